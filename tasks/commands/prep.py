"""`seqlab prep`: raw files -> dataset directory."""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from seqlab.errors import UserError
from tasks.commands.options import Block, Json, MinLength, Overwrite, Splits, Test, Valid
from tasks.commands.terminal import command, emit, note, print_table, program, progress_bar, quoted

group = typer.Typer(no_args_is_help=True, help="Raw files -> dataset directory.")


@command(group, "dna")
def prep_dna(
    fasta: Annotated[list[Path], typer.Argument(help="FASTA files, plain, gzip or bgzip.")],
    out: Annotated[Path, typer.Option("--out", help="Dataset directory to write.")],
    splits: Splits = None,
    valid: Valid = None,
    test: Test = None,
    block: Block = None,
    min_length: MinLength = 1,
    overwrite: Overwrite = False,
    json_out: Json = None,
) -> None:
    """Prepare a genome once: one byte a base, splits, manifest.

    Example:  seqlab prep dna ecoli.fa.gz --out data/ecoli
    """
    dataset = prepare_dna(fasta, out, splits, valid, test, block=block, min_length=min_length, overwrite=overwrite)
    manifest = json.loads((dataset / "manifest.json").read_text())

    def human() -> None:
        print_manifest(manifest, dataset)
        note(f"Next:  {program()} train dna --data {quoted(dataset)}")

    emit(json_out, {"dataset": str(dataset), **{k: manifest[k] for k in ("counts", "soft_masked", "total")}}, human=human)


def prepare_dna(fasta, out, splits=None, valid=None, test=None, **options) -> Path:
    """`prepare_genome` (its options) with a progress bar."""
    from data_prep.genome import prepare_genome

    bar, update = progress_bar("preparing", "MB", 1e6)
    with bar:
        return prepare_genome(
            list(fasta),
            out,
            splits=splits,
            valid=list(valid or []),
            test=list(test or []),
            progress=update,
            **options,
        )


def print_manifest(manifest: dict, dataset: Path) -> None:
    counts = manifest["counts"]
    total = max(1, manifest["total"])
    rows = [[base, f"{n:,}", f"{100 * n / total:.2f} %"] for base, n in counts.items()]
    rows.append(["soft-masked", f"{manifest['soft_masked']:,}", f"{100 * manifest['soft_masked'] / total:.2f} %"])
    for split, intervals in manifest["splits"].items():
        n = sum(end - start for _, start, end in intervals)
        rows.append([f"split {split}", f"{n:,}", f"{100 * n / total:.2f} %"])
    print_table(f"{dataset}: {manifest['total']:,} bases in {len(manifest['sequences'])} sequences", ["", "bases", "share"], rows)
    note(f"Splits: {manifest['split_rule']}")
    _note_empty_splits(manifest)
    _note_skipped(manifest)
    tell_duplicates(manifest)


def tell_duplicates(manifest: dict) -> None:
    """Of a dataset of DNA, where there are any."""
    if n := manifest.get("duplicates", {}).get("pairs"):
        note(
            f"The same sequence is on two sides of a split, {n:,} time{'s' * (n > 1)}: {' and '.join(manifest['duplicates']['example'])} (a reverse "
            "complement counts). Scores on such bases are memory: take copies out, or choose splits that keep them together."
        )


def _note_empty_splits(manifest: dict) -> None:
    """Before `train` says so."""
    if not manifest["splits"]["valid"]:
        note("Nothing validates, and `train` needs what does: prepare it again with --valid, or with other splits.")
    if not manifest["splits"]["test"]:
        note("Nothing tests: runs will be evaluated on the validation split, which chooses their checkpoint.")


def _note_skipped(manifest: dict) -> None:
    found = manifest["skipped"]
    if n := found["sequences"]:
        note(f"Left out: {n:,} sequence{'s' * (n != 1)} shorter than {found['min_length']:,}, {found['bases']:,} bases in all.")


def _fold(text: str) -> tuple[int, int]:
    from data_prep.genome import is_count

    part, _, whole = text.partition("/")
    if not (is_count(part) and is_count(whole)):
        raise UserError(f"--fold {text[:40]!r}: expected I/K with I from 1 to K, such as 2/5")
    return int(part), int(whole)


