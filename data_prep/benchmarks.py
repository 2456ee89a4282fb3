"""Public benchmarks, as they are downloaded -> dataset directories with the official splits.

    genomic-benchmarks        DIR/{train,test}/CLASS/*.txt, one sequence a file (what the genomic_benchmarks package unpacks),
                              or a folder of such folders; or train and test as CSV (its Hugging Face copies)
    nucleotide-transformer    one folder a task with train and test as FASTA (label after the last | of the header), CSV, TSV
                              or parquet; or train and test tables of all tasks with a `task` column (the revised tasks)
    great-apes, five-mammals  DIR/SPECIES/chrN.fna.gz (or .fa, .fasta, .gz or not), HyenaDNA's layout: chromosomes 1, 3, 12
                              and 13 validate, 5, 7, 9, 10 and 11 test, the others train

Classes are sorted by name. The published protocols keep duplicates, so they are kept here too, counted and reported.
Validation is drawn from the training split, anew for each seed (GenomicBenchmarks and Nucleotide Transformer tasks as in
Caduceus, arXiv 2403.03234).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.labelled import SPLIT_WORDS, Duplicates, LabelOptions, Reader, Record, prepare_labelled
from seqlab.classification import published
from seqlab.dataset import nearest
from seqlab.errors import UserError

SUITES = ("genomic-benchmarks", "nucleotide-transformer", "great-apes", "five-mammals")
TABLES = (".csv", ".tsv", ".txt", ".parquet")
FASTAS = (".fa", ".fasta", ".fna")
VALID_CHROMOSOMES, TEST_CHROMOSOMES = ("1", "3", "12", "13"), ("5", "7", "9", "10", "11")


@dataclass(frozen=True)
class Benchmark:
    """One task found on the disk: how to read it, and what the manifest says about it."""

    suite: str
    task: str
    records: Callable[[Reader], Iterator[Record]]

    def manifest(self) -> dict:
        limit = published.GENOMIC_MAX_LENGTH.get(self.task) if self.suite == "genomic-benchmarks" else None
        return {"suite": self.suite, "task": self.task, "max_length": limit}


def prepare_benchmark(
    benchmark: Benchmark, out: Path, *, duplicates: Duplicates = "keep", overwrite: bool = False, progress=None
) -> Path:
    """Write one task into the dataset directory `out` and return it. Raises UserError."""
    reader = Reader(progress)
    return prepare_labelled(
        benchmark.records(reader),
        reader.sources,
        out,
        labels=LabelOptions(),
        duplicates=duplicates,
        overwrite=overwrite,
        extra={"benchmark": benchmark.manifest()},
    )


def find_benchmarks(suite: str, path: Path, tasks: tuple[str, ...] = ()) -> list[Benchmark]:
    """The tasks of a suite under `path`, sorted by name; `tasks` chooses among them. Raises UserError."""
    path = Path(path)
    if suite not in SUITES[:2]:
        raise UserError(f"{suite}: unknown benchmark; {nearest(suite, SUITES)}")
    if not path.exists():
        raise UserError(f"{path}: no such folder; give the one that the benchmark was unpacked to")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; give the folder that holds the train and test split")
    find = _genomic_benchmarks if suite == SUITES[0] else _nucleotide_transformer
    found = {benchmark.task: benchmark for benchmark in find(path)}
    if not found:
        layout = "{train,test}/CLASS/*.txt, or train.csv and test.csv" if suite == SUITES[0] else "train and test as FASTA, TSV or parquet"
        raise UserError(f"{path}: holds no task of {suite}; a task is a folder with {layout}")
    for task in tasks:
        if task not in found:
            raise UserError(f"--task {task}: not under {path}; {nearest(task, sorted(found))}")
    return [found[task] for task in sorted(tasks or found)]


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


# -- GenomicBenchmarks ---------------------------------------------------------------------------------------------
def _genomic_benchmarks(path: Path) -> Iterator[Benchmark]:
    for folder in [path, *_folders(path)]:
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            yield Benchmark(SUITES[0], folder.name, lambda reader, folder=folder: _text_files(folder, reader))
        elif (files := _split_files(folder, TABLES)) is not None:
            yield Benchmark(SUITES[0], _task_name(folder, files), lambda reader, files=files: _tables(files, reader))


def _text_files(folder: Path, reader: Reader) -> Iterator[Record]:
    """One sequence a .txt file, one folder a class, the same classes in train and test."""
    classes = {split: [p.name for p in _folders(folder / split)] for split in ("train", "test")}
    if classes["train"] != classes["test"]:
        odd = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise UserError(f"{folder}: class {odd[0]!r} is in one split only; train and test need the same class folders")
    for code, split in ((0, "train"), (2, "test")):
        for label in classes[split]:
            number = 0
            for file in sorted((folder / split / label).glob("*.txt"), key=lambda p: (len(p.name), p.name)):
                number += 1
                yield Record(str(file), f"{split}/{label}/{file.stem}", reader.small_file(file), label, code)
            if not number:
                raise UserError(f"{folder / split / label}: holds no .txt file, so class {label!r} is empty; unpack it again")


# -- Nucleotide Transformer tasks ----------------------------------------------------------------------------------
def _nucleotide_transformer(path: Path) -> Iterator[Benchmark]:
    for folder in [path, *_folders(path)]:
        files = _split_files(folder, TABLES + FASTAS)
        if files is None:
            continue
        if not _is_fasta(files[0]):
            counts = Reader().column_values(files[0], "task")
            if counts:  # the revised tasks, all in one table
                for task in sorted(counts):
                    yield Benchmark(
                        "nucleotide-transformer-revised", task,
                        lambda reader, files=files, task=task: _tables(files, reader, {"task": task}),
                    )  # fmt: skip
                continue
        yield Benchmark(SUITES[1], _task_name(folder, files), lambda reader, files=files: _tables(files, reader))


def _is_fasta(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(FASTAS)


def _split_files(folder: Path, suffixes: tuple[str, ...]) -> dict[int, Path] | None:
    """Split code -> file, for the one train, the one test and perhaps the one validation file of a folder."""
    found: dict[int, Path] = {}
    for file in sorted(p for p in folder.iterdir() if p.is_file() and p.name.lower().removesuffix(".gz").endswith(suffixes)):
        codes = {SPLIT_WORDS[part] for part in re.split(r"[-_. ]", file.name.lower()) if part in SPLIT_WORDS}
        if len(codes) != 1:
            continue
        code = codes.pop()
        if code in found:
            raise UserError(f"{folder}: {found[code].name} and {file.name} are both the same split; keep one of them")
        found[code] = file
    return found if 0 in found and 2 in found else None


def _task_name(folder: Path, files: dict[int, Path]) -> str:
    """The folder's name, or what train and test file names share if that is a known task (train_TASK.csv)."""
    stem = re.sub(r"\.(csv|tsv|txt|parquet|fa|fasta|fna)(\.gz)?$", "", files[0].name.lower())
    stem = re.sub(r"(^|[-_.])train([-_.]|$)", "", stem)
    known = set(published.GENOMIC_BENCHMARKS) | set(published.NT_TASKS)
    return stem if stem in {name.lower() for name in known} else folder.name


