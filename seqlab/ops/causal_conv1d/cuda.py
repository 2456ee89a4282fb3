"""causal_conv1d on NVIDIA GPUs: the kernels of conv.cu, compiled at first use (seqlab/ops/nvrtc.py). Deterministic."""

import ctypes
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from seqlab.ops import nvrtc
from seqlab.ops.dispatch import Request, memorise

NATIVE_MASK = True
SOURCE = "causal_conv1d/conv.cu"
KERNELS = ("conv_forward", "conv_backward", "conv_reduce", "conv_forward_pair", "conv_backward_pair")
THREADS = 128
VECTOR = {2: 4, 4: 2}
"""Channels a thread, by bytes of an element: 8 bytes an access. 4 lose a tenth, 16 leave too few warps."""
PAIR_BACKWARD_VECTOR = {2: 2, 4: 1}
"""Fewer where both directions' sums live in registers."""
FORWARD_RUN, BACKWARD_RUN, PAIR_BACKWARD_RUN = 128, 256, 512
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


class Real(NamedTuple):
    """The real positions of a mask."""

    order: Tensor  # (b l) int64, real positions first, left to right
    counts: Tensor  # (b) int64


def real_positions(mask: Tensor | None) -> Real | None:
    """Of a mask (b l); None where there is none."""
    if mask is None:
        return None
    order = torch.sort((~mask).to(torch.uint8), dim=1, stable=True).indices
    return Real(order, mask.sum(dim=1))


def _outputs(x: Tensor, real: Real | None) -> Tensor:
    """An output like x. The kernels leave masked positions alone, so they must be 0 beforehand."""
    if real is None and x.is_contiguous():
        return torch.empty_like(x)  # the cheapest call, but it follows x's strides
    make = torch.empty if real is None else torch.zeros
    return make(x.shape, dtype=x.dtype, device=x.device)


def _defines(half: bool, width: int, vector: int, silu: bool, masked: bool) -> tuple[tuple[str, int], ...]:
    return (
        ("WIDTH", width), ("VEC", vector), ("BF16", int(half)), ("PAIRED", 0), ("SILU", int(silu)), ("MASKED", int(masked)),
    )  # fmt: skip


class _Plan(NamedTuple):
    """What a kind of call needs, found once."""

    module: nvrtc.Module
    run: int
    runs: int
    blocks: int
    shared: int  # bytes: the rings


@functools.lru_cache(maxsize=4096)
def _plan(
    device, shape: tuple[int, int, int], half: bool, width: int, vector: int, silu: bool, masked: bool, longest: int, rings: int
) -> _Plan:
    batch, length, channels = shape
    groups = channels // vector
    run = _run_length(batch, length, groups, device.multiprocessors * 1024, longest)
    runs = math.ceil(length / run)
    blocks = math.ceil(batch * runs * groups / THREADS)
    module = device.module(_defines(half, width, vector, silu, masked))
    return _Plan(module, run, runs, blocks, rings * AHEAD * THREADS * vector * (2 if half else 4))


# Finding out how to run a call takes longer than running a short one; it is done once for every kind of call.
_recipes: dict[tuple, "_Recipe"] = {}


class _Recipe(NamedTuple):
    plan: _Plan
    params: ctypes.Structure  # complete but for the addresses


def _recipe(device, what: str, x: Tensor, others: tuple[Tensor | None, ...], width: int, silu: bool, reverse: bool,
            masked: bool, longest: int, rings: int) -> _Recipe:  # fmt: skip
    """For rows of x and `others`, channels adjacent, of any strides and alignments."""
    kind, address = [device, what, x.shape, x.stride(), x.dtype, width, silu, reverse, masked], x.data_ptr()
    for t in others:
        if t is None:
            kind.append(None)
        else:
            kind.append(t.stride())
            address |= t.data_ptr()
    kind = (*kind, address % 8)
    found = _recipes.get(kind)
    if found is None:
        most = PAIR_BACKWARD_VECTOR if what == "pair" else VECTOR
        vector = _vector(most[x.element_size()], x, *others)
        plan = _plan(device, x.shape, x.dtype == torch.bfloat16, width, vector, silu, masked, longest, rings)
        p = nvrtc.params_type(SOURCE)()
        p.x_b, p.x_t = x.stride(0), x.stride(1)
        p.batch, p.length, p.channels = x.shape
        p.reverse, p.run, p.runs = int(reverse), plan.run, plan.runs
        found = memorise(_recipes, kind, _Recipe(plan, p))
    return found


def _fill(recipe: _Recipe, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, real: Real | None):
    """The parameters with the addresses of what is read."""
    p = type(recipe.params).from_buffer_copy(recipe.params)
    if real is not None:
        p.order, p.counts = real.order.data_ptr(), real.counts.data_ptr()
    p.x, p.weight = x.data_ptr(), weight.data_ptr()
    if bias is not None:
        p.bias = bias.data_ptr()
    if initial is not None and initial.numel():
        p.initial = initial.data_ptr()
    return p


def _tidy(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None):
    """The same values, laid out as the kernels read them."""
    return _rows(x), weight.contiguous(), *(None if t is None else t.contiguous() for t in (bias, initial))


