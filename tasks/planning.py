"""What `seqlab plan` does: a run's memory, step time and cost, from its configuration alone.

A task can be planned if its module has `example(config, rows, length) -> (task, batch)`: the part of the task that builds a
model and scores a batch, and a batch of that shape with made-up contents.
"""

import dataclasses
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from seqlab.errors import UserError
from seqlab.training import planner
from seqlab.training.config import resolve_accelerator
from seqlab.training.task import Batch, Task
from tasks.runs import task_module


@dataclass(frozen=True)
class RunPlan:
    """`seconds` is the whole run on `devices` devices like this one, of `steps` steps; None where no mode fits."""

    plan: planner.Plan
    parameters: int
    devices: int
    steps: int
    tokens_per_step: int
    seconds: float | None

    @property
    def device_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.devices / 3600


@dataclass(frozen=True)
class Step:
    """What one device does in a step of a run: `windows` windows of `length`, `rows` of them at once. `task` and `batch`, of one
    short row, are what to do it with."""

    task: Task
    batch: Batch
    windows: int
    rows: int
    length: int

    @property
    def micro_batches(self) -> int:
        return -(-self.windows // self.rows)


def plannable(name: str) -> ModuleType:
    """The module of a task. Raises UserError for one that says nothing about its steps without data."""
    module = task_module(name)
    if not hasattr(module, "example"):
        raise UserError(f"task: {name}: cannot be planned without data; `seqlab train {name}` plans as it starts")
    return module


def step_of(config: Any) -> Step:
    """Raises UserError for a task that cannot be planned, and for windows of no fixed length."""
    example = plannable(config.task).example
    train, context = config.train, config.data.context
    if not isinstance(context, int):
        raise UserError(f"data.context: {context}: give the length to plan for, --context N")
    devices, sharing = train.devices, train.context_parallel
    length = -(-context // sharing)
    windows = max(1, train.tokens_per_step // context * sharing // devices)
    rows = min(windows, max(1, (train.micro_batch_tokens or windows * context) // context))
    return Step(*example(config, 1, min(length, 1024)), windows, rows, length)


def plan_run(config: Any) -> RunPlan:
    """Measure short steps on one device of this machine, predict those of a run of `config` on as many like it as it asks for.

    Raises UserError for a task that cannot be planned, or a device that is not there.
    """
    step, train, context = step_of(config), config.train, config.data.context
    task, batch, rows, length = step.task, step.batch, step.rows, step.length
    devices, sharing = train.devices, train.context_parallel
    alone = dataclasses.replace(train, devices=1, context_parallel=1)
    device = torch.device("cuda" if resolve_accelerator(alone) == "gpu" else "cpu")
    model = task.build_model().to(device)
    batch = {key: value.to(device) for key, value in batch.items()}
    bf16 = train.precision == "bfloat16" or (train.precision == "auto" and device.type == "cuda")
    probe = planner.Probe(model, task, batch, rows, length, bf16)
    load = planner.load_of(model, batch, step.micro_batches, train.ema_decay > 0, rows, length)
    result = planner.plan(probe, load, train, everything=True)
    result = dataclasses.replace(result, length=context)
    steps, seconds = train.max_steps, None
    if result.chosen is not None:
        seconds = result.chosen.step_seconds * steps
        if train.max_minutes is not None and seconds > 60 * train.max_minutes:
            seconds = 60 * train.max_minutes
            steps = max(1, int(seconds / result.chosen.step_seconds))
    parameters = sum(p.numel() for p in model.parameters())
    return RunPlan(result, parameters, devices, steps, step.windows * context * devices // sharing, seconds)
