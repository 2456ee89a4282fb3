"""Labelled datasets: sequences with a label each, memory-mapped, and how they are split.

A directory that `data_prep.labelled` writes:

    tokens.bin      one byte a base, sequences end to end
    offsets.npy     (n+1) int64, sequence i is tokens[offsets[i] : offsets[i+1]]
    labels.npy      (n) int64 class indices; (n c) uint8 for multi-label; (n) float64 for regression
    split.npy       (n) uint8, index into SPLITS
    keys.npy        (n) uint64, a hash of the sequence that both strands share: equal keys are duplicates
    groups.npy      (n) uint64, only of intervals of a genome: those that share bases are a group, named by one of their keys
    names.txt       one line a sequence
    manifest.json   label_kind, classes (sorted), splits, duplicates, counts, sources, vocab, sha256 of the tokens

Splits are functions of what a sequence is (its key) and of a seed, never of its place in the file, and duplicates always
fall on the same side. So do intervals that share bases, where they leave enough sequences on both.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from seqlab.classification.baselines import Sequences
from seqlab.classification.metrics import KINDS, Kind
from seqlab.dataset import SPLITS, VERSION, read_manifest
from seqlab.errors import UserError
from seqlab.tokenizers import nucleotide

RARE = 10  # sequences with one combination of labels, of which too few could be shared out by themselves
ARRAYS = {"offsets": np.int64, "labels": None, "split": np.uint8, "keys": np.uint64}


class LabelledStore:
    """A labelled dataset, opened for reading; see the module for the files.

    directory, manifest, hash: where it lies, manifest.json as a dictionary, its sha256
    kind: "binary", "multi-class", "multi-label" or "regression"
    classes: names of the classes or labels, in the order of the model's outputs; empty for regression
    tokens, offsets, lengths, labels, split, keys, groups: arrays as in the module; groups are the keys where there are none
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], manifest_hash: str):
        self.directory, self.manifest, self.hash = directory, manifest, manifest_hash
        try:
            self._read()
        except (KeyError, TypeError, ValueError, OSError, EOFError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(f"{type(error).__name__}: {error}".splitlines()[0][:120]) from None

    @classmethod
    def open(cls, directory: Path | str) -> "LabelledStore":
        """Open and check; raises UserError for what is no labelled dataset, or a damaged one."""
        directory = Path(directory)
        manifest, digest = read_manifest(directory, "seqlab prep labelled")
        path = directory / "manifest.json"
        if manifest.get("kind") != "labelled":
            raise UserError(
                f"{directory}: is a dataset of kind {manifest.get('kind')!r}, which has no labels; give one that "
                "`seqlab prep labelled` wrote"
            )
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{path}: dataset version {manifest.get('version')!r}, this program reads {VERSION}; prepare it again"
            )
        return cls(directory, manifest, digest)

    def __reduce__(self):
        return LabelledStore.open, (self.directory,)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.directory}: damaged dataset ({what}); prepare it again")

    def _read(self) -> None:
        self.kind: Kind = self.manifest["label_kind"]
        self.classes: list[str] = [str(name) for name in self.manifest["classes"]]
        if self.kind not in KINDS:
            raise self._damaged(f"label_kind {self.kind!r}")
        for name, dtype in ARRAYS.items():
            array = np.load(self.directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if dtype is not None and array.dtype != dtype:
                raise self._damaged(f"{name}.npy holds {array.dtype}, expected {np.dtype(dtype)}")
            setattr(self, name, np.asarray(array))
        path = self.directory / "groups.npy"
        self.groups = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) if path.exists() else self.keys
        n = int(self.manifest["n"])
        if len(self.offsets) != n + 1 or any(len(getattr(self, name)) != n for name in ("labels", "split", "keys", "groups")):
            raise self._damaged(f"the manifest says {n:,} sequences, the arrays hold another number")
        self.lengths = np.diff(self.offsets)
        path = self.directory / "tokens.bin"
        size = path.stat().st_size
        if size != self.offsets[-1] or (self.lengths < 1).any() or self.offsets[0] != 0:
            raise self._damaged(f"tokens.bin is {size:,} bytes, the offsets say {int(self.offsets[-1]):,}")
        self.tokens = np.asarray(np.memmap(path, np.uint8, "r"))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_outputs(self) -> int:
        return max(1, len(self.classes))

    def names(self) -> list[str]:
        return (self.directory / "names.txt").read_bytes().decode("utf-8").split("\n")[:-1]

    def sequence(self, row: int) -> np.ndarray:
        """Token ids (l) of one sequence."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def has_valid(self) -> bool:
        """Whether the dataset has its own validation split; else each seed draws one from the training split."""
        return bool((self.split == SPLITS.index("valid")).any())

    def rows(self, split: str, seed: int = 0, valid_share: float = 0.1) -> np.ndarray:
        """(k) int64: the rows of a split, in an order that does not depend on the file's.

        Without a validation split of its own, `valid_share` of the training sequences validate, stratified by label and
        drawn anew for each seed; the others train.
        """
        if split not in SPLITS:
            raise UserError(f"{split!r}: no such split; choose one of {', '.join(SPLITS)}")
        code = SPLITS.index(split)
        if self.has_valid() or split == "test":
            rows = np.flatnonzero(self.split == code)
        else:
            training = np.flatnonzero(self.split == SPLITS.index("train"))
            stratum = strata(self.labels[training], self.kind)
            part = stratified_parts(stratum, self.groups[training], (valid_share,), seed + 1)
            if len(np.unique(part)) < 2:  # one chain of overlapping intervals
                part = stratified_parts(stratum, self.keys[training], (valid_share,), seed + 1)
            rows = training[part == (0 if split == "valid" else 1)]
        return rows[np.lexsort((rows, self.keys[rows]))]

    def sequences(self, rows: np.ndarray, max_length: int | None = None) -> Sequences:
        """The rows as padded arrays, cut to their first `max_length` bases."""
        lengths = self.lengths[rows] if max_length is None else np.minimum(self.lengths[rows], max_length)
        return Sequences(self.padded(rows, lengths), lengths, self.labels[rows])

    def padded(self, rows: np.ndarray, lengths: np.ndarray, width: int | None = None) -> np.ndarray:
        """(k width) uint8: the first lengths[i] tokens of each row, padded on the right with [PAD]."""
        width = int(lengths.max(initial=1)) if width is None else width
        ids = np.full((len(rows), width), nucleotide.PAD, np.uint8)
        for line, start, length in zip(ids, self.offsets[rows], lengths):
            line[:length] = self.tokens[start : start + length]
        return ids


def strata(labels: np.ndarray, kind: Kind) -> np.ndarray:
    """(n) int64: which sequences a split must share out evenly: the class, the combination of labels (those that fewer than RARE
    sequences have are one stratum), or a tenth of the range of ranks of a regression's values."""
    if kind == "multi-label":
        _, combination, count = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
        combination = combination.reshape(-1)
        return np.where(count[combination] < RARE, len(count), combination).astype(np.int64)
    if kind == "regression":
        edges = np.quantile(labels, np.linspace(0.1, 0.9, 9))
        return np.searchsorted(edges, labels).astype(np.int64)
    return labels.astype(np.int64)


