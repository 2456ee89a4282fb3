"""`seqlab eval`, and the same evaluation after training: every kind of run beside its baselines."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from seqlab.errors import UserError
from tasks.commands.options import DATASETS, Device, Fasta, Json, Overwrite, parse_context, resolve_device
from tasks.commands.prep import prepare_dna
from tasks.commands.settings import lay_over
from tasks.commands.terminal import check_output_file, emit, note, print_table, progress_bar
from tasks.run_directory import no_empty_folder


def eval_(
    run: Annotated[Path, typer.Argument(help="Run directory or checkpoint.")],
    fasta: Fasta = None,
    data: Annotated[Optional[Path], typer.Option("--data", help="Another dataset directory to evaluate on.")] = None,
    split: Annotated[Optional[str], typer.Option("--split", help="train, valid or test.")] = None,
    context: Annotated[Optional[list[str]], typer.Option("--context", help="Context length; may be repeated.")] = None,
    set_: Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE, for example eval.max_bases=100000.")] = None,
    device: Device = "auto",
    out: Annotated[
        Optional[Path], typer.Option("--out", help="Where to put the report and plots; default: in the run, in the place of earlier ones.")
    ] = None,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Evaluate a run on its test split by context length, beside its baselines on exactly the same bases, samples or sequences.

    Example:  seqlab eval runs/dna_demo --context 256 --context 4096
    """
    import dataclasses

    from seqlab.config import to_dict
    from seqlab.report import report_path
    from tasks import runs

    device = resolve_device(device)
    loaded = runs.load_run(run)
    if out is None and not os.access(loaded.directory, os.W_OK):
        raise UserError(f"{loaded.directory}: is not writable; give --out DIR for the report")
    config = lay_over(type(loaded.config), to_dict(loaded.config), {}, set_ or [], "--set")
    for section in ("model", "optim", "loss"):
        if getattr(config, section, None) != getattr(loaded.config, section, None):
            raise UserError(f"--set {section}: is as it was in training, and cannot be changed any more; set eval values, for example eval.max_order=4")
    loaded = dataclasses.replace(loaded, config=config)
    _check_options(loaded, run, fasta, data, split, context)
    lengths = tuple(parse_context(c, "--context") for c in context or [])
    training = None
    if loaded.task != "synthetic":
        training = data if "imported" in loaded.facts else runs.training_data(loaded.directory, loaded.facts, data)
    if data == training:
        data = None  # its own, in another place than it was; or the only one that an imported run is ever told of
    # those of the run's own test split keep their places
    name = "evaluation" + "-other" * bool(fasta or data) + f"-{split}" * (split not in (None, "test"))
    if out is not None:
        check_output_file(str(report_path(out, name)), "--out", overwrite)
    with no_empty_folder(out), contextlib.ExitStack() as undo:
        dataset = data or training
        if fasta:
            temporary = undo.enter_context(tempfile.TemporaryDirectory(prefix="seqlab-"))
            dataset = prepare_dna(fasta, Path(temporary) / "data", whole="test")
        evaluation = evaluate(loaded, dataset, training, split or "test", lengths, device)
        if "imported" in loaded.facts:  # on what length it was trained its files do not say
            evaluation = dataclasses.replace(evaluation, trained_context=0)
        show_evaluation(loaded, evaluation, json_out, lambda found: {"run": str(run), **found}, name=name, out=out)


def _check_options(loaded, run: Path, fasta, data, split, context) -> None:
    """UserError for what a run of this task cannot be told."""
    if loaded.task == "synthetic":
        if fasta or data or split:
            raise UserError("--fasta, --data and --split: a run of `train synthetic` makes its own sequences; leave them out")
        return
    if "imported" in loaded.facts and data is None:
        raise UserError(
            f"{run}: was imported, so there is no training split that baselines could be fitted on; give a dataset that has one: --data DIR, "
            "from `seqlab prep dna`"
        )
    if "dataset" not in loaded.facts and "imported" not in loaded.facts:
        raise UserError(f"{run}: no run.json beside the checkpoint, so its training split is unknown; give the run directory")
    if fasta and loaded.task != "dna":
        prepared = DATASETS[loaded.task][0]
        raise UserError(f"--fasta: a run of `train {loaded.task}` is evaluated on a dataset of `seqlab prep {prepared}`; give --data")
    if fasta and data:
        raise UserError("--data and --fasta: give one of them, what is to be scored")
    if fasta and split is not None:
        raise UserError("--split: with --fasta every base is scored; leave one of them out")
    if context and loaded.task == "classify":
        raise UserError("--context: a run of `train classify` reads whole sequences; leave it out (data.max_length cuts them)")


