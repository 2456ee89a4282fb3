"""Labelled sequences -> dataset directory (seqlab/classification/dataset.py): CSV or TSV, FASTA, BED with a genome.

A record and what becomes of it:

    seq,label                     columns by name, whatever their order
    " acgtnRY-" , promoter        blanks around fields are cut; 7 8 9 10 11 11 11 11: lower case is read as upper case,
                                  the ambiguity codes RYSWKMBDHVX and gaps become N, and both are counted

Case never reaches the model: in some public sets it gives the label away (the report says when it does). Classes are
sorted by name (by value if all are whole numbers), never by their order in the file. Coordinates of a BED file are 0-based
half-open; a minus in the strand column reads the other strand.

Splits: the file's own (a split column, or one file each), else `test_share` of the sequences test, stratified by label and
decided by what the sequence is, not where it stands. Sequences that occur on both sides of a split, as they are or reverse
complemented, are counted and, unless told otherwise, dropped from the training side.
"""

import csv
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_prep.files import SourceFile, check_source, output_directory, sync, write_synced
from data_prep.genome import CODES, WHITESPACE, is_count, parse_records, shown_byte
from data_prep.intervals import Interval, chains, joined, sharing
from data_prep.near_copies import copied, families, sketch
from seqlab.classification.dataset import sequence_key, strata, stratified_parts
from seqlab.classification.metrics import KINDS
from seqlab.dataset import FORMAT, SPLITS, VERSION, nearest
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide

csv.field_size_limit(2**31 - 1)  # Python's 131,072 letters are less than a long sequence

SEQUENCE_NAMES = ("sequence", "seq", "seqs")
LABEL_NAMES = ("label", "labels")
SPLIT_WORDS = {"train": 0, "training": 0, "valid": 1, "val": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}
HEADER_PATTERN = r"[|\s](?:label=)?([^|\s]+)\s*$"
"""Label in a FASTA header by default: the last field after a | or a blank, with or without `label=`."""
MANY_CLASSES = 1000
Duplicates = Literal["drop", "keep", "error"]
NearCopies = Literal["apart", "together"]
Progress = Callable[[int, int], None]


@dataclass
class Record:
    """One labelled sequence as it was read. `where` names it in messages; `split` is None where the file has none; `place` is
    where in a genome it lies, if that is known."""

    where: str
    name: str
    text: bytes
    label: str
    split: int | None = None
    place: Interval | None = None


@dataclass(frozen=True)
class LabelOptions:
    """How labels are read.

    kind: "auto" finds out: multi-label if there is a separator, regression if every label is a number and there are more
        than 50 different ones, else binary or multi-class
    separator: between the labels of one sequence, for multi-label; an empty field means none of them
    classes: the names that are allowed, for files that should hold them all; empty: whatever occurs
    """

    kind: str = "auto"
    separator: str | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("auto", *KINDS):
            raise UserError(f"--kind {self.kind}: unknown; use auto, {', '.join(KINDS)}")
        if self.separator is not None and self.kind not in ("auto", "multi-label"):
            raise UserError(f"--label-separator belongs to --kind multi-label, not to {self.kind}; leave one of them out")
        if self.kind == "multi-label" and not self.separator:
            raise UserError("--kind multi-label: needs --label-separator, for example --label-separator ';'")
        if self.kind == "regression" and self.classes:
            raise UserError("--classes names classes, but --kind regression has numbers; leave one of them out")


@dataclass
class Summary:
    """What was met on the way; becomes part of the manifest."""

    counts: Counter = field(default_factory=Counter)  # A C G T N other
    lower_case: int = 0
    lower_case_sequences: Counter = field(default_factory=Counter)  # label -> sequences with any lower case
    label_counts: Counter = field(default_factory=Counter)
    skipped: Counter = field(default_factory=Counter)  # why -> sequences


