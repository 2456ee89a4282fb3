"""Words that some genome holds more than once: insertion sequences, phages, ribosomal operons, satellites. They are found again in
stretches of a genome that were held out, and tell close relatives apart whose genes cannot.

A word is `length` bases, the same as its reverse complement; its code is the smaller of the two numbers that its strands
make, A C G T = 0 1 2 3, the first base the most significant. Words that every genome holds once at most are left out on purpose: in
held-out sequence they point to the relative that holds the same gene, not to the genome that it was taken from. Which genomes hold
a word that one of them repeats is what counts, not how often: copies are left over from what was held out, a few or one.
"""

import numpy as np

MAX_LENGTH = 31  # 62 bits
CAPACITY = 1 << 18  # words that are kept, the most frequent ones
MOST = 8_000_000  # bases of a genome that are looked at, pieces evenly spread
PIECE = 1 << 16
UNUSED = np.iinfo(np.int64).max
_UNKNOWN = 4


def fit(genomes: list[list[np.ndarray]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Words (w) int64, ascending, that some genome holds twice or more, and which genomes hold each (w genomes) bool. A genome is a
    list of stretches: digits (n) uint8, 4 for what is not known."""
    found = []
    for stretches in genomes:
        codes = [_codes(piece, length) for piece in _take(stretches, length)]
        found.append(np.unique(np.concatenate([np.empty(0, np.int64), *codes]), return_counts=True))
    words = np.unique(np.concatenate([word[count > 1] for word, count in found]))
    counts = np.zeros((len(words), len(genomes)), np.int64)
    for i, (word, count) in enumerate(found):
        _, here, there = np.intersect1d(words, word, assume_unique=True, return_indices=True)
        counts[here, i] = count[there]
    if len(words) > CAPACITY:
        keep = np.sort(np.argsort(counts.max(1), kind="stable")[-CAPACITY:])
        words, counts = words[keep], counts[keep]
    return words, counts > 0


def _take(stretches: list[np.ndarray], length: int) -> list[np.ndarray]:
    """Pieces that overlap by a word less one base: all of them, or as many as MOST allows, evenly spread."""
    pieces = [digits[at : at + PIECE + length - 1] for digits in stretches for at in range(0, len(digits), PIECE)]
    most = max(1, MOST // PIECE)
    return pieces if len(pieces) <= most else [pieces[i * len(pieces) // most] for i in range(most)]


def _codes(digits: np.ndarray, length: int) -> np.ndarray:
    """Codes of the words of a piece that hold no unknown base."""
    n = len(digits) - length + 1
    if n < 1:
        return np.empty(0, np.int64)
    forward, backward, is_known = np.zeros(n, np.int64), np.zeros(n, np.int64), np.ones(n, bool)
    for i in range(length):
        part = digits[i : i + n].astype(np.int64)
        is_known &= part < _UNKNOWN
        forward = forward * 4 + np.minimum(part, 3)
        backward += (3 - np.minimum(part, 3)) << (2 * i)
    return np.minimum(forward, backward)[is_known]
