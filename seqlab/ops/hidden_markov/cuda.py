"""hidden_markov on NVIDIA GPUs: the kernel of follow.cu, compiled at first use (seqlab/ops/nvrtc.py). Deterministic."""

import functools
import math

import torch
from torch import Tensor

from seqlab.ops import nvrtc
from seqlab.ops.dispatch import Request

SOURCE = "hidden_markov/follow.cu"
ROWS = 16  # of a block: every row needs tables of its own, so few rows on many multiprocessors are better than the reverse


def unavailable(request: Request | None = None) -> str | None:
    """Why this back end cannot run here (or cannot run this); None if it can."""
    if (reason := nvrtc.machine()) is not None:
        return reason
    if request is not None and request.device != "cuda":
        return f"the tensors are on {request.device}; move them to the GPU: tensor.cuda()"
    return nvrtc.gpu(torch.cuda.current_device())


class _Device:
    """Compiles and launches for one GPU. The tests put an emulator in its place."""

    def __init__(self, index: int):
        self.index = index

    def module(self, defines: tuple[tuple[str, int], ...]) -> nvrtc.Module:
        return nvrtc.module(SOURCE, defines, self.index)


@functools.cache
def _device(index: int) -> _Device:
    return _Device(index)


def defines(states: int) -> tuple[tuple[str, int], ...]:
    return (("STATES", states), ("ROWS", ROWS), ("BF16", 0), ("PAIRED", 0))


def follow(base: Tensor, context: Tensor, emissions: Tensor, transitions: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """log p (b l m 4) and q after each position (b l m s) of contiguous tensors."""
    rows, length = base.shape
    models, contexts, states, _ = emissions.shape
    if emissions.data_ptr() % 16:
        emissions = emissions.clone()  # rows are read 16 bytes at a time
    log_p, after = start.new_empty(rows, length, models, 4), start.new_empty(rows, length, models, states)
    p = nvrtc.params_type(SOURCE)()
    p.base, p.context, p.start = base.data_ptr(), context.data_ptr(), start.data_ptr()
    p.emissions, p.transitions = emissions.data_ptr(), transitions.data_ptr()
    p.log_p, p.after = log_p.data_ptr(), after.data_ptr()
    p.batch, p.length, p.models, p.contexts = rows, length, models, contexts
    module = _device(base.device.index).module(defines(states))
    module.launch("follow", models * math.ceil(rows / ROWS), ROWS, 4 * states * states, p)
    return log_p, after


@torch.library.custom_op("seqlab::hidden_markov_cuda", mutates_args=(), device_types="cuda")
def _forward(
    base: Tensor, context: Tensor, emissions: Tensor, transitions: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    return nvrtc.on_device(follow, base, context, emissions, transitions, start)


@_forward.register_fake
def _(base, context, emissions, transitions, start):
    rows, length = base.shape
    models, _, states, _ = emissions.shape
    return start.new_empty(rows, length, models, 4), start.new_empty(rows, length, models, states)


def run(base: Tensor, context: Tensor, emissions: Tensor, transitions: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return _forward(base, context, emissions, transitions, start)
    return nvrtc.on_device(follow, base, context, emissions, transitions, start)
