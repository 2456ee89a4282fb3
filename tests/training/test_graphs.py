"""Recorded steps give what steps give, bit for bit."""

import csv
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from seqlab.training import memory
from seqlab.training.config import TrainConfig
from seqlab.training.fit import fit
from seqlab.training.graphs import BrokenOffError, GradientGraphs, _GraphRecorder
from seqlab.training.memory import Memory
from seqlab.training.module import _ahead
from seqlab.training.optim import OptimConfig
from tests.training.toy import ToyTask

TRAIN = TrainConfig(max_steps=12, tokens_per_step=128, validate_every=6, log_every=1, accelerator="cpu")


def again(work):
    """Records by remembering what to call, and where the results lie."""
    results = work()

    def replay():
        for place, value in zip(results, work(), strict=True):
            if place is not None:
                place.copy_(value)

    return results, replay


def gradients(backward, steps=5, memory_mode="plain", rows=(8, 6)):
    task = ToyTask(TRAIN, dropout=0.2)
    torch.manual_seed(0)
    model, found = task.build_model(), []
    for step in range(steps):
        batch = {k: v[: rows[step % len(rows)]] for k, v in task.train_batches(step, 0, 1)[0].items()}
        torch.manual_seed(100 + step)
        loss = backward(Memory(memory_mode), model, task, batch, torch.tensor(0.5 + step))
        found.append([loss, torch.rand(()), *(p.grad.clone() for p in model.parameters())])
        for p in model.parameters():
            p.grad = None
    return found


def test_recorded_batches_give_the_same_bits():
    graphs = GradientGraphs(again)
    expected, seen = gradients(memory.backward, 8), gradients(graphs.backward, 8)
    assert graphs.recorded == 2  # a layout for each number of rows
    for one, other in zip(expected, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_layout_is_recorded_when_it_comes_again():
    graphs = GradientGraphs(again)
    gradients(graphs.backward, 2)
    assert graphs.recorded == 0
    gradients(graphs.backward, 1)  # the same layout of another model's batch: only ever asked of one model in a run
    assert graphs.recorded == 1


def test_the_rehearsal_says_nothing(monkeypatch):
    """Torch warns of its debug mode, two lines in the middle of everybody's run."""
    modes = []

    def set_mode(mode):
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=1)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)

    def work():
        assert modes == ["error"]
        warnings.warn("of the model's own", stacklevel=1)
        raise RuntimeError("a loss that waits for the host")

    with pytest.warns(UserWarning) as found, pytest.raises(RuntimeError, match="waits for the host"):
        _GraphRecorder()(work)
    assert modes == ["error", 0] and [str(w.message) for w in found] == ["of the model's own"]


def test_what_cannot_be_recorded_goes_on_as_before():
    attempts = []

    def refuse(work):
        attempts.append(work)
        work()  # gradients are there, and random numbers drawn, when it breaks off
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = GradientGraphs(refuse)
    expected, seen = gradients(memory.backward, 8), gradients(graphs.backward, 8)
    assert graphs.recorded == 0 and len(attempts) == 2  # once a layout
    for one, other in zip(expected, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_after_a_recording_that_broke_off_nothing_is_replayed():
    attempts = []

    def second_breaks(work):
        attempts.append(work)
        if len(attempts) == 2:
            raise BrokenOffError("operation not permitted when stream is capturing")
        return again(work)

    graphs = GradientGraphs(second_breaks)
    expected, seen = gradients(memory.backward, 8), gradients(graphs.backward, 8)
    assert graphs.recorded == 0 and len(attempts) == 2
    for one, other in zip(expected, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_modes_that_go_back_in_parts_are_not_recorded():
    graphs = GradientGraphs(lambda work: pytest.fail("recorded"))
    gradients(graphs.backward, 4, "block")


def test_batches_made_ahead_come_in_order_and_raise_what_making_them_raised():
    def items():
        yield from (1, 2, 3)
        raise ValueError("no fourth")

    seen, source = [], _ahead(items())
    with pytest.raises(ValueError, match="no fourth"):
        for item in source:
            seen.append(item)
    assert seen == [1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("precision, mode", [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "states")])
def test_runs_with_and_without_recorded_steps_are_the_same_bits(precision, mode, tmp_path, monkeypatch):
    """Dropout, gradient clipping and an average of the weights included; resumed in the middle, too."""
    if mode == "states":
        monkeypatch.setattr(memory, "FINE_ABOVE", 0)  # which such small batches would not get
    recorded = []
    monkeypatch.setattr(
        GradientGraphs, "_again", staticmethod(lambda *a, f=GradientGraphs._again: (recorded.append(1), f(*a))[1])
    )
    train = replace(TRAIN, max_steps=24, validate_every=8, accelerator="gpu", precision=precision, ema_decay=0.9, memory=mode)
    runs = {"graphs": train, "kernels": replace(train, cuda_graphs=False), "resumed": train}
    for name, config in runs.items():
        before = len(recorded)
        task = ToyTask(config, dropout=0.2, d_model=64)
        if name == "resumed":
            stopped = ToyTask(config, dropout=0.2, d_model=64, stop_before_step=19)
            with pytest.raises(RuntimeError, match="pulled the plug"):
                fit(stopped, OptimConfig(lr=1e-3), config, tmp_path / name)
        fit(task, OptimConfig(lr=1e-3), config, tmp_path / name, resume=name == "resumed")
        assert (len(recorded) > before) == config.cuda_graphs
    weights = {name: load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors") for name in runs}
    for name in ("kernels", "resumed"):
        assert all(torch.equal(weights["graphs"][key], weights[name][key]) for key in weights["graphs"]), name
    losses = [[row["loss"] for row in csv.DictReader(open(tmp_path / name / "metrics.csv"))] for name in ("graphs", "kernels")]
    assert losses[0] == losses[1]


class Asking(ToyTask):
    """A loss that waits for the GPU on the host, once in a way that torch notices, once in a way that it does not."""

    def __init__(self, train, hidden, **options):
        super().__init__(train, **options)
        self.hidden = hidden

    def loss(self, model, batch):
        value, weight = super().loss(model, batch)
        if self.hidden:
            torch.cuda.synchronize()
            return value, weight
        return (value if value.item() > 0 else value * 2), weight


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("hidden", [False, True])
def test_a_loss_that_asks_the_host_is_not_recorded(hidden, tmp_path, monkeypatch):
    monkeypatch.setattr(GradientGraphs, "_again", staticmethod(lambda *a: pytest.fail("replayed")))
    train = replace(TRAIN, accelerator="gpu")
    for name, config in {"graphs": train, "kernels": replace(train, cuda_graphs=False)}.items():
        result = fit(Asking(config, hidden, dropout=0.2), OptimConfig(lr=1e-3), config, tmp_path / name)
        assert result.steps == 12
    one, other = (load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors") for name in ("graphs", "kernels"))
    assert all(torch.equal(one[key], other[key]) for key in one)
