"""Hidden Markov models of genomes: counts by hand, expectation and maximisation, and genes found in a simulated genome."""

import itertools

import numpy as np
import pytest
import torch

from seqlab import gene_kernels, genes
from seqlab.heads.genes import GenePredictor, contexts

CODON = np.array([[0.45, 0.05, 0.45, 0.05], [0.4, 0.3, 0.1, 0.2], [0.1, 0.4, 0.4, 0.1]])  # what each codon position emits
GAP = np.array([0.35, 0.15, 0.15, 0.35])


def simulated(pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A genome of genes of 900 bases on either strand, without stop codons inside, and 200 bases between them; and where the
    first, second and third codon positions (1 2 3) of the forward genes are, -1 in the reverse ones, 0 elsewhere."""
    rng, digits, truth = np.random.default_rng(seed), [], []
    for i in range(pairs):
        digits.append(rng.choice(4, 200, p=GAP))
        truth.append(np.zeros(200, int))
        codons = np.stack([rng.choice(4, 300, p=p) for p in CODON], 1)
        stop = (codons[:, 0] == 3) & np.isin(codons[:, 1] * 4 + codons[:, 2], (0, 2, 8))  # TAA TAG TGA
        codons[stop] = 0, 1, 2
        forward = rng.random() < 0.5
        digits.append(codons.ravel() if forward else 3 - codons.ravel()[::-1])
        truth.append(np.tile([1, 2, 3], 300) if forward else np.full(900, -1))
    return np.concatenate(digits).astype(np.uint8), np.concatenate(truth)


def test_contexts_by_hand_and_as_the_model_makes_them():
    digits = np.array([0, 1, 2, 4, 3, 3, 0, 1], np.uint8)
    # none: 0; one base v: 1 + v; two bases u v: 5 + 4 u + v
    expected = [0, 1, 5 + 1, 5 + 4 + 2, 0, 1 + 3, 5 + 15, 5 + 12]
    assert gene_kernels.contexts(digits, 2).tolist() == expected
    assert genes.context_count(2) == 21
    rng = np.random.default_rng(0)
    for order in (1, 3, 5):
        digits = rng.choice(5, 200, p=[0.24, 0.24, 0.24, 0.23, 0.05]).astype(np.uint8)
        line = torch.from_numpy(np.where(digits < 4, digits.astype(np.int32), -1))[None]
        line = torch.cat([line.new_full((1, order), -1), line], 1)
        assert torch.equal(contexts(line, order)[0], torch.from_numpy(gene_kernels.contexts(digits, order)))


def test_emissions_back_off_to_shorter_contexts():
    counts = np.zeros((4, genes.STATES, 4))
    counts[2, 1] = 30, 0, 10, 20  # after G, in state 1
    E, a = genes.emissions_of(counts), genes.SMOOTHING
    assert E.shape == (5, genes.STATES, 4) and np.allclose(E.sum(-1), 1, atol=1e-6) and (E > 0).all()
    short = (np.array([30, 0, 10, 20]) + a / 4) / (60 + a)
    assert np.allclose(E[0, 1], short) and np.allclose(E[0, 2], 0.25)
    assert np.allclose(E[1 + 2, 1], (np.array([30, 0, 10, 20]) + a * short) / (60 + a))
    assert np.allclose(E[1 + 0, 1], short)  # nothing seen after A


def test_the_expectation_step_is_a_sum_over_all_paths():
    rng = np.random.default_rng(1)
    digits, states = np.array([2, 0, 4, 3, 1], np.uint8), 2
    context = gene_kernels.contexts(digits, 1)
    E = rng.dirichlet(np.ones(4), (5, states)).astype(np.float32)
    A, start = rng.dirichlet(np.ones(2), states).astype(np.float32), np.array([0.3, 0.7], np.float32)
    counts, moves = np.zeros((4, states, 4)), np.zeros((states, states))
    nats = gene_kernels.expect(digits, context, E, A, start, 1, counts, moves)
    total, by_count, by_move = 0.0, np.zeros_like(counts), np.zeros_like(moves)
    for path in itertools.product(range(states), repeat=5):
        p = start[path[0]] * np.prod([A[r, s] for r, s in zip(path, path[1:])])
        p *= np.prod([E[context[t], s, digits[t]] for t, s in enumerate(path) if digits[t] < 4])
        total += p
        for t, s in enumerate(path):
            if digits[t] < 4 and context[t] >= 1:
                by_count[context[t] - 1, s, digits[t]] += p
            if t:
                by_move[path[t - 1], s] += p
    assert nats == pytest.approx(np.log(total), rel=1e-5)
    assert np.allclose(counts, by_count / total, atol=1e-5) and np.allclose(moves, by_move / total, atol=1e-5)


def test_genes_of_a_simulated_genome_are_found():
    digits, _ = simulated(150, seed=0)
    model = genes.fit([digits[:100_000], digits[100_000:]], 1)
    assert all(later <= earlier + 1e-5 for earlier, later in zip(model.bits, model.bits[1:]))
    again = genes.fit([digits[:100_000], digits[100_000:]], 1, threads=3)
    assert np.array_equal(model.emissions, again.emissions) and model.bits == again.bits
    # on a genome that it has not seen: the frame, from what came before alone
    fresh, truth = simulated(20, seed=1)
    predictor = GenePredictor(1, 1)
    predictor.fit([model])
    prediction, _ = predictor(torch.from_numpy(fresh.astype(np.int64))[None])
    guess = prediction.frame[0, :-1, 0].argmax(-1).numpy()  # of the base that follows
    inside = np.convolve(truth[1:] > 0, np.ones(301), "full")[: len(guess)] > 299  # 300 bases into a forward gene
    frames = np.array([np.bincount(guess[inside & (truth[1:] == k)], minlength=genes.STATES).argmax() for k in (1, 2, 3)])
    assert len(set(frames)) == 3  # three states, one for each codon position,
    assert np.mean(guess[inside] == frames[truth[1:][inside] - 1]) > 0.9
    bits = -prediction.log_p[0, :, 0].numpy()[np.arange(len(fresh)), fresh].mean() / np.log(2)
    mixture = np.bincount(fresh, minlength=4) / len(fresh)
    assert bits < -(mixture * np.log2(mixture)).sum() - 0.1


def test_genomes_without_genes_or_with_little_of_anything():
    noise = np.random.default_rng(0).integers(0, 4, 5000).astype(np.uint8)
    for stretches in ([noise], [noise[:3]], [np.full(50, 4, np.uint8), noise[:40]]):
        model = genes.fit(stretches, 3)
        assert all(np.isfinite(part).all() for part in (model.emissions, model.transitions, model.start))
        assert np.allclose(model.transitions.sum(1), 1, atol=1e-5) and model.start.sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="nothing but unknown"):
        genes.fit([np.full(10, 4, np.uint8)], 3)


def test_of_a_large_genome_evenly_spread_pieces_are_looked_at(monkeypatch):
    monkeypatch.setattr(genes, "PIECE", 100)
    monkeypatch.setattr(genes, "MOST", 1000)
    stretches = [np.zeros(2050, np.uint8), np.ones(40, np.uint8), np.full(3000, 2, np.uint8)]
    taken = genes._take(stretches)
    assert len(taken) == 10 and {int(piece[0]) for _, piece in taken} >= {0, 2}
    assert [(number, len(piece)) for number, piece in genes._take([stretches[1]])] == [(0, 40)]
    assert [genes.pieces_of(len(stretch)) for stretch in stretches] == [21, 1, 30]


def test_held_out_emissions_have_not_seen_their_fold(monkeypatch):
    monkeypatch.setattr(genes, "PIECE", 2000)
    digits, _ = simulated(60, seed=2)
    stretches = [digits[:30_001], digits[30_001:]]
    model = genes.fit(stretches, 2)
    assert model.held_out.shape == (genes.FOLDS, *model.emissions.shape)
    # what is in a fold only: a word that occurs nowhere else
    at = 7 * 2000 + 500  # piece 7 of the first stretch, fold 3
    marked = [stretches[0].copy(), stretches[1]]
    marked[0][at : at + 300] = 0
    assert genes.fold_of(np.array([at]), np.array([0])).tolist() == [3]
    assert genes.fold_of(np.array([0, 5000]), np.array([genes.pieces_of(30_001)] * 2)).tolist() == [0, 2]
    other = genes.fit(marked, 2)
    run_of_a = genes.context_count(1) + 0  # after AA
    seen = [float((m.held_out[f, run_of_a, :, 0] * m.start).sum()) for m in (model, other) for f in range(genes.FOLDS)]
    gain = np.array(seen[genes.FOLDS :]) - np.array(seen[: genes.FOLDS])
    assert gain[:3].min() > 0.005 and abs(gain[3]) < 0.2 * gain[:3].min()
