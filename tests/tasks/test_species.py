"""The species task and its commands: lengths, losses, toy training that beats chance, evaluation, prediction, bad input."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli import app, load_config, presets
from data_prep.species import Source, prepare_species
from seqlab import report
from seqlab.dataset import TokenStore
from seqlab.errors import UserError
from seqlab.heads.homology import scale_of
from seqlab.tokenizers import nucleotide
from seqlab.training.module import step_seed
from tasks import runs, species

TOY = ["--set", "model.d_model=16", "--set", "model.n_layer=1", "--set", "model.d_state=4", "--context", 128]
TOY += ["--set", "model.homology=0", "--set", "model.composition=0", "--set", "data.min_context=64", "--set", "train.tokens_per_step=2048", "--set", "train.accelerator=cpu"]
QUICK = ["--set", "train.validation_tokens=2000", "--set", "eval.windows_per_class=12", "--set", "eval.lengths=[64,128]"]
QUICK += ["--set", "eval.max_k=2", "--set", "eval.baseline_windows=40", "--set", "eval.baselines=[k-mers]"]


def run(*arguments, code=0):
    """Invoke the command; (stdout, stderr). One line of error and no traceback where code is 1."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{arguments}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
    if code == 1:
        assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1, result.stderr
        assert "Traceback" not in result.stderr and "unexpected" not in result.stderr, result.stderr
    return result.stdout, result.stderr


def error_of(*arguments):
    return next(line for line in run(*arguments, code=1)[1].splitlines() if line.startswith("error: "))


def genome(path, length, gc, seed, name="chr"):
    rng = np.random.default_rng(seed)
    letters = rng.choice(np.frombuffer(b"ACGT", np.uint8), length, p=[(1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2])
    path.write_text(f">{name}\n{letters.tobytes().decode()}\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three species that differ in their share of G and C; prepared by the command."""
    folder = tmp_path_factory.mktemp("species")
    pairs = [f"{name}={genome(folder / f'{name}.fa', 8000, gc, seed)}" for seed, (name, gc) in enumerate({"lo": 0.2, "mid": 0.5, "hi": 0.8}.items())]
    stdout, stderr = run("prep", "species", *pairs, "--out", folder / "data", "--block", 300)
    assert "hi" in stdout and "train species --data" in stderr
    return folder / "data"


@pytest.fixture(scope="module")
def trained(data):
    """Trained by the command, enough to tell the three apart."""
    out = data.parent / "run"
    run("train", "species", "--data", data, "--out", out, "--max-steps", 60, "--set", "optim.lr=0.01", *TOY, *QUICK)
    return out


def toy_config(**data):
    return species.Config(
        classes=("hi", "lo", "mid"),
        model=species.ClassifierConfig(d_model=16, n_layer=1, d_state=4),
        data=species.DataConfig(**{"context": 256, "min_context": 64} | data),
        train=species.TrainConfig(tokens_per_step=1024, max_steps=100),
    )


def test_every_preset_builds_a_step(data):
    store = TokenStore.open(data)
    for name in presets("species"):
        small = ["model.d_model=16", "model.n_layer=1", "data.context=128", "data.min_context=64", "train.tokens_per_step=256"]
        config = load_config(species.Config, name, small, {})
        task = species.SpeciesTask(config, store)
        model = task.build_model()
        (batch, *_) = task.train_batches(0, 0, 1)
        loss, weight = task.loss(model, batch)
        loss.backward()
        assert torch.isfinite(loss) and weight == len(batch["label"])


def test_lengths_halve_and_warm_up(data):
    store = TokenStore.open(data)
    task = species.SpeciesTask(toy_config(), store)
    seen = [task.length_at(step) for step in range(300)]
    assert set(seen) == {64, 128, 256}
    assert all(seen.count(length) > 70 for length in (64, 128, 256))
    for step in range(5):
        (batch,) = task.train_batches(step, 0, 1)
        assert batch["ids"].shape == (1024 // seen[step], seen[step])
    warm = species.SpeciesTask(toy_config(length_warmup_start=64, length_warmup=0.5), store)
    assert [warm.longest_at(step) for step in (0, 24, 25, 49, 50, 99)] == [64, 64, 128, 128, 256, 256]
    alone = species.SpeciesTask(toy_config(min_context=None, windows_per_step=3), store)
    assert alone.train_batches(0, 0, 1)[0]["ids"].shape == (3, 256)


def test_ranks_and_micro_batches_see_the_rows_of_one_step(data):
    config = toy_config()
    config = dataclasses.replace(config, loss=species.LossConfig(substitutions=0.3))
    store = TokenStore.open(data)
    (whole,) = species.SpeciesTask(config, store).train_batches(3, 0, 1)
    halves = [species.SpeciesTask(config, store).train_batches(3, rank, 2)[0] for rank in (0, 1)]
    assert torch.equal(whole["ids"], torch.cat([half["ids"] for half in halves]))
    micro = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_tokens=512))
    parts = species.SpeciesTask(micro, store).train_batches(3, 0, 1)
    assert len(parts) == 2 and torch.equal(whole["ids"], torch.cat([part["ids"] for part in parts]))
    (plain,) = species.SpeciesTask(toy_config(), store).train_batches(3, 0, 1)
    changed = (plain["ids"] != whole["ids"]).float().mean(1)
    assert changed.max() < 0.3 * 0.75 + 0.1 and changed.unique().numel() > 1
    shares = [(species.SpeciesTask(config, store).train_batches(s, 0, 1)[0]["ids"] != species.SpeciesTask(toy_config(), store).train_batches(s, 0, 1)[0]["ids"]).float().mean().item() for s in range(20)]
    assert np.mean(shares) == pytest.approx(0.15 * 0.75, abs=0.02)  # a quarter of the substitutes are the same base


def test_the_loss_asks_every_segment(data):
    store = TokenStore.open(data)
    task = species.SpeciesTask(toy_config(), store)
    assert task.ask == "segments"
    model = task.build_model().train()
    batch = next(b for step in range(20) for b in task.train_batches(step, 0, 1) if b["ids"].shape[1] == 256)
    features = model.features(batch["ids"]).value
    levels = []
    for size in (64, 128, 256):
        parts = [features[:, at : at + size] for at in range(0, 256, size)]
        nats = [torch.nn.functional.cross_entropy(model.head(model.head.pool(part)), batch["label"], reduction="sum") for part in parts]
        levels.append(torch.stack(nats).mean())
    loss, weight = task.loss(model, batch)
    assert torch.allclose(loss, torch.stack(levels).mean(), rtol=1e-4) and weight == 4


def test_the_loss_is_the_mean_over_prefixes_and_adds_the_language_model(data):
    store = TokenStore.open(data)
    base = dataclasses.replace(toy_config(min_context=64), loss=species.LossConfig(ask="prefixes"))
    torch.manual_seed(0)
    task = species.SpeciesTask(base, store)
    model = task.build_model()
    batch = next(b for step in range(20) for b in task.train_batches(step, 0, 1) if b["ids"].shape[1] == 256)
    model.train()
    expected = torch.stack([
        torch.nn.functional.cross_entropy(model(batch["ids"][:, :end]), batch["label"], reduction="sum") for end in (64, 128, 256)
    ]).mean()
    loss, weight = task.loss(model, batch)
    assert torch.allclose(loss, expected, rtol=1e-4) and weight == 4
    both = species.SpeciesTask(dataclasses.replace(base, loss=species.LossConfig(ask="prefixes", language_model=2.0)), store)
    more, _ = both.loss(model, batch)
    features = model.features(batch["ids"]).value
    logits = features[:, :-1] @ model.embedding.weight[7:11].T
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 1:].flatten().long() - 7)
    assert torch.allclose(more, expected + 2.0 * 4 * nats, rtol=1e-4)
    model.eval()
    outside, _ = both.loss(model, batch)  # validation is the species alone, both strands
    assert torch.allclose(outside, torch.nn.functional.cross_entropy(model(batch["ids"]), batch["label"], reduction="sum"))


