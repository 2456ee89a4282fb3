"""Mamba, the backbone. Read this file first.

Glossary (Gu & Dao 2023, arXiv 2312.00752; equation and algorithm numbers are that paper's):

    b, l        batch, sequence length                    shapes are written as lower-case words, (b l d_model)
    d_model     width of the residual stream               D in the paper's section 3.4
    d_inner     expand * d_model, width inside a block     E * D
    d_state     n, size of the state of one channel        N
    dt_rank     rank of the projection that makes delta    R
    u           input of the scan  (b l d_inner)           x in equation 1
    delta       step size, > 0     (b l d_inner)           eq. 4; softplus(dt_proj(.)), algorithm 2
    A           decay, < 0         (d_inner n)             stored as A_log = log(-A), S4D-Real initialisation
    B, C        input and output vectors of the state, both functions of the input: the selection, algorithm 2
    D           skip weight of a channel (d_inner)
    z           gate               (b l d_inner)           section 3.4, figure 3
    reverse     right to left in time; never "reverse complement", which is always written rc

One block:  x -> norm -> in_proj -> (u | z);  u -> causal_conv1d + SiLU -> x_proj -> (delta | B | C) -> selective scan,
gated by SiLU(z) -> out_proj -> + x.

A backbone is `forward(x, state=None, mask=None) -> (y, state)`: feed a sequence in pieces, carrying the state, and the
answer is the same as for the whole; one position at a time is the same again.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from seqlab.ops import block, causal_conv1d, selective_scan


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of a stack of Mamba blocks. `direction` decides the objective too: causal models predict the next symbol,
    bidirectional ones fill in masked symbols."""

    d_model: int = 256
    n_layer: int = 8
    direction: Literal["causal", "bidirectional"] = "causal"
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None  # None: ceil(d_model / 16)
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_init_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    tie_projections: bool = True  # bidirectional: both directions share in_proj and out_proj
    combine: Literal["add", "multiply"] = "add"  # bidirectional: how the two directions meet
    architecture: Literal["isotropic", "unet"] = "isotropic"  # unet: n_layer blocks in each stage (backbones/unet.py)
    pool: tuple[int, ...] = (4, 4)  # unet: pooling factors, outermost first
    pool_expand: int = 2  # unet: growth of d_model at each pool
    # the kind of block: one for all, or for a U-Net one a stage, from the outermost rate to the centre
    # s6: selective (this file); s4d, s4d_complex: a fixed recurrence, real or complex (s4d.py)
    blocks: tuple[Literal["s6", "s4d", "s4d_complex"], ...] = ("s6",)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "d_state", "d_conv", "expand"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be 1 or more, got {getattr(self, name)}")
        if self.d_state > 256:
            raise ValueError(f"d_state: at most 256, got {self.d_state}")
        if self.dt_rank is not None and self.dt_rank < 1:
            raise ValueError(f"dt_rank: must be 1 or more, or null for ceil(d_model / 16), got {self.dt_rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: must lie in [0, 1), got {self.dropout}")
        if not 0.0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min: must lie in (0, dt_max], got {self.dt_min} with dt_max {self.dt_max}")
        if self.architecture == "unet":
            if self.direction != "causal":
                raise ValueError("architecture: unet is causal; use direction: causal, or architecture: isotropic")
            if not self.pool or min(self.pool) < 2:
                raise ValueError(f"pool: one or more factors of 2 or more, for example [4, 4], got {list(self.pool)}")
            if self.pool_expand < 1:
                raise ValueError(f"pool_expand: must be 1 or more, got {self.pool_expand}")
        stages = len(self.pool) + 1 if self.architecture == "unet" else 1
        if len(self.blocks) not in (1, stages):
            allowed = f"1 or {stages} names, from the outermost stage to the centre" if stages > 1 else "1 name"
            raise ValueError(f"blocks: {allowed}, got {len(self.blocks)}")
        if self.direction == "bidirectional" and self.blocks != ("s6",):
            raise ValueError(f"blocks: a bidirectional stack is made of s6 blocks, got {list(self.blocks)}")

    def block_of(self, stage: int) -> str:
        """The kind of block of a stage (0: outermost)."""
        return self.blocks[0] if len(self.blocks) == 1 else self.blocks[stage]

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        return self.dt_rank if self.dt_rank is not None else math.ceil(self.d_model / 16)


