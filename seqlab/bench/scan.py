"""How fast the selective scan is on this machine, beside whatever else is installed: what `seqlab bench scan` runs.

First a parity gate: output and every gradient of each contender against the float64 reference, on values that a trained
model has. A contender that fails is reported and not timed; if one of our own fails, nothing is. Then median times of
forward and forward + backward at (batch, l, d_inner) over a range of lengths, all contenders on the same values in the
same run. A contender is dropped at the length where it runs out of memory, or where it is expected to need more than the
time allowed, by how its time grew with the last length. Long ones take minutes, so every length is told as soon as it is there.
"""

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlab.bench import machine
from seqlab.errors import UserError
from seqlab.ops import backends, selective_scan
from seqlab.ops.dispatch import Request

Call = Callable[[list[Tensor]], Tensor]
"""[u, delta, A, B, C, D, z, delta_bias] -> y, all channel-last; channel-first for the contender called mamba_ssm."""
ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative error (norms) of the output or a gradient that passes the gate, by dtype of the data."""


@dataclass(frozen=True)
class Settings:
    batch: int = 1
    d_inner: int = 512
    d_state: int = 16
    min_length: int = 2**10
    max_length: int = 2**20
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    attention: bool = True
    seconds: float = 10.0  # most time one contender may take at one length
    repeats: int = 5
    seed: int = 0  # of the data

    def __post_init__(self) -> None:
        for name in ("batch", "d_inner", "d_state", "min_length", "repeats"):
            if (value := getattr(self, name)) < 1:
                option = name if name == "repeats" else f"--{name.replace('_', '-')}"
                raise UserError(f"bench scan: {option} must be 1 or more, got {value}")
        if not self.seconds > 0:
            raise UserError(f"bench scan: --seconds must be above 0, got {self.seconds:g}")
        if self.max_length < self.min_length:
            raise UserError(f"bench scan: --max-length {self.max_length} is below --min-length {self.min_length}")
        if self.d_state > 256:
            raise UserError(f"bench scan: --d-state must be at most 256, got {self.d_state}")

    @property
    def lengths(self) -> list[int]:
        """Doubling by four up to the longest, which is always there."""
        lengths, length = [], self.min_length
        while length < self.max_length:
            lengths.append(length)
            length *= 4
        return [*lengths, self.max_length]


@dataclass(frozen=True)
class Time:
    forward_ms: float
    both_ms: float  # forward + backward
    peak_gib: float | None  # of forward + backward, inputs included; None on a CPU


@dataclass
class Result:
    settings: dict
    machine: str
    torch: str
    errors: dict[str, dict[str, float]]  # contender -> argument ("y" for the output) -> relative error
    absent: dict[str, str]  # contender -> why it is not here
    times: dict[int, dict[str, Time]]  # length -> contender -> time
    dropped: dict[str, str]  # contender -> why it was not timed up to the longest length

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


# ---------------------------------------------------------------------------------------------------- contenders
def torch_parallel(x: list[Tensor]) -> Tensor:
    """The scan in plain torch, parallel over time in log2(l) rounds (Hillis and Steele 1986): what one writes without a
    kernel. Holds (b l d n) several times over."""
    u, delta, A, B, C, D, z, bias = (t.float() for t in x)
    delta = F.softplus(delta + bias)
    decay = torch.exp(delta.unsqueeze(-1) * A)  # (b l d n)
    h = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    step = 1
    while step < u.shape[1]:
        h = torch.cat([h[:, :step], h[:, step:] + decay[:, step:] * h[:, :-step]], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    y = torch.einsum("bldn,bln->bld", h, C) + D * u
    return (y * F.silu(z)).to(x[0].dtype)


def attention(settings: Settings) -> Call:
    """Causal attention of the same width, 8 heads (fewer if they do not divide it), on u, delta and z as q, k and v."""
    heads = math.gcd(8, settings.d_inner)

    def call(x: list[Tensor]) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (x[0], x[1], x[6]))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    return call


def contenders(settings: Settings) -> tuple[dict[str, Call], dict[str, str]]:
    """(name -> call, name -> why absent). mamba_ssm is called as its users call it, on tensors laid out its way."""
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for name, module in backends("selective_scan").items():
        reason = module.unavailable(_request(settings))
        if reason is not None:
            absent[name] = reason
        elif name == "mamba_ssm":
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

            calls[name] = lambda x: selective_scan_fn(*x, True)
        else:
            label = "torch loop" if name == "reference" else name
            calls[label] = lambda x, name=name: selective_scan(*x, True, backend=name)
    calls["torch parallel"] = torch_parallel
    if settings.attention:
        calls["attention"] = attention(settings)
    return calls, absent


def _request(settings: Settings) -> Request:
    return Request(
        device=settings.device,
        dtype=settings.dtype,
        channels=settings.d_inner,
        batch=settings.batch,
        length=settings.max_length,
        d_state=settings.d_state,
        grad=True,
    )


def laid_out(x: Tensor, name: str) -> Tensor:
    """(b l d) <-> (b d l) where that contender wants it; anything else as it is."""
    return x.transpose(1, 2).contiguous() if name == "mamba_ssm" and x.dim() == 3 else x


def make_inputs(settings: Settings, length: int, batch: int | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The statistics of a layer at the start of training: A = -1..-n, steps of 0.001 to 0.1."""
    b, d, n = batch or settings.batch, settings.d_inner, settings.d_state
    g = torch.Generator(settings.device).manual_seed(settings.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=settings.device, generator=g)

    dtype = dtype or settings.dtype
    u, delta, z = (normal(b, length, d).to(dtype) for _ in range(3))
    B, C = (normal(b, length, n).to(dtype) for _ in range(2))
    A = -torch.arange(1.0, n + 1, device=settings.device).repeat(d, 1)
    bias = torch.rand(d, device=settings.device, generator=g) * 4.6 - 6.9
    return [u, delta, A, B, C, normal(d), z, bias]