@pytest.mark.parametrize("ask,model", [
    ("prefixes", dict(direction="bidirectional")), ("prefixes", dict(strand="equivariant")), ("prefixes", dict(pooling="max")),
    ("segments", dict(strand="equivariant")), ("segments", dict(pooling="last")),
])
def test_the_whole_is_asked_where_parts_have_no_answer_of_their_own(ask, model, data):
    config = toy_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model), loss=species.LossConfig(ask=ask))
    assert species.SpeciesTask(config, TokenStore.open(data)).ask == "whole"


def test_the_language_model_of_evidence_is_the_right_species_own(data):
    config = toy_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pooling="evidence", length_scale=True))
    plain = species.SpeciesTask(config, TokenStore.open(data))
    both = species.SpeciesTask(dataclasses.replace(config, loss=species.LossConfig(language_model=2.0)), plain.store)
    torch.manual_seed(0)
    model, (batch,) = plain.build_model().train(), plain.train_batches(3, 0, 1)
    rows, length = batch["ids"].shape
    before = torch.cat([torch.zeros(rows, 1, 16), model.features(batch["ids"]).value[:, :-1]], 1)
    logits = model.head.next_base(before).view(rows, length, 3, 4)[torch.arange(rows), :, batch["label"]]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["ids"].flatten().long() - 7)
    expected = plain.loss(model, batch)[0] + 2.0 * rows * nats
    assert torch.allclose(both.loss(model, batch)[0], expected, rtol=1e-4)


@pytest.mark.parametrize("model", [dict(direction="bidirectional"), dict(strand="equivariant"), dict(pooling="max"), dict(pooling="last"), dict(pooling="evidence", period=3), dict(pooling="evidence", gene_order=2)], ids=str)
def test_every_kind_of_model_has_a_loss_and_gradients(data, model):
    config = toy_config()
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **model), loss=species.LossConfig(language_model=0.5, mask_rate=0.3)
    )
    task = species.SpeciesTask(config, TokenStore.open(data))
    net = task.build_model().train()
    (batch,) = task.train_batches(0, 0, 1)
    if model.get("direction"):
        assert 0.2 < batch["scored"].float().mean() < 0.4 and (batch["ids"] == 3).any()
    loss, _ = task.loss(net, batch)
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_training_tells_them_apart(trained):
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert evaluation["classes"] == ["hi", "lo", "mid"]
    for length in ("64", "128"):
        result = evaluation["lengths"][length]
        assert result["model"]["accuracy"] > 0.8 and result["chance"]["accuracy"] == pytest.approx(1 / 3)
        assert result["k-mers"]["n"] == result["model"]["n"] == result["windows"]
    text = (trained / "report.md").read_text()
    assert "k-mer" in text and "| true" in text
    for plot in ("evaluation.png", "training.png", "evaluation-calibration.png", "evaluation-confusion-64.png"):
        assert (trained / "plots" / plot).read_bytes()[:4] == b"\x89PNG"


