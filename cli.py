"""The command line: parse, load a config, call. No logic of its own; heavy imports wait until a command needs them."""

import contextlib
import datetime
import functools
import inspect
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seqlab.errors import UserError
from seqlab.processes import is_main_process, launched

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train and run Mamba models on DNA and raw audio at million-token context.",
)
prep_app = typer.Typer(no_args_is_help=True, help="Raw files -> dataset directory.")
train_app = typer.Typer(no_args_is_help=True, help="Train a model.")
app.add_typer(prep_app, name="prep")
bench_app = typer.Typer(no_args_is_help=True, help="This machine's numbers, beside whatever peers are installed.")
app.add_typer(train_app, name="train")
generate_app = typer.Typer(no_args_is_help=True, help="Make sequences with a trained model.")
app.add_typer(generate_app, name="generate")
app.add_typer(bench_app, name="bench")

CONFIGS = Path(__file__).parent / "configs"


def command(group: typer.Typer, name: str):
    """A command that turns UserError into one line and exit code 1, and adds --debug for tracebacks."""

    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args, debug: bool = False, **kwargs):
            try:
                return function(*args, **kwargs)
            except (typer.Exit, typer.Abort, typer.BadParameter):
                raise
            except KeyboardInterrupt:
                if debug:
                    raise
                fail("stopped by Ctrl-C")
            except BrokenPipeError:  # `seqlab ... | head`: nothing is wrong
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(0) from None
            except Exception as error:
                if debug:
                    traceback.print_exc()
                    raise typer.Exit(1) from None
                if isinstance(error, UserError):
                    fail(str(error))
                if isinstance(error, OSError) and error.strerror:
                    fail(f"{error.filename or 'input/output'}: {error.strerror}")
                first = (str(error).strip().splitlines() or [""])[0][:200]
                fail(f"{type(error).__name__}: {first} (unexpected; repeat with --debug for the whole story)")

        signature = inspect.signature(function)
        option = inspect.Parameter(
            "debug",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")],
        )
        wrapper.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
        return group.command(name)(wrapper)

    return decorate


