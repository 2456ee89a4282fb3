"""Markov models of DNA, order 0 to 12: the baselines that every language model here is measured against.

An order-k model predicts a base from the k bases before it by counting:

    p(b | context) = (n(context b) + a) / (n(context) + 4 a)

with one pseudo-count `a` per order, chosen on the validation split. Contexts are made of A, C, G, T only and never reach
over the border of a split's interval: where fewer than k such bases come before a base, the longest clean context there is
decides, with that lower order's counts and pseudo-count. Fitting on both strands counts every (k+1)-mer and its reverse
complement.

A masked language model sees what comes after a base too, so beside it stand models of the k bases on either side, k up to half
of the highest order, by the same counts: those of (2k+1)-mers with b in the middle. They see no more than the model does: a base
that is masked ends a context as a border does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from seqlab.dataset import TokenStore
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide

MAX_ORDER = 12  # 4^13 counts: 256 MB
PSEUDO_COUNTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_DEFAULT_PSEUDO_COUNT = 1.0
_SELECTION_POSITIONS = 500_000  # of the validation split, to choose the pseudo-counts
_CHUNK = 1 << 21
_COUNTER = np.uint32  # of the tables of order 10 and more; the smaller ones, whose counts are larger, have int64

# Codes of k-mers: A C G T = 0 1 2 3, the last base is the least significant digit in base 4; so the codes of an order-k
# table are context * 4 + base, and dropping the most significant digit drops the farthest base of the context.
Hidden = Callable[[np.ndarray], np.ndarray]
"""Global positions (n) -> which of them are masked (n) bool."""

_BREAK = 4  # anything but a base, and the border of an interval
_DIGIT = nucleotide.DIGITS


@dataclass(frozen=True)
class MarkovScore:
    """Of one order on one set of bases: bits per base, and the share of bases that were the likeliest one."""

    bits: float
    accuracy: float
    bases: int


class MarkovModels:
    """Fitted models of order 0 to max_order.

    counts[k]: (4^(k+1),) how often each (k+1)-mer was seen, by code; pseudo_counts[k]: the `a` of order k; side_pseudo_counts[k]:
    that of k bases on either side.
    """

    def __init__(self, counts: list[np.ndarray], pseudo_counts: list[float] | None = None):
        self.counts = counts
        self.pseudo_counts = pseudo_counts or [_DEFAULT_PSEUDO_COUNT] * len(counts)
        self.max_order = len(counts) - 1
        self.side_pseudo_counts = [_DEFAULT_PSEUDO_COUNT] * (self.max_order // 2 + 1)

    def score_positions(self, store: TokenStore, positions: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Score the bases at global `positions` (n,), in any order: {order: (bits (n,) float64, hit (n,) bool)}.

        bits is -log2 of the probability of the base that is there, hit whether it was the likeliest (the first in A C G
        T of equals). Raises ValueError for a position outside the store or that holds no A, C, G or T.
        """
        return self._score(store, positions, self.pseudo_counts, self._seen)

    def score_both_sides(self, store: TokenStore, positions: np.ndarray, hidden: Hidden) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """`score_positions` of the models of k bases on either side, k = 1 .. max_order / 2. Where fewer than k bases that are not
        `hidden` lie on both sides, as many as do decide."""
        found = self._score(store, positions, self.side_pseudo_counts, _both_sides(self, hidden))
        return {k: scores for k, scores in found.items() if k}

    def _score(self, store: TokenStore, positions, pseudo_counts: list[float], seen_of) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        positions = np.asarray(positions, np.int64).reshape(-1)
        if len(positions) and not (0 <= positions.min() and positions.max() < store.total):
            raise ValueError(f"positions must lie in 0 .. {store.total - 1}, got {positions.min()} .. {positions.max()}")
        orders = range(len(pseudo_counts))
        bits = {k: np.empty(len(positions)) for k in orders}
        hits = {k: np.empty(len(positions), bool) for k in orders}
        borders = _borders(store)
        for at in range(0, len(positions), _CHUNK):
            part = slice(at, at + _CHUNK)
            for k, rows, seen, base in seen_of(store, positions[part], borders):
                if k:  # rows whose context is too short keep the lower order's prediction
                    bits[k][part], hits[k][part] = bits[k - 1][part], hits[k - 1][part]
                a = pseudo_counts[k]
                of_base = seen[np.arange(len(base)), base]
                bits[k][part][rows] = np.log2(seen.sum(1) + 4 * a) - np.log2(of_base + a)
                hits[k][part][rows] = seen.argmax(1) == base
        return {k: (bits[k], hits[k]) for k in orders}

    def score(self, store: TokenStore, split: str, *, soft_masked: bool | None = None) -> dict[int, MarkovScore]:
        """Score every A, C, G, T of a split; with `soft_masked` only those that are soft-masked (True) or are not
        (False). Orders map to MarkovScore; bases = 0 and bits = nan where there is nothing to score. Memory is bounded."""
        orders = range(self.max_order + 1)
        total, right, bases = dict.fromkeys(orders, 0.0), dict.fromkeys(orders, 0), 0
        for positions in _positions(store, split, soft_masked):
            bases += len(positions)
            for k, (bits, hit) in self.score_positions(store, positions).items():
                total[k] += float(bits.sum())
                right[k] += int(hit.sum())
        return {
            k: MarkovScore(total[k] / bases if bases else np.nan, right[k] / bases if bases else np.nan, bases)
            for k in orders
        }

    def _seen(
        self, store: TokenStore, positions: np.ndarray, borders: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray | slice, np.ndarray, np.ndarray]]:
        """For each order k: (k, which positions have a clean context of k bases, how often each base was seen after that
        context (rows 4), the base that is there (rows,))."""
        base = _bases(store, positions)
        start = borders[np.searchsorted(borders, positions, side="right") - 1]
        rows: np.ndarray | slice = slice(None)
        context = np.zeros(len(positions), np.int64)
        for k in range(self.max_order + 1):
            if k:
                at = positions - k
                inside = at >= start
                digit = _DIGIT[store.tokens[np.where(inside, at, 0)]]
                keep = inside & (digit != _BREAK)
                if not keep.all():
                    rows = np.flatnonzero(keep) if isinstance(rows, slice) else rows[keep]
                    positions, start, base = positions[keep], start[keep], base[keep]
                    context, digit = context[keep], digit[keep]
                context = context + (digit.astype(np.int64) << (2 * (k - 1)))
            yield k, rows, self.counts[k].reshape(-1, 4)[context].astype(np.int64), base