def test_calibration_costs_a_small_share_of_training():
    lengths = [256, 512, 1024, 2048]
    assert species.calibration_windows(lengths, 131_072, 30_000, 7) == dict.fromkeys(lengths, 32)
    chosen = species.calibration_windows(lengths, 131_072, 176_000_000, 7)
    assert chosen[256] == 500 and list(chosen) == [*lengths, 8192, 32_768, 131_072] and chosen[131_072] == 11
    assert all(2 * 7 * chosen[length] * length <= 176_000_000 / 8 for length in (8192, 32_768, 131_072))
    assert 8192 not in species.calibration_windows(lengths, 131_072, 1_000_000, 7)
    assert list(species.calibration_windows(lengths, 1000, 176_000_000, 7)) == [256, 512]
    assert 131_072 in species.calibration_windows(lengths, 131_072, 10**10, 7)


def test_likeness_is_fitted_in_as_many_steps_as_its_windows_bear():
    assert [species.words.fit_steps(n) for n in (10, 820, 4_100, 20_500, 144_000)] == [100, 100, 320, 1500, 1500]


def test_calibration_moves_biases_alone_and_for_the_better(trained, data, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "best" / "model.safetensors"
    weights = load_file(path)
    weights["head.linear.bias"] = weights["head.linear.bias"] + torch.tensor([150.0, 0.0, -150.0])  # spoilt
    save_file(weights, path)
    (tmp_path / "run" / "checkpoints" / "last" / "model.safetensors").unlink()
    found = species.calibrate(tmp_path / "run", TokenStore.open(data))
    after = load_file(path)
    assert found["after"] < found["before"] - 0.1
    assert {name for name in after if not torch.equal(after[name], weights[name])} <= {"head.linear.bias", "head.length_scale"}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["calibration"]["after"] == found["after"]
    assert json.loads((trained / "run.json").read_text())["calibration"]  # train does it by itself


def test_calibration_takes_the_last_network_if_it_is_better_once_calibrated(trained, data, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    best, last = (tmp_path / "run" / "checkpoints" / name / "model.safetensors" for name in ("best", "last"))
    good, weights, store = load_file(last), load_file(best), TokenStore.open(data)

    def spoil(path, weights):
        noise = torch.randn(weights["head.next_base.weight"].shape, generator=torch.Generator().manual_seed(0))
        save_file({**weights, "head.next_base.weight": noise}, path)

    def calibrate():
        found = species.calibrate(tmp_path / "run", store)
        noted = json.loads((tmp_path / "run" / "run.json").read_text())["calibration"]
        return found, noted["checkpoint"], load_file(best)

    spoil(best, weights)
    found, name, chosen = calibrate()
    assert name == "last" and torch.equal(chosen["head.next_base.weight"], good["head.next_base.weight"])
    again, name, twice = calibrate()  # now both are one
    assert name == "last" and again == found and all(torch.equal(chosen[key], twice[key]) for key in chosen)
    spoil(last, good)
    again, name, kept = calibrate()
    assert name == "best" and again == found and torch.equal(kept["head.next_base.weight"], good["head.next_base.weight"])


def test_the_cnn_reads_long_windows_in_pieces(trained, data, monkeypatch, tmp_path):
    monkeypatch.setattr(species, "CNN_LONGEST", 64)
    store, run_ = TokenStore.open(data), runs.load_run(trained)
    seen, calls = {}, []

    def fake(train, valid, test, kind, n_outputs, device):
        seen.update(train=train.tokens.shape[1], test=test)
        calls.append(len(test))
        share = np.tile([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], (len(test), 1))[: len(test)]
        return species.BaselineResult("cnn", share, "fake", 0.0, 0.0)

    monkeypatch.setattr(species, "cnn_baseline", fake)
    config = dataclasses.replace(run_.config, eval=species.EvalConfig(lengths=(100, 130), windows_per_class=3, baselines=("cnn",)))
    result = species.evaluate_run(dataclasses.replace(run_, config=config), store, store, device="cpu", cache=tmp_path)
    assert seen["train"] == 64 and seen["test"].lengths[:2].tolist() == [64, 36]
    assert result.results[0].metrics["cnn"]["confusion"][0][1] == 3  # sqrt(0.7 * 0.1) < sqrt(0.2 * 0.8)
    assert "pieces of 64" in result.results[1].details["cnn"]
    assert calls == [9 * 2 + 9 * 3]  # one network for both lengths: two pieces and three


def test_eval_again_takes_the_baselines_from_the_run(trained, monkeypatch):
    monkeypatch.setattr(species, "kmer_baseline", None)  # would fail if it were called
    stdout, stderr = run("eval", trained, "--json", "-")
    assert json.loads(stdout)["lengths"]["64"]["model"]["accuracy"] > 0.8
    stdout, _ = run("eval", trained, "--context", 64, "--set", "eval.baselines=[]")
    assert "model" in stdout and "k-mers" not in stdout


def test_resume_init_and_freeze(trained, data, tmp_path):
    short = ["train", "species", "--data", data, *TOY, *QUICK, "--set", "eval.baselines=[]"]
    run(*short, "--out", tmp_path / "a", "--max-steps", 3)
    run("train", "species", "--resume", "--out", tmp_path / "a", "--max-steps", 5)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["result"]["steps"] == 5
    run(*short, "--out", tmp_path / "b", "--max-steps", 2, "--init", trained, "--freeze")
    before, after = runs.load_run(trained).model, runs.load_run(tmp_path / "b").model
    assert torch.equal(before.backbone.layers[0].mixer.A_log, after.backbone.layers[0].mixer.A_log)
    assert not torch.equal(before.head.linear.weight, after.head.linear.weight)
    assert json.loads((tmp_path / "b" / "run.json").read_text())["init"].endswith("model.safetensors")


def test_a_run_resumed_at_its_end_is_what_it_was(trained, tmp_path):
    """Its head was calibrated a second time, from where the first time had left it."""
    shutil.copytree(trained, tmp_path / "again")
    before = json.loads((trained / "run.json").read_text())["calibration"]
    assert before["after"] < before["before"]
    run("train", "species", "--resume", "--out", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "run.json").read_text())["calibration"] == before
    one, other = (load_file(folder / "checkpoints/best/model.safetensors") for folder in (trained, tmp_path / "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("module, name, then", [("tasks.species", "calibrate", "train species --resume --out"), ("tasks.commands.train", "evaluate", "eval")])
def test_ctrl_c_after_training_says_what_goes_on_from_there(trained, tmp_path, monkeypatch, module, name, then):
    """It said that it was stopped, and neither that the run was there nor how to go on with it."""

    def pressed(*arguments, **options):
        raise KeyboardInterrupt

    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(f"{module}.{name}", pressed)
    _, stderr = run("train", "species", "--resume", "--out", tmp_path / "run", code=130)
    last = stderr.splitlines()[-1]
    assert last.startswith("Stopped by Ctrl-C; what has been trained is saved.") and last.endswith(f" {then} {tmp_path / 'run'}")


def test_ctrl_c_before_training_leaves_nothing_to_go_on_with(data, tmp_path, monkeypatch):
    def pressed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(species, "train", pressed)
    _, stderr = run("train", "species", "--data", data, "--out", tmp_path / "run", *TOY, code=130)
    assert stderr.splitlines()[-1] == "Stopped by Ctrl-C." and not (tmp_path / "run").exists()


def test_one_length_is_told_once(trained):
    """Accuracy went "from 83.33 % there to 83.33 % at 64", and windows were "of 256 to 256 bases"."""
    stdout, stderr = run("eval", trained, "--context", 64)
    assert "at 64" not in stdout + stderr and ("accuracy is" in stdout + stderr or "beats" in stdout + stderr)
    assert report.in_words([256]) == "256" and report.in_words([256, 512, 2048]) == "256 to 2,048"


def test_gene_models_learn_from_the_training_split_and_stay_as_they_are(data, tmp_path, monkeypatch):
    store = TokenStore.open(data)
    config = toy_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pooling="evidence", gene_order=2))
    task = species.SpeciesTask(config, store)
    kept = {name: tensor.clone() for name, tensor in task.build_model().genes.state_dict().items()}
    assert set(kept) == {"emissions", "transitions", "start"}
    at = store.intervals("train")[:, 0]
    moved = np.array(store.tokens)
    for split in ("valid", "test"):
        for start, end in store.intervals(split):
            moved[start:end] = nucleotide.A
    monkeypatch.setattr(store, "tokens", moved)
    other = species.SpeciesTask(config, store)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in other.build_model().genes.state_dict().items())
    moved[at[0] : at[0] + 100] = nucleotide.A
    other = species.SpeciesTask(config, store)
    assert not torch.equal(kept["emissions"], other.build_model().genes.emissions)
    # trained, resumed and loaded, they are what they were
    short = ["train", "species", "--data", data, *TOY, *QUICK, "--set", "eval.baselines=[]", "--set", "model.pooling=evidence"]
    run(*short, "--set", "model.gene_order=2", "--set", "train.ema_decay=0.9", "--out", tmp_path / "a", "--max-steps", 3)
    run("train", "species", "--resume", "--out", tmp_path / "a", "--max-steps", 5)
    model = runs.load_run(tmp_path / "a").model
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.genes.state_dict().items())
    assert model.head.next_base.weight.abs().max() > 0


