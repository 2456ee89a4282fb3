"""Reverse-complement equivariance by parameter sharing (Caduceus-PS, arXiv 2403.03234 section 4).

A DNA molecule can be read from either strand, so a model f of one strand should satisfy

    f(rc(x)) == complement(flip(f(x)))          rc(x): complement every base, then reverse the order

Caduceus-PS gets this by running the same weights on two halves of the channels, the second half flipped along length
and channels. Those halves never mix before the head, so they are two independent sequences for one d_model-wide stack:
here they are two rows of the batch, each in its own frame. That is the same function with no flip inside the stack.
The two meet only in the logits, by a sum, which commutes: the equation above holds exactly.
"""

import torch
from torch import Tensor, nn


class ReverseComplementEquivariant(nn.Module):
    """Makes a token-to-logits model equivariant: logits(x) = f(x) + complement(flip(f(rc(x)))).

    `complement` (vocab) maps each token id, hence each logit column, to its complement's.
    """

    def __init__(self, model: nn.Module, complement: Tensor):
        super().__init__()
        self._complement = complement.tolist()
        if [self._complement[other] for other in self._complement] != list(range(len(complement))):
            raise ValueError(f"complement must be an involution over the vocabulary, got {self._complement}")
        self.model = model
        self.register_buffer("complement", complement, persistent=False)

    def _apply(self, fn, recurse=True):
        """What `to`, `to_empty` and the like go through; no checkpoint holds the buffer, so what is emptied is filled here. A buffer
        that stays as it is, is left alone: made in inference mode, it may not be written outside of it."""
        before = self.complement
        super()._apply(fn, recurse)
        if self.complement is not before and not self.complement.is_meta:
            self.complement.copy_(torch.tensor(self._complement, device="cpu"))
        return self

    def forward(self, ids: Tensor, state: None = None, mask: Tensor | None = None, return_state: bool = False):
        if state is not None:
            raise ValueError("a reverse-complement equivariant model has no state: it reads the sequence both ways")
        both, both_mask = self.both_strands(ids, mask)
        forward_strand, reverse_strand = self.model(both, mask=both_mask, return_state=False)[0].chunk(2)
        return self.combine_strands(forward_strand, reverse_strand), None

    def both_strands(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """ids and mask (b l) -> (2b l): each sequence, then each one's reverse complement."""
        both = torch.cat([ids, self.complement[ids.long()].flip(1).to(ids.dtype)])
        return both, None if mask is None else torch.cat([mask, mask.flip(1)])

    def combine_strands(self, forward_strand: Tensor, reverse_strand: Tensor) -> Tensor:
        """Logits (b l vocab) of the two strands, each in its own frame -> those of the model."""
        return forward_strand + reverse_strand.flip(1)[..., self.complement]


def average_strands(model: nn.Module, complement: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Post-hoc conjoining (Caduceus-Ph): the mean log-probability of both strands' readings, (b l vocab)."""
    there = model(ids, mask=mask, return_state=False)[0].float().log_softmax(-1)
    rc_mask = None if mask is None else mask.flip(1)
    back = model(complement[ids.long()].flip(1), mask=rc_mask, return_state=False)[0].float().log_softmax(-1)
    return 0.5 * (there + back.flip(1)[..., complement])
