"""Effects of variants from a DNA language model alone: how much less likely is the other allele?

Causal model, any alleles:            s = log p(left ALT right) - log p(left REF right)
Bidirectional model, substitutions:   s = sum_i log p(ALT_i | window without the allele) - log p(REF_i | the same)

in nats, over A, C, G, T alone; the window holds `context` bases of the reference, the allele in its middle. Negative: the
model finds ALT less likely. Alleles of different length are likelihoods of different numbers of bases: about 1.4 nats for each
base that an insertion has more. Models that were made for both strands read both, and the two scores are averaged.

All windows of a variant have one shape, so what the alleles do not change cancels to the bit, and a score does not depend on
what else is scored (`seqlab.inference.classify`).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from seqlab.backbones.strand import average_strands
from seqlab.classifier import reverse_complement
from seqlab.inference.classify import Predictor, padded_length
from seqlab.model import language_model
from seqlab.tokenizers import nucleotide

BASES = slice(nucleotide.A, nucleotide.T + 1)
MOST_MASKED = 16
"""Longest allele that a bidirectional model scores; all of it is masked at once."""


class Variant(NamedTuple):
    """genome (l) uint8 ids; the reference allele is genome[start : start + len(ref)]. alts: ids, or None for what is not scored."""

    genome: np.ndarray
    start: int
    ref: np.ndarray
    alts: list[np.ndarray | None]


class Likelihood(nn.Module):
    """forward(ids (b l), mask (b l)) -> (b) float64: log p of each row's bases but the first, by a causal model."""

    def __init__(self, model: nn.Module, both_strands: bool):
        super().__init__()
        self.model, self.both_strands = model, both_strands
        self.register_buffer("complement", torch.from_numpy(nucleotide.COMPLEMENT.astype(np.int64)), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        there = self._one(ids, mask)
        if not self.both_strands:
            return there
        return 0.5 * (there + self._one(reverse_complement(ids, mask, self.complement), mask))

    def _one(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits, _ = self.model(ids, mask=mask, return_state=False)
        log_p = logits[:, :-1, BASES].float().log_softmax(-1)
        base = ids[:, 1:].long() - nucleotide.A
        counts = mask[:, 1:] & (base >= 0) & (base < 4)
        picked = log_p.gather(2, base.clamp(0, 3)[..., None])[..., 0]
        return torch.where(counts, picked, 0.0).sum(1, dtype=torch.float64)


class MaskedBases(nn.Module):
    """forward(ids (b l), mask (b l)) -> (b MOST_MASKED 4) float32: log p of A, C, G, T at the masked symbols of each row, in
    order, by a bidirectional model; zero after the last of them."""

    def __init__(self, model: nn.Module, both_strands: bool):
        super().__init__()
        self.model, self.both_strands = model, both_strands
        self.register_buffer("complement", torch.from_numpy(nucleotide.COMPLEMENT.astype(np.int64)), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.both_strands:
            logits = average_strands(self.model, self.complement, ids, mask)
        else:
            logits, _ = self.model(ids, mask=mask, return_state=False)
        log_p = logits[..., BASES].float().log_softmax(-1)
        hidden = ids == nucleotide.MASK
        place = hidden.cumsum(1) - 1
        rows, columns = hidden.nonzero(as_tuple=True)
        found = log_p.new_zeros(len(ids), MOST_MASKED, 4)
        found[rows, place[rows, columns]] = log_p[rows, columns]
        return found


def score_variants(
    model: nn.Module,
    variants: Iterable[Variant],
    *,
    context: int,
    device: str = "cpu",
    precision: str = "float32",
    together: int = 256,
) -> Iterator[list[float | None]]:
    """A score for each ALT of each variant, in order; None where there is none to give (see the module and `Variant`).
    `model`: as `load_run` gives it, of a run of `train dna`. `together`: variants looked at at once; changes no score."""
    config = language_model(model).config
    is_causal, both = config.direction == "causal", config.strand == "augment"
    predictor = Predictor((Likelihood if is_causal else MaskedBases)(model, both), device, precision)
    held: list[Variant] = []
    for variant in variants:
        held.append(variant)
        if len(held) == together:
            yield from _score(predictor, held, context, is_causal)
            held = []
    yield from _score(predictor, held, context, is_causal)


def _score(predictor: Predictor, variants: list[Variant], context: int, is_causal: bool) -> list[list[float | None]]:
    rows: dict[int, list[tuple[int, int, np.ndarray]]] = {}  # width -> (variant, allele or 0 for REF, window)
    for v, variant in enumerate(variants):
        windows = dict(_windows(variant, context, is_causal))
        if windows:
            width = padded_length(max(map(len, windows.values())))
            rows.setdefault(width, []).extend((v, allele, window) for allele, window in windows.items())
    found: dict[tuple[int, int], np.ndarray] = {}
    for width, members in rows.items():
        for (v, allele, _), output in zip(members, predictor.padded([window for *_, window in members], width)):
            found[v, allele] = output
    return [[_difference(found, v, variant, i, is_causal) for i in range(len(variant.alts))] for v, variant in enumerate(variants)]


def _windows(variant: Variant, context: int, is_causal: bool) -> Iterator[tuple[int, np.ndarray]]:
    """(0, window of REF or, for a bidirectional model, of what is masked), then (i + 1, window of alts[i])."""
    if all(alt is None for alt in variant.alts) or _base(variant.ref).min(initial=0) < 0 or not len(variant.ref):
        return
    end = variant.start + len(variant.ref)
    before = min(variant.start, max(0, context - len(variant.ref)) // 2)
    left = variant.genome[variant.start - before : variant.start]
    right = variant.genome[end : end + max(0, context - len(variant.ref) - before)]
    if is_causal:
        for i, allele in enumerate([variant.ref, *variant.alts]):
            if allele is not None:
                yield i, np.concatenate([left, allele, right])
    elif len(variant.ref) <= MOST_MASKED:
        yield 0, np.concatenate([left, np.full(len(variant.ref), nucleotide.MASK, np.uint8), right])


def _difference(found: dict, v: int, variant: Variant, i: int, is_causal: bool) -> float | None:
    alt = variant.alts[i]
    if alt is None or (v, 0) not in found:
        return None
    if is_causal:
        return float(found[v, i + 1] - found[v, 0])
    if len(alt) != len(variant.ref):
        return None
    log_p, places = found[v, 0].astype(np.float64), np.arange(len(alt))
    return float((log_p[places, _base(alt)] - log_p[places, _base(variant.ref)]).sum())


def _base(ids: np.ndarray) -> np.ndarray:
    """A C G T = 0 1 2 3, -1 for anything else."""
    base = ids.astype(np.int64) - nucleotide.A
    return np.where((base >= 0) & (base < 4), base, -1)