def test_training_windows_are_read_without_their_fold(data, monkeypatch):
    monkeypatch.setattr(species.genes, "PIECE", 512)
    store, config = TokenStore.open(data), toy_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pooling="evidence", gene_order=2))
    task = species.SpeciesTask(config, store)
    model = task.build_model().train()
    (batch,) = task.train_batches(1, 0, 1)
    for start, label, fold in zip(batch["start"].tolist(), batch["label"].tolist(), batch["fold"].tolist()):
        before, mine = 0, task.windows.intervals[label]
        for first, end in sorted(mine.tolist()):
            if first <= start < end:
                assert fold == (before + (start - first) // 512) % 4
            before += -(-(end - first) // 512)
    loss, _ = task.loss(model, batch)
    with torch.no_grad():
        alone = [model.genes(torch.zeros(1, 9, dtype=torch.long), fold=torch.tensor([f]))[0].log_p for f in range(4)]
        model.genes.emissions.copy_(model.genes.held_out[:, : model.genes.emissions.shape[1]])  # all without fold 0
        assert torch.equal(model.genes(torch.zeros(1, 9, dtype=torch.long))[0].log_p, alone[0])
        assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    assert torch.equal(task.loss(model, batch)[0], loss)  # which takes nothing from the whole's
    assert "fold" not in next(iter(task.validation_batches(0, 1)))


def test_init_from_a_language_model_takes_its_shape(data, tmp_path):
    lm = ["--set", "model.d_model=24", "--set", "model.n_layer=2", "--set", "model.d_state=4", "--context", 64]
    lm += ["--set", "train.tokens_per_step=512", "--set", "train.accelerator=cpu", "--set", "eval.max_order=1"]
    run("train", "dna", "--data", data, "--out", tmp_path / "lm", "--max-steps", 2, *lm)  # a species dataset is DNA too
    rest = [*TOY[6:], *QUICK, "--set", "eval.baselines=[]", "--set", "train.ema_decay=0"]
    run("train", "species", "--data", data, "--out", tmp_path / "s", "--init", tmp_path / "lm", "--freeze", "--max-steps", 1, *rest)
    theirs, ours = runs.load_run(tmp_path / "lm").model, runs.load_run(tmp_path / "s").model
    assert torch.equal(theirs.backbone.layers[1].mixer.in_proj.weight, ours.backbone.layers[1].mixer.in_proj.weight)
    said = error_of("train", "species", "--data", data, "--out", tmp_path / "x", "--init", tmp_path / "lm", "--max-steps", 1, *rest, "--set", "model.d_model=32")
    assert "d_model" in said and not (tmp_path / "x").exists()
    manifest = json.loads((tmp_path / "lm" / "manifest.json").read_text())
    (tmp_path / "lm" / "manifest.json").write_text(json.dumps(manifest | {"vocab": ["a", "b"]}))
    said = error_of("train", "species", "--data", data, "--out", tmp_path / "x", "--init", tmp_path / "lm", "--max-steps", 1, *rest)
    assert "vocabularies must be the same" in said
    said = error_of("predict", tmp_path / "lm", tmp_path / "none.fa")
    assert "train dna" in said


@pytest.fixture(scope="module")
def relatives(tmp_path_factory):
    """Two genomes seven eighths identical, one of them rotated so that what is held out of one is not held out of the other, and a third."""
    folder, rng = tmp_path_factory.mktemp("relatives"), np.random.default_rng(0)
    left = rng.integers(0, 4, 60_000)
    right = np.roll(np.where(rng.random(60_000) < 1 / 6, rng.integers(0, 4, 60_000), left), 37_500)
    pairs = []
    for name, digits in (("left", left), ("right", right), ("third", rng.integers(0, 4, 60_000))):
        (folder / f"{name}.fa").write_text(f">chr\n{np.frombuffer(b'ACGT', np.uint8)[digits].tobytes().decode()}\n")
        pairs.append(f"{name}={folder / name}.fa")
    run("prep", "species", *pairs, "--out", folder / "data", "--block", 3000, "--test-share", 0.2)
    return folder / "data"


LIKENESS = ["--set", "model.pooling=evidence", "--set", "model.length_scale=true", "--set", "model.gene_order=2", "--set", "eval.baselines=[]"]
LIKENESS += [*TOY, "--set", "model.homology=200000", "--set", "model.composition=3", "--set", "eval.lengths=[64,128]"]


def test_likeness_names_the_relative_of_what_is_known_and_the_known_itself(relatives, tmp_path, monkeypatch):
    monkeypatch.setattr(species.words, "STEPS", 200)
    monkeypatch.setattr(species, "FIT_SHARE", 0.01)  # a hundred times the bases that a toy is trained on
    run("train", "species", "--data", relatives, "--out", tmp_path / "run", "--max-steps", 1, *LIKENESS)
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())["lengths"]
    assert figures["64"]["model"]["accuracy_mean_over_species"] > 0.6 and figures["128"]["model"]["accuracy_mean_over_species"] > 0.85
    store, loaded = TokenStore.open(relatives), runs.load_run(tmp_path / "run")
    assert (loaded.model.homology.scale[:, 0] > 0).all() and loaded.model.composition.scale[0, 0] > 0
    after = json.loads((tmp_path / "run" / "run.json").read_text())["calibration"]["after"]

    class Elsewhere(species.Predictor):
        """As on another device: every buffer is a new one."""

        def __init__(self, model, *arguments, **options):
            super().__init__(model._apply(torch.clone), *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(species, "Predictor", Elsewhere)
        assert species.calibrate(tmp_path / "run", store)["after"] == after  # fitted anew, to the same
    again = runs.load_run(tmp_path / "run").model
    for part in ("homology", "composition"):
        assert torch.equal(getattr(again, part).scale, getattr(loaded.model, part).scale)
    assert torch.equal(again.head.length_scale, loaded.model.head.length_scale)
    # a read of a genome that is known, whole; without the parts nothing is known of either
    known, _ = species.ClassWindows(store, "train").fixed(128, 40)
    outputs = np.stack(list(species.Predictor(loaded.model).outputs(known.sequence(store, i) for i in range(len(known)))))
    assert (outputs.argmax(1) == known.label).mean() > 0.9
    counters = loaded.model.counters
    assert counters == (loaded.model.homology, loaded.model.composition) and loaded.model.train().counters == ()
    loaded.model.eval()
    for part in counters:
        part.scale.zero_()
    assert loaded.model.counters == ()
    outputs = np.stack(list(species.Predictor(loaded.model).outputs(known.sequence(store, i) for i in range(len(known)))))
    assert (outputs.argmax(1) == known.label).mean() < 0.7


def test_without_calibration_likeness_counts_nothing(relatives, tmp_path):
    run("train", "species", "--data", relatives, "--out", tmp_path / "run", "--max-steps", 1, *LIKENESS, "--set", "calibrate=false")
    assert runs.load_run(tmp_path / "run").model.counters == ()


def test_training_windows_are_looked_up_without_their_place(relatives):
    windows = species.ClassWindows(TokenStore.open(relatives), "train")
    places, rng = species.words._Places(windows), np.random.default_rng(0)
    drawn = windows.sample(rng, 300, 500)
    known = rng.random(300) < 0.3
    allowed = places.allowed(drawn, known, rng)
    first, last = places.folds(drawn)
    mine = allowed[np.arange(300), drawn.label]
    assert (known == ((mine >> first & 1) == 1)).all() and (known == ((mine >> last & 1) == 1)).all()
    folds = np.array([[bin(bits).count("1") for bits in row] for row in allowed])
    assert set(folds.ravel()) == {2, 3} and (folds == 2).sum() == (~known & (first != last)).sum()
    side_by_side = ((allowed == (15 & ~(1 << first))[:, None]).sum(1) >= 2)[~known & (first == last)]
    assert 0.5 < side_by_side.mean() < 0.8  # half of them, and some by chance
    assert places.blocks.tolist() == [42_000 // 8] * 3
    assert species.words.fit_lengths(windows, 64) == [32, 64, 128, 256, 512, 1024, 2048, 4096]


def test_likeness_has_limits(relatives, tmp_path):
    common = ["train", "species", "--data", relatives, "--out", tmp_path / "x", "--max-steps", 1, *TOY]
    mean = ["--set", "model.pooling=mean", "--set", "model.gene_order=0", "--set", "model.repeat_word=0"]
    assert "needs pooling: evidence" in error_of(*common, *mean, "--set", "model.homology=1000")
    assert "23 .." in error_of(*common, "--set", "model.pooling=evidence", "--set", "model.homology=10")
    assert "1 .. 8" in error_of(*common, "--set", "model.pooling=evidence", "--set", "model.composition=9")
    with pytest.raises(UserError, match="at most 15 species, got 16"):
        species.SequenceClassifier(species.ClassifierConfig(pooling="evidence", homology=1000), 16)


# -- predict -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reads(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("reads") / "reads.fa"
    with open(path, "w") as file:
        for i in range(30):
            gc = (0.2, 0.5, 0.8)[i % 3]
            letters = rng.choice(list("ACGT"), int(rng.integers(50, 300)), p=[(1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2])
            file.write(f">r{i} {gc}\n{''.join(letters)}\n")
        file.write(f">long\n{'GGCC' * 6000}\n>unknown\nNNNN\n")
    return path


def test_predict_gives_the_same_text_for_any_batch_size_and_order(trained, reads, tmp_path):
    whole, stderr = run("predict", trained, reads)
    lines = whole.splitlines()
    assert lines[0].split("\t") == ["name", "label", "hi", "lo", "mid", "length"]
    assert [line.split("\t")[0] for line in lines[1:]] == [*(f"r{i}" for i in range(30)), "long", "unknown"]
    assert "sequences/s" in stderr and "have no label (first: unknown)" in stderr
    assert lines[-1].split("\t") == ["unknown", ".", ".", ".", ".", "4"]
    assert lines[-2].split("\t")[1] == "hi" and lines[-2].endswith("\t24000")
    right = sum(line.split("\t")[1] == ("lo", "mid", "hi")[i % 3] for i, line in enumerate(lines[1:31]))
    assert right >= 25
    for line in lines[1:31]:
        assert sum(map(float, line.split("\t")[2:5])) == pytest.approx(1, abs=2e-4)
    one, _ = run("predict", trained, reads, "--batch-size", 1)
    assert one == whole
    records = [">" + record for record in reads.read_text().split(">")[1:]]
    (tmp_path / "turned.fa").write_text("".join(records[::-1]))
    turned, _ = run("predict", trained, tmp_path / "turned.fa", "--batch-size", 7)
    assert turned.splitlines()[1:] == lines[:0:-1]


def test_predict_leaves_no_table_without_a_label_and_makes_the_folder_of_one(trained, tmp_path):
    (tmp_path / "n.fa").write_text(">a\nNNNN\n>b\nNN\n")
    assert "none of its 2 sequences" in error_of("predict", trained, tmp_path / "n.fa", "--out", tmp_path / "labels.tsv")
    assert {p.name for p in tmp_path.iterdir()} == {"n.fa"}
    (tmp_path / "x.fa").write_text(">a\nACGTACGT\n")
    run("predict", trained, tmp_path / "x.fa", "--out", tmp_path / "new" / "labels.tsv")
    assert (tmp_path / "new" / "labels.tsv").read_text().count("\n") == 2
    assert "is not a directory" in error_of("predict", trained, tmp_path / "x.fa", "--out", tmp_path / "n.fa" / "labels.tsv")


def test_no_run_of_sound_to_start_from(data, tmp_path):
    (tmp_path / "config.yaml").write_text("task: audio\nmodel: {blocks: [s6]}\n")
    (tmp_path / "model.safetensors").write_bytes(b"")
    said = error_of("train", "species", "--data", data, "--init", tmp_path, "--out", tmp_path / "out")
    assert "is of a run of `train audio`; start from one of train dna or species" in said and not (tmp_path / "out").exists()


def test_predict_writes_a_file_and_a_summary(trained, reads, tmp_path):
    run("predict", trained, reads, "--out", tmp_path / "t.tsv", "--json", tmp_path / "s.json")
    assert (tmp_path / "t.tsv").read_text() == run("predict", trained, reads)[0]
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["sequences"] == 32 and summary["labels"]["."] == 1 and summary["bases"] > 24_000
    assert "exists" in error_of("predict", trained, reads, "--out", tmp_path / "t.tsv")


@pytest.mark.parametrize("text,said", [(">a\nNNN\n", "none of its 1 sequences"), (">a\n", "none of its 1"), ("", "is empty"), (">a\nACGTL\n", "base 5")])
def test_predict_says_what_it_cannot_read(trained, tmp_path, text, said):
    (tmp_path / "x.fa").write_text(text)
    assert said in error_of("predict", trained, tmp_path / "x.fa", "--out", tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv").exists()
    assert not list(tmp_path.glob(".*partial"))


# -- wrong input ---------------------------------------------------------------------------------------------------
def test_wrong_input_is_one_clear_line(trained, data, tmp_path):
    a, b = genome(tmp_path / "a.fa", 3000, 0.3, 8), genome(tmp_path / "b.fa", 3000, 0.6, 9)
    assert "one species only" in error_of("prep", "species", f"a={a}", "--out", tmp_path / "d")
    assert "two classes" in error_of("prep", "species", f"a={a}", f"b={a}", "--out", tmp_path / "d")
    for fold in ("2", "two/5", "6/5", f"{'9' * 5000}/5"):
        assert "expected I/K with I from 1 to K, such as 2/5" in error_of("prep", "species", f"a={a}", f"b={a}", "--fold", fold, "--out", tmp_path / "d")
    run("prep", "species", f"a={a}", f"b={b}", "--out", tmp_path / "d")
    assert "species a is unknown to this run, which knows hi, lo, mid" in error_of("eval", trained, "--data", tmp_path / "d")
    assert "--data" in error_of("train", "species", "--out", tmp_path / "r")
    assert "--freeze" in error_of("train", "species", "--data", data, "--freeze", "--out", tmp_path / "r")
    assert "does not fit" in error_of("train", "species", "--data", data, "--context", 4096, "--out", tmp_path / "r")
    assert "classes: c: not a species" in error_of("train", "species", "--data", data, "--set", "classes=[c, hi]", *TOY, "--out", tmp_path / "r")
    assert "length 4,000" in error_of("eval", trained, "--context", 4000)
    assert "--batch-size" in error_of("predict", trained, a, "--batch-size", 0)
    assert not (tmp_path / "r").exists()


def test_classes_that_are_too_few_are_refused():
    with pytest.raises(UserError, match="two or more"):
        species.build_model(dataclasses.replace(toy_config(), classes=("a",)))


def test_a_dataset_by_files_trains(tmp_path):
    sources = []
    for number, name in enumerate("ab"):
        for split in ("train", "valid", "test"):
            path = genome(tmp_path / f"{name}{split}.fa", 600, 0.2 + 0.6 * number, step_seed(number, split) % 1000, split)
            sources.append(Source(name, path, split))
    data = prepare_species(sources, tmp_path / "data")
    run("train", "species", "--data", data, "--out", tmp_path / "r", "--max-steps", 2, *TOY, *QUICK, "--set", "eval.baselines=[]")
    assert (tmp_path / "r" / "report.md").is_file()


@pytest.mark.parametrize(
    "strand, pooling, genes", [("none", "last", 0), ("average", "mean", 0), ("equivariant", "max", 0), ("none", "evidence", 0), ("none", "evidence", 2)]
)
def test_windows_in_pieces_have_the_same_gradient(data, strand, pooling, genes):
    from seqlab.training import memory
    from seqlab.training.memory import Memory

    config = toy_config(min_context=None, windows_per_step=2)
    shape = species.ClassifierConfig(d_model=16, n_layer=2, d_state=4, strand=strand, pooling=pooling, gene_order=genes)
    config = dataclasses.replace(config, model=shape, loss=species.LossConfig(ask="whole"))
    task = species.SpeciesTask(config, TokenStore.open(data))
    torch.manual_seed(0)
    model, (batch,) = task.build_model(), task.train_batches(0, 0, 1)
    batch["mask"] = torch.arange(batch["ids"].shape[1]) < torch.tensor([[199], [256]])

    def gradients(setting):
        model.zero_grad(set_to_none=True)
        memory.backward(setting, model, task, batch, 1.0)
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    assert memory.unavailable("chunked", model, task, torch.device("cpu")) is None
    plain, pieces = gradients(Memory()), gradients(Memory("chunked", 70))
    for name, gradient in plain.items():
        assert (pieces[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    model.eval()
    with torch.no_grad():
        both = zip(memory.loss(Memory("chunked", 70), model, task, batch), task.loss(model, batch), strict=True)
    for a, b in both:
        assert float(a) == pytest.approx(float(b), rel=1e-5)
    prefixes = species.SpeciesTask(toy_config(), TokenStore.open(data))
    assert "pieces" in memory.unavailable("chunked", prefixes.build_model(), prefixes, torch.device("cpu"))


def test_substitutions_are_what_the_network_reads_not_what_is_foretold(data):
    store, config = TokenStore.open(data), toy_config()
    shape = dataclasses.replace(config.model, pooling="evidence", gene_order=2, strand="none")
    config = dataclasses.replace(config, model=shape, loss=species.LossConfig(language_model=1.0, substitutions=0.5))
    task = species.SpeciesTask(config, store)
    model, (batch,) = task.build_model().train(), task.train_batches(1, 0, 1)
    assert 0.05 < (batch["ids"] != batch["clean"]).float().mean() < 0.35
    start, length = int(batch["start"][0]), batch["ids"].shape[1]
    assert np.array_equal(batch["clean"][0].numpy(), store.tokens[start : start + length])
    with torch.no_grad():  # a fresh head's predictions are the gene models', of the sequence itself
        evidence = model.read(batch["ids"], fold=batch["fold"], clean=batch["clean"])[..., 16:]
        same = model.read(batch["clean"], fold=batch["fold"])[..., 16:]
        assert torch.allclose(evidence, same, atol=1e-5)
    batch["ids"] = batch["clean"]
    del batch["clean"]
    assert torch.isfinite(task.loss(model, batch)[0])


def test_calibration_finds_that_repeats_tell_twins_apart(tmp_path):
    """Two genomes of the same statistics, one with an element of 200 bases in every 500."""
    rng = np.random.default_rng(0)
    element = "".join(rng.choice(list("ACGT"), 200))
    for name in ("plain", "repeats"):
        parts = ["".join(rng.choice(list("ACGT"), 300 if name == "repeats" else 500)) for _ in range(60)]
        (tmp_path / f"{name}.fa").write_text(f">chr\n{(element if name == 'repeats' else '').join(parts)}\n")
    pairs = [f"{name}={tmp_path / name}.fa" for name in ("plain", "repeats")]
    run("prep", "species", *pairs, "--out", tmp_path / "data", "--block", 1500, "--test-share", 0.2)
    store = TokenStore.open(tmp_path / "data")
    config = dataclasses.replace(toy_config(), classes=("plain", "repeats"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pooling="evidence", repeat_word=12))
    words, held = species.SpeciesTask(config, store).repeated_words()
    assert len(words) > 150 and held[:, 1].sum() > 150 and held[:, 0].mean() < 0.2
    options = [*TOY, "--set", "model.pooling=evidence", "--set", "model.repeat_word=12", "--set", "eval.baselines=[]", "--set", "eval.lengths=[1000]"]
    run("train", "species", "--data", tmp_path / "data", "--out", tmp_path / "run", "--max-steps", 1, *options)
    trained = runs.load_run(tmp_path / "run")
    assert trained.model.head.repeat_scale[0] > 0 and trained.model.repeats.held[:, 1].sum() > 150
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert figures["lengths"]["1000"]["model"]["accuracy_mean_over_species"] > 0.95


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_calibration_finds_the_same_on_a_gpu():
    n, rng = 600, torch.Generator().manual_seed(3)
    label, length = torch.arange(n) % 3, 256 << torch.randint(0, 4, (n,), generator=rng)
    outputs = torch.randn(n, 3, generator=rng) + F.one_hot(label, 3)
    said = torch.randn(n, 2, 3, generator=rng, dtype=torch.float64) + F.one_hot(label, 3)[:, None]

    def fit(device):
        head = SimpleNamespace(linear=torch.nn.Linear(1, 3).to(device), length_scale=torch.zeros(2, device=device))
        return species._fit_scales(head, outputs, label, length, said, [(torch.zeros(1, 2), scale_of), (torch.zeros(2), scale_of)])

    here, there = fit("cpu"), fit("cuda")
    assert here.after < here.before and there.after == pytest.approx(here.after, abs=1e-7)
    for a, b in zip([here.shift, here.scale, *here.beside], [there.shift, there.scale, *there.beside]):
        torch.testing.assert_close(b.cpu(), a, atol=1e-4, rtol=0)
