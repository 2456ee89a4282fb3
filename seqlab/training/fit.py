"""Train a task into a run directory, from the start or from where it was left."""

import contextlib
import ctypes
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from seqlab.config import dump_yaml
from seqlab.errors import UserError
from seqlab.processes import end_with_parent, launched
from seqlab.training.callbacks import Clock, History, MemoryChoice, ProgressBar, Validation
from seqlab.training.checkpoint import load_model
from seqlab.training.config import TrainConfig, resolve_accelerator
from seqlab.training.facts import FitResult
from seqlab.training.memory import MODES, unavailable
from seqlab.training.module import TrainingModule
from seqlab.training.optim import OptimConfig
from seqlab.training.task import Task
from seqlab.training.termination import Termination
from seqlab.training.trainer_state import AtomicCheckpointIO

LAUNCHER = "lightning.fabric.strategies.launchers.subprocess_script"
"""Whose thread in the first process watches those that it started, and kills all, itself too, when one has ended badly."""


def fit(
    task: Task,
    optim: OptimConfig,
    train: TrainConfig,
    run_dir: Path,
    *,
    init: Path | None = None,
    resume: bool = False,
    whole: Path | None = None,
) -> FitResult:
    """Train; leaves `checkpoints/best` and `checkpoints/last`. `whole`: the run that `run_dir` is a part of, if it is one, which
    messages say to go on with. Raises UserError for what the user can mend."""
    quiet_lightning()
    run_dir = Path(run_dir)
    whole = run_dir if whole is None else whole
    accelerator = resolve_accelerator(train)
    if accelerator == "cpu":
        keep_freed_memory()
    torch.manual_seed(train.seed)
    module = TrainingModule(task, optim, train)
    if init is not None:
        load_model(module.model, init)
    if train.compile:
        module.model.compile()
    clock = Clock(train)
    history = History(run_dir / "metrics.csv", clock, train.log_every)
    validation = Validation(run_dir, dump_yaml(task.resolved_config()), train, history)
    bar = ProgressBar(clock, history, validation, train, task.metric)
    started = launched()
    precision = train.precision
    if precision == "auto":
        precision = "bfloat16" if accelerator == "gpu" else "float32"
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=started.per_node if started else train.devices,
        strategy="ddp" if train.devices > 1 or started else "auto",
        num_nodes=started.nodes if started else 1,
        precision={"float32": "32-true", "bfloat16": "bf16-mixed"}[precision],
        max_epochs=-1,  # Validation knows when it ends; Lightning would pass over a run that has its steps and lacks their validation
        callbacks=[MemoryChoice(train), clock, history, validation, bar, Termination(lost_contact_advice(whole))],
        logger=TensorBoardLogger(run_dir, name="", version="tensorboard"),
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    checkpoint = run_dir / "checkpoints" / "last" / "trainer.pt"
    interrupted = False
    end_with_parent()
    try:
        with several_processes(module, whole) if trainer.world_size > 1 else contextlib.nullcontext():
            trainer.fit(module, ckpt_path=checkpoint if resume else None)
        interrupted = trainer.interrupted
    except KeyboardInterrupt:
        interrupted = True
    except SystemExit:  # Lightning turns Ctrl-C into an exit on some strategies
        interrupted = True
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if is_out_of_memory(error):
            raise UserError(out_of_memory_advice(module, checkpoint, trainer.global_step)) from None
        if not lost_contact(error):
            raise
        raise UserError(lost_contact_advice(whole, f" at step {trainer.global_step}")) from error
    finally:
        bar.stop()
    interrupted = interrupted or module.stopping
    if interrupted and not module.stopping and trainer.global_step > 0:
        validation.save_last(trainer, module)
    ended = "interrupted" if interrupted else "stopped early" if validation.stopped_early else "finished"
    return FitResult(
        steps=trainer.global_step,
        minutes=clock.elapsed / 60,
        best=validation.best,
        best_step=validation.best_step,
        tokens=history.tokens,
        tokens_per_second=history.tokens / max(clock.elapsed, 1e-9),
        ended=ended,
    )


@contextlib.contextmanager
def several_processes(module: TrainingModule, run_dir: Path) -> Iterator[None]:
    """What a run of several processes needs around it: Ctrl-C for all of them, a last word when one dies."""
    logger, last_word = logging.getLogger(LAUNCHER), LastWord(run_dir)
    logger.addHandler(last_word)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with interrupts_shared(module):
            yield
    finally:
        logger.removeHandler(last_word)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


class LastWord(logging.Handler):
    """Says in our words what that thread logs before it kills: a process waiting in NCCL never gets to say anything."""

    def __init__(self, run_dir: Path):
        super().__init__(logging.INFO)
        self.run_dir = run_dir
        self.addFilter(lambda record: "terminated with code" in record.getMessage())

    def emit(self, record: logging.LogRecord) -> None:
        print(f"error: {lost_contact_advice(self.run_dir)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def interrupts_shared(module: TrainingModule) -> Iterator[None]:
    """Ctrl-C in a run of several processes: the first one ends the run with the step, in all of them; a second one is the
    usual KeyboardInterrupt. A process that left in the middle of a step would keep the others waiting."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number, frame) -> None:
        if module.stop_asked:
            raise KeyboardInterrupt
        module.stop_asked = True

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed, which is how a process learns that another one is gone."""
    return isinstance(error, torch.distributed.DistError) or any(name in str(error) for name in ("gloo", "Gloo", "NCCL"))


def lost_contact_advice(run_dir: Path, where: str = "") -> str:
    return (
        f"lost contact with the other processes of this run{where}: one of them has ended, and says why if it could; the last "
        f"checkpoint is kept, go on with --resume --out {run_dir}"
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def out_of_memory_advice(module: TrainingModule, checkpoint: Path, step: int) -> str:
    """One line: what to change, and how to go on."""
    memory, sparing = module.memory, None
    for mode in MODES[MODES.index(memory.mode) + 1 :]:
        if unavailable(mode, module.model, module.task, module.device) is None:
            sparing = f"--set train.memory={mode}"
            break
    if sparing is None and memory.chunk_tokens is not None:
        sparing = f"--set train.chunk_tokens={max(1, memory.chunk_tokens // 2)}"
    elif sparing is None:
        sparing = f"--set train.chunk_tokens={max(1, module.train_config.tokens_per_step // 4)}"
    place = "GPU memory" if module.device.type == "cuda" else "memory"
    how = "the last checkpoint is kept: add it to --resume" if checkpoint.is_file() else "nothing was saved yet: start again"
    return f"out of {place} at step {step} with memory: {memory}; try {sparing}, or a smaller --context; {how}"


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of returning each to the system and faulting its pages in again for the
    next tensor: about a tenth of a training step on a CPU. Elsewhere (musl, macOS) nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def quiet_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*isinstance.*LeafSpec.*")
