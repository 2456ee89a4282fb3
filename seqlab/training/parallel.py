"""Context parallelism: one sequence over several ranks, each holding a piece of it, with exact gradients.

Everything outside the mixers works position by position, so a rank simply runs the model on its piece. Inside a mixer
two things cross a cut, and both are small whatever the length (docs/context-parallel.md has the maths and the sizes):

    convolution   the last d_conv - 1 inputs before the piece (b w-1 d), from as many ranks as it takes
    scan          the state that enters the piece (b d n)

The state that enters is not passed from rank to rank, which would make them wait for each other. Every rank first sums up
its own piece: the state that it would leave starting from zero, and the sum of its steps delta', which decides how much
of an older state survives it. One all-gather later every rank knows the state that enters its piece and runs the real
scan. Backward mirrors it: a rank sums up what its outputs want of the state that entered, one all-gather tells it the
gradient of the state that it left, and the scan's own backward does the rest. Since the real scan starts from the true
state, that one gradient carries everything that later ranks want of this one's u, delta, A and B.

Shapes: b batch, l length of the local piece, d channels, n states, w width of the convolution, k ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqlab import ops
from seqlab.backbones.bidirectional import BidirectionalMamba, BidirectionalMixer
from seqlab.backbones.mamba import Mamba, MambaMixer
from seqlab.backbones.strand import ReverseComplementEquivariant
from seqlab.errors import UserError
from seqlab.model import language_model
from seqlab.ops.selective_scan.ends import piece_ends
from seqlab.training.place import Place
from seqlab.training.task import Task


@dataclass
class Traffic:
    """What this rank has given to collectives: how many there were, and the bytes it contributed.

    A ring of k ranks passes every contribution on k - 1 times; each rank receives k - 1 contributions.
    """

    collectives: int = 0
    bytes: int = 0


class Ranks:
    """The ranks that share a sequence, and the two operators of a mixer run on their pieces.

    Rank i holds piece i, counted from the left; pieces may have any lengths, zero too. With `two_strands` the second
    half of the batch's rows lies the other way round (rank 0 holds its right end): the layout of
    ReverseComplementEquivariant, whose second half is the reverse complement of the first.
    """

    def __init__(self, group: dist.ProcessGroup, two_strands: bool = False):
        self.group, self.two_strands = group, two_strands
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.traffic = Traffic()
        self._recorded: list | None = None
        self._replayed: Iterator | None = None

    def __deepcopy__(self, memo) -> "Ranks":
        return self  # a process group cannot be copied; a copied model runs on the same ranks

    def all_gather(self, x: Tensor) -> Tensor:
        """(...) -> (k ...), in the order of the ranks."""
        gathered = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(gathered), x.contiguous(), group=self.group)
        self.traffic.collectives += 1
        self.traffic.bytes += x.nbytes
        return gathered

    def remembered(self, make: Callable[[], Any]) -> Any:
        """make(), or in a block's recomputation what it returned in the block's first run: nothing is sent again."""
        if self._replayed is not None:
            return next(self._replayed)
        made = make()
        if self._recorded is not None:
            self._recorded.append(made)
        return made

    def checkpoint_contexts(self) -> tuple["_Recording", "_Replay"]:
        """For torch.utils.checkpoint: what the run of a block and its recomputation happen under."""
        tape: list = []
        return _Recording(self, tape), _Replay(self, tape)

    def rows(self, batch: int) -> Iterator[tuple[slice, bool]]:
        """(rows of the batch, whether their pieces lie on the ranks from right to left)."""
        if not self.two_strands:
            yield slice(None), False
        else:
            yield slice(0, batch // 2), False
            yield slice(batch // 2, None), True

    def causal_conv1d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        mask: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        """`seqlab.ops.causal_conv1d` of the whole sequence, x (b l d) and the result being this rank's piece."""
        width = weight.shape[1]
        halo = None
        if width > 1:
            halo = _Halo.apply(x, width - 1, mask, self, reverse)
        return ops.causal_conv1d(x, weight, bias, activation, halo, mask, reverse)

    def selective_scan(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        mask: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        """`seqlab.ops.selective_scan` of the whole sequence, u (b l d) and the result being this rank's piece."""
        entering, sums = self.entering_state(u, delta, A, B, delta_bias, delta_softplus, mask, reverse)
        y, left = ops.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, entering, mask, reverse, return_final_state=True
        )
        if not torch.is_grad_enabled() or not y.requires_grad:
            return y
        return _StateGradient.apply(y, left, delta, A, C, z, delta_bias, mask, sums, delta_softplus, reverse, self)

    # What crosses the cuts, forward and backward, without autograd: the functions below and the fused block
    # (seqlab/ops/block) run on these. All ranks must call them in the same order.

    def halo(self, x: Tensor, count: int, mask: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        """The `count` inputs just before this rank's piece (b count d), x (b l d) being the piece, and for every rank where
        its own come from (k b count), for `add_halo_gradient`."""
        tail, real = last_inputs(x, count, mask, reverse)
        flagged = torch.cat((tail, real.unsqueeze(-1).to(tail.dtype)), -1)
        gathered = self.remembered(lambda: self.all_gather(flagged))  # (k b count d+1)
        source = _sources(gathered[..., -1] > 0.5, self, reverse)
        flat = gathered[..., :-1].transpose(0, 1).flatten(1, 2)  # (b k*count d)
        mine = source[self.rank].unsqueeze(-1)
        return torch.where(mine >= 0, flat.gather(1, mine.clamp(min=0).expand(-1, -1, flat.shape[2])), 0.0), source

    def add_halo_gradient(self, dx: Tensor, dhalo: Tensor, source: Tensor, mask: Tensor | None, reverse: bool) -> None:
        """Adds to dx (b l d) what all ranks' halos, this one's having the gradient dhalo (b count d), want of its inputs."""
        dhalos = self.all_gather(dhalo)  # (k b count d)
        count = dhalo.shape[1]
        own = self.rank * count + torch.arange(count, device=dhalo.device)
        used = (source.unsqueeze(-1) == own).to(dhalos.dtype)  # (k b count count): whose halo holds which of my inputs
        with torch.autocast(dhalo.device.type, enabled=False):
            dtail = torch.einsum("kbis,kbid->bsd", used, dhalos)
        add_to_last_inputs(dx, dtail, mask, reverse)

    def entering_state(
        self, u, delta, A, B, delta_bias, delta_softplus: bool, mask: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """The state that enters this rank's piece (b d n), and every rank's sum of steps (k b d)."""

        def summarise() -> tuple[Tensor, Tensor]:
            ends, steps = piece_ends(u, B, delta, A, delta_bias, delta_softplus, mask, reverse)
            gathered = self.all_gather(torch.cat((ends, steps.unsqueeze(-1)), -1))  # (k b d n+1)
            sums = gathered[..., -1].contiguous()
            return self.carried(gathered[..., :-1], sums, A, reverse), sums

        with torch.no_grad(), torch.autocast(u.device.type, enabled=False):
            return self.remembered(summarise)

    def leaving_gradient(
        self, dy, delta, A, C, z, delta_bias, delta_softplus: bool, mask: Tensor | None, sums: Tensor, reverse: bool
    ) -> Tensor:
        """The gradient of the state that leaves this rank's piece (b d n), which is what later pieces want of it."""
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            wanted, _ = piece_ends(dy, C, delta, A, delta_bias, delta_softplus, mask, reverse, gate=z, adjoint=True)
            return self.carried(self.all_gather(wanted), sums, A, not reverse)

    def carried(self, ends: Tensor, sums: Tensor, A: Tensor, from_right: bool) -> Tensor:
        """What reaches this rank's piece: sum over the ranks i before it of exp(A (sum of delta' between)) ends_i.

        ends (k b d n), sums (k b d) -> (b d n); `from_right`: the ranks before are those to the right.
        """
        parts = []
        for rows, mirrored in self.rows(ends.shape[1]):
            place = self.rank
            end, passed = ends[:, rows], sums[:, rows]
            if mirrored != from_right:  # now what comes before has smaller places, the nearest last
                end, passed, place = end.flip(0), passed.flip(0), self.size - 1 - place
            passed = torch.cat((passed[1:place], torch.zeros_like(passed[:1])))[:place]
            between = passed.flip(0).cumsum(0).flip(0)
            parts.append((torch.exp(between.unsqueeze(-1) * A) * end[:place]).sum(0))
        return torch.cat(parts)


class _Recording:
    """While a block runs: what `remembered` makes goes on the tape."""

    def __init__(self, ranks: Ranks, tape: list):
        self.ranks, self.tape = ranks, tape

    def __enter__(self) -> None:
        self.ranks._recorded = self.tape

    def __exit__(self, *error) -> None:
        self.ranks._recorded = None


class _Replay(_Recording):
    """While a block is run again: `remembered` reads the tape from its start."""

    def __enter__(self) -> None:
        self.ranks._replayed = iter(self.tape)

    def __exit__(self, *error) -> None:
        self.ranks._replayed = None


class _Halo(torch.autograd.Function):
    """x (b l d), the piece -> the inputs just before it (b w-1 d)."""

    @staticmethod
    def forward(ctx, x: Tensor, count: int, mask: Tensor | None, ranks: Ranks, reverse: bool) -> Tensor:
        halo, source = ranks.halo(x, count, mask, reverse)
        ctx.save_for_backward(source, mask)
        ctx.ranks, ctx.reverse, ctx.shape = ranks, reverse, x.shape
        return halo

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dhalo: Tensor):
        source, mask = ctx.saved_tensors
        dx = dhalo.new_zeros(ctx.shape)
        ctx.ranks.add_halo_gradient(dx, dhalo, source, mask, ctx.reverse)
        return dx, None, None, None, None


def _sources(real: Tensor, ranks: Ranks, reverse: bool) -> Tensor:
    """real (k b w-1) -> for every rank, where its halo comes from in all tails laid side by side; -1: nowhere. (k b w-1)"""
    k, batch, width = real.shape
    place = torch.arange(k * width, device=real.device)
    rank = torch.arange(k, device=real.device).view(k, 1, 1)
    parts = []
    for rows, mirrored in ranks.rows(batch):
        there = real[:, rows].flip(0) if mirrored else real[:, rows]
        there = there.transpose(0, 1).flatten(1)  # (b k*(w-1)), now from left to right
        if reverse:
            found = torch.where(there & (place >= (rank + 1) * width), place, k * width).topk(width, largest=False).values
            found = torch.where(found < k * width, found, -1)
        else:
            found = torch.where(there & (place < rank * width), place, -1).topk(width).values.flip(-1)
        if mirrored:
            found = torch.where(found >= 0, (k - 1 - found // width) * width + found % width, -1).flip(0)
        parts.append(found)
    return torch.cat(parts, dim=1)


def last_inputs(x: Tensor, count: int, mask: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """The last `count` real inputs (reverse: the first) in sequence order, and which of them exist: (b count d), (b count).

    Where there are fewer, the far end (left; reverse: right) is filled with zeros.
    """
    batch, length, channels = x.shape
    if mask is None or not length:
        kept = min(count, length)
        pad = (0, count - kept) if reverse else (count - kept, 0)
        tail = x[:, :kept] if reverse else x[:, length - kept :]
        real = F.pad(torch.ones(batch, kept, dtype=torch.bool, device=x.device), pad)
        return F.pad(tail, (0, 0, *pad)), real
    places, real = _last_places(mask, count, reverse)
    return torch.where(real.unsqueeze(-1), x.gather(1, places.unsqueeze(-1).expand(-1, -1, channels)), 0.0), real


def add_to_last_inputs(x: Tensor, tail: Tensor, mask: Tensor | None, reverse: bool) -> None:
    """Adds `tail` (b count d) to x (b l d) where `last_inputs` took its own from: the gradient of that."""
    count, length = tail.shape[1], x.shape[1]
    if mask is None or not length:
        kept = min(count, length)
        (x[:, :kept] if reverse else x[:, length - kept :]).add_(tail[:, :kept] if reverse else tail[:, count - kept :])
        return
    places, real = _last_places(mask, count, reverse)
    x.scatter_add_(1, places.unsqueeze(-1).expand(tail.shape), torch.where(real.unsqueeze(-1), tail, 0.0).to(x.dtype))


def _last_places(mask: Tensor, count: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """Positions of the last `count` True (reverse: the first) in order, and which of them exist, (b count) each."""
    length = mask.shape[1]
    place = torch.arange(length, device=mask.device)
    if reverse:
        found = F.pad(torch.where(mask, place, length), (0, count), value=length).topk(count, largest=False).values
    else:
        found = F.pad(torch.where(mask, place, -1), (count, 0), value=-1).topk(count).values.flip(-1)
    return found.clamp(0, length - 1), (found >= 0) & (found < length)


class _StateGradient(torch.autograd.Function):
    """Passes y through; backward gives the state that the piece left the gradient that later ranks have for it."""

    @staticmethod
    def forward(ctx, y, left, delta, A, C, z, delta_bias, mask, sums, delta_softplus, reverse, ranks):
        ctx.save_for_backward(delta, A, C, z, delta_bias, mask, sums)
        ctx.delta_softplus, ctx.reverse, ctx.ranks = delta_softplus, reverse, ranks
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        delta, A, C, z, delta_bias, mask, sums = ctx.saved_tensors
        dleft = ctx.ranks.leaving_gradient(dy, delta, A, C, z, delta_bias, ctx.delta_softplus, mask, sums, ctx.reverse)
        return dy, dleft, *[None] * 10


# ------------------------------------------------------------------------------------------------------------ models


def share_sequences(task: Task, models: list[nn.Module], place: Place, device_type: str) -> DeviceMesh:
    """Make the models run over the ranks of a mesh (data, context), each rank of which is then fed its piece.

    Raises:
        UserError: the task's loss or a model mixes positions in a way that cannot be cut.
    """
    if not getattr(task, "positionwise", False):
        raise UserError(
            f"--context-parallel: {type(task).__name__} needs whole sequences for its loss, so they cannot be shared; "
            "use --devices alone"
        )
    mesh = init_device_mesh(device_type, (place.data_size, place.context), mesh_dim_names=("data", "context"))
    for model in models:
        share_mixers(model, mesh.get_group("context"))
    return mesh


def share_mixers(model: nn.Module, group: dist.ProcessGroup) -> Ranks:
    """Make every mixer of `model` run over the ranks of `group`. UserError if other parts of it mix positions too."""
    backbone = getattr(language_model(model), "backbone", None)
    strange = None if type(backbone) in (Mamba, BidirectionalMamba) else backbone or model
    if strange is None:
        mixers = (layer.mixer for layer in backbone.layers)
        strange = next((m for m in mixers if type(m) not in (MambaMixer, BidirectionalMixer)), None)
        strange = strange or getattr(language_model(model), "prediction_head", None)  # reads the samples before its piece
    if strange is not None:
        raise UserError(
            f"--context-parallel: {type(strange).__name__} mixes positions in a way that cannot be cut; use a causal or "
            "bidirectional stack of s6 blocks, or --devices alone"
        )
    ranks = Ranks(group, two_strands=isinstance(model, ReverseComplementEquivariant))
    for module in model.modules():
        if isinstance(module, MambaMixer):
            module.ranks = ranks
    backbone.checkpoint_contexts = ranks.checkpoint_contexts
    return ranks
