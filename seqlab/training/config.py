"""What a run is told about its loop: `train:` of every config. Knows nothing of Lightning, so that reading a run needs none."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

from seqlab.errors import UserError
from seqlab.processes import launched
from seqlab.training.memory import SHARING


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how much a step, on what.

    The run ends at max_steps or max_minutes, whichever comes first, and the schedule follows whichever is nearer its
    end. Only a run bounded by max_steps is repeatable to the bit.
    """

    max_steps: int = 10_000
    max_minutes: float | None = None
    tokens_per_step: int = 65_536  # held constant as context grows
    micro_batch_tokens: int | None = None  # most tokens of a batch made at once; null: all of a step
    validate_every: int = 200  # steps; a checkpoint is saved as often
    validation_tokens: int = 500_000
    patience: int = 0  # validations without an improvement before stopping; 0: never stop early
    log_every: int = 10
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    context_parallel: int = 1  # devices that share a sequence, each with a piece of it; divides devices
    memory: Literal["auto", "states", "plain", "subtract", "block", "chunked", "layerwise", "offload"] = "auto"  # docs/long-context.md
    chunk_tokens: int | None = None  # most tokens at work at once; null: chosen with the memory mode
    checkpoint_blocks: bool = False  # what memory: block was called
    compile: bool = False
    cuda_graphs: bool = True  # on one GPU: record the kernels of a step and replay them; the same bits, sooner
    ema_decay: float = 0.0  # above 0: an exponential moving average of the weights is validated and kept
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("max_steps", "tokens_per_step", "validate_every", "validation_tokens", "log_every", "devices")
        for name in (*counts, "context_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be 1 or more, got {getattr(self, name)}")
        if self.devices % self.context_parallel:
            raise ValueError(
                f"context_parallel: {self.context_parallel} does not divide devices {self.devices}; start a multiple of "
                f"{self.context_parallel} processes (--devices, or torchrun --nproc-per-node)"
            )
        if self.context_parallel > 1 and (self.memory not in ("auto", *SHARING) or self.chunk_tokens is not None):
            raise ValueError(
                f"memory: {self.memory}, chunk_tokens: {self.chunk_tokens}: devices that share a sequence each hold one piece "
                "of it and cut it no further; use memory: auto, plain or block without chunk_tokens, or more devices"
            )
        if self.compile and self.context_parallel > 1:
            raise ValueError("compile: not together with context_parallel; set one of them to its default")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens: must be 1 or more, or null, got {self.micro_batch_tokens}")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: must be 1 or more, or null, got {self.chunk_tokens}")
        if self.checkpoint_blocks and self.memory not in ("auto", "block"):
            raise ValueError(f"checkpoint_blocks: true is memory: block, got memory: {self.memory}; leave one of them out")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes: must be above 0, or null, got {self.max_minutes}")
        if self.patience < 0:
            raise ValueError(f"patience: must be 0 or more, got {self.patience}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: must lie in [0, 1), got {self.ema_decay}")
        if not 0 <= self.seed < 2**62:  # other seeds are a few more than this one, or twice as much
            raise ValueError(f"seed: must lie in [0, 2^62), got {self.seed}")


def resolve_accelerator(train: TrainConfig) -> str:
    """"cpu" or "gpu"; UserError when the devices asked for are not there."""
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accelerator = train.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if present else "cpu"
    if accelerator == "gpu" and not present:
        raise UserError("train.accelerator=gpu, but torch sees no GPU here; use cpu, or run `seqlab doctor` for the reason")
    if accelerator == "gpu" and train.devices > present and not launched():
        raise UserError(f"--devices {train.devices}, but torch sees {present} GPU(s) here; use --devices {present}")
    return accelerator


def step_seed(*parts: int) -> int:
    """A 63-bit seed that depends on all parts; the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
