"""A training step on sequences that several GPUs share, against one GPU alone.

Parity gate first: a sequence of odd length cut into pieces, loss and every parameter's gradient against the first rank
alone with separate operators, in float32 and bfloat16. Then forward + backward + gradient all-reduce for each length, alone
on one GPU and shared by all, activations kept and blocks recomputed in the backward pass. A table, and one JSON line.

    torchrun --nproc-per-node 2 benchmarks/bench_context_parallel.py
    torchrun --nproc-per-node 2 benchmarks/bench_context_parallel.py --device cpu --d-model 32 --n-layer 2 --lengths 2048
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F

from seqlab.backbones.mamba import Block
from seqlab.model import LanguageModel, ModelConfig
from seqlab.training.parallel import MambaMixer, share_mixers


class Bench:
    def __init__(self, options):
        self.options, self.rank, self.size = options, dist.get_rank(), dist.get_world_size()
        self.device = torch.device(options.device, self.rank if options.device == "cuda" else None)
        torch.manual_seed(0)
        config = ModelConfig(d_model=options.d_model, n_layer=options.n_layer, direction=options.direction)
        self.model = LanguageModel(config).to(self.device)
        self.ranks = share_mixers(self.model, dist.group.WORLD)

    def share(self, on: bool, recompute: bool) -> None:
        self.model.backbone.checkpoint_blocks = recompute
        for module in self.model.modules():
            if isinstance(module, MambaMixer):
                module.ranks = self.ranks if on else None

    def step(self, ids, bf16: bool, shared: bool) -> torch.Tensor:
        """The mean loss of a whole sequence, gradients in place on every rank that takes part."""
        self.model.zero_grad(set_to_none=True)
        target = ids.roll(-1, 1)
        length = ids.shape[1]
        if shared:
            ids, target = (x.tensor_split(self.size, dim=1)[self.rank] for x in (ids, target))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits, _ = self.model(ids, return_state=False)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / length
        loss.backward()
        loss = loss.detach()
        if shared:
            flat = torch.cat([loss.view(1), *(p.grad.flatten() for p in self.model.parameters())])
            dist.all_reduce(flat)
            loss, *grads = flat.split([1, *(p.numel() for p in self.model.parameters())])
            for p, grad in zip(self.model.parameters(), grads):
                p.grad.copy_(grad.view_as(p))
        return loss

    def ids(self, length: int):
        return torch.randint(7, 11, (1, length), generator=torch.Generator().manual_seed(length)).to(self.device)

    def parity(self, length: int, bf16: bool, recompute: bool) -> dict[str, float]:
        """Relative error of the loss and the largest one of any parameter's gradient; rank 0 has the answer."""
        ids = self.ids(length)
        self.share(True, recompute)
        loss = self.step(ids, bf16, True)
        grads = [p.grad.clone() for p in self.model.parameters()]
        if self.rank == 0:
            self.share(False, True)
            fused, Block.fuse = Block.fuse, False
            alone = self.step(ids, bf16, False)
            Block.fuse = fused
            pairs = [(g, p.grad) for g, p in zip(grads, self.model.parameters())]
            worst = max(((g - e).norm() / e.norm().clamp(min=1e-12)).item() for g, e in pairs)
            result = {"loss": abs((loss - alone) / alone).item(), "gradients": worst}
        else:
            result = {}
        dist.barrier()
        return result

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, length: int, shared: bool, recompute: bool) -> dict | None:
        """Median seconds of a step and peak GiB; None where it does not fit."""
        ids, bf16 = self.ids(length), self.device.type == "cuda"
        self.share(shared, recompute)
        seconds, fits = [], True
        self.ranks.traffic.collectives = self.ranks.traffic.bytes = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if shared or self.rank == 0:
            try:
                for _ in range(self.options.repeats + 1):
                    self.sync()
                    start = time.perf_counter()
                    self.step(ids, bf16, shared)
                    self.sync()
                    seconds.append(time.perf_counter() - start)
            except torch.OutOfMemoryError:
                if shared:  # the others wait for this rank: nothing to save
                    raise
                fits = False
                self.model.zero_grad(set_to_none=True)
        dist.barrier()
        if not fits or not seconds:
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else float("nan")
        steps = self.options.repeats + 1
        traffic = (self.ranks.traffic.collectives / steps, self.ranks.traffic.bytes / steps)
        return {"seconds": statistics.median(seconds[1:]), "gib": peak, "traffic": traffic}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--direction", choices=["causal", "bidirectional"], default="causal")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--n-layer", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << 18, 1 << 20, 1 << 21, 1 << 22])
    parser.add_argument("--parity-length", type=int, default=200_001)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recomputed", action="store_true", help="time recomputed blocks alone: what does not fit otherwise")
    options = parser.parse_args()
    if options.device == "cuda":
        import os

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    bench = Bench(options)
    say = print if bench.rank == 0 else lambda *arguments, **options: None
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    say(f"{bench.size} x {name}; {options.direction}, {options.n_layer} layers, d_model {options.d_model}, torch {torch.__version__}")
    result = {"benchmark": "context_parallel", "ranks": bench.size, "device": name, **vars(options), "rows": []}
    for bf16, recompute in ((False, False), (False, True), (True, False), (True, True)):
        errors, limit = bench.parity(options.parity_length, bf16, recompute), 1e-2 if bf16 else 1e-5
        kind = ("bfloat16" if bf16 else "float32") + (", recomputed" if recompute else "")
        result[f"parity_{kind}"] = errors
        if bench.rank == 0:
            say(f"parity {kind}, 1 x {options.parity_length}: loss {errors['loss']:.1e}, gradients {errors['gradients']:.1e}", flush=True)
            assert errors["gradients"] < limit, "no timing of a wrong answer"
    say(f"{'length':>10} {'':<22} {'ms':>9} {'tokens/s':>12} {'GiB':>6}   sent a rank and step")
    ways = (", recomputed",) if options.recomputed else ("", ", recomputed")
    modes = [(f"{who}{way}", who == "shared", bool(way)) for way in ways for who in ("alone", "shared")]
    for length in options.lengths:
        for label, shared, recompute in modes:
            row = bench.time(length, shared, recompute)
            if row is None:
                say(f"{length:>10} {label:<22} does not fit")
                continue
            calls, sent = row["traffic"]
            words = f"{sent / 1024:.0f} KiB in {calls:.0f} all-gathers" if shared else ""
            say(f"{length:>10} {label:<22} {1e3 * row['seconds']:9.1f} {length / row['seconds']:12,.0f} {row['gib']:6.1f}   {words}", flush=True)
            result["rows"].append({"length": length, "mode": label, **row})
    say(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
