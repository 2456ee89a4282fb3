"""Windows of a dataset whose sequences have classes: drawn at random for training, fixed for evaluation.

Training draws a class uniformly, then a place uniformly among all the places of that class where a window fits, so a
sequence counts by its length; which is the sampling of HyenaDNA's and Mamba's species experiments. A class of which no
sequence is long enough gives whole sequences, by length, padded on the right. Windows that are mostly N are drawn again.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from seqlab.dataset import TokenStore
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide


@dataclass(frozen=True)
class Windows:
    """Stretches of a dataset: global starts (n) int64, lengths (n) int64, class labels (n) int64, whether each is read from
    the other strand (n) bool."""

    start: np.ndarray
    length: np.ndarray
    label: np.ndarray
    reverse: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, part: slice | np.ndarray) -> "Windows":
        return Windows(self.start[part], self.length[part], self.label[part], self.reverse[part])

    def sequence(self, store: TokenStore, i: int) -> np.ndarray:
        """(length,) uint8 ids of window i, of the strand that it is read from."""
        tokens = store.tokens[self.start[i] : self.start[i] + self.length[i]]
        return nucleotide.reverse_complement(tokens) if self.reverse[i] else np.array(tokens)

    def tokens(self, store: TokenStore, width: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """ids (n width) uint8, padded on the right with [PAD], and the mask (n width) bool, None if nothing is padded."""
        width = int(self.length.max(initial=1)) if width is None else width
        if len(self) and (self.length == width).all():
            ids = sliding_window_view(store.tokens, width)[self.start]
            ids[self.reverse] = nucleotide.COMPLEMENT[ids[self.reverse, ::-1]]
            return ids, None
        ids = np.full((len(self), width), nucleotide.PAD, np.uint8)
        for i in range(len(self)):
            ids[i, : self.length[i]] = self.sequence(store, i)
        return ids, np.arange(width) < self.length[:, None]


class ClassWindows:
    """The windows of one split.

    max_unknown: the largest share of a window that may be anything but A, C, G, T
    Raises UserError if the dataset has no classes, or a class has nothing in this split.
    """

    def __init__(self, store: TokenStore, split: str, max_unknown: float = 0.5):
        classes = store.manifest.get("classes")
        if not classes:
            raise UserError(f"{store.directory}: has no classes; prepare it with `seqlab prep species`")
        self.store, self.split, self.max_unknown = store, split, max_unknown
        self.classes = [str(name) for name in classes]
        of_sequence = np.array([s.get("class", -1) for s in store.manifest["sequences"]], np.int64)
        if (of_sequence < 0).any() or (of_sequence >= len(classes)).any():
            raise UserError(f"{store.directory}: damaged dataset (a sequence without a class); prepare it again")
        intervals = store.intervals(split)
        of_interval = of_sequence[np.searchsorted(store.offsets, intervals[:, 0], side="right") - 1]
        self.intervals = [intervals[of_interval == c] for c in range(len(classes))]
        for name, mine in zip(self.classes, self.intervals):
            if not len(mine):
                raise UserError(f"{store.directory}: species {name} has nothing in the {split} split; prepare it again")

    def longest(self) -> int:
        """The longest window that every class has."""
        return min(int((mine[:, 1] - mine[:, 0]).max()) for mine in self.intervals)

    def sample(self, rng: np.random.Generator, rows: int, length: int, random_strand: bool = True) -> Windows:
        """`rows` random windows; a function of the generator's state alone."""
        label = rng.integers(len(self.classes), size=rows)
        start, size = np.empty(rows, np.int64), np.empty(rows, np.int64)
        todo = np.arange(rows)
        for _ in range(100):
            for c in np.unique(label[todo]):
                mine = todo[label[todo] == c]
                start[mine], size[mine] = self._places(rng, int(c), len(mine), length)
            todo = todo[~self._is_known(start[todo], size[todo])]
            if not len(todo):
                break
        else:
            name = self.classes[int(label[todo[0]])]
            raise UserError(
                f"species {name}: a hundred windows of {length:,} bases in a row are mostly N in the {self.split} split; "
                "raise data.max_unknown or leave the species out"
            )
        reverse = rng.random(rows) < 0.5 if random_strand else np.zeros(rows, bool)
        return Windows(start, size, label, reverse)

    def _places(self, rng: np.random.Generator, c: int, n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        intervals = self.intervals[c]
        sizes = intervals[:, 1] - intervals[:, 0]
        fits = sizes >= length
        if fits.any():
            intervals, room = intervals[fits], sizes[fits] - length + 1
            ends = np.cumsum(room)
            at = rng.integers(ends[-1], size=n)
            which = np.searchsorted(ends, at, side="right")
            return intervals[which, 0] + at - (ends - room)[which], np.full(n, length)
        ends = np.cumsum(sizes)
        which = np.searchsorted(ends, rng.integers(ends[-1], size=n), side="right")
        return intervals[which, 0], sizes[which]

    def _is_known(self, start: np.ndarray, size: np.ndarray) -> np.ndarray:
        known = np.empty(len(start), bool)
        for n in np.unique(size):
            windows = sliding_window_view(self.store.tokens, n)
            rows = np.flatnonzero(size == n)
            for part in np.split(rows, range(0, len(rows), max(1, (1 << 24) // int(n)))[1:]):  # 16 MB at a time
                piece = windows[start[part]]
                count = np.count_nonzero((piece >= nucleotide.A) & (piece <= nucleotide.T), axis=1)
                known[part] = (count > 0) & (count >= (1 - self.max_unknown) * n)
        return known

    def fixed(self, length: int, per_class: int) -> tuple[Windows, list[int]]:
        """At most `per_class` windows of each class, the same every time, and how many of them share no base.

        Evenly spread and side by side where the split has room for that many; else overlapping, each starting a quarter of
        its length or more after the one before. Every other window is read from the other strand. Raises UserError if a
        class has no window that long.
        """
        parts, independent = [], []
        for c, intervals in enumerate(self.intervals):
            sizes = intervals[:, 1] - intervals[:, 0]
            side_by_side = [a + np.arange(n // length) * length for a, n in zip(intervals[:, 0], sizes)]
            places = np.concatenate([np.empty(0, np.int64), *side_by_side])
            total = len(places)
            if total > 20 * per_class:  # of a large genome, a sample is looked at for N
                places = places[np.arange(20 * per_class) * total // (20 * per_class)]
            looked = len(places)
            places = places[self._is_known(places, np.full(looked, length))]
            apart = round(total * len(places) / max(1, looked))  # in the whole split
            if len(places) < per_class:
                step = max(1, length // 4)
                overlapping = [np.arange(a, b - length + 1, step) for a, b in intervals.tolist() if b - a >= length]
                places = np.concatenate([np.empty(0, np.int64), *overlapping])
                places = places[self._is_known(places, np.full(len(places), length))]
            if not len(places):
                raise UserError(
                    f"length {length:,}: species {self.classes[c]} has no such window in the {self.split} split (longest "
                    f"stretch {int(sizes.max()):,}); choose shorter ones, or prepare larger blocks"
                )
            if len(places) > per_class:
                places = places[np.arange(per_class) * len(places) // per_class]
            independent.append(min(apart, len(places)))
            parts.append((places, np.full(len(places), c), np.arange(len(places)) % 2 == 1))
        start, label, reverse = (np.concatenate(column) for column in zip(*parts))
        return Windows(start, np.full(len(start), length), label, reverse), independent