def prepare_labelled(
    records: Iterable[Record],
    sources: Callable[[], list[dict[str, Any]]],
    out: Path | str,
    *,
    labels: LabelOptions = LabelOptions(),
    test_share: float = 0.2,
    seed: int = 0,
    duplicates: Duplicates = "drop",
    near_copies: NearCopies = "apart",
    skip_bad: bool = False,
    overwrite: bool = False,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write the records into the dataset directory `out` and return it. See the readers below for `records`.

    sources: called when all is read; the manifest's list of files with their sha256.
    test_share: share of the sequences that test where the records bring no split.
    duplicates: what to do about sequences on both sides of a split: drop them from the training (or validation) side,
        keep them (and say so), or stop with an error.
    near_copies: "together": sequences that share half or more of their 32-mers are on one side of a split that is made here;
        "apart": each is dealt out by itself, and those that test and have near copies in training are counted.
    skip_bad: leave out sequences that are empty, hold no A, C, G or T or have no label, and count them; else they are errors.
    extra: further keys of the manifest.

    Nothing is left behind after an error. Raises UserError.
    """
    out = Path(out)
    if not 0 <= test_share < 1:
        raise UserError(f"--test-share {test_share}: must lie in [0, 1)")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: must lie in [0, 2^63)")
    if duplicates not in ("drop", "keep", "error"):
        raise UserError(f"--duplicates {duplicates}: unknown; use drop, keep or error")
    if near_copies not in ("apart", "together"):
        raise UserError(f"--near-copies {near_copies}: unknown; use apart or together")
    summary = Summary()
    with output_directory(out, overwrite) as directory:
        names, raw_labels, splits, keys, places, offsets = [], [], [], [], [], [0]
        digest = hashlib.sha256()
        seen_names: dict[str, str] = {}
        with open(directory / "tokens.bin", "wb", buffering=1 << 20) as tokens:
            for record in records:
                ids = _encode(record, summary, skip_bad, labels.separator is None)
                if ids is None:
                    continue
                if record.name in seen_names:
                    raise UserError(
                        f"{record.where}: id {record.name[:60]!r} was met before ({seen_names[record.name]}); ids must "
                        "differ: rename one, or use another column"
                    )
                seen_names[record.name] = record.where
                data = ids.tobytes()
                tokens.write(data)
                digest.update(data)
                names.append(record.name.replace("\n", " "))  # one line each, in names.txt
                raw_labels.append(record.label)
                splits.append(record.split)
                keys.append(sequence_key(ids))
                if record.place is not None:
                    places.append(record.place)
                offsets.append(offsets[-1] + len(ids))
            sync(tokens)
        if not names:
            bad = f" ({sum(summary.skipped.values()):,} were left out)" if summary.skipped else ""
            read = ", ".join(file["path"] for file in sources()) or "nothing"
            raise UserError(f"{read}: no labelled sequence was read{bad}; give a file that holds some")
        where = list(seen_names.values())
        kind, classes, label_array = _resolve_labels(raw_labels, labels, where)
        key_array = np.array(keys, np.uint64)
        stored = np.memmap(directory / "tokens.bin", np.uint8, "r")
        found = sketch(stored, offsets)
        del stored
        groups = key_array[joined(key_array, chains(places))] if places else key_array
        if near_copies == "together":
            groups = key_array[joined(groups, families(found))]
        split, rule = _resolve_splits(splits, label_array, kind, key_array, groups, test_share, seed, where, near_copies)
        kept, report = _leaks(split, key_array, label_array, duplicates, names)
        report["near_copies"] = int(copied(found, kept & (split == 0), kept & (split == 2)).sum())
        if places:
            report["sharing_bases_with_test"] = _overlapping(places, split, kept)
        _check_classes(kind, classes, label_array[kept], split[kept], int((~kept).sum()), labels.kind == "auto")
        if not kept.all():
            _drop(directory, kept, offsets)
            lengths = np.diff(offsets)[kept]
            offsets = np.concatenate([[0], np.cumsum(lengths)]).tolist()
            names = [name for name, keep in zip(names, kept) if keep]
            label_array, split, key_array, groups = label_array[kept], split[kept], key_array[kept], groups[kept]
            with open(directory / "tokens.bin", "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        arrays = {"offsets": np.array(offsets, np.int64), "labels": label_array, "split": split, "keys": key_array}
        if places or near_copies == "together":
            arrays["groups"] = groups
        for name, array in arrays.items():
            with open(directory / f"{name}.npy", "wb") as file:
                np.save(file, array, allow_pickle=False)
                sync(file)
        write_synced(directory / "names.txt", "".join(f"{name}\n" for name in names))
        lengths = np.diff(offsets)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "labelled",
            "label_kind": kind,
            "classes": classes,
            "tokenizer": "nucleotide",
            "vocab": list(nucleotide.VOCAB),
            "n": len(names),
            "total": int(offsets[-1]),
            "lengths": {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())},
            "counts": {key: int(summary.counts[key]) for key in ("A", "C", "G", "T", "N", "other")},
            "lower_case": summary.lower_case,
            "case_gives_labels_away": _case_trap(summary, kind),
            "splits": {name: int((split == code).sum()) for code, name in enumerate(SPLITS)},
            "class_counts": _class_counts(kind, classes, label_array, split),
            "split_rule": rule,
            "duplicates": report,
            "skipped": dict(summary.skipped),
            "sha256": digest.hexdigest(),
            "sources": sources(),
            **(extra or {}),
        }
        write_synced(directory / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return out


# -- one record ----------------------------------------------------------------------------------------------------
_AMBIGUOUS = b"RYSWKMBDHVX-.*"
_ALLOWED = b"ACGTUN" + _AMBIGUOUS + b"acgtun" + _AMBIGUOUS.lower()
_LOWER = bytes(range(ord("a"), ord("z") + 1))


def _encode(record: Record, summary: Summary, skip_bad: bool, needs_label: bool) -> np.ndarray | None:
    """Token ids of a record's text, counted; None if it is bad and to be skipped."""
    text = record.text.translate(None, WHITESPACE)
    problem = None
    if strays := text.translate(None, _ALLOWED):
        raise UserError(
            f"{record.where}: {shown_byte(strays[0])} in the sequence is no nucleotide code ({CODES}); mend it, or is this the wrong column?"
        )
    if needs_label and not record.label:
        problem = "no label"
    raw = nucleotide.encode(text)
    other = int(np.count_nonzero(raw == nucleotide.UNK))
    ids = np.where(raw == nucleotide.UNK, np.uint8(nucleotide.N), raw)
    counts = np.bincount(raw, minlength=16)
    if problem is None and not len(ids):
        problem = "empty sequence"
    elif problem is None and not counts[list(nucleotide.BASES)].sum():
        problem = "no A, C, G or T in the sequence"
    if problem is not None:
        if not skip_bad:
            raise UserError(f"{record.where}: {problem}; mend it, or leave such sequences out with --skip-bad")
        summary.skipped[problem] += 1
        return None
    for base, token in zip("ACGTN", (*nucleotide.BASES, nucleotide.N)):
        summary.counts[base] += int(counts[token])
    summary.counts["other"] += other
    lower = len(text) - len(text.translate(None, _LOWER))
    summary.lower_case += lower
    summary.label_counts[record.label] += 1
    summary.lower_case_sequences[record.label] += lower > 0
    return ids


# -- labels --------------------------------------------------------------------------------------------------------
def _resolve_labels(raw: list[str], options: LabelOptions, where: list[str]) -> tuple[str, list[str], np.ndarray]:
    """(kind, sorted class names, array) of the labels as they were read."""
    if options.separator:
        sets = [sorted({part.strip() for part in label.split(options.separator)} - {""}) for label in raw]
        classes = _class_names({name for labels in sets for name in labels}, options, where, sets)
        index = {name: i for i, name in enumerate(classes)}
        array = np.zeros((len(raw), len(classes)), np.uint8)
        for row, labels in zip(array, sets):
            row[[index[name] for name in labels]] = 1
        return "multi-label", classes, array
    values = set(raw)
    kind = options.kind
    if kind == "auto":
        numbers = sum(map(_is_number, values)) if len(values) > 50 and not options.classes else 0
        if len(values) > numbers >= 0.9 * len(values):  # a column of measurements with a gap in it
            i, text = next((i, text) for i, text in enumerate(raw) if not _is_number(text))
            raise UserError(
                f"{where[i]}: label {text[:40]!r} is not a finite number, as nearly all the others are; mend it, leave the row out, or "
                "say --kind multi-class"
            )
        is_regression = 0 < numbers == len(values)
        kind = "regression" if is_regression else "binary" if len(options.classes or values) == 2 else "multi-class"
    if kind == "regression":
        numbers = np.empty(len(raw), np.float64)
        for i, text in enumerate(raw):
            if not _is_number(text):
                raise UserError(
                    f"{where[i]}: label {text[:40]!r} is not a number; --kind regression needs numbers, "
                    "--kind multi-class takes names"
                )
            numbers[i] = float(text)
        if np.ptp(numbers) == 0:
            raise UserError(f"every label is {raw[0][:40]!r}; a regression needs at least two different numbers")
        return kind, [], numbers
    if len(values) > MANY_CLASSES:
        raise UserError(
            f"{len(values):,} different labels, for example {sorted(values)[0][:40]!r}; is this the right column? At most "
            f"{MANY_CLASSES:,} classes are allowed; --kind regression reads numbers"
        )
    classes = _class_names(values, options, where, [[label] for label in raw])
    if kind == "binary" and len(classes) != 2:
        raise UserError(f"--kind binary: {len(classes)} classes ({_list(classes)}); use --kind multi-class")
    index = {name: i for i, name in enumerate(classes)}
    return kind, classes, np.array([index[label] for label in raw], np.int64)


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _class_names(found: set[str], options: LabelOptions, where: list[str], labels: list[list[str]]) -> list[str]:
    """Sorted: whole numbers by value, everything else as text."""
    names = set(options.classes) or found
    for i, row in enumerate(labels if options.classes else []):
        for label in row:
            if label not in names:
                raise UserError(f"{where[i]}: label {label[:40]!r} is not among --classes; {nearest(label, sorted(names))}")
    if options.classes and (absent := sorted(names - found)):
        raise UserError(f"class {absent[0]!r} is empty: no sequence has this label; add some, or leave it out of --classes")
    if len(names) < (1 if options.separator else 2):
        raise UserError(
            f"only one class, {next(iter(names))!r}: nothing to tell apart; add sequences of another class"
            if names
            else "no sequence has any label; is this the right column, and the right --label-separator?"
        )
    if all(re.fullmatch(r"-?\d{1,15}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _list(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name[:40]) for name in names[:most]) + more


def _check_classes(kind: str, classes: list[str], labels: np.ndarray, split: np.ndarray, dropped: int, kind_was_found: bool) -> None:
    """Every class needs training sequences, and there must be something to test on. dropped: sequences that are not here any
    more, as they occur on both sides of a split."""
    hint = "; --kind regression reads labels as numbers" if kind_was_found and all(map(_is_number, classes)) else ""
    lost = f" ({dropped:,} on both sides of a split were dropped from its training side; --duplicates keep leaves them)" if dropped else ""
    for code, name in ((0, "train"), (2, "test")):
        if not (split == code).any():
            raise UserError(f"the {name} split is empty{lost}; give it sequences, or leave the splits to --test-share{hint}")
    if kind == "regression":
        return
    train = labels[split == 0]
    for c, name in enumerate(classes):
        n = int(train[:, c].sum() if kind == "multi-label" else (train == c).sum())
        if n < 2:
            raise UserError(
                f"class {name!r} has {n} training sequence{'s' * (n != 1)}{lost}; each class needs 2 or more: add some, or leave "
                f"the class out{hint}"
            )


def _class_counts(kind: str, classes: list[str], labels: np.ndarray, split: np.ndarray) -> dict[str, dict[str, int]]:
    if kind == "regression":
        return {}
    is_class = labels.astype(bool) if kind == "multi-label" else labels[:, None] == np.arange(len(classes))
    return {
        name: {s: int((is_class[:, c] & (split == code)).sum()) for code, s in enumerate(SPLITS)}
        for c, name in enumerate(classes)
    }


def _case_trap(summary: Summary, kind: str) -> bool:
    """Whether having lower-case letters tells one class from another: all of one have them, none of another."""
    if kind == "regression" or len(summary.label_counts) > MANY_CLASSES:
        return False
    shares = [summary.lower_case_sequences[label] / n for label, n in summary.label_counts.items() if n >= 5]
    return bool(shares) and max(shares) > 0.95 and min(shares) < 0.05


# -- splits and duplicates -----------------------------------------------------------------------------------------
def _resolve_splits(splits, labels, kind, keys, groups, test_share, seed, where, near_copies) -> tuple[np.ndarray, str]:
    """(n) uint8 codes into SPLITS and the rule, for the manifest. Rows of one group (n) stay together, if that leaves enough to
    train and to test on; those of one key (n) always do."""
    given = [code for code in splits if code is not None]
    if given:
        if len(given) < len(splits):
            raise UserError(f"{where[splits.index(None)]}: no split; either every sequence has one or none has")
        if near_copies == "together":
            raise UserError("--near-copies together: the files bring a split already; leave one of them out")
        code = np.array(splits, np.uint8)
        rule = "as given in the files"
        if not (code == 1).any():
            rule += "; validation is drawn from the training split, anew for each seed"
        if (code == 2).any():
            return code, rule
        raise UserError("the files give a training split but no test split; add one, or leave the split column out")
    stratum = strata(labels, kind)
    parts, together = stratified_parts(stratum, groups, (test_share,), seed), ""
    if not np.array_equal(groups, keys):
        what = "near copies" if near_copies == "together" else "intervals that share bases"
        together = f"{what} are on one side; "
        if not _is_enough(stratum, parts == 0, test_share):
            if near_copies == "together":
                most = int(np.unique(groups, return_counts=True)[1].max())
                raise UserError(
                    f"--near-copies together: leaves no fair split, {most:,} of {len(keys):,} sequences are one family of near copies; "
                    "bring a split of your own, or leave the option out"
                )
            parts, together = stratified_parts(stratum, keys, (test_share,), seed), "intervals overlap too much to be kept apart; "
    code = np.where(parts == 0, 2, 0).astype(np.uint8)
    return code, (
        f"{test_share:g} of the sequences test, stratified by label, by a hash of the sequence and seed {seed}; {together}validation "
        "is drawn from the training split, anew for each seed"
    )


def _is_enough(stratum: np.ndarray, tests: np.ndarray, share: float) -> bool:
    """Whether about `share` of the rows test, of each stratum (n) that is not tiny some, and enough are left to train on."""
    if not 0.5 * share <= tests.mean() <= 2 * share:
        return False
    rows = [(tests[stratum == s].sum(), (stratum == s).sum()) for s in np.unique(stratum)]
    return all((n < 10 or tested > 0 or share == 0) and (n < 3 or n - tested >= 2) for tested, n in rows)


def _overlapping(places: list[Interval], split: np.ndarray, kept: np.ndarray) -> int:
    """How many of the intervals that train or validate share bases with one that tests."""
    test = [place for place, code, keep in zip(places, split, kept) if keep and code == 2]
    others = [place for place, code, keep in zip(places, split, kept) if keep and code != 2]
    return int(sharing(others, test).sum())


def _leaks(split, keys, labels, duplicates, names) -> tuple[np.ndarray, dict[str, Any]]:
    """Which rows to keep (n) bool, and the report. A training or validation sequence leaks if the test split holds it, a
    training sequence also if the validation split does; reverse complements count as the same."""
    test, valid = np.unique(keys[split == 2]), np.unique(keys[split == 1])
    in_test, in_valid = np.isin(keys, test), np.isin(keys, valid)
    leaks = (split != 2) & in_test | (split == 0) & in_valid
    unique, first, count = np.unique(keys, return_index=True, return_counts=True)
    group = np.searchsorted(unique, keys)
    first_labels = labels[first][group]
    differs = (labels != first_labels) if labels.ndim == 1 else (labels != first_labels).any(1)
    report = {
        "repeats": int((count - 1).sum()),
        "repeats_with_another_label": int(differs.sum()),
        "leaking": int(leaks.sum()),
        "action": duplicates if leaks.any() else "none needed",
    }
    if leaks.any() and duplicates == "error":
        i = int(np.flatnonzero(leaks)[0])
        j = int(np.flatnonzero((keys == keys[i]) & (split > split[i]))[0])
        raise UserError(
            f"{int(leaks.sum()):,} sequences are on both sides of a split, for example {names[i][:60]!r} ({SPLITS[split[i]]}) "
            f"and {names[j][:60]!r} ({SPLITS[split[j]]}); use --duplicates drop, or keep to leave them"
        )
    return ~leaks if duplicates == "drop" else np.ones(len(keys), bool), report


def _drop(directory: Path, kept: np.ndarray, offsets: list[int]) -> None:
    """Rewrite tokens.bin without the sequences that are not kept."""
    tokens = np.memmap(directory / "tokens.bin", np.uint8, "r")
    with open(directory / "tokens.partial", "wb", buffering=1 << 20) as file:
        for i in np.flatnonzero(kept):
            file.write(tokens[offsets[i] : offsets[i + 1]].tobytes())
        sync(file)
    del tokens
    (directory / "tokens.partial").replace(directory / "tokens.bin")


# -- readers -------------------------------------------------------------------------------------------------------
class Reader:
    """Files read so far, for the manifest; the readers below hang their sources here."""

    def __init__(self, progress: Progress | None = None):
        self.files: list[dict[str, Any]] = []
        self.progress = progress
        self._done = 0

    def sources(self) -> list[dict[str, Any]]:
        for file in self.files:
            if not isinstance(file["sha256"], str):
                file["sha256"] = file["sha256"].hexdigest()
        return self.files

    def blocks(self, path: Path, wanted: str) -> Iterator[bytes]:
        size = check_source(path, wanted)

        def report(read: int) -> None:
            if self.progress is not None:
                self.progress(self._done + read, max(self._done + size, 1))

        with SourceFile(path, report) as source:
            yield from source.blocks()
            self.files.append({"path": str(path), "sha256": source.sha256(), "bytes": source.bytes_read})
        self._done += size

    def lines(self, path: Path, wanted: str) -> Iterator[str]:
        """Text lines without their ends: LF, CRLF, or the CR alone of old spreadsheets."""
        rest = b""
        for block in self.blocks(path, wanted):
            text = rest + block
            end = len(text) - text.endswith(b"\r")  # half of a CRLF, perhaps
            *whole, rest = text[:end].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
            rest += text[end:]
            for line in whole:
                yield line.decode("utf-8", "replace")
        if rest:
            yield rest.decode("utf-8", "replace").rstrip("\r")

    # -- tables ----------------------------------------------------------------------------------------------------
    def table(
        self,
        path: Path,
        *,
        sequence_column: str | None = None,
        label_column: str | None = None,
        name_column: str | None = None,
        split_column: str | None = None,
        columns: tuple[str, ...] = (),
        split: int | None = None,
        where: dict[str, str] | None = None,
    ) -> Iterator[Record]:
        """Rows of a CSV or TSV. `columns` names the columns of a file without a header; `split` is the whole file's;
        `where` keeps only the rows with these values in these columns."""
        lines = self.lines(path, "CSV or TSV file with a sequence and a label column")
        first = next(lines, "")
        if first.startswith(">"):
            raise UserError(f"{path}: looks like FASTA; give --label-from header, or --labels FILE")
        delimiter = _delimiter(path, first)
        header = list(columns) or _header(first, delimiter)
        lines = itertools.chain([first], lines) if columns else lines
        at = _Columns.of(path, header, sequence_column, label_column, name_column, split_column, split, where)
        reader = csv.reader(lines, delimiter=delimiter)
        start = 1 if columns else 2
        chosen = _Chosen(path, header, at.filters)
        try:
            for number, row in enumerate(reader, start=start):
                if not any(cell.strip() for cell in row):
                    continue
                place = f"{path}: line {number}"
                if len(row) != len(header):
                    raise UserError(
                        f"{place}: {len(row)} column{'s' * (len(row) != 1)}, the header has {len(header)} "
                        f"({_list(header)}); mend the line"
                    )
                if not chosen(row):
                    continue
                its_split = split if at.split is None else _split_code(place, row[at.split])
                called = f"{at.stem}{number}" if at.name is None else row[at.name].strip()
                yield Record(place, called, row[at.sequence].encode("utf-8"), row[at.label].strip(), its_split)
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num + start - 1}: not a readable table ({error})") from None
        chosen.check()

    def parquet(
        self,
        path: Path,
        *,
        sequence_column: str | None = None,
        label_column: str | None = None,
        name_column: str | None = None,
        split_column: str | None = None,
        split: int | None = None,
        where: dict[str, str] | None = None,
    ) -> Iterator[Record]:
        """Rows of a parquet file; needs pyarrow. Arguments as for `table`."""
        table = _read_parquet(path)
        header = list(table.column_names)
        at = _Columns.of(path, header, sequence_column, label_column, name_column, split_column, split, where)
        columns = [column.to_pylist() for column in table.columns]
        chosen = _Chosen(path, header, at.filters)
        for number in range(table.num_rows):
            if chosen({c: str(columns[c][number]) for c in at.filters}):
                text, label, name, word = (
                    "" if c is None or columns[c][number] is None else str(columns[c][number]).strip() for c in (at.sequence, at.label, at.name, at.split)
                )
                place = f"{path}: row {number + 1}"
                its_split = split if at.split is None else _split_code(place, word)
                yield Record(place, f"{at.stem}{number + 1}" if at.name is None else name, text.encode(), label, its_split)
        chosen.check()
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.files.append({"path": str(path), "sha256": digest, "bytes": path.stat().st_size})

    def small_file(self, path: Path) -> bytes:
        """A file that is one sequence; of many such files, the manifest keeps one line for each folder."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        folder = str(path.parent)
        if not self.files or self.files[-1]["path"] != folder:
            self.files.append({"path": folder, "sha256": hashlib.sha256(), "bytes": 0, "files": 0})
        last = self.files[-1]
        last["sha256"].update(data)
        last["bytes"] += len(data)
        last["files"] += 1
        return data

    def column_values(self, path: Path, column: str) -> Counter:
        """value -> rows of one column of a CSV or TSV; nothing if there is no such column."""
        if path.suffix.lower() == ".parquet":
            table = _read_parquet(path)
            return Counter(table[column].to_pylist() if column in table.column_names else ())
        lines = self.lines(path, "CSV or TSV file")
        first = next(lines, "")
        delimiter = _delimiter(path, first)
        header = _header(first, delimiter)
        if column not in header:
            return Counter()
        at = header.index(column)
        return Counter(row[at].strip() for row in csv.reader(lines, delimiter=delimiter) if len(row) > at)

    # -- FASTA -----------------------------------------------------------------------------------------------------
    def each_record(self, path: Path, use: Callable[[str, bytes], None]) -> None:
        """Call `use(header, letters)` for each record of a FASTA file, holding one record at a time."""
        parse_records(path, self.blocks(path, "FASTA file"), _Records(path, use))

    def fasta(self, path: Path) -> list[tuple[str, bytes]]:
        """(header, letters) of all records, in order."""
        records: list[tuple[str, bytes]] = []
        self.each_record(path, lambda header, letters: records.append((header, letters)))
        return records

    def fasta_with_header_labels(self, path: Path, pattern: str = HEADER_PATTERN, split: int | None = None) -> Iterator[Record]:
        """The label is the first group of `pattern` in the header; the name is the header's first word."""
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UserError(f"--label-pattern {pattern}: not a regular expression ({error})") from None
        if compiled.groups < 1:
            raise UserError(f"--label-pattern {pattern}: needs a group in parentheses, the label, for example 'class=(\\w+)'")
        for number, (header, letters) in enumerate(self.fasta(path), start=1):
            place = f"{path}: record {number} ({header[:40]!r})"
            found = compiled.search(header)
            if not found:
                raise UserError(f"{place}: no label in the header (pattern {pattern}); give another --label-pattern")
            name = (header.split() or [f"record-{number}"])[0]
            name = name if split is None else f"{SPLITS[split]}-{number}"  # files of public sets reuse names
            yield Record(place, name, letters, (found.group(1) or "").strip(), split)

    def fasta_with_label_file(
        self, paths: dict[int | None, Path], table: Path, *, label_column: str | None = None, name_column: str | None = None,
        split_column: str | None = None,
    ) -> Iterator[Record]:  # fmt: skip
        """Labels by name from a CSV or TSV with a name and a label column (and a split column, if there is one) for the records of
        FASTA files. `paths` maps a split code (None: not said) to its file."""
        lines = self.lines(table, "CSV or TSV file with a name and a label column")
        first = next(lines, "")
        delimiter = _delimiter(table, first)
        header = _header(first, delimiter)
        name = _column(table, header, name_column, ("name", "id", "sequence", "sequence_name"), "--name-column", "name")
        label = _column(table, header, label_column, LABEL_NAMES, "--label-column", "label")
        chosen = _split_column(table, header, split_column) if None in paths else None
        labels: dict[str, tuple[str, int | None]] = {}
        for number, row in enumerate(csv.reader(lines, delimiter=delimiter), start=2):
            if not any(cell.strip() for cell in row):
                continue
            place = f"{table}: line {number}"
            if len(row) != len(header):
                raise UserError(f"{place}: {len(row)} columns, the header has {len(header)} ({_list(header)}); mend the line")
            key = row[name].strip()
            if key in labels:
                raise UserError(f"{place}: {key[:60]!r} has a label already; names must differ")
            labels[key] = row[label].strip(), None if chosen is None else _split_code(place, row[chosen])
        found = 0
        for split, path in paths.items():
            for number, (header_text, letters) in enumerate(self.fasta(path), start=1):
                key = (header_text.split() or [""])[0]
                if key not in labels:
                    raise UserError(f"{path}: record {number}, {key[:60]!r}, has no label in {table}; {nearest(key, labels)}")
                found += 1
                its_label, its_split = labels[key]
                yield Record(f"{path}: record {number} ({key[:40]!r})", key, letters, its_label, its_split if split is None else split)
        if found < len(labels):
            where = " or ".join(map(str, paths.values()))
            raise UserError(f"{table}: {len(labels) - found:,} of its {len(labels):,} names are not in {where}; give the right FASTA")

    # -- BED -------------------------------------------------------------------------------------------------------
    def bed(
        self, path: Path, genome: Path, *, label_column: str | None = None, split_column: str | None = None
    ) -> Iterator[Record]:
        """Intervals of a genome: chrom, start, end, label in the fourth column (0-based half-open); a sixth column of + and
        - is the strand, a fifth of train, valid and test the split. With a header line, columns by name. Sequences are named
        chrom:start-end(strand), and #2, #3, ... where an interval occurs again (annotations repeat exons)."""
        rows = _bed_rows(path, self.lines(path, "BED file: chrom start end label"), label_column, split_column)
        wanted: dict[str, list[_Interval]] = {}
        for row in rows:
            wanted.setdefault(row.chrom, []).append(row)
        letters: list[bytes | None] = [None] * len(rows)
        lengths: dict[str, int] = {}

        def cut(header: str, sequence: bytes) -> None:
            name = (header.split() or [""])[0]
            lengths[name] = len(sequence)
            for row in wanted.get(name, ()):
                if row.end > len(sequence):
                    raise UserError(f"{row.where}: end {row.end:,} is past the end of {name!r} ({len(sequence):,} bases)")
                letters[row.index] = sequence[row.start : row.end]

        self.each_record(genome, cut)
        met: Counter[str] = Counter()
        for row in rows:
            text = letters[row.index]
            if text is None:
                raise UserError(f"{row.where}: no sequence {row.chrom[:60]!r} in {genome}; {nearest(row.chrom, lengths)}")
            if row.is_reverse:
                text = text.translate(_COMPLEMENT_TEXT)[::-1]
            name = f"{row.chrom}:{row.start}-{row.end}({'-' if row.is_reverse else '+'})"
            met[name] += 1
            again = f"#{met[name]}" if met[name] > 1 else ""
            yield Record(row.where, name + again, text, row.label, row.split, (row.chrom, row.start, row.end))


def _read_parquet(path: Path):
    """A pyarrow table. Raises UserError: no pyarrow, no file, no parquet."""
    check_source(path, "parquet file")
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; type: pip install pyarrow, or export CSV") from None
    try:
        return parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0][:80]})") from None


