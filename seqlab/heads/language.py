"""The language head: features to logits over the vocabulary, and the losses of both kinds of language model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LanguageHead(nn.Module):
    """(b l d_model) -> (b l vocab) logits in float32 (float64 for a float64 model); the weight may be the embedding's (tied)."""

    def __init__(self, d_model: int, vocab_size: int, tied_to: nn.Embedding | None = None):
        super().__init__()
        if tied_to is None:
            self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
            nn.init.normal_(self.weight, std=0.02)
        else:
            self.weight = tied_to.weight

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.weight)
        return logits if logits.dtype == torch.float64 else logits.float()


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies in nats, and the sum of the weights: (), ().

    logits (b l vocab), target (b l) ids, weight (b l) >= 0, zero where nothing is scored. The two sums are returned
    apart so that a mean over several batches or ranks is exact.
    """
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten().long(), reduction="none")
    weight = weight.flatten().float()
    # where, not a product: a NaN at a position that does not count must not count
    return torch.where(weight > 0, loss * weight, 0.0).sum(), weight.sum()
