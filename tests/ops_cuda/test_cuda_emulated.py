"""The CUDA sources themselves, run on the processor (emulate.py), against the float64 reference: outputs and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import emulate
import pytest
import torch

from seqlab.ops import causal_conv1d, dispatch, nvrtc, selective_scan
from seqlab.ops.causal_conv1d import cuda as conv
from seqlab.ops.causal_conv1d import reference as conv_reference
from seqlab.ops.selective_scan import cpu, reference
from seqlab.ops.selective_scan import cuda as scan
from seqlab.ops.selective_scan.ends import piece_ends, torch_piece_ends

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="g++ is not installed; it compiles the emulated kernels")
FLOAT, HALF = torch.float32, torch.bfloat16
TOLERANCE = {FLOAT: 3e-6, HALF: 4e-3}


def worst(pairs):
    """Largest relative error (norm of the difference over norm of the reference); NaN anywhere counts as infinite."""
    errors = [float((a.double() - r).norm() / (r.norm() + 1e-30)) for a, r in pairs if r is not None and r.numel()]
    return max(float("inf") if e != e else e for e in errors)


def test_worst_notices_wrong_and_missing_answers():
    r = torch.ones(4, dtype=torch.float64)
    assert worst([(r, r)]) == 0
    assert worst([(r * 1.1, r)]) > 0.05
    assert worst([(r * float("nan"), r)]) == float("inf")


def chosen(sides):
    """Instead of scan.short: these `sides` (None: scan.cu), which going backward are as many tiles of TILE."""

    def short(device, batch, length, channels, n, size, backward=False, scans=1):
        found = None if sides is None else scan.Sides(*sides)
        if found is None or not backward:
            return found
        return found._replace(tile=scan.TILE, blocks=found.blocks * found.tile // scan.TILE if found.blocks > 1 else 1)

    return short


def scan_errors(monkeypatch, batch, length, channels, states, dtype=FLOAT, *, softplus=True, reverse=False, masked=False,
                options=True, decay=1.0, blocks=(2, 2), strided=False, sides=None, fine=False):  # fmt: skip
    """Of every result. `sides`: by scan_short.cu, with such blocks. `fine`: with the states of every tile kept for the backward
    pass, whose results must be, but for dz of half precision, the same bits as with few."""
    monkeypatch.setattr(scan, "short", chosen(sides))
    device = emulate.Device(scan.SOURCE, scan.KERNELS, *blocks)
    monkeypatch.setattr(scan, "_device", lambda x: device)
    torch.manual_seed(length)
    rows = (lambda d: torch.randn(batch, length, 2 * d)[..., d:]) if strided else (lambda d: torch.randn(batch, length, d))
    u, delta, z = (rows(channels).to(dtype) for _ in range(3))
    if not softplus:
        delta = (delta.float().abs() * 0.1).to(dtype)
    B, C = (rows(states).to(dtype) for _ in range(2))
    A = -torch.rand(channels, states) * decay - 1e-4
    D = torch.randn(channels) if options else None
    bias = torch.randn(channels).abs() * 0.1 if options else None
    initial = torch.randn(batch, channels, states) if options else None
    mask = torch.rand(batch, length) > 0.3 if masked else None
    if masked:
        for x in (u, delta, z, B, C):
            x[~mask] = float("nan")
    inputs = [u, delta, A, B, C, D, z if options else None, bias, initial]
    segment = scan.segment_length(batch, length, channels)
    y, final, states_kept, _ = scan.forward(*inputs, mask, softplus, reverse, segment)
    dy, dfinal = torch.randn(batch, length, channels).to(dtype), torch.randn(batch, channels, states)
    if masked:
        dy[~mask] = float("nan")
    grads = scan.backward(dy, dfinal, *inputs, mask, states_kept, softplus, reverse, segment)
    if fine:
        few, (y, final, states_kept, ungated) = (y, final, *grads), scan.forward(*inputs, mask, softplus, reverse, scan.TILE)
        assert states_kept.shape[1] == -(-length // scan.TILE) and (ungated is None) == (inputs[6] is None)
        grads = scan.backward(dy, dfinal, *inputs, mask, states_kept, softplus, reverse, scan.TILE, ungated)
        for number, (a, b) in enumerate(zip(few, (y, final, *grads), strict=True)):
            assert a is None or torch.equal(a, b) or number == 8 and (dtype == HALF or states > scan.BACKWARD_GROUP), number
    exact = [None if x is None else x.double().requires_grad_() for x in inputs]
    y64, final64 = reference.run(*exact[:8], softplus, exact[8], mask, reverse, True)
    seen = dy.double() if mask is None else torch.where(mask[..., None], dy.double(), 0.0)
    torch.autograd.backward((y64, final64), (seen, dfinal.double()))
    pairs = [(y, y64.detach()), (final, final64.detach())]
    return worst(pairs + [(g, None if x is None else x.grad) for g, x in zip(grads, exact, strict=True)])


@pytest.mark.parametrize("length", (1, 2, 7, 65, 300))
@pytest.mark.parametrize("reverse", (False, True))
def test_scan(monkeypatch, length, reverse):
    assert scan_errors(monkeypatch, 2, length, 5, 3, reverse=reverse) < TOLERANCE[FLOAT]


@pytest.mark.parametrize(
    "case",
    (
        {"masked": True},
        {"masked": True, "softplus": False, "reverse": True},
        {"options": False},
        {"decay": 0.01},  # slow: no chunk forgets
        {"decay": 300.0},  # fast: the first pass stops at once
        {"blocks": (1, 1)},  # one chunk, no first pass
        {"strided": True},
    ),
    ids=str,
)
def test_scan_options(monkeypatch, case):
    assert scan_errors(monkeypatch, 1, 200, 6, 3, **case) < TOLERANCE[FLOAT]


def test_scan_half_precision_over_several_channel_blocks(monkeypatch):
    assert scan_errors(monkeypatch, 1, 65, 300, 16, HALF, masked=True) < TOLERANCE[HALF]


@pytest.mark.parametrize("dtype", (FLOAT, HALF))
@pytest.mark.parametrize(
    "length,channels,states,sides,case",
    (
        (1, 5, 3, (2, 1), {}), (7, 6, 3, (4, 2), {"reverse": True}), (300, 5, 3, (2, 1), {"masked": True}),
        (300, 4, 3, (1, 2), {"masked": True, "reverse": True, "softplus": False}), (200, 20, 16, (8, 2), {}),
        (300, 6, 8, (2, 2, 1, 16), {"options": False, "strided": True}), (200, 4, 4, (4, 1, 1, 16), {"decay": 0.01}),
        (300, 4, 4, (4, 4), {"decay": 300.0}), (300, 9, 5, (8, 2, 4, 16), {}), (190, 7, 3, (8, 1, 4, 16), {"decay": 0.01}),
        (300, 9, 5, (4, 2, 4), {"masked": True, "reverse": True}), (100, 6, 4, (8, 2, 2), {"decay": -0.5}),
        (260, 6, 16, (4, 1, 8), {"options": False, "strided": True}), (129, 20, 3, (8, 2, 4), {"masked": True}),
    ),
    ids=str,
)  # fmt: skip
def test_short_scan(monkeypatch, length, channels, states, sides, case, dtype):
    """One launch: pairs of channels side by side, warps and blocks of clusters in time, several rounds, tails, blocks without a step, odd
    channels, states that grow."""
    assert scan_errors(monkeypatch, 2, length, channels, states, dtype, sides=sides, **case) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", (FLOAT, HALF))
@pytest.mark.parametrize(
    "length,channels,states,sides,masked,gate",
    ((1, 5, 3, (2, 1), False, True), (300, 6, 4, (2, 2), True, True), (150, 20, 16, (8, 2), False, False),
     (150, 18, 5, (8, 1, 4, 16), True, True), (150, 5, 3, None, True, True)),
)  # fmt: skip
def test_both_directions_at_once(monkeypatch, length, channels, states, sides, masked, gate, dtype):
    """Two scans of one shape, one from the right, and one gradient for both; `sides` None: one after the other."""
    monkeypatch.setattr(scan, "short", chosen(sides))
    device = emulate.Device(scan.SOURCE, scan.KERNELS, 2, 2)
    monkeypatch.setattr(scan, "_device", lambda x: device)
    torch.manual_seed(length)
    mask, batch = torch.rand(2, length) > 0.3 if masked else None, 2
    rows = {"u": channels, "delta": channels, "B": states, "C": states}
    z = torch.randn(batch, length, channels).to(dtype) if gate else None
    dy = torch.randn(batch, length, channels).to(dtype)
    scans = []
    for _ in range(2):
        u, delta, B, C = (torch.randn(batch, length, width).to(dtype) for width in rows.values())
        D, bias = torch.randn(channels), torch.randn(channels).abs() * 0.1
        scans.append((u, delta, -torch.rand(channels, states) - 1e-4, B, C, D, z, bias))
    for x in (dy, *(t for each in scans for t in each if t is not None and t.dim() == 3)) if masked else ():
        x[~mask] = float("nan")
    kept, pairs = [], []
    segment = scan.segment_length(batch, length, channels)
    found = scan.forward_pair(tuple(scans), mask, True, segment)
    kept = [states for _, states in found]
    grads = scan.backward_pair(dy, scans, mask, kept, True, segment)
    seen = dy.double() if mask is None else torch.where(mask[..., None], dy.double(), 0.0)
    for i, (each, (y, _), mine) in enumerate(zip(scans, found, grads, strict=True)):
        exact = [None if x is None else x.double().requires_grad_() for x in each]
        y64, _ = reference.run(*exact, True, None, mask, i > 0, True)
        y64.backward(seen)
        assert mine[-1] is None
        pairs += [(y, y64.detach())] + [(g, None if x is None else x.grad) for g, x in zip(mine[:-1], exact, strict=True)]
    assert worst(pairs) < TOLERANCE[dtype]


def test_scans_that_do_not_lie_alike_run_one_after_the_other(monkeypatch):
    monkeypatch.setattr(scan, "short", chosen((2, 1)))
    device = emulate.Device(scan.SOURCE, scan.KERNELS, 2, 2)
    monkeypatch.setattr(scan, "_device", lambda x: device)
    torch.manual_seed(0)
    A, B = -torch.rand(6, 3), torch.randn(1, 40, 3)
    first, second = torch.randn(1, 40, 6), torch.randn(1, 40, 12)[..., 6:]
    scans = tuple((u, u, A, B, B, None, None, None) for u in (first, second))
    (y, _), (y_too, _) = scan.forward_pair(scans, None, True, 0)
    exact = [reference.run(*(t.double() for t in each[:5]), None, None, None, True, None, None, i > 0, True)[0]
             for i, each in enumerate(scans)]  # fmt: skip
    assert worst(zip((y, y_too), exact)) < TOLERANCE[FLOAT]


@pytest.mark.parametrize("dtype", (FLOAT, HALF))
@pytest.mark.parametrize(
    "channels,case", ((136, {}), (72, {"reverse": True}), (64, {"masked": True}), (64, {"options": False, "strided": True})),
    ids=str,
)  # fmt: skip
def test_scan_of_aligned_rows(monkeypatch, dtype, channels, case):
    """Rows read in pieces of 16 bytes: whole warps of channels, a part of one, tiles cut short by the end or by a mask."""
    assert scan_errors(monkeypatch, 1, 83, channels, 16, dtype, **case) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", (FLOAT, HALF))
@pytest.mark.parametrize(
    "length,channels,states,case",
    ((1, 5, 3, {}), (83, 72, 16, {"reverse": True}), (300, 6, 3, {"masked": True, "strided": True}), (300, 5, 3, {"options": False}),
     (200, 64, 16, {"masked": True, "softplus": False, "reverse": True}), (64, 136, 16, {}), (200, 64, 8, {"blocks": (1, 1)}),
     (200, 130, 4, {"decay": 0.01}), (90, 8, 16, {"options": False, "strided": True})),
    ids=str,
)  # fmt: skip
def test_states_kept_at_every_tile(monkeypatch, length, channels, states, case, dtype):
    """The backward pass from what was kept, without going forward again: in one chunk or several, of whole and partial warps."""
    assert scan_errors(monkeypatch, 2, length, channels, states, dtype, fine=True, **case) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", ({}, {"masked": True, "reverse": True}, {"options": False}), ids=str)
@pytest.mark.parametrize("dtype", (FLOAT, HALF))
def test_states_kept_at_every_tile_in_groups(monkeypatch, case, dtype):
    monkeypatch.setattr(scan, "BACKWARD_GROUP", 3)
    assert scan_errors(monkeypatch, 1, 100, 70, 7, dtype, fine=True, **case) < TOLERANCE[dtype]


@pytest.mark.parametrize("length,reverse", ((200, False), (620, False), (620, True)))
def test_scan_over_more_chunks_than_are_summed_in_place(monkeypatch, length, reverse):
    """By the carry: a chunk a thread, and runs of three with an incomplete one and empty ones at the end."""
    monkeypatch.setattr(scan, "FEW", 2)
    assert scan_errors(monkeypatch, 2, length, 15, 3, decay=0.01, reverse=reverse, blocks=(20, 2)) < TOLERANCE[FLOAT]


@pytest.mark.parametrize("case", ({}, {"masked": True, "reverse": True}, {"options": False}), ids=str)
def test_scan_with_more_states_than_the_backward_pass_takes_at_once(monkeypatch, case):
    monkeypatch.setattr(scan, "BACKWARD_GROUP", 3)
    assert scan_errors(monkeypatch, 1, 100, 70, 7, **case) < TOLERANCE[FLOAT]


def test_a_call_of_a_known_kind_takes_its_own_tensors(monkeypatch):
    """The second call reuses what was found out for the first: the same layout at other addresses, then another layout."""
    device = emulate.Device(scan.SOURCE, scan.KERNELS, 2, 2)
    monkeypatch.setattr(scan, "_device", lambda x: device)
    torch.manual_seed(0)
    for strided in (False, False, True, False):
        u, delta, z = (torch.randn(1, 70, 12)[..., 6:] if strided else torch.randn(1, 70, 6) for _ in range(3))
        A, B, C = -torch.rand(6, 3), torch.randn(1, 70, 3), torch.randn(1, 3, 70).transpose(1, 2)
        y, _, kept, _ = scan.forward(u, delta, A, B, C, None, z, None, None, None, True, False, 32)
        grads = scan.backward(y, None, u, delta, A, B, C, None, z, None, None, None, kept, True, False, 32)
        exact = [t.double().requires_grad_() for t in (u, delta, A, B, C, z)]
        y64, _ = reference.run(*exact[:5], None, exact[5], None, True, None, None, False, True)
        y64.backward(y.double())
        pairs = [(grads[i], x.grad) for i, x in zip((0, 1, 2, 3, 4, 6), exact, strict=True)]
        assert worst([(y, y64.detach()), *pairs]) < TOLERANCE[FLOAT]


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """Tensors of the processor take the way of tensors on a GPU, kernels included."""
    for module in (scan, conv):
        device = emulate.Device(module.SOURCE, module.KERNELS, 2, 2)
        monkeypatch.setattr(module, "_device", lambda x, device=device: device)
        monkeypatch.setattr(module, "unavailable", lambda request=None: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    for operator in (selective_scan, causal_conv1d):
        monkeypatch.setitem(operator.__globals__, "_known", {})
    monkeypatch.setitem(selective_scan.__globals__, "_recent", dispatch.Recent())
    monkeypatch.setattr(scan, "_recent", dispatch.Recent())
    return lambda operator: operator.__globals__["_known"]


def test_a_scan_seen_before_skips_the_checks_but_not_the_answer(monkeypatch, as_if_on_a_gpu):
    """The same layout with other values, another alignment; then what makes it another call: a flag, a gradient, a stride."""
    torch.manual_seed(0)
    checks = []
    real = selective_scan.__globals__["_check"]
    monkeypatch.setitem(selective_scan.__globals__, "_check", lambda *a: checks.append(1) or real(*a))
    for number, (cut, reverse, final, grad, seen) in enumerate((
        (slice(0, 6), False, False, True, False), (slice(0, 6), False, False, True, True), (slice(1, 7), False, False, True, True),
        (slice(0, 6), True, False, True, False), (slice(0, 6), False, True, True, False), (slice(0, 6), False, True, True, True),
        (slice(0, 6), False, True, False, False), (slice(0, 6), False, True, False, True),
    )):  # fmt: skip
        u, delta, z = (torch.randn(1, 70, 12)[..., cut].detach() for _ in range(3))
        A, B, C = -torch.rand(6, 3), torch.randn(1, 70, 3), torch.randn(1, 70, 3)
        leaves = [x.requires_grad_(grad) for x in (u, delta, A, B, C, torch.randn(6), z, torch.randn(6))]
        before = len(checks)
        found = selective_scan(*leaves, True, reverse=reverse, return_final_state=final, backend="cuda")
        assert (len(checks) == before) == seen, number
        exact = [x.detach().double().requires_grad_(grad) for x in leaves]
        wanted = reference.run(*exact, True, None, None, reverse, True)
        found, wanted = (found, wanted) if final else ((found,), wanted[:1])
        pairs = [(a.detach(), r.detach()) for a, r in zip(found, wanted, strict=True)]
        if grad:
            sums = [sum((x * torch.arange(x.numel()).view(x.shape)).sum() for x in out) for out in (found, wanted)]
            pairs += zip(torch.autograd.grad(sums[0], leaves), torch.autograd.grad(sums[1], exact), strict=True)
        assert worst(pairs) < TOLERANCE[FLOAT], number
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan(u, delta, A, B[:, :5], C, backend="cuda")


def test_a_scan_whose_tensors_must_be_changed_is_never_taken_for_known(as_if_on_a_gpu):
    u, A, B = torch.randn(1, 40, 6), -torch.rand(6, 3), torch.randn(1, 40, 3)
    for _ in range(2):
        y = selective_scan(u, u.transpose(1, 2).contiguous().transpose(1, 2), A, B.bfloat16(), B, backend="cuda")
    assert not any(as_if_on_a_gpu(selective_scan).values())
    y64, _ = reference.run(*(x.double() for x in (u, u, A, B.bfloat16(), B)), *[None] * 3, False, None, None, False, True)
    assert worst([(y, y64)]) < TOLERANCE[FLOAT]


def test_gradients_of_a_known_scan_whose_kept_tensors_came_back_in_another_layout(as_if_on_a_gpu):
    """As after activation checkpointing or offloading: what the forward pass found out of strides no longer holds."""
    torch.manual_seed(1)
    wide = torch.randn(1, 40, 12)
    leaves = [wide[..., 6:].detach(), wide[..., :6].detach(), -torch.rand(6, 3), torch.randn(1, 40, 3), torch.randn(1, 40, 3)]
    leaves = [x.requires_grad_() for x in leaves]
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
            y = selective_scan(*leaves, delta_softplus=True, backend="cuda")
        grads = torch.autograd.grad(y.square().sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    y64, _ = reference.run(*exact, *[None] * 3, True, None, None, False, True)
    assert worst(zip(grads, torch.autograd.grad(y64.square().sum(), exact), strict=True)) < TOLERANCE[FLOAT]


def test_a_convolution_seen_before_takes_its_own_tensors(monkeypatch, as_if_on_a_gpu):
    torch.manual_seed(0)
    for number, (cut, reverse, masked) in enumerate(((slice(0, 6), False, False),) * 2 + ((slice(1, 7), True, False),) * 2
                                                    + ((slice(0, 6), False, True),) * 2):  # fmt: skip
        x = torch.randn(2, 50, 12)[..., cut].detach()
        mask = torch.rand(2, 50) > 0.4 if masked else None
        leaves = [t.requires_grad_() for t in (x, torch.randn(6, 4), torch.randn(6))]
        seen = len(as_if_on_a_gpu(causal_conv1d))
        y = causal_conv1d(*leaves, "silu", mask=mask, reverse=reverse, backend="cuda")
        assert (len(as_if_on_a_gpu(causal_conv1d)) == seen) == bool(number % 2)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        y64 = causal_conv1d(*exact, "silu", mask=mask, reverse=reverse, backend="reference")
        dy = torch.randn(y.shape)
        pairs = zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(y64, exact, dy.double()), strict=True)
        assert worst([(y.detach(), y64.detach()), *pairs]) < TOLERANCE[FLOAT]


@pytest.mark.parametrize("dtype", (FLOAT, HALF))
def test_groups_of_states_of_aligned_rows(monkeypatch, dtype):
    monkeypatch.setattr(scan, "BACKWARD_GROUP", 8)
    assert scan_errors(monkeypatch, 1, 70, 72, 16, dtype) < TOLERANCE[dtype]


def test_scan_is_the_same_on_every_run(monkeypatch):
    device = emulate.Device(scan.SOURCE, scan.KERNELS, 2, 2)
    monkeypatch.setattr(scan, "_device", lambda x: device)
    inputs = [torch.randn(1, 100, 6), torch.randn(1, 100, 6), -torch.rand(6, 3), torch.randn(1, 100, 3), torch.randn(1, 100, 3)]
    runs = []
    for _ in range(2):
        y, final, kept, _ = scan.forward(*inputs, None, None, None, None, None, True, False, 32)
        runs.append((y, final, *scan.backward(y, final, *inputs, None, None, None, None, None, kept, True, False, 32)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True) if a is not None)


@pytest.mark.parametrize("length", (1, 2, 37, 150))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("width,channels,dtype,silu,state", ((4, 24, FLOAT, True, True), (1, 6, FLOAT, False, False),
                                                             (8, 6, FLOAT, True, True), (4, 16, HALF, True, True)))  # fmt: skip
def test_convolution(monkeypatch, length, reverse, width, channels, dtype, silu, state):
    device = emulate.Device(conv.SOURCE, conv.KERNELS, 1, 1)
    monkeypatch.setattr(conv, "_device", lambda x: device)
    torch.manual_seed(length)
    x, dy = (torch.randn(2, length, channels).to(dtype) for _ in range(2))
    weight, bias = torch.randn(channels, width), torch.randn(channels)
    initial = torch.randn(2, width - 1, channels).to(dtype) if state else None
    y = conv.forward(x, weight, bias, initial, silu, reverse)
    grads = conv.backward(dy, x, weight, bias, initial, silu, reverse)
    exact = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias, initial)]
    y64 = conv_reference.run(*exact[:3], silu, exact[3], reverse)
    y64.backward(dy.double())
    pairs = [(y, y64.detach())] + [(g, None if t is None else t.grad) for g, t in zip(grads, exact, strict=True)]
    assert worst(pairs) < TOLERANCE[dtype]


@pytest.mark.parametrize("adjoint", (False, True))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("case", ({}, {"masked": True}, {"decay": 0.01}, {"decay": 300.0, "masked": True}), ids=str)
def test_what_a_piece_does_to_a_state(monkeypatch, case, reverse, adjoint):
    """The chunk summaries, over all chunks, against the definition's final state and its gradient."""
    device = emulate.Device(scan.SOURCE, scan.KERNELS, 2, 2)
    monkeypatch.setattr(scan, "_device", lambda x: device)
    torch.manual_seed(1)
    batch, length, channels, states = 2, 200, 6, 3
    u, delta, z, dy = (torch.randn(batch, length, channels) for _ in range(4))
    B, C = (torch.randn(batch, length, states) for _ in range(2))
    A, bias = -torch.rand(channels, states) * case.get("decay", 1.0) - 1e-4, torch.randn(channels).abs() * 0.1
    mask = torch.rand(batch, length) > 0.3 if "masked" in case else None
    exact = [t.double() for t in (u, delta, A, B, C)]
    start = torch.zeros(batch, channels, states, dtype=torch.float64, requires_grad=True)
    y, final = reference.run(*exact, None, z.double(), bias.double(), True, start, mask, reverse, True)
    (wanted,) = torch.autograd.grad(y, start, dy.double(), retain_graph=True)
    step = torch.nn.functional.softplus(exact[1] + bias.double())
    steps = (step if mask is None else torch.where(mask[..., None], step, 0.0)).sum(1)
    if mask is not None:
        for t in (u, delta, z, dy, B, C):
            t[~mask] = float("nan")
    arguments = (dy, C, delta, A, bias, mask, True, reverse, z, True) if adjoint else (u, B, delta, A, bias, mask, True, reverse)
    for run in (scan.piece_ends, torch_piece_ends):
        ends, sums = run(*arguments)
        assert worst([(ends, wanted if adjoint else final.detach())]) < TOLERANCE[FLOAT], run
        # the sum may stop short, where nothing is left of any state
        assert worst([(torch.exp(sums[..., None] * A), torch.exp(steps[..., None] * exact[2]))]) < 1e-4 or "decay" in case


