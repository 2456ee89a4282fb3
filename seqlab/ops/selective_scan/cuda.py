"""selective_scan on NVIDIA GPUs: the kernels of scan.cu, compiled at first use (seqlab/ops/nvrtc.py).

Parallel over channels and over time; deterministic; no workspace grows with l*d*n except the states kept for the
backward pass: one every 32 to 128 steps, or one every 8 where those fit KEEP_LIMIT. See README.md and docs/kernels.md.
"""

import ctypes
import dataclasses
import functools
import itertools
import math
import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from seqlab.ops import nvrtc
from seqlab.ops.dispatch import Alike, Recent, Request, memorise

NATIVE_MASK = True
SOURCE = "selective_scan/scan.cu"
KERNELS = (
    "scan_ends", "scan_carry", "scan_forward", "adjoint_ends", "adjoint_carry", "scan_backward", "scan_reduce",
)  # fmt: skip
SHORT_SOURCE, SHORT_KERNELS = "selective_scan/scan_short.cu", ("short_forward", "short_backward", "short_reduce")
TILE, STAGE = 8, 32
KEEP_LIMIT = "SEQLAB_SCAN_KEEP"
"""Environment variable: how many GiB of states a scan may keep for its backward pass to have one every TILE steps, which then
need not go through the sequence again; a 32nd of the GPU's memory unless set, 0 for never."""
FINE_ABOVE = 1 << 21
"""Elements (batch x channels x length) above which that is done: what is smaller waits for the host."""
GROUP = 64
"""States in one launch; more are run in groups, whose outputs are added."""
BACKWARD_GROUP = 16
"""The same for the backward pass, which keeps more for every state; the groups' gradients are added in float32."""
FEW = 4
"""Up to so many chunks every block sums up itself what the chunks before leave, which saves a launch."""
FORWARD_WARPS = 4
FORWARD_RESIDENT = (12, 16)
"""Warps a multiprocessor holds; more have fewer registers, and all together are about as fast."""
BACKWARD_WARPS = {2: 4, 4: 3}
"""Warps a block by bytes of an element: two blocks fill a multiprocessor's shared memory. Four where every tile's state is kept."""


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


def keep_limit(total: int) -> int:
    """KEEP_LIMIT in bytes on a GPU with `total` bytes of memory.

    Raises:
        ValueError: the environment variable is not a number of GiB.
    """
    text = os.environ.get(KEEP_LIMIT, "").strip()
    if not text:
        return total // 32
    try:
        if (limit := int(float(text) * (1 << 30))) >= 0:
            return limit
        raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{KEEP_LIMIT} is {text!r}; allowed: a number of GiB, 0 for no states every {TILE} steps") from None


def kept_every(device, batch: int, length: int, channels: int, n: int) -> int:
    """Steps between the states kept for the backward pass: TILE where they fit, else `segment_length`.

    With TILE the gradients are made of the same numbers by the same operations, but for dz, which comes from outputs rounded to the
    data's type.
    """
    if batch * length * channels > FINE_ABOVE and 4 * batch * math.ceil(length / TILE) * n * channels <= device.keep_limit:
        return TILE
    return segment_length(batch, length, channels)


def _grain(segment: int, batch: int, length: int, channels: int) -> int:
    """Chunks are multiples of this: of the steps between the few states kept. Where none is or every tile's, long sequences are cut
    more finely, so that chunks fill a wave more exactly."""
    if segment not in (0, TILE):
        return segment
    return STAGE if length >= 1 << 16 else segment_length(batch, length, channels)


def segment_length(batch: int, length: int, channels: int) -> int:
    """Steps between the states kept for the backward pass, and the grain of the chunks.

    128, and shorter only where 128 would leave most of a large GPU without a warp. It depends on the shape alone, so
    that shapes of results are known without a GPU.
    """
    warps = batch * math.ceil(channels / 64)
    for segment in (128, 64):
        if warps * math.ceil(length / segment) >= 2048:
            return segment
    return 32


@functools.lru_cache(maxsize=1024)
def plan(batch: int, length: int, channels: int, resident: int, warps: int, segment: int) -> Plan:
    """Choose the chunk, a multiple of `segment`, so that the blocks fill `resident` slots in few and full waves."""
    return _plan_and_cost(batch, length, channels, resident, warps, segment)[0]


