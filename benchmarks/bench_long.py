"""Long sequences on one GPU: time and memory of a whole training step in every memory mode, and what the planner predicts.

    python benchmarks/bench_long.py [--only peer,modes,sweep,planner] [--json FILE]

parity   first, and nothing is timed if it fails: every mode's gradients against the plain ones, float32, every parameter
peer     bidirectional, d_model 256, 16 layers, 1 x 2^20, bfloat16, with AdamW: a stack made of mamba_ssm's fused block with
         tied projections, flips and checkpointing, where mamba_ssm is installed
modes    our step, bidirectional and causal, of the same size: tokens/s and peak memory by length, 2^14 to 2^24, in every mode
sweep    the same step in pieces of 2^15 to 2^18 tokens
planner  predicted and measured peak of a dozen models

Median of the repeats after a warm-up step, CUDA events; peaks are the allocator's, weights and optimiser included. Tables,
and one JSON line at the end.
"""

import argparse
import gc
import json
import statistics
import sys
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seqlab.backbones.mamba import Block
from seqlab.training import memory as modes
from seqlab.training import planner
from seqlab.training.memory import Memory
from tasks.language_modeling import DnaConfig, LanguageObjective, build_dna_model, example_batch

GIB = 2**30
CAUSAL = {"direction": "causal", "d_model": 256, "n_layer": 16}
BOTH = {"direction": "bidirectional", "d_model": 256, "n_layer": 16}
MODELS = [  # none of them is what the planner was tried on while it was written
    ("plain", 8, 4096, {"d_model": 192, "n_layer": 6}),
    ("plain", 1, 200_000, {"direction": "bidirectional", "d_model": 128, "n_layer": 5}),
    ("plain", 3, 50_001, {"d_model": 320, "n_layer": 4}),
    ("block", 1, 300_000, {"d_model": 256, "n_layer": 10}),
    ("states", 1, 150_000, {"direction": "bidirectional", "d_model": 256, "n_layer": 6}),
    ("states", 4, 40_000, {"d_model": 320, "n_layer": 5}),
    ("subtract", 1, 250_000, {"direction": "bidirectional", "d_model": 256, "n_layer": 12}),
    ("block", 2, 131_072, {"direction": "bidirectional", "d_model": 192, "n_layer": 12, "tie_projections": False}),
    ("chunked", 1, 1_500_000, {"d_model": 128, "n_layer": 12}),
    ("chunked", 1, 900_000, {"d_model": 384, "n_layer": 8, "dropout": 0.1}),
    ("layerwise", 1, 400_000, {"direction": "bidirectional", "d_model": 256, "n_layer": 6, "strand": "equivariant"}),
    ("offload", 1, 800_000, {"direction": "bidirectional", "d_model": 192, "n_layer": 10}),
]


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def config_of(changes: dict, context: int) -> DnaConfig:
    from seqlab.config import from_dict

    return from_dict(DnaConfig, {"model": changes, "data": {"context": context}, "train": {"tokens_per_step": 1 << 26}})


class Ours:
    """A model, its task, a batch of random bases and AdamW on the GPU."""

    def __init__(self, changes: dict, rows: int, length: int):
        torch.manual_seed(0)
        self.config = config_of(changes, length)
        self.task = LanguageObjective(self.config)
        self.model = build_dna_model(self.config.model).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = {k: v.cuda() for k, v in example_batch(self.config, rows, length).items()}

    def step(self, memory: Memory):
        modes.prepare(memory, self.model)
        weight = self.task.weight(self.batch)

        def run():
            with torch.autocast("cuda", torch.bfloat16):
                loss = modes.backward(memory, self.model, self.task, self.batch, 1.0 / weight)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss

        return run


class PeerBlock(nn.Module):
    """mamba_ssm's fused block in both directions, projections tied, the second on a flipped copy; fp32 residual."""

    def __init__(self, d_model: int, both: bool):
        super().__init__()
        from mamba_ssm.modules.mamba_simple import Mamba

        self.norm = nn.RMSNorm(d_model)
        self.there = Mamba(d_model)
        self.back = Mamba(d_model) if both else None
        if both:
            self.back.in_proj, self.back.out_proj = self.there.in_proj, self.there.out_proj

    def forward(self, x):
        h = self.norm(x)
        y = self.there(h)
        return x + (y if self.back is None else y + self.back(h.flip(1)).flip(1))