def _bases(store: TokenStore, positions: np.ndarray) -> np.ndarray:
    """The bases at positions (n), A C G T = 0 1 2 3, int64. Raises ValueError for anything else."""
    base = _DIGIT[store.tokens[positions]].astype(np.int64)
    if (base == _BREAK).any():
        bad = positions[base == _BREAK][0]
        raise ValueError(f"position {bad} ({':'.join(map(str, store.locate(int(bad))))}) holds no A, C, G or T")
    return base


def _both_sides(models: MarkovModels, hidden: Hidden):
    """What `MarkovModels._seen` is to contexts before a base, for contexts on both sides of it."""

    def seen_of(store: TokenStore, positions: np.ndarray, borders: np.ndarray):
        base, each = _bases(store, positions), np.arange(4)
        after = np.searchsorted(borders, positions, side="right")
        start, end = borders[after - 1], np.append(borders, store.total)[after]
        rows: np.ndarray | slice = slice(None)
        left, right = np.zeros(len(positions), np.int64), np.zeros(len(positions), np.int64)
        for k in range(len(models.side_pseudo_counts)):
            if k:
                keep = (positions - k >= start) & (positions + k < end)
                digits = []
                for at in (positions - k, positions + k):
                    at = np.where(keep, at, positions)
                    digits.append(_DIGIT[store.tokens[at]].astype(np.int64))
                    keep &= (digits[-1] != _BREAK) & ~(hidden(at) & (at != positions))
                rows = np.flatnonzero(keep) if isinstance(rows, slice) else rows[keep]
                positions, start, end, base = positions[keep], start[keep], end[keep], base[keep]
                left = left[keep] + (digits[0][keep] << (2 * (k - 1)))
                right = right[keep] * 4 + digits[1][keep]
            code = ((left[:, None] * 4 + each) << (2 * k)) + right[:, None]
            yield k, rows, models.counts[2 * k][code].astype(np.int64), base

    return seen_of


