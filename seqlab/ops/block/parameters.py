"""What a fused block takes, in order."""

from typing import NamedTuple

from torch import Tensor


class Direction(NamedTuple):
    """Parameters of one direction of a block; gradients come back in the same order."""

    conv_weight: Tensor  # (d w)
    conv_bias: Tensor | None  # (d)
    x_weight: Tensor  # (r+2n d)
    dt_weight: Tensor  # (d r)
    dt_bias: Tensor  # (d)
    A_log: Tensor  # (d n)
    D: Tensor  # (d)
