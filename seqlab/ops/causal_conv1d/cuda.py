"""causal_conv1d on NVIDIA GPUs: the kernels of conv.cu, compiled at first use (seqlab/ops/nvrtc.py). Deterministic."""

import functools
import math

import torch
from torch import Tensor

from seqlab.ops import nvrtc
from seqlab.ops.dispatch import Request

SOURCE = "causal_conv1d/conv.cu"
KERNELS = ("conv_forward", "conv_backward", "conv_reduce")
THREADS = 128
VECTOR = 2
"""Channels a thread: two measured best (more warps in flight), also where 16-byte accesses would be possible."""
FORWARD_RUN, BACKWARD_RUN = 128, 256
AHEAD = 16
"""Rows on their way, a thread and tensor (conv.cu)."""


def unavailable(request: Request | None = None) -> str | None:
    """Why this back end cannot run here (or cannot run this); None if it can."""
    if (reason := nvrtc.machine()) is not None:
        return reason
    if request is not None and request.device != "cuda":
        return f"the tensors are on {request.device}; move them to the GPU: tensor.cuda()"
    if (reason := nvrtc.gpu(torch.cuda.current_device())) is not None:
        return reason
    if request is not None and request.dtype not in (torch.bfloat16, torch.float32):
        return f"it computes in float32 on bfloat16 or float32 data, not {request.dtype}"
    return None


class _Device:
    """Compiles and launches for one GPU. The tests put an emulator in its place."""

    def __init__(self, index: int):
        self.index = index
        self.multiprocessors = nvrtc.multiprocessors(index)

    def module(self, defines: tuple[tuple[str, int], ...]) -> nvrtc.Module:
        return nvrtc.module(SOURCE, defines, self.index)


_devices: dict[int, _Device] = {}


def _device(x: Tensor):
    index = x.device.index
    found = _devices.get(index)
    if found is None:
        found = _devices[index] = _Device(index)
    return found


def _vector(count: int, *tensors: Tensor | None) -> int:
    """How many neighbouring channels one access may take: `count`, fewer where a row is not aligned for it."""
    size = tensors[0].element_size()
    for x in tensors:
        if x is None:
            continue
        while count > 1 and (
            x.shape[-1] % count
            or (x.shape[0] > 1 and x.stride(0) % count)
            or (x.shape[1] > 1 and x.stride(1) % count)
            or x.data_ptr() % (count * size)
        ):
            count //= 2
    return count


def _run_length(batch: int, length: int, groups: int, slots: int, longest: int) -> int:
    """Steps a thread takes: `longest`, fewer where the GPU (`slots` threads) would not be full."""
    run = longest
    while run > 16 and batch * math.ceil(length / run) * groups < 2 * slots:
        run //= 2
    return run


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, silu: bool, reverse: bool):
    p = nvrtc.params_type(SOURCE)()
    p.x, p.weight = x.data_ptr(), weight.data_ptr()
    p.bias = 0 if bias is None else bias.data_ptr()
    p.initial = 0 if initial is None or initial.numel() == 0 else initial.data_ptr()
    p.x_b, p.x_t = x.stride(0), x.stride(1)
    p.batch, p.length, p.channels = x.shape
    p.silu, p.reverse = int(silu), int(reverse)
    return p