@functools.lru_cache(maxsize=1024)
def _plan_and_cost(batch: int, length: int, channels: int, resident: int, warps: int, segment: int) -> tuple[Plan, float]:
    """`plan`, and about how many steps it takes.

    A wave lasts as long as a chunk; several chunks cost a first pass, taken as 160 steps of work (what is usually left
    of it) or 0.9 of a chunk, and one or two more launches.
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
    return Plan(best, math.ceil(length / best), segment, warps, blocks), best_cost


SHORT_FORWARD, SHORT_BACKWARD = 1 << 23, 1 << 21
"""Elements (batch x channels x length) up to which scan_short.cu is thought of; no more have been measured."""
SAVED = 3.0
"""Microseconds that its fewer launches are worth: by so much scan.cu, with fewer instructions, must be faster."""
SHORT_WARPS = 8
"""Warps of scan_short.cu that a multiprocessor holds."""
AT_ONCE = {1: 1.0, 2: 1.0, 4: 0.91, 8: 0.91}
"""The share of the multiprocessors on which clusters of so many blocks find room: those of an H200, whose groups of
multiprocessors are not all whole."""


class Sides(NamedTuple):
    """A block of scan_short.cu, and the cluster of blocks that shares a sequence."""

    across: int  # pairs of channels a warp
    times: int  # warps, which follow each other in time
    blocks: int = 1  # of a cluster, which follow each other in time
    tile: int = TILE  # steps a thread; going backward always TILE

    @property
    def span(self) -> int:
        """Steps of a warp."""
        return 32 // self.across * self.tile

    @property
    def covers(self) -> int:
        """Steps of a round."""
        return self.span * self.times * self.blocks

    def shared(self, n: int, size: int, backward: bool = False) -> int:
        """Bytes of shared memory; size: of an element of the data."""
        rows, warps = self.across * n, self.times
        total = 2 * n * self.span * size * warps + 16 * rows * (warps + 2) + 8 * n * warps + 8 * rows
        if backward:
            total += 8 * self.across * warps * (2 * self.span + max(4, 32 // self.across)) + 8 * warps * (32 * n + rows)
        return total

    def at_once(self, multiprocessors: int) -> int:
        """Clusters."""
        return max(1, int(AT_ONCE[self.blocks] * multiprocessors) * (SHORT_WARPS // self.times) // self.blocks)

    def clusters(self, sequences: int, channels: int) -> int:
        return sequences * math.ceil(channels / (2 * self.across))

    def microseconds(self, multiprocessors: int, sequences: int, length: int, channels: int, backward: bool = False) -> float:
        """About how long it takes with 16 states of bfloat16. Fitted on an H200 (docs/kernels.md); waves and rounds decide."""
        clusters, at_once = self.clusters(sequences, channels), self.at_once(multiprocessors)
        rounds = math.ceil(clusters / at_once) * math.ceil(length / self.covers)
        busy = max(1.0, self.times / 4, min(clusters, at_once) * self.blocks * self.times / (4 * multiprocessors))  # warps a scheduler
        lanes = math.log2(32 // self.across)  # exchanges of a state
        start = 0.35 * (self.blocks - 1) + 0.05 * self.blocks * self.times
        if backward:  # sums over channels are added up block by block
            return 5.8 + start + rounds * (4.2 + 4.6 * busy + 1.4 * lanes) + 57.0 * sequences * channels * length / self.across / 2**20
        if self.tile > TILE:
            return 1.7 + start + rounds * (2.8 + 3.9 * busy + 1.7 * lanes)
        return 2.2 + start + rounds * (1.8 + 2.1 * busy + 0.9 * lanes)


def chunked_microseconds(elements: int, backward: bool) -> float:
    """The same for scan.cu, of which launches are most for little."""
    return max(60.0, 35.0 + 29.5 * elements / 2**20) if backward else max(31.0, 21.0 + 13.5 * elements / 2**20)


@functools.lru_cache(maxsize=1024)
def short(
    device, batch: int, length: int, channels: int, n: int, size: int, backward: bool = False, scans: int = 1
) -> Sides | None:
    """How scan_short.cu runs a problem; None where scan.cu is faster. scans: how many of that size at once, 1 or 2."""
    elements = batch * length * channels
    if elements > (SHORT_BACKWARD if backward else SHORT_FORWARD) or n > 32:
        return None
    best, least = None, chunked_microseconds(elements, backward) + SAVED
    if scans > 1:  # one after the other, and less where that is near
        one = short(device, batch, length, channels, n, size, backward)
        if one is None:
            return None
        least = 0.9 * scans * one.microseconds(device.multiprocessors, batch, length, channels, backward)
    # going backward a warp begins where a state was kept
    ways = ((8, 4), (TILE,)) if backward else ((16, 8, 4), (2 * TILE, TILE))
    for across, tile, times, blocks in itertools.product(*ways, (8, 4, 2, 1), (1, 2, 4, 8)):
        sides = Sides(across, times, blocks, tile)
        if blocks > 1 and not (
            device.clusters and sides.covers >= length and sides.clusters(scans * batch, channels) <= sides.at_once(device.multiprocessors)
        ):
            continue  # a second wave of clusters, which leave multiprocessors idle, never paid
        if sides.covers // 2 >= length and times * blocks > 1 or sides.shared(n, size, backward) > device.shared_limit:
            continue
        time = sides.microseconds(device.multiprocessors, scans * batch, length, channels, backward)
        if time < least:
            best, least = sides, time
    return best


# --------------------------------------------------------------------------------------------------------- device
class _Device:
    """Compiles and launches for one GPU. The tests put an emulator in its place."""

    def __init__(self, index: int):
        self.index = index
        self.multiprocessors = nvrtc.multiprocessors(index)
        self.shared_limit = nvrtc.shared_limit(index)
        self.keep_limit = keep_limit(torch.cuda.get_device_properties(index).total_memory)
        self.clusters = torch.cuda.get_device_capability(index) >= (9, 0)

    def module(self, defines: tuple[tuple[str, int], ...], source: str = SOURCE) -> nvrtc.Module:
        return nvrtc.module(source, defines, self.index)


_devices: dict[int, _Device] = {}


def _device(x: Tensor):
    index = x.device.index
    found = _devices.get(index)
    if found is None:
        found = _devices[index] = _Device(index)
    return found


@functools.lru_cache(maxsize=1024)
def _shared_bytes(kernel: str, n: int, warps: int, size: int = 2, wide: int = 0, fine: int = 0) -> int:
    """Dynamic shared memory of a kernel (scan.cu says what is in it); size: bytes of an element of the data; wide and fine: as
    the macros."""
    row, slots = STAGE + 4, 16 * 32 * n * warps // (1 if n <= 32 else 2)
    inputs = 3 * TILE * 64 * size * warps
    if kernel in ("scan_ends", "adjoint_ends"):
        return 4 * n * row + slots + inputs
    if kernel == "scan_forward":
        per = 16 // size if wide else 1
        each = math.ceil(2 * STAGE * n / per / (32 * warps)) * per
        return 4 * n * row * 2 * (2 if each <= 16 else 1) + slots + inputs
    if kernel == "scan_backward":
        fold, stage, tensor = 576 if size == 2 else 1024, 16 if warps > 2 and not fine else 8, 16 * TILE * size
        sums = (n * (2 * stage + 2) + 3) // 4 * 4
        if fine:  # two stages of B and C, and where a warp's tensors lie
            return 4 * warps * (192 * n + max(fold, 3 * tensor) + 2 * tensor + sums + 20) + 16 * n * stage
        return 4 * warps * (256 * n + fold + 128 * TILE + 3 * tensor + sums) + 8 * n * (stage + 4)
    return {"scan_reduce": 1024, "scan_carry": 2048, "adjoint_carry": 2048}[kernel]  # 256 threads, 1 and 2 floats each


@functools.lru_cache(maxsize=1024)
def _most_warps(kernel: str, n: int, warps: int, limit: int, size: int = 2, wide: int = 0, fine: int = 0) -> int:
    """Fewer warps a block where that many states would not fit a block's shared memory."""
    while warps > 1 and _shared_bytes(kernel, n, warps, size, wide, fine) > limit:
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


def _aligned(*tensors: Tensor | None) -> bool:
    return not any(x is not None and x.data_ptr() % 16 for x in tensors)


def _wide(n: int, *tensors: Tensor | None) -> int:
    """1 if rows can be read in pieces of 16 bytes everywhere; the states of B and C too, and rows without gaps, as results have.
    The first tensor has the data's shape."""
    per = 16 // tensors[0].element_size()
    return int(n % per == 0 and tensors[0].shape[-1] % per == 0 and all(
        x is None or not (x.stride(0) % per or x.stride(1) % per or x.data_ptr() % 16) for x in tensors
    ))  # fmt: skip


def _defines(
    u: Tensor, n: int, warps: int, paired: int, wide: int, grouped: int = 0, fine: int = 0
) -> tuple[tuple[str, int], ...]:
    basic = (("STATES", n), ("WARPS", warps), ("BF16", int(u.dtype == torch.bfloat16)), ("PAIRED", paired))
    return (*basic, ("WIDE", wide), *((("GROUPED", 1),) if grouped else ()), *((("FINE", 1),) if fine else ()))


# Finding out how to run a call takes longer than running a short one, so it is done once for every kind of call: shapes,
# strides, alignments and options. What is left is to fill in the addresses.
_recipes: dict[tuple, "_Recipe | None"] = {}
_recent = Recent()
"""Recipes of the backward passes run last."""


