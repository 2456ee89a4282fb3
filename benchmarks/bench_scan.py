"""selective_scan against the implementations people use today: parity gate, then a table, then one JSON line.

    python benchmarks/bench_scan.py                          CPU, lengths 256 to 16384, then alone to 1,048,576
    python benchmarks/bench_scan.py --max-length 4096        shorter

Every contender computes the same thing on the same float32 numbers: softplus(delta + bias), the scan, D u, the gate
silu(z). Times are the best of several runs after a warm-up (which holds the compile). Contenders that are not installed
get a row saying so. The parity gate compares outputs and gradients of every contender with the float64 reference first;
a red gate ends the run before anything is timed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlab.ops import backends, selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
GATE = 1e-4  # largest error allowed, relative to the largest value of each result


def make_inputs(batch: int, length: int, channels: int, states: int, dtype=torch.float32, device="cpu", grad=True):
    """Arguments with the statistics of a Mamba at initialisation: A = -1..-n, steps of 0.001 to 0.1."""
    g = torch.Generator().manual_seed(0)
    t = {
        "u": torch.randn(batch, length, channels, generator=g),
        "delta": torch.randn(batch, length, channels, generator=g) * 0.5,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": torch.randn(batch, length, states, generator=g),
        "C": torch.randn(batch, length, states, generator=g),
        "D": torch.ones(channels),
        "z": torch.randn(batch, length, channels, generator=g),
        "delta_bias": torch.rand(channels, generator=g) * 4.6 - 6.9,
    }
    data = ("u", "delta", "B", "C", "z")
    return {k: v.to(device, dtype if k in data else torch.float32).requires_grad_(grad) for k, v in t.items()}


# ---------------------------------------------------------------------------------------------------- contenders
# name -> (function of the eight arguments, channel-last in and out; longest length worth waiting for: forward, backward).
# A function raises ImportError when its package is missing. transformers' backward is quadratic in the length: each of its
# l slices of a (b d l n) tensor gets a gradient of that whole size (a minute at 1024).


def ours(backend: str) -> Callable[..., Tensor]:
    def run(u, delta, A, B, C, D, z, delta_bias):
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, True, backend=backend)

    return run


def mambapy_pscan(u, delta, A, B, C, D, z, delta_bias):
    """mambapy's MambaBlock.selective_scan: builds exp(delta A) and delta B u, parallel scan, contraction with C."""
    from mambapy.mamba import MambaBlock

    return MambaBlock.selective_scan(None, u, F.softplus(delta + delta_bias), A, B, C, D) * F.silu(z)


def transformers_sequential(u, delta, A, B, C, D, z, delta_bias):
    """The loop over time that transformers' MambaMixer runs without CUDA kernels; it likes (b d l), given as views."""
    from transformers.models.mamba import modeling_mamba

    if not hasattr(modeling_mamba, "mamba_selective_scan"):
        raise ImportError("transformers 5 or later: pip install -U transformers")
    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
    y = modeling_mamba.mamba_selective_scan(u, delta, A, B, C, D, z, delta_bias, True)
    return y.transpose(1, 2)


FOREVER = 1 << 62
CONTENDERS: dict[str, dict[str, tuple[Callable[..., Tensor], int, int]]] = {
    "cpu": {
        "seqlab cpu": (ours("cpu"), FOREVER, FOREVER),
        "mambapy pscan": (mambapy_pscan, 16384, 16384),
        "transformers sequential": (transformers_sequential, 4096, 256),
        "seqlab reference": (ours("reference"), 1024, 1024),
    },
}


# -------------------------------------------------------------------------------------------------------- timing


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def best_ms(function: Callable[[], object], device: str, seconds: float = 1.5, most: int = 15) -> float:
    """Best of as many runs as fit in `seconds` (two at least, `most` at most), after one that does not count."""
    function()
    synchronize(device)
    times: list[float] = []
    while len(times) < 2 or (sum(times) < seconds and len(times) < most):
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def forward_only(function, t):
    with torch.no_grad():
        return function(*(t[name] for name in NAMES))


def forward_backward(function, t, dy):
    return torch.autograd.grad(function(*(t[name] for name in NAMES)), [t[name] for name in NAMES], dy)


def gate(device: str) -> list[str]:
    """Compare every contender with the float64 reference; return the failures."""
    t = make_inputs(1, 130, 24, 16, device=device)
    exact = {k: v.detach().double().cpu().requires_grad_() for k, v in t.items()}
    dy = torch.randn(1, 130, 24, generator=torch.Generator().manual_seed(1))
    reference = ours("reference")
    want = [forward_only(reference, exact), *forward_backward(reference, exact, dy.double())]
    failures = []
    for name, (function, *_) in CONTENDERS[device].items():
        try:
            got = [forward_only(function, t), *forward_backward(function, t, dy.to(device))]
        except ImportError as error:
            print(f"parity  {name:26} not installed ({error})")
            continue
        error = max(
            ((g.cpu().double() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True)
        )
        green = error < GATE  # NaN is red
        print(f"parity  {name:26} {error:.1e}  {'ok' if green else f'RED (allowed {GATE:.0e})'}")
        if not green:
            failures.append(name)
    return failures


# -------------------------------------------------------------------------------------------------------- memory


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak so far) of this process, in bytes. Linux only."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def measure_memory(length: int, channels: int, states: int) -> None:
    """In a process of its own: print peak resident bytes of one forward and backward, and what inputs + outputs take."""
    small = make_inputs(1, 64, channels, states)
    forward_backward(ours("cpu"), small, torch.ones(1, 64, channels))  # compile
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # forget the peak so far
    before = resident("VmRSS")
    t = make_inputs(1, length, channels, states)
    dy = torch.ones(1, length, channels)
    y = ours("cpu")(*(t[name] for name in NAMES))
    grads = torch.autograd.grad(y, [t[name] for name in NAMES], dy)
    needed = sum(x.numel() * x.element_size() for x in (*t.values(), dy, y, *grads))
    print(json.dumps({"peak_bytes": resident("VmHWM") - before, "inputs_outputs_bytes": needed}))


