"""What the operator tests share: random arguments, results with every gradient, and the comparison.

Tolerances are relative to |want| + rms(want), element by element, against the reference in float64 on the same (rounded)
inputs. The weights that make a loss of the outputs are rounded to the data type too, so bfloat16 only shows the
rounding of what is written.
"""

import torch

from seqlab.ops import causal_conv1d, selective_scan

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 6e-3}
OPS = {"selective_scan": selective_scan, "causal_conv1d": causal_conv1d}
DATA = ("u", "delta", "B", "C", "z", "x")


def close(got, want, dtype, what="", factor=1.0):
    """Assert that two tensors agree; NaN anywhere is a failure."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    error = (got - want).abs() / (want.abs() + want.square().mean().sqrt() + 1e-30)
    if (want == 0).all():
        error = got.abs()
    worst = error.max().item() if not error.isnan().any() else float("nan")
    assert worst <= factor * TOLERANCE[dtype], f"{what}: error {worst:.2e}, allowed {factor * TOLERANCE[dtype]:.0e}"


def parameter_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def scan_arguments(b, l, d, n, dtype, *, softplus, state=True, optional=("D", "z", "delta_bias"), seed=0):
    """Arguments of selective_scan, rounded to `dtype` (parameters: float32, or float64 for float64)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    t = {
        "u": normal(b, l, d),
        "delta": normal(b, l, d) if softplus else normal(b, l, d).abs() * 0.3,
        "A": -normal(d, n).abs() * 2 - 0.01,
        "B": normal(b, l, n),
        "C": normal(b, l, n),
        "D": normal(d),
        "z": normal(b, l, d),
        "delta_bias": normal(d) - 1 if softplus else normal(d).abs() * 0.1,
        "initial_state": normal(b, d, n),
    }
    for name in ("D", "z", "delta_bias"):
        if name not in optional:
            del t[name]
    if not state:
        del t["initial_state"]
    return {k: v.to(dtype if k in DATA else parameter_dtype(dtype)) for k, v in t.items()}


def conv_arguments(b, l, d, w, dtype, *, state=True, bias=True, seed=0):
    """Arguments of causal_conv1d."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    t = {"x": normal(b, l, d), "weight": normal(d, w)}
    if bias:
        t["bias"] = normal(d)
    if state:
        t["initial_state"] = normal(b, w - 1, d)
    return {k: v.to(dtype if k in (*DATA, "initial_state") else parameter_dtype(dtype)) for k, v in t.items()}


def results(op, tensors, options, *, backend, dtype, device="cpu", final_grad=True):
    """Outputs and the gradient of a weighting of them for every tensor: {"y", "final", "d<name>"}."""
    leaves = {k: v.detach().to(device).requires_grad_() for k, v in tensors.items()}
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    function = OPS[op]
    if final_grad:
        y, final = function(**leaves, **options, return_final_state=True, backend=backend)
    else:
        y = function(**leaves, **options, backend=backend)
        with torch.no_grad():
            _, final = function(**leaves, **options, return_final_state=True, backend=backend)
    g = torch.Generator().manual_seed(99)
    loss = (y.double() * torch.randn(y.shape, generator=g).to(dtype).double().to(device)).sum()
    if final_grad:
        loss = loss + (final.double() * torch.randn(final.shape, generator=g).to(dtype).double().to(device)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), "final": final.detach()} | {
        f"d{k}": grad for k, grad in zip(leaves, grads, strict=True)
    }


def compare(op, tensors, options, *, backend, dtype, device="cpu", final_grad=True, factor=1.0):
    """Run a back end and the float64 reference on the same numbers; assert that everything agrees."""
    got = results(op, tensors, options, backend=backend, dtype=dtype, device=device, final_grad=final_grad)
    exact = {k: v.double() for k, v in tensors.items()}
    want = results(op, exact, options, backend="reference", dtype=dtype, final_grad=final_grad)
    assert got["y"].dtype == dtype
    for name, value in want.items():
        close(got[name], value, dtype, f"{op} {backend} {dtype} {name} {sorted(tensors)}", factor)
    return got
