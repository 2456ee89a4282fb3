"""selective_scan on NVIDIA GPUs: the kernels of scan.cu, compiled at first use (seqlab/ops/nvrtc.py).

Parallel over channels and over time; deterministic; no workspace grows with l*d*n except the states kept for the
backward pass, one every SEGMENT steps. See README.md and docs/kernels.md.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from seqlab.ops import nvrtc
from seqlab.ops.dispatch import Request

NATIVE_MASK = True
SOURCE = "selective_scan/scan.cu"
KERNELS = (
    "scan_ends", "scan_carry", "scan_forward", "adjoint_ends", "adjoint_carry", "scan_backward", "reduce_rows",
    "reduce_blocks",
)  # fmt: skip
TILE, STAGE = 8, 32
GROUP = 64
"""States in one launch; more are run in groups, whose outputs are added."""
BACKWARD_GROUP = 16
"""The same for the backward pass, which keeps more for every state; the groups' gradients are added in float32."""
FORWARD_WARPS, BACKWARD_WARPS = 4, 4


def unavailable(request: Request | None = None) -> str | None:
    """Why this back end cannot run here (or cannot run this); None if it can."""
    if (reason := nvrtc.machine()) is not None:
        return reason
    if request is None:
        return nvrtc.gpu(torch.cuda.current_device())
    if request.device != "cuda":
        return f"the tensors are on {request.device}; move them to the GPU: tensor.cuda()"
    if (reason := nvrtc.gpu(torch.cuda.current_device())) is not None:
        return reason
    if request.dtype not in (torch.bfloat16, torch.float32):
        return f"it computes in float32 on bfloat16 or float32 data, not {request.dtype}"
    return None


# ------------------------------------------------------------------------------------------------------- planning
@dataclass(frozen=True)
class Plan:
    """How one direction is cut up. Lengths in steps."""

    chunk: int
    chunks: int
    segment: int
    warps: int
    channel_blocks: int

    @property
    def threads(self) -> int:
        return 32 * self.warps


def segment_length(batch: int, length: int, channels: int) -> int:
    """Steps between the states kept for the backward pass, and the grain of the chunks.

    256, and shorter only where 256 would leave most of a large GPU without a warp. It depends on the shape alone, so
    that shapes of results are known without a GPU.
    """
    warps = batch * math.ceil(channels / 64)
    for segment in (256, 128, 64):
        if warps * math.ceil(length / segment) >= 2048:
            return segment
    return 32


