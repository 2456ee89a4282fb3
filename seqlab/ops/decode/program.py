"""A causal model as the list of operations that one token passes, and the state it leaves behind.

Fast back ends read this instead of the modules. One token runs `operations` from the first to the last on a vector x of
the residual stream, which starts as the embedding of the token (plus that of the stream's class):

    BLOCK  x += shift of the stream's class, if any;  x += mixer(norm(x));  x += slots[add] where there is an add;  slots[save] = x where there is a save
    DOWN   pending[phase] = x;  slots[slot] = x + held[phase].  If that filled the frame: x = DownPool(pending),
           slots[save] = x and on to the next operation; else x = slots[slot] and on to operation `jump`
    UP     held = UpPool(x);  x = slots[slot]

A BLOCK's recurrence depends on the input (`fixed` 0) or does not (1: real, 2: complex states, real parts first); the latter has
neither x_proj nor dt_proj. logits = head(norm_f(x)) end the token; with a linear prediction (heads/sample.py) a step of the
predictor comes first, the head has more rows, and the density follows. `slots` keep what a U-Net's skip connections carry upwards; an
isotropic stack has blocks alone. The gains of the norms are folded into the matrices behind them.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqlab.backbones.mamba import MambaMixer, MixerState
from seqlab.backbones.s4d import S4DMixer
from seqlab.backbones.unet import PoolState, UNet, UNetState
from seqlab.heads.sample import NOISE, PredictionHead, SampleState, numbers, window_weights

BLOCK, DOWN, UP = 0, 1, 2
PARAMETERS = re.compile(
    r"(embedding|class_embedding|class_shifts\.\d+|lm_head|backbone\.norm_f)\.weight|prediction_head\.(input|weight|shape|bias)"
    r"|backbone\.(layers|centre|(down|up)\.\d+)\.\d+\.(norm\.weight|mixer\.(A_log|A_imag|C|D|dt_bias))"
    r"|backbone\.(layers|centre|(down|up)\.\d+)\.\d+\.mixer\.(in_proj|x_proj|dt_proj|out_proj|conv1d)\.(weight|bias)"
    r"|backbone\.(down|up)_pools\.\d+\.linear\.(weight|bias)"
)
"""Everything that a program knows what to do with."""
LOG2E = 1.4426950408889634


@dataclass
class Operation:
    """One row of the program; which fields count is told above. -1: none."""

    kind: int
    index: int  # of the block, or of the pool
    d_model: int  # width of x on entry
    tensors: dict[str, Tensor] = field(default_factory=dict)  # float32
    shift: Tensor | None = None  # (classes d_model)
    save: int = -1
    add: int = -1
    slot: int = -1
    jump: int = -1
    d_inner: int = 0
    rank: int = 0
    fixed: int = 0
    states: int = 0  # numbers of state of a channel
    pool: int = 0
    d_out: int = 0  # width of x behind a pool


class LinearPrediction(NamedTuple):
    """A PredictionHead (heads/sample.py) as decoders use it; float32 but for `table`."""

    rows: Tensor  # (3 d_model), the head's further rows: (m - p) / w, log s / w, log a
    biases: Tensor  # (3)
    levels: Tensor  # (vocab)
    bias: Tensor  # (vocab)
    inputs: Tensor  # (3 d_model): what is added to a token's embedding, times the three numbers of the predictor
    table: Tensor  # (4 (K+1) + 3) float64: the weights of the sums S_0, S_1, S_2 and the prior, with 1 + NOISE at k = 0; the decays
    floors: tuple[float, float]
    hold: float
    start: Tensor  # (1 n) float64: the predictor's state before the first sample

    @classmethod
    def of(cls, head: PredictionHead, gain: Tensor) -> "LinearPrediction":
        own = head.predictor
        table = torch.cat([window_weights(own.order, own.memory, gain.device), own.prior.double()[None]])
        table[:, 0] *= 1 + NOISE
        table = torch.cat([table.flatten(), table.new_tensor(own.decays)])
        weights = _copy(head.weight) * gain, _copy(head.shape), _copy(own.levels), _copy(head.bias), _copy(head.input)
        return cls(*weights, table, tuple(own.floors().tolist()), own.hold, own.start(1))


class Program:
    """What `Operation`s say about a LanguageModel, with float32 copies of its weights on its device.

    slots: widths of the skip slots. `prediction`: what a linear prediction of `order` K needs; 0 and None: there is none.
    Raises ValueError for a model without a step (see `reason`).
    """

    def __init__(self, model: nn.Module):
        if (why := reason(model)) is not None:
            raise ValueError(why)
        config, backbone = model.config, model.backbone
        self.d_state, self.d_conv, self.epsilon = config.d_state, config.d_conv, config.norm_epsilon
        self.vocab_size, self.d_model = config.vocab_size, config.d_model
        self.operations: list[Operation] = []
        self.slots: list[int] = []
        if isinstance(backbone, UNet):
            self.pools = config.pool
            first = self._slot(config.d_model)  # the embedding is saved here before the first operation
            self._level(backbone, 0, config.d_model, first)
        else:
            self.pools = ()
            for layer in backbone.layers:
                self._block(layer)
        for block, shift in zip(self.blocks, getattr(model, "class_shifts", ())):
            block.shift = _copy(shift.weight)
        self.embedding = _copy(model.embedding.weight)
        gain = _copy(backbone.norm_f.weight)
        self.head = _copy(model.lm_head.weight) * gain
        self.order = config.prediction_order
        self.prediction = LinearPrediction.of(model.prediction_head, gain) if self.order else None
        self.heard = numbers(self.order, 0.0 if self.prediction is None else self.prediction.hold)

    @property
    def blocks(self) -> list[Operation]:
        return [o for o in self.operations if o.kind == BLOCK]

    def _slot(self, width: int) -> int:
        self.slots.append(width)
        return len(self.slots) - 1

    def _level(self, backbone: UNet, level: int, width: int, first: int) -> None:
        if level == len(self.pools):
            for layer in backbone.centre:
                self._block(layer)
            self.operations[-1].add = first
            return
        saved = [first]
        for layer in backbone.down[level]:
            saved.append(self._slot(width))
            self._block(layer).save = saved[-1]
        lower = backbone.down_pools[level].linear
        pool = self.pools[level]
        down = Operation(DOWN, level, width, slot=saved[-1], pool=pool, d_out=lower.out_features)
        # to (out, position, channel): a frame is then read as its positions come
        weight = _copy(lower.weight).unflatten(1, (width, pool)).transpose(1, 2).flatten(1)
        down.tensors = {"weight": weight.contiguous(), "bias": _copy(lower.bias)}
        down.save = self._slot(lower.out_features)
        self.operations.append(down)
        self._level(backbone, level + 1, lower.out_features, down.save)
        upper = backbone.up_pools[level].linear
        up = Operation(UP, level, upper.in_features, slot=saved.pop(), pool=pool, d_out=width)
        weight = _copy(upper.weight).unflatten(0, (width, pool)).transpose(0, 1).flatten(0, 1)
        bias = _copy(upper.bias).unflatten(0, (width, pool)).t().flatten()
        up.tensors = {"weight": weight.contiguous(), "bias": bias.contiguous()}
        self.operations.append(up)
        down.jump = len(self.operations)
        for layer in backbone.up[level]:
            self._block(layer).add = saved.pop()

    def _block(self, layer: nn.Module) -> Operation:
        mixer = layer.mixer
        config = mixer.config
        fixed = 0 if isinstance(mixer, MambaMixer) else 1 + mixer.is_complex
        block = Operation(
            BLOCK,
            len(self.blocks),
            config.d_model,
            d_inner=config.d_inner,
            rank=0 if fixed else config.rank,
            fixed=fixed,
            states=config.d_state * (2 if fixed == 2 else 1),
            d_out=config.d_model,
        )
        zeros = torch.zeros(1, device=mixer.D.device)
        in_bias, out_bias, conv_bias = mixer.in_proj.bias, mixer.out_proj.bias, mixer.conv1d.bias
        block.tensors = {
            "in_proj": _copy(mixer.in_proj.weight) * _copy(layer.norm.weight),
            "in_bias": zeros.repeat(2 * config.d_inner) if in_bias is None else _copy(in_bias),
            "conv": _copy(mixer.conv1d.weight).squeeze(1),
            "conv_bias": zeros.repeat(config.d_inner) if conv_bias is None else _copy(conv_bias),
            "D": _copy(mixer.D),
            "out_proj": _copy(mixer.out_proj.weight),
            "out_bias": zeros.repeat(config.d_model) if out_bias is None else _copy(out_bias),
        }
        if not fixed:
            block.tensors |= {
                "x_proj": _copy(mixer.x_proj.weight),
                "dt_proj": _copy(mixer.dt_proj.weight),
                "dt_bias": _copy(mixer.dt_proj.bias),
                "A": -torch.exp(_copy(mixer.A_log)) * LOG2E,
            }
        else:
            with torch.no_grad():
                log_decay, delta, C = mixer.discrete()
                parts = [torch.exp(log_decay), C]
                if fixed == 2:
                    parts = [torch.cat([z.real, z.imag], 1) for z in parts]
            # (d n), complex (d 2n); delta takes the place of dt_bias
            block.tensors |= {"A": parts[0].float(), "C": parts[1].float(), "dt_bias": _copy(delta)}
        self.operations.append(block)
        return block


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().float().clone()


def reason(model: nn.Module) -> str | None:
    """Why a model has no program: something in it only the model itself can run."""
    for name, _ in model.named_parameters():
        if not PARAMETERS.fullmatch(name):
            return f"parameter {name} is one that only the model itself knows to use: use graph or reference"
    backbone = model.backbone
    stages = backbone.stages if isinstance(backbone, UNet) else [backbone.layers]
    for stage in stages:
        for layer in stage:
            if type(layer.mixer) not in (MambaMixer, S4DMixer):
                return f"blocks of kind {type(layer.mixer).__name__} are run by the model itself: use graph or reference"
            for name, module in layer.mixer.named_children():
                if name.endswith("_proj") and type(module) is not nn.Linear:
                    return f"{name} is a {type(module).__name__}, which only the model itself can run: use graph or reference"
    return None


# --------------------------------------------------------------------------------------------------------- the state
class Carried:
    """The state of a program, one tensor a block and pool, float32, written in place by the back ends.

    conv[i] (b d_conv-1 d_inner), ssm[i] (b d_inner states), pending[l] (b p-1 d), held[l] (b p d), phase[l] int; heard
    (b 4K+5), or with `hold` (b 5K+9), float64.
    """

    def __init__(self, program: Program, batch: int, device: torch.device):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, device=device)

        blocks = program.blocks
        self.conv = [zeros(program.d_conv - 1, o.d_inner) for o in blocks]
        self.ssm = [zeros(o.d_inner, o.states) for o in blocks]
        down = [o for o in program.operations if o.kind == DOWN]
        down.sort(key=lambda o: o.index)
        self.pending = [zeros(o.pool - 1, o.d_model) for o in down]
        self.held = [zeros(o.pool, o.d_model) for o in down]
        self.phase = [0] * len(down)
        self.pools, self.order = program.pools, program.order
        self.heard = zeros(program.heard).double()
        self._start = None if program.prediction is None else program.prediction.start

    def load(self, state) -> None:
        """Take over a model's state (None: the start of a sequence)."""
        for tensor in (*self.conv, *self.ssm, *self.pending, *self.held, self.heard):
            tensor.zero_()
        self.phase = [0] * len(self.pending)
        if state is None:
            if self._start is not None:
                self.heard.copy_(self._start)
            return
        if isinstance(state, SampleState):
            self.heard.copy_(state.heard)
            state = state.backbone
        mixers = state.blocks if isinstance(state, UNetState) else state
        for i, mixer in enumerate(mixers):
            if mixer is not None:
                self.conv[i].copy_(mixer.conv)
                self.ssm[i].copy_(mixer.ssm)
        for level, pool in enumerate(state.pools if isinstance(state, UNetState) else ()):
            self.pending[level].copy_(pool.pending)
            self.held[level].copy_(pool.held)
            self.phase[level] = one_phase(pool.phase)

    def advance(self, tokens: int) -> None:
        """The phases after so many tokens more."""
        for level, pool in enumerate(self.pools):
            total = self.phase[level] + tokens
            self.phase[level], tokens = total % pool, total // pool

    def state(self):
        """The model's own state, in memory of its own."""
        state = [MixerState(c.clone(), s.clone()) for c, s in zip(self.conv, self.ssm)]
        if self.pools:
            pools = [PoolState(p.clone(), h.clone(), f) for p, h, f in zip(self.pending, self.held, self.phase)]
            state = UNetState(state, pools)
        return SampleState(state, self.heard.clone()) if self.order else state


def one_phase(phase: int | Tensor) -> int:
    """The phase all rows share; ValueError where masks have let them advance unequally."""
    if isinstance(phase, int):
        return phase
    if (phase != phase[0]).any():
        raise ValueError("the rows of this U-Net state stand at different positions of a frame; decode them apart")
    return int(phase[0])


def map_tensors(state, function):
    """A model's state with every tensor replaced by function(tensor)."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple):
        return type(state)(*(map_tensors(s, function) for s in state))
    return [map_tensors(s, function) for s in state] if isinstance(state, list) else state