class Peer(nn.Module):
    def __init__(self, d_model: int, n_layer: int, both: bool):
        super().__init__()
        self.embedding = nn.Embedding(16, d_model)
        self.layers = nn.ModuleList(PeerBlock(d_model, both) for _ in range(n_layer))
        self.norm = nn.RMSNorm(d_model)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return F.linear(self.norm(x), self.embedding.weight)


def peer_step(d_model: int, n_layer: int, length: int, both: bool):
    torch.manual_seed(0)
    model = Peer(d_model, n_layer, both).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(7, 11, (1, length + 1), device="cuda")

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(run, repeats: int, warm: int = 1) -> tuple[float, float]:
    """(milliseconds, peak GiB)."""
    for _ in range(warm):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / GIB


def attempt(name: str, length: int, make, repeats: int, warm: int, results: list) -> dict | None:
    """Measure, print a line, go on after a failure."""
    release()
    try:
        ms, peak = measure(make(), repeats, warm)
    except torch.OutOfMemoryError:
        print(f"  {name:<34} {length:>10,}   out of memory", flush=True)
        results.append({"name": name, "length": length, "out_of_memory": True})
        return None
    except Exception as error:
        traceback.print_exc(limit=3)
        print(f"  {name:<34} {length:>10,}   failed: {error}", flush=True)
        return None
    finally:
        release()
    rate = length / ms * 1e3
    print(f"  {name:<34} {length:>10,} {ms:>10,.1f} ms {rate:>11,.0f} tokens/s {peak:>7.2f} GiB", flush=True)
    results.append({"name": name, "length": length, "ms": ms, "tokens_per_second": rate, "peak_gib": peak})
    return results[-1]