def memory_row(length: int, channels: int, states: int) -> dict:
    command = [sys.executable, __file__, "--memory", str(length), str(channels), str(states)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    return {"length": length, "ratio": row["peak_bytes"] / row["inputs_outputs_bytes"], **row}


# ---------------------------------------------------------------------------------------------------------- main


def compare_table(device: str, shape: tuple[int, int, int], lengths: list[int]) -> list[dict]:
    batch, channels, states = shape
    print(f"\nfloat32, batch {batch}, {channels} channels, {states} states; times in ms, speed-up of {first(device)}")
    print(f"{'length':>8} {'':26} {'forward':>10} {'fwd+bwd':>10} {'speed-up':>18}")
    rows = []
    for length in lengths:
        t = make_inputs(batch, length, channels, states, device=device)
        dy = torch.randn_like(t["u"])
        base = None
        for name, (function, longest, longest_backward) in CONTENDERS[device].items():
            if length > longest:
                continue
            both = None
            try:
                forward = best_ms(lambda f=function, t=t: forward_only(f, t), device)
                if length <= longest_backward:
                    both = best_ms(lambda f=function, t=t, dy=dy: forward_backward(f, t, dy), device)
            except ImportError as error:
                print(f"{length:8} {name:26} not installed ({error})")
                continue
            base = base or (forward, both)
            times = f"{forward:10.2f} {both:10.2f}" if both else f"{forward:10.2f} {'-':>10}"
            ratios = f"{forward / base[0]:8.1f}x " + (f"{both / base[1]:8.1f}x" if both else f"{'-':>8}")
            print(f"{length:8} {name:26} {times} {ratios}")
            rows.append({"length": length, "name": name, "forward_ms": forward, "forward_backward_ms": both})
    return rows


def first(device: str) -> str:
    return next(iter(CONTENDERS[device]))


def linearity_table(device: str, lengths: list[int], channels: int, states: int) -> list[dict]:
    function = CONTENDERS[device][first(device)][0]
    print(f"\n{first(device)} alone, batch 1, {channels} channels, {states} states: is it linear?")
    print(f"{'length':>8} {'forward ms':>12} {'fwd+bwd ms':>12} {'ns/position':>12}")
    rows = []
    for length in lengths:
        t = make_inputs(1, length, channels, states, device=device)
        dy = torch.ones_like(t["u"])
        forward = best_ms(lambda t=t: forward_only(function, t), device)
        both = best_ms(lambda t=t, dy=dy: forward_backward(function, t, dy), device)
        print(f"{length:8} {forward:12.1f} {both:12.1f} {both * 1e6 / length:12.0f}")
        rows.append({"length": length, "forward_ms": forward, "forward_backward_ms": both})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--max-length", type=int, default=1 << 20, help="longest sequence (default: 1048576)")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own number)")
    parser.add_argument("--memory", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(*options.memory)
        return 0
    if options.device not in CONTENDERS:
        parser.error(f"--device {options.device}: nothing to measure there; devices: {', '.join(CONTENDERS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    where = f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"{platform.machine()}, {where}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    for name, module in backends("selective_scan").items():
        print(f"back end {name}: {module.unavailable() or 'available'}")
    failures = gate(device)
    if failures:
        print(f"parity gate is red for {', '.join(failures)}: nothing was timed")
        return 1
    lengths = [n for n in (256, 1024, 4096, 16384) if n <= options.max_length]
    long = [n for n in (16384, 65536, 262144, 1048576) if n <= options.max_length]
    result = {
        "benchmark": "scan",
        "device": device,
        "where": where,
        "torch": torch.__version__,
        "compare": compare_table(device, (1, options.channels, options.states), lengths),
        "linearity": linearity_table(device, long, 64, options.states),
        "memory": [],
    }
    if device == "cpu" and os.path.exists("/proc/self/clear_refs"):
        print("\npeak memory of forward + backward, 64 channels, over inputs + outputs (gradients included)")
        for n in long:
            row = memory_row(n, 64, options.states)
            result["memory"].append(row)
            needed, peak = (row[k] / 2**20 for k in ("inputs_outputs_bytes", "peak_bytes"))
            print(f"{n:8} {needed:10.0f} MiB needed {peak:10.0f} MiB peak {row['ratio']:6.2f}x")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
