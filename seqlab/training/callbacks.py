"""What happens around a step: the clock, the log, validation with checkpoints and early stopping, the progress bar."""

import csv
import io
import math
import sys
import time
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from seqlab.errors import UserError
from seqlab.files import write_text
from seqlab.processes import at_terminal
from seqlab.training import memory as modes
from seqlab.training import planner
from seqlab.training.checkpoint import save_model
from seqlab.training.config import TrainConfig
from seqlab.training.history import read_history
from seqlab.training.memory import Memory
from seqlab.training.module import TrainingModule


class MemoryChoice(Callback):
    """Before the first step: how gradients are computed, as configured or chosen by the planner. A resumed run keeps what it
    had, so that it goes on to the same bits. Raises UserError when a step cannot fit."""

    def __init__(self, train: TrainConfig):
        self.train_config = train
        self.memory: Memory | None = None

    def on_fit_start(self, trainer: lightning.Trainer, module: TrainingModule) -> None:
        if self.memory is None or not self._allows(self.memory):
            answer = None
            if trainer.is_global_zero:
                try:
                    answer = self._choose(trainer, module)
                except UserError as error:
                    answer = error
            answer = trainer.strategy.broadcast(answer)
            if isinstance(answer, UserError):
                raise answer
            self.memory, line = answer
            if trainer.is_global_zero:
                print(line, file=sys.stderr, flush=True)
        module.memory = self.memory
        modes.prepare(self.memory, module.model)

    def _allows(self, memory: Memory) -> bool:
        """Whether the configuration, which a resumed run may change, leaves room for what the run had."""
        train = self.train_config
        mode = "block" if train.checkpoint_blocks else train.memory
        return mode in ("auto", memory.mode) and train.chunk_tokens in (None, memory.chunk_tokens)

    def _choose(self, trainer: lightning.Trainer, module: TrainingModule) -> tuple[Memory, str]:
        train, task, place = self.train_config, module.task, module.place
        # the last step is the largest: length warm-up is over
        batches = [place.piece(b) for b in task.train_batches(train.max_steps - 1, place.data_rank, place.data_size)]
        batch = max(batches, key=task.tokens)
        if "ids" not in batch:
            mode = "block" if train.checkpoint_blocks else "plain" if train.memory == "auto" else train.memory
            return Memory(mode, train.chunk_tokens), f"memory: {mode}"
        batch = {key: value.to(module.device) for key, value in batch.items()}
        longest = getattr(task, "longest_row", 0)
        if place.context == 1 and batch["ids"].shape[1] < longest:  # whole sequences: the last step need not have the longest
            batch = planner.resize(batch, batch["ids"].shape[0], longest)
        model = module.model
        if place.context > 1:  # this process alone measures: with a model that waits for no other
            model = task.build_model().to(module.device)
        return planner.choose(model, task, batch, len(batches), train, trainer.precision == "bf16-mixed")

    def state_dict(self) -> dict:
        if self.memory is None:
            return {}
        sharing = self.train_config.context_parallel
        return {"mode": self.memory.mode, "chunk_tokens": self.memory.chunk_tokens, "context_parallel": sharing}

    def load_state_dict(self, state: dict) -> None:
        state = dict(state)
        # cut among another number of devices, a sequence is another load
        same = state.pop("context_parallel", 1) == self.train_config.context_parallel
        self.memory = Memory(**state) if state and same else None


