"""Audio modelling: windows and their one-step delay, augmentation, classes, evaluation by hand, presets."""

import dataclasses
import math

import numpy as np
import pytest
import soundfile
import torch

from cli import load_config, presets
from data_prep.audio import prepare_audio
from seqlab.dataset import CoveringSampler, TokenStore
from seqlab.errors import UserError
from seqlab.tokenizers.waveform import QUANTIZERS
from seqlab.training.fit import fit
from tasks import audio, runs
from tasks.audio import AudioModeling, group_by_length, read_windows, spans_of, thin_spans

RATE = 8000


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    """Thirty tones of two classes, 150 to 730 samples long."""
    folder = tmp_path_factory.mktemp("tones")
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        t = np.arange(150 + 20 * i) / RATE
        x = 0.4 * np.sin(2 * np.pi * (300 if i % 2 else 900) * t + rng.uniform(0, 6)) + 0.01 * rng.standard_normal(len(t))
        soundfile.write(folder / "in" / f"{'low' if i % 2 else 'high'}_{i:02d}.wav", x, RATE)
    return TokenStore.open(prepare_audio(folder / "in", folder / "data", sample_rate=RATE, label_from="name"))


def config(*sets: str) -> audio.AudioConfig:
    base = ["model.d_model=16", "model.n_layer=1", "model.d_state=4", "data.context=256", "train.tokens_per_step=1000"]
    base += ["train.max_steps=20", "train.accelerator=cpu", "train.max_minutes=null", "eval.max_samples=null"]
    base += ["model.prediction_order=0", "train.micro_batch_tokens=null"]
    return load_config(audio.Config, "audio_fsdd", [*base, *sets], {})


PLAIN = ("data.gain_db=0", "data.speed=0", "data.end_silence=0", "data.class_dropout=0")


