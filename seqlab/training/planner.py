"""Which memory mode a run needs, and what a step will take: measured on short sequences, extrapolated to the real one.

Nothing about the model is assumed but that memory grows linearly with what is at work at once, and time with the tokens. A
few steps on short sequences give the constants:

    states, plain, subtract, block peak = p0 + p1 tokens                        tokens at once, over all rows
    chunked, layerwise, offload    peak = p0 + p1 chunk + p2 length + state bytes at a cut x cuts    (chunked: p2 = 0)

The peak is that of the device's allocator on a GPU; on a CPU the storages that torch makes are watched as they come and go.
Weights, gradients, AdamW's two moments, an average of the weights and the batch itself are added by arithmetic.
"""

import dataclasses
import math
import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from seqlab.errors import UserError
from seqlab.training import memory as modes
from seqlab.training.config import TrainConfig
from seqlab.training.memory import MODES, Memory, Mode
from seqlab.training.task import Batch, Task

GIB = 2**30
LARGEST_CHUNK = {"cuda": 1 << 18, "cpu": 1 << 14}
SMALLEST_CHUNK = 1 << 10
PROBE_TOKENS = {"cuda": 1 << 16, "cpu": 1 << 8}
"""The shorter of the probe's lengths: on a GPU long enough that its kernels cut up time as they do for a long sequence."""


@dataclass(frozen=True)
class Estimate:
    """What one memory mode would take. Bytes and seconds of one device; `longest` is the longest context (one row)."""

    memory: Memory
    peak: int
    step_seconds: float
    host: int
    longest: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Estimates by mode, cheapest first, and the first that fits (None: none does)."""

    device: str
    rows: int  # of a micro-batch on one device
    length: int  # of the whole sequence, also where devices share it
    capacity: int
    host_capacity: int
    estimates: tuple[Estimate, ...]
    unavailable: dict[str, str]
    chosen: Estimate | None

    def refusal(self, wanted: Mode | None = None) -> str:
        """One line: why it cannot be trained, and the nearest that can."""
        asked = [e for e in self.estimates if wanted is None or e.memory.mode == wanted]
        least = min(asked, key=lambda e: e.peak)
        line = (
            f"context {self.length:,}: a step needs {gib(least.peak)} with memory {least.memory.mode}, "
            f"and {gib(self.capacity)} are free on this {'GPU' if self.device == 'cuda' else 'machine'}"
        )
        if least.host > self.host_capacity and least.peak <= self.capacity:
            line += f" (and {gib(least.host)} of host memory, of which {gib(self.host_capacity)} are free)"
        others = [e for e in self.estimates if e.fits and e not in asked]
        if others:
            return f"{line}; use --set train.memory={others[0].memory.mode} ({gib(others[0].peak)})"
        chunk = least.memory.chunk_tokens
        if least.memory.cuts_sequences and self.length > chunk > SMALLEST_CHUNK:  # pieces of a size that the config says
            smaller = 1 << int(math.log2(0.8 * chunk * min(1, self.capacity / least.peak)))
            if smaller >= SMALLEST_CHUNK:
                return f"{line}; use --set train.chunk_tokens={smaller}"
        longest = max(asked, key=lambda e: e.longest)
        if longest.longest < 2:
            return f"{line}; use a smaller model or another device"
        return f"{line}; use --context {longest.longest} with train.memory={longest.memory.mode}, or a smaller model"


def gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= 0.95 * GIB else f"{size / 2**20:,.0f} MiB"


# -- what there is ---------------------------------------------------------------------------------------------------
def capacity(device: torch.device) -> int:
    """Bytes that this process may use on the device, those it already uses included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return host_capacity()


def host_capacity() -> int:
    """Bytes of host memory that are free, within the container's limit if there is one."""
    free = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:  # control groups, version 2; reclaimable cache counts as used there, so the answer is on the safe side
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(free, 0)


def fits(peak: float, available: int, device: str) -> bool:
    """With a margin: for what the allocator cannot place on a GPU, for everything that is not torch's on a CPU."""
    return 1.05 * peak + GIB / 4 <= available if device == "cuda" else 1.2 * peak <= available


