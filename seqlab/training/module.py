"""One optimiser step, exactly: micro-batches, exact means over ranks, clipping, the guard against NaN."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from seqlab.errors import UserError
from seqlab.training import memory
from seqlab.training.config import TrainConfig, step_seed
from seqlab.training.graphs import GradientGraphs
from seqlab.training.memory import Memory
from seqlab.training.optim import OptimConfig, learning_rate, make_optimizer
from seqlab.training.place import Place
from seqlab.training.task import Batch, Task


def _average(decay: float):
    """Exponential moving average whose memory grows with the run: min(decay, (1 + n) / (10 + n)) after n updates, so that
    a short run does not average in its first, untrained weights."""

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], n: Tensor) -> None:
        n = int(n)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + n) / (10 + n)))

    return update


@contextlib.contextmanager
def interrupts_held():
    """Ctrl-C comes when the block has ended: what it saves must not be half of an update."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


class DivergedError(UserError):
    """Training produced a NaN or an infinity; the last good checkpoint is kept."""


class _StepBatches(IterableDataset):
    """The batches of every step from `start` on. `is_ahead`: the next step's are made while this one's are at work."""

    def __init__(self, task: Task, start: int, place: Place, is_ahead: bool):
        self.task, self.start, self.place, self.is_ahead = task, start, place, is_ahead

    def __iter__(self):
        batches = (self._batches(step) for step in itertools.count(self.start))
        return _ahead(batches) if self.is_ahead else batches

    def _batches(self, step: int) -> list[Batch]:
        batches = self.task.train_batches(step, self.place.data_rank, self.place.data_size)
        return [self.place.piece(batch) for batch in batches]


def _ahead(items: Iterator) -> Iterator:
    with ThreadPoolExecutor(1, "batches") as worker:
        coming = worker.submit(next, items)
        while True:
            item = coming.result()
            coming = worker.submit(next, items)
            yield item


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
        self.graphs = GradientGraphs()
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
        # with a GPU the processor has nothing else to do; without one it would be in its own way
        source = _StepBatches(self.task, self.global_step, self.place, self.trainer.strategy.root_device.type == "cuda")
        return DataLoader(source, batch_size=None)

    def training_step(self, batches: list[Batch], batch_idx: int) -> dict:
        step, world, config = self.global_step, self.trainer.world_size, self.train_config
        # Dropout of a step depends on the seed and the step alone, so a resumed run repeats it.
        torch.manual_seed(step_seed(config.seed, step, self.global_rank))
        optimizer = self.optimizers(use_pl_optimizer=True)
        lr = learning_rate(self.optim_config, self.progress_share())
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = [float(sum(count(batch) for batch in batches)) for count in (self.task.weight, self.task.tokens)]
        sums = torch.tensor([*sums, float(self.stop_asked)], dtype=torch.float64, device=self.device)
        total, tokens, stop = self.trainer.strategy.reduce(sums, reduce_op="sum")
        total = total.float().clamp(min=1.0)
        loss_sum = torch.zeros((), device=self.device)
        is_recorded = self.device.type == "cuda" and world == len(batches) == 1 and config.cuda_graphs and not config.compile
        backward = self.graphs.backward if is_recorded else memory.backward
        for i, batch in enumerate(batches):
            reduces = i == len(batches) - 1 and not self.memory.is_divided
            with contextlib.nullcontext() if reduces or world == 1 else self.trainer.strategy.model.no_sync():
                # DDP averages over ranks; times world it is the sum, over the global weight it is the exact mean
                scale = world / total
                loss_sum += backward(self.memory, self.model, self.task, batch, scale, self.manual_backward)
        if self.memory.is_divided and world > 1:
            memory.synchronise(self.model, self.manual_backward)
        clip = self.optim_config.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        mean = self.trainer.strategy.reduce(loss_sum, reduce_op="sum") / total
        if not torch.isfinite(mean + norm).item():
            raise DivergedError(self._diagnose(batches, step, lr, mean, norm))
        with interrupts_held():
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
