"""Which species does this piece of DNA come from? Training, and evaluation at many lengths beside two baselines.

One record: a window of one sequence, for example 4,096 bases of salmonella/NC_003197.2 read from either strand, and the
index of its species among the sorted names.

Split rule: decided by `seqlab prep species` (blocks of each species, sequences, or files); windows never cross a border.

One model for all lengths. Training mixes window lengths: context, context/2, ... down to min_context, one for each step,
with the tokens of a step held constant. With pooling mean or evidence the answer is a mean of what all positions say, which a longer
sequence can only make less noisy; so parts of a window can be asked too, and with `loss.ask: segments` every stretch of
min_context bases, every two of them, every four, ... up to the whole is: a window of 4,096 that is easy as a whole still
teaches at each of its positions.

With pooling: evidence each species also predicts every next base, and how well it did counts (Bayes' rule, trained end to
end): with `loss.language_model` the predictions are learnt as a language model's are, which is a target for every base
instead of one for every window. `model.period: 3` lets the backbone keep reading frames apart.

After training, the head's biases and its length scale (a dozen numbers) are fitted once more on validation windows of the
lengths of training and some longer ones (`calibrate`). Among near-identical species the biases that training leaves are noise, but at great lengths that
noise would decide everything.

Samples are drawn as in the published experiments (HyenaDNA section 4.4.1, Mamba section 4.3.2): a species uniformly, then a
sequence by its length, then a position.
"""

import hashlib
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlab import genes, repeats, report
from seqlab.classification import published, words
from seqlab.classification.baselines import BaselineResult, Sequences, cnn_baseline, kmer_baseline
from seqlab.classification.metrics import evaluate_predictions, plot_calibration, plot_confusion
from seqlab.classification.windows import ClassWindows, Windows
from seqlab.classifier import ClassifierConfig, SequenceClassifier, load_pretrained
from seqlab.config import dump_yaml, from_dict, load_yaml
from seqlab.dataset import TokenStore, nearest
from seqlab.errors import UserError
from seqlab.files import write_atomic, write_json, write_text
from seqlab.heads.classification import ADDITIVE, evenly_spread_ends
from seqlab.heads.homology import scale_of, scaled
from seqlab.inference.classify import Predictor
from seqlab.ops.threads import one_thread
from seqlab.processes import is_main_process
from seqlab.tokenizers import nucleotide
from seqlab.training.checkpoint import load_model, read_notes, save_model
from seqlab.training.config import TrainConfig, step_seed
from seqlab.training.facts import FitResult, read_run_facts
from seqlab.training.optim import OptimConfig
from seqlab.training.task import Batch
from tasks import runs
from tasks.language_modeling import FIRST_BASE, LAST_BASE, MaskingConfig, base_index, is_base, mask_tokens

NAME = "species"