_COMPLEMENT_TEXT = bytes.maketrans(b"ACGTUNRYSWKMBDHVacgtunryswkmbdhv", b"TGCAANYRSWMKVHDBtgcaanyrswmkvhdb")


@dataclass
class _Interval:
    index: int
    where: str
    chrom: str
    start: int
    end: int
    label: str
    split: int | None
    is_reverse: bool


def _bed_rows(path: Path, lines: Iterable[str], label_column: str | None, split_column: str | None) -> list[_Interval]:
    rows: list[_Interval] = []
    header: list[str] | None = None
    label, split, strand = 3, None, None
    for number, line in enumerate(lines, start=1):
        words = [word.strip() for word in (line.split("\t") if "\t" in line else line.split())]
        if not line.strip() or words[0] in ("track", "browser"):
            continue
        is_first = header is None and not rows
        if is_first and len(words) > 2 and not (is_count(words[1]) and is_count(words[2])):
            header = [word.lstrip("#").strip() for word in words]
            label = _column(path, header, label_column, LABEL_NAMES + ("name",), "--label-column", "label")
            split = _split_column(path, header, split_column)
            strand = header.index("strand") if "strand" in header else None
            continue
        if line.startswith("#"):
            continue
        place = f"{path}: line {number}"
        if is_first:
            if label_column is not None and not label_column.isdigit():
                raise UserError(f"--label-column {label_column}: {path} has no header; give the column's number, from 1")
            label = int(label_column) - 1 if label_column is not None else 3
            if len(words) > 4 and words[4].lower() in SPLIT_WORDS:
                split = 4
            if len(words) > 5 and words[5] in ("+", "-", "."):
                strand = 5
        if len(words) <= max(2, label):
            raise UserError(f"{place}: {len(words)} columns; a row is: chrom start end label [split] [strand], tab-separated")
        chrom, start, end = words[:3]
        if not (is_count(start) and is_count(end)):
            raise UserError(f"{place}: {start[:20]!r}, {end[:20]!r}: start and end must be whole numbers, 0-based half-open")
        if int(start) >= int(end):
            raise UserError(f"{place}: start {start} is not before end {end}; coordinates are 0-based half-open")
        its_split = None if split is None else _split_code(place, words[split] if split < len(words) else "")
        is_reverse = strand is not None and strand < len(words) and words[strand] == "-"
        rows.append(_Interval(len(rows), place, chrom, int(start), int(end), words[label], its_split, is_reverse))
    if not rows:
        raise UserError(f"{path}: holds no rows; a row is: chrom start end label")
    return rows


