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
    rows = np.arange(len(first))
    neighbours = np.concatenate([_lowest(first), _lowest(second)])
    return _lowest(components(len(first), np.concatenate([rows, rows]), neighbours))


def components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n) int64: connected components of a graph of n nodes with edges a - b."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    return connected_components(coo_array((np.ones(len(a), bool), (a, b)), shape=(n, n)), directed=False)[1].astype(np.int64)


def _lowest(number: np.ndarray) -> np.ndarray:
    """(n) int64: the lowest row with the same number, of each row."""
    _, row, inverse = np.unique(number, return_index=True, return_inverse=True)
    return row[inverse]


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