@pytest.mark.parametrize("length", (1, 5, 150))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("state", (False, True))
def test_convolution_with_a_mask(monkeypatch, length, reverse, state, width=4):
    """Through the public function, whose other back ends move the real positions together."""
    device = emulate.Device(conv.SOURCE, conv.KERNELS, 1, 1)
    monkeypatch.setattr(conv, "_device", lambda x: device)
    monkeypatch.setattr(nvrtc, "on_device", lambda f, *a: f(*a))
    monkeypatch.setattr(conv, "unavailable", lambda request=None: None)
    torch.manual_seed(length)
    x = torch.randn(3, length, 6)
    mask = torch.rand(3, length) > 0.4
    mask[1] = False  # nothing real
    x[~mask] = float("nan")
    tensors = [x, torch.randn(6, width), torch.randn(6), torch.randn(3, width - 1, 6) if state else None]
    results = []
    for backend, dtype in (("cuda", FLOAT), ("reference", torch.float64)):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
        y, final = causal_conv1d(*leaves[:3], "silu", leaves[3], mask, reverse, True, backend=backend)
        torch.manual_seed(1)
        loss = (y * torch.randn(y.shape).to(dtype)).sum() + (final * torch.randn(final.shape).to(dtype)).sum()
        wanted = [t for t in leaves if t is not None]
        results.append([y.detach(), final.detach(), *torch.autograd.grad(loss, wanted)])
    assert worst(zip(*results, strict=True)) < TOLERANCE[FLOAT]


