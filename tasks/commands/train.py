"""`seqlab train`: a new run or one gone on with, then its evaluation and report.

Every command has four parts: what the run is (`new_run` or `resumed_run`, a Begun), the line that says what is trained
(`announce`), the task's own `train`, and what comes after it (`finish`).
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple, Optional

import typer

from seqlab.errors import UserError
from seqlab.processes import is_main_process
from tasks.commands.evaluate import evaluate, held_out_split, show_evaluation
from tasks.commands.options import (
    DATASETS,
    ContextParallel,
    Devices,
    Fasta,
    Freeze,
    Init,
    Json,
    MaxMinutes,
    MaxSteps,
    Overwrite,
    Precision,
    Resume,
    RunOut,
    Seed,
    Set,
    Splits,
    Test,
    TrainDevice,
    Valid,
    show_context,
)
from tasks.commands.prep import prepare_dna, tell_duplicates
from tasks.commands.settings import lay_over, load_config, train_options
from tasks.commands.terminal import command, note, program, quoted
from tasks.run_directory import fresh_directory, new_run_directory, newest_run

group = typer.Typer(no_args_is_help=True, help="Train a model.")


class Begun(NamedTuple):
    """A run that is about to be trained."""

    directory: Path
    dataset: Optional[Path]  # None: the task makes its own data
    settings: Any  # the task's Config
    init: Optional[Path]  # the checkpoint that it starts from
    resume: bool


@command(group, "dna")
def train_dna(
    fasta: Fasta = None,
    data: Annotated[Optional[Path], typer.Option("--data", help="Dataset directory from `seqlab prep dna`.")] = None,
    config: Annotated[
        Optional[str], typer.Option("--config", help="Preset or YAML file; default: dna_small, or dna_demo without data.")
    ] = None,
    set_: Set = None,
    out: RunOut = None,
    resume: Resume = False,
    init: Init = None,
    context: Annotated[Optional[str], typer.Option("--context", help="Window length in bases; whole: each sequence.")] = None,
    seed: Seed = None,
    device: TrainDevice = None,
    devices: Devices = None,
    context_parallel: ContextParallel = None,
    precision: Precision = None,
    max_steps: MaxSteps = None,
    max_minutes: MaxMinutes = None,
    splits: Splits = None,
    valid: Valid = None,
    test: Test = None,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Train a DNA language model and evaluate it beside Markov models.

    Without arguments it simulates a small genome and trains on that for about three minutes.

    Example:  seqlab train dna --fasta ecoli.fa.gz --max-minutes 10
    """
    from tasks import dna, runs

    options = dict(
        context=context, seed=seed, device=device, devices=devices, precision=precision, max_steps=max_steps, max_minutes=max_minutes,
        context_parallel=context_parallel,
    )  # fmt: skip
    with contextlib.ExitStack() as undo:
        if resume:
            refused = {"--fasta": fasta, "--config": config, "--init": init, "--splits": splits, "--valid": valid, "--test": test}
            run = resumed_run(dna, out, data, set_, options, refused)
        else:
            checkpoint = None if init is None else runs.find_checkpoint(init)
            run = _new_dna_run(out, data, fasta, config, set_, train_options(**options), splits, valid, test, checkpoint, overwrite, undo)
        model, shown = run.settings.model, show_context(run.settings.data.context)
        announce(run, f"{model.direction} Mamba, {model.n_layer} layers of d_model {model.d_model}, context {shown}")
        result = dna.train(run.settings, run.dataset, run.directory, init=run.init, resume=resume)

    def hints(evaluation) -> list[str]:
        lengths = " ".join(f"--context {c}" for c in sorted({min(evaluation.contexts), max(evaluation.contexts)}))
        lines = [f"eval {quoted(run.directory)} {lengths}"]
        lines.append(f"train dna --data {quoted(run.dataset)} --init {quoted(run.directory)}   train further from these weights")
        if fasta is None and data is None and not resume:
            lines.insert(0, "train dna --fasta YOUR_GENOME.fa.gz     train on your own genome")
        return lines

    finish(run, result, dna.LanguageModeling.metric, json_out, hints)