def fit(
    store: TokenStore, split: str = "train", *, max_order: int = MAX_ORDER, both_strands: bool = True, hidden: Hidden | None = None
) -> MarkovModels:
    """Count a split, once; choose each order's pseudo-count among PSEUDO_COUNTS on the validation split (at most 500,000
    of its bases, evenly spread), or use 1 if there is none; with `hidden` also those of contexts on both sides. Raises UserError
    for a split without any A, C, G or T."""
    if not 0 <= max_order <= MAX_ORDER:
        raise ValueError(f"max_order must lie in 0 .. {MAX_ORDER}, got {max_order}")
    models = MarkovModels(_count(store, split, max_order, both_strands))
    if not models.counts[0].any():
        raise UserError(f"{store.directory}: the {split} split holds no A, C, G or T; prepare other splits")
    if split != "valid":
        models.pseudo_counts = _choose_pseudo_counts(store, models.pseudo_counts, models._seen)
        if hidden is not None:
            models.side_pseudo_counts = _choose_pseudo_counts(store, models.side_pseudo_counts, _both_sides(models, hidden))
    return models


def _choose_pseudo_counts(store: TokenStore, default: list[float], seen_of) -> list[float]:
    intervals = store.intervals("valid")
    ends = np.cumsum(intervals[:, 1] - intervals[:, 0])
    if not len(ends):
        return default
    # evenly spread over the split, then only the bases
    number = np.unique(np.linspace(0, ends[-1] - 1, min(int(ends[-1]), _SELECTION_POSITIONS)).astype(np.int64))
    index = np.searchsorted(ends, number, side="right")
    positions = intervals[index, 1] - (ends[index] - number)
    positions = positions[_DIGIT[store.tokens[positions]] != _BREAK]
    if not len(positions):
        return default
    chosen = []
    for _, _, seen, base in seen_of(store, positions, _borders(store)):
        of_base, total = seen[np.arange(len(base)), base], seen.sum(1)
        cost = [float((np.log2(total + 4 * a) - np.log2(of_base + a)).sum()) for a in PSEUDO_COUNTS]
        chosen.append(PSEUDO_COUNTS[int(np.argmin(cost))] if len(base) else _DEFAULT_PSEUDO_COUNT)
    return chosen


def _borders(store: TokenStore) -> np.ndarray:
    """Sorted global positions that no context reaches over: starts of sequences, starts and ends of all intervals."""
    splits = [store.intervals(split).reshape(-1) for split in store.manifest["splits"]]
    return np.unique(np.concatenate([store.offsets, *splits]))


def _positions(store: TokenStore, split: str, soft_masked: bool | None) -> Iterator[np.ndarray]:
    """Global positions of the split's bases, in order, in pieces."""
    held, size = [], 0
    for start, end in store.intervals(split).tolist():
        for at in range(start, end, _CHUNK):
            stop = min(at + _CHUNK, end)
            keep = _DIGIT[store.tokens[at:stop]] != _BREAK
            if soft_masked is not None:
                keep &= store.soft_mask(at, stop) == soft_masked
            held.append(np.flatnonzero(keep) + at)
            size += len(held[-1])
            if size >= _CHUNK:  # many short intervals go together
                yield np.concatenate(held)
                held, size = [], 0
    if size:
        yield np.concatenate(held)


# -- counting ------------------------------------------------------------------------------------------------------
def _count(store: TokenStore, split: str, max_order: int, both_strands: bool) -> list[np.ndarray]:
    """Counts of the clean (k+1)-mers of a split, k = 0 .. max_order: one pass.

    The longest k-mers are counted at every position whose context is clean over its full length. A shorter context
    occurs there too, as the end of the longer one: those counts are sums. What is left are the positions shortly after a
    border or an N: `short[k]` counts those whose clean context is exactly k long.
    """
    top = np.zeros(4 ** (max_order + 1), _COUNTER if max_order >= 10 else np.int64)
    short = [np.zeros(4 ** (k + 1), np.int64) for k in range(max_order)]
    counted = 0
    for digits in _chunks(store, split, max_order):  # each begins with max_order digits of the chunk before
        codes, is_clean = _codes(digits, max_order)
        codes = codes[is_clean]
        np.add.at(top, codes, top.dtype.type(1))  # keeps to 4 bytes a count, where bincount would need 8 more
        counted += len(codes)
        _count_short(digits, max_order, short)
    too_many = UserError(f"{store.directory}: one 11-mer occurs more than 2^31 times; use an order of 9 or less")
    limit = np.iinfo(_COUNTER).max // (2 if both_strands else 1)  # the other strand may double a count
    if int(top.sum(dtype=np.uint64)) != counted or (max_order >= 10 and int(top.max()) > limit):
        raise too_many  # a counter went round, or may yet
    counts = [top]
    for k in reversed(range(max_order)):
        longer = counts[0].reshape(4, -1)
        lower = longer[0].astype(np.int64)
        for row in longer[1:]:
            lower += row
        lower += short[k]
        if k >= 10:
            if int(lower.max()) > limit:
                raise too_many
            lower = lower.astype(_COUNTER)
        counts.insert(0, lower)
    if both_strands:
        for k, table in enumerate(counts):
            _add_other_strand(table, k + 1)
    return counts


