"""Hidden Markov models of genomes, as gene finders have them (Borodovsky & McIninch 1993, Krogh et al. 1994), fitted without any
annotation.

States: between genes, and three codon positions of genes on either strand; each emits a base given the `order` bases before
it. So a model knows which words a genome writes in which reading frame, and in what it has read it finds the frame by itself.
Where fewer than `order` known bases come before a base, these decide:

    p_j(v | c, s) = (n_j(c, s, v) + a p_j-1(v | c without its first base, s)) / (n_j(c, s) + a)          p_-1 = 1/4

Fitted by expectation and maximisation (Baum et al. 1970) on both strands, from long stretches without a stop codon; a genome
in which there are none is described all the same, by states that mean something else.

A model knows the bases that it was fitted to better than others, by a nat in 280 bases of E. coli, by more in small genomes. Whoever
learns from what the models say of those same bases would trust them too much: `held_out` has emissions that were fitted without
a fold of the pieces, for each fold (stacked generalisation, Wolpert 1992).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

STATES = 7  # 0 between genes; 1 2 3 codon positions; 4 5 6 codon positions of the other strand, in the order that they are met: 3 2 1
MAX_ORDER = 6
SMOOTHING = 30.0  # a, bases
ROUNDS = 20  # at most; and it ends when a round gains less than
LEAST_GAIN = 1e-4  # bits a base
PIECE = 1 << 14  # bases that are followed at a time
FOLDS = 4  # piece i is of fold i modulo this
MOST = 4_000_000  # bases of a genome that are looked at, pieces evenly spread
OPEN_FRAME = 300  # bases without a stop codon that are taken for a gene to begin with
_UNKNOWN = 4


@dataclass(frozen=True)
class GeneModel:
    """emissions (contexts states 4) and transitions (states states), start (states): where a sequence begins that is cut out
    anywhere; held_out (folds contexts states 4): emissions without the counts of a fold; float32. bits: a base of what it was
    fitted to, round by round."""

    emissions: np.ndarray
    transitions: np.ndarray
    start: np.ndarray
    held_out: np.ndarray
    bits: tuple[float, ...]


def context_count(order: int) -> int:
    """Contexts of 0 to `order` bases. Those of j bases begin at context_count(j - 1); within them the bases are digits of a
    number to the base 4, the nearest one the least significant."""
    return (4 ** (order + 1) - 1) // 3


def fit(stretches: list[np.ndarray], order: int, threads: int = 1) -> GeneModel:
    """A model of some stretches of one genome: digits (n) uint8, A C G T = 0 1 2 3, 4 for anything else. Deterministic, whatever
    the number of threads."""
    from seqlab import gene_kernels

    taken = _take(stretches)
    pieces = [side for _, piece in taken for side in (piece, reverse_complement(piece))]
    folds = np.repeat([number % FOLDS for number, _ in taken], 2)
    contexts = [gene_kernels.contexts(piece, order) for piece in pieces]
    first = context_count(order) - 4**order
    known = sum(int((piece < _UNKNOWN).sum()) for piece in pieces)
    if not known:
        raise ValueError("nothing but unknown bases: there is nothing to fit a model to")
    counts, transitions, bits = _first_counts(pieces, contexts, first, order), _first_transitions(), []

    def expect(i: int):
        sums = np.zeros((4**order, STATES, 4)), np.zeros((STATES, STATES))
        return gene_kernels.expect(pieces[i], contexts[i], emissions, transitions, start, first, *sums), *sums

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _ in range(ROUNDS):
            emissions, start = emissions_of(counts), _stationary(transitions)
            by_fold, moves, nats = np.zeros((FOLDS, 4**order, STATES, 4)), np.full((STATES, STATES), 1e-3), 0.0
            for fold, (nats_of_piece, counts_of_piece, moves_of_piece) in zip(folds, pool.map(expect, range(len(pieces)))):
                by_fold[fold] += counts_of_piece
                nats, moves = nats + nats_of_piece, moves + moves_of_piece
            counts = by_fold.sum(0)
            transitions = (moves / moves.sum(1, keepdims=True)).astype(np.float32)
            bits.append(-nats / known / np.log(2))
            if len(bits) > 1 and bits[-2] - bits[-1] < LEAST_GAIN:
                break
    held_out = np.stack([emissions_of(counts - mine) for mine in by_fold])
    return GeneModel(emissions_of(counts), transitions, _stationary(transitions), held_out, tuple(bits))


def reverse_complement(digits: np.ndarray) -> np.ndarray:
    return np.where(digits < _UNKNOWN, 3 - digits, _UNKNOWN)[::-1].astype(np.uint8)


def fold_of(offset: np.ndarray, first_piece: np.ndarray) -> np.ndarray:
    """The fold of a base `offset` into a stretch, before whose first piece there were `first_piece` of the same genome."""
    return (first_piece + offset // PIECE) % FOLDS


def pieces_of(length: int) -> int:
    """How many pieces a stretch makes."""
    return -(-length // PIECE)


def emissions_of(counts: np.ndarray) -> np.ndarray:
    """counts (4**order states 4) of the longest contexts -> emissions (contexts states 4) float32, above 0: those of shorter
    contexts are sums, and smooth those of the longer ones."""
    levels = [counts]
    while len(levels[0]) > 1:
        levels.insert(0, levels[0].reshape(4, -1, *counts.shape[1:]).sum(0))
    p, out = np.full((1, *counts.shape[1:]), 0.25), []
    for j, n in enumerate(levels):
        p = (n + SMOOTHING * (np.tile(p, (4, 1, 1)) if j else p)) / (n.sum(2, keepdims=True) + SMOOTHING)
        out.append(p)
    return np.concatenate(out).astype(np.float32)


def _take(stretches: list[np.ndarray]) -> list[tuple[int, np.ndarray]]:
    """Pieces of the stretches and their numbers, all or evenly spread over them."""
    pieces = list(enumerate(digits[at : at + PIECE] for digits in stretches for at in range(0, len(digits), PIECE)))
    most = max(1, MOST // PIECE)
    return pieces if len(pieces) <= most else [pieces[i * len(pieces) // most] for i in range(most)]


def _first_transitions() -> np.ndarray:
    """A gene, or what lies between two of them, lasts some hundred bases."""
    leave_gene, leave_gap = 0.003, 0.01
    A = np.full((STATES, STATES), leave_gene / STATES)
    A[0] = leave_gap / (STATES - 1)
    A[0, 0] = 1 - leave_gap
    for strand in (1, 4):
        for i in range(3):
            A[strand + i, strand + (i + 1) % 3] += 1 - leave_gene
    return (A / A.sum(1, keepdims=True)).astype(np.float32)


def _stationary(transitions: np.ndarray) -> np.ndarray:
    """(states) float32: how often each state is met in the long run."""
    power = transitions.astype(np.float64)
    for _ in range(40):  # squared again and again
        power = power @ power
        power /= power.sum(1, keepdims=True)
    return power.mean(0).astype(np.float32)


def _first_counts(pieces: list[np.ndarray], contexts: list[np.ndarray], first: int, order: int) -> np.ndarray:
    """What the states emit if long stretches without a stop codon are genes: counts (4**order states 4). Each state has a share of
    everything besides, so that no state is without any."""
    counts = np.zeros(4**order * STATES * 4)
    for digits, context in zip(pieces, contexts, strict=True):
        keep = (context >= first) & (digits < _UNKNOWN)
        code = ((context[keep].astype(np.int64) - first) * STATES + _guess_states(digits)[keep]) * 4 + digits[keep]
        counts += np.bincount(code, minlength=len(counts))
    counts = counts.reshape(-1, STATES, 4)
    return counts + 0.02 * counts.sum(1, keepdims=True)


def _guess_states(digits: np.ndarray) -> np.ndarray:
    """(n) int64: the longest stretches without a stop codon in one of the six frames are genes, each where no longer one is."""
    states = np.zeros(len(digits), np.int64)
    for start, end, strand in sorted(_open_frames(digits), key=lambda f: f[0] - f[1]):
        here = states[start:end]
        if (here > 0).mean() < 0.2:
            position = (np.arange(end - start)) % 3
            here[here == 0] = (1 + 3 * strand + position)[here == 0]
    return states


def _open_frames(digits: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(start, end, strand) of stretches of whole codons without a stop codon."""
    if len(digits) < OPEN_FRAME:
        return
    codon = digits[:-2].astype(np.int64) * 25 + digits[1:-1] * 5 + digits[2:]
    has_unknown = (digits[:-2] == _UNKNOWN) | (digits[1:-1] == _UNKNOWN) | (digits[2:] == _UNKNOWN)
    # TAA TAG TGA; read from the other strand TTA CTA TCA
    for strand, stops in enumerate((((3, 0, 0), (3, 0, 2), (3, 2, 0)), ((3, 3, 0), (1, 3, 0), (3, 1, 0)))):
        closed = has_unknown | np.isin(codon, [a * 25 + b * 5 + c for a, b, c in stops])
        for frame in range(3):
            at = frame + 3 * np.flatnonzero(closed[frame::3])
            ends = np.concatenate([at, [frame + (len(digits) - frame) // 3 * 3]])
            starts = np.concatenate([[frame], at + 3])
            for start, end in zip(starts.tolist(), ends.tolist()):
                if end - start >= OPEN_FRAME:
                    yield start, end, strand
