"""Decoding with CUDA graphs: one token of the model's own forward pass, drawing included, replayed as a whole.

Runs every causal model that `reference` runs, on any NVIDIA GPU. A U-Net does different work at different positions of its
frames: there is a graph for each, made when the position is first met.
"""

import torch
from torch import Tensor

from seqlab.ops.decode.program import map_tensors
from seqlab.ops.decode.reference import one_token
from seqlab.ops.decode.request import Request
from seqlab.ops.decode.sampling import Sampling, draw

ROOM = 1024
"""Tokens a stream that graphs may write before they are fetched."""


def unavailable(request: Request | None = None) -> str | None:
    """Needs an NVIDIA GPU."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use (see nvidia-smi)"
    if request is not None and request.device.type != "cuda":
        return f"the decoder is on {request.device}; pass device='cuda'"
    return None


class Runner:
    """Runs the tokens of all streams; graphs read and write the tensors made here."""

    def __init__(self, request: Request):
        self._request = request
        batch, device = request.batch, request.device
        self._token = torch.zeros(batch, dtype=torch.int64, device=device)
        self._keys = torch.zeros(batch, dtype=torch.int64, device=device)
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._index = torch.zeros(1, dtype=torch.int64, device=device)
        self._forced = torch.zeros(batch, ROOM, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(batch, ROOM, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(batch, ROOM, device=device)
        self._state = None
        self._fixed: list[Tensor] | None = None  # the state's tensors, where graphs find them
        self._graphs: dict = {}
        self._memory = torch.cuda.graph_pool_handle()

    def load(self, state) -> None:
        """Take over the backbone's state."""
        self._state = None if state is None else map_tensors(state, torch.clone)
        self._graphs, self._fixed = {}, None

    def state(self):
        """The backbone's state after all tokens so far."""
        return None if self._state is None else map_tensors(self._state, torch.clone)

    def run(
        self, token: Tensor, position: int, n: int, sampling: Sampling, keys: Tensor, forced: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """n tokens a stream, (b n) int64, and their log-probabilities (b n); see Decoder."""
        self._token.copy_(token)
        self._keys.copy_(keys)
        self._position.fill_(position)
        parts = []
        for start in range(0, n, ROOM):
            count = min(ROOM, n - start)
            self._index.zero_()
            if forced is not None:
                self._forced[:, :count] = forced[:, start : start + count]
            for _ in range(count):
                self._one(sampling, forced is not None)
            parts.append((self._tokens[:, :count].clone(), self._log_probs[:, :count].clone()))
        return torch.cat([tokens for tokens, _ in parts], 1), torch.cat([log_probs for _, log_probs in parts], 1)

    def _one(self, sampling: Sampling, forced: bool) -> None:
        if self._state is None or not _complete(self._state):  # the first tokens make the state's tensors
            self._state = self._step(self._state, sampling, forced)
            return
        if self._fixed is None:
            self._fixed = _tensors(self._state)
        key = (_phases(self._state), sampling.temperature, sampling.top_k, sampling.top_p, forced)
        if key not in self._graphs:
            self._graphs[key] = self._capture(sampling, forced)
        graph, after = self._graphs[key]
        graph.replay()
        self._state = after

    def _step(self, state, sampling: Sampling, forced: bool):
        r = draw(self._keys, self._position)
        given = self._forced.gather(1, self._index.expand(len(self._token), 1))[:, 0] if forced else None
        token, log_prob, state = one_token(self._request, self._token, state, r, sampling, given)
        at = self._index.expand(len(token), 1)
        self._tokens.scatter_(1, at, token[:, None])
        self._log_probs.scatter_(1, at, log_prob[:, None].float())
        self._token.copy_(token)
        self._position += 1
        self._index += 1
        return state

    def _capture(self, sampling: Sampling, forced: bool):
        """A graph of one token from the state's present phases, and the state as it is found afterwards."""
        changed = [self._token, self._position, self._index, self._tokens, self._log_probs, *self._fixed]
        before = [t.clone() for t in changed]
        stream = torch.cuda.Stream(self._request.device)
        stream.wait_stream(torch.cuda.current_stream(self._request.device))
        with torch.cuda.stream(stream):
            self._step(self._state, sampling, forced)  # compiles and allocates whatever has to be
        torch.cuda.current_stream(self._request.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            after = self._step(self._state, sampling, forced)
            for place, value in zip(self._fixed, _tensors(after)):
                place.copy_(value)
        for place, value in zip(changed, before):
            place.copy_(value)
        places = iter(self._fixed)
        return graph, map_tensors(after, lambda _: next(places))


def _tensors(state) -> list[Tensor]:
    out: list[Tensor] = []
    map_tensors(state, out.append)
    return out


def _phases(state) -> tuple[int, ...]:
    """The Python numbers in a state: what a graph cannot read from memory."""
    if isinstance(state, int):
        return (state,)
    return tuple(p for s in state for p in _phases(s)) if isinstance(state, (tuple, list)) else ()


def _complete(state) -> bool:
    return all(_complete(s) for s in state) if isinstance(state, (tuple, list)) else state is not None
