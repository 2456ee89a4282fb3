"""Decoding hundreds of streams: three kernels a mixer, each over all streams, one more for the end of a token, and the tokens
replayed as CUDA graphs. batched.cu holds the kernels, compiled at first use (ops/nvrtc.py); this file lays out the weights, records
the graphs and fills in the addresses.

Against `persistent`, in which a cluster keeps its streams and reads every weight for them: weights are read a few times for all
streams together, and all multiprocessors move states at once; in return there are 3 n_layer + 1 launches a token. `price` says what
a token costs.
"""

import math

import torch
from torch import Tensor

from seqlab.ops import nvrtc
from seqlab.ops.decode import persistent
from seqlab.ops.decode.persistent import Shape, pack
from seqlab.ops.decode.program import Carried, Program
from seqlab.ops.decode.request import Request
from seqlab.ops.decode.sampling import Sampling

SOURCE = "decode/batched.cu"
IN, SCAN, OUT, FINISH = "mixer_in", "mixer_scan", "mixer_out", "finish"
KERNELS = (IN, SCAN, OUT, FINISH)
THREADS = {IN: 256, SCAN: 512, OUT: 256, FINISH: 512}
IN_CHANNELS, OUT_ROWS, SCAN_STREAMS, FINISH_STREAMS = 32, 32, 4, 8
ROOM = 1024
"""Tokens a stream that graphs may write before they are fetched."""
TOGETHER = 16
"""Tokens of a graph."""


def unavailable(request: Request | None = None) -> str | None:
    """Needs an NVIDIA GPU of compute capability 8.0 and an isotropic stack of Mamba blocks."""
    if (missing := nvrtc.machine()) is not None or request is None:
        return missing
    if request.device.type != "cuda":
        return f"the decoder is on {request.device}; pass device='cuda'"
    if (why := nvrtc.gpu(request.device.index) or unfit(request)) is not None:
        return why
    device = persistent.Device(request.device.index)
    if Sizes.of(Program(request.model), request.dtype == torch.bfloat16, device.shared_limit) is None:
        return f"a tile of d_model {request.model.config.d_model} does not fit {device.shared_limit} bytes of shared memory"
    return None


def unfit(request: Request) -> str | None:
    """Why these kernels cannot run a model, wherever they are."""
    if (why := persistent.no_selective_stack(request)) is not None:
        return why
    config, program = request.model.config, Program(request.model)
    if config.d_state not in (16, 32):
        return f"d_state is {config.d_state}; 16 or 32"
    if any(o.d_model % 32 or o.d_inner % 64 for o in program.operations):
        return f"d_model must be a multiple of 32 and d_inner of 64, got {config.d_model} and {program.operations[0].d_inner}"
    return None


