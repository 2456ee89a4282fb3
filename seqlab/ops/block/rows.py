"""What a block does row by row on NVIDIA GPUs, the kernels of rows.cu: RMSNorm, sums, gates. Reference and path of every
other device: torch's own functions, as seqlab/backbones/mamba.py writes them.

The gradient of the norm is added to that of the residual stream in the same pass, and nothing is kept for the backward pass.
Deterministic.
"""

import math
import struct

import torch
from torch import Tensor

from seqlab.ops import nvrtc

SOURCE = "block/rows.cu"
KERNELS = ("norm_forward", "norm_backward", "norm_reduce", "add_rows", "gate_forward", "gate_backward")
WIDEST = 4096
"""Channels a warp can hold in registers."""
BLOCKS = 16
"""Blocks of four warps a multiprocessor: a full one."""


class _Device:
    """Compiles and launches for one GPU. The tests put an emulator in its place."""

    def __init__(self, index: int):
        self.index = index
        self.multiprocessors = nvrtc.multiprocessors(index)

    def module(self, defines: tuple[tuple[str, int], ...]) -> nvrtc.Module:
        return nvrtc.module(SOURCE, defines, self.index)


_devices: dict[int, _Device] = {}


def _device(x: Tensor):
    found = _devices.get(x.device.index)
    if found is None:
        found = _devices[x.device.index] = _Device(x.device.index)
    return found


def _defines(x: Tensor, dtype: torch.dtype, vector: int) -> tuple[tuple[str, int], ...]:
    half, wide = int(dtype == torch.bfloat16), int(x.dtype == torch.float32)
    return (("CHANNELS", x.shape[-1]), ("VEC", vector), ("BF16", half), ("WIDE", wide), ("PAIRED", 0))


def _prepare(x: Tensor, dtype: torch.dtype, weight: Tensor, epsilon: float):
    device, channels = _device(x), x.shape[-1]
    defines = _defines(x, dtype, 1 if channels % 4 else 4)
    p = nvrtc.params_type(SOURCE)()
    p.x, p.weight = x.data_ptr(), weight.data_ptr()
    p.rows = x.numel() // channels
    blocks = min(math.ceil(p.rows / 4), BLOCKS * device.multiprocessors)
    p.warps = 4 * blocks
    p.epsilon = struct.unpack("<I", struct.pack("<f", epsilon))[0]
    return device.module(defines), p, blocks


def norm_forward(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """x (... d), contiguous, normalised over d: `dtype` is x's, or bfloat16 beside float32. weight (d) float32."""
    module, p, blocks = _prepare(x, dtype, weight, epsilon)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    p.y = y.data_ptr()
    module.launch("norm_forward", blocks, 128, 0, p)
    return y


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient of x, to which `residual` (like x) is added if given, and of the weight (float32)."""
    module, p, blocks = _prepare(x, dy.dtype, weight, epsilon)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    partial = torch.empty(p.warps * x.shape[-1], dtype=torch.float32, device=x.device)
    p.dy, p.residual = dy.data_ptr(), 0 if residual is None else residual.data_ptr()
    p.dx, p.dweight, p.partial = dx.data_ptr(), dweight.data_ptr(), partial.data_ptr()
    module.launch("norm_backward", blocks, 128, 0, p)
    module.launch("norm_reduce", math.ceil(x.shape[-1] / 32), 1024, 4096, p)
    return dx, dweight


def _piecewise(kernel: str, x: Tensor, dtype: torch.dtype, rows: tuple[Tensor, ...], **fields: int) -> None:
    """Launch a kernel of pieces on x and whatever else `fields` point to; `rows` are all tensors it reads or writes."""
    device = _device(x)
    aligned = x.shape[-1] % 4 == 0 and all(
        t.stride(1) % 4 == 0 and t.data_ptr() % (4 * t.element_size()) == 0 for t in rows
    )
    vector = 4 if aligned else 1
    p = nvrtc.params_type(SOURCE)()
    p.x, p.rows = x.data_ptr(), x.shape[0] * x.shape[1]
    for name, value in fields.items():
        setattr(p, name, value)
    blocks = min(math.ceil(p.rows * x.shape[2] / (512 * vector)), BLOCKS * device.multiprocessors)
    device.module(_defines(x, dtype, vector)).launch(kernel, blocks, 128, 0, p)


def add(x: Tensor, other: Tensor, into: Tensor) -> Tensor:
    """into = x + other, all (b l d) with neighbouring channels; `into` is like x and may be x, `other` x's dtype or bfloat16.

    Rows may lie anywhere (a half of a projection's output), where torch's own addition is three times slower.
    """
    _piecewise(
        "add_rows", x, other.dtype, (x, other, into),
        x_t=x.stride(1), other=other.data_ptr(), other_t=other.stride(1), dx=into.data_ptr(), dx_t=into.stride(1),
    )  # fmt: skip
    return into


def gate_forward(x: Tensor, other: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """s = x + other, which takes x's place, and s silu(z), which takes other's; (b l d), z's rows anywhere."""
    _piecewise(
        "gate_forward", x, x.dtype, (x, other, z),
        other=other.data_ptr(), z=z.data_ptr(), z_t=z.stride(1), dx=x.data_ptr(), y=other.data_ptr(),
    )  # fmt: skip
    return x, other


def gate_backward(dy: Tensor, s: Tensor, z: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """From s and the gradient of y = s silu(z): that of s, which takes dy's place, and y; that of z goes into `dz`."""
    y = torch.empty_like(s)
    _piecewise(
        "gate_backward", s, s.dtype, (s, dy, z, dz, y),
        dy=dy.data_ptr(), z=z.data_ptr(), z_t=z.stride(1), dz=dz.data_ptr(), dz_t=dz.stride(1), dx=dy.data_ptr(),
        y=y.data_ptr(),
    )  # fmt: skip
    return dy, y
