"""FASTA or GenBank -> dataset directory (tokens.bin, soft_masked.npy, manifest.json): any size, bounded memory, one pass.

A record and what becomes of it:

    >chr1 some description      name "chr1": the first word of the header
    ACGTNacgtRYU-               7 8 9 10 11 7 8 9 10 6 6 10 6, one byte each; bases 5..9 soft-masked (lower case)

Letters: A C G T, U read as T, N. The ambiguity codes RYSWKMBDHV, X, and the gap signs - . * become [UNK] and are counted
as "other"; they keep their place, so that coordinates are those of `samtools faidx`. Anything else is an error. GenBank
files are named by their VERSION (as NCBI's FASTA of the same record is), and their lower case means nothing.

Splits never share a base: by a BED file, by sequence name, or by blocks (see `prepare_genome`).

The reader is our own: pyfaidx needs an index beside the file and refuses plain gzip, and this pass also needs the case
of every letter and a checksum. pyfaidx is the oracle in the tests instead.
"""

import difflib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.files import SourceFile, Table, check_source, output_directory, sync, write_synced
from seqlab.dataset import FORMAT, SPLITS, VERSION, nearest
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide

DEFAULT_BLOCK = 65_536
MAX_HEADER = 1 << 16  # bytes of a header that are kept; only its first word is used
WHITESPACE = b" \t\n\r\v\f"

Progress = Callable[[int, int], None]  # (bytes of source files read, bytes of source files in all)


