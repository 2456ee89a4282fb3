"""selective_scan on the CPU: fused, threaded, and never larger in memory than its inputs and outputs.

The arithmetic is in cpu_kernels.py (numba, compiled on first use, kept on disk); this file makes tensors into addresses,
splits the work, and tells torch about the operator, its shapes and its gradient. Results are the same bit for bit from
run to run and for any number of threads.
"""


import numpy as np
import torch
from torch import Tensor

from seqlab.ops import needs_numba, threads
from seqlab.ops.register import only_once, operator

NATIVE_MASK = True
CHUNK_MAX = 256
GROUPS_MAX = 16  # shares of dB and dC that are kept apart and then added in order
PARTIAL_BYTES = 4 << 20  # room for those shares: decides the length of a backward segment
SMALLEST = 1e-20  # a step this small decays nothing: exp(A 1e-20) is 1
WORTH = 1 << 18  # steps x channels x states that are worth another thread


unavailable = needs_numba.unavailable  # takes every argument the operator has


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
    """y (b l d) in u's dtype and the last state (b d n)."""
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)
    )
    y, final_state, _ = _forward(
        u, delta, A, B, C, D, z, delta_bias, initial_state, mask, delta_softplus, reverse, save
    )
    return y, final_state


def piece_ends(x, vector, delta, A, bias, mask, softplus: bool, reverse: bool, gate=None, adjoint: bool = False):
    """(b d n), (b d): ends.py says what; by a forward scan, whose last state it is.

    The adjoint is H = a_0 H_0 with H_t = C_t g_t + a_{t+1} H_{t+1}: a scan the other way round, whose step at t is that of
    its predecessor t+1 and whose u is g / step, for the scan multiplies u by its step. A step below SMALLEST decays
    nothing, so that SMALLEST may stand for it in both places.
    """
    step = delta.to(A.dtype)
    if bias is not None:
        step = step + bias
    if softplus:
        step = torch.nn.functional.softplus(step)
    x, vector = x.to(A.dtype), vector.to(A.dtype)
    if adjoint and gate is not None:
        x = x * torch.nn.functional.silu(gate.to(A.dtype))
    if mask is not None:
        step, x, vector = (torch.where(mask.unsqueeze(-1), t, 0.0) for t in (step, x, vector))
    sums, first = step.sum(1), step[:, -1 if reverse else 0]
    if adjoint:
        none = torch.zeros_like(step[:, :1])
        step = torch.cat((none, step[:, :-1]) if reverse else (step[:, 1:], none), 1)
        step = torch.where(step.abs() < SMALLEST, SMALLEST, step)
        x = x / step
    _, end, _ = _forward(x, step, A, vector, vector, None, None, None, None, None, False, reverse != adjoint, False)
    return (torch.exp(first.unsqueeze(-1) * A) * end if adjoint else end), sums


# ------------------------------------------------------------------------------------------ the operator, for torch


