"""A Mamba block whose recurrence does not depend on the input: the S6 layer replaced by S4D (arXiv 2206.11893).

Convolution, gate and projections are those of `MambaMixer`; delta, B and C are parameters of each channel instead of
functions of the input ("Mamba-S4" in the Mamba paper's audio ablation, figure 10, where it is the better block at full
rate). B is 1: only its product with C counts.

    h_t = exp(delta A) h_{t-1} + delta u_t              (d_inner n), real or complex
    y_t = sum_n C h_t + D u_t                           complex: 2 Re(sum), every state standing for a conjugate pair

    real       A_n = -(n + 1) to begin with             `blocks: s4d`
    complex    A_n = -1/2 + n i, S4D-Lin                `blocks: s4d_complex`

A fixed recurrence is a convolution. Sequences are cut into chunks of T: within a chunk it is a T x T Toeplitz matrix of
each channel; from chunk to chunk the states at the borders follow the same recurrence with exp(T delta A), which is solved
the same way again. Everything is a matrix product, differentiable as it stands, with l d_inner n / T numbers of state.
"""

import math

import torch
from torch import Tensor, nn

from seqlab.backbones.mamba import BackboneConfig, MambaMixer, MixerState, _state
from seqlab.ops import causal_conv1d

CHUNK = 128
GROUP = 32  # chunks whose border states are found in one product


class S4DMixer(nn.Module):
    """(b l d_model) -> (b l d_model) with a fixed recurrence; the contract of `MambaMixer`.

    State: conv (b d_conv-1 d_inner), ssm (b d_inner n) float32, or (b d_inner 2n): real parts, then imaginary ones.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        d_inner, n = config.d_inner, config.d_state
        self.config, self.is_complex = config, config.blocks[0] == "s4d_complex"
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=config.bias)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner, bias=config.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(d_inner))
        if self.is_complex:
            self.A_log = nn.Parameter(torch.full((d_inner, n), math.log(0.5)))  # of minus the real part
            self.A_imag = nn.Parameter(torch.arange(n, dtype=torch.float32).repeat(d_inner, 1))
            self.C = nn.Parameter(torch.randn(d_inner, n, 2) * math.sqrt(0.5))  # real, imaginary
        else:
            self.A_log = nn.Parameter(torch.arange(1, n + 1, dtype=torch.float32).log().repeat(d_inner, 1))
            self.C = nn.Parameter(torch.randn(d_inner, n))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=config.bias)
        with torch.no_grad():
            self.dt_bias.copy_(MambaMixer.initial_dt_bias(config))
            self.out_proj.weight /= math.sqrt(config.n_layer)

    def forward(
        self, x: Tensor, state: MixerState | None = None, mask: Tensor | None = None, return_state: bool = True
    ) -> tuple[Tensor, MixerState | None]:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (b l d_inner) each
        u = causal_conv1d(
            u,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=None if state is None else state.conv,
            mask=mask,
            return_final_state=return_state,
        )
        if return_state:
            u, conv_state = u
        with torch.autocast(x.device.type, enabled=False):
            real = u if u.dtype == torch.float64 else u.float()
            y, ssm = self.recur(real, None if state is None else state.ssm, mask, return_state)
            y = (y + self.D * real).to(u.dtype)
        y = self.out_proj(y * nn.functional.silu(z))
        return y, MixerState(conv_state, ssm) if return_state else None

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """log of the decay (d n), input gain delta (d), and C (d n), with the factor 2 of a conjugate pair."""
        delta, A, C = nn.functional.softplus(_state(self.dt_bias)), -torch.exp(_state(self.A_log)), _state(self.C)
        if not self.is_complex:
            return A * delta[:, None], delta, C
        return torch.complex(A, _state(self.A_imag)) * delta[:, None], delta, 2 * torch.view_as_complex(C)

    def recur(self, u: Tensor, state: Tensor | None, mask: Tensor | None, return_state: bool):
        """The recurrence without D: u (b l d) float32 or float64 -> y (b l d), last state in its type. Masked positions are not there."""
        log_decay, delta, C = self.discrete()
        h = None if state is None else _unpacked(state, self.is_complex)
        if mask is None:
            y, last = lti_scan(u * delta, log_decay, C, h)
            return y, _packed(last).to(u.dtype) if return_state else None
        # the real positions of each row move to the front, and their outputs back
        count = mask.sum(1)  # (b)
        rank = (mask.cumsum(1) - 1).clamp(min=0)[..., None].expand_as(u)
        order = torch.argsort(~mask, dim=1, stable=True)
        v = torch.where(mask[..., None], u * delta, 0.0)
        y = lti_scan(v.gather(1, order[..., None].expand_as(u)), log_decay, C, h)[0].gather(1, rank)
        y = torch.where(mask[..., None], y, 0.0)
        if not return_state:
            return y, None
        # to the end, for the state: nothing then happens before they begin, and what was there decays as often as they count
        order = torch.argsort(mask, dim=1, stable=True)
        _, last = lti_scan(v.gather(1, order[..., None].expand_as(u)), log_decay, C, None)
        if h is not None:
            last = last + torch.exp(count[:, None, None] * log_decay) * h
        return y, _packed(last).to(u.dtype)


def lti_scan(v: Tensor, log_decay: Tensor, C: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_decay) h_{t-1} + v_t,  y_t = Re(sum_n C h_t).

    v (b l d) real; log_decay, C (d n) and state (b d n), all real or all complex. Returns y (b l d), h (b d n).
    """
    batch, length, d = v.shape
    h = torch.zeros(batch, d, C.shape[1], dtype=C.dtype, device=v.device) if state is None else state.to(C.dtype)
    whole = length // CHUNK * CHUNK
    outputs = []
    for piece in (v[:, :whole].unflatten(1, (-1, CHUNK)), v[:, None, whole:]):
        if piece.numel():
            y, h = _chunks(piece, log_decay, C, h)
            outputs.append(y)
    return torch.cat(outputs, 1) if outputs else v, h


