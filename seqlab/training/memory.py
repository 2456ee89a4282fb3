"""The gradient of one batch in as little memory as asked for. Every mode is exact; they differ in what is kept.

    states     on a GPU: plain, and a state of every scan at every 8th position, so that none runs forward again; the fastest
    plain      everything autograd wants: all layers of all positions
    subtract   on a GPU: the same but no layer's input, which is recovered from its output (seqlab/ops/block/stack.py)
    block      one tensor (b l d_model) a layer, and one layer at work: blocks are recomputed (activation checkpointing)
    chunked    causal models: the states at the cuts, and one piece of the sequence at work, whatever its length
    layerwise  bidirectional models: one tensor (b l d_model) a layer, and one piece of one direction of a layer at work
    offload    the same with those tensors in the host's memory, copied while the GPU computes

Chunked back-propagation (causal). With the sequence cut into pieces, a piece and the state h that enters it give its
losses and the state that leaves it, and nothing else passes between pieces. So: one pass left to right without
gradients, keeping the states at the cuts; then from the right, piece by piece, run the piece again and back-propagate
its loss together with dL/dh of the state that leaves it, which the piece on its right has just given. That is the chain
rule itself, not truncation: each gradient is the whole sequence's.

        h0        h1        h2                 left to right, no gradients, keep h1, h2
    [  p0  ]->[  p1  ]->[  p2  ]
    dh <-     dh <-     loss                   right to left: run p2 again, back; p1 again with dh2, back; ...

Layerwise (bidirectional). Every output depends on the whole layer below, so the layers go one at a time, whole; inside
a layer each direction is causal in its own time and is cut as above, the right-to-left one from the other end.

Pieces hold `chunk_tokens` tokens, over all rows of the batch. Short sequences are dealt out by rows instead of cut.

Dropout repeats: before a piece is run the generator is seeded with a function of (a seed drawn for the batch, the
piece), so the second run of a piece draws what the first drew.

What a task needs for this is in seqlab/training/task.py: `piece_loss`.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seqlab.backbones.bidirectional import BidirectionalMixer
from seqlab.backbones.mamba import Block
from seqlab.backbones.strand import ReverseComplementEquivariant
from seqlab.ops.selective_scan.cuda import FINE_ABOVE
from seqlab.training.task import Batch, Task

Mode = Literal["states", "plain", "subtract", "block", "chunked", "layerwise", "offload"]
MODES: tuple[Mode, ...] = ("states", "plain", "subtract", "block", "chunked", "layerwise", "offload")
CUTTING: tuple[Mode, ...] = ("chunked", "layerwise", "offload")
SHARING: tuple[Mode, ...] = ("states", "plain", "block")
"""Those in which devices may share a sequence."""


@dataclass(frozen=True)
class Memory:
    """How the gradient of a batch is computed.

    chunk_tokens: the most tokens at work at once, over all rows: a batch of more is dealt out by rows, and the modes that
        cut sequences cut a row that alone is longer. None: all of a batch (not where sequences are cut).
    """

    mode: Mode = "plain"
    chunk_tokens: int | None = None

    @property
    def is_divided(self) -> bool:
        """Whether backward is called many times a batch, on parts of it."""
        return self.chunk_tokens is not None

    @property
    def cuts_sequences(self) -> bool:
        return self.mode in CUTTING

    def __str__(self) -> str:
        return self.mode + ("" if self.chunk_tokens is None else f", {self.chunk_tokens:,} tokens at a time")


def unavailable(mode: Mode, model: nn.Module, task: Task, device: torch.device) -> str | None:
    """Why this model and task cannot be trained in this mode; None if they can."""
    inner = _inner(model)
    backbone = getattr(inner, "backbone", None)
    if mode == "plain":
        return None
    if mode == "states":
        weight = next(model.parameters())
        blocks = [layer for layer in model.modules() if isinstance(layer, Block)]
        if any(layer.fuse and layer._fusible(weight.new_zeros(1, 1, layer.norm.weight.numel())) for layer in blocks):
            return None
        return "it needs a GPU and blocks that run as one operator"
    if mode == "subtract":
        recovers = getattr(backbone, "can_recover_inputs", None)
        weight = next(model.parameters())
        conditional = getattr(inner, "class_embedding", None) is not None  # something is added between the blocks
        if recovers is not None and not conditional and recovers(weight.new_zeros(1, 1, backbone.config.d_model)):
            return None
        return "it needs a GPU, blocks that run as one operator, no dropout and no classes"
    if mode == "block":
        if any(hasattr(module, "checkpoint_blocks") for module in model.modules()):
            return None
        return "its backbone has no blocks to recompute"
    if mode == "chunked":
        if inner is not model or not getattr(backbone, "is_causal", False):
            return "only a causal model can be run in pieces; this one sees the whole sequence at every position"
        scores = getattr(task, "piece", None) or getattr(task, "piece_loss", None)
        return None if scores else "the task cannot score pieces of a sequence"
    if not hasattr(task, "piece_loss"):
        return "the task's loss is not a sum over positions"
    if not all(hasattr(inner, name) for name in ("embedding", "dropout", "backbone", "lm_head")) or not all(
        isinstance(layer, Block) and isinstance(layer.mixer, BidirectionalMixer) for layer in getattr(backbone, "layers", [None])
    ):
        return "only a stack of bidirectional blocks can be run layer by layer"
    if mode == "offload" and device.type != "cuda":
        return "there is no second memory: the model is in the host's already"
    return None


def keeps_states(model: nn.Module, tokens: int) -> bool:
    """Whether a batch of so many tokens is worth the states mode: smaller scans wait for the host, and are run in one launch."""
    widest = max((layer.mixer.config.d_inner for layer in model.modules() if isinstance(layer, Block)), default=0)
    return tokens * widest > FINE_ABOVE


def prepare(memory: Memory, model: nn.Module) -> None:
    """Set the model up for the mode; names no parameter anew and changes no result."""
    for module in model.modules():
        if hasattr(module, "checkpoint_blocks"):
            module.checkpoint_blocks = memory.mode == "block"
        if hasattr(module, "recover_inputs"):
            module.recover_inputs = memory.mode == "subtract"
        if isinstance(module, Block):
            module.keep_every_state = memory.mode == "states"


def backward(
    memory: Memory,
    model: nn.Module,
    task: Task,
    batch: Batch,
    scale: float | Tensor,
    run_backward: Callable[[Tensor], Any] = Tensor.backward,
) -> Tensor:
    """Add the gradient of `scale` times the batch's loss to the parameters' `.grad`; returns the loss, a sum over the
    batch's positions, detached, ().

    `run_backward` is called if backward is called once (chunk_tokens None). Otherwise autograd is used directly, many
    times; with DDP around the model call `synchronise` afterwards.
    """
    if not memory.is_divided:
        loss, _ = task.loss(model, batch)
        run_backward(loss * scale)
        return loss.detach()
    seed = int(torch.randint(2**62, ()))  # of the step's generator: another one for every batch
    with _no_cast_cache(), torch.random.fork_rng(_devices(batch)):
        return _cut(memory, model, task, batch, scale, seed)[0]


def loss(memory: Memory, model: nn.Module, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """`task.loss` without gradients, in no more memory than `backward` takes."""
    with torch.no_grad():
        if not memory.is_divided:
            return task.loss(model, batch)
        with _no_cast_cache(), torch.random.fork_rng(_devices(batch)):
            return _cut(memory, model, task, batch, None, seed=0)


def synchronise(model: nn.Module, run_backward: Callable[[Tensor], Any]) -> None:
    """After `backward` on divided batches: let DDP average the gradients that lie in `.grad`.

    DDP averages what has accumulated when a backward pass that it watches reaches a parameter; this one reaches every
    parameter and adds zero.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    run_backward(torch.stack([p.reshape(-1)[0].float() for p in parameters]).sum() * 0.0)