@dataclass(frozen=True)
class DataConfig:
    context: int = 4096  # longest training window
    min_context: int | None = 256  # shortest; windows halve from context down to this; null: context alone
    windows_per_step: int | None = None  # null: train.tokens_per_step / the length of the step's windows
    max_unknown: float = 0.5  # windows with a larger share of N are drawn again
    length_warmup_start: int | None = None  # first longest window of a length warm-up by doubling; null: none
    length_warmup: float = 0.3  # share of max_steps spent below the full context

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"context: must be 2 or more, got {self.context}")
        if self.min_context is not None and not 2 <= self.min_context:
            raise ValueError(f"min_context: must be 2 or more, or null, got {self.min_context}")
        if self.windows_per_step is not None and self.windows_per_step < 1:
            raise ValueError(f"windows_per_step: must be 1 or more, or null, got {self.windows_per_step}")
        if not 0 <= self.max_unknown < 1:
            raise ValueError(f"max_unknown: must lie in [0, 1), got {self.max_unknown}")
        if self.length_warmup_start is not None and not 2 <= self.length_warmup_start <= self.context:
            raise ValueError(f"length_warmup_start: must lie in 2 .. context, got {self.length_warmup_start}")
        if not 0 < self.length_warmup < 1:
            raise ValueError(f"length_warmup: must lie in (0, 1), got {self.length_warmup}")

    def lengths(self, longest: int) -> list[int]:
        """Window lengths of training: longest, longest / 2, ... down to min_context, ascending."""
        least = longest if self.min_context is None else self.min_context
        lengths = [longest]
        while lengths[-1] // 2 >= least:
            lengths.append(lengths[-1] // 2)
        return lengths[::-1]


@dataclass(frozen=True)
class LossConfig:
    """What is minimised: the cross-entropy of the species, and beside it, with weight `language_model`, that of the next
    base (causal; with pooling: evidence as the right species predicts it) or of masked bases (bidirectional), which tells
    the backbone what DNA looks like."""

    # of which parts of a window the species is asked: the whole; its prefixes of min_context, twice that, ... (causal,
    # pooling other than max); all its segments of these lengths (pooling: mean or evidence). Elsewhere the whole is asked.
    ask: Literal["whole", "prefixes", "segments"] = "segments"
    language_model: float = 0.0
    mask_rate: float = 0.1  # bidirectional with language_model: share of bases masked
    label_smoothing: float = 0.0
    substitutions: float = 0.0  # training replaces bases at random, in each window a share between 0 and this: long exact
    # matches teach less. With pooling: evidence in what the network reads, not in what the species are to foretell

    def __post_init__(self) -> None:
        if self.language_model < 0:
            raise ValueError(f"language_model: must be 0 or more, got {self.language_model}")
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate: must lie in (0, 1), got {self.mask_rate}")
        for name in ("label_smoothing", "substitutions"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must lie in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class EvalConfig:
    lengths: tuple[int, ...] = ()  # empty: 256, 512, 1024, 4096, 16384, ... as far as the split has them
    windows_per_class: int = 500  # at most; fewer where the split holds fewer
    tokens_per_class: int = 2_000_000  # windows_per_class is also bounded by this / length, but not below 16
    baselines: tuple[Literal["k-mers", "cnn"], ...] = ("k-mers", "cnn")
    baseline_windows: int = 2000  # training windows a class for the baselines, at most
    baseline_tokens: int = 8_000_000  # of a class for the k-mers, at most
    cnn_tokens: int = 2_100_000  # of a class for the CNN, at most: 2,000 windows of 1,024
    max_k: int = 6

    def __post_init__(self) -> None:
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths: each must be 1 or more, got {list(self.lengths)}")
        for name in ("windows_per_class", "tokens_per_class", "baseline_windows", "baseline_tokens", "cnn_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be 1 or more, got {getattr(self, name)}")
        if not 1 <= self.max_k <= 6:
            raise ValueError(f"max_k: must lie in 1 .. 6, got {self.max_k}")


@dataclass(frozen=True)
class Config:
    """One run of `seqlab train species`."""

    task: Literal["species"] = "species"
    classes: tuple[str, ...] = ()  # names of the outputs; empty: those of the dataset
    freeze: Literal["none", "backbone"] = "none"  # backbone: train the head alone
    calibrate: bool = True  # fit the head's biases and length scale on the validation split after training
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        rows = self.data.windows_per_step or self.train.tokens_per_step // self.data.context
        if not rows:
            raise ValueError(
                f"data.context: {self.data.context} is more than train.tokens_per_step {self.train.tokens_per_step}; "
                "raise train.tokens_per_step to at least the context"
            )
        if rows % self.train.devices:
            raise ValueError(
                f"train.devices: {rows} windows a step cannot be shared evenly by {self.train.devices} devices; change "
                "train.tokens_per_step"
            )
        if self.loss.language_model and self.freeze == "backbone" and self.model.pooling != "evidence":
            raise ValueError("loss.language_model: trains the backbone, which freeze: backbone does not; set it to 0")


def build_model(config: Config) -> SequenceClassifier:
    if len(config.classes) < 2:
        raise UserError(f"classes: two or more are needed to tell apart, got {list(config.classes)}")
    return SequenceClassifier(config.model, len(config.classes))


class SpeciesTask:
    """The task that `seqlab.training` trains; see seqlab/training/task.py for the protocol."""

    metric = "bits per window"

    def __init__(self, config: Config, store: TokenStore, init: Path | None = None):
        self.windows = ClassWindows(store, "train", config.data.max_unknown)
        self.valid = ClassWindows(store, "valid", config.data.max_unknown)
        classes = tuple(self.windows.classes)
        if config.classes and config.classes != classes:
            unknown = [name for name in config.classes if name not in classes] or list(config.classes)
            raise UserError(
                f"classes: {unknown[0]}: not a species of {store.directory} in its sorted order; {nearest(unknown[0], classes)}"
            )
        self.config, self.store, self.init = replace(config, classes=classes), store, init
        self._fixed: dict[int, Windows] = {}  # length -> validation windows
        self._genes: list[genes.GeneModel] | None = None
        self._repeats: tuple[np.ndarray, np.ndarray] | None = None
        # starts of the training split's stretches, ascending, and how many pieces of the same species come before each
        stretches = [
            (int(start), number)
            for mine in self.windows.intervals
            for (start, _), number in zip(mine, np.cumsum([0, *(genes.pieces_of(int(end - start)) for start, end in mine)]))
        ]
        self._stretches = np.array(sorted(stretches)).T
        model = config.model
        self.is_causal = model.direction == "causal"
        self.ask = config.loss.ask
        if model.strand == "equivariant" or model.pooling in ("max", "centre"):
            self.ask = "whole"
        if (self.ask == "prefixes" and not self.is_causal) or (self.ask == "segments" and model.pooling not in ADDITIVE):
            self.ask = "whole"
        longest = max(int((mine[:, 1] - mine[:, 0]).max()) for mine in self.windows.intervals)
        if config.data.context > longest:
            raise UserError(
                f"context {config.data.context:,} does not fit: the longest stretch of the train split of {store.directory} "
                f"is {longest:,} bases; use --context {longest} or less, or prepare larger blocks"
            )

    def build_model(self) -> nn.Module:
        model = build_model(self.config)
        if model.genes is not None:
            model.genes.fit(self.gene_models())
        if model.repeats is not None:
            model.repeats.fit(*self.repeated_words())
        if self.init is not None:
            load_init(model, self.init, self.config, self.store)
        if self.config.freeze == "backbone":
            model.freeze_backbone()
        return model

    def gene_models(self) -> list[genes.GeneModel]:
        """A model of each species' training split, fitted once."""
        if self._genes is None:
            order, threads = self.config.model.gene_order, torch.get_num_threads()
            self._genes = [genes.fit(stretches, order, threads) for stretches in self._digits()]
        return self._genes

    def repeated_words(self) -> tuple[np.ndarray, np.ndarray]:
        """Words that occur more than once in the training split of a species, and their counts; found once."""
        if self._repeats is None:
            self._repeats = repeats.fit(list(self._digits()), self.config.model.repeat_word)
        return self._repeats

    def _digits(self) -> Iterator[list[np.ndarray]]:
        """The stretches of each species' training split."""
        for mine in self.windows.intervals:
            yield [nucleotide.DIGITS[self.store.tokens[start:end]] for start, end in mine.tolist()]

    def resolved_config(self) -> Config:
        return self.config

    # -- data ------------------------------------------------------------------------------------------------------
    def longest_at(self, step: int) -> int:
        """Longest window of a step: doubling stages of equal length, then the context (length warm-up)."""
        data = self.config.data
        if data.length_warmup_start is None:
            return data.context
        stages = max(1, math.ceil(math.log2(data.context / data.length_warmup_start)))
        stage_steps = max(1, int(self.config.train.max_steps * data.length_warmup / stages))
        return min(data.context, data.length_warmup_start << min(step // stage_steps, stages))

    def length_at(self, step: int) -> int:
        """Length of a step's windows: one of `DataConfig.lengths`, each as often, in an order that the seed decides."""
        lengths = self.config.data.lengths(self.longest_at(step))
        return lengths[step_seed(self.config.train.seed, "length", step) % len(lengths)]

    def train_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        config = self.config
        length = self.length_at(step)
        rows = config.data.windows_per_step or config.train.tokens_per_step // length // world_size * world_size
        rng = np.random.Generator(np.random.Philox(key=step_seed(config.train.seed, "windows", step)))
        drawn = self.windows.sample(rng, max(rows, world_size), length, random_strand=config.model.augments)
        share = len(drawn) // world_size
        mine = np.arange(rank * share, (rank + 1) * share)
        micro = max(1, (config.train.micro_batch_tokens or len(mine) * length) // length)
        parts = [slice(part[0], part[-1] + 1) for part in np.split(mine, range(micro, len(mine), micro))]
        if not (config.loss.substitutions or self._masks or config.model.gene_order):
            return [self._batch(drawn[part]) for part in parts]
        # the noise of a step is drawn for all of its rows, so it does not depend on how they are dealt to ranks or micro-batches
        whole = self._batch(drawn, np.random.Generator(np.random.Philox(key=step_seed(config.train.seed, "noise", step))))
        return [{key: value[part] for key, value in whole.items()} for part in parts]

    @property
    def _masks(self) -> bool:
        """Whether training masks bases, to be filled in."""
        return bool(self.config.loss.language_model) and not self.is_causal

    def _batch(self, windows: Windows, noise: np.random.Generator | None = None) -> Batch:
        """ids (b l), label (b), start (b), and where rows are padded mask (b l). With `noise`, for training: ids with some
        bases substituted or masked, for masked language modelling target and scored (b l), for gene models fold (b),
        for evidence clean (b l), which is ids without the substitutions."""
        ids, mask = windows.tokens(self.store)
        batch = {"label": windows.label, "start": windows.start}
        loss = self.config.loss
        if noise is not None and loss.substitutions:
            rate = noise.random((len(ids), 1), dtype=np.float32) * loss.substitutions
            chosen = (noise.random(ids.shape, dtype=np.float32) < rate) & is_base(ids)
            if self.config.model.pooling == "evidence":
                batch["clean"] = ids
            ids = np.where(chosen, noise.integers(FIRST_BASE, LAST_BASE + 1, ids.shape, dtype=np.uint8), ids)
        if noise is not None and self._masks:
            batch["target"] = ids
            ids, batch["scored"] = mask_tokens(ids, MaskingConfig(rate=loss.mask_rate), noise)
        if self.config.model.gene_order and noise is not None:
            at = np.searchsorted(self._stretches[0], windows.start, side="right") - 1
            batch["fold"] = genes.fold_of(windows.start - self._stretches[0][at], self._stretches[1][at])
        batch["ids"] = ids
        if mask is not None:
            batch["mask"] = mask
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in batch.items()}

    def validation_batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """As many fixed windows of every training length, about validation_tokens in all."""
        lengths = self.config.data.lengths(self.config.data.context)
        per_class = max(4, self.config.train.validation_tokens // (len(self.valid.classes) * sum(lengths)))
        limit = self.config.train.micro_batch_tokens or self.config.train.tokens_per_step
        for length in lengths:
            length = min(length, self.valid.longest())
            if length not in self._fixed:
                self._fixed[length], _ = self.valid.fixed(length, per_class)
            windows = self._fixed[length]
            windows = windows[np.arange(rank, len(windows), world_size)]
            rows = max(1, limit // length)
            for i in range(0, len(windows), rows):
                yield self._batch(windows[i : i + rows])

    # -- loss ------------------------------------------------------------------------------------------------------
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over windows, and their number. Outside training it is the cross-entropy of the species alone."""
        ids, label, mask = batch["ids"], batch["label"], batch.get("mask")
        total = torch.full((), float(len(label)), device=ids.device)
        if not model.training:
            return F.cross_entropy(model(ids, mask), label, reduction="sum"), total
        loss = self.config.loss
        positions, shortest = None, min(ids.shape[1], self.config.data.min_context or ids.shape[1])
        if loss.language_model or self.ask != "whole":
            positions = model.read(ids, mask, batch.get("fold"), batch.get("clean"))
        if self.ask == "segments":
            levels = model.head.segments(positions, shortest, mask)
        elif self.ask == "prefixes":
            ends = torch.tensor(evenly_spread_ends(ids.shape[1], shortest))
            levels = [(model.head.prefixes(positions, ends, mask), None)]
        elif model.reads_both_strands or positions is None:
            levels = [(model(ids, mask)[:, None], None)]
        else:
            levels = [(model.head(model.head.pool(positions, mask))[:, None], None)]
        result = sum(self._species_loss(outputs, label, used) for outputs, used in levels) / len(levels)
        if loss.language_model:
            result = result + loss.language_model * len(label) * self._language_loss(model, positions, batch)
        return result, total

    @property
    def piece(self) -> Callable | None:
        """For sequences in pieces (seqlab/training/task.py), where the loss is that of the whole window's outputs alone."""
        return None if self.ask != "whole" or self.config.loss.language_model else self._piece

    def _piece(self, model: SequenceClassifier, batch: Batch, start: int, stop: int, state: Any, more: bool):
        ids, label, mask = batch["ids"], batch["label"], batch.get("mask")
        if model.reads_both_strands:
            ids = torch.cat([ids, model.reverse_complement(ids, mask)])  # (2b l)
            mask = None if mask is None else mask.repeat(2, 1)
        state = model.feed(ids[:, start:stop], None if mask is None else mask[:, start:stop], state, more)
        total = torch.full((), 0.0 if more else float(len(label)), device=ids.device)
        if more:
            return torch.zeros_like(total), total, state
        outputs = model.finish(state)
        if model.reads_both_strands:
            outputs = 0.5 * sum(outputs.chunk(2))
        smoothing = self.config.loss.label_smoothing if model.training else 0.0
        return F.cross_entropy(outputs, label, reduction="sum", label_smoothing=smoothing), total, state

    def _species_loss(self, outputs: Tensor, label: Tensor, used: Tensor | None) -> Tensor:
        """Sum over rows of the mean cross-entropy of a row's parts: outputs (b k classes), used (b k) or None for all."""
        k = outputs.shape[1]
        nats = F.cross_entropy(
            outputs.flatten(0, 1), label.repeat_interleave(k), reduction="none", label_smoothing=self.config.loss.label_smoothing
        ).view(-1, k)
        if used is None:
            return nats.mean(1).sum()
        return (torch.where(used, nats, 0.0).sum(1) / used.sum(1).clamp(min=1)).sum()

    def _language_loss(self, model: nn.Module, features: Tensor, batch: Batch) -> Tensor:
        """Mean nats a scored base, over A, C, G and T, of what the head reads at each position; the embedding is the output
        matrix too, unless the head has the predictions of each class: then those of the right one."""
        if self.config.model.pooling == "evidence":
            of_class = features[..., model.head.d_model :]
            nats = -of_class.gather(-1, batch["label"][:, None, None].expand(-1, features.shape[1], 1))[..., 0]
            scored = (batch["ids"] >= FIRST_BASE) & (batch["ids"] <= LAST_BASE)
            return nats.sum() / scored.sum().clamp(min=1)
        if self.is_causal:
            features, target = features[:, :-1], batch["ids"][:, 1:]
            scored = (target >= FIRST_BASE) & (target <= LAST_BASE)
        else:
            target, scored = batch["target"], batch["scored"]
        logits = F.linear(features, model.embedding.weight[FIRST_BASE : LAST_BASE + 1]).float()
        nats = F.cross_entropy(logits.flatten(0, 1), base_index(target).flatten(), reduction="none")
        scored = scored.flatten()
        return torch.where(scored, nats, 0.0).sum() / scored.sum().clamp(min=1)

    def weight(self, batch: Batch) -> float:
        return float(len(batch["label"]))

    def tokens(self, batch: Batch) -> int:
        return batch["ids"].numel()

    def metric_value(self, mean_loss: float) -> float:
        return mean_loss / math.log(2)

    def describe(self, batch: Batch) -> str:
        places = [self.store.locate(int(start)) for start in batch["start"][:3]]
        more = f" and {len(batch['start']) - 3} more" if len(batch["start"]) > 3 else ""
        return "windows at " + ", ".join(f"{name}:{position}" for name, position in places) + more


def load_init(model: SequenceClassifier, checkpoint: Path, config: Config, store: TokenStore) -> None:
    """Weights of another run: all of them from a run of the same classes, else embedding and backbone."""
    path = checkpoint.parent / "config.yaml"
    data = load_yaml(path) if path.is_file() else {}
    if data.get("task") == NAME:
        theirs = from_dict(Config, data, str(path))
        if theirs.classes == config.classes and theirs.model == config.model:
            load_model(model, checkpoint)
            return
    load_pretrained(model, checkpoint, store.manifest.get("vocab"))


def train(
    config: Config, dataset: Path, run_dir: Path, *, init: Path | None = None, resume: bool = False, say: Callable[[str], None] = lambda text: None
) -> FitResult:
    """Train on a prepared dataset into `run_dir`; `init`: a checkpoint of `train dna` or `train species` to start from; `say` is told
    what is done before and after training. Nothing is created before the configuration is known to fit."""
    store = TokenStore.open(dataset)
    resume, init = runs.start_of(run_dir, resume, init)
    if config.eval.lengths:
        runs.check_lengths("eval.lengths", config.eval.lengths, store, ClassWindows(store, "test", config.data.max_unknown).longest())
    task = SpeciesTask(config, store, None if resume else init)
    since = time.perf_counter()
    task.build_model()
    if config.model.gene_order:
        say(f"gene models (order {config.model.gene_order}) fitted in {time.perf_counter() - since:.0f} s")
    result = runs.train(task, run_dir, dataset, store.hash, pretrained=init, resume=resume)
    if config.calibrate and result.ended != "interrupted" and is_main_process():
        calibrate(run_dir, store, task.gene_models() if config.model.gene_order else None, say)
    return result


def calibration_windows(lengths: Sequence[int], longest: int, trained: int, classes: int) -> dict[int, int]:
    """Length -> windows of each class to calibrate on: 32 to 500 at the lengths of training, and at each longer one as many as an
    eighth of the tokens that were `trained` allows, if that is 2 or more (each window is read on both strands, once, where training
    reads, remembers and goes back)."""
    within = [length for length in lengths if length <= longest]
    longer = []
    while within and (longer or within)[-1] * 4 <= longest:
        longer.append((longer or within)[-1] * 4)
    each = trained // 8 // (2 * classes)  # tokens of a class at a length
    chosen = {length: min(500, max(32, each // length)) for length in within}
    return chosen | {length: min(500, each // length) for length in longer if each // length >= 2}


FIT_SHARE, MOST_FIT = 1, 64_000_000
"""Likeness and composition are fitted to as many bases as the network was trained on, but no more than this: some ten times as fast."""


CALIBRATION_TILE = 1 << 18
"""Tokens that are read together on a GPU: gene models go through a row base by base, and more rows take them no longer. (Predictions, whose
bits depend on no company, are made in tiles that a single sequence can afford.)"""


def calibrate(
    run_dir: Path, store: TokenStore, gene_models: list[genes.GeneModel] | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, float]:
    """Fit the biases and the length scale of a run's head, and what repeats, likeness and composition count, on fixed windows
    of the validation split (`calibration_windows`), likeness and composition themselves before that, on windows of the training
    split; the best checkpoint is replaced. Nothing else of the model changes (vector scaling without the vector,
    Guo et al. 2017). The network is the best checkpoint's, or the last one's where that is better once calibrated: what it was chosen by in
    training grows with overconfidence, which calibration takes away. A checkpoint that was calibrated before (its run was resumed at its end) is
    calibrated anew, from what training left, to the same values. `gene_models` are fitted anew where they are not given; `say` is told what is
    done. Returns the cross-entropy (nats) before and after, which are written into run.json."""
    run = runs.load_run(run_dir, task=NAME)
    config, model = run.config, run.model
    left = json.loads(read_notes(run.checkpoint).get("before_calibration", "{}"))
    with torch.no_grad():
        for name, values in left.items():
            model.head.get_parameter(name).copy_(torch.tensor(values))
    windows = ClassWindows(store, "valid", config.data.max_unknown)
    facts = read_run_facts(run.directory)
    trained = (facts.get("result") or {}).get("tokens", 0)
    chosen = calibration_windows(config.data.lengths(config.data.context), windows.longest(), trained, len(config.classes))
    lengths = list(chosen)
    if not lengths:
        return {}
    device = "cuda" if config.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    wide = dict.fromkeys(("tile", "piece"), CALIBRATION_TILE if device == "cuda" else None)
    networks = {name: Predictor(network, device, config.train.precision, **wide) for name, network in _networks(run).items()}
    beside = _beside(model)  # now that it lies where it will be calibrated: moving a model makes new buffers
    for scale, _ in beside:
        scale.zero_()
    if model.homology is not None or model.composition is not None:
        training = ClassWindows(store, "train", config.data.max_unknown)
        if model.genes is not None:  # evidence of training windows needs what checkpoints do not hold: emissions without their fold
            model.genes.fit(gene_models or SpeciesTask(config, store).gene_models())
        fitted_at = words.fit_lengths(training, config.data.min_context or config.data.context)
        words.fit(model, training, fitted_at, min(MOST_FIT, int(trained / FIT_SHARE)), config.train.seed, say)
    since = time.perf_counter()
    fixed = {length: windows.fixed(length, chosen[length])[0] for length in lengths}
    said = {length: _said_beside(model, fixed[length], windows) for length in lengths}
    outputs: dict[str, dict[int, np.ndarray]] = {name: {} for name in networks}

    def fit_to(name: str, lengths: list[int]) -> _Scales:
        read = outputs[name]
        for length in lengths:
            if length not in read:
                read[length] = np.stack(list(networks[name].outputs(fixed[length].sequence(store, i) for i in range(len(fixed[length])))))
        parts = [(read[length], fixed[length].label, fixed[length].length, said[length]) for length in lengths]
        columns = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts))
        return _fit_scales(networks[name].model.head, *columns, beside)

    # the network is chosen at the lengths of training; the longer windows, which cost the most, are read by that one alone
    within = [length for length in lengths if length <= config.data.context]
    trials = {name: fit_to(name, within) for name in networks} if len(networks) > 1 else {}
    name = min(trials, key=lambda name: trials[name].after) if trials else next(iter(networks))
    fit, network = fit_to(name, lengths), networks[name]
    others = "".join(f"; {other} {trials[other].after:.4f} where it has {trials[name].after:.4f}" for other in trials if other != name)
    say(
        f"calibrated on {sum(map(len, fixed.values())):,} validation windows of {report.in_words(lengths)} bases in "
        f"{time.perf_counter() - since:.0f} s: {fit.before:.4f} to {fit.after:.4f} nats a window ({name} checkpoint{others})"
    )
    if not fit.after < fit.before:
        return {"before": fit.before, "after": fit.before}
    with torch.no_grad():
        for weight_name, values in _network(network.model).items():
            model.get_parameter(weight_name).copy_(values)
        left = json.dumps({name: model.head.get_parameter(name).tolist() for name in ("linear.bias", *(() if fit.scale is None else ("length_scale",)))})
        model.head.linear.bias += fit.shift.to(model.head.linear.bias)
        if fit.scale is not None:
            model.head.length_scale.copy_(fit.scale)
        for values, (buffer, _) in zip(fit.beside, beside):
            buffer.copy_(values.view_as(buffer))
    save_model(model.cpu(), run.checkpoint.parent, dump_yaml(config), before_calibration=left)
    calibration = {"before": fit.before, "after": fit.after, "lengths": lengths, "checkpoint": name}
    write_json(run.directory / "run.json", {**facts, "calibration": calibration})
    return {"before": fit.before, "after": fit.after}


def _network(model: SequenceClassifier) -> dict[str, Tensor]:
    """What training changes; what is kept beside it and fitted afterwards is frozen as it is made."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _networks(run: runs.LoadedRun) -> dict[str, SequenceClassifier]:
    """Models of a run's checkpoints: "best", which is `run.model`, and "last" if that has another network; "last" alone where both are one, as
    they are too after calibration has taken the last for the best."""
    path = run.directory / "checkpoints" / "last" / "model.safetensors"
    if not path.is_file() or run.checkpoint.parent.name != "best":
        return {"best": run.model}
    last = runs.load_run(path, task=NAME).model
    same = all(torch.equal(weight, run.model.get_parameter(name)) for name, weight in _network(last).items())
    return {"last": run.model} if same else {"best": run.model, "last": last}


@dataclass(frozen=True)
class _Scales:
    """What calibration found: added to the head's biases; its length scale, if it has one; scales of what counts beside the network;
    cross-entropy (nats) of the network alone as it was, and of everything together."""

    shift: Tensor
    scale: Tensor | None
    beside: list[Tensor]
    before: float
    after: float


def _fit_scales(
    head: nn.Module, outputs: Tensor, label: Tensor, length: Tensor, said: Tensor, beside: list[tuple[Tensor, Callable]]
) -> _Scales:
    """outputs (n classes), label, length (n) of windows; said (n m classes): see `_said_beside`; `beside`: see `_beside`. Computed
    where the head lies."""
    device = head.linear.bias.device
    label, said = label.to(device), said.to(device)
    outputs, length = outputs.to(device).double(), length.to(device).double()
    # each length counts as much as another, and each species within it
    group = torch.unique(torch.stack([length.long(), label]), dim=1, return_inverse=True)[1]
    weight = 1.0 / torch.bincount(group)[group].double()
    weight /= weight.sum()
    has_scale = head.length_scale is not None
    old = head.length_scale.detach().double() if has_scale else outputs.new_zeros(2)
    logs = (length / 1024).log()
    raw = outputs / torch.exp(old[0] + old[1] * logs)[:, None]
    shift = outputs.new_zeros(outputs.shape[1], requires_grad=True)
    scale = old.clone().requires_grad_(has_scale)
    free = [outputs.new_zeros(buffer[None].shape if buffer.dim() == 1 else buffer.shape, requires_grad=True) for buffer, _ in beside]
    each = said.split([len(numbers) for numbers in free], 1)

    def nats(all_of_it: bool = True) -> Tensor:
        answers = (raw + shift) * torch.exp(scale[0] + scale[1] * logs)[:, None]
        if all_of_it:
            for numbers, (_, limit), log_odds in zip(free, beside, each):
                answers = answers + scaled(log_odds, limit(numbers), length)
        return (F.cross_entropy(answers, label, reduction="none") * weight).sum()

    before = nats(all_of_it=False).item()
    optimizer = torch.optim.LBFGS([shift, *([scale] if has_scale else []), *free], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # keeps the biases of species that are never confused where they are
        loss = nats() + 1e-4 * sum(numbers.square().sum() for numbers in (shift, *free))
        loss.backward()
        return loss

    with one_thread():
        optimizer.step(closure)
    found = [limit(numbers.detach()) for numbers, (_, limit) in zip(free, beside)]
    return _Scales(shift.detach(), scale.detach() if has_scale else None, found, before, nats().item())


def _beside(model: SequenceClassifier) -> list[tuple[Tensor, Callable]]:
    """What counts beside the network: the buffer of its scales and exponents, and what makes these (m 2) of free numbers. The
    exponent of repeats lies between 0 and 1, where independent witnesses are: where all answers are right, nothing else would hold it
    back."""
    found = []
    if model.repeats is not None:
        found.append((model.head.repeat_scale, lambda v: torch.stack([v[:, 0].exp(), v[:, 1].sigmoid()], 1)))
    return found + [(part.scale, scale_of) for part in (model.homology, model.composition) if part is not None]


@torch.inference_mode()
def _said_beside(model: SequenceClassifier, fixed: Windows, windows: ClassWindows) -> np.ndarray:
    """(n m classes) float64: log-odds of each window, of everything in `_beside`, before they are scaled; of both strands, if the model
    reads both."""
    device, said = model.head.linear.bias.device, []
    counters = [counter for counter in (model.homology, model.composition) if counter is not None]
    for part, base in words.batches(windows, fixed, device):
        length = torch.from_numpy(fixed.length[part]).to(device).double()
        strands = [base, words.other_strand(base)] if model.reads_both_strands else [base]
        found = []
        for strand in strands:
            each = [base.new_zeros(len(base), 0, len(windows.classes), dtype=torch.float64)]
            if model.repeats is not None:
                each.append(model.repeats(strand).double().mean(1, keepdim=True))
            read = words.reading(model, strand) if model.composition is not None else None
            each += [counter.unscaled(counter.feed(None, strand, None, read), length) for counter in counters]
            found.append(torch.cat(each, 1))
        said.append(torch.stack(found).mean(0).cpu())
    return torch.cat(said).numpy()


# -- prediction ----------------------------------------------------------------------------------------------------
def output_names(config: Config) -> list[str]:
    return list(config.classes)


def interpret(config: Config, outputs: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Outputs (n classes) of the model -> labels (n) and probabilities (n classes)."""
    probabilities = torch.from_numpy(outputs).double().softmax(1).numpy()
    return [config.classes[i] for i in outputs.argmax(1)], probabilities


# -- evaluation ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LengthResult:
    """At one length: metrics of each predictor ("model", "k-mers", "cnn", "chance") on the same windows."""

    length: int
    windows: int
    independent: int  # of them that share no base
    metrics: dict[str, dict[str, Any]]
    details: dict[str, str]  # of the baselines: what was chosen

    def accuracy(self, name: str) -> float:
        """Mean over species of the share that is right: species with few windows count as much as the others."""
        rows = self.metrics[name]["classes"].values()
        return float(np.mean([row["recall"] for row in rows if row["support"]]))


@dataclass(frozen=True)
class Evaluation:
    split: str
    classes: tuple[str, ...]
    trained_context: int
    results: tuple[LengthResult, ...]
    confidence: dict[str, tuple[np.ndarray, np.ndarray]]  # at the first length: (confidence, is right) by predictor
    shared_kmers: dict[str, Any] | None


def default_lengths(longest: int) -> list[int]:
    """256, 512, 1024, 4096, 16384, ... as far as every species has a window that long."""
    lengths = [256, 512, 1024] + [4096 * 4**i for i in range(6)]
    return [length for length in lengths if length <= longest] or [longest]


def evaluate_run(
    run: runs.LoadedRun,
    store: TokenStore,
    training: TokenStore,
    *,
    split: str = "test",
    lengths: Sequence[int] = (),
    device: str = "auto",
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a run on fixed windows of `store` at each length, beside baselines that learn from the training split of
    `training` and choose on its validation split. `cache`: where the baselines' predictions are kept for the next time.
    `progress(done, total)` counts lengths times predictors."""
    config: Config = run.config
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    windows = ClassWindows(store, split, config.data.max_unknown)
    unknown = [name for name in windows.classes if name not in config.classes]
    if unknown:
        raise UserError(
            f"{store.directory}: species {unknown[0]} is unknown to this run, which knows {', '.join(config.classes)}; "
            "evaluate on those, or train with it"
        )
    to_run = np.array([config.classes.index(name) for name in windows.classes])
    lengths = sorted(set(lengths or config.eval.lengths)) or default_lengths(windows.longest())
    drawn = {length: windows.fixed(length, _per_class(config.eval, length)) for length in lengths}  # fails before any work
    predictor = Predictor(run.model, device, config.train.precision)
    baselines = _Baselines(config, store, training, {n: w for n, (w, _) in drawn.items()}, to_run, split, device, cache)
    results, confidence = [], {}
    names = ["model", *config.eval.baselines]
    for number, length in enumerate(lengths):
        fixed, independent = drawn[length]
        labels = to_run[fixed.label]
        outputs = predictor.outputs((fixed.sequence(store, i) for i in range(len(fixed))))
        logits = torch.from_numpy(np.stack(list(outputs)))
        predictions = {"model": logits.double().softmax(1).numpy()}
        details = {}
        if progress is not None:
            progress(number * len(names) + 1, len(lengths) * len(names))
        for i, name in enumerate(config.eval.baselines):
            found = baselines.get(name, length)
            predictions[name], details[name] = found.predictions, found.detail
            if progress is not None:
                progress(number * len(names) + 2 + i, len(lengths) * len(names))
        predictions["chance"] = np.full((len(fixed), len(config.classes)), 1 / len(config.classes))
        kind = "binary" if len(config.classes) == 2 else "multi-class"
        metrics = {key: evaluate_predictions(labels, p, config.classes, kind) for key, p in predictions.items()}
        results.append(LengthResult(length, len(fixed), sum(independent), metrics, details))
        if not number:
            confidence = {key: (p.max(1), p.argmax(1) == labels) for key, p in predictions.items() if key != "chance"}
    return Evaluation(
        split, config.classes, config.data.context, tuple(results), confidence, store.manifest.get("shared_kmers")
    )


def _per_class(config: EvalConfig, length: int) -> int:
    return min(config.windows_per_class, max(16, config.tokens_per_class // length))


CNN_LONGEST = 4096
"""Beyond this the CNN reads pieces of this length and its log-probabilities are averaged: better than learning from the few
windows that are longer, and affordable."""


class _Baselines:
    """Each learns from windows of a length drawn as the model's are, chooses on validation windows, predicts test windows.

    drawn: length -> fixed test windows; to_run: class of the dataset -> class of the run
    """

    def __init__(self, config: Config, store: TokenStore, training: TokenStore, drawn: dict[int, Windows], to_run: np.ndarray,
                 split: str, device: str, cache: Path | None):
        self.config, self.store, self.training, self.drawn, self.to_run = config, store, training, drawn, to_run
        self.split, self.device, self.cache = split, device, cache
        self._found: dict[tuple[str, int], BaselineResult] = {}

    def get(self, name: str, length: int) -> BaselineResult:
        if (name, length) in self._found:
            return self._found[name, length]
        path = None if self.cache is None else self.cache / f"{name}-{self.split}-{length}.npz"
        kept = None if path is None else _read_cache(path, self._key(name, length))
        if kept is not None:
            self._found[name, length] = kept
            return kept
        _, at = self._learns_from(name, length)
        together = [length]
        if name == "cnn" and length >= CNN_LONGEST:  # one network serves all of these
            together = sorted(n for n in self.drawn if n >= CNN_LONGEST)
        for served, result in self._learn(name, at, together).items():
            self._found[name, served] = result
            if self.cache is not None:
                _write_cache(self.cache / f"{name}-{self.split}-{served}.npz", self._key(name, served), result)
        return self._found[name, length]

    def _learns_from(self, name: str, length: int) -> list[int]:
        """[windows of each class, their length] in training."""
        evaluation = self.config.eval
        at = length if name == "k-mers" else min(length, CNN_LONGEST)
        tokens = evaluation.baseline_tokens if name == "k-mers" else evaluation.cnn_tokens
        return [min(evaluation.baseline_windows, max(32, tokens // at)), at]

    def _key(self, name: str, length: int) -> dict:
        evaluation = self.config.eval
        return {
            "name": name, "length": length, "split": self.split, "classes": list(self.config.classes),
            "data": _content(self.store), "training": _content(self.training), "max_unknown": self.config.data.max_unknown,
            "test": len(self.drawn[length]), "learn": self._learns_from(name, length),
            "max_k": evaluation.max_k if name == "k-mers" else None,
        }

    def _learn(self, name: str, at: int, lengths: list[int]) -> dict[int, BaselineResult]:
        """A baseline that learns from windows of `at` bases predicts the test windows of these lengths, piece by piece."""
        config, training = self.config, self.training
        rng = np.random.Generator(np.random.Philox(key=step_seed(at, "baseline")))
        source = ClassWindows(training, "train", config.data.max_unknown)
        per_class, _ = self._learns_from(name, at)
        learn = source.sample(rng, per_class * len(source.classes), at)
        check = ClassWindows(training, "valid", config.data.max_unknown)
        choose, _ = check.fixed(min(at, check.longest()), max(8, per_class // 10))
        to_run = np.array([config.classes.index(known) for known in source.classes])
        tokens, held, labels = [], [], []
        for length in lengths:
            windows = self.drawn[length]
            pieces = -(-length // at)
            test = np.pad(windows.tokens(self.store)[0], ((0, 0), (0, pieces * at - length)), constant_values=nucleotide.PAD)
            tokens.append(test.reshape(-1, at))
            held.append(np.tile(np.minimum(at, length - np.arange(pieces) * at), len(windows)))
            labels.append(np.repeat(self.to_run[windows.label], pieces))
        parts = [
            Sequences(learn.tokens(training)[0], learn.length.copy(), to_run[learn.label]),
            Sequences(choose.tokens(training)[0], choose.length.copy(), to_run[choose.label]),
            Sequences(np.concatenate(tokens), np.concatenate(held), np.concatenate(labels)),
        ]
        n_classes = len(config.classes)
        kind = "binary" if n_classes == 2 else "multi-class"
        if name == "k-mers":
            result = kmer_baseline(*parts, kind, n_classes, ks=range(1, config.eval.max_k + 1))
        else:
            result = cnn_baseline(*parts, kind, n_classes, device=self.device)
        found, first = {}, 0
        for length, part in zip(lengths, tokens):
            mine = result.predictions[first : first + len(part)]
            first += len(part)
            found[length] = replace(result, predictions=mine)
            if length > at:
                mean = np.log(mine.clip(1e-12)).reshape(len(self.drawn[length]), -1, n_classes).mean(1)
                predictions = torch.from_numpy(mean).softmax(1).numpy()
                detail = f"{result.detail}; mean over pieces of {at:,}"
                found[length] = replace(result, predictions=predictions, detail=detail)
        return found


def _content(store: TokenStore) -> str:
    """What a dataset holds and how it is split, wherever it lies and whatever its sources were called."""
    manifest = store.manifest
    return hashlib.sha256(json.dumps([manifest["sha256"], manifest["classes"], manifest["splits"]]).encode()).hexdigest()


def _read_cache(path: Path, key: dict) -> BaselineResult | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            facts = json.loads(str(kept["facts"]))
            if facts.pop("key") != key:
                return None
            return BaselineResult(name=key["name"], predictions=kept["predictions"], **facts)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(path: Path, key: dict, result: BaselineResult) -> None:
    facts = {"key": key, "detail": result.detail, "valid": result.valid, "seconds": result.seconds}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, predictions=result.predictions, facts=json.dumps(facts))

    write_atomic(path, write)


# -- report --------------------------------------------------------------------------------------------------------
SHOWN = {"model": "model", "k-mers": "k-mer logistic regression", "cnn": "small CNN", "chance": "chance"}


def evaluation_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that `eval` prints: accuracy by length, the model and the baselines."""
    names = list(evaluation.results[0].metrics)
    header = ["length", "windows", "apart", *names]
    rows = []
    for result in evaluation.results:
        cells = [f"{100 * result.accuracy(name):.2f} %" for name in names]
        rows.append([f"{result.length:,}", f"{result.windows:,}", f"{result.independent:,}", *cells])
    return header, rows


def evaluation_verdict(evaluation: Evaluation) -> str:
    """One honest sentence: where the model wins, where a baseline does."""
    lost = []
    for result in evaluation.results:
        for name in result.details:
            if result.accuracy(name) > result.accuracy("model"):
                lost.append(
                    f"{result.length:,} ({SHOWN[name]} {100 * result.accuracy(name):.2f} % against "
                    f"{100 * result.accuracy('model'):.2f} %)"
                )
    if lost:
        return f"A baseline beats the model at length {', '.join(lost)}."
    guessed = [f"{r.length:,}" for r in evaluation.results if r.accuracy("model") <= r.accuracy("chance")]
    if guessed:
        return f"The model is no better than chance at length {', '.join(guessed)}."
    if not evaluation.results[0].details:
        return "No baseline was asked for (eval.baselines)."
    first, last = evaluation.results[0], evaluation.results[-1]
    best = max(first.details, key=first.accuracy)
    ratio = (1 - first.accuracy("model")) / max(1e-9, 1 - first.accuracy(best))
    accuracy = f"{100 * first.accuracy('model'):.2f} %"
    grows = f"accuracy goes from {accuracy} there to {100 * last.accuracy('model'):.2f} % at {last.length:,}"
    return (
        f"No baseline beats the model at any length. At {first.length:,} bases it makes {ratio:.2f} times the errors of the "
        f"best baseline ({SHOWN[best]}); {grows if last is not first else f'accuracy is {accuracy}'}."
    )


def published_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows of the published figures for exactly these species, if there are any."""
    found = published.species_figures(evaluation.classes)
    if found is None:
        return None
    table, source = found
    lengths = sorted({length for row in table.values() for length in row})
    rows = [[model, *(f"{100 * row[n]:.2f} %" if n in row else "-" for n in lengths)] for model, row in table.items()]
    return [source, *(f"{n:,}" for n in lengths)], rows


def evaluation_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Plain values for --json."""
    return {
        "split": evaluation.split,
        "classes": list(evaluation.classes),
        "trained_context": evaluation.trained_context,
        "lengths": {
            str(result.length): {
                "windows": result.windows,
                "independent": result.independent,
                "baselines": result.details,
                **{name: {"accuracy_mean_over_species": result.accuracy(name), **m} for name, m in result.metrics.items()},
            }
            for result in evaluation.results
        },
    }


def plot_accuracy(evaluation: Evaluation, path: Path) -> Path:
    """Accuracy against length: the model and the baselines."""
    figure, axes = report.new_figure()
    styles = {
        "model": dict(color=report.MODEL, linewidth=2, marker="o", markersize=5, zorder=3),
        "k-mers": dict(color=report.BASELINE, linewidth=1.6, marker="s", markersize=4),
        "cnn": dict(color=report.INK, linewidth=1.2, marker="^", markersize=4),
        "chance": dict(color=report.FAINT, linewidth=1.2, linestyle="--"),
    }
    lengths = [result.length for result in evaluation.results]
    for name in evaluation.results[0].metrics:
        axes.plot(lengths, [100 * r.accuracy(name) for r in evaluation.results], label=SHOWN[name], **styles[name])
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30, fontsize=8)
    axes.set_xlabel("length (bases)")
    axes.set_ylabel("accuracy, mean over species (%)")
    axes.set_title(f"{len(evaluation.classes)} species, {evaluation.split} split", fontsize=10, color=report.INK)
    axes.legend(frameon=False, fontsize=8)
    return report.save_figure(figure, path)


def write_report(run_dir: Path, evaluation: Evaluation, name: str = "evaluation", out: Path | None = None) -> Path:
    """Plots, `{name}.json` and the report of a run, in `out` (default: the run); returns the report's path."""
    run_dir = Path(run_dir)
    out = Path(out or run_dir)
    plots = out / "plots"
    write_json(out / f"{name}.json", evaluation_dict(evaluation))
    plot_accuracy(evaluation, plots / f"{name}.png")
    first, last = evaluation.results[0], evaluation.results[-1]
    shown = dict.fromkeys((first.length, last.length))
    for result in evaluation.results:
        if result.length in shown:
            plot_confusion(
                result.metrics["model"]["confusion"], evaluation.classes, plots / f"{name}-confusion-{result.length}.png",
                f"model, {result.length:,} bases",
            )
    plot_calibration(evaluation.confidence, plots / f"{name}-calibration.png", f"{first.length:,} bases")
    header, rows = evaluation_rows(evaluation)
    facts = read_run_facts(run_dir) if (run_dir / "run.json").is_file() else {}
    lines = [f"# {run_dir.name}", "", evaluation_verdict(evaluation), "", report.markdown_table(header, rows), ""]
    lines += [
        f"Accuracy is the mean over species of the share that is right, on fixed windows of the {evaluation.split} split; "
        "`apart` counts the windows that share no base. Baselines learn from windows of the same length of the same training "
        "split and choose on its validation split:",
        "",
    ]
    if known := published_rows(evaluation):
        lines[-2:-2] = ["Published by others for these species, not measured here:", "", report.markdown_table(*known), ""]
    for result in evaluation.results:
        if result.details:
            lines.append(f"- {result.length:,}: " + "; ".join(f"{key} {text}" for key, text in result.details.items()))
    lines += ["", f"![accuracy by length](plots/{name}.png)", ""]
    for result in evaluation.results:
        if result.length in shown:
            lines += [
                f"## {result.length:,} bases", "",
                _confusion_table(evaluation.classes, result.metrics["model"]["confusion"]), "",
                f"![confusion](plots/{name}-confusion-{result.length}.png)", "",
            ]
    lines += [f"![calibration](plots/{name}-calibration.png)", ""]
    if evaluation.shared_kmers:
        lines += [_shared_text(evaluation), ""]
    lines += report.training_lines(run_dir, facts, SpeciesTask.metric, plots)
    write_text(path := report.report_path(out, name), "\n".join(lines))
    return path


def _confusion_table(classes: Sequence[str], confusion: list[list[int]]) -> str:
    rows = [[name, *(str(n) if n else "" for n in row)] for name, row in zip(classes, confusion)]
    return report.markdown_table(["true \\ predicted", *classes], rows)


def _shared_text(evaluation: Evaluation) -> str:
    """Which species' test sequences the training sequences of others hold."""
    matrix, k = evaluation.shared_kmers["test_in_train"], evaluation.shared_kmers["k"]
    names = evaluation.classes
    pairs = [
        (matrix[i][j], names[i], names[j])
        for i in range(len(matrix)) for j in range(len(matrix)) if i != j and matrix[i][j] >= 0.02 and len(names) == len(matrix)
    ]
    if not pairs:
        return f"No two species share 2 % or more of their {k}-mers between test and training."
    listed = ", ".join(f"{100 * share:.0f} % of {a}'s in {b}" for share, a, b in sorted(pairs, reverse=True))
    return (
        f"Relatives: of the test {k}-mers, the training split of another species holds {listed}. Such stretches point to the "
        "wrong species, since their own copy was held out."
    )