class _Results(NamedTuple):
    """Where results are, and their sizes, strides and dtypes as `nvrtc.memory` takes them, all without gaps. Made once for a kind of
    call."""

    device: torch.device
    data: tuple  # y, du, ddelta, dz (b l d)
    vectors: tuple  # dB, dC (b l n)
    A: tuple  # dA (d n)
    channel: tuple  # dD, dbias (d)
    state: tuple  # final state, dinitial (b d n)
    kept: tuple  # states for the backward pass (b segments n d)


def _results(u: Tensor, n: int, segments: int) -> _Results:
    batch, length, channels = u.shape

    def packed(dtype: torch.dtype, *sizes: int) -> tuple:
        return sizes, tuple(math.prod(max(1, size) for size in sizes[i + 1 :]) for i in range(len(sizes))), dtype

    data, state = u.dtype, torch.float32
    return _Results(
        u.device, packed(data, batch, length, channels), packed(data, batch, length, n), packed(state, channels, n),
        packed(state, channels), packed(state, batch, channels, n), packed(state, batch, segments, n, channels),
    )  # fmt: skip


@dataclass
class _Recipe:
    """How to run one kind of call; `params` is complete but for the addresses."""

    module: object
    params: ctypes.Structure
    cut: Plan
    keep: bool  # forward: states for the backward pass; backward: dB and dC go straight to where they belong
    results: _Results
    work: int  # floats of workspace
    sums: int  # where in it the chunks' sums start, in bytes; the states at chunk borders are at its start
    launches: tuple[tuple[str, int, int, int], ...]  # kernel, blocks, threads, bytes of shared memory
    ungated: bool = False  # keep the output before the gate, too
    aligned: bool = False  # it was found for rows of data aligned to 16 bytes, and takes no others
    parts: tuple[tuple[str, int], ...] = ()  # of the workspace: a field of the parameters, where it starts in bytes

    def __post_init__(self):
        self.copy = functools.partial(type(self.params).from_buffer_copy, self.params)
        self.queue = [self.module.launcher(*what) for what in self.launches]  # called with the parameters


def _kind(device, what: str, tensors: tuple[Tensor | None, ...], *options) -> tuple:
    """What a recipe depends on. `tensors` begins with u and A."""
    kind = [device, what, tensors[0].shape, tensors[1].shape[1], tensors[0].dtype, *options]
    for x in tensors:
        if x is None:
            kind.append(None)
        else:
            kind += (x.stride(), x.data_ptr() % 16)
    return tuple(kind)


def _template(u, delta, A, B, C, z, softplus: bool, reverse: bool, cut: Plan, source: str = SOURCE):
    """Everything but the addresses."""
    p = nvrtc.params_type(source)()
    p.A_c, p.A_n = A.stride()
    for name, x in (("u", u), ("delta", delta), ("B", B), ("C", C), ("z", z)):
        if x is not None:
            setattr(p, f"{name}_b", x.stride(0))
            setattr(p, f"{name}_t", x.stride(1))
            if x.stride(1) >= 1 << 29:
                raise ValueError(f"selective_scan: rows of {name} are {x.stride(1)} elements apart; allowed: below 2^29")
    p.batch, p.length, p.channels = u.shape
    p.all_states = A.shape[1]
    p.softplus, p.reverse = int(softplus), int(reverse)
    p.chunk, p.chunks, p.segment = cut.chunk, cut.chunks, cut.segment
    p.all_segments = math.ceil(p.length / cut.segment)
    p.channel_blocks, p.items = cut.channel_blocks, p.batch * cut.chunks * cut.channel_blocks
    p.summed, p.carried = cut.chunks - 1, int(cut.chunks > FEW)
    p.shares = _carry_shares(cut.chunks)
    return p


READ = ("u", "delta", "B", "C", "z", "dy", "A", "D", "bias", "initial", "dfinal", "mask")
"""What kernels read: the first fields of their parameters, in this order, so that one call writes all addresses."""
_write_addresses = struct.Struct(f"{len(READ)}Q").pack_into


def _fill(p, u, delta, B, C, z, dy, A, D, bias, initial, dfinal, mask) -> bool:
    """The addresses of what is read, in READ's order; whether u, delta, B, C, z and dy are aligned to 16 bytes."""
    at_u, at_delta, at_B, at_C = u.data_ptr(), delta.data_ptr(), B.data_ptr(), C.data_ptr()
    at_z, at_dy = 0 if z is None else z.data_ptr(), 0 if dy is None else dy.data_ptr()
    _write_addresses(
        p, 0, at_u, at_delta, at_B, at_C, at_z, at_dy, A.data_ptr(), 0 if D is None else D.data_ptr(),
        0 if bias is None else bias.data_ptr(), 0 if initial is None else initial.data_ptr(),
        0 if dfinal is None else dfinal.data_ptr(), 0 if mask is None else mask.data_ptr(),
    )  # fmt: skip
    return not (at_u | at_delta | at_B | at_C | at_z | at_dy) % 16


