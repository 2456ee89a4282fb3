"""What `seqlab train dna` and `seqlab eval` do once there is a dataset: train, evaluate, report."""

from collections.abc import Callable
from pathlib import Path

import torch

from seqlab import report
from seqlab.dataset import TokenStore
from seqlab.errors import UserError
from seqlab.files import write_json, write_text
from seqlab.markov import MarkovModels, fit
from seqlab.report import evaluation_dict
from seqlab.training.facts import FitResult, read_run_facts
from seqlab.training.task import Batch
from tasks import runs
from tasks.language_modeling import (
    DnaConfig,
    Evaluation,
    LanguageModeling,
    LanguageObjective,
    build_dna_model,
    evaluate,
    example_batch,
    hidden_in_evaluation,
)

NAME, Config = "dna", DnaConfig


def build_model(config: DnaConfig) -> torch.nn.Module:
    return build_dna_model(config.model)


def example(config: DnaConfig, rows: int, length: int) -> tuple[LanguageObjective, Batch]:
    """The task without its data, and random bases: what `seqlab plan` measures."""
    return LanguageObjective(config), example_batch(config, rows, length)


def train(
    config: DnaConfig, dataset: Path, run_dir: Path, *, init: Path | None = None, resume: bool = False
) -> FitResult:
    """Train on a prepared dataset into `run_dir`. Nothing is created before the configuration is known to fit."""
    store = TokenStore.open(dataset)
    check_kind(store)
    resume, init = runs.start_of(run_dir, resume, init)
    task = LanguageModeling(config, store)
    if not len(store.intervals("valid")):
        raise UserError(f"{dataset}: no valid split; early stopping needs one: prepare it again with a valid split")
    runs.check_lengths("eval.contexts", config.eval.contexts, store)
    for split in ("train", "valid", "test"):  # known now, not after hours
        if len(store.intervals(split)) and not store.has_bases(split):
            raise UserError(f"{dataset}: the {split} split holds no A, C, G or T; prepare other splits")
    if config.data.soft_mask_weight == 0:
        for split in ("train", "valid"):
            if not store.has_bases(split, soft_masked=False):
                raise UserError(
                    f"{dataset}: all bases of the {split} split are lower case (soft-masked), and data.soft_mask_weight 0 counts none of "
                    "them; set it above 0, or give the genome in upper case"
                )
    return runs.train(task, run_dir, dataset, store.hash, init=init, resume=resume)


def check_kind(store: TokenStore) -> None:
    """UserError unless the dataset holds bases."""
    if store.kind not in ("dna", "species"):
        raise UserError(f"{store.directory}: is a dataset of kind {store.kind!r}; give one that `seqlab prep dna` wrote")


def evaluate_run(
    run: runs.LoadedRun,
    store: TokenStore,
    training: TokenStore,
    *,
    split: str = "test",
    contexts: tuple[int, ...] = (),
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a run on `store`, beside Markov models fitted on the training split of `training`."""
    for one in (store, training):
        check_kind(one)
    hidden = None if run.config.model.direction == "causal" else hidden_in_evaluation(run.config.masking)
    markov: MarkovModels = fit(training, "train", max_order=run.config.eval.max_order, both_strands=True, hidden=hidden)
    return evaluate(
        run.model,
        run.config,
        store,
        markov,
        split=split,
        contexts=contexts,
        device=device,
        precision=run.config.train.precision,
        progress=progress,
    )


def write_report(run_dir: Path, evaluation: Evaluation, name: str = "evaluation", out: Path | None = None) -> Path:
    """Plots, `{name}.json` and the report of a run, in `out` (default: the run); returns the report's path."""
    run_dir, out = Path(run_dir), Path(out or run_dir)
    plots = out / "plots"
    report.plot_evaluation(evaluation, plots / f"{name}.png")
    write_json(out / f"{name}.json", evaluation_dict(evaluation))
    header, rows = report.evaluation_rows(evaluation)
    best = evaluation.best_baseline
    lines = [f"# {run_dir.name}", "", report.evaluation_verdict(evaluation), "", report.markdown_table(header, rows), ""]
    lines += [
        f"{evaluation.bases:,} bases of the {evaluation.split} split scored, {evaluation.soft_masked:,} of them soft-masked; "
        f"{evaluation.not_scored:,} positions not scored (N or another symbol). "
        "Markov models are fitted on both strands of the training split and scored on the same bases.",
        "",
        f"![bits per base by context](plots/{name}.png)",
        "",
    ]
    level = (f"best of k-mer counts ({best.name}), {evaluation.split}", best.score.bits)
    lines += report.training_lines(run_dir, read_run_facts(run_dir), LanguageModeling.metric, plots, level)
    write_text(path := report.report_path(out, name), "\n".join(lines))
    return path
