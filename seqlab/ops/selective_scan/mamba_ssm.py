"""selective_scan through mamba_ssm's CUDA extension, where that is installed and can do what is asked.

It calls the extension `selective_scan_cuda` itself (fwd and bwd as in mamba_ssm 2.x's selective_scan_interface.py), so
that it is an operator torch.compile knows. The extension wants (b d l): inputs are transposed (and flipped for
reverse=True) into copies, which are made again for the backward rather than kept. Its backward adds with atomics: the
last bits change from run to run.
"""

import importlib
import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from seqlab.ops.dispatch import Request
from seqlab.ops.register import only_once, operator

INSTALL = (
    "MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation mamba-ssm causal-conv1d "
    "(needs nvcc; a plain `pip install mamba-ssm causal-conv1d` may leave the CUDA extension out)"
)


@lru_cache(maxsize=1)
def _extension_missing() -> str | None:
    if importlib.util.find_spec("selective_scan_cuda") is None:
        return f"the extension selective_scan_cuda is not installed: {INSTALL}"
    try:
        importlib.import_module("selective_scan_cuda")
    except ImportError as error:  # most often built against another torch
        return f"the extension selective_scan_cuda does not load ({str(error).splitlines()[0]}): {INSTALL}"
    return None


def unavailable(request: Request | None = None) -> str | None:
    """Needs the extension and a GPU; no initial state, no gradient through the final state."""
    missing = _extension_missing()
    if missing is not None:
        return missing
    if request is None:
        return None if torch.cuda.is_available() else "no CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    if request.device != "cuda":
        return f"tensors are on {request.device}; move them with .cuda()"
    if request.dtype == torch.float64:
        return "float64 is not supported; use .float()"
    if request.d_state > 256:
        return f"at most 256 states per channel, got {request.d_state}"
    if request.channels > 65535:
        return f"at most 65535 channels, got {request.channels}"
    if request.initial_state:
        return "it has no initial state (its scan starts from 0)"
    if request.final_state and request.grad:
        return "it drops the gradient of the final state; wrap the call in torch.no_grad() or do not ask for the state"
    if request.grad and torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic, and torch.use_deterministic_algorithms is on"
    return _too_large(request.batch, request.length, request.channels, request.d_state)


def _too_large(batch: int, length: int, channels: int, d_state: int) -> str | None:
    if batch * length * channels >= 2**32:
        return f"versions before 2.3.2 go wrong without notice from 2^32 elements on, got {batch * length * channels}"
    snapshots = batch * channels * -(-length // 2048) * 2 * d_state
    if snapshots >= 2**31:
        return f"its state snapshots are indexed with 32 bits, got {snapshots} of them"
    return None


def run(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    mask: Tensor | None,
    reverse: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """y (b l d) in u's dtype and the last state (b d n), which carries no gradient."""
    assert initial_state is None and mask is None
    y, final_state, _, _ = _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return y, final_state


def _theirs(x: Tensor | None, reverse: bool) -> Tensor | None:
    """(b l c) in either direction -> (b c l), contiguous, left to right."""
    if x is None:
        return None
    return (x.flip(1) if reverse else x).transpose(1, 2).contiguous()


def _ours(x: Tensor, reverse: bool) -> Tensor:
    """(b c l), left to right -> (b l c) in the direction asked for, contiguous."""
    return (x.flip(2) if reverse else x).transpose(1, 2).contiguous()


def _inputs(u, delta, B, C, z, reverse):
    u, delta, B, C, z = (_theirs(x, reverse) for x in (u, delta, B, C, z))
    return u, delta, B.unsqueeze(1), C.unsqueeze(1), z  # B, C (b 1 n l): one group


@operator("selective_scan_mamba_ssm")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, last state, its snapshots (b d chunks 2n), the output before the gate (b d l), empty without z)."""
    extension = importlib.import_module("selective_scan_cuda")
    too_large = _too_large(*u.shape[:2], *A.shape)  # a compiled graph meets sizes it was not traced with
    if too_large is not None:
        raise RuntimeError(f"selective_scan: back end 'mamba_ssm': {too_large}")
    tu, tdelta, tB, tC, tz = _inputs(u, delta, B, C, z, reverse)
    A, D, delta_bias = (x if x is None else x.contiguous() for x in (A, D, delta_bias))
    out, snapshots, *gated = extension.fwd(tu, tdelta, A, tB, tC, D, tz, delta_bias, delta_softplus)
    final_state = snapshots[:, :, -1, 1::2].contiguous()
    return _ours(gated[0] if gated else out, reverse), final_state, snapshots, out if gated else out.new_empty(0)


@torch.library.register_fake(_forward)
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    batch, length, channels = u.shape
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        A.new_empty((batch, channels, A.shape[1])),
        A.new_empty((batch, channels, (length + 2047) // 2048, 2 * A.shape[1])),
        u.new_empty(0) if z is None else u.new_empty((batch, channels, length)),
    )


@operator("selective_scan_mamba_ssm_backward")
def _backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    snapshots: Tensor,
    out: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias); an empty tensor for what is absent."""
    extension = importlib.import_module("selective_scan_cuda")
    tu, tdelta, tB, tC, tz = _inputs(u, delta, B, C, z, reverse)
    A, D, delta_bias = (x if x is None else x.contiguous() for x in (A, D, delta_bias))
    du, ddelta, dA, dB, dC, dD, dbias, *dz = extension.bwd(
        tu,
        tdelta,
        A,
        tB,
        tC,
        D,
        tz,
        delta_bias,
        _theirs(dy, reverse),
        snapshots,
        None if z is None else out,
        None,
        delta_softplus,
        False,
    )
    return (
        _ours(du, reverse),
        _ours(ddelta, reverse),
        dA,
        _ours(dB.squeeze(1), reverse).to(B.dtype),
        _ours(dC.squeeze(1), reverse).to(C.dtype),
        A.new_empty(0) if D is None else dD,
        u.new_empty(0) if z is None else _ours(dz[0], reverse),
        A.new_empty(0) if delta_bias is None else dbias,
    )


@torch.library.register_fake(_backward)
def _(dy, u, delta, A, B, C, D, z, delta_bias, snapshots, out, delta_softplus, reverse):
    def like(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return (
        like(u),
        like(delta),
        like(A),
        like(B),
        like(C),
        A.new_empty(0) if D is None else like(D),
        u.new_empty(0) if z is None else like(z),
        A.new_empty(0) if delta_bias is None else like(delta_bias),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output[2], output[3])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, *_):
    u, delta, A, B, C, D, z, delta_bias, snapshots, out = ctx.saved_tensors
    if dy is None:
        return (None,) * 10
    du, ddelta, dA, dB, dC, dD, dz, dbias = _backward(
        dy, u, delta, A, B, C, D, z, delta_bias, snapshots, out, ctx.delta_softplus, ctx.reverse
    )
    return (
        du,
        ddelta,
        dA,
        dB,
        dC,
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else dbias,
        None,
        None,
    )


torch.library.register_autograd(_forward, _autograd, setup_context=_setup_context)
only_once(_backward)
