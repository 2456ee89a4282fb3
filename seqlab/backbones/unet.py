"""A U-Net of Mamba blocks: SaShiMi (Goel et al. 2022, arXiv 2202.09729) with the changes of the Mamba paper (section 4.4).

Blocks run at the full rate, at the rate of the first pool, and so on down to the centre and up again; each pool divides
the rate by p and multiplies the width by `pool_expand`. With one pool of p = 4, n = 2 blocks a stage:

    x ─┬─ block ─┬─ block ─┬─ DownPool ─┬─ centre blocks ─(+)─ UpPool, one frame late ─(+)─ block ─(+)─ block ─(+)─ y
       │         │         │            └──────────────────┘                            │          │          │
       │         │         └────────────────────────────────────────────────────────────┘          │          │
       │         └─────────────────────────────────────────────────────────────────────────────────┘          │
       └──────────────────────────────────────────────────────────────────────────────────────────────────────┘

DownPool joins p positions into one frame: (b p d) -> Linear(d p -> d'); UpPool makes p positions of a frame:
Linear(d' -> d p). Frame k is made of positions kp .. kp+p-1 and is heard from position (k+1)p on: the shift by one frame
is what makes the stack causal.

    position    0 1 2 3 | 4 5 6 7 | 8 9 ...
    frame made        0         1
    frame heard  (none) |    0    |   1 ...

Any length and any cut: positions that do not fill a frame yet wait in the state.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqlab.backbones.mamba import BackboneConfig, Block, MixerState, make_mixer


class PoolState(NamedTuple):
    """What one pool remembers: the frame that is being filled and the frame that is being heard."""

    pending: Tensor  # (b p-1 d), inputs of the frame that is not full yet; `phase` of them count
    held: Tensor  # (b p d), what the last full frame says to the positions of the next one
    phase: int | Tensor  # positions mod p; (b) once masks have let the rows of a batch advance unequally


class UNetState(NamedTuple):
    """State of a U-Net between two pieces of a sequence."""

    blocks: list[MixerState | None]  # in the order of `UNet.stages`; None where no frame has come yet
    pools: list[PoolState]  # outermost first


class DownPool(nn.Module):
    """Frames of p positions (b f p d) -> (b f d_out). Input p + of the Linear is channel-major: index d * p + position."""

    def __init__(self, d_model: int, d_out: int, pool: int):
        super().__init__()
        self.linear = nn.Linear(d_model * pool, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(2, 3).flatten(2))


class UpPool(nn.Module):
    """Frames (b f d) -> p positions each (b f p d_out); the shift by one frame is the U-Net's."""

    def __init__(self, d_model: int, d_out: int, pool: int):
        super().__init__()
        self.pool = pool
        self.linear = nn.Linear(d_model, d_out * pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(-1, (-1, self.pool)).transpose(2, 3)


class UNet(nn.Module):
    """Causal U-Net: forward(x, state, mask, return_state, shifts) -> (y, state), all (b l d_model), the contract of `Mamba`.

    `config.n_layer` blocks in every stage, of the kind `config.blocks` names for it; `config.pool` lists the pooling
    factors, outermost first. There are 2 len(pool) + 1 stages.
    """

    is_causal = True

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        depth = len(config.pool)
        total = config.n_layer * (2 * depth + 1)
        widths = [config.d_model * config.pool_expand**level for level in range(depth + 1)]

        def stage(level: int) -> nn.ModuleList:
            # n_layer of a stage's config is the number of residual adds in the whole stack: it scales out_proj
            own = dataclasses.replace(config, architecture="isotropic", blocks=(config.block_of(level),),
                                      d_model=widths[level], n_layer=total)  # fmt: skip
            return nn.ModuleList(Block(own, make_mixer(own)) for _ in range(config.n_layer))

        self.down = nn.ModuleList(stage(level) for level in range(depth))
        self.down_pools = nn.ModuleList(DownPool(widths[i], widths[i + 1], p) for i, p in enumerate(config.pool))
        self.centre = stage(depth)
        self.up_pools = nn.ModuleList(UpPool(widths[i + 1], widths[i], p) for i, p in enumerate(config.pool))
        self.up = nn.ModuleList(stage(level) for level in range(depth))
        self.norm_f = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.checkpoint_blocks = False  # as in Mamba: recompute blocks in the backward pass instead of keeping them

    @property
    def stages(self) -> list[nn.ModuleList]:
        """Down from the outside, centre, up to the outside: the order in which a sample passes them."""
        return [*self.down, self.centre, *reversed(self.up)]

    @property
    def widths(self) -> list[int]:
        """d_model of every block, in the order of `stages`."""
        return [block.mixer.config.d_model for stage in self.stages for block in stage]

    def forward(
        self,
        x: Tensor,
        state: UNetState | None = None,
        mask: Tensor | None = None,
        return_state: bool = True,
        shifts: list[Tensor] | None = None,
    ) -> tuple[Tensor, UNetState | None]:
        if state is None:
            state = UNetState([None] * self.config.n_layer * len(self.stages), [self._start(x, i) for i in range(len(self.down))])
        after = UNetState(list(state.blocks), list(state.pools))
        y = self._level(0, x, state, after, mask, return_state, shifts)
        return self.norm_f(y), after if return_state else None

    def step(self, x: Tensor, state: UNetState | None = None) -> tuple[Tensor, UNetState]:
        """One position, x (b 1 d_model); the same as `forward` on a sequence of one."""
        return self(x, state)

    def _start(self, x: Tensor, level: int) -> PoolState:
        pool, width = self.config.pool[level], self.config.d_model * self.config.pool_expand**level
        return PoolState(x.new_zeros(x.shape[0], pool - 1, width), x.new_zeros(x.shape[0], pool, width), 0)

    def _level(self, level: int, x: Tensor, state: UNetState, after: UNetState, mask, return_state: bool, shifts) -> Tensor:
        """Everything at this rate and the slower ones, its input added. Writes the new states into `after`."""
        if level == len(self.down):
            return x + self._blocks(level, x, state, after, mask, return_state, shifts)[-1]
        skips = [x, *self._blocks(level, x, state, after, mask, return_state, shifts)]
        frames = _Frames(state.pools[level], skips[-1], mask, self.config.pool[level])
        y = self.up_pools[level].linear.weight.new_empty(0)
        if frames.values.shape[1]:
            pooled = self.down_pools[level](frames.values)
            y = self.up_pools[level](self._level(level + 1, pooled, state, after, frames.mask, return_state, shifts))
        heard, after.pools[level] = frames.spread(y)
        x = heard + skips.pop()
        return self._blocks(2 * len(self.down) - level, x, state, after, mask, return_state, shifts, skips)[-1]

    def _blocks(self, stage: int, x: Tensor, state, after, mask, return_state: bool, shifts, skips=None) -> list[Tensor]:
        """Outputs of a stage's blocks; `skips` are added, the last one to the first block's output."""
        outputs = []
        for i, block in enumerate(self.stages[stage], stage * self.config.n_layer):
            if shifts is not None:
                x = x + shifts[i].to(x.dtype)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x, new = checkpoint(block, x, state.blocks[i], mask, return_state, use_reentrant=False)
            else:
                x, new = block(x, state.blocks[i], mask, return_state)
            after.blocks[i] = new
            if skips is not None:
                x = x + skips.pop()
            outputs.append(x)
        return outputs


class _Frames:
    """Positions cut into frames of `pool`, behind those that were waiting: values (b f p d), and mask (b f) or None."""

    def __init__(self, state: PoolState, x: Tensor, mask: Tensor | None, pool: int):
        self.state, self.pool, self.length = state, pool, x.shape[1]
        self.uniform = mask is None and isinstance(state.phase, int)
        if self.uniform:
            self.items = torch.cat([state.pending[:, : state.phase], x], 1)
            self.count = self.items.shape[1] // pool
            self.mask = None
        else:  # rows have different numbers of real positions: the real ones of each move to the front
            phase = torch.as_tensor(state.phase, device=x.device).expand(x.shape[0])
            slots = torch.arange(pool - 1, device=x.device) < phase[:, None]
            real = torch.cat([slots, slots.new_ones(x.shape[:2]) if mask is None else mask], 1)
            self.rank = real.cumsum(1) - 1
            order = torch.argsort(~real, dim=1, stable=True)
            items = torch.cat([state.pending, x], 1)
            items = torch.where(real[..., None], items, 0.0)
            self.items = _take(items, order)
            self.real = real.sum(1)
            self.count = self.items.shape[1] // pool  # as many as there may be; `mask` tells which there are
            self.mask = torch.arange(self.count, device=x.device) < (self.real // pool)[:, None]
        self.values = self.items[:, : self.count * pool].unflatten(1, (self.count, pool))

    def spread(self, y: Tensor) -> tuple[Tensor, PoolState]:
        """Frames' words to the positions (b f p d) -> what each position of x hears (b l d), and the new state."""
        pool = self.pool
        held = self.state.held[:, None]  # (b 1 p d)
        frames = torch.cat([held.to(y.dtype), y], 1) if self.count else held
        positions = frames.flatten(1, 2)
        if self.uniform:
            phase = self.state.phase
            rest = self.items[:, self.count * pool :]
            pending = nn.functional.pad(rest, (0, 0, 0, pool - 1 - rest.shape[1]))
            new = PoolState(pending, frames[:, -1], rest.shape[1])
            return positions[:, phase : phase + self.length], new
        full = self.real // pool  # (b), frames that were filled
        slots = torch.arange(pool - 1, device=y.device)
        index = (full * pool)[:, None] + slots
        pending = _take(self.items, index.clamp(max=self.items.shape[1] - 1))
        pending = torch.where((slots < (self.real % pool)[:, None])[..., None], pending, 0.0)
        new = PoolState(pending, frames[torch.arange(len(full), device=y.device), full], self.real % pool)
        return _take(positions, self.rank[:, pool - 1 :].clamp(min=0)), new


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (b l d), index (b k) -> (b k d)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