def _run_forward(recipe: _Recipe, x, weight, bias, initial, real: Real | None) -> Tensor:
    p, y, plan = _fill(recipe, x, weight, bias, initial, real), _outputs(x, real), recipe.plan
    p.y = y.data_ptr()
    plan.module.launch("conv_forward", plan.blocks, THREADS, plan.shared, p)
    return y


def _forward_recipe(x: Tensor, weight: Tensor, initial: Tensor | None, silu: bool, reverse: bool, masked: bool) -> _Recipe:
    return _recipe(_device(x), "forward", x, (initial,), weight.shape[1], silu, reverse, masked, FORWARD_RUN, 1)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    silu: bool,
    reverse: bool,
    real: Real | None = None,
) -> Tensor:
    """y (b l d)."""
    x, weight, bias, initial = _tidy(x, weight, bias, initial)
    recipe = _forward_recipe(x, weight, initial, silu, reverse, real is not None)
    return _run_forward(recipe, x, weight, bias, initial, real)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    silu: bool,
    reverse: bool,
    real: Real | None = None,
    into: Tensor | None = None,
    add: bool = False,
):
    """Gradients of x, weight, bias, initial (None for what is absent). `into` (like x, channels adjacent) receives that of
    x at real positions, added to what is there with `add`."""
    dy = _rows(dy)
    x, weight, bias, initial = _tidy(x, weight, bias, initial)
    channels, width = weight.shape
    dx = _outputs(x, real) if into is None else into
    rows = dy, dx, initial
    recipe = _recipe(_device(x), "backward", x, rows, width, silu, reverse, real is not None, BACKWARD_RUN, 2)
    plan, p = recipe.plan, _fill(recipe, x, weight, bias, initial, real)
    dweight = torch.empty_like(weight)
    dbias, dinitial = (None if t is None else torch.empty_like(t) for t in (bias, initial))
    p.dy, p.dy_b, p.dy_t = dy.data_ptr(), dy.stride(0), dy.stride(1)
    p.dx, p.dx_b, p.dx_t, p.add = dx.data_ptr(), dx.stride(0), dx.stride(1), int(add)
    p.dweight = dweight.data_ptr()
    if bias is not None:
        p.dbias = dbias.data_ptr()
    if p.initial:
        p.dinitial = dinitial.data_ptr()
    partial = torch.empty(p.batch * p.runs * (width + 1) * channels, dtype=torch.float32, device=x.device)
    p.partial = partial.data_ptr()
    plan.module.launch("conv_backward", plan.blocks, THREADS, plan.shared, p)
    plan.module.launch("conv_reduce", math.ceil((width + 1) * channels / 32), 1024, 4096, p)
    return dx, dweight, dbias, dinitial


def forward_pair(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], silu: bool, real: Real | None = None):
    """y left to right with the first filter, y right to left with the second; x is read once."""
    x = _rows(x)
    weights, biases = [w.contiguous() for w in weights], [None if b is None else b.contiguous() for b in biases]
    y, y_too = _outputs(x, real), _outputs(x, real)
    recipe = _forward_recipe(x, weights[0], None, silu, False, real is not None)
    plan, p = recipe.plan, _fill(recipe, x, weights[0], biases[0], None, real)
    _second_filter(p, weights[1], biases[1])
    p.y, p.y_too = y.data_ptr(), y_too.data_ptr()
    plan.module.launch("conv_forward_pair", plan.blocks, THREADS, plan.shared, p)
    return y, y_too


def backward_pair(
    dy: Tensor,
    dy_too: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    silu: bool,
    into: Tensor,
    real: Real | None = None,
):
    """The gradient of x from both directions into `into` (like x, channels adjacent) at real positions; gradients of the weights (2 d w) and
    of the biases (2 d), which are meaningless where there is no bias."""
    x, dy, dy_too = _rows(x), _rows(dy), _rows(dy_too)
    weights, biases = [w.contiguous() for w in weights], [None if b is None else b.contiguous() for b in biases]
    channels, width = weights[0].shape
    new = {"dtype": torch.float32, "device": x.device}
    dweight, dbias = torch.empty(2, channels, width, **new), torch.empty(2, channels, **new)
    rows = dy, dy_too, into
    recipe = _recipe(_device(x), "pair", x, rows, width, silu, False, real is not None, PAIR_BACKWARD_RUN, 3)
    plan, p = recipe.plan, _fill(recipe, x, weights[0], biases[0], None, real)
    _second_filter(p, weights[1], biases[1])
    p.dy, p.dy_b, p.dy_t = dy.data_ptr(), dy.stride(0), dy.stride(1)
    p.dy_too, p.dy_too_b, p.dy_too_t = dy_too.data_ptr(), dy_too.stride(0), dy_too.stride(1)
    p.dx, p.dx_b, p.dx_t = into.data_ptr(), into.stride(0), into.stride(1)
    p.dweight, p.dbias = dweight.data_ptr(), dbias.data_ptr()
    partial = torch.empty(2 * p.batch * p.runs * (width + 1) * channels, **new)
    p.partial = partial.data_ptr()
    plan.module.launch("conv_backward_pair", plan.blocks, THREADS, plan.shared, p)
    plan.module.launch("conv_reduce", 2 * math.ceil((width + 1) * channels / 32), 1024, 4096, p)
    return dweight, dbias


