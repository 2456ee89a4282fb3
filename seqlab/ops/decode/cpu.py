"""Decoding on the CPU: one compiled call for a block of tokens, float32, streams shared out over threads.

A stream is worked on by one thread from the first token of a block to the last, so threads never wait for each other.
cpu_kernels.py holds the arithmetic (numba, compiled on first use, kept on disk).
"""

import numpy as np
import torch
from torch import Tensor

from seqlab.ops import needs_numba, threads
from seqlab.ops.decode.program import BLOCK, Carried, Operation, Program, reason
from seqlab.ops.decode.request import Request
from seqlab.ops.decode.sampling import Sampling


def unavailable(request: Request | None = None) -> str | None:
    """Needs numba, the CPU, float32 weights and Mamba blocks."""
    if (missing := needs_numba.unavailable()) is not None or request is None:
        return missing
    if request.device.type != "cpu":
        return f"the decoder is on {request.device}; pass device='cpu'"
    if request.dtype != torch.float32:
        return f"weights are {request.dtype}; this back end computes in float32"
    return reason(request.model)


class Runner:
    """Runs the tokens of all streams; its state is in its own padded arrays between `load` and `state`."""

    def __init__(self, request: Request):
        from seqlab.ops.decode import cpu_kernels as kernels

        self._kernels = kernels
        self.batch, self._classes, self._guidance = request.batch, request.classes, request.guidance
        program = self._program = Program(request.model)
        self._carried = Carried(program, request.batch, torch.device("cpu"))
        self._kept: list[Tensor] = []  # what the kernel has the addresses of
        d, n = program.d_model, program.d_state
        self.p = np.zeros(kernels.SLOTS_P, np.int64)
        self.p[kernels.OPERATIONS] = len(program.operations)
        self.p[kernels.STATES], self.p[kernels.WIDTH], self.p[kernels.D_MODEL] = n, program.d_conv, d
        self.p[kernels.VOCAB] = program.vocab_size
        self.p[kernels.EMBEDDING] = self._keep(_pad(program.embedding, 1))
        head, bias = _pad(program.head, 0), torch.zeros(program.vocab_size)
        self._table, floors = torch.zeros(1, dtype=torch.float64), (0.0, 0.0, 0.0)
        if (own := program.prediction) is not None:
            head, bias = torch.cat([head, own.rows]), own.bias
            self._table, floors = own.table.contiguous(), (*own.floors, own.hold)
            self.p[kernels.LEVELS], self.p[kernels.TOLD] = self._keep(own.levels), self._keep(_pad(own.inputs, 1))
        self._settings = [program.epsilon, request.guidance, *floors]
        bias = bias if request.allowed is None else torch.where(request.allowed, bias, -torch.inf)
        bias = _pad(bias, 0, -torch.inf)
        bias = bias if own is None else torch.cat([bias, own.biases])
        self.p[kernels.ORDER], self.p[kernels.HEAD_ROWS] = program.order, len(bias)
        self.p[kernels.HEAD], self.p[kernels.HEAD_BIAS] = self._keep(_tiles(head)), self._keep(_pad(bias, 0))
        self.ops = np.full((len(program.operations), kernels.SLOTS_OP), -1, np.int64)
        self._conv, self._ssm, self._pending, self._held = [], [], [], []
        for row, operation in zip(self.ops, program.operations):
            self._fill(row, operation)
        for row, operation in zip(self.ops, program.operations):
            if operation.kind != BLOCK:
                row[kernels.PENDING] = self._pending[operation.index].data_ptr()
                row[kernels.HELD] = self._held[operation.index].data_ptr()
        self.at = self._areas()
        self.p[kernels.SCRATCH] = self._keep(torch.zeros(request.batch * int(self.at[kernels.PITCH]) // 4))
        self.p[kernels.RANKED] = self._keep(torch.zeros(request.batch * 2 * program.vocab_size, dtype=torch.int64))
        base = torch.zeros(request.batch, d) if request.base is None else request.base.float()
        base = _pad(base, 1)
        self.rows = np.zeros((request.batch, 3), np.int64)
        address = self._keep(base)
        self.rows[:, 0] = address + np.arange(request.batch) * base.shape[1] * 4
        self._work = sum(t.numel() for o in program.operations for t in o.tensors.values())

    def _keep(self, tensor: Tensor) -> int:
        """Address of a tensor, aligned to whole cache lines, that lives as long as the runner."""
        raw = torch.empty(tensor.numel() * tensor.element_size() + 64, dtype=torch.uint8)
        start = -raw.data_ptr() % 64
        place = raw[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        place.copy_(tensor.flatten())
        self._kept.append(raw)
        return place.data_ptr()

    def _fill(self, row: np.ndarray, o: Operation) -> None:
        k, t = self._kernels, o.tensors
        row[k.KIND], row[k.SAVE], row[k.ADD], row[k.SLOT], row[k.JUMP] = o.kind, o.save, o.add, o.slot, o.jump
        row[k.WIDE], row[k.INNER], row[k.RANK], row[k.POOL], row[k.D_OUT] = o.d_model, o.d_inner, o.rank, o.pool, o.d_out
        if o.kind == BLOCK:
            u, z = t["in_proj"].chunk(2)
            u_bias, z_bias = t["in_bias"].chunk(2)
            row[k.W_IN] = self._keep(torch.cat([_tiles(u), _tiles(z)]))
            row[k.B_IN] = self._keep(torch.cat([_pad(u_bias, 0), _pad(z_bias, 0)]))
            row[k.W_CONV] = self._keep(_pad(t["conv"].t(), 1))
            row[k.B_CONV] = self._keep(_pad(t["conv_bias"], 0))
            row[k.FIXED] = o.fixed
            if o.fixed:
                row[k.W_C] = self._keep(_pad(t["C"].t(), 1))
            else:
                row[k.W_X] = self._keep(_tiles(t["x_proj"]))
                row[k.W_DT] = self._keep(_tiles(t["dt_proj"]))
            row[k.B_DT] = self._keep(_pad(t["dt_bias"], 0))
            row[k.W_A] = self._keep(_pad(t["A"].t(), 1))
            row[k.W_D] = self._keep(_pad(t["D"], 0))
            row[k.W_OUT] = self._keep(_tiles(t["out_proj"]))
            row[k.B_OUT] = self._keep(_pad(t["out_bias"], 0))
            wide = -(-o.d_inner // 16) * 16
            self._conv.append(torch.zeros(self.batch, self._program.d_conv - 1, wide))
            self._ssm.append(torch.zeros(self.batch, o.states, wide))
            if o.shift is not None:
                shifts = _pad(o.shift[self._classes], 1)
                row[k.SHIFT], row[k.SHIFT_PITCH] = self._keep(shifts), shifts.shape[1] * 4
            row[k.CONV], row[k.SSM] = self._conv[-1].data_ptr(), self._ssm[-1].data_ptr()
            return
        if o.pool and o.save >= 0:  # DOWN: the input is a frame of padded positions
            self._pending.append(torch.zeros(self.batch, o.pool, -(-o.d_model // 16) * 16))
            self._held.append(torch.zeros_like(self._pending[-1]))
            weight = _pad(t["weight"].unflatten(1, (o.pool, o.d_model)), 2).flatten(1)
            bias = t["bias"]
        else:  # UP: so is the output
            weight = _pad(t["weight"].unflatten(0, (o.pool, o.d_out)), 1).flatten(0, 1)
            bias = _pad(t["bias"].unflatten(0, (o.pool, o.d_out)), 1).flatten()
        row[k.W_IN] = self._keep(_tiles(weight))
        row[k.B_IN] = self._keep(_pad(bias, 0))

    def _areas(self) -> np.ndarray:
        """Byte offsets of a stream's scratch areas, its pitch, and the offsets of its skip slots."""
        k, program = self._kernels, self._program

        def widest(of) -> int:
            return max([_up(of(o)) for o in program.operations], default=16)

        x = max(_up(program.d_model), widest(lambda o: o.d_model), widest(lambda o: o.d_out))
        inner = widest(lambda o: o.d_inner)
        sizes = {
            k.X: x,
            k.NORMED: x,
            k.UZ: 2 * inner,
            k.PROJECTED: max(32, widest(lambda o: o.rank + 2 * program.d_state)),
            k.DELTA: inner,
            k.Y: inner,
            k.LOGITS: _up(int(self.p[k.HEAD_ROWS])),
            k.WEIGHTS: _up(program.vocab_size) + 32,
        }
        offsets, end = np.zeros(k.PITCH + 1 + len(program.slots), np.int64), 0
        for area, size in sizes.items():
            offsets[area], end = end, end + 4 * size
        for i, width in enumerate(program.slots):
            offsets[k.PITCH + 1 + i], end = end, end + 4 * _up(width)
        offsets[k.PITCH] = end + 192  # streams not a multiple of 4 KiB apart
        return offsets

    def load(self, state) -> None:
        """Take over the model's state."""
        self._carried.load(state)
        for i, (conv, ssm) in enumerate(zip(self._carried.conv, self._carried.ssm)):
            self._conv[i][..., : conv.shape[2]] = conv
            self._ssm[i][..., : ssm.shape[1]] = ssm.transpose(1, 2)
        for i, (pending, held) in enumerate(zip(self._carried.pending, self._carried.held)):
            self._pending[i][:, :-1, : pending.shape[2]] = pending
            self._held[i][..., : held.shape[2]] = held

    def state(self):
        """The model's state after all tokens so far."""
        for i, (conv, ssm) in enumerate(zip(self._carried.conv, self._carried.ssm)):
            conv.copy_(self._conv[i][..., : conv.shape[2]])
            ssm.copy_(self._ssm[i][..., : ssm.shape[1]].transpose(1, 2))
        for i, (pending, held) in enumerate(zip(self._carried.pending, self._carried.held)):
            pending.copy_(self._pending[i][:, :-1, : pending.shape[2]])
            held.copy_(self._held[i][..., : held.shape[2]])
        return self._carried.state()

    def run(
        self, token: Tensor, position: int, n: int, sampling: Sampling, keys: Tensor, forced: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """n tokens a stream, (b n) int64, and their log-probabilities (b n); see Decoder."""
        k, p = self._kernels, self.p.copy()
        tokens = torch.empty(self.batch, n, dtype=torch.int64)
        log_probs = torch.empty(self.batch, n)
        p[k.POSITION], p[k.COUNT], p[k.TOP_K] = position, n, sampling.top_k
        p[k.OUT], p[k.LOG_PROBS] = tokens.data_ptr(), log_probs.data_ptr()
        if forced is not None:
            forced = forced.long().contiguous()
            p[k.FORCED] = forced.data_ptr()
        for row, operation in zip(self.ops, self._program.operations):
            if operation.kind != BLOCK:
                row[k.PHASE] = self._carried.phase[operation.index]
        self.rows[:, 1], self.rows[:, 2] = keys.numpy(), token.numpy()
        settings = np.array([sampling.temperature, sampling.top_p, *self._settings], np.float32)
        heard, table = self._carried.heard.numpy(), self._table.numpy()
        count = threads.thread_count(self._work * n * self.batch, 1 << 22)
        each = 2 if self._guidance else 1  # rows that stay together

        def kernel(slot: int, first: int, last: int) -> None:
            k.decode(p, self.ops, self.rows, self.at, settings, heard, table, each * first, each * last)

        threads.parallel(kernel, self.batch // each, count)
        self._carried.advance(n)
        return tokens, log_probs


def _up(n: int) -> int:
    return -(-n // 16) * 16


def _pad(x: Tensor, dim: int, value: float = 0.0) -> Tensor:
    """x with `dim` padded to a multiple of 16."""
    extra = _up(x.shape[dim]) - x.shape[dim]
    if not extra:
        return x
    shape = list(x.shape)
    shape[dim] = extra
    return torch.cat([x, x.new_full(shape, value)], dim)


def _tiles(weight: Tensor) -> Tensor:
    """(rows k) -> (tiles k 16) flat."""
    return _pad(weight, 0).unflatten(0, (-1, 16)).transpose(1, 2).contiguous().flatten()
