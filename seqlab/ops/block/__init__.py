"""A whole Mamba block as one operator, where that is faster and smaller: norm, projections, convolution, scan, residual sum.

The definition, and what runs everywhere else, is the chain of separate operators in seqlab/backbones/mamba.py; tests hold
the two together, outputs and every gradient. What it keeps and recomputes is in cuda.py beside this file.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqlab.ops import dispatch
from seqlab.ops.block import cuda, rows
from seqlab.ops.block.parameters import Direction
from seqlab.ops.selective_scan import cuda as scan

__all__ = ["BACKENDS", "Direction", "compute_dtype", "mamba_block", "mamba_stack", "unavailable"]

BACKENDS: dict[str, ModuleType] = {"cuda": cuda}
"""Away from it, the separate operators of seqlab/backbones/mamba.py, with back ends of their own."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x run in: autocast's choice, else x's own dtype."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def unavailable(x: Tensor, d_inner: int, d_state: int) -> str | None:
    """Why x (b l d_model) must go through the separate operators; None if the fused block can take it."""
    if not x.is_cuda:
        return "the fused block runs on NVIDIA GPUs"
    if torch.compiler.is_compiling():
        return "torch.compile fuses the separate operators itself"
    if x.numel() == 0:
        return "nothing to compute"
    if dispatch.transforming():
        return "forward-mode derivatives and torch.func go through the separate operators"
    if dispatch.forces_another("cuda"):
        return f"{dispatch.ENVIRONMENT} asks for another back end"
    dtype = compute_dtype(x)
    if x.dtype not in (torch.float32, dtype):
        return f"the residual stream is {x.dtype} beside {dtype}"
    if x.shape[2] > rows.WIDEST or d_state > scan.GROUP:
        return f"it takes d_model up to {rows.WIDEST} and d_state up to {scan.GROUP}"
    return cuda.unavailable(dispatch.Request("cuda", dtype, d_inner))


def mamba_block(
    x: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    directions: tuple[Direction, ...],
    reverse: tuple[bool, ...] = (False,),
    residual: bool = True,
    mask: Tensor | None = None,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    return_state: bool = False,
    ranks: Any = None,
    every_state: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x + mixer(rms_norm(x)), or without residual the mixer's output alone.

    Args:
        x: (b l d_model), float32, or the dtype that matrix products run in.
        norm_weight: (d_model). in_weight: (2d d_model). out_weight: (d_model d). Biases or None.
        directions: parameters of one direction, or of two: both read one projection of the input, and one projection takes
            the sum of their outputs (tied projections).
        reverse: whether the one direction runs right to left; (False, True) for two.
        mask: (b l) bool, True at real positions; the others change nothing, and there the mixer's output is 0.
        conv_state, ssm_state: (b w-1 d), (b d n): what came before, one direction only.
        return_state: also the states that continue the sequence.
        ranks: those that share the sequence, x being this one's piece (seqlab/training/parallel.py); no states then.
        every_state: for the backward pass keep the scan's state every 8 steps instead of every 128: faster, in d_inner n / 2 bytes
            a token and direction more.

    Returns:
        out (b l d_model), conv state, ssm state (None unless asked for). Differentiable in all tensors.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: directions or states that do not go together.
    """
    if tuple(reverse) not in ((False,), (True,), (False, True)) or len(directions) != len(reverse):
        raise ValueError(f"mamba_block: {len(directions)} directions with reverse {reverse}; allowed: one, or (False, True)")
    if ranks is not None and (conv_state is not None or ssm_state is not None or return_state):
        raise ValueError("mamba_block: a sequence shared by several ranks carries no state in or out")
    tensors = (x, mask, conv_state, ssm_state, norm_weight, in_weight, in_bias, out_weight, out_bias)
    tensors += tuple(t for direction in directions for t in direction)
    try:
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        spec = cuda.Spec(epsilon, tuple(reverse), residual, compute_dtype(x), return_state, keep, every_state=every_state, ranks=ranks)
        return cuda.Block.apply(spec, *tensors)
    except (AttributeError, TypeError):  # to ask each tensor first is host time of every call
        _check_are_tensors(x, norm_weight, in_weight, in_bias, out_weight, out_bias, directions, mask, conv_state, ssm_state)
        raise


def _check_are_tensors(x, norm_weight, in_weight, in_bias, out_weight, out_bias, directions, mask, conv_state, ssm_state) -> None:
    required = {"x": x, "norm_weight": norm_weight, "in_weight": in_weight, "out_weight": out_weight}
    optional = {"in_bias": in_bias, "out_bias": out_bias, "mask": mask, "conv_state": conv_state, "ssm_state": ssm_state}
    for i, direction in enumerate(directions):
        for name, t in direction._asdict().items():
            (optional if name == "conv_bias" else required)[f"directions[{i}].{name}"] = t
    dispatch.check_are_tensors("mamba_block", (*required, *optional), (*required.values(), *optional.values()), len(required))


def mamba_stack(x: Tensor, blocks: list[tuple], mask: Tensor | None = None) -> Tensor:
    """x (b l d_model) through blocks with residual, one after the other, keeping no block's input for the backward pass.

    blocks: for each, mamba_block's arguments from norm_weight to reverse; all of one kind. Inputs recovered on the way back
    are off by float32's rounding of a sum (seqlab/ops/block/stack.py).
    """
    from seqlab.ops.block.stack import Stack

    specs, parameters = [], []
    for norm_weight, epsilon, in_weight, in_bias, out_weight, out_bias, directions, reverse in blocks:
        specs.append(cuda.Spec(epsilon, tuple(reverse), True, compute_dtype(x), False, True, gate_after=False, spare=True))
        parameters += [norm_weight, in_weight, in_bias, out_weight, out_bias]
        parameters += [t for direction in directions for t in direction]
    return Stack.apply(tuple(specs), x, mask, *parameters)