def program() -> str:
    """What the user types for this program here: `seqlab`, or a path to it that is not on PATH."""
    import shutil

    called = Path(sys.argv[0])
    if called.name != "seqlab":
        return "seqlab" if shutil.which("seqlab") else "python -m cli"
    if shutil.which("seqlab"):
        return "seqlab"
    try:
        return str(called.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(called.resolve())


def fail(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(1)


def note(message: str = "") -> None:
    """A line for people, on standard error; once, however many processes there are."""
    if not is_main_process():
        return
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def emit(json_out: Optional[str], data: dict, *, human) -> None:
    """`human()` prints for people; --json FILE writes `data` too, and --json - prints it instead."""
    text = json.dumps(data, indent=1)
    if json_out == "-":
        print(text)
        return
    human()
    if json_out is not None:
        from seqlab.training.checkpoint import write_text

        write_text(Path(json_out), text + "\n")


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True  # six columns fit into 80 characters
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console(highlight=False).print(table)


def progress_bar(title: str, unit: str, scale: float = 1.0, suffix: str = "/s"):
    """(context manager, update(done, total)): a bar with rate and remaining time; silent when not on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        expand=True,
    )
    task = bar.add_task(title, total=None, rate="")

    def update(done: float, total: float | None) -> None:
        speed = bar.tasks[0].speed
        rate = f"{speed / scale:,.1f} {unit}{suffix}" if speed else ""
        bar.update(task, completed=done, total=total, rate=rate)

    return bar, update


# -- configuration -------------------------------------------------------------------------------------------------
def presets(task: Optional[str] = None) -> list[str]:
    """Names of the presets, of one task (`dna`, where a file names none) or of all."""
    from seqlab.config import load_yaml

    paths = sorted(CONFIGS.glob("*.yaml"))
    return [path.stem for path in paths if task in (None, load_yaml(path).get("task", "dna"))]


def find_config(name: str) -> Path:
    """A preset's name or a path -> the YAML file."""
    if (CONFIGS / f"{name}.yaml").is_file():
        return CONFIGS / f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    import difflib

    close = difflib.get_close_matches(name, presets(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"--config {name}: no such file or preset; {hint}presets: {', '.join(presets())}")


def load_config(cls: type, name: str, overrides: list[str], options: dict):
    """The preset or file, then the options of the command line, then --set, all through the same check."""
    from seqlab.config import load_yaml

    data = load_yaml(find_config(name))
    return lay_over(cls, data, make_room(data, options, overrides), overrides, name)


def lay_over(cls: type, data: dict, options: dict, overrides: list[str], source: str):
    """A config `cls` of the values in `data`, under `options`, under the --set texts; `source` serves the messages."""
    from seqlab.config import from_dict, merge, parse_override

    for top in [options, *(parse_override(text) for text in overrides)]:
        data = merge(data, top)
    return from_dict(cls, data, source)


def train_options(
    *, context=None, seed=None, devices=None, precision=None, max_steps=None, max_minutes=None, context_parallel=None
) -> dict:
    """The command-line options that every `seqlab train` has, as a nested dictionary of what was given."""
    if (started := launched()) is not None:
        devices = started.world_size
    names = {"float32": "float32", "fp32": "float32", "32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "auto": "auto"}
    if precision is not None:
        if precision in ("fp16", "float16", "16", "half"):
            raise UserError(
                f"--precision {precision}: float16 is refused, its range is too small for the scan's state and training "
                "turns to NaN; use bf16 or fp32"
            )
        if precision not in names:
            raise UserError(f"--precision {precision}: unknown; use fp32, bf16 or auto")
    train = {
        "seed": seed,
        "devices": devices,
        "context_parallel": context_parallel,
        "precision": None if precision is None else names[precision],
        "max_steps": max_steps,
        "max_minutes": max_minutes,
    }
    options = {"train": {key: value for key, value in train.items() if value is not None}}
    if context is not None:
        options["data"] = {"context": "whole" if context == "whole" else parse_context(context, "--context")}
    return options


def make_room(data: dict, options: dict, overrides: list[str]) -> dict:
    """`options` with a larger train.tokens_per_step if --context asks for a window that a step of `data` does not hold."""
    from seqlab.config import merge, parse_override
    from seqlab.training.module import TrainConfig

    context = options.get("data", {}).get("context")
    if context in (None, "whole"):
        return options
    for text in overrides:
        data = merge(data, parse_override(text))
    train = {**data.get("train", {}), **options.get("train", {})}
    tokens, devices = train.get("tokens_per_step", TrainConfig.tokens_per_step), train.get("devices", 1)
    needed = context * max(1, devices // train.get("context_parallel", 1))
    if not isinstance(tokens, int) or tokens >= needed:
        return options
    note(f"--context {context:,}: train.tokens_per_step goes from {tokens:,} to {needed:,}, one window a step and device")
    return merge(options, {"train": {"tokens_per_step": needed}})


def show_context(context: int | str) -> str:
    return "whole sequences" if context == "whole" else f"{context:,}"


def parse_context(text: str, option: str) -> int:
    try:
        number = int(str(text).replace(",", "").replace("_", ""))
    except ValueError:
        raise UserError(f"{option} {text}: expected a whole number, for example 131072 or 1_000_000") from None
    if number < 2:
        raise UserError(f"{option} {text}: must be 2 or more")
    return number


def resolve_device(device: str) -> str:
    """--device: "cpu" or "cuda" for auto, cpu or cuda. Raises UserError where there is no such device."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: unknown; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use cpu, or run `seqlab doctor` for the reason")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def default_run_dir(name: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{stamp}"


def newest_run() -> Path:
    runs = sorted(Path("runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("--resume: no run under runs/; name it with --out DIR")
    return runs[-1].parent


def check_new_directory(path: Path, overwrite: bool) -> None:
    """UserError unless `path` can become a new directory (or --overwrite says it may be replaced)."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not overwrite:
            raise UserError(f"{path}: already used; choose another --out, continue with --resume, or add --overwrite")
        if not path.is_dir() or not (path / "run.json").exists():
            raise UserError(f"{path}: not a run directory, so --overwrite will not remove it; choose another --out")
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"{path}: {parent} is not writable; choose another --out")


def new_run_directory(name: str, out: Optional[Path]) -> Path:
    """Where a new run goes: --out, or runs/NAME-TIME; every process of a run on several devices gets the same answer."""
    if out is not None:
        return out
    if "SEQLAB_RUN_DIR" in os.environ and not is_main_process():
        return Path(os.environ["SEQLAB_RUN_DIR"])  # an extra process of a run on several devices
    if launched():
        raise UserError("torchrun or srun: give --out DIR, so that all processes agree on the run directory")
    run_dir = default_run_dir(Path(name).stem)
    os.environ["SEQLAB_RUN_DIR"] = str(run_dir)
    return run_dir


def known_dataset(directory: Path, writer: str) -> Path:
    """`directory`, once its manifest has been read: what is no dataset is refused before anything is said or written."""
    from seqlab.dataset import read_manifest

    read_manifest(directory, writer)
    return directory


@contextlib.contextmanager
def fresh_directory(run_dir: Path, overwrite: bool, in_use: list[Path]):
    """While a new run begins in `run_dir`: an old run there is set aside (with --overwrite, else refused), and put back if
    the new one fails before it has trained anything; of a run that failed so, nothing is left. `in_use`: what the new run
    reads."""
    import shutil

    from tasks import runs

    check_new_directory(run_dir, overwrite)
    aside = None
    if run_dir.is_dir() and any(run_dir.iterdir()):
        for path in in_use:
            if path.resolve().is_relative_to(run_dir.resolve()):
                raise UserError(f"{path}: lies in {run_dir}, which --overwrite would replace; choose another --out")
        aside = run_dir.with_name(f".{run_dir.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        run_dir.rename(aside)
    try:
        yield
    except BaseException:
        runs.discard_empty(run_dir)
        if aside is not None and not run_dir.exists():
            aside.rename(run_dir)
            aside = None
        raise
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def resumed_run(cls: type, task: str, out: Optional[Path], data: Optional[Path], set_, given: dict, refused: dict):
    """(run directory, dataset, settings) of a run to go on with: its own settings, with a longer end if asked. `given`:
    arguments of train_options; `refused`: option -> value, of options that a resumed run takes from itself."""
    from seqlab.config import load_yaml
    from seqlab.training.fit import read_run_facts

    own = {**refused, "--context": given.get("context"), "--seed": given.get("seed")}
    if any(value not in (None, [], ()) for value in own.values()):
        raise UserError(f"--resume: goes on with the run's own data and settings; leave out {', '.join(own)}")
    run_dir = out or newest_run()
    facts = read_run_facts(run_dir)
    if facts.get("task", task) != task:
        raise UserError(f"{run_dir}: is a run of `train {facts['task']}`; resume it with that command")
    path = run_dir / "config.yaml"
    settings = lay_over(cls, load_yaml(path), train_options(**given), set_ or [], str(path))
    return run_dir, data or Path(facts["dataset"]), settings


def note_training_result(result, run_dir: Path, command_name: str, metric: str) -> None:
    """What came out of training, for people; leaves with exit code 130 if it was stopped by Ctrl-C."""
    if result.ended == "interrupted":
        note(f"Stopped at step {result.steps}; saved. Go on with:  {program()} train {command_name} --resume --out {run_dir}")
        raise typer.Exit(130)
    note(
        f"Trained {result.steps:,} steps, {result.tokens:,} tokens in {result.minutes:.1f} minutes "
        f"({result.tokens_per_second:,.0f} tokens/s), {result.ended}; best validation {result.best:.4f} {metric} "
        f"at step {result.best_step:,}."
    )


# -- commands ------------------------------------------------------------------------------------------------------
Fasta = Annotated[Optional[list[Path]], typer.Option("--fasta", help="FASTA file, plain, gzip or bgzip; may be repeated.")]
Splits = Annotated[Optional[Path], typer.Option("--splits", help="BED: chrom start end train|valid|test.")]
Valid = Annotated[Optional[list[str]], typer.Option("--valid", help="Sequence to validate on; may be repeated.")]
Test = Annotated[Optional[list[str]], typer.Option("--test", help="Sequence to test on; may be repeated.")]
Block = Annotated[Optional[int], typer.Option("--block", help="Bases in a block of the default split.")]
Json = Annotated[Optional[str], typer.Option("--json", help="Write results as JSON to this file; - for standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
# of every `seqlab train`
Set = Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE laid over the config; may be repeated.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out (default: the newest).")]
Seed = Annotated[Optional[int], typer.Option("--seed")]
Devices = Annotated[Optional[int], typer.Option("--devices", help="GPUs, or processes on a CPU.")]
Precision = Annotated[Optional[str], typer.Option("--precision", help="fp32, bf16 or auto.")]
MaxSteps = Annotated[Optional[int], typer.Option("--max-steps")]
MaxMinutes = Annotated[Optional[float], typer.Option("--max-minutes")]


@command(prep_app, "dna")
def prep_dna(
    fasta: Annotated[list[Path], typer.Argument(help="FASTA files, plain, gzip or bgzip.")],
    out: Annotated[Path, typer.Option("--out", help="Dataset directory to write.")],
    splits: Splits = None,
    valid: Valid = None,
    test: Test = None,
    block: Block = None,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Prepare a genome once: one byte a base, splits, manifest.

    Example:  seqlab prep dna ecoli.fa.gz --out data/ecoli
    """
    dataset = _prepare(fasta, out, splits, valid, test, block, overwrite)
    manifest = json.loads((dataset / "manifest.json").read_text())

    def human() -> None:
        _print_manifest(manifest, dataset)
        note(f"Next:  {program()} train dna --data {dataset}")

    emit(json_out, {"dataset": str(dataset), **{k: manifest[k] for k in ("counts", "soft_masked", "total")}}, human=human)


def _prepare(fasta, out, splits=None, valid=None, test=None, block=None, overwrite=False, whole=None) -> Path:
    from data_prep.genome import prepare_genome

    bar, update = progress_bar("preparing", "MB", 1e6)
    with bar:
        return prepare_genome(
            list(fasta),
            out,
            splits=splits,
            valid=list(valid or []),
            test=list(test or []),
            block=block,
            whole=whole,
            overwrite=overwrite,
            progress=update,
        )


def _print_manifest(manifest: dict, dataset: Path) -> None:
    counts = manifest["counts"]
    total = max(1, manifest["total"])
    rows = [[base, f"{n:,}", f"{100 * n / total:.2f} %"] for base, n in counts.items()]
    rows.append(["soft-masked", f"{manifest['soft_masked']:,}", f"{100 * manifest['soft_masked'] / total:.2f} %"])
    for split, intervals in manifest["splits"].items():
        n = sum(end - start for _, start, end in intervals)
        rows.append([f"split {split}", f"{n:,}", f"{100 * n / total:.2f} %"])
    print_table(f"{dataset}: {manifest['total']:,} bases in {len(manifest['sequences'])} sequences", ["", "bases", "share"], rows)
    note(f"Splits: {manifest['split_rule']}")


@command(train_app, "dna")
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
        from seqlab.training.fit import resolve_accelerator

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
    evaluation = _evaluate(runs.load_run(run_dir), dataset, dataset, "test", (), "auto")
    report_path = dna.write_report(run_dir, evaluation)
    from seqlab import report

    def human() -> None:
        _print_evaluation(evaluation)
        note(f"Report with plots: {report_path}")
        note("Next:")
        if fasta is None and data is None and not resume:
            note(f"  {program()} train dna --fasta YOUR_GENOME.fa.gz     train on your own genome")
        note(f"  {program()} eval {run_dir} --context 256 --context 4096")
        note(f"  {program()} train dna --data {dataset} --init {run_dir}   train further from these weights")

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
    settings = load_config(DnaConfig, name, set_ or [], options)
    dataset = None if data is None else known_dataset(data, "seqlab prep dna")
    run_dir = new_run_directory(name, out)
    if not is_main_process():
        dataset = dataset or run_dir / "data"
        _wait_for(dataset / "manifest.json")
        return run_dir, dataset, settings
    in_use = [path for path in (data, checkpoint, *(fasta or [])) if path is not None]
    undo.enter_context(fresh_directory(run_dir, overwrite, in_use))
    if dataset is None:
        dataset = run_dir / "data"
        run_dir.mkdir(parents=True, exist_ok=True)
        if demo:
            from data_prep.simulate import simulate_genome

            note("No --fasta or --data: simulating a small genome (genes on both strands, repeats; fixed seed).")
            fasta = [run_dir / "simulated.fa"]
            simulate_genome(fasta[0], seed=0)
        _prepare(fasta, dataset, splits, valid, test)
        _print_manifest_line(dataset)
    return run_dir, dataset, settings


def _wait_for(path: Path, seconds: float = 3600) -> None:
    """Until the first process has prepared the data."""
    deadline = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() > deadline:
            raise UserError(f"{path}: did not appear; the first process has not prepared the data")
        time.sleep(0.2)


def _print_manifest_line(dataset: Path) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    sizes = {s: sum(end - start for _, start, end in rows) for s, rows in manifest["splits"].items()}
    shares = ", ".join(f"{split} {n:,}" for split, n in sizes.items())
    note(
        f"{manifest['total']:,} bases in {len(manifest['sequences'])} sequences: {shares}; "
        f"{manifest['counts']['N']:,} N, {manifest['counts']['other']:,} other, {manifest['soft_masked']:,} soft-masked."
    )


def _evaluate(run, dataset: Path, training: Path, split: str, contexts: tuple[int, ...], device: str):
    """Of a run of `train dna` or `train audio`, whose tasks take the same arguments."""
    from seqlab.dataset import TokenStore
    from tasks import runs

    bar, update = progress_bar("evaluating", "k samples" if run.task == "audio" else "k tokens", 1e3)
    with bar:
        return runs.task_module(run.task).evaluate_run(
            run,
            TokenStore.open(dataset),
            TokenStore.open(training),
            split=split,
            contexts=contexts,
            device=device,
            progress=update,
        )


def _print_evaluation(evaluation) -> None:
    from seqlab import report

    header, rows = report.evaluation_rows(evaluation)
    print_table(f"{evaluation.bases:,} bases of the {evaluation.split} split", header, rows)
    note(report.evaluation_verdict(evaluation))
    note(
        f"{evaluation.soft_masked:,} of the scored bases are soft-masked; {evaluation.not_scored:,} positions were not "
        "scored (N or another symbol). Markov models: fitted on both strands of the same training split."
    )


# -- species, labelled sequences: prep, train, predict --------------------------------------------------------------
@command(prep_app, "species")
def prep_species(
    sources: Annotated[list[str], typer.Argument(help="NAME=FASTA pairs, or one TSV (species, file, split), or one folder.")],
    out: Annotated[Path, typer.Option("--out", help="Dataset directory to write.")],
    valid: Annotated[Optional[list[str]], typer.Option("--valid", help="Sequence that validates in every species.")] = None,
    test: Annotated[Optional[list[str]], typer.Option("--test", help="Sequence that tests in every species.")] = None,
    block: Annotated[Optional[int], typer.Option("--block", help="Bases in a test block; windows are no longer.")] = None,
    test_share: Annotated[float, typer.Option("--test-share", help="Share of each species in test blocks.")] = 0.1,
    valid_share: Annotated[float, typer.Option("--valid-share", help="Share of each species that validates.")] = 0.1,
    min_length: Annotated[int, typer.Option("--min-length", help="Leave out shorter sequences.")] = 1,
    allow_duplicates: Annotated[bool, typer.Option("--allow-duplicates", help="Keep identical sequences across a split.")] = False,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Prepare the genomes of several species once: one dataset, sequences or blocks of each held out.

    Example:  seqlab prep species human=human.fa.gz chimp=chimp.fa.gz --out data/apes
    """
    from data_prep.species import close_relatives, find_sources, prepare_species

    bar, update = progress_bar("preparing", "MB", 1e6)
    with bar:
        dataset = prepare_species(
            find_sources(sources),
            out,
            valid=list(valid or []),
            test=list(test or []),
            block=block,
            test_share=test_share,
            valid_share=valid_share,
            min_length=min_length,
            allow_duplicates=allow_duplicates,
            overwrite=overwrite,
            progress=update,
        )
    manifest = json.loads((dataset / "manifest.json").read_text())

    def human() -> None:
        rows = [[name, *(f"{n:,}" for n in known.values())] for name, known in manifest["class_bases"].items()]
        print_table(f"{dataset}: {len(rows)} species, bases A, C, G, T", ["species", "train", "valid", "test"], rows)
        note(f"Splits: {manifest['split_rule']}")
        relatives = list(close_relatives(manifest))
        for mine, other, share in relatives[:10]:
            note(f"Relatives: {100 * share:.0f} % of the test 32-mers of {mine} are in the training split of {other}.")
        if manifest["duplicates"]:
            note(f"Duplicates kept: {len(manifest['duplicates'])} pairs, first {' and '.join(manifest['duplicates'][0])}.")
        note(f"Next:  {program()} train species --data {dataset} --context 4096")

    keys = ("classes", "class_bases", "shared_kmers", "duplicates", "total")
    emit(json_out, {"dataset": str(dataset), **{k: manifest[k] for k in keys}}, human=human)


@command(train_app, "species")
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
    from seqlab.training.fit import resolve_accelerator
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
            if freeze and init is None:
                raise UserError("--freeze: trains the head on a backbone that has learnt; give one with --init RUN")
            checkpoint = None if init is None else runs.find_checkpoint(init)
            given = train_options(**options)
            if freeze:
                given = {**given, "freeze": "backbone", "loss": {"language_model": 0.0}}
            if checkpoint is not None:
                from seqlab.classifier import backbone_shape

                given = {**given, "model": backbone_shape(checkpoint)}
            settings = load_config(species.Config, config or "species", set_ or [], given)
            dataset = known_dataset(data, "seqlab prep species")
            run_dir = new_run_directory(config or "species", out)
            if is_main_process():
                undo.enter_context(fresh_directory(run_dir, overwrite, [p for p in (data, checkpoint) if p is not None]))
        accelerator = resolve_accelerator(settings.train)
        model = settings.model
        note(
            f"{run_dir}: {model.direction} Mamba, {model.n_layer} layers of d_model {model.d_model}, windows up to "
            f"{settings.data.context:,}, on the {accelerator.upper()}; Ctrl-C saves and stops"
        )
        result = species.train(settings, dataset, run_dir, init=checkpoint, resume=resume)
    if not is_main_process():
        return
    note_training_result(result, run_dir, species.NAME, species.SpeciesTask.metric)
    evaluation = _evaluate_species(runs.load_run(run_dir), dataset, dataset, "test", (), "auto")
    report_path = species.write_report(run_dir, evaluation)

    def human() -> None:
        _print_species_evaluation(evaluation)
        note(f"Report with plots: {report_path}")
        note(f"Next:  {program()} predict {run_dir} reads.fa.gz > labels.tsv")

    emit(
        json_out,
        {"run": str(run_dir), "result": result.__dict__, "evaluation": species.evaluation_dict(evaluation)},
        human=human,
    )


@command(app, "predict")
def predict(
    run: Annotated[Path, typer.Argument(help="Run directory or checkpoint of a classifier.")],
    reads: Annotated[str, typer.Argument(help="FASTA or FASTQ, plain or gzip; - for standard input.")],
    out: Annotated[str, typer.Option("--out", help="TSV to write; - for standard output.")] = "-",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences looked at together; changes no answer.")] = 1024,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Label sequences of any length, in order: name, label, a probability for each class, length.

    Example:  seqlab predict runs/apes reads.fa.gz | cut -f 1,2
    """
    from collections import Counter

    from seqlab.inference.classify import predict_records

    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be 1 or more")
    if out == "-" and json_out == "-":
        raise UserError("--json -: standard output is taken by the table; give --out FILE, or --json FILE")
    device = resolve_device(device)
    from data_prep.records import read_records
    from tasks import runs

    loaded = runs.load_run(run)
    module = runs.task_module(loaded.task)
    if not hasattr(module, "interpret"):
        raise UserError(f"{run}: is a run of `train {loaded.task}`, which gives no labels; give one of train species or classify")
    counts, unknown, total, started = Counter(), [], 0, time.monotonic()
    bar, update = progress_bar("predicting", "k bases", 1e3)
    with _table_out(out, overwrite) as file, bar:
        names = module.output_names(loaded.config)
        file.write("\t".join(["name", "label", *names, "length"]) + "\n")
        records = predict_records(
            loaded.model, read_records(reads), lambda outputs: module.interpret(loaded.config, outputs),
            device=device, precision=loaded.config.train.precision, batch_size=batch_size,
        )
        for name, label, values, length in records:
            cells = ["."] * len(names) if values is None else [f"{value:.4f}" for value in values]
            file.write("\t".join([name, label or ".", *cells, str(length)]) + "\n")
            counts[label or "."] += 1
            total += length
            if label is None:
                unknown.append(name)
            update(total, None)
    seconds = max(time.monotonic() - started, 1e-9)
    n = sum(counts.values())
    if not n:
        raise UserError(f"{reads}: no sequence in it")
    if len(unknown) == n:
        raise UserError(f"{reads}: none of its {n:,} sequences holds an A, C, G or T, so none has a label")
    note(
        f"{n:,} sequences, {total:,} bases in {seconds:.1f} s: {n / seconds:,.0f} sequences/s, {total / seconds:,.0f} bases/s "
        f"on the {device.upper()}."
    )
    if unknown:
        note(f"{len(unknown):,} without any A, C, G or T have no label (first: {unknown[0]}).")
    summary = {"sequences": n, "bases": total, "seconds": seconds, "labels": dict(counts), "device": device}
    emit(json_out, summary, human=lambda: None)


@contextlib.contextmanager
def _table_out(out: str, overwrite: bool):
    """Standard output, or a file that appears only when it is complete."""
    if out == "-":
        yield sys.stdout
        return
    path = Path(out)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; choose another --out or add --overwrite")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _evaluate_species(run, dataset: Path, training: Path, split: str, lengths: tuple[int, ...], device: str):
    from seqlab.dataset import TokenStore
    from tasks import species

    bar, update = progress_bar("evaluating", "parts")
    with bar:
        return species.evaluate_run(
            run,
            TokenStore.open(dataset),
            TokenStore.open(training),
            split=split,
            lengths=lengths,
            device=device,
            cache=run.directory / "baselines",
            progress=update,
        )


def _print_species_evaluation(evaluation) -> None:
    from tasks import species

    header, rows = species.evaluation_rows(evaluation)
    print_table(f"{len(evaluation.classes)} species, {evaluation.split} split: mean accuracy", header, rows)
    if known := species.published_rows(evaluation):
        print_table("Published by others for these species, not measured here", *known)
    note(species.evaluation_verdict(evaluation))
    for result in evaluation.results:
        if result.details:
            note(f"{result.length:,}: " + "; ".join(f"{name} {text}" for name, text in result.details.items()))


@command(prep_app, "labelled")
def prep_labelled(
    out: Annotated[Path, typer.Option("--out", help="Dataset directory to write.")],
    file: Annotated[Optional[Path], typer.Argument(help="CSV, TSV, FASTA, BED or parquet, plain or gzip.")] = None,
    train: Annotated[Optional[Path], typer.Option("--train", help="Instead of FILE: the training split.")] = None,
    valid: Annotated[Optional[Path], typer.Option("--valid", help="With --train: the validation split, if there is one.")] = None,
    test: Annotated[Optional[Path], typer.Option("--test", help="With --train: the test split.")] = None,
    sequence_column: Annotated[Optional[str], typer.Option("--sequence-column", help="Default: sequence or seq.")] = None,
    label_column: Annotated[Optional[str], typer.Option("--label-column", help="Default: label; BED: number, default 4.")] = None,
    name_column: Annotated[Optional[str], typer.Option("--name-column", help="Default: rows are named by number.")] = None,
    split_column: Annotated[Optional[str], typer.Option("--split-column", help="train, valid, test; default: split.")] = None,
    columns: Annotated[Optional[str], typer.Option("--columns", help="Names for a table without a header: label,name,sequence.")] = None,
    where: Annotated[Optional[list[str]], typer.Option("--where", help="COLUMN=VALUE: only these rows; may be repeated.")] = None,
    label_from: Annotated[Optional[str], typer.Option("--label-from", help="header: FASTA labels are in the headers.")] = None,
    label_pattern: Annotated[Optional[str], typer.Option("--label-pattern", help="Regular expression; group 1 is the label.")] = None,
    labels: Annotated[Optional[Path], typer.Option("--labels", help="CSV or TSV of name and label, for a FASTA.")] = None,
    genome: Annotated[Optional[Path], typer.Option("--genome", help="FASTA that a BED file points into.")] = None,
    kind: Annotated[str, typer.Option("--kind", help="auto, binary, multi-class, multi-label or regression.")] = "auto",
    label_separator: Annotated[Optional[str], typer.Option("--label-separator", help="Between labels: multi-label.")] = None,
    classes: Annotated[Optional[str], typer.Option("--classes", help="Names that must occur, and no others: a,b,c.")] = None,
    test_share: Annotated[float, typer.Option("--test-share", help="Share that tests, where no split is given.")] = 0.2,
    seed: Annotated[int, typer.Option("--seed", help="Of the split.")] = 0,
    duplicates: Annotated[str, typer.Option("--duplicates", help="Of test sequences in training: drop, keep or error.")] = "drop",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out sequences without label or bases, and count them.")] = False,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Prepare labelled sequences once: binary, multi-class, multi-label or regression.

    Example:  seqlab prep labelled promoters.csv --out data/promoters
    """
    from data_prep.labelled import LabelOptions, Reader, prepare_labelled, read_files

    if (file is None) == (train is None):
        raise UserError("give one FILE, or --train and --test")
    if file is not None and (valid or test):
        raise UserError("--valid and --test: belong to --train; a FILE brings its splits in a column, or gets them from --test-share")
    if train is not None and test is None:
        raise UserError("--train: needs --test too; to have a test split made, give the file without --train")
    files = {None: file} if file is not None else {i: p for i, p in enumerate((train, valid, test)) if p is not None}
    filters = {}
    for text in where or []:
        column, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--where {text}: expected COLUMN=VALUE, for example --where task=enhancers")
        filters[column.strip()] = value.strip()
    names = tuple(part.strip() for part in (classes or "").split(",") if part.strip())
    options = LabelOptions(kind, label_separator, names)
    bar, update = progress_bar("preparing", "MB", 1e6)
    reader = Reader(update)
    records = read_files(
        reader, files, genome=genome, labels=labels, label_from=label_from, label_pattern=label_pattern,
        sequence_column=sequence_column, label_column=label_column, name_column=name_column, split_column=split_column,
        columns=tuple(part.strip() for part in (columns or "").split(",") if part.strip()), where=filters,
    )  # fmt: skip
    with bar:
        dataset = prepare_labelled(
            records, reader.sources, out, labels=options, test_share=test_share, seed=seed, duplicates=duplicates,
            skip_bad=skip_bad, overwrite=overwrite,
        )  # fmt: skip
    manifest = json.loads((dataset / "manifest.json").read_text())

    def human() -> None:
        _print_labelled(manifest, dataset)
        note(f"Next:  {program()} train classify --data {dataset}")

    emit(json_out, {"dataset": str(dataset), **_labelled_summary(manifest)}, human=human)


def _labelled_summary(manifest: dict) -> dict:
    keys = ("label_kind", "classes", "n", "lengths", "counts", "lower_case", "case_gives_labels_away", "splits")
    keys += ("class_counts", "split_rule", "duplicates", "skipped")
    return {key: manifest[key] for key in keys}


def _print_labelled(manifest: dict, dataset: Path) -> None:
    rows = [[name, *(f"{n:,}" for n in counts.values())] for name, counts in manifest["class_counts"].items()]
    rows = rows if len(rows) <= 30 else [*rows[:29], [f"and {len(rows) - 29} more", "", "", ""]]
    rows.append(["all", *(f"{n:,}" for n in manifest["splits"].values())])
    lengths, counts = manifest["lengths"], manifest["counts"]
    print_table(f"{dataset}: {manifest['n']:,} sequences, {manifest['label_kind']}", ["class", "train", "valid", "test"], rows)
    note(
        f"{lengths['min']:,} to {lengths['max']:,} bases (median {lengths['median']:,.0f}); {counts['N']:,} N, {counts['other']:,} "
        f"ambiguity codes and gaps read as N; {manifest['lower_case']:,} lower-case letters read as upper case."
    )
    if manifest["case_gives_labels_away"]:
        note("Case gives the label away in this file: lower-case letters occur in one class only. The model never sees case.")
    note(f"Splits: {manifest['split_rule']}")
    found = manifest["duplicates"]
    if found["repeats"]:
        conflict = found["repeats_with_another_label"]
        note(
            f"{found['repeats']:,} sequences repeat another (as they are or reverse complemented), {conflict:,} of them with another "
            f"label; {found['leaking']:,} were on both sides of a split"
            + (f" ({found['action']})." if found["leaking"] else ".")
        )
    for why, n in manifest["skipped"].items():
        note(f"{n:,} sequences left out: {why}.")


@command(prep_app, "benchmark")
def prep_benchmark(
    suite: Annotated[str, typer.Argument(help="genomic-benchmarks, nucleotide-transformer, great-apes or five-mammals.")],
    folder: Annotated[Path, typer.Argument(help="Folder that the public files were unpacked to.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; one dataset a task in it.")],
    task: Annotated[Optional[list[str]], typer.Option("--task", help="Only this task; may be repeated.")] = None,
    duplicates: Annotated[str, typer.Option("--duplicates", help="keep (as published), drop or error.")] = "keep",
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Turn the public files of a benchmark into datasets with its official splits.

    Example:  seqlab prep benchmark genomic-benchmarks ~/.genomic_benchmarks --out data/gb
    """
    from data_prep.benchmarks import SUITES, find_benchmarks, prepare_benchmark, species_sources
    from seqlab.dataset import nearest

    if suite not in SUITES:
        raise UserError(f"{suite}: unknown benchmark; {nearest(suite, SUITES)}")
    bar, update = progress_bar("preparing", "MB", 1e6)
    if suite in SUITES[2:]:
        from data_prep.species import prepare_species

        if task:
            raise UserError(f"--task: {suite} is one dataset; leave it out")
        with bar:
            dataset = prepare_species(
                species_sources(suite, folder), out, allow_duplicates=duplicates == "keep", overwrite=overwrite, progress=update
            )
        preset = suite.replace("-", "_")
        data = {"dataset": str(dataset)}
        emit(json_out, data, human=lambda: note(f"Next:  {program()} train species --data {dataset} --config {preset} --context 1024"))
        return
    found = find_benchmarks(suite, folder, tuple(task or ()))
    made = []
    with bar:
        for benchmark in found:
            made.append(prepare_benchmark(benchmark, out / benchmark.task, duplicates=duplicates, overwrite=overwrite, progress=update))
    manifests = [json.loads((dataset / "manifest.json").read_text()) for dataset in made]

    def human() -> None:
        rows = [
            [dataset.name, str(len(m["classes"])), *(f"{m['splits'][s]:,}" for s in ("train", "test")), f"{m['lengths']['median']:,.0f}",
             f"{m['duplicates']['leaking']:,}"]
            for dataset, m in zip(made, manifests)
        ]  # fmt: skip
        print_table(f"{out}: {suite}", ["task", "classes", "train", "test", "median length", "train in test"], rows)
        preset = "genomic_benchmarks" if suite == SUITES[0] else "nucleotide_transformer_tasks"
        note(f"Next:  {program()} train classify --data {made[0]} --config {preset} --init RUN")

    emit(json_out, {"datasets": {str(d): _labelled_summary(m) for d, m in zip(made, manifests)}}, human=human)


@command(train_app, "classify")
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
    epochs: Annotated[Optional[float], typer.Option("--epochs")] = None,
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
    from seqlab.training.fit import resolve_accelerator
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
            if freeze and init is None:
                raise UserError("--freeze: trains the head on a backbone that has learnt; give one with --init RUN")
            checkpoint = None if init is None else runs.find_checkpoint(init)
            given = train_options(**options)
            own = {"seeds": seeds, "epochs": epochs, "freeze": "backbone" if freeze else None}
            given |= {key: value for key, value in own.items() if value is not None}
            if checkpoint is not None:
                from seqlab.classifier import backbone_shape

                given["model"] = backbone_shape(checkpoint)
            if strand is not None:
                given["model"] = {**given.get("model", {}), "strand": strand}
            settings = load_config(classification.Config, config or "classify", set_ or [], given)
            dataset = known_dataset(data, "seqlab prep labelled")
            run_dir = new_run_directory(config or "classify", out)
            if is_main_process():
                undo.enter_context(fresh_directory(run_dir, overwrite, [p for p in (data, checkpoint) if p is not None]))
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
        note(f"Stopped; saved. Go on with:  {program()} train classify --resume --out {run_dir}")
        raise typer.Exit(130)
    evaluation = _evaluate_labelled(runs.load_run(run_dir), dataset, dataset, "test", "auto")
    report_path = classification.write_report(run_dir, evaluation)

    def human() -> None:
        _print_labelled_evaluation(evaluation)
        note(f"Report with plots: {report_path}")
        note(f"Next:  {program()} predict {run_dir} sequences.fa.gz > labels.tsv")

    found = classification.evaluation_dict(evaluation)
    plain = {str(seed): result.__dict__ for seed, result in results.items()}
    emit(json_out, {"run": str(run_dir), "results": plain, "evaluation": found}, human=human)


def _evaluate_labelled(run, dataset: Path, training: Path, split: str, device: str):
    from seqlab.classification.dataset import LabelledStore
    from tasks import classification

    bar, update = progress_bar("evaluating", "parts")
    with bar:
        return classification.evaluate_run(
            run, LabelledStore.open(dataset), LabelledStore.open(training), split=split, device=device, progress=update
        )


def _print_labelled_evaluation(evaluation) -> None:
    from tasks import classification

    header, rows = classification.evaluation_rows(evaluation)
    seeds = len(evaluation.seeds)
    title = f"{evaluation.dataset}: {evaluation.n:,} sequences, {evaluation.split} split, {seeds} seed{'s' * (seeds != 1)}"
    print_table(title, header, rows)
    if known := classification.published_rows(evaluation):
        print_table("Published by others, not measured here", ["model", classification.TITLES[evaluation.main], "source"], known)
    note(classification.evaluation_verdict(evaluation))
    for name, chosen in evaluation.details.items():
        if chosen:
            note(f"{name}: " + " | ".join(dict.fromkeys(chosen)))


def _eval_labelled(loaded, run: Path, data, training: Path, split: str, contexts, device: str, out, json_out) -> None:
    from tasks import classification

    if contexts:
        raise UserError("--context: a run of `train classify` reads whole sequences; leave it out (data.max_length cuts them)")

    evaluation = _evaluate_labelled(loaded, data or training, training, split, device)
    name = "evaluation-other" if data else "evaluation" if split == "test" else f"evaluation-{split}"
    report_path = classification.write_report(loaded.directory, evaluation, name, out)

    def human() -> None:
        _print_labelled_evaluation(evaluation)
        note(f"Report with plots: {report_path}")

    emit(json_out, {"run": str(run), **classification.evaluation_dict(evaluation)}, human=human)


# -- audio: prep, train, generate -----------------------------------------------------------------------------------
@command(prep_app, "audio")
def prep_audio(
    sources: Annotated[list[Path], typer.Argument(help="Sound files, or directories to search for them.")],
    out: Annotated[Path, typer.Option("--out", help="Dataset directory to write.")],
    sample_rate: Annotated[int, typer.Option("--sample-rate", help="Samples a second of the dataset.")] = 16000,
    quantizer: Annotated[
        str, typer.Option("--quantizer", help="mulaw-256, linear-256, sashimi-mulaw or sashimi-linear.")
    ] = "mulaw-256",
    scale: Annotated[str, typer.Option("--scale", help="One factor for all samples; `peak`: the loudest becomes 1.")] = "1",
    label_from: Annotated[Optional[str], typer.Option("--label-from", help="folder or name: classes from there.")] = None,
    label_pattern: Annotated[
        Optional[str], typer.Option("--label-pattern", help="Regular expression; its groups are the label in a name.")
    ] = None,
    valid: Annotated[Optional[list[str]], typer.Option("--valid", help="Pattern of files to validate on.")] = None,
    test: Annotated[Optional[list[str]], typer.Option("--test", help="Pattern of files to test on: '*_[0-4].wav'.")] = None,
    share: Annotated[Optional[float], typer.Option("--share", help="Of each of the two default splits; 0.1.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out files that cannot be used, and list them.")] = False,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Prepare recordings once: mono, one sample rate, one scale, 8 bits a sample, splits, manifest.

    Example:  seqlab prep audio recordings/ --sample-rate 16000 --out data/speech
    """
    from data_prep.audio import prepare_audio

    try:
        factor = scale if scale == "peak" else float(scale)
    except ValueError:
        raise UserError(f"--scale {scale}: must be a number above 0, or peak") from None
    bar, update = progress_bar("preparing", "MB", 1e6)
    with bar:
        dataset = prepare_audio(
            sources,
            out,
            sample_rate=sample_rate,
            quantizer=quantizer,
            scale=factor,
            label_from=label_from,
            label_pattern=label_pattern,
            valid=valid or [],
            test=test or [],
            share=share,
            skip_bad=skip_bad,
            overwrite=overwrite,
            progress=update,
        )
    manifest = json.loads((dataset / "manifest.json").read_text())

    def human() -> None:
        _print_audio_manifest(manifest, dataset)
        note(f"Next:  {program()} train audio --data {dataset}")

    keys = ("total", "sample_rate", "scale", "labels", "clipped", "silent", "skipped")
    emit(json_out, {"dataset": str(dataset), **{k: manifest[k] for k in keys}}, human=human)


def _print_audio_manifest(manifest: dict, dataset: Path) -> None:
    rate, total = manifest["sample_rate"], manifest["total"]

    def row(name: str, samples: int) -> list[str]:
        return [name, f"{samples / rate:,.1f}", f"{samples:,}", f"{100 * samples / total:.2f} %"]

    rows = [row(f"split {name}", sum(e - s for _, s, e in part)) for name, part in manifest["splits"].items()]
    rows += [row("silent (below -60 dB)", manifest["silent"]), row("clipped", manifest["clipped"])]
    title = f"{dataset}: {len(manifest['sequences']):,} recordings at {rate:,} Hz, {manifest['tokenizer']}"
    print_table(title, ["", "seconds", "samples", "share"], rows)
    note(f"Scale: {manifest['scale']:.4g}. Splits: {manifest['split_rule']}")
    if manifest["labels"]:
        shown = ", ".join(manifest["labels"][:12]) + (" ..." if len(manifest["labels"]) > 12 else "")
        note(f"{len(manifest['labels'])} classes: {shown}")
    if manifest["skipped"]:
        first = manifest["skipped"][0]
        note(f"Left out {len(manifest['skipped'])} files, listed in the manifest; the first: {first['path']}: {first['reason']}")


@command(train_app, "audio")
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
            settings = load_config(audio.Config, config, set_ or [], train_options(**options))
            dataset = known_dataset(data, "seqlab prep audio")
            run_dir = new_run_directory(config, out)
            if is_main_process():
                in_use = [path for path in (data, checkpoint) if path is not None]
                undo.enter_context(fresh_directory(run_dir, overwrite, in_use))
        from seqlab.training.fit import resolve_accelerator

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
    evaluation = _evaluate(runs.load_run(run_dir), dataset, dataset, "test", (), "auto")
    report_path = audio.write_report(run_dir, evaluation)
    from seqlab import report

    def human() -> None:
        _print_audio_evaluation(evaluation)
        note(f"Report with plots: {report_path}")
        note(f"Next:  {program()} generate audio {run_dir} --seconds 2 --num 8 --out samples/")

    emit(
        json_out,
        {"run": str(run_dir), "result": result.__dict__, "evaluation": report.audio_evaluation_dict(evaluation)},
        human=human,
    )


def _print_audio_evaluation(evaluation) -> None:
    from seqlab import report

    header, rows = report.audio_evaluation_rows(evaluation)
    title = f"{evaluation.samples:,} samples of {evaluation.recordings:,} recordings, {evaluation.split} split"
    print_table(title, header, rows)
    note(report.audio_verdict(evaluation))


def _eval_audio(loaded, run: Path, data, training: Path, split: str, contexts, device: str, out, json_out) -> None:
    from seqlab import report
    from tasks import audio

    evaluation = _evaluate(loaded, data or training, training, split, contexts, device)
    report_path = audio.write_report(loaded.directory, evaluation, "evaluation-other" if data else "evaluation", out)

    def human() -> None:
        _print_audio_evaluation(evaluation)
        note(f"Report with plots: {report_path}")

    emit(json_out, {"run": str(run), **report.audio_evaluation_dict(evaluation)}, human=human)


@command(generate_app, "audio")
def generate_audio(
    run: Annotated[Optional[Path], typer.Argument(help="Run directory or checkpoint; with --resume it is known.")] = None,
    out: Annotated[str, typer.Option("--out", help="Folder for the WAV files; - for raw PCM on standard output.")] = "samples",
    seconds: Annotated[float, typer.Option("--seconds", help="Length of each sample, without the prompt.")] = 10.0,
    num: Annotated[int, typer.Option("--num", help="How many samples.")] = 1,
    prompt: Annotated[Optional[Path], typer.Option("--prompt", help="A recording to continue.")] = None,
    prompt_start: Annotated[float, typer.Option("--prompt-start", help="Second at which the prompt begins.")] = 0.0,
    prompt_seconds: Annotated[Optional[float], typer.Option("--prompt-seconds", help="Length of the prompt.")] = None,
    with_prompt: Annotated[bool, typer.Option("--with-prompt", help="Write the prompt before its continuation.")] = False,
    class_: Annotated[
        Optional[list[str]], typer.Option("--class", help="Class to make; repeated: in turn; `all`: every one in turn.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="1: as learned; 0: always the likeliest.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw among so many likeliest codes; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among the likeliest codes of this probability.")] = 1.0,
    guidance: Annotated[float, typer.Option("--guidance", help="Above 0: follow --class more closely than learned.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    rank: Annotated[Optional[int], typer.Option("--rank", help="Make so many and keep the --num likeliest.")] = None,
    rank_by: Annotated[
        str, typer.Option("--rank-by", help="likelihood, or class: the model's own belief in the class asked for.")
    ] = "likelihood",
    runaway: Annotated[str, typer.Option("--runaway", help="What has run away: mark it, or resample it.")] = "mark",
    batch: Annotated[int, typer.Option("--batch", help="Samples made side by side.")] = 256,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished generation in --out.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[str, typer.Option("--backend", help="Back end of the decoder; auto: the fastest.")] = "auto",
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Make sound with a trained model: WAV files that grow while you listen, likelihoods, a contact sheet.

    Example:  seqlab generate audio runs/digits --seconds 1 --num 20 --class all --out digits/
    """
    from tasks import audio, audio_generation, runs

    device = resolve_device(device)
    to_stdout = out == "-"
    if to_stdout and (num != 1 or rank is not None or resume or json_out == "-"):
        raise UserError("--out -: one sample goes to standard output; leave out --num, --rank, --resume and --json -")
    folder = Path(out)
    if resume:
        given = {
            "--seconds": seconds != 10.0, "--num": num != 1, "--prompt": prompt is not None, "--prompt-start": prompt_start != 0,
            "--prompt-seconds": prompt_seconds is not None, "--with-prompt": with_prompt, "--class": bool(class_),
            "--temperature": temperature != 1, "--top-k": top_k != 0, "--top-p": top_p != 1, "--seed": seed != 0,
            "--guidance": guidance != 0, "--rank": rank is not None, "--rank-by": rank_by != "likelihood", "--runaway": runaway != "mark",
            "--batch": batch != 256, "--overwrite": overwrite,
        }  # fmt: skip
        if any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise UserError(f"--resume: goes on with the settings that it was stopped with; leave out {names}")
        audio_generation.load_state(folder)
        checkpoint, settings = audio_generation.load_settings(folder)
        checkpoint = run or checkpoint
    else:
        if run is None:
            raise UserError("which run? give the directory that `seqlab train audio` wrote")
        checkpoint = run
        settings = audio_generation.Settings(
            seconds=seconds,
            num=num,
            prompt=None if prompt is None else str(prompt.resolve()),
            prompt_start=prompt_start,
            prompt_seconds=prompt_seconds,
            with_prompt=with_prompt,
            classes=tuple(class_ or ()),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            seed=seed,
            candidates=rank,
            rank_by=rank_by,
            runaway=runaway,
            batch=batch,
        )
    loaded = runs.load_run(checkpoint, task=audio.NAME)
    if settings.classes == ("all",):
        import dataclasses

        if not loaded.config.sound.labels:
            raise UserError("--class all: this run was trained without classes; prepare data with --label-from")
        settings = dataclasses.replace(settings, classes=loaded.config.sound.labels)
    bar, update = progress_bar("generating", "x real time", suffix="")
    generator = audio_generation.Generator(loaded, settings, device, backend, update)
    if not to_stdout and not resume:
        _check_sample_folder(folder, overwrite)
    with bar:
        if to_stdout:
            outcome = generator.to_pcm(audio_generation.write_to_stdout)
        else:
            outcome = generator.to_folder(folder, resume)
    if not outcome.finished:
        note(f"Stopped after {outcome.seconds_of_sound:.1f} s of sound; saved. Go on with:  "
             f"{program()} generate audio --resume --out {folder}")  # fmt: skip
        raise typer.Exit(130)
    sound = f"{outcome.seconds_of_sound:,.1f} s of sound in {outcome.wall_seconds:,.1f} s"
    speed = f"{outcome.real_time_factor:,.1f} x real time in all ({outcome.backend} decoder on {device})"
    if to_stdout:
        note(f"{sound}: {speed}. Played with:  aplay -f S16_LE -c 1 -r {outcome.sample_rate}")
        return

    def human() -> None:
        rows = [
            [row["file"], row["class"] or "-", f"{row['log_likelihood']:,.0f}", f"{row['bits_per_sample']:.3f}",
             ", ".join(f"{name} from {at:.1f} s" for name, at in row["marks"].items()) or "-"]
            for row in outcome.rows
        ]  # fmt: skip
        print_table(f"{folder}: {len(rows)} samples", ["file", "class", "log-likelihood", "bits/sample", "ran away"], rows)
        note(f"{sound}: {speed}. Contact sheet: {folder / 'contact_sheet.png'}")

    emit(json_out, json.loads((folder / "generation.json").read_text()), human=human)


def _check_sample_folder(folder: Path, overwrite: bool) -> None:
    """UserError unless samples may be written to `folder`; removes those of an earlier call with --overwrite."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another --out")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        hint = "; go on with --resume" if (folder / ".state.pt").exists() else ""
        raise UserError(f"{folder}: already holds something{hint}; choose another --out, or add --overwrite")
    if not (folder / "generation.json").is_file():
        raise UserError(f"{folder}: was not written by `seqlab generate`, so --overwrite leaves it alone; choose another --out")
    for pattern in ("sample-*.wav", "samples.csv", "generation.json", "contact_sheet.png", ".state.pt"):
        for path in folder.glob(pattern):
            path.unlink()


@command(generate_app, "dna")
def generate_dna(
    run: Annotated[Path, typer.Argument(help="Run directory or checkpoint of a causal model.")],
    out: Annotated[str, typer.Option("--out", help="FASTA file to write; - for standard output.")] = "-",
    length: Annotated[int, typer.Option("--length", help="Bases of each sequence, without the prompt.")] = 1000,
    num: Annotated[int, typer.Option("--num", help="How many sequences.")] = 1,
    prompt: Annotated[str, typer.Option("--prompt", help="Bases to go on from.")] = "",
    temperature: Annotated[float, typer.Option("--temperature", help="1: as learned; 0: always the likeliest.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw among so many likeliest bases; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among the likeliest bases of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    batch: Annotated[int, typer.Option("--batch", help="Sequences made side by side.")] = 256,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[str, typer.Option("--backend", help="Back end of the decoder; auto: the fastest.")] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Draw DNA from a causal model: A, C, G and T only, with the log-likelihood of each sequence.

    Example:  seqlab generate dna runs/dna_demo --length 2000 --num 4 --prompt ATGAAACGC --out drawn.fa
    """
    from seqlab.ops.decode import Sampling
    from tasks import dna_generation, runs

    device = resolve_device(device)
    if out != "-" and Path(out).exists() and not overwrite:
        raise UserError(f"{out}: exists; choose another --out, or add --overwrite")
    try:
        sampling = Sampling(temperature, top_k, top_p, seed)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None
    loaded = runs.load_run(run, task="dna")
    bar, update = progress_bar("generating", "k bases", 1e3)
    with bar:
        sequences, seconds, used = dna_generation.generate(
            loaded, length=length, num=num, prompt=prompt, sampling=sampling, device=device, backend=backend, batch=batch,
            progress=update,
        )  # fmt: skip
    text = "".join(sequence.fasta() for sequence in sequences)
    if out == "-":
        print(text, end="")
    else:
        from seqlab.training.checkpoint import write_text

        write_text(Path(out), text)
    rate = length * num / max(seconds, 1e-9)
    note(f"{num} sequences of {length:,} bases in {seconds:.1f} s: {rate:,.0f} bases/s ({used} decoder on {device})")


# -- plan -----------------------------------------------------------------------------------------------------------
@command(app, "plan")
def plan(
    config: Annotated[str, typer.Argument(help="Preset or YAML file.")],
    context: Annotated[Optional[str], typer.Option("--context", help="Window length; default: the config's.")] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="GPUs like this machine's that the run would have.")] = 1,
    context_parallel: Annotated[
        Optional[int], typer.Option("--context-parallel", help="How many of them would share a window.")
    ] = None,
    set_: Set = None,
    json_out: Json = None,
) -> None:
    """Memory, step time and cost of a run before it starts: a few short steps on this machine, extrapolated.

    Example:  seqlab plan dna_base --context 1_000_000
    """
    import dataclasses

    from seqlab.config import load_yaml
    from seqlab.training import planner
    from tasks import planning, runs

    module = runs.task_module(str(load_yaml(find_config(config)).get("task", "dna")))
    options = train_options(context=context, devices=devices, context_parallel=context_parallel)
    settings = load_config(module.Config, config, set_ or [], options)
    with progress_bar("measuring", "")[0]:
        found = planning.plan_run(settings)
    result = found.plan
    per_step = found.tokens_per_step

    def human() -> None:
        hosts = any(e.host for e in result.estimates)
        header = ["memory", "chunk", "peak", *(["host"] if hosts else []), "s/step", "tokens/s", "longest", "fits"]
        rows = []
        for e in result.estimates:
            chunk = "" if e.memory.chunk_tokens is None else f"{e.memory.chunk_tokens:,}"
            host = [planner.gib(e.host) if e.host else ""] if hosts else []
            seconds = f"{e.step_seconds:,.{0 if e.step_seconds >= 100 else 2}f}"
            rate, longest = f"{per_step / e.step_seconds:,.0f}", f"{e.longest:,}"
            rows.append([e.memory.mode, chunk, planner.gib(e.peak), *host, seconds, rate, longest, "yes" if e.fits else "no"])
        title = f"{config}: {found.parameters:,} parameters, context {result.length:,}, {per_step:,} tokens a step"
        print_table(title, header, rows)
        for mode, reason in result.unavailable.items():
            note(f"{mode}: not for this model: {reason}")
        note(f"Free here: {planner.gib(result.capacity)} ({'GPU' if result.device == 'cuda' else 'CPU'})")
        if result.chosen is None:
            note(result.refusal(None if settings.train.memory == "auto" else settings.train.memory))
            return
        note(
            f"`train` would use memory {result.chosen.memory}: {found.steps:,} steps, {found.steps * per_step:,} tokens, "
            f"{show_duration(found.seconds)} on {found.devices} device(s), {found.device_hours:,.1f} device-hours, validation apart."
        )

    data = {"config": config, **{k: v for k, v in dataclasses.asdict(found).items() if k != "plan"}, "plan": planner.as_dict(result)}
    emit(json_out, {**data, "device_hours": found.device_hours}, human=human)


def show_duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"


# -- bench ----------------------------------------------------------------------------------------------------------
@command(bench_app, "scan")
def bench_scan(
    batch: Annotated[int, typer.Option("--batch")] = 1,
    d_inner: Annotated[int, typer.Option("--d-inner", help="Channels.")] = 512,
    d_state: Annotated[int, typer.Option("--d-state", help="States a channel.")] = 16,
    min_length: Annotated[str, typer.Option("--min-length")] = "1024",
    max_length: Annotated[Optional[str], typer.Option("--max-length", help="Default: 1,048,576 on a GPU, 16,384 on a CPU.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[Optional[str], typer.Option("--precision", help="bf16 or fp32; default: bf16 on a GPU.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Most time a contender may take at one length.")] = 10.0,
    attention: Annotated[bool, typer.Option("--attention/--no-attention", help="Causal attention of the same width too.")] = True,
    plot: Annotated[Optional[Path], typer.Option("--plot", help="Write a plot (PNG) here.")] = None,
    json_out: Json = None,
) -> None:
    """Selective scan by length: parity with float64 first, then every back end and peer installed here, side by side.

    Example:  seqlab bench scan --max-length 4096 --plot scan.png
    """
    import torch

    from seqlab.bench import scan

    device = resolve_device(device)
    if precision not in (None, "bf16", "bfloat16", "fp32", "float32"):
        raise UserError(f"--precision {precision}: unknown; use bf16 or fp32")
    half = device == "cuda" if precision is None else precision in ("bf16", "bfloat16")
    longest = max_length or (2**20 if device == "cuda" else 2**14)
    settings = scan.Settings(
        batch=batch,
        d_inner=d_inner,
        d_state=d_state,
        min_length=parse_context(min_length, "--min-length"),
        max_length=parse_context(longest, "--max-length"),
        device=device,
        dtype=torch.bfloat16 if half else torch.float32,
        attention=attention,
        seconds=seconds,
    )
    console = Console(stderr=True)
    with console.status("") if console.is_terminal else contextlib.nullcontext() as status:
        result = scan.run(settings, (lambda text: status.update(text)) if status else (lambda text: None))
    if plot is not None:
        scan.plot(result, plot)

    def human() -> None:
        shown = f"batch {batch}, d_inner {d_inner}, d_state {d_state}, {result.settings['dtype']}, {result.machine}"
        print_table("Error against the float64 reference", *scan.error_table(result))
        print_table(f"Forward / forward + backward, ms: {shown}", *scan.table(result))
        for name, why in {**result.absent, **result.dropped}.items():
            note(f"{name}: {why}")
        if plot is not None:
            note(f"Plot: {plot}")
        print(json.dumps(result.as_dict()))

    emit(json_out, result.as_dict(), human=human)


@command(bench_app, "generate")
def bench_generate(
    shape: Annotated[Optional[list[str]], typer.Option("--shape", help="Model shape; may be repeated. Default: all.")] = None,
    batch: Annotated[Optional[list[int]], typer.Option("--batch", help="Streams side by side; may be repeated.")] = None,
    backend: Annotated[Optional[list[str]], typer.Option("--backend", help="Back end; may be repeated. Default: auto.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    prompt: Annotated[str, typer.Option("--prompt", help="Length of the prompt that is timed; 0: none.")] = "160000",
    seconds: Annotated[float, typer.Option("--seconds", help="About how long one timing runs.")] = 0.5,
    json_out: Json = None,
) -> None:
    """Tokens a second while generating: parity with the parallel forward pass first, then beside mamba_ssm if installed.

    Example:  seqlab bench generate --shape youtubemix_1m --batch 1 --prompt 0
    """
    import torch

    from seqlab.bench import generate
    from seqlab.dataset import nearest
    from seqlab.ops import decode

    device = resolve_device(device)
    for name in backend or []:
        if name not in ("auto", *decode.BACKENDS):
            raise UserError(f"--backend {name}: unknown; {nearest(name, ('auto', *decode.BACKENDS))}")
    on_gpu = device == "cuda"
    settings = generate.Settings(
        shapes=tuple(shape or generate.SHAPES),
        batches=tuple(batch or ((1, 64, 512) if on_gpu else (1, 16))),
        dtypes=(torch.float32, torch.bfloat16) if on_gpu else (torch.float32,),
        backends=tuple(backend or ("auto",)),
        prompt=0 if prompt == "0" else parse_context(prompt, "--prompt"),
        seconds=seconds,
        device=device,
    )
    console = Console(stderr=True)
    with console.status("") if console.is_terminal else contextlib.nullcontext() as status:
        result = generate.run(settings, (lambda text: status.update(text)) if status else (lambda text: None))

    def human() -> None:
        print_table(f"Generation, {result.machine}", *generate.table(result))
        print_table("Prompt and state", *generate.facts(result))
        note(f"largest difference from the parallel forward pass: {max(result.errors.values()):.1e}")
        for name, why in result.absent.items():
            note(f"{name}: {why}")
        print(json.dumps(result.as_dict()))

    emit(json_out, result.as_dict(), human=human)


# -- every kind of run: eval, doctor --------------------------------------------------------------------------------
@command(app, "eval")
def eval_(
    run: Annotated[Path, typer.Argument(help="Run directory or checkpoint.")],
    fasta: Fasta = None,
    data: Annotated[Optional[Path], typer.Option("--data", help="Another dataset directory to evaluate on.")] = None,
    split: Annotated[Optional[str], typer.Option("--split", help="train, valid or test.")] = None,
    context: Annotated[Optional[list[str]], typer.Option("--context", help="Context length; may be repeated.")] = None,
    set_: Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE, for example eval.max_bases=100000.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Optional[Path], typer.Option("--out", help="Where to put the plot and table; default: in the run.")] = None,
    json_out: Json = None,
) -> None:
    """Bits per base by context length, beside Markov models of order 0 to 12 on the same bases.

    Example:  seqlab eval runs/dna_demo --context 256 --context 4096
    """
    import dataclasses
    import tempfile

    from seqlab import report
    from seqlab.config import to_dict
    from tasks import runs

    device = resolve_device(device)
    loaded = runs.load_run(run)
    loaded = dataclasses.replace(loaded, config=lay_over(type(loaded.config), to_dict(loaded.config), {}, set_ or [], "--set"))
    if "dataset" not in loaded.facts:
        raise UserError(f"{run}: no run.json beside the checkpoint, so its training split is unknown; give the run directory")
    training = Path(loaded.facts["dataset"])
    contexts = tuple(parse_context(c, "--context") for c in context or [])
    prepared_by = {"audio": "audio", "classify": "labelled", "species": "species"}.get(loaded.task)
    if prepared_by is not None:
        if fasta:
            raise UserError(
                f"--fasta: a run of `train {loaded.task}` is evaluated on a dataset of `seqlab prep {prepared_by}`; give --data"
            )
        evaluate = {"audio": _eval_audio, "classify": _eval_labelled, "species": _eval_species}[loaded.task]
        evaluate(loaded, run, data, training, split or "test", contexts, device, out, json_out)
        return
    with tempfile.TemporaryDirectory(prefix="seqlab-") as temporary:
        dataset, other = training, bool(fasta or data)
        if fasta:
            if split is not None:
                raise UserError("--split: with --fasta every base is scored; leave one of them out")
            dataset = _prepare(fasta, Path(temporary) / "data", whole="test")
        elif data:
            dataset = data
        evaluation = _evaluate(loaded, dataset, training, split or "test", contexts, device)
    target = out or loaded.directory
    if out is not None:
        target.mkdir(parents=True, exist_ok=True)
    name = "evaluation-other" if other else "evaluation"
    plot = report.plot_evaluation(evaluation, target / "plots" / f"{name}.png")

    def human() -> None:
        _print_evaluation(evaluation)
        note(f"Plot: {plot}")

    emit(json_out, {"run": str(run), **report.evaluation_dict(evaluation)}, human=human)


def _eval_species(loaded, run: Path, data, training: Path, split: str, lengths, device: str, out, json_out) -> None:
    from tasks import species

    evaluation = _evaluate_species(loaded, data or training, training, split, lengths, device)
    name = "evaluation-other" if data else "evaluation"
    report_path = species.write_report(loaded.directory, evaluation, name, out)

    def human() -> None:
        _print_species_evaluation(evaluation)
        note(f"Report with plots: {report_path}")

    emit(json_out, {"run": str(run), **species.evaluation_dict(evaluation)}, human=human)


@command(app, "doctor")
def doctor(json_out: Json = None) -> None:
    """What works here and why not: versions, devices, memory, every operator back end checked against the reference.

    Example:  seqlab doctor
    """
    import dataclasses

    from seqlab.doctor import examine

    findings = examine()
    problems = [finding for finding in findings if finding.status == "problem"]

    def human() -> None:
        console = Console(highlight=False, soft_wrap=True)
        marks = {"ok": "[green]ok     [/]", "absent": "[dim]absent [/]", "problem": "[bold red]PROBLEM[/]"}
        section = None
        for finding in findings:
            if finding.section != section:
                section = finding.section
                console.print(f"\n[bold]{section}[/]")
            console.print(f"  {marks[finding.status]} {finding.name:<19} {escape(finding.detail)}")
            if finding.remedy:
                console.print(f"          {'':<19} remedy: {escape(finding.remedy)}")
        console.print()
        note("All is well." if not problems else f"{len(problems)} problem(s); the remedies are above.")

    data = {"problems": len(problems), "findings": [dataclasses.asdict(finding) for finding in findings]}
    emit(json_out, data, human=human)
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
