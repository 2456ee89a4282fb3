"""FASTA files of several species -> one dataset whose every sequence has a class: for `seqlab train species`.

Sources, one of three ways (see `find_sources`):

    human=human.fa.gz chimp=chimp.fa.gz      name=file, any number of files a species
    apes.tsv                                 rows of species <TAB> file [<TAB> train|valid|test]
    genomes/                                 one subfolder of files a species, or one file a species, named by it

A record chr1 of human.fa.gz becomes the sequence human/chr1 of class human, so that two species may both have a chr1.
Classes are sorted by name, never by the order of files.

Splits never share a base: by file (third column of the TSV), by names of sequences (--valid, --test, in every species), or
by blocks. The blocks of a species, its sequences laid end to end, with block 4, test share 0.2 and valid share 0.1:

    |test  4|va 2|train                    14|test  4|va 2|train           ...      one period is block / test share

Fold 2 of 5 moves them along by a fifth of a period, round the end of the species, and so on: with a fifth of a species in test
blocks five datasets test about every base, each in one of them (species shorter than a period in more).

Sharing no base is not enough: relatives share whole genes, and repeats lie on both sides of a border. So the share of each
species' test 32-mers (both strands) that the training split of each species holds too is counted from a sample and written
into the manifest, and identical sequences on the two sides of a split, or in two classes, are refused.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import Table, check_source, output_directory, write_synced
from data_prep.genome import (
    DEFAULT_BLOCK,
    Progress,
    check_apart,
    find_duplicates,
    manifest_text,
    splits_by_name,
    write_sequences,
)
from data_prep.kmers import KMER, kmer_hashes, sampled
from seqlab.dataset import FORMAT, SPLITS, VERSION
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide

SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".gb", ".gbk", ".gbff")


@dataclass(frozen=True)
class Source:
    species: str
    path: Path
    split: str | None = None  # the split of everything in this file; None: by blocks or by name


# -- what the user named -------------------------------------------------------------------------------------------
def find_sources(arguments: Iterable[str]) -> list[Source]:
    """`name=file` pairs, one TSV or one folder -> sources, sorted by species. Raises UserError."""
    arguments = [str(a) for a in arguments]
    if not arguments:
        raise UserError("no species given; give name=file pairs, a TSV of species and file, or a folder")
    sources = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            sources += _from_folder(path)
        elif "=" in argument and not path.exists():
            name, _, file = argument.partition("=")
            if not file:
                raise UserError(f"{argument}: names no file; expected NAME=FILE, for example human=human.fa.gz")
            sources.append(Source(_checked_name(name, argument), Path(file)))
        elif path.exists() and not _is_sequence_file(path):
            sources += _from_table(path)
        else:
            raise UserError(f"{argument}: expected NAME=FILE, for example human=human.fa.gz, a TSV or a folder")
    species = sorted({source.species for source in sources})
    if len(species) == 1:
        raise UserError(f"one species only ({species[0]}); telling species apart needs two or more")
    for source in sources:
        check_source(source.path)
    return sorted(sources, key=lambda source: source.species)  # stable: files of a species in the order given


def _checked_name(name: str, where: str) -> str:
    name = name.strip()
    if not name or "/" in name or any(c.isspace() for c in name):
        raise UserError(f"{where}: {name!r} is no name for a species; use one word without '/', such as e_coli")
    return name


def _is_sequence_file(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz").removesuffix(".bgz")
    return name.endswith(SUFFIXES)


def _from_folder(folder: Path) -> list[Source]:
    sources = []
    subfolders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    beside = sorted(p for p in folder.iterdir() if p.is_file() and _is_sequence_file(p))
    if subfolders:
        if beside:  # whose species is it?
            raise UserError(
                f"{folder}: holds subfolders ({subfolders[0].name}) and sequence files ({beside[0].name}) side by side; give each "
                "species a subfolder, or each a file"
            )
        for sub in subfolders:
            files = sorted(p for p in sub.iterdir() if p.is_file() and _is_sequence_file(p))
            if not files:
                raise UserError(f"{sub}: holds no FASTA file; every subfolder of {folder} is taken for a species")
            sources += [Source(_checked_name(sub.name, str(sub)), file) for file in files]
        return sources
    for file in beside:
        name = file.name.removesuffix(".gz").removesuffix(".bgz").rsplit(".", 1)[0]
        sources.append(Source(_checked_name(name, str(file)), file))
    if not sources:
        raise UserError(f"{folder}: holds no FASTA file and no subfolder; give one file or one subfolder for each species")
    return sources


def _from_table(path: Path) -> list[Source]:
    """Rows species, file (relative to the table), and perhaps split; # starts a comment, a header line is skipped."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: not a text file; a table of species holds rows of species<TAB>file[<TAB>split]") from None
    sources = []
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in line.split("\t")]
        if not line.strip() or line.startswith("#") or (number == 1 and cells[0].lower() == "species"):
            continue
        if len(cells) not in (2, 3) or not all(cells[:2]):
            raise UserError(f"{path}: line {number}: {len(cells)} column(s); a row is species<TAB>file[<TAB>split]")
        split = cells[2] if len(cells) == 3 and cells[2] else None
        if split is not None and split not in SPLITS:
            raise UserError(f"{path}: line {number}: split {split[:40]!r} is not one of {', '.join(SPLITS)}")
        file = Path(cells[1])
        sources.append(
            Source(_checked_name(cells[0], f"{path}: line {number}"), file if file.is_absolute() else path.parent / file, split)
        )
    if not sources:
        raise UserError(f"{path}: holds no rows; a row is species<TAB>file[<TAB>split]")
    return sources


