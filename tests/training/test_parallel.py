"""Context parallelism: several processes with a piece of the sequence each, against one process with all of it."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
from pieces import CASES, outcome  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """For each of four ranks, (size of the group, case's name) -> what the rank made of it."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(__file__).parent / "pieces.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "4", str(folder / "store"), str(folder)],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@functools.cache
def alone(name):
    return outcome(next(case for case in CASES if case.name == name))


def worst(pairs) -> float:
    """Largest relative error over (got, expected); NaN and missing answers count as infinite."""
    error = 0.0
    for got, expected in pairs:
        if got is None or got.shape != expected.shape:
            return float("inf")
        if expected.numel():
            e = float((got - expected).norm() / expected.norm().clamp(min=1e-3))
            error = max(error, float("inf") if e != e else e)
    return error


def test_worst_notices_wrong_and_missing_answers():
    x = torch.ones(3, dtype=torch.float64)
    assert worst([(x, x)]) == 0
    assert worst([(x + 1e-9, x)]) > 1e-10
    assert worst([(None, x)]) == worst([(x[:2], x)]) == worst([(x * float("nan"), x)]) == float("inf")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_every_gradient_are_those_of_one_rank(outcomes, case, size):
    whole, parts = alone(case.name), [outcomes[rank][size, case.name] for rank in range(size)]
    pairs = {
        "y": (torch.cat([part["y"] for part in parts], 1), whole["y"]),
        "dx": (torch.cat([part["dx"] for part in parts], 1), whole["dx"]),
    }
    for name, gradient in whole["gradients"].items():
        pairs[name] = (sum(part["gradients"][name] for part in parts), gradient)
    errors = {name: worst([pair]) for name, pair in pairs.items()}
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_sent_do_not_depend_on_the_length(outcomes, size):
    layers, batch, channels, states, width, number = 2, 2, 12, 4, 4, 8  # float64; two sequences
    forward = (width - 1) * (channels + 1) + channels * (states + 1)  # halo and its flags; state and sum of steps
    backward = (width - 1) * channels + channels * states
    expected = (4 * layers, layers * batch * number * (forward + backward))
    for rank in range(size):
        for name in ("causal", "causal ten times as long"):
            assert outcomes[rank][size, name]["traffic"] == expected
        both_ways = outcomes[rank][size, "bidirectional"]["traffic"]
        assert both_ways == tuple(2 * n for n in expected)