class MixerState(NamedTuple):
    """What one causal mixer remembers of everything to its left."""

    conv: Tensor  # (b d_conv-1 d_inner), the last inputs of the convolution
    ssm: Tensor  # (b d_inner n), float32


def _state(parameter: Tensor) -> Tensor:
    """A parameter of the scan in the type of its state: float32, whatever the model's, but float64 beside float64."""
    return parameter if parameter.dtype == torch.float64 else parameter.float()


class MambaMixer(nn.Module):
    """One selective state space mixer, (b l d_model) -> (b l d_model); paper section 3.4, figure 3.

    Parameter names and shapes are those of the published implementations, so their weights load unrenamed.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        d_inner, d_state = config.d_inner, config.d_state
        self.config = config
        # A run-time choice, not part of the model: the ranks that share a sequence (seqlab/training/parallel.py), each
        # calling this with its piece. Their two operators take the place of ours.
        self.ranks = None
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=config.bias)
        # nn.Conv1d only holds the weights (d_inner 1 d_conv); the arithmetic is our own channel-last operator
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner, bias=config.conv_bias)
        self.x_proj = nn.Linear(d_inner, config.rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(config.rank, d_inner, bias=True)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=config.bias)
        self._initialise()

    def _initialise(self) -> None:
        """Section 3.6 and appendix: delta starts log-uniform in [dt_min, dt_max]."""
        config = self.config
        nn.init.uniform_(self.dt_proj.weight, -(config.rank**-0.5), config.rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(self.initial_dt_bias(config))
            # two residual branches of a Transformer become one here: GPT-2's 1/sqrt(number of residual adds)
            self.out_proj.weight /= math.sqrt(config.n_layer)

    @staticmethod
    def initial_dt_bias(config: BackboneConfig) -> Tensor:
        """(d_inner) numbers whose softplus is log-uniform in [dt_min, dt_max]."""
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        delta = torch.exp(torch.rand(config.d_inner) * (high - low) + low).clamp(min=config.dt_init_floor)
        return delta + torch.log(-torch.expm1(-delta))  # inverse of softplus

    def forward(
        self, x: Tensor, state: MixerState | None = None, mask: Tensor | None = None, return_state: bool = True
    ) -> tuple[Tensor, MixerState | None]:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (b l d_inner) each
        y, state = self.scan(u, z, state, mask, return_state=return_state)
        return self.out_proj(y), state

    def directions(self) -> tuple["MambaMixer", ...]:
        """The mixers whose scans share in_proj and add up before out_proj, left to right first; () if that is not how it
        is built, which keeps the fused block away."""
        return (self,)

    def scan(
        self,
        u: Tensor,
        z: Tensor,
        state: MixerState | None = None,
        mask: Tensor | None = None,
        reverse: bool = False,
        return_state: bool = False,
    ) -> tuple[Tensor, MixerState | None]:
        """Everything between the two projections: u, z (b l d_inner) -> gated output (b l d_inner)."""
        if self.ranks is not None:
            if state is not None or return_state:
                raise ValueError("a sequence shared by several ranks carries no state in or out")
            return self._scan_piece(u, z, mask, reverse), None
        rank, d_state = self.config.rank, self.config.d_state
        u = causal_conv1d(
            u,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=None if state is None else state.conv,
            mask=mask,
            reverse=reverse,
            return_final_state=return_state,
        )
        if return_state:
            u, conv_state = u
        delta, B, C = self.x_proj(u).split([rank, d_state, d_state], dim=-1)
        y = selective_scan(
            u,
            F.linear(delta, self.dt_proj.weight),  # the bias goes into the scan, in float32
            -torch.exp(_state(self.A_log)),
            B,
            C,
            _state(self.D),
            z=z,
            delta_bias=_state(self.dt_proj.bias),
            delta_softplus=True,
            initial_state=None if state is None else state.ssm,
            mask=mask,
            reverse=reverse,
            return_final_state=return_state,
        )
        if return_state:
            y, ssm_state = y
            return y, MixerState(conv_state, ssm_state)
        return y, None

    def _scan_piece(self, u: Tensor, z: Tensor, mask: Tensor | None, reverse: bool) -> Tensor:
        """`scan` of this rank's piece of a sequence that is shared by `self.ranks`."""
        rank, d_state = self.config.rank, self.config.d_state
        weight = self.conv1d.weight.squeeze(1)
        u = self.ranks.causal_conv1d(u, weight, self.conv1d.bias, activation="silu", mask=mask, reverse=reverse)
        delta, B, C = self.x_proj(u).split([rank, d_state, d_state], dim=-1)
        return self.ranks.selective_scan(
            u,
            F.linear(delta, self.dt_proj.weight),
            -torch.exp(_state(self.A_log)),
            B,
            C,
            _state(self.D),
            z=z,
            delta_bias=_state(self.dt_proj.bias),
            delta_softplus=True,
            mask=mask,
            reverse=reverse,
        )


