"""The definition of decoding: the model's own forward pass on one token at a time, then sampling.sample."""

import torch
from torch import Tensor

from seqlab.ops.decode.request import Request
from seqlab.ops.decode.sampling import Sampling, draw, forbid, sample


def unavailable(request: Request | None = None) -> str | None:
    """Always there; weights as the model has them."""
    return None


def one_token(request: Request, token: Tensor, state, r: Tensor | None, sampling: Sampling, forced: Tensor | None):
    """Feed token (b): (next token (b), its log-probability (b), the state). `forced` (b) takes the place of a draw."""
    extra = {} if request.classes is None else {"classes": request.classes}
    with torch.autocast(request.device.type, request.dtype, enabled=request.dtype != torch.float32):
        logits, state = request.model(token[:, None], state, **extra)
    logits = logits[:, 0].float()
    drawn = guided(logits, request.guidance) if request.guidance else logits
    logits = forbid(logits, request.allowed)
    following = sample(forbid(drawn, request.allowed), r, sampling) if forced is None else forced
    return following, logits.log_softmax(-1).gather(-1, following[:, None])[:, 0], state


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Logits (b vocab) of pairs of rows -> what both rows of each pair draw from (b vocab)."""
    told, untold = logits[0::2], logits[1::2]
    return (told + guidance * (told - untold)).repeat_interleave(2, 0)


class Runner:
    """Runs the tokens of all streams with the model itself."""

    def __init__(self, request: Request):
        self._request, self._state = request, None

    def load(self, state) -> None:
        """Take over the backbone's state."""
        self._state = state

    def state(self):
        """The backbone's state after all tokens so far."""
        return self._state

    def run(
        self, token: Tensor, position: int, n: int, sampling: Sampling, keys: Tensor, forced: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """n tokens a stream, (b n) int64, and their log-probabilities (b n); see Decoder."""
        tokens, log_probs = [], []
        for i in range(n):
            given = None if forced is None else forced[:, i]
            r = draw(keys, position + i)
            token, log_prob, self._state = one_token(self._request, token, self._state, r, sampling, given)
            tokens.append(token)
            log_probs.append(log_prob)
        return torch.stack(tokens, 1), torch.stack(log_probs, 1)