def prepare_genome(
    fastas: Iterable[Path | str] | Path | str,
    out: Path | str,
    *,
    splits: Path | str | None = None,
    valid: Iterable[str] = (),
    test: Iterable[str] = (),
    block: int | None = None,
    whole: str | None = None,
    min_length: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Read FASTA or GenBank files (plain, gzip or bgzip) into the dataset directory `out` and return it.

    Splits, one of four ways:
    - `splits`: a BED file of chrom, start, end, train|valid|test (0-based half-open). Bases outside it are in no split.
      Rows of one split may overlap, as those of the published human intervals do, and are joined; rows of two may not.
    - `valid`, `test`: names of the sequences that validate and test; the others train. One of them may be empty.
    - by default, blocks of `block` bases (65,536; less for a small genome, so that there are 20 or more), cut within
      each sequence and counted from 0 through all of them: every tenth block (k % 10 = 0) tests, the next one
      (k % 10 = 1) validates, the others train.
    - `whole`: every base is in this one split ("test": a genome that is only evaluated on).

    min_length: shorter sequences are left out (counted in the manifest's "skipped").
    overwrite: replace `out` if it is a dataset.

    Memory: some 50 MB, and about 1.5 KB for every sequence (an assembly of a million contigs needs min_length).

    Nothing is written to `out` before everything is known to be right: the work is done in a directory beside it, which
    is renamed at the end and removed after any error or Ctrl-C. Raises UserError.
    """
    paths = [Path(fastas)] if isinstance(fastas, (str, os.PathLike)) else [Path(p) for p in fastas]
    out, valid, test = Path(out), list(valid), list(test)
    if not paths:
        raise UserError("no FASTA file given; give one or more .fa or .fa.gz files")
    if splits is not None and (valid or test):
        raise UserError("splits come from a BED file or from names of sequences, not from both; leave one out")
    if block is not None and (splits is not None or valid or test):
        raise UserError("--block cuts the default splits; it has no use with a BED file or names of sequences")
    if whole is not None and (splits is not None or valid or test or block is not None or whole not in SPLITS):
        raise ValueError(f"whole must be one of {', '.join(SPLITS)} and the only rule for splits, got {whole!r}")
    for option, number in (("block", block), ("min-length", min_length)):
        if number is not None and number < 1:
            raise UserError(f"--{option} {number}: must be 1 or more")
    check_apart(valid, test)
    for path in paths:
        check_source(path)
    bed = None if splits is None else _read_bed(Path(splits))

    with output_directory(out, overwrite) as directory:
        writer, sources = write_sequences(directory, [("", path) for path in paths], min_length, progress)
        sequences = writer.sequences
        if not writer.total:
            skipped = f" of {min_length:,} bases or more" if min_length > 1 else ""
            raise UserError(f"{_list(paths)}: no sequence{skipped}; a FASTA file holds '>name' and lines of bases")
        if whole is not None:
            table = {name: [] for name in SPLITS}
            table[whole] = [[i, 0, s["length"]] for i, s in enumerate(sequences)]
            rule = f"every base is in {whole}"
        elif bed is not None:
            table, rule = _splits_from_bed(bed, Path(splits), sequences)
        elif valid or test:
            table, rule = splits_by_name([s["name"] for s in sequences], sequences, valid, test, "no such sequence")
            if not table["train"]:
                raise UserError("--valid and --test name every sequence; leave at least one to train on")
        else:
            table, rule = _splits_by_block(sequences, block)
        if not table["train"] and whole is None:
            raise UserError(f"{splits or _list(paths)}: nothing is left to train on; leave some sequence in train")
        tokens = np.memmap(directory / "tokens.bin", np.uint8, "r")
        pairs = find_duplicates(tokens, sequences, table) if whole is None else []
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "dna",
            "tokenizer": "nucleotide",
            "vocab": list(nucleotide.VOCAB),
            **writer.facts(),
            "split_rule": rule,
            "duplicates": {"pairs": len(pairs), "example": [sequences[i]["name"] for i in pairs[0][:2]] if pairs else []},
            "sources": sources,
            "sequences": sequences,
            "splits": table,
        }
        write_synced(directory / "manifest.json", manifest_text(manifest))
    return out


def write_sequences(
    directory: Path, sources: list[tuple[str, Path]], min_length: int, progress: Progress | None
) -> tuple["_Writer", list[dict[str, Any]]]:
    """tokens.bin and soft_masked.npy in `directory`, of all records of the source files in order.

    `sources`: (prefix, path); every name in a file is written with its prefix. Returns the writer, which knows the
    sequences, their number and the checksum, and the manifest's list of sources. Raises UserError.
    """
    sizes = [check_source(path) for _, path in sources]

    def report(before: int) -> Callable[[int], None]:
        return (lambda read: None) if progress is None else (lambda read: progress(before + read, sum(sizes)))

    facts = []
    with (
        open(directory / "tokens.bin", "wb", buffering=1 << 20) as tokens,
        open(directory / "soft_masked.npy", "wb", buffering=1 << 20) as runs,
    ):
        writer = _Writer(tokens, runs, min_length)
        for i, (prefix, path) in enumerate(sources):
            with SourceFile(path, report(sum(sizes[:i]))) as source:
                writer.source(path, prefix)
                parse_records(path, source.blocks(), writer)
                facts.append({"path": str(path), "sha256": source.sha256(), "bytes": source.bytes_read})
        writer.finish()
    return writer, facts


# -- the same sequence twice ---------------------------------------------------------------------------------------
def find_duplicates(
    tokens: np.ndarray, sequences: list[dict[str, Any]], table: dict[str, list[list[int]]], classes: list[int] | None = None
) -> list[tuple[int, int, str]]:
    """Pairs of identical sequences (or reverse complements) that lie in two classes or not in the same one split, and which of
    the two it is. Those shorter than 32 bases say nothing."""
    classes = classes or [0] * len(sequences)
    tokens = np.asarray(tokens)  # not a memmap, whose slices take as long as what is done with them
    where: dict[int, set[str]] = {}
    for split, rows in table.items():
        for index, _, _ in rows:
            where.setdefault(index, set()).add(split)
    alike: dict[tuple, list[int]] = {}  # by length and letters, which strands share: most need not be read again
    for i, sequence in enumerate(sequences):
        a, c, g, t, *others = sequence["counts"].values()
        if sequence["length"] >= 32:
            alike.setdefault((min((a, c, g, t), (t, g, c, a)), *others), []).append(i)
    first: dict[bytes, int] = {}
    found = []
    for same in alike.values():
        for i in same if len(same) > 1 else ():
            key = _fingerprint(tokens, sequences[i])
            j = first.setdefault(key, i)
            if j == i:
                continue
            here, there = where.get(i, set()), where.get(j, set())
            if classes[i] != classes[j]:
                found.append((j, i, "in two classes"))
            elif here and there and len(here | there) > 1:
                found.append((j, i, "on two sides of a split"))
    return sorted(found)


def _fingerprint(tokens: np.ndarray, sequence: dict[str, Any]) -> bytes:
    """The same for a sequence and its reverse complement."""
    start, end = sequence["offset"], sequence["offset"] + sequence["length"]
    there, back = hashlib.sha256(), hashlib.sha256()
    for at in range(start, end, 1 << 22):
        there.update(tokens[at : min(at + (1 << 22), end)])
    for at in range(end, start, -(1 << 22)):
        back.update(nucleotide.reverse_complement(tokens[max(at - (1 << 22), start) : at]))
    return min(there.digest(), back.digest())


def _list(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


# -- reading -------------------------------------------------------------------------------------------------------
def parse_records(path: Path, blocks: Iterator[bytes], writer: "_Writer") -> None:
    """Feed the records of a file to the writer: begin(header), add(piece of its lines), ..., end()."""
    first = next(blocks)
    is_genbank = first.lstrip(WHITESPACE).startswith(b"LOCUS ")
    (_parse_genbank if is_genbank else _parse_fasta)(path, itertools.chain([first], blocks), writer)
    writer.end()


def _parse_fasta(path: Path, blocks: Iterable[bytes], writer: "_Writer") -> None:
    """Lines end in LF, CRLF or CR; blanks and empty lines mean nothing."""
    header: bytearray | None = None  # the header being read, if a block ended in it
    is_started, at_line_start = False, True
    for block in blocks:
        at = 0
        while at < len(block):
            if header is not None:
                end = _line_end(block, at)
                if len(header) < MAX_HEADER:
                    header += block[at : min(end, at + MAX_HEADER)]
                if end < len(block):
                    writer.begin(bytes(header))
                    header, at_line_start = None, True
                at = end + 1
                continue
            mark = block.find(b">", at)
            end = mark if mark >= 0 else len(block)
            if end > at:
                piece = block if end - at == len(block) else block[at:end]
                if is_started:
                    writer.add(piece)
                elif piece.strip(WHITESPACE):
                    raise _not_fasta(path, piece.lstrip(WHITESPACE))
                at_line_start = _ends_line(piece, at_line_start)
            if mark < 0:
                break
            if not at_line_start:
                raise writer.misplaced_mark()
            header, is_started, at = bytearray(), True, mark + 1
    if header is not None:
        writer.begin(bytes(header))
    if not is_started:
        raise UserError(f"{path}: no sequence, only blanks; a FASTA file holds '>name' and lines of bases")


def _line_end(block: bytes, at: int) -> int:
    """Index of the first LF or CR from `at` on, or the length of the block."""
    feed = block.find(b"\n", at)
    feed = len(block) if feed < 0 else feed
    carriage = block.find(b"\r", at, feed)
    return feed if carriage < 0 else carriage


def _ends_line(piece: bytes, before: bool) -> bool:
    """Whether what follows `piece` is the first visible character of its line."""
    i = len(piece) - 1
    while i >= 0 and piece[i] in b" \t\v\f":
        i -= 1
    return before if i < 0 else piece[i] in b"\n\r"


def _parse_genbank(path: Path, blocks: Iterable[bytes], writer: "_Writer") -> None:
    for begins, text in genbank_events(path, blocks):
        (writer.begin if begins else writer.add)(text)


def genbank_events(path: Path | str, blocks: Iterable[bytes]) -> Iterator[tuple[bool, bytes]]:
    """Records from LOCUS to //; of each, (True, its name: VERSION, or else LOCUS), then (False, bases) for the lines after ORIGIN.

    (NCBI GenBank flat file, release notes section 3.4: keywords begin in the first column, a line of the sequence is a
    number and six groups of ten bases.) Features are not read, so this takes a line at a time where Biopython would
    build the whole record.
    """
    name, is_record, is_sequence = b"", False, False
    for line in _lines(path, blocks):
        if line.startswith(b"LOCUS "):
            if is_record:
                raise UserError(f"{path}: record {_shown(name)} has no end ('//'); fetch or copy the file again")
            name, is_record = line[6:], True
        elif is_sequence:
            if line.startswith(b"//"):
                is_record = is_sequence = False
            else:
                yield False, line.lstrip(b" 0123456789").upper()
        elif line.startswith(b"VERSION ") and line[8:].strip():
            name = line[8:]
        elif line.startswith(b"ORIGIN") and is_record:
            yield True, name
            is_sequence = True
        elif line.startswith(b"//") and is_record:
            raise UserError(f"{path}: record {_shown(name)} has no sequence (ORIGIN); fetch it in full, or as FASTA")
        elif not is_record and line.strip():
            raise UserError(f"{path}: starts as GenBank, but {_shown(line)} is between two records")
    if is_record:
        raise UserError(f"{path}: record {_shown(name)} is cut short (no '//'); fetch or copy the file again")


def _shown(text: bytes) -> str:
    return repr((text.decode("utf-8", "replace").split(maxsplit=1) or [""])[0][:60])


def _lines(path: Path | str, blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        if len(rest) > MAX_HEADER:
            raise UserError(f"{path}: starts as GenBank, but has a line of more than {MAX_HEADER:,} bytes; mend it")
    yield rest


def _not_fasta(path: Path, text: bytes) -> UserError:
    start = text[:4096]
    if start.startswith(b"@"):
        return UserError(f"{path}: looks like FASTQ (it starts with '@'); turn the reads into FASTA: seqtk seq -a")
    if start.startswith(b"ID   "):
        return UserError(f"{path}: looks like EMBL; save the sequence as FASTA or GenBank")
    if any(byte < 32 and byte not in WHITESPACE or byte == 127 for byte in start):
        return UserError(f"{path}: is not a text file; give a FASTA file, plain or gzip")
    line = start.splitlines()[0][:40].decode("utf-8", "replace")
    return UserError(f"{path}: does not start with '>' but with {line!r}; a FASTA record starts with a line '>name'")


# -- writing -------------------------------------------------------------------------------------------------------
STRAY_LETTER, STRAY_BYTE = 254, 255
CODES = "ACGTUN, RYSWKMBDHVX, gaps -.*"
"""What a sequence may consist of, for messages."""


def shown_byte(byte: int) -> str:
    """A byte that does not belong in a sequence, for messages: itself, or its number if it cannot be seen."""
    return repr(chr(byte)) if 32 < byte < 127 else f"byte 0x{byte:02x}"


def strict_table() -> bytes:
    """nucleotide.ENCODE, but letters that mean nothing in a nucleotide sequence, and other bytes, stand out."""
    table = bytearray([STRAY_BYTE]) * 256
    for letter in b"ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        table[letter] = table[letter | 32] = STRAY_LETTER
    for letter in b"ACGTUNRYSWKMBDHVX":
        table[letter] = table[letter | 32] = nucleotide.ENCODE[letter]
    for sign in b"-.*":
        table[sign] = nucleotide.UNK
    return bytes(table)


STRICT = strict_table()


class _Writer:
    """Takes text piece by piece; writes tokens.bin and soft_masked.npy; keeps the counts of every record.

    Pieces are held back until there are HOLD bytes, so that many short records are worked on together, and no more than
    that is in memory. Runs of lower case go to the file as they end; one that crosses buffers (or records: the table is
    in global coordinates) stays open in `_run`.
    """

    COUNTED = ("A", "C", "G", "T", "N", "other")
    IDS = (nucleotide.A, nucleotide.C, nucleotide.G, nucleotide.T, nucleotide.N, nucleotide.UNK)
    HOLD = 1 << 19

    def __init__(self, tokens: BinaryIO, runs: BinaryIO, min_length: int):
        self._tokens, self._runs = tokens, runs
        self._write_runs_header(0)
        self._runs_start = self._runs.tell()
        self.min_length = min_length
        self.sha256 = hashlib.sha256()
        self.total = self.skipped = self.skipped_bases = 0  # total: bases written
        self.sequences: list[dict[str, Any]] = []
        self._seen: dict[str, int] = {}  # name -> source, of every record met
        self._paths: list[Path] = []
        self._run = -1  # start of the run of lower case that is open, or -1
        self._held: list[tuple[bytes, dict[str, Any], int]] = []  # (letters, their record, where in it they begin)
        self._held_size = 0
        self._record: dict[str, Any] | None = None  # the record that is open: its entry in the manifest
        self._record_first = 0  # index of its first piece in `_held`
        self._before: tuple | None = None  # how to undo what has been written of it

    def source(self, path: Path, prefix: str = "") -> None:
        """Records come from this file now; their names get the prefix."""
        self._paths.append(path)
        self._prefix = prefix

    def begin(self, header: bytes) -> None:
        """Start the record with this header (without its '>')."""
        self.end()
        words = header.decode("utf-8", "replace").split(maxsplit=1)
        path = self._paths[-1]
        if not words:
            raise UserError(f"{path}: record {len(self._seen) + 1:,} has no name; write a word after its '>'")
        name, source = self._prefix + words[0], len(self._paths) - 1
        if name in self._seen:
            other = self._seen[name]
            where = f"twice in {path}" if other == source else f"in {self._paths[other]} and {path}"
            raise UserError(f"sequence {name[:60]!r} is {where}; names must differ: rename one")
        self._seen[name] = source
        self._record = {
            "name": name,
            "source": source,
            "offset": self.total + self._held_size,
            "length": 0,
            "counts": dict.fromkeys(self.COUNTED, 0),
            "soft_masked": 0,
        }
        self._record_first, self._before = len(self._held), None

    def add(self, text: bytes) -> None:
        """Append a piece of the record's lines, in any case, with any white space."""
        letters = text.translate(None, WHITESPACE)
        if not letters:
            return
        self._held.append((letters, self._record, self._record["length"]))
        self._record["length"] += len(letters)
        self._held_size += len(letters)
        if self._held_size >= self.HOLD:
            self._flush()

    def misplaced_mark(self) -> UserError:
        return UserError(
            f"{self._paths[-1]}: record {self._record['name'][:60]!r} has a '>' within a line of bases, after base "
            f"{self._record['length']:,}; start a new line before each '>'"
        )

    def end(self) -> None:
        """Finish the record that is open, if any."""
        record, self._record = self._record, None
        if record is None:
            return
        if record["length"] >= self.min_length:
            self.sequences.append(record)
            return
        self.skipped += 1
        self.skipped_bases += record["length"]
        self._held_size -= sum(len(letters) for letters, _, _ in self._held[self._record_first :])
        del self._held[self._record_first :]
        if self._before is not None:
            self.total, self.sha256, self._run, at = self._before
            self._tokens.seek(self.total)
            self._tokens.truncate()
            self._runs.seek(at)
            self._runs.truncate()

    def finish(self) -> None:
        """Write what is still held back, and to the disk."""
        self.end()
        self._flush()
        if self._run >= 0:
            self._write_runs(np.array([self._run, self.total]))
        count = (self._runs.tell() - self._runs_start) // 16
        self._runs.seek(0)
        self._write_runs_header(count)
        assert self._runs.tell() == self._runs_start, "the header of soft_masked.npy changed its size"
        for file in (self._tokens, self._runs):
            sync(file)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of all sequences together."""
        return {
            "total": self.total,
            "counts": {key: sum(s["counts"][key] for s in self.sequences) for key in self.COUNTED},
            "soft_masked": sum(s["soft_masked"] for s in self.sequences),
            "sha256": self.sha256.hexdigest(),
            "sample_rate": None,
            "skipped": {"sequences": self.skipped, "bases": self.skipped_bases, "min_length": self.min_length},
        }

    def _flush(self) -> None:
        held, first = self._held, self._record_first
        if self._record is not None and self._record["length"] < self.min_length and self._before is None:
            self._write(held[:first])  # so that the record can still be undone
            self._before = (self.total, self.sha256.copy(), self._run, self._runs.tell())
            self._write(held[first:])
        else:
            self._write(held)
        self._held, self._held_size, self._record_first = [], 0, 0

    def _write(self, pieces: list[tuple[bytes, dict[str, Any], int]]) -> None:
        if not pieces:
            return
        letters = b"".join([piece for piece, _, _ in pieces])
        tokens = letters.translate(STRICT)
        counts = self._count(tokens)
        if sum(counts) != len(tokens):
            raise self._stray(pieces, letters, tokens)
        is_lower = None
        if self._run >= 0 or not letters.isupper():
            is_lower = np.frombuffer(letters, np.uint8) >= ord("a")
            self._find_runs(is_lower)
        if pieces[0][1] is pieces[-1][1]:
            self._credit(pieces[0][1], counts, 0 if is_lower is None else int(np.count_nonzero(is_lower)))
        else:  # many records: count them all at once
            number = np.repeat(np.arange(len(pieces)), [len(piece) for piece, _, _ in pieces])
            table = np.bincount(number * 16 + np.frombuffer(tokens, np.uint8), minlength=len(pieces) * 16)
            table = table.reshape(len(pieces), 16)[:, self.IDS].tolist()
            soft = np.bincount([] if is_lower is None else number[is_lower], minlength=len(pieces)).tolist()
            for (_, record, _), mine, lower in zip(pieces, table, soft):
                self._credit(record, mine, lower)
        self._tokens.write(tokens)
        self.sha256.update(tokens)
        self.total += len(tokens)

    def _credit(self, record: dict[str, Any], counts: list[int], soft: int) -> None:
        for key, count in zip(self.COUNTED, counts):
            record["counts"][key] += count
        record["soft_masked"] += soft

    def _count(self, tokens: bytes) -> list[int]:
        """How often each of IDS occurs."""
        array = np.frombuffer(tokens, np.uint8)
        # comparing and counting in pieces that stay in the cache is several times faster than bincount
        pieces = [array[at : at + (1 << 18)] for at in range(0, len(array), 1 << 18)]
        return [sum(int(np.count_nonzero(piece == token)) for piece in pieces) for token in self.IDS]

    def _find_runs(self, is_lower: np.ndarray) -> None:
        """Write the runs of True that end in this buffer; keep open one that reaches its end."""
        edges = np.flatnonzero(is_lower[1:] != is_lower[:-1]) + (self.total + 1)
        if is_lower[0] != (self._run >= 0):
            edges = np.concatenate([[self.total], edges])
        if self._run >= 0:
            edges = np.concatenate([[self._run], edges])
        self._run = int(edges[-1]) if len(edges) % 2 else -1
        self._write_runs(edges[: len(edges) // 2 * 2])

    def _write_runs(self, edges: np.ndarray) -> None:
        self._runs.write(edges.astype("<i8").tobytes())

    def _write_runs_header(self, count: int) -> None:
        # numpy pads this header so that the first number can grow in place
        np.lib.format.write_array_header_1_0(
            self._runs, {"descr": "<i8", "fortran_order": False, "shape": (count, 2)}
        )

    def _stray(self, pieces: list[tuple[bytes, dict[str, Any], int]], letters: bytes, tokens: bytes) -> UserError:
        """What to say about the first letter that has no token; `pieces` are what `letters` was joined from."""
        array = np.frombuffer(tokens, np.uint8)
        index = int(np.flatnonzero(array >= STRAY_LETTER)[0])
        starts = np.cumsum([0, *(len(piece) for piece, _, _ in pieces)])
        which = int(np.searchsorted(starts, index, side="right")) - 1
        _, record, before = pieces[which]
        same = [i for i, (_, other, _) in enumerate(pieces) if other is record]
        mine = slice(int(starts[same[0]]), int(starts[same[-1] + 1]))
        is_stray = array[mine] == STRAY_LETTER
        share = np.count_nonzero(is_stray) / len(is_stray)
        where = f"{self._paths[record['source']]}: record {record['name'][:60]!r}"
        if share > 0.1:
            strays = np.frombuffer(letters, np.uint8)[mine][is_stray].tobytes().decode().upper()
            return UserError(
                f"{where} looks like protein: {share:.0%} of its letters are not nucleotide codes "
                f"({' '.join(sorted(set(strays)))}); give a nucleotide FASTA"
            )
        return UserError(
            f"{where} has {shown_byte(letters[index])} at base {before + index - int(starts[which]) + 1:,}, which is no nucleotide code "
            f"({CODES}); mend it or write N there"
        )


def manifest_text(manifest: dict[str, Any]) -> str:
    """JSON with one sequence, source or interval a line: readable, and small."""

    def rows(texts: Iterable[str], indent: str) -> str:
        body = f",\n{indent} ".join(texts)
        return f"[\n{indent} {body}\n{indent}]" if body else "[]"

    lines = []
    for key, value in manifest.items():
        if key in ("sources", "sequences"):
            text = rows(map(json.dumps, value), " ")
        elif key == "splits":
            # rows of whole numbers: text made here is several times faster than a call of json.dumps for each
            texts = {name: rows((f"[{i}, {a}, {b}]" for i, a, b in table), "  ") for name, table in value.items()}
            text = "{\n" + ",\n".join(f'  "{name}": {texts[name]}' for name in texts) + "\n }"
        else:
            text = json.dumps(value)
        lines.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


# -- splits --------------------------------------------------------------------------------------------------------
def _splits_by_block(sequences: list[dict[str, Any]], block: int | None) -> tuple[Table, str]:
    """Blocks counted through all the sequences: every tenth tests, the next one validates, the rest trains."""
    lengths = np.array([s["length"] for s in sequences], np.int64)
    size = block or _default_block(int(lengths.sum()))
    counts = -(-lengths // size)
    if counts.sum() < 3:
        total = int(lengths.sum())
        if block is None or total < 3:
            raise UserError(f"{total} base{'s' * (total != 1)}: too few for a test, a validation and a training split")
        raise UserError(
            f"--block {block:,} cuts {total:,} bases into fewer than the 3 blocks that a test, a validation and a "
            f"training split need; use --block {_default_block(total):,} or leave it out"
        )
    k = np.arange(int(counts.sum()))
    index = np.repeat(np.arange(len(counts)), counts)
    start = (k - np.repeat(np.cumsum(counts) - counts, counts)) * size
    kind = np.where(k % 10 == 0, 2, np.where(k % 10 == 1, 1, 0))  # index into SPLITS: train, valid, test
    is_first = np.concatenate([[True], (kind[1:] != kind[:-1]) | (index[1:] != index[:-1])])  # neighbours are merged
    is_last = np.concatenate([is_first[1:], [True]])
    end = np.minimum(start + size, lengths[index])
    rows = np.stack([index[is_first], start[is_first], end[is_last]], axis=1)
    table: Table = {name: rows[kind[is_first] == i].tolist() for i, name in enumerate(SPLITS)}
    rule = (
        f"blocks of {size} bases, counted from 0 through all sequences: block k tests if k % 10 = 0, "
        "validates if k % 10 = 1, else trains"
    )
    return table, rule


def _default_block(total: int) -> int:
    """65,536, or less for a small genome: at least 20 blocks, a multiple of 64 if that many bases are there."""
    size = min(DEFAULT_BLOCK, total // 20)
    return max(1, size // 64 * 64 if size >= 64 else size)


def check_apart(valid: list[str], test: list[str]) -> None:
    """UserError for a name that is to validate and to test."""
    if both := sorted(set(valid) & set(test)):
        raise UserError(f"{both[0]!r} is in --valid and in --test; splits share no base: leave it out of one")


def splits_by_name(
    names: list[str], sequences: list[dict[str, Any]], valid: list[str], test: list[str], absent: str
) -> tuple[Table, str]:
    """Sequences, of these names (of several species: some may be the same), validate and test as they are listed; the others train.
    `absent` says what is wrong with a listed name that is not there."""
    known = dict.fromkeys(names)
    for option, chosen in (("valid", valid), ("test", test)):
        for name in chosen:
            if name not in known:
                raise UserError(f"--{option} {name}: {absent}; {nearest(name, known)}")
    table: Table = {name: [] for name in SPLITS}
    for i, (name, sequence) in enumerate(zip(names, sequences, strict=True)):
        split = "test" if name in test else "valid" if name in valid else "train"
        table[split].append([i, 0, sequence["length"]])
    return table, f"by sequence: valid {', '.join(valid) or 'none'}; test {', '.join(test) or 'none'}; the others train"


def _read_bed(path: Path) -> list[tuple[int, str, int, int, str]]:
    """Rows (line number, sequence name, start, end, split), checked as far as the file alone allows."""
    check_source(path, "BED file: rows of chrom start end train|valid|test")
    with SourceFile(path, lambda read: None) as source:
        text = b"".join(source.blocks())
    rows = []
    for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), start=1):
        words = line.split("\t") if "\t" in line else line.split()
        words = [word.strip() for word in words]
        if not line.strip() or line.startswith("#") or words[0] in ("track", "browser"):
            continue
        where = f"{path}: line {number}"
        if len(words) < 4:
            raise UserError(f"{where}: {len(words)} column{'s' * (len(words) != 1)}; a row is: chrom start end train|valid|test")
        name, start, end, split = words[:4]
        if not (is_count(start) and is_count(end)):
            raise UserError(f"{where}: {start[:20]!r}, {end[:20]!r}: start and end must be whole numbers, 0-based half-open")
        if split not in SPLITS:
            close = difflib.get_close_matches(split, SPLITS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{where}: split {split[:40]!r} is not one of {', '.join(SPLITS)}{hint}")
        if int(start) >= int(end):
            raise UserError(f"{where}: start {start} is not before end {end}; coordinates are 0-based half-open")
        rows.append((number, name, int(start), int(end), split))
    if not rows:
        raise UserError(f"{path}: holds no rows; a row is: chrom start end train|valid|test")
    return rows


def is_count(word: str) -> bool:
    """Whether a column of a table is a whole number that fits into 64 bits."""
    return word.isascii() and word.isdigit() and len(word) <= 18


def _splits_from_bed(
    rows: list[tuple[int, str, int, int, str]], path: Path, sequences: list[dict[str, Any]]
) -> tuple[Table, str]:
    names = {s["name"]: i for i, s in enumerate(sequences)}
    placed = []
    for number, name, start, end, split in rows:
        if name not in names:
            raise UserError(f"{path}: line {number}: no sequence {name[:60]!r} in the FASTA; {nearest(name, names)}")
        length = sequences[names[name]]["length"]
        if end > length:
            raise UserError(f"{path}: line {number}: end {end:,} is past the end of {name!r} ({length:,} bases)")
        placed.append((names[name], start, end, split, number))
    placed.sort()
    table: Table = {name: [] for name in SPLITS}
    far, overlapping = (-1, 0, "", 0), 0  # sequence, end, split, line of the row that reaches furthest yet
    for index, start, end, split, number in placed:
        overlaps = far[0] == index and far[1] > start
        if overlaps and far[2] != split:
            lines = sorted((far[3], number))
            raise UserError(
                f"{path}: lines {lines[0]} and {lines[1]} overlap in {sequences[index]['name']!r} and are of two splits, "
                f"{far[2]} and {split}; every base may be in one split only"
            )
        overlapping += overlaps
        last = table[split][-1] if table[split] else None
        if last and last[0] == index and last[2] >= start:
            last[2] = max(last[2], end)
        else:
            table[split].append([index, start, end])
        if index != far[0] or end > far[1]:
            far = (index, end, split, number)
    met = f", {overlapping} of them over others of their split" if overlapping else ""
    return table, f"BED file {path.name}, {len(rows)} rows{met}"

