"""`seqlab eval`, and the same evaluation after training: every kind of run beside its baselines."""

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from seqlab.errors import UserError
from tasks.commands.options import Fasta, Json, parse_context, resolve_device
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
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Optional[Path], typer.Option("--out", help="Where to put the report and plots; default: in the run.")] = None,
    json_out: Json = None,
) -> None:
    """Evaluate a run on its test split by context length, beside its baselines on exactly the same bases, samples or sequences.

    Example:  seqlab eval runs/dna_demo --context 256 --context 4096
    """
    import dataclasses

    from seqlab.config import to_dict
    from tasks import runs

    device = resolve_device(device)
    if out is not None:
        check_output_file(str(out / "report.md"), "--out")
    loaded = runs.load_run(run)
    if out is None and not os.access(loaded.directory, os.W_OK):
        raise UserError(f"{loaded.directory}: is not writable; give --out DIR for the report")
    loaded = dataclasses.replace(loaded, config=lay_over(type(loaded.config), to_dict(loaded.config), {}, set_ or [], "--set"))
    imported = "imported" in loaded.facts
    if imported and data is None:
        raise UserError(
            f"{run}: was imported, so there is no training split that baselines could be fitted on; give a dataset that has one: --data DIR, "
            "from `seqlab prep dna`"
        )
    if "dataset" not in loaded.facts and not imported:
        raise UserError(f"{run}: no run.json beside the checkpoint, so its training split is unknown; give the run directory")
    contexts = tuple(parse_context(c, "--context") for c in context or [])
    with no_empty_folder(out):
        _eval_task(loaded, run, data, fasta, split, contexts, device, out, json_out)


def _eval_task(loaded, run: Path, data, fasta, split, contexts, device: str, out, json_out) -> None:
    from tasks import runs

    if loaded.task == "synthetic":
        if fasta or data or split:
            raise UserError("--fasta, --data and --split: a run of `train synthetic` makes its own sequences; leave them out")
        _eval_synthetic(loaded, run, contexts, device, out, json_out)
        return
    training = data if "imported" in loaded.facts else runs.training_data(loaded.directory, loaded.facts, data)
    if data == training:
        data = None  # its own, in another place than it was; or the only one that an imported run is ever told of
    prepared_by = {"audio": "audio", "classify": "labelled", "species": "species"}.get(loaded.task)
    if prepared_by is None:
        _eval_dna(loaded, run, data, fasta, training, split, contexts, device, out, json_out)
        return
    if fasta:
        raise UserError(
            f"--fasta: a run of `train {loaded.task}` is evaluated on a dataset of `seqlab prep {prepared_by}`; give --data"
        )
    eval_task = {"audio": _eval_audio, "classify": _eval_labelled, "species": _eval_species}[loaded.task]
    eval_task(loaded, run, data, training, split or "test", contexts, device, out, json_out)


def _eval_dna(loaded, run: Path, data, fasta, training: Path, split, contexts, device: str, out, json_out) -> None:
    import dataclasses
    import tempfile

    from seqlab import report
    from tasks import dna

    with tempfile.TemporaryDirectory(prefix="seqlab-") as temporary:
        dataset, other = training, bool(fasta or data)
        if fasta:
            if data:
                raise UserError("--data and --fasta: give one of them, what is to be scored")
            if split is not None:
                raise UserError("--split: with --fasta every base is scored; leave one of them out")
            dataset = prepare_dna(fasta, Path(temporary) / "data", whole="test")
        elif data:
            dataset = data
        evaluation = evaluate(loaded, dataset, training, split or "test", contexts, device)
    if "imported" in loaded.facts:  # on what length it was trained its files do not say
        evaluation = dataclasses.replace(evaluation, trained_context=0)
    report_path = dna.write_report(loaded.directory, evaluation, _name(other, evaluation.split), out)

    def human() -> None:
        print_evaluation(evaluation)
        note(f"Report with plots: {report_path}")

    emit(json_out, {"run": str(run), **report.evaluation_dict(evaluation)}, human=human)


def _name(other: bool, split: str) -> str:
    """Of the files of an evaluation: those of the run's own test split keep their places."""
    return "evaluation" + "-other" * bool(other) + f"-{split}" * (split != "test")


def evaluate(run, dataset: Path, training: Path, split: str, contexts: tuple[int, ...], device: str):
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


def held_out_split(dataset: Path) -> str:
    """What a run is evaluated on when it ends: test, or valid where the dataset has no test split."""
    from seqlab.dataset import TokenStore

    if len(TokenStore.open(dataset).intervals("test")):
        return "test"
    note("The dataset has no test split: evaluated on the validation split, which chose the checkpoint.")
    return "valid"


