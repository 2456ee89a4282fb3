"""Steps of a small model on a GPU without asking the host for every kernel: the gradient of a batch as a CUDA graph.

A training step of a few million parameters is some five hundred kernels of 50 microseconds, and launching one takes Python
about as long: half of the time the GPU waits. The kernels of a step depend on the layout of its batch alone, so the second
batch of a layout is recorded while it runs, and later ones replay that record (cudaGraphLaunch): the same kernels on the same
numbers, so the same bits; dropout too, whose generator a replay asks for seed and offset as every step does.

What cannot be recorded (a loss that waits for the GPU to decide something on the host) is noticed in a rehearsal, and goes on
kernel by kernel. Records keep the memory of one step (all layouts share it) beside what PyTorch keeps for everything else,
so steps that need more than a quarter of the GPU's memory are left alone; their kernels are long anyway.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqlab.training import memory as modes
from seqlab.training.memory import Memory
from seqlab.training.task import Batch, Task

log = logging.getLogger(__name__)

RECORDABLE = ("states", "plain", "subtract")
"""Memory modes whose backward pass is one call."""
LARGEST_SHARE = 0.25
"""Of the GPU's memory, the most that a step may have taken to be recorded."""
MOST_LAYOUTS = 32


@dataclass(frozen=True)
class Record:
    """A recorded batch: where its tensors lie, and what repeats it."""

    replay: Callable[[], None]
    batch: Batch
    scale: Tensor
    loss: Tensor
    gradients: list[Tensor | None]  # of the model's parameters, in their order


class GradientGraphs:
    """`memory.backward` for a model whose batches come in a few layouts, recorded.

    recorder: called with what computes tensors; returns them and what computes them again in their places. Exchanged by tests.
    """

    def __init__(self, recorder: "Recorder | None" = None):
        self._seen: dict[tuple, Record | None] = {}  # None: met once, or not to be recorded
        self._refused: set[tuple] = set()
        self._is_broken = False
        self._record = recorder or _GraphRecorder()

    @property
    def recorded(self) -> int:
        """Layouts of batches that are replayed."""
        return sum(record is not None for record in self._seen.values())

    def backward(
        self,
        memory: Memory,
        model: nn.Module,
        task: Task,
        batch: Batch,
        scale: Tensor,
        run_backward: Callable[[Tensor], Any] = Tensor.backward,
    ) -> Tensor:
        """As `memory.backward` on parameters without gradients, which it sets: those of a layout always lie in the same
        places, so use them before the next call. `scale` is (), on the batch's device."""
        if self._is_broken:
            return modes.backward(memory, model, task, batch, scale, run_backward)
        layout = _layout(memory, model, batch)
        record = self._seen.get(layout)
        if record is not None:
            return self._again(record, model, batch, scale)
        known = layout in self._seen
        if not known and len(self._seen) < MOST_LAYOUTS:
            self._seen[layout] = None
        if not known or layout in self._refused or not self._may_record(memory, batch):
            return modes.backward(memory, model, task, batch, scale, run_backward)
        record = self._make(memory, model, task, batch, scale, run_backward)
        if record is None:
            self._refused.add(layout)
            return modes.backward(memory, model, task, batch, scale, run_backward)
        self._seen[layout] = record
        return self._again(record, model, batch, scale)

    @staticmethod
    def _may_record(memory: Memory, batch: Batch) -> bool:
        if memory.is_divided or memory.mode not in RECORDABLE:
            return False
        device = next(iter(batch.values())).device
        if device.type != "cuda":
            return True  # a recorder of a test's
        return torch.cuda.max_memory_allocated(device) <= LARGEST_SHARE * torch.cuda.get_device_properties(device).total_memory

    def _make(self, memory, model, task, batch, scale, run_backward) -> Record | None:
        batch = {key: value.clone() for key, value in batch.items()}
        scale, parameters = scale.clone(), list(model.parameters())

        def work() -> list[Tensor | None]:
            for parameter in parameters:
                parameter.grad = None
            loss = modes.backward(memory, model, task, batch, scale, run_backward)
            return [loss, *(parameter.grad for parameter in parameters)]

        generators = _random_states(batch)
        try:
            # weights that autocast has made already would not be made again by a replay, and the other way round
            torch.clear_autocast_cache()
            (loss, *gradients), replay = self._record(work)
        except RuntimeError as error:
            for parameter in parameters:
                parameter.grad = None
            if isinstance(error, BrokenOffError):
                # earlier records draw from the generator that was given up
                self._is_broken = True
                self._seen.clear()
            log.info("steps of this layout go on kernel by kernel: %s", str(error).partition("\n")[0])
            return None
        finally:
            torch.clear_autocast_cache()
            _set_random_states(generators)
        return Record(replay, batch, scale, loss, gradients)

    @staticmethod
    def _again(record: Record, model: nn.Module, batch: Batch, scale: Tensor) -> Tensor:
        for key, value in batch.items():
            record.batch[key].copy_(value)
        record.scale.copy_(scale)
        record.replay()
        for parameter, gradient in zip(model.parameters(), record.gradients, strict=True):
            parameter.grad = gradient
        return record.loss.clone()


def _layout(memory: Memory, model: nn.Module, batch: Batch) -> tuple:
    parts = tuple((key, tuple(value.shape), value.dtype, value.device) for key, value in batch.items())
    return memory, model.training, torch.is_autocast_enabled(next(iter(batch.values())).device.type), parts


def _random_states(batch: Batch) -> list[Tensor]:
    """The CPU's generator and the GPU's. Recording may draw from them, and is no step."""
    cuda = any(value.is_cuda for value in batch.values())
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


Recorder = Callable[[Callable[[], list]], tuple[list, Callable[[], None]]]


class BrokenOffError(RuntimeError):
    """The recording failed in the middle; what was recorded before is no longer to be used."""


def _set_sync_debug_mode(mode: str | int) -> None:
    """Torch's, without its two lines in the middle of everybody's run: that it is a prototype and does not see everything. What it
    misses is an error of the recording."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)


class _GraphRecorder:
    """Records what is called as a CUDA graph, after a rehearsal that fails where the host waits for the GPU. All records share
    one pool of memory: they are replayed one after the other, and nothing of a step is needed after it but what it returned,
    whose places stay taken."""

    def __init__(self):
        self.pool = None

    def __call__(self, work: Callable[[], list]) -> tuple[list, Callable[[], None]]:
        before = torch.cuda.get_sync_debug_mode()
        _set_sync_debug_mode("error")
        try:
            work()
        finally:
            _set_sync_debug_mode(before)
        graph = torch.cuda.CUDAGraph()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        try:
            with warnings.catch_warnings():
                # of a graph whose recording was broken off: the error that follows says more
                warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
                # thread_local: other threads (the next batch's, the logger's) may go on meanwhile
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    results = work()
        except RuntimeError as error:
            # torch's generator would wait for the end of the recording for ever
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(torch.Generator(generator.device).graphsafe_get_state())
            raise BrokenOffError(str(error)) from error
        return results, graph.replay
