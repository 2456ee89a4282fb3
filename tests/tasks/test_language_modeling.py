"""DNA language modelling: masking, weights, length warm-up, evaluation against a by-hand score, every preset."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from cli import load_config, presets
from data_prep.genome import prepare_genome
from seqlab import report
from seqlab.dataset import TokenStore
from seqlab.errors import UserError
from seqlab.markov import fit as fit_markov
from seqlab.tokenizers import nucleotide
from seqlab.training.fit import fit
from tasks.dna import write_report
from tasks.language_modeling import (
    DnaConfig,
    EvalConfig,
    LanguageModeling,
    MaskingConfig,
    build_dna_model,
    evaluate,
    evaluation_mask,
    hidden_in_evaluation,
    mask_tokens,
)

BASES = np.array(nucleotide.BASES, np.uint8)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    """Two sequences with a soft-masked stretch, N and an ambiguous base, in blocks of 256."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("genome")
    bases = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, 12_000)].tobytes().decode()
    one = bases[:7000]
    one = one[:500] + one[500:900].lower() + one[900:2000] + "N" * 40 + one[2040:2300] + "R" + one[2301:]
    (folder / "g.fa").write_text(f">one\n{one}\n>two\n{bases[7000:]}\n")
    return TokenStore.open(prepare_genome([folder / "g.fa"], folder / "data", block=256))


def config(**changes) -> DnaConfig:
    """A toy run; `changes` as dotted keys with __ for the dot."""
    sets = {"model.d_model": 16, "model.n_layer": 1, "model.d_state": 4, "data.context": 64}
    sets |= {"train.tokens_per_step": 512, "train.max_steps": 20, "train.accelerator": "cpu"}
    sets |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(DnaConfig, "dna_small", [f"{k}={v}" for k, v in sets.items()], {})


# -- masking -------------------------------------------------------------------------------------------------------
def test_masking_follows_15_80_10_10_among_bases_only():
    rng = np.random.default_rng(1)
    tokens = BASES[rng.integers(0, 4, (400, 1000))]
    tokens[:, ::50] = nucleotide.N
    ids, chosen = mask_tokens(tokens, MaskingConfig(), rng)
    assert not chosen[:, ::50].any() and (ids[~chosen] == tokens[~chosen]).all()
    base = tokens != nucleotide.N
    assert chosen[base].mean() == pytest.approx(0.15, abs=0.003)
    masked = ids[chosen] == nucleotide.MASK
    changed = (ids[chosen] != tokens[chosen]) & ~masked
    assert masked.mean() == pytest.approx(0.80, abs=0.01)
    assert changed.mean() == pytest.approx(0.10 * 3 / 4, abs=0.005)  # a quarter of the replacements is the base itself
    assert set(np.unique(ids[chosen])) == {nucleotide.MASK, *nucleotide.BASES}


def test_the_published_masking_replaces_from_the_whole_vocabulary_anywhere():
    rng = np.random.default_rng(1)
    tokens = np.full((200, 1000), nucleotide.N, np.uint8)
    ids, chosen = mask_tokens(tokens, MaskingConfig(replacements="vocabulary"), rng)
    assert chosen.mean() == pytest.approx(0.15, abs=0.005)
    assert set(np.unique(ids[chosen])) == set(range(12))


def test_the_evaluation_mask_is_a_fixed_function_of_the_position():
    whole = evaluation_mask(np.array([1000]), 5000, 0.15)[0]
    assert whole.mean() == pytest.approx(0.15, abs=0.02)
    parts = evaluation_mask(np.array([1000, 1700]), 700, 0.15)
    assert (parts.reshape(-1) == whole[:1400]).all()


# -- batches -------------------------------------------------------------------------------------------------------
def test_causal_batches_hold_the_next_base_and_score_bases_only(store):
    task = LanguageModeling(config(), store)
    seen = set()
    for step in range(40):
        (batch,) = task.train_batches(step, 0, 1)
        assert batch["ids"].shape == batch["target"].shape == (8, 64)
        assert torch.equal(batch["ids"][:, 1:], batch["target"][:, :-1])
        is_base = (batch["target"] >= 7) & (batch["target"] <= 10)
        assert torch.equal(batch["weight"] > 0, is_base)
        seen |= set(batch["target"][~is_base].tolist())
    assert seen == {nucleotide.N, nucleotide.UNK}, "the unscored ones do occur"


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_soft_masked_bases_get_their_weight_on_either_strand(store, weight):
    task = LanguageModeling(config(data__soft_mask_weight=weight, model__strand="augment"), store)
    found = {}
    for step in range(60):
        sampled = task._sampler(64, 0, 1).batch(step)
        (batch,) = task.train_batches(step, 0, 1)
        for row in range(8):
            start = int(sampled["start"][row])
            soft = store.soft_mask(start, start + 65)
            soft = soft[::-1] if sampled["reverse"][row] else soft
            is_base = ((batch["target"][row] >= 7) & (batch["target"][row] <= 10)).numpy()
            expected = np.where(soft[1:], weight, 1.0) * is_base
            assert np.allclose(batch["weight"][row], expected)
            found[bool(sampled["reverse"][row]), bool(soft.any())] = True
    assert len(found) == 4, "both strands, with and without soft-masked bases, were seen"