@command(group, "species")
def prep_species(
    sources: Annotated[list[str], typer.Argument(help="NAME=FASTA pairs, or one TSV (species, file, split), or one folder.")],
    out: Annotated[Path, typer.Option("--out", help="Dataset directory to write.")],
    valid: Annotated[Optional[list[str]], typer.Option("--valid", help="Sequence that validates in every species.")] = None,
    test: Annotated[Optional[list[str]], typer.Option("--test", help="Sequence that tests in every species.")] = None,
    block: Annotated[Optional[int], typer.Option("--block", help="Bases in a test block; windows are no longer.")] = None,
    test_share: Annotated[float, typer.Option("--test-share", help="Share of each species in test blocks.")] = 0.1,
    valid_share: Annotated[float, typer.Option("--valid-share", help="Share of each species that validates.")] = 0.1,
    fold: Annotated[str, typer.Option("--fold", help="I/K, such as 2/5: the I-th of K ways to lay the blocks.")] = "1/1",
    min_length: MinLength = 1,
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
            fold=_fold(fold),
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
        _note_skipped(manifest)
        relatives = list(close_relatives(manifest))
        for mine, other, share in relatives[:10]:
            note(f"Relatives: {100 * share:.0f} % of the test 32-mers of {mine} are in the training split of {other}.")
        if manifest["duplicates"]:
            note(f"Duplicates kept: {len(manifest['duplicates'])} pairs, first {' and '.join(manifest['duplicates'][0])}.")
        longest = max(end - start for _, start, end in manifest["splits"]["train"])
        context = min(4096, 1 << longest.bit_length() - 1)  # what a small genome's stretches hold
        note(f"Next:  {program()} train species --data {quoted(dataset)} --context {context}")

    keys = ("classes", "class_bases", "shared_kmers", "duplicates", "total")
    emit(json_out, {"dataset": str(dataset), **{k: manifest[k] for k in keys}}, human=human)


@command(group, "labelled")
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
    near_copies: Annotated[
        str, typer.Option("--near-copies", help="Sequences that share half of their 32-mers: apart or together in a split made here.")
    ] = "apart",
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
            records, reader.sources, out, labels=options, test_share=test_share, seed=seed, duplicates=duplicates, near_copies=near_copies,
            skip_bad=skip_bad, overwrite=overwrite,
        )  # fmt: skip
    manifest = json.loads((dataset / "manifest.json").read_text())

    def human() -> None:
        _print_labelled(manifest, dataset)
        note(f"Next:  {program()} train classify --data {quoted(dataset)}")

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
    from seqlab.report import in_words

    median = f" (median {lengths['median']:,.0f})" if lengths["min"] < lengths["max"] else ""
    note(
        f"{in_words([lengths['min'], lengths['max']])} bases{median}; {counts['N']:,} N, {counts['other']:,} "
        f"ambiguity codes and gaps read as N; {manifest['lower_case']:,} lower-case letters read as upper case."
    )
    if manifest["case_gives_labels_away"]:
        note("Case gives the label away in this file: lower-case letters occur in one class only. The model never sees case.")
    note(f"Splits: {manifest['split_rule']}")
    found, rule = manifest["duplicates"], manifest["split_rule"]
    if found["repeats"]:
        conflict = found["repeats_with_another_label"]
        note(
            f"{found['repeats']:,} sequences repeat another (as they are or reverse complemented), {conflict:,} of them with another "
            f"label; {found['leaking']:,} were on both sides of a split"
            + (f" ({found['action']})." if found["leaking"] else ".")
        )
    if n := found["near_copies"]:
        note(
            f"{n:,} of the {manifest['splits']['test']:,} test sequences share half or more of their 32-mers with the training split (overlapping "
            "windows, alleles, repeats): scores on them are memory in part."
            + (" --near-copies together keeps them on one side." if "stratified" in rule and "near copies" not in rule else "")
        )
    if n := found.get("sharing_bases_with_test"):
        note(f"{n:,} intervals that train or validate share bases with one that tests; a split of your own, by chromosome, has none.")
    for why, n in manifest["skipped"].items():
        note(f"{n:,} sequences left out: {why}.")


@command(group, "benchmark")
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
        emit(json_out, data, human=lambda: note(f"Next:  {program()} train species --data {quoted(dataset)} --config {preset} --context 1024"))
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
             f"{m['duplicates']['leaking']:,}", f"{m['duplicates']['near_copies']:,}"]
            for dataset, m in zip(made, manifests)
        ]  # fmt: skip
        print_table(f"{out}: {suite}", ["task", "classes", "train", "test", "median length", "train in test", "near train"], rows)
        note("Train in test: the same sequence. Near train: test sequences with half or more of their 32-mers in the training split.")
        preset = "genomic_benchmarks" if suite == SUITES[0] else "nucleotide_transformer_tasks"
        note(f"Next:  {program()} train classify --data {quoted(made[0])} --config {preset} --init RUN")

    emit(json_out, {"datasets": {str(d): _labelled_summary(m) for d, m in zip(made, manifests)}}, human=human)


@command(group, "audio")
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
    valid: Annotated[Optional[list[str]], typer.Option("--valid", help="Pattern of files to validate on, or @FILE: their names.")] = None,
    test: Annotated[Optional[list[str]], typer.Option("--test", help="Pattern of files to test on: '*_[0-4].wav', or @FILE.")] = None,
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
        note(f"Next:  {program()} train audio --data {quoted(dataset)}")

    keys = ("total", "sample_rate", "scale", "labels", "clipped", "silent", "repeats", "skipped")
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
    _note_empty_splits(manifest)
    if repeats := manifest["repeats"]["recordings"]:
        leaking, example = manifest["repeats"]["leaking"], manifest["repeats"]["example"]
        note(
            f"{repeats:,} recordings repeat another, sample for sample; {leaking:,} are also in another split"
            + (f", for example {' and '.join(example)}: choose --valid and --test so that copies stay together." if leaking else ".")
        )
    if manifest["labels"]:
        shown = ", ".join(manifest["labels"][:12]) + (" ..." if len(manifest["labels"]) > 12 else "")
        note(f"{len(manifest['labels'])} classes: {shown}")
    if manifest["skipped"]:
        first = manifest["skipped"][0]
        note(f"Left out {len(manifest['skipped'])} files, listed in the manifest; the first: {first['path']}: {first['reason']}")
