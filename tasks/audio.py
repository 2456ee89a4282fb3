"""Raw audio: an autoregressive model of the next 8-bit sample, on recordings prepared by `seqlab prep audio`.

One record: a recording of n codes q0 .. q(n-1), or a window of it. The model reads the codes one step late and predicts
each:

    ids     zero  q0  q1  ...  q(n-2)        zero: the code of silence, which stands before a recording begins
    target    q0  q1  q2  ...  q(n-1)

so every sample of every recording is a target, the first one too. A window that begins inside a recording reads the real
sample before it instead of zero; either way the model's state starts from zero. Short recordings are whole windows, padded on
the right to the longest of their batch with weight 0.

Split rule: by recording (or along time within each, for a few long ones), decided by `seqlab prep audio`.

Bits per sample are over all 256 codes. With classes, a share of the windows is shown as of the class "unknown" in training,
so that one model gives both the conditional and the unconditional likelihood; evaluation uses the latter.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from seqlab.dataset import CoveringSampler, TokenStore
from seqlab.errors import UserError
from seqlab.heads.language import weighted_cross_entropy
from seqlab.model import ModelConfig
from seqlab.model import build_model as build_language_model
from seqlab.tokenizers.waveform import QUANTIZERS
from seqlab.training.fit import FitResult
from seqlab.training.module import TrainConfig, step_seed
from seqlab.training.optim import OptimConfig
from seqlab.training.task import Batch
from tasks import runs

NAME = "audio"
VOCAB = 256


@dataclass(frozen=True)
class SoundConfig:
    """What the samples mean; taken from the dataset, so that a checkpoint alone can read a prompt and write a WAV."""

    sample_rate: int | None = None
    quantizer: str = "mulaw-256"
    scale: float = 1.0
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer: must be one of {', '.join(QUANTIZERS)}, got {self.quantizer}")

    @property
    def unknown(self) -> int:
        """The class index that says nothing: one past the labels."""
        return len(self.labels)


@dataclass(frozen=True)
class DataConfig:
    context: int = 8192
    classes: Literal["auto", "none"] = "auto"  # auto: condition on the dataset's labels, if it has any
    class_dropout: float = 0.2  # share of training windows shown as of the class "unknown"
    input_noise: float = 0.0  # standard deviation, in codes, of noise on the inputs (not the targets): a regulariser

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"context: must be 2 or more, got {self.context}")
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout: must lie in [0, 1], got {self.class_dropout}")
        if not 0 <= self.input_noise < 64:
            raise ValueError(f"input_noise: in codes, must lie in [0, 64), got {self.input_noise}")


@dataclass(frozen=True)
class EvalConfig:
    contexts: tuple[int, ...] = ()  # empty: 16, 64, 256, ... to the longest that the split holds
    max_context: int = 1_048_576
    max_samples: int | None = 2_000_000  # at most this many samples of the split, evenly spread; null: all

    def __post_init__(self) -> None:
        if any(c < 1 for c in self.contexts):
            raise ValueError(f"contexts: each must be 1 or more, got {list(self.contexts)}")


@dataclass(frozen=True)
class AudioConfig:
    """One run of `seqlab train audio`."""

    task: Literal["audio"] = "audio"
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=VOCAB, tie_embeddings=False))
    sound: SoundConfig = field(default_factory=SoundConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.model.vocab_size != VOCAB:
            raise ValueError(f"model.vocab_size: sound has {VOCAB} codes, got {self.model.vocab_size}")
        if self.model.direction != "causal" or self.model.strand != "single":
            raise ValueError("model: sound has one direction and one strand; use direction: causal and strand: single")


Config = AudioConfig


def build_model(config: AudioConfig) -> nn.Module:
    return build_language_model(config.model)


class AudioModeling:
    """The task that `seqlab.training` trains; see seqlab/training/task.py for the protocol."""

    metric = "bits per sample"

    def __init__(self, config: AudioConfig, store: TokenStore):
        self.config, self.store = resolve(config, store), store
        self._samplers: dict[tuple[int, int], CoveringSampler] = {}
        self._sampler(0, 1)  # fails now, not at the first step, if the split is empty
        known = {label: i for i, label in enumerate(self.config.sound.labels)}
        labels = [known.get(s.get("label"), self.config.sound.unknown) for s in store.manifest["sequences"]]
        self.class_of = np.array(labels, np.int64)
        self.zero = QUANTIZERS[self.config.sound.quantizer].zero

    def build_model(self) -> nn.Module:
        return build_model(self.config)

    def resolved_config(self) -> AudioConfig:
        return self.config

    # -- data ------------------------------------------------------------------------------------------------------
    def _sampler(self, rank: int, world_size: int) -> CoveringSampler:
        key = (rank, world_size)
        if key not in self._samplers:
            train = self.config.train
            self._samplers[key] = CoveringSampler(
                self.store,
                "train",
                self.config.data.context,
                train.tokens_per_step,
                seed=train.seed,
                rank=rank,
                world_size=world_size,
            )
        return self._samplers[key]

    def train_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        bounds = self._sampler(rank, world_size).bounds(step)
        rng = np.random.Generator(np.random.Philox(key=step_seed(self.config.train.seed, step, rank)))
        hidden = rng.random(len(bounds)) < self.config.data.class_dropout
        batches = []
        for rows in group_by_length(bounds[:, 1] - bounds[:, 0], self.config.train.micro_batch_tokens):
            batch = self.batch(bounds[rows], hidden[rows])
            if self.config.data.input_noise:
                noise = np.rint(rng.normal(0, self.config.data.input_noise, batch["ids"].shape)).astype(np.int16)
                noisy = np.clip(batch["ids"].numpy().astype(np.int16) + noise, 0, VOCAB - 1)
                batch["ids"] = torch.from_numpy(noisy.astype(np.uint8))
            batches.append(batch)
        return batches

    def batch(self, bounds: np.ndarray, hidden: np.ndarray | None = None) -> Batch:
        """Windows (start, end, start of the interval), (b 3) -> ids, target, weight (b l), start (b,) and, with classes,
        classes (b,): "unknown" where `hidden` (None: everywhere)."""
        longest = int((bounds[:, 1] - bounds[:, 0]).max())
        target = np.full((len(bounds), longest), self.zero, np.uint8)
        ids = target.copy()
        weight = np.zeros(target.shape, np.float32)
        tokens = self.store.tokens
        for row, (start, end, begin) in enumerate(bounds.tolist()):
            n = end - start
            target[row, :n] = tokens[start:end]
            ids[row, 1:n] = target[row, : n - 1]
            if start > begin:
                ids[row, 0] = tokens[start - 1]
            weight[row, :n] = 1
        batch = {
            "ids": torch.from_numpy(ids),
            "target": torch.from_numpy(target),
            "weight": torch.from_numpy(weight),
            "start": torch.from_numpy(np.ascontiguousarray(bounds[:, 0])),
        }
        if self.config.model.n_classes:
            classes = np.full(len(bounds), self.config.sound.unknown, np.int64)
            if hidden is not None:
                sequence = np.searchsorted(self.store.offsets, bounds[:, 0], side="right") - 1
                classes = np.where(hidden, classes, self.class_of[sequence])
            batch["classes"] = torch.from_numpy(classes)
        return batch

    def validation_batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """The validation split in windows of the training context, thinned evenly to validation_tokens."""
        train, context = self.config.train, self.config.data.context
        spans = thin_spans(spans_of(self.store, "valid", context), train.validation_tokens)
        mine = spans[rank::world_size]
        budget = train.micro_batch_tokens or train.tokens_per_step
        for rows in group_by_length(mine[:, 1] - mine[:, 0], budget):
            yield self.batch(mine[rows])

    # -- loss ------------------------------------------------------------------------------------------------------
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, _ = model(batch["ids"], return_state=False, **classes_of(batch))
        return weighted_cross_entropy(logits, batch["target"], batch["weight"])

    def weight(self, batch: Batch) -> float:
        return batch["weight"].sum().item()

    def tokens(self, batch: Batch) -> int:
        return int(batch["weight"].sum().item())

    def metric_value(self, mean_loss: float) -> float:
        return mean_loss / math.log(2)

    def describe(self, batch: Batch) -> str:
        places = [self.store.locate(int(start)) for start in batch["start"][:3]]
        more = f" and {len(batch['start']) - 3} more" if len(batch["start"]) > 3 else ""
        return "windows at " + ", ".join(f"{name} sample {at:,}" for name, at in places) + more


def classes_of(batch: Batch) -> dict[str, Tensor]:
    return {"classes": batch["classes"]} if "classes" in batch else {}


def resolve(config: AudioConfig, store: TokenStore) -> AudioConfig:
    """The config with what it takes from the dataset filled in. Raises UserError if the dataset is not sound, or not the
    kind of sound that the config (of a resumed run) names."""
    manifest = store.manifest
    if store.kind != "audio":
        raise UserError(f"{store.directory}: is a dataset of {store.kind}; give one that `seqlab prep audio` wrote")
    labels = tuple(manifest["labels"]) if config.data.classes == "auto" else ()
    sound = SoundConfig(manifest["sample_rate"], manifest["tokenizer"], manifest["scale"], labels)
    if config.sound.sample_rate is not None and config.sound != sound:
        raise UserError(f"{store.directory}: other sample rate, quantizer, scale or labels than the run's; use its own dataset")
    model = dataclasses.replace(config.model, n_classes=len(labels) + 1 if labels else 0)
    return dataclasses.replace(config, sound=sound, model=model)


def train(
    config: AudioConfig, dataset: Path, run_dir: Path, *, init: Path | None = None, resume: bool = False
) -> FitResult:
    """Train on a prepared dataset into `run_dir`. Nothing is created before the configuration is known to fit."""
    store = TokenStore.open(dataset)
    task = AudioModeling(config, store)
    if not len(store.intervals("valid")):
        raise UserError(f"{dataset}: no valid split; early stopping needs one: prepare it again with a valid split")
    return runs.train(task, run_dir, dataset, store.hash, init=init, resume=resume)


# -- windows -------------------------------------------------------------------------------------------------------
def spans_of(store: TokenStore, split: str, context: int) -> np.ndarray:
    """Every token of a split once, in windows of at most `context`: (k 3) start, end, start of the interval."""
    rows = [
        (at, min(at + context, end), start)
        for start, end in store.intervals(split).tolist()
        for at in range(start, end, context)
    ]
    return np.array(rows, np.int64).reshape(-1, 3)


def thin_spans(spans: np.ndarray, keep_tokens: int | None) -> np.ndarray:
    """At most about `keep_tokens` tokens of them (at least one span), evenly spread."""
    total = int((spans[:, 1] - spans[:, 0]).sum())
    if keep_tokens is None or total <= keep_tokens:
        return spans
    keep = max(1, int(len(spans) * keep_tokens / total))
    return spans[np.arange(keep) * len(spans) // keep]


def group_by_length(lengths: np.ndarray, budget: int | None) -> list[np.ndarray]:
    """Row numbers in groups of like length, each of at most `budget` tokens with its padding (or one row)."""
    order = np.argsort(-lengths, kind="stable")
    if budget is None:
        return [order] if len(order) else []
    groups = []
    while len(order):
        rows = max(1, budget // int(lengths[order[0]]))
        groups.append(order[:rows])
        order = order[rows:]
    return groups
