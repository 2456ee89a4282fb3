"""The mamba_ssm back ends without their extensions: stand-ins with the extensions' own signatures and layouts, computed by
the references, show that transposes, flips, argument order and gradients are right. The real ones are in the gpu tests."""

import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from parity import compare, conv_arguments, scan_arguments

from seqlab.ops.causal_conv1d import mamba_ssm as conv_mamba
from seqlab.ops.causal_conv1d import reference as conv_reference
from seqlab.ops.selective_scan import mamba_ssm as scan_mamba
from seqlab.ops.selective_scan import reference as scan_reference


def gradients(function, tensors, dout):
    """Gradients for the tensors that are there. In a thread of its own: inside an operator torch records nothing."""

    def work():
        leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
        grads = iter(torch.autograd.grad(function(*leaves), [t for t in leaves if t is not None], dout))
        return [None if t is None else next(grads) for t in leaves]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def last(x):
    """(b c l) <-> (b l c)."""
    return None if x is None else x.transpose(1, 2)


def scan(u, delta, A, B, C, D, z, bias, softplus):
    for x in (u, delta, B, C, z):
        assert x is None or (x.stride(-1) == 1 and x.dtype == u.dtype)
    assert B.shape[1] == C.shape[1] == 1 and A.dtype == torch.float32
    y, state = scan_reference.run(
        last(u), last(delta), A, last(B.squeeze(1)), last(C.squeeze(1)), D, last(z), bias, softplus, None, None, False, True
    )  # fmt: skip
    return last(y), state


def scan_fwd(u, delta, A, B, C, D, z, bias, softplus):
    out, state = scan(u, delta, A, B, C, D, None, bias, softplus)
    snapshots = torch.full((*u.shape[:2], -(-u.shape[2] // 2048), 2 * A.shape[1]), torch.nan)
    snapshots[:, :, -1, 1::2] = state
    gated = [] if z is None else [scan(u, delta, A, B, C, D, z, bias, softplus)[0]]
    return [out, snapshots, *gated]


def scan_bwd(u, delta, A, B, C, D, z, bias, dout, x, out, dz, softplus, recompute):
    assert dz is None and recompute is False and (out is None) == (z is None) and dout.is_contiguous()
    du, ddelta, dA, dB, dC, dD, dz, dbias = gradients(
        lambda *t: scan(*t, softplus)[0], [u, delta, A, B, C, D, z, bias], dout
    )
    return [du, ddelta, dA, dB, dC, dD, dbias, *([] if z is None else [dz])]


def conv(x, weight, bias, state, silu):
    assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
    assert state is None or state.stride(1) == 1
    return last(conv_reference.run(last(x), weight, bias, silu, last(state), False))


def conv_fwd(x, weight, bias, seq_idx, initial_states, final_states_out, silu):
    assert seq_idx is None and final_states_out is None
    return conv(x, weight, bias, initial_states, silu)


def conv_bwd(x, weight, bias, dout, seq_idx, initial_states, dfinal, dx, return_dinitial, silu):
    assert seq_idx is None and dfinal is None and dx is None and return_dinitial == (initial_states is not None)
    return tuple(gradients(lambda *t: conv(*t, silu), [x, weight, bias, initial_states], dout))


@pytest.fixture
def stand_ins(monkeypatch):
    extension = types.ModuleType("selective_scan_cuda")
    extension.fwd, extension.bwd = scan_fwd, scan_bwd
    functions = types.ModuleType("causal_conv1d.cpp_functions")
    functions.causal_conv1d_fwd_function, functions.causal_conv1d_bwd_function = conv_fwd, conv_bwd
    package = types.ModuleType("causal_conv1d")
    package.cpp_functions = functions
    for module in (extension, functions, package):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for module in (scan_mamba, conv_mamba):
        monkeypatch.setattr(module, "unavailable", lambda request=None: None)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("optional", [(), ("D",), ("z", "delta_bias"), ("D", "z", "delta_bias")])
def test_scan(stand_ins, reverse, optional):
    t = scan_arguments(2, 11, 8, 3, torch.float32, softplus=True, state=False, optional=optional)
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) > 0.3
    for masked in (False, True):
        options = {"delta_softplus": True, "reverse": reverse, **({"mask": mask} if masked else {})}
        compare("selective_scan", t, options, backend="mamba_ssm", dtype=torch.float32, final_grad=False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_conv(stand_ins, reverse, state, bias):
    t = conv_arguments(2, 11, 8, 4, torch.float32, state=state, bias=bias)
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) > 0.3
    for activation in (None, "silu"):
        for masked in (False, True):
            options = {"activation": activation, "reverse": reverse, **({"mask": mask} if masked else {})}
            compare("causal_conv1d", t, options, backend="mamba_ssm", dtype=torch.float32)


def test_too_large_is_refused_when_it_runs(stand_ins, monkeypatch):
    """A compiled graph does not ask `unavailable` again when the length changes."""
    monkeypatch.setattr(scan_mamba, "_too_large", lambda *sizes: f"too large: {sizes}")
    t = scan_arguments(1, 4, 8, 2, torch.float32, softplus=True, state=False)
    with pytest.raises(RuntimeError, match=r"too large: \(1, 4, 8, 2\)"):
        compare("selective_scan", t, {}, backend="mamba_ssm", dtype=torch.float32, final_grad=False)
