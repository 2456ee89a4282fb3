"""The fused block, its kernels run on the processor (emulate.py), against the separate operators in float64."""

import copy
import re

import emulate
import numpy as np
import pytest
import torch

from seqlab.backbones.bidirectional import BidirectionalMamba
from seqlab.backbones.mamba import BackboneConfig, Block, Mamba, MixerState
from seqlab.ops.block import cuda as fused
from seqlab.ops.block import mamba_block, rows
from seqlab.ops.causal_conv1d import cuda as conv
from seqlab.ops.selective_scan import cuda as scan

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="g++ is not installed; it compiles the emulated kernels")
FLOAT, HALF = torch.float32, torch.bfloat16
TOLERANCE = {FLOAT: 5e-6, HALF: 2e-2}


def relative(a, r):
    error = float((a.detach().double() - r.detach().double()).norm() / (r.detach().double().norm() + 1e-30))
    return float("inf") if error != error else error


@pytest.fixture
def emulated(monkeypatch):
    for module in (conv, scan, rows):
        device = emulate.Device(module.SOURCE, module.KERNELS, 2, 2)
        monkeypatch.setattr(module, "_device", lambda x, device=device: device)


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize(
    "channels,wide,dtype", ((260, FLOAT, FLOAT), (7, FLOAT, HALF), (8, HALF, HALF))
)
def test_norm(emulated, channels, wide, dtype, residual):
    torch.manual_seed(channels)
    x, weight = torch.randn(3, 11, channels).to(wide), torch.randn(channels)
    dy = torch.randn(3, 11, channels).to(dtype)
    more = torch.randn(3, 11, channels).to(wide) if residual else None
    y = rows.norm_forward(x, weight, 1e-5, dtype)
    dx, dweight = rows.norm_backward(dy, x, weight, 1e-5, more)
    assert y.dtype == dtype and dx.dtype == wide and dweight.dtype == FLOAT
    x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_()
    y64 = torch.nn.functional.rms_norm(x64, (channels,), w64, 1e-5)
    y64.backward(dy.double())
    expected = x64.grad if more is None else x64.grad + more.double()
    limit = {FLOAT: 1e-6, HALF: 3e-3}
    assert relative(y, y64) < limit[dtype]
    assert relative(dx, expected) < limit[wide]
    assert relative(dweight, w64.grad) < 1e-6


@pytest.mark.parametrize("channels,wide,dtype", ((8, HALF, HALF), (7, FLOAT, HALF)))
def test_sum_of_rows(emulated, channels, wide, dtype):
    x, other = torch.randn(2, 21, channels).to(wide), torch.randn(2, 21, 2 * channels).to(dtype)[..., channels:]
    into = torch.full((2, 21, 2 * channels), 7.0, dtype=wide)
    rows.add(x, other, into[..., channels:])
    assert torch.equal(into[..., channels:], (x.float() + other.float()).to(wide))
    assert torch.equal(into[..., :channels], torch.full_like(x, 7.0))


@pytest.mark.parametrize("channels,dtype", ((8, HALF), (7, FLOAT)))
def test_gate_of_two_scans(emulated, channels, dtype):
    torch.manual_seed(0)
    a, b, dy = (torch.randn(2, 21, channels).to(dtype) for _ in range(3))
    wide = torch.randn(2, 21, 2 * channels).to(dtype)
    z, dz = wide[..., channels:], torch.full_like(wide, 7.0)
    s64, z64 = (a.double() + b.double()).requires_grad_(), z.double().requires_grad_()
    y64 = s64 * torch.nn.functional.silu(z64)
    y64.backward(dy.double())
    s, y = rows.gate_forward(a.clone(), b.clone(), z)
    ds, again = rows.gate_backward(dy.clone(), s, z, dz[..., channels:])
    limit = {FLOAT: 1e-6, HALF: 6e-3}[dtype]
    pairs = ((s, s64), (y, y64), (again, y64), (ds, s64.grad), (dz[..., channels:], z64.grad))
    assert max(relative(found, exact) for found, exact in pairs) < limit
    assert torch.equal(dz[..., :channels], torch.full_like(a, 7.0))


def blocks(direction, dtype=FLOAT, **options):
    """A block in float64 and the same in float32, with weights that are not special."""
    torch.manual_seed(0)
    sizes = {"d_model": 12, "d_state": 3, "dt_rank": 2, **options}
    config = BackboneConfig(n_layer=1, direction=direction, **sizes)
    exact = (Mamba if direction == "causal" else BidirectionalMamba)(config).layers[0]
    with torch.no_grad():
        for p in exact.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return copy.deepcopy(exact), exact.double()


