"""`seqlab train synthetic`: the problems by hand, what a perfect and a wrong model score, training, the commands."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli import app, load_config, presets
from seqlab.model import ModelConfig
from seqlab.training.config import TrainConfig
from tasks import runs, synthetic
from tasks.synthetic import DataConfig, Synthetic, SyntheticConfig, evaluate_run, sequences

PROBLEMS = ("selective_copying", "induction_heads")
TOY = ["model.d_model=16", "model.n_layer=1", "model.d_state=4", "train.tokens_per_step=256", "train.accelerator=cpu"]
TOY += ["data.context=32", "data.remember=4", "eval.sequences=20"]
TOY = [word for text in TOY for word in ("--set", text)]


def solve(data, ids):
    """The right answers, worked out from the sequence alone."""
    if data.problem == "selective_copying":
        return np.stack([row[row >= 2] for row in ids])
    return np.stack([row[np.flatnonzero(row == 1)[0] + 1 :][:1] for row in ids])


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("length", [8, 9, 64])
def test_the_answers_follow_from_the_sequence(problem, length):
    data = DataConfig(problem, context=length, symbols=5, remember=4)
    ids, right = sequences(data, length, np.random.default_rng(0), 2000)
    assert ids.shape == (2000, length) and right.shape == (2000, synthetic.answers(data)) and ids.dtype == right.dtype == np.uint8
    assert np.array_equal(solve(data, ids), right)
    assert set(np.unique(right)) == set(range(2, 7)) and ids.max() <= 6
    if problem == "selective_copying":
        assert (ids[:, -4:] == 1).all() and ((ids == 1).sum(1) == 4).all() and ((ids >= 2).sum(1) == 4).all()
        assert ((ids[:, :-4] >= 2).mean(0) > 0.5 * 4 / (length - 4)).all()  # at every place
    else:
        assert (ids[:, -1] == 1).all() and ((ids == 1).sum(1) == 2).all()
        assert set((ids == 1)[:, :-1].argmax(1)) == set(range(length - 2))


def test_batches_are_functions_of_the_step_and_never_those_of_the_test():
    data = DataConfig(context=32, remember=4)
    config = SyntheticConfig(data=data, train=TrainConfig(tokens_per_step=256, validation_tokens=512))
    task = Synthetic(config)
    (one,), (again,), (next_one,) = task.train_batches(3, 0, 1), Synthetic(config).train_batches(3, 0, 1), task.train_batches(4, 0, 1)
    assert torch.equal(one["ids"], again["ids"]) and not torch.equal(one["ids"], next_one["ids"])
    assert one["ids"].shape == (8, 32) and task.weight(one) == 32 and task.tokens(one) == 256
    other_rank = task.train_batches(3, 1, 2)[0]["ids"]
    assert other_rank.shape == (4, 32) and not torch.equal(other_rank, task.train_batches(3, 0, 2)[0]["ids"])
    valid = list(task.validation_batches(0, 1))
    assert sum(len(b["ids"]) for b in valid) == 16
    halves = [torch.cat([b["ids"] for b in task.validation_batches(rank, 2)]) for rank in (0, 1)]
    assert sorted(map(tuple, torch.cat(halves).tolist())) == sorted(tuple(row) for b in valid for row in b["ids"].tolist())
    small = replace(config, train=replace(config.train, micro_batch_tokens=96))
    parts = Synthetic(small).train_batches(3, 0, 1)
    assert [len(p["ids"]) for p in parts] == [3, 3, 2] and torch.equal(torch.cat([p["ids"] for p in parts]), one["ids"])


class Perfect(torch.nn.Module):
    """Reads piece by piece, remembers everything; `slip`: the answer that it gets wrong."""

    def __init__(self, data, slip=None):
        super().__init__()
        self.data, self.slip = data, slip

    def forward(self, ids, state=None, return_state=True):
        seen = ids if state is None else torch.cat([state, ids], 1)
        logits = torch.zeros(*ids.shape, 12)
        last, done = synthetic.answers(self.data), seen.shape[1]
        if done == self.data.context:
            right = torch.from_numpy(solve(self.data, seen.numpy())).long()
            if self.slip is not None:
                right[:, self.slip] = 0
            logits[:, -last:].scatter_(-1, right[..., None], 50.0)
        return logits, seen


@pytest.mark.parametrize("problem", PROBLEMS)
def test_accuracy_of_a_model_that_knows_and_one_that_slips(problem):
    data = DataConfig(problem, context=40, symbols=7, remember=4)
    config = SyntheticConfig(data=data, train=TrainConfig(tokens_per_step=400))

    def score(slip):
        return evaluate_run(SimpleNamespace(config=config, model=Perfect(data, slip)), (40,), "cpu").lengths[40]

    good, bad = score(None), score(0)
    assert (good.accuracy, good.whole) == (1.0, 1.0) and good.bits < 1e-6
    assert bad.accuracy == 1 - 1 / synthetic.answers(data) and bad.whole == 0.0 and bad.bits > 10


@pytest.mark.parametrize("piece", [1, 3, 5, 7, 100])
def test_answers_read_in_pieces_are_those_of_the_whole(piece):
    config = SyntheticConfig(model=ModelConfig(d_model=8, n_layer=2, d_state=4), data=DataConfig(context=32, remember=4))
    model = synthetic.build_model(config).eval()
    ids = torch.from_numpy(sequences(config.data, 37, np.random.default_rng(0), 2)[0])
    with torch.no_grad():
        torch.testing.assert_close(synthetic.answer(model, ids, 4, 2 * piece), model(ids)[0][:, -4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", presets("synthetic"))
def test_presets_build_and_learn_something(name):
    config = load_config(SyntheticConfig, name, [], {})
    assert config.data.problem == name
    config = replace(config, model=replace(config.model, d_model=16, n_layer=1), data=replace(config.data, context=32, symbols=2, remember=2))
    task = Synthetic(config)
    model = task.build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        batch = {key: value[:8] for key, value in task.train_batches(0, 0, 1)[0].items()}  # one batch, learnt by heart
        loss, weight = task.loss(model, batch)
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()
        losses.append((loss / weight).item())
    assert losses[-1] < 0.5 * losses[0]


# -- the commands --------------------------------------------------------------------------------------------------
def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


def test_train_resume_evaluate(tmp_path):
    out = tmp_path / "run"
    call("train", "synthetic", *TOY, "--max-steps", 4, "--out", out, "--json", tmp_path / "t.json")
    found = json.loads((tmp_path / "t.json").read_text())
    assert set(found["evaluation"]["lengths"]) == {str(32 * 2**i) for i in range(7)} and (out / "report.md").is_file()
    assert runs.load_run(out).config.model.vocab_size == 18 and not (out / "manifest.json").exists()
    shutil.copytree(out, tmp_path / "killed", ignore=shutil.ignore_patterns("checkpoints"))  # before its first checkpoint
    call("train", "synthetic", "--resume", "--out", tmp_path / "killed")
    ours, theirs = (load_file(folder / "checkpoints/last/model.safetensors") for folder in (out, tmp_path / "killed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    call("train", "synthetic", "--resume", "--out", out, "--max-steps", 8)
    assert json.loads((out / "run.json").read_text())["result"]["steps"] == 8
    first, again = (json.loads(call("eval", out, "--context", 32, "--context", 100, "--json", "-").stdout) for _ in range(2))
    assert first == again and set(first["lengths"]) == {"32", "100"}
    call("train", "synthetic", *TOY, "--config", "induction_heads", "--max-steps", 1, "--out", tmp_path / "heads")
    call("train", "synthetic", *TOY, "--config", "induction_heads", "--max-steps", 1, "--init", tmp_path / "heads", "--out", tmp_path / "more")
    call("plan", "selective_copying", *TOY, "--context", 32)


def test_wrong_input_is_one_line(tmp_path):
    call("train", "synthetic", *TOY, "--max-steps", 1, "--out", tmp_path / "run")
    for words, expected in (
        (["train", "synthetic", *TOY, "--set", "data.symbols=1", "--out", tmp_path / "x"], "symbols: 2 to 250"),
        (["train", "synthetic", *TOY, "--set", "data.remember=40", "--out", tmp_path / "x"], "needs sequences of 80 or more"),
        (["train", "synthetic", *TOY, "--set", "data.problem=sorting", "--out", tmp_path / "x"], "selective_copying"),
        (["train", "synthetic", *TOY, "--set", "model.direction=bidirectional", "--out", tmp_path / "x"], "causal models"),
        (["train", "synthetic", *TOY, "--set", "train.tokens_per_step=16", "--out", tmp_path / "x"], "at least one"),
        (["train", "synthetic", "--resume", "--config", "induction_heads", "--out", tmp_path / "run"], "leave out"),
        (["eval", tmp_path / "run", "--context", 4], "needs 8 or more"),
        (["eval", tmp_path / "run", "--split", "test"], "makes its own sequences"),
        (["generate", "dna", tmp_path / "run"], "is a run of `train synthetic`"),
        (["train", "dna", "--resume", "--out", tmp_path / "run"], "is a run of `train synthetic`"),
    ):
        stderr = call(*words, code=1).stderr
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and expected in errors[0] and "unexpected" not in stderr, stderr
    assert not (tmp_path / "x").exists()