def _new_dna_run(out, data, fasta, config, set_, options, splits, valid, test, checkpoint, overwrite, undo) -> Begun:
    """A fresh run; simulates and prepares what is needed. `undo` learns how to leave things as they were if the run does not
    get as far as training."""
    from tasks import dna

    if data is not None and fasta:
        raise UserError("--data and --fasta: give one of them; --data is a FASTA already prepared")
    if data is not None and (splits or valid or test):
        raise UserError("--splits, --valid and --test: the dataset in --data has its splits; use them with --fasta")
    demo = data is None and not fasta
    name = config or ("dna_demo" if demo else "dna_small")
    if checkpoint is not None:
        options = {**options, **started_from(checkpoint, dna.NAME, config is not None)}
    settings = load_config(dna.Config, name, set_ or [], options)
    was_chosen = config is not None or "data" in options or any(text.split("=")[0].strip() == "data.context" for text in set_ or [])
    dataset = None if data is None else known_dataset(data, dna.NAME)
    run_dir = begin_run(name, out, overwrite, undo, data, checkpoint, *(fasta or []))
    if not is_main_process():
        dataset = dataset or run_dir / "data"
        _wait_for(dataset / "manifest.json")
    elif dataset is None:
        dataset = run_dir / "data"
        run_dir.mkdir(parents=True, exist_ok=True)
        if demo:
            from data_prep.simulate import simulate_genome

            note("No --fasta or --data: simulating a small genome (genes on both strands, repeats; fixed seed).")
            fasta = [run_dir / "simulated.fa"]
            simulate_genome(fasta[0], seed=0)
        prepare_dna(fasta, dataset, splits, valid, test)
        _note_manifest(dataset)
    return Begun(run_dir, dataset, settings if was_chosen else _fitting(settings, dataset), checkpoint, False)


def _fitting(settings, dataset: Path):
    """The settings with the longest power of two as context that the train split holds a window of, where the preset's, which
    nobody asked for, is longer: a plasmid or a virus is a genome too."""
    from seqlab.dataset import TokenStore

    sizes = TokenStore.open(dataset).intervals("train")
    longest = int((sizes[:, 1] - sizes[:, 0]).max(initial=0)) - (settings.model.direction == "causal")
    if not 2 <= longest < settings.data.context:
        return settings
    context = 1 << (longest.bit_length() - 1)
    note(f"The preset's context of {settings.data.context:,} is longer than any stretch of the train split: {context:,} instead.")
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, context=context))


def _wait_for(path: Path, seconds: float = 3600) -> None:
    """Until the first process has prepared the data."""
    deadline = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() > deadline:
            raise UserError(f"{path}: did not appear; the first process has not prepared the data")
        time.sleep(0.2)


def _note_manifest(dataset: Path) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    sizes = {s: sum(end - start for _, start, end in rows) for s, rows in manifest["splits"].items()}
    shares = ", ".join(f"{split} {n:,}" for split, n in sizes.items())
    note(
        f"{manifest['total']:,} bases in {len(manifest['sequences'])} sequences: {shares}; "
        f"{manifest['counts']['N']:,} N, {manifest['counts']['other']:,} other, {manifest['soft_masked']:,} soft-masked."
    )
    tell_duplicates(manifest)


