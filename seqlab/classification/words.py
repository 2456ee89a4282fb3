"""Fit what words say of a sequence beside a species model's network: likeness to known genomes, and k-mer regression
(seqlab/heads/homology.py). Both learn from windows of the training split, after the network has been trained.

Likeness has to be learnt from windows as they will come: in most of them a species is to be named whose genome, as it is kept, lacks that very
place. So the fold in which a training window lies is left out of its own genome. Of half of these windows the same fold of every genome
is left out, as blocks are held out side by side, of the others another fold of each; every genome lacks one of its folds, so that none
is known by what it holds by chance. For one window in five its place is not left out, as of reads of the very strain that was kept; half of those
are read with up to 6 % of substitutions, as of another strain. The log-odds are fitted beside the gene models' evidence
(themselves fitted without the window's fold), so that they say what that does not.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqlab import genes, homology
from seqlab.classification.windows import ClassWindows, Windows
from seqlab.classifier import SequenceClassifier
from seqlab.heads.homology import LONGEST, STRETCH, Composition, Homology
from seqlab.report import in_words
from seqlab.tokenizers import nucleotide

KNOWN_SHARE, STRAIN_SHARE, MOST_SUBSTITUTIONS = 0.2, 0.5, 0.06
PARALLEL_SHARE = 0.5  # of the windows whose place is left out: in all genomes side by side
STEPS, BATCH, RATE, DECAY, CLIP = 1500, 512, 3e-3, 0.1, 1.0  # of fitting the network of likeness, at most so many steps
FEWEST_STEPS, EPOCHS = 100, 40  # few windows are learnt by heart: of 820 as many steps leave 0.237 nats on others, 100 leave 0.231
PENALTY = 0.1  # on the squares of the k-mer regression's weights, of shares in standard deviations
SHORTEST_COMPOSITION = 1024  # bases; shares of k-mers of shorter windows are noise, or the longest ones if none are so long
COMPOSITION_SHARE = 3  # as many bases as for likeness: k-mers by frame are 16,384 numbers, which more windows always make surer
MOST_WINDOWS = 48_000  # of a length
MOST_MEASURED = 4_000  # of them are looked at for how much the counts vary
FORWARD = 1 << 18  # bases at a time


@dataclass(frozen=True)
class Learning:
    """Training windows of one length, label (n): the bases (n) and the counts of words (n m) of which likeness is judged, evidence of the gene
    models (nats, less its mean), shares of k-mers; what a model does not have has no columns."""

    label: Tensor
    length: Tensor
    counts: Tensor
    evidence: Tensor
    shares: Tensor


def fit(
    model: SequenceClassifier, windows: ClassWindows, lengths: list[int], tokens: int, seed: int, say: Callable[[str], None] = lambda text: None
) -> None:
    """Fit model.homology and model.composition, on the device of the model, from about `tokens` bases of random windows of the
    training split, as many of each length (of those that composition alone learns from, COMPOSITION_SHARE times as many); `say` is told what is done. Their scales stay 0: that is for calibration."""
    store, device = windows.store, model.head.linear.bias.device
    genomes = [[nucleotide.DIGITS[store.tokens[a:b]] for a, b in mine.tolist()] for mine in windows.intervals]
    places = _Places(windows)
    indices, since = None, time.perf_counter()
    if model.homology is not None:
        model.homology.keep(homology.keep(genomes, model.homology.capacity))
        indices = model.homology.indices(places.blocks)
    learnt, least = [], min(SHORTEST_COMPOSITION, max(lengths))
    if model.composition is None:
        lengths = [length for length in lengths if length <= STRETCH]
    for number, length in enumerate(lengths):
        rng = np.random.Generator(np.random.Philox(key=[seed, number]))
        share = tokens if length <= STRETCH else COMPOSITION_SHARE * tokens
        drawn = windows.sample(rng, int(np.clip(share // len(lengths) // length, 64, MOST_WINDOWS)), length)
        learnt.append(_look(model, windows, drawn, places, indices, rng, least))
    del indices
    number = sum(len(part.label) for part in learnt)
    say(f"{number:,} training windows of {in_words(lengths)} bases looked up in {time.perf_counter() - since:.0f} s")
    since = time.perf_counter()
    torch_rng = torch.Generator(device="cpu").manual_seed(seed)
    if model.homology is not None:
        _fit_homology(model.homology, [part for part in learnt if part.counts.shape[1]], torch_rng)
        say(f"likeness fitted in {time.perf_counter() - since:.0f} s")
        since = time.perf_counter()
    if model.composition is not None:
        chosen = [(length, part) for length, part in zip(lengths, learnt) if length >= least]
        _fit_composition(model.composition, [part for _, part in chosen], [length for length, _ in chosen])
        say(f"composition fitted in {time.perf_counter() - since:.0f} s")
    model.to(device)


def fit_lengths(windows: ClassWindows, shortest: int) -> list[int]:
    """Half of `shortest` (the shortest window of training), or a quarter of a stretch if that is less, and doublings as far as LONGEST and
    a fold's blocks go. Likeness is fitted to those of a stretch at most, composition to those of SHORTEST_COMPOSITION and more."""
    most = min(LONGEST, int(_Places(windows).blocks.min()), windows.longest())
    lengths = [max(2, min(shortest, STRETCH // 2) // 2)]
    while 2 * lengths[-1] <= most:
        lengths.append(2 * lengths[-1])
    return lengths


class _Places:
    """Where in its genome a window of the training split lies. blocks (species): bases of a fold at a time."""

    def __init__(self, windows: ClassWindows):
        self.blocks = np.array([homology.block_size(int((mine[:, 1] - mine[:, 0]).sum())) for mine in windows.intervals])
        rows = []
        for mine in windows.intervals:
            before = np.cumsum([0, *(genes.pieces_of(int(b - a)) for a, b in mine)])
            rows += [(int(a), int(n)) for (a, _), n in zip(mine, before)]
        self.starts, self.before = np.array(sorted(rows)).T

    def gene_fold(self, drawn: Windows) -> np.ndarray:
        at = np.searchsorted(self.starts, drawn.start, side="right") - 1
        return genes.fold_of(drawn.start - self.starts[at], self.before[at])

    def folds(self, drawn: Windows) -> tuple[np.ndarray, np.ndarray]:
        """(n), (n): the folds of a window's first and last base."""
        offset = drawn.start - self.starts[np.searchsorted(self.starts, drawn.start, side="right") - 1]
        block = self.blocks[drawn.label]
        return homology.fold_of(offset, block), homology.fold_of(offset + drawn.length - 1, block)

    def allowed(self, drawn: Windows, known: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(n species) int64: bits of the folds of each genome that a window is looked up in; known (n): its own place is among them."""
        n, rows = len(drawn), np.arange(len(drawn))
        first, last = self.folds(drawn)
        without = rng.integers(0, homology.FOLDS, (n, len(self.blocks)))
        parallel = ~known & (rng.random(n) < PARALLEL_SHARE)
        without[parallel] = first[parallel, None]
        elsewhere = (first + np.where((first + 1) % homology.FOLDS == last, 2, 1)) % homology.FOLDS
        without[rows, drawn.label] = np.where(known, elsewhere, first)
        allowed = ((1 << homology.FOLDS) - 1) & ~(1 << without)
        allowed[rows, drawn.label] &= np.where(known, -1, ~(1 << last))
        return allowed


@torch.no_grad()
def _look(
    model: SequenceClassifier, windows: ClassWindows, drawn: Windows, places: _Places, indices, rng: np.random.Generator, least: int
) -> Learning:
    """`least`: k-mers of shorter windows are not counted."""
    n_species, device = len(windows.classes), model.head.linear.bias.device
    known = rng.random(len(drawn)) < KNOWN_SHARE
    rate = np.where(known & (rng.random(len(drawn)) < STRAIN_SHARE), rng.random(len(drawn)) * MOST_SUBSTITUTIONS, 0.0)
    allowed = torch.from_numpy(places.allowed(drawn, known, rng)).to(device)
    fold = torch.from_numpy(places.gene_fold(drawn)).to(device)
    columns: list[tuple[Tensor, ...]] = []
    composition = model.composition if int(drawn.length.max(initial=0)) >= least else None
    if int(drawn.length.max(initial=0)) > STRETCH:
        indices = None
    for part, base in batches(windows, drawn, device):
        none = base.new_zeros(len(base), 0, dtype=torch.float32)
        counts, shares = none, none
        if indices is not None:
            changed = torch.from_numpy((rng.random(base.shape) < rate[part, None]) * rng.integers(1, 4, base.shape)).to(device)
            line = torch.where(base >= 0, (base + changed) % 4, -1)
            line = F.pad(line, (homology.REACH, 0), value=-1)
            counts = homology.count(indices, line, base.shape[1], n_species, allowed[part]).to(torch.int16)
        if composition is not None:
            shares = composition.shares(composition.count(base, reading=reading(model, base, fold[part]))).float()
        columns.append((counts, none if indices is None else gene_evidence(model, base, fold[part]), shares))
    counts, evidence, shares = (torch.cat(column) for column in zip(*columns))
    label, length = (torch.from_numpy(column).to(device) for column in (drawn.label, drawn.length))
    return Learning(label, length, counts, evidence, shares)


def batches(windows: ClassWindows, drawn: Windows, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """(which windows, their bases (b l) int64: 0 to 3, -1 where not known or beyond the end)."""
    rows = max(1, FORWARD // int(drawn.length.max(initial=1)))
    for at in range(0, len(drawn), rows):
        digits = torch.from_numpy(nucleotide.DIGITS[drawn[at : at + rows].tokens(windows.store)[0]]).to(device).long()
        yield slice(at, at + rows), torch.where(digits < 4, digits, -1)


def other_strand(base: Tensor) -> Tensor:
    """Of whole sequences (b l): 0 to 3, -1 where not known."""
    return torch.where(base >= 0, 3 - base, -1).flip(1)


@torch.no_grad()
def reading(model: SequenceClassifier, base: Tensor, fold: Tensor | None = None) -> Tensor | None:
    """See `GenePredictor`: of whole sequences (b l), one strand; None without gene models."""
    return None if model.genes is None else model.genes(base, fold=fold, with_reading=True)[0].reading


def gene_evidence(model: SequenceClassifier, base: Tensor, fold: Tensor) -> Tensor:
    """(b n_species) float32: log-likelihoods of the gene models, mean of both strands, less the mean over species; 0 without them."""
    if model.genes is None:
        return base.new_zeros(len(base), model.head.linear.out_features, dtype=torch.float32)
    lead = [model.genes(strand, fold=fold)[0].lead.double().sum(1) for strand in (base, other_strand(base))]
    return (0.5 * (lead[0] + lead[1])).float()


def fit_steps(windows: int) -> int:
    """Steps of fitting the network of likeness to so many windows."""
    return min(STEPS, max(FEWEST_STEPS, EPOCHS * windows // BATCH))


def _fit_homology(part: Homology, learnt: list[Learning], rng: torch.Generator) -> None:
    """By Adam on the cross-entropy of evidence and log-odds together, as many windows of each length in a step. What each species' evidence
    lacks on the whole is fitted beside, and forgotten: where nothing is found, likeness has nothing to say."""
    device = part.scale.device
    some = [part.inputs(one.counts[:MOST_MEASURED].float(), one.length[:MOST_MEASURED].float()) for one in learnt]
    for columns, centre, spread in zip(zip(*some), (part.own_centre, part.pair_centre), (part.own_spread, part.pair_spread)):
        values = torch.cat(columns).flatten(0, -2)
        centre.copy_(values.mean(0))
        spread.copy_(values.std(0) + 0.05)
    part.start_anew(rng)
    part.requires_grad_(True).train()
    gain = torch.nn.Parameter(torch.zeros(len(learnt), device=device) - 1.0)  # log of what a nat of the gene models counts, by length
    bias = torch.nn.Parameter(torch.zeros(part.n_species, device=device))
    weights = list(part.parameters())
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": DECAY}, {"params": [gain, bias], "weight_decay": 0.0}], lr=RATE)
    steps = fit_steps(sum(len(one.label) for one in learnt))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    each = max(1, BATCH // len(learnt))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(int(torch.randint(1 << 31, (), generator=rng)))  # dropout
        for _ in range(steps):
            rows = [torch.randint(len(one.label), (each,), generator=rng).to(device) for one in learnt]
            counts, length = (torch.cat([getattr(one, name)[row] for one, row in zip(learnt, rows)]).float() for name in ("counts", "length"))
            evidence = torch.cat([one.evidence[row] * g.exp() for one, row, g in zip(learnt, rows, gain)])
            label = torch.cat([one.label[row] for one, row in zip(learnt, rows)])
            answers = evidence + bias + part.log_odds(part.inputs(counts, length))  # (members b n_species)
            loss = F.cross_entropy(answers.flatten(0, 1), label.repeat(len(answers))) * len(answers)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*weights, gain, bias], CLIP * len(answers) ** 0.5)
            optimizer.step()
            schedule.step()
    part.requires_grad_(False).eval()


def _fit_composition(part: Composition, learnt: list[Learning], lengths: list[int]) -> None:
    """Logistic regression with a penalty; each length counts as much as another. What a k-mer is weighed in is the noise of its count in
    1,024 bases; longer windows have less of it, so their log-odds are larger, by the root of the length."""
    shares = torch.cat([one.shares for one in learnt])
    label = torch.cat([one.label for one in learnt])
    weight = torch.cat([torch.full((len(one.label),), 1 / len(one.label) / len(learnt)) for one in learnt]).to(shares)
    gain = torch.cat([torch.full((len(one.label), 1), (n / 1024) ** 0.5) for one, n in zip(learnt, lengths)]).to(shares)
    centre = shares.mean(0)
    spread = (centre * 1024 + 0.05).sqrt() / 1024
    x = shares.sub_(centre).div_(spread).mul_(gain)
    w = torch.zeros_like(part.weight, requires_grad=True)
    bias = torch.zeros(len(w), device=w.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, bias], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (F.cross_entropy(F.linear(x, w, bias), label, reduction="none") * weight).sum() + PENALTY * w.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    part.weight.copy_(w.detach() / spread)
    part.centre.copy_(centre)