# -- measuring -------------------------------------------------------------------------------------------------------
class Storages(TorchDispatchMode):
    """Peak of the bytes in storages made while it is active (and those still alive), on any device."""

    def __init__(self, known: Iterator[Tensor]):
        super().__init__()
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self._known = {t.untyped_storage()._cdata for t in known}
        self.now = self.peak = 0

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)[1]

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = (weakref.ref(storage, lambda _: self._gone(key)), size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self._add(x)
        return result


def resize(batch: Batch, rows: int, length: int) -> Batch:
    """A batch of another shape, its own contents repeated: every tensor's rows, and what runs along the sequence."""
    own_rows, own_length = batch["ids"].shape[:2]

    def stretch(x: Tensor, dimension: int, size: int) -> Tensor:
        return x.index_select(dimension, torch.arange(size, device=x.device) % x.shape[dimension])

    resized = {}
    for key, value in batch.items():
        if value.dim() >= 1 and value.shape[0] == own_rows:
            value = stretch(value, 0, rows)
        if value.dim() >= 2 and value.shape[1] == own_length:
            value = stretch(value, 1, length)
        resized[key] = value
    return resized


@dataclass
class Probe:
    """Measures steps of one model on one device. `batch` is any batch of the task, on that device; (rows length) the shape to
    plan for."""

    model: nn.Module
    task: Task
    batch: Batch
    rows: int
    length: int
    bf16: bool
    _linear: dict = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.batch["ids"].device

    def measure(self, memory: Memory, rows: int, length: int) -> tuple[int, float]:
        """Peak bytes beyond weights, gradients and batch, and the seconds, of forward and backward, once everything is warm.

        Leaves gradients absent, and weights and random state as they were.
        """
        device, batch = self.device, resize(self.batch, rows, length)
        modes.prepare(memory, self.model)
        compiled = getattr(self.model, "_compiled_call_impl", None)
        self.model._compiled_call_impl = None  # not worth compiling for; eager takes no less memory
        devices = [device.index or 0] if device.type == "cuda" else []
        seconds = math.inf
        try:
            with torch.random.fork_rng(devices), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                for parameter in self.model.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
                # The first one may compile kernels, and cuBLAS takes a workspace that it keeps: 32 MiB in the shorter of two probes
                # made the prediction for 16 times its length 480 MiB too low. So the time is the better one, the peak the second's.
                for _ in range(2):
                    before = self._settle()
                    start = time.perf_counter()
                    modes.backward(memory, self.model, self.task, batch, 1.0)
                    after = self._settle(peak=True)
                    seconds, peak = min(seconds, time.perf_counter() - start), after - before
                if device.type == "cpu":
                    known = [*self.model.parameters(), *self.model.buffers(), *batch.values()]
                    known += [p.grad for p in self.model.parameters() if p.grad is not None]
                    with Storages(iter(known)) as storages:
                        modes.backward(memory, self.model, self.task, batch, 1.0)
                    peak = storages.peak
        finally:
            self.model._compiled_call_impl = compiled
            self.model.zero_grad(set_to_none=True)
            modes.prepare(Memory(), self.model)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # so that what is free is seen to be
        return peak, seconds

    def _settle(self, peak: bool = False) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        if peak:
            return torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    # -- extrapolating -----------------------------------------------------------------------------------------------
    def rough(self, mode: Mode, rows: int, length: int) -> float:
        """An upper bound of the peak of plain or states, from one short step: what does not grow is taken to grow."""
        short = min(length, PROBE_TOKENS[self.device.type] // 8)
        peak, _ = self.measure(Memory(mode), 1, short)
        return peak / short * rows * length

    def whole(self, mode: Mode, tokens: int) -> tuple[float, float]:
        """(peak bytes, seconds) of a mode that cuts no sequence, with that many tokens at once, over all rows."""
        if mode not in self._linear:

            def measure(unit: int):
                shapes = self._shape(unit), self._shape(2 * unit)
                return [(rows * length, *self.measure(Memory(mode), rows, length)) for rows, length in shapes]

            # a step that is no longer than the probe is measured itself: kernels cut short problems up in other ways
            self._linear[mode] = self._shrinking(measure, self.rows * self.length // 2)
        (n1, m1, _), (n2, m2, t2) = self._linear[mode]
        more = (tokens - n1) / max(1, n2 - n1)
        return m1 + (m2 - m1) * more, t2 * tokens / n2

    def _shape(self, tokens: int) -> tuple[int, int]:
        return (tokens // self.length, self.length) if tokens >= self.length else (1, max(1, tokens))

    def cut(self, mode: Mode, chunk: int, length: int) -> tuple[float, float]:
        """(peak bytes, seconds) of one row of `length` in pieces of `chunk` tokens, length > chunk."""
        if mode not in self._linear:

            def measure(unit: int):
                points = [(unit, 2 * unit), (unit, 3 * unit), (2 * unit, 4 * unit)]
                if mode == "chunked":
                    points[1] = points[0]
                return unit, [self.measure(Memory(mode, c), 1, n) for c, n in dict.fromkeys(points)]

            state = modes.state_bytes(mode, self.model, self.task, self.batch)
            self._linear[mode] = (*self._shrinking(measure), state)
        unit, measured, state = self._linear[mode]
        (m1, _), (m2, _), (m3, t3) = measured[0], measured[-2], measured[-1]
        # the chunked mode keeps nothing else of the sequence; measured, the allocator's grain would be multiplied by its length
        per_length = 0.0 if mode == "chunked" else (m2 - m1 - state) / unit
        per_chunk = (m3 - m1 - 2 * unit * per_length) / unit
        constant = m1 - unit * per_chunk - 2 * unit * per_length - 2 * state
        peak = constant + per_chunk * chunk + per_length * length + state * math.ceil(length / chunk)
        spared = 0.25 if mode == "chunked" else 0.0  # the last piece goes forward once; of four parts of a piece's work one
        return peak, t3 * (length / (2 * unit) - spared) / (2 - spared)

    def _shrinking(self, measure, most: int | None = None):
        """`measure(unit)`, with a smaller unit if the device has no room for it."""
        unit = PROBE_TOKENS[self.device.type]
        unit = unit if most is None else max(1, min(unit, most))
        while True:
            try:
                return measure(unit)
            except torch.OutOfMemoryError:
                if unit < 256:
                    raise UserError("not even a sequence of 256 tokens fits; use a smaller model") from None
                unit //= 2
                torch.cuda.empty_cache()


# -- planning --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Load:
    """What a step consists of on one device."""

    rows: int  # of the largest micro-batch
    length: int
    micro_batches: int
    static: int  # bytes of weights, gradients, moments, average, and the step's batches
    host_per_token: int  # bytes of the offload mode, a token of one row


def load_of(model: nn.Module, batch: Batch, micro_batches: int, ema: bool, rows: int, length: int) -> Load:
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    fixed = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    own = batch["ids"].shape[0] * batch["ids"].shape[1]
    data = sum(x.numel() * x.element_size() for x in batch.values()) / own * rows * length * micro_batches
    host = 0
    layers = getattr(getattr(getattr(model, "model", model), "backbone", None), "layers", None)
    if layers is not None:
        strands = 2 if hasattr(model, "both_strands") else 1
        host = 4 * strands * len(layers) * layers[0].norm.weight.numel()
    return Load(rows, length, micro_batches, int(fixed * (2 if ema else 1) + 3 * size + data), host)


def candidates(mode: Mode, load: Load, device: str, chunk_tokens: int | None, may_divide: bool) -> Iterator[Memory]:
    """The settings of a mode, cheapest first."""
    if chunk_tokens is not None:
        yield Memory(mode, chunk_tokens)
    elif mode not in modes.CUTTING:
        yield Memory(mode)
        rows = load.rows if may_divide and mode != "states" else 1  # plain at once before states in parts
        while rows > 1:
            rows = (rows + 1) // 2
            yield Memory(mode, rows * load.length)
    else:
        chunk = LARGEST_CHUNK[device]
        while chunk >= SMALLEST_CHUNK:
            if chunk < load.length or chunk == SMALLEST_CHUNK:
                yield Memory(mode, chunk)
            chunk //= 2


def estimate(probe: Probe, load: Load, memory: Memory, available: int, host_available: int) -> Estimate:
    device, length = probe.device.type, load.length

    def peak_and_seconds(length: int, rows: int) -> tuple[float, float]:
        together = rows if memory.chunk_tokens is None else min(rows, max(1, memory.chunk_tokens // length))
        if memory.cuts_sequences and length > memory.chunk_tokens:
            peak, seconds = probe.cut(memory.mode, memory.chunk_tokens, length)
        else:
            peak, seconds = probe.whole("plain" if memory.cuts_sequences else memory.mode, together * length)
        return peak, seconds * rows / together

    peak, seconds = peak_and_seconds(length, load.rows)
    host = load.host_per_token * length if memory.mode == "offload" else 0
    step_seconds = seconds * load.micro_batches

    def possible(length: int) -> bool:
        enough = memory.mode != "offload" or load.host_per_token * length <= 0.9 * host_available
        return enough and fits(peak_and_seconds(length, 1)[0] + load.static, available, device)

    return Estimate(
        memory,
        int(peak + load.static),
        step_seconds,
        host,
        _largest(possible),
        fits(peak + load.static, available, device) and host <= 0.9 * host_available,
    )


def _largest(possible) -> int:
    """The largest n for which possible(n), which is monotonous: to three digits; 0 if not even 1."""
    if not possible(1):
        return 0
    low = 1
    while possible(2 * low) and low < 2**50:
        low *= 2
    step = low // 2
    while step >= max(1, low // 1000):
        if possible(low + step):
            low += step
        step //= 2
    return low


def _unavailable(mode: Mode, probe: Probe, load: Load) -> str | None:
    """Why the mode is not to be had; None if it is."""
    reason = modes.unavailable(mode, probe.model, probe.task, probe.device)
    if reason is None and mode == "states" and not modes.keeps_states(probe.model, load.rows * load.length):
        return "batches as small as these gain nothing from it"
    return reason


def plan(
    probe: Probe,
    load: Load,
    train: TrainConfig,
    *,
    everything: bool = False,
    available: int | None = None,
) -> Plan:
    """Estimate the modes in order of cost until one fits; with `everything` all of them."""
    device = probe.device
    available = capacity(device) if available is None else available
    host_available = host_capacity()
    wanted: Mode | None = "block" if train.checkpoint_blocks else None if train.memory == "auto" else train.memory
    reasons: dict[str, str] = {}
    found: list[Estimate] = []
    chosen: Estimate | None = None
    # the modes asked for first; if none of them fits, the others for the sake of the message
    for mode in sorted(MODES, key=lambda m: wanted not in (None, m)):
        reason = _unavailable(mode, probe, load)
        if mode not in modes.SHARING and train.context_parallel > 1:
            reason = "devices that share a sequence each run whole blocks on one piece of it"
        if reason is not None:
            reasons[mode] = reason
            if mode == wanted:
                raise UserError(f"train.memory: {mode} cannot be used: {reason}; use train.memory=auto")
            continue
        if chosen is not None and not everything:
            break
        best = None
        for memory in candidates(mode, load, device.type, train.chunk_tokens, train.context_parallel == 1):
            best = estimate(probe, load, memory, available, host_available)
            if best.fits:
                break
        best = dataclasses.replace(best, longest=best.longest * train.context_parallel)
        found.append(best)
        if chosen is None and best.fits and wanted in (None, mode):
            chosen = best
    found.sort(key=lambda e: MODES.index(e.memory.mode))
    return Plan(
        device.type, load.rows, load.length * train.context_parallel, available, host_available, tuple(found), reasons, chosen
    )


def choose(model: nn.Module, task: Task, batch: Batch, micro_batches: int, train: TrainConfig, bf16: bool) -> tuple[Memory, str]:
    """The memory setting for a run whose largest micro-batch is `batch` (on the device), and one line about it.

    Raises UserError, naming the nearest that can, if the step cannot fit.
    """
    rows, length = batch["ids"].shape[:2]
    probe = Probe(model, task, resize(batch, 1, min(length, 1024)), rows, length, bf16)
    load = load_of(model, batch, micro_batches, train.ema_decay > 0, rows, length)
    available = capacity(probe.device)
    place = "the GPU's" if probe.device.type == "cuda" else "this machine's"
    if train.chunk_tokens is None and not train.checkpoint_blocks:
        for mode in ("states", "plain"):
            if train.memory in ("auto", mode) and _unavailable(mode, probe, load) is None:
                bound = probe.rough(mode, rows, length) + load.static
                if 2 * bound < available:
                    return Memory(mode), f"memory: {mode}, less than {gib(bound)} of {place} {gib(available)}"
                break
    result = plan(probe, load, train)
    if result.chosen is None:
        wanted = "block" if train.checkpoint_blocks else None if train.memory == "auto" else train.memory
        raise UserError(result.refusal(wanted))
    chosen = result.chosen
    host = f" and {gib(chosen.host)} of host memory" if chosen.host else ""
    return chosen.memory, f"memory: {chosen.memory}, {gib(chosen.peak)} of {place} {gib(available)}{host}"


def as_dict(result: Plan) -> dict:
    """For --json."""
    return {
        **{k: getattr(result, k) for k in ("device", "rows", "length", "capacity", "host_capacity", "unavailable")},
        "chosen": None if result.chosen is None else dataclasses.asdict(result.chosen),
        "modes": [dataclasses.asdict(e) for e in result.estimates],
    }
