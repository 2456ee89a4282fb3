"""k-mer counts by hand and by brute force, the network's size and laws, and both baselines on a task they can learn."""

import itertools
import time

import numpy as np
import pytest
import torch
from torch import nn

from seqlab.classification.baselines import (
    BaselineCNN,
    Sequences,
    canonical_columns,
    chance,
    cnn_baseline,
    kmer_baseline,
    kmer_counts,
    kmer_frequencies,
    kmer_tables,
)
from seqlab.tokenizers import nucleotide

WORD = "ACGTTGCAACCA"


def sequences(texts, labels=None) -> Sequences:
    lengths = np.array([len(t) for t in texts])
    tokens = np.full((len(texts), lengths.max()), nucleotide.PAD, np.uint8)
    for row, text in zip(tokens, texts):
        row[: len(text)] = nucleotide.encode(text)
    return Sequences(tokens, lengths, np.zeros(len(texts), np.int64) if labels is None else np.asarray(labels))


def brute_force(text: str, k: int) -> np.ndarray:
    words = ["".join(w) for w in itertools.product("ACGT", repeat=k)]
    return np.array([sum(text[i : i + k] == w for i in range(len(text) - k + 1)) for w in words])


def planted(n, kind, seed, low=80, high=120, place=None):
    """Sequences with a word planted in those of class 1, another in those of class 2; anywhere, or at `place`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3 if kind == "multi-class" else 2, n)
    texts = []
    for label in labels:
        text = list(rng.choice(list("ACGT"), rng.integers(low, high)))
        if label:
            at = rng.integers(0, len(text) - 12) if place is None else place
            text[at : at + 12] = WORD if label == 1 else WORD[::-1]
        texts.append("".join(text))
    if kind == "multi-label":
        labels = np.stack([labels, np.ones(n, np.int64)], 1)
    if kind == "regression":
        labels = 10 + 4.0 * labels
    return sequences(texts, labels)


def test_kmer_counts_by_hand():
    s = sequences(["ACGTNACG", "AA", "NNNN"])
    counts = kmer_counts(s.tokens, s.lengths, 2)
    named = {a + b: i for i, (a, b) in enumerate(itertools.product("ACGT", repeat=2))}
    expected = np.zeros((3, 16))
    for word, n in {"AC": 2, "CG": 2, "GT": 1}.items():
        expected[0, named[word]] = n
    expected[1, named["AA"]] = 1
    assert (counts == expected).all()
    assert (kmer_counts(s.tokens, s.lengths, 6) == 0).all()  # N every few bases


def test_kmer_counts_by_brute_force():
    rng = np.random.default_rng(3)
    texts = ["".join(rng.choice(list("ACGTN"), n, p=[0.24] * 4 + [0.04])) for n in (1, 3, 6, 40, 77)]
    s = sequences(texts)
    tables = kmer_tables(s.tokens, s.lengths, (1, 2, 3, 4))
    for k, table in tables.items():
        assert (table == np.stack([brute_force(t, k) for t in texts])).all(), k


def test_bases_past_the_length_do_not_count():
    s = sequences(["ACGTACGT"])
    assert kmer_counts(s.tokens, np.array([3]), 2).sum() == 2


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_canonical_kmers(k):
    columns = canonical_columns(k)
    words = ["".join(w) for w in itertools.product("ACGT", repeat=k)]
    complement = str.maketrans("ACGT", "TGCA")
    for i, word in enumerate(words):
        assert columns[i] == columns[words.index(word[::-1].translate(complement))]
    assert columns.max() + 1 == {1: 2, 2: 10, 3: 32, 4: 136}[k]


def test_both_strands_have_the_same_frequencies():
    text = "ACCGTTAGGCNATTA"
    back = nucleotide.decode(nucleotide.reverse_complement(nucleotide.encode(text)))
    s = sequences([text, back])
    both = kmer_frequencies(kmer_counts(s.tokens, s.lengths, 3), 3, both_strands=True)
    assert both[0] == pytest.approx(both[1]) and both.sum(1) == pytest.approx(1)
    one = kmer_frequencies(kmer_counts(s.tokens, s.lengths, 3), 3, both_strands=False)
    assert np.abs(one[0] - one[1]).max() > 0


def test_counting_is_fast():
    tokens = np.random.default_rng(0).integers(7, 11, (1000, 4096)).astype(np.uint8)
    started = time.perf_counter()
    kmer_tables(tokens, np.full(1000, 4096))
    assert time.perf_counter() - started < 10  # about half a second on a quiet core


def test_the_network_is_the_published_one_at_1024():
    published = nn.Sequential(  # written out as in the GenomicBenchmarks paper's code, for an input of 1,024
        nn.Conv1d(100, 16, 8), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(8, 4, 8), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2),
        nn.Flatten(), nn.Linear(484, 512), nn.Linear(512, 1),
    )  # fmt: skip
    model = BaselineCNN(1)
    assert sum(p.numel() for p in model.parameters()) == 264_197
    ours = [model.conv1, model.norm1, model.conv2, model.norm2, model.conv3, model.norm3, model.hidden, model.out]
    theirs = [layer for layer in published if list(layer.parameters())]
    for a, b in zip(ours, theirs):
        b.load_state_dict(a.state_dict())
    ids = torch.randint(3, 12, (3, 1024))
    expected = published(model.embedding(ids).transpose(1, 2))
    assert (model(ids) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("length", [1, 57, 64, 200, 5000])
def test_the_network_takes_any_length(length):
    assert BaselineCNN(3).eval()(torch.full((2, length), 7)).shape == (2, 3)


@pytest.mark.parametrize("kind, n_outputs", [("binary", 2), ("multi-class", 3), ("multi-label", 2), ("regression", 1)])
@pytest.mark.parametrize("baseline", [kmer_baseline, cnn_baseline])
def test_baselines_learn_planted_words(baseline, kind, n_outputs):
    place = None if baseline is kmer_baseline else 20  # the network reads positions, k-mers do not
    train, valid, test = (planted(n, kind, seed, place=place) for seed, n in enumerate((400, 100, 100)))
    options = {"ks": (2, 4), "penalties": (0.1, 1.0)} if baseline is kmer_baseline else {"seed": 1, "lr": 3e-3, "min_steps": 300}
    result = baseline(train, valid, test, kind, n_outputs, **options)
    base = chance(train, test, kind, n_outputs)
    if kind == "regression":
        assert result.predictions.shape == (100,)
        error = ((result.predictions - test.labels) ** 2).mean()
        assert error < 0.6 * ((base.predictions - test.labels) ** 2).mean()
        return
    assert result.predictions.shape == (100, n_outputs)
    if kind == "multi-label":
        right = ((result.predictions > 0.5) == test.labels).all(1).mean()
        assert right > 0.72
        return
    assert result.predictions.sum(1) == pytest.approx(1)
    accuracy = (result.predictions.argmax(1) == test.labels).mean()
    assert accuracy > 0.72 > (base.predictions.argmax(1) == test.labels).mean()


def test_the_network_gives_the_same_answer_in_any_order():
    train, valid, test = (planted(n, "binary", seed, 20, 200) for seed, n in enumerate((60, 20, 30)))
    shuffled = np.random.default_rng(0).permutation(30)
    other = Sequences(test.tokens[shuffled], test.lengths[shuffled], test.labels[shuffled])
    a, b = (
        cnn_baseline(train, valid, t, "binary", 2, seed=3, max_epochs=2, min_steps=1).predictions for t in (test, other)
    )
    assert b == pytest.approx(a[shuffled], abs=1e-5)


def test_a_share_that_is_the_same_in_all_training_sequences_says_nothing():
    """Rounding gave it a deviation of 1e-7, in which one base more or less was all that a sequence was judged by."""
    rng = np.random.default_rng(1)
    texts = ["".join(rng.permutation(list(13 * "A" + 11 * "C" + 9 * "G" + 8 * "T"))) for _ in range(301)]
    train = sequences(texts, (np.arange(301) % 4 > 0).astype(np.int64))
    result = kmer_baseline(train, train, sequences([texts[0], texts[0][1:] + "A"]), "binary", 2, ks=(1,), strands=(False,), penalties=(1.0,))
    assert np.allclose(result.predictions[:, 1], 0.75, atol=0.01)


def test_a_class_without_training_sequences_has_probability_zero():
    train, valid, test = (planted(30, "binary", seed) for seed in range(3))
    result = kmer_baseline(train, valid, test, "multi-class", 3, ks=(1,), penalties=(1.0,))
    assert (result.predictions[:, 2] == 0).all()


def test_a_k_that_does_not_fit_into_memory_is_left_out_and_named():
    train, valid, test = (planted(30, "binary", seed) for seed in range(3))
    result = kmer_baseline(train, valid, test, "binary", 2, ks=(1, 2, 5), penalties=(1.0,), max_bytes=100_000)
    assert "(k to 2 only: memory)" in result.detail


def test_shapes_are_checked():
    good = sequences(["ACGT", "AC"])
    for tokens, lengths, labels in [
        (good.tokens.astype(int), good.lengths, good.labels),
        (good.tokens, good.lengths[:1], good.labels),
        (good.tokens, good.lengths + 1, good.labels),
    ]:
        with pytest.raises(ValueError):
            Sequences(tokens, lengths, labels)
