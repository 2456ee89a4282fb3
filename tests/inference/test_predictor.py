"""An answer depends on its own sequence alone, to the bit; long sequences in pieces are the whole."""

import numpy as np
import pytest
import torch

from seqlab import homology
from seqlab.classifier import ClassifierConfig, SequenceClassifier
from seqlab.inference.classify import Predictor, padded_length, predict_records
from seqlab.tokenizers import nucleotide


def classifier(**options):
    torch.manual_seed(0)
    options = dict(d_model=32, n_layer=2, d_state=4) | options
    model = SequenceClassifier(ClassifierConfig(**options), 3).eval()
    with torch.no_grad():
        model.head.linear.weight.normal_(std=0.5)
        if model.genes is not None:  # as if they had been fitted
            model.genes.emissions.copy_(torch.randn_like(model.genes.emissions).softmax(-1))
            model.genes.transitions.copy_(torch.randn_like(model.genes.transitions).softmax(-1))
        if model.repeats is not None:
            words = np.arange(4**8, step=2)
            model.repeats.fit(words, np.stack([words % 7, words % 3, words % 5], 1) > 0)
            model.head.repeat_scale.copy_(torch.tensor([5.0, 0.5]))
        for part in (model.homology, model.composition):
            if part is not None:
                part.scale.copy_(torch.tensor([[1.5, 0.3]]))
        if model.homology is not None:  # the last class holds nothing
            model.homology.keep(homology.keep([[s - nucleotide.A] for s in sequences([1000, 300])] + [[]], 2000))
            for weight in model.homology.parameters():
                weight.normal_(std=0.3)
            model.composition.weight.normal_(std=5.0)
    return model


def sequences(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(7, 11, length).astype(np.uint8) for length in lengths]


KINDS = [dict(), dict(pooling="last"), dict(direction="bidirectional"), dict(strand="none")]
EVIDENCE = dict(pooling="evidence", length_scale=True, kmer=3, period=3)
GENES = dict(pooling="evidence", length_scale=True, gene_order=3, repeat_word=8, homology=2000, composition=4)
KINDS += [EVIDENCE, GENES]
CENTRE = dict(direction="bidirectional", pooling="centre")


@pytest.mark.parametrize("kind", [dict(), dict(direction="bidirectional"), EVIDENCE, GENES], ids=str)
def test_batch_size_and_order_change_no_bit(kind):
    rng = np.random.default_rng(1)
    data = sequences([1, 50, 64, 65, 300, *rng.integers(50, 100, 12)])
    predictor = Predictor(classifier(**kind, d_model=16, n_layer=1), tile=256, piece=200)
    together = np.stack(list(predictor.outputs(data, batch_size=64)))
    for size in (1, 5):
        assert np.array_equal(together, np.stack(list(predictor.outputs(data, batch_size=size))))
    order = rng.permutation(len(data))
    shuffled = np.stack(list(predictor.outputs([data[i] for i in order], batch_size=16)))
    assert np.array_equal(together[order], shuffled)
    bases = np.stack(list(predictor.outputs(data, batch_size=64, batch_bases=150)))
    assert np.array_equal(together, bases)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_answers_are_the_models_own(kind):
    model = classifier(**kind)
    data = sequences([1, 50, 90, 600])
    answers = list(Predictor(model, tile=256, piece=600).outputs(data))
    for sequence, answer in zip(data, answers):
        with torch.no_grad():
            assert np.allclose(model(torch.from_numpy(sequence)[None])[0], answer, atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if "direction" not in k] + [CENTRE], ids=str)
def test_long_sequences_in_pieces_are_the_whole(kind):
    model = classifier(**kind)
    (sequence,) = sequences([1000])
    (whole,) = Predictor(model, piece=2000).outputs([sequence])
    (pieces,) = Predictor(model, piece=128).outputs([sequence])
    assert np.allclose(whole, pieces, atol=1e-5)


def test_pieces_of_a_bidirectional_model_are_averaged_by_length():
    model = classifier(direction="bidirectional", strand="none")
    (sequence,) = sequences([150])
    (answer,) = Predictor(model, piece=100).outputs([sequence])
    first, second = Predictor(model, piece=100).outputs([sequence[:100], sequence[100:]])
    assert np.allclose(answer, (2 * first + second) / 3, atol=1e-5)


def test_padded_lengths():
    assert [padded_length(n) for n in (0, 1, 64, 65, 80, 81, 128, 129, 4096, 4097)] == [64, 64, 64, 80, 80, 96, 128, 160, 4096, 5120]
    for n in range(64, 3000):
        assert n <= padded_length(n) <= 1.25 * n + 1 and padded_length(padded_length(n)) == padded_length(n)


def test_records_without_a_base_have_no_label():
    unknown = np.full(30, nucleotide.N, np.uint8)
    (known,) = sequences([40])
    records = [("n", unknown), ("k", known), ("e", unknown[:0])]
    interpret = lambda outputs: (["x"] * len(outputs), outputs)  # noqa: E731
    got = list(predict_records(classifier(), records, interpret, batch_size=2))
    assert [(name, label, length) for name, label, _, length in got] == [("n", None, 30), ("k", "x", 40), ("e", None, 0)]
    assert got[0][2] is None and got[1][2].shape == (3,)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [dict(kmer=4), dict(direction="bidirectional"), GENES], ids=str)
def test_company_changes_no_bit_on_a_gpu(kind):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    data = sequences(np.random.default_rng(2).integers(50, 3000, 200).tolist() + [200_000])
    predictor = Predictor(classifier(**kind, d_model=64), "cuda")
    together = np.stack(list(predictor.outputs(data, batch_size=64)))
    alone = np.stack(list(predictor.outputs(data[:30] + data[-1:], batch_size=1)))
    assert np.array_equal(alone, np.concatenate([together[:30], together[-1:]]))
    order = np.random.default_rng(3).permutation(len(data))
    assert np.array_equal(together[order], np.stack(list(predictor.outputs([data[i] for i in order]))))