def evaluate(run, dataset: Optional[Path], training: Optional[Path], split: str, lengths: tuple[int, ...], device: str) -> Any:
    """The evaluation of a loaded run of any task, with a progress bar.

    `dataset` is what is scored, `training` what baselines are fitted on (None: the task makes its own data); `lengths`: none for
    the task's own choice."""
    from seqlab.classification.dataset import LabelledStore
    from seqlab.dataset import TokenStore
    from tasks import runs

    evaluate_run = runs.task_module(run.task).evaluate_run
    units = {"audio": ("k samples", 1e3), "dna": ("k tokens", 1e3), "synthetic": ("k tokens", 1e3)}
    bar, update = progress_bar("evaluating", *units.get(run.task, ("parts",)))
    with bar:
        if run.task == "synthetic":
            return evaluate_run(run, lengths, device, update)
        open_, own = TokenStore.open, {"contexts": lengths}
        if run.task == "classify":
            open_, own = LabelledStore.open, {}
        elif run.task == "species":
            own = {"lengths": lengths, "cache": run.directory / "baselines"}
        return evaluate_run(run, open_(dataset), open_(training), split=split, device=device, progress=update, **own)


def show_evaluation(
    run, evaluation, json_out: Optional[str], data: Callable[[dict], dict], *, name: str = "evaluation", out: Optional[Path] = None,
    hints: Sequence[str] = (),
) -> None:  # fmt: skip
    """Writes the report of an evaluation and says what is in it: to people, and as JSON `data(evaluation as plain values)`.
    `name` and `out`: of the task's `write_report`. `hints`: lines about what to do next."""
    from tasks import runs

    module = runs.task_module(run.task)
    report = module.write_report(run.directory, evaluation, name, out)

    def human() -> None:
        PRINTERS[run.task](evaluation)
        note(f"Report with plots: {report}")
        for line in hints:
            note(line)

    emit(json_out, data(module.evaluation_dict(evaluation)), human=human)


def held_out_split(dataset: Path) -> str:
    """What a run is evaluated on when it ends: test, or valid where the dataset has no test split."""
    from seqlab.dataset import TokenStore

    if len(TokenStore.open(dataset).intervals("test")):
        return "test"
    note("The dataset has no test split: evaluated on the validation split, which chose the checkpoint.")
    return "valid"


def _print_dna(evaluation) -> None:
    from seqlab import report

    header, rows = report.evaluation_rows(evaluation)
    print_table(f"{evaluation.bases:,} bases of the {evaluation.split} split", header, rows)
    note(report.evaluation_verdict(evaluation))
    note(
        f"{evaluation.soft_masked:,} of the scored bases are soft-masked; {evaluation.not_scored:,} positions were not "
        "scored (N or another symbol). Markov models: fitted on both strands of the same training split."
        + (" Both sides: counts of k-mers with the base in the middle, no masked base in them." if evaluation.both_sides else "")
    )


def _print_species(evaluation) -> None:
    from tasks import species

    header, rows = species.evaluation_rows(evaluation)
    print_table(f"{len(evaluation.classes)} species, {evaluation.split} split: mean accuracy", header, rows)
    if known := species.published_rows(evaluation):
        print_table("Published by others for these species, not measured here", *known)
    note(species.evaluation_verdict(evaluation))
    for result in evaluation.results:
        if result.details:
            note(f"{result.length:,}: " + "; ".join(f"{name} {text}" for name, text in result.details.items()))


def _print_labelled(evaluation) -> None:
    from tasks import classification

    header, rows = classification.evaluation_rows(evaluation)
    seeds = len(evaluation.seeds)
    title = f"{evaluation.dataset}: {evaluation.n:,} sequences, {evaluation.split} split, {seeds} seed{'s' * (seeds != 1)}"
    print_table(title, header, rows)
    if known := classification.published_rows(evaluation):
        print_table("Published by others, not measured here", ["model", classification.TITLES[evaluation.main], "source"], known)
    note(classification.evaluation_verdict(evaluation))
    if copies := classification.near_copies_line(evaluation):
        note(copies)
    for name, chosen in evaluation.details.items():
        if chosen:
            note(f"{name}: " + " | ".join(dict.fromkeys(chosen)))


def _print_audio(evaluation) -> None:
    from seqlab import report

    header, rows = report.audio_evaluation_rows(evaluation)
    title = f"{evaluation.samples:,} samples of {evaluation.recordings:,} recordings, {evaluation.split} split"
    print_table(title, header, rows)
    note(report.audio_verdict(evaluation))


def _print_synthetic(evaluation) -> None:
    from tasks import synthetic

    print_table(f"{evaluation.problem}, {evaluation.sequences:,} sequences of each length", *synthetic.evaluation_rows(evaluation))
    note(synthetic.evaluation_verdict(evaluation))


PRINTERS = {
    "audio": _print_audio,
    "classify": _print_labelled,
    "dna": _print_dna,
    "species": _print_species,
    "synthetic": _print_synthetic,
}
"""Task -> what prints its evaluation for people."""
