"""DNA language modelling: next base (causal) or masked base (bidirectional), on a prepared genome.

One record: a window of `context` bases of one sequence, as ids, for example ACGTNa -> 7 8 9 10 11 7 (a lower-case base
is soft-masked: same id, and `data.soft_mask_weight` in the loss).

Split rule: by blocks, by sequence or by a BED file, decided by `seqlab prep dna`; no window crosses a split border, so no
base of the validation or test split is ever read in training.

Bits per base are over A, C, G and T only, in training too: the softmax runs over those four logits, and positions whose
true symbol is anything else are not scored.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from seqlab.backbones.strand import average_strands
from seqlab.dataset import SequenceSampler, TokenStore, WindowSampler, eval_windows
from seqlab.errors import UserError
from seqlab.heads.language import weighted_cross_entropy
from seqlab.markov import MarkovModels
from seqlab.model import ModelConfig, build_model, language_model
from seqlab.tokenizers import nucleotide
from seqlab.training.config import TrainConfig, step_seed
from seqlab.training.optim import OptimConfig
from seqlab.training.task import Batch

FIRST_BASE, LAST_BASE = nucleotide.BASES[0], nucleotide.BASES[-1]  # A, C, G, T are consecutive ids


@dataclass(frozen=True)
class DataConfig:
    context: int | Literal["whole"] = 1024  # bases; whole: each sequence from end to end, however long
    soft_mask_weight: float = 1.0  # weight of soft-masked (lower-case) bases in the loss; the field also uses 0.1
    length_warmup_start: int | None = None  # first context of a length warm-up by doubling; null: none
    length_warmup: float = 0.3  # share of max_steps spent below the full context

    def __post_init__(self) -> None:
        full = math.inf if self.context == "whole" else self.context
        if full < 2:
            raise ValueError(f"context: must be 2 or more, or whole, got {self.context}")
        if not 0 <= self.soft_mask_weight:
            raise ValueError(f"soft_mask_weight: must be 0 or more, got {self.soft_mask_weight}")
        if self.length_warmup_start is not None and not 2 <= self.length_warmup_start <= full:
            raise ValueError(f"length_warmup_start: must lie in 2 .. context, got {self.length_warmup_start}")
        if not 0 < self.length_warmup < 1:
            raise ValueError(f"length_warmup: must lie in (0, 1), got {self.length_warmup}")


@dataclass(frozen=True)
class MaskingConfig:
    """Masked language modelling (bidirectional models). `bases` masks and replaces among A, C, G, T only; `vocabulary`
    is the published variant: any position may be chosen, replacements come from all 12 symbols."""

    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    replacements: Literal["bases", "vocabulary"] = "bases"

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate: must lie in (0, 1), got {self.rate}")
        if self.mask < 0 or self.random < 0 or self.mask + self.random > 1:
            raise ValueError(f"mask and random: must be 0 or more and together at most 1, got {self.mask}, {self.random}")


@dataclass(frozen=True)
class EvalConfig:
    contexts: tuple[int, ...] = ()  # empty: 64, 256, 1024, ... to the longest that the split holds
    max_context: int = 1_048_576
    max_bases: int | None = 2_000_000  # at most this many bases of the split, evenly spread; null: all
    max_order: int = 12  # Markov models of order 0 to this
    average_strands: bool = True  # bidirectional models with strand: augment

    def __post_init__(self) -> None:
        if not 0 <= self.max_order <= 12:
            raise ValueError(f"max_order: must lie in 0 .. 12, got {self.max_order}")
        if any(c < 2 for c in self.contexts):
            raise ValueError(f"contexts: each must be 2 or more, got {list(self.contexts)}")


@dataclass(frozen=True)
class DnaConfig:
    """One run of `seqlab train dna`."""

    task: Literal["dna"] = "dna"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        sharing = self.train.context_parallel
        if self.data.context == "whole":  # the data decide what a step holds
            return
        if self.data.context > self.train.tokens_per_step:
            raise ValueError(
                f"data.context: {self.data.context} is more than train.tokens_per_step {self.train.tokens_per_step}; "
                "raise train.tokens_per_step to at least the context"
            )
        if (self.train.tokens_per_step // self.data.context) % (self.train.devices // sharing):
            raise ValueError(
                f"train.devices: {self.train.tokens_per_step // self.data.context} windows a step cannot be shared "
                f"evenly by {self.train.devices} devices"
                + (f", {sharing} to a window" if sharing > 1 else "")
                + "; change train.tokens_per_step"
            )
        shortest = self.data.length_warmup_start or self.data.context
        if sharing > shortest:
            raise ValueError(f"train.context_parallel: {sharing} devices cannot share a window of {shortest} bases")


class LanguageObjective:
    """What is asked of a DNA language model: the model and its loss. No data: this much is enough to plan a run."""

    metric = "bits per base"
    positionwise = True

    def __init__(self, config: DnaConfig):
        self.config = config
        self.is_causal = config.model.direction == "causal"

    def build_model(self) -> nn.Module:
        return build_dna_model(self.config.model)

    def resolved_config(self) -> DnaConfig:
        return self.config

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, _ = model(batch["ids"], return_state=False)
        return self.piece_loss(logits, batch, 0, logits.shape[1])

    def piece_loss(self, output: Tensor, batch: Batch, start: int, stop: int) -> tuple[Tensor, Tensor]:
        piece = slice(start, stop)
        return weighted_cross_entropy(
            output[..., FIRST_BASE : LAST_BASE + 1], base_index(batch["target"][:, piece]), batch["weight"][:, piece]
        )

    def weight(self, batch: Batch) -> float:
        return batch["weight"].sum().item()

    def tokens(self, batch: Batch) -> int:
        return batch["ids"].numel()

    def metric_value(self, mean_loss: float) -> float:
        return mean_loss / math.log(2)


class LanguageModeling(LanguageObjective):
    """The task that `seqlab.training` trains; see seqlab/training/task.py for the protocol."""

    def __init__(self, config: DnaConfig, store: TokenStore):
        super().__init__(config)
        self.store = store
        self._samplers: dict[tuple[int, int, int], WindowSampler | SequenceSampler] = {}
        self.extra = 1 if self.is_causal else 0  # a causal window holds one base more: the last target
        if config.data.context == "whole":
            self.context = SequenceSampler(store, "train", 1).longest - self.extra
            sizes = store.intervals("train")
            self._longest_window = int((sizes[:, 1] - sizes[:, 0]).max()) - self.extra
        else:
            self.context = self._longest_window = config.data.context
            self._sampler(self.context, 0, 1)  # fails now, not at the first step, if no window fits

    @property
    def longest_row(self) -> int:
        """Positions of the longest row of any batch."""
        return self.context

    # -- data ------------------------------------------------------------------------------------------------------
    def context_at(self, step: int) -> int:
        """Context of a step: doubling stages of equal length, then the full context (length warm-up)."""
        data = self.config.data
        if data.length_warmup_start is None:
            return self.context
        stages = max(1, math.ceil(math.log2(self.context / data.length_warmup_start)))
        stage_steps = max(1, int(self.config.train.max_steps * data.length_warmup / stages))
        context = min(self.context, data.length_warmup_start << min(step // stage_steps, stages))
        # whole sequences with a split in blocks: what is longer than the blocks is the whole already
        return context if context <= self._longest_window else self.context

    def _sampler(self, context: int, rank: int, world_size: int) -> WindowSampler | SequenceSampler:
        key = (context, rank, world_size)
        if key not in self._samplers:
            options = {
                "seed": self.config.train.seed,
                "rank": rank,
                "world_size": world_size,
                "reverse_complement": self.config.model.strand == "augment",
                "soft_mask": self.config.data.soft_mask_weight != 1.0,
            }
            count = self.config.train.tokens_per_step // context
            if self.config.data.context == "whole":
                count = max(1, count // world_size) * world_size
            if self.config.data.context == "whole" and context == self.context:
                self._samplers[key] = SequenceSampler(self.store, "train", count, **options)
            else:
                self._samplers[key] = WindowSampler(self.store, "train", context, count, extra=self.extra, **options)
        return self._samplers[key]

    def train_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        context = self.context_at(step)
        windows = self._sampler(context, rank, world_size).batch(step)
        if isinstance(windows, list):  # whole sequences, each of its own length
            return [self._windows_batch(w, step, rank * len(windows) + i) for i, w in enumerate(windows)]
        micro = self.config.train.micro_batch_tokens or windows["tokens"].size
        rows, count = max(1, micro // context), len(windows["tokens"])
        parts = [{key: value[i : i + rows] for key, value in windows.items()} for i in range(0, count, rows)]
        return [self._windows_batch(part, step, rank * count + i * rows) for i, part in enumerate(parts)]

    def _windows_batch(self, windows: dict[str, np.ndarray], step: int, first: int) -> Batch:
        """A batch of a sampler's windows. The masks of a row depend on the row alone, its number in the step (`first` for the
        first one), not on how rows are dealt to ranks or micro-batches."""
        tokens = windows["tokens"]
        rngs = None if self.is_causal else [self._rng(step, first + row) for row in range(len(tokens))]
        return {
            **self._batch(tokens, windows.get("soft_mask"), rngs),
            "start": torch.from_numpy(windows["start"]),
        }

    def _rng(self, *parts: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=step_seed(self.config.train.seed, *parts)))

    def _batch(self, tokens: np.ndarray, soft: np.ndarray | None, rngs: list[np.random.Generator] | None) -> Batch:
        """ids, target, weight, each (b l); a causal model's target is the next base, else the masked one, with masks from
        a generator for each row."""
        if self.is_causal:
            ids, target = tokens[:, :-1], tokens[:, 1:]
            soft = None if soft is None else soft[:, 1:]
            weight = is_base(target)
        else:
            masked = [mask_tokens(row, self.config.masking, rng) for row, rng in zip(tokens, rngs, strict=True)]
            ids, chosen = (np.stack(parts) for parts in zip(*masked))
            target = tokens
            weight = chosen & is_base(target)
        weight = weight.astype(np.float32)
        if soft is not None:
            weight = np.where(soft, weight * self.config.data.soft_mask_weight, weight).astype(np.float32)
        return {
            "ids": torch.from_numpy(np.ascontiguousarray(ids)),
            "target": torch.from_numpy(np.ascontiguousarray(target)),
            "weight": torch.from_numpy(weight),
        }

    def validation_batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """The validation split in windows of the training context, thinned evenly to validation_tokens."""
        sizes = self.store.intervals("valid")
        context = min(self.context, max(1, int((sizes[:, 1] - sizes[:, 0]).max(initial=0)) - self.extra))
        windows = [w for w in eval_windows(self.store, "valid", context, extra=self.extra)]
        full = [w for w in windows if w[1] - w[0] == context + self.extra]
        windows = thin(full or windows[:1], max(1, self.config.train.validation_tokens // context))
        rows = max(1, (self.config.train.micro_batch_tokens or self.config.train.tokens_per_step) // context)
        mine = windows[rank::world_size]
        for i in range(0, len(mine), rows):
            chunk = mine[i : i + rows]
            tokens = np.stack([self.store.tokens[start:end] for start, end in chunk])
            soft = None
            if self.config.data.soft_mask_weight != 1.0:
                soft = np.stack([self.store.soft_mask(start, end) for start, end in chunk])
            if self.is_causal:
                yield self._batch(tokens, soft, None)
            else:
                starts = np.array([start for start, _ in chunk])
                yield evaluation_mask_batch(tokens, starts, self.config.masking.rate)

    def describe(self, batch: Batch) -> str:
        starts = batch.get("start")
        if starts is None:
            return "validation windows"
        places = [self.store.locate(int(start)) for start in starts[:3]]
        more = f" and {len(starts) - 3} more" if len(starts) > 3 else ""
        return "windows at " + ", ".join(f"{name}:{position}" for name, position in places) + more


def example_batch(config: DnaConfig, rows: int, length: int) -> Batch:
    """Random bases in a batch's clothes, for the planner and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(FIRST_BASE, LAST_BASE + 1, (rows, length), dtype=torch.uint8, generator=generator)
    if config.model.direction == "causal":
        return {"ids": tokens, "target": tokens.roll(-1, 1), "weight": torch.ones(rows, length)}
    chosen = torch.rand(rows, length, generator=generator) < config.masking.rate
    return {"ids": tokens.where(~chosen, nucleotide.MASK), "target": tokens, "weight": chosen.float()}


