"""Samples of sound <-> 8-bit codes, one byte a sample: mu-law and linear, and the two variants that SaShiMi published.

    mulaw-256       torchaudio's mu_law_encoding(x, 256), after clamping x to [-1, 1]; the default
    linear-256      8-bit PCM: floor(128 x + 1/2) + 128; exact zero and equal steps
    sashimi-mulaw   state-spaces/s4: another rounding, decoded half a step low; for comparison with published numbers
    sashimi-linear  the same of the linear one

The first two are safe to repeat: encode(decode(code)) is code, for all 256. (SaShiMi's is not, for half of them, which is why
it is not the default.) All take amplitudes on a fixed scale. SaShiMi also stretches every chunk of sound to [-1, 1] first;
nothing here does, because then one click moves the code of silence, and a prompt cannot be encoded like the training data.
These are not the codes of G.711.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEVELS = 256
MU = LEVELS - 1


@dataclass(frozen=True)
class Quantizer:
    """amplitudes float32, any shape, clamped to [-1, 1] <-> codes uint8. NaN has no code: refuse it before.

    Raises ValueError for samples on the scale of integers, which would all be clamped, and for codes that are none.
    """

    name: str
    _encode: Callable[[np.ndarray], np.ndarray]
    _table: np.ndarray  # (256,) float32: what each code stands for

    def encode(self, samples: np.ndarray) -> np.ndarray:
        samples = np.asarray(samples)
        if samples.dtype.kind in "iu" and samples.size and (samples.min() < -1 or samples.max() > 1):
            scale = f"/ {-int(np.iinfo(samples.dtype).min)}" if samples.dtype in (np.int16, np.int32) else "on that scale"
            raise ValueError(f"samples are {samples.dtype}, {samples.min()} .. {samples.max()}; amplitudes lie in [-1, 1]: samples {scale}")
        x = np.clip(samples.astype(np.float32), np.float32(-1), np.float32(1))
        return self._encode(x).astype(np.uint8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        codes = np.asarray(codes)
        if codes.dtype != np.uint8 and codes.size:
            if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= LEVELS:
                seen = f"{codes.min()} .. {codes.max()}" if codes.dtype.kind in "iuf" else "no numbers"
                raise ValueError(f"codes must be integers in 0 .. {LEVELS - 1}, got {codes.dtype}, {seen}")
        return self._table[codes.astype(np.uint8)]

    @property
    def levels(self) -> np.ndarray:
        """(256,) float32, increasing: the amplitude of every code."""
        return self._table

    @property
    def zero(self) -> int:
        """The code of silence, and what stands before the first sample of a recording."""
        return 128

    def edges(self) -> np.ndarray:
        """(257,) float64: code k is what amplitudes in [edges[k], edges[k + 1]) become; the outermost are infinite."""
        inner = {
            "mulaw-256": lambda k: _expand((k - 0.5) / MU * 2 - 1),
            "linear-256": lambda k: (k - 0.5 - 128) / 128,
            "sashimi-mulaw": lambda k: _expand(2 * (k - 0.005) / (LEVELS - 0.01) - 1),
            "sashimi-linear": lambda k: 2 * (k - 0.005) / (LEVELS - 0.01) - 1,
        }[self.name](np.arange(1, LEVELS, dtype=np.float64))
        return np.concatenate([[-np.inf], inner, [np.inf]])


def _compress(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.log1p(np.float32(MU) * np.abs(x)) / np.log1p(np.float32(MU))


def _expand(y: np.ndarray) -> np.ndarray:
    return np.sign(y) * np.expm1(np.abs(y) * np.log1p(y.dtype.type(MU))) / MU


def _sashimi_round(share: np.ndarray) -> np.ndarray:
    """[0, 1] -> 0 .. 255 as state-spaces/s4 does (src/dataloaders/audio.py: quantize, epsilon 0.01)."""
    return np.floor(share * np.float32(LEVELS - 0.01) + np.float32(0.005))


def _make() -> dict[str, Quantizer]:
    code = np.arange(LEVELS, dtype=np.float64)
    half = np.float32(0.5)
    # torchaudio: ((compressed + 1) / 2 * mu + 0.5) to integer, which rounds down, being positive
    mulaw = Quantizer(
        "mulaw-256",
        lambda x: np.floor((_compress(x) + 1) / 2 * np.float32(MU) + half),
        _expand(code / MU * 2 - 1).astype(np.float32),
    )
    linear = Quantizer(
        "linear-256",
        lambda x: np.minimum(np.floor(x * 128 + half) + 128, 255),
        ((code - 128) / 128).astype(np.float32),
    )
    sashimi_mulaw = Quantizer(
        "sashimi-mulaw",
        lambda x: _sashimi_round((_compress(x) + 1) / 2),
        _expand(code / 128 - 1).astype(np.float32),
    )
    sashimi_linear = Quantizer(
        "sashimi-linear",
        lambda x: _sashimi_round((x + 1) / 2),
        (code / 128 - 1).astype(np.float32),
    )
    return {q.name: q for q in (mulaw, linear, sashimi_mulaw, sashimi_linear)}


QUANTIZERS = _make()
DEFAULT = "mulaw-256"