def _second_filter(p, weight: Tensor, bias: Tensor | None) -> None:
    p.weight_too, p.bias_too = weight.data_ptr(), 0 if bias is None else bias.data_ptr()


# ------------------------------------------------------------------------------------------------------ operators
def _real(order: Tensor | None, counts: Tensor | None) -> Real | None:
    return None if order is None else Real(order, counts)


def _forward(x, weight, bias, initial, order, counts, silu, reverse):
    return forward(x, weight, bias, initial, silu, reverse, _real(order, counts))


def _backward(dy, x, weight, bias, initial, order, counts, silu, reverse):
    return backward(dy, x, weight, bias, initial, silu, reverse, _real(order, counts))


@torch.library.custom_op("seqlab::causal_conv1d_cuda", mutates_args=(), device_types="cuda")
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    return nvrtc.on_device(_forward, x, weight, bias, initial, order, counts, silu, reverse)


@_conv.register_fake
def _(x, weight, bias, initial, order, counts, silu, reverse):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("seqlab::causal_conv1d_cuda_backward", mutates_args=(), device_types="cuda")
def _conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = nvrtc.on_device(_backward, dy, x, weight, bias, initial, order, counts, silu, reverse)
    kinds = x.dtype, torch.float32, torch.float32, x.dtype
    return tuple(torch.empty(0, dtype=k, device=x.device) if g is None else g for g, k in zip(found, kinds, strict=True))


@_conv_backward.register_fake
def _(dy, x, weight, bias, initial, order, counts, silu, reverse):
    def like(t, dtype):
        return torch.empty((0,) if t is None else t.shape, dtype=dtype, device=x.device)

    return like(x, x.dtype), like(weight, torch.float32), like(bias, torch.float32), like(initial, x.dtype)


def _setup(ctx, inputs, output):
    *tensors, silu, reverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu, ctx.reverse = silu, reverse


def _gradients(ctx, dy):
    tensors = ctx.saved_tensors
    x = tensors[0]
    dy = dy if dy.dtype == x.dtype else dy.to(x.dtype)
    out = _conv_backward(dy, *tensors, ctx.silu, ctx.reverse)
    return (*(None if t is None else g for g, t in zip(out, tensors[:4], strict=True)), None, None, None, None)


_conv.register_autograd(_gradients, setup_context=_setup)


class Call(NamedTuple):
    """What a call asks for beside its tensors."""

    silu: bool
    reverse: bool
    grad: bool
    recipe: _Recipe | None = None  # known: the tensors lie as it wants them


def _execute(x: Tensor, call: Call, weight, bias, initial, order, counts) -> Tensor:
    if call.recipe is not None:
        return _run_forward(call.recipe, x, weight, bias, initial, _real(order, counts))
    return _forward(x, weight, bias, initial, order, counts, call.silu, call.reverse)


class _Eager(torch.autograd.Function):
    """The same operator without torch.library's wrapping."""

    @staticmethod
    def forward(ctx, call, x, *rest):
        ctx.save_for_backward(x, *rest)
        ctx.silu, ctx.reverse = call.silu, call.reverse
        return nvrtc.on_device(_execute, x, call, *rest)

    @staticmethod
    @nvrtc.once_differentiable
    def backward(ctx, dy):
        saved = ctx.saved_tensors  # once: under checkpointing every look recomputes
        x = saved[0]
        dy = dy if dy.dtype == x.dtype else dy.to(x.dtype)
        return None, *nvrtc.on_device(_backward, dy, *saved, ctx.silu, ctx.reverse), None, None


def execute(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, mask: Tensor | None) -> Tensor:
    """y of a call outside of torch.compile."""
    order, counts = (None, None) if mask is None else real_positions(mask)
    if call.grad:
        return _Eager.apply(call, x, weight, bias, initial, order, counts)
    return nvrtc.on_device(_execute, x, call, weight, bias, initial, order, counts)


def known(tensors: tuple[Tensor | None, ...], silu: bool, reverse: bool) -> Call | None:
    """How to make any call with tensors (x, weight, bias, initial state, mask) of the same layouts and alignments again;
    None where they must be laid out anew every time."""
    x, weight, bias, initial, mask = tensors
    if x.device.index != torch.cuda.current_device():
        return None
    if any(a is not b for a, b in zip(_tidy(x, weight, bias, initial), tensors[:4], strict=True)):
        return None
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4])
    return Call(silu, reverse, grad, _forward_recipe(x, weight, initial, silu, reverse, mask is not None))


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    reverse: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """y (b l d) in x's dtype, as __init__ describes it."""
    if torch.compiler.is_compiling():
        order, counts = real_positions(mask) or (None, None)
        return _conv(x, weight, bias, initial_state, order, counts, silu, reverse)
    return execute(Call(silu, reverse, torch.is_grad_enabled()), x, weight, bias, initial_state, mask)