class _Records:
    """Takes what the parser of `prep dna` finds and hands on whole records."""

    def __init__(self, path: Path, use: Callable[[str, bytes], None]):
        self.path, self._use = path, use
        self._header: str | None = None
        self._pieces: list[bytes] = []

    def begin(self, header: bytes) -> None:
        self.end()
        self._header = header.decode("utf-8", "replace").strip()

    def add(self, text: bytes) -> None:
        self._pieces.append(text.translate(None, WHITESPACE))

    def end(self) -> None:
        header, self._header = self._header, None
        letters, self._pieces = b"".join(self._pieces), []
        if header is not None:
            self._use(header, letters)

    def misplaced_mark(self) -> UserError:
        return UserError(
            f"{self.path}: record {(self._header or '')[:60]!r} has a '>' within a line of bases; start a new line before "
            "each '>'"
        )


# -- columns -------------------------------------------------------------------------------------------------------
def _delimiter(path: Path, line: str) -> str:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".tsv", ".tab")):
        return "\t"
    for delimiter in (",", "\t", ";"):
        if delimiter in line:
            return delimiter
    return ","


def _header(line: str, delimiter: str) -> list[str]:
    """Names of the columns, which may be in quotes."""
    return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]


def _column(
    path: Path, header: list[str], asked: str | None, usual: tuple[str, ...], option: str, what: str
) -> int:
    """Index of a column, asked for by name or one of the usual names. UserError says which columns there are."""
    lower = [name.lower() for name in header]
    if asked is not None:
        if asked in header:
            return header.index(asked)
        raise UserError(f"{option} {asked}: {path} has no such column; it has {_list(header, 12)}")
    for name in usual:
        if name in lower:
            return lower.index(name)
    bare = "; if the first line is no header, name all columns: --columns label,name,sequence" if what == "sequence" else ""
    raise UserError(
        f"{path}: no column is called {' or '.join(map(repr, usual))}; name the {what} column with {option}, one of "
        f"{_list(header, 12)}{bare}"
    )


