"""hidden_markov on the CPU: a compiled loop for each row and model (cpu_kernels.py), over the threads of torch."""

import torch
from torch import Tensor

from seqlab.ops import needs_numba, threads
from seqlab.ops.register import operator

WORTH = 1 << 13  # positions that are worth another thread

unavailable = needs_numba.unavailable


def run(base: Tensor, context: Tensor, emissions: Tensor, transitions: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """log p (b l m 4) and q after each position (b l m s)."""
    return _forward(base, context, emissions, transitions, start)


@operator("hidden_markov_cpu", "cpu")
def _forward(
    base: Tensor, context: Tensor, emissions: Tensor, transitions: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    from seqlab.ops.hidden_markov.cpu_kernels import follow

    rows, length = base.shape
    models, _, states, _ = emissions.shape
    log_p, after = start.new_empty(rows, length, models, 4), start.new_empty(rows, length, models, states)
    arrays = [x.numpy() for x in (base, context, emissions, transitions, start, log_p, after)]
    units = rows * models

    def share(slot: int, first: int, last: int) -> None:
        follow(*arrays, first, last)

    threads.parallel(share, units, threads.thread_count(units * length, WORTH))
    return log_p, after


@torch.library.register_fake(_forward)
def _(base, context, emissions, transitions, start):
    rows, length = base.shape
    models, _, states, _ = emissions.shape
    return start.new_empty(rows, length, models, 4), start.new_empty(rows, length, models, states)
