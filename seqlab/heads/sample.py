"""Linear prediction inside a model of sampled signals: what the network is told about it, and the head that follows it.

A code stands for an amplitude, `levels[code]`. `LinearPredictor` has no weights: at every sample it fits K coefficients to the
recent past (backward-adaptive linear predictive coding, the autocorrelation method with a recursive window; lambda^2 is `memory`):

    v_t[n] = (lambda^n - mu^n) x_{t-n}                     the windowed past; x: amplitudes, zero before the beginning
    r_t[k] = sum_n v_t[n] v_t[n+k] + prior[k]              k = 0 ... K, its correlations, and the training split's
    c_t    = Levinson(r_t);  p_t = sum_k c_t[k] x_{t+1-k}   the prediction of x_{t+1}, held within [-1, 1]
    e_t    = nu e_{t-1} + (1 - nu) |x_t - p_{t-1}|          how wrong it has been lately
    w_t    = e_t + f0 + f1 |p_t|                           and no less than a quarter of a step between levels there

A window that ended at its highest would fit coefficients to the silence behind its end. Its product with itself k samples on is
three exponentials, so three sums that decay at lambda^2, lambda mu and mu^2 hold all that r needs:

    S_j,t[k] = decay_j S_j,t-1[k] + x_t x_{t-k};  r[k] = lambda^k S_0[k] - (lambda^k + mu^k) S_1[k] + mu^k S_2[k] + prior[k]

`PredictionHead` adds to the logits, from the features y of a position,

    m     = p + w (.),  s = w exp(.),  a = exp(.)          (.): linear maps of y
    logit = -a log(1 + ((levels - m) / s)^2) + bias per code

that is, up to a constant, a Student t distribution around m of 2 a - 1 degrees of freedom, times whatever the language head
says. The newest error, w and p go into the network too.

Sound that follows its own errors loses its level: log w then is a random walk, and what is a little too narrow or too wide
everywhere takes it to silence or to full scale. And a fit to the recent past alone sharpens whatever resonance it has just made.
With `hold` above 0, which is for generation (it costs likelihood), the whole past has a say too, as if PAST samples of the
training split had come before it:

    R_t[k] = R_t-1[k] + x_t x_{t-k};  r[k] += hold r[0] / R[0] R[k]     so that no resonance is all there is
    M_t = M_t-1 + DRIFT (x_t - M_t-1);  p_t -= DRIFT M_t                so that the mean stays at zero
    W_t = mean of all |errors| + f0 + f1 |p_t|                          and w^(1 - hold) W^hold takes the place of w in m and s

Then log w goes back to log W at a rate of (1 - nu) hold a sample, and a density that is exp(b) times too wide leaves it b / hold above.

The predictor computes in float64, the head in float32: a prediction 30 dB better than its signal leaves little for rounding.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONSET = 0.95  # mu
WIDTH_MEMORY = 0.99  # nu; less, and generated sound wanders off: its errors are as wide as the errors before them
NOISE = 1e-4  # share of r[0] that is added to it: white noise 40 dB below, which keeps the fit from being too sure
PAST = 1 << 14  # samples of the training split that the whole past begins with
DRIFT = 1 / 64  # memory of the mean, and how fast it goes back to zero
PIECE = 1 << 17  # positions that are worked on at a time
INPUTS = 3  # numbers that the network is told at every position
ROWS = 3  # numbers that the network says about the sample that follows


class SampleState(NamedTuple):
    """State of a language model with a linear prediction between two pieces of a sequence."""

    backbone: Any
    heard: Tensor  # (b 4K+5) float64: the last K amplitudes, oldest first; S_0, S_1, S_2; p; e. With `hold` (b 5K+9): and R, E, n, M


class Prediction(NamedTuple):
    """What `LinearPredictor` says at every position (b l), about the sample that follows."""

    p: Tensor
    width: Tensor  # w, above 0; with `hold` what takes its place
    inputs: Tensor  # (b l INPUTS)


def numbers(order: int, hold: float) -> int:
    """How many numbers `heard` has for a row."""
    return 4 * order + 5 + (order + 4 if hold else 0)


def levinson(r: Tensor) -> Tensor:
    """Correlations (K+1 n) -> coefficients (K n) of the linear prediction with the least error, newest sample first."""
    order = len(r) - 1
    c, error, backwards = torch.zeros_like(r[1:]), r[0], r.flip(0)
    for i in range(order):
        reflection = (r[i + 1] - (c[:i] * backwards[order - i : order]).sum(0)) / error
        c[:i].addcmul_(c[:i].flip(0), reflection, value=-1)
        c[i] = reflection
        error = torch.addcmul(error, error * reflection, reflection, value=-1)
    return c


def window_weights(order: int, memory: float, device: torch.device) -> Tensor:
    """(3 K+1) float64: what S_0, S_1 and S_2 weigh in r; memory: lambda^2."""
    k = torch.arange(order + 1, device=device, dtype=torch.float64)
    slow, fast = memory ** (k / 2), ONSET**k
    return torch.stack([slow, -slow - fast, fast])


def decaying_sum(x: Tensor, decay: float) -> Tensor:
    """y_t = decay y_{t-1} + x_t along dim 1, by doubling; what has decayed below 1e-9 is left out."""
    reach = 1
    while reach < x.shape[1] and decay**reach > 1e-9:
        x = torch.cat([x[:, :reach], x[:, reach:] + decay**reach * x[:, :-reach]], 1)
        reach *= 2
    return x


class LinearPredictor(nn.Module):
    """forward(ids (b l), heard or None) -> (Prediction, heard). `fit` fills in what it takes from the data. `hold` (0) may be set
    before a sequence begins: states of 0 and of more than 0 differ."""

    def __init__(self, vocab_size: int, order: int, memory: float = 0.995):
        super().__init__()
        self.order, self.memory, self.hold = order, memory, 0.0
        self.decays = (memory, memory**0.5 * ONSET, ONSET * ONSET)
        self.register_buffer("levels", torch.linspace(-1, 1, vocab_size))
        self.register_buffer("prior", F.one_hot(torch.tensor(0), order + 1) * 1e-3)

    def floors(self) -> Tensor:
        """f0, f1 (2) float64: a quarter of the steps between levels, which for mu-law grow as the amplitude. Stays on its device:
        a CUDA graph can hold the whole step."""
        steps = self.levels.double().diff() / 4
        return torch.stack([steps.min(), steps.max() - steps.min()])

    @torch.no_grad()
    def forward(self, ids: Tensor, heard: Tensor | None = None) -> tuple[Prediction, Tensor]:
        with torch.autocast(ids.device.type, enabled=False):
            parts = []
            for piece in ids.split(max(1, PIECE // max(1, len(ids))), 1):
                part, heard = self._piece(piece, heard)
                parts.append(part)
        return Prediction(*(torch.cat(same, 1) for same in zip(*parts))), heard

    def start(self, rows: int) -> Tensor:
        """`heard` before the first sample."""
        heard = self.levels.new_zeros(1, numbers(self.order, self.hold), dtype=torch.float64)
        if self.hold:
            R, E, n = heard[0, 4 * self.order + 5 :].split([self.order + 1, 1, 2])[:3]
            R.copy_(self.prior).mul_(PAST)
            E.copy_(self.longterm_error()).mul_(PAST)
            n[0] = PAST
        return heard.expand(rows, -1)

    def longterm_error(self) -> Tensor:
        """Mean |error| (1) of one prediction for the whole training split, were its errors of a normal distribution."""
        r = self.prior.double()[:, None].clone()
        r[0] *= 1 + NOISE
        return (2 / math.pi * (r[0] - (levinson(r) * r[1:]).sum(0)).clamp_min(0)).sqrt()

    def _piece(self, ids: Tensor, heard: Tensor | None) -> tuple[Prediction, Tensor]:
        K, (f0, f1) = self.order, self.floors().unbind()
        heard = self.start(len(ids)) if heard is None else heard
        if not ids.shape[1]:
            nothing = self.levels.new_zeros(len(ids), 0, dtype=torch.float32)
            return Prediction(nothing, nothing, nothing.new_zeros(len(ids), 0, INPUTS)), heard
        heard, past = heard[:, : 4 * K + 5], heard[:, 4 * K + 5 :]
        before, *sums, last, width = heard.split([K, K + 1, K + 1, K + 1, 1, 1], 1)
        x = torch.cat([before, self.levels[ids.long()].double()], 1)  # (b K+l)
        windows = x.unfold(1, K + 1, 1)  # (b l K+1), newest last
        products = windows[..., -1:] * windows.flip(-1)
        r, ends = self.prior.double(), []
        for weight, decay, S in zip(window_weights(K, self.memory, x.device), self.decays, sums, strict=True):
            S = decaying_sum(torch.cat([products[:, :1] + decay * S[:, None], products[:, 1:]], 1), decay)
            r = r + weight * S
            ends.append(S[:, -1])
        r = r.permute(2, 0, 1).flatten(1)  # (K+1 b l)
        r[0] *= 1 + NOISE
        if self.hold:
            R, E, n, M = past.split([K + 1, 1, 1, 1], 1)
            R = products.cumsum(1) + R[:, None]
            r = torch.addcmul(r, self.hold * r[0], (R / R[..., :1]).permute(2, 0, 1).flatten(1))
        c = levinson(r).unflatten(1, ids.shape)  # (K b l)
        p = (c * windows[..., 1:].flip(-1).permute(2, 0, 1)).sum(0)
        if self.hold:
            means = DRIFT * x[:, K:]
            means = torch.cat([means[:, :1] + (1 - DRIFT) * M, means[:, 1:]], 1)
            means = decaying_sum(means, 1 - DRIFT)
            p = p - DRIFT * means
        p = p.clamp(-1, 1)
        errors = x[:, K:] - torch.cat([last, p[:, :-1]], 1)
        widths = (1 - WIDTH_MEMORY) * errors.abs()
        widths[:, :1] += WIDTH_MEMORY * width
        widths = decaying_sum(widths, WIDTH_MEMORY)
        wide = widths + f0 + f1 * p.abs()
        earlier = torch.cat([width + f0 + f1 * last.abs(), wide[:, :-1]], 1)
        inputs = [torch.tanh(errors / earlier), 0.5 * wide.log() + 2, torch.asinh(255 * p) / math.asinh(255)]
        new = [x[:, -K:], *ends, p[:, -1:], widths[:, -1:]]
        if self.hold:
            E = errors.abs().cumsum(1) + E
            n = n + torch.arange(1, ids.shape[1] + 1, device=ids.device)
            wide = wide * ((E / n + f0 + f1 * p.abs()) / wide) ** self.hold
            new += [R[:, -1], E[:, -1:], n[:, -1:], means[:, -1:]]
        return Prediction(p.float(), wide.float(), torch.stack(inputs, -1).float()), torch.cat(new, 1)


class PredictionHead(nn.Module):
    """forward(y (b l d_model), Prediction) -> what to add to the logits (b l vocab). `predictor` is its own."""

    def __init__(self, d_model: int, vocab_size: int, order: int, memory: float = 0.995):
        super().__init__()
        self.predictor = LinearPredictor(vocab_size, order, memory)
        self.input = nn.Parameter(torch.zeros(INPUTS, d_model))  # what the network is told
        self.weight = nn.Parameter(torch.zeros(ROWS, d_model))
        self.shape = nn.Parameter(torch.tensor([0.0, 0.0, 0.7]))  # (m - p) / w, log s / w and log a to begin with
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    @torch.no_grad()
    def fit(self, levels: np.ndarray, correlations: np.ndarray) -> None:
        """Take over the amplitude of every code (vocab), and the training split's mean products (K + 1) of samples 0, 1, ... K
        apart."""
        silence = 1e-9 * (np.arange(self.predictor.order + 1) == 0)
        self.predictor.prior.copy_(torch.from_numpy(correlations + silence))
        self.predictor.levels.copy_(torch.from_numpy(levels))
        self.bias.copy_(torch.from_numpy(np.log(np.gradient(levels.astype(np.float64)))))

    def forward(self, y: Tensor, prediction: Prediction) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            move, log_s, log_a = F.linear(y.to(self.weight.dtype), self.weight, self.shape).split(1, dim=-1)
            p, width = prediction.p[..., None], prediction.width[..., None]
            z = ((self.predictor.levels - p) / width - move) * torch.exp(-log_s)
            return self.bias - torch.exp(log_a) * torch.log1p(z * z)
