"""Run directories of every task: train into one, load one, say which task it belongs to.

A task's module is listed in MODULES and offers

    NAME                         the word in `seqlab train NAME` and in the config's `task:`
    Config                       its dataclass; `task: Literal[NAME]`, and parts called `optim` and `train`
    build_model(config) -> nn.Module    everything the shape of the weights depends on is in the config
    train(config, ...) -> FitResult     checks what it was given, then calls `train` below
    evaluate_run(run, ...)       an evaluation beside baselines: any object, which the next two understand
    evaluation_dict(evaluation) -> dict     as plain values
    write_report(run_dir, evaluation, name, out) -> Path    report, plots and those values, as files
    example(config, rows, length)       only of a task that can be planned: see tasks/planning.py
    output_names(config), interpret(config, outputs)    only of one that `predict` can use: names of the columns; labels and values

tasks/commands/evaluate.py calls `evaluate_run`, whose arguments differ a little, and prints what came out.
"""

import importlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import seqlab
from seqlab.config import dump_yaml, from_dict, load_yaml
from seqlab.dataset import TokenStore, read_manifest
from seqlab.errors import UserError
from seqlab.files import write_text
from seqlab.processes import is_main_process
from seqlab.training.checkpoint import OtherModel, check_model, load_model
from seqlab.training.facts import FitResult, git_commit, read_run_facts, write_run_facts
from seqlab.training.task import Task
from tasks.run_directory import held, is_held

MODULES = {
    "audio": "tasks.audio",
    "classify": "tasks.classification",
    "dna": "tasks.dna",
    "species": "tasks.species",
    "synthetic": "tasks.synthetic",
}
"""Task name -> module. A task's imports (plots, baselines) are paid by its own commands only."""


def task_module(name: str) -> ModuleType:
    """The module of a task. Raises UserError for a name that no task has."""
    if name not in MODULES:
        raise UserError(f"task: {name}: unknown; allowed: {', '.join(sorted(MODULES))}")
    return importlib.import_module(MODULES[name])


@dataclass(frozen=True)
class LoadedRun:
    directory: Path
    task: str
    config: Any
    facts: dict
    model: torch.nn.Module
    checkpoint: Path


def train(
    task: Task,
    run_dir: Path,
    dataset: Path | None,
    dataset_hash: str | None,
    *,
    init: Path | None = None,
    pretrained: Path | None = None,
    resume: bool = False,
    whole: Path | None = None,
) -> FitResult:
    """Train on a prepared dataset (None: the task makes its own data) into `run_dir`, leaving its config, manifest and facts there.

    `init` is a model.safetensors that the weights start from: the same model. A task that starts from another one's
    weights loads them in its `build_model`; `pretrained` is then the file they come from, for the record. `whole`: the run that
    `run_dir` is a part of, if it is one.

    Raises:
        UserError: the dataset is not the one that the run to resume was trained on, or whatever training meets.
    """
    is_main = is_main_process()  # the others write nothing: the main one may not even have looked yet whether run_dir is free
    if is_main:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    with held(run_dir):
        return _train(task, run_dir, dataset, dataset_hash, init, pretrained, resume, whole)


def _train(task: Task, run_dir: Path, dataset: Path | None, dataset_hash: str | None, init, pretrained, resume: bool, whole) -> FitResult:
    config, is_main = task.resolved_config(), is_main_process()
    if is_main and not resume:
        write_text(run_dir / "config.yaml", dump_yaml(config))
        if dataset is not None:
            write_text(run_dir / "manifest.json", (Path(dataset) / "manifest.json").read_text())
    facts = {
        "task": config.task,
        "dataset": None if dataset is None else str(Path(dataset).resolve()),
        "dataset_hash": dataset_hash,
        "init": None if init is None and pretrained is None else str(init or pretrained),
        "parameters": sum(p.numel() for p in task.build_model().parameters()),
    }
    if resume:
        saved = read_run_facts(run_dir)
        if saved.get("dataset_hash") != dataset_hash:
            raise UserError(f"{dataset}: is not the dataset that {run_dir} was trained on; resume with the same one")
        facts["init"] = saved.get("init")
    if is_main:
        write_run_facts(run_dir, {**facts, "ended": "running"})
    from seqlab.training.fit import fit as fit_task  # Lightning, which nothing but training needs

    result = fit_task(task, config.optim, config.train, run_dir, init=init, resume=resume, whole=whole)
    if is_main:
        write_text(run_dir / "config.yaml", dump_yaml(config))  # a resumed run may have another end than it began with
        write_run_facts(run_dir, {**facts, "ended": result.ended, "result": result.__dict__})
    return result


def start_of(run_dir: Path, resume: bool, init: Path | None) -> tuple[bool, Path | None]:
    """(resume, init) as they are, but of a run to resume that was killed before it had saved anything: (False, the weights
    that it began with). It begins again."""
    if not resume or (Path(run_dir) / "checkpoints" / "last" / "trainer.pt").is_file():
        return resume, init
    saved = read_run_facts(run_dir).get("init")
    return False, None if saved is None else Path(saved)


