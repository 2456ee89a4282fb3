"""Gene models inside a classifier: before every base, what each species' hidden Markov model makes of it.

`GenePredictor` holds one model for each species (seqlab/genes.py), fitted to the training split before training begins and
constant from then on. Training windows it reads with emissions that were fitted without their fold of the genome: what it says of them is then
what it would say of sequence that it has not seen. In one pass it gives

    log p (b l n 4)     each species' log-probabilities of A, C, G and T at each position, from the bases before it
    frame (b l n s)     after each position, the probabilities of the states of the next one: in which reading frame of which
                        strand each species takes itself to be
    lead (b l n)        the log-probability that each species gave to the base that came, less their mean; 0 where it is not known
    reading (b l s)     where asked for: `frame` of all species, each as probable as what it has said so far makes it

The classification head lets each species' predictions begin at log p, and the network is told frame and lead. Sequences in
pieces are exact: the last bases and the newest frames are carried.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqlab import genes
from seqlab.ops.hidden_markov import hidden_markov

EVIDENCE_UNITS = 1 << 20  # to a nat


class GeneState(NamedTuple):
    """What is carried from one piece of a sequence to the next."""

    before: Tensor  # (b order) int32: the last bases, -1 where not known or before the beginning
    frame: Tensor  # (b n s)
    evidence: Tensor  # (b n) int64: sums of `lead` so far, in units of 2**-20


class GenePrediction(NamedTuple):
    log_p: Tensor  # (b l n 4)
    frame: Tensor  # (b l n s)
    lead: Tensor  # (b l n)
    reading: Tensor | None = None  # (b l s)


class GenePredictor(nn.Module):
    """forward(base (b l), state or None) -> (GenePrediction, GeneState). `fit` fills in the models; before, every base is as
    likely as another."""

    def __init__(self, n_species: int, order: int):
        super().__init__()
        self.order = order
        states = genes.STATES
        self.register_buffer("emissions", torch.full((n_species, genes.context_count(order), states, 4), 0.25))
        self.register_buffer("transitions", torch.full((n_species, states, states), 1 / states))
        self.register_buffer("start", torch.full((n_species, states), 1 / states))
        self.register_buffer("held_out", None, persistent=False)  # (n folds*contexts s 4), for training

    @torch.no_grad()
    def fit(self, models: list[genes.GeneModel]) -> None:
        """Take over one model for each species, in their order."""
        for i, model in enumerate(models):
            for name in ("emissions", "transitions", "start"):
                getattr(self, name)[i].copy_(torch.from_numpy(getattr(model, name)))
        self.held_out = torch.stack([torch.from_numpy(model.held_out).flatten(0, 1) for model in models]).to(self.emissions)

    @torch.no_grad()
    def forward(
        self, base: Tensor, state: GeneState | None = None, fold: Tensor | None = None, with_reading: bool = False
    ) -> tuple[GenePrediction, GeneState]:
        """base (b l): 0 to 3, -1 where not known; fold (b): of training windows, whose fold the emissions are to leave out."""
        base = base.to(torch.int32)
        if state is None:
            start = self.start.expand(len(base), -1, -1)
            nothing = base.new_zeros(len(base), start.shape[1], dtype=torch.int64)
            state = GeneState(base.new_full((len(base), self.order), -1), start, nothing)
        line = torch.cat([state.before, base], 1)  # (b order+l)
        context, emissions = contexts(line, self.order), self.emissions
        if fold is not None and self.held_out is not None:
            context = context + fold.to(torch.int32)[:, None] * emissions.shape[1]
            emissions = self.held_out
        log_p, frame = hidden_markov(base, context, emissions.float(), self.transitions.float(), state.frame.float())
        last = frame[:, -1] if base.shape[1] else state.frame
        came = base.clamp(min=0).long()[..., None, None].expand(*log_p.shape[:3], 1)
        nats = log_p.gather(-1, came)[..., 0]
        lead = torch.where(base[..., None] >= 0, nats - nats.mean(-1, keepdim=True), 0.0)
        reading, evidence = None, state.evidence
        if with_reading and base.shape[1]:
            # whole numbers: sums of them are the same in pieces and in any company
            so_far = state.evidence[:, None] + (lead.double() * EVIDENCE_UNITS).round().long().cumsum(1)
            evidence = so_far[:, -1]
            weight = (so_far.double() / EVIDENCE_UNITS).softmax(-1)
            reading = weight[..., 0, None] * frame[:, :, 0]
            for species in range(1, frame.shape[2]):
                reading = reading + weight[..., species, None] * frame[:, :, species]
        state = GeneState(line[:, line.shape[1] - self.order :], last, evidence)
        return GenePrediction(log_p, frame, lead, reading), state


def contexts(line: Tensor, order: int) -> Tensor:
    """(b order+l) bases int32, -1 where not known -> (b l) int32: the context before each of the last l, see
    `genes.context_count`: as many of the `order` bases before it as are known without a gap."""
    length = line.shape[1] - order
    code = torch.zeros_like(line[:, order:])
    known = torch.ones_like(code, dtype=torch.bool)
    context = code
    for j in range(1, order + 1):
        digit = line[:, order - j : order - j + length]
        known = known & (digit >= 0)
        code = code + digit * 4 ** (j - 1)
        context = torch.where(known, genes.context_count(j - 1) + code, context)
    return context
