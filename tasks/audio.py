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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from seqlab import report
from seqlab.audio import change_speed
from seqlab.dataset import CoveringSampler, TokenStore
from seqlab.errors import UserError
from seqlab.files import write_json, write_text
from seqlab.heads.language import weighted_cross_entropy
from seqlab.model import ModelConfig
from seqlab.model import build_model as build_language_model
from seqlab.predictors import AdaptivePredictor, CodeMarkov, correlations
from seqlab.report import audio_evaluation_dict as evaluation_dict
from seqlab.tokenizers.waveform import QUANTIZERS
from seqlab.training.config import TrainConfig, step_seed
from seqlab.training.facts import FitResult, read_run_facts
from seqlab.training.optim import OptimConfig
from seqlab.training.task import Batch
from tasks import runs

NAME = "audio"
VOCAB = 256
SILENCE_WEIGHT = 0.05  # of a sample of `data.end_silence`


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
    # seconds of silence that are taught to follow the end of a recording, with little weight: without them a model of short
    # recordings has never heard one end, and what it makes beyond their length is anybody's guess
    end_silence: float = 0.0
    # augmentation, for small datasets: every training window is played louder or softer, faster or slower, and quantized anew
    gain_db: float = 0.0  # up to so much louder or softer
    speed: float = 0.0  # up to this share faster or slower
    input_noise: float = 0.0  # standard deviation, in codes, of noise on the inputs (not the targets)

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"context: must be 2 or more, got {self.context}")
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout: must lie in [0, 1], got {self.class_dropout}")
        if not 0 <= self.end_silence <= 60:
            raise ValueError(f"end_silence: in seconds, must lie in 0 .. 60, got {self.end_silence}")
        if not 0 <= self.gain_db <= 40:
            raise ValueError(f"gain_db: must lie in 0 .. 40, got {self.gain_db}")
        if not 0 <= self.speed <= 0.5:
            raise ValueError(f"speed: must lie in 0 .. 0.5, got {self.speed}")
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
class GenerationConfig:
    hold: float = 0.0  # of the linear prediction (heads/sample.py), where `generate audio --hold` does not say otherwise

    def __post_init__(self) -> None:
        if not 0 <= self.hold <= 1:
            raise ValueError(f"hold: must lie in 0 .. 1, got {self.hold}")


