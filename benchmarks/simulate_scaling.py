"""How far sharing one sequence scales: a model of compute and links, not a measurement.

A step on n GPUs, all of which share one sequence (seqlab/training/parallel.py), is a chain of stretches of compute with an
all-gather after each: per layer and direction two in the forward pass (convolution halo, state) and two in the backward
pass; then one all-reduce of the gradients. Every all-gather waits for the slowest
rank. Assumptions, all of them options:

    rate, fixed the time of a layer and direction, forward + backward, is fixed + tokens of the piece / rate / layers: the line
                through the measurements of benchmarks/bench_context_parallel.py, `shared`, divided by the ranks
    alone       tokens/s of one GPU on a sequence of its own, from the same benchmark: what efficiency is measured against
    jitter      standard deviation of a stretch's duration, as a share of it; how far the slowest of n is behind is drawn
                (normal, fixed seed)
    links       a collective among n GPUs takes latency * ceil(log2 n) + bytes received / bandwidth; within a host of 8
                the NVLink pair of numbers, beyond it the network's
    combine     every rank reads the n gathered states three times at the memory's bandwidth
    memory      bytes a token and layer that recomputed blocks keep, plus one block at work

    python benchmarks/simulate_scaling.py                      the table of docs/RESULTS.md
    python benchmarks/simulate_scaling.py --rate 2e6 --fixed 1e-3 --json -
"""

import argparse
import functools
import json
import math
import random
from dataclasses import asdict, dataclass

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (2**20, 2**24, 2**27, 10**9)


@dataclass(frozen=True)
class Machine:
    host: int = 8  # GPUs that NVLink joins
    nvlink: float = 300e9  # bytes/s a GPU receives in an all-gather
    network: float = 40e9  # the same across hosts: 400 Gb/s a GPU, less protocol
    nvlink_latency: float = 8e-6  # s a round of a collective
    network_latency: float = 12e-6
    memory: float = 3.0e12  # bytes/s
    capacity: float = 130e9  # bytes of a GPU that a step may use
    jitter: float = 0.02
    fixed: float = 3.8e-3  # s a layer and direction; these three: H200, the model below, blocks recomputed
    rate: float = 1.55e6  # tokens/s
    alone: float = 1.62e6


@dataclass(frozen=True)
class Model:
    d_model: int = 256
    n_layer: int = 16
    d_state: int = 16
    d_conv: int = 4
    directions: int = 1
    parameters: float = 7e6
    kept: float = 1024.0  # bytes a token and layer (float32 residual stream)
    at_work: float = 10e3  # bytes a token, of the one block at work

    @property
    def d_inner(self) -> int:
        return 2 * self.d_model

    def payloads(self) -> list[float]:
        """Bytes that a rank contributes to the all-gathers of a layer and direction, in order."""
        halo = 2.0 * (self.d_conv - 1) * (self.d_inner + 1)  # bfloat16
        state = 4.0 * self.d_inner * (self.d_state + 1)
        forward = [halo, state]
        backward = [4.0 * self.d_inner * self.d_state, 2.0 * (self.d_conv - 1) * self.d_inner]
        return forward + backward


def collective(machine: Machine, n: int, received: float) -> float:
    """Seconds of a collective among n GPUs in which each receives so many bytes."""
    rounds = math.ceil(math.log2(n))
    near = min(rounds, int(math.log2(machine.host)))
    if n <= machine.host:
        return rounds * machine.nvlink_latency + received / machine.nvlink
    return near * machine.nvlink_latency + (rounds - near) * machine.network_latency + received / machine.network


@functools.cache
def slowest(n: int, draws: int = 200) -> float:
    """How many standard deviations the slowest of n ranks is behind the mean one: the average over draws."""
    random_ = random.Random(n)
    return sum(max(random_.gauss(0.0, 1.0) for _ in range(n)) for _ in range(draws)) / draws


def step(machine: Machine, model: Model, n: int, tokens: float) -> dict:
    """Seconds of a training step of one sequence on n GPUs, and where they go."""
    payloads, units = model.payloads(), model.n_layer * model.directions
    piece = tokens / n
    compute = machine.fixed + piece / machine.rate / units  # of a layer and direction
    waiting = compute * machine.jitter * slowest(n)
    links = sum(collective(machine, n, n * payload) for payload in payloads)
    combine = 3.0 * n * sum(payloads) / machine.memory
    reduce = collective(machine, n, 2 * 4.0 * model.parameters)
    seconds = units * (compute + waiting + links + combine) + reduce
    return {
        "gpus": n,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "efficiency": tokens / seconds / (n * machine.alone),
        "links": (units * (links + combine) + reduce) / seconds,
        "gib": piece * (model.kept * model.n_layer + model.at_work) / 2**30,
        "fits": piece * (model.kept * model.n_layer + model.at_work) <= machine.capacity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for cls in (Machine, Model):
        for name, value in asdict(cls()).items():
            kind = (lambda text: text.lower() in ("1", "true")) if isinstance(value, bool) else type(value)
            parser.add_argument("--" + name.replace("_", "-"), type=kind, default=value)
    parser.add_argument("--json", help="write the rows as JSON to this file; - for standard output")
    options = vars(parser.parse_args())
    machine = Machine(**{name: options[name] for name in asdict(Machine())})
    model = Model(**{name: options[name] for name in asdict(Model())})
    rows = [step(machine, model, n, tokens) for tokens in TOKENS for n in GPUS]
    if options["json"] == "-":
        print(json.dumps({"machine": asdict(machine), "model": asdict(model), "rows": rows}))
        return
    print("Simulated; each cell: million tokens/s, efficiency against n times one GPU, share of links; * does not fit")
    print(f"{'tokens':>14} " + " ".join(f"{n:>5} GPUs     " for n in GPUS))
    for tokens in TOKENS:
        cells = []
        for row in (r for r in rows if r["tokens"] == tokens):
            numbers = f"{row['tokens_per_second'] / 1e6:6.1f} {100 * row['efficiency']:3.0f}% {100 * row['links']:3.0f}%"
            cells.append(numbers if row["fits"] else f"{'*':>16}")
        print(f"{tokens:>14,} " + " ".join(f"{cell:>16}" for cell in cells))
    if options["json"]:
        with open(options["json"], "w") as file:
            json.dump({"machine": asdict(machine), "model": asdict(model), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
