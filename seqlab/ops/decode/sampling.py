"""Drawing a token from logits: the definition that every back end of the decoder follows.

A draw is a function of (seed, stream, position) and of the logits, nothing else: no generator is carried along, so the
tokens do not depend on how generation is cut into blocks, on the batch or on the back end.

    h(seed, stream, position) = mix(mix(mix(seed g + 1) + stream g) + position g)     mod 2^64, mix: splitmix64's
    r = (top 23 bits of h + 1/2) / 2^23                                               in (0, 1), exact in float32

The distribution: logits of tokens that are not allowed are -inf; w = exp((logits - max) / temperature); the `top_k`
largest stay; of those the fewest, largest first, that hold `top_p` of their mass. Ties go to the lower token. The draw is
the first token whose running sum of w, in the order of the vocabulary, exceeds r times the sum. Temperature 0 takes the
largest logit. Log-probabilities are the model's own: temperature 1, nothing cut but what is not allowed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """temperature (0: the most probable token), top_k (0: all), top_p (1: all), seed."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: must be 0 (the most probable token) or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: must be 1 or more, or 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed: must lie in [0, 2^63), got {self.seed}")


def mix(z: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def stream_key(seed: int, stream: int) -> int:
    """What a stream adds its position to, as a signed 64-bit number (back ends compute on)."""
    key = mix((mix((seed * GOLDEN + 1) & _MASK) + stream * GOLDEN) & _MASK)
    return key - (1 << 64) if key >> 63 else key


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def draw(keys: Tensor, position: int | Tensor) -> Tensor:
    """keys (b) int64 of `stream_key`, position -> r (b) float32 in (0, 1)."""
    steps = position * _signed(GOLDEN) if isinstance(position, Tensor) else _signed((position * GOLDEN) & _MASK)
    z = keys + steps
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return (_shift(z, 41).float() + 0.5) * 2.0**-23


def forbid(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Logits (b vocab) with -inf where `allowed` (vocab) is False."""
    return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)


def sample(logits: Tensor, r: Tensor, sampling: Sampling) -> Tensor:
    """Logits (b vocab) float32 and r (b) -> tokens (b) int64."""
    top = logits.argmax(-1)
    if sampling.temperature == 0:
        return top
    weight = torch.exp((logits - logits.gather(-1, top[:, None])) * (1.0 / sampling.temperature))
    if sampling.top_k or sampling.top_p < 1:
        order = torch.argsort(logits, dim=-1, descending=True, stable=True)
        ranked = weight.gather(-1, order)
        if sampling.top_k:
            ranked = torch.where(torch.arange(logits.shape[-1], device=logits.device) < sampling.top_k, ranked, 0.0)
        if sampling.top_p < 1:
            before = ranked.cumsum(-1) - ranked
            ranked = torch.where(before < sampling.top_p * ranked.sum(-1, keepdim=True), ranked, 0.0)
        weight = torch.zeros_like(weight).scatter(-1, order, ranked)
    running = weight.cumsum(-1)
    token = (running <= r[:, None] * running[:, -1:]).sum(-1)
    # rounding may leave no running sum above the threshold: then the last token that can be drawn
    index = torch.arange(logits.shape[-1], device=logits.device)
    last = torch.where(weight > 0, index, 0).amax(-1)
    return torch.minimum(token, last)
