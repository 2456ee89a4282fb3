"""Where a sequence stands in the genomes that were kept, and how alike: words of two kinds, looked up in every species.

    codon       16 bases of 23: the first two of eight codons, x x - x x - ... x x. The third base of a codon changes first, so
                these words outlast relatives that are four fifths identical
    contiguous  16 bases in a row, which need nine tenths or more

A word is the same as its reverse complement (both patterns are palindromes), its code the smaller of the two numbers that its strands make, A C
G T = 0 1 2 3, the first base the most significant: below 4^16, so that an int32 holds it. By chance one of five hundred words is
found in ten million bases. How alike a found stretch is, is told by how many words in a row are found: 17 contiguous ones are 32
bases without a difference.

What is looked up in is the genomes themselves, two bits a base; an index (sorted codes, and for each the species that hold it) is made of
them when it is first needed, in a second for ten million bases. With folds, for fitting, it also says in which of FOLDS parts of each genome a
word stands, so that any part can be left out.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CODON = tuple(i for i in range(23) if i % 3 != 2)
CONTIGUOUS = tuple(range(16))
# kind -> (offsets of its bases, step from word to word in a row, in a row at least)
KINDS = ((CODON, 3, (1, 2, 5)), (CONTIGUOUS, 1, (1, 3, 5, 9, 17)))
PAIRED = ((1,), (1, 17))  # in a row at least, of each kind, where species are also compared two by two
N_PAIRED = sum(len(pairs) for pairs in PAIRED)
REACH = max(offsets[-1] + step * (runs[-1] - 1) for offsets, step, runs in KINDS)  # bases before one that its words depend on
MOST_SPECIES = 15  # four folds of each are bits of an int64
FOLDS = 4
BLOCK = 1 << 17  # bases of a fold at a time, less in small genomes; as blocks are held out
PIECE = 1 << 16  # of genomes that are too large pieces of this size are kept, evenly spread
PIECES = 4096  # at most; the longest
_UNKNOWN = 4


@dataclass(frozen=True)
class Genomes:
    """Bases (n) uint8, A C G T = 0 1 2 3, of all pieces end to end; pieces (p 3) int64: species, length, where in its stretch it
    begins."""

    bases: np.ndarray
    pieces: np.ndarray


@dataclass(frozen=True)
class Index:
    """keys (w) int32, ascending: codes less 2^31; holders (w): `bits` bits for each species, one for each fold
    (int64) or one alone (int16)."""

    keys: Tensor
    holders: Tensor
    bits: int


def keep(genomes: list[list[np.ndarray]], most: int) -> Genomes:
    """As much of the genomes as `most` bases allow: small ones whole, of the others an equal number of bases. A genome is a list of
    stretches: digits (n) uint8, 4 for what is not known."""
    totals = [sum(len(stretch) for stretch in stretches) for stretches in genomes]
    room, share, left = most, 0, len(genomes)
    for total in sorted(totals):  # what small genomes leave is for the others
        share = room // left
        if total > share:
            break
        room, left = room - total, left - 1
    found = []
    for species, (stretches, total) in enumerate(zip(genomes, totals)):
        if total <= share:
            cuts = [(0, stretch) for stretch in stretches]
        else:
            cuts = [(at, stretch[at : at + PIECE]) for stretch in stretches for at in range(0, len(stretch), PIECE)]
            number = share // PIECE
            cuts = [cuts[i * len(cuts) // number] for i in range(number)] or [(0, max(stretches, key=len)[:share])]
        for at, digits in cuts:
            edges = np.flatnonzero(np.diff(np.concatenate([[True], digits >= _UNKNOWN, [True]])))
            found += [(species, at + a, digits[a:b]) for a, b in edges.reshape(-1, 2).tolist() if b - a > CODON[-1]]
    if len(found) > PIECES:
        longest = np.sort(np.argsort([-len(digits) for *_, digits in found], kind="stable")[:PIECES])
        found = [found[i] for i in longest]
    bases = np.concatenate([np.empty(0, np.uint8), *(digits for *_, digits in found)])
    return Genomes(bases, np.array([(species, len(digits), at) for species, at, digits in found], np.int64).reshape(-1, 3))


def pack(bases: np.ndarray) -> np.ndarray:
    """(n) -> (n/4, rounded up) uint8, four bases a byte, the first in the lowest bits."""
    four = np.pad(bases, (0, -len(bases) % 4)).reshape(-1, 4)
    return (four[:, 0] | four[:, 1] << 2 | four[:, 2] << 4 | four[:, 3] << 6).astype(np.uint8)


def unpack(packed: np.ndarray, n: int) -> np.ndarray:
    return np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1).reshape(-1)[:n].astype(np.uint8)


def block_size(total: int) -> int:
    """Bases of a genome of `total` that are in one fold before the next fold's begin."""
    return max(1, min(BLOCK, total // (2 * FOLDS)))


def fold_of(offset: np.ndarray, block: np.ndarray | int) -> np.ndarray:
    """The fold of a base `offset` into its stretch."""
    return offset // block % FOLDS


def codes(base: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Of the words of each row: base (b n) int64, 0 to 3 or -1 -> (b n-span+1) int64, -1 where a base is not known. Words are put together of
    two halves, so of `offsets` there are a power of two, and the second half repeats the first, as in both kinds."""
    forward, backward, known, length = base, 3 - base, base >= 0, 1
    while length < len(offsets):
        step = offsets[length]
        n = max(0, forward.shape[1] - step)
        forward = (forward[:, :n] << 2 * length) + forward[:, step:]
        backward = backward[:, :n] + (backward[:, step:] << 2 * length)
        known = known[:, :n] & known[:, step:]
        length *= 2
    return torch.where(known, torch.minimum(forward, backward), -1)


def index(genomes: Genomes, offsets: tuple[int, ...], *, blocks: np.ndarray | None = None, device: str | torch.device = "cpu") -> Index:
    """Of one kind of word. With `blocks` (species), the size of each genome's blocks, holders say in which folds."""
    bits, start, entries = 1 if blocks is None else FOLDS, 0, []
    for species, length, at in genomes.pieces.tolist():
        for first in range(0, length - offsets[-1], 1 << 20):  # a million words at a time
            digits = genomes.bases[start + first : start + min(length, first + (1 << 20) + offsets[-1])]
            code = codes(torch.from_numpy(digits).to(device).long()[None], offsets)[0]
            bit = torch.full_like(code, species * bits)
            if blocks is not None:
                bit += (at + first + torch.arange(len(code), device=device)) // int(blocks[species]) % FOLDS
            entries.append(code << 6 | bit)
        start += length
    if not entries:
        return Index(torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int16, device=device), bits)
    entry = torch.unique_consecutive(torch.cat(entries).sort().values)
    code, word = torch.unique_consecutive(entry >> 6, return_inverse=True)
    holders = torch.zeros_like(code).scatter_add_(0, word, 1 << (entry & 63))  # different bits: the sum is the union
    return Index((code - 2**31).to(torch.int32), holders.to(torch.int16) if blocks is None else holders, bits)


def find(index: Index, code: Tensor, n_species: int, allowed: Tensor | None = None) -> Tensor:
    """code (b n) -> (b n species) bool: who holds the word. allowed (b species) int64, with folds: bits of those that may be looked at."""
    key = (code - 2**31).to(torch.int32)
    at = torch.searchsorted(index.keys, key).clamp(max=len(index.keys) - 1)
    holders = torch.where((index.keys[at] == key) & (code >= 0), index.holders[at], 0)
    shifts = index.bits * torch.arange(n_species, device=code.device)
    bits = holders[..., None] >> shifts
    return (bits & ((1 << index.bits) - 1 if allowed is None else allowed[:, None, :])) != 0


def in_a_row(held: Tensor, least: int, step: int) -> Tensor:
    """held (b n s) bool -> whether the last `least` words, `step` apart, are held too."""
    have = 1
    while have < least:
        more = min(have, least - have)
        shifted = torch.zeros_like(held)
        if more * step < held.shape[1]:
            shifted[:, more * step :] = held[:, : -more * step]
        held, have = held & shifted, have + more
    return held


def n_counts(n_species: int) -> int:
    """How many numbers `count` gives."""
    return sum(len(runs) for *_, runs in KINDS) * n_species + N_PAIRED * n_species**2


def count(indices: tuple[Index, ...], line: Tensor, n: int, n_species: int, allowed: Tensor | None = None) -> Tensor:
    """Of the words that end at the last n bases of line (b REACH+n), 0 to 3 or -1: (b n_counts) float64, whole numbers. For each
    kind and each number in a row, how many each species holds; then, where they are paired, how many of them two species hold,
    for all pairs."""
    return count_stretches(indices, line, n, n_species, max(1, n), 0, allowed)[:, 0]


def count_stretches(
    indices: tuple[Index, ...], line: Tensor, n: int, n_species: int, stretch: int, used: int, allowed: Tensor | None = None
) -> Tensor:
    """The same, of every `stretch` bases: (b k n_counts). Of the first stretch `used` bases came before these n, and are not counted."""
    single, paired = [], []
    missing = -(used + n) % stretch
    for lookup, (offsets, step, runs), pairs in zip(indices, KINDS, PAIRED):
        held = find(lookup, codes(line, offsets), n_species, allowed)
        for least in runs:
            last = in_a_row(held, least, step)[:, -n:]
            last = F.pad(last, (0, 0, used, missing)).unflatten(1, (-1, stretch))  # (b k stretch s)
            single.append(last.sum(2))
            if least in pairs:  # below 2^24, float32 is exact
                with torch.autocast(line.device.type, enabled=False):
                    last = last.float()
                    paired.append((last.transpose(2, 3) @ last).flatten(2))
    return torch.cat([part.double() for part in (*single, *paired)], 2)
