"""How fast a model trains on this machine, beside mamba_ssm where it is installed: what `seqlab bench train` runs.

First a parity gate: loss and gradient of every contender on a short batch against the same model in float32 on the reference
operators, on the CPU. What fails is reported and not timed. Then whole steps (forward, backward, clipping, AdamW) on random data, one contender
after the other from the same weights:

    seqlab                the model in the memory mode that `seqlab train` would choose; on a GPU blocks are one operator
    recorded              the same steps replayed as CUDA graphs, which is what training does by default on one GPU
    separate operators    GPU: the same, each block as separate operators
    mamba_ssm             the same model, its mixers replaced by mamba_ssm's fused module: one, or for a bidirectional block two
                          that share what ours share, the second on the flipped sequence

All but the first two are timed with nothing recomputed, or if that does not fit, with blocks recomputed. A step of a large preset
takes seconds and a run minutes, so every result is told as soon as it is there.
"""

import contextlib
import copy
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from seqlab.backbones.bidirectional import BidirectionalMixer
from seqlab.backbones.mamba import Block, MambaMixer
from seqlab.bench import machine
from seqlab.errors import UserError
from seqlab.ops import backends, dispatch
from seqlab.training import memory as modes
from seqlab.training import planner
from seqlab.training.config import TrainConfig
from seqlab.training.graphs import GradientGraphs
from seqlab.training.memory import Memory
from seqlab.training.optim import OptimConfig, make_optimizer
from seqlab.training.task import Batch, Task

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest relative error of the loss, or of all gradients as one vector, that passes the gate."""
GATE = (1, 256)
"""Rows and positions of its batch, at most."""
SEPARATE, PEER = "separate operators", "mamba_ssm"


@dataclass(frozen=True)
class Settings:
    """What is timed: `micro_batches` batches of (rows length) a step, on one device."""

    rows: int
    length: int
    micro_batches: int = 1
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16  # of matrix products and activations
    seconds: float = 5.0  # about how long a contender's steps are timed

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise UserError(f"bench train: --seconds must be above 0, got {self.seconds:g}")

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.length * self.micro_batches

    def show(self) -> str:
        """What a step consists of: 8 times 1 x 131,072 tokens."""
        times = f"{self.micro_batches} times " if self.micro_batches > 1 else ""
        return f"{times}{self.rows} x {self.length:,} tokens"


@dataclass(frozen=True)
class Row:
    contender: str
    memory: str
    step_ms: float  # the median
    steps: int  # that were timed
    tokens_per_second: float
    peak_bytes: int  # of everything on the device: weights, moments, gradients, data, what is at work


@dataclass
class Result:
    settings: dict
    machine: str
    torch: str
    parameters: int
    errors: dict[str, float] = field(default_factory=dict)  # contender -> relative error at the gate
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


class PeerMixer(nn.Module):
    """One of our mixers as mamba_ssm would compute it, with the same parameters."""

    def __init__(self, ours: MambaMixer | BidirectionalMixer):
        super().__init__()
        self.config = c = ours.config
        if isinstance(ours, MambaMixer):
            self.mamba_fwd, self.mamba_rev = self._module(ours), None
            return
        self.mamba_fwd, self.mamba_rev = self._module(ours.mamba_fwd), self._module(ours.mamba_rev)
        if c.tie_projections:
            self.mamba_rev.in_proj, self.mamba_rev.out_proj = self.mamba_fwd.in_proj, self.mamba_fwd.out_proj

    def _module(self, ours: MambaMixer) -> nn.Module:
        from mamba_ssm.modules.mamba_simple import Mamba

        c = self.config
        sizes = dict(d_state=c.d_state, d_conv=c.d_conv, expand=c.expand, dt_rank=c.rank, conv_bias=c.conv_bias, bias=c.bias)
        module = Mamba(c.d_model, **sizes, layer_idx=0)
        module.load_state_dict(ours.state_dict())
        return module

    def forward(self, x: Tensor, state: None = None, mask: None = None, return_state: bool = False):
        y = self.mamba_fwd(x)
        if self.mamba_rev is not None:
            back = self.mamba_rev(x.flip(1)).flip(1)
            y = y * back if self.config.combine == "multiply" else y + back
        return y, None


def separate(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Block):
            module.fuse = False
    return model


def peer(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Block):
            module.mixer = PeerMixer(module.mixer)
    return model


def why_no_peer(model: nn.Module, device: str) -> str | None:
    if device != "cuda":
        return "needs an NVIDIA GPU"
    if not all(isinstance(m.mixer, MambaMixer | BidirectionalMixer) for m in model.modules() if isinstance(m, Block)):
        return "has no such blocks: only selective ones"
    reasons = [backends(op)[PEER].unavailable() for op in ("selective_scan", "causal_conv1d")]
    return next((reason for reason in reasons if reason is not None), None)


def gradient(model: nn.Module, task: Task, batch: Batch) -> tuple[float, Tensor]:
    """The mean loss, and the gradients of all parameters as one vector, float64 on the CPU. Without dropout."""
    model.eval()
    loss, weight = task.loss(model, batch)
    mean = loss / weight
    mean.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.train()
    return mean.item(), torch.cat([part.flatten().double().cpu() for part in parts])


def error(found: tuple[float, Tensor], exact: tuple[float, Tensor]) -> float:
    loss = abs(found[0] - exact[0]) / max(abs(exact[0]), 1e-30)
    worst = max(loss, float((found[1] - exact[1]).norm() / exact[1].norm().clamp_min(1e-30)))
    return worst if loss == loss and worst == worst else float("inf")


class Steps:
    """Whole optimiser steps of one model, as the trainer takes them."""

    def __init__(self, model: nn.Module, task: Task, batch: Batch, settings: Settings, optim: OptimConfig, memory: Memory, recorded: bool):
        self.model, self.task, self.batch, self.settings, self.memory = model, task, batch, settings, memory
        self.clip, self.optimizer = optim.clip or float("inf"), make_optimizer(model, optim)
        self.is_recorded = recorded
        self.backward = GradientGraphs().backward if recorded else modes.backward
        weight = task.weight(batch) * settings.micro_batches
        self.scale = torch.tensor(1 / max(weight, 1.0), device=batch["ids"].device)

    def __call__(self) -> None:
        with autocast(self.settings):
            for _ in range(self.settings.micro_batches):
                self.backward(self.memory, self.model, self.task, self.batch, self.scale)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def autocast(settings: Settings):
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == torch.bfloat16)


def measure(step: Steps, settings: Settings) -> tuple[list[float], int]:
    """Seconds of each timed step, and the peak of bytes.

    Three steps warm up (they compile, allocate and record) and three are timed at least, fewer where they would take long beside
    `settings.seconds`."""
    if settings.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for warm in range(3):
        if warm and not step.is_recorded and time.perf_counter() - began > 2 * settings.seconds:
            break
        step()
        _wait(settings)
    times: list[float] = []
    while sum(times) < settings.seconds * (1 if len(times) >= 3 else 3) and len(times) < 1000:
        began = time.perf_counter()
        step()
        _wait(settings)
        times.append(time.perf_counter() - began)
    if settings.device == "cuda":
        return times, torch.cuda.max_memory_allocated()
    known = [*step.model.parameters(), *step.model.buffers(), *step.batch.values()]
    known += [x for state in step.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    with planner.Storages(iter(known)) as storages:
        step()
    return times, storages.peak + sum(x.numel() * x.element_size() for x in known)


def _wait(settings: Settings) -> None:
    if settings.device == "cuda":
        torch.cuda.synchronize()


def run(
    task: Task,
    batch: Batch,
    settings: Settings,
    train: TrainConfig,
    optim: OptimConfig,
    progress: Callable[[str], None] = lambda text: None,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Gate, then time everything. `batch` is any batch of the task, on the CPU. `progress` is told what is being done, `say` what has
    been found. Raises UserError if nothing of ours passes."""
    with torch.random.fork_rng():
        torch.manual_seed(train.seed)
        original = task.build_model()
    dtype = "bf16" if settings.dtype == torch.bfloat16 else "fp32"
    shown = dataclasses.asdict(settings) | {"dtype": dtype, "tokens_per_step": settings.tokens}
    result = Result(shown, machine(settings.device), torch.__version__, sum(p.numel() for p in original.parameters()))
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {"seqlab": lambda model: model}
    if settings.device == "cuda":
        makers |= {"recorded": lambda model: model, SEPARATE: separate}
    if (reason := why_no_peer(original, settings.device)) is None:
        makers[PEER] = peer
    else:
        result.absent[PEER] = reason

    say(f"{result.parameters:,} parameters, {settings.show()} a step, {dtype}, {result.machine}")
    progress("parity: the reference operators, on the CPU")
    began = time.perf_counter()
    short = planner.resize(batch, min(GATE[0], settings.rows), min(GATE[1], settings.length))
    with _reference_operators():
        exact = gradient(copy.deepcopy(original), task, short)
    rows, length = short["ids"].shape[:2]
    say(f"reference: loss and gradients of {rows} x {length} tokens in float32 on the CPU, {time.perf_counter() - began:.1f} s")
    full = planner.resize(batch, settings.rows, settings.length)
    full, short = ({key: value.to(settings.device) for key, value in part.items()} for part in (full, short))
    for name, make in makers.items():
        progress(name)
        try:
            model = make(copy.deepcopy(original)).to(settings.device)
            if name != "recorded":
                with autocast(settings):
                    result.errors[name] = error(gradient(model, task, short), exact)
            if not result.errors.get(name, 0.0) <= LIMITS[settings.dtype]:
                result.absent[name] = f"not timed: loss or gradients differ by {result.errors[name]:.2g}"
                continue
            result.rows.append(row := _row(name, model, task, full, settings, train, optim, result))
            parity = f", parity {result.errors[name]:.1e}" if name in result.errors else ""
            rate = f"{row.tokens_per_second:,.0f} tokens/s"
            say(f"{name}: {row.step_ms:,.1f} ms a step ({row.steps} timed), {rate}, {planner.gib(row.peak_bytes)}, memory {row.memory}{parity}")
        except UserError as refusal:  # of the planner: nothing fits
            result.absent[name] = str(refusal)
        except Exception as problem:  # a contender may fail in any way; that is its row
            first = str(problem).splitlines()[0] if str(problem) else ""
            result.absent[name] = f"{type(problem).__name__}: {first}"
        finally:
            model = None
            gc.collect()
            if settings.device == "cuda":
                torch.cuda.empty_cache()
    if not any(row.contender == "seqlab" for row in result.rows):
        raise UserError("bench train: nothing of ours was timed: " + "; ".join(f"{k}: {v}" for k, v in result.absent.items()))
    return result


