"""Labelled sequences: binary, multi-class, multi-label or regression, fine-tuned or from scratch, beside two baselines.

One record: a sequence of any length and its label, for example the 81 bases around an E. coli transcription start, and
"promoter" or "none".

Split rule: the dataset's own test split; without a validation split of its own, each seed draws one from the training split
(stratified by label). Splits depend on what a sequence is, not where it stands, and duplicates fall on the same side.

A run has one or more seeds, each a run directory of its own in RUN/seeds; RUN/checkpoints/best is the seed with the best
validation, which `predict` uses. Reports give the mean over seeds and the range, for the model and the baselines alike.
"""

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlab import report
from seqlab.classification import baselines, published
from seqlab.classification.baselines import BaselineResult, chance, cnn_baseline, kmer_baseline
from seqlab.classification.dataset import LabelledStore
from seqlab.classification.metrics import (
    Kind,
    evaluate_predictions,
    main_metric,
    plot_calibration,
    plot_confusion,
    plot_regression,
)
from seqlab.classifier import ClassifierConfig, SequenceClassifier, load_pretrained
from seqlab.config import dump_yaml, from_dict, load_yaml
from seqlab.errors import UserError
from seqlab.files import write_atomic, write_json, write_text
from seqlab.inference.classify import Predictor
from seqlab.tokenizers import nucleotide
from seqlab.training.checkpoint import load_model
from seqlab.training.config import TrainConfig, step_seed
from seqlab.training.facts import FitResult, read_run_facts, write_run_facts
from seqlab.training.optim import OptimConfig
from seqlab.training.task import Batch
from tasks import runs
from tasks.run_directory import held

NAME = "classify"


@dataclass(frozen=True)
class DataConfig:
    max_length: int | None = None  # bases kept of a sequence, from its start; null: the benchmark's limit, else all
    valid_share: float = 0.1  # of the training split, where the dataset has no validation split
    batch_size: int = 64  # sequences a step

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length: must be 1 or more, or null, got {self.max_length}")
        if not 0 < self.valid_share < 1:
            raise ValueError(f"valid_share: must lie in (0, 1), got {self.valid_share}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: must be 1 or more, got {self.batch_size}")


@dataclass(frozen=True)
class EvalConfig:
    baselines: tuple[Literal["k-mers", "cnn"], ...] = ("k-mers", "cnn")
    max_k: int = 6
    baseline_seeds: int | None = None  # baselines learn with the first so many seeds; null: all

    def __post_init__(self) -> None:
        if not 1 <= self.max_k <= 6:
            raise ValueError(f"max_k: must lie in 1 .. 6, got {self.max_k}")
        if self.baseline_seeds is not None and self.baseline_seeds < 1:
            raise ValueError(f"baseline_seeds: must be 1 or more, or null, got {self.baseline_seeds}")


@dataclass(frozen=True)
class Config:
    """One run of `seqlab train classify`. Seeds are train.seed, train.seed + 1, ...

    kind, classes, target_mean and target_scale are the dataset's and are filled in. A run ends after `epochs`, or at
    train.max_steps or train.max_minutes (of each seed) if that comes first; validation is once an epoch, but at most 40
    times.
    """

    task: Literal["classify"] = "classify"
    kind: Literal["auto", "binary", "multi-class", "multi-label", "regression"] = "auto"
    classes: tuple[str, ...] = ()
    target_mean: float = 0.0  # regression: the model predicts (value - mean) / scale
    target_scale: float = 1.0
    seeds: int = 1
    epochs: float = 20.0
    min_steps: int = 0  # a small set has as many epochs more as make so many steps
    freeze: Literal["none", "backbone"] = "none"  # backbone: train the head alone
    class_weights: Literal["none", "balanced"] = "none"  # balanced: every class has the same weight in the loss
    select_by: Literal["loss", "error"] = "loss"  # what validation minimises: cross-entropy, or the share that is wrong
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds: must be 1 or more, got {self.seeds}")
        if not self.epochs > 0:
            raise ValueError(f"epochs: must be above 0, got {self.epochs}")
        if self.min_steps < 0:
            raise ValueError(f"min_steps: must be 0 or more, got {self.min_steps}")
        if not self.target_scale > 0:
            raise ValueError(f"target_scale: must be above 0, got {self.target_scale}")
        if self.data.batch_size % self.train.devices:
            raise ValueError(
                f"train.devices: data.batch_size {self.data.batch_size} cannot be shared evenly by {self.train.devices} "
                "devices; change data.batch_size"
            )
        if self.kind == "regression" and self.class_weights != "none":
            raise ValueError("class_weights: a regression has no classes; use none")
        for name in ("gene_order", "repeat_word", "homology", "composition"):
            if getattr(self.model, name):
                raise ValueError(f"model.{name}: is fitted to genomes, by `train species`; set it to 0")
        if self.kind in ("multi-label", "regression") and self.model.pooling == "evidence":
            raise ValueError(f"model.pooling: evidence weighs classes that exclude each other, and this is {self.kind}; use mean")

    @property
    def n_outputs(self) -> int:
        return max(1, len(self.classes))