@command(group, "species")
def train_species(
    data: Annotated[Optional[Path], typer.Option("--data", help="Dataset directory from `seqlab prep species`.")] = None,
    config: Annotated[Optional[str], typer.Option("--config", help="Preset or YAML file; default: species.")] = None,
    set_: Set = None,
    out: RunOut = None,
    resume: Resume = False,
    init: Annotated[Optional[Path], typer.Option("--init", help="Start from this run of train dna or train species.")] = None,
    freeze: Freeze = False,
    context: Annotated[Optional[str], typer.Option("--context", help="Longest training window in bases.")] = None,
    seed: Seed = None,
    device: TrainDevice = None,
    devices: Devices = None,
    precision: Precision = None,
    max_steps: MaxSteps = None,
    max_minutes: MaxMinutes = None,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Train a species classifier and evaluate it at many lengths beside k-mer logistic regression and a small CNN.

    Example:  seqlab train species --data data/apes --context 4096 --max-minutes 30
    """
    from tasks import species

    options = dict(context=context, seed=seed, device=device, devices=devices, precision=precision, max_steps=max_steps, max_minutes=max_minutes)
    with contextlib.ExitStack() as undo:
        if resume:
            run = resumed_run(species, out, data, set_, options, {"--config": config, "--init": init, "--freeze": freeze or None})
        else:
            checkpoint = backbone_to_start_from(init, freeze)
            given = train_options(**options)
            if freeze:
                given = {**given, "freeze": "backbone", "loss": {"language_model": 0.0}}
            given |= shape_to_start_from(checkpoint)
            run = new_run(species, config or "species", set_, given, out, data, checkpoint, overwrite, undo)
        model = run.settings.model
        size = f"{model.direction} Mamba, {model.n_layer} layers of d_model {model.d_model}"
        announce(run, f"{size}, windows up to {run.settings.data.context:,}")
        if model.gene_order and not resume:
            note(f"A hidden Markov model of each species' genes (order {model.gene_order}) is fitted first")
        with told_how_to_go_on(run.directory, f"train species --resume --out {quoted(run.directory)}"):
            result = species.train(run.settings, run.dataset, run.directory, init=run.init, resume=resume, say=note)
    finish(run, result, species.SpeciesTask.metric, json_out, lambda _: [f"predict {quoted(run.directory)} reads.fa.gz > labels.tsv"])


@command(group, "classify")
def train_classify(
    data: Annotated[Optional[Path], typer.Option("--data", help="Dataset directory from `seqlab prep labelled`.")] = None,
    config: Annotated[Optional[str], typer.Option("--config", help="Preset or YAML file; default: classify.")] = None,
    set_: Set = None,
    out: RunOut = None,
    resume: Resume = False,
    init: Annotated[Optional[Path], typer.Option("--init", help="Start from this run of train dna, species or classify.")] = None,
    freeze: Freeze = False,
    seeds: Annotated[Optional[int], typer.Option("--seeds", help="Runs with different seeds; reports mean and range.")] = None,
    strand: Annotated[Optional[str], typer.Option("--strand", help="none, augment, average or equivariant.")] = None,
    epochs: Annotated[Optional[float], typer.Option("--epochs", help="Times that training reads every sequence.")] = None,
    seed: Annotated[Optional[int], typer.Option("--seed", help="The first seed.")] = None,
    device: TrainDevice = None,
    devices: Devices = None,
    precision: Precision = None,
    max_steps: Annotated[Optional[int], typer.Option("--max-steps", help="Of each seed.")] = None,
    max_minutes: Annotated[Optional[float], typer.Option("--max-minutes", help="Of each seed.")] = None,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Train a classifier (or regression) of labelled sequences and report it beside k-mer logistic regression and a small CNN.

    Example:  seqlab train classify --data data/promoters --init runs/dna --seeds 5
    """
    from tasks import classification

    options = dict(seed=seed, device=device, devices=devices, precision=precision, max_steps=max_steps, max_minutes=max_minutes)
    with contextlib.ExitStack() as undo:
        if resume:
            refused = {"--config": config, "--init": init, "--freeze": freeze or None, "--seeds": seeds, "--strand": strand, "--epochs": epochs}
            run = resumed_run(classification, out, data, set_, options, refused)
        else:
            checkpoint = backbone_to_start_from(init, freeze)
            given = train_options(**options)
            own = {"seeds": seeds, "epochs": epochs, "freeze": "backbone" if freeze else None}
            given |= {key: value for key, value in own.items() if value is not None}
            given |= shape_to_start_from(checkpoint)
            if strand is not None:
                given["model"] = {**given.get("model", {}), "strand": strand}
            run = new_run(classification, config or "classify", set_, given, out, data, checkpoint, overwrite, undo)
        model, n = run.settings.model, run.settings.seeds
        size = f"{model.direction} Mamba, {model.n_layer} layers of d_model {model.d_model}"
        announce(run, f"{size}, strand {model.strand}, {n} seed{'s' * (n != 1)}")

        def each_seed(seed, result) -> None:
            best = f"; best validation {result.best:.4f}" if math.isfinite(result.best) else ""  # stopped before the first
            note(f"Seed {seed}: {result.steps:,} steps in {result.minutes:.1f} minutes, {result.ended}{best}.")

        results = classification.train(run.settings, run.dataset, run.directory, init=run.init, resume=resume, each_seed=each_seed)
    finish(run, results, None, json_out, lambda _: [f"predict {quoted(run.directory)} sequences.fa.gz > labels.tsv"])


@command(group, "audio")
def train_audio(
    data: Annotated[Optional[Path], typer.Option("--data", help="Dataset directory from `seqlab prep audio`.")] = None,
    config: Annotated[Optional[str], typer.Option("--config", help="Preset or YAML file; default: audio_fsdd.")] = None,
    set_: Set = None,
    out: RunOut = None,
    resume: Resume = False,
    init: Init = None,
    context: Annotated[Optional[str], typer.Option("--context", help="Window length in samples.")] = None,
    seed: Seed = None,
    device: TrainDevice = None,
    devices: Devices = None,
    context_parallel: ContextParallel = None,
    precision: Precision = None,
    max_steps: MaxSteps = None,
    max_minutes: MaxMinutes = None,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Train a model of the next sample on recordings, and evaluate it beside simpler predictors.

    Example:  seqlab train audio --data data/speech --max-minutes 10
    """
    from tasks import audio, runs

    options = dict(
        context=context, seed=seed, device=device, devices=devices, precision=precision, max_steps=max_steps, max_minutes=max_minutes,
        context_parallel=context_parallel,
    )  # fmt: skip
    with contextlib.ExitStack() as undo:
        if resume:
            run = resumed_run(audio, out, data, set_, options, {"--config": config, "--init": init})
        else:
            checkpoint = None if init is None else runs.find_checkpoint(init)
            given = train_options(**options) | started_from(checkpoint, audio.NAME, config is not None)
            run = new_run(audio, config or "audio_fsdd", set_, given, out, data, checkpoint, overwrite, undo)
        model, context = run.settings.model, run.settings.data.context
        kind, stage = (f"U-Net with pools of {list(model.pool)}", " a stage") if model.architecture == "unet" else ("Mamba", "")
        announce(run, f"{kind}, {model.n_layer} blocks{stage} of d_model {model.d_model}, context {context:,} samples")
        result = audio.train(run.settings, run.dataset, run.directory, init=run.init, resume=resume)
    hint = f"generate audio {quoted(run.directory)} --seconds 2 --num 8 --out samples/"
    finish(run, result, audio.AudioModeling.metric, json_out, lambda _: [hint])


@command(group, "synthetic")
def train_synthetic(
    config: Annotated[
        Optional[str], typer.Option("--config", help="Preset (selective_copying, the default, or induction_heads) or YAML file.")
    ] = None,
    set_: Set = None,
    out: RunOut = None,
    resume: Resume = False,
    init: Init = None,
    context: Annotated[Optional[str], typer.Option("--context", help="Length of a training sequence.")] = None,
    seed: Seed = None,
    device: TrainDevice = None,
    devices: Devices = None,
    precision: Precision = None,
    max_steps: MaxSteps = None,
    max_minutes: MaxMinutes = None,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Train on a made-up problem that wants memory, selective copying or induction heads, and evaluate it far beyond its length.

    Example:  seqlab train synthetic --config induction_heads --max-minutes 3
    """
    from tasks import runs, synthetic

    options = dict(context=context, seed=seed, device=device, devices=devices, precision=precision, max_steps=max_steps, max_minutes=max_minutes)
    with contextlib.ExitStack() as undo:
        if resume:
            run = resumed_run(synthetic, out, None, set_, options, {"--config": config, "--init": init})
        else:
            checkpoint = None if init is None else runs.find_checkpoint(init)
            given = train_options(**options) | started_from(checkpoint, synthetic.NAME, config is not None)
            run = new_run(synthetic, config or "selective_copying", set_, given, out, None, checkpoint, overwrite, undo)
        model, problem = run.settings.model, run.settings.data
        announce(run, f"{problem.problem}, {model.n_layer} layers of d_model {model.d_model}, length {problem.context:,}")
        result = synthetic.train(run.settings, run.directory, init=run.init, resume=resume)
    hint = f"train synthetic --config {problem.problem} --set model.blocks=[s4d]    the same without selection"
    finish(run, result, synthetic.Synthetic.metric, json_out, lambda _: [hint])


def new_run(
    module: ModuleType, name: str, set_, given: dict, out: Optional[Path], data: Optional[Path], init: Optional[Path], overwrite: bool,
    undo: contextlib.ExitStack,
) -> Begun:  # fmt: skip
    """A fresh run of a task (its module) with the preset or YAML file `name` under `given`, the options that were given, and the
    --set texts. `undo`: as in `begin_run`."""
    if data is None and module.NAME in DATASETS:
        raise UserError(f"--data: give the dataset that `seqlab prep {DATASETS[module.NAME][0]}` wrote")
    settings = load_config(module.Config, name, set_ or [], given)
    dataset = None if data is None else known_dataset(data, module.NAME)
    return Begun(begin_run(name, out, overwrite, undo, data, init), dataset, settings, init, False)


def begin_run(name: str, out: Optional[Path], overwrite: bool, undo: contextlib.ExitStack, *reads: Optional[Path]) -> Path:
    """Where a new run goes, made free by the main process; `reads`: what the run reads, None for nothing. `undo` learns how to
    leave things as they were if the run does not get as far as training."""
    run_dir = new_run_directory(name, out)
    if is_main_process():
        undo.enter_context(fresh_directory(run_dir, overwrite, [path for path in reads if path is not None]))
    return run_dir


def resumed_run(module: ModuleType, out: Optional[Path], data: Optional[Path], set_, given: dict, refused: dict) -> Begun:
    """A run to go on with, of a task (its module): its own settings, with a longer end if asked. `given`: arguments of
    train_options; `refused`: option -> value, of options that a resumed run takes from itself."""
    from seqlab.config import load_yaml
    from seqlab.training.facts import read_run_facts
    from tasks import runs

    refused = {**refused, "--context": given.get("context"), "--seed": given.get("seed")}
    if own := [option for option, value in refused.items() if value not in (None, [], ())]:
        raise UserError(f"--resume: goes on with the run's own data and settings; leave out {', '.join(own)}")
    run_dir = out or newest_run()
    facts = read_run_facts(run_dir)
    if facts.get("task", module.NAME) != module.NAME:
        raise UserError(f"{run_dir}: is a run of `train {facts['task']}`; resume it with that command")
    if run_dir.resolve().parent.name == "seeds" and (run_dir.resolve().parents[1] / "run.json").is_file():
        raise UserError(f"{run_dir}: is one seed of a run; go on with that: --resume --out {quoted(run_dir.resolve().parents[1])}")
    if "dataset" not in facts:
        raise UserError(f"{run_dir}: was imported; start from it with --init {run_dir}, and another --out")
    path = run_dir / "checkpoints" / "last" / "config.yaml"  # of what is gone on with: an earlier --resume may have changed settings
    if not path.is_file():
        path = run_dir / "config.yaml"
    stored = load_yaml(path)
    before = runs.own_config(module, stored, path, facts)
    settings = lay_over(module.Config, stored, train_options(**given), set_ or [], str(path))
    _check_same_run(before, settings, run_dir)
    runs.check_weights(run_dir)
    return Begun(run_dir, data or (facts["dataset"] and runs.training_data(run_dir, facts)), settings, None, True)


def _check_same_run(stored, settings, run_dir: Path) -> None:
    """UserError where --set would make another model of a resumed run, which its checkpoint cannot go on with, or read its data
    in another way."""
    from dataclasses import fields

    keys = [f"model.{field.name}" for field in fields(settings.model) if field.name != "dropout"]
    for key in (*keys, "data.context", "train.seed"):
        section, name = key.split(".")
        old, new = (getattr(getattr(config, section), name, None) for config in (stored, settings))
        if new != old:
            raise UserError(
                f"--set {key}={new}: --resume goes on with the run's own {section}, where {name} is {old}; for another start a new run, "
                f"with --init {quoted(run_dir)} where the weights fit"
            )


def known_dataset(directory: Path, task: str) -> Path:
    """`directory`, once its manifest has been read: what is no dataset, or one that the task does not read, is refused before
    anything is said or written."""
    from seqlab.dataset import read_manifest

    kinds = DATASETS[task]
    writer = f"seqlab prep {kinds[0]}"
    manifest, _ = read_manifest(directory, writer)
    if (kind := manifest.get("kind")) not in kinds:
        raise UserError(f"{directory}: is a dataset of kind {kind!r}; give one that `{writer}` wrote")
    return directory


def started_from(checkpoint: Optional[Path], task: str, has_config: bool) -> dict:
    """What `--init` says of the settings: the model is as in that run, unless a --config says what it is."""
    from tasks import runs

    if checkpoint is None or not checkpoint.with_name("config.yaml").is_file():
        return {}
    model = runs.check_init(checkpoint, (task,))
    return {} if has_config else {"model": {key: value for key, value in model.items() if key != "dropout"}}


def backbone_to_start_from(init: Optional[Path], freeze: bool) -> Optional[Path]:
    """The checkpoint that `--init` means, for a classifier; None without one."""
    from tasks import runs

    if freeze and init is None:
        raise UserError("--freeze: trains the head on a backbone that has learnt; give one with --init RUN")
    return None if init is None else runs.find_checkpoint(init)


def shape_to_start_from(checkpoint: Optional[Path]) -> dict:
    """What a classifier's settings take from the run that it starts from: the shape of the backbone."""
    if checkpoint is None:
        return {}
    from seqlab.classifier import backbone_shape
    from tasks import runs

    runs.check_init(checkpoint, ("dna", "species", "classify"))
    return {"model": backbone_shape(checkpoint)}


def announce(run: Begun, what: str) -> None:
    """The line before training."""
    from seqlab.training.config import resolve_accelerator

    note(f"{run.directory}: {what}, on the {resolve_accelerator(run.settings.train).upper()}; Ctrl-C saves and stops")


def finish(run: Begun, result, metric: Optional[str], json_out: Optional[str], hints: Callable[[Any], list[str]]) -> None:
    """What comes after training: says how it went, evaluates the run and writes its report. Leaves with exit code 130 if it was
    stopped by Ctrl-C. In the main process alone.

    `result`: a FitResult; or of a run of seeds one of each, {seed: FitResult}, which have been told already, and `metric` is None.
    `metric`: what validation measures, with its unit. `hints(evaluation)`: commands to go on with, without the program's name."""
    from seqlab.training.config import resolve_accelerator
    from tasks import runs

    if not is_main_process():
        return
    results = result if isinstance(result, dict) else {None: result}
    *_, last = results.values()
    task = run.settings.task
    if last.ended == "interrupted":
        note(f"Stopped at step {last.steps:,}; saved. Go on with:  {program()} train {task} --resume --out {quoted(run.directory)}")
        raise typer.Exit(130)
    if last is result:
        note(
            f"Trained {last.steps:,} steps, {last.tokens:,} tokens in {last.minutes:.1f} minutes "
            f"({last.tokens_per_second:,.0f} tokens/s), {last.ended}; best validation {last.best:.4f} {metric} "
            f"at step {last.best_step:,}."
        )
    split = held_out_split(run.dataset) if task in ("dna", "audio") else "test"
    loaded = runs.load_run(run.directory)
    loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, eval=run.settings.eval))  # --resume --set of a run that had ended
    device = "cuda" if resolve_accelerator(run.settings.train) == "gpu" else "cpu"
    if last is result:
        outcome = {"result": last.__dict__}
    else:
        outcome = {"results": {str(seed): each.__dict__ for seed, each in results.items()}}
    with told_how_to_go_on(run.directory, f"eval {quoted(run.directory)}"):
        evaluation = evaluate(loaded, run.dataset, run.dataset, split, (), device)
        show_evaluation(
            loaded, evaluation, json_out, lambda found: {"run": str(run.directory), **outcome, "evaluation": found}, hints=_next(hints(evaluation))
        )  # fmt: skip


@contextlib.contextmanager
def told_how_to_go_on(run_dir: Path, command_line: str):
    """Ctrl-C beside the steps of training, which save by themselves: says what of the run is kept, and the command (without the
    program's name) that does the rest."""
    try:
        yield
    except KeyboardInterrupt:
        if not (run_dir / "checkpoints" / "last").is_dir():
            raise  # nothing has been trained yet
        note(f"Stopped by Ctrl-C; what has been trained is saved. Go on with:  {program()} {command_line}")
        raise typer.Exit(130) from None


def _next(commands: Sequence[str]) -> list[str]:
    """Lines that tell what to type next: one line, or one for each."""
    if len(commands) == 1:
        return [f"Next:  {program()} {commands[0]}"]
    return ["Next:", *(f"  {program()} {line}" for line in commands)]