# -- the parts of a batch --------------------------------------------------------------------------------------------
def _cut(
    memory: Memory, model: nn.Module, task: Task, batch: Batch, scale: float | Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Loss and weight of a batch, dealt out by rows so that a part holds about chunk_tokens, or else one row; with a
    scale, gradients too."""
    rows, length = batch["ids"].shape[:2]
    together = max(1, memory.chunk_tokens // length)
    sums = []
    for i in range(0, rows, together):
        part = {key: value[i : i + together] for key, value in batch.items()}
        _seed(seed, i)
        if not memory.cuts_sequences or len(part["ids"]) * length <= memory.chunk_tokens:
            with torch.set_grad_enabled(scale is not None):
                value, weight = task.loss(model, part)
            if scale is not None:
                (value * scale).backward()
        else:
            run = _chunked if memory.mode == "chunked" else _layerwise
            value, weight = run(memory, model, task, part, scale, (seed, i))
        sums.append(torch.stack([value.detach(), weight.detach()]))
    value, weight = torch.stack(sums).sum(0)
    return value, weight


def pieces(rows: int, length: int, chunk_tokens: int) -> list[slice]:
    """Cuts (b l) into pieces of at most chunk_tokens tokens (at least one position), all but the last of one length."""
    step = max(1, chunk_tokens // rows)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _chunked(memory, model, task, batch, scale, seed) -> tuple[Tensor, Tensor]:
    cuts = pieces(*batch["ids"].shape[:2], memory.chunk_tokens)
    piece = getattr(task, "piece", None) or functools.partial(_piece, task)
    last = len(cuts) - 1

    def run(i: int, state: Any):
        _seed(*seed, i)
        return piece(model, batch, cuts[i].start, cuts[i].stop, state, i < last)

    state, states, sums = None, [], []
    with torch.no_grad():
        for i in range(last if scale is not None else last + 1):
            states.append(state)
            value, weight, state = run(i, state)
            sums.append(torch.stack([value, weight]))
    if scale is None:
        return tuple(torch.stack(sums).sum(0))
    gradients: list[Tensor | None] = []
    for i in range(last, -1, -1):
        with torch.enable_grad():
            state, leaves = _leaves(state)
            value, weight, after = run(i, state)
        if i == last:
            sums.append(torch.stack([value.detach(), weight.detach()]))
        _back([value * scale, *(_tensors(after) if i < last else [])], [None, *gradients])
        gradients = [leaf.grad for leaf in leaves]
        state = states.pop() if states else None
    return tuple(torch.stack(sums).sum(0))


def _piece(task: Task, model: nn.Module, batch: Batch, start: int, stop: int, state: Any, more: bool):
    """`task.piece` of a task that has only `piece_loss`."""
    mask = batch.get("mask")
    output, state = model(
        batch["ids"][:, start:stop], state, mask=None if mask is None else mask[:, start:stop], return_state=more
    )
    return *task.piece_loss(output, batch, start, stop), state


def _layerwise(memory, model, task, batch, scale, seed) -> tuple[Tensor, Tensor]:
    inner = _inner(model)
    ids, mask = batch["ids"], batch.get("mask")
    if isinstance(model, ReverseComplementEquivariant):
        ids, mask = model.both_strands(ids, mask)
    cuts = pieces(*ids.shape[:2], memory.chunk_tokens)
    layers = inner.backbone.layers
    keep = _Host(len(layers)) if memory.mode == "offload" else _Device(len(layers))

    def embed(piece: slice, i: int) -> Tensor:
        _seed(*seed, -1, i)
        return inner.dropout(inner.embedding(ids[:, piece].long()))

    with torch.no_grad():
        x = _assemble(lambda i: embed(cuts[i], i), cuts, ids.shape[1])
        states = []
        for k, layer in enumerate(layers):
            if scale is not None:
                keep.put(k, x)
            x, at_cuts = _layer_forward(layer, x, mask, cuts, (*seed, k))
            states.append(at_cuts if scale is not None else None)
    # the head, piece by piece, so that logits never exist whole
    sums, dx = [], None
    for i, piece in enumerate(cuts):
        with torch.set_grad_enabled(scale is not None):
            parts = _head_inputs(model, x, piece)
            if scale is not None:
                parts = [part.detach().requires_grad_() for part in parts]
            logits = _head(model, parts)
            value, weight = task.piece_loss(logits, batch, piece.start, piece.stop)
        sums.append(torch.stack([value.detach(), weight.detach()]))
        if scale is not None:
            (value * scale).backward()
            dx = torch.empty_like(x) if dx is None else dx
            for target, part in zip(_head_inputs(model, dx, piece), parts, strict=True):
                target.copy_(part.grad)
    del x
    if scale is not None:
        for k in range(len(layers) - 1, -1, -1):
            dx = _layer_backward(layers[k], keep.take(k), dx, mask, cuts, states.pop(), (*seed, k))
        for i, piece in enumerate(cuts):
            with torch.enable_grad():
                x = embed(piece, i)
            _back([x], [dx[:, piece]])
    return tuple(torch.stack(sums).sum(0))


def _layer_forward(layer: Block, x: Tensor, mask: Tensor | None, cuts: list[slice], seed: tuple):
    """The layer's output (b l d_model), and the states entering the pieces, of both directions."""
    run = _direction(layer, mask, cuts)
    right = [None] * len(cuts)  # what enters piece i from its right
    left = [None] * len(cuts)
    state = None
    backwards: list[Tensor | None] = [None] * len(cuts)
    for i in range(len(cuts) - 1, -1, -1):
        right[i] = state
        backwards[i], state = run(x, i, True, state, i > 0)
    state, y = None, torch.empty_like(x)
    for i, piece in enumerate(cuts):
        left[i] = state
        forwards, state = run(x, i, False, state, i < len(cuts) - 1)
        mixed = layer.mixer.meet(forwards.to(x.dtype), backwards[i].to(x.dtype))
        backwards[i] = None
        scale = _dropout_mask(layer, mixed, (*seed, i))
        torch.add(x[:, piece], mixed if scale is None else mixed * scale, out=y[:, piece])
    return y, (left, right)


def _layer_backward(layer: Block, x: Tensor, dy: Tensor, mask, cuts, states, seed: tuple) -> Tensor:
    """dL/dx of a layer from dL/dy, both (b l d_model), adding to its parameters' gradients."""
    run = _direction(layer, mask, cuts)
    dx = dy.clone()  # the residual path
    for reverse in (False, True):
        entering, entering_other = states[reverse], states[not reverse]
        gradients: list[Tensor | None] = []
        order = range(len(cuts)) if reverse else range(len(cuts) - 1, -1, -1)
        for position, i in enumerate(order):
            piece = cuts[i]
            cotangent = dy[:, piece]
            scale = _dropout_mask(layer, cotangent, (*seed, i))
            cotangent = cotangent if scale is None else cotangent * scale
            if layer.mixer.config.combine == "multiply":
                with torch.no_grad():
                    cotangent = cotangent * run(x, i, not reverse, entering_other[i], False)[0]
            with torch.enable_grad():
                leaf = x[:, piece].detach().requires_grad_()
                state, leaves = _leaves(entering[i])
                y, after = run(leaf, i, reverse, state, position > 0, whole=False)
            _back([y, *_tensors(after)], [cotangent.to(y.dtype), *gradients])
            dx[:, piece] += leaf.grad
            gradients = [leaf.grad for leaf in leaves]
    return dx


def _direction(layer: Block, mask: Tensor | None, cuts: list[slice]):
    """run(x, i, reverse, state, return_state): one direction of the layer's mixer on piece i of x (or on x, the piece)."""

    def run(x: Tensor, i: int, reverse: bool, state, return_state: bool, whole: bool = True):
        piece = cuts[i]
        return layer.direction(
            x[:, piece] if whole else x,
            reverse,
            state,
            None if mask is None else mask[:, piece],
            return_state,
        )

    return run


def _dropout_mask(layer: Block, like: Tensor, seed: tuple) -> Tensor | None:
    if not (layer.training and layer.dropout.p):
        return None
    _seed(*seed)
    return layer.dropout(torch.ones(like.shape, dtype=like.dtype, device=like.device))


def _head_inputs(model: nn.Module, x: Tensor, piece: slice) -> list[Tensor]:
    """Where in x (rows l d_model) the logits of a piece come from: views, one a strand."""
    if not isinstance(model, ReverseComplementEquivariant):
        return [x[:, piece]]
    there, back = x.chunk(2)
    length = x.shape[1]
    return [there[:, piece], back[:, length - piece.stop : length - piece.start]]


def _head(model: nn.Module, parts: list[Tensor]) -> Tensor:
    inner = _inner(model)
    logits = [inner.lm_head(inner.backbone.norm_f(part)) for part in parts]
    return model.combine_strands(*logits) if isinstance(model, ReverseComplementEquivariant) else logits[0]


def _assemble(make: Callable[[int], Tensor], cuts: list[slice], length: int) -> Tensor:
    """The pieces make(0), make(1), ... (b piece d) laid side by side, (b l d), with one of them alive at a time."""
    whole = None
    for i, piece in enumerate(cuts):
        part = make(i)
        if whole is None:
            whole = torch.empty((part.shape[0], length, part.shape[2]), dtype=part.dtype, device=part.device)
        whole[:, piece] = part
    return whole


def state_bytes(mode: Mode, model: nn.Module, task: Task, batch: Batch) -> int:
    """Bytes of the states kept at one cut of one row."""
    one = {key: value[:1] for key, value in batch.items()}
    with torch.no_grad(), torch.random.fork_rng(_devices(batch)):
        if mode == "chunked":
            piece = getattr(task, "piece", None) or functools.partial(_piece, task)
            states = piece(model, one, 0, 1, None, True)[2]
        elif mode in CUTTING:
            inner = _inner(model)
            x = inner.embedding(one["ids"][:, :1].long())
            x = torch.cat([x, x]) if inner is not model else x
            layers = inner.backbone.layers
            states = [layer.direction(x, reverse)[1] for layer in layers for reverse in (False, True)]
        else:
            return 0
    return sum(t.numel() * t.element_size() for t in _tensors(states))


# -- where block inputs are kept -------------------------------------------------------------------------------------
class _Device:
    """On the device."""

    def __init__(self, count: int):
        self._kept: list[Tensor | None] = [None] * count

    def put(self, k: int, x: Tensor) -> None:
        self._kept[k] = x

    def take(self, k: int) -> Tensor:
        x, self._kept[k] = self._kept[k], None
        return x


_pinned: dict[tuple, list[Tensor]] = {}
"""Page-locked buffers by (shape, dtype): locking gigabytes takes seconds, so they live as long as the process."""


class _Host:
    """In page-locked host memory. Copies run on a stream of their own, beside the computation: out as soon as a layer's
    input exists, back one layer ahead of its use. At most one copy is in flight each way, so that the GPU never holds
    more than two of the tensors for it."""

    def __init__(self, count: int):
        self.count = count
        self.stream = torch.cuda.Stream()
        self._buffers: list[Tensor] = []
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def put(self, k: int, x: Tensor) -> None:
        if not self._buffers:
            key = (tuple(x.shape), x.dtype)
            if key not in _pinned:
                _pinned.clear()  # another shape: the old one's memory is wanted
                _pinned[key] = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for _ in range(self.count)]
            self._buffers = _pinned[key]
        if self._leaving is not None:
            # The previous tensor's memory may be given away only when it has left. Waiting on the host, not on the
            # stream, bounds what is queued: the allocator can use the memory at once.
            self._leaving[1].synchronize()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._buffers[k].copy_(x, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._leaving = (x, done)

    def _fetch(self, k: int) -> None:
        if k < 0 or k in self._coming:
            return
        x = torch.empty(self._buffers[k].shape, dtype=self._buffers[k].dtype, device="cuda")
        self.stream.wait_stream(torch.cuda.current_stream())  # the memory may have been in use until now
        with torch.cuda.stream(self.stream):
            x.copy_(self._buffers[k], non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._coming[k] = (x, done)

    def take(self, k: int) -> Tensor:
        if k == self.count - 1:
            x, done = self._leaving
            self._leaving = None
            self._coming[k] = (x, done)  # the last one is still here
        self._fetch(k)
        x, done = self._coming.pop(k)
        torch.cuda.current_stream().wait_event(done)
        self._fetch(k - 1)
        return x


# -- states, seeds, autograd -----------------------------------------------------------------------------------------
def _map(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """`tree` (tensors in tuples, lists, dictionaries, dataclasses) with `function` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map(item, function) for item in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map(item, function) for item in tree)
    if isinstance(tree, dict):
        return {key: _map(item, function) for key, item in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: _map(getattr(tree, f.name), function) for f in dataclasses.fields(tree) if f.init}
        return dataclasses.replace(tree, **values)
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a state, in order."""
    found: list[Tensor] = []
    _map(tree, lambda t: found.append(t) if t.is_floating_point() else None)
    return found


def _leaves(state: Any) -> tuple[Any, list[Tensor]]:
    """The state with fresh leaves that ask for gradients, and the list of them."""
    state = _map(state, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)
    return state, _tensors(state)


def _back(outputs: list[Tensor], gradients: list[Tensor | None]) -> None:
    """torch.autograd.backward, leaving out what has no gradient; the first output may be a scalar (gradient None)."""
    pairs = [
        (y, g) for i, (y, g) in enumerate(zip(outputs, gradients, strict=True)) if y.requires_grad and (i == 0 or g is not None)
    ]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])


def _seed(*parts: int) -> None:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def _devices(batch: Batch) -> list[int]:
    device = batch["ids"].device
    return [device.index] if device.type == "cuda" else []


@contextlib.contextmanager
def _no_cast_cache() -> Iterator[None]:
    """Autocast remembers the low-precision copy of a weight; one made without gradients must not be used with them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _inner(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, ReverseComplementEquivariant) else model
