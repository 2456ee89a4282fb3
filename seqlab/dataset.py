"""Prepared datasets: a memory-mapped stream of tokens, its splits, and windows drawn from them.

A dataset is a directory that `data_prep` writes (tokens.bin, soft_masked.npy, manifest.json; the manifest's keys are
listed in `TokenStore`). Two coordinate systems, both 0-based half-open:

    sequence coordinates   the manifest's splits: [sequence index, start, end]
    global coordinates     everything else here: positions in tokens.bin, where sequences lie end to end

Windows for training are a pure function of (seed, step): nothing is remembered between batches, so a resumed run, or one
on another number of ranks, sees the windows that an uninterrupted one would have seen.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from seqlab.errors import UserError
from seqlab.tokenizers.nucleotide import BASES, COMPLEMENT, N

FORMAT, VERSION = "seqlab-dataset", 1
SPLITS = ("train", "valid", "test")


def read_manifest(directory: Path, writer: str) -> tuple[dict, str]:
    """(manifest, sha256 of its bytes) of a dataset directory of any kind; `writer`, the command that makes such a directory, serves
    the messages. Raises UserError for what is no dataset, or a damaged one."""
    path = directory / "manifest.json"
    if not directory.exists():
        raise UserError(f"{directory}: no such dataset; give a directory that `{writer}` wrote")
    if not path.is_file():
        raise UserError(f"{directory}: holds no manifest.json; give a directory that `{writer}` wrote")
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged (not valid JSON); prepare the dataset again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a seqlab dataset; give a directory that `{writer}` wrote")
    return manifest, hashlib.sha256(raw).hexdigest()


class TokenStore:
    """A dataset directory, opened for reading. Picklable: a worker process opens the directory again.

    directory: where it lies
    manifest: manifest.json as a dictionary: format, version, kind ("dna", ...), tokenizer, vocab, sources, sequences
        (name, source, offset, length, ...), splits, split_rule, counts, soft_masked, total, sample_rate, sha256
    tokens: (total,) uint8, read-only, memory-mapped
    offsets, lengths: (sequences,) int64, where each sequence lies in `tokens`
    hash: sha256 of manifest.json, which holds the sha256 of the tokens: the identity of the dataset
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], manifest_hash: str):
        self.directory, self.manifest, self.hash = directory, manifest, manifest_hash
        try:
            self._read()
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{directory}: damaged dataset (manifest.json: {what}); prepare it again") from None

    @classmethod
    def open(cls, directory: Path | str) -> "TokenStore":
        """Open and check a dataset; the cost does not depend on the number of tokens (see `verify`). Raises UserError."""
        directory = Path(directory)
        manifest, digest = read_manifest(directory, "seqlab prep")
        path = directory / "manifest.json"
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{path}: dataset version {manifest.get('version')!r}, this program reads {VERSION}; prepare it again"
            )
        if manifest.get("kind") == "labelled":
            raise UserError(f"{directory}: holds labelled sequences; those are for `seqlab train classify --data`")
        return cls(directory, manifest, digest)

    def __reduce__(self):
        return TokenStore.open, (self.directory,)

    # -- opening ---------------------------------------------------------------------------------------------------
    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.directory}: damaged dataset ({what}); prepare it again")

    def _read(self) -> None:
        manifest = self.manifest
        self.kind: str = manifest["kind"]
        self.total = int(manifest["total"])
        path = self.directory / "tokens.bin"
        size = path.stat().st_size if path.is_file() else None
        if size != self.total or self.total < 1:
            seen = "missing" if size is None else f"{size:,} bytes"
            raise self._damaged(f"tokens.bin is {seen}, the manifest says {self.total:,}")
        # a plain ndarray over the map: slicing numpy's memmap subclass costs some microseconds each time
        self.tokens = np.asarray(np.memmap(path, np.uint8, "r"))

        sequences = manifest["sequences"]
        self.names = [str(s["name"]) for s in sequences]
        self.offsets = np.array([s["offset"] for s in sequences], np.int64)
        self.lengths = np.array([s["length"] for s in sequences], np.int64)
        ends = np.cumsum(self.lengths)
        if (self.lengths < 0).any() or ends[-1] != self.total or (self.offsets != ends - self.lengths).any():
            raise self._damaged("the sequences do not lie end to end in tokens.bin")
        self._intervals = {name: self._split(name, rows) for name, rows in manifest["splits"].items()}
        used = np.concatenate([np.empty((0, 2), np.int64), *self._intervals.values()])
        used = used[np.argsort(used[:, 0], kind="stable")]
        if (used[1:, 0] < used[:-1, 1]).any():
            raise self._damaged("two splits share bases")
        self.soft_masked = self._read_soft_masked()

    def _split(self, name: str, rows: list) -> np.ndarray:
        """Manifest rows [sequence, start, end] -> global intervals (k 2), neighbours in one sequence merged."""
        table = np.array(rows, np.int64).reshape(-1, 3)
        index, start, end = table.T
        if len(table) and (index.min() < 0 or index.max() >= len(self.offsets)):
            raise self._damaged(f"split {name} names a sequence that does not exist")
        if (start < 0).any() or (start >= end).any() or (end > self.lengths[index]).any():
            raise self._damaged(f"split {name} has an interval outside its sequence")
        start, end = start + self.offsets[index], end + self.offsets[index]
        if (start[1:] < end[:-1]).any():
            raise self._damaged(f"the intervals of split {name} overlap or are not sorted")
        is_new = np.ones(len(table), bool)
        is_new[1:] = (start[1:] != end[:-1]) | (index[1:] != index[:-1])
        is_last = np.ones(len(table), bool)
        is_last[:-1] = is_new[1:]
        return np.stack([start[is_new], end[is_last]], axis=1)

    def _read_soft_masked(self) -> np.ndarray:
        path = self.directory / "soft_masked.npy"
        if not path.is_file():
            if self.manifest.get("soft_masked"):
                raise self._damaged("soft_masked.npy is missing")
            return np.empty((0, 2), np.int64)
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            raise self._damaged(f"soft_masked.npy: {str(error).splitlines()[0]}") from None
        if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != 2:
            raise self._damaged(f"soft_masked.npy holds {table.dtype} {table.shape}, expected int64 (k, 2)")
        table = np.ascontiguousarray(table)
        start, end = table.T
        is_sorted = (start < end).all() and (end[:-1] <= start[1:]).all()
        if len(table) and not (is_sorted and start[0] >= 0 and end[-1] <= self.total):
            raise self._damaged("the intervals of soft_masked.npy overlap, are unsorted or lie outside")
        return table

    def verify(self) -> None:
        """Read every token and compare with the manifest's sha256 (about 1 GB/s). Raises UserError."""
        digest = hashlib.sha256()
        for at in range(0, self.total, 1 << 24):
            digest.update(self.tokens[at : at + (1 << 24)])
        if digest.hexdigest() != self.manifest.get("sha256"):
            raise self._damaged("tokens.bin does not have the sha256 that the manifest says")

    # -- reading ---------------------------------------------------------------------------------------------------
    def intervals(self, split: str) -> np.ndarray:
        """(k 2) int64: the split's intervals in global coordinates, sorted, disjoint, each within one sequence.

        A split that the dataset lacks is empty; raises ValueError for a name that no dataset has.
        """
        if split in self._intervals:
            return self._intervals[split]
        if split in SPLITS:
            return np.empty((0, 2), np.int64)
        raise UserError(f"{split!r}: no such split; choose one of {', '.join(self._intervals) or ', '.join(SPLITS)}")

    def has_bases(self, split: str, soft_masked: bool = True) -> bool:
        """Whether there is any A, C, G or T in a split of DNA (soft_masked False: one that is not soft-masked); reads no further
        than the first."""
        for start, end in self.intervals(split).tolist():
            for at in range(start, end, 1 << 20):
                stop = min(at + (1 << 20), end)
                found = np.isin(self.tokens[at:stop], BASES)
                if (found if soft_masked else found & ~self.soft_mask(at, stop)).any():
                    return True
        return False

    def soft_mask(self, start: int, end: int) -> np.ndarray:
        """(end - start,) bool: which tokens of a global interval are soft-masked (lower case in the source)."""
        if not 0 <= start <= end <= self.total:
            raise ValueError(f"interval {start}..{end} is outside the dataset, 0..{self.total}")
        return self.soft_masks(np.array([start]), end - start)[0]

    def soft_masks(self, starts: np.ndarray, size: int) -> np.ndarray:
        """(b, size) bool: `soft_mask` of b stretches of one size, all at once."""
        edges = self.soft_masked.reshape(-1)  # start, end, start, end, ...: never decreasing
        first = np.searchsorted(edges, starts, side="right") // 2  # the first run that ends after the stretch begins
        last = (np.searchsorted(edges, starts + size, side="left") + 1) // 2  # the first that begins after it ends
        count = np.maximum(last - first, 0)
        row = np.repeat(np.arange(len(starts)), count)
        run = np.arange(len(row)) + np.repeat(first - (np.cumsum(count) - count), count)
        # +1 where a run starts, -1 where it ends; runs are disjoint, so no place is the start (or the end) of two
        step = np.zeros((len(starts), size + 1), np.int8)
        step[row, np.maximum(self.soft_masked[run, 0] - starts[row], 0)] += 1
        step[row, np.minimum(self.soft_masked[run, 1] - starts[row], size)] -= 1
        return np.cumsum(step, axis=1, dtype=np.int8, out=step).view(bool)[:, :-1]

    def locate(self, position: int) -> tuple[str, int]:
        """Global position -> (sequence name, 0-based position in it)."""
        if not 0 <= position < self.total:
            raise ValueError(f"position {position} is outside the dataset, 0..{self.total - 1}")
        index = int(np.searchsorted(self.offsets, position, side="right")) - 1
        return self.names[index], int(position - self.offsets[index])