def _defines(x: Tensor, width: int, vector: int) -> tuple[tuple[str, int], ...]:
    return (("WIDTH", width), ("VEC", vector), ("BF16", int(x.dtype == torch.bfloat16)), ("PAIRED", 0))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """y (b l d)."""
    device = _device(x)
    x, weight = _rows(x), weight.contiguous()
    bias, initial = (None if t is None else t.contiguous() for t in (bias, initial))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    vector = _vector(VECTOR, x, initial)
    groups = x.shape[2] // vector
    p = _arguments(x, weight, bias, initial, silu, reverse)
    p.y = y.data_ptr()
    p.run = _run_length(x.shape[0], x.shape[1], groups, device.multiprocessors * 1024, FORWARD_RUN)
    p.runs = math.ceil(x.shape[1] / p.run)
    module = device.module(_defines(x, weight.shape[1], vector))
    ring = AHEAD * THREADS * vector * x.element_size()
    module.launch("conv_forward", math.ceil(p.batch * p.runs * groups / THREADS), THREADS, ring, p)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    silu: bool,
    reverse: bool,
    into: Tensor | None = None,
    add: bool = False,
):
    """Gradients of x, weight, bias, initial (empty for what is absent). `into` (like x, channels adjacent) receives that of
    x, added to what is there with `add`."""
    device = _device(x)
    x, dy, weight = _rows(x), _rows(dy), weight.contiguous()
    bias, initial = (None if t is None else t.contiguous() for t in (bias, initial))
    channels, width = weight.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if into is None else into
    dweight = torch.empty_like(weight)
    dbias = torch.empty(0 if bias is None else channels, dtype=torch.float32, device=x.device)
    dinitial = torch.empty((0,) if initial is None else initial.shape, dtype=x.dtype, device=x.device)
    vector = _vector(VECTOR, x, dy, dx, initial)
    groups = channels // vector
    p = _arguments(x, weight, bias, initial, silu, reverse)
    p.dy, p.dy_b, p.dy_t = dy.data_ptr(), dy.stride(0), dy.stride(1)
    p.dx, p.dx_b, p.dx_t, p.add = dx.data_ptr(), dx.stride(0), dx.stride(1), int(add)
    p.dweight = dweight.data_ptr()
    p.dbias = 0 if bias is None else dbias.data_ptr()
    p.dinitial = 0 if initial is None or initial.numel() == 0 else dinitial.data_ptr()
    p.run = _run_length(x.shape[0], x.shape[1], groups, device.multiprocessors * 1024, BACKWARD_RUN)
    p.runs = math.ceil(x.shape[1] / p.run)
    partial = torch.empty(p.batch * p.runs * (width + 1) * channels, dtype=torch.float32, device=x.device)
    p.partial = partial.data_ptr()
    module = device.module(_defines(x, width, vector))
    ring = 2 * AHEAD * THREADS * vector * x.element_size()
    module.launch("conv_backward", math.ceil(p.batch * p.runs * groups / THREADS), THREADS, ring, p)
    module.launch("conv_reduce", math.ceil((width + 1) * channels / 32), 1024, 4096, p)
    return dx, dweight, dbias, dinitial


# ------------------------------------------------------------------------------------------------------ operators
@torch.library.custom_op("seqlab::causal_conv1d_cuda", mutates_args=(), device_types="cuda")
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    return nvrtc.on_device(forward, x, weight, bias, initial, silu, reverse)


@_conv.register_fake
def _(x, weight, bias, initial, silu, reverse):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("seqlab::causal_conv1d_cuda_backward", mutates_args=(), device_types="cuda")
def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return nvrtc.on_device(backward, dy, x, weight, bias, initial, silu, reverse)


@_conv_backward.register_fake
def _(dy, x, weight, bias, initial, silu, reverse):
    def like(t, dtype):
        return torch.empty((0,) if t is None else t.shape, dtype=dtype, device=x.device)

    return like(x, x.dtype), like(weight, torch.float32), like(bias, torch.float32), like(initial, x.dtype)


def _setup(ctx, inputs, output):
    *tensors, silu, reverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu, ctx.reverse = silu, reverse


def _gradients(ctx, dy, call=_conv_backward):
    tensors = ctx.saved_tensors
    x = tensors[0]
    dy = dy if dy.dtype == x.dtype else dy.to(x.dtype)
    out = call(dy, *tensors, ctx.silu, ctx.reverse)
    return (*(None if t is None else g for g, t in zip(out, tensors, strict=True)), None, None)


_conv.register_autograd(_gradients, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The same operator without torch.library's wrapping."""

    @staticmethod
    def forward(ctx, *inputs):
        _setup(ctx, inputs, None)
        return nvrtc.on_device(forward, *inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return _gradients(ctx, dy, functools.partial(nvrtc.on_device, backward))


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None, reverse: bool
) -> Tensor:
    """y (b l d) in x's dtype, as __init__ describes it."""
    if torch.compiler.is_compiling():
        return _conv(x, weight, bias, initial_state, silu, reverse)
    return _Eager.apply(x, weight, bias, initial_state, silu, reverse)