@functools.lru_cache(maxsize=1024)
def plan(batch: int, length: int, channels: int, resident: int, warps: int, segment: int) -> Plan:
    """Choose the chunk, a multiple of `segment`, so that the blocks fill `resident` slots in few and full waves.

    A wave lasts as long as a chunk; several chunks cost a first pass, taken as 160 steps of work (what is usually left
    of it) or 0.9 of a chunk, and two more launches.
    """
    groups = math.ceil(channels / 64)
    blocks = math.ceil(groups / min(warps, groups))
    warps = math.ceil(groups / blocks)
    rows = batch * blocks
    best, best_cost = 0, math.inf
    for waves in range(0, 9):
        count = max(1, waves * resident // rows)
        chunk = math.ceil(math.ceil(length / count) / segment) * segment
        chunks = math.ceil(length / chunk)
        steps = chunk + (48 + min(160.0, 0.9 * chunk) if chunks > 1 else 0)
        cost = math.ceil(rows * chunks / resident) * steps + (100 if chunks > 1 else 0) + 0.02 * chunks
        if cost < best_cost:
            best, best_cost = chunk, cost
    return Plan(best, math.ceil(length / best), segment, warps, blocks)


# --------------------------------------------------------------------------------------------------------- device
class _Device:
    """Compiles and launches for one GPU. The tests put an emulator in its place."""

    def __init__(self, index: int):
        self.index = index
        self.multiprocessors = nvrtc.multiprocessors(index)
        self.shared_limit = nvrtc.shared_limit(index)

    def module(self, defines: tuple[tuple[str, int], ...]) -> nvrtc.Module:
        return nvrtc.module(SOURCE, defines, self.index)


_devices: dict[int, _Device] = {}


def _device(x: Tensor):
    index = x.device.index
    found = _devices.get(index)
    if found is None:
        found = _devices[index] = _Device(index)
    return found


@functools.lru_cache(maxsize=1024)
def _shared_bytes(kernel: str, n: int, warps: int) -> int:
    """Dynamic shared memory of a kernel (scan.cu says what is in it)."""
    row, each = STAGE + 4, math.ceil(STAGE * n / (32 * warps))
    coefficients = 8 * 32 * n * warps if n <= 32 else 0
    if kernel in ("scan_ends", "adjoint_ends"):
        return 4 * n * row + 8 * 32 * n * warps
    if kernel == "scan_forward":
        return 4 * n * row * 2 * (2 if each <= 8 else 1) + 8 * 32 * n * warps + coefficients
    if kernel == "scan_backward":
        return 4 * n * row * 2 + 4 * warps * (n * (2 * STAGE + 2) + 1024) + 2 * 8 * 32 * n * warps + 2 * coefficients
    return 1024 if kernel == "reduce_rows" else 0


@functools.lru_cache(maxsize=1024)
def _most_warps(kernel: str, n: int, warps: int, limit: int) -> int:
    """Fewer warps a block where that many states would not fit a block's shared memory."""
    while warps > 1 and _shared_bytes(kernel, n, warps) > limit:
        warps -= 1
    return warps


def _rows(x: Tensor) -> Tensor:
    """Channels must be neighbours; time and batch may be strided (a slice of a projection's output is fine)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _paired(*tensors: Tensor | None) -> int:
    """1 if two neighbouring channels can be read at once everywhere."""
    for x in tensors:
        if x is not None and (
            x.shape[-1] % 2 or x.stride(0) % 2 or x.stride(1) % 2 or x.data_ptr() % (2 * x.element_size())
        ):
            return 0
    return 1


def _defines(u: Tensor, n: int, warps: int, paired: int, grouped: int = 0) -> tuple[tuple[str, int], ...]:
    basic = (("STATES", n), ("WARPS", warps), ("BF16", int(u.dtype == torch.bfloat16)), ("PAIRED", paired))
    return (*basic, ("GROUPED", 1)) if grouped else basic


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _arguments(u, delta, At, B, C, D, z, bias, initial, mask, softplus: bool, reverse: bool):
    p = nvrtc.params_type(SOURCE)()
    p.u, p.delta, p.B, p.C, p.z = (_pointer(x) for x in (u, delta, B, C, z))
    p.A, p.D, p.bias, p.initial, p.mask = (_pointer(x) for x in (At, D, bias, initial, mask))
    for name, x in (("u", u), ("delta", delta), ("B", B), ("C", C), ("z", z)):
        if x is not None:
            setattr(p, f"{name}_b", x.stride(0))
            setattr(p, f"{name}_t", x.stride(1))
            if x.stride(1) >= 1 << 30:
                raise ValueError(f"selective_scan: rows of {name} are {x.stride(1)} elements apart; allowed: below 2^30")
    p.batch, p.length, p.channels = u.shape
    p.all_states = At.shape[0]
    p.softplus, p.reverse = int(softplus), int(reverse)
    return p


def _set_plan(p, cut: Plan, all_segments: int) -> None:
    p.chunk, p.chunks, p.segment, p.all_segments = cut.chunk, cut.chunks, cut.segment, all_segments
    p.channel_blocks, p.items = cut.channel_blocks, p.batch * cut.chunks * cut.channel_blocks
    p.summed = cut.chunks - 1


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _outputs(x: Tensor, mask: Tensor | None) -> Tensor:
    """An output like x; the kernels leave masked positions alone, so they must be 0 beforehand."""
    make = torch.empty if mask is None else torch.zeros
    return make(x.shape, dtype=x.dtype, device=x.device)


def forward(u, delta, A, B, C, D, z, bias, initial, mask, softplus: bool, reverse: bool, segment: int):
    """y (b l d), final state (b d n), states at segment starts (b segments n d; empty if segment is 0)."""
    device = _device(u)
    batch, length, channels = u.shape
    n = A.shape[1]
    u, delta, B, C = (_rows(x) for x in (u, delta, B, C))
    z = None if z is None else _rows(z)
    At, D, bias, initial = A.t().contiguous(), _float(D), _float(bias), _float(initial)
    mask = None if mask is None else mask.contiguous()
    paired = _paired(u, delta, z)
    warps = _most_warps("scan_forward", n, min(FORWARD_WARPS, math.ceil(channels / 64)), device.shared_limit)
    first = plan(1, 1, channels, 1, warps, 1)
    module = device.module(_defines(u, n, first.warps, paired))
    shared = _shared_bytes("scan_forward", n, first.warps)
    slots = module.resident("scan_forward", first.threads, shared) * device.multiprocessors
    keep, segment = segment > 0, segment or segment_length(batch, length, channels)
    cut = plan(batch, length, channels, slots, warps, segment)
    all_segments = math.ceil(length / segment)
    y = _outputs(u, mask)
    new = {"dtype": torch.float32, "device": u.device}
    final = torch.empty(batch, channels, n, **new)
    states = torch.empty((batch, all_segments, n, channels) if keep else (0,), **new)
    p = _arguments(u, delta, At, B, C, D, z, bias, initial, mask, softplus, reverse)
    _set_plan(p, cut, all_segments)
    p.y, p.final = y.data_ptr(), final.data_ptr()
    p.segments = states.data_ptr() if keep else 0
    if cut.chunks > 1:
        ends = torch.empty(batch * cut.chunks * (n + 1) * channels, **new)
        p.ends = ends.data_ptr()
        p.sums = p.ends + 4 * batch * cut.chunks * n * channels
        module.launch(
            "scan_ends",
            batch * (cut.chunks - 1) * cut.channel_blocks,
            cut.threads,
            _shared_bytes("scan_ends", n, cut.warps),
            p,
        )
        module.launch("scan_carry", math.ceil(batch * n * channels / 128), 128, 0, p)
    module.launch("scan_forward", p.items, cut.threads, shared, p)
    return y, final, states


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, bias, initial, mask, states, softplus: bool, reverse: bool, segment: int
):
    """Gradients of u, delta, A, B, C, D, z, bias, initial (empty tensors for what is absent)."""
    device = _device(u)
    batch, length, channels = u.shape
    n = A.shape[1]
    u, delta, B, C, dy = (_rows(x) for x in (u, delta, B, C, dy))
    z = None if z is None else _rows(z)
    At, D, bias, initial = A.t().contiguous(), _float(D), _float(bias), _float(initial)
    dfinal = _float(dfinal)
    mask = None if mask is None else mask.contiguous()
    paired = _paired(u, delta, z, dy)
    parts = math.ceil(n / BACKWARD_GROUP)
    kind = u.dtype if parts == 1 else torch.float32
    new = {"dtype": torch.float32, "device": u.device}
    make = torch.empty if mask is None else torch.zeros  # the kernels leave masked positions alone
    du, ddelta = (make(u.shape, dtype=kind, device=u.device) for _ in range(2))
    dz = make((0,) if z is None else u.shape, dtype=kind, device=u.device)
    dB, dC = (torch.empty((batch, length, n), dtype=u.dtype, device=u.device) for _ in range(2))
    dA = torch.empty(channels, n, **new)
    dD = torch.empty(0 if D is None else channels, **new)
    dbias = torch.empty(parts, 0 if bias is None else channels, **new)
    dinitial = torch.empty((0,) if initial is None else initial.shape, **new)
    for part in range(parts):
        first = part * BACKWARD_GROUP
        states_here = min(BACKWARD_GROUP, n - first)
        p = _arguments(u, delta, At, B, C, D, z, bias, initial, mask, softplus, reverse)
        p.add = int(part > 0)
        p.A += 4 * first * channels
        p.B += first * B.element_size()
        p.C += first * C.element_size()
        p.segments = states.data_ptr() + 4 * first * channels
        p.dy, p.dy_b, p.dy_t = dy.data_ptr(), dy.stride(0), dy.stride(1)
        p.dfinal = 0 if dfinal is None else dfinal.data_ptr() + 4 * first
        p.du, p.ddelta, p.dz = du.data_ptr(), ddelta.data_ptr(), dz.data_ptr()
        p.dA, p.dD, p.dbias = dA.data_ptr() + 4 * first, dD.data_ptr(), dbias[part].data_ptr()
        if part > 0:  # the skip connection belongs to the first group alone
            p.D, p.dD = 0, 0
        p.dinitial = 0 if initial is None else dinitial.data_ptr() + 4 * first
        targets = dB.data_ptr() + first * dB.element_size(), dC.data_ptr() + first * dC.element_size()
        defines = (u, states_here, paired, int(parts > 1))
        _backward_launches(p, device, defines, segment, targets, new)
    if parts > 1:
        du, ddelta, dz = (x.to(u.dtype) for x in (du, ddelta, dz))
    return du, ddelta, dA, dB, dC, dD, dz, dbias[0] if parts == 1 else dbias.sum(0), dinitial


def _backward_launches(p, device, defines, segment: int, targets: tuple[int, int], new: dict) -> None:
    """The launches for one group of states; `targets` are the addresses of its first columns of dB and dC."""
    u, n, paired, grouped = defines
    batch, length, channels = p.batch, p.length, p.channels
    warps = _most_warps("scan_backward", n, min(BACKWARD_WARPS, math.ceil(channels / 64)), device.shared_limit)
    threads = plan(1, 1, channels, 1, warps, 1)
    module = device.module(_defines(u, n, threads.warps, paired, grouped))
    shared = _shared_bytes("scan_backward", n, threads.warps)
    slots = module.resident("scan_backward", threads.threads, shared) * device.multiprocessors
    cut = plan(batch, length, channels, slots, warps, segment)
    _set_plan(p, cut, math.ceil(length / segment))
    if cut.chunks > 1:
        ends = torch.empty(batch * cut.chunks * (n + 1) * channels, **new)
        p.ends = ends.data_ptr()
        p.sums = p.ends + 4 * batch * cut.chunks * n * channels
        blocks = batch * (cut.chunks - 1) * cut.channel_blocks
        module.launch("adjoint_ends", blocks, cut.threads, _shared_bytes("adjoint_ends", n, cut.warps), p)
        module.launch("adjoint_carry", math.ceil(batch * n * channels / 128), 128, 0, p)
    grid = min(p.items, slots)
    scratch = torch.empty(grid * cut.warps * (segment // TILE) * n * 64, **new)
    partial = torch.empty(batch * cut.chunks * (n + 2) * channels, **new)
    p.scratch, p.partial = scratch.data_ptr(), partial.data_ptr()
    p.dB, p.dC = targets
    if cut.channel_blocks > 1:
        sums = torch.empty(2, cut.channel_blocks * batch * length * n, **new)
        p.dB, p.dC = sums[0].data_ptr(), sums[1].data_ptr()
    module.launch("scan_backward", grid, cut.threads, shared, p)
    module.launch("reduce_rows", math.ceil((n + 2) * channels / 32), 256, 1024, p)
    if cut.channel_blocks > 1:
        p.y, p.du = targets
        blocks = min(8 * device.multiprocessors, math.ceil(batch * length * n / 256))
        module.launch("reduce_blocks", blocks, 256, 0, p)


def piece_ends(x, vector, delta, A, bias, mask, softplus: bool, reverse: bool, gate=None, adjoint: bool = False):
    """(b d n), (b d): ends.py says what; by the first pass of the scan or of its backward pass, over all chunks."""
    device = _device(x)
    batch, length, channels = x.shape
    if A.shape[1] > GROUP:
        groups = [slice(first, first + GROUP) for first in range(0, A.shape[1], GROUP)]
        parts = [
            piece_ends(x, vector[..., g], delta, A[:, g], bias, mask, softplus, reverse, gate, adjoint) for g in groups
        ]
        return torch.cat([ends for ends, _ in parts], -1), parts[0][1]
    n = A.shape[1]
    x, vector, delta = (_rows(t) for t in (x, vector, delta))
    gate = None if gate is None else _rows(gate)
    At, bias = A.t().contiguous(), _float(bias)
    mask = None if mask is None else mask.contiguous()
    kernel = "adjoint_ends" if adjoint else "scan_ends"
    warps = _most_warps(kernel, n, min(FORWARD_WARPS, math.ceil(channels / 64)), device.shared_limit)
    threads = plan(1, 1, channels, 1, warps, 1)
    module = device.module(_defines(x, n, threads.warps, _paired(x, delta, gate)))
    shared = _shared_bytes(kernel, n, threads.warps)
    slots = module.resident(kernel, threads.threads, shared) * device.multiprocessors
    cut = plan(batch, length, channels, slots, warps, segment_length(batch, length, channels))
    p = _arguments(x, delta, At, vector, vector, None, gate, bias, None, mask, softplus, reverse)
    p.dy, p.dy_b, p.dy_t = x.data_ptr(), x.stride(0), x.stride(1)
    _set_plan(p, cut, 0)
    p.summed = cut.chunks
    ends = torch.empty((batch, cut.chunks, n, channels), dtype=torch.float32, device=x.device)
    sums = torch.empty((batch, cut.chunks, channels), dtype=torch.float32, device=x.device)
    p.ends, p.sums = ends.data_ptr(), sums.data_ptr()
    module.launch(kernel, p.items, cut.threads, shared, p)
    if not adjoint:  # the state leaves at the last chunk, its gradient at the first
        ends, sums = ends.flip(1), sums.flip(1)
    between = torch.cat((torch.zeros_like(sums[:, :1]), sums[:, :-1]), 1).cumsum(1)  # from a chunk to the piece's end
    decayed = (between.unsqueeze(2) * At).exp_().mul_(ends)  # (b chunks n d)
    return decayed.sum(1).transpose(1, 2), sums.sum(1)


# ------------------------------------------------------------------------------------------------------ operators
@torch.library.custom_op("seqlab::selective_scan_cuda", mutates_args=(), device_types="cuda")
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    mask: Tensor | None,
    softplus: bool,
    reverse: bool,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return nvrtc.on_device(forward, u, delta, A, B, C, D, z, bias, initial, mask, softplus, reverse, segment)


@_scan.register_fake
def _(u, delta, A, B, C, D, z, bias, initial, mask, softplus, reverse, segment):
    state = A.new_empty(u.shape[0], u.shape[2], A.shape[1])
    kept = (u.shape[0], (u.shape[1] + segment - 1) // segment, A.shape[1], u.shape[2]) if segment else (0,)
    states = A.new_empty(kept)
    return torch.empty(u.shape, dtype=u.dtype, device=u.device), state, states


@torch.library.custom_op("seqlab::selective_scan_cuda_backward", mutates_args=(), device_types="cuda")
def _scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    mask: Tensor | None,
    states: Tensor,
    softplus: bool,
    reverse: bool,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return nvrtc.on_device(
        backward, dy, dfinal, u, delta, A, B, C, D, z, bias, initial, mask, states, softplus, reverse, segment,
    )  # fmt: skip


@_scan_backward.register_fake
def _(dy, dfinal, u, delta, A, B, C, D, z, bias, initial, mask, states, softplus, reverse, segment):
    def like(x, dtype=None):
        shape = (0,) if x is None else x.shape
        return torch.empty(shape, dtype=dtype or u.dtype, device=u.device)

    f = torch.float32
    return like(u), like(u), like(A, f), like(B), like(C), like(D, f), like(z), like(bias, f), like(initial, f)


def _setup(ctx, inputs, output):
    *tensors, softplus, reverse, segment = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.softplus, ctx.reverse, ctx.segment = softplus, reverse, segment
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, dfinal, _, call=_scan_backward):
    *tensors, states = ctx.saved_tensors
    if not ctx.segment:
        raise RuntimeError("selective_scan: the forward pass ran without gradients in sight; nothing was kept for them")
    u = tensors[0]
    if dy is None:
        dy = torch.zeros(u.shape, dtype=u.dtype, device=u.device)
    if dy.dtype != u.dtype:
        dy = dy.to(u.dtype)
    out = call(dy, dfinal, *tensors, states, ctx.softplus, ctx.reverse, ctx.segment)
    grads = [None if x is None else g for g, x in zip(out, tensors[:9], strict=True)]
    return (*grads, None, None, None, None)


_scan.register_autograd(_gradients, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The same operator without torch.library's wrapping, which costs more than a short scan does."""

    @staticmethod
    def forward(ctx, *inputs):
        out = nvrtc.on_device(forward, *inputs)
        _setup(ctx, inputs, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal, nothing):
        return _gradients(ctx, dy, dfinal, nothing, functools.partial(nvrtc.on_device, backward))


def _call(*inputs):
    """One launch sequence: y, final state, states kept for the backward pass (the last input says how far apart)."""
    if torch.compiler.is_compiling() or not inputs[0].is_cuda:
        return _scan(*inputs)
    if inputs[-1]:
        return _Eager.apply(*inputs)
    return nvrtc.on_device(forward, *inputs)


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
    """y (b l d) in u's dtype and the state after the last step (b d n), as __init__ describes them."""
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)
    )
    segment = segment_length(*u.shape) if keep else 0
    if A.shape[1] <= GROUP:
        y, final, _ = _call(u, delta, A, B, C, D, z, delta_bias, initial_state, mask, delta_softplus, reverse, segment)
        return y, final
    return _run_groups(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, reverse, segment)


def _run_groups(u, delta, A, B, C, D, z, bias, softplus, initial, mask, reverse, segment):
    """More than GROUP states: the sum over states is taken group by group, in float32, the rest by torch."""
    data = u.dtype
    x, delta, B, C = (t.float() for t in (u, delta, B, C))
    total, finals = None, []
    for first in range(0, A.shape[1], GROUP):
        part = slice(first, first + GROUP)
        y, final, _ = _call(
            x, delta, A[:, part], B[..., part], C[..., part], None, None, bias,
            None if initial is None else initial[..., part], mask, softplus, reverse, segment,
        )  # fmt: skip
        total = y if total is None else total + y
        finals.append(final)
    real = None if mask is None else mask.unsqueeze(-1)
    if D is not None:
        total = total + D * (x if real is None else torch.where(real, x, 0.0))
    if z is not None:
        gate = z.float()
        total = total * torch.nn.functional.silu(gate if real is None else torch.where(real, gate, 0.0))
    return total.to(data), torch.cat(finals, -1)