class Clock(Callback):
    """Training time, carried over a resume, and the share of the run that is done."""

    def __init__(self, train: TrainConfig):
        self.train_config = train
        self.before = 0.0  # seconds of earlier sittings
        self.started: float | None = None
        self._step = 0

    @property
    def elapsed(self) -> float:
        return self.before + (0.0 if self.started is None else time.monotonic() - self.started)

    @property
    def share(self) -> float:
        """Share of the run that was done when the current step began: what the learning rate follows."""
        return self.share_at(self._step)

    def share_at(self, step: int) -> float:
        share = step / self.train_config.max_steps
        if self.train_config.max_minutes is not None:
            share = max(share, self.elapsed / (60 * self.train_config.max_minutes))
        return share

    def on_train_start(self, trainer: lightning.Trainer, module: TrainingModule) -> None:
        self.started = time.monotonic()
        module.progress_share = lambda: self.share

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        # one step counts as done only when the next begins: the last step still has its learning rate
        self._step = trainer.global_step
        if trainer.world_size > 1 and self.train_config.max_minutes is not None:
            # ranks must agree on the learning rate and on when to stop, so rank 0's clock rules
            seconds = torch.tensor(self.elapsed, device=module.device)
            self.before += trainer.strategy.broadcast(seconds).item() - self.elapsed

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        limit = self.train_config.max_minutes
        if limit is not None and self.elapsed >= 60 * limit:
            trainer.should_stop = trainer.strategy.reduce_boolean_decision(True, all=False)
        elif limit is not None and trainer.world_size > 1:
            trainer.should_stop = trainer.strategy.reduce_boolean_decision(False, all=False) or trainer.should_stop

    def state_dict(self) -> dict:
        return {"elapsed": self.elapsed}

    def load_state_dict(self, state: dict) -> None:
        self.before = float(state["elapsed"])


class History(Callback):
    """metrics.csv: one row a logged step; TensorBoard gets the same through Lightning's logger."""

    columns = ("step", "minutes", "tokens", "loss", "bits", "lr", "grad_norm", "tokens_per_second", "valid")

    def __init__(self, path: Path, clock: Clock, log_every: int):
        self.path, self.clock, self.log_every = Path(path), clock, log_every
        self.tokens = 0
        self._mark = (0.0, 0)
        self.rate = 0.0
        self.latest: dict = {}

    def on_train_start(self, trainer, module) -> None:
        self._mark = (self.clock.elapsed, self.tokens)
        if not trainer.is_global_zero:
            return
        rows = []
        if trainer.global_step and self.path.exists():  # a resumed run: drop what was logged after its checkpoint
            rows = [row for row in read_history(self.path) if row["step"] <= trainer.global_step]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([["" if math.isnan(row[c]) else _number(row[c]) for c in self.columns] for row in rows])
        write_text(self.path, text.getvalue())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.tokens += outputs["tokens"]
        step = trainer.global_step
        if step % self.log_every and step != 1:
            return
        then, tokens = self._mark
        seconds = self.clock.elapsed - then
        self.rate = (self.tokens - tokens) / seconds if seconds > 0 else 0.0
        self._mark = (self.clock.elapsed, self.tokens)
        loss = float(outputs["loss"])
        self.write(
            trainer,
            {
                "step": step,
                "minutes": self.clock.elapsed / 60,
                "tokens": self.tokens,
                "loss": loss,
                "bits": loss / math.log(2),
                "lr": outputs["lr"],
                "grad_norm": float(outputs["grad_norm"]),
                "tokens_per_second": self.rate,
            },
        )

    def pause(self) -> None:
        """Forget the time spent outside steps (validation), so that the rate is of training."""
        self._mark = (self.clock.elapsed, self.tokens)

    def write(self, trainer, row: dict) -> None:
        self.latest.update(row)
        if not trainer.is_global_zero:
            return
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(
                [_number(row[c]) if c in row else "" for c in self.columns]
            )
        if trainer.logger is not None:
            trainer.logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def state_dict(self) -> dict:
        return {"tokens": self.tokens}

    def load_state_dict(self, state: dict) -> None:
        self.tokens = int(state["tokens"])


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"