def _split_column(path: Path, header: list[str], asked: str | None) -> int | None:
    if asked is not None:
        return _column(path, header, asked, (), "--split-column", "split")
    lower = [name.lower() for name in header]
    return lower.index("split") if "split" in lower else None


class _Columns(NamedTuple):
    """Where a table has what, by column."""

    sequence: int
    label: int
    name: int | None
    split: int | None  # None: the whole file's, or nobody's yet
    filters: dict[int, str]  # rows with other values are left out
    stem: str  # of the names of rows that are numbered

    @classmethod
    def of(cls, path, header: list[str], sequence, label, name, split_column, split: int | None, where: dict[str, str] | None) -> "_Columns":
        """By the names asked for, or the usual ones; arguments as for `Reader.table`."""
        return cls(
            _column(path, header, sequence, SEQUENCE_NAMES, "--sequence-column", "sequence"),
            _column(path, header, label, LABEL_NAMES, "--label-column", "label"),
            None if name is None else _column(path, header, name, (), "--name-column", "name"),
            None if split is not None else _split_column(path, header, split_column),
            {_column(path, header, key, (), "--where", key): value for key, value in (where or {}).items()},
            "" if split is None else f"{SPLITS[split]}-",
        )


class _Chosen:
    """Which rows of a table --where keeps, and a clear word where it keeps none."""

    def __init__(self, path: Path, header: list[str], filters: dict[int, str]):
        self.path, self.header, self.filters = path, header, filters
        self.seen: dict[int, set[str]] = {column: set() for column in filters}
        self.none = bool(filters)

    def __call__(self, row: list[str] | dict[int, str]) -> bool:
        values = {column: row[column].strip() for column in self.filters}
        if values == self.filters:
            self.none = False
            return True
        if self.none:
            for column, value in values.items():
                if len(self.seen[column]) < 10_000:  # enough to name the nearest
                    self.seen[column].add(value)
        return False

    def check(self) -> None:
        """UserError if it kept none, with what is there."""
        if not self.none:
            return
        asked = " ".join(f"--where {self.header[column]}={value}" for column, value in self.filters.items())
        for column, value in self.filters.items():
            if value not in self.seen[column] and 0 < len(self.seen[column]) < 10_000:
                raise UserError(f"{self.path}: no row has {self.header[column]} {value!r} ({asked}); {nearest(value, sorted(self.seen[column]))}")
        raise UserError(f"{self.path}: no row is chosen by {asked}")


