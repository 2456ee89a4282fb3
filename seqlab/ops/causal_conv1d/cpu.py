"""causal_conv1d on the CPU: fused with bias and SiLU, threaded, reading and writing memory once.

The arithmetic is in cpu_kernels.py (numba, compiled on first use, kept on disk); this file makes tensors into addresses,
splits the work, and tells torch about the operator, its shapes and its gradient. Results are the same bit for bit from
run to run and for any number of threads.
"""


import numpy as np
import torch
from torch import Tensor

from seqlab.ops import needs_numba, threads
from seqlab.ops.register import only_once, operator

STEPS = 256  # times in one cell of work
UNITS_MAX = 256  # shares of the parameters' gradients
WORTH = 1 << 16  # numbers that are worth another thread


unavailable = needs_numba.unavailable  # takes every argument the operator has


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None, reverse: bool
) -> Tensor:
    """y (b l d) in x's dtype."""
    return _forward(x, weight, bias, initial_state, silu, reverse)


@operator("causal_conv1d_cpu", "cpu")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    call = _Call(x, weight, bias, initial_state, silu, reverse)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    call.data("Y", y)
    call.parallel("forward", 1)
    return y


@torch.library.register_fake(_forward)
def _(x, weight, bias, initial_state, silu, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("causal_conv1d_cpu_backward", "cpu")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias, initial state); an empty tensor for what is absent."""
    call = _Call(x, weight, bias, initial_state, silu, reverse)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    call.data("DY", call.rows(dy))
    call.data("DX", dx)
    dstate = x.new_empty(0) if initial_state is None else x.new_empty(initial_state.shape)
    if dstate.numel():
        call.data("DSTATE", dstate)
    width = weight.shape[1]
    shares = np.empty((call.units, width + 1, call.padded), np.float64 if weight.dtype == torch.float64 else np.float32)
    call.p[call.kernels.SHARES] = shares.ctypes.data
    call.parallel("backward", 3)
    sums = torch.from_numpy(np.add.reduce(shares, axis=0, dtype=np.float64)[:, : x.shape[2]].copy()).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else sums[width].clone()
    return dx, sums[:width].t().contiguous(), dbias, dstate


@torch.library.register_fake(_backward)
def _(dy, x, weight, bias, initial_state, silu, reverse):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
        x.new_empty(0) if initial_state is None else x.new_empty(initial_state.shape),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, initial_state, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, bias, initial_state)


def _autograd(ctx, dy):
    x, weight, bias, initial_state = ctx.saved_tensors
    dx, dweight, dbias, dstate = _backward(dy, x, weight, bias, initial_state, ctx.silu, ctx.reverse)
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if initial_state is None else dstate,
        None,
        None,
    )


torch.library.register_autograd(_forward, _autograd, setup_context=_setup_context)
only_once(_backward)


class _Call:
    """The kernels' argument array for one call, and the tensors that must stay alive during it."""

    def __init__(self, x, weight, bias, initial_state, silu, reverse):
        from seqlab.ops.causal_conv1d import cpu_kernels

        self.kernels = cpu_kernels
        self.reverse = reverse
        batch, length, channels = x.shape
        width = weight.shape[1]
        self.padded = -(-channels // 16) * 16
        self.numbers = float(batch * length * self.padded)
        cells = batch * -(-length // STEPS)
        cells_per_unit = -(-cells // UNITS_MAX)
        self.units = -(-cells // cells_per_unit)
        self.like = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0), torch.float64: np.float64(0)}[x.dtype]
        self.compute = np.float64(0) if weight.dtype == torch.float64 else np.float32(0)
        self.p = np.zeros(cpu_kernels.SLOTS, np.int64)
        self.alive: list = []
        self.data("X", self.rows(x))
        if initial_state is not None and initial_state.numel():
            self.data("STATE", self.rows(initial_state))
        filters = weight.new_zeros(width, self.padded)
        filters[:, :channels] = weight.t()
        biases = weight.new_zeros(self.padded)
        if bias is not None:
            biases[:channels] = bias
        self.alive += [filters, biases]
        values = {
            "WEIGHT": filters.data_ptr(),
            "BIAS": 0 if bias is None else biases.data_ptr(),
            "BATCH": batch,
            "LENGTH": length,
            "CHANNELS": channels,
            "WIDTH": width,
            "PADDED": self.padded,
            "STEPS": STEPS,
            "CELLS": cells_per_unit,
            "SILU": int(silu),
            "SIZE": x.element_size(),
            "WORK": weight.element_size(),
        }
        for name, value in values.items():
            self.p[getattr(cpu_kernels, name)] = value

    def data(self, name: str, x: Tensor) -> None:
        """Address and byte strides of a (b l d) tensor (last stride 1), walked in the filter's direction."""
        size = x.element_size()
        address, step = x.data_ptr(), x.stride(1) * size
        if self.reverse:
            address, step = address + (x.shape[1] - 1) * step, -step
        slot = getattr(self.kernels, name)
        self.p[slot : slot + 3] = address, x.stride(0) * size, step
        self.alive.append(x)

    @staticmethod
    def rows(x: Tensor) -> Tensor:
        """As it is if neighbouring channels are neighbours in memory, else a copy."""
        return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()

    def parallel(self, kernel: str, cost: int) -> None:
        count = threads.thread_count(cost * self.numbers, WORTH)
        width = int(self.p[self.kernels.WIDTH])
        stride = -(-(256 + width * self.padded * 8) // 4096) * 4096 + 64
        scratch = np.empty(count * stride + 64, np.uint8)
        base = -(-scratch.ctypes.data // 64) * 64
        function = getattr(self.kernels, kernel)

        def share(slot: int, first: int, last: int) -> None:
            function(self.p, base + slot * stride, self.like, self.compute, first, last)

        threads.parallel(share, self.units, count)