# -- parity ----------------------------------------------------------------------------------------------------------
def gradients(model, task, memory: Memory, batch) -> dict:
    model.zero_grad(set_to_none=True)
    modes.prepare(memory, model)
    torch.manual_seed(3)
    loss = modes.backward(memory, model, task, batch, 1.0 / task.weight(batch))
    return {"loss": loss.clone(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def parity(results: list) -> None:
    """Raises AssertionError if any gradient of any mode is off by more than 1e-5."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for changes, names, length, chunk in (
        (CAUSAL, ("block", "chunked"), 20_011, 3001),
        (BOTH, ("block", "layerwise", "offload"), 20_011, 3001),
        ({**BOTH, "strand": "equivariant"}, ("layerwise", "offload"), 9001, 2777),
        (CAUSAL, ("states", "subtract"), 20_011, 1),
        (BOTH, ("states", "subtract"), 20_011, 1),
    ):
        run = Ours(changes, 1, length)
        names = [name for name in names if modes.unavailable(name, run.model, run.task, torch.device("cuda")) is None]
        plain = gradients(run.model, run.task, Memory(), run.batch)
        for name in names:
            memory = Memory(name, chunk if name in modes.CUTTING else None)
            found = gradients(run.model, run.task, memory, run.batch)
            errors = {k: ((found[k] - g).double().norm() / g.double().norm()).item() for k, g in plain.items()}
            worst = max(errors, key=errors.get)
            kind = f"{changes['direction']}{' equivariant' if 'strand' in changes else ''}, {changes['n_layer']} layers"
            print(f"  {kind:<36} {name:<10} {errors[worst]:.1e} ({worst})", flush=True)
            results.append({"kind": kind, "mode": name, "worst": errors[worst]})
            assert errors[worst] < 1e-5, f"{name}: {worst} is off by {errors[worst]:.1e}: no timing of a wrong answer"
        release()


# -- speed and memory ------------------------------------------------------------------------------------------------
def ours(changes: dict, length: int, memory: Memory):
    return lambda: Ours(changes, 1, length).step(memory)


def peer(results: list, repeats: int) -> None:
    """A stack made of mamba_ssm's fused block, every block checkpointed."""
    try:
        import mamba_ssm  # noqa: F401
    except Exception as error:
        print(f"  mamba_ssm is not here ({error})")
        return
    attempt("bidirectional, mamba_ssm, blocks", 1 << 20, lambda: peer_step(256, 16, 1 << 20, True), repeats, 1, results)


def by_length(results: list, chunk: int, powers: range, repeats: int, wanted: list[str]) -> None:
    """A mode that has run out of memory is not tried at longer lengths."""
    causal, both = ("states", "plain", "subtract", "block", "chunked"), ("states", "plain", "subtract", "block", "layerwise", "offload")
    for changes, names in ((BOTH, both), (CAUSAL, causal)):
        kind = changes["direction"]
        for name in (name for name in names if name in wanted):
            for power in powers:
                length = 1 << power
                if name == "offload" and 4 * 256 * 16 * length > 40 * GIB:
                    break  # of host memory, which takes long to lock
                memory = Memory(name, chunk // (2 if name == "offload" else 1) if name in modes.CUTTING else None)
                times = (repeats, 1) if power <= 20 else (1, 0)
                if attempt(f"{kind}, {name}", length, ours(changes, length, memory), *times, results) is None:
                    break


def sweep(results: list, repeats: int) -> None:
    """How much the size of a piece matters."""
    for power in (15, 16, 17, 18):
        for kind, changes, mode in (("causal", CAUSAL, "chunked"), ("bidirectional", BOTH, "layerwise")):
            memory = Memory(mode, 1 << power)
            attempt(f"{kind}, {mode}, pieces of 2^{power}", 1 << 20, ours(changes, 1 << 20, memory), repeats, 1, results)


def planned(results: list, chunk: int) -> None:
    for mode, rows, length, changes in MODELS:
        release()
        try:
            run = Ours(changes, rows, length)
            memory = Memory(mode, chunk if mode in modes.CUTTING else None)
            small = planner.resize(run.batch, 1, 1024)
            probe = planner.Probe(run.model, run.task, small, rows, length, True)
            load = planner.load_of(run.model, run.batch, 1, False, rows, length)
            found = planner.estimate(probe, load, memory, planner.capacity(probe.device), planner.host_capacity())
            ms, peak = measure(run.step(memory), 1)
            ratio = found.peak / GIB / peak
            print(
                f"  {mode:<10} {rows} x {length:<10,} predicted {found.peak / GIB:6.2f} GiB, measured {peak:6.2f} ({ratio:.3f}); "
                f"predicted {1e3 * found.step_seconds:8.1f} ms, measured {ms:8.1f}  {json.dumps(changes)}",
                flush=True,
            )
            results.append({"mode": mode, "rows": rows, "length": length, "predicted": found.peak / GIB, "measured": peak,
                            "ratio": ratio, "predicted_ms": 1e3 * found.step_seconds, "ms": ms, **changes})  # fmt: skip
        except Exception as error:
            traceback.print_exc(limit=3)
            print(f"  {mode} {rows} x {length}: failed: {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="peer,modes,sweep,planner")
    parser.add_argument("--chunk", type=int, default=1 << 18)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--powers", default="14,25,2", help="range of lengths under modes: from, to, step")
    parser.add_argument("--blocks", choices=("default", "fused", "separate"), default="default", help="Mamba blocks as one operator")
    parser.add_argument("--names", default=",".join(modes.MODES), help="memory modes under modes")
    parser.add_argument("--no-parity", action="store_true", help="time without checking first")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.blocks != "default":
        Block.fuse = options.blocks == "fused"
    chosen, powers = options.only.split(","), range(*map(int, options.powers.split(",")))
    result = {"benchmark": "long", "device": torch.cuda.get_device_name(), "torch": torch.__version__, "fused": Block.fuse}
    print(f"{result['device']}, torch {result['torch']}, pieces of {options.chunk:,} tokens, fused blocks: {Block.fuse}", flush=True)
    for name, run in (
        ("parity", parity),
        ("peer", lambda r: peer(r, options.repeats)),
        ("modes", lambda r: by_length(r, options.chunk, powers, options.repeats, options.names.split(","))),
        ("sweep", lambda r: sweep(r, options.repeats)),
        ("planner", lambda r: planned(r, options.chunk)),
    ):
        if name in chosen or (name == "parity" and not options.no_parity):
            print(name, flush=True)
            run(result.setdefault(name, []))
    if options.json:
        options.json.write_text(json.dumps(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