def build_model(config: Config) -> SequenceClassifier:
    if config.kind == "auto":
        raise UserError("kind: auto: the run's config should name a kind; use the config.yaml that training wrote")
    return SequenceClassifier(config.model, config.n_outputs)


class ClassificationTask:
    """The task that `seqlab.training` trains, one seed of it; see seqlab/training/task.py for the protocol."""

    def __init__(self, config: Config, store: LabelledStore, init: Path | None = None):
        if config.kind not in ("auto", store.kind):
            raise UserError(f"kind: {config.kind}, but {store.directory} is {store.kind}; leave it at auto")
        if config.classes and list(config.classes) != store.classes:
            raise UserError(
                f"{store.directory}: its classes are {', '.join(store.classes)}, the config's {', '.join(config.classes)}; "
                "use the dataset that the run was made for"
            )
        seed = config.train.seed
        self.store, self.init = store, init
        self.train_rows = store.rows("train", seed, config.data.valid_share)
        self.valid_rows = store.rows("valid", seed, config.data.valid_share)
        if not len(self.valid_rows):
            raise UserError(f"{store.directory}: no sequence is left to validate on; raise data.valid_share")
        mean, scale = 0.0, 1.0
        if store.kind == "regression":
            values = store.labels[self.train_rows]
            mean, scale = float(values.mean()), float(values.std()) or 1.0
        limit = config.data.max_length or (store.manifest.get("benchmark") or {}).get("max_length")
        steps = max(1, config.min_steps, math.ceil(config.epochs * len(self.train_rows) / config.data.batch_size))
        steps = min(config.train.max_steps, steps)
        an_epoch = math.ceil(len(self.train_rows) / config.data.batch_size)
        try:
            self.config = replace(
                config,
                kind=store.kind,
                classes=tuple(store.classes),
                target_mean=mean,
                target_scale=scale,
                data=replace(config.data, max_length=limit),
                train=replace(config.train, max_steps=steps, validate_every=max(1, an_epoch, math.ceil(steps / 40))),
            )
        except ValueError as error:  # what does not go with this kind of labels
            raise UserError(f"{store.directory}: {error}") from None
        lengths = self._lengths(self.train_rows)
        # a GPU records the steps of a layout that comes again (seqlab/training/graphs.py); these sequences have lengths of their own
        varies = torch.cuda.is_available() and lengths.min() < lengths.max()
        self.multiple = max(1, int(lengths.max()) // 16) if varies else 1
        self._order = (-1, np.empty(0, np.int64))  # of the epoch that is being dealt out: it and its shuffled rows
        self.class_weight = self._class_weight()
        by_error = config.select_by == "error" and store.kind != "regression"
        self.metric = (
            "error rate" if by_error
            else {"regression": "squared error in units of the variance"}.get(store.kind, "nats per sequence")
        )  # fmt: skip
        self.by_error = by_error

    def _class_weight(self) -> Tensor | None:
        """(classes): n / (classes x n of the class); multi-label: negatives / positives of each label."""
        if self.config.class_weights == "none" or self.store.kind == "regression":
            return None
        labels = self.store.labels[self.train_rows]
        if self.store.kind == "multi-label":
            positive = labels.sum(0).clip(1)
            return torch.from_numpy(((len(labels) - positive) / positive).clip(1e-3)).float()
        count = np.bincount(labels, minlength=self.store.n_outputs).clip(1)
        return torch.from_numpy(len(labels) / (len(count) * count)).float()

    def build_model(self) -> nn.Module:
        model = build_model(self.config)
        if self.init is not None:
            load_init(model, self.init, self.config, self.store)
        if self.config.freeze == "backbone":
            model.freeze_backbone()
        return model

    def resolved_config(self) -> Config:
        return self.config

    # -- data ------------------------------------------------------------------------------------------------------
    def step_rows(self, step: int) -> np.ndarray:
        """Rows of a step: the training rows, shuffled anew each epoch, dealt out without a gap between epochs."""
        size, n = self.config.data.batch_size, len(self.train_rows)
        positions = np.arange(step * size, (step + 1) * size)
        rows = np.empty(size, np.int64)
        for epoch in range(int(positions[0]) // n, int(positions[-1]) // n + 1):
            mine = positions // n == epoch
            if self._order[0] != epoch:
                rng = np.random.Generator(np.random.Philox(key=step_seed(self.config.train.seed, "epoch", epoch)))
                self._order = epoch, self.train_rows[rng.permutation(n)]
            rows[mine] = self._order[1][positions[mine] % n]
        return rows

    def train_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        rows = self.step_rows(step)
        rng = np.random.Generator(np.random.Philox(key=step_seed(self.config.train.seed, "strand", step)))
        is_reverse = rng.random(len(rows)) < 0.5 if self.config.model.augments else np.zeros(len(rows), bool)
        share = len(rows) // world_size
        mine = slice(rank * share, (rank + 1) * share)
        rows, is_reverse = rows[mine], is_reverse[mine]
        size = len(rows)
        if self.config.train.micro_batch_tokens:
            size = max(1, self.config.train.micro_batch_tokens // int(self._lengths(rows).max()))
        return [self._batch(rows[i : i + size], is_reverse[i : i + size], self.multiple) for i in range(0, len(rows), size)]

    def validation_batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        rows = self.valid_rows[rank::world_size]
        rows = rows[np.argsort(self._lengths(rows), kind="stable")]
        limit = self.config.train.micro_batch_tokens or self.config.train.tokens_per_step
        at = 0
        while at < len(rows):
            size = max(1, min(1024, limit // int(self._lengths(rows[at : at + 1024]).max())))
            yield self._batch(rows[at : at + size])
            at += size

    def _lengths(self, rows: np.ndarray) -> np.ndarray:
        lengths = self.store.lengths[rows]
        return lengths if self.config.data.max_length is None else np.minimum(lengths, self.config.data.max_length)

    def _batch(self, rows: np.ndarray, is_reverse: np.ndarray | None = None, multiple: int = 1) -> Batch:
        """ids (b l), l a multiple of `multiple`; target (b) or (b c), row (b), and where rows are padded mask (b l)."""
        lengths = self._lengths(rows)
        ids = self.store.padded(rows, lengths, -(-int(lengths.max()) // multiple) * multiple)
        for i in np.flatnonzero(is_reverse) if is_reverse is not None else ():
            ids[i, : lengths[i]] = nucleotide.reverse_complement(ids[i, : lengths[i]])
        target = np.asarray(self.store.labels[rows])
        if self.store.kind == "regression":
            target = ((target - self.config.target_mean) / self.config.target_scale).astype(np.float32)
        elif self.store.kind == "multi-label":
            target = target.astype(np.float32)
        batch = {"ids": torch.from_numpy(ids), "target": torch.from_numpy(target), "row": torch.from_numpy(rows)}
        if lengths.min() < ids.shape[1]:
            batch["mask"] = torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None])
        return batch

    # -- loss ------------------------------------------------------------------------------------------------------
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighted sum over sequences and the sum of weights; outside training unweighted, and the number of wrong answers
        if that is what validation minimises."""
        outputs, target = model(batch["ids"], batch.get("mask")), batch["target"]
        total = torch.full((), float(len(target)), device=outputs.device)
        kind = self.store.kind
        if kind == "regression":
            return F.mse_loss(outputs[:, 0], target, reduction="sum"), total
        if not model.training and self.by_error:
            if kind == "multi-label":
                return ((outputs > 0) != (target > 0.5)).float().mean(1).sum(), total
            return (outputs.argmax(1) != target).float().sum(), total
        weight = None if self.class_weight is None or not model.training else self.class_weight.to(outputs.device)
        if kind == "multi-label":
            nats = F.binary_cross_entropy_with_logits(outputs, target, pos_weight=weight, reduction="none")
            return nats.mean(1).sum(), total
        nats = F.cross_entropy(outputs, target, weight=weight, reduction="sum")
        return nats, total if weight is None else weight[target].sum()

    def weight(self, batch: Batch) -> float:
        if self.class_weight is None or self.store.kind == "multi-label":
            return float(len(batch["target"]))
        return float(self.class_weight[batch["target"]].sum())

    def tokens(self, batch: Batch) -> int:
        return batch["ids"].numel()

    def metric_value(self, mean_loss: float) -> float:
        return mean_loss

    def describe(self, batch: Batch) -> str:
        names = self.store.names()
        shown = ", ".join(names[int(row)] for row in batch["row"][:3])
        return f"sequences {shown}" + (f" and {len(batch['row']) - 3} more" if len(batch["row"]) > 3 else "")


def load_init(model: SequenceClassifier, checkpoint: Path, config: Config, store: LabelledStore) -> None:
    """Weights of another run: all of them from a classifier of the same classes, else embedding and backbone."""
    path = checkpoint.parent / "config.yaml"
    data = load_yaml(path) if path.is_file() else {}
    if data.get("task") == NAME:
        theirs = from_dict(Config, data, str(path))
        if (theirs.kind, theirs.classes, theirs.model) == (config.kind, config.classes, config.model):
            load_model(model, checkpoint)
            return
    load_pretrained(model, checkpoint, store.manifest.get("vocab"))


# -- training ------------------------------------------------------------------------------------------------------
def train(
    config: Config,
    dataset: Path,
    run_dir: Path,
    *,
    init: Path | None = None,
    resume: bool = False,
    each_seed: Callable[[int, FitResult], None] | None = None,
) -> dict[int, FitResult]:
    """Train every seed on a prepared dataset into `run_dir`; returns seed -> result. A resumed run skips the seeds that are
    done. Stops after a seed that was interrupted."""
    store = LabelledStore.open(dataset)
    if resume:
        saved = read_run_facts(run_dir)
        if saved.get("dataset_hash") != store.hash:
            raise UserError(f"{dataset}: is not the dataset that {run_dir} was trained on; resume with the same one")
        init = Path(saved["init"]) if saved.get("init") else None  # for the seeds that have not begun
    seeds = [config.train.seed + i for i in range(config.seeds)]
    tasks = {}
    for seed in seeds:  # all of them first: nothing is written before everything is known to fit
        own = replace(config, seeds=1, train=replace(config.train, seed=seed))
        tasks[seed] = ClassificationTask(own, store, init)
    tasks[seeds[0]].build_model()
    facts = {
        "task": NAME,
        "dataset": str(Path(dataset).resolve()),
        "dataset_hash": store.hash,
        "init": None if init is None else str(init),
        "seeds": seeds,
        "parameters": sum(p.numel() for p in tasks[seeds[0]].build_model().parameters()),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    with held(run_dir):
        if not resume:
            write_text(run_dir / "config.yaml", dump_yaml(config))
            write_text(run_dir / "manifest.json", (Path(dataset) / "manifest.json").read_text())
        write_run_facts(run_dir, {**facts, "ended": "running"})
        return _train_seeds(config, tasks, facts, dataset, store.hash, run_dir, init, resume, each_seed)


def _train_seeds(config: Config, tasks: dict, facts: dict, dataset: Path, dataset_hash: str, run_dir: Path, init, resume: bool, each_seed):
    """Every seed whose task is in `tasks`, and what is known of all in the end."""
    seeds = list(tasks)
    results: dict[int, FitResult] = {}
    for seed in seeds:
        directory = seed_directory(run_dir, seed)
        done = _finished(directory) if resume else None
        if done is None:
            goes_on = resume and (directory / "checkpoints" / "last" / "trainer.pt").is_file()
            if goes_on:
                tasks[seed].init = None
            done = runs.train(tasks[seed], directory, dataset, dataset_hash, pretrained=init, resume=goes_on, whole=run_dir)
        results[seed] = done
        if each_seed is not None:
            each_seed(seed, done)
        if done.ended == "interrupted":
            break
    best = min(results, key=lambda seed: results[seed].best)
    ended = results[max(results)].ended
    if (seed_directory(run_dir, best) / "checkpoints" / "best" / "model.safetensors").is_file():
        _copy_checkpoint(seed_directory(run_dir, best) / "checkpoints" / "best", run_dir / "checkpoints" / "best")
    write_text(run_dir / "config.yaml", dump_yaml(config))  # a resumed run may have more seeds than it began with
    write_run_facts(
        run_dir,
        {
            **facts,
            "ended": ended,
            "best_seed": best,
            "results": {str(seed): result.__dict__ for seed, result in results.items()},
        },
    )
    return results


def seed_directory(run_dir: Path, seed: int) -> Path:
    return Path(run_dir) / "seeds" / str(seed)


def _finished(directory: Path) -> FitResult | None:
    """The result of a seed that has ended by itself."""
    if not (directory / "run.json").is_file():
        return None
    facts = read_run_facts(directory)
    if facts.get("ended") not in ("finished", "stopped early"):
        return None
    return FitResult(**facts["result"])


def _copy_checkpoint(source: Path, target: Path) -> None:
    for name in ("config.yaml", "model.safetensors"):
        write_atomic(target / name, lambda temporary, name=name: shutil.copyfile(source / name, temporary))


# -- prediction ----------------------------------------------------------------------------------------------------
def output_names(config: Config) -> list[str]:
    return list(config.classes) or ["value"]


def interpret(config: Config, outputs: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Outputs (n n_outputs) of the model -> labels (n) and values (n n_outputs): probabilities, or for a regression the
    value in its own units. The label of a multi-label sequence is all of its labels, joined by commas, or "none"."""
    values = probabilities(config, outputs)
    if config.kind == "regression":
        return [f"{value:.6g}" for value in values[:, 0]], values
    if config.kind == "multi-label":
        return [",".join(name for name, p in zip(config.classes, row) if p >= 0.5) or "none" for row in values], values
    return [config.classes[i] for i in values.argmax(1)], values


def probabilities(config: Config, outputs: np.ndarray) -> np.ndarray:
    logits = torch.from_numpy(np.asarray(outputs)).double()
    if config.kind == "regression":
        return (logits * config.target_scale + config.target_mean).numpy()
    return (logits.sigmoid() if config.kind == "multi-label" else logits.softmax(1)).numpy()


# -- evaluation ----------------------------------------------------------------------------------------------------
MODEL, CHANCE = "model", "chance"
SHOWN = {MODEL: "model", "k-mers": "k-mer logistic regression", "cnn": "small CNN", CHANCE: "chance"}
SHOWN_REGRESSION = {**SHOWN, "k-mers": "k-mer ridge regression", CHANCE: "mean of training"}


@dataclass(frozen=True)
class Evaluation:
    """Scores of a run on one split, seed by seed.

    metrics: predictor ("model", "k-mers", "cnn", "chance") -> one dictionary of metrics for each seed
    details: baseline -> what was chosen, for each seed
    best_seed, labels, predictions: of the seed that `predict` uses, labels and predictor -> predictions, for plots
    """

    split: str
    dataset: str
    kind: Kind
    classes: tuple[str, ...]
    seeds: tuple[int, ...]
    n: int
    metrics: dict[str, list[dict[str, Any]]]
    details: dict[str, list[str]]
    best_seed: int
    labels: np.ndarray
    predictions: dict[str, np.ndarray]
    benchmark: dict[str, Any] | None
    near_copies: int = 0  # of the test split: sequences with half or more of their 32-mers in the training split

    @property
    def main(self) -> str:
        """The metric that decides: the benchmark's own, else the kind's."""
        if self.benchmark:
            return published.figures(self.benchmark["suite"], self.benchmark["task"])[0]
        return main_metric(self.kind)

    def values(self, predictor: str, metric: str) -> list[float]:
        """One for each seed that has this metric (None is left out)."""
        return [row[metric] for row in self.metrics[predictor] if row.get(metric) is not None]

    def mean(self, predictor: str, metric: str) -> float:
        values = self.values(predictor, metric)
        return float(np.mean(values)) if values else math.nan


def evaluate_run(
    run: runs.LoadedRun,
    store: LabelledStore,
    training: LabelledStore,
    *,
    split: str = "test",
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score every seed of a run on a split of `store`, beside baselines that learn from each seed's own training split of
    `training` and choose on its validation split. Baselines are kept in the training dataset's directory, if that can be
    written, since they are the same for every model. `progress(done, total)` counts fits and predictions."""
    config: Config = run.config
    _check_same_labels(config, store)
    seeds = [int(seed) for seed in run.facts.get("seeds", [config.train.seed])]
    directories = {seed: seed_directory(run.directory, seed) for seed in seeds}
    seeds = [seed for seed in seeds if (directories[seed] / "checkpoints" / "best" / "model.safetensors").is_file()]
    best_seed = int(run.facts.get("best_seed", config.train.seed))
    models = {seed: (run if seed == best_seed else runs.load_run(directories[seed])) for seed in seeds} or {best_seed: run}
    metrics: dict[str, list[dict]] = {name: [] for name in (MODEL, *config.eval.baselines, CHANCE)}
    details: dict[str, list[str]] = {name: [] for name in config.eval.baselines}
    kept: dict[str, np.ndarray] = {}
    limit = config.eval.baseline_seeds
    total, done, n = len(models) * (1 + len(config.eval.baselines)), 0, 0
    labels_of_best = np.empty(0)
    for number, (seed, loaded) in enumerate(models.items()):
        rows = store.rows(split, seed, config.data.valid_share)
        if not len(rows):
            raise UserError(f"{store.directory}: the {split} split is empty; choose another with --split")
        test = store.sequences(rows, config.data.max_length)
        n, labels = len(rows), store.labels[rows]
        sequences = (line[:length] for line, length in zip(test.tokens, test.lengths))
        predictor = Predictor(loaded.model, device, config.train.precision)
        outputs = np.stack(list(predictor.outputs(sequences)))
        found = {MODEL: probabilities(loaded.config, outputs)}
        done += 1
        if progress is not None:
            progress(done, total)
        if limit is None or number < limit:
            parts = [training.rows(name, seed, config.data.valid_share) for name in ("train", "valid")]
            parts = [training.sequences(part, config.data.max_length) for part in parts]
            for name in config.eval.baselines:
                cache = _cache_path(name, config, seed, split, store, training)
                result = _baseline(name, config, seed, parts, test, device, cache)
                found[name] = result.predictions
                details[name].append(result.detail)
                done += 1
                if progress is not None:
                    progress(done, total)
            found[CHANCE] = chance(parts[0], test, config.kind, config.n_outputs).predictions
        for name, predictions in found.items():
            metrics[name].append(evaluate_predictions(labels, predictions, config.classes, config.kind))
        if seed == best_seed or not kept:
            kept, labels_of_best = found, labels
    return Evaluation(
        split=split,
        dataset=store.directory.name,
        kind=config.kind,
        classes=tuple(config.classes),
        seeds=tuple(models),
        n=n,
        metrics=metrics,
        details=details,
        best_seed=best_seed,
        labels=labels_of_best,
        predictions=kept,
        benchmark=store.manifest.get("benchmark"),
        near_copies=store.manifest["duplicates"].get("near_copies", 0) if split == "test" else 0,
    )


def _check_same_labels(config: Config, store: LabelledStore) -> None:
    if store.kind != config.kind or list(config.classes) != store.classes:
        theirs = ", ".join(store.classes[:6]) or store.kind
        raise UserError(
            f"{store.directory}: holds {store.kind} labels ({theirs}), this run was trained on {config.kind} "
            f"({', '.join(config.classes[:6]) or 'numbers'}); give a dataset with the same labels"
        )


def _cache_path(name: str, config: Config, seed: int, split: str, store: LabelledStore, training: LabelledStore) -> Path:
    parts = (baselines.VERSION, name, seed, split, store.hash, training.hash, config.data.max_length, config.data.valid_share)
    if name == "k-mers":
        parts = (*parts, config.eval.max_k)
    return training.directory / "baselines" / f"{name}-{split}-{seed}-{step_seed(*parts):016x}.npz"


def _baseline(name, config: Config, seed: int, parts, test, device: str, cache: Path) -> BaselineResult:
    kept = _read_cache(cache, name)
    if kept is not None and len(kept.predictions) == len(test):
        return kept
    if name == "k-mers":
        result = kmer_baseline(*parts, test, config.kind, config.n_outputs, ks=range(1, config.eval.max_k + 1))
    else:
        result = cnn_baseline(*parts, test, config.kind, config.n_outputs, seed=seed, device=device)
    _write_cache(cache, result)
    return result


def _read_cache(path: Path, name: str) -> BaselineResult | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            return BaselineResult(name=name, predictions=kept["predictions"], **json.loads(str(kept["facts"])))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(path: Path, result: BaselineResult) -> None:
    """Keep a baseline's predictions; a dataset that cannot be written simply keeps none."""
    facts = {"detail": result.detail, "valid": result.valid, "seconds": result.seconds}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, predictions=result.predictions, facts=json.dumps(facts))

    try:
        write_atomic(path, write)
    except (UserError, OSError):
        return


# -- report --------------------------------------------------------------------------------------------------------
COLUMNS = {
    "binary": ("accuracy", "f1", "mcc", "auroc", "auprc", "ece"),
    "multi-class": ("accuracy", "f1_macro", "mcc", "auroc", "auprc", "ece"),
    "multi-label": ("accuracy", "f1_macro", "mcc", "auroc", "auprc", "ece"),
    "regression": ("pearson", "spearman", "r2", "rmse", "mae"),
}
TITLES = {"accuracy": "accuracy", "f1": "F1", "f1_macro": "F1 macro", "mcc": "MCC", "auroc": "AUROC", "auprc": "AUPRC"}
TITLES |= {"ece": "ECE", "pearson": "Pearson", "spearman": "Spearman", "r2": "R2", "rmse": "RMSE", "mae": "MAE"}


def shown(evaluation: Evaluation) -> dict[str, str]:
    return SHOWN_REGRESSION if evaluation.kind == "regression" else SHOWN


def evaluation_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that `eval` prints: means over seeds, and the range of the metric that decides."""
    columns = list(COLUMNS[evaluation.kind])
    if evaluation.main in columns:  # the metric that decides comes first
        columns.remove(evaluation.main)
    columns = [evaluation.main, *columns]
    header = ["", TITLES[columns[0]], *(["range"] if len(evaluation.seeds) > 1 else []), *(TITLES[c] for c in columns[1:])]
    rows = []
    for name in evaluation.metrics:
        if not evaluation.metrics[name]:
            continue
        cells = [_number(evaluation.mean(name, column)) for column in columns]
        if len(evaluation.seeds) > 1:
            values = evaluation.values(name, columns[0])
            cells.insert(1, f"{min(values):.3f}-{max(values):.3f}" if values else "-")
        rows.append([{"cnn": "small CNN"}.get(name, name), *cells])
    return header, rows


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def published_rows(evaluation: Evaluation) -> list[list[str]]:
    """Rows (model, score, source) of the benchmark's published figures, best first."""
    if not evaluation.benchmark:
        return []
    _, figures = published.figures(evaluation.benchmark["suite"], evaluation.benchmark["task"])
    rows = sorted(figures, key=lambda figure: -figure.score)
    return [
        [f.model, f"{f.score:.3f}" + ("" if f.spread is None else f" ± {f.spread:.3f}"), published.SOURCES[f.source]] for f in rows
    ]


def evaluation_verdict(evaluation: Evaluation) -> str:
    """One honest sentence: whether the model, a baseline or chance wins, by how much, and whether the seeds agree."""
    metric, names = evaluation.main, [name for name in evaluation.details if evaluation.metrics[name]]
    ours = evaluation.mean(MODEL, metric)
    title = TITLES[metric]
    where = f"{evaluation.n:,} sequences of the {evaluation.split} split"
    if not names:
        return f"{title} {_number(ours)} on {where}; no baseline was asked for (eval.baselines)."
    best = max(names, key=lambda name: _or_low(evaluation.mean(name, metric)))
    theirs = evaluation.mean(best, metric)
    seeds = "" if len(evaluation.seeds) == 1 else f" (means over {len(evaluation.seeds)} seeds)"
    label = shown(evaluation)[best]
    chance = evaluation.mean(CHANCE, metric) if evaluation.metrics.get(CHANCE) else math.nan
    if not _or_low(ours) > max(_or_low(theirs), _or_low(chance)):
        if _or_low(chance) >= _or_low(theirs):
            return f"Nothing is better than chance: {title} {_number(chance)}, the model {_number(ours)}{seeds}, on {where}."
        return (
            f"A baseline wins: {label} reaches {title} {_number(theirs)}, the model {_number(ours)}{seeds}, on {where}."
        )
    own, other = evaluation.values(MODEL, metric), evaluation.values(best, metric)
    overlap = ""
    if len(own) > 1 and min(own) <= max(other):
        overlap = " The ranges over seeds overlap, so the difference is within what the seed decides."
    return f"The model wins: {title} {_number(ours)} against {_number(theirs)} of the {label}{seeds}, on {where}.{overlap}"


def _or_low(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def evaluation_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Plain values for --json."""
    predictors = {}
    for name, rows in evaluation.metrics.items():
        if not rows:
            continue
        keys = [key for key, value in rows[0].items() if isinstance(value, (int, float)) and key != "n"]
        summary = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
        predictors[name] = {
            "mean": {key: float(np.mean(values)) for key, values in summary.items() if values},
            "min": {key: min(values) for key, values in summary.items() if values},
            "max": {key: max(values) for key, values in summary.items() if values},
            "seeds": rows,
            **({"chosen": evaluation.details[name]} if name in evaluation.details else {}),
        }
    return {
        "split": evaluation.split,
        "kind": evaluation.kind,
        "classes": list(evaluation.classes),
        "seeds": list(evaluation.seeds),
        "best_seed": evaluation.best_seed,
        "n": evaluation.n,
        "near_copies": evaluation.near_copies,
        "metric": evaluation.main,
        "predictors": predictors,
        "benchmark": evaluation.benchmark,
        "published": [dict(zip(("model", "score", "source"), row)) for row in published_rows(evaluation)],
    }


def near_copies_line(evaluation: Evaluation, sequences: str = "the test sequences") -> str:
    """A sentence about `sequences` where part of the scores may be memory, else nothing."""
    if not evaluation.near_copies:
        return ""
    return (
        f"{evaluation.near_copies:,} of {sequences} share half or more of their 32-mers with the training split of the dataset: there every "
        "score is memory in part."
    )


def write_report(run_dir: Path, evaluation: Evaluation, name: str = "evaluation", out: Path | None = None) -> Path:
    """Plots, `{name}.json` and the report of a run, in `out` (default: the run); returns the report's path."""
    run_dir, out = Path(run_dir), Path(out or run_dir)
    plots = out / "plots"
    write_json(out / f"{name}.json", evaluation_dict(evaluation))
    header, rows = evaluation_rows(evaluation)
    header[0] = "predictor"
    lines = [f"# {run_dir.name}", "", evaluation_verdict(evaluation), "", report.markdown_table(header, rows), ""]
    seeds = len(evaluation.seeds)
    lines += [
        f"{evaluation.n:,} sequences of the {evaluation.split} split of {evaluation.dataset}, {seeds} seed{'s' * (seeds != 1)}; the "
        "range is the smallest and largest over seeds. Baselines learn from each seed's training split and choose on its validation "
        "split. Plots show the seed with the best validation."
        + (f" F1 is of class {evaluation.classes[1]}." if evaluation.kind == "binary" else "")
        + (f" {copies}" if (copies := near_copies_line(evaluation, "them")) else ""),
        "",
    ]
    if known := published_rows(evaluation):
        lines += [
            "## Published figures", "",
            report.markdown_table(["model (published)", TITLES[evaluation.main], "source"], known), "",
            "Published by others, not measured here; ± is the largest minus the smallest over their seeds.", "",
        ]  # fmt: skip
    for baseline, chosen in evaluation.details.items():
        if chosen:
            lines += [f"- {shown(evaluation)[baseline]}: " + " | ".join(dict.fromkeys(chosen))]
    lines.append("")
    for plot, title in _plots(evaluation, plots, name).items():
        lines += [f"![{title}](plots/{plot.name})", ""]
    facts = read_run_facts(run_dir) if (run_dir / "run.json").is_file() else {}
    if results := facts.get("results"):
        minutes = sum(result["minutes"] for result in results.values())
        tokens = sum(result["tokens"] for result in results.values())
        lines += [
            f"{facts.get('parameters', 0):,} parameters; {len(results)} seeds, {tokens:,} tokens in {minutes:.1f} minutes on "
            f"{facts.get('machine')}; started from {facts.get('init') or 'random weights'}; {report.versions(facts)}.",
            "",
        ]
    path = report.report_path(out, name)
    write_text(path, "\n".join(lines))
    return path


def _plots(evaluation: Evaluation, plots: Path, name: str) -> dict[Path, str]:
    """path -> title of the plots that fit the kind of label."""
    predictions, labels = evaluation.predictions, evaluation.labels
    if evaluation.kind == "regression":
        return {plot_regression(labels, predictions[MODEL], plots / f"{name}-regression.png"): "predicted and measured"}
    curves = {
        shown(evaluation)[key]: _confidence(evaluation.kind, labels, p) for key, p in predictions.items() if key != CHANCE
    }
    drawn = {plot_calibration(curves, plots / f"{name}-calibration.png"): "calibration"}
    if evaluation.kind != "multi-label":
        index = evaluation.seeds.index(evaluation.best_seed) if evaluation.best_seed in evaluation.seeds else 0
        confusion = evaluation.metrics[MODEL][index]["confusion"]
        drawn[plot_confusion(confusion, evaluation.classes, plots / f"{name}-confusion.png")] = "confusion"
    return drawn


def _confidence(kind: Kind, labels: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if kind == "multi-label":
        return np.maximum(p, 1 - p).ravel(), ((p >= 0.5) == labels.astype(bool)).ravel()
    return p.max(1), p.argmax(1) == labels