def both(direction, dtype, length, state, return_state, device="cpu", masked=False, every_state=False, **options):
    """(error, name) of outputs and every gradient of the fused block against the definition."""
    ours, exact = blocks(direction, **options)
    ours.keep_every_state = every_state
    ours, config = ours.to(device), ours.mixer.config
    x = torch.randn(2, length, config.d_model)
    inputs = [x]
    if state:
        inputs += [torch.randn(2, config.d_conv - 1, config.d_inner), torch.randn(2, config.d_inner, config.d_state)]
    mask = torch.rand(2, length) > 0.4 if masked else None
    doubles = [t.double().requires_grad_() for t in inputs]
    inputs = [t.to(device).requires_grad_() for t in inputs]
    with torch.autocast(device, HALF, enabled=dtype == HALF):
        y, after = ours._fused(inputs[0], MixerState(*inputs[1:]) if state else None, mask if mask is None else mask.to(device), return_state)
    y64, after64 = exact(doubles[0], MixerState(*doubles[1:]) if state else None, mask, return_state)
    outputs, true = [y, *(after or ())], [y64, *(after64 or ())]
    seeds = [torch.randn(t.shape, dtype=torch.float64) for t in true]
    torch.autograd.backward(outputs, [s.to(o) for s, o in zip(seeds, outputs)])
    torch.autograd.backward(true, seeds)
    pairs = [("output", *p) for p in zip(outputs, true, strict=True)]
    pairs += [("input", a.grad, r.grad) for a, r in zip(inputs, doubles, strict=True)]
    named = dict(exact.named_parameters())
    pairs += [(n, p.grad, named[n].grad) for n, p in ours.named_parameters()]
    assert all(a.shape == r.shape for _, a, r in pairs)
    return [(relative(a.cpu(), r), name) for name, a, r in pairs]


@pytest.mark.parametrize("grad", (True, False))
@pytest.mark.parametrize("name,value", (
    ("x", np.zeros((2, 5, 12), np.float32)), ("x", None), ("norm_weight", None), ("in_weight", np.zeros((48, 12), np.float32)),
    ("mask", [True]), ("directions[0].A_log", None), ("directions[0].conv_bias", 0.0),
))  # fmt: skip
def test_what_is_no_tensor_is_refused(emulated, name, value, grad):
    ours, _ = blocks("causal")
    names = "norm_weight", "epsilon", "in_weight", "in_bias", "out_weight", "out_bias", "directions"
    given = {"x": torch.randn(2, 5, 12), **dict(zip(names, ours._operands(ours.mixer.directions()), strict=True))}
    if name.startswith("directions"):
        given["directions"] = (given["directions"][0]._replace(**{name.split(".")[1]: value}),)
    else:
        given[name] = value
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=f"^mamba_block: {re.escape(name)} is .*; it must be a torch.Tensor"):
        mamba_block(**given)


@pytest.mark.parametrize("length", (1, 2, 3, 7, 65))
@pytest.mark.parametrize("state", (False, True))
@pytest.mark.parametrize("return_state", (False, True))
def test_causal_block_with_states(emulated, length, state, return_state):
    assert max(both("causal", FLOAT, length, state, return_state))[0] < TOLERANCE[FLOAT]


@pytest.mark.parametrize("length", (1, 3, 65))
@pytest.mark.parametrize("dtype", (FLOAT, HALF))
def test_bidirectional_block(emulated, length, dtype):
    assert max(both("bidirectional", dtype, length, False, False))[0] < TOLERANCE[dtype]


@pytest.mark.parametrize("length", (1, 4, 65))
@pytest.mark.parametrize("direction,state", (("causal", True), ("causal", False), ("bidirectional", False)))
def test_masked_block(emulated, length, direction, state):
    assert max(both(direction, FLOAT, length, state, direction == "causal", masked=True))[0] < TOLERANCE[FLOAT]