def _split_code(where: str, word: str) -> int:
    code = SPLIT_WORDS.get(word.strip().lower())
    if code is None:
        raise UserError(f"{where}: split {word.strip()[:40]!r} is not one of {', '.join(SPLITS)}; mend it, or rename the column")
    return code


def read_files(
    reader: Reader,
    files: dict[int | None, Path],
    *,
    genome: Path | None = None,
    labels: Path | None = None,
    label_from: str | None = None,
    label_pattern: str | None = None,
    sequence_column: str | None = None,
    label_column: str | None = None,
    name_column: str | None = None,
    split_column: str | None = None,
    columns: tuple[str, ...] = (),
    where: dict[str, str] | None = None,
) -> Iterator[Record]:
    """Records of files by what they are: BED with `genome`, FASTA with `labels` or `label_from` "header", else a table.
    `files` maps a split code (None: not said) to its file."""
    if label_from not in (None, "column", "header"):
        raise UserError(f"--label-from {label_from}: unknown; use column or header")
    given = {
        "--genome": genome, "--labels": labels, "--label-from": label_from, "--label-pattern": label_pattern,
        "--sequence-column": sequence_column, "--label-column": label_column, "--name-column": name_column,
        "--split-column": split_column, "--columns": columns, "--where": where,
    }  # fmt: skip
    layouts = {}
    for split, path in files.items():
        check_source(path, "CSV, TSV, FASTA, BED or parquet file of labelled sequences")
        layouts[split] = layout = _layout(path, genome, labels, label_from == "header" or label_pattern is not None)
        for option, value in given.items():
            if value and option not in _MEANT[layout]:
                raise UserError(f"{option}: says nothing about {path}, which is read as {layout}; leave it out")
    if _FASTA_AND_TABLE in layouts.values():  # all of them are
        yield from reader.fasta_with_label_file(
            files, labels, label_column=label_column, name_column=name_column, split_column=split_column
        )
        return
    for split, path in files.items():
        if layouts[split] == _BED:
            for record in reader.bed(path, genome, label_column=label_column, split_column=split_column):
                if split is not None:
                    record.split, record.name = split, f"{SPLITS[split]}-{record.name}"
                yield record
        elif layouts[split] == _FASTA:
            yield from reader.fasta_with_header_labels(path, label_pattern or HEADER_PATTERN, split)
        elif layouts[split] == _PARQUET:
            yield from reader.parquet(
                path, sequence_column=sequence_column, label_column=label_column, name_column=name_column,
                split_column=split_column, split=split, where=where,
            )  # fmt: skip
        else:
            yield from reader.table(
                path, sequence_column=sequence_column, label_column=label_column, name_column=name_column,
                split_column=split_column, columns=columns, split=split, where=where,
            )  # fmt: skip


