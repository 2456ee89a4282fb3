"""The fast back ends as torch operators: schema, shapes, gradients, and torch.compile without a graph break."""

import pytest
import torch
from parity import close, conv_arguments, scan_arguments

from seqlab.ops import causal_conv1d, selective_scan
from seqlab.ops.causal_conv1d import cpu as conv_cpu
from seqlab.ops.selective_scan import cpu as scan_cpu

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("optional", [(), ("D", "z", "delta_bias")])
def test_scan_operator(optional):
    t = scan_arguments(2, 70, 5, 3, torch.float32, softplus=True, optional=optional)
    t = {k: v.requires_grad_() for k, v in t.items()}
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    for reverse in (False, True):
        arguments = (*(t.get(name) for name in names), None, True, reverse, True)
        torch.library.opcheck(scan_cpu._forward, arguments, test_utils=CHECKS)


def test_conv_operator():
    t = {k: v.requires_grad_() for k, v in conv_arguments(2, 20, 5, 4, torch.float32).items()}
    for bias, state in ((None, None), (t["bias"], t["initial_state"])):
        torch.library.opcheck(conv_cpu._forward, (t["x"], t["weight"], bias, state, True, False), test_utils=CHECKS)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_whole_graph(compiler, backend, monkeypatch):
    """Both operators, a mask, states, both directions: one graph, the same values and gradients."""
    monkeypatch.delenv("SEQLAB_BACKEND", raising=False)
    torch._dynamo.reset()
    t = scan_arguments(2, 9, 8, 3, torch.float32, softplus=True)
    t["weight"] = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False

    def f(t):
        t = dict(t)
        weight, x = t.pop("weight"), t.pop("u")
        u = causal_conv1d(x, weight, activation="silu", mask=mask, backend=backend)
        y, state = selective_scan(u, **t, delta_softplus=True, mask=mask, return_final_state=True, backend=backend)
        t["initial_state"] = state
        z = selective_scan(y, **t, delta_softplus=True, reverse=True, backend=backend)
        return z, state

    outputs = []
    for function in (f, torch.compile(f, fullgraph=True, backend=compiler)):
        leaves = {k: v.clone().requires_grad_() for k, v in t.items()}
        z, state = function(leaves)
        (z.square().sum() + state.sum()).backward()
        outputs.append([z, state, *(v.grad for v in leaves.values())])
    for one, other in zip(*outputs, strict=True):
        close(one, other, torch.float32)


def test_another_length_does_not_fall_out_of_the_graph():
    torch._dynamo.reset()
    f = torch.compile(
        lambda t: selective_scan(**t, delta_softplus=True, backend="cpu"), fullgraph=True, backend="eager"
    )
    for length in (5, 70, 131):
        t = scan_arguments(1, length, 4, 2, torch.float32, softplus=True)
        close(f(t), selective_scan(**t, delta_softplus=True, backend="reference"), torch.float32)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_every_size_may_be_a_symbol(backend):
    """torch.compile(dynamic=True) makes symbols of the channels and states that a back end is chosen by, too."""
    torch._dynamo.reset()

    def f(t, weight):
        u = causal_conv1d(t["u"], weight, activation="silu", backend=backend)
        return selective_scan(**{**t, "u": u}, delta_softplus=True, return_final_state=True, backend=backend)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="eager")
    for length, channels, states in ((5, 4, 2), (9, 6, 3)):
        t = scan_arguments(2, length, channels, states, torch.float32, softplus=True)
        weight = torch.randn(channels, 4, generator=torch.Generator().manual_seed(5))
        for one, other in zip(compiled(t, weight), f(t, weight), strict=True):
            close(one, other, torch.float32)
