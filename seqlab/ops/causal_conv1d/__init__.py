"""causal_conv1d: a short depthwise convolution over time, with state, masks and either direction.

Maths and limits are in README.md beside this file. This module holds the signature, the checks, the final state and the
handling of masks; a back end only convolves.

Shapes: b batch, l length, d channels, w width.
"""

import operator
from types import ModuleType

import torch
from torch import Tensor

from seqlab.ops import dispatch
from seqlab.ops.causal_conv1d import cpu, cuda, mamba_ssm, reference

BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "mamba_ssm": mamba_ssm, "cpu": cpu, "reference": reference}
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
MAX_WIDTH = 8
_known: dict[tuple, cuda.Call | None] = {}
"""Calls seen before, by their layout: what is left to do of them."""


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own short filter, looking only at what came before.

        y_t = act(bias + sum_k weight[:, k] x_{t-(w-1)+k})               k = 0 .. w-1
        y_t = act(bias + sum_k weight[:, k] x_{t+(w-1)-k})               reverse: flip(conv(flip(x)))

    Args:
        x: (b l d), bfloat16, float32 or float64 (float64: CPU). float16 is refused.
        weight: (d w), w from 1 to 8.
        bias: (d).
        activation: None or "silu".
        initial_state: (b w-1 d), the inputs just before position 0 (reverse: just after position l-1), in sequence
            order (left to right) for both directions. Absent: zeros.
        mask: (b l) bool, True where the position is real. The others are as if removed from the sequence: windows reach
            over them to the nearest real positions. Output and gradients there are 0 and the values (even NaN) never matter.
        reverse: the mirror image.
        return_final_state: also return the state that continues the sequence: the last w-1 real inputs (reverse: the
            first), in sequence order.
        backend: "auto", or the name of one back end, which is then used or refused, never replaced.

    Returns:
        y (b l d) in x's dtype; with return_final_state (y, final_state), the state (b w-1 d) in x's dtype.
        Differentiable in every tensor argument, through y and through the final state.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: an argument of the wrong shape, dtype, layout or device, or an unknown back end.
        RuntimeError: the back end asked for cannot run this; lists every back end with its reason.
    """
    given = x, weight, bias, initial_state, mask
    try:
        if not torch.compiler.is_compiling() and dispatch.transforming():
            backend = dispatch.differentiable("causal_conv1d", backend, given)
        layout = None if return_final_state else dispatch.layout(backend, given, activation, reverse)
    except (AttributeError, TypeError, RuntimeError):  # what is no dense tensor has no layout
        _check(x, weight, bias, activation, initial_state, mask)
        raise
    if layout is not None and (call := _known.get(layout)) is not None:
        return cuda.execute(call, *given)
    _check(x, weight, bias, activation, initial_state, mask)
    width = operator.index(weight.shape[1])  # as a number, which torch.compile with dynamic=True takes for a symbol
    parameter = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias, initial_state = _cast(weight, parameter), _cast(bias, parameter), _cast(initial_state, x.dtype)
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, initial_state)
    )
    known = not torch.compiler.is_compiling()
    name = dispatch.choose(
        "causal_conv1d",
        _modules,
        backend,
        device=x.device.type,
        dtype=x.dtype,
        channels=operator.index(weight.shape[0]),
        batch=x.shape[0] if known else 0,
        length=x.shape[1] if known else 0,
        width=width,
        initial_state=initial_state is not None,
        final_state=return_final_state,
        grad=wants_grad,
        mask=mask is not None,
        reverse=reverse,
    )
    module = reference if x.numel() == 0 else BACKENDS[name]
    silu = activation == "silu"
    if module is cuda:
        dispatch.remember(_known, layout, given, (x, weight, bias, initial_state, mask), cuda.known, silu, reverse)
    if mask is None:
        y = module.run(x, weight, bias, silu, initial_state, reverse)
        if not return_final_state:
            return y
        keep = min(width - 1, x.shape[1])
        last = x[:, :keep] if reverse else x[:, x.shape[1] - keep :]
        ends = _with_state(last, width, initial_state, reverse)  # (b keep+w-1 d)
        return y, (ends[:, : width - 1] if reverse else ends[:, keep:]).clone()
    if getattr(module, "NATIVE_MASK", False):
        y = module.run(x, weight, bias, silu, initial_state, reverse, mask)
        return (y, _last_real(x, mask, width, initial_state, reverse)) if return_final_state else y
    # The real positions are moved together, to the end where the filter starts (left, or right for reverse), so that it
    # runs over them without gaps; then the outputs go back to where their inputs came from.
    order = torch.sort((mask if reverse else ~mask).to(torch.uint8), dim=1, stable=True).indices  # (b l)
    index = order.unsqueeze(-1).expand(x.shape)
    packed = torch.where(mask.gather(1, order).unsqueeze(-1), x.gather(1, index), 0.0)
    y = module.run(packed, weight, bias, silu, initial_state, reverse)
    y = torch.zeros_like(y).scatter(1, index, y)
    y = torch.where(mask.unsqueeze(-1), y, 0.0)
    if not return_final_state:
        return y
    ends = _with_state(packed, width, initial_state, reverse)
    count = mask.sum(dim=1, keepdim=True)  # (b 1)
    first = x.shape[1] - count if reverse else count
    window = first + torch.arange(width - 1, device=x.device)  # (b w-1)
    return y, ends.gather(1, window.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _modules() -> dict[str, ModuleType]:
    return BACKENDS


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype == dtype else x.to(dtype)


def _with_state(x: Tensor, width: int, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """The inputs with the state (or zeros) at the end where the filter starts: (b l+w-1 d)."""
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    return torch.cat((x, initial_state) if reverse else (initial_state, x), dim=1)


def last_real_positions(mask: Tensor, width: int, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where the final state of a masked sequence comes from, (b w-1) each: positions of its last real inputs (reverse: the
    first), places in the state before, and which of the two holds."""
    batch, length = mask.shape
    count = mask.sum(dim=1, keepdim=True)  # (b 1)
    order = torch.sort((~mask).to(torch.uint8), dim=1, stable=True).indices
    wanted = torch.arange(width - 1, device=mask.device) + (0 if reverse else count - (width - 1))  # among the real ones
    wanted = wanted.expand(batch, width - 1)
    before = wanted - count if reverse else wanted + width - 1
    there = (wanted >= 0) & (wanted < count)
    return order.gather(1, wanted.clamp(0, length - 1)), before.clamp(0, max(width - 2, 0)), there