# -- the dataset ---------------------------------------------------------------------------------------------------
def prepare_species(
    sources: list[Source],
    out: Path | str,
    *,
    valid: Iterable[str] = (),
    test: Iterable[str] = (),
    block: int | None = None,
    test_share: float = 0.1,
    valid_share: float = 0.1,
    fold: tuple[int, int] = (1, 1),
    min_length: int = 1,
    allow_duplicates: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Read the sources into the dataset directory `out` and return it.

    valid, test: names of sequences (as in the files) that validate and test in every species that has them
    block, test_share, valid_share: see the module; block None: 65,536, or less so that the smallest species has two test
        blocks or more
    fold: (i, k), the i-th of k ways to lay the blocks, counted from 1
    min_length: shorter sequences are left out
    allow_duplicates: keep identical sequences in two classes or on two sides of a split (they are reported all the same)

    Nothing is written to `out` before everything is known to be right. Raises UserError.
    """
    out, valid, test = Path(out), list(valid), list(test)
    has_split_column = any(source.split for source in sources)
    if sum([has_split_column, bool(valid or test), block is not None]) > 1:
        raise UserError("splits come from the table, from --valid and --test, or from --block: leave all but one out")
    if has_split_column and not all(source.split for source in sources):
        missing = next(source for source in sources if not source.split)
        raise UserError(f"{missing.path}: has no split, others in the table have; fill the third column in every row")
    for name, share in (("test-share", test_share), ("valid-share", valid_share)):
        if not 0 < share < 1:
            raise UserError(f"--{name} {share}: must lie in (0, 1)")
    if not 1 <= fold[0] <= fold[1]:
        raise UserError(f"--fold {fold[0]}/{fold[1]}: expected I/K with I from 1 to K, such as 2/5")
    if fold[1] > 1 and (has_split_column or valid or test):
        raise UserError("--fold moves blocks along; the splits of this dataset come from the table or from --valid and --test")
    if test_share + valid_share >= 1:
        raise UserError(f"--test-share {test_share} and --valid-share {valid_share} leave nothing to train on")
    for name, number in (("block", block), ("min-length", min_length)):
        if number is not None and number < 1:
            raise UserError(f"--{name} {number}: must be 1 or more")
    check_apart(valid, test)
    classes = sorted({source.species for source in sources})
    with output_directory(out, overwrite) as directory:
        prefixed = [(source.species + "/", source.path) for source in sources]
        writer, facts = write_sequences(directory, prefixed, min_length, progress)
        sequences = writer.sequences
        for sequence in sequences:
            sequence["class"] = classes.index(sources[sequence["source"]].species)
        _check_classes(classes, sequences, sources)
        if has_split_column:
            table = {name: [] for name in SPLITS}
            for i, sequence in enumerate(sequences):
                table[sources[sequence["source"]].split].append([i, 0, sequence["length"]])
            rule = "by file"
        elif valid or test:
            names = [s["name"].split("/", 1)[1] for s in sequences]
            table, rule = splits_by_name(names, sequences, valid, test, "no species has such a sequence")
        else:
            table, rule = _by_blocks(classes, sequences, block, test_share, valid_share, fold)
        tokens = np.memmap(directory / "tokens.bin", np.uint8, "r")
        duplicates = find_duplicates(tokens, sequences, table, [sequence["class"] for sequence in sequences])
        if duplicates and not allow_duplicates:
            a, b, why = duplicates[0]
            more = f" ({len(duplicates)} such pairs)" if len(duplicates) > 1 else ""
            raise UserError(
                f"{sequences[a]['name']} and {sequences[b]['name']} are the same sequence {why}{more}; take one out, or add "
                "--allow-duplicates"
            )
        known = _known_bases(tokens, classes, sequences, table)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "species",
            "tokenizer": "nucleotide",
            "vocab": list(nucleotide.VOCAB),
            "classes": classes,
            **writer.facts(),
            "split_rule": rule,
            "class_bases": known,
            "duplicates": [[sequences[a]["name"], sequences[b]["name"]] for a, b, _ in duplicates],
            "shared_kmers": shared_kmers(tokens, classes, sequences, table),
            "sources": facts,
            "sequences": sequences,
            "splits": table,
        }
        del tokens
        write_synced(directory / "manifest.json", manifest_text(manifest))
    return out


def _check_classes(classes: list[str], sequences: list[dict], sources: list[Source]) -> None:
    for index, name in enumerate(classes):
        mine = [s for s in sequences if s["class"] == index]
        files = ", ".join(str(source.path) for source in sources if source.species == name)
        if not mine:
            raise UserError(f"species {name}: no sequence in {files} (after --min-length); a FASTA file holds '>name' and bases")
        if not any(s["counts"][base] for s in mine for base in "ACGT"):
            raise UserError(f"species {name}: its sequences in {files} hold no A, C, G or T; leave it out or give another file")


def _by_blocks(
    classes: list[str], sequences: list[dict], block: int | None, test_share: float, valid_share: float, fold: tuple[int, int]
) -> tuple[Table, str]:
    totals = [sum(s["length"] for s in sequences if s["class"] == index) for index in range(len(classes))]
    if block is None:
        smallest = int(min(totals) * test_share / 2)
        block = min(DEFAULT_BLOCK, smallest // 64 * 64 if smallest >= 64 else max(1, smallest))
    period = max(3, round(block / test_share))
    valid = max(1, round(period * valid_share))
    edges = ((0, block, "test"), (block, block + valid, "valid"), (block + valid, period, "train"))
    table: Table = {name: [] for name in SPLITS}
    for index, total in enumerate(totals):
        if total <= block + valid:
            raise UserError(
                f"species {classes[index]}: {total:,} bases leave nothing to train on beside a test block of {block:,} and "
                f"{valid:,} to validate; use --block {max(1, int(total * test_share / 2)):,} or less"
            )
        moved = (fold[0] - 1) * min(period, total) // fold[1]
        at = -moved % total  # of the next base in the species that is counted from `moved` on, and round its end
        for i, sequence in enumerate(sequences):
            if sequence["class"] != index:
                continue
            length = sequence["length"]
            for low in (at, at - total):  # what lies beyond the end of the species is at its beginning
                for a, b, split in _laid(edges, period, max(low, 0), min(low + length, total)):
                    table[split].append([i, a - low, b - low])
            at = (at + length) % total
    counted = "0"
    if fold[0] > 1:
        part = f"{fold[0] - 1}/{fold[1]}"
        counted = f"base {(fold[0] - 1) * period // fold[1]:,} (where it is shorter than {period:,}: {part} of it) and round its end"
    rule = (
        f"in each species, counted from {counted} through its sequences, of every {period:,} bases the first {block:,} test, the "
        f"next {valid:,} validate, the rest train"
    )
    for rows in table.values():
        rows.sort()
    return table, rule


def _laid(edges: Iterable[tuple[int, int, str]], period: int, low: int, high: int) -> Iterator[tuple[int, int, str]]:
    """(start, end, split) of everything in low .. high, where each period is cut at the `edges`."""
    for first in range(low // period * period, high, period):
        for start, end, split in edges:
            a, b = max(first + start, low), min(first + end, high)
            if a < b:
                yield a, b, split


def _known_bases(tokens: np.ndarray, classes: list[str], sequences: list[dict], table: Table) -> dict[str, dict[str, int]]:
    """A, C, G and T of each species in each split; UserError where a species cannot be learnt or tested."""
    known = {name: dict.fromkeys(SPLITS, 0) for name in classes}
    for split, rows in table.items():
        for index, start, end in rows:
            offset = sequences[index]["offset"]
            name = classes[sequences[index]["class"]]
            for at in range(offset + start, offset + end, 1 << 20):
                piece = tokens[at : min(at + (1 << 20), offset + end)]
                known[name][split] += int(np.count_nonzero((piece >= nucleotide.A) & (piece <= nucleotide.T)))
    for name, counts in known.items():
        for split in SPLITS:
            if not counts[split]:
                raise UserError(
                    f"species {name}: no A, C, G or T in its {split} split; every species needs all three splits: choose "
                    "other sequences or blocks"
                )
    return known


# -- what the two sides of a split share ---------------------------------------------------------------------------
def shared_kmers(tokens: np.ndarray, classes: list[str], sequences: list[dict], table: Table) -> dict[str, Any]:
    """How much of each species' test split the training split of each species holds: from a sample of 32-mers.

    Returns {"k", "sampled": one in how many, "test_in_train": rows test species, columns training species, each the share
    of the row's distinct 32-mers (a 32-mer and its reverse complement are one)}. The sample is of k-mers whose hash is
    small (FracMinHash, Irber et al. 2022), so both sides sample the same ones.
    """
    total = sum(s["length"] for s in sequences)
    scale = 1
    while total / scale > 4_000_000:  # some 32 MB of hashes
        scale *= 2
    sketches = {
        split: [np.unique(np.concatenate([np.empty(0, np.uint64), *parts])) for parts in _sketch(tokens, classes, sequences, table[split], scale)]
        for split in ("train", "test")
    }
    matrix = []
    for mine in sketches["test"]:
        row = [float(np.isin(mine, theirs, assume_unique=True).mean()) if len(mine) else 0.0 for theirs in sketches["train"]]
        matrix.append([round(share, 4) for share in row])
    return {"k": KMER, "sampled": scale, "test_in_train": matrix}


def _sketch(tokens: np.ndarray, classes: list[str], sequences: list[dict], rows: list[list[int]], scale: int) -> list[list[np.ndarray]]:
    kept: list[list[np.ndarray]] = [[] for _ in classes]
    for index, start, end in rows:
        offset, into = sequences[index]["offset"], kept[sequences[index]["class"]]
        for at in range(start, end, 1 << 16):  # pieces that stay in the cache, overlapping by k - 1
            piece = tokens[offset + at : offset + min(at + (1 << 16) + KMER - 1, end)]
            if len(piece) >= KMER:
                hashes = kmer_hashes(np.asarray(piece))
                into.append(hashes[sampled(hashes, scale)])
    return kept


def close_relatives(manifest: dict[str, Any], least: float = 0.02) -> Iterator[tuple[str, str, float]]:
    """(test species, training species, share of shared 32-mers) of different species, the largest first."""
    classes, matrix = manifest["classes"], manifest["shared_kmers"]["test_in_train"]
    pairs = [
        (classes[i], classes[j], matrix[i][j])
        for i in range(len(classes))
        for j in range(len(classes))
        if i != j and matrix[i][j] >= least
    ]
    yield from sorted(pairs, key=lambda pair: -pair[2])