class Sizes:
    """How a model is cut into tiles, and the bytes of shared memory of each kernel."""

    def __init__(self, program: Program, half: bool, in_tiles: int, out_tiles: int):
        o = program.operations[0]
        d, inner, n = o.d_model, o.d_inner, program.d_state
        self.d_model, self.inner = d, inner
        self.half, self.in_tiles, self.out_tiles = half, in_tiles, out_tiles
        self.unit, size = (16, 2) if half else (8, 4)
        self.rank = _up(o.rank, 8)
        self.x_groups = -(-(self.rank + 2 * n) // 16)
        self.depth = min(-(-4 * inner // THREADS[SCAN]), 64 // n)
        self.in_streams, self.out_streams = 32 * in_tiles, 16 * out_tiles
        pitch = inner + 8
        scan = self.depth * 4 * (n // 4) * THREADS[SCAN] + 2 * 4 * pitch + 4 * (16 * self.x_groups + 4)
        scan += max(4 * pitch, THREADS[SCAN] // 32 * 4 * 16 * self.x_groups)
        self.shared = {
            IN: size * (2 * IN_CHANNELS * d + self.in_streams * self._pitch(d)) + 4 * (self.in_streams + (3 + program.d_conv) * IN_CHANNELS),
            SCAN: 4 * scan,
            OUT: size * (OUT_ROWS * inner + self.out_streams * self._pitch(inner)) + 4 * 4 * 128 * out_tiles,
            FINISH: 4 * (8 * (_up(d, 32) + 8) + 16 + 16 * (_up(program.vocab_size, 16) + 4)),
        }

    def _pitch(self, k: int) -> int:
        return _up(k, 64 if self.half else 32) + 8

    def grids(self, batch: int) -> dict[str, int]:
        """Blocks of a mixer's kernels."""
        return {
            IN: self.inner // IN_CHANNELS * -(-batch // self.in_streams),
            SCAN: -(-batch // SCAN_STREAMS),
            OUT: self.d_model // OUT_ROWS * -(-batch // self.out_streams),
        }

    @classmethod
    def of(cls, program: Program, half: bool, limit: int) -> "Sizes | None":
        """The largest tiles that fit `limit` bytes of shared memory."""
        for in_tiles in (2, 1):
            for out_tiles in (2, 1):
                sizes = cls(program, half, in_tiles, out_tiles)
                if max(sizes.shared.values()) <= limit:
                    return sizes
        return None

    def defines(self, program: Program) -> tuple[tuple[str, int], ...]:
        """The kernels' macros."""
        o = program.operations[0]
        return (("D_MODEL", o.d_model), ("INNER", o.d_inner), ("RANK", self.rank), ("VOCAB", program.vocab_size), ("STATES", program.d_state),
                ("WIDTH", program.d_conv), ("BF16", int(self.half)), ("PAIRED", 0), ("IN_TILES", self.in_tiles),
                ("OUT_TILES", self.out_tiles), ("DEPTH", self.depth))  # fmt: skip


def price(request: Request) -> float:
    """Microseconds a token of every stream takes, roughly."""
    program, half, device = Program(request.model), request.dtype == torch.bfloat16, persistent.Device(request.device.index)
    return cost(program, request.batch, half, device.multiprocessors, device.shared_limit)


def cost(program: Program, batch: int, half: bool, multiprocessors: int, limit: int) -> float:
    """The same on a GPU of so many multiprocessors and bytes of shared memory a block: what a mixer takes however few streams there
    are, turns of blocks that do not all find room at once, states. Fitted on an H200."""
    sizes, total = Sizes.of(program, half, limit), 14.0
    grids = sizes.grids(batch)
    turns = {kernel: math.ceil(grid / (multiprocessors * max(limit // sizes.shared[kernel], 1))) for kernel, grid in grids.items()}
    for o in program.operations:
        alone = max((0.034 if half else 0.046) * o.d_model, 9.0)
        total += alone * (1 + 0.5 * (turns[SCAN] - 1)) + (0.0049 if half else 0.0114) * o.d_model * (turns[IN] + turns[OUT])
        total += batch * o.d_inner * program.d_state * 8 / 2.8e6
    return total


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


class Runner:
    """Runs the tokens of all streams; graphs read and write the tensors made here."""

    def __init__(self, request: Request, device=None):
        batch, where, half = request.batch, request.device, request.dtype == torch.bfloat16
        self._device = device or persistent.Device(where.index)
        program = self._program = Program(request.model)
        self._sizes = Sizes.of(program, half, self._device.shared_limit)
        self._carried = Carried(program, batch, where)
        self._module = self._device.module(self._sizes.defines(program), SOURCE)
        self._kept: list[Tensor] = []
        self._early = getattr(self._device, "clusters", False)  # compute capability 9.0
        self._batch, self._torch_device = batch, where
        d, inner = program.d_model, program.operations[0].d_inner

        def zeros(*shape: int, dtype=torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=where)

        self._x = zeros(batch, d)
        self._rounded = zeros(batch, d, dtype=torch.bfloat16) if half else self._x
        self._keys, self._token = zeros(batch, dtype=torch.int64), zeros(batch, dtype=torch.int64)
        self._tokens, self._forced = zeros(batch, ROOM, dtype=torch.int64), zeros(batch, ROOM, dtype=torch.int64)
        self._log_probs = zeros(batch, ROOM)
        self._settings, self._numbers = zeros(3), zeros(3, dtype=torch.int64)
        self._steps = zeros(-(-batch // FINISH_STREAMS), dtype=torch.int64)
        bias = zeros(program.vocab_size)
        if request.allowed is not None:
            bias = bias.masked_fill(~request.allowed, -torch.inf)
        self._embedding, self._base = program.embedding, None if request.base is None else request.base.float().contiguous()
        shifts = [None if o.shift is None else o.shift[request.classes].contiguous() for o in program.operations]
        self._shift = shifts[0]
        self._common = {
            "x": self._x, "rounded": self._rounded, "u": zeros(batch, inner), "gate": zeros(batch, inner),
            "y": zeros(batch, inner, dtype=request.dtype), "settings": self._settings, "numbers": self._numbers, "keys": self._keys,
            "forced": self._forced, "out": self._tokens, "log_probs": self._log_probs, "steps": self._steps,
        }  # fmt: skip
        self._scalars = {"batch": batch, "room": ROOM}
        layers = [self._layer(o, following) for o, following in zip(program.operations, [*shifts[1:], None])]
        rows = _up(program.vocab_size, 16)
        end = self._params(
            head=self._pack([program.head], rows, half), head_bias=bias, embedding=self._embedding, base=self._base, shift=self._shift
        )
        grids = self._sizes.grids(batch)
        self._launches = [(kernel, grid, layer) for layer in layers for kernel, grid in grids.items()]
        self._launches.append((FINISH, len(self._steps), end))
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def _params(self, **tensors: Tensor | None):
        p = nvrtc.params_type(SOURCE)()
        for name, tensor in (self._common | tensors).items():
            if tensor is not None:
                tensor = tensor.contiguous()
                self._kept.append(tensor)
                setattr(p, name, tensor.data_ptr())
        for name, value in self._scalars.items():
            setattr(p, name, value)
        return p

    def _pack(self, parts: list[Tensor], rows: int, half: bool) -> Tensor:
        shape = Shape(1, 8, half)
        return pack(parts, rows, _up(parts[0].shape[1], shape.unit) // shape.unit, shape)

    def _layer(self, o, shift: Tensor | None):
        """A mixer's parameters; `shift` is the next one's."""
        t, half = o.tensors, self._sizes.half
        spread = torch.zeros_like(t["x_proj"][:1]).expand(self._sizes.rank - o.rank, -1)
        x_proj = torch.cat([t["x_proj"][: o.rank], spread, t["x_proj"][o.rank :]])
        dt_proj = torch.nn.functional.pad(t["dt_proj"], (0, self._sizes.rank - o.rank))
        return self._params(
            w_in=self._pack([torch.cat(pair) for pair in zip(*(w.split(IN_CHANNELS) for w in t["in_proj"].chunk(2)))], 2 * IN_CHANNELS, half),
            w_x=self._pack([x_proj], 16 * self._sizes.x_groups, half),
            w_dt=self._pack([dt_proj], o.d_inner, False),
            w_out=self._pack(list(t["out_proj"].split(OUT_ROWS)), OUT_ROWS, half),
            b_in=t["in_bias"], w_conv=t["conv"], b_conv=t["conv_bias"], b_dt=t["dt_bias"], a=t["A"], d=t["D"],
            b_out=t["out_bias"].expand(o.d_model), conv=self._carried.conv[o.index], ssm=self._carried.ssm[o.index], shift=shift,
        )  # fmt: skip

    def load(self, state) -> None:
        """Take over the backbone's state."""
        self._carried.load(state)

    def state(self):
        """The backbone's state after all tokens so far."""
        return self._carried.state()

    def run(
        self, token: Tensor, position: int, n: int, sampling: Sampling, keys: Tensor, forced: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """n tokens a stream, (b n) int64, and their log-probabilities (b n); see Decoder."""
        self._keys.copy_(keys)
        self._settings.copy_(torch.tensor([self._program.epsilon, sampling.temperature, sampling.top_p]))
        parts = []
        for start in range(0, n, ROOM):
            count = min(ROOM, n - start)
            self._numbers.copy_(torch.tensor([position + start, sampling.top_k, int(forced is not None)]))
            self._steps.zero_()
            self._begin(token)
            if forced is not None:
                self._forced[:, :count] = forced[:, start : start + count]
            if self._torch_device.type == "cuda":
                nvrtc.on_device(self._replay, self._x, count)
            else:
                for _ in range(count):
                    self._queue()
            parts.append((self._tokens[:, :count].clone(), self._log_probs[:, :count].clone()))
            token = parts[-1][0][:, -1]
        return torch.cat([tokens for tokens, _ in parts], 1), torch.cat([log_probs for _, log_probs in parts], 1)

    def _begin(self, token: Tensor) -> None:
        """The residual stream of the newest token; all later ones are made by the kernels."""
        x = self._embedding[token]
        for added in (self._base, self._shift):
            x = x if added is None else x + added
        self._x.copy_(x)
        if self._rounded is not self._x:
            self._rounded.copy_(x)

    def _queue(self) -> None:
        """All kernels of one token."""
        for kernel, grid, params in self._launches:
            self._module.launch(kernel, grid, THREADS[kernel], self._sizes.shared[kernel], params, early=self._early)

    def _replay(self, _, count: int) -> None:
        while count:
            together = TOGETHER if count >= TOGETHER else 1
            if together not in self._graphs:
                self._graphs[together] = self._record(together)
            self._graphs[together].replay()
            count -= together

    def _record(self, tokens: int) -> torch.cuda.CUDAGraph:
        for kernel in KERNELS:  # what is loaded lazily must be there before
            self._module.function(kernel, self._sizes.shared[kernel], beside=self._early)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(tokens):
                self._queue()
        return graph