def _last_real(x: Tensor, mask: Tensor, width: int, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """The last w-1 real inputs (reverse: the first), in sequence order; where there are fewer, the old state's as well."""
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    now, before, there = (t.unsqueeze(-1) for t in last_real_positions(mask, width, reverse))
    wide = (-1, -1, x.shape[2])
    return torch.where(there, x.gather(1, now.expand(wide)), initial_state.gather(1, before.expand(wide)))


def _check(x, weight, bias, activation, initial_state, mask) -> None:
    names = "x", "weight", "bias", "initial_state", "mask"
    dispatch.check_are_tensors("causal_conv1d", names, (x, weight, bias, initial_state, mask), 2)
    if x.dim() != 3:
        raise ValueError(f"causal_conv1d: x must be (batch length channels), got shape {tuple(x.shape)}")
    if x.dtype == torch.float16:
        raise ValueError("causal_conv1d: x is float16, which is refused for its range (65504); use x.bfloat16()")
    if x.dtype not in DTYPES:
        raise ValueError(f"causal_conv1d: x is {x.dtype}; allowed: bfloat16, float32, float64")
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation {activation!r} does not exist; allowed: None, 'silu'")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            f"causal_conv1d: weight must be (channels width) = ({x.shape[2]}, w) to go with x {tuple(x.shape)}, "
            f"got shape {tuple(weight.shape)}"
        )
    if not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(f"causal_conv1d: weight has width {weight.shape[1]}; allowed: 1 to {MAX_WIDTH}")
    batch, length, channels = x.shape
    expected = (
        ("weight", weight, tuple(weight.shape)),
        ("bias", bias, (channels,)),
        ("initial_state", initial_state, (batch, weight.shape[1] - 1, channels)),
        ("mask", mask, (batch, length)),
    )
    dispatch.check_tensors("causal_conv1d", ("x", x), expected, f"x {tuple(x.shape)} and weight {tuple(weight.shape)}")
