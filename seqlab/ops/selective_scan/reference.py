"""The definition of selective_scan: a plain loop over time, never optimised.

Float32 inside, or float64 when given float64, so that gradcheck can be run on it; autograd does the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlab.ops.dispatch import Request

NATIVE_MASK = True


def unavailable(request: Request | None = None) -> str | None:
    """Always there."""
    return None


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
    """Step through time.

        delta'_t = softplus(delta_t + delta_bias)
        h_t = exp(delta'_t A) h_{t-1} + delta'_t B_t u_t                 (b d n)
        y_t = (sum_n C_t h_t + D u_t) silu(z_t)                          (b d)

    At a masked position h_t = h_{t-1} and y_t = 0. Returns y (b l d) in u's dtype and the last state (b d n).
    """
    data = u.dtype
    inner = torch.float64 if data == torch.float64 else torch.float32
    if mask is not None:  # NaN may sit at masked positions, and 0 * NaN would reach the gradients
        real = mask[:, :, None]
        u, delta, B, C = (torch.where(real, x, 0.0) for x in (u, delta, B, C))
        z = None if z is None else torch.where(real, z, 0.0)
    u, delta, B, C = (x.to(inner) for x in (u, delta, B, C))
    batch, length, channels = u.shape
    h = u.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    y: list[Tensor] = [u.new_zeros(batch, channels)] * length
    us, deltas, Bs, Cs = (x.unbind(1) for x in (u, delta, B, C))
    for t in range(length - 1, -1, -1) if reverse else range(length):
        step = deltas[t][:, :, None]  # (b d 1)
        new = torch.exp(step * A) * h + step * Bs[t][:, None, :] * us[t][:, :, None]  # (b d n)
        out = (new * Cs[t][:, None, :]).sum(-1)  # (b d)
        if D is not None:
            out = out + D * us[t]
        if mask is not None:
            new = torch.where(mask[:, t, None, None], new, h)
            out = torch.where(mask[:, t, None], out, 0.0)
        h, y[t] = new, out
    stacked = torch.stack(y, dim=1) if length else u * 1.0  # (b l d)
    if z is not None:
        stacked = stacked * F.silu(z.to(inner))
    return stacked.to(data), h if h is not initial_state else h.clone()
