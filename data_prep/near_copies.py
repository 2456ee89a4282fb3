"""Sequences that are nearly the same: windows that overlap, alleles, paralogues. A split that parts them tests memory.

Two sequences are near copies if they share half or more of the 32-mers of the one that has fewer, on either strand. Of large
sets a sample of the 32-mers is looked at; sequences without any (shorter than 32 bases) are nobody's copies.
"""

from typing import NamedTuple

import numpy as np

from data_prep.intervals import components
from data_prep.kmers import KMER, placed_kmers, sampled

MOST = 4_000_000
"""32-mers that are looked at."""
SHARE = 0.5
_ALL_PAIRS = 8  # sequences with one 32-mer of which every two are compared; of more, those next to each other
_CHUNK = 1 << 18


class Sketch(NamedTuple):
    """rows (m) int64 and hashes (m) uint64: which sequence holds which 32-mer, each once, sorted by hash and row; count (n):
    how many each of the n sequences has."""

    rows: np.ndarray
    hashes: np.ndarray
    count: np.ndarray


def sketch(tokens: np.ndarray, offsets: np.ndarray) -> Sketch:
    """Of sequences that lie end to end: i is tokens[offsets[i] : offsets[i+1]]."""
    offsets, scale = np.asarray(offsets, np.int64), 1
    while int(offsets[-1]) / scale > MOST:
        scale *= 2
    rows, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for at in range(0, int(offsets[-1]) - KMER + 1, _CHUNK):
        found, start = placed_kmers(np.asarray(tokens[at : at + _CHUNK + KMER - 1]))
        chosen = sampled(found, scale)
        found, start = found[chosen], start[chosen] + at
        row = np.searchsorted(offsets, start, side="right") - 1
        within = start + KMER <= offsets[row + 1]
        rows.append(row[within])
        hashes.append(found[within])
    row, found = np.concatenate(rows), np.concatenate(hashes)
    order = np.lexsort((row, found))
    row, found = row[order], found[order]
    first = np.ones(len(row), bool)
    first[1:] = (row[1:] != row[:-1]) | (found[1:] != found[:-1])
    row, found = row[first], found[first]
    return Sketch(row, found, np.bincount(row, minlength=len(offsets) - 1))


def copied(sketch: Sketch, known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(n) bool: which of the `asked` sequences (n bool) have half or more of their 32-mers in the `known` ones (n bool), taken
    together."""
    there = np.unique(sketch.hashes[known[sketch.rows]])
    if not len(there):
        return np.zeros(len(asked), bool)
    mine = asked[sketch.rows]
    row, found = sketch.rows[mine], sketch.hashes[mine]
    hit = there[np.minimum(np.searchsorted(there, found), len(there) - 1)] == found
    return asked & (sketch.count > 0) & (np.bincount(row[hit], minlength=len(asked)) >= SHARE * sketch.count)


def families(sketch: Sketch) -> np.ndarray:
    """(n) int64: the same number for near copies, and for what a chain of near copies joins."""
    row, n = sketch.rows, len(sketch.count)
    ends = np.flatnonzero(np.append(sketch.hashes[1:] != sketch.hashes[:-1], True)) + 1 if len(row) else np.empty(0, np.int64)
    size = np.diff(ends, prepend=0)
    place = np.arange(len(row)) - np.repeat(ends - size, size)  # of each in the run of its hash
    its_size = np.repeat(size, size)
    pairs = []
    for step in range(1, _ALL_PAIRS):
        apart = (place + step < its_size) & ((step == 1) | (its_size <= _ALL_PAIRS))
        at = np.flatnonzero(apart)
        pairs.append(row[at] * n + row[at + step])
    pair, shared = np.unique(np.concatenate(pairs), return_counts=True)
    a, b = pair // n, pair % n
    near = shared >= SHARE * np.minimum(sketch.count[a], sketch.count[b])
    return components(n, a[near], b[near])
