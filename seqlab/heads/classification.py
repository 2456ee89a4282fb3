"""The classification head: features of a sequence of any length -> one vector of outputs, in one go or in pieces.

    mean    the mean over real positions, then a linear map. Linear maps and means commute, so this is also the mean of what
            every position says for itself: evidence adds up, and a longer sequence is only less noisy.
    max     the largest value of each feature over real positions
    last    the features of the last real position (of a causal backbone: it has seen everything)
    centre  the features in the middle of the sequence (the mean of the two middle ones where its length is even), for
            sequences that were cut around what is to be judged: of a bidirectional backbone, which has seen everything
            there and from where it is. It needs the whole sequence at once.
    evidence
            (of a causal backbone) `mean`, and beside it Bayes' rule: each class predicts every next base, and the mean of the
            log-probabilities that it gave to the bases that came speaks for it. Predictions of a class are a linear map
            of the features, so all classes cost one pass. Where each class has a model of its own (seqlab/heads/genes.py), the
            linear map is added to what that says. Where repeats are counted (seqlab/heads/repeats.py), their mean counts
            too, by a scale that training leaves at 0 and calibration fits: of training windows every word is counted in
            themselves.

A head makes of features what it adds up with `read`, pools with `pool`, piece by piece, and answers with `forward`; padding (mask False) changes nothing.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pooling = Literal["mean", "max", "last", "centre", "evidence"]
ADDITIVE = ("mean", "evidence")  # pooled by adding positions up


class Pooled(NamedTuple):
    """What a head remembers of the pieces so far."""

    # (b d_model) float64: sum, maximum, or the features of the last real position or the middle; evidence: (b d_model + n_outputs), with repeats (b d_model + 2 n_outputs)
    value: Tensor
    count: Tensor  # (b) float64: real positions


class ClassificationHead(nn.Module):
    """(b l d_model) -> (b n_outputs), float32 whatever the autocast.

    length_scale (mean and evidence): multiply the outputs by exp(s0 + s1 log(length / 1024)), s learned: how much surer one may
    be of a longer sequence. It changes no decision, only the probabilities. s1 begins at 0, for `evidence` at 1, where
    log-probabilities add up as Bayes' rule says; below 1 means that bases are not independent witnesses.
    """

    def __init__(
        self,
        d_model: int,
        n_outputs: int,
        pooling: Pooling = "mean",
        length_scale: bool = False,
        *,
        has_prior: bool = False,
        has_repeats: bool = False,
    ):
        super().__init__()
        if (has_prior or has_repeats) and pooling != "evidence":
            raise ValueError(f"models of each class belong to pooling: evidence, not to {pooling}")
        if length_scale and pooling not in ADDITIVE:
            raise ValueError(f"length_scale belongs to pooling: mean or evidence, not to {pooling}")
        self.pooling, self.d_model = pooling, d_model
        self.linear = nn.Linear(d_model, n_outputs)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        has_evidence = pooling == "evidence"
        self.length_scale = nn.Parameter(torch.tensor([0.0, float(has_evidence)])) if length_scale else None
        self.next_base = nn.Linear(d_model, 4 * n_outputs) if has_evidence else None
        if has_evidence:
            nn.init.normal_(self.next_base.weight, std=0.02)
            nn.init.zeros_(self.next_base.bias)
            # log of how much a nat a base counts beside the linear map; begins so that 400 bases are independent witnesses
            self.gain = nn.Parameter(torch.tensor([6.0]))
        self.prior_scale = nn.Parameter(torch.ones(n_outputs)) if has_prior else None
        # how each class's evidence counts for the others, beside its own: where two predict alike, a third may tell them apart
        self.mix = nn.Parameter(torch.zeros(n_outputs, n_outputs)) if has_prior else None
        # what the repeats of 1,024 bases count, and the exponent with which that grows with the length
        self.register_buffer("repeat_scale", torch.zeros(2) if has_repeats else None)
        if has_prior:
            nn.init.zeros_(self.next_base.weight)  # training begins with what is there

    def read(
        self,
        features: Tensor,
        base: Tensor,
        before: Tensor | None = None,
        prior: Tensor | None = None,
        repeats: Tensor | None = None,
    ) -> Tensor:
        """What `pool`, `prefixes` and `segments` add up: features (b l d_model) as they are; for `evidence` beside them, (b l
        d_model + n_outputs), the log-probabilities (nats) that each class gave to each base, 0 where it is not known.

        base (b l): 0 .. 3, or -1 for anything but A, C, G, T; before (b d_model): the features just left of these, if any
        prior (b l n_outputs 4): log-probabilities that each class begins with, if it has a model of its own
        repeats (b l n_outputs): what the last n_outputs columns are then, if repeats are counted; None: zeros
        """
        if self.next_base is None:
            return features
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            first = torch.zeros_like(features[:, 0]) if before is None else before.float()
            seen = torch.cat([first[:, None], features[:, :-1]], 1)
            logits = F.linear(seen, self.next_base.weight.float(), self.next_base.bias.float()).unflatten(-1, (-1, 4))
            if prior is not None:
                logits = logits + self.prior_scale.float()[:, None] * prior
            chosen = base.clamp(min=0)[..., None, None].expand(*logits.shape[:-1], 1)
            nats = logits.log_softmax(-1).gather(-1, chosen)[..., 0]  # (b l n_outputs)
            parts = [features, torch.where(base[..., None] >= 0, nats, 0.0)]
            if self.repeat_scale is not None:
                parts.append(torch.zeros_like(nats) if repeats is None else repeats)
            return torch.cat(parts, -1)

    def pool(self, features: Tensor, mask: Tensor | None = None, before: Pooled | None = None) -> Pooled:
        """Add a piece of what `read` gave: features (b l d), mask (b l) True at real positions (None: all are)."""
        batch, length, _ = features.shape
        if mask is None:
            count = features.new_full((batch,), length, dtype=torch.float64)
        else:
            count = mask.sum(1, dtype=torch.float64)
        features = features.float()
        if self.pooling in ADDITIVE:
            value = features if mask is None else torch.where(mask[..., None], features, 0.0)
            value = value.sum(1, dtype=torch.float64)
            if before is not None:
                value = before.value + value
        elif self.pooling == "max":
            value = features if mask is None else torch.where(mask[..., None], features, -torch.inf)
            value = value.amax(1).double()
            if before is not None:
                value = torch.maximum(before.value, value)
        elif self.pooling == "centre":
            if before is not None:
                raise ValueError("pooling: centre needs the whole sequence at once")
            middle = torch.stack([(count - 1) / 2, count / 2], 1).long().clamp(min=0)  # (b 2), equal for an odd length
            value = features.gather(1, middle[..., None].expand(-1, -1, features.shape[2])).mean(1).double()
        else:
            if mask is None:
                value = features[:, -1].double()
            else:
                last = (torch.arange(length, device=mask.device) * mask).amax(1)
                value = features.gather(1, last[:, None, None].expand(-1, 1, features.shape[2]))[:, 0].double()
                if before is not None:  # a piece of padding alone says nothing
                    value = torch.where(count[:, None] > 0, value, before.value)
        return Pooled(value, count if before is None else before.count + count)

    def forward(self, pooled: Pooled) -> Tensor:
        """Outputs (b n_outputs) of what has been pooled. A sequence without any position answers with the bias."""
        count = pooled.count.clamp(min=1.0)
        value = pooled.value / count[:, None] if self.pooling in ADDITIVE else pooled.value
        value = torch.where(pooled.count[:, None] > 0, value, 0.0).float()
        return self._outputs(value, count)

    def prefixes(self, features: Tensor, ends: Tensor, mask: Tensor | None = None) -> Tensor:
        """Outputs (b k n_outputs) for the first ends[j] positions of each row: features (b l d) of a causal
        backbone, as `read`, ends (k) in 1 .. l. A row with fewer real positions (padded on the right) answers for all it has."""
        if self.pooling in ("max", "centre"):
            raise ValueError(f"pooling: {self.pooling} has no outputs for prefixes; use mean, evidence or last")
        features, ends = features.float(), ends.to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            if self.pooling == "last":
                at = (ends - 1).expand(features.shape[0], -1)
                if mask is not None:
                    at = torch.minimum(at, (mask.sum(1, keepdim=True) - 1).clamp(min=0))
                return self.linear(features.gather(1, at[..., None].expand(-1, -1, features.shape[2])))
            # sums of the stretches between two ends, then sums of those: nothing of (b l n_outputs) is accumulated
            if mask is not None:
                features = torch.where(mask[..., None], features, 0.0)
            edges = [0, *ends.tolist()]
            sums = torch.stack([features[:, a:b].sum(1) for a, b in zip(edges, edges[1:])], 1).cumsum(1)
            count = ends.float().expand(features.shape[0], -1)
            if mask is not None:
                count = torch.minimum(count, mask.sum(1, keepdim=True).float()).clamp(min=1.0)
        return self._outputs(sums / count[..., None], count)

    def segments(self, features: Tensor, size: int, mask: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Outputs for parts of each row (pooling: mean or evidence): of every stretch of `size` positions, of every two of them, of every
        four, ... up to the whole. A list of (outputs (b k n_outputs), whether there is anything in it (b k)), finest first."""
        if self.pooling not in ADDITIVE:
            raise ValueError(f"segments need pooling: mean or evidence, not {self.pooling}")
        batch, length, width = features.shape
        features = features.float()
        real = features.new_ones(batch, length) if mask is None else mask.float()
        if mask is not None:
            features = torch.where(mask[..., None], features, 0.0)
        pieces = -(-length // size)
        missing = pieces * size - length
        if missing:
            features, real = F.pad(features, (0, 0, 0, missing)), F.pad(real, (0, missing))
        value = features.reshape(batch, pieces, size, width).sum(2)
        count = real.reshape(batch, pieces, size).sum(2)
        levels = []
        while True:
            at_least_one = count.clamp(min=1.0)
            levels.append((self._outputs(value / at_least_one[..., None], at_least_one), count > 0))
            if count.shape[1] == 1:
                return levels
            if count.shape[1] % 2:
                value, count = F.pad(value, (0, 0, 0, 1)), F.pad(count, (0, 1))
            value = value.reshape(batch, -1, 2, width).sum(2)
            count = count.reshape(batch, -1, 2).sum(2)

    def _outputs(self, value: Tensor, count: Tensor) -> Tensor:
        with torch.autocast(value.device.type, enabled=False):
            mine = value[..., : self.d_model].contiguous()  # rows of another stride are rounded by where they lie in memory
            outputs = F.linear(mine, self.linear.weight.float(), self.linear.bias.float())
            if self.next_base is not None:
                n = outputs.shape[-1]
                evidence = _centred(value[..., self.d_model : self.d_model + n])
                if self.mix is not None:
                    evidence = evidence + F.linear(evidence, self.mix.float())
                outputs = outputs + self.gain.float().exp() * evidence
            if self.length_scale is not None:
                s0, s1 = self.length_scale.float()
                outputs = outputs * torch.exp(s0 + s1 * (count.float() / 1024.0).log())[..., None]
            if self.repeat_scale is not None:
                scale, exponent = self.repeat_scale.float()
                scale = scale * torch.exp(exponent * (count.float() / 1024.0).log())
                outputs = outputs + scale[..., None] * _centred(value[..., self.d_model + n :])
            return outputs


def _centred(x: Tensor) -> Tensor:
    """Less the mean over classes: what all share decides nothing, and may be large."""
    x = x.contiguous()
    return x - x.mean(-1, keepdim=True)


def evenly_spread_ends(length: int, first: int) -> list[int]:
    """Prefix lengths first, 2 first, 4 first, ... below `length`, and `length` itself."""
    doublings = max(0, math.ceil(math.log2(length / first))) if length > first else 0
    return [first << i for i in range(doublings)] + [length]