def nearest(name: str, known: Iterable[str]) -> str:
    """For messages: which known name is meant, or else what there is."""
    known = list(known)
    close = difflib.get_close_matches(name, known[:10_000], n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(known) - 5:,} more" if len(known) > 5 else ""
    return f"there is {', '.join(map(repr, known[:5]))}{more}"


class WindowSampler:
    """Training windows of a split: a pure function of (seed, step), the same for any number of ranks.

        interval  |..........................................|
        epoch 0     [context ][context ][context ][context ]x      x: the extra token of the last window
        epoch 1        [context ][context ][context ][context ]x   shifted by a random slack per interval and epoch

    Every epoch cuts each interval into floor((length - extra) / context) windows and visits all of them once, in a new
    order; with `reverse_complement` each window is read from the other strand with probability 1/2. A window of
    context + extra tokens overlaps the next one by `extra` (the target of a causal model's last position). Windows never
    leave their interval; intervals too short for one window are counted in `skipped_bases`.

    `batch_size` is that of the whole step: each of `world_size` ranks gets batch_size / world_size rows of it, rank 0
    the first ones, so the number of ranks does not change what a step sees.

    Raises UserError if no interval holds a window, ValueError for impossible arguments.
    """

    def __init__(
        self,
        store: TokenStore,
        split: str,
        context: int,
        batch_size: int,
        *,
        extra: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        reverse_complement: bool = False,
        soft_mask: bool = False,
    ):
        if context < 1 or batch_size < 1 or extra < 0:
            raise ValueError(f"context {context} and batch_size {batch_size} must be 1 or more, extra {extra} 0 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0 .. world_size - 1, got rank {rank} of {world_size}")
        if batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} windows cannot be shared evenly by {world_size} ranks")
        if reverse_complement and store.manifest.get("tokenizer") != "nucleotide":
            raise ValueError(f"only DNA has a reverse complement; this dataset is {store.kind!r}")
        self.store, self.split, self.context, self.extra, self.seed = store, split, context, extra, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.reverse_complement, self.soft_mask = reverse_complement, soft_mask

        intervals = store.intervals(split)
        length = intervals[:, 1] - intervals[:, 0]
        count = np.maximum((length - extra) // context, 0)
        self.skipped_bases = int(length[count == 0].sum())
        self._starts, length, count = intervals[count > 0, 0], length[count > 0], count[count > 0]
        if not len(count):
            longest = int((intervals[:, 1] - intervals[:, 0]).max(initial=0))
            if longest <= extra:
                raise UserError(f"{store.directory}: the {split} split is empty; prepare the dataset with one")
            raise UserError(
                f"context {context:,} does not fit: the longest stretch of the {split} split of {store.directory} is "
                f"{longest:,} tokens; use a context of {longest - extra:,} or less, or prepare larger blocks (DNA: or --context whole)"
            )
        self._slack = length - extra - count * context
        self._first = np.cumsum(count) - count  # number of each interval's first window
        self.windows = int(count.sum())  # in an epoch

    def epoch(self, step: int) -> float:
        """How many times the split has been visited once when `step` begins."""
        return step * self.batch_size / self.windows

    def starts(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Of this rank's rows of a step: first token (b,) int64 in global coordinates, read in reverse (b,) bool."""
        rows = self.batch_size // self.world_size
        number = step * self.batch_size + self.rank * rows + np.arange(rows, dtype=np.int64)
        epoch, number = np.divmod(number, self.windows)
        start, reverse = np.empty(rows, np.int64), np.zeros(rows, bool)
        for e in np.unique(epoch):  # one, but for a batch that ends an epoch
            key = _mix(_mix(np.uint64(self.seed % 2**64)) ^ np.uint64(e))
            window = _permute(number[epoch == e].astype(np.uint64), self.windows, key).astype(np.int64)
            interval = np.searchsorted(self._first, window, side="right") - 1
            shift = _hash(interval, key, 1) % (self._slack[interval] + 1).astype(np.uint64)
            inside = (window - self._first[interval]) * self.context + shift.astype(np.int64)
            start[epoch == e] = self._starts[interval] + inside
            if self.reverse_complement:
                reverse[epoch == e] = (_hash(window, key, 2) >> np.uint64(63)).astype(bool)
        return start, reverse

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The windows of a step (those of this rank).

        tokens (b, context + extra) uint8; start (b,) int64, global coordinate of each window's first base on the forward
        strand; reverse (b,) bool, read from the other strand; soft_mask (b, context + extra) bool if it was asked for, in
        the order of `tokens`.
        """
        start, reverse = self.starts(step)
        size = self.context + self.extra
        source = self.store.tokens
        tokens = np.empty((len(start), size), np.uint8)
        for row, at in zip(tokens, start.tolist()):
            row[:] = source[at : at + size]
        _flip(tokens, reverse, complement=True)
        result = {"tokens": tokens, "start": start, "reverse": reverse}
        if self.soft_mask:
            soft = self.store.soft_masks(start, size)
            _flip(soft, reverse, complement=False)
            result["soft_mask"] = soft
        return result


class CoveringSampler:
    """Training windows of a split of recordings, short ones included: a pure function of (seed, step), the same for any
    number of ranks. Where `WindowSampler` draws windows of one length, these cover every token of every interval.

        interval  |................................|        2 1/2 contexts: three windows
        epoch 0   [context ][context ][ rest ]
        epoch 1   [ rest ][context ][context ]              the cuts are shifted anew in each epoch
        short     [.....]                                   an interval shorter than the context: one window, whole

    Every epoch visits all windows once, in a new order. Windows never leave their interval.

    A step holds `rows` windows: as many as make `tokens_per_step` tokens on average, a multiple of `world_size`; rank 0
    gets the first rows / world_size of them.

    Raises UserError if the split is empty.
    """

    def __init__(
        self,
        store: TokenStore,
        split: str,
        context: int,
        tokens_per_step: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if context < 1 or tokens_per_step < 1:
            raise ValueError(f"context {context} and tokens_per_step {tokens_per_step} must be 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0 .. world_size - 1, got rank {rank} of {world_size}")
        intervals = store.intervals(split)
        if not len(intervals):
            raise UserError(f"{store.directory}: the {split} split is empty; prepare the dataset with one")
        self.store, self.context, self.seed, self.rank, self.world_size = store, context, seed, rank, world_size
        self._begin = intervals[:, 0]
        self._length = intervals[:, 1] - intervals[:, 0]
        self._count = -(-self._length // context)
        self._first = np.cumsum(self._count) - self._count  # number of each interval's first window
        self.windows = int(self._count.sum())  # in an epoch
        rows = round(tokens_per_step * self.windows / int(self._length.sum()) / world_size)
        self.rows = max(1, rows) * world_size

    def epoch(self, step: int) -> float:
        """How many times the split has been visited once when `step` begins."""
        return step * self.rows / self.windows

    def bounds(self, step: int) -> np.ndarray:
        """Of this rank's rows of a step: (start, end, start of the interval), (b 3) int64 in global coordinates."""
        rows = self.rows // self.world_size
        number = step * self.rows + self.rank * rows + np.arange(rows, dtype=np.int64)
        epoch, number = np.divmod(number, self.windows)
        bounds = np.empty((rows, 3), np.int64)
        for e in np.unique(epoch):
            key = _mix(_mix(np.uint64(self.seed % 2**64)) ^ np.uint64(e))
            window = _permute(number[epoch == e].astype(np.uint64), self.windows, key).astype(np.int64)
            i = np.searchsorted(self._first, window, side="right") - 1
            slack = self._count[i] * self.context - self._length[i]
            shift = (_hash(i, key, 1) % (slack + 1).astype(np.uint64)).astype(np.int64)
            shift[self._count[i] == 1] = 0
            start = (window - self._first[i]) * self.context - shift
            end = np.minimum(start + self.context, self._length[i])
            begin = self._begin[i]
            bounds[epoch == e] = np.stack([begin + np.maximum(start, 0), begin + end, begin], axis=1)
        return bounds


class SequenceSampler:
    """Training on whole sequences: each one, from its first base to its last, is one window of its own length.

        sequence    |ACGTACGTACGTACGTACGTACGTACGTACGT|
        split         train    | valid |    train
        window      |ACGTACGTANNNNNNNCGTACGTACGTACGT|      what is not in the split is never read

    Every epoch visits each sequence that has a stretch of the split once, in a new order; with `reverse_complement` from the
    other strand with probability 1/2. `batch_size` is that of the whole step, shared by ranks as in `WindowSampler`.

    Raises UserError if the split is empty, ValueError for impossible arguments.
    """

    def __init__(
        self,
        store: TokenStore,
        split: str,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        reverse_complement: bool = False,
        soft_mask: bool = False,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"{batch_size} sequences cannot be shared evenly by {world_size} ranks")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0 .. world_size - 1, got rank {rank} of {world_size}")
        self.store, self.batch_size, self.seed, self.rank, self.world_size = store, batch_size, seed, rank, world_size
        self.reverse_complement, self.soft_mask = reverse_complement, soft_mask
        self.intervals = store.intervals(split)
        if not len(self.intervals):
            raise UserError(f"{store.directory}: the {split} split is empty; prepare the dataset with one")
        self.sequences = np.unique(np.searchsorted(store.offsets, self.intervals[:, 0], side="right") - 1)
        self.longest = int(store.lengths[self.sequences].max())

    def batch(self, step: int) -> list[dict[str, np.ndarray]]:
        """This rank's sequences of a step, each as `WindowSampler.batch` gives a window: tokens (1 l), start (1,), ..."""
        rows = self.batch_size // self.world_size
        number = step * self.batch_size + self.rank * rows + np.arange(rows, dtype=np.int64)
        epoch, number = np.divmod(number, len(self.sequences))
        return [self._window(int(e), int(n)) for e, n in zip(epoch, number)]

    def _window(self, epoch: int, number: int) -> dict[str, np.ndarray]:
        key = _mix(_mix(np.uint64(self.seed % 2**64)) ^ np.uint64(epoch))
        chosen = _permute(np.array([number], np.uint64), len(self.sequences), key).astype(np.int64)
        index = int(self.sequences[chosen[0]])
        start = int(self.store.offsets[index])
        end = start + int(self.store.lengths[index])
        tokens = np.full((1, end - start), N, np.uint8)
        for left, right in self.intervals[(self.intervals[:, 0] >= start) & (self.intervals[:, 1] <= end)].tolist():
            tokens[0, left - start : right - start] = self.store.tokens[left:right]
        reverse = np.zeros(1, bool)
        if self.reverse_complement:
            reverse = (_hash(chosen, key, 2) >> np.uint64(63)).astype(bool)
        _flip(tokens, reverse, complement=True)
        window = {"tokens": tokens, "start": np.array([start], np.int64), "reverse": reverse}
        if self.soft_mask:
            soft = self.store.soft_masks(window["start"], end - start)
            _flip(soft, reverse, complement=False)
            window["soft_mask"] = soft
        return window


def eval_windows(store: TokenStore, split: str, context: int, *, extra: int = 0) -> Iterator[tuple[int, int]]:
    """Windows (start, end), global coordinates, that score every base of a split once, in order.

    Window i of an interval covers context + extra tokens from i * context on; its first `extra` tokens are only read (a
    causal model predicts from the second on), the others are scored. The last window of an interval may be shorter. With
    extra = 1 the first base of each interval is nobody's target: nothing of the interval comes before it.
    """
    if context < 1 or extra < 0:
        raise ValueError(f"context {context} must be 1 or more, extra {extra} 0 or more")
    for start, end in store.intervals(split).tolist():
        for at in range(start, end - extra, context):
            yield at, min(at + context + extra, end)


def _flip(rows: np.ndarray, which: np.ndarray, complement: bool) -> None:
    """Reverse the chosen rows of (b l) in place, complementing nucleotide ids."""
    chosen = np.flatnonzero(which)
    per_piece = max(1, (1 << 20) // rows.shape[1])  # pieces that stay in the cache
    for i in range(0, len(chosen), per_piece):
        piece = chosen[i : i + per_piece]
        flipped = rows[piece, ::-1]
        rows[piece] = _COMPLEMENT_256[flipped] if complement else flipped


_COMPLEMENT_256 = np.arange(256, dtype=np.uint8)  # a full table: bytes index it without a range check
_COMPLEMENT_256[: len(COMPLEMENT)] = COMPLEMENT


# -- stateless randomness ------------------------------------------------------------------------------------------
def _mix(x: np.ndarray | np.uint64) -> Any:
    """A bijection of 64-bit integers that looks random: splitmix64's output function (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _hash(number: np.ndarray, key: np.uint64, stream: int) -> np.ndarray:
    """A random 64-bit integer for each number; `stream` separates uses of one key."""
    return _mix(number.astype(np.uint64) ^ _mix(key ^ np.uint64(stream)))


def _permute(number: np.ndarray, size: int, key: np.uint64) -> np.ndarray:
    """A random permutation of range(size), evaluated at `number` (uint64) alone: nothing of length `size` is stored.

    A Feistel network permutes a power of four that is at least `size`; results outside the range are permuted again
    until they fall inside ("cycle walking", Black and Rogaway 2002), less than four times on average.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = [_mix(key ^ np.uint64(16 + i)) for i in range(6)]

    def shuffle(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & low)
        return (left << half) | right

    result = shuffle(number)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = shuffle(result[outside])
        outside = outside[result[outside] >= size]
    return result