def _chunks(v: Tensor, log_decay: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """`lti_scan` of whole chunks v (b c t d)."""
    batch, count, t, d = v.shape
    power = torch.exp(torch.arange(t + 1, device=v.device)[:, None, None] * log_decay)  # (t+1 d n)
    kernel = _real((C * power[:t]).sum(-1))  # (t d)
    lag = torch.arange(t, device=v.device)
    lag = lag[:, None] - lag
    toeplitz = torch.where(lag[..., None] >= 0, kernel[lag.clamp(min=0)], 0.0).permute(2, 0, 1)  # (d t t)
    columns = v.permute(3, 2, 0, 1).flatten(2)  # (d t bc)
    y = toeplitz @ columns
    ends = _packed(power[:t].flip(0)).permute(1, 2, 0) @ columns  # (d n' t) (d t bc): what a chunk leaves behind
    ends = _unpacked(ends.transpose(1, 2), C.is_complex()).unflatten(1, (batch, count)).permute(1, 2, 0, 3)  # (b c d n)
    before, last = _borders(ends, t * log_decay, h)
    # Re(z h) = Re z Re h - Im z Im h
    reading = _packed((C * power[1:]).conj() if C.is_complex() else C * power[1:])  # (t d n')
    y = y + reading.transpose(0, 1) @ _packed(before).permute(2, 3, 0, 1).flatten(2)  # (d t n') (d n' bc)
    return y.unflatten(2, (batch, count)).permute(2, 3, 1, 0).flatten(1, 2), last


def _borders(ends: Tensor, log_decay: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """h_{i+1} = exp(log_decay) h_i + ends_i from h_0 = h: (b c d n) of h_0 .. h_{c-1}, and h_c."""
    batch, count = ends.shape[:2]
    if count > GROUP:  # groups of chunks are chunks of their own
        whole = count // GROUP * GROUP
        grouped = ends[:, :whole].unflatten(1, (-1, GROUP))  # (b g c d n)
        inner, sums = _borders(grouped.flatten(0, 1), log_decay, h.new_zeros(len(grouped) * grouped.shape[1], *h.shape[1:]))
        starts, after = _borders(sums.unflatten(0, (batch, -1)), GROUP * log_decay, h)
        steps = torch.arange(GROUP, device=ends.device)[:, None, None]
        inner = inner.unflatten(0, (batch, -1)) + starts[:, :, None] * torch.exp(steps * log_decay)
        rest, last = _borders(ends[:, whole:], log_decay, after) if whole < count else (ends[:, :0], after)
        return torch.cat([inner.flatten(1, 2), rest], 1), last
    lag = torch.arange(count + 1, device=ends.device)[:, None] - torch.arange(1, count + 1, device=ends.device)
    weight = torch.exp(lag.clamp(min=0)[..., None, None] * log_decay)
    weight = torch.where(lag[..., None, None] >= 0, weight, 0.0)  # (c+1 c d n)
    states = (weight.permute(2, 3, 0, 1) @ ends.permute(2, 3, 1, 0)).permute(3, 2, 0, 1)  # (b c+1 d n)
    steps = torch.arange(count + 1, device=ends.device)[:, None, None]
    states = states + h[:, None] * torch.exp(steps * log_decay)
    return states[:, :-1], states[:, -1]


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _packed(x: Tensor) -> Tensor:
    """(.. n) complex -> (.. 2n) real parts, imaginary parts; real numbers as they are."""
    return torch.cat([x.real, x.imag], -1) if x.is_complex() else x


def _unpacked(x: Tensor, is_complex: bool) -> Tensor:
    return torch.complex(*(part.contiguous() for part in x.chunk(2, -1))) if is_complex else x