# -- windows -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("context", [64, 256, 700, 5000])
def test_an_epoch_covers_every_sample_once_and_no_window_leaves_its_recording(store, context):
    sampler = CoveringSampler(store, "train", context, 1000, seed=3)
    intervals = store.intervals("train")
    for epoch in range(3):
        seen = np.zeros(store.total, int)
        number = [epoch * sampler.windows, (epoch + 1) * sampler.windows]
        steps = range(number[0] // sampler.rows, -(-number[1] // sampler.rows))
        rows = np.concatenate([sampler.bounds(step) for step in steps])
        rows = rows[number[0] - steps[0] * sampler.rows :][: sampler.windows]
        for start, end, begin in rows:
            assert 0 < end - start <= context
            i = np.searchsorted(intervals[:, 0], start, side="right") - 1
            assert begin == intervals[i, 0] <= start and end <= intervals[i, 1]
            seen[start:end] += 1
        expected = np.zeros(store.total, int)
        for s, e in intervals:
            expected[s:e] = 1
        np.testing.assert_array_equal(seen, expected)


def test_windows_do_not_depend_on_the_number_of_ranks(store):
    whole = CoveringSampler(store, "train", 256, 2000, seed=1, world_size=1)
    halves = [CoveringSampler(store, "train", 256, 2000, seed=1, rank=r, world_size=2) for r in range(2)]
    assert whole.rows == halves[0].rows and whole.rows % 2 == 0
    for step in (0, 1, 5):
        np.testing.assert_array_equal(whole.bounds(step), np.concatenate([h.bounds(step) for h in halves]))
    assert not np.array_equal(whole.bounds(0), CoveringSampler(store, "train", 256, 2000, seed=2).bounds(0))


def test_inputs_are_the_targets_one_sample_late(store):
    start, end = store.intervals("train")[5].tolist()
    bounds = np.array([(start, start + 50, start), (start + 20, start + 50, start), (start + 10, end, start)])
    ids, target, weight = read_windows(store, bounds, 128)
    codes = store.tokens[start:end]
    assert ids[0, 0] == 128 and (ids[0, 1:50] == codes[:49]).all() and (target[0, :50] == codes[:50]).all()
    assert ids[1, 0] == codes[19] and (target[1, :30] == codes[20:50]).all()
    assert weight.sum(1).tolist() == [50, 30, end - start - 10]
    assert (target[0, 50:] == 128).all() and (ids[0, 50:] == 128).all()


def test_silence_after_the_end_of_a_recording_only(store):
    start, end = store.intervals("train")[5].tolist()
    task = AudioModeling(config(*PLAIN), store)
    batch = task.batch(np.array([(start, end, start), (start, end - 7, start)]), end_silence=9)
    n = end - start
    assert batch["weight"][0, n : n + 9].unique().tolist() == [pytest.approx(audio.SILENCE_WEIGHT)]
    assert (batch["target"][0, n:] == 128).all() and batch["ids"][0, n] == int(store.tokens[end - 1])
    assert batch["weight"][1].sum() == n - 7 and task.tokens(batch) == 2 * n - 7


def test_batches_are_pure_functions_of_the_step_and_groups_fit_the_budget(store):
    one, other = (AudioModeling(config("train.micro_batch_tokens=600"), store) for _ in range(2))
    for step in (0, 7):
        for a, b in zip(one.train_batches(step, 0, 1), other.train_batches(step, 0, 1), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
    other.prefetch = True  # made ahead in a thread, in order and out of order
    for step in (0, 1, 2, 7, 8, 3):
        for a, b in zip(one.train_batches(step, 0, 1), other.train_batches(step, 0, 1), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
    lengths = np.array([5, 100, 30, 30, 90, 2])
    groups = group_by_length(lengths, 100)
    assert sorted(np.concatenate(groups).tolist()) == list(range(6))
    assert all(len(g) == 1 or len(g) * lengths[g].max() <= 100 for g in groups)
    assert [g.tolist() for g in group_by_length(lengths, None)] == [[1, 4, 2, 3, 0, 5]]


def test_batches_of_a_few_layouts_have_the_same_loss(store):
    tight, wide = (AudioModeling(config("data.end_silence=0.01", *PLAIN), store) for _ in range(2))
    wide.multiple = 64
    model = tight.build_model().eval()
    layouts = [set(), set()]
    for step in range(12):
        for a, b in zip(tight.train_batches(step, 0, 1), wide.train_batches(step, 0, 1), strict=True):
            assert b["ids"].shape[1] % 64 == 0 and 0 <= b["ids"].shape[1] - a["ids"].shape[1] < 64
            assert tight.tokens(a) == wide.tokens(b) and torch.equal(a["start"], b["start"])
            if step < 3:
                with torch.no_grad():
                    (loss, weight), (other, same) = tight.loss(model, a), wide.loss(model, b)
                torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-3)
                assert weight == same
            for seen, batch in zip(layouts, (a, b)):
                seen.add(tuple(batch["ids"].shape))
    assert len(layouts[1]) < len(layouts[0])


def test_augmentation_plays_louder_and_faster(store):
    start, end = max(store.intervals("train").tolist(), key=lambda row: row[1] - row[0])
    task = AudioModeling(config("data.gain_db=6", "data.speed=0.2"), store)
    augment = task._augmenter(np.random.default_rng(0))
    q, codes = QUANTIZERS["mulaw-256"], store.tokens[start:end]
    levels, lengths = [], []
    for _ in range(40):
        got = augment(codes)
        levels.append(20 * np.log10(q.decode(got).std() / q.decode(codes).std()))
        lengths.append(len(codes) / len(got))
    assert -6.3 < min(levels) < -4 and 4 < max(levels) < 6.3
    assert 0.79 < min(lengths) < 0.87 and 1.13 < max(lengths) < 1.21
    loud = q.encode(0.9 * np.sin(np.arange(400) / 3))
    peaks = [np.abs(q.decode(task._augmenter(np.random.default_rng(i))(loud))).max() for i in range(40)]
    assert max(peaks) < 1.0 and max(peaks) > 0.93, "louder, but never clipped"
    full = q.encode(np.sin(np.arange(400) / 3))  # leaves no headroom
    faster = AudioModeling(config("data.gain_db=0", "data.speed=0.2"), store)._augmenter(np.random.default_rng(0))
    assert all(np.abs(q.decode(faster(full))).max() < 1.0 for _ in range(20))
    assert AudioModeling(config(*PLAIN), store)._augmenter(None) is None


def test_classes_come_from_the_manifest_and_some_are_hidden(store):
    task = AudioModeling(config("data.class_dropout=0.5"), store)
    assert task.config.sound.labels == ("high", "low") and task.config.model.n_classes == 3
    seen = np.concatenate([b["classes"].numpy() for step in range(60) for b in task.train_batches(step, 0, 1)])
    assert 0.4 < (seen == 2).mean() < 0.6 and set(seen) == {0, 1, 2}
    plain = AudioModeling(config(*PLAIN), store)
    for batch in plain.train_batches(0, 0, 1):
        for s, c in zip(batch["start"].tolist(), batch["classes"].tolist()):
            assert store.locate(s)[0].startswith(("high", "low")[c])
    assert "classes" not in AudioModeling(config("data.classes=none"), store).train_batches(0, 0, 1)[0]
    assert "sample" in task.describe(task.train_batches(0, 0, 1)[0])


# -- evaluation ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> runs.LoadedRun:
    folder = tmp_path_factory.mktemp("run") / "r"
    audio.train(config("train.validate_every=10"), store.directory, folder)
    return runs.load_run(folder)


def test_scores_by_context_equal_a_plain_loop(store, run):
    evaluation = audio.evaluate_run(run, store, store, contexts=(8, 100, 400), device="cpu")  # each divides the next: same cuts
    unknown = torch.tensor([run.config.sound.unknown])
    for context, score in evaluation.contexts.items():
        nats, n = 0.0, 0
        for start, end in store.intervals("test").tolist():
            codes = np.concatenate([[128], store.tokens[start:end]]).astype(np.int64)
            for at in range(0, end - start, context):
                piece = torch.from_numpy(codes[at : at + context + 1])[None]
                with torch.no_grad():
                    logits, _ = run.model(piece[:, :-1], classes=unknown)
                nats += torch.nn.functional.cross_entropy(logits[0].double(), piece[0, 1:], reduction="sum").item()
                n += piece.shape[1] - 1
        assert score.samples == n == evaluation.samples
        assert score.bits == pytest.approx(nats / n / math.log(2), abs=2e-5)
        assert score.nats == pytest.approx(nats / n, abs=2e-5)
    assert {s.samples for s in evaluation.baselines.values()} == {evaluation.samples}
    *counted, linear = evaluation.baselines
    assert counted == ["unigram", "Markov order 1", "Markov order 2"] and linear.startswith("adaptive linear, order")
    assert evaluation.with_class.samples == evaluation.samples and evaluation.with_class.bits != evaluation.contexts[400].bits


def test_streaming_a_long_window_changes_nothing(store, run):
    scorer = audio.Scorer(run.model, run.config, store, "cpu")
    spans = spans_of(store, "test", 400)
    whole = sum(nats for nats, _ in scorer.run(spans, 400))
    scorer.tokens_at_once = 53
    assert sum(nats for nats, _ in scorer.run(spans, 400)) == pytest.approx(whole, rel=1e-5)


def test_spans_cover_a_split_and_thin_evenly(store):
    spans = spans_of(store, "train", 100)
    assert (spans[:, 1] - spans[:, 0]).max() <= 100
    assert (spans[:, 1] - spans[:, 0]).sum() == sum(e - s for s, e in store.intervals("train"))
    some = thin_spans(spans, 1000)
    assert 500 < (some[:, 1] - some[:, 0]).sum() < 1500 and some[-1, 0] > spans[len(spans) // 2, 0]


def test_a_run_learns_and_is_below_the_unigram(store, run):
    evaluation = audio.evaluate_run(run, store, store, device="cpu")
    assert evaluation.best[1].bits < 8
    text = audio.write_report(run.directory, evaluation).read_text()
    assert "bits/sample" in text and "adaptive linear" in text and (run.directory / "plots" / "evaluation.png").is_file()


def test_one_batch_is_overfitted(store, tmp_path):
    c = config(*PLAIN, "optim.lr=2e-2", "optim.warmup=0.1", "train.max_steps=150", "model.dropout=0", "train.ema_decay=0",
               "train.tokens_per_step=500", "train.validate_every=150", "train.log_every=149")  # fmt: skip

    class OneBatch(AudioModeling):
        def train_batches(self, step, rank, world_size):
            return super().train_batches(0, rank, world_size)

    fit(OneBatch(c, store), c.optim, c.train, tmp_path)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    first, last = (float(row.split(",")[4]) for row in (rows[1], rows[2]))
    assert first > 7.5 and last < 3.5, (first, last)


def test_stopped_and_resumed_equals_uninterrupted(store, tmp_path):
    from safetensors.torch import load_file

    sets = ("train.validate_every=3", "data.gain_db=3", "data.speed=0.1")
    audio.train(config(*sets, "train.max_steps=12"), store.directory, tmp_path / "whole")

    class Pulled(AudioModeling):
        def train_batches(self, step, rank, world_size):
            if step == 8:
                raise RuntimeError("pulled the plug")
            return super().train_batches(step, rank, world_size)

    c = config(*sets, "train.max_steps=12")
    with pytest.raises(RuntimeError, match="pulled"):
        runs.train(Pulled(c, store), tmp_path / "cut", store.directory, store.hash)
    resumed = load_config(audio.Config, str(tmp_path / "cut" / "config.yaml"), [], {})
    audio.train(resumed, store.directory, tmp_path / "cut", resume=True)
    one, other = (load_file(tmp_path / name / "checkpoints/last/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_does_not_fit(store, run, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 4000), 16000)
    other = TokenStore.open(prepare_audio(tmp_path / "a.wav", tmp_path / "d", sample_rate=16000))
    with pytest.raises(UserError, match="--sample-rate 8000 --quantizer mulaw-256"):
        audio.evaluate_run(run, other, store, device="cpu")
    with pytest.raises(UserError, match="other sample rate"):
        AudioModeling(run.config, other)
    with pytest.raises(UserError, match="the longest stretch"):
        audio.evaluate_run(run, store, store, contexts=(9999,), device="cpu")
    for sets, message in (
        (["model.vocab_size=64"], "256 codes"),
        (["model.strand=augment"], "one direction"),
        (["data.context=1"], "context: must be 2"),
        (["data.class_dropout=2"], "class_dropout"),
        (["data.speed=0.9"], "speed"),
    ):
        with pytest.raises(UserError, match=message):
            config(*sets)


# -- presets -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, published", [("sc09_6m", 6.1e6), ("sc09_24m", 24.3e6), ("youtubemix_1m", 3.5e6)])
def test_presets_have_the_published_numbers_of_parameters(name, published):
    model = audio.build_model(load_config(audio.Config, name, [], {}))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("name", presets("audio"))
def test_every_preset_takes_a_step_at_toy_size(name, store, tmp_path):
    toy = ["model.d_model=8", "model.n_layer=1", "model.d_state=2", "data.context=128", "train.tokens_per_step=256"]
    toy += ["train.max_steps=1", "train.accelerator=cpu", "train.validation_tokens=200", "train.micro_batch_tokens=null"]
    c = load_config(audio.Config, name, toy, {})
    result = audio.train(c, store.directory, tmp_path / name)
    assert result.steps == 1 and math.isfinite(result.best)
    assert dataclasses.asdict(runs.load_run(tmp_path / name).config)["sound"]["sample_rate"] == RATE


@pytest.mark.parametrize("order", [0, 8])
def test_windows_in_pieces_have_the_same_gradient(store, order):
    from seqlab.training import memory
    from seqlab.training.memory import Memory

    task = AudioModeling(config(f"model.prediction_order={order}"), store)
    torch.manual_seed(0)
    model, batch = task.build_model().eval(), task.train_batches(0, 0, 1)[0]  # no dropout

    def gradients(setting):
        model.zero_grad(set_to_none=True)
        memory.backward(setting, model, task, batch, 1.0)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert batch["ids"].shape[1] > 29
    plain, pieces = gradients(Memory()), gradients(Memory("chunked", 29))
    for name, gradient in plain.items():
        assert (pieces[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
