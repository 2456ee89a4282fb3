"""The definition of causal_conv1d: one term of the sum at a time, never optimised.

Float32 inside, or float64 when given float64, so that gradcheck can be run on it; autograd does the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlab.ops.dispatch import Request


def unavailable(request: Request | None = None) -> str | None:
    """Always there."""
    return None


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None, reverse: bool
) -> Tensor:
    """y_t = act(bias + sum_k weight[:, k] x_{t-(w-1)+k}), or with +(w-1)-k when reversed; (b l d) in x's dtype."""
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, channels = x.shape
    width = weight.shape[1]
    state = x.new_zeros(batch, width - 1, channels) if initial_state is None else initial_state
    inputs = torch.cat((x, state) if reverse else (state, x), dim=1).to(inner)  # (b l+w-1 d)
    y = torch.zeros_like(x, dtype=inner)
    for k in range(width):
        first = width - 1 - k if reverse else k
        y = y + weight[:, k] * inputs[:, first : first + length]
    if bias is not None:
        y = y + bias
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)