@pytest.mark.parametrize("length", (1, 2, 65))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("masked", (False, True))
def test_one_direction_in_pieces(emulated, monkeypatch, length, reverse, masked):
    """What the layer by layer memory mode runs: one direction of a bidirectional block, states going in and out."""
    ours, exact = blocks("bidirectional")
    monkeypatch.setattr(ours, "fuse", True)
    monkeypatch.setattr(ours, "_fusible", lambda x: True)
    config = ours.mixer.config
    inputs = [torch.randn(2, length, 12), torch.randn(2, 3, config.d_inner), torch.randn(2, config.d_inner, 3)]
    mask = torch.rand(2, length) > 0.4 if masked else None
    doubles = [t.double().requires_grad_() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    y, after = ours.direction(inputs[0], reverse, MixerState(*inputs[1:]), mask)
    true, true_after = exact.direction(doubles[0], reverse, MixerState(*doubles[1:]), mask)
    outputs, expected = [y, *after], [true, *true_after]
    seeds = [torch.randn(t.shape, dtype=torch.float64) for t in expected]
    torch.autograd.backward(outputs, [s.float() for s in seeds])
    torch.autograd.backward(expected, seeds)
    pairs = [*zip(outputs, expected, strict=True), *((a.grad, r.grad) for a, r in zip(inputs, doubles, strict=True))]
    named = dict(exact.named_parameters())
    pairs += [(p.grad, named[n].grad) for n, p in ours.named_parameters() if p.grad is not None]
    assert len(pairs) == 6 + 10
    assert max(relative(a, r) for a, r in pairs) < TOLERANCE[FLOAT]


@pytest.mark.parametrize("direction,state", (("causal", True), ("causal", False), ("bidirectional", False)))
@pytest.mark.parametrize("length,dtype", ((1, FLOAT), (65, FLOAT), (65, HALF)))
@pytest.mark.parametrize("masked", (False, True))
def test_block_that_keeps_every_state(emulated, direction, state, length, masked, dtype):
    errors = both(direction, dtype, length, state, state, masked=masked, every_state=True)
    limit = TOLERANCE[dtype] if dtype == FLOAT else 2 * TOLERANCE[dtype]  # a mask leaves few steps to average over
    assert max(errors)[0] < limit, max(errors)


@pytest.mark.parametrize("direction", ("causal", "bidirectional"))
def test_every_state_is_kept_at_any_size(emulated, monkeypatch, direction):
    """A probe of the planner on a short sequence must keep what a long one does."""
    ours, _ = blocks(direction)
    kept = {}
    for ours.keep_every_state in (False, True):
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(tuple(t.shape)) or t, lambda t: t):
            ours._fused(torch.randn(2, 65, 12), None, None, False)
        kept[ours.keep_every_state] = seen
    directions = 1 if direction == "causal" else 2
    assert kept[True].count((2, 9, 3, 24)) == directions and (2, 9, 3, 24) not in kept[False]
    # a gated scan's output before the gate, beside the one after it; two scans share the gate, and one tensor is kept in any case
    assert kept[True].count((2, 65, 24)) == kept[False].count((2, 65, 24)) + (directions == 1)


@pytest.mark.parametrize("options", ({"bias": True}, {"conv_bias": False}, {"d_conv": 1}, {"d_conv": 2}), ids=str)
def test_options_of_the_config(emulated, options):
    assert max(both("causal", FLOAT, 20, True, True, **options))[0] < TOLERANCE[FLOAT]


def test_half_precision_with_states(emulated):
    assert max(both("causal", HALF, 65, True, True))[0] < TOLERANCE[HALF]


def test_comparison_notices_a_wrong_answer(emulated, monkeypatch):
    right = fused._backward
    monkeypatch.setattr(fused, "_backward", lambda *a: [g if g is None else g * 1.001 for g in right(*a)])
    assert max(both("causal", FLOAT, 20, True, True))[0] > TOLERANCE[FLOAT]


def test_dropout_acts_on_the_branch_alone(emulated):
    ours, _ = blocks("causal", dropout=0.5)
    x = torch.randn(1, 30, 12)
    torch.manual_seed(1)
    y, _ = ours._fused(x, None, None, False)
    torch.manual_seed(1)
    expected = x + ours.dropout(ours.mixer(ours.norm(x), None, None, False)[0])
    assert relative(y, expected) < TOLERANCE[FLOAT]


def test_checkpointing_and_frozen_weights(emulated):
    ours, _ = blocks("bidirectional")
    x = torch.randn(1, 30, 12, requires_grad=True)
    ours.mixer.mamba_fwd.D.requires_grad_(False)
    plain = torch.autograd.grad(ours._fused(x, None, None, False)[0].square().sum(), x)
    kept = torch.utils.checkpoint.checkpoint(ours._fused, x, None, None, False, use_reentrant=False)[0]
    assert torch.equal(torch.autograd.grad(kept.square().sum(), x)[0], plain[0])