def _tables(files: dict[int, Path], reader: Reader, where: dict[str, str] | None = None) -> Iterator[Record]:
    for code, file in sorted(files.items()):
        if _is_fasta(file):
            yield from reader.fasta_with_header_labels(file, r"[|_\s](?:label=)?([^|_\s]+)\s*$", split=code)
        elif file.suffix.lower() == ".parquet":
            yield from reader.parquet(file, split=code, where=where)
        else:
            yield from reader.table(file, split=code, where=where)


# -- species -------------------------------------------------------------------------------------------------------
def species_sources(suite: str, path: Path):
    """Sources for `data_prep.species.prepare_species`: every chromosome file with its split, by HyenaDNA's table."""
    from data_prep.species import Source

    names = published.SPECIES_SETS[suite][0]
    if not Path(path).is_dir():
        raise UserError(f"{path}: not a folder; give the one with a subfolder for each of {', '.join(names)}")
    sources = []
    for name in names:
        folder = Path(path) / name
        if not folder.is_dir():
            raise UserError(f"{folder}: is missing; {suite} needs a subfolder of chromosome files for each of {', '.join(names)}")
        mine: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
        for file in sorted(p for p in folder.iterdir() if p.is_file() and _is_fasta(p)):
            found = re.search(r"chr(?:omosome)?[._-]?(\d{1,2}[ab]?|[xy])(?![0-9a-z])", file.name, re.IGNORECASE)
            if not found:
                continue  # mitochondria and unplaced pieces take no part in the published sets
            number = found.group(1).upper()
            split = "valid" if number in VALID_CHROMOSOMES else "test" if number in TEST_CHROMOSOMES else "train"
            mine[split].append(file)
        for split, files in mine.items():
            if not files:
                raise UserError(
                    f"{folder}: no chromosome for {split} (chr1, 3, 12, 13 validate, chr5, 7, 9, 10, 11 test, the others "
                    "train); file names are chrN.fna.gz"
                )
            sources += [Source(name, file, split) for file in files]
    return sources
