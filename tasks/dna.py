"""What `seqlab train dna` and `seqlab eval` do once there is a dataset: train, evaluate, report."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from seqlab import report
from seqlab.config import from_dict, load_yaml
from seqlab.dataset import TokenStore
from seqlab.errors import UserError
from seqlab.markov import MarkovModels, fit
from seqlab.training.callbacks import read_history
from seqlab.training.checkpoint import load_model, write_json, write_text
from seqlab.training.fit import FitResult, read_run_facts, write_run_facts
from seqlab.training.fit import fit as fit_task
from tasks.language_modeling import DnaConfig, Evaluation, LanguageModeling, build_dna_model, evaluate


@dataclass(frozen=True)
class LoadedRun:
    directory: Path
    config: DnaConfig
    facts: dict
    model: torch.nn.Module
    checkpoint: Path


def train(
    config: DnaConfig, dataset: Path, run_dir: Path, *, init: Path | None = None, resume: bool = False
) -> FitResult:
    """Train on a prepared dataset into `run_dir`. Nothing is created before the configuration is known to fit."""
    store = TokenStore.open(dataset)
    task = LanguageModeling(config, store)
    if not len(store.intervals("valid")):
        raise UserError(f"{dataset}: no valid split; early stopping needs one: prepare it again with a valid split")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    if not resume:
        from seqlab.config import dump_yaml

        write_text(run_dir / "config.yaml", dump_yaml(config))
        write_text(run_dir / "manifest.json", (Path(dataset) / "manifest.json").read_text())
    facts = {
        "task": "dna",
        "dataset": str(Path(dataset).resolve()),
        "dataset_hash": store.hash,
        "init": None if init is None else str(init),
        "parameters": sum(p.numel() for p in task.build_model().parameters()),
    }
    if resume:
        saved = read_run_facts(run_dir)
        if saved.get("dataset_hash") != store.hash:
            raise UserError(f"{dataset}: is not the dataset that {run_dir} was trained on; resume with the same one")
        facts["init"] = saved.get("init")
    write_run_facts(run_dir, {**facts, "ended": "running"})
    result = fit_task(task, config.optim, config.train, run_dir, init=init, resume=resume)
    write_run_facts(run_dir, {**facts, "ended": result.ended, "result": result.__dict__})
    return result


def find_checkpoint(path: Path) -> Path:
    """`RUN`, `RUN/checkpoints/best` or a model.safetensors -> the model.safetensors meant. Raises UserError."""
    path = Path(path)
    candidates = [path] if path.is_file() else [
        path / "model.safetensors",
        path / "checkpoints" / "best" / "model.safetensors",
        path / "checkpoints" / "last" / "model.safetensors",
    ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if not path.exists():
        raise UserError(f"{path}: no such run; give a run directory that `seqlab train` wrote")
    raise UserError(f"{path}: holds no checkpoint (checkpoints/best/model.safetensors); the run saved none yet")


def load_run(path: Path) -> LoadedRun:
    """Model, config and facts of a run; a checkpoint needs nothing else. Raises UserError."""
    checkpoint = find_checkpoint(path)
    directory = next((p for p in checkpoint.parents if (p / "run.json").is_file()), checkpoint.parent)
    config_path = checkpoint.parent / "config.yaml"
    config = from_dict(DnaConfig, load_yaml(config_path), str(config_path))
    model = build_dna_model(config.model)
    load_model(model, checkpoint)
    facts = read_run_facts(directory) if (directory / "run.json").is_file() else {}
    return LoadedRun(directory, config, facts, model, checkpoint)


def evaluate_run(
    run: LoadedRun,
    store: TokenStore,
    training: TokenStore,
    *,
    split: str = "test",
    contexts: tuple[int, ...] = (),
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a run on `store`, beside Markov models fitted on the training split of `training`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    markov: MarkovModels = fit(training, "train", max_order=run.config.eval.max_order, both_strands=True)
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


def write_report(run_dir: Path, evaluation: Evaluation, name: str = "evaluation") -> Path:
    """Plots, `{name}.json` and report.md of a run; returns the report's path."""
    run_dir = Path(run_dir)
    plots = run_dir / "plots"
    report.plot_evaluation(evaluation, plots / f"{name}.png")
    write_json(run_dir / f"{name}.json", report.evaluation_dict(evaluation))
    header, rows = report.evaluation_rows(evaluation)
    facts = read_run_facts(run_dir)
    result = facts.get("result", {})
    order, markov = evaluation.best_markov
    lines = [f"# {run_dir.name}", "", report.evaluation_verdict(evaluation), "", report.markdown_table(header, rows), ""]
    lines += [
        f"{evaluation.bases:,} bases scored, {evaluation.soft_masked:,} of them soft-masked; "
        f"{evaluation.not_scored:,} positions not scored (N or another symbol). "
        "Markov models are fitted on both strands of the training split and scored on the same bases.",
        "",
        f"![bits per base by context]({(plots / f'{name}.png').relative_to(run_dir)})",
        "",
    ]
    metrics = run_dir / "metrics.csv"
    if metrics.is_file():
        report.plot_history(
            read_history(metrics), "bits per base", plots / "training.png", (f"best Markov model (order {order}), test", markov.bits)
        )
        lines += ["![training](plots/training.png)", ""]
    if result:
        lines += [
            f"{facts.get('parameters', 0):,} parameters, {result['tokens']:,} tokens in {result['minutes']:.1f} minutes "
            f"({result['tokens_per_second']:,.0f} tokens/s) on {facts.get('machine')}; best at step {result['best_step']:,} "
            f"of {result['steps']:,}; seqlab {facts.get('seqlab')} ({facts.get('git')}), torch {facts.get('torch')}.",
            "",
        ]
    write_text(run_dir / "report.md", "\n".join(lines))
    return run_dir / "report.md"


def discard_empty(run_dir: Path) -> None:
    """Remove a run directory in which nothing has been trained yet, so that a refused run leaves nothing behind."""
    if run_dir.is_dir() and not any((run_dir / "checkpoints").glob("*/*.safetensors")):
        shutil.rmtree(run_dir, ignore_errors=True)
        if run_dir.parent.name == "runs" and not any(run_dir.parent.iterdir()):
            run_dir.parent.rmdir()
