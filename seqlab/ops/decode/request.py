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
    guidance: float = 0.0  # not 0: rows 2i and 2i + 1 are one stream, with its class and with the one that says nothing;
    # their tokens are the same, and the log-probabilities of the first count
