"""A small genome from nothing: FASTA with the kinds of structure that a language model of DNA can find.

What is in it, and what it takes to predict it:

    genes, on both strands       ATG, codons drawn from an uneven usage table, a stop. Which base is likely depends on
                                 the codon phase, which a model has to keep track of over hundreds of bases.
    between genes                an order-2 Markov chain whose G+C content changes along the sequence (isochores)
    dispersed repeats            copies of a few transposon-like elements, both strands, with 3-12 % of the bases changed;
                                 most are soft-masked (lower case), as RepeatMasker would
    tandem repeats               a unit of 8-40 bases many times over, soft-masked: predictable from the sequence just read
    a gap                        one run of N

It is a toy for demonstrations and tests: nothing about an organism can be learned from it.
"""

from pathlib import Path

import numpy as np

from seqlab.errors import UserError

_BASES = np.frombuffer(b"ACGT", np.uint8)
_COMPLEMENT = np.arange(256, dtype=np.uint8)
for _from, _to in zip(b"ACGTacgt", b"TGCAtgca"):
    _COMPLEMENT[_from] = _to
_CODONS = np.stack(np.meshgrid(_BASES, _BASES, _BASES, indexing="ij"), -1).reshape(64, 3)  # AAA, AAC, ..., TTT
_STOPS = [i for i, codon in enumerate(_CODONS) if codon.tobytes() in (b"TAA", b"TAG", b"TGA")]
_GAP = 200  # bases of N
_LINE = 60
MIN_LENGTH = 10_000


def simulate_genome(path: Path | str, *, length: int = 2_000_000, seed: int = 0, overwrite: bool = False) -> Path:
    """Write a simulated genome of exactly `length` bases, in four sequences, as plain FASTA; return its path.

    The same length and seed give the same file. Raises UserError for a length below 10,000 or an unwritable path.
    """
    path = Path(path)
    if length < MIN_LENGTH:
        raise UserError(f"a simulated genome needs {MIN_LENGTH:,} bases or more, got {length:,}")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; choose another file or add --overwrite")
    genome = _Simulation(np.random.default_rng(seed)).genome(length)
    cuts = (np.cumsum([0.4, 0.3, 0.2]) * length).astype(int)
    try:
        with open(path, "wb") as file:
            for number, sequence in enumerate(np.split(genome, cuts), start=1):
                file.write(b">sim%d simulated, seed %d\n" % (number, seed))
                file.write(_lines(sequence))
    except OSError as error:
        if path.is_file():
            path.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
    return path


def _lines(sequence: np.ndarray) -> bytes:
    full = len(sequence) // _LINE * _LINE
    rows = np.full((full // _LINE, _LINE + 1), ord("\n"), np.uint8)
    rows[:, :_LINE] = sequence[:full].reshape(-1, _LINE)
    return rows.tobytes() + (sequence[full:].tobytes() + b"\n" if full < len(sequence) else b"")


class _Simulation:
    """Tables drawn once from the random generator, and the pieces drawn from those tables. All sequences are uint8."""

    FAMILIES = 6

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        usage = rng.random(64) ** 5 + 0.005  # uneven: a third of the codons make up most of the genes
        usage[_STOPS] = 0.0
        self.codon_usage = np.cumsum(usage) / usage.sum()
        self.after = rng.random((16, 4)) + 0.5  # weights of the base after each pair of bases
        self.families = [self._between(int(n))[0] for n in rng.integers(400, 1600, self.FAMILIES)]

    def genome(self, length: int) -> np.ndarray:
        """Genes one after the other with spacers between them, repeats in some spacers, cut to `length`."""
        pieces: list[np.ndarray] = []
        total = 0
        while total < length:
            added = self._stretch(200)
            pieces += added
            total += sum(map(len, added))
        genome = np.concatenate(pieces)[:length]
        middle = length // 2
        genome[middle : middle + _GAP] = ord("N")
        return genome

    def _stretch(self, genes: int) -> list[np.ndarray]:
        rng = self.rng
        spacers = self._between(*(40 + (-np.log(1 - rng.random(genes)) * 160).astype(int)))
        pieces = []
        for gene, spacer, chance in zip(self._genes(genes), spacers, rng.random(genes)):
            pieces += [gene, spacer]
            if chance < 0.05:
                pieces += [self._repeat_copy(), spacer[::-1].copy()]
            elif chance < 0.08:
                pieces.append(self._tandem())
        return pieces

    def _genes(self, count: int) -> list[np.ndarray]:
        rng = self.rng
        codons = 60 + (-np.log(1 - rng.random(count)) * 240).astype(int)
        drawn = np.searchsorted(self.codon_usage, rng.random(int(codons.sum())), side="right")
        genes = []
        for inner, stop, is_forward in zip(
            np.split(drawn, np.cumsum(codons)[:-1]), rng.integers(0, 3, count), rng.random(count) < 0.5
        ):
            gene = np.concatenate([np.frombuffer(b"ATG", np.uint8), _CODONS[inner].reshape(-1), _CODONS[_STOPS[stop]]])
            genes.append(gene if is_forward else _COMPLEMENT[gene[::-1]])
        return genes

    def _between(self, *lengths: int) -> list[np.ndarray]:
        """Spacers from the order-2 chain, all drawn side by side, one step of every spacer at a time."""
        rng, count, longest = self.rng, len(lengths), max(lengths)
        # G+C content drifts from spacer to spacer: 0.30 .. 0.65, over some tens of genes
        gc = 0.475 + 0.175 * np.sin(np.cumsum(rng.random(count)) * 0.1 + rng.random() * 6)
        weight = self.after[None] * np.stack([1 - gc, gc, gc, 1 - gc], -1)[:, None, :]  # (count 16 4)
        upto = np.cumsum(weight, -1)
        upto /= upto[..., -1:]
        u = rng.random((longest, count))
        out = np.empty((count, longest), np.uint8)
        pair = rng.integers(0, 16, count)
        row = np.arange(count)
        for t in range(longest):
            base = (u[t][:, None] >= upto[row, pair, :3]).sum(-1)
            out[:, t] = base
            pair = pair % 4 * 4 + base
        return [_BASES[out[i, :n]] for i, n in enumerate(lengths)]

    def _mutated(self, sequence: np.ndarray, share: float) -> np.ndarray:
        sequence = sequence.copy()
        at = self.rng.random(len(sequence)) < share
        sequence[at] = _BASES[self.rng.integers(0, 4, int(at.sum()))]
        return sequence

    def _repeat_copy(self) -> np.ndarray:
        rng = self.rng
        family = self.families[int(rng.integers(0, self.FAMILIES))]
        start = int(rng.integers(0, len(family) // 2)) if rng.random() < 0.5 else 0  # half are cut short
        copy = self._mutated(family[start:], 0.04 + 0.12 * rng.random())  # a quarter of the draws change nothing
        copy = copy if rng.random() < 0.5 else _COMPLEMENT[copy[::-1]]
        return copy | 0x20 if rng.random() < 0.8 else copy  # 0x20: lower case

    def _tandem(self) -> np.ndarray:
        rng = self.rng
        unit = _BASES[rng.integers(0, 4, int(rng.integers(8, 41)))]
        return self._mutated(np.tile(unit, int(rng.integers(6, 30))), 0.02) | 0x20