def _sizes(u: Tensor, A: Tensor) -> tuple[int, int, int]:
    """(steps in a chunk, chunks, channels padded to whole tiles). Functions of the shape alone."""
    states = A.shape[1]
    chunk = 64 if states <= 16 else 128 if states <= 64 else CHUNK_MAX
    return chunk, -(-u.shape[1] // chunk), -(-u.shape[2] // 16) * 16


@operator("selective_scan_cpu", "cpu")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last state, the states at the chunks' starts (b chunks n dp), empty unless `save`)."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, mask, delta_softplus, reverse)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    state = call.padded_state(initial_state)
    checkpoints = A.new_empty((call.batch, call.chunks, call.states, call.padded) if save else (0,))
    call.data("Y", y)
    call.set(STATE=state.data_ptr(), CHECKPOINTS=checkpoints.data_ptr(), SAVE=int(save))
    call.parallel("forward", call.batch * (call.padded // 16), call.work)
    return y, call.unpadded_state(state, A), checkpoints


@torch.library.register_fake(_forward)
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, mask, delta_softplus, reverse, save):
    _, chunks, padded = _sizes(u, A)
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        A.new_empty((u.shape[0], u.shape[2], A.shape[1])),
        A.new_empty((u.shape[0], chunks, A.shape[1] + A.shape[1] % 2, padded) if save else (0,)),
    )


@operator("selective_scan_cpu_backward", "cpu")
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    mask: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial state); an empty tensor for what is absent."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, mask, delta_softplus, reverse)
    batch, length, padded, states = call.batch, call.length, call.padded, call.states
    tiles = padded // 16
    group_tiles = -(-tiles // GROUPS_MAX)
    groups = -(-tiles // group_tiles)
    row_bytes = 2 * batch * groups * states * A.element_size()
    segment = min(max(1, PARTIAL_BYTES // (row_bytes * call.chunk)), call.chunks) * call.chunk
    partial = np.empty(row_bytes * segment, np.uint8)
    du, ddelta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta))
    dz = u.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    dB, dC = (A.new_empty((batch, length, states)) for _ in range(2))
    dstate = call.padded_state(dfinal)
    dA = np.zeros((batch, states, padded))
    dD, dbias = np.zeros((batch, padded)), np.zeros((batch, padded))
    for name, x in (("DY", call.rows(dy)), ("DU", du), ("DDELTA", ddelta), ("DB", dB), ("DC", dC)):
        call.data(name, x)
    if z is not None:
        call.data("DZ", dz)
    call.set(
        STATE=dstate.data_ptr(),
        CHECKPOINTS=checkpoints.data_ptr(),
        DA=dA.ctypes.data,
        DD=0 if D is None else dD.ctypes.data,
        DBIAS=0 if delta_bias is None else dbias.ctypes.data,
        PARTIAL=partial.ctypes.data,
        GROUPS=groups,
        GROUP_TILES=group_tiles,
        SEGMENT=segment,
    )
    for start in range((call.chunks * call.chunk - 1) // segment * segment, -1, -segment):
        stop = min(start + segment, length)
        call.set(START=start, STOP=stop)
        call.parallel("backward", batch * groups, 3 * call.work * (stop - start) / length)
        call.parallel("sum_groups", stop - start, call.work / 8 * (stop - start) / length)

    def channel_sum(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.add.reduce(x, axis=0)[..., : u.shape[2]].copy()).to(A.dtype)

    absent = A.new_empty(0)
    return (
        du,
        ddelta,
        channel_sum(dA)[: A.shape[1]].t().contiguous(),
        dB[..., : B.shape[2]].to(B.dtype).contiguous(),
        dC[..., : C.shape[2]].to(C.dtype).contiguous(),
        absent if D is None else channel_sum(dD),
        dz,
        absent.clone() if delta_bias is None else channel_sum(dbias),
        call.unpadded_state(dstate, A),
    )


@torch.library.register_fake(_backward)
def _(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, mask, checkpoints, delta_softplus, reverse):
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
        A.new_empty((u.shape[0], u.shape[2], A.shape[1])),
    )


def _setup_context(ctx, inputs, output) -> None:
    u, delta, A, B, C, D, z, delta_bias, initial_state, mask, delta_softplus, reverse, _ = inputs
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, mask, output[2])
    ctx.delta_softplus, ctx.reverse, ctx.has_state = delta_softplus, reverse, initial_state is not None
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal, _):
    u, delta, A, B, C, D, z, delta_bias, mask, checkpoints = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(u)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dstate = _backward(
        dy, dfinal, u, delta, A, B, C, D, z, delta_bias, mask, checkpoints, ctx.delta_softplus, ctx.reverse
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
        dstate if ctx.has_state else None,
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd(_forward, _autograd, setup_context=_setup_context)
only_once(_backward)


# ------------------------------------------------------------------------------------------- tensors into addresses


class _Call:
    """The kernels' argument array for one call, and the tensors that must stay alive during it."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, mask, delta_softplus, reverse):
        from seqlab.ops.selective_scan import cpu_kernels

        self.kernels = cpu_kernels
        self.reverse = reverse
        self.batch, self.length, channels = u.shape
        self.states = A.shape[1] + A.shape[1] % 2  # the kernels work on pairs; a state more has A = B = C = 0
        self.chunk, self.chunks, self.padded = _sizes(u, A)
        self.work = float(self.batch * self.length * self.padded * self.states)
        self.like = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0), torch.float64: np.float64(0)}[u.dtype]
        self.compute = np.float64(0) if A.dtype == torch.float64 else np.float32(0)
        self.p = np.zeros(cpu_kernels.SLOTS, np.int64)
        self.alive: list = []
        B, C = B.to(A.dtype), C.to(A.dtype)
        if self.states != A.shape[1]:
            B, C = (torch.nn.functional.pad(x, (0, 1)) for x in (B, C))
        if mask is not None:  # 0 x NaN would still be NaN
            B, C = (torch.where(mask.unsqueeze(-1), x, 0.0) for x in (B, C))
            self.data("MASK", mask.contiguous().view(torch.uint8))
        for name, x in (("U", u), ("DELTA", delta), ("Z", z), ("B", B), ("C", C)):
            if x is not None:
                self.data(name, self.rows(x))
        # 2^(delta A log2 e): the kernels' exponential is a power of two
        decay = A.new_zeros(self.states, self.padded)
        decay[: A.shape[1], :channels] = A.t() * 1.4426950408889634
        self.set(
            A=self.keep(decay).data_ptr(),
            D=0 if D is None else self._pad(D).data_ptr(),
            BIAS=0 if delta_bias is None else self._pad(delta_bias).data_ptr(),
            BATCH=self.batch,
            LENGTH=self.length,
            CHANNELS=channels,
            STATES=self.states,
            PADDED=self.padded,
            CHUNK=self.chunk,
            SOFTPLUS=int(delta_softplus),
            SIZE=u.element_size(),
            WORK=A.element_size(),
        )

    def set(self, **slots: int) -> None:
        for name, value in slots.items():
            self.p[getattr(self.kernels, name)] = value

    def data(self, name: str, x: Tensor) -> None:
        """Address and byte strides of a (b l d) tensor (last stride 1), walked in scan order."""
        size = x.element_size()
        address, step = x.data_ptr(), x.stride(1) * size
        if self.reverse:
            address, step = address + (self.length - 1) * step, -step
        slot = getattr(self.kernels, name)
        self.p[slot : slot + 3] = address, x.stride(0) * size, step
        self.keep(x)

    def keep(self, x: Tensor) -> Tensor:
        self.alive.append(x)
        return x

    @staticmethod
    def rows(x: Tensor) -> Tensor:
        """As it is if neighbouring channels are neighbours in memory, else a copy."""
        return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()

    def _pad(self, x: Tensor) -> Tensor:
        padded = x.new_zeros(self.padded)
        padded[: x.shape[0]] = x
        return self.keep(padded)

    def padded_state(self, state: Tensor | None) -> Tensor:
        """(b d n) -> a new (b n dp), zeros if absent."""
        dtype = torch.float64 if isinstance(self.compute, np.float64) else torch.float32
        padded = torch.zeros(self.batch, self.states, self.padded, dtype=dtype)
        if state is not None:
            padded[:, : state.shape[2], : state.shape[1]] = state.transpose(1, 2)
        return padded

    def unpadded_state(self, padded: Tensor, like: Tensor) -> Tensor:
        """(b n dp) -> (b d n), sizes of A = `like` (d n)."""
        return padded[:, : like.shape[1], : like.shape[0]].transpose(1, 2).contiguous()

    def parallel(self, kernel: str, units: int, work: float) -> None:
        count = threads.thread_count(work, WORTH)
        stride = -(-self.kernels.scratch_bytes(self.chunk, self.states) // 4096) * 4096
        scratch = np.empty(count * stride + 64, np.uint8)
        base = -(-scratch.ctypes.data // 64) * 64
        function = getattr(self.kernels, kernel)

        def share(slot: int, first: int, last: int) -> None:
            function(self.p, base + slot * stride, self.like, self.compute, first, last)

        threads.parallel(share, units, count)
