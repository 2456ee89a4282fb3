"""The trainer on a toy task: exact micro-batches, bitwise resume, best and last, early stopping, the NaN guard."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import ToyTask

from seqlab.errors import UserError
from seqlab.training.callbacks import read_history
from seqlab.training.fit import fit
from seqlab.training.module import DivergedError, TrainConfig, TrainingModule
from seqlab.training.optim import OptimConfig, learning_rate, parameter_groups

ROOT = Path(__file__).resolve().parents[2]


def train(tmp_path, name="run", *, steps=12, optim=None, resume=False, init=None, task=None, **options):
    config = TrainConfig(**{"max_steps": steps, "validate_every": 4, "log_every": 1, "accelerator": "cpu", **options})
    task = task or ToyTask(config)
    result = fit(task, optim or OptimConfig(lr=1e-2), config, tmp_path / name, resume=resume, init=init)
    return result, tmp_path / name


def weights(run, which="last"):
    return load_file(run / "checkpoints" / which / "model.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_learns_and_leaves_what_it_promises(tmp_path):
    result, run = train(tmp_path, steps=40)
    assert result.ended == "finished" and result.steps == 40
    rows = read_history(run / "metrics.csv")
    losses = [row["loss"] for row in rows if not math.isnan(row["loss"])]
    assert len(losses) == 40 and losses[-1] < 0.8 * losses[0]
    assert [row["step"] for row in rows if not math.isnan(row["valid"])] == list(range(4, 41, 4))
    assert result.best == min(row["valid"] for row in rows if not math.isnan(row["valid"])) or result.best > 0
    for which in ("best", "last"):
        assert {p.name for p in (run / "checkpoints" / which).iterdir()} >= {"model.safetensors", "config.yaml"}
    assert not list(run.rglob(".*.safetensors*")), "no temporary file is left"


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    _, one = train(tmp_path, "one")
    _, two = train(tmp_path, "two")
    _, three = train(tmp_path, "three", seed=5)
    assert_same(weights(one), weights(two))
    assert any(not torch.equal(a, b) for a, b in zip(weights(one).values(), weights(three).values()))


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, options):
    _, whole = train(tmp_path, "whole", steps=12, **options)
    task = ToyTask(TrainConfig(max_steps=12), stop_before_step=7)  # dies after the checkpoint of step 4
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(tmp_path, "broken", steps=12, task=task, **options)
    result, resumed = train(tmp_path, "broken", steps=12, resume=True, **options)
    assert result.steps == 12
    assert_same(weights(whole), weights(resumed))
    assert_same(weights(whole, "best"), weights(resumed, "best"))
    strip = lambda run: [(r["step"], r["loss"], r["valid"]) for r in read_history(run / "metrics.csv")]  # noqa: E731
    assert str(strip(whole)) == str(strip(resumed)), "no step is logged twice or lost"


def test_killed_at_any_instant_and_resumed_equals_uninterrupted(tmp_path):
    """SIGKILL from outside, while steps and checkpoints are being written."""
    script = (
        "import sys; sys.path[:0] = [%r, %r]\n"
        "from pathlib import Path\nfrom toy import ToyTask\n"
        "from seqlab.training.fit import fit\nfrom seqlab.training.module import TrainConfig\n"
        "from seqlab.training.optim import OptimConfig\n"
        "c = TrainConfig(max_steps=60, validate_every=3, accelerator='cpu')\n"
        "run = Path(sys.argv[1])\n"
        "fit(ToyTask(c, pause=0.02), OptimConfig(lr=1e-2), c, run, resume=(run / 'checkpoints/last/trainer.pt').exists())\n"
    ) % (str(ROOT), str(Path(__file__).parent))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    def start(run):
        return subprocess.Popen([sys.executable, "-c", script, str(run)], env=environment, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(timeout=120) == 0
    kills, run = 0, tmp_path / "killed"
    while True:
        process = start(run)
        deadline = time.monotonic() + 60
        before = _saved(run)
        while process.poll() is None and time.monotonic() < deadline and kills < 2:
            if _saved(run) != before:  # it has gone on since it was started: kill it somewhere after that
                time.sleep(0.013 * (1 + kills))
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        code = process.wait(timeout=120)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert kills == 2
    assert_same(weights(tmp_path / "whole"), weights(run))


@pytest.mark.parametrize("place, call", [("update", 7), ("validate", 3)])
def test_ctrl_c_in_an_update_or_a_validation_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, place, call):
    """Half an update was saved; a validation that was broken off never came, not even that of the last step."""
    _, whole = train(tmp_path, "whole", ema_decay=0.9)
    owner, name = {
        "update": (torch.optim.swa_utils.AveragedModel, "update_parameters"), "validate": (TrainingModule, "validate"),
    }[place]  # fmt: skip
    right, calls = getattr(owner, name), []

    def press(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return right(*arguments)

    before = signal.getsignal(signal.SIGINT)
    try:
        monkeypatch.setattr(owner, name, press)
        broken, _ = train(tmp_path, "broken", ema_decay=0.9)
        assert broken.ended == "interrupted" and broken.steps == (7 if place == "update" else 4 * call)
        result, resumed = train(tmp_path, "broken", resume=True, ema_decay=0.9)
    finally:
        signal.signal(signal.SIGINT, before)  # which Lightning ignores from then on
    assert result.steps == 12 and result.best_step == 12
    for which in ("last", "best"):
        assert_same(weights(whole, which), weights(resumed, which))


def _saved(run):
    path = run / "checkpoints" / "last" / "trainer.pt"
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.mark.parametrize("metric, scale", [("bits per symbol", math.log(2)), ("nats per sequence", 1.0), ("error rate", 1.0)])
def test_the_line_shows_the_loss_in_the_units_of_the_metric(tmp_path, capfd, monkeypatch, metric, scale):
    monkeypatch.setattr(ToyTask, "metric", metric)
    _, run = train(tmp_path, steps=4)
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("step 4 "))
    shown, after = line.split("  loss ")[1].split(" ", 1)
    assert float(shown) == pytest.approx([r["loss"] for r in read_history(run / "metrics.csv") if r["step"] == 4 and not math.isnan(r["loss"])][0] / scale, abs=1e-4)
    assert after.startswith("bits") == metric.startswith("bits") and line.endswith(f"({metric})")


def test_micro_batches_change_nothing(tmp_path):
    exact = {"clip": 0.0, "lr": 1e-2}
    config = TrainConfig(max_steps=3, accelerator="cpu")
    _, whole = train(tmp_path, "whole", steps=3, optim=OptimConfig(**exact), task=ToyTask(config, dropout=0.0))
    split = ToyTask(config, dropout=0.0, micro_rows=3)
    _, pieces = train(tmp_path, "pieces", steps=3, optim=OptimConfig(**exact), task=split)
    for a, b in zip(weights(whole).values(), weights(pieces).values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_early_stopping_keeps_the_best(tmp_path):
    # trained on one rule, validated on its opposite: the more it learns, the worse it gets
    config = TrainConfig(max_steps=200)
    result, run = train(tmp_path, steps=200, task=ToyTask(config, wrong_validation=True), patience=2)
    assert result.ended == "stopped early" and result.steps < 200
    assert result.best_step < result.steps
    rows = [r for r in read_history(run / "metrics.csv") if not math.isnan(r["valid"])]
    assert min(r["valid"] for r in rows) == pytest.approx(result.best, rel=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(weights(run, "best").values(), weights(run, "last").values()))


def test_time_limit_ends_the_run_with_the_schedule_at_its_end(tmp_path):
    started = time.monotonic()
    task = ToyTask(TrainConfig(), pause=0.02)
    result, run = train(tmp_path, steps=100_000, max_minutes=3 / 60, task=task, validate_every=10**6)
    assert time.monotonic() - started < 30 and result.ended == "finished"
    last = [r for r in read_history(run / "metrics.csv") if not math.isnan(r["lr"])][-1]
    assert last["lr"] < 0.1 * 1e-2


@pytest.mark.parametrize("poison, expected", [("weights", "backbone.layers.1"), ("input", "embedding")])
def test_nan_stops_the_run_and_names_step_layer_and_batch(tmp_path, poison, expected):
    task = ToyTask(TrainConfig(), poison_at_step=6, poison=poison)
    with pytest.raises(DivergedError) as caught:
        train(tmp_path, steps=12, task=task)
    message = str(caught.value)
    assert "step 6" in message and expected in message and "batch: toy batch of step 6" in message
    assert "\n" not in message
    last = weights(tmp_path / "run")
    assert all(torch.isfinite(w).all() for w in last.values()), "the last good checkpoint is kept"


def test_init_takes_the_weights_and_refuses_another_model(tmp_path):
    _, first = train(tmp_path, "first", steps=4)
    checkpoint = first / "checkpoints" / "last" / "model.safetensors"
    _, second = train(tmp_path, "second", steps=1, optim=OptimConfig(lr=1e-9, min_lr=0), init=checkpoint)
    for a, b in zip(weights(first).values(), weights(second).values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    config = TrainConfig(max_steps=1)
    with pytest.raises(UserError, match=r"A_log is \[16, 2\] there and \[24, 2\] in this model"):
        train(tmp_path, "third", steps=1, init=checkpoint, task=ToyTask(config, d_model=12))


@pytest.mark.parametrize("damage", ["truncate", "garbage", "remove"])
def test_damaged_checkpoints_are_one_clear_line(tmp_path, damage):
    _, run = train(tmp_path, steps=4)
    trainer_state = run / "checkpoints" / "last" / "trainer.pt"
    model = run / "checkpoints" / "last" / "model.safetensors"
    for path in (trainer_state, model):
        if damage == "truncate":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif damage == "garbage":
            path.write_bytes(b"\x00garbage" * 100)
        else:
            path.unlink()
    for options in ({"resume": True}, {"init": model}):
        with pytest.raises(UserError) as caught:
            train(tmp_path, steps=8, **options)
        assert "\n" not in str(caught.value)


def test_devices_that_are_not_there():
    from seqlab.training.fit import resolve_accelerator

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; the message is for machines without")
    assert resolve_accelerator(TrainConfig()) == "cpu"
    with pytest.raises(UserError, match="torch sees no GPU here"):
        resolve_accelerator(TrainConfig(accelerator="gpu"))


def test_two_processes_train_as_one(tmp_path):
    """DDP over gloo: two ranks with half of the rows each end at the weights of one rank with all of them, also where
    gradients are made of many backward passes that DDP does not watch."""
    script = (
        "import sys; sys.path[:0] = [%r, %r]\n"
        "from pathlib import Path\nfrom toy import ToyTask\n"
        "from seqlab.training.fit import fit\nfrom seqlab.training.module import TrainConfig\n"
        "from seqlab.training.optim import OptimConfig\n"
        "c = TrainConfig(max_steps=5, validate_every=5, accelerator='cpu', devices=int(sys.argv[2]), ema_decay=0.5,\n"
        "                memory=sys.argv[3], chunk_tokens=5 if sys.argv[3] == 'chunked' else None)\n"
        "fit(ToyTask(c, dropout=0.0, uneven=True), OptimConfig(lr=1e-2), c, Path(sys.argv[1]))\n"
    ) % (str(ROOT), str(Path(__file__).parent))
    path = tmp_path / "train.py"
    path.write_text(script)
    runs = {"one": ("1", "auto"), "two": ("2", "auto"), "pieces": ("2", "chunked")}
    for name, options in runs.items():
        done = subprocess.run(
            [sys.executable, str(path), str(tmp_path / name), *options],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one = weights(tmp_path / "one")
    for name in ("two", "pieces"):
        for key, value in weights(tmp_path / name).items():
            torch.testing.assert_close(value, one[key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")


def test_seeds_that_do_not_fit_into_a_generator_are_refused():
    """A seed of 2^64 was an OverflowError of torch, after the run directory had been made."""
    with pytest.raises(ValueError, match=r"seed: must lie in \[0, 2\^62\), got 18446744073709551616"):
        TrainConfig(seed=2**64)


def test_weight_decay_spares_norms_biases_and_the_state_matrix():
    module = TrainingModule(ToyTask(TrainConfig()), OptimConfig(), TrainConfig())
    decayed, free = parameter_groups(module.model, 0.1)
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    names = {id(p): name for name, p in module.model.named_parameters()}
    free_names = {names[id(p)].rsplit(".", 1)[-1] for p in free["params"]}
    assert {"A_log", "D", "bias"} <= free_names
    assert all("norm" in names[id(p)] or names[id(p)].endswith(("A_log", "D", "bias")) for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(module.model.parameters()))


def test_schedule_warms_up_and_ends_at_the_floor():
    config = OptimConfig(lr=1.0, min_lr=0.01, warmup=0.1)
    assert learning_rate(config, 0.05) == pytest.approx(0.5)
    assert learning_rate(config, 0.1) == pytest.approx(1.0)
    assert learning_rate(config, 0.55) == pytest.approx(0.505)
    assert learning_rate(config, 1.0) == learning_rate(config, 1.7) == pytest.approx(0.01)
