"""Decoding in one launch a block of tokens: a thread block, or a cluster of them, keeps its streams from the first token
to the last, drawing included. persistent.cu holds the kernel, compiled at first use (ops/nvrtc.py); this file lays out the
weights, chooses the shape of the launch and fills in the addresses.

`plan` weighs two sizes against each other: more blocks in a cluster share the reading of the weights and meet at barriers;
more streams in a cluster share each weight that is read and add arithmetic.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from seqlab.ops import nvrtc
from seqlab.ops.decode.program import BLOCK, DOWN, UP, Carried, Operation, Program, reason
from seqlab.ops.decode.request import Request
from seqlab.ops.decode.sampling import Sampling

SOURCE, KERNEL = "decode/persistent.cu", "decode"
WARPS = (16, 8)
VOCAB_MAX = 1024  # a lane keeps the fate of its 32 tokens in one word
TOKENS_MAX = 1 << 14  # of one launch
CLUSTERS, STREAMS = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32)
FIELDS = ("kind save add slot jump wide inner rank pool d_out index w_in w_x w_out b_in w_conv b_conv w_dt b_dt "
          "w_a w_d b_out conv ssm pending held n_in n_x n_out "
          "fixed w_c shift").split()  # fmt: skip


def unavailable(request: Request | None = None) -> str | None:
    """Needs an NVIDIA GPU of compute capability 8.0 and a model of Mamba blocks whose activations fit shared memory."""
    if (missing := nvrtc.machine()) is not None or request is None:
        return missing
    if request.device.type != "cuda":
        return f"the decoder is on {request.device}; pass device='cuda'"
    if (why := nvrtc.gpu(request.device.index) or reason(request.model)) is not None:
        return why
    if request.model.config.vocab_size > VOCAB_MAX:
        return f"the vocabulary has {request.model.config.vocab_size} tokens; the kernel draws from {VOCAB_MAX} at most"
    if request.model.config.prediction_order and request.dtype != torch.float32:
        return f"weights are {request.dtype}; a linear prediction needs float32"
    device = Device(request.device.index)
    if plan(Program(request.model), request.batch, request.dtype == torch.bfloat16, device, bool(request.guidance)) is None:
        return f"the activations of one stream do not fit {device.shared_limit} bytes of shared memory"
    return None


def no_selective_stack(request: Request) -> str | None:
    """What `batched` and `solo`, which run stacks of equal selective blocks alone, leave to this back end."""
    if (why := reason(request.model)) is not None:
        return why
    config = request.model.config
    if request.guidance:
        return "guidance pairs streams: use persistent"
    if config.prediction_order:
        return "a linear prediction is made by persistent alone"
    if config.vocab_size > VOCAB_MAX:
        return f"the vocabulary has {config.vocab_size} tokens; the kernel draws from {VOCAB_MAX} at most"
    if any(o.kind != BLOCK or o.fixed for o in Program(request.model).operations):
        return "only isotropic stacks of selective blocks: use persistent"
    return None


def in_launches(device: torch.device, launch: Callable, token: Tensor, n: int, keys: Tensor, forced: Tensor | None):
    """n tokens a stream, (b n) int64, and their log-probabilities (b n), of as many launches as that takes: each is
    launch(token, keys, forced, start=, n=), for tokens start .. start + n, with that part of `forced`."""
    parts, token = [], token.contiguous()
    for start in range(0, n, TOKENS_MAX):
        stop = min(n, start + TOKENS_MAX)
        given = None if forced is None else forced[:, start:stop].long().contiguous()
        this = functools.partial(launch, start=start, n=stop - start)
        parts.append(nvrtc.on_device(this, token, keys, given) if device.type == "cuda" else this(token, keys, given))
        token = parts[-1][0][:, -1].contiguous()
    if len(parts) == 1:
        return parts[0]
    return torch.cat([tokens for tokens, _ in parts], 1), torch.cat([log_probs for _, log_probs in parts], 1)


class Device:
    """What the back end asks of a GPU."""

    def __init__(self, index: int):
        self.index = index
        self.multiprocessors, self.shared_limit = nvrtc.multiprocessors(index), nvrtc.shared_limit(index)
        self.clusters = torch.cuda.get_device_capability(index) >= (9, 0)

    def module(self, defines: tuple[tuple[str, int], ...], name: str = SOURCE) -> nvrtc.Module:
        return nvrtc.module(name, defines, self.index)


# --------------------------------------------------------------------------------------------------- shape of a launch
class Shape(NamedTuple):
    """Blocks in a cluster, streams of a cluster, whether matrices are bfloat16, warps in a block."""

    cluster: int
    streams: int
    half: bool
    warps: int = WARPS[0]

    @property
    def together(self) -> int:
        """Blocks that a multiprocessor has registers for."""
        return 1 if self.warps >= 16 else 2

    def room(self, limit: int) -> int:
        """Shared memory that a block may have of the most a block can have, `limit`, if the others are to fit beside it."""
        return limit if self.together == 1 else limit // self.together - 1024

    @property
    def tensor(self) -> bool:
        """Products run on tensor cores, eight streams at a time (of which four may be missing)."""
        return self.streams >= 4

    @property
    def unit(self) -> int:
        """Columns that a product takes at a time."""
        return (2 if self.tensor else 1) * (8 if self.half else 4)

    @property
    def padded(self) -> int:
        """Rows of a matrix are a multiple of this."""
        return 64 if self.streams > 1 and not self.tensor else 32

    def shares(self, rows: int, units: int) -> int:
        """How many warps divide the columns of a group of rows among them: adding up more than a few takes longer."""
        return min(max(self.warps // (rows // (16 if self.tensor else self.padded)), 1), units, 4)


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def matrices(program: Program, shape: Shape) -> list[tuple[int, int]]:
    """(padded rows, units of columns) of every matrix as one block of a cluster has it, the head's last."""
    c, u, n, pad = shape.cluster, shape.unit, program.d_state, shape.padded
    out = []
    for o in program.operations:
        if o.kind == BLOCK:
            own = _up(o.d_inner // c, u) // u
            out.append((_up(2 * (o.d_inner // c), pad), _up(o.d_model, u) // u))
            out += [] if o.fixed else [(_up(_up(o.rank, 4) + 2 * n, pad), own)]
            out.append((_up(o.d_model, pad), own))
        elif o.kind == DOWN:
            out.append((_up(o.d_out, pad), _up(-(-o.pool * o.d_model // c), u) // u))
        else:
            out.append((_up(-(-o.pool * o.d_out // c), pad), _up(o.d_model, u) // u))
    return [*out, (_up(head_rows(program), pad), _up(-(-program.d_model // c), u) // u)]


def head_rows(program: Program) -> int:
    """Logits, and what a linear prediction needs."""
    return program.vocab_size + (0 if program.prediction is None else len(program.prediction.rows))


def sizes(program: Program, shape: Shape) -> dict[str, int]:
    """The kernel's sizes, in numbers of 4 bytes, and `shared`, the bytes of shared memory they come to."""
    c, s, u = shape.cluster, shape.streams, shape.unit
    operations, blocks = program.operations, program.blocks

    def pitch(*widths: int) -> int:  # tensor cores: the same columns of four streams must lie in different banks
        widest = max(_up(w, 16) for w in widths)
        return _up(widest, 32) + 8 if shape.tensor else widest

    out = {
        "x_pitch": pitch(c * _up(-(-program.d_model // c), u), *(w for o in operations for w in (o.d_model, o.d_out))),
        "inner_pitch": pitch(*(o.d_inner // c for o in blocks)),
        "slots": _up(sum(program.slots), 4),
        # what four lanes read of four streams at a time must lie in different banks
        "row_pitch": _up(max(_up(o.rank, 4) for o in blocks) + 2 * program.d_state, 8) + 4,
        "input_pitch": pitch(4, *(-(-o.pool * o.d_model // c) for o in operations if o.kind == DOWN)),
        "part_floats": max(shape.shares(r, k) * r * s for r, k in matrices(program, shape)),
    }
    x_rows = max((_up(_up(o.rank, 4) + 2 * program.d_state, shape.padded) for o in blocks if not o.fixed), default=0)
    gathered = [_up(o.d_model, shape.padded) for o in blocks] + [_up(o.d_out, shape.padded) for o in operations if o.kind == DOWN]
    gathered.append(_up(head_rows(program), shape.padded))
    simple = len(operations) == len(blocks) and not any(o.fixed for o in blocks)  # see `gather` in the kernel
    out["exchange_rows"] = max(gathered if simple else [*gathered, x_rows])
    out["small_rows"] = x_rows if simple else 0
    floats = _up(2 * len(FIELDS) * len(operations), 4) + 4 + s * (out["x_pitch"] + 3 * out["inner_pitch"] + out["input_pitch"])
    floats += s * out["slots"] + out["part_floats"] + s * out["row_pitch"]
    floats += c * s * (out["exchange_rows"] + (out["small_rows"] or out["exchange_rows"])) if c > 1 else 0
    queued = min(s, 4) * 8 * shape.warps * program.d_state if program.d_state % 16 == 0 else 0  # states on their way
    floats += max(queued, 2 * s * _up(head_rows(program), 4)) + 4 * s + 2 * _up(s, 4) + 8 + _up(len(operations), 4)
    if program.order:  # float64
        floats += _up(2 * s * program.heard, 4) + _up(2 * min(s, shape.warps) * (3 * program.order + 2), 4)
    return {**out, "shared": 4 * floats}


def cost(program: Program, batch: int, shape: Shape, multiprocessors: int) -> float:
    """Microseconds a token of every stream takes, roughly: multiplying or reading, scanning, meeting. Fitted on an H200."""
    numbers, work = iter(matrices(program, shape)), 1.0
    weights = states = meetings = 0.0
    for o in program.operations:  # `work`: how often an operation runs, per token
        work /= o.pool if o.kind == DOWN else 1
        weights += work * sum(r * k * shape.unit for r, k in (next(numbers) for _ in range(3 - (o.fixed > 0) if o.kind == BLOCK else 1)))
        states += work * o.d_inner / shape.cluster * o.states
        meetings += work * (2 if o.kind == BLOCK and not o.fixed else 1)
        work *= o.pool if o.kind == UP else 1
    r, k = next(numbers)
    weights += r * k * shape.unit
    # a cluster lies within one of the groups that the multiprocessors form, and some of these have a few left over; large
    # ones are not spread evenly where two blocks fit a multiprocessor
    usable = multiprocessors if shape.cluster < 4 else 10 * multiprocessors // 11
    at_once = max(usable // shape.cluster, 1) * (shape.together if shape.cluster < 4 else 1)
    clusters = math.ceil(batch / shape.streams)
    beside = max(min(clusters, at_once) * shape.cluster / multiprocessors, 1.0) - 1.0
    slower = 16 / shape.warps
    read = weights * (2 if shape.half else 4) / 65e3 * slower**0.3
    if shape.tensor:
        multiply = weights * max(shape.streams, 8) / (630e3 if shape.half else 200e3) * slower
    else:
        multiply = weights * shape.streams / 226e3 * slower
    scan = states * shape.streams / 2.4e3 * slower
    meet = (meetings + 1) * (1.4 if shape.cluster == 1 else 1.9 + 0.07 * shape.cluster * shape.streams) * slower**-0.75
    return math.ceil(clusters / at_once) * ((read + multiply + scan) * (1.0 + 0.1 * beside) + meet)


def price(request: Request) -> float:
    """Microseconds a token of every stream takes, roughly."""
    device, program = Device(request.device.index), Program(request.model)
    shape = plan(program, request.batch, request.dtype == torch.bfloat16, device, bool(request.guidance))
    return cost(program, request.batch, shape, device.multiprocessors)


def plan(program: Program, batch: int, half: bool, device, paired: bool = False) -> Shape | None:
    """The launch that `cost` thinks fastest, with pairs of rows in one cluster if they must be; None where nothing fits."""
    best = None
    for cluster in CLUSTERS if device.clusters else (1,):
        if any(o.d_inner % cluster for o in program.blocks):
            continue
        for streams, warps in itertools.product(STREAMS[paired:], WARPS):
            shape = Shape(cluster, streams, half, warps)
            if sizes(program, shape)["shared"] > shape.room(device.shared_limit) or (streams > 1 and streams >= 2 * batch):
                continue
            price = cost(program, batch, shape, device.multiprocessors)
            if best is None or price < best[0]:
                best = (price, shape)
    return None if best is None else best[1]


def defines(shape: Shape, d_state: int, d_conv: int) -> tuple[tuple[str, int], ...]:
    """The kernel's macros."""
    values = {"CLUSTER": shape.cluster, "STREAMS": shape.streams, "STATES": d_state, "WIDTH": d_conv, "WARPS": shape.warps}
    return (*values.items(), ("BF16", int(shape.half)), ("TENSOR", int(shape.tensor)), ("PAIRED", 0))


# ------------------------------------------------------------------------------------------------------------ weights
def pack(parts: list[Tensor], rows: int, units: int, shape: Shape) -> Tensor:
    """One matrix (r k) for each block of the cluster -> (cluster units rows unit): 16 bytes of k, rows side by side.

    For tensor cores (cluster units rows/16 lane 4 or 8): the lane of row g and of columns 2t has the columns 2t, 2t + 1 of
    rows g and g + 8, for bfloat16 also the columns 8 further on.
    """
    out = []
    for part in parts:
        whole = part.new_zeros(rows, units * shape.unit)
        whole[: part.shape[0], : part.shape[1]] = part
        if shape.tensor and not shape.half:
            tiles = whole.reshape(rows // 16, 2, 8, units, 4, 2)  # (group high g unit t column)
            out.append(tiles.permute(3, 0, 2, 4, 5, 1))  # (unit group g t column high)
        elif shape.tensor:
            tiles = whole.reshape(rows // 16, 2, 8, units, 2, 4, 2)  # (group high g unit far t pair)
            out.append(tiles.permute(3, 0, 2, 5, 4, 1, 6))  # (unit group g t far high pair)
        else:
            out.append(whole.unflatten(1, (units, shape.unit)).transpose(0, 1))
    return torch.stack(out).to(torch.bfloat16 if shape.half else torch.float32).contiguous()


def _columns(weight: Tensor, cluster: int, width: int) -> list[Tensor]:
    return [weight[:, c * width : (c + 1) * width] for c in range(cluster)]


class Arena:
    """One piece of memory for everything that a block reads, the small and often missed first, so that shared memory can
    take a beginning of it: tensors (cluster ...) are laid out by rank, each on a boundary of 16 bytes."""

    def __init__(self, cluster: int):
        self.cluster, self._entries = cluster, []

    def add(self, rank: int, tensor: Tensor, tell) -> None:
        """`tell` will be called with the tensor's place, in bytes."""
        self._entries.append((rank, tensor.contiguous(), tell))

    def build(self, room: int) -> tuple[Tensor, int]:
        """The memory (cluster bytes), and how many bytes of whole tensors at its beginning fit `room`."""
        self._entries.sort(key=lambda entry: entry[0])
        parts, end, resident = [], 0, 0
        for _, tensor, tell in self._entries:
            flat = tensor.view(self.cluster, -1).view(torch.uint8)
            parts.append(torch.nn.functional.pad(flat, (0, -flat.shape[1] % 16)))
            tell(end)
            end += parts[-1].shape[1]
            if end <= room:
                resident = end
        return torch.cat(parts, 1).contiguous(), resident


class Runner:
    """Runs the tokens of all streams; the kernel works on the state tensors in place."""

    def __init__(self, request: Request, device: Device | None = None, shape: Shape | None = None):
        self.batch, self._torch_device = request.batch, request.device
        self._classes, self._guidance, self._floors = request.classes, request.guidance, (0.0, 0.0, 0.0)
        self._device = Device(request.device.index) if device is None else device
        program = self._program = Program(request.model)
        self.shape = shape or plan(program, request.batch, request.dtype == torch.bfloat16, self._device, bool(request.guidance))
        self._carried = Carried(program, request.batch, request.device)
        self._sizes = sizes(program, self.shape)
        self._kept: list[Tensor] = []
        cells = iter(matrices(program, self.shape))
        self._wanted: list[dict[str, tuple[Tensor, int]]] = []  # of each operation: tensors (cluster ...), how much wanted
        rows = [self._row(o, cells) for o in program.operations]
        share, cell = _up(-(-program.d_model // self.shape.cluster), self.shape.unit), next(cells)
        head, bias = program.head, torch.zeros(program.vocab_size, device=request.device)
        if (own := program.prediction) is not None:
            head, bias, self._floors = torch.cat([head, own.rows]), own.bias, (*own.floors, own.hold)
        if request.allowed is not None:
            bias = bias.masked_fill(~request.allowed, -torch.inf)
        bias = bias if own is None else torch.cat([bias, own.biases])
        head = pack(_columns(head, self.shape.cluster, share), *cell, self.shape)
        arena = Arena(self.shape.cluster)
        for row, wanted in zip(rows, self._wanted):
            for field, (tensor, rank) in wanted.items():
                arena.add(rank, tensor, functools.partial(row.__setitem__, field))
        places: dict[str, int] = {}
        arena.add(0, bias.expand(self.shape.cluster, -1), functools.partial(places.__setitem__, "head_bias"))
        arena.add(2, head, functools.partial(places.__setitem__, "head"))
        grid = -(-request.batch // self.shape.streams) * self.shape.cluster
        limit = self._device.shared_limit
        room = self.shape.room(limit) if grid > self._device.multiprocessors else limit
        memory, resident = arena.build(room - self._sizes["shared"])
        self._shared = self._sizes["shared"] + resident
        self._operations = torch.tensor([list(row.values()) for row in rows], dtype=torch.int64).to(request.device)
        base = None if request.base is None else request.base.float()
        self._fixed = {
            "ops": self._keep(self._operations),
            "embedding": self._keep(program.embedding),
            "base": 0 if base is None else self._keep(base),
            "arena": self._keep(memory),
            "arena_stride": memory.shape[1],
            "resident": resident,
            "head_shares": self.shape.shares(*cell),
            **places,
            "operations": len(rows),
            "batch": request.batch,
            "d_model": program.d_model,
            "vocab": program.vocab_size,
            "head_rows": head_rows(program),
            "order": program.order,
            "numbers": program.heard,
            "levels": 0 if own is None else self._keep(own.levels),
            "inputs": 0 if own is None else self._keep(own.inputs),
            "table": 0 if own is None else self._keep(own.table),
            "heard": self._carried.heard.data_ptr(),
            **{name: size for name, size in self._sizes.items() if name != "shared"},
        }
        self._module = self._device.module(defines(self.shape, program.d_state, program.d_conv))

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _row(self, o: Operation, cells) -> dict[str, int]:
        """One operation as the kernel reads it, but for the places of its tensors in the arena."""
        shape, t, offsets = self.shape, o.tensors, [0]
        for width in self._program.slots:
            offsets.append(offsets[-1] + width)

        def slot(index: int) -> int:
            return -1 if index < 0 else offsets[index]

        row = dict.fromkeys(FIELDS, 0)
        row |= {"kind": o.kind, "save": slot(o.save), "add": slot(o.add), "slot": slot(o.slot), "jump": o.jump}
        row |= {"wide": o.d_model, "inner": o.d_inner, "rank": o.rank, "pool": o.pool, "d_out": o.d_out, "index": o.index}
        carried, c = self._carried, shape.cluster
        wanted: dict[str, tuple[Tensor, int]] = {}
        self._wanted.append(wanted)

        def matrix(field: str, parts: list[Tensor], rank: int) -> None:
            cell = next(cells)
            wanted[field] = pack(parts, *cell, shape), rank
            row["n_" + field.removeprefix("w_")] = shape.shares(*cell)

        if o.kind == BLOCK:
            own = o.d_inner // c
            u, z = t["in_proj"].chunk(2)
            matrix("w_in", [torch.cat([u[i * own : (i + 1) * own], z[i * own : (i + 1) * own]]) for i in range(c)], 3)
            if not o.fixed:
                spread = torch.zeros_like(t["x_proj"][: -o.rank % 4])  # B and C begin on a boundary of 16 bytes
                matrix("w_x", _columns(torch.cat([t["x_proj"][: o.rank], spread, t["x_proj"][o.rank :]]), c, own), 1)
            matrix("w_out", _columns(t["out_proj"], c, own), 2)
            names = {"w_conv": "conv", "b_conv": "conv_bias", "b_dt": "dt_bias", "w_a": "A", "w_d": "D"}
            names |= {"w_c": "C"} if o.fixed else {}
            row["fixed"] = o.fixed
            wanted |= {field: (t[name].unflatten(0, (c, own)), 0) for field, name in names.items()}
            if not o.fixed:  # (c own rank) -> (c rank/4 own 4)
                dt = torch.nn.functional.pad(t["dt_proj"], (0, -o.rank % 4)).unflatten(0, (c, own)).unflatten(2, (-1, 4))
                wanted["w_dt"] = dt.transpose(1, 2), 0
            wanted["b_in"] = t["in_bias"].view(2, c, own).transpose(0, 1), 0
            wanted["b_out"] = t["out_bias"].expand(c, -1), 0
            row["shift"] = 0 if o.shift is None else self._keep(o.shift[self._classes])
            row |= {"conv": carried.conv[o.index].data_ptr(), "ssm": carried.ssm[o.index].data_ptr()}
            return row
        if o.kind == DOWN:
            matrix("w_in", _columns(t["weight"], c, _up(-(-o.pool * o.d_model // c), shape.unit)), 4)
            wanted["b_in"] = t["bias"].expand(c, -1), 0
        else:
            share = -(-o.pool * o.d_out // c)
            matrix("w_in", [t["weight"][i * share : (i + 1) * share] for i in range(c)], 4)
            bias = torch.cat([t["bias"], t["bias"].new_zeros(c * share - len(t["bias"]))])
            wanted["b_in"] = bias.view(c, share), 0
        row |= {"pending": carried.pending[o.index].data_ptr(), "held": carried.held[o.index].data_ptr()}
        return row

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
        def launch(token: Tensor, keys: Tensor, forced: Tensor | None, start: int, n: int):
            made = self._launch(token, keys, forced, position + start, n, sampling)
            self._carried.advance(n)
            return made

        return in_launches(self._torch_device, launch, token, n, keys, forced)

    def _launch(self, token: Tensor, keys: Tensor, forced: Tensor | None, position: int, n: int, sampling: Sampling):
        device = self._torch_device
        tokens = torch.empty(self.batch, n, dtype=torch.int64, device=device)
        log_probs = torch.empty(self.batch, n, device=device)
        settings = torch.tensor([self._program.epsilon, sampling.temperature, sampling.top_p, self._guidance, *self._floors], device=device)
        phases = [0] * len(self._program.operations)
        phases[: len(self._carried.phase)] = self._carried.phase  # the kernel looks them up by pool
        phases = torch.tensor(phases, device=device)
        p = nvrtc.params_type(SOURCE)()
        for name, value in self._fixed.items():
            setattr(p, name, value)
        p.phases, p.settings = phases.data_ptr(), settings.data_ptr()
        p.keys, p.tokens = keys.data_ptr(), token.data_ptr()
        p.forced = 0 if forced is None else forced.data_ptr()
        p.out, p.log_probs = tokens.data_ptr(), log_probs.data_ptr()
        p.count, p.position, p.top_k = n, position, sampling.top_k
        grid = -(-self.batch // self.shape.streams) * self.shape.cluster
        self._module.launch(KERNEL, grid, 32 * self.shape.warps, self._shared, p)
        return tokens, log_probs
