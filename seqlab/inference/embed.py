"""One vector a sequence: the mean of the last layer's features, from a language model or a classifier of nucleotides.

    e = sum_t [x_t in A C G T] y_t / sum_t [x_t in A C G T]          y_t (d_model): after the final norm, before any head

Positions of N and other symbols are read and not counted. A model that was made for both strands (`strand` augment, average or
equivariant) reads both, and the mean of both is the same for a sequence and its reverse complement. Sequences of any length and
answers that do not depend on the company: as in `seqlab.inference.classify`, whose tiles and pieces these are. A bidirectional
model reads each piece of a long sequence for itself.
"""

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from seqlab.classifier import SequenceClassifier, reverse_complement
from seqlab.inference.classify import Predictor, groups
from seqlab.model import language_model
from seqlab.tokenizers import nucleotide


class Sums(NamedTuple):
    """Of what was fed so far: the model's own state, the sum of features (b d_model) float64 and the number of bases (b 1)."""

    model: object
    features: Tensor
    bases: Tensor


class MeanFeatures(nn.Module):
    """forward(ids (b l), mask (b l) or None) -> (b d_model): a trained model, seen as `Predictor` sees a classifier."""

    head = SimpleNamespace(pooling="mean")

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model if isinstance(model, SequenceClassifier) else language_model(model)
        self.reads_both_strands = self.model.config.strand in ("augment", "average", "equivariant")
        self.register_buffer("complement", torch.from_numpy(nucleotide.COMPLEMENT.astype(np.int64)), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.reads_both_strands:
            return self.finish(self.feed(ids, mask))
        both = torch.cat([ids, reverse_complement(ids, mask, self.complement)])  # (2b l)
        there, back = self.finish(self.feed(both, None if mask is None else mask.repeat(2, 1))).chunk(2)
        return 0.5 * (there + back)

    def feed(self, ids: Tensor, mask: Tensor | None = None, state: Sums | None = None, more: bool = False) -> Sums:
        """One piece of one strand, in order. `more`: further pieces follow."""
        carried = more and self.model.backbone.is_causal
        before = None if state is None else state.model
        if isinstance(self.model, SequenceClassifier):
            features = self.model.features(ids, mask, before, carried)
            y, after = features.value, None
            if more:
                after = self.model.next_state(ids, features, before, pooled=None, carried=carried)
        else:
            y, after, _ = self.model.read(ids, before, mask, carried)
        counts = (ids >= nucleotide.A) & (ids <= nucleotide.T)
        if mask is not None:
            counts &= mask
        total = torch.where(counts[..., None], y, 0.0).sum(1, dtype=torch.float64)
        bases = counts.sum(1, keepdim=True)
        return Sums(after, total, bases) if state is None else Sums(after, total + state.features, bases + state.bases)

    def finish(self, state: Sums) -> Tensor:
        return (state.features / state.bases).float()  # NaN where there is no base


def embed_records(
    model: nn.Module,
    records: Iterable[tuple[str, np.ndarray]],
    *,
    device: str = "cpu",
    precision: str = "auto",
    batch_size: int = 1024,
    batch_bases: int = 1 << 26,
) -> Iterator[tuple[str, np.ndarray, int]]:
    """(name, embedding (d_model) float32, length) of each record (name, ids (l) uint8), in order; NaN for a record without any
    A, C, G or T. `model`: as `load_run` gives it, of a run of `train dna`, `species` or `classify`."""
    predictor = Predictor(MeanFeatures(model), device, precision)
    for group in groups(records, batch_size, batch_bases):
        for (name, ids), vector in zip(group, predictor.batch([ids for _, ids in group])):
            yield name, vector, len(ids)