def test_masked_batches_are_a_function_of_the_step(store):
    task, again = (LanguageModeling(config(model__direction="bidirectional"), store) for _ in range(2))
    for step in (3, 0, 7):
        a, b = task.train_batches(step, 0, 1)[0], again.train_batches(step, 0, 1)[0]
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(task.train_batches(1, 0, 1)[0]["ids"], task.train_batches(2, 0, 1)[0]["ids"])


def test_micro_batches_hold_the_same_rows(store):
    whole = LanguageModeling(config(), store).train_batches(5, 0, 1)
    parts = LanguageModeling(config(train__micro_batch_tokens=130), store).train_batches(5, 0, 1)
    assert len(whole) == 1 and [len(p["ids"]) for p in parts] == [2, 2, 2, 2]
    assert torch.equal(torch.cat([p["ids"] for p in parts]), whole[0]["ids"])


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_rows_and_their_masks_are_the_same_for_any_number_of_ranks(store, direction):
    task = LanguageModeling(config(model__direction=direction), store)
    whole = task.train_batches(5, 0, 1)[0]
    shared = [task.train_batches(5, rank, 4)[0] for rank in range(4)]
    for key in whole:
        assert torch.equal(torch.cat([part[key] for part in shared]), whole[key]), key


def test_length_warmup_doubles_the_context_with_the_tokens_held(store):
    run = config(data__context=256, data__length_warmup_start=64, data__length_warmup=0.5, train__tokens_per_step=512)
    task = LanguageModeling(run, store)
    contexts = [task.context_at(step) for step in range(20)]
    assert contexts == [64] * 5 + [128] * 5 + [256] * 10
    for step in (0, 5, 19):
        assert task.train_batches(step, 0, 1)[0]["ids"].numel() == 512


def test_no_base_of_validation_or_test_is_trained_on(store):
    trained = np.zeros(store.total, bool)
    for direction in ("causal", "bidirectional"):
        task = LanguageModeling(config(model__direction=direction), store)
        for step in range(200):
            sampled = task._sampler(64, 0, 1).batch(step)
            for start in sampled["start"]:
                trained[start : start + sampled["tokens"].shape[1]] = True
    for split in ("valid", "test"):
        for start, end in store.intervals(split):
            assert not trained[start:end].any()
    inside = np.concatenate([trained[start:end] for start, end in store.intervals("train")])
    assert inside.mean() > 0.9


def test_a_context_longer_than_any_interval_says_what_would_fit(store):
    with pytest.raises(UserError, match="use a context of"):
        LanguageModeling(config(data__context=100_000, train__tokens_per_step=100_000), store)


# -- evaluation ----------------------------------------------------------------------------------------------------
def by_hand(model, store, context):
    """Mean bits of the test split, one base at a time, from the definition: windows of `context`, no batches."""
    bits = []
    for start, end in store.intervals("test").tolist():
        for target in range(start + 1, end):
            begin = start + (target - start - 1) // context * context
            token = int(store.tokens[target])
            if not 7 <= token <= 10:
                continue
            ids = torch.from_numpy(store.tokens[begin:target].copy())[None]
            with torch.no_grad():
                logits = model(ids, return_state=False)[0][0, -1, 7:11]
            bits.append(-logits.log_softmax(-1)[token - 7].item() / math.log(2))
    return bits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TokenStore:
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(5)
    text = "".join("ACGT"[i] for i in rng.integers(0, 4, 700))
    text = text[:570] + "NNn" + text[573:600].lower() + text[600:]
    (folder / "g.fa").write_text(f">s\n{text}\n")
    (folder / "s.bed").write_text("s\t0\t500\ttrain\ns\t500\t550\tvalid\ns\t550\t700\ttest\n")
    return TokenStore.open(prepare_genome([folder / "g.fa"], folder / "data", splits=folder / "s.bed"))