class Validation(Callback):
    """Every `validate_every` steps, and at the end: validate, keep `best`, save `last`, stop when patience is out."""

    def __init__(self, run_dir: Path, config_text: str, train: TrainConfig, history: History):
        self.run_dir, self.config_text, self.train_config, self.history = Path(run_dir), config_text, train, history
        self.best, self.best_step = math.inf, -1
        self.stale = 0
        self.value = math.nan
        self.validated_step = -1
        self.stopped_early = False

    def on_train_start(self, trainer, module) -> None:
        if trainer.global_step:  # a resumed run may have been stopped after a step and before the end of its validation
            self._after_step(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if module.stopping:
            self.save_last(trainer, module)
            return
        self._after_step(trainer, module)

    def _after_step(self, trainer, module) -> None:
        if trainer.global_step >= self.train_config.max_steps:
            trainer.should_stop = True
        if trainer.should_stop or trainer.global_step % self.train_config.validate_every == 0:
            self.validate(trainer, module)

    def validate(self, trainer: lightning.Trainer, module: TrainingModule) -> None:
        if self.validated_step == trainer.global_step:
            return
        self.value = module.validate()
        self.validated_step = trainer.global_step
        improved = self.value < self.best
        if improved:
            self.best, self.best_step, self.stale = self.value, trainer.global_step, 0
            if trainer.is_global_zero:
                save_model(module.evaluated_model, self.run_dir / "checkpoints" / "best", self.config_text)
        else:
            self.stale += 1
            if self.train_config.patience and self.stale >= self.train_config.patience:
                self.stopped_early = trainer.should_stop = True
        self.history.write(
            trainer, {"step": trainer.global_step, "minutes": self.history.clock.elapsed / 60, "valid": self.value}
        )
        self.history.pause()
        self.save_last(trainer, module)

    def save_last(self, trainer: lightning.Trainer, module: TrainingModule) -> None:
        last = self.run_dir / "checkpoints" / "last"
        if trainer.is_global_zero:
            save_model(module.evaluated_model, last, self.config_text)
        trainer.save_checkpoint(last / "trainer.pt")

    def state_dict(self) -> dict:
        keys = ("best", "best_step", "stale", "value", "validated_step")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state: dict) -> None:
        for key, value in state.items():
            setattr(self, key, value)


class ProgressBar(Callback):
    """One live line on a terminal; elsewhere one plain line a validation. Both go to standard error."""

    def __init__(self, clock: Clock, history: History, validation: Validation, train: TrainConfig, metric: str):
        self.clock, self.history, self.validation, self.train_config = clock, history, validation, train
        self.metric = metric
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self._reported = -1

    def on_train_start(self, trainer, module) -> None:
        if not trainer.is_global_zero or not at_terminal():
            return
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            expand=True,
            redirect_stdout=False,
        )
        self.bar = self.progress.add_task("training", total=1000, line="starting")
        self.progress.start()

    def _line(self, trainer) -> str:
        latest, share = self.history.latest, max(self.clock.share_at(trainer.global_step), 1e-6)
        left = max(0.0, self.clock.elapsed * (1 - share) / share)
        valid = "" if math.isnan(self.validation.value) else f"  valid {self.validation.value:.4f}"
        # beside a validation in other units (nats, squared error) a loss in bits would be taken for another number
        kind, unit = ("bits", " bits") if self.metric.startswith("bits") else ("loss", "")
        return (
            f"step {trainer.global_step}  loss {latest.get(kind, math.nan):.4f}{unit}{valid}  "
            f"{_si(self.history.rate)} tokens/s  {_clock(left)} left"
        )

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.progress is not None:
            self.progress.update(self.bar, completed=1000 * min(1.0, self.clock.share_at(trainer.global_step)), line=self._line(trainer))
        elif trainer.is_global_zero and self.validation.validated_step not in (self._reported, -1):
            self._reported = self.validation.validated_step
            print(f"{self._line(trainer)}  ({self.metric})", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def on_train_end(self, trainer, module) -> None:
        if self.progress is not None:
            self.progress.update(self.bar, completed=1000, line=self._line(trainer))
        self.stop()

    def on_exception(self, trainer, module, exception) -> None:
        self.stop()


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000 or unit == "G":
            return f"{value:.0f}{unit}" if value >= 100 or not unit else f"{value:.1f}{unit}"
        value /= 1000
    raise AssertionError


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