def make_mixer(config: BackboneConfig) -> nn.Module:
    """The causal mixer that `config.blocks` names."""
    if config.blocks[0] == "s6":
        return MambaMixer(config)
    from seqlab.backbones.s4d import S4DMixer  # which is made of parts of this file

    return S4DMixer(config)


class Block(nn.Module):
    """Pre-norm residual block: x + dropout(mixer(norm(x))).

    `forward` below is the definition. On a GPU the same arithmetic runs as one operator (seqlab/ops/block), which keeps a
    quarter of the memory; `fuse = False` turns that off.
    """

    fuse = True
    # Likewise a run-time choice that changes no result: the fused block keeps more of the scan for the backward pass.
    keep_every_state = False

    def __init__(self, config: BackboneConfig, mixer: nn.Module):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.mixer = mixer
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state, mask: Tensor | None, return_state: bool):
        if self.fuse and self._fusible(x):
            return self._fused(x, state, mask, return_state)
        y, state = self.mixer(self.norm(x), state, mask, return_state)
        return x + self.dropout(y), state

    def direction(
        self,
        x: Tensor,
        reverse: bool,
        state: MixerState | None = None,
        mask: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, MixerState | None]:
        """What one direction of a bidirectional mixer adds to x (b l d_model), before dropout, and its state: causal in its
        own time, so that x can be fed in pieces, for `reverse` from the right."""
        if self.fuse and self._fusible(x):
            mixers = (self.mixer.directions()[reverse],)
            return self._mamba_block(x, mixers, (reverse,), False, state, mask, return_state)
        return self.mixer.direction(self.norm(x), reverse, state, mask, return_state)

    def _fusible(self, x: Tensor) -> bool:
        config, mixers = self.mixer.config, getattr(self.mixer, "directions", tuple)()
        if not mixers or block.unavailable(x, config.d_inner, config.d_state) is not None:
            return False
        first = mixers[0]  # an adapter in the place of a projection must be called
        return all(type(m) is nn.Linear for m in (first.in_proj, first.out_proj, first.x_proj, first.dt_proj))

    def _fused(self, x: Tensor, state: MixerState | None, mask: Tensor | None, return_state: bool):
        mixers = self.mixer.directions()
        dropout = self.dropout.p > 0 and self.training
        reverse = (False, True)[: len(mixers)]
        y, state = self._mamba_block(x, mixers, reverse, not dropout, state, mask, return_state)
        return (x + self.dropout(y) if dropout else y), state

    def _mamba_block(self, x: Tensor, mixers, reverse, residual: bool, state, mask: Tensor | None, return_state: bool):
        y, conv_state, ssm_state = block.mamba_block(
            x,
            *self._operands(mixers),
            reverse,
            residual=residual,
            mask=mask,
            conv_state=None if state is None else state.conv,
            ssm_state=None if state is None else state.ssm,
            return_state=return_state,
            ranks=mixers[0].ranks,
            every_state=self.keep_every_state,
        )
        return y, MixerState(conv_state, ssm_state) if return_state else None

    def _operands(self, mixers) -> tuple:
        """What block.mamba_block takes between x and `reverse`."""
        first = mixers[0]
        projections = (first.in_proj.weight, first.in_proj.bias, first.out_proj.weight, first.out_proj.bias)
        directions = tuple(
            block.Direction(
                m.conv1d.weight.squeeze(1),
                m.conv1d.bias,
                m.x_proj.weight,
                m.dt_proj.weight,
                m.dt_proj.bias,
                m.A_log,
                m.D,
            )
            for m in mixers
        )
        return self.norm.weight, self.norm.eps, *projections, directions


