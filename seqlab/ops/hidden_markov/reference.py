"""hidden_markov written down: a loop over positions, on any device."""

import torch
from torch import Tensor

from seqlab.ops.dispatch import Request


def unavailable(request: Request | None = None) -> str | None:
    """Runs everywhere."""
    return None


def run(base: Tensor, context: Tensor, emissions: Tensor, transitions: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """log p (b l m 4) and q after each position (b l m s), in the tables' dtype."""
    rows, length = base.shape
    models, _, states, _ = emissions.shape
    q, log_p, after = start, [], []
    for t in range(length):
        E = emissions[:, context[:, t].long()].transpose(0, 1)  # (b m s 4)
        p = (q[..., None] * E).sum(-2)
        log_p.append(p.log())
        is_known = (base[:, t] >= 0) & (base[:, t] < 4)
        v = torch.where(is_known, base[:, t], 0).long()[:, None, None].expand(rows, models, 1)
        seen = E.gather(-1, v[..., None].expand(rows, models, states, 1))[..., 0] / p.gather(-1, v)
        a = torch.where(is_known[:, None, None], q * seen, q)
        q = torch.einsum("bmr,mrs->bms", a, transitions)
        after.append(q)
    if not length:
        return start.new_empty(rows, 0, models, 4), start.new_empty(rows, 0, models, states)
    return torch.stack(log_p, 1), torch.stack(after, 1)
