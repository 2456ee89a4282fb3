"""Decoding: token after token through a whole causal model, drawing included, without returning to Python in between.

    decoder = Decoder(model, batch=16)                      # a LanguageModel, isotropic or U-Net
    decoder.prefill(prompt)                                 # (b l) or (l): read by the parallel forward pass
    tokens, log_probs = decoder.generate(16000, Sampling(temperature=0.95, seed=1))       # (b n) each; call again to go on

Whatever the back end, the tokens are those of `reference`: the model's forward pass on one token at a time and
`sampling.sample`. Back ends differ in speed and in what they can run:

    persistent   CUDA C++: one launch for a block of tokens; a thread block, or a cluster of them, keeps its streams
    batched      CUDA C++: three launches a mixer, each over all streams: for hundreds of streams of an isotropic stack
    clustered    CUDA C++: clusters of blocks keep tens of streams each, states move in the background: the same in bfloat16
    solo         CUDA C++: one stream a cluster, weights in registers before their turn: for a few streams of one
    graph        a CUDA graph of the model's own steps: any causal model
    cpu          one compiled call for a block of tokens (numba)
    reference    the model, one token at a time: anywhere, any model
"""

import copy
import logging
from types import ModuleType

import torch
from torch import Tensor, nn

from seqlab.backbones.mamba import MixerState
from seqlab.backbones.unet import PoolState, UNetState
from seqlab.heads.sample import SampleState
from seqlab.ops import dispatch
from seqlab.ops.decode import batched, clustered, cpu, graph, persistent, reference, solo
from seqlab.ops.decode.program import map_tensors
from seqlab.ops.decode.request import Request
from seqlab.ops.decode.sampling import Sampling, stream_key

__all__ = ["BACKENDS", "Decoder", "Sampling", "fastest", "unavailable"]

BACKENDS: dict[str, ModuleType] = {
    "persistent": persistent, "batched": batched, "clustered": clustered, "solo": solo, "graph": graph, "cpu": cpu, "reference": reference,
}  # fmt: skip
"""What "auto" tries in order; of those that name a price, it takes the cheapest."""

PREFILL = 1 << 17
"""Prompt tokens (all streams together) that one forward pass takes; longer prompts go in pieces."""

_log = logging.getLogger("seqlab")


def unavailable(request: Request | None = None) -> dict[str, str | None]:
    """name -> why that back end cannot serve `request` (None: this machine at all); None if it can."""
    return {name: module.unavailable(request) for name, module in BACKENDS.items()}


def fastest(request: Request) -> str:
    """The back end that "auto" stands for."""
    able = [name for name, why in unavailable(request).items() if why is None]
    priced = [name for name in able if hasattr(BACKENDS[name], "price")]
    return min(priced, key=lambda name: BACKENDS[name].price(request)) if priced else able[0]