class Mamba(nn.Module):
    """A stack of blocks and a final norm: forward(x, state, mask) -> (y, state), all (b l d_model).

    `state` is a list with one MixerState a layer (None: start of the sequence). `mask` (b l) is True at real
    positions; the others change nothing. `return_state=False` saves the work of making the final state. `shifts`, one
    (b 1 d_model) a block, are added to x before the block.
    """

    is_causal = True

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config, self.make_mixer(config)) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        # A run-time choice, not part of the model: recompute blocks in the backward pass instead of keeping them.
        # It renames no parameter and changes no result.
        self.checkpoint_blocks = False
        # What a block and its recomputation run under (torch.utils.checkpoint), for those who have something to remember.
        self.checkpoint_contexts = noop_context_fn
        # Likewise: keep no block's input but subtract on the way back (seqlab/ops/block/stack.py).
        self.recover_inputs = False

    def make_mixer(self, config: BackboneConfig) -> nn.Module:
        return make_mixer(config)

    @property
    def widths(self) -> list[int]:
        """d_model of every block."""
        return [self.config.d_model] * len(self.layers)

    def forward(
        self,
        x: Tensor,
        state: list[MixerState] | None = None,
        mask: Tensor | None = None,
        return_state: bool = True,
        shifts: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[MixerState] | None]:
        recovers = self.recover_inputs and torch.is_grad_enabled() and not return_state and shifts is None
        if recovers and self.can_recover_inputs(x, state):
            blocks = [(*layer._operands(m := layer.mixer.directions()), (False, True)[: len(m)]) for layer in self.layers]
            return self.norm_f(block.mamba_stack(x, blocks, mask)), None
        states = []
        for i, layer in enumerate(self.layers):
            before = None if state is None else state[i]
            if shifts is not None:
                x = x + shifts[i].to(x.dtype)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x, after = checkpoint(
                    layer, x, before, mask, return_state, use_reentrant=False, context_fn=self.checkpoint_contexts
                )
            else:
                x, after = layer(x, before, mask, return_state)
            states.append(after)
        return self.norm_f(x), states if return_state else None

    def can_recover_inputs(self, x: Tensor, state=None) -> bool:
        """Whether x (b l d_model) can go through the stack that keeps no block's input: fused blocks, from the start of a
        sequence that no other rank shares, without dropout."""
        drops = self.config.dropout > 0 and self.training
        if state is not None or drops or any(getattr(m, "ranks", None) is not None for m in self.modules()):
            return False
        return all(layer.fuse and layer._fusible(x) for layer in self.layers)

    def step(self, x: Tensor, state: list[MixerState] | None = None) -> tuple[Tensor, list[MixerState]]:
        """One position, x (b 1 d_model); the same as `forward` on a sequence of one."""
        return self(x, state)
