"""Compare a back end with a reference on this machine, quickly: what `seqlab doctor` shows beside its name.

Here for selective_scan and causal_conv1d, which are called alike; the other operators have a self_check.py of their own.
"""

import importlib

import torch
from torch import Tensor

from seqlab.ops import backends, causal_conv1d, selective_scan
from seqlab.ops.dispatch import Request

BATCH, LENGTH, CHANNELS, STATES, WIDTH = 2, 150, 24, 5, 4


def self_check(op: str, backend: str) -> float:
    """Largest error of a back end over outputs and every gradient, relative to each one's largest value; scan and convolution
    in both directions.

    Runs in float32 on the device the back end is for; initial state and final-state gradient take part where it has
    them. About 1e-6 is right, above 1e-3 is broken.

    Raises:
        ValueError: unknown op or back end.
        RuntimeError: the back end is not available here; the message is its reason.
    """
    modules = backends(op)
    if backend not in modules:
        raise ValueError(f"backend {backend!r} is not a back end of {op}; allowed: {', '.join(modules)}")
    reason = modules[backend].unavailable()
    if reason is not None:
        raise RuntimeError(f"{op}: back end {backend!r} is not available: {reason}")
    if op not in ("selective_scan", "causal_conv1d"):
        return importlib.import_module(f"seqlab.ops.{op}.self_check").self_check(backend)
    device = "cuda" if backend in ("cuda", "mamba_ssm") else "cpu"
    width, states = (0, STATES) if op == "selective_scan" else (WIDTH, 0)
    worst = 0.0
    for reverse in (False, True):
        request = Request(
            device, torch.float32, CHANNELS, BATCH, LENGTH, states, width, True, True, grad=True, reverse=reverse
        )
        with_state = modules[backend].unavailable(request) is None
        arguments, options = _scan_case(with_state) if op == "selective_scan" else _conv_case(with_state)
        options |= {"reverse": reverse, "return_final_state": True}
        function = selective_scan if op == "selective_scan" else causal_conv1d
        got = _results(function, arguments, options, backend, torch.float32, device, with_state)
        want = _results(function, arguments, options, "reference", torch.float64, "cpu", with_state)
        for g, w in zip(got, want, strict=True):
            error = (g.cpu().double() - w).abs().max() / w.abs().max().clamp_min(1e-6)
            worst = max(worst, error.item() if error == error else float("inf"))
    return worst


def _scan_case(with_state: bool) -> tuple[dict[str, Tensor], dict]:
    normal = _normal()
    return {
        "u": normal(BATCH, LENGTH, CHANNELS),
        "delta": normal(BATCH, LENGTH, CHANNELS),
        "A": -normal(CHANNELS, STATES).abs() - 0.1,
        "B": normal(BATCH, LENGTH, STATES),
        "C": normal(BATCH, LENGTH, STATES),
        "D": normal(CHANNELS),
        "z": normal(BATCH, LENGTH, CHANNELS),
        "delta_bias": normal(CHANNELS) - 1.0,
        **({"initial_state": normal(BATCH, CHANNELS, STATES)} if with_state else {}),
    }, {"delta_softplus": True}


def _conv_case(with_state: bool) -> tuple[dict[str, Tensor], dict]:
    normal = _normal()
    return {
        "x": normal(BATCH, LENGTH, CHANNELS),
        "weight": normal(CHANNELS, WIDTH),
        "bias": normal(CHANNELS),
        **({"initial_state": normal(BATCH, WIDTH - 1, CHANNELS)} if with_state else {}),
    }, {"activation": "silu"}


def _normal():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _results(function, arguments, options, backend, dtype, device, with_state) -> list[Tensor]:
    """Outputs, then the gradient of a fixed weighting of them with respect to each argument."""
    tensors = {k: v.to(device, dtype).requires_grad_() for k, v in arguments.items()}
    with torch.enable_grad():
        if with_state:
            y, final = function(**tensors, **options, backend=backend)
        else:  # a back end without a final-state gradient: ask for the state apart
            y = function(**tensors, **(options | {"return_final_state": False}), backend=backend)
            with torch.no_grad():
                _, final = function(**tensors, **options, backend=backend)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().reshape(y.shape).to(y)
        loss = (y * weights).sum()
        if with_state:
            loss = loss + final.square().sum() / 2
        grads = torch.autograd.grad(loss, list(tensors.values()))
    return [y.detach(), final.detach(), *grads]