def stratified_parts(strata: np.ndarray, keys: np.ndarray, shares: tuple[float, ...], seed: int) -> np.ndarray:
    """(n) int64: the part of each sequence; part i gets about shares[i] of every stratum, the rest is the last part.

    A stratum with as many different sequences as there are parts has at least one in each. Equal keys are in one part
    (that of their lowest stratum). The answer depends on keys, strata and seed, not on the order of the rows.
    """
    unique, group = np.unique(keys, return_inverse=True)
    group_stratum = np.full(len(unique), np.iinfo(np.int64).max)
    np.minimum.at(group_stratum, group, strata)
    ticket = _mix(unique, seed)
    order = np.lexsort((unique, ticket, group_stratum))
    part = np.empty(len(unique), np.int64)
    for members in np.split(order, np.flatnonzero(np.diff(group_stratum[order])) + 1):
        n, start = len(members), 0
        part[members] = len(shares)
        for i, share in enumerate(shares):
            room = n - start - (len(shares) - i)  # leave one for each part to come
            size = min(max(int(np.floor(share * n + 0.5)), 1), max(room, 0)) if share > 0 else 0
            part[members[start : start + size]] = i
            start += size
    return part[group]


def _mix(keys: np.ndarray, seed: int) -> np.ndarray:
    """A new 64-bit ticket for each key: splitmix64 of key and seed."""
    with np.errstate(over="ignore"):
        x = keys + np.uint64(0x9E3779B97F4A7C15) * np.uint64(2 * seed + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def sequence_key(ids: np.ndarray) -> int:
    """64 bits that a sequence and its reverse complement share, and other sequences do not."""
    there, back = ids.tobytes(), nucleotide.reverse_complement(ids).tobytes()
    return int.from_bytes(hashlib.blake2b(min(there, back), digest_size=8).digest(), "little")
