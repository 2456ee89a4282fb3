"""VCF text: records with the alleles as token ids in 0-based coordinates, and the same lines with one more INFO value.

POS counts from 1 in a VCF; everything that leaves this file counts from 0. Plain, gzip or bgzip text; BCF is refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.files import SourceFile, check_source
from data_prep.genome import is_count
from data_prep.records import read_records, text_lines
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide

KEY = "SEQLAB"
"""The INFO field that scores are written to."""


@dataclass
class Record:
    """One line. alts: ids of each ALT allele, None for one that is no plain sequence (<DEL>, *, breakends, N)."""

    fields: list[str]
    chrom: str
    start: int  # 0-based
    ref: np.ndarray
    alts: list[np.ndarray | None]

    def line(self, scores: list[float | None]) -> str:
        """The line with INFO KEY=, a value for each ALT, `.` for one that has none; as it is where there is no ALT."""
        if not scores:
            return "\t".join(self.fields)
        values = KEY + "=" + ",".join("." if score is None else f"{score:.4f}" for score in scores)
        info = self.fields[7]
        return "\t".join([*self.fields[:7], values if info in (".", "") else f"{info};{values}", *self.fields[8:]])


def read_vcf(path: Path) -> Iterator[str | Record]:
    """Header lines as they are, then records, in order. Raises UserError, also midway, naming the line."""
    check_source(path, "VCF file, plain, gzip or bgzip")
    has_columns = False
    with SourceFile(path, lambda read: None) as source:
        for number, raw in enumerate(text_lines(source.blocks()), 1):
            if number == 1 and not raw.startswith(b"##fileformat=VCF"):
                seen = raw[:40].decode("utf-8", "replace")
                raise UserError(f"{path}: starts with {seen!r}; a VCF starts with ##fileformat=VCF (for BCF: bcftools view)")
            line = raw.decode("utf-8", "replace")
            if line.startswith("#"):
                if line.startswith(f"##INFO=<ID={KEY},"):
                    raise UserError(f"{path}: has INFO {KEY} already; give the file that was scored, or take it out: bcftools annotate -x INFO/{KEY}")
                has_columns |= line.startswith("#CHROM\t")
                yield line
            elif line.strip():
                if not has_columns:
                    raise UserError(f"{path}: line {number:,}: a record before the line of columns, #CHROM POS ID REF ALT ...")
                yield _record(path, number, line.split("\t"))
    if not has_columns:
        raise UserError(f"{path}: has no line of columns, #CHROM POS ID REF ALT QUAL FILTER INFO")


def _record(path: Path, number: int, fields: list[str]) -> Record:
    if len(fields) < 8:
        raise UserError(f"{path}: line {number:,}: {len(fields)} columns; a record has at least 8, with tabs between them")
    if not is_count(fields[1]) or int(fields[1]) < 1:
        raise UserError(f"{path}: line {number:,}: POS is {fields[1][:20]!r}, expected a number from 1 on")
    alts = [] if fields[4] in (".", "") else fields[4].split(",")
    return Record(fields, fields[0], int(fields[1]) - 1, _ids(fields[3]), [_plain(allele) for allele in alts])


def _ids(allele: str) -> np.ndarray:
    return np.array(nucleotide.encode(allele), np.uint8)


def _plain(allele: str) -> np.ndarray | None:
    return _ids(allele) if allele and not set(allele.upper()) - set("ACGT") else None


def read_genome(path: Path, names: set[str], aliases: dict[str, str] | None = None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The sequences of a FASTA that variants are on, name in the VCF -> ids (l) uint8; and what each is called in the FASTA where
    that is another name: as `aliases` say, or one that differs in what projects write differently (`plain_name`) and is the
    only one. Raises UserError where one is not there."""
    aliases = aliases or {}
    if unknown := sorted(set(aliases) - names):
        raise UserError(f"--alias {unknown[0]}={aliases[unknown[0]]}: no variant is on {unknown[0]!r}; there is {_shown(sorted(names))}")
    asked = {aliases.get(name, name) for name in names}
    alike = {plain_name(name) for name in names - set(aliases)}
    kept, seen = {}, {}
    for name, ids in read_records(path):
        if name in seen:
            raise UserError(f"{path}: sequence {name!r} is there twice; names must differ: rename one")
        seen[name] = None  # in their order
        if name in asked or plain_name(name) in alike:
            kept[name] = ids
    found, renamed = {}, {}
    for name in sorted(names):
        own = aliases.get(name, name)
        if own not in kept and name not in aliases:
            near = [other for other in kept if plain_name(other) == plain_name(name)]
            rivals = [other for other in names - {name} if other in near or plain_name(other) == plain_name(name)]
            if len(near) == 1 and not rivals:
                own = near[0]
        if own not in kept:
            raise UserError(
                f"{path}: has no sequence {own!r}, which the variants are on; it has {_shown(list(seen))}: give their genome, or "
                f"say under which name it is there: --alias {name}=NAME"
            )
        found[name] = kept[own]
        if own != name:
            renamed[name] = own
    return found, renamed


def plain_name(name: str) -> str:
    """A sequence's name without what projects write differently: chr20 is 20, MN908947.3 is MN908947, chrM is MT."""
    name = re.sub(r"^chr(?=.)|\.\d+$", "", name, flags=re.IGNORECASE)
    return "MT" if name == "M" else name


def _shown(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def mismatch(record: Record, genome: np.ndarray) -> str | None:
    """None if the genome has the record's REF where the record says, else what is there. Where the genome has an ambiguity code
    (GRCh38 does), a VCF has one of the bases that it stands for."""
    there = genome[record.start : record.start + len(record.ref)]
    if len(there) == len(record.ref) and not ((there != record.ref) & (there != nucleotide.UNK)).any():
        return None
    seen = nucleotide.decode(there[:20]) if len(there) else f"its end ({len(genome):,} bases)"
    return f"{record.chrom}:{record.start + 1} has REF {record.fields[3][:20]}, the genome has {seen} there"