class Decoder:
    """Streams of one causal LanguageModel, decoded side by side.

    Args:
        model: a LanguageModel whose backbone is causal; put into eval mode.
        batch: number of streams.
        classes: (b) class of each stream, for a class-conditional model.
        guidance: above 0, draws follow the class more closely than the model would: from logits of the class plus
            `guidance` times their difference to those of the model's last class, the one that says nothing (classifier-free
            guidance, Ho & Salimans 2022). Every stream then takes two rows of the model. Log-probabilities stay the class's own.
        device: "cuda", "cpu", ...; None: where the model is. A model elsewhere is copied.
        backend: "auto" (the fastest that can run this; SEQLAB_BACKEND may name one), or a name, never replaced.
        allowed: token ids that may be drawn; None: the whole vocabulary. Log-probabilities are among these.
        dtype: of the weights, float32 or bfloat16; states and sums are float32 always.
        streams: (b) numbers that tell the streams' random draws apart; None: 0, 1, ... b-1.

    Raises ValueError for a model or arguments that do not fit together, RuntimeError where the back end asked for
    cannot run this, listing every back end with its reason.

    position: tokens of each stream so far, prompt included. backend: the name of the back end that runs.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: int = 1,
        classes: Tensor | None = None,
        device: str | torch.device | None = None,
        backend: str = "auto",
        allowed: list[int] | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        streams: Tensor | None = None,
        guidance: float = 0.0,
    ):
        if not getattr(getattr(model, "backbone", None), "is_causal", False):
            raise ValueError("a decoder needs a causal language model; this one sees both sides of every position")
        if batch < 1:
            raise ValueError(f"batch: must be 1 or more, got {batch}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype: must be float32 or bfloat16, got {dtype}")
        weight = model.embedding.weight
        device = weight.device if device is None else torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device != weight.device:
            model = copy.deepcopy(model).to(device)
        self.model, self.batch, self.device = model.eval(), batch, device
        vocab = model.config.vocab_size
        if allowed is not None:
            ids = torch.as_tensor(allowed, dtype=torch.int64).flatten()
            if not len(ids) or ids.min() < 0 or ids.max() >= vocab:
                raise ValueError(f"allowed: one or more token ids of 0 to {vocab - 1}, got {ids.tolist()}")
            allowed = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True).to(device)
        base = None
        if classes is not None:
            classes = torch.as_tensor(classes, device=device).long().flatten()
            if model.class_embedding is None:
                raise ValueError("classes: this model is not conditional (n_classes: 0)")
            n = model.class_embedding.num_embeddings
            if len(classes) != batch or classes.min() < 0 or classes.max() >= n:
                raise ValueError(f"classes: {batch} numbers of 0 to {n - 1}, one a stream, got {classes.tolist()[:9]}")
            base = model.class_embedding.weight.detach()[classes]
        elif model.class_embedding is not None:
            raise ValueError(f"classes: this model is conditional; give each of the {batch} streams a class")
        self.streams = torch.arange(batch) if streams is None else torch.as_tensor(streams).long().flatten().cpu()
        if len(self.streams) != batch or self.streams.min() < 0:
            raise ValueError(f"streams: {batch} numbers of 0 or more, got {self.streams.tolist()[:9]}")
        if not 0 <= guidance < float("inf"):
            raise ValueError(f"guidance: must be 0 or more, got {guidance}")
        if guidance and base is None:
            raise ValueError("guidance: this model is not conditional (n_classes: 0)")
        self._each = 2 if guidance else 1  # rows of the model a stream
        if guidance:
            nothing = torch.full_like(classes, n - 1)
            classes = torch.stack([classes, nothing], 1).flatten()
            base = model.class_embedding.weight.detach()[classes]
        self._request = Request(model, batch * self._each, device, dtype, allowed, classes, base, guidance)
        self.backend = _choose(backend, self._request)
        self._runner = BACKENDS[self.backend].Runner(self._request)
        self._seed, self._keys = None, None  # the streams' keys for this seed
        self.position = 0
        self._token: Tensor | None = None  # (b): the newest token, which the model has not read yet

    # ------------------------------------------------------------------------------------------------- the prompt
    @torch.inference_mode()
    def prefill(self, ids: Tensor, log_probs: bool = False) -> Tensor | None:
        """Read a prompt (b l), or (l) and (1 l) for the same in every stream, with the parallel forward pass.

        May be called again to go on with tokens from elsewhere. With `log_probs`, returns the log-probability of each
        of these tokens given all before, (b l); for the first call (b l-1), as nothing comes before the first token.
        """
        ids = self._ids(ids)
        fresh = self._token is None
        # what the model reads now: the token it has not read yet and all new ones but the last
        inputs = ids[:, :-1] if fresh else torch.cat([self._token[:, None], ids[:, :-1]], 1)
        targets = ids[:, 1:] if fresh else ids
        same = fresh and self._request.classes is None and bool((ids == ids[:1]).all())
        rows = 1 if same else self.batch * self._each
        state = None if fresh else self._runner.state()
        scores = []
        size = max(1, PREFILL // (1 if self.device.type == "cuda" else 8) // rows)
        for start in range(0, inputs.shape[1], size):
            piece, target = inputs[:rows, start : start + size], targets[:rows, start : start + size]
            state, score = self._forward(piece, target, state, log_probs)
            scores.append(score)
        if same and state is not None:
            state = map_tensors(state, lambda t: t.expand(self.batch, *t.shape[1:]))
        self._runner.load(state)
        self._token = ids[:, -1].clone()
        self.position += ids.shape[1]
        if not log_probs:
            return None
        joined = torch.cat(scores, 1) if scores else torch.zeros(rows, 0, device=self.device)
        return joined.expand(len(ids), -1)[:: self._each]

    def _forward(self, ids: Tensor, targets: Tensor, state, log_probs: bool):
        request = self._request
        classes = None if request.classes is None else request.classes[: len(ids)]
        with torch.autocast(self.device.type, request.dtype, enabled=request.dtype != torch.float32):
            y, after, prediction = self.model.read(ids, state, classes=classes)
            if not log_probs:
                return after, None
            logits = reference.forbid(self.model.logits(y, prediction).float(), request.allowed)
        return after, logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    # ---------------------------------------------------------------------------------------------------- tokens
    @torch.inference_mode()
    def generate(self, n: int, sampling: Sampling | None = None) -> tuple[Tensor, Tensor]:
        """The next n tokens of every stream (b n), uint8 for vocabularies of up to 256, and their log-probabilities
        (b n) float32 under the model itself: temperature 1, no cut. Needs a prompt of one token or more before."""
        return self._run(n, sampling or Sampling(), None)

    @torch.inference_mode()
    def score(self, ids: Tensor) -> Tensor:
        """Log-probabilities of given tokens (b l) by the very steps that `generate` takes: like `prefill(ids, True)`, and
        slower. For checking a back end."""
        ids = self._ids(ids)
        if self._token is None:
            self.prefill(ids[:, :1])
            ids = ids[:, 1:]
        return self._run(ids.shape[1], Sampling(), ids)[1]

    def _run(self, n: int, sampling: Sampling, forced: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._token is None:
            raise ValueError("nothing to go on from: call prefill with a prompt, at least the start token")
        if n < 0:
            raise ValueError(f"n: must be 0 or more tokens, got {n}")
        if sampling.seed != self._seed:
            keys = [stream_key(sampling.seed, s) for s in self.streams.tolist()]
            self._keys = torch.tensor(keys, device=self.device).repeat_interleave(self._each)
            self._seed = sampling.seed
        small = torch.uint8 if self.model.config.vocab_size <= 256 else torch.int64
        if n == 0:
            return torch.zeros(self.batch, 0, dtype=small, device=self.device), torch.zeros(self.batch, 0, device=self.device)
        tokens, log_probs = self._runner.run(self._token, self.position, n, sampling, self._keys, forced)
        self._token = tokens[:, -1].long()
        self.position += n
        return tokens[:: self._each].to(small), log_probs[:: self._each]

    def _ids(self, ids: Tensor) -> Tensor:
        ids = torch.as_tensor(ids, device=self.device)
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.dim() != 2 or ids.shape[0] not in (1, self.batch) or not ids.shape[1]:
            raise ValueError(f"ids: ({self.batch} l), or (l) for all streams, of one token or more; got {tuple(ids.shape)}")
        ids = ids.long().expand(self.batch, -1)
        vocab = self.model.config.vocab_size
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"ids: tokens must lie in 0 to {vocab - 1}, got {int(ids.min())} to {int(ids.max())}")
        return ids.repeat_interleave(self._each, 0) if self._each > 1 else ids

    # ------------------------------------------------------------------------------------------------- the state
    @property
    def state_bytes_per_stream(self) -> int:
        """Memory that one stream takes between tokens, however long it has become."""
        if self._token is None:
            raise ValueError("no state yet: call prefill first")
        tensors: list[Tensor] = []
        map_tensors(self._runner.state(), tensors.append)
        return sum(t.numel() * t.element_size() for t in tensors) // self.batch

    @torch.inference_mode()
    def state_dict(self) -> dict[str, Tensor]:
        """Everything a decoder of the same model needs to go on exactly here, on any back end; tensors on the CPU."""
        out = {"position": torch.tensor(self.position), "streams": self.streams.clone()}
        if self._token is None:
            return out
        out["token"] = self._token.cpu().clone()
        state = self._runner.state()
        if isinstance(state, SampleState):
            out["heard"], state = state.heard.cpu().clone(), state.backbone
        mixers = state.blocks if isinstance(state, UNetState) else state or []
        for i, mixer in enumerate(mixers):
            if mixer is not None:
                out |= {f"blocks.{i}.{name}": t.cpu().clone() for name, t in mixer._asdict().items()}
        for i, pool in enumerate(state.pools if isinstance(state, UNetState) else ()):
            out |= {f"pools.{i}.{name}": torch.as_tensor(t).cpu().clone() for name, t in pool._asdict().items()}
        return out

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError where it is of another model or number of streams."""
        if len(saved["streams"]) != self.batch:
            raise ValueError(f"this state has {len(saved['streams'])} streams, the decoder {self.batch}")
        self.position, self.streams, self._seed = int(saved["position"]), saved["streams"].clone(), None
        if "token" not in saved:
            self._token = None
            return
        unet = hasattr(self.model.backbone, "stages")
        count = sum(len(stage) for stage in self.model.backbone.stages) if unet else len(self.model.backbone.layers)
        try:
            mixers = [self._restored(saved, f"blocks.{i}.", MixerState) for i in range(count)]
            pools = [self._restored(saved, f"pools.{i}.", PoolState) for i in range(len(self.model.config.pool) if unet else 0)]
            pools = [pool._replace(phase=int(pool.phase)) for pool in pools]
            state = (UNetState(mixers, pools) if unet else mixers) if any(mixers) or unet else None
            if state is not None and self.model.config.prediction_order:
                state = SampleState(state, saved["heard"].to(self.device))
            self._runner.load(state)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"this state is not of this model: {error}") from None
        self._token = saved["token"].to(self.device)

    def _restored(self, saved: dict[str, Tensor], prefix: str, kind):
        names = [name for name in kind._fields if f"{prefix}{name}" in saved]
        return kind(**{name: saved[prefix + name].to(self.device) for name in names}) if names else None


def _choose(backend: str, request: Request) -> str:
    """The back end of a decoder; see `Decoder`."""
    where = "argument backend"
    if backend == "auto":
        backend, where = dispatch.forced(BACKENDS), dispatch.ENVIRONMENT
    dispatch.check_name(backend, BACKENDS, where)
    if backend == "auto":
        backend = fastest(request)
        _log.info("decode: back end %s on %s", backend, request.device)
        return backend
    reasons = unavailable(request)
    if reasons[backend] is not None:
        listing = "; ".join(f"{name}: {why or 'can run this'}" for name, why in reasons.items())
        raise RuntimeError(f"decode: back end {backend!r} (asked for by {where}) cannot run this. {listing}")
    return backend