def training_data(run_dir: Path, facts: dict, data: Path | None = None) -> Path:
    """The dataset that a run was trained on: where it was, or, of a run that has moved with it, RUN/data; or `data`, if that is
    it in another place. Raises UserError."""
    recorded = Path(facts["dataset"])
    if recorded.exists():
        return recorded
    for place in (Path(run_dir) / "data", data):
        if place is not None and (place / "manifest.json").is_file() and read_manifest(place, "seqlab prep")[1] == facts["dataset_hash"]:
            return place
    raise UserError(f"{recorded}: no such dataset, and {run_dir} was trained on it; if it has moved, say where: --data DIR")


def check_lengths(field: str, lengths: Sequence[int], store: TokenStore, longest: int | None = None) -> None:
    """UserError for a length to evaluate at that the test split (or the valid one, where there is none) does not hold: known
    before training, not after. `longest`: that it holds, by default its longest stretch."""
    split = "test" if len(store.intervals("test")) else "valid"
    if longest is None:
        intervals = store.intervals(split)
        longest = int((intervals[:, 1] - intervals[:, 0]).max(initial=0))
    if lengths and max(lengths) > longest:
        raise UserError(f"{field}: {max(lengths):,}: the {split} split of {store.directory} has windows of at most {longest:,}")


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


def check_init(checkpoint: Path, tasks: tuple[str, ...]) -> dict:
    """What a checkpoint's run says of its model, `model:` of its config, if it is a run of one of `tasks`.

    Raises:
        UserError: it is a run of another task, or has no config beside it.
    """
    path = checkpoint.with_name("config.yaml")
    if not path.is_file():
        raise UserError(f"--init: no config.yaml beside {checkpoint}; give a run directory that `seqlab train` wrote")
    data = load_yaml(path)
    if (name := str(data.get("task", "dna"))) not in tasks:
        raise UserError(f"--init: {checkpoint} is of a run of `train {name}`; start from one of train {' or '.join(tasks)}")
    model = data.get("model")
    return model if isinstance(model, dict) else {}


def load_run(path: Path, *, task: str | None = None) -> LoadedRun:
    """Model, config and facts of a run of any task; a checkpoint needs nothing else.

    Raises:
        UserError: no run, a damaged one, or one of another task than `task` (None: any).
    """
    return _run(path, task, load_model)


def _run(path: Path, task: str | None, load: Callable[[torch.nn.Module, Path], None]) -> LoadedRun:
    """As `load_run`, its model filled by `load`, or only checked."""
    checkpoint = find_checkpoint(path)
    directory = next((p for p in checkpoint.parents if (p / "run.json").is_file()), checkpoint.parent)
    config_path = checkpoint.parent / "config.yaml"
    if not config_path.is_file():
        raise UserError(f"{path}: no config.yaml beside {checkpoint}; give a run directory that `seqlab train` wrote")
    data = load_yaml(config_path)
    name = str(data.get("task", "dna"))
    if task is not None and name != task:
        raise UserError(f"{path}: is a run of `train {name}`; this command needs one of `train {task}`")
    module = task_module(name)
    facts = read_run_facts(directory) if (directory / "run.json").is_file() else {}
    config = own_config(module, data, config_path, facts)
    model = module.build_model(config)
    try:
        load(model, checkpoint)
    except OtherModel as error:
        raise UserError(f"{checkpoint}: {error.what}; {advice}" if (advice := other_version(facts)) else str(error)) from None
    return LoadedRun(directory, name, config, facts, model, checkpoint)


def own_config(module: ModuleType, data: dict, path: Path, facts: dict) -> Any:
    """The config of a run of a task (its module) from `data`, the values of the run's own file at `path`. Raises UserError."""
    try:
        return from_dict(module.Config, data, str(path))
    except UserError as error:
        raise UserError(f"{error}; {advice}" if (advice := other_version(facts)) else str(error)) from None


def other_version(facts: dict) -> str:
    """What to do about a run that cannot be read and was written by another version than this; "" if it was this one, or none
    is known. `facts` are those of run.json."""
    theirs, ours = ((found.get("seqlab"), found.get("git")) for found in (facts, {"seqlab": seqlab.__version__, "git": git_commit()}))
    if theirs in (ours, (None, None)):
        return ""
    shown = [f"seqlab {version}" + (f" ({commit})" if commit else "") for version, commit in (theirs, ours)]
    return f"the run was written by {shown[0]}, this is {shown[1]}: use that version, or train it again"


def check_weights(run_dir: Path) -> None:
    """UserError if the last weights of a run, or of one of its seeds, are none of this version's model: known before a resumed run
    has prepared anything."""
    for path in sorted(Path(run_dir).glob("**/checkpoints/last/model.safetensors"))[:1]:
        _run(path, None, check_model)  # `--resume` reads the weights themselves with the rest of trainer.pt


def discard_empty(run_dir: Path) -> None:
    """Remove a run directory in which nothing has been trained yet, so that a refused run leaves nothing behind."""
    if run_dir.is_dir() and not any(run_dir.glob("**/checkpoints/*/*.safetensors")) and not is_held(run_dir):
        shutil.rmtree(run_dir, ignore_errors=True)
        if run_dir.parent.name == "runs" and not any(run_dir.parent.iterdir()):
            run_dir.parent.rmdir()