def build_dna_model(config: ModelConfig) -> nn.Module:
    return build_model(config, torch.from_numpy(nucleotide.COMPLEMENT.astype(np.int64)))


def is_base(tokens: np.ndarray) -> np.ndarray:
    return (tokens >= FIRST_BASE) & (tokens <= LAST_BASE)


def base_index(target: Tensor) -> Tensor:
    """Token ids to 0..3; anything that is not a base (weight 0) becomes 0."""
    return (target.long() - FIRST_BASE).clamp(0, 3)


def mask_tokens(
    tokens: np.ndarray, masking: MaskingConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking (Devlin et al. 2018, section 3.1): (ids with some replaced, which positions were chosen)."""
    u = rng.random(tokens.shape, dtype=np.float32)
    chosen = u < masking.rate
    if masking.replacements == "bases":
        chosen &= is_base(tokens)
        replacement = rng.integers(FIRST_BASE, LAST_BASE + 1, tokens.shape, dtype=np.uint8)
    else:
        replacement = rng.integers(0, nucleotide.VOCAB_SIZE, tokens.shape, dtype=np.uint8)
    share = u / masking.rate  # uniform in [0, 1) where chosen
    ids = np.where(chosen & (share < masking.mask), np.uint8(nucleotide.MASK), tokens)
    swap = chosen & (share >= masking.mask) & (share < masking.mask + masking.random)
    return np.where(swap, replacement, ids), chosen


def evaluation_mask(starts: np.ndarray, length: int, rate: float) -> np.ndarray:
    """(b length) bool: the positions that are masked and scored, a fixed function of the position in the genome, so
    every context length and every run scores the same bases."""
    position = (starts[:, None] + np.arange(length)).astype(np.uint64)
    # splitmix64: a good hash of a counter (Steele, Lea, Flood 2014)
    position = (position + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    position ^= position >> np.uint64(31)
    position *= np.uint64(0x94D049BB133111EB)
    position ^= position >> np.uint64(29)
    return (position >> np.uint64(11)).astype(np.float64) / 2.0**53 < rate


def hidden_in_evaluation(masking: MaskingConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Global positions (n) -> which of them a masked model is not shown in evaluation, (n) bool."""
    return lambda positions: evaluation_mask(positions, 1, masking.rate)[:, 0]


def evaluation_mask_batch(tokens: np.ndarray, starts: np.ndarray, rate: float) -> Batch:
    chosen = evaluation_mask(starts, tokens.shape[1], rate) & is_base(tokens)
    return {
        "ids": torch.from_numpy(np.where(chosen, np.uint8(nucleotide.MASK), tokens)),
        "target": torch.from_numpy(tokens),
        "weight": torch.from_numpy(chosen.astype(np.float32)),
    }


def thin(items: list, keep: int) -> list:
    """At most `keep` of the items, evenly spread."""
    if len(items) <= keep:
        return items
    return [items[i * len(items) // keep] for i in range(keep)]


# -- evaluation ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Score:
    """Of one model on one set of bases. Bits per base; accuracy as a share."""

    bits: float
    accuracy: float
    bases: int
    bits_soft_masked: float | None = None  # over soft-masked bases only, where there are any
    bits_other: float | None = None

    @property
    def perplexity(self) -> float:
        return 2.0**self.bits


@dataclass(frozen=True)
class Baseline:
    """What counts k-mers of the training split, and its score on the bases that the model is scored on."""

    kind: Literal["markov", "both sides"]
    order: int  # bases that it sees: before the one that it predicts, or on either side
    score: Score

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"Markov order {self.order}" if self.kind == "markov" else f"both sides, {self.order} base{'s' * (self.order > 1)} each"


@dataclass(frozen=True)
class Evaluation:
    """Scores of a language model by context length, with baselines that count k-mers on exactly the same bases."""

    split: str
    contexts: dict[int, Score]
    markov: dict[int, Score]  # by order
    both_sides: dict[int, Score]  # by bases on either side; of a model that sees both, else empty
    bases: int  # scored
    not_scored: int  # N and other symbols at target positions
    soft_masked: int  # of the scored ones
    trained_context: int

    @property
    def best(self) -> tuple[int, Score]:
        return min(self.contexts.items(), key=lambda item: item[1].bits)

    @property
    def baselines(self) -> list[Baseline]:
        """What the model is measured against."""
        counted = [Baseline("markov", order, score) for order, score in self.markov.items()]
        return counted + [Baseline("both sides", k, score) for k, score in self.both_sides.items()]

    @property
    def best_baseline(self) -> Baseline:
        return min(self.baselines, key=lambda baseline: baseline.score.bits)


def default_contexts(trained: int, longest: int, limit: int, is_causal: bool) -> list[int]:
    """64, 256, 1024, ..., the trained context and the longest that fits. Causal models stream: only the split's longest
    stretch and `limit` bound them. Bidirectional ones hold a window whole and stop at four times the trained context."""
    top = min(longest, limit) if is_causal else min(longest, limit, 4 * trained)
    contexts = {c for c in (64 * 4**i for i in range(12)) if c <= top} | {min(trained, longest)}
    if top > 1.25 * max(contexts):
        contexts.add(top)
    return sorted(contexts)


def evaluate(
    model: nn.Module,
    config: DnaConfig,
    store: TokenStore,
    markov: MarkovModels,
    *,
    split: str = "test",
    contexts: Iterable[int] = (),
    device: str = "cpu",
    precision: str = "auto",
    progress=None,
) -> Evaluation:
    """Score the model on a split at each context length, and the Markov models on the same bases.

    The split is cut into spans of the longest context; each shorter context cuts those spans further, so every context
    length predicts the same bases, each from the bases before it in its own window (causal) or around it (masked).
    `progress(done, total)` is called with tokens.
    """
    is_causal = config.model.direction == "causal"
    extra = 1 if is_causal else 0
    intervals = store.intervals(split)
    if not len(intervals):
        raise UserError(f"the dataset has no {split} split; choose --split train, valid or test, or prepare it with one")
    longest = int((intervals[:, 1] - intervals[:, 0]).max()) - extra
    contexts = sorted(set(contexts or config.eval.contexts))
    trained = longest if config.data.context == "whole" else config.data.context
    if not contexts:
        contexts = default_contexts(trained, longest, config.eval.max_context, is_causal)
    too_long = [c for c in contexts if c > longest]
    if too_long:
        raise UserError(f"--context {too_long[0]}: the longest stretch of the {split} split holds {longest} bases")
    spans = list(eval_windows(store, split, max(contexts), extra=extra))
    if config.eval.max_bases is not None:
        spans = thin(spans, max(1, config.eval.max_bases // max(contexts)))
    spans = [(start, end) for start, end in spans if end - start > extra]
    total = sum(end - start - extra for start, end in spans) * len(contexts)
    done = 0

    positions, targets = [], []
    for start, end in spans:
        span_positions = np.arange(start + extra, end)
        chosen = is_base(store.tokens[start + extra : end])
        if not is_causal:
            chosen &= evaluation_mask(np.array([start]), end - start, config.masking.rate)[0]
        positions.append(span_positions[chosen])
        targets.append(store.tokens[start + extra : end][chosen])
    all_positions = np.concatenate(positions) if positions else np.empty(0, np.int64)
    if not len(all_positions):
        raise UserError(f"the {split} split holds no A, C, G or T to score; choose another split, or give sequences that do")
    soft = np.concatenate([store.soft_mask(start + extra, end)[p - start - extra] for (start, end), p in zip(spans, positions)])
    scored_targets = sum(end - start - extra for start, end in spans)
    not_scored = scored_targets - sum(int(is_base(store.tokens[s + extra : e]).sum()) for s, e in spans)

    scores = {}
    average = config.eval.average_strands and not is_causal and config.model.strand == "augment"
    scorer = _Scorer(model, config, store, device, precision, average)
    for context in contexts:
        nats, hits = [], []
        for bits, hit, tokens in scorer.run(spans, context):
            nats.append(bits)
            hits.append(hit)
            done += tokens
            if progress is not None:
                progress(done, total)
        scores[context] = _score(np.concatenate(nats) / math.log(2), np.concatenate(hits), soft)
    markov_scores = {k: _score(*found, soft) for k, found in markov.score_positions(store, all_positions).items()}
    both_sides = {}
    if not is_causal:
        seen = markov.score_both_sides(store, all_positions, hidden_in_evaluation(config.masking))
        both_sides = {k: _score(*found, soft) for k, found in seen.items()}
    return Evaluation(
        split=split,
        contexts=scores,
        markov=markov_scores,
        both_sides=both_sides,
        bases=len(all_positions),
        not_scored=not_scored,
        soft_masked=int(soft.sum()),
        trained_context=trained,
    )


def _score(bits: np.ndarray, hits: np.ndarray, soft: np.ndarray) -> Score:
    if len(bits) != len(soft):
        raise AssertionError(f"scored {len(bits)} bases, expected {len(soft)}")
    some_soft, some_other = soft.any(), not soft.all()
    return Score(
        bits=float(bits.mean(dtype=np.float64)),
        accuracy=float(hits.mean()),
        bases=len(bits),
        bits_soft_masked=float(bits[soft].mean(dtype=np.float64)) if some_soft else None,
        bits_other=float(bits[~soft].mean(dtype=np.float64)) if some_soft and some_other else None,
    )


class _Scorer:
    """Runs a model over spans in windows of one context; yields nats and hits of the scored bases, in order."""

    def __init__(self, model: nn.Module, config: DnaConfig, store: TokenStore, device: str, precision: str, average: bool):
        self.model = model.to(device).eval()
        self.config, self.store, self.device, self.average = config, store, torch.device(device), average
        self.is_causal = config.model.direction == "causal"
        self.bf16 = precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")
        width = language_model(model).config.d_inner
        # tokens of one forward pass: about 50 (b l d_inner) float32 tensors' worth of 2 GB (CPU) or 20 GB (GPU)
        budget = (2 if self.device.type == "cpu" else 20) * 2**30
        self.tokens_at_once = max(1024, budget // (50 * 4 * width))

    @torch.inference_mode()
    def run(self, spans: list[tuple[int, int]], context: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        extra = 1 if self.is_causal else 0
        windows = [
            (at, min(at + context, end - extra) + extra)
            for start, end in spans
            for at in range(start, end - extra, context)
        ]
        rows = max(1, self.tokens_at_once // context)
        for i in range(0, len(windows), rows):
            yield self._batch(windows[i : i + rows], context)

    def _batch(self, windows: list[tuple[int, int]], context: int) -> tuple[np.ndarray, np.ndarray, int]:
        extra = 1 if self.is_causal else 0
        tokens = np.full((len(windows), context + extra), nucleotide.PAD, np.uint8)
        for row, (start, end) in enumerate(windows):
            tokens[row, : end - start] = self.store.tokens[start:end]
        lengths = np.array([end - start - extra for start, end in windows])
        real = np.arange(context) < lengths[:, None]
        if self.is_causal:
            ids, target = tokens[:, :-1], tokens[:, 1:]
            chosen = is_base(target) & real
        else:
            starts = np.array([start for start, _ in windows])
            chosen = evaluation_mask(starts, context, self.config.masking.rate) & is_base(tokens) & real
            ids, target = np.where(chosen, np.uint8(nucleotide.MASK), tokens), tokens
        mask = None if real.all() or self.is_causal else torch.from_numpy(real).to(self.device)
        log_probs = self._log_probs(torch.from_numpy(np.ascontiguousarray(ids)).to(self.device), mask)
        keep = torch.from_numpy(chosen).to(self.device)
        log_probs = log_probs[keep]  # (scored, 4), row by row: the order of the genome
        target = base_index(torch.from_numpy(np.ascontiguousarray(target)).to(self.device)[keep])
        nats = -log_probs.gather(1, target[:, None])[:, 0]
        hits = log_probs.argmax(-1) == target
        return nats.double().cpu().numpy(), hits.cpu().numpy(), int(lengths.sum())

    def _log_probs(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """(b l 4) log-probabilities over A, C, G, T. A causal model streams long windows with its state carried."""
        bases = slice(FIRST_BASE, LAST_BASE + 1)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            if not self.is_causal:
                if self.average:
                    complement = torch.from_numpy(nucleotide.COMPLEMENT.astype(np.int64)).to(ids.device)
                    logits = average_strands(self.model, complement, ids, mask)
                else:
                    logits, _ = self.model(ids, mask=mask, return_state=False)
                return logits[..., bases].float().log_softmax(-1)
            state, parts = None, []
            for piece in ids.split(max(1, self.tokens_at_once // len(ids)), dim=1):
                logits, state = self.model(piece, state, return_state=piece.shape[1] < ids.shape[1])
                parts.append(logits[..., bases].float().log_softmax(-1))
            return torch.cat(parts, dim=1)
