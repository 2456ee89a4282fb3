"""What a piece of a sequence does to a state that passes it, without computing its outputs.

Where a sequence is cut, the state on the far side of a piece is exp(A s) h + e: h enters, s (b d) is the sum of the
piece's steps delta', and e (b d n) is what the piece adds:

    e = sum_t exp(A (steps between t and the piece's end)) delta'_t u_t B_t

The gradient of the state that entered is exp(A s) g + a of the gradient g of the state that left and the outputs' share

    a = sum_t exp(A (steps from the start to t, t's own too)) dy_t silu(z_t) C_t

Combining the two numbers of every piece gives the exact states at all cuts without running one piece after the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlab.ops import dispatch
from seqlab.ops.selective_scan import cpu, cuda

ELEMENTS = 1 << 22
"""b x steps x d x n of one round of the torch version: bounds its memory."""
NEAR = {"cpu": 8192, "cuda": 65536}
"""Steps summed up before looking whether anything is left; twice as many then, and so on."""
FORGOTTEN = {torch.float32: -20.0, torch.float64: -708.0}
"""Logarithm of what is left of a state when the rest no longer matters."""


def piece_ends(
    x: Tensor,
    vector: Tensor,
    delta: Tensor,
    A: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    mask: Tensor | None = None,
    reverse: bool = False,
    *,
    gate: Tensor | None = None,
    adjoint: bool = False,
) -> tuple[Tensor, Tensor]:
    """What a piece adds to a state, or (adjoint) what its outputs ask of the state that entered; and the sum of its steps.

    Args:
        x: u (b l d); adjoint: dy.
        vector: B (b l n); adjoint: C.
        delta, A, delta_bias, delta_softplus, mask, reverse: those of `selective_scan`, as is `gate`, its z (adjoint only).

    Returns:
        (b d n), (b d), float32, or float64 for float64 data. Not differentiable.

    The walk starts at the end where the sum is wanted. With softplus (steps >= 0) and A < 0 the weight of a step only falls
    as it goes on, so it ends where no state keeps more than 2^-29 (float64: nothing) of what lies further: a long piece costs no
    more than the model's memory is long. The sum of steps is then short of the rest, which no longer changes anything.
    """
    data, state = x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32
    x, vector, delta = x.detach(), vector.detach().to(data), delta.detach().to(data)
    A, delta_bias = A.detach().to(state), None if delta_bias is None else delta_bias.detach().to(state)
    gate = None if gate is None else gate.detach().to(data)
    run = torch_piece_ends
    request = dispatch.Request(x.device.type, x.dtype, A.shape[0], d_state=A.shape[1])
    for name, backend in (("cuda", cuda), ("cpu", cpu)):
        wanted = not dispatch.forces_another(name)
        if wanted and x.numel() and x.device.type == name and backend.unavailable(request) is None:
            run = backend.piece_ends
    length, rightward = x.shape[1], adjoint != reverse
    total = A.new_zeros(x.shape[0], *A.shape)
    passed = A.new_zeros(x.shape[0], A.shape[0])
    start, size = 0, NEAR[x.device.type] if x.device.type in NEAR else length
    while start < length:
        stop = min(start + size, length)
        part = slice(start, stop) if rightward else slice(length - stop, length - start)
        x_, vector_, delta_, gate_, mask_ = (None if t is None else t[:, part] for t in (x, vector, delta, gate, mask))
        ends, steps = run(x_, vector_, delta_, A, delta_bias, mask_, delta_softplus, reverse, gate_, adjoint)
        total = total + torch.exp(passed.unsqueeze(-1) * A) * ends
        passed = passed + steps
        if stop < length and delta_softplus and (passed.unsqueeze(-1) * A).amax().item() < FORGOTTEN[state]:
            break
        start, size = stop, 2 * size
    return total, passed


@torch.no_grad()
def torch_piece_ends(x, vector, delta, A, bias, mask, softplus: bool, reverse: bool, gate=None, adjoint: bool = False):
    """The same in plain torch, on any device."""
    batch, length, channels = x.shape
    total = A.new_zeros(batch, channels, A.shape[1])
    passed = A.new_zeros(batch, channels)
    rightward = adjoint != reverse  # the walk starts where the sum is wanted
    stretch = max(1, ELEMENTS // max(1, batch * A.numel()))
    for start in range(0, length, stretch):
        stop = min(start + stretch, length)
        part = slice(start, stop) if rightward else slice(length - stop, length - start)
        step = delta[:, part].to(A.dtype)
        if bias is not None:
            step = step + bias
        if softplus:
            step = F.softplus(step)
        value, weight = x[:, part].to(A.dtype), vector[:, part].to(A.dtype)
        if adjoint and gate is not None:
            value = value * F.silu(gate[:, part].to(A.dtype))
        if mask is not None:  # anything may stand at masked positions
            real = mask[:, part].unsqueeze(-1)
            step, value, weight = (torch.where(real, t, 0.0) for t in (step, value, weight))
        if not rightward:
            step, value, weight = step.flip(1), value.flip(1), weight.flip(1)
        through = torch.cat((passed.unsqueeze(1), step), 1).cumsum(1)  # (b part+1 d): before each step, and after all
        if adjoint:
            between = through[:, 1:]
        else:
            between, value = through[:, :-1], value * step
        total += torch.einsum("btdn,btd,btn->bdn", torch.exp(between.unsqueeze(-1) * A), value, weight)
        passed = through[:, -1]
    return total, passed
