"""What a back end of the decoder is asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Request:
    """A causal LanguageModel on `device` and how it is to be decoded."""

    model: nn.Module
    batch: int
    device: torch.device
    dtype: torch.dtype  # of the weights; states and sums are float32
    allowed: Tensor | None = None  # (vocab) bool: tokens that may be drawn
    classes: Tensor | None = None  # (b)
    base: Tensor | None = None  # (b d_model), the class embeddings of the streams
