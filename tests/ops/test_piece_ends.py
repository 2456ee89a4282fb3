"""What a piece does to a state (ends.py), by every back end here, against the definition's last state and its gradient."""

import pytest
import torch
import torch.nn.functional as F

from seqlab.ops.selective_scan import cpu, reference
from seqlab.ops.selective_scan.ends import piece_ends, torch_piece_ends

VERSIONS = [torch_piece_ends] + ([] if cpu.unavailable() else [cpu.piece_ends])


def case(length, *, softplus=True, masked=False, gated=True, smallest_steps=False, dtype=torch.float64):
    """Arguments of a scan in float64; `smallest_steps`: steps that are 0 or underflow."""
    torch.manual_seed(length)
    batch, channels, states = 2, 5, 3
    x, delta, z, dy = (torch.randn(batch, length, channels, dtype=dtype) for _ in range(4))
    B, C = (torch.randn(batch, length, states, dtype=dtype) for _ in range(2))
    A, bias = -torch.rand(channels, states, dtype=dtype) - 0.01, 0.3 * torch.randn(channels, dtype=dtype)
    if not softplus:
        delta, bias = delta.abs() * 0.1, bias.abs()
    if smallest_steps:
        delta[:, ::2] = -1e4 if softplus else 0.0
        bias = bias if softplus else torch.zeros_like(bias)
    mask = torch.rand(batch, length) > 0.4 if masked else None
    return dict(x=x, dy=dy, delta=delta, A=A, B=B, C=C, z=z if gated else None, bias=bias, mask=mask, softplus=softplus)


def expected(c, reverse):
    """(last state from zero, gradient of the first state, sum of steps)"""
    start = torch.zeros(2, 5, 3, dtype=c["A"].dtype, requires_grad=True)
    y, last = reference.run(
        c["x"], c["delta"], c["A"], c["B"], c["C"], None, c["z"], c["bias"], c["softplus"], start, c["mask"], reverse, True
    )
    (wanted,) = torch.autograd.grad(y, start, c["dy"])
    step = c["delta"] + c["bias"]
    step = F.softplus(step) if c["softplus"] else step
    return last.detach(), wanted, (step if c["mask"] is None else torch.where(c["mask"][..., None], step, 0.0)).sum(1)


def poison(c):
    return {
        k: torch.where(c["mask"][..., None], t, float("nan")) if k in ("x", "dy", "delta", "B", "C", "z") else t
        for k, t in c.items()
    } if c["mask"] is not None and c["z"] is not None else c


@pytest.mark.parametrize("run", VERSIONS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masked": True},
        {"softplus": False},
        {"gated": False},
        {"smallest_steps": True},
        {"smallest_steps": True, "softplus": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 2, 65])
def test_both_sums_are_those_of_the_definition(monkeypatch, run, reverse, options, length):
    monkeypatch.setitem(piece_ends.__globals__, "ELEMENTS", 300)  # several rounds
    c = case(length, **options)
    last, wanted, steps = expected(c, reverse)
    c = poison(c)
    shared = (c["delta"], c["A"], c["bias"], c["mask"], c["softplus"], reverse)
    end, sums = run(c["x"], c["B"], *shared)
    start, _ = run(c["dy"], c["C"], *shared, c["z"], True)
    for got, right in ((end, last), (start, wanted), (sums, steps)):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reverse,adjoint", [(False, False), (True, False), (False, True), (True, True)])
def test_a_long_piece_is_left_as_soon_as_nothing_remains(monkeypatch, reverse, adjoint):
    """Steps of 1 forget a state in some twenty steps: what lies further is not even read."""
    x, vector, z = torch.ones(1, 20_000, 2), torch.ones(1, 20_000, 3), torch.ones(1, 20_000, 2)
    A, delta = -torch.ones(2, 3), torch.full((1, 20_000, 2), 0.5413)  # softplus(0.5413) = 1
    options = dict(delta_softplus=True, reverse=reverse, gate=z, adjoint=adjoint)
    whole, _ = piece_ends(x.double(), vector.double(), delta.double(), A.double(), **options)
    monkeypatch.setitem(piece_ends.__globals__, "NEAR", {"cpu": 10})
    x[:, 100:-100] = float("nan")
    end, sums = piece_ends(x, vector, delta, A, **options)
    torch.testing.assert_close(end.double(), whole, rtol=1e-6, atol=0)
    assert (sums > 20).all() and (sums < 100).all()
    if not adjoint:  # without softplus steps may be negative and everything counts
        end, _ = piece_ends(x, vector, delta.abs(), A, reverse=reverse)
        assert end.isnan().all()


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("reverse", [False, True])
def test_summed_up_part_by_part(monkeypatch, size, reverse):
    monkeypatch.setitem(piece_ends.__globals__, "NEAR", {"cpu": size})
    c = case(65, masked=True)
    last, wanted, steps = expected(c, reverse)
    c = poison(c)
    options = dict(delta_bias=c["bias"], delta_softplus=True, mask=c["mask"], reverse=reverse)
    end, sums = piece_ends(c["x"], c["B"], c["delta"], c["A"], **options)
    start, _ = piece_ends(c["dy"], c["C"], c["delta"], c["A"], **options, gate=c["z"], adjoint=True)
    for got, right in ((end, last), (start, wanted), (sums, steps)):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("forced", ["reference", "cpu"])
def test_any_dtype_and_back_end_through_the_public_function(monkeypatch, forced):
    monkeypatch.setenv("SEQLAB_BACKEND", forced)
    c = case(40)
    last, wanted, _ = expected(c, False)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        d = {k: t.to(dtype) if isinstance(t, torch.Tensor) and k != "mask" else t for k, t in c.items()}
        shared = (d["delta"], d["A"].float() if dtype != torch.float64 else d["A"], d["bias"], True)
        end, _ = piece_ends(d["x"], d["B"], *shared)
        start, _ = piece_ends(d["dy"], d["C"], *shared, gate=d["z"], adjoint=True)
        assert end.dtype == start.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for got, right in ((end, last), (start, wanted)):
            assert (got.double() - right).norm() / right.norm() < tolerance
