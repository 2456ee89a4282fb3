"""Which intervals of a genome share bases: they must not lie on both sides of a split.

An interval is (chrom, start, end), 0-based half-open; strands are the same bases.
"""

from collections.abc import Sequence

import numpy as np

Interval = tuple[str, int, int]


def chains(places: Sequence[Interval]) -> np.ndarray:
    """(n) int64: a number for each interval, the same for two that overlap, or that a chain of overlapping ones joins."""
    chain, number, chrom, reach = np.empty(len(places), np.int64), -1, None, 0
    for i in sorted(range(len(places)), key=places.__getitem__):
        its_chrom, start, end = places[i]
        if its_chrom != chrom or start >= reach:
            number, chrom, reach = number + 1, its_chrom, end
        reach = max(reach, end)
        chain[i] = number
    return chain


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n) int64: the components of rows that agree in `first` (n) or in `second` (n), numbered by their lowest row."""
    _, first = np.unique(first, return_inverse=True)
    _, second = np.unique(second, return_inverse=True)
    group = np.arange(len(first))
    while True:
        lowest = group
        for same in (first, second):
            least = np.full(same.max(initial=-1) + 1, len(group))
            np.minimum.at(least, same, lowest)
            lowest = least[same]
        if np.array_equal(lowest, group):
            return group
        group = lowest


def sharing(places: Sequence[Interval], others: Sequence[Interval]) -> np.ndarray:
    """(n) bool: which of `places` share a base with one of `others`."""
    shares = np.zeros(len(places), bool)
    rows: dict[str, list[int]] = {}
    for i, (chrom, _, _) in enumerate(places):
        rows.setdefault(chrom, []).append(i)
    theirs: dict[str, list[tuple[int, int]]] = {}
    for chrom, start, end in others:
        theirs.setdefault(chrom, []).append((start, end))
    for chrom, found in theirs.items():
        if chrom in rows:
            start, end = np.array(sorted(found)).T
            reach = np.maximum.accumulate(end)
            mine = np.array([places[i][1:] for i in rows[chrom]])
            before = np.searchsorted(start, mine[:, 1], side="left")  # of theirs, those that start before mine ends
            shares[rows[chrom]] = (before > 0) & (reach[np.maximum(before - 1, 0)] > mine[:, 0])
    return shares