def _chunks(store: TokenStore, split: str, overlap: int) -> Iterator[np.ndarray]:
    """The split as digits, a break between intervals, in chunks that begin with the last `overlap` of the one before."""
    carry = np.full(overlap, _BREAK, np.uint8)
    held, size = [carry], 0

    def pieces() -> Iterator[np.ndarray]:
        for start, end in store.intervals(split).tolist():
            for at in range(start, end, _CHUNK):
                yield _DIGIT[store.tokens[at : min(at + _CHUNK, end)]]
            yield np.full(1, _BREAK, np.uint8)

    for piece in pieces():
        held.append(piece)
        size += len(piece)
        if size >= _CHUNK:
            chunk = np.concatenate(held)
            yield chunk
            held, size = [chunk[len(chunk) - overlap :]], 0
    if size:
        yield np.concatenate(held)


def _codes(digits: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the (order+1)-mers that end at digits[order:], and which of them hold no break."""
    length = order + 1
    code, have = digits.astype(np.int64) & 3, 1  # code[i] is of the `have` digits that end at digit i + have - 1
    while have < length:  # doubling: 13 digits take four passes
        more = min(have, length - have)
        # the farthest `more` digits of the longer k-mer are the farthest ones of the code `more` places before
        farthest = code[: len(code) - more] >> (2 * (have - more))
        code = code[more:] + (farthest << (2 * have))
        have += more
    is_clean = np.ones(len(digits), bool)
    breaks = np.flatnonzero(digits == _BREAK)
    for i in range(length):
        at = breaks + i
        is_clean[at[at < len(digits)]] = False
    return code, is_clean[order:]


def _count_short(digits: np.ndarray, order: int, short: list[np.ndarray]) -> None:
    """Add the k-mers that follow a break too closely for a full context, those that end in digits[order:]."""
    at = np.flatnonzero(digits == _BREAK)
    code = np.zeros(len(at), np.int64)
    for k in range(order):  # the (k+1)-mer that begins right after the break
        at = at + 1
        keep = at < len(digits)
        at, code = at[keep], code[keep]
        keep = digits[at] != _BREAK
        at, code = at[keep], code[keep]
        if not len(at):
            return
        code = code * 4 + digits[at]
        np.add.at(short[k], code[at >= order], 1)


def _add_other_strand(table: np.ndarray, length: int) -> None:
    """table[code] += table[code of the reverse complement], in place; only entries that are not zero are touched."""
    for start in range(0, len(table), _CHUNK):
        code = np.flatnonzero(table[start : start + _CHUNK]) + start
        other = _reverse_complement_codes(code, length)
        # each pair once: from its smaller code, or from the only one that is not zero
        keep = (code < other) | (table[other] == 0)
        palindrome = code[code == other]
        code, other = code[keep], other[keep]
        both = table[code] + table[other]
        table[code] = both
        table[other] = both
        table[palindrome] *= 2


def _reverse_complement_codes(code: np.ndarray, length: int) -> np.ndarray:
    """Codes of `length` digits, read from the other strand: digits d become 3 - d and their order is reversed."""
    x = np.uint64(4**length - 1) - code.astype(np.uint64)
    for shift, mask in ((2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        s, m = np.uint64(shift), np.uint64(mask)
        x = ((x >> s) & m) | ((x & m) << s)
    return (x >> np.uint64(32 - 2 * length)).astype(np.int64)