# ------------------------------------------------------------------------------------------------------- parity
def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||; infinite where the value is not finite."""
    error = float((value.detach().double() - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


def parity(settings: Settings, calls: dict[str, Call]) -> dict[str, dict[str, float]]:
    """Errors of y and of every gradient, against the float64 reference on the same (rounded) values, length 300."""
    small = dataclasses.replace(settings, d_inner=min(settings.d_inner, 64))
    x = make_inputs(small, 300, batch=2)
    exact = [t.double().requires_grad_() for t in x]
    y = selective_scan(*exact, True, backend="reference")
    g = torch.Generator(settings.device).manual_seed(settings.seed + 1)
    cotangent = torch.randn(y.shape, device=settings.device, generator=g).to(settings.dtype)
    truth = [y.detach(), *torch.autograd.grad(y, exact, cotangent.double())]
    errors = {}
    for name, call in calls.items():
        leaves = [laid_out(t, name).clone().requires_grad_() for t in x]
        y = call(leaves)
        got = [laid_out(t, name) for t in (y, *torch.autograd.grad(y, leaves, laid_out(cotangent, name)))]
        errors[name] = {k: relative_error(a, b) for k, a, b in zip(("y", *ARGUMENTS), got, truth, strict=True)}
    return errors


# ------------------------------------------------------------------------------------------------------- timing
def measure(call: Call, x: list[Tensor], settings: Settings) -> Time:
    """Medians after a warm-up. The cotangent is random, and no gradient is accumulated."""
    leaves = [t.detach().requires_grad_() for t in x]
    with torch.no_grad():
        forward = _median(lambda: call(leaves), settings)
        cotangent = torch.randn_like(call(leaves))
    on_gpu = settings.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    both = _median(lambda: torch.autograd.grad(call(leaves), leaves, cotangent, allow_unused=True), settings)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return Time(forward, both, peak)


def _median(f: Callable[[], object], settings: Settings) -> float:
    """Milliseconds; fewer repeats where one takes long."""
    times: list[float] = []
    started = time.perf_counter()
    for i in range(settings.repeats + 1):
        with _clock(settings.device) as read:
            f()
        if i:
            times.append(read())
        if i and time.perf_counter() - started > settings.seconds / 4:
            break
    return sorted(times)[len(times) // 2]


@contextlib.contextmanager
def _clock(device: str) -> Iterator[Callable[[], float]]:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        yield lambda: start.elapsed_time(end)
        end.record()
        end.synchronize()
    else:
        start, end = time.perf_counter(), 0.0
        yield lambda: end * 1e3
        end = time.perf_counter() - start


def run(
    settings: Settings, progress: Callable[[str], None] = lambda text: None, say: Callable[[str], None] = lambda text: None
) -> Result:
    """Parity, then times. `progress` is told what is being done, `say` what has been found.

    Raises:
        UserError: one of our own back ends failed the gate; nothing was timed.
    """
    calls, absent = contenders(settings)
    progress("parity with the float64 reference")
    errors = parity(settings, {name: call for name, call in calls.items() if name != "attention"})
    limit = LIMITS[settings.dtype]
    dropped = {}
    for name, of in errors.items():
        worst = max(of, key=of.get)
        if of[worst] > limit:
            if name not in ("mamba_ssm", "torch parallel"):
                raise UserError(
                    f"bench scan: back end {name} is off by {of[worst]:.1e} in {worst} (limit {limit:.0e}); nothing was timed: "
                    "please report this with the output of `seqlab doctor`"
                )
            dropped[name] = f"failed the parity gate: {of[worst]:.1e} in {worst}"
            del calls[name]
    largest = max(max(of.values()) for name, of in errors.items() if name in calls)
    say(f"parity with the float64 reference: largest error {largest:.1e}; forward / forward + backward follow")
    times: dict[int, dict[str, Time]] = {}
    for length in settings.lengths:
        times[length] = {}
        for name, call in list(calls.items()):
            expected = _expected_seconds(times, name, length)
            if expected > settings.seconds:
                dropped[name] = f"from {length:,} on: about {expected:,.0f} s, more than the {settings.seconds:g} s allowed"
                del calls[name]
                continue
            progress(f"length {length:,}: {name}")
            try:
                times[length][name] = measure(call, [laid_out(t, name) for t in make_inputs(settings, length)], settings)
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; a CPU's has no name
                if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate" not in str(error):
                    raise
                dropped[name] = f"from {length:,} on: out of memory"
                del calls[name]
            gc.collect()
            if settings.device == "cuda":
                torch.cuda.empty_cache()
        if times[length]:
            say(f"length {length:,}, ms: " + ", ".join(f"{name} {_cell(of)}" for name, of in times[length].items()))
    shown = {**dataclasses.asdict(settings), "dtype": str(settings.dtype).removeprefix("torch.")}
    return Result(shown, machine(settings.device), torch.__version__, errors, absent, times, dropped)


def _expected_seconds(times: dict[int, dict[str, Time]], name: str, length: int) -> float:
    """Of one forward and backward with its warm-up, from the last two lengths; 0 while nothing is known."""
    known = [(at, of[name].both_ms / 1e3) for at, of in times.items() if name in of]
    if not known:
        return 0.0
    growth = 1.0
    if len(known) > 1:
        (l0, t0), (l1, t1) = known[-2:]
        growth = max(1.0, math.log(t1 / t0) / math.log(l1 / l0))
    at, seconds = known[-1]
    return 3 * seconds * (length / at) ** growth


# ------------------------------------------------------------------------------------------------------- showing
def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """(header, rows): forward / forward + backward in milliseconds, a row a length."""
    names = [name for name in result.errors if any(name in of for of in result.times.values())]
    if any("attention" in of for of in result.times.values()):
        names.append("attention")
    rows = []
    for length, of in result.times.items():
        cells = [_cell(of[n]) if n in of else "" for n in names]
        rows.append([f"{length:,}", *cells])
    return ["length", *names], rows


def _cell(time: Time) -> str:
    return f"{time.forward_ms:,.2f} / {time.both_ms:,.2f}"


def error_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """(header, rows): the output's error and the worst gradient's, a row a contender."""
    rows = []
    for name, of in result.errors.items():
        gradients = {k: e for k, e in of.items() if k != "y"}
        worst = max(gradients, key=gradients.get)
        rows.append([name, f"{of['y']:.1e}", f"{gradients[worst]:.1e} ({worst})"])
    return ["", "y", "worst gradient"], rows


def plot(result: Result, path: Path) -> Path:
    """Forward + backward by length, both axes logarithmic."""
    from seqlab.report import new_figure, save_figure

    figure, axes = new_figure()
    names = sorted({name for of in result.times.values() for name in of})
    for name in names:
        points = [(length, of[name].both_ms) for length, of in result.times.items() if name in of]
        axes.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    s = result.settings
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length", ylabel="forward + backward, ms")
    axes.set_title(f"batch {s['batch']}, d_inner {s['d_inner']}, d_state {s['d_state']}, {s['dtype']}, {result.machine}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="best")
    return save_figure(figure, path)