def test_nothing_is_kept_without_gradients(emulated):
    ours, _ = blocks("causal")
    x = torch.randn(1, 30, 12)
    with torch.no_grad():
        quiet = ours._fused(x, None, None, True)
    assert quiet[0].grad_fn is None and torch.equal(quiet[0], ours._fused(x, None, None, True)[0])


def test_same_bits_on_every_run(emulated):
    def run():
        ours, _ = blocks("bidirectional")
        x = torch.linspace(-1, 1, 2 * 65 * 12).reshape(2, 65, 12)
        y = ours._fused(x, None, None, False)[0]
        y.square().sum().backward()
        return [y, *(p.grad for p in ours.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def check_weight_gradient(device, dtype):
    wide = torch.randn(6001, 20, device=device).to(dtype)  # two parts, one row left over, strided
    a, b = wide[:, 3:8], torch.randn(6001, 6, device=device).to(dtype)
    found = fused.weight_gradient(a, b)
    assert found.dtype == FLOAT and relative(found, a.double().t() @ b.double()) < 1e-5


@pytest.mark.parametrize("dtype", (FLOAT, HALF))
def test_weight_gradient_in_parts(dtype):
    check_weight_gradient("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("dtype", (FLOAT, HALF))
def test_weight_gradient_on_a_gpu(dtype):
    check_weight_gradient("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("direction,state", (("causal", True), ("causal", False), ("bidirectional", False)))
@pytest.mark.parametrize("length", (1, 3, 65, 3000))
@pytest.mark.parametrize("dtype", (FLOAT, HALF))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("sizes", ({}, {"d_model": 64, "d_state": 16, "dt_rank": None}), ids=str)
@pytest.mark.parametrize("every_state", (False, True))
def test_block_on_a_gpu(direction, state, length, dtype, masked, sizes, every_state):
    errors = both(direction, dtype, length, state, state, "cuda", masked, every_state, **sizes)
    assert max(errors)[0] < 4 * TOLERANCE[dtype], max(errors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_model_takes_the_fused_block_on_a_gpu(monkeypatch):
    ours = BidirectionalMamba(BackboneConfig(d_model=16, n_layer=2, direction="bidirectional")).cuda()
    x = torch.randn(1, 50, 16, device="cuda")
    calls = []
    right = fused.Block.apply
    monkeypatch.setattr(fused.Block, "apply", lambda *a: calls.append(1) or right(*a))
    y, _ = ours(x)
    assert len(calls) == 2
    for layer in ours.layers:
        layer.fuse = False
    assert relative(y, ours(x)[0]) < 1e-5 and len(calls) == 2


@pytest.mark.parametrize("direction", ("causal", "bidirectional"))
@pytest.mark.parametrize("masked", (False, True))
def test_stack_that_keeps_no_inputs(emulated, monkeypatch, direction, masked):
    torch.manual_seed(4)
    config = BackboneConfig(d_model=12, n_layer=5, d_state=3, dt_rank=2, direction=direction, bias=direction == "causal")
    model = (Mamba if direction == "causal" else BidirectionalMamba)(config)
    exact = copy.deepcopy(model).double()
    monkeypatch.setattr(Block, "fuse", True)
    monkeypatch.setattr(Block, "_fusible", lambda self, x: x.dtype == FLOAT)
    model.recover_inputs = True
    x, mask = torch.randn(2, 70, 12), torch.rand(2, 70) > 0.3 if masked else None
    ours, double = x.clone().requires_grad_(), x.double().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _ = model(ours, mask=mask, return_state=False)
    big = {t.data_ptr() for t in kept if t.shape == x.shape}
    assert len(big) <= 2, "of the blocks' inputs none is kept: only what the final norm wants"
    true, _ = exact(double, mask=mask, return_state=False)
    seed = torch.randn_like(true)
    y.backward(seed.float(), retain_graph=True)
    true.backward(seed)
    named = dict(exact.named_parameters())
    pairs = [(y, true), (ours.grad, double.grad), *((p.grad, named[n].grad) for n, p in model.named_parameters())]
    assert max(relative(a, r) for a, r in pairs) < TOLERANCE[FLOAT]
    with pytest.raises(RuntimeError, match="goes back once"):
        y.backward(seed.float())


def test_self_check_is_small_and_sees_a_wrong_block(emulated, monkeypatch):
    from seqlab.ops.block.self_check import self_check

    assert self_check(device="cpu") < 1e-5
    right = fused.rows.norm_forward
    monkeypatch.setattr(fused.rows, "norm_forward", lambda x, weight, *rest: right(x, 1.01 * weight, *rest))
    assert self_check(device="cpu") > 1e-3
