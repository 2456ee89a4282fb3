"""FASTA, FASTQ or GenBank -> one record after another, in order: for commands that use a model on whatever comes down a pipe.

Plain, gzip or bgzip; `-` is standard input. One record is in memory at a time (a byte a base), and one block of text.
FASTQ is read in its usual form of four lines a record; qualities are not used. For datasets, see `data_prep.genome`.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_prep.files import SourceFile, check_source
from data_prep.genome import CODES, STRAY_LETTER, STRICT, WHITESPACE, genbank_events, shown_byte
from seqlab.errors import UserError


def read_records(path: Path | str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, ids (l) uint8) of each record. Raises UserError, also midway: for a damaged file, for letters that no
    nucleotide sequence has, for a file without records."""
    path = Path("/dev/stdin") if str(path) == "-" else Path(path)
    shown = "standard input" if str(path) == "/dev/stdin" else str(path)
    check_source(path, "FASTA, FASTQ or GenBank file, with or without .gz")
    number = 0
    with SourceFile(path, lambda read: None) as source:
        blocks = source.blocks()
        first = next(blocks)
        while not first.strip(WHITESPACE):
            first = next(blocks, None)
            if first is None:
                raise UserError(f"{shown}: no sequence, only blanks; a FASTA file holds '>name' and lines of bases")
        first = first.lstrip(WHITESPACE)
        while len(first) < len(b"LOCUS ") and (more := next(blocks, None)) is not None:
            first += more
        texts = itertools.chain([first], blocks)
        if first.startswith(b">"):
            records = _fasta(texts)
        elif first.startswith(b"@"):
            records = _fastq(texts, shown)
        elif first.startswith(b"LOCUS "):
            records = _genbank(texts, shown)
        else:
            line = first.splitlines()[0][:40].decode("utf-8", "replace")
            raise UserError(f"{shown}: starts with {line!r}; a FASTA record starts with '>name', a FASTQ record with '@name', a GenBank record with LOCUS")
        for header, letters in records:
            number += 1
            words = header.decode("utf-8", "replace").split(maxsplit=1)
            name = words[0] if words else f"record_{number}"
            tokens = np.frombuffer(bytearray(letters.translate(STRICT, WHITESPACE)), np.uint8)
            if len(tokens) and tokens.max() >= STRAY_LETTER:
                at = int(np.flatnonzero(tokens >= STRAY_LETTER)[0])
                seen = shown_byte(letters.translate(None, WHITESPACE)[at])
                raise UserError(
                    f"{shown}: record {name[:60]!r} has {seen} at base {at + 1:,}, which is no nucleotide code ({CODES}); give "
                    "nucleotide sequences"
                )
            yield name, tokens


def _fasta(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """(header, text of the lines below it). A record starts at a '>' that begins a line."""
    header, parts, rest, at_line_start = None, [], b"", True
    for block in blocks:
        data, at = rest + block, 0
        rest = b""
        while at < len(data):
            mark = at if at_line_start and data[at : at + 1] == b">" else _next_mark(data, at)
            end = len(data) if mark < 0 else mark
            if end > at:
                parts.append(data[at:end])
                at_line_start = data[end - 1 : end] in (b"\n", b"\r")
            if mark < 0:
                break
            line = min((i for i in (data.find(b"\n", mark), data.find(b"\r", mark)) if i >= 0), default=-1)
            if line < 0:  # the header goes on in the next block
                rest, at_line_start = data[mark:], True
                break
            if header is not None:
                yield header, b"".join(parts)
            header, parts, at, at_line_start = data[mark + 1 : line], [], line + 1, True
    if rest:
        if header is not None:
            yield header, b"".join(parts)
        header, parts = rest[1:], []
    if header is not None:
        yield header, b"".join(parts)


def _next_mark(data: bytes, at: int) -> int:
    """Index of the next '>' that begins a line, or -1."""
    while (mark := data.find(b">", at)) > 0:
        if data[mark - 1] in b"\n\r":
            return mark
        at = mark + 1
    return -1


def _fastq(blocks: Iterable[bytes], shown: str) -> Iterator[tuple[bytes, bytes]]:
    lines, number = text_lines(blocks), 0
    for header in lines:
        if not header.strip():
            continue
        number += 1
        sequence, plus, quality = next(lines, None), next(lines, None), next(lines, None)
        if not header.startswith(b"@") or quality is None or not plus.startswith(b"+") or len(quality) != len(sequence):
            name = header[:60].decode("utf-8", "replace")
            raise UserError(
                f"{shown}: FASTQ record {number:,} ({name}) is not four lines of @name, bases, +, and as many qualities; mend "
                "it, or turn the reads into FASTA: seqtk seq -a"
            )
        yield header[1:], sequence


def _genbank(blocks: Iterable[bytes], shown: str) -> Iterator[tuple[bytes, bytes]]:
    header, parts = None, []
    for begins, text in genbank_events(shown, blocks):
        if not begins:
            parts.append(text)
            continue
        if header is not None:
            yield header, b"".join(parts)
        header, parts = text, []
    if header is not None:
        yield header, b"".join(parts)


def text_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of a text that comes in blocks, without their ends (LF or CRLF)."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from (line.rstrip(b"\r") for line in lines)
    if rest:
        yield rest.rstrip(b"\r")