_BED, _FASTA, _FASTA_AND_TABLE, _PARQUET, _TABLE = (
    "BED", "FASTA with labels in its headers", "FASTA with a table of labels", "parquet", "a table",
)  # fmt: skip
_COLUMNS = ("--label-from", "--sequence-column", "--label-column", "--name-column", "--split-column", "--where")
_MEANT = {
    _BED: ("--genome", "--label-column", "--split-column"),
    _FASTA: ("--label-from", "--label-pattern"),
    _FASTA_AND_TABLE: ("--labels", "--label-column", "--name-column", "--split-column"),
    _PARQUET: _COLUMNS,
    _TABLE: (*_COLUMNS, "--columns"),
}
"""What a file is read as -> the options that its reader looks at; another one would be passed over in silence."""


def _layout(path: Path, genome: Path | None, labels: Path | None, has_header_labels: bool) -> str:
    """What a file is read as, one of _MEANT. Raises UserError where that takes an option that was not given."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".bgz")
    if genome is not None:
        return _BED
    if name.endswith(".bed"):
        raise UserError(f"{path}: a BED file needs the genome that it belongs to: --genome FASTA")
    if labels is not None:
        return _FASTA_AND_TABLE
    if has_header_labels:
        return _FASTA
    if name.endswith((".fa", ".fasta", ".fna")):
        raise UserError(f"{path}: where are the labels of this FASTA? Give --label-from header, or --labels FILE")
    return _PARQUET if name.endswith(".parquet") else _TABLE
