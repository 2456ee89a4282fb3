"""causal_conv1d through the causal_conv1d package's CUDA extension, where that is installed and can do what is asked.

It calls the package's cpp_functions (1.5.1 and later) in their channel-last layout: (b l d) is passed as a transposed
view, without a copy, except that reverse=True flips into one. Its backward may add with atomics: the last bits of the
weight's gradient can change from run to run.
"""

import importlib
import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from seqlab.ops.dispatch import Request
from seqlab.ops.register import only_once, operator

INSTALL = (
    "CAUSAL_CONV1D_FORCE_BUILD=TRUE pip install --no-build-isolation causal-conv1d (needs nvcc; a plain "
    "`pip install mamba-ssm causal-conv1d` may leave the CUDA extension out)"
)


@lru_cache(maxsize=1)
def _extension_missing() -> str | None:
    if importlib.util.find_spec("causal_conv1d_cuda") is None:
        return f"the extension causal_conv1d_cuda is not installed: {INSTALL}"
    try:
        importlib.import_module("causal_conv1d.cpp_functions")
    except ImportError as error:  # built against another torch, or older than 1.5.1
        return f"causal_conv1d.cpp_functions does not load ({str(error).splitlines()[0]}): {INSTALL}"
    return None


def unavailable(request: Request | None = None) -> str | None:
    """Needs the extension and a GPU; widths 2 to 4, channels a multiple of 8."""
    missing = _extension_missing()
    if missing is not None:
        return missing
    if request is None:
        return None if torch.cuda.is_available() else "no CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    if request.device != "cuda":
        return f"tensors are on {request.device}; move them with .cuda()"
    if request.dtype == torch.float64:
        return "float64 is not supported; use .float()"
    if not 2 <= request.width <= 4:
        return f"widths 2 to 4 only, got {request.width}"
    if request.channels % 8:
        return f"the number of channels must be a multiple of 8, got {request.channels}"
    if request.grad and torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic, and torch.use_deterministic_algorithms is on"
    return _too_large(request.batch, request.length, request.channels)


def _too_large(batch: int, length: int, channels: int) -> str | None:
    if length > 65535 * 64:
        return f"at most {65535 * 64} positions, got {length}"
    if batch * length * channels >= 2**32:
        return f"it goes wrong without notice from 2^32 elements on, got {batch * length * channels}"
    return None


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None, reverse: bool
) -> Tensor:
    """y (b l d) in x's dtype."""
    return _forward(x, weight, bias, initial_state, silu, reverse)


def _theirs(x: Tensor | None, reverse: bool) -> Tensor | None:
    """(b l d) in either direction -> (b d l) left to right, channels adjacent in memory, other strides multiples of 8."""
    if x is None:
        return None
    x = x.flip(1) if reverse else x
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8:
        x = x.contiguous()
    return x.transpose(1, 2)


def _ours(x: Tensor, reverse: bool) -> Tensor:
    x = x.transpose(1, 2)
    return (x.flip(1) if reverse else x).contiguous()


@operator("causal_conv1d_mamba_ssm")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    functions = importlib.import_module("causal_conv1d.cpp_functions")
    too_large = _too_large(*x.shape)  # a compiled graph meets sizes it was not traced with
    if too_large is not None:
        raise RuntimeError(f"causal_conv1d: back end 'mamba_ssm': {too_large}")
    tx, state = _theirs(x, reverse), _theirs(initial_state, reverse)
    return _ours(functions.causal_conv1d_fwd_function(tx, weight, bias, None, state, None, silu), reverse)


@torch.library.register_fake(_forward)
def _(x, weight, bias, initial_state, silu, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("causal_conv1d_mamba_ssm_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias, initial state); an empty tensor for what is absent."""
    functions = importlib.import_module("causal_conv1d.cpp_functions")
    tx, tdy, state = (_theirs(t, reverse) for t in (x, dy, initial_state))
    dx, dweight, dbias, dstate = functions.causal_conv1d_bwd_function(
        tx, weight, bias, tdy, None, state, None, None, state is not None, silu
    )
    return (
        _ours(dx, reverse),
        dweight,
        x.new_empty(0) if bias is None else dbias,
        x.new_empty(0) if state is None else _ours(dstate, reverse),
    )


@torch.library.register_fake(_backward)
def _(dy, x, weight, bias, initial_state, silu, reverse):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
        x.new_empty(0) if initial_state is None else x.new_empty(initial_state.shape),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, initial_state, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, bias, initial_state)


def _autograd(ctx, dy):
    x, weight, bias, initial_state = ctx.saved_tensors
    dx, dweight, dbias, dstate = _backward(dy, x, weight, bias, initial_state, ctx.silu, ctx.reverse)
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if initial_state is None else dstate,
        None,
        None,
    )


torch.library.register_autograd(_forward, _autograd, setup_context=_setup_context)
only_once(_backward)