@pytest.mark.parametrize("length", (1, 2, 37, 150))
@pytest.mark.parametrize("width,dtype,bias", ((4, FLOAT, True), (3, HALF, False)))
def test_convolution_in_both_directions_at_once(monkeypatch, length, width, dtype, bias):
    device = emulate.Device(conv.SOURCE, conv.KERNELS, 1, 1)
    monkeypatch.setattr(conv, "_device", lambda x: device)
    torch.manual_seed(length)
    x, *dys = (torch.randn(2, length, 12).to(dtype) for _ in range(3))
    weights = [torch.randn(12, width) for _ in range(2)]
    biases = [torch.randn(12) if bias else None for _ in range(2)]
    strided = torch.cat((x, x), -1)[..., :12]
    into = torch.full((2, length, 24), float("nan"), dtype=dtype)[..., 12:]
    ys = conv.forward_pair(strided, weights, biases, True)
    dweight, dbias = conv.backward_pair(*dys, strided, weights, biases, True, into)
    exact = [None if t is None else t.double().requires_grad_() for t in (x, *weights, *biases)]
    y64 = [conv_reference.run(exact[0], exact[1 + i], exact[3 + i], True, None, bool(i)) for i in range(2)]
    torch.autograd.backward(y64, [d.double() for d in dys])
    pairs = [*zip(ys, y64, strict=True), (into, exact[0].grad)]
    pairs += [(dweight[i], exact[1 + i].grad) for i in range(2)] + [(dbias[i], exact[3 + i].grad) for i in range(2) if bias]
    assert worst([(a, r.detach()) for a, r in pairs]) < TOLERANCE[dtype]