@dataclass(frozen=True)
class AudioConfig:
    """One run of `seqlab train audio`."""

    task: Literal["audio"] = "audio"
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=VOCAB, tie_embeddings=False))
    # start with embeddings and output weights that are smooth functions of the code, so that neighbours are alike
    smooth_init: bool = False
    sound: SoundConfig = field(default_factory=SoundConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        if self.model.vocab_size != VOCAB:
            raise ValueError(f"model.vocab_size: sound has {VOCAB} codes, got {self.model.vocab_size}")
        if self.model.direction != "causal" or self.model.strand != "single":
            raise ValueError("model: sound has one direction and one strand; use direction: causal and strand: single")


Config = AudioConfig


def build_model(config: AudioConfig) -> nn.Module:
    model = build_language_model(config.model)
    if config.smooth_init:
        for weight in (model.embedding.weight, model.lm_head.weight):
            smooth_codes(weight)
    return model


@torch.no_grad()
def smooth_codes(weight: Tensor) -> None:
    """Fill (codes d) with waves along the codes, of half a period to 32 periods over all of them; variance as `normal_` of
    standard deviation 0.02."""
    codes, width = weight.shape
    periods = 0.5 * 64 ** torch.rand(width)
    phase = 2 * math.pi * (torch.arange(codes)[:, None] / codes * periods + torch.rand(width))
    weight.copy_(0.02 * math.sqrt(2) * torch.cos(phase))


class AudioObjective:
    """What is asked of a model of sound: the model and its loss. No data: this much is enough to plan a run."""

    metric = "bits per sample"
    positionwise = True

    def __init__(self, config: AudioConfig):
        self.config = config

    def build_model(self) -> nn.Module:
        return build_model(self.config)

    def resolved_config(self) -> AudioConfig:
        return self.config

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.piece(model, batch, 0, batch["ids"].shape[1], None, False)[:2]

    def piece(self, model: nn.Module, batch: Batch, start: int, stop: int, state: Any, more: bool) -> tuple[Tensor, Tensor, Any]:
        part = slice(start, stop)
        logits, state = model(batch["ids"][:, part], state, return_state=more, **classes_of(batch))
        return *weighted_cross_entropy(logits, batch["target"][:, part], batch["weight"][:, part]), state

    def weight(self, batch: Batch) -> float:
        return batch["weight"].sum().item()

    def tokens(self, batch: Batch) -> int:
        return int((batch["weight"] == 1).sum())

    def metric_value(self, mean_loss: float) -> float:
        return mean_loss / math.log(2)


class AudioModeling(AudioObjective):
    """The task that `seqlab.training` trains; see seqlab/training/task.py for the protocol."""

    def __init__(self, config: AudioConfig, store: TokenStore):
        super().__init__(resolve(config, store))
        self.store = store
        self._samplers: dict[tuple[int, int], CoveringSampler] = {}
        self._sampler(0, 1)  # fails now, not at the first step, if the split is empty
        self.class_of = class_indices(store, self.config.sound.labels)
        self.zero = QUANTIZERS[self.config.sound.quantizer].zero
        self.end_silence = round(self.config.data.end_silence * self.config.sound.sample_rate)
        self._ends = store.offsets + store.lengths  # of the recordings, in increasing order
        # augmentation takes about as long as a GPU's step, so the next step's is made meanwhile; a CPU is busy itself
        self.prefetch = torch.cuda.is_available() and (config.data.gain_db > 0 or config.data.speed > 0)
        # a GPU records the steps of a layout that comes again (seqlab/training/graphs.py); recordings have lengths of their own
        self.multiple = max(1, config.data.context // 16) if torch.cuda.is_available() else 1
        self._worker = ThreadPoolExecutor(1)  # starts its thread when it is first used
        self._ahead: dict[tuple[int, int, int], Future] = {}

    def build_model(self) -> nn.Module:
        model = super().build_model()
        if model.prediction_head is not None:
            levels = QUANTIZERS[self.config.sound.quantizer].levels
            model.prediction_head.fit(levels, correlations(self.store, levels, self.config.model.prediction_order))
        return model

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
        if not self.prefetch:
            return self._train_batches(step, rank, world_size)
        ready = self._ahead.pop((step, rank, world_size), None)
        batches = self._train_batches(step, rank, world_size) if ready is None else ready.result()
        self._ahead = {(step + 1, rank, world_size): self._worker.submit(self._train_batches, step + 1, rank, world_size)}
        return batches

    def _train_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        bounds = self._sampler(rank, world_size).bounds(step)
        rng = np.random.Generator(np.random.Philox(key=step_seed(self.config.train.seed, step, rank)))
        hidden = rng.random(len(bounds)) < self.config.data.class_dropout
        batches = []
        for rows in group_by_length(bounds[:, 1] - bounds[:, 0], self.config.train.micro_batch_tokens):
            batch = self.batch(bounds[rows], hidden[rows], self._augmenter(rng), self.end_silence, self.multiple)
            if self.config.data.input_noise:
                noise = np.rint(rng.normal(0, self.config.data.input_noise, batch["ids"].shape)).astype(np.int16)
                noisy = np.clip(batch["ids"].numpy().astype(np.int16) + noise, 0, VOCAB - 1)
                batch["ids"] = torch.from_numpy(noisy.astype(np.uint8))
            batches.append(batch)
        return batches

    def _augmenter(self, rng: np.random.Generator):
        """Codes of a window -> codes of the window as another recording level and speed would have given them; or None."""
        data, quantizer = self.config.data, QUANTIZERS[self.config.sound.quantizer]
        if not data.gain_db and not data.speed:
            return None
        edges = np.clip(quantizer.edges(), -1, 1).astype(np.float32)

        def augment(codes: np.ndarray) -> np.ndarray:
            # a random amplitude that has the code, so that the new codes have no gaps
            samples = edges[codes] + rng.random(len(codes), dtype=np.float32) * (edges[1:] - edges[:-1])[codes]
            # never so loud that it clips: a model that has heard clipping makes it
            headroom_db = -20 * math.log10(max(1e-3, float(np.abs(samples).max()))) - 0.5  # resampling may overshoot
            loudest_db = min(data.gain_db, headroom_db)
            samples *= np.float32(10 ** (rng.uniform(min(-data.gain_db, loudest_db), loudest_db) / 20))
            if data.speed:
                samples = change_speed(samples, 1 + rng.uniform(-data.speed, data.speed))
            return quantizer.encode(samples)

        return augment

    def batch(
        self, bounds: np.ndarray, hidden: np.ndarray | None = None, augment=None, end_silence: int = 0, multiple: int = 1
    ) -> Batch:
        """Windows (start, end, start of the interval), (b 3) -> ids, target, weight (b l), start (b,) and, with classes,
        classes (b,): "unknown" where `hidden` (None: everywhere)."""
        is_end = self._ends[np.searchsorted(self._ends, bounds[:, 1])] == bounds[:, 1]
        silence = np.where(is_end, end_silence, 0)
        ids, target, weight = read_windows(self.store, bounds, self.zero, augment, silence, multiple)
        batch = {
            "ids": torch.from_numpy(ids),
            "target": torch.from_numpy(target),
            "weight": torch.from_numpy(weight),
            "start": torch.from_numpy(np.ascontiguousarray(bounds[:, 0])),
        }
        if self.config.model.n_classes:
            classes = np.full(len(bounds), self.config.sound.unknown, np.int64)
            if hidden is not None:
                classes = np.where(hidden, classes, self.class_of[sequence_of(self.store, bounds)])
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

    def describe(self, batch: Batch) -> str:
        places = [self.store.locate(int(start)) for start in batch["start"][:3]]
        more = f" and {len(batch['start']) - 3} more" if len(batch["start"]) > 3 else ""
        return "windows at " + ", ".join(f"{name} sample {at:,}" for name, at in places) + more


def example(config: AudioConfig, rows: int, length: int) -> tuple[AudioObjective, Batch]:
    """The task without its data, and noise: what `seqlab plan` measures."""
    codes = torch.randint(VOCAB, (rows, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = {"ids": codes, "target": codes.roll(-1, 1), "weight": torch.ones(rows, length)}
    if config.model.n_classes:
        batch["classes"] = torch.zeros(rows, dtype=torch.int64)
    return AudioObjective(config), batch


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
    resume, init = runs.start_of(run_dir, resume, init)
    task = AudioModeling(config, store)
    if not len(store.intervals("valid")):
        raise UserError(f"{dataset}: no valid split; early stopping needs one: prepare it again with a valid split")
    runs.check_lengths("eval.contexts", config.eval.contexts, store)
    return runs.train(task, run_dir, dataset, store.hash, init=init, resume=resume)


def class_indices(store: TokenStore, labels: tuple[str, ...]) -> np.ndarray:
    """(sequences,) the class of each recording; one past the labels where it has none of them."""
    known = {label: i for i, label in enumerate(labels)}
    return np.array([known.get(s.get("label"), len(labels)) for s in store.manifest["sequences"]], np.int64)


# -- windows -------------------------------------------------------------------------------------------------------
def spans_of(store: TokenStore, split: str, context: int) -> np.ndarray:
    """Every token of a split once, in windows of at most `context`: (k 3) start, end, start of the interval."""
    rows = [
        (at, min(at + context, end), start)
        for start, end in store.intervals(split).tolist()
        for at in range(start, end, context)
    ]
    return np.array(rows, np.int64).reshape(-1, 3)


def sequence_of(store: TokenStore, bounds: np.ndarray) -> np.ndarray:
    """Index of the recording in which each window lies."""
    return np.searchsorted(store.offsets, bounds[:, 0], side="right") - 1


def read_windows(
    store: TokenStore,
    bounds: np.ndarray,
    zero: int,
    augment: Callable[[np.ndarray], np.ndarray] | None = None,
    silence: np.ndarray | None = None,
    multiple: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows (start, end, start of the interval), (b 3) -> ids uint8, target uint8, weight float32, each (b l), padded on
    the right with silence, l to a multiple of `multiple`: ids are the targets one sample late. `augment` turns the codes of a
    window into others; the first `silence` (b,) samples of padding weigh SILENCE_WEIGHT."""
    silence = np.zeros(len(bounds), np.int64) if silence is None else silence
    rows = []
    for start, end, begin in bounds.tolist():
        codes = store.tokens[max(begin, start - 1) : end]
        codes = codes if augment is None else augment(codes)
        rows.append(codes if start > begin else np.concatenate([np.full(1, zero, np.uint8), codes]))
    longest = max(len(codes) - 1 + n for codes, n in zip(rows, silence.tolist()))
    ids = np.full((len(rows), -(-longest // multiple) * multiple), zero, np.uint8)
    target = ids.copy()
    weight = np.zeros(ids.shape, np.float32)
    for i, codes in enumerate(rows):
        n = len(codes) - 1
        ids[i, :n], target[i, :n], weight[i, :n] = codes[:-1], codes[1:], 1
        if silence[i]:
            ids[i, n] = codes[-1]
            weight[i, n : n + silence[i]] = SILENCE_WEIGHT
    return ids, target, weight


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


# -- evaluation ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Score:
    """Mean over one set of samples."""

    bits: float
    samples: int

    @property
    def nats(self) -> float:
        return self.bits * math.log(2)


@dataclass(frozen=True)
class Evaluation:
    """Scores of an audio model by context length, with the predictors of seqlab/predictors.py on the same samples."""

    split: str
    contexts: dict[int, Score]
    baselines: dict[str, Score]
    samples: int
    recordings: int
    sample_rate: int
    trained_context: int
    with_class: Score | None = None  # at the longest context, each recording's class given; None: no classes

    @property
    def best(self) -> tuple[int, Score]:
        return min(self.contexts.items(), key=lambda item: item[1].bits)

    @property
    def best_baseline(self) -> tuple[str, Score]:
        return min(self.baselines.items(), key=lambda item: item[1].bits)


def default_contexts(trained: int, longest: int, limit: int) -> list[int]:
    """16, 64, 256, ..., the trained context and the longest that the split holds."""
    top = min(longest, limit)
    contexts = {c for c in (16 * 4**i for i in range(14)) if c <= top} | {min(trained, top)}
    if top > 1.25 * max(contexts):
        contexts.add(top)
    return sorted(contexts)


def evaluate_run(
    run: runs.LoadedRun,
    store: TokenStore,
    training: TokenStore,
    *,
    split: str = "test",
    contexts: Iterable[int] = (),
    device: str = "cpu",
    progress=None,
) -> Evaluation:
    """Score a run on a split at each context length, and the predictors, fitted on `training`, on the same samples.

    The split is cut into spans of the longest context; each shorter context cuts those further, so every context length
    predicts the same samples: each from those before it in its window, from a state of zero. `progress(done, total)` is
    called with samples.
    """
    config: AudioConfig = run.config
    if store.kind != "audio":
        raise UserError(f"{store.directory}: is a dataset of {store.kind}; give one that `seqlab prep audio` wrote")
    own = (config.sound.sample_rate, config.sound.quantizer)
    theirs = (store.manifest["sample_rate"], store.manifest["tokenizer"])
    if own != theirs:
        raise UserError(
            f"{store.directory}: {theirs[0]:,} Hz, {theirs[1]}, but the run was trained on {own[0]:,} Hz, {own[1]}; prepare it "
            f"again with --sample-rate {own[0]} --quantizer {own[1]} --scale {config.sound.scale:.6g}"
        )
    intervals = store.intervals(split)
    if not len(intervals):
        raise UserError(f"the dataset has no {split} split; choose --split train, valid or test, or prepare it with one")
    longest = int((intervals[:, 1] - intervals[:, 0]).max())
    contexts = sorted(set(contexts or config.eval.contexts))
    if not contexts:
        contexts = default_contexts(config.data.context, longest, config.eval.max_context)
    if contexts[-1] > longest:
        raise UserError(f"--context {contexts[-1]}: the longest stretch of the {split} split holds {longest:,} samples")
    spans = thin_spans(spans_of(store, split, contexts[-1]), config.eval.max_samples)
    samples = int((spans[:, 1] - spans[:, 0]).sum())
    scorer = Scorer(run.model, config, store, device)
    labels = config.sound.labels
    classes = class_indices(store, labels)
    is_labelled = bool(labels) and bool((classes < len(labels)).all())
    done, total = 0, samples * (len(contexts) + is_labelled)

    def mean_bits(context: int, class_of: np.ndarray | None) -> Score:
        nonlocal done
        bits = 0.0
        for nats, count in scorer.run(spans, context, class_of):
            bits += nats / math.log(2)
            done += count
            if progress is not None:
                progress(done, total)
        return Score(bits / samples, samples)

    scores = {context: mean_bits(context, None) for context in contexts}
    with_class = mean_bits(contexts[-1], classes) if is_labelled else None
    return Evaluation(
        split=split,
        contexts=scores,
        baselines={name: Score(float(bits.mean()), len(bits)) for name, bits in baseline_bits(store, training, spans)},
        samples=samples,
        recordings=len(np.unique(sequence_of(store, spans))),
        sample_rate=config.sound.sample_rate,
        trained_context=config.data.context,
        with_class=with_class,
    )


def baseline_bits(store: TokenStore, training: TokenStore, spans: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name, bits of every sample) of each predictor."""
    where = [tuple(row) for row in spans.tolist()]
    for order, bits in CodeMarkov.fit(training).score(store, where).items():
        yield "unigram" if order == 0 else f"Markov order {order}", bits
    model = AdaptivePredictor.fit(training)
    yield f"adaptive linear, order {model.settings.order}", model.score(store, where)


class Scorer:
    """Runs a model over spans in windows of one context."""

    def __init__(self, model: nn.Module, config: AudioConfig, store: TokenStore, device: str = "cpu"):
        self.model, self.config, self.store = model.to(device).eval(), config, store
        self.device = torch.device(device)
        precision = config.train.precision
        self.bf16 = precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")
        self.zero = QUANTIZERS[config.sound.quantizer].zero
        # tokens of one forward pass: about 50 (b l d_inner) float32 tensors' worth of 1 GB (CPU) or 20 GB (GPU)
        budget = (1 if self.device.type == "cpu" else 20) * 2**30
        self.tokens_at_once = max(1024, budget // (50 * 4 * config.model.d_inner))

    @torch.inference_mode()
    def run(self, spans: np.ndarray, context: int, class_of: np.ndarray | None = None) -> Iterator[tuple[float, int]]:
        """(sum of nats, samples) of one batch after the other; `class_of` (sequences,): None for "unknown"."""
        rows = [
            (at, min(at + context, end), begin) for start, end, begin in spans.tolist() for at in range(start, end, context)
        ]
        # a window inside a recording reads the sample before it, so what `read_windows` needs is the recording's start
        windows = np.array(rows, np.int64).reshape(-1, 3)
        for group in group_by_length(windows[:, 1] - windows[:, 0], self.tokens_at_once):
            bounds = windows[group]
            yield self._nats(bounds, class_of), int((bounds[:, 1] - bounds[:, 0]).sum())

    def _nats(self, bounds: np.ndarray, class_of: np.ndarray | None) -> float:
        ids, target, weight = (torch.from_numpy(a).to(self.device) for a in read_windows(self.store, bounds, self.zero))
        kwargs = {}
        if self.config.model.n_classes:
            classes = np.full(len(bounds), self.config.sound.unknown, np.int64)
            if class_of is not None:
                classes = class_of[sequence_of(self.store, bounds)]
            kwargs["classes"] = torch.from_numpy(classes).to(self.device)
        state, total = None, 0.0
        step = max(1, self.tokens_at_once // len(ids))
        for at in range(0, ids.shape[1], step):
            part = slice(at, at + step)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                logits, state = self.model(ids[:, part], state, return_state=at + step < ids.shape[1], **kwargs)
            loss, _ = weighted_cross_entropy(logits.float(), target[:, part], weight[:, part])
            total += loss.double().item()
        return total


def write_report(run_dir: Path, evaluation: Evaluation, name: str = "evaluation", out: Path | None = None) -> Path:
    """Plots, `{name}.json` and the report of a run, in `out` (default: the run); returns the report's path."""
    target = Path(out or run_dir)
    plots = target / "plots"
    report.plot_audio_evaluation(evaluation, plots / f"{name}.png")
    write_json(target / f"{name}.json", evaluation_dict(evaluation))
    header, rows = report.audio_evaluation_rows(evaluation)
    lines = [f"# {Path(run_dir).name}", "", report.audio_verdict(evaluation), "", report.markdown_table(header, rows), ""]
    lines += [
        "Every row scores the same samples. Unigram, Markov and adaptive linear predictors are fitted on the training split.",
        "",
        f"![bits per sample by context](plots/{name}.png)",
        "",
    ]
    best, score = evaluation.best_baseline
    level = (f"{best}, test", score.bits)
    lines += report.training_lines(run_dir, read_run_facts(run_dir), AudioModeling.metric, plots, level, "samples")
    write_text(path := report.report_path(target, name), "\n".join(lines))
    return path