def print_evaluation(evaluation) -> None:
    from seqlab import report

    header, rows = report.evaluation_rows(evaluation)
    print_table(f"{evaluation.bases:,} bases of the {evaluation.split} split", header, rows)
    note(report.evaluation_verdict(evaluation))
    note(
        f"{evaluation.soft_masked:,} of the scored bases are soft-masked; {evaluation.not_scored:,} positions were not "
        "scored (N or another symbol). Markov models: fitted on both strands of the same training split."
    )


def _eval_species(loaded, run: Path, data, training: Path, split: str, lengths, device: str, out, json_out) -> None:
    from tasks import species

    evaluation = evaluate_species(loaded, data or training, training, split, lengths, device)
    report_path = species.write_report(loaded.directory, evaluation, _name(data, split), out)

    def human() -> None:
        print_species_evaluation(evaluation)
        note(f"Report with plots: {report_path}")

    emit(json_out, {"run": str(run), **species.evaluation_dict(evaluation)}, human=human)


def evaluate_species(run, dataset: Path, training: Path, split: str, lengths: tuple[int, ...], device: str):
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


def print_species_evaluation(evaluation) -> None:
    from tasks import species

    header, rows = species.evaluation_rows(evaluation)
    print_table(f"{len(evaluation.classes)} species, {evaluation.split} split: mean accuracy", header, rows)
    if known := species.published_rows(evaluation):
        print_table("Published by others for these species, not measured here", *known)
    note(species.evaluation_verdict(evaluation))
    for result in evaluation.results:
        if result.details:
            note(f"{result.length:,}: " + "; ".join(f"{name} {text}" for name, text in result.details.items()))


def _eval_labelled(loaded, run: Path, data, training: Path, split: str, contexts, device: str, out, json_out) -> None:
    from tasks import classification

    if contexts:
        raise UserError("--context: a run of `train classify` reads whole sequences; leave it out (data.max_length cuts them)")

    evaluation = evaluate_labelled(loaded, data or training, training, split, device)
    report_path = classification.write_report(loaded.directory, evaluation, _name(data, split), out)

    def human() -> None:
        print_labelled_evaluation(evaluation)
        note(f"Report with plots: {report_path}")

    emit(json_out, {"run": str(run), **classification.evaluation_dict(evaluation)}, human=human)


def evaluate_labelled(run, dataset: Path, training: Path, split: str, device: str):
    from seqlab.classification.dataset import LabelledStore
    from tasks import classification

    bar, update = progress_bar("evaluating", "parts")
    with bar:
        return classification.evaluate_run(
            run, LabelledStore.open(dataset), LabelledStore.open(training), split=split, device=device, progress=update
        )


def print_labelled_evaluation(evaluation) -> None:
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


def _eval_audio(loaded, run: Path, data, training: Path, split: str, contexts, device: str, out, json_out) -> None:
    from seqlab import report
    from tasks import audio

    evaluation = evaluate(loaded, data or training, training, split, contexts, device)
    report_path = audio.write_report(loaded.directory, evaluation, _name(data, split), out)

    def human() -> None:
        print_audio_evaluation(evaluation)
        note(f"Report with plots: {report_path}")

    emit(json_out, {"run": str(run), **report.audio_evaluation_dict(evaluation)}, human=human)


def print_audio_evaluation(evaluation) -> None:
    from seqlab import report

    header, rows = report.audio_evaluation_rows(evaluation)
    title = f"{evaluation.samples:,} samples of {evaluation.recordings:,} recordings, {evaluation.split} split"
    print_table(title, header, rows)
    note(report.audio_verdict(evaluation))


def _eval_synthetic(loaded, run: Path, lengths, device: str, out, json_out) -> None:
    from tasks import synthetic

    evaluation = evaluate_synthetic(loaded, lengths, device)
    report_path = synthetic.write_report(loaded.directory, evaluation, out)

    def human() -> None:
        print_synthetic_evaluation(evaluation)
        note(f"Report with plots: {report_path}")

    emit(json_out, {"run": str(run), **synthetic.evaluation_dict(evaluation)}, human=human)


def evaluate_synthetic(run, lengths: tuple[int, ...], device: str):
    from tasks import synthetic

    bar, update = progress_bar("evaluating", "k tokens", 1e3)
    with bar:
        return synthetic.evaluate_run(run, lengths, device, update)


def print_synthetic_evaluation(evaluation) -> None:
    from tasks import synthetic

    print_table(f"{evaluation.problem}, {evaluation.sequences:,} sequences of each length", *synthetic.evaluation_rows(evaluation))
    note(synthetic.evaluation_verdict(evaluation))
