"""Decoding hundreds of streams in one launch: clusters of blocks that keep their streams from the first token to the last and never meet
each other, states moved in the background all the while. clustered.cu holds the kernel, compiled for the sizes of the model at first use
(ops/nvrtc.py); this file lays out the weights, shares out the streams and fills in the addresses.

Against `batched`, whose kernels begin and end three times a mixer over all streams: only the blocks of a cluster wait for each other, and states
move while they do. `price` says what a token costs.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from seqlab.ops import nvrtc
from seqlab.ops.decode import persistent
from seqlab.ops.decode.cluster_runner import ClusterRunner
from seqlab.ops.decode.persistent import Shape, pack
from seqlab.ops.decode.program import Operation, Program
from seqlab.ops.decode.request import Request

SOURCE, KERNEL = "decode/clustered.cu", "clustered"
THREADS = 512
OWN, SHARE = 64, 32
"""Channels and numbers of x of a block."""
TILES, DEPTHS = range(1, 9), (1,)
TOLERANCE = 0.02
"""Of a self-check: activations are rounded to bfloat16."""
CAPABILITIES = {(9, 0): 16, (10, 0): 16, (10, 3): 16}
"""Blocks of the largest cluster, by compute capability."""


def unavailable(request: Request | None = None) -> str | None:
    """Needs an NVIDIA GPU of compute capability 9.0 with large clusters and an isotropic stack of Mamba blocks in bfloat16."""
    if (missing := nvrtc.machine()) is not None:
        return missing
    index = torch.cuda.current_device() if request is None or request.device.type != "cuda" else request.device.index
    capability = torch.cuda.get_device_capability(index)
    if capability not in CAPABILITIES:
        return f"needs clusters of sixteen blocks; {torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}"
    if request is None:
        return None
    if request.device.type != "cuda":
        return f"the decoder is on {request.device}; pass device='cuda'"
    if (why := unfit(request)) is not None:
        return why
    if plan(request, persistent.Device(index)) is None:
        return "a tile of streams of this stack does not fit a cluster's shared memory"
    return None


def unfit(request: Request) -> str | None:
    """Why this kernel cannot run a model, wherever it is."""
    if (why := persistent.no_selective_stack(request)) is not None:
        return why
    if request.dtype != torch.bfloat16:
        return "weights are float32; bfloat16 alone"
    config, program = request.model.config, Program(request.model)
    if config.d_state != 16:
        return f"d_state is {config.d_state}; 16"
    o = program.operations[0]
    if o.d_model not in (64, 128, 256, 512) or o.d_inner != 2 * o.d_model:
        return f"d_model is {o.d_model} and d_inner {o.d_inner}; 64, 128, 256 or 512 and twice that"
    if len(program.operations) < 2:
        return "there is one layer, whose states would be asked for before they are stored; 2 or more"
    if o.rank > 32:
        return f"dt_rank is {o.rank}; up to 32"
    return None


class Sizes(NamedTuple):
    """The kernel's constants, and how streams are shared out."""

    cluster: int
    d_model: int
    inner: int
    rank: int  # a multiple of 4
    states: int
    width: int
    vocab: int
    head_rows: int  # of a block
    layers: int
    clusters: int
    tiles: int  # of eight streams of a cluster
    depth: int

    @classmethod
    def of(cls, program: Program, batch: int, at_once: int, limit: int) -> "Sizes | None":
        """As many clusters as run at once (`at_once`), or the fewest times as many whose streams fit `limit` bytes of shared memory."""
        o = program.operations[0]
        cluster = o.d_model // SHARE
        rows = _up(-(-program.vocab_size // cluster), 32)
        constants = (cluster, o.d_model, o.d_inner, _up(o.rank, 4), program.d_state, program.d_conv, program.vocab_size, rows, len(program.operations))
        possible = []
        for turns in range(1, -(-batch // at_once) + 1):
            clusters = min(turns * at_once, -(-batch // 8))
            tiles = -(-batch // (8 * clusters))
            if tiles not in TILES:
                continue
            for depth in DEPTHS:
                sizes = cls(*constants, clusters, tiles, depth)
                if sizes.shared <= limit and depth <= max(sizes.items(batch), 1):
                    possible.append(sizes)
                    break
        return min(possible, key=lambda sizes: cost(sizes, at_once), default=None)

    def items(self, batch: int) -> int:
        """Items, each of one stream, that every warp of the emptiest cluster has at least."""
        return batch // self.clusters // 8

    @property
    def x_rows(self) -> int:
        return self.rank + 2 * self.states

    @property
    def x_groups(self) -> int:
        return -(-self.x_rows // 16)

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        streams, slots, x_pitch = 8 * self.tiles, -(-8 * self.tiles // self.cluster), 16 * self.x_groups + 4
        y = max(self.cluster * streams * (OWN + 8) // 2, 2 * streams * (2 * OWN + 4), 2 * slots * self.cluster * self.head_rows)
        splits = min(8, self.inner // 32)
        u = max((2 * (OWN + 8) + x_pitch + (OWN + 8) // 2) * streams + slots * self.cluster * x_pitch, splits * streams * (SHARE + 4))
        floats = 28 + streams + self.cluster * streams + 4 * self.cluster * slots + self.cluster * streams * (SHARE + 8) // 2 + y + u
        floats += streams * (self.width - 1) * OWN
        return 4 * (floats + 16 * self.depth * 4 * 32 * 4) + 16 * self.layers

    def defines(self) -> tuple[tuple[str, int], ...]:
        """The kernel's macros."""
        return (("CLUSTER", self.cluster), ("D_MODEL", self.d_model), ("INNER", self.inner), ("RANK", self.rank), ("STATES", self.states),
                ("WIDTH", self.width), ("VOCAB", self.vocab), ("HEAD_ROWS", self.head_rows), ("TILES", self.tiles), ("DEPTH", self.depth),
                ("BF16", 1), ("PAIRED", 0))  # fmt: skip


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def at_once(cluster: int, multiprocessors: int) -> int:
    """How many clusters run at a time, about: those of an H200, whose groups of multiprocessors are not all whole."""
    share = {2: 1.0, 4: 0.91, 8: 0.91, 16: 0.85}[cluster]
    return max(int(share * multiprocessors) // cluster, 1)


def plan(request: Request, device) -> Sizes | None:
    """The kernel's sizes for a request."""
    program = Program(request.model)
    return Sizes.of(program, request.batch, at_once(program.d_model // SHARE, device.multiprocessors), device.shared_limit)


def price(request: Request) -> float:
    """Microseconds a token of every stream takes, roughly."""
    device = persistent.Device(request.device.index)
    sizes = plan(request, device)
    return cost(sizes, at_once(sizes.cluster, device.multiprocessors))


def cost(sizes: Sizes, at_once: int) -> float:
    """The same on a GPU that runs so many clusters at once. Fitted on an H200."""
    mixer = 1.2 + 0.008 * sizes.d_model + (2.2 + 1.8 * (sizes.d_model / 512) ** 3) * sizes.tiles
    return math.ceil(sizes.clusters / at_once) * (5.0 + mixer * sizes.layers)


class Runner(ClusterRunner):
    """Many streams a cluster."""

    source, kernel, threads = SOURCE, KERNEL, THREADS

    def __init__(self, request: Request, device=None, sizes: Sizes | None = None):
        self.batch, self._torch_device = request.batch, request.device
        self._device = device or persistent.Device(request.device.index)
        program = self._program = Program(request.model)
        self.sizes = s = sizes or plan(request, self._device)
        self._module = self._device.module(s.defines(), SOURCE)
        most = self._module.clusters(KERNEL, THREADS, s.shared, s.cluster)
        if sizes is None and most < at_once(s.cluster, self._device.multiprocessors):  # a GPU cut otherwise than was thought
            self.sizes = s = Sizes.of(program, request.batch, most, self._device.shared_limit)
            self._module = self._device.module(s.defines(), SOURCE)
        self._hold(request)

    @property
    def _clusters(self) -> int:
        return self.sizes.clusters

    def _head(self, parts: list[Tensor]) -> Tensor:
        return _pack(parts, self.sizes.head_rows)

    def _layer(self, o: Operation) -> dict[str, Tensor]:
        """A mixer's weights."""
        s, t = self.sizes, o.tensors
        halves = (half.split(OWN) for half in t["in_proj"].chunk(2))
        spread = torch.zeros_like(t["x_proj"][:1]).expand(s.rank - o.rank, -1)
        x_proj = torch.cat([t["x_proj"][: o.rank], spread, t["x_proj"][o.rank :]])
        return {
            "w_in": _pack([torch.cat(pair) for pair in zip(*halves)], 2 * OWN),
            "w_x": _pack(x_proj.split(OWN, 1), 16 * s.x_groups),
            "w_out": _pack(t["out_proj"].split(SHARE), SHARE),
            "w_dt": torch.nn.functional.pad(t["dt_proj"], (0, s.rank - o.rank)),
            "b_in": t["in_bias"], "w_conv": t["conv"], "b_conv": t["conv_bias"], "b_dt": t["dt_bias"], "a": t["A"], "d": t["D"],
            "b_out": t["out_bias"].expand(o.d_model).contiguous(),
        }  # fmt: skip



def _pack(parts, rows: int) -> Tensor:
    """One matrix (r k) a block -> (blocks units rows/16 lane 8), bfloat16, as tensor cores take it."""
    shape = Shape(1, 8, True)
    return pack(list(parts), rows, _up(parts[0].shape[1], shape.unit) // shape.unit, shape)
