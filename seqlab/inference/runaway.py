"""Noticing when generated sound has run away: clipping, a stuck value, endless silence, noise.

A model of raw audio that leaves what it knows seldom comes back: it holds full scale, one value, or hiss. Sound is watched in
windows of half a second, while it is made:

    clipped     more than 5 % of the samples of a window are the lowest or the highest code
    constant    a window has one or two different codes and is not silence
    noise       the spectrum of two windows in a row is flat (flatness above 0.7; 1 is white noise) and they are louder than
                -40 dB of full scale
    silent      everything from some point on, or from the start, is below -60 dB, and that is longer than 2 seconds, or all
                there is

They are marks, not verdicts: a recording may well end in silence, and a cymbal is noise.
"""

from dataclasses import dataclass, field

import numpy as np

from seqlab.tokenizers.waveform import Quantizer


@dataclass
class _Stream:
    marks: dict[str, float] = field(default_factory=dict)  # mark -> second at which it began
    noisy: int = 0  # windows in a row
    silent_since: float | None = None


class RunawayDetector:
    """Watches `streams` streams; feed blocks of codes (streams, n) in order with `watch`, then read `marks`."""

    WINDOW_S, CLIPPED, FLATNESS, NOISE_DB, SILENCE_DB, SILENCE_S, SEGMENT = 0.5, 0.05, 0.7, -40.0, -60.0, 2.0, 256

    def __init__(self, streams: int, sample_rate: int, quantizer: Quantizer):
        self.sample_rate, self.quantizer = sample_rate, quantizer
        self.window = max(2, round(self.WINDOW_S * sample_rate))
        self._streams = [_Stream() for _ in range(streams)]
        self._held = np.empty((streams, 0), np.uint8)
        self._at = 0  # samples examined

    def watch(self, codes: np.ndarray) -> None:
        held = np.concatenate([self._held, codes], axis=1)
        while held.shape[1] >= self.window:
            self._examine(held[:, : self.window])
            held = held[:, self.window :]
        self._held = held

    def finish(self) -> list[dict[str, float]]:
        """The marks of every stream: name -> second at which it began. Ends the watch."""
        if self._held.shape[1] >= self.window // 2 or (not self._at and self._held.shape[1]):
            self._examine(self._held)
        self._held = self._held[:, :0]
        end = self._at / self.sample_rate
        for stream in self._streams:
            since = stream.silent_since
            if since is not None and (end - since >= self.SILENCE_S or since == 0):
                stream.marks.setdefault("silent", since)
        return [dict(stream.marks) for stream in self._streams]

    def state_dict(self) -> dict:
        return {
            "at": self._at,
            "held": self._held.tolist(),
            "streams": [[s.marks, s.noisy, s.silent_since] for s in self._streams],
        }

    def load_state_dict(self, state: dict) -> None:
        self._at = state["at"]
        self._held = np.array(state["held"], np.uint8).reshape(len(self._streams), -1)
        self._streams = [_Stream(dict(marks), noisy, since) for marks, noisy, since in state["streams"]]

    def _examine(self, codes: np.ndarray) -> None:
        begin = self._at / self.sample_rate
        self._at += codes.shape[1]
        samples = self.quantizer.decode(codes)
        level = 10 * np.log10(np.mean(samples.astype(np.float64) ** 2, axis=1) + 1e-12)
        clipped = ((codes == 0) | (codes == 255)).mean(axis=1) > self.CLIPPED
        flat = self._flatness(samples)
        for i, stream in enumerate(self._streams):
            is_silent = level[i] < self.SILENCE_DB
            if not is_silent:
                stream.silent_since = None
            elif stream.silent_since is None:
                stream.silent_since = begin
            if clipped[i]:
                stream.marks.setdefault("clipped", begin)
            if not is_silent and len(np.unique(codes[i])) <= 2:
                stream.marks.setdefault("constant", begin)
            stream.noisy = stream.noisy + 1 if flat[i] > self.FLATNESS and level[i] > self.NOISE_DB else 0
            if stream.noisy >= 2:
                stream.marks.setdefault("noise", begin - self.WINDOW_S)

    def _flatness(self, samples: np.ndarray) -> np.ndarray:
        """Geometric over arithmetic mean of the power spectrum (Welch, segments of 256 samples), (streams,)."""
        n = samples.shape[1] // self.SEGMENT
        if n < 4:
            return np.zeros(len(samples))
        segments = samples[:, : n * self.SEGMENT].reshape(len(samples), n, self.SEGMENT) * np.hanning(self.SEGMENT)
        power = (np.abs(np.fft.rfft(segments)) ** 2).mean(axis=1)[:, 1:-1] + 1e-12
        return np.exp(np.log(power).mean(axis=1)) / power.mean(axis=1)
