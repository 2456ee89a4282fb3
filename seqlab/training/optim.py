"""AdamW groups and the learning-rate schedule: the recipe of the Mamba and Caduceus papers."""

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 8e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    warmup: float = 0.1  # share of the run
    min_lr: float = 1e-4
    clip: float = 1.0  # largest norm of the gradient; 0 switches clipping off

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr: must be above 0, got {self.lr}")
        if not 0 <= self.min_lr:
            raise ValueError(f"min_lr: must be 0 or more, got {self.min_lr}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: the share of the run spent warming up, in [0, 1), got {self.warmup}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must lie in [0, 1), got {getattr(self, name)}")
        if self.weight_decay < 0 or self.clip < 0:
            raise ValueError("weight_decay and clip: must be 0 or more")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices and embeddings; none for norms, biases, and the parameters of the recurrence: A_log, A_imag, C, D."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():  # tied parameters appear once
        if not parameter.requires_grad:
            continue
        is_free = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in ("A_log", "A_imag", "C")
        (free if is_free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    groups = parameter_groups(model, config.weight_decay)
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)


def learning_rate(config: OptimConfig, progress: float) -> float:
    """Linear warm-up, then a cosine down to min_lr; `progress` is the share of the run that is done, 0 to 1."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    share = (progress - config.warmup) / (1 - config.warmup)
    floor = min(config.min_lr, config.lr)
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * share))
