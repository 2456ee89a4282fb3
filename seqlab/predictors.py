"""Predictors of sound that need no training on a GPU: what a model of audio is measured against.

    unigram       how often each code occurs in the training split
    Markov 1, 2   a code from the one or two codes before it, by counting, each order smoothed by the one below
    adaptive      linear prediction that adapts to the recording: least squares over the recent past (the criterion of RLS),
                  refitted every few samples, then a mixture of logistic distributions around the prediction, as wide as the
                  recent errors, integrated over each code's interval of amplitudes

All are fitted on the training split, their few settings chosen on the validation split, and all score whatever spans of
samples they are given, each sample from those before it in its span (and one before the span: see `Span`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from seqlab.dataset import TokenStore
from seqlab.tokenizers.waveform import LEVELS, QUANTIZERS

Span = tuple[int, int, int]
"""(start, end, start of its recording) in a store's global coordinates: samples start .. end - 1 are scored. What stands
before sample `start` is the sample before it, or silence if the recording starts there."""

_SMOOTHING = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_CHUNK = 1 << 20
_SELECT = 200_000  # samples of the validation split on which settings are chosen
_FIT = 400_000  # samples of the training split on which the adaptive predictor's widths and weights are fitted


# -- counting ------------------------------------------------------------------------------------------------------
class CodeMarkov:
    """Orders 0 to 2 over 256 codes.

        p2(c | a b) = (n(a b c) + k2 p1(c | b)) / (n(a b) + k2)
        p1(c | b)   = (n(b c) + k1 p0(c)) / (n(b) + k1)
        p0(c)       = (n(c) + 1/2) / (n + 128)
    """

    ORDERS = (0, 1, 2)

    def __init__(self, counts: list[np.ndarray], smoothing: tuple[float, float]):
        self.counts, self.smoothing = counts, smoothing  # counts[k]: (256,) * (k + 1), oldest code first
        self.totals = [None, counts[1].sum(1, dtype=np.int64), counts[2].sum(2, dtype=np.int64)]

    @classmethod
    def fit(cls, store: TokenStore, split: str = "train") -> "CodeMarkov":
        pairs = np.zeros(LEVELS**2, np.int64)
        triples = np.zeros(LEVELS**3, np.uint32)
        for a, b, c in _triples(store, whole_intervals(store, split)):
            code = (a.astype(np.int64) << 16) | (b.astype(np.int64) << 8) | c
            seen, times = np.unique(code, return_counts=True)
            triples[seen] += times.astype(np.uint32)
            pairs += np.bincount(code & 0xFFFF, minlength=LEVELS**2)
        pairs, triples = pairs.reshape(LEVELS, LEVELS), triples.reshape(LEVELS, LEVELS, LEVELS)
        model = cls([pairs.sum(0), pairs, triples], (1.0, 1.0))
        spans = take(whole_intervals(store, "valid"), _SELECT)
        if not spans:
            return model
        contexts = [np.concatenate(part) for part in zip(*_triples(store, spans))]
        k1 = min(_SMOOTHING, key=lambda k: model._bits(*contexts, (k, 1.0))[1].mean())
        k2 = min(_SMOOTHING, key=lambda k: model._bits(*contexts, (k1, k))[2].mean())
        model.smoothing = (k1, k2)
        return model

    def score(self, store: TokenStore, spans: Iterable[Span]) -> dict[int, np.ndarray]:
        """Bits of every sample of the spans, in their order, by order of the model."""
        parts: dict[int, list[np.ndarray]] = {k: [] for k in self.ORDERS}
        for a, b, c in _triples(store, spans):
            for k, bits in enumerate(self._bits(a, b, c, self.smoothing)):
                parts[k].append(bits)
        return {k: np.concatenate(values) for k, values in parts.items()}

    def _bits(self, a, b, c, smoothing: tuple[float, float]) -> list[np.ndarray]:
        k1, k2 = smoothing
        n0, n1, n2 = self.counts
        p0 = (n0[c] + 0.5) / (n0.sum() + LEVELS / 2)
        p1 = (n1[b, c] + k1 * p0) / (self.totals[1][b] + k1)
        p2 = (n2[a, b, c] + k2 * p1) / (self.totals[2][a, b] + k2)
        return [-np.log2(p) for p in (p0, p1, p2)]


def _triples(store: TokenStore, spans: Iterable[Span]):
    """(two before, one before, code), (n,) each, of every sample of the spans, in pieces."""
    zero = QUANTIZERS[store.manifest["tokenizer"]].zero
    for start, end, begin in spans:
        for at in range(start, end, _CHUNK):
            stop = min(end, at + _CHUNK)
            # within a span everything before counts; at its start only one sample of the recording does
            lowest = start - 1 if start > begin else start
            codes = store.tokens[max(lowest, at - 2) : stop]
            missing = 2 - (at - max(lowest, at - 2))
            codes = np.concatenate([np.full(missing, zero, np.uint8), codes])
            yield codes[:-2], codes[1:-1], codes[2:]


def whole_intervals(store: TokenStore, split: str) -> list[Span]:
    return [(start, end, start) for start, end in store.intervals(split).tolist()]


def take(spans: list[Span], samples: int, piece: int = 1 << 14) -> list[Span]:
    """At most about so many samples of the spans, in pieces of at most `piece`, evenly spread over them."""
    total = sum(end - start for start, end, _ in spans)
    if total <= samples:
        return spans
    pieces = [(at, min(at + piece, end), begin) for start, end, begin in spans for at in range(start, end, piece)]
    keep = max(1, len(pieces) * samples // total)
    return [pieces[i * len(pieces) // keep] for i in range(keep)]


# -- adaptive linear prediction ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LinearSettings:
    order: int = 32
    memory: float = 0.998  # weight of a sample relative to the next one, in the least squares
    width_memory: float = 0.95  # the same for the running mean of the absolute error
    refit_every: int = 16


SETTINGS = (
    LinearSettings(16, 0.998, 0.95),
    LinearSettings(32, 0.998, 0.95),
    LinearSettings(32, 0.9995, 0.95),
    LinearSettings(32, 0.998, 0.8),
)
MULTIPLES = 2.0 ** np.arange(-4, 3.5, 0.75)  # widths of the mixture's components, in running mean absolute errors
_BUCKETS = 12  # the mixture's weights depend on how wide the running error is
_PRIOR = 100.0  # samples' worth of the training split's correlations with which every recording begins


class AdaptivePredictor:
    """settings, the training split's mean correlations, and mixture weights by width of the recent error."""

    def __init__(self, store: TokenStore, settings: LinearSettings, correlations: np.ndarray, weights: np.ndarray | None):
        quantizer = QUANTIZERS[store.manifest["tokenizer"]]
        self.settings, self.correlations, self.weights = settings, correlations, weights
        self.levels, self.edges = quantizer.levels.astype(np.float64), quantizer.edges()
        self.floor = float(np.diff(self.levels).min()) / 4

    @classmethod
    def fit(cls, store: TokenStore) -> "AdaptivePredictor":
        spans = take(whole_intervals(store, "train"), _FIT)
        select = take(whole_intervals(store, "valid"), _SELECT) or spans
        levels = QUANTIZERS[store.manifest["tokenizer"]].levels
        products = correlations(store, levels, max(settings.order for settings in SETTINGS))
        best = None
        for settings in SETTINGS:
            model = cls(store, settings, products[: settings.order + 1], None)
            model._fit_weights(store, spans)
            bits = model.score(store, select).mean()
            if best is None or bits < best[0]:
                best = (bits, model)
        return best[1]

    def score(self, store: TokenStore, spans: Iterable[Span]) -> np.ndarray:
        """Bits of every sample of the spans, in their order."""
        parts = []
        for start, end, _ in spans:
            codes = np.ascontiguousarray(store.tokens[start:end])
            for masses, bucket in self._masses(codes):
                p = (masses * self.weights[bucket]).sum(1)
                parts.append(-np.log2(0.999 * p + 0.001 / LEVELS))
        return np.concatenate(parts)

    def predict(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(predictions, running mean absolute errors) for each sample of one stretch, both from the samples before it."""
        s = self.settings
        kernels = _compiled()
        return kernels.predict(
            self.levels[codes], self.correlations, s.order, s.memory, s.width_memory, s.refit_every, _PRIOR, self.floor
        )

    def _masses(self, codes: np.ndarray):
        """((n, components) probabilities of each sample's code, (n,) bucket of its width), in pieces."""
        prediction, width = self.predict(codes)
        for at in range(0, len(codes), 1 << 16):
            part = slice(at, at + (1 << 16))
            masses = _compiled().masses(codes[part], prediction[part], width[part], self.edges, MULTIPLES)
            yield masses, self._bucket(width[part])

    def _bucket(self, width: np.ndarray) -> np.ndarray:
        position = np.log2(width / self.floor)
        return np.clip(position, 0, _BUCKETS - 1).astype(np.int64)

    def _fit_weights(self, store: TokenStore, spans: list[Span]) -> None:
        """Expectation-maximisation of the mixture's weights, each bucket apart."""
        pieces = [piece for start, end, _ in spans for piece in self._masses(np.ascontiguousarray(store.tokens[start:end]))]
        masses = np.concatenate([m for m, _ in pieces])
        buckets = np.concatenate([b for _, b in pieces])
        self.weights = np.full((_BUCKETS, len(MULTIPLES)), 1 / len(MULTIPLES))
        for bucket in range(_BUCKETS):
            mine = masses[buckets == bucket]
            w = self.weights[bucket]
            for _ in range(60 if len(mine) else 0):
                share = mine * w + 1e-12
                share /= share.sum(1, keepdims=True)
                w = (share.sum(0) + 1.0) / (len(mine) + len(w))
            self.weights[bucket] = w


def correlations(store: TokenStore, levels: np.ndarray, order: int) -> np.ndarray:
    """(order + 1,) mean product of a sample of the training split with the one `lag` before it."""
    sums, count = np.zeros(order + 1), 0
    for start, end, _ in take(whole_intervals(store, "train"), _FIT):
        x = levels[store.tokens[start:end]].astype(np.float64)
        count += len(x)
        for lag in range(min(order + 1, len(x))):
            sums[lag] += x[lag:] @ x[: len(x) - lag]
    return sums / max(1, count)


_kernels = None


def _compiled():
    """The two loops over samples, compiled on first use; numba is not imported before."""
    global _kernels
    if _kernels is None:
        from seqlab import predictor_kernels as _kernels
    return _kernels