def trained_like(run: DnaConfig, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build_dna_model(run.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    return model


def test_causal_evaluation_equals_the_definition(tiny):
    run = config()
    model = trained_like(run)
    result = evaluate(model, run, tiny, fit_markov(tiny, "train", max_order=4), contexts=[16, 50, 149])
    for context, score in result.contexts.items():
        bits = by_hand(model, tiny, context)
        assert score.bases == len(bits) == result.bases
        assert score.bits == pytest.approx(np.mean(bits), abs=1e-5), context
    assert result.not_scored == 3 and result.soft_masked == 27
    assert set(result.markov) == set(range(5)) and all(s.bases == result.bases for s in result.markov.values())
    some = next(iter(result.contexts.values()))
    whole = (some.bits_soft_masked * 27 + some.bits_other * (result.bases - 27)) / result.bases
    assert some.bits == pytest.approx(whole, abs=1e-9)


def test_streamed_evaluation_equals_evaluation_at_once(store, monkeypatch):
    from tasks import language_modeling

    run = config()
    model, markov = trained_like(run), fit_markov(store, "train", max_order=2)
    whole = evaluate(model, run, store, markov, contexts=[255])
    original = language_modeling._Scorer.__init__

    def small(self, *arguments):
        original(self, *arguments)
        self.tokens_at_once = 37

    monkeypatch.setattr(language_modeling._Scorer, "__init__", small)
    pieces = evaluate(model, run, store, markov, contexts=[255])
    assert pieces.contexts[255].bits == pytest.approx(whole.contexts[255].bits, abs=1e-5)


@pytest.mark.parametrize("strand", ["single", "augment", "equivariant"])
def test_masked_evaluation_scores_the_same_bases_at_every_context(store, strand):
    run = config(model__direction="bidirectional", model__strand=strand)
    model = trained_like(run)
    result = evaluate(model, run, store, fit_markov(store, "train", max_order=2), contexts=[64, 100, 256])
    scored = {score.bases for score in result.contexts.values()}
    assert scored == {result.bases}
    total = sum(end - start for start, end in store.intervals("test").tolist())
    assert result.bases == pytest.approx(0.15 * total, rel=0.25)
    assert list(result.both_sides) == [1] and result.both_sides[1].bases == result.bases


def test_a_masked_model_is_measured_against_what_sees_both_sides(tmp_path):
    """A base that its two neighbours tell, and the one before does not: what comes before wins nothing there."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 4, (4000, 2))
    text = "".join("ACGT"[a] + "ACGT"[(a + b) % 4] + "ACGT"[b] for a, b in pairs)
    (tmp_path / "g.fa").write_text(f">s\n{text}\n")
    store = TokenStore.open(prepare_genome([tmp_path / "g.fa"], tmp_path / "data"))
    run = config(model__direction="bidirectional")
    markov = fit_markov(store, "train", max_order=4, both_strands=False, hidden=hidden_in_evaluation(run.masking))
    result = evaluate(trained_like(run), run, store, markov, contexts=[128])
    assert list(result.both_sides) == [1, 2]
    assert min(score.bits for score in result.both_sides.values()) < min(score.bits for score in result.markov.values()) - 0.02
    best = result.best_baseline
    assert best.kind == "both sides" and best.score is result.both_sides[best.order]
    assert best.name == f"both sides, {best.order} base{'s' * (best.order > 1)} each"
    assert f"Counts of k-mers win ({best.name})" in report.evaluation_verdict(result)
    assert [f"{best.name} (best)" in row for row, *_ in report.evaluation_rows(result)[1]].count(True) == 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "metrics.csv").write_text("step\n")
    written = write_report(tmp_path / "run", result)
    assert written.name == "report.md" and f"Counts of k-mers win ({best.name})" in written.read_text()
    causal = evaluate(trained_like(config()), config(), store, markov, contexts=[128])
    best = causal.best_baseline
    assert causal.both_sides == {} and best.kind == "markov" and best.score is causal.markov[best.order]
    better = dataclasses.replace(causal, contexts={128: dataclasses.replace(best.score, bits=best.score.bits - 0.5)})
    for evaluation, told in ((causal, "The Markov model of order {} wins: "), (better, "0.5000 fewer than the best Markov model (order {}, ")):
        assert told.format(best.order) in report.evaluation_verdict(evaluation)
    assert [row for row, *_ in report.evaluation_rows(causal)[1]].count(f"Markov order {best.order} (best)") == 1


def test_evaluation_refuses_what_it_cannot_do(store):
    run, markov = config(), fit_markov(store, "train", max_order=1)
    with pytest.raises(UserError, match="the longest stretch of the test split holds"):
        evaluate(trained_like(run), run, store, markov, contexts=[100_000])


def test_max_bases_thins_evenly_and_the_baselines_with_it(store):
    run = dataclasses.replace(config(), eval=EvalConfig(max_bases=300, contexts=(100,)))
    result = evaluate(trained_like(run), run, store, fit_markov(store, "train", max_order=1))
    assert result.bases <= 300 and all(s.bases == result.bases for s in result.markov.values())


# -- wiring --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", presets("dna"))
def test_every_preset_builds_at_toy_size_and_takes_a_step(name, store, tmp_path):
    toy = ["model.d_model=16", "model.n_layer=2", "data.context=64", "train.tokens_per_step=256", "train.max_steps=2"]
    toy += ["train.micro_batch_tokens=128", "train.validation_tokens=256", "train.accelerator=cpu"]
    if load_config(DnaConfig, name, [], {}).data.length_warmup_start is not None:
        toy.append("data.length_warmup_start=16")
    run = load_config(DnaConfig, name, toy, {})
    result = fit(LanguageModeling(run, store), run.optim, run.train, tmp_path)
    assert result.steps == 2 and 1.0 < result.best < 4.0


def test_one_batch_can_be_learnt_by_heart(store, tmp_path):
    run = config(train__max_steps=150, train__validate_every=150, model__dropout=0, model__d_model=32, optim__weight_decay=0)

    class OneBatch(LanguageModeling):
        def train_batches(self, step, rank, world_size):
            return super().train_batches(0, rank, world_size)

    fit(OneBatch(run, store), run.optim, run.train, tmp_path)
    from seqlab.training.callbacks import read_history

    rows = [r["bits"] for r in read_history(tmp_path / "metrics.csv") if not math.isnan(r["bits"])]
    assert rows[-1] < 0.8 < 1.9 < rows[0]


# -- whole sequences -----------------------------------------------------------------------------------------------
def test_whole_sequences_are_trained_on_in_pieces_and_held_out_bases_stay_unread(store, tmp_path):
    settings = config(data__context="whole", data__length_warmup_start=64, train__memory="chunked", train__chunk_tokens=501)
    task = LanguageModeling(settings, store)
    assert task.context == 6999 and task.context_at(0) == 64 and task.context_at(19) == 6999
    train = np.zeros(store.total, bool)
    for start, end in store.intervals("train"):
        train[start:end] = True
    lengths = set()
    for step in range(15, 19):
        for batch in task.train_batches(step, 0, 1):
            lengths.add(batch["ids"].shape[1])
            start, n = int(batch["start"][0]), batch["ids"].shape[1] + 1
            bases = store.tokens[start : start + n]
            open_ = np.where(train[start : start + n], bases, nucleotide.N)
            if not np.array_equal(batch["ids"][0].numpy(), open_[:-1]):  # the other strand
                open_ = nucleotide.COMPLEMENT[open_[::-1]]
            assert np.array_equal(batch["ids"][0].numpy(), open_[:-1])
            assert np.array_equal(batch["weight"][0].numpy() > 0, np.isin(open_[1:], BASES))
    assert lengths == {6999, 4999}
    result = fit(task, settings.optim, settings.train, tmp_path / "run")
    assert result.steps == 20 and result.best < 2.1


def test_length_warm_up_of_the_paper_is_two_epochs_a_stage():
    """hg38_1m: two epochs (34,021 segments of 2^17) at each power of two from 2^10, tokens a step constant."""
    settings = load_config(DnaConfig, "hg38_1m", [], {})
    task = object.__new__(LanguageModeling)
    task.config, task.context, task._longest_window = settings, settings.data.context, settings.data.context
    contexts = [task.context_at(step) for step in range(settings.train.max_steps)]
    counts = {context: contexts.count(context) for context in sorted(set(contexts))}
    assert list(counts) == [2**k for k in range(10, 21)]
    two_epochs = 2 * 34_021 * 2**17 / settings.train.tokens_per_step
    assert all(abs(n - two_epochs) < 1 for n in list(counts.values())[:-1])
    assert all(settings.train.tokens_per_step % context == 0 for context in counts)
