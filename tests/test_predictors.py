"""The simple predictors of sound: by hand, sums of probabilities, causality, and that they are as good as they should be."""

import numpy as np
import pytest
import soundfile

from data_prep.audio import prepare_audio
from seqlab.dataset import TokenStore
from seqlab.predictors import (
    AdaptivePredictor,
    CodeMarkov,
    LinearSettings,
    correlations,
    take,
    whole_intervals,
)
from seqlab.tokenizers.waveform import QUANTIZERS


def store_of(folder, recordings, rate=8000, **options) -> TokenStore:
    (folder / "in").mkdir()
    for i, x in enumerate(recordings):
        soundfile.write(folder / "in" / f"{i:03d}.wav", x, rate, subtype="FLOAT")
    return TokenStore.open(prepare_audio(folder / "in", folder / "data", sample_rate=rate, **options))


def resonance(n, seed, noise=0.02):
    """An AR(2) process: x[t] = 1.8 x[t-1] - 0.95 x[t-2] + noise."""
    e = noise * np.random.default_rng(seed).standard_normal(n)
    x = np.zeros(n)
    for t in range(2, n):
        x[t] = 1.8 * x[t - 1] - 0.95 * x[t - 2] + e[t]
    return x


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("ar"), [resonance(1500, i) for i in range(30)])


def test_markov_by_hand(tmp_path):
    levels = QUANTIZERS["mulaw-256"].levels
    train = np.array([10, 20, 10, 20, 30])
    store = store_of(tmp_path, [levels[train], levels[[10, 20]], levels[[20, 10]]], test=["001.wav"], valid=["002.wav"])
    model = CodeMarkov.fit(store)
    k1, k2 = model.smoothing
    p0 = (np.array([2, 2]) + 0.5) / (5 + 128)  # codes 10 and 20
    z = 128
    p1_10 = (1 + k1 * p0[0]) / (1 + k1)  # after silence: 10, once of once
    p1_20 = (2 + k1 * p0[1]) / (2 + k1)  # after 10: 20, twice of twice
    p2_10 = (1 + k2 * p1_10) / (1 + k2)  # after silence, silence
    p2_20 = (1 + k2 * p1_20) / (1 + k2)  # after silence, 10
    bits = model.score(store, whole_intervals(store, "test"))
    np.testing.assert_allclose(bits[0], -np.log2(p0))
    np.testing.assert_allclose(bits[1], -np.log2([p1_10, p1_20]))
    np.testing.assert_allclose(bits[2], -np.log2([p2_10, p2_20]))
    assert model.counts[2][z, z, 10] == 1 and model.counts[2].sum() == 5


def test_markov_probabilities_sum_to_one(store):
    model = CodeMarkov.fit(store)
    every = np.arange(256, dtype=np.uint8)
    for a, b in ((128, 128), (100, 90), (7, 250)):
        for bits in model._bits(np.full(256, a, np.uint8), np.full(256, b, np.uint8), every, model.smoothing):
            assert (2.0**-bits).sum() == pytest.approx(1)


def test_a_span_inside_a_recording_sees_one_sample_before_it(store):
    model = CodeMarkov.fit(store)
    start, end, begin = whole_intervals(store, "test")[0]
    inside = model.score(store, [(start + 10, start + 13, begin)])
    codes = store.tokens[start + 8 : start + 13]
    zero = np.uint8(128)
    expected = model._bits(
        np.array([zero, codes[1], codes[2]]), np.array([codes[1], codes[2], codes[3]]), codes[2:5], model.smoothing
    )
    for order in (0, 1, 2):
        np.testing.assert_allclose(inside[order], expected[order])