def _row(name, model, task, batch, settings, train, optim, result) -> Row:
    """Times one contender. Those of ours take the memory mode that training would; the others the first of two that fits."""
    ours = [row for row in result.rows if row.contender == "seqlab"]
    if name == "seqlab":
        bf16 = settings.dtype == torch.bfloat16
        candidates = [planner.choose(model, task, batch, settings.micro_batches, train, bf16)[0]]
    elif name == "recorded":
        at_once = ("states", "plain")
        if not ours or settings.micro_batches > 1 or train.memory not in ("auto", *at_once) or ours[0].memory not in at_once:
            raise UserError("only steps of one batch with memory states or plain are recorded")
        candidates = [Memory(ours[0].memory)]
    else:
        candidates = [Memory("plain"), Memory("block")]
    for i, memory in enumerate(candidates):
        modes.prepare(memory, model)
        try:
            step = Steps(model, task, batch, settings, optim, memory, name == "recorded")
            times, peak = measure(step, settings)
        except torch.OutOfMemoryError:
            if i == len(candidates) - 1:
                raise UserError("out of memory") from None
            step = None
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            continue
        if step.is_recorded and not step.backward.__self__.recorded:
            raise UserError("could not be recorded")
        seconds = statistics.median(times)
        return Row(name, str(memory), 1e3 * seconds, len(times), settings.tokens / seconds, peak)


@contextlib.contextmanager
def _reference_operators():
    """While this lasts, operators that are not told their back end run as the reference. It is made of operations too small to be
    shared out: with several threads on a busy machine they wait for each other, for minutes instead of seconds."""
    import os

    before, threads = os.environ.get(dispatch.ENVIRONMENT), torch.get_num_threads()
    os.environ[dispatch.ENVIRONMENT] = "reference"
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop(dispatch.ENVIRONMENT)
        if before is not None:
            os.environ[dispatch.ENVIRONMENT] = before


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one a contender."""
    theirs = {row.contender: row.tokens_per_second for row in result.rows}.get(PEER)
    rows = []
    for row in result.rows:
        ratio = [f"{row.tokens_per_second / theirs:.2f}"] if theirs else []
        peak = planner.gib(row.peak_bytes)
        rows.append([row.contender, row.memory, f"{row.step_ms:,.1f}", f"{row.tokens_per_second:,.0f}", peak, *ratio])
    return ["", "memory", "ms a step", "tokens/s", "peak", *([f"x {PEER}"] if theirs else [])], rows
