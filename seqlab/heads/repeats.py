"""Which species' genomes hold the word that ends at each position, of words that some genome repeats (seqlab/repeats.py)."""

import numpy as np
import torch
from torch import Tensor, nn

from seqlab import repeats


class RepeatCounter(nn.Module):
    """forward(base (b l), before (b length-1) or None) -> (b l n) float32: 1 where such a word ends that the genome
    holds, else 0. `fit` fills in the words; before, there are none."""

    def __init__(self, n_species: int, length: int):
        super().__init__()
        self.length = length
        self.register_buffer("words", torch.full((repeats.CAPACITY,), int(repeats.UNUSED)))
        self.register_buffer("held", torch.zeros(repeats.CAPACITY, n_species, dtype=torch.bool))

    @torch.no_grad()
    def fit(self, words: np.ndarray, held: np.ndarray) -> None:
        """Take over words (w) int64, ascending, and who holds them (w n) bool."""
        self.words[: len(words)] = torch.from_numpy(words)
        self.held[: len(words)] = torch.from_numpy(held)

    @torch.no_grad()
    def forward(self, base: Tensor, before: Tensor | None = None) -> Tensor:
        """base, before: 0 to 3, -1 where not known; before: the bases that precede this piece, not known where None."""
        if before is None:
            before = base.new_full((len(base), self.length - 1), -1)
        line, n = torch.cat([before, base], 1).long(), base.shape[1]
        forward = torch.zeros(len(base), n, dtype=torch.long, device=base.device)
        backward, is_known = torch.zeros_like(forward), torch.ones_like(forward, dtype=torch.bool)
        for i in range(self.length):
            part = line[:, i : i + n]
            is_known &= part >= 0
            forward = forward * 4 + part
            backward += (3 - part) << (2 * i)
        code = torch.minimum(forward, backward)
        at = torch.searchsorted(self.words, code).clamp(max=len(self.words) - 1)
        is_repeat = is_known & (self.words[at] == code)
        return (is_repeat[..., None] & self.held[at]).float()
