"""The head of a model of sampled signals: a density around a linear prediction of the next sample, added to the logits.

A code stands for an amplitude, `levels[code]`. From the features y of a position come the K coefficients of a linear
prediction, a width s and a tail a:

    c     = base + basis^T (W y)              (K)   coefficients, oldest sample first
    m     = sum_k c_k x_k                           x: amplitudes of the last K samples, zero before the beginning
    logit = -a log(1 + ((levels - m) / s)^2) + bias per code        s = exp(.), a = exp(.)

that is, up to a constant, a Student t distribution around m of 2 a - 1 degrees of freedom, times whatever the language head
says. Fixed coefficients are linear predictive coding (LPC); here the network moves them with what it has heard. `basis` makes
the directions in which it moves them equally strong: with R = L L^T the correlations of K neighbouring samples, basis = L^-1,
so W y acts on signals of variance one. Without it the loss hardly feels the directions in which sound has little power, which
are those that precise prediction needs.

Everything is float32 or more: a prediction 30 dB better than its signal leaves nothing for bfloat16 to round.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SampleState(NamedTuple):
    """State of a language model with a PredictionHead between two pieces of a sequence."""

    backbone: Any
    past: Tensor  # (b K-1), amplitudes of the last samples, oldest first


class PredictionHead(nn.Module):
    """forward(y (b l d_model), ids (b l), past (b K-1) or None) -> what to add to the logits (b l vocab).

    `fit` fills in what it takes from the data; until then it predicts that nothing changes.
    """

    def __init__(self, d_model: int, vocab_size: int, order: int):
        super().__init__()
        self.order = order
        self.weight = nn.Parameter(torch.zeros(order + 2, d_model))  # K rows of coefficients, log s, log a
        self.shape = nn.Parameter(torch.tensor([-4.0, 0.7]))  # log s and log a to begin with
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.register_buffer("levels", torch.linspace(-1, 1, vocab_size))
        self.register_buffer("base", F.one_hot(torch.tensor(order - 1), order).float())
        self.register_buffer("basis", torch.eye(order))

    @torch.no_grad()
    def fit(self, levels: np.ndarray, correlations: np.ndarray) -> None:
        """Take over the amplitude of every code (vocab) and the mean products (K + 1) of samples 0, 1, ... K apart, and start
        from the prediction that has the least mean square error."""
        lags = np.abs(np.arange(self.order)[:, None] - np.arange(self.order))
        R = np.asarray(correlations, np.float64)[lags]
        R += 1e-6 * R[0, 0] * np.eye(self.order)
        r = correlations[np.arange(self.order, 0, -1)]  # oldest first
        base = np.linalg.solve(R, r)
        error = max(correlations[0] - r @ base, 1e-12)
        self.base.copy_(torch.from_numpy(base))
        self.basis.copy_(torch.from_numpy(np.linalg.inv(np.linalg.cholesky(R)) * np.sqrt(error)))
        self.levels.copy_(torch.from_numpy(levels))
        self.bias.copy_(torch.from_numpy(np.log(np.gradient(levels.astype(np.float64)))))
        self.shape[0] = 0.5 * np.log(error)

    def rows(self) -> tuple[Tensor, Tensor]:
        """(K + 2, d_model) and (K + 2): the linear map from y to coefficients, log s and log a."""
        weight, bias = self.weight, torch.cat([self.base, self.shape])
        return torch.cat([self.basis.T @ weight[: self.order], weight[self.order :]]), bias

    def forward(self, y: Tensor, ids: Tensor, past: Tensor | None) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            weight, bias = self.rows()
            c, log_s, log_a = F.linear(y.to(weight.dtype), weight, bias).split([self.order, 1, 1], dim=-1)
            x = self.follow(ids, past).unfold(1, self.order, 1)  # (b l K)
            m = (c * x).sum(-1, keepdim=True)
            z = (self.levels - m) * torch.exp(-log_s)
            return self.bias - torch.exp(log_a) * torch.log1p(z * z)

    def follow(self, ids: Tensor, past: Tensor | None) -> Tensor:
        """Amplitudes (b K-1+l) of the past samples and of these."""
        x = self.levels[ids.long()]
        return torch.cat([x.new_zeros(len(x), self.order - 1) if past is None else past.to(x.dtype), x], 1)
