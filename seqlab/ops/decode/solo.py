"""Decoding a few streams with the least delay: one cluster a stream, weights in registers before their turn comes, states in shared
memory from the first token to the last. solo.cu holds the kernel, compiled for the sizes of the model at first use (ops/nvrtc.py); this
file lays out the weights and fills in the addresses.

`persistent` serves every shape of stack and any number of streams; this back end a stack of equal selective blocks whose widths are
powers of two, and streams by the handful. `price` says what a token costs.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from seqlab.ops import nvrtc
from seqlab.ops.decode import persistent
from seqlab.ops.decode.cluster_runner import ClusterRunner
from seqlab.ops.decode.program import Operation, Program
from seqlab.ops.decode.request import Request

SOURCE, KERNEL = "decode/solo.cu", "solo"
THREADS = 512
PIECES = 22
"""So many times 16 bytes of weights does a thread keep in registers."""
LARGEST = {(9, 0): 16, (10, 0): 16, (10, 3): 16}
"""Blocks of the largest cluster, by compute capability."""


def unavailable(request: Request | None = None) -> str | None:
    """Needs an NVIDIA GPU of compute capability 9.0 with large clusters and an isotropic stack of Mamba blocks."""
    if (missing := nvrtc.machine()) is not None:
        return missing
    index = torch.cuda.current_device() if request is None or request.device.type != "cuda" else request.device.index
    capability = torch.cuda.get_device_capability(index)
    if capability not in LARGEST:
        return f"needs clusters of sixteen blocks; {torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}"
    if request is None:
        return None
    if request.device.type != "cuda":
        return f"the decoder is on {request.device}; pass device='cuda'"
    if (why := unfit(request)) is not None:
        return why
    if _sizes(request, persistent.Device(index)) is None:
        return "weights and states of this stack do not fit a cluster's registers and shared memory"
    return None


def unfit(request: Request) -> str | None:
    """Why this kernel cannot run a model, whatever its size."""
    if (why := persistent.no_selective_stack(request)) is not None:
        return why
    config, program = request.model.config, Program(request.model)
    if config.d_state != 16:
        return f"d_state is {config.d_state}; 16"
    if program.d_model not in (64, 128, 256, 512):
        return f"d_model is {program.d_model}; 64, 128, 256 or 512"
    return None


class Sizes(NamedTuple):
    """The kernel's constants."""

    cluster: int
    d_model: int
    inner: int
    rank: int  # a multiple of 4
    states: int
    width: int
    vocab: int
    head_rows: int  # of a block
    half: bool
    layers: int

    @classmethod
    def of(cls, program: Program, half: bool, limit: int, batch: int, multiprocessors: int) -> "Sizes | None":
        """The cluster that `cost` thinks fastest among those whose blocks have room in registers and in `limit` bytes of shared memory.
        Weights of d_model 64 are so few that they stay float32: then a thread's share of a row is 16 bytes, and the cluster may be larger."""
        o = program.operations[0]
        half = half and o.d_model > 64
        possible = []
        for own in (32, 64) if o.d_model >= 256 else (32,):  # more streams of narrower stacks are as well served by `persistent`
            cluster = o.d_inner // own
            if cluster not in (2, 4, 8, 16) or cluster * own != o.d_inner:
                continue
            rows = _up(-(-program.vocab_size // cluster), 4)
            rank = _up(o.rank, 4)
            sizes = cls(cluster, o.d_model, o.d_inner, rank, program.d_state, program.d_conv, program.vocab_size, rows, half, len(program.operations))
            possible += [sizes] if sizes.possible(limit) else []
        return min(possible, key=lambda sizes: cost(sizes, batch, multiprocessors), default=None)

    @property
    def own(self) -> int:
        return self.inner // self.cluster

    @property
    def piece(self) -> int:
        """Weights in 16 bytes."""
        return 8 if self.half else 4

    @property
    def in_rounds(self) -> int:
        return 2 * self.own // 64

    @property
    def x_rows(self) -> int:
        return self.rank + 2 * self.states

    @property
    def per_row(self) -> int:
        """Threads of a row of out_proj."""
        return THREADS // self.d_model

    @property
    def small(self) -> int:
        """Floats of a mixer that stay in a block's shared memory beside states."""
        return self.own * (2 + self.width + 3 + self.states + self.rank) + self.d_model

    def possible(self, limit: int) -> bool:
        whole = self.own >= self.per_row * self.piece and -(-self.head_rows // 64) <= self.in_rounds
        return whole and self.pieces <= PIECES and self.shared <= limit

    @property
    def pieces(self) -> int:
        """So many times 16 bytes of a mixer's weights does a thread have."""
        x = -(-self.x_rows // 64) * self.own // 32
        return self.in_rounds * self.d_model // (8 * self.piece) + x + self.own // (self.per_row * self.piece)

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        floats = 16 + self.d_model + 3 * self.own + self.x_rows + self.cluster * (self.x_rows + 4)
        floats += self.cluster * (self.d_model // self.cluster + 4 + 2 * self.head_rows)
        return 4 * (floats + self.layers * (self.small + self.own * (self.states + self.width - 1)))

    def defines(self) -> tuple[tuple[str, int], ...]:
        """The kernel's macros."""
        return (("CLUSTER", self.cluster), ("D_MODEL", self.d_model), ("INNER", self.inner), ("RANK", self.rank), ("STATES", self.states),
                ("WIDTH", self.width), ("VOCAB", self.vocab), ("HEAD_ROWS", self.head_rows), ("BF16", int(self.half)), ("PAIRED", 0))  # fmt: skip


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def price(request: Request) -> float:
    """Microseconds a token of every stream takes, roughly."""
    device = persistent.Device(request.device.index)
    return cost(_sizes(request, device), request.batch, device.multiprocessors)


def _sizes(request: Request, device) -> Sizes | None:
    half = request.dtype == torch.bfloat16
    return Sizes.of(Program(request.model), half, device.shared_limit, request.batch, device.multiprocessors)


def cost(sizes: Sizes, batch: int, multiprocessors: int) -> float:
    """The same on a GPU of so many multiprocessors. Fitted on an H200."""
    at_once = max((10 * multiprocessors // 11 if sizes.cluster < 16 else 7 * multiprocessors // 8) // sizes.cluster, 1)
    mixer = 1.1 + 0.1 * sizes.pieces + 0.02 * sizes.cluster
    return math.ceil(batch / at_once) * (2.0 + mixer * sizes.layers)


# ------------------------------------------------------------------------------------------------------------ weights
def _pieces(weights: Tensor, half: bool) -> Tensor:
    return weights.to(torch.bfloat16 if half else torch.float32).contiguous()


def pack_rows(matrices: list[Tensor], rounds: int, half: bool) -> Tensor:
    """One matrix (r k) a block -> (blocks rounds piece row part ...): 64 rows a round, 8 threads a row, thread `part` with 4 columns of
    each run of 32."""
    out = []
    for matrix in matrices:
        whole = matrix.new_zeros(64 * rounds, matrix.shape[1])
        whole[: len(matrix)] = matrix
        cut = whole.reshape(rounds, 64, -1, 2 if half else 1, 8, 4)  # (round row piece run part column)
        out.append(cut.permute(0, 2, 1, 4, 3, 5))
    return _pieces(torch.stack(out), half)


def pack_out(matrices: list[Tensor], per_row: int, half: bool) -> Tensor:
    """One matrix (d_model own) a block -> (blocks piece row thread columns): `per_row` threads a row take pieces in turn."""
    cut = torch.stack(matrices).unflatten(2, (-1, per_row, 8 if half else 4))  # (block row piece thread column)
    return _pieces(cut.transpose(1, 2), half)


class Runner(ClusterRunner):
    """One stream a cluster."""

    source, kernel, threads = SOURCE, KERNEL, THREADS

    def __init__(self, request: Request, device=None, sizes: Sizes | None = None):
        self.batch, self._torch_device = request.batch, request.device
        self._device = device or persistent.Device(request.device.index)
        self._program = Program(request.model)
        self.sizes = sizes or _sizes(request, self._device)
        self._module = self._device.module(self.sizes.defines(), SOURCE)
        self._hold(request)

    @property
    def _clusters(self) -> int:
        return self.batch

    def _head(self, parts: list[Tensor]) -> Tensor:
        return pack_rows(parts, self.sizes.in_rounds, self.sizes.half)

    def _layer(self, o: Operation) -> dict[str, Tensor]:
        """A mixer's weights (cluster ...)."""
        s, t = self.sizes, o.tensors
        blocks = range(s.cluster)
        u, z = (half.split(s.own) for half in t["in_proj"].chunk(2))
        spread = torch.zeros_like(t["x_proj"][:1]).expand(s.rank - o.rank, -1)
        x_proj = torch.cat([t["x_proj"][: o.rank], spread, t["x_proj"][o.rank :]]).split(s.own, 1)
        dt = torch.nn.functional.pad(t["dt_proj"], (0, s.rank - o.rank)).unflatten(1, (-1, 4)).transpose(0, 1)  # (rank/4 inner 4)
        b_u, b_z = t["in_bias"].chunk(2)
        small = []
        for i in blocks:
            mine = slice(i * s.own, (i + 1) * s.own)
            parts = [b_u[mine], b_z[mine], t["conv"][mine], t["conv_bias"][mine], t["dt_bias"][mine], t["D"][mine], t["A"][mine], dt[:, mine]]
            small.append(torch.cat([part.flatten() for part in (*parts, t["out_bias"].expand(o.d_model))]))
        return {
            "w_in": pack_rows([torch.cat([u[i], z[i]]) for i in blocks], s.in_rounds, s.half),
            "w_x": pack_rows([x_proj[i] for i in blocks], -(-s.x_rows // 64), False),
            "w_out": pack_out(list(t["out_proj"].split(s.own, 1)), s.per_row, s.half),
            "small": torch.stack(small),
        }