def test_least_squares_equal_numpys(store):
    """Without forgetting, and with a prior that weighs nothing, the prediction is that of the whole past."""
    x = resonance(400, 99)
    from seqlab.predictor_kernels import predict

    order = 4
    prediction, width = predict(x, np.full(order + 1, 1e-12), order, 1.0, 0.9, 1, 1.0, 1e-6)
    padded = np.concatenate([np.zeros(order), x])
    for t in (100, 250, 399):
        past = np.stack([padded[i : i + order][::-1] for i in range(t)])  # newest first
        # the ridge of the kernel, relative to the mean energy
        gram = past.T @ past
        gram += np.eye(order) * (1e-5 * np.trace(gram) / order + 1e-9)
        w = np.linalg.solve(gram, past.T @ x[:t])
        assert prediction[t] == pytest.approx(padded[t : t + order][::-1] @ w, abs=1e-6)
    e = np.abs(x - prediction)
    assert width[11] == pytest.approx(0.9 * width[10] + 0.1 * e[10], abs=1e-9)


def test_the_adaptive_predictor_knows_only_the_past_and_is_a_distribution(store):
    model = AdaptivePredictor.fit(store)
    codes = np.array(store.tokens[store.intervals("test")[0][0] :][:600])
    before = model.predict(codes)
    changed = codes.copy()
    changed[300:] = 255
    after = model.predict(changed)
    for one, other in zip(before, after):
        np.testing.assert_array_equal(one[:301], other[:301])
    total = np.zeros(3)
    for code in range(256):  # the probabilities of all codes at three places
        for i, t in enumerate((5, 150, 400)):
            part = codes[: t + 1].copy()
            part[t] = code
            ((masses, bucket),) = model._masses(part)
            total[i] += (masses[t] * model.weights[bucket[t]]).sum()
    np.testing.assert_allclose(total, 1, atol=1e-9)


def test_the_adaptive_predictor_comes_near_the_entropy_of_a_linear_process(store):
    """Gaussian noise of a known size, measured against the width of the codes: the ideal predictor's bits are known."""
    model = AdaptivePredictor.fit(store)
    spans = whole_intervals(store, "test")
    bits = model.score(store, spans)
    assert len(bits) == sum(end - start for start, end, _ in spans)
    quantizer = QUANTIZERS["mulaw-256"]
    step = np.diff(np.clip(quantizer.edges(), -1, 1))[store.tokens[spans[0][0] : spans[0][1]]]
    ideal = 0.5 * np.log2(2 * np.pi * np.e * 0.02**2) - np.log2(step).mean()
    markov = CodeMarkov.fit(store).score(store, spans)
    assert ideal - 0.05 < bits.mean() < ideal + 0.6
    assert bits.mean() < min(values.mean() for values in markov.values()) - 0.5


def test_correlations_by_hand(tmp_path):
    store = store_of(tmp_path, [QUANTIZERS["mulaw-256"].levels[[100, 150, 128]]] * 3, test=["000.wav"], valid=["001.wav"])
    levels = QUANTIZERS["mulaw-256"].levels.astype(np.float64)
    a, b, c = levels[[100, 150, 128]]
    got = correlations(store, levels, 2)
    np.testing.assert_allclose(got, [(a * a + b * b + c * c) / 3, (a * b + b * c) / 3, a * c / 3])
    np.testing.assert_array_equal(got[:2], correlations(store, levels, 1))  # those of a lower order are a part of them


def test_taking_some_of_the_spans():
    spans = [(i * 10, i * 10 + 10, i * 10) for i in range(20)]
    assert take(spans, 1000) == spans
    assert take(spans, 50) == spans[::4]
    assert take([(0, 1000, 0), (1000, 1400, 1000)], 700, piece=300) == [(0, 300, 0), (600, 900, 0), (1000, 1300, 1000)]


def test_silence_and_square_waves_do_not_break_it(tmp_path):
    recordings = [np.zeros(800)] * 4 + [np.sign(np.sin(np.arange(800) / 5))] * 4 + [np.random.default_rng(0).uniform(-1, 1, 800)] * 4
    store = store_of(tmp_path, recordings, test=["00[048].wav"], valid=["001.wav"])
    bits = AdaptivePredictor.fit(store).score(store, whole_intervals(store, "test"))
    assert np.isfinite(bits).all() and bits[:800].mean() < 1.0
    assert LinearSettings().order == 32