def test_gradient_of_a_convolution_added_to_another(monkeypatch):
    device = emulate.Device(conv.SOURCE, conv.KERNELS, 1, 1)
    monkeypatch.setattr(conv, "_device", lambda x: device)
    x, dy, before = (torch.randn(2, 37, 12) for _ in range(3))
    weight = torch.randn(12, 4)
    alone = conv.backward(dy, x, weight, None, None, True, True)[0]
    into = torch.cat((before, before), -1)
    conv.backward(dy, x, weight, None, None, True, True, into=into[..., 12:], add=True)
    assert worst([(into[..., 12:], (before + alone).double())]) < 1e-6 and torch.equal(into[..., :12], before)


@pytest.mark.parametrize("adjoint", (False, True))
@pytest.mark.parametrize("reverse", (False, True))
def test_what_a_piece_does_to_a_state_part_by_part(monkeypatch, reverse, adjoint):
    """The kernels on slices of a longer piece, as ends.py calls them: strided rows, a mask cut in time."""
    device = emulate.Device(scan.SOURCE, scan.KERNELS, 2, 2)
    monkeypatch.setattr(scan, "_device", lambda x: device)
    monkeypatch.setattr(cpu, "piece_ends", scan.piece_ends)
    monkeypatch.setitem(piece_ends.__globals__, "NEAR", {"cpu": 30})
    torch.manual_seed(2)
    x, delta, z = (torch.randn(2, 200, 6) for _ in range(3))
    vector, A, mask = torch.randn(2, 200, 3), -0.02 * torch.rand(6, 3) - 1e-4, torch.rand(2, 200) > 0.3
    options = dict(delta_softplus=True, mask=mask, reverse=reverse, gate=z, adjoint=adjoint)
    found = piece_ends(x, vector, delta, A, **options)
    exact = torch_piece_ends(
        x.double(), vector.double(), delta.double(), A.double(), None, mask, True, reverse, z.double(), adjoint
    )
    assert worst(zip(found, exact)) < TOLERANCE[FLOAT]


