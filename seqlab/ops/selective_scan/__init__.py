"""selective_scan: the recurrence of a selective state space model (S6), forward and backward, in either direction.

Maths, memory and limits are in README.md beside this file. This module holds the signature, the checks and the handling
of masks for back ends that know nothing of them.

Shapes: b batch, l length, d channels, n states per channel.
"""

import operator
from types import ModuleType

import torch
from torch import Tensor

from seqlab.ops import dispatch
from seqlab.ops.selective_scan import cpu, cuda, mamba_ssm, reference

BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "mamba_ssm": mamba_ssm, "cpu": cpu, "reference": reference}
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
_known: dict[tuple, cuda.Call | None] = {}
"""Calls seen before, by their layout: what is left to do of them."""
_recent = dispatch.Recent()
"""The last of these."""
CLOSED = -1e30
"""softplus of this plus any sane bias is exactly 0, and so is its slope; unlike -inf it cannot make NaN."""


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective state space recurrence over a sequence.

        delta'_t = softplus(delta_t + delta_bias)                        (plain sum without delta_softplus)
        h_t = exp(delta'_t A) h_{t-1} + delta'_t B_t u_t                 h_{-1} = initial_state, or 0
        y_t = (C_t . h_t + D u_t) silu(z_t)                              (without D, z: the term, the factor is absent)

    Args:
        u: input (b l d), bfloat16, float32 or float64 (float64: CPU). float16 is refused.
        delta: step size (b l d).
        A: (d n), real, normally negative.
        B, C: (b l n).
        D, delta_bias: (d).
        z: gate (b l d).
        initial_state: (b d n).
        mask: (b l) bool, True where the position is real. Elsewhere the state passes through, y and every gradient are
            0, and the values (even NaN) never matter.
        reverse: run from position l-1 down to 0. The initial state enters at the right end, the final state leaves at
            the left end.
        return_final_state: also return the state after the last step.
        backend: "auto", or the name of one back end, which is then used or refused, never replaced.

    Returns:
        y (b l d) in u's dtype; with return_final_state (y, final_state), the state (b d n) in float32 (float64 beside a
        float64 u). Differentiable in every tensor argument, through y and through the final state.

    delta, z, B and C are cast to u's dtype, A, D, delta_bias and the initial state to the state's.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: an argument of the wrong shape, dtype, layout or device, or an unknown back end.
        RuntimeError: the back end asked for cannot run this; lists every back end with its reason.

    Source: Gu and Dao 2023 (arXiv 2312.00752), sections 3.2-3.3; argument names are the authors'.
    """
    given = u, delta, A, B, C, D, z, delta_bias, initial_state, mask
    options = delta_softplus, reverse, return_final_state
    absent = D is None, z is None, delta_bias is None, initial_state is None, mask is None
    try:
        if not torch.compiler.is_compiling() and dispatch.transforming():
            backend = dispatch.differentiable("selective_scan", backend, given)
        call = _recent.find(backend, given, options, absent)
        if call is None:
            layout = dispatch.layout(backend, given, *options)
            if layout is not None and (call := _known.get(layout)) is not None and call.recipe.aligned:
                _recent.keep(call, backend, given, options, absent)
    except (AttributeError, TypeError, RuntimeError):  # what is no dense tensor has no layout; to ask each one first is host time of every call
        _check(*given)
        raise
    if call is not None:
        return cuda.repeat(call, given)
    _check(*given)
    data, state = u.dtype, torch.float64 if u.dtype == torch.float64 else torch.float32
    delta, B, C, z = (_cast(x, data) for x in (delta, B, C, z))
    A, D, delta_bias, initial_state = (_cast(x, state) for x in (A, D, delta_bias, initial_state))
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)
    )
    known = not torch.compiler.is_compiling()
    name = dispatch.choose(
        "selective_scan",
        _modules,
        backend,
        device=u.device.type,
        dtype=data,
        channels=operator.index(A.shape[0]),
        batch=u.shape[0] if known else 0,
        length=u.shape[1] if known else 0,
        d_state=operator.index(A.shape[1]),
        initial_state=initial_state is not None,
        final_state=return_final_state,
        grad=wants_grad,
        mask=mask is not None,
        reverse=reverse,
    )
    module = BACKENDS[name]
    if u.numel() == 0:  # nothing to launch; the definition copes with any size
        module = reference
    if mask is not None and not getattr(module, "NATIVE_MASK", False):
        u, delta, B, C, z, delta_bias = _apply_mask(mask, u, delta, B, C, z, delta_bias, delta_softplus)
        y, final_state = module.run(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, None, reverse, return_final_state
        )
    else:
        y, final_state = module.run(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, reverse, return_final_state
        )
    if module is cuda:
        used = u, delta, A, B, C, D, z, delta_bias, initial_state, mask
        dispatch.remember(_known, layout, given, used, cuda.known, *options)
    return (y, final_state) if return_final_state else y


def _modules() -> dict[str, ModuleType]:
    return BACKENDS


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype == dtype else x.to(dtype)


def _apply_mask(mask, u, delta, B, C, z, delta_bias, delta_softplus):
    """Fill masked positions so that any back end does the right thing there.

    A step of size 0 is the identity on the state: exp(0) h + 0. It needs delta' = 0 *and* no gradient from it into
    delta_bias. With softplus a very negative delta gives both. Without, the bias is added here, before the fill, so that
    autograd drops the masked positions' share.
    """
    real = mask.unsqueeze(-1)
    if delta_softplus:
        delta = torch.where(real, delta, CLOSED)
    else:
        if delta_bias is not None:
            delta, delta_bias = (delta + delta_bias).to(u.dtype), None
        delta = torch.where(real, delta, 0.0)
    u, B, C = (torch.where(real, x, 0.0) for x in (u, B, C))
    z = None if z is None else torch.where(real, z, 0.0)
    return u, delta, B, C, z, delta_bias


def _check(u, delta, A, B, C, D, z, delta_bias, initial_state, mask) -> None:
    names = "u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "mask"
    dispatch.check_are_tensors("selective_scan", names, (u, delta, A, B, C, D, z, delta_bias, initial_state, mask), 5)
    if u.dim() != 3:
        raise ValueError(f"selective_scan: u must be (batch length channels), got shape {tuple(u.shape)}")
    if u.dtype == torch.float16:
        raise ValueError(
            "selective_scan: u is float16, whose range (65504) the state overflows; use bfloat16 or float32: u.bfloat16()"
        )
    if u.dtype not in DTYPES:
        raise ValueError(f"selective_scan: u is {u.dtype}; allowed: bfloat16, float32, float64")
    if A.dim() != 2 or A.shape[0] != u.shape[2]:
        raise ValueError(
            f"selective_scan: A must be (channels states) = ({u.shape[2]}, n) to go with u {tuple(u.shape)}, "
            f"got shape {tuple(A.shape)}"
        )
    if A.shape[1] == 0:
        raise ValueError(f"selective_scan: A must have at least one state per channel, got shape {tuple(A.shape)}")
    batch, length, channels = u.shape
    states = A.shape[1]
    expected = (
        ("A", A, tuple(A.shape)),
        ("delta", delta, (batch, length, channels)),
        ("B", B, (batch, length, states)),
        ("C", C, (batch, length, states)),
        ("D", D, (channels,)),
        ("z", z, (batch, length, channels)),
        ("delta_bias", delta_bias, (channels,)),
        ("initial_state", initial_state, (batch, channels, states)),
        ("mask", mask, (batch, length)),
    )
    dispatch.check_tensors("selective_scan", ("u", u), expected, f"u {tuple(u.shape)} and A {tuple(A.shape)}")
