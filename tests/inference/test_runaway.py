"""The runaway detector: each mark on a sound made for it, none on ordinary sound, and blocks of any size."""

import numpy as np
import pytest

from seqlab.inference.runaway import RunawayDetector
from seqlab.tokenizers.waveform import QUANTIZERS

RATE, Q = 8000, QUANTIZERS["mulaw-256"]
RNG = np.random.default_rng(0)
T = np.arange(4 * RATE) / RATE
TONE = 0.3 * np.sin(2 * np.pi * 220 * T) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * T))
VOICE = TONE + 0.02 * RNG.standard_normal(len(T))


def marks(*streams, block=1000):
    codes = np.stack([Q.encode(np.asarray(x, np.float32)) for x in streams])
    detector = RunawayDetector(len(streams), RATE, Q)
    for at in range(0, codes.shape[1], block):
        detector.watch(codes[:, at : at + block])
    return detector.finish()


def test_each_kind_is_marked_where_it_begins():
    def from_two_seconds(x):
        return np.where(T < 2, VOICE, x)

    found = marks(
        VOICE,
        from_two_seconds(np.sign(TONE)),
        from_two_seconds(np.full(len(T), 0.2)),
        from_two_seconds(0.2 * RNG.standard_normal(len(T))),
        from_two_seconds(np.zeros(len(T))),
        np.zeros(len(T)),
    )
    assert found[0] == {}
    assert found[1]["clipped"] == pytest.approx(2.0, abs=0.01)
    assert found[2] == {"constant": pytest.approx(2.0, abs=0.01)}
    assert found[3] == {"noise": pytest.approx(2.0, abs=0.01)}
    assert found[4] == {"silent": pytest.approx(2.0, abs=0.01)}
    assert found[5] == {"silent": 0.0}


def test_a_pause_or_a_short_silence_at_the_end_is_no_mark():
    pause = np.where((T > 0.5) & (T < 3.0), 0.0, VOICE)
    end = np.where(T < 3.0, VOICE, 0.0)
    assert marks(pause, end) == [{}, {}]


def test_the_size_of_blocks_does_not_matter():
    x = np.where(T < 2, VOICE, 0.2 * RNG.standard_normal(len(T)))
    expected = marks(x, TONE)
    assert all(marks(x, TONE, block=size) == expected for size in (333, 4000, 32000))


def test_short_sounds_are_looked_at_too():
    assert marks(np.zeros(500)) == [{"silent": 0.0}]
    assert "clipped" in marks(np.ones(500))[0] and marks(VOICE[:500]) == [{}]


def test_the_watch_can_be_saved_and_continued():
    codes = Q.encode(np.where(T < 2, VOICE, 0.2 * RNG.standard_normal(len(T))).astype(np.float32))[None]
    whole = RunawayDetector(1, RATE, Q)
    whole.watch(codes)
    first = RunawayDetector(1, RATE, Q)
    first.watch(codes[:, :18_123])
    second = RunawayDetector(1, RATE, Q)
    second.load_state_dict(first.state_dict())
    second.watch(codes[:, 18_123:])
    assert second.finish() == whole.finish() != [{}]
