"""One optimiser step, exactly: micro-batches, exact means over ranks, clipping, the guard against NaN."""

import contextlib
import hashlib
from dataclasses import dataclass
from typing import Literal

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from seqlab.errors import UserError
from seqlab.training import memory
from seqlab.training.memory import SHARING, Memory
from seqlab.training.optim import OptimConfig, learning_rate, make_optimizer
from seqlab.training.place import Place
from seqlab.training.task import Batch, Task


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
    memory: Literal["auto", "plain", "subtract", "block", "chunked", "layerwise", "offload"] = "auto"  # docs/long-context.md
    chunk_tokens: int | None = None  # most tokens at work at once; null: chosen with the memory mode
    checkpoint_blocks: bool = False  # what memory: block was called
    compile: bool = False
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
        if self.seed < 0:
            raise ValueError(f"seed: must be 0 or more, got {self.seed}")


def _average(decay: float):
    """Exponential moving average whose memory grows with the run: min(decay, (1 + n) / (10 + n)) after n updates, so that
    a short run does not average in its first, untrained weights."""

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], n: Tensor) -> None:
        n = int(n)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + n) / (10 + n)))

    return update


class DivergedError(UserError):
    """Training produced a NaN or an infinity; the last good checkpoint is kept."""


class _StepBatches(IterableDataset):
    def __init__(self, task: Task, start: int, place: Place):
        self.task, self.start, self.place = task, start, place

    def __iter__(self):
        step = self.start
        while True:
            batches = self.task.train_batches(step, self.place.data_rank, self.place.data_size)
            yield [self.place.piece(batch) for batch in batches]
            step += 1


class TrainingModule(lightning.LightningModule):
    """Binds a task to Lightning. Optimisation is manual: one Lightning batch is one optimiser step."""

    def __init__(self, task: Task, optim: OptimConfig, train: TrainConfig):
        super().__init__()
        self.automatic_optimization = False
        self.task, self.optim_config, self.train_config = task, optim, train
        self.model = task.build_model()
        self.ema = None
        if train.ema_decay > 0:
            self.ema = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=_average(train.ema_decay))
            self.ema.requires_grad_(False)  # several ranks: DDP waits for a gradient of whatever asks for one
        self.memory = Memory()  # set by the MemoryChoice callback
        self.stop_asked = False  # this process was told to stop; the next step passes it on
        self.stopping = False  # and all processes know that the step was the last one
        self.progress_share = lambda: 0.0  # set by the Clock callback, which knows the time

    @property
    def place(self) -> Place:
        """Which part of a step's data this process works on."""
        return Place(self.global_rank, self.trainer.world_size, self.train_config.context_parallel)

    def setup(self, stage: str) -> None:
        if self.train_config.context_parallel > 1:
            from seqlab.training.parallel import share_sequences

            models = [self.model] if self.ema is None else [self.model, self.ema.module]
            share_sequences(self.task, models, self.place, self.trainer.strategy.root_device.type)

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that are validated and kept: the average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.optim_config)

    def train_dataloader(self) -> DataLoader:
        source = _StepBatches(self.task, self.global_step, self.place)
        return DataLoader(source, batch_size=None)

    def training_step(self, batches: list[Batch], batch_idx: int) -> dict:
        step, world = self.global_step, self.trainer.world_size
        # Dropout of a step depends on the seed and the step alone, so a resumed run repeats it.
        torch.manual_seed(step_seed(self.train_config.seed, step, self.global_rank))
        optimizer = self.optimizers(use_pl_optimizer=True)
        lr = learning_rate(self.optim_config, self.progress_share())
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = [float(sum(count(batch) for batch in batches)) for count in (self.task.weight, self.task.tokens)]
        sums = torch.tensor([*sums, float(self.stop_asked)], dtype=torch.float64, device=self.device)
        total, tokens, stop = self.trainer.strategy.reduce(sums, reduce_op="sum")
        total = total.float().clamp(min=1.0)
        loss_sum = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            reduces = i == len(batches) - 1 and not self.memory.is_divided
            with contextlib.nullcontext() if reduces or world == 1 else self.trainer.strategy.model.no_sync():
                # DDP averages over ranks; times world it is the sum, over the global weight it is the exact mean
                scale = world / total
                loss_sum += memory.backward(self.memory, self.model, self.task, batch, scale, self.manual_backward)
        if self.memory.is_divided and world > 1:
            memory.synchronise(self.model, self.manual_backward)
        clip = self.optim_config.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        mean = self.trainer.strategy.reduce(loss_sum, reduce_op="sum") / total
        if not torch.isfinite(mean + norm).item():
            raise DivergedError(self._diagnose(batches, step, lr, mean, norm))
        optimizer.step()
        optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        if stop.item():
            self.stopping = self.trainer.should_stop = True
        return {"loss": mean, "lr": lr, "grad_norm": norm, "tokens": int(tokens)}

    @torch.no_grad()
    def validate(self) -> float:
        """Validation metric of the evaluated weights, over all ranks; leaves every random state as it was."""
        model = self.evaluated_model
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with self.trainer.precision_plugin.forward_context():
            for batch in self.task.validation_batches(self.place.data_rank, self.place.data_size):
                batch = {key: value.to(self.device) for key, value in self.place.piece(batch).items()}
                sums += torch.stack(memory.loss(self.memory, model, self.task, batch)).double()
        model.train(was_training)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        if sums[1] == 0:
            raise UserError("validation scored no position; the valid split holds no A, C, G or T: choose other splits")
        return self.task.metric_value((sums[0] / sums[1]).item())

    def _diagnose(self, batches: list[Batch], step: int, lr: float, loss: Tensor, norm: Tensor) -> str:
        """Say where the first NaN or infinity appears: which layer's output, else which parameter's gradient."""
        where = None

        def watch(name):
            def hook(module, inputs, output):
                nonlocal where
                first = output[0] if isinstance(output, tuple) else output
                if where is None and isinstance(first, Tensor) and not torch.isfinite(first).all():
                    where = f"the output of {name} ({type(module).__name__})"

            return hook

        bad = None
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for name, parameter in self.model.named_parameters():
                if not torch.isfinite(parameter).all():
                    where = f"the weights {name}"
                    break
            hooks = [m.register_forward_hook(watch(name)) for name, m in self.model.named_modules() if name]
            for batch in batches:
                loss_sum, _ = memory.loss(self.memory, self.model, self.task, batch)
                if bad is None and (where or not torch.isfinite(loss_sum)):
                    bad = batch  # and on through the others: ranks that share a sequence must run the same batches
            for hook in hooks:
                hook.remove()
        if where is None:
            names = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            where = f"the gradient of {names[-1]}" if names else "the loss"
        return (
            f"step {step}: loss {loss.item():.4g}, gradient norm {norm.item():.4g}: first not finite in {where}; "
            f"batch: {self.task.describe(batches[0] if bad is None else bad)}; lr was {lr:.2g}: try --set optim.lr={self.optim_config.lr / 4:.2g}. "
            "The last good checkpoint is kept."
        )


def step_seed(*parts: int) -> int:
    """A 63-bit seed that depends on all parts; the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
