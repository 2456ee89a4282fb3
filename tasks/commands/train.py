"""`seqlab train`: a new run or one gone on with, then its evaluation and report."""

import contextlib
import json
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from seqlab.errors import UserError
from seqlab.processes import is_main_process
from tasks.commands.evaluate import (
    evaluate,
    evaluate_labelled,
    evaluate_species,
    evaluate_synthetic,
    held_out_split,
    print_audio_evaluation,
    print_evaluation,
    print_labelled_evaluation,
    print_species_evaluation,
    print_synthetic_evaluation,
)
from tasks.commands.options import (
    Devices,
    Fasta,
    Json,
    MaxMinutes,
    MaxSteps,
    Overwrite,
    Precision,
    Resume,
    Seed,
    Set,
    Splits,
    Test,
    Valid,
    show_context,
)
from tasks.commands.prep import prepare_dna
from tasks.commands.settings import lay_over, load_config, train_options
from tasks.commands.terminal import command, emit, note, program, quoted
from tasks.run_directory import fresh_directory, new_run_directory, newest_run

group = typer.Typer(no_args_is_help=True, help="Train a model.")


@command(group, "dna")
def train_dna(
    fasta: Fasta = None,
    data: Annotated[Optional[Path], typer.Option("--data", help="Dataset directory from `seqlab prep dna`.")] = None,
    config: Annotated[Optional[str], typer.Option("--config", help="Preset or YAML file.")] = None,
    set_: Set = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Run directory; default runs/NAME-TIME.")] = None,
    resume: Resume = False,
    init: Annotated[Optional[Path], typer.Option("--init", help="Start from the weights of this run.")] = None,
    context: Annotated[Optional[str], typer.Option("--context", help="Window length in bases; whole: each sequence.")] = None,
    seed: Seed = None,
    devices: Devices = None,
    context_parallel: Annotated[
        Optional[int], typer.Option("--context-parallel", help="Devices that share a window, each with a piece of it.")
    ] = None,
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
    options = dict(
        context=context, seed=seed, devices=devices, precision=precision, max_steps=max_steps, max_minutes=max_minutes,
        context_parallel=context_parallel,
    )  # fmt: skip
    from tasks import dna, runs

    with contextlib.ExitStack() as undo:
        checkpoint = None
        if resume:
            refused = {"--fasta": fasta, "--config": config, "--init": init}
            run_dir, dataset, settings = resumed_run(dna.Config, dna.NAME, out, data, set_, options, refused)
        else:
            checkpoint = None if init is None else runs.find_checkpoint(init)
            run_dir, dataset, settings = _new_run(
                out, data, fasta, config, set_, train_options(**options), splits, valid, test, checkpoint, overwrite, undo
            )
        from seqlab.training.config import resolve_accelerator

        accelerator = resolve_accelerator(settings.train)
        model = settings.model
        note(
            f"{run_dir}: {model.direction} Mamba, {model.n_layer} layers of d_model {model.d_model}, context "
            f"{show_context(settings.data.context)}, on the {accelerator.upper()}; Ctrl-C saves and stops"
        )
        result = dna.train(settings, dataset, run_dir, init=checkpoint, resume=resume)
    if not is_main_process():
        return
    note_training_result(result, run_dir, "dna", "bits per base")
    evaluation = evaluate(runs.load_run(run_dir), dataset, dataset, held_out_split(dataset), (), "auto")
    report_path = dna.write_report(run_dir, evaluation)
    from seqlab import report

    def human() -> None:
        print_evaluation(evaluation)
        note(f"Report with plots: {report_path}")
        note("Next:")
        if fasta is None and data is None and not resume:
            note(f"  {program()} train dna --fasta YOUR_GENOME.fa.gz     train on your own genome")
        lengths = " ".join(f"--context {c}" for c in sorted({min(evaluation.contexts), max(evaluation.contexts)}))
        note(f"  {program()} eval {quoted(run_dir)} {lengths}")
        note(f"  {program()} train dna --data {quoted(dataset)} --init {quoted(run_dir)}   train further from these weights")

    emit(json_out, {"run": str(run_dir), "result": result.__dict__, "evaluation": report.evaluation_dict(evaluation)}, human=human)


def _new_run(out, data, fasta, config, set_, options, splits, valid, test, checkpoint, overwrite, undo):
    """(run directory, dataset, settings) of a fresh run; simulates and prepares what is needed. `undo` learns how to
    leave things as they were if the run does not get as far as training."""
    from tasks.language_modeling import DnaConfig

    if data is not None and fasta:
        raise UserError("--data and --fasta: give one of them; --data is a FASTA already prepared")
    if data is not None and (splits or valid or test):
        raise UserError("--splits, --valid and --test: the dataset in --data has its splits; use them with --fasta")
    demo = data is None and not fasta
    name = config or ("dna_demo" if demo else "dna_small")
    if checkpoint is not None:
        options = {**options, **started_from(checkpoint, "dna", config is not None)}
    settings = load_config(DnaConfig, name, set_ or [], options)
    was_chosen = config is not None or "data" in options or any(text.split("=")[0].strip() == "data.context" for text in set_ or [])
    dataset = None if data is None else known_dataset(data, "seqlab prep dna", ("dna", "species"))
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
    return run_dir, dataset, settings if was_chosen else _fitting(settings, dataset)


def _fitting(settings, dataset: Path):
    """The settings with the longest power of two as context that the train split holds a window of, where the preset's, which
    nobody asked for, is longer: a plasmid or a virus is a genome too."""
    import dataclasses

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


@command(group, "species")
def train_species(
    data: Annotated[Optional[Path], typer.Option("--data", help="Dataset directory from `seqlab prep species`.")] = None,
    config: Annotated[Optional[str], typer.Option("--config", help="Preset or YAML file.")] = None,
    set_: Set = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Run directory; default runs/NAME-TIME.")] = None,
    resume: Resume = False,
    init: Annotated[Optional[Path], typer.Option("--init", help="Start from this run of train dna or train species.")] = None,
    freeze: Annotated[bool, typer.Option("--freeze", help="Train the head alone; wants --init.")] = False,
    context: Annotated[Optional[str], typer.Option("--context", help="Longest training window in bases.")] = None,
    seed: Seed = None,
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
    from seqlab.training.config import resolve_accelerator
    from tasks import runs, species

    options = dict(
        context=context, seed=seed, devices=devices, precision=precision, max_steps=max_steps, max_minutes=max_minutes
    )
    with contextlib.ExitStack() as undo:
        checkpoint = None
        if resume:
            refused = {"--config": config, "--init": init, "--freeze": freeze or None}
            run_dir, dataset, settings = resumed_run(species.Config, species.NAME, out, data, set_, options, refused)
        else:
            if data is None:
                raise UserError("--data: give the dataset that `seqlab prep species` wrote")
            checkpoint = backbone_to_start_from(init, freeze)
            given = train_options(**options)
            if freeze:
                given = {**given, "freeze": "backbone", "loss": {"language_model": 0.0}}
            given |= shape_to_start_from(checkpoint)
            settings = load_config(species.Config, config or "species", set_ or [], given)
            dataset = known_dataset(data, "seqlab prep species", ("species",))
            run_dir = begin_run(config or "species", out, overwrite, undo, data, checkpoint)
        accelerator = resolve_accelerator(settings.train)
        model = settings.model
        note(
            f"{run_dir}: {model.direction} Mamba, {model.n_layer} layers of d_model {model.d_model}, windows up to "
            f"{settings.data.context:,}, on the {accelerator.upper()}; Ctrl-C saves and stops"
        )
        if model.gene_order and not resume:
            note(f"A hidden Markov model of each species' genes (order {model.gene_order}) is fitted first")
        result = species.train(settings, dataset, run_dir, init=checkpoint, resume=resume, say=note)
    if not is_main_process():
        return
    note_training_result(result, run_dir, species.NAME, species.SpeciesTask.metric)
    evaluation = evaluate_species(runs.load_run(run_dir), dataset, dataset, "test", (), "auto")
    report_path = species.write_report(run_dir, evaluation)

    def human() -> None:
        print_species_evaluation(evaluation)
        note(f"Report with plots: {report_path}")
        note(f"Next:  {program()} predict {quoted(run_dir)} reads.fa.gz > labels.tsv")

    emit(
        json_out,
        {"run": str(run_dir), "result": result.__dict__, "evaluation": species.evaluation_dict(evaluation)},
        human=human,
    )


@command(group, "classify")
def train_classify(
    data: Annotated[Optional[Path], typer.Option("--data", help="Dataset directory from `seqlab prep labelled`.")] = None,
    config: Annotated[Optional[str], typer.Option("--config", help="Preset or YAML file.")] = None,
    set_: Set = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Run directory; default runs/NAME-TIME.")] = None,
    resume: Resume = False,
    init: Annotated[Optional[Path], typer.Option("--init", help="Start from this run of train dna, species or classify.")] = None,
    freeze: Annotated[bool, typer.Option("--freeze", help="Train the head alone; wants --init.")] = False,
    seeds: Annotated[Optional[int], typer.Option("--seeds", help="Runs with different seeds; reports mean and range.")] = None,
    strand: Annotated[Optional[str], typer.Option("--strand", help="none, augment, average or equivariant.")] = None,
    epochs: Annotated[Optional[float], typer.Option("--epochs", help="Times that training reads every sequence.")] = None,
    seed: Annotated[Optional[int], typer.Option("--seed", help="The first seed.")] = None,
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
    from seqlab.training.config import resolve_accelerator
    from tasks import classification, runs

    options = dict(seed=seed, devices=devices, precision=precision, max_steps=max_steps, max_minutes=max_minutes)
    with contextlib.ExitStack() as undo:
        checkpoint = None
        if resume:
            refused = {"--config": config, "--init": init, "--freeze": freeze or None, "--seeds": seeds, "--strand": strand, "--epochs": epochs}
            run_dir, dataset, settings = resumed_run(classification.Config, classification.NAME, out, data, set_, options, refused)
        else:
            if data is None:
                raise UserError("--data: give the dataset that `seqlab prep labelled` wrote")
            checkpoint = backbone_to_start_from(init, freeze)
            given = train_options(**options)
            own = {"seeds": seeds, "epochs": epochs, "freeze": "backbone" if freeze else None}
            given |= {key: value for key, value in own.items() if value is not None}
            given |= shape_to_start_from(checkpoint)
            if strand is not None:
                given["model"] = {**given.get("model", {}), "strand": strand}
            settings = load_config(classification.Config, config or "classify", set_ or [], given)
            dataset = known_dataset(data, "seqlab prep labelled", ("labelled",))
            run_dir = begin_run(config or "classify", out, overwrite, undo, data, checkpoint)
        accelerator = resolve_accelerator(settings.train)
        model = settings.model
        note(
            f"{run_dir}: {model.direction} Mamba, {model.n_layer} layers of d_model {model.d_model}, strand {model.strand}, "
            f"{settings.seeds} seed{'s' * (settings.seeds != 1)}, on the {accelerator.upper()}; Ctrl-C saves and stops"
        )

        def each_seed(seed, result) -> None:
            note(f"Seed {seed}: {result.steps:,} steps in {result.minutes:.1f} minutes, {result.ended}; best validation {result.best:.4f}.")

        results = classification.train(settings, dataset, run_dir, init=checkpoint, resume=resume, each_seed=each_seed)
    if not is_main_process():
        return
    if any(result.ended == "interrupted" for result in results.values()):
        note(f"Stopped; saved. Go on with:  {program()} train classify --resume --out {quoted(run_dir)}")
        raise typer.Exit(130)
    evaluation = evaluate_labelled(runs.load_run(run_dir), dataset, dataset, "test", "auto")
    report_path = classification.write_report(run_dir, evaluation)

    def human() -> None:
        print_labelled_evaluation(evaluation)
        note(f"Report with plots: {report_path}")
        note(f"Next:  {program()} predict {quoted(run_dir)} sequences.fa.gz > labels.tsv")

    found = classification.evaluation_dict(evaluation)
    plain = {str(seed): result.__dict__ for seed, result in results.items()}
    emit(json_out, {"run": str(run_dir), "results": plain, "evaluation": found}, human=human)


@command(group, "audio")
def train_audio(
    data: Annotated[Optional[Path], typer.Option("--data", help="Dataset directory from `seqlab prep audio`.")] = None,
    config: Annotated[str, typer.Option("--config", help="Preset or YAML file.")] = "audio_fsdd",
    set_: Set = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Run directory; default runs/NAME-TIME.")] = None,
    resume: Resume = False,
    init: Annotated[Optional[Path], typer.Option("--init", help="Start from the weights of this run.")] = None,
    context: Annotated[Optional[str], typer.Option("--context", help="Window length in samples.")] = None,
    seed: Seed = None,
    devices: Devices = None,
    precision: Precision = None,
    max_steps: MaxSteps = None,
    max_minutes: MaxMinutes = None,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Train a model of the next sample on recordings, and evaluate it beside simpler predictors.

    Example:  seqlab train audio --data data/speech --max-minutes 10
    """
    options = dict(
        context=context, seed=seed, devices=devices, precision=precision, max_steps=max_steps, max_minutes=max_minutes
    )
    from tasks import audio, runs

    with contextlib.ExitStack() as undo:
        checkpoint = None
        if resume:
            refused = {"--init": init, "--config": None if config == "audio_fsdd" else config}
            run_dir, dataset, settings = resumed_run(audio.Config, audio.NAME, out, data, set_, options, refused)
        else:
            if data is None:
                raise UserError(f"--data: missing; prepare recordings first: {program()} prep audio DIR --out data/mine")
            checkpoint = None if init is None else runs.find_checkpoint(init)
            given = train_options(**options)
            if checkpoint is not None:
                given |= started_from(checkpoint, audio.NAME, config != "audio_fsdd")
            settings = load_config(audio.Config, config, set_ or [], given)
            dataset = known_dataset(data, "seqlab prep audio", ("audio",))
            run_dir = begin_run(config, out, overwrite, undo, data, checkpoint)
        from seqlab.training.config import resolve_accelerator

        accelerator, model = resolve_accelerator(settings.train), settings.model
        kind = f"U-Net with pools of {list(model.pool)}," if model.architecture == "unet" else "Mamba,"
        note(
            f"{run_dir}: {kind} {model.n_layer} blocks{' a stage' if model.architecture == 'unet' else ''} of d_model "
            f"{model.d_model}, context {settings.data.context:,} samples, on the {accelerator.upper()}; Ctrl-C saves and stops"
        )
        result = audio.train(settings, dataset, run_dir, init=checkpoint, resume=resume)
    if not is_main_process():
        return
    note_training_result(result, run_dir, "audio", "bits per sample")
    evaluation = evaluate(runs.load_run(run_dir), dataset, dataset, held_out_split(dataset), (), "auto")
    report_path = audio.write_report(run_dir, evaluation)
    from seqlab import report

    def human() -> None:
        print_audio_evaluation(evaluation)
        note(f"Report with plots: {report_path}")
        note(f"Next:  {program()} generate audio {quoted(run_dir)} --seconds 2 --num 8 --out samples/")

    emit(
        json_out,
        {"run": str(run_dir), "result": result.__dict__, "evaluation": report.audio_evaluation_dict(evaluation)},
        human=human,
    )


@command(group, "synthetic")
def train_synthetic(
    config: Annotated[str, typer.Option("--config", help="Preset (selective_copying, induction_heads) or YAML file.")] = "selective_copying",
    set_: Set = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Run directory; default runs/NAME-TIME.")] = None,
    resume: Resume = False,
    init: Annotated[Optional[Path], typer.Option("--init", help="Start from the weights of this run.")] = None,
    context: Annotated[Optional[str], typer.Option("--context", help="Length of a training sequence.")] = None,
    seed: Seed = None,
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

    options = dict(context=context, seed=seed, devices=devices, precision=precision, max_steps=max_steps, max_minutes=max_minutes)
    with contextlib.ExitStack() as undo:
        checkpoint = None
        if resume:
            refused = {"--init": init, "--config": None if config == "selective_copying" else config}
            run_dir, _, settings = resumed_run(synthetic.Config, synthetic.NAME, out, None, set_, options, refused)
        else:
            checkpoint = None if init is None else runs.find_checkpoint(init)
            given = train_options(**options)
            if checkpoint is not None:
                given |= started_from(checkpoint, synthetic.NAME, config != "selective_copying")
            settings = load_config(synthetic.Config, config, set_ or [], given)
            run_dir = begin_run(config, out, overwrite, undo, checkpoint)
        from seqlab.training.config import resolve_accelerator

        accelerator, model, data = resolve_accelerator(settings.train), settings.model, settings.data
        note(
            f"{run_dir}: {data.problem}, {model.n_layer} layers of d_model {model.d_model}, length {data.context:,}, on the "
            f"{accelerator.upper()}; Ctrl-C saves and stops"
        )
        result = synthetic.train(settings, run_dir, init=checkpoint, resume=resume)
    if not is_main_process():
        return
    note_training_result(result, run_dir, synthetic.NAME, synthetic.Synthetic.metric)
    evaluation = evaluate_synthetic(runs.load_run(run_dir), (), "auto")
    report_path = synthetic.write_report(run_dir, evaluation)

    def human() -> None:
        print_synthetic_evaluation(evaluation)
        note(f"Report with plots: {report_path}")
        note(f"Next:  {program()} train synthetic --config {config} --set model.blocks=[s4d]    the same without selection")

    emit(json_out, {"run": str(run_dir), "result": result.__dict__, "evaluation": synthetic.evaluation_dict(evaluation)}, human=human)


def begin_run(name: str, out: Optional[Path], overwrite: bool, undo: contextlib.ExitStack, *reads: Optional[Path]) -> Path:
    """Where a new run goes, made free by the main process; `reads`: what the run reads, None for nothing. `undo` learns how to
    leave things as they were if the run does not get as far as training."""
    run_dir = new_run_directory(name, out)
    if is_main_process():
        undo.enter_context(fresh_directory(run_dir, overwrite, [path for path in reads if path is not None]))
    return run_dir


def resumed_run(cls: type, task: str, out: Optional[Path], data: Optional[Path], set_, given: dict, refused: dict):
    """(run directory, dataset (None: it has none), settings) of a run to go on with: its own settings, with a longer end if asked. `given`:
    arguments of train_options; `refused`: option -> value, of options that a resumed run takes from itself."""
    from seqlab.config import load_yaml
    from seqlab.training.facts import read_run_facts
    from tasks import runs

    own = {**refused, "--context": given.get("context"), "--seed": given.get("seed")}
    if any(value not in (None, [], ()) for value in own.values()):
        raise UserError(f"--resume: goes on with the run's own data and settings; leave out {', '.join(own)}")
    run_dir = out or newest_run()
    facts = read_run_facts(run_dir)
    if facts.get("task", task) != task:
        raise UserError(f"{run_dir}: is a run of `train {facts['task']}`; resume it with that command")
    if run_dir.resolve().parent.name == "seeds" and (run_dir.resolve().parents[1] / "run.json").is_file():
        raise UserError(f"{run_dir}: is one seed of a run; go on with that: --resume --out {quoted(run_dir.resolve().parents[1])}")
    if "dataset" not in facts:
        raise UserError(f"{run_dir}: was imported; start from it with --init {run_dir}, and another --out")
    path = run_dir / "checkpoints" / "last" / "config.yaml"  # of what is gone on with: an earlier --resume may have changed settings
    if not path.is_file():
        path = run_dir / "config.yaml"
    stored = load_yaml(path)
    settings = lay_over(cls, stored, train_options(**given), set_ or [], str(path))
    _check_same_run(lay_over(cls, stored, {}, [], str(path)), settings, run_dir)
    return run_dir, data or (facts["dataset"] and runs.training_data(run_dir, facts)), settings


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


def known_dataset(directory: Path, writer: str, kinds: tuple[str, ...]) -> Path:
    """`directory`, once its manifest has been read: what is no dataset, or one of another kind than those, is refused before
    anything is said or written."""
    from seqlab.dataset import read_manifest

    manifest, _ = read_manifest(directory, writer)
    if (kind := manifest.get("kind")) not in kinds:
        raise UserError(f"{directory}: is a dataset of kind {kind!r}; give one that `{writer}` wrote")
    return directory


def started_from(checkpoint: Path, task: str, has_config: bool) -> dict:
    """What `--init` says of the settings: the model is as in that run, unless a --config says what it is."""
    from tasks import runs

    if not checkpoint.with_name("config.yaml").is_file():
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


def note_training_result(result, run_dir: Path, command_name: str, metric: str) -> None:
    """What came out of training, for people; leaves with exit code 130 if it was stopped by Ctrl-C."""
    if result.ended == "interrupted":
        note(f"Stopped at step {result.steps}; saved. Go on with:  {program()} train {command_name} --resume --out {quoted(run_dir)}")
        raise typer.Exit(130)
    note(
        f"Trained {result.steps:,} steps, {result.tokens:,} tokens in {result.minutes:.1f} minutes "
        f"({result.tokens_per_second:,.0f} tokens/s), {result.ended}; best validation {result.best:.4f} {metric} "
        f"at step {result.best_step:,}."
    )