def test_a_piece_with_several_groups_of_states_has_the_longest_walks_sum(monkeypatch):
    """The first group forgets within a few steps, the second never: the sum of steps is that of all of them."""
    device = emulate.Device(scan.SOURCE, scan.KERNELS, 2, 2)
    monkeypatch.setattr(scan, "_device", lambda x: device)
    monkeypatch.setattr(scan, "GROUP", 3)
    torch.manual_seed(3)
    x, delta, vector = torch.randn(1, 120, 6), torch.randn(1, 120, 6) + 2, torch.randn(1, 120, 6)
    A = torch.cat((torch.full((6, 3), -50.0), torch.full((6, 3), -1e-3)), 1)
    found = scan.piece_ends(x, vector, delta, A, None, None, True, False)
    exact = torch_piece_ends(x.double(), vector.double(), delta.double(), A.double(), None, None, True, False)
    assert worst(zip(found, exact)) < TOLERANCE[FLOAT]


def test_second_gradients_are_refused_not_wrong(as_if_on_a_gpu):
    leaves = [x.requires_grad_() for x in (torch.randn(1, 20, 4), torch.rand(1, 20, 4), -torch.rand(4, 2), *torch.randn(2, 1, 20, 2))]
    y = selective_scan(*leaves, backend="cuda")
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_processes_that_compile_the_same_kernels_at_once_do_not_disturb_each_other(tmp_path):
    """Ranks of a test took each other's half-written library, or found their own renamed away."""
    code = f"""
import sys, time
sys.path[:0] = {[str(Path(emulate.__file__).parent), str(Path(emulate.__file__).parents[2])]}
import emulate
from seqlab.ops.causal_conv1d import cuda as conv
defines = (("WIDTH", 4), ("VEC", 1), ("BF16", 0), ("PAIRED", 0), ("SILU", 1), ("MASKED", 0))
print("ready", flush=True)
sys.stdin.readline()
emulate._library(conv.SOURCE, defines, conv.KERNELS)
"""
    pipe = subprocess.PIPE
    ranks = [subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        rank.stdin.write("go\n")
        rank.stdin.flush()
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0, 0]
    assert [path.suffix for path in (tmp_path / "seqlab-emulated").iterdir()] == [".so"]