def _carry_shares(chunks: int) -> int:
    """Threads that share the carry over so many chunks: a power of two, at least eight chunks each."""
    return max(1, min(8, 1 << (chunks // 8).bit_length() - 1)) if chunks >= 8 else 1


def _summary_launches(names: tuple[str, str], n: int, cut: Plan, batch: int, channels: int, size: int):
    """The launches that find the state entering every chunk: none for a single chunk; few chunks are summed where needed."""
    ends, carry = names
    if cut.chunks == 1:
        return []
    blocks = batch * (cut.chunks - 1) * cut.channel_blocks
    launches = [(ends, blocks, cut.threads, _shared_bytes(ends, n, cut.warps, size))]
    if cut.chunks > FEW:
        blocks = batch * math.ceil(n * channels * _carry_shares(cut.chunks) / 256)
        launches.append((carry, blocks, 256, _shared_bytes(carry, n, 8)))
    return launches


def _tidy(u, delta, A, B, C, D, z, bias, initial, mask):
    """The same values, laid out as the kernels read them."""
    u, delta, B, C, z = (None if x is None else _rows(x) for x in (u, delta, B, C, z))
    D, bias, initial, mask = (None if x is None else x.contiguous() for x in (D, bias, initial, mask))
    if A.shape[1] > 32:  # then A is read all the time, and neighbouring channels must be neighbours
        A = A.t().contiguous().t()
    return u, delta, A, B, C, D, z, bias, initial, mask


def _like(x: Tensor) -> Tensor:
    """Rows without gaps, of x's shape and dtype; empty_like costs less than half of torch.empty, whose sizes are Python's."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


def _blank(new, mask: Tensor | None):
    """`new` for outputs: 0 everywhere where there is a mask, as kernels leave masked positions alone."""
    return new if mask is None else lambda *what: new(*what).zero_()


def _short_recipe(device, sides, kernel: str, u, delta, A, B, C, z, softplus: bool, reverse: bool, segment: int, scans: int, *rows):
    """Module, plan, parameters and the launch of a kernel of scan_short.cu; rows: what else is read by rows. None where the GPU has
    no room for such a cluster."""
    n, backward = A.shape[1], kernel == "short_backward"
    named = (("FORWARD", int(not backward)), ("STATES", n), ("ACROSS", sides.across), ("TIMES", sides.times))
    paired, wide = _paired(u, delta, z, *rows), _wide(n, u, delta, z, *rows, B, C)
    ways = (("CLUSTER", sides.blocks, sides.blocks > 1), ("TILE", sides.tile, sides.tile != TILE), ("BOTH", 1, scans > 1))
    defines = (*named, *_defines(u, n, 0, paired, wide)[2:], *((name, value) for name, value, unusual in ways if unusual))
    cut = Plan(u.shape[1], 1, segment, sides.times, math.ceil(u.shape[2] / (2 * sides.across)))
    module, shared = device.module(defines, SHORT_SOURCE), sides.shared(n, u.element_size(), backward)
    kernel += "_pair" if scans > 1 else ""
    if sides.blocks > 1 and module.clusters(kernel, cut.threads, shared, sides.blocks) == 0:
        return None
    params = _template(u, delta, A, B, C, z, softplus, reverse, cut, SHORT_SOURCE)
    return module, cut, params, (kernel, scans * u.shape[0] * cut.channel_blocks * sides.blocks, cut.threads, shared)


def _short_forward_recipe(
    device, u, delta, A, B, C, z, softplus: bool, reverse: bool, segment: int, scans: int = 1
) -> _Recipe | None:
    """By scan_short.cu; None where scan.cu is faster."""
    batch, length, channels = u.shape
    n, size = A.shape[1], u.element_size()
    sides = short(device, batch, length, channels, n, size, False, scans)
    if sides is None:
        return None
    grain = _grain(segment, batch, length, channels)
    found = _short_recipe(device, sides, "short_forward", u, delta, A, B, C, z, softplus, reverse, grain, scans)
    if found is None:
        return None
    module, cut, p, launch = found
    return _Recipe(module, p, cut, segment > 0, _results(u, n, p.all_segments), 0, 0, (launch,), aligned=_aligned(u, delta, z, B, C))


def _forward_recipe(device, kind, u, delta, A, B, C, z, softplus: bool, reverse: bool, segment: int) -> _Recipe:
    fine = segment == TILE
    if not fine and (found := _short_forward_recipe(device, u, delta, A, B, C, z, softplus, reverse, segment)) is not None:
        return memorise(_recipes, kind, found)
    batch, length, channels = u.shape
    n = A.shape[1]
    paired, wide, size = _paired(u, delta, z), _wide(n, u, delta, z, B, C), u.element_size()
    grain = _grain(segment, batch, length, channels)
    warps = _most_warps("scan_forward", n, min(FORWARD_WARPS, math.ceil(channels / 64)), device.shared_limit, size, wide)
    first = plan(1, 1, channels, 1, warps, 1)
    shared = _shared_bytes("scan_forward", n, first.warps, size, wide)

    def work(warps_held: int) -> float:
        slots = warps_held // first.warps * device.multiprocessors
        return warps_held * _plan_and_cost(batch, length, channels, slots, warps, grain)[1]

    resident = FORWARD_RESIDENT[0]
    for more in FORWARD_RESIDENT[1:]:
        if more // first.warps * (shared + 1024) <= device.shared_limit and work(more) < 0.95 * work(resident):
            resident = more
    defines = _defines(u, n, first.warps, paired, wide, fine=int(fine))
    if resident != FORWARD_RESIDENT[0]:  # else what the backward pass uses too
        defines = (*defines, ("FORWARD_RESIDENT", resident))
    module = device.module(defines)
    slots = module.resident("scan_forward", first.threads, shared) * device.multiprocessors
    cut = dataclasses.replace(plan(batch, length, channels, slots, warps, grain), segment=segment or grain)
    p = _template(u, delta, A, B, C, z, softplus, reverse, cut)
    launches = _summary_launches(("scan_ends", "scan_carry"), n, cut, batch, channels, size)
    launches.append(("scan_forward", p.items, cut.threads, shared))
    borders = batch * cut.chunks * n * channels if cut.chunks > 1 else 0
    work = borders + batch * cut.chunks * channels if borders else 0
    results = _results(u, n, p.all_segments)
    found = _Recipe(
        module, p, cut, segment > 0, results, work, 4 * borders, tuple(launches), fine and z is not None, _aligned(u, delta, z, B, C)
    )
    return memorise(_recipes, kind, found)


def _find_forward(device, tensors, softplus: bool, reverse: bool, segment: int):
    """The recipe, and the tensors laid out for it."""
    u, delta, A, B, C, D, z, bias, initial, mask = tensors
    kind = _kind(device, "forward", (u, A, delta, B, C, D, z, bias, initial, mask), softplus, reverse, segment)
    recipe = _recipes.get(kind)
    if recipe is None:
        u, delta, A, B, C, D, z, bias, initial, mask = tidy = _tidy(*tensors)
        if any(a is not b for a, b in zip(tidy, tensors, strict=True)):
            tensors = tidy
            kind = _kind(device, "forward", (u, A, delta, B, C, D, z, bias, initial, mask), softplus, reverse, segment)
            recipe = _recipes.get(kind)
        if recipe is None:
            recipe = _forward_recipe(device, kind, u, delta, A, B, C, z, softplus, reverse, segment)
    return recipe, tensors


def _run_forward(recipe: _Recipe, u, delta, A, B, C, D, z, bias, initial, mask, final: bool):
    """y, the final state, and what the backward pass needs: states, the output before the gate (None where not wanted); None
    if the recipe takes aligned data and these are not."""
    p = recipe.copy()
    if not _fill(p, u, delta, B, C, z, None, A, D, bias, initial, None, mask) and recipe.aligned:
        return None
    results, (*first_passes, outputs), new = recipe.results, recipe.queue, nvrtc.memory(recipe.results.device)
    blank = _blank(new, mask)
    if recipe.work:
        work = new((recipe.work,), (1,), torch.float32)
        p.ends = work.data_ptr()
        p.sums = p.ends + recipe.sums
    for launch in first_passes:  # the GPU works while the rest is allocated
        launch(p)
    y, states, last, ungated = blank(*results.data), None, None, None
    p.y = y.data_ptr()
    if final:
        last = new(*results.state)
        p.final = last.data_ptr()
    if recipe.keep:
        states = new(*results.kept)
        p.segments = states.data_ptr()
        if recipe.ungated:
            ungated = new(*results.data)
            p.ungated = ungated.data_ptr()
    outputs(p)
    return y, last, states, ungated


def forward(u, delta, A, B, C, D, z, bias, initial, mask, softplus: bool, reverse: bool, segment: int, final: bool = True):
    """y (b l d), final state (b d n; None if not wanted), and for `backward` states at segment starts (b segments n d; empty if
    segment is 0) and, with segments of TILE steps and a gate, the output before it (b l d; else None).

    segment: steps between the states kept, a multiple of STAGE, or TILE (`kept_every`); 0: none."""
    recipe, tensors = _find_forward(_device(u), (u, delta, A, B, C, D, z, bias, initial, mask), softplus, reverse, segment)
    y, last, states, ungated = _run_forward(recipe, *tensors, final)
    return y, last, torch.empty(0, dtype=torch.float32, device=u.device) if states is None else states, ungated


def _short_backward_recipe(
    device, dy, u, delta, A, B, C, z, softplus: bool, reverse: bool, segment: int, scans: int = 1
) -> _Recipe | None:
    """By scan_short.cu; None where scan.cu is faster, or a span would start where no state was kept."""
    batch, length, channels = u.shape
    n, size = A.shape[1], u.element_size()
    sides = short(device, batch, length, channels, n, size, True, scans)
    if sides is None or sides.span % segment:
        return None
    found = _short_recipe(device, sides, "short_backward", u, delta, A, B, C, z, softplus, reverse, segment, scans, dy)
    if found is None:
        return None
    module, cut, p, launch = found
    p.dy_b, p.dy_t = dy.stride(0), dy.stride(1)
    outputs = batch * 2 * n * length + (n + 2) * channels
    launches = (launch, ("short_reduce" + ("_pair" if scans > 1 else ""), scans * math.ceil(outputs / 256), 256, 0))
    parts, work = _workspace(blocks=cut.channel_blocks * batch * 2 * n * length, partial=batch * sides.blocks * (n + 2) * channels)
    results = _results(u, n, p.all_segments)
    return _Recipe(module, p, cut, False, results, work, 0, launches, aligned=_aligned(dy, u, delta, z, B, C), parts=parts)


def _backward_recipe(device, dy, u, delta, A, B, C, z, softplus: bool, reverse: bool, segment: int, n: int, grouped):
    """The launches for `n` states of all."""
    fine = int(segment == TILE)
    if not (grouped or fine):
        found = _short_backward_recipe(device, dy, u, delta, A, B, C, z, softplus, reverse, segment)
        if found is not None:
            return found
    batch, length, channels = u.shape
    size = u.element_size()
    paired, wide = _paired(u, delta, z, dy), _wide(n, u, delta, z, dy, B, C)
    most = min(4 if fine else BACKWARD_WARPS[size], math.ceil(channels / 64))
    warps = _most_warps("scan_backward", n, most, device.shared_limit, size, 0, fine)
    first = plan(1, 1, channels, 1, warps, 1)
    gated = () if z is not None else (("GATED", 0),)
    shared = _shared_bytes("scan_backward", n, first.warps, size, 0, fine)
    module = device.module((*_defines(u, n, first.warps, paired, wide, grouped, fine), *gated))
    slots = module.resident("scan_backward", first.threads, shared) * device.multiprocessors
    grain = _grain(segment, batch, length, channels)
    cut = dataclasses.replace(plan(batch, length, channels, slots, warps, grain), segment=segment)
    p = _template(u, delta, A, B, C, z, softplus, reverse, cut)
    p.dy_b, p.dy_t = dy.stride(0), dy.stride(1)
    launches = _summary_launches(("adjoint_ends", "adjoint_carry"), n, cut, batch, channels, size)
    grid, tiles, several = min(p.items, slots), segment // TILE, cut.channel_blocks > 1
    launches.append(("scan_backward", grid, cut.threads, shared))
    blocks = math.ceil((n + 2) * channels / 32)
    if several:
        blocks += min(8 * device.multiprocessors, math.ceil(batch * length * n / 256))
    launches.append(("scan_reduce", blocks, 256, _shared_bytes("scan_reduce", n, 8)))
    borders = batch * cut.chunks * n * channels if cut.chunks > 1 else 0
    sums = cut.channel_blocks * batch * length * n if several else 0
    parts, work = _workspace(
        ends=borders,
        sums=batch * cut.chunks * channels if borders else 0,
        scratch=0 if fine else grid * cut.warps * 64 * ((tiles + 1) * n + 16 * tiles),
        partial=batch * cut.chunks * (n + 2) * channels,
        **({"dB": sums, "dC": sums} if several else {}),
    )
    aligned = _aligned(dy, u, delta, z, B, C)
    results = _results(u, A.shape[1], p.all_segments)
    return _Recipe(module, p, cut, not several, results, work, 0, tuple(launches), aligned=aligned, parts=parts)


def _workspace(**floats: int) -> tuple[tuple[tuple[str, int], ...], int]:
    """Where in one workspace each part starts, in bytes, a multiple of 16; how many floats all take."""
    parts, total = [], 0
    for name, count in floats.items():
        parts.append((name, 4 * total))
        total += (count + 31) // 32 * 32
    return tuple(parts), total


def _backward_recipes(device, dy, u, delta, A, B, C, z, softplus: bool, reverse: bool, segment: int):
    """One for every group of states."""
    n = A.shape[1]
    groups = [min(BACKWARD_GROUP, n - first) for first in range(0, n, BACKWARD_GROUP)]
    return tuple(
        _backward_recipe(device, dy, u, delta, A, B, C, z, softplus, reverse, segment, here, int(len(groups) > 1))
        for here in groups
    )


def _find_backward(device, tensors, softplus: bool, reverse: bool, segment: int):
    """The recipes, and the tensors laid out for them."""
    dy, dfinal, u, delta, A, *rest = tensors
    kind = _kind(device, "backward", (u, A, delta, *rest, dy, dfinal), softplus, reverse, segment)
    recipes = _recipes.get(kind)
    if recipes is None:
        dy, dfinal = _rows(dy), None if dfinal is None else dfinal.contiguous()
        u, delta, A, B, C, D, z, bias, initial, mask = _tidy(u, delta, A, *rest)
        tensors = dy, dfinal, u, delta, A, B, C, D, z, bias, initial, mask
        kind = _kind(device, "backward", (u, A, delta, B, C, D, z, bias, initial, mask, dy, dfinal), softplus, reverse, segment)
        recipes = _recipes.get(kind)
        if recipes is None:
            found = _backward_recipes(device, dy, u, delta, A, B, C, z, softplus, reverse, segment)
            recipes = memorise(_recipes, kind, found)
    return recipes, tensors


def _take_workspace(recipe: _Recipe, p, work: int, states: Tensor, ungated: Tensor | None = None) -> None:
    """The addresses of the backward pass's workspace, which starts at `work`, and of what was kept for it."""
    for name, offset in recipe.parts:
        setattr(p, name, work + offset)
    p.segments = states.data_ptr()
    if ungated is not None:
        p.ungated = ungated.data_ptr()


def _take_first_outputs(new, results: _Results, p, z, initial, mask):
    """du, ddelta, dz, dinitial, which the gradients' own kernel writes, their addresses in the parameters."""
    blank, data = _blank(new, mask), results.data
    du, ddelta = blank(*data), blank(*data)
    p.du, p.ddelta = du.data_ptr(), ddelta.data_ptr()
    dz = dinitial = None
    if z is not None:
        dz = blank(*data)
        p.dz = dz.data_ptr()
    if initial is not None:
        dinitial = new(*results.state)
        p.dinitial = dinitial.data_ptr()
    return du, ddelta, dz, dinitial


def _take_sums(new, results: _Results, p, D, bias):
    """dA, dB, dC, dD, dbias, which are added up at the end (dB and dC at once if there is nothing to add), likewise."""
    dA, dB, dC = new(*results.A), new(*results.vectors), new(*results.vectors)
    p.dA, p.into_B, p.into_C = dA.data_ptr(), dB.data_ptr(), dC.data_ptr()
    dD = dbias = None
    if D is not None:
        dD = new(*results.channel)
        p.dD = dD.data_ptr()
    if bias is not None:
        dbias = new(*results.channel)
        p.dbias = dbias.data_ptr()
    return dA, dB, dC, dD, dbias


def _run_backward(recipe: _Recipe, dy, dfinal, u, delta, A, B, C, D, z, bias, initial, mask, states, ungated):
    """All gradients by one recipe; None if it takes aligned data and these are not.

    A kernel is launched as soon as what it writes has a place: the GPU works while the rest is allocated."""
    p = recipe.copy()
    if not _fill(p, u, delta, B, C, z, dy, A, D, bias, initial, dfinal, mask) and recipe.aligned:
        return None
    results, (*first_passes, gradients, sums), new = recipe.results, recipe.queue, nvrtc.memory(recipe.results.device)
    work = new((recipe.work,), (1,), torch.float32)
    _take_workspace(recipe, p, work.data_ptr(), states, ungated)
    for launch in first_passes:
        launch(p)
    du, ddelta, dz, dinitial = _take_first_outputs(new, results, p, z, initial, mask)
    if recipe.keep:
        dA, dB, dC, dD, dbias = _take_sums(new, results, p, D, bias)
        p.dB, p.dC = p.into_B, p.into_C
        gradients(p)
    else:
        gradients(p)
        dA, dB, dC, dD, dbias = _take_sums(new, results, p, D, bias)
    sums(p)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial


def _run_backward_groups(recipes: tuple[_Recipe, ...], dy, dfinal, u, delta, A, B, C, D, z, bias, initial, mask, states, ungated):
    """The same where a recipe takes BACKWARD_GROUP states: du, ddelta and dz are added up in float32. With the output before the
    gate, dz is done at once."""
    channels, new = A.shape[0], {"dtype": torch.float32, "device": u.device}
    make = torch.empty if mask is None else torch.zeros  # the kernels leave masked positions alone
    du, ddelta, dz = (None if x is None else make(x.shape, **new) for x in (u, delta, z if ungated is None else None))
    if ungated is not None:
        dz = _like(z) if mask is None else torch.zeros_like(z, memory_format=torch.contiguous_format)
    dB, dC, dA = _like(B), _like(C), _like(A)
    dD, dinitial = (None if x is None else _like(x) for x in (D, initial))
    dbias = None if bias is None else torch.empty((len(recipes), channels), **new)
    for part, recipe in enumerate(recipes):
        p = recipe.copy()
        work = A.new_empty(recipe.work)
        _fill(p, u, delta, B, C, z, dy, A, D, bias, initial, dfinal, mask)
        _take_workspace(recipe, p, work.data_ptr(), states, ungated)
        p.du, p.ddelta = du.data_ptr(), ddelta.data_ptr()
        for field, x in (("dz", dz), ("dD", dD), ("dbias", dbias), ("dinitial", dinitial)):
            setattr(p, field, 0 if x is None else x.data_ptr())
        p.dA, p.into_B, p.into_C = dA.data_ptr(), dB.data_ptr(), dC.data_ptr()
        if part > 0:
            p.add, p.D, p.dD = 1, 0, 0  # the skip connection belongs to the first group alone
            if ungated is not None:
                p.dz = 0
            first = part * BACKWARD_GROUP
            p.A += 4 * first * A.stride(1)
            p.segments += 4 * first * channels
            for field, x in (("B", B), ("C", C), ("into_B", dB), ("into_C", dC)):
                setattr(p, field, getattr(p, field) + first * x.element_size())
            for field in ("dA", "dfinal", "dinitial"):
                if getattr(p, field):
                    setattr(p, field, getattr(p, field) + 4 * first)
            if bias is not None:
                p.dbias += 4 * part * channels
        if recipe.keep:
            p.dB, p.dC = p.into_B, p.into_C
        for launch in recipe.queue:
            launch(p)
    du, ddelta, dz = (None if x is None else x.to(u.dtype) for x in (du, ddelta, dz))
    return du, ddelta, dA, dB, dC, dD, dz, None if bias is None else dbias.sum(0), dinitial


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, bias, initial, mask, states, softplus: bool, reverse: bool, segment: int, ungated=None
):
    """Gradients of u, delta, A, B, C, D, z, bias, initial (None for what is absent). states, segment, ungated: as in `forward`."""
    given = dy, dfinal, u, delta, A, B, C, D, z, bias, initial, mask
    options = softplus, reverse, segment
    absent = dfinal is None, D is None, z is None, bias is None, initial is None, mask is None
    recipe = _recent.find("cuda", given, options, absent)
    if recipe is not None and (grads := _run_backward(recipe, *given, states, ungated)) is not None:
        return grads
    return _backward_anew(given, states, options, ungated, lambda found: recipe or _recent.keep(found, "cuda", given, options, absent))


def _backward_anew(given: tuple[Tensor | None, ...], states: Tensor, options: tuple, ungated: Tensor | None, keep):
    """The same, found out by looking at the tensors; keep(recipe) where it alone is all that there was to find out."""
    recipes, tensors = _find_backward(_device(given[2]), given, *options)
    if len(recipes) > 1:
        return _run_backward_groups(recipes, *tensors, states, ungated)
    if recipes[0].aligned and tensors is given and given[0].is_cuda:
        keep(recipes[0])
    return _run_backward(recipes[0], *tensors, states, ungated)


# ------------------------------------------------------------------------------------------- both directions at once
def _pair_recipe(what: str, find, tensors: tuple[tuple[Tensor | None, ...], ...], *options) -> _Recipe | None:
    """How to run two scans of one shape at once; None where they do not lie alike, or one after the other is faster.

    tensors: of each scan, (u, A, ...) as the kernels read them; find(device, *options): a recipe of the first, which is
    made into one of both."""
    device = _device(tensors[0][0])
    kind, other = (_kind(device, what, each, *options) for each in tensors)
    if kind != other:
        return None
    found = _recipes.get(kind, False)
    if found is False:
        found = find(device)
        if found is not None:
            both = (type(found.params) * 2)(found.params, found.params)
            both[1].reverse = 1
            found = dataclasses.replace(found, params=both, work=2 * found.work)
        memorise(_recipes, kind, found)
    return found


def pair_pays(u: Tensor, n: int, backward: bool = False) -> bool:
    """Whether two scans like this, of n states, are faster at once; else nobody need have the inputs of both at one time."""
    return short(_device(u), *u.shape, n, u.element_size(), backward, 2) is not None


def forward_pair(scans: tuple[tuple[Tensor | None, ...], ...], mask: Tensor | None, softplus: bool, segment: int):
    """(y, states at segment starts) of two scans (u, delta, A, B, C, D, z, bias) of one shape, the first from left to right,
    the second from right to left. In one launch where that is faster."""
    tidy = [_tidy(*tensors, None, mask) for tensors in scans]
    u, delta, A, B, C, _, z, *_ = tidy[0]
    recipe = _pair_recipe(
        "forward pair",
        lambda device: _short_forward_recipe(device, u, delta, A, B, C, z, softplus, False, segment, 2),
        tuple((t[0], t[2], t[1], *t[3:]) for t in tidy),
        softplus,
        segment,
    )
    if recipe is None:
        return [forward(*t, softplus, i > 0, segment, False)[:3:2] for i, t in enumerate(tidy)]
    p, new, pair = recipe.copy(), nvrtc.memory(recipe.results.device), []
    for mine, (u, delta, A, B, C, D, z, bias, initial, mask) in zip(p, tidy, strict=True):
        _fill(mine, u, delta, B, C, z, None, A, D, bias, initial, None, mask)
        y, states = _blank(new, mask)(*recipe.results.data), new(*recipe.results.kept) if recipe.keep else A.new_empty(0)
        mine.y = y.data_ptr()
        if recipe.keep:
            mine.segments = states.data_ptr()
        pair.append((y, states))
    for launch in recipe.queue:
        launch(p)
    return pair


def backward_pair(dy: Tensor, scans, mask: Tensor | None, states, softplus: bool, segment: int):
    """Of `forward_pair`'s scans, both of whose outputs have the gradient dy: for each those of u, delta, A, B, C, D, z, bias and
    the initial state (None for what is absent). states: those kept. In two launches where that is faster."""
    dy, tidy = _rows(dy), [_tidy(*tensors, None, mask) for tensors in scans]
    u, delta, A, B, C, _, z, *_ = tidy[0]
    recipe = _pair_recipe(
        "backward pair",
        lambda device: _short_backward_recipe(device, dy, u, delta, A, B, C, z, softplus, False, segment, 2),
        tuple((t[0], t[2], t[1], *t[3:], dy) for t in tidy),
        softplus,
        segment,
    )
    if recipe is None:
        return [backward(dy, None, *t, kept, softplus, i > 0, segment) for i, (t, kept) in enumerate(zip(tidy, states, strict=True))]
    p, results, new = recipe.copy(), recipe.results, nvrtc.memory(recipe.results.device)
    work = new((recipe.work,), (1,), torch.float32)
    start = work.data_ptr()
    grads = []
    for mine, tensors, kept in zip(p, tidy, states, strict=True):
        u, delta, A, B, C, D, z, bias, initial, mask = tensors
        _fill(mine, u, delta, B, C, z, dy, A, D, bias, initial, None, mask)
        _take_workspace(recipe, mine, start, kept)
        du, ddelta, dz, _ = _take_first_outputs(new, results, mine, z, None, mask)
        dA, dB, dC, dD, dbias = _take_sums(new, results, mine, D, bias)
        grads.append((du, ddelta, dA, dB, dC, dD, dz, dbias, None))
        start += 2 * recipe.work  # bytes of half of it
    for launch in recipe.queue:
        launch(p)
    return grads


def piece_ends(x, vector, delta, A, bias, mask, softplus: bool, reverse: bool, gate=None, adjoint: bool = False):
    """(b d n), (b d): ends.py says what; by the first pass of the scan or of its backward pass, over all chunks."""
    device = _device(x)
    batch, length, channels = x.shape
    if A.shape[1] > GROUP:
        groups = [slice(first, first + GROUP) for first in range(0, A.shape[1], GROUP)]
        parts = [
            piece_ends(x, vector[..., g], delta, A[:, g], bias, mask, softplus, reverse, gate, adjoint) for g in groups
        ]
        # a group whose states are forgotten sooner has not walked as far as the others
        return torch.cat([ends for ends, _ in parts], -1), torch.stack([sums for _, sums in parts]).amax(0)
    n = A.shape[1]
    x, vector, delta = (_rows(t) for t in (x, vector, delta))
    gate = None if gate is None else _rows(gate)
    At, bias = A.t().contiguous(), None if bias is None else bias.contiguous()
    mask = None if mask is None else mask.contiguous()
    wide = _wide(n, x, delta, gate, vector)
    kernel = "adjoint_ends" if adjoint else "scan_ends"
    size = x.element_size()
    warps = _most_warps(kernel, n, min(FORWARD_WARPS, math.ceil(channels / 64)), device.shared_limit, size)
    threads = plan(1, 1, channels, 1, warps, 1)
    shared = _shared_bytes(kernel, n, threads.warps, size)
    module = device.module(_defines(x, n, threads.warps, _paired(x, delta, gate), wide))
    slots = module.resident(kernel, threads.threads, shared) * device.multiprocessors
    cut = plan(batch, length, channels, slots, warps, segment_length(batch, length, channels))
    p = _template(x, delta, At.t(), vector, vector, gate, softplus, reverse, cut)
    _fill(p, x, delta, vector, vector, gate, x, At, None, bias, None, None, mask)
    p.dy_b, p.dy_t = x.stride(0), x.stride(1)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *found, ungated = nvrtc.on_device(forward, u, delta, A, B, C, D, z, bias, initial, mask, softplus, reverse, segment)
    return *found, u.new_empty(0) if ungated is None else ungated


@_scan.register_fake
def _(u, delta, A, B, C, D, z, bias, initial, mask, softplus, reverse, segment):
    state = A.new_empty(u.shape[0], u.shape[2], A.shape[1])
    kept = (u.shape[0], (u.shape[1] + segment - 1) // segment, A.shape[1], u.shape[2]) if segment else (0,)
    states = A.new_empty(kept)
    y, ungated = (torch.empty(x, dtype=u.dtype, device=u.device) for x in (u.shape, u.shape if segment == TILE and z is not None else 0))
    return y, state, states, ungated


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
    ungated: Tensor,
    softplus: bool,
    reverse: bool,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = nvrtc.on_device(
        backward, dy, dfinal, u, delta, A, B, C, D, z, bias, initial, mask, states, softplus, reverse, segment,
        ungated if ungated.numel() else None,
    )  # fmt: skip
    kinds = (u.dtype,) * 2 + (torch.float32,) + (u.dtype,) * 2 + (torch.float32, u.dtype, torch.float32, torch.float32)
    return tuple(torch.empty(0, dtype=k, device=u.device) if g is None else g for g, k in zip(found, kinds, strict=True))


@_scan_backward.register_fake
def _(dy, dfinal, u, delta, A, B, C, D, z, bias, initial, mask, states, ungated, softplus, reverse, segment):
    def like(x, dtype=None):
        shape = (0,) if x is None else x.shape
        return torch.empty(shape, dtype=dtype or u.dtype, device=u.device)

    f = torch.float32
    return like(u), like(u), like(A, f), like(B), like(C), like(D, f), like(z), like(bias, f), like(initial, f)


def _setup(ctx, inputs, output):
    *tensors, softplus, reverse, segment = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.options = softplus, reverse, segment
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, dfinal, *_):
    *tensors, states, ungated = ctx.saved_tensors
    if not ctx.options[2]:
        raise RuntimeError("selective_scan: the forward pass ran without gradients in sight; nothing was kept for them")
    out = _scan_backward(_incoming(dy, tensors[0]), dfinal, *tensors, states, ungated, *ctx.options)
    grads = [None if x is None else g for g, x in zip(out, tensors[:9], strict=True)]
    return (*grads, None, None, None, None)


def _incoming(dy: Tensor | None, u: Tensor) -> Tensor:
    if dy is None:
        return torch.zeros(u.shape, dtype=u.dtype, device=u.device)
    return dy if dy.dtype == u.dtype else dy.to(u.dtype)


_scan.register_autograd(_gradients, setup_context=_setup)


class Call(NamedTuple):
    """What a call asks for beside its tensors."""

    softplus: bool
    reverse: bool
    segment: int  # 0: no gradients wanted
    final: bool  # the final state is wanted
    recipe: _Recipe | None = None  # known: the tensors lie as it wants them
    alike: Alike | None = None  # known: recipes of its backward passes, by the gradient of y, None and the tensors


def _execute(call: Call, tensors: tuple[Tensor | None, ...]):
    """(y, final state, states kept, output before the gate), for a call outside of torch.compile."""
    if call.recipe is not None and (found := _run_forward(call.recipe, *tensors, call.final)) is not None:
        return found  # what is known has been seen to lie on the current GPU
    return nvrtc.on_device(forward, *tensors, call.softplus, call.reverse, call.segment, call.final)


def _execute_backward(call: Call, dy: Tensor | None, dfinal: Tensor | None, tensors, states: Tensor, ungated: Tensor | None):
    """The gradients of a call's tensors but for the mask; on their GPU. Tensors kept may have come back in another layout
    (checkpointing, offloading), so they are looked at again."""
    dy, options = _incoming(dy, tensors[0]), call[:3]
    if call.alike is None or dfinal is not None:
        return backward(dy, dfinal, *tensors, states, *options, ungated)
    given = dy, None, *tensors
    recipe = call.alike.find(given)
    if recipe is not None and (grads := _run_backward(recipe, *given, states, ungated)) is not None:
        return grads
    return _backward_anew(given, states, options, ungated, lambda found: recipe or call.alike.keep(found, given))


class _Eager(torch.autograd.Function):
    """The same operator without torch.library's wrapping, which costs more than a short scan does."""

    @staticmethod
    def forward(ctx, call, *tensors):
        y, final, *kept = _execute(call, tensors)
        ctx.save_for_backward(*tensors, *kept)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return y if final is None else (y, final)

    @staticmethod
    @nvrtc.once_differentiable
    def backward(ctx, dy, dfinal=None):
        *tensors, states, ungated = ctx.saved_tensors  # once: under checkpointing every look recomputes
        call = ctx.call
        if tensors[0].device.index == torch.cuda.current_device():
            return None, *_execute_backward(call, dy, dfinal, tensors, states, ungated), None
        with torch.cuda.device(tensors[0].device):
            return None, *_execute_backward(call, dy, dfinal, tensors, states, ungated), None


_apply_plain = super(torch.autograd.Function, _Eager).apply
"""_Eager.apply without torch.func's look at every argument: seven of the sixty microseconds of a call."""


def repeat(call: Call, tensors: tuple[Tensor | None, ...]) -> Tensor | tuple[Tensor, Tensor]:
    """y or, where it is wanted, y and the final state of a `known` call: its tensors have been seen to be plain ones, and need no care for
    torch.func's."""
    if call.segment:
        return _apply_plain(call, *tensors)
    y, final, _, _ = _execute(call, tensors)
    return (y, final) if call.final else y


def execute(call: Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """y and, where wanted, the final state, of a call outside of torch.compile; tensors as for `forward`."""
    if not call.segment:
        return _execute(call, tensors)[:2]
    found = _Eager.apply(call, *tensors)
    return found if call.final else (found, None)


def _segment(tensors: tuple[Tensor | None, ...]) -> int:
    """How many steps apart the forward pass keeps states for the gradients of these; 0 where none are wanted. u comes first."""
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        return 0
    u = tensors[0]
    if torch.compiler.is_compiling() or not u.is_cuda:
        return segment_length(*u.shape)
    return kept_every(_device(u), *u.shape, tensors[2].shape[1])


def known(tensors: tuple[Tensor | None, ...], softplus: bool, reverse: bool, final: bool) -> Call | None:
    """How to make any call with tensors of the same layouts and alignments again, skipping all that is found out from
    those; None where one launch sequence on these very tensors is not the whole of it."""
    u, A = tensors[0], tensors[2]
    if A.shape[1] > GROUP or u.device.index != torch.cuda.current_device():
        return None
    segment = _segment(tensors[:9])
    recipe, tidy = _find_forward(_device(u), tensors, softplus, reverse, segment)
    if tidy is not tensors:
        return None
    return Call(softplus, reverse, segment, final, recipe, Alike((u, None, *tensors)) if segment else None)


def _call(*inputs):
    """y, final state; the last input but one says how far apart the states kept for the backward pass are."""
    *tensors, softplus, reverse, segment, final = inputs
    if torch.compiler.is_compiling() or not inputs[0].is_cuda:
        return _scan(*inputs[:-1])[:2]
    return execute(Call(softplus, reverse, segment, final), *tensors)


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
) -> tuple[Tensor, Tensor | None]:
    """y (b l d) in u's dtype and the state after the last step (b d n; None if not wanted), as __init__ describes them."""
    segment = _segment((u, delta, A, B, C, D, z, delta_bias, initial_state))
    if A.shape[1] <= GROUP:
        return _call(
            u, delta, A, B, C, D, z, delta_bias, initial_state, mask, delta_softplus, reverse, segment, return_final_state
        )
    return _run_groups(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, reverse, segment)


def _run_groups(u, delta, A, B, C, D, z, bias, softplus, initial, mask, reverse, segment):
    """More than GROUP states: the sum over states is taken group by group, in float32, the rest by torch."""
    data = u.dtype
    x, delta, B, C = (t.float() for t in (u, delta, B, C))
    total, finals = None, []
    for first in range(0, A.shape[1], GROUP):
        part = slice(first, first + GROUP)
        y, final = _call(
            x, delta, A[:, part], B[..., part], C[..., part], None, None, bias,
            None if initial is None else initial[..., part], mask, softplus, reverse, segment, True,
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
