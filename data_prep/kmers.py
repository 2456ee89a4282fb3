"""Hashes of 32-mers: what two sequences, or two strands, have in common without comparing them base by base."""

import numpy as np

from seqlab.tokenizers import nucleotide

KMER = 32  # 2 bits a base: one 64-bit word


def kmer_hashes(tokens: np.ndarray) -> np.ndarray:
    """uint64 hashes of the 32-mers of a piece (l >= 32), equal for a k-mer and its reverse complement; k-mers that hold
    anything but A, C, G, T are left out."""
    return placed_kmers(tokens)[0]


def placed_kmers(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`kmer_hashes`, and where each k-mer begins, int64."""
    code = tokens.astype(np.int16) - nucleotide.A
    is_base = (code >= 0) & (code < 4)
    code = np.where(is_base, code, 0).astype(np.uint64)
    bad = np.concatenate([[0], np.cumsum(~is_base)])
    clean = bad[KMER:] == bad[:-KMER]
    canonical = np.minimum(_words(code), _words(np.uint64(3) - code[::-1])[::-1])[clean]
    with np.errstate(over="ignore"):  # splitmix64's output function
        x = canonical + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31)), np.flatnonzero(clean)


def sampled(hashes: np.ndarray, scale: int) -> np.ndarray:
    """(n) bool: one in `scale` of the hashes, the same ones wherever they occur (FracMinHash, Irber et al. 2022)."""
    return hashes <= np.uint64(2**64 // scale - 1)


def _words(code: np.ndarray) -> np.ndarray:
    """All 32-mers of 2-bit codes as 64-bit words: 1-mers, joined to 2-mers, to 4-mers, ... five times."""
    word, k = code, 1
    while k < KMER:
        word = (word[:-k] << np.uint64(2 * k)) | word[k:]
        k *= 2
    return word
