"""Quantizers: torchaudio as the oracle, round trips, clamping, monotony, edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlab.tokenizers.waveform import DEFAULT, QUANTIZERS

ALL = sorted(QUANTIZERS)
CODES = np.arange(256, dtype=np.uint8)


def torchaudio_functional():
    try:
        import torchaudio.functional as functional
    except (ImportError, RuntimeError, OSError) as error:  # the pair of torch and torchaudio may not fit
        pytest.skip(f"torchaudio does not import here: {str(error).splitlines()[0]}")
    return functional


def test_mulaw_equals_torchaudio_on_every_16_bit_sample_and_on_a_dense_grid():
    import torch

    functional = torchaudio_functional()
    quantizer = QUANTIZERS["mulaw-256"]
    pcm = np.arange(-32768, 32768).astype(np.float32) / 32768
    expected = functional.mu_law_encoding(torch.from_numpy(pcm), 256).numpy()
    assert (quantizer.encode(pcm) == expected).all()
    grid = np.random.default_rng(0).uniform(-1, 1, 300_000).astype(np.float32)
    expected = functional.mu_law_encoding(torch.from_numpy(grid), 256).numpy()
    assert (quantizer.encode(grid) != expected).mean() < 2e-5  # the last bit of two logarithms, at an edge
    decoded = functional.mu_law_decoding(torch.from_numpy(CODES.astype(np.int64)), 256).numpy()
    np.testing.assert_allclose(quantizer.decode(CODES), decoded, atol=3e-7)


@pytest.mark.parametrize("name", ["mulaw-256", "linear-256"])
def test_code_to_sound_to_code_changes_nothing(name):
    quantizer = QUANTIZERS[name]
    assert (quantizer.encode(quantizer.decode(CODES)) == CODES).all()


def test_the_published_variant_is_not_safe_to_repeat():
    """About half of the codes change; code 0 is -1 and the top one stays below +1 (0.957)."""
    quantizer = QUANTIZERS["sashimi-mulaw"]
    changed = (quantizer.encode(quantizer.decode(CODES)) != CODES).sum()
    assert 100 < changed < 200
    assert quantizer.levels[0] == -1 and quantizer.levels[-1] == pytest.approx(0.957, abs=2e-3)


@pytest.mark.parametrize("name", ALL)
def test_edges_agree_with_encode(name):
    quantizer = QUANTIZERS[name]
    edges = quantizer.edges()
    assert len(edges) == 257 and (np.diff(edges) > 0).all()
    samples = np.random.default_rng(1).uniform(-1, 1, 50_000).astype(np.float32)
    by_edges = np.searchsorted(edges, samples.astype(np.float64), side="right") - 1
    assert (by_edges != quantizer.encode(samples)).mean() < 1e-3


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=50))
def test_clamped_monotone_and_close(name, values):
    quantizer = QUANTIZERS[name]
    x = np.sort(np.array(values, np.float32))
    codes = quantizer.encode(x)
    assert codes.dtype == np.uint8 and (np.diff(codes.astype(int)) >= 0).all()
    assert (quantizer.encode(np.clip(x, -1, 1)) == codes).all()
    error = np.abs(quantizer.decode(codes) - np.clip(x, -1, 1))
    assert error.max() <= (0.05 if "mulaw" in name else 1 / 127)


def test_silence_is_one_code_and_quiet():
    for quantizer in QUANTIZERS.values():
        assert abs(int(quantizer.encode(np.zeros(3))[0]) - quantizer.zero) <= 1
        assert abs(quantizer.decode(np.array([quantizer.zero]))[0]) < 1e-3
    assert QUANTIZERS[DEFAULT].encode(np.zeros(1))[0] == 128


@pytest.mark.parametrize("name", QUANTIZERS)
def test_integer_samples_and_false_codes_are_refused(name):
    """Samples of 16 bits all became the loudest codes, and code 300 was decoded as 44."""
    quantizer = QUANTIZERS[name]
    with pytest.raises(ValueError, match=r"samples are int16, -1000 .. 1000; amplitudes lie in \[-1, 1\]: samples / 32768"):
        quantizer.encode(np.array([0, 1000, -1000], np.int16))
    assert quantizer.encode([0, 1, -1]).dtype == np.uint8  # amplitudes that happen to be whole
    for codes in ([300], [-1], [1.5]):
        with pytest.raises(ValueError, match="codes must be integers in 0 .. 255"):
            quantizer.decode(np.array(codes))
    assert quantizer.decode(np.array([0, 255])).dtype == np.float32
