"""One whole training step on a GPU (forward, backward, AdamW, bfloat16 autocast) against a stack on mamba_ssm's fused block.

    python benchmarks/bench_train_gpu.py [--json FILE] [--profile DIR] [--layers 8] [--shapes 1x1048576 ...] [--skip-peer]

The model is bidirectional with tied projections (d_model 256, 16 symbols). The peer is the same model with every mixer
replaced by two of mamba_ssm's `Mamba` modules that share in_proj and out_proj, the second on the flipped sequence.

Parity first: loss and every gradient of both from the same weights; nothing is timed if they differ by more than bfloat16
explains. Then the median of several steps and the peak of allocated memory, a table, and one JSON line. --profile writes
torch.profiler's table of one step.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seqlab.model import ModelConfig, build_model
from seqlab.training import memory
from seqlab.training.memory import Memory

LIMIT = 0.03
"""Of the relative difference of a gradient; two bfloat16 computations of this size differ by about 0.01."""


class PeerMixer(nn.Module):
    """mamba_ssm's fused block in both directions, with our parameters."""

    def __init__(self, ours):
        from mamba_ssm.modules.mamba_simple import Mamba

        super().__init__()
        self.config, c = ours.config, ours.config
        for name in ("mamba_fwd", "mamba_rev"):
            mixer = Mamba(c.d_model, d_state=c.d_state, d_conv=c.d_conv, expand=c.expand, dt_rank=c.rank, layer_idx=0)
            mixer.load_state_dict(getattr(ours, name).state_dict())
            setattr(self, name, mixer)
        self.mamba_rev.in_proj, self.mamba_rev.out_proj = self.mamba_fwd.in_proj, self.mamba_fwd.out_proj

    def forward(self, x, state=None, mask=None, return_state=False):
        return self.mamba_fwd(x) + self.mamba_rev(x.flip(1)).flip(1), None


def build(layers: int, d_model: int = 256, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(ModelConfig(d_model=d_model, n_layer=layers, direction="bidirectional")).cuda()


def peer_of(model: nn.Module) -> nn.Module:
    peer = copy.deepcopy(model).cpu()
    for layer in peer.backbone.layers:
        layer.mixer, layer.fuse = PeerMixer(layer.mixer), False
    return peer.cuda()


def separate(model: nn.Module) -> nn.Module:
    """The same model on separate operators."""
    other = copy.deepcopy(model)
    for layer in other.backbone.layers:
        layer.fuse = False
    return other


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(ids, return_state=False)[0]
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = loss_of(model, ids)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def worst(a: dict, b: dict) -> tuple[float, str]:
    differences = [(float((a[n].float() - b[n].float()).norm() / b[n].float().norm()), n) for n in b]
    return max((float("inf") if d != d else d, n) for d, n in differences)


def gate(with_peer: bool) -> dict:
    """Largest difference of loss and gradients: fused against separate operators, and against the peer."""
    model = build(2)
    ids = torch.randint(7, 11, (2, 5000), device="cuda")
    fused = gradients(model, ids)
    found = {"separate operators": worst(fused, gradients(separate(model), ids))}
    memory.prepare(Memory("states"), model)
    found["memory states"] = worst(gradients(model, ids), fused)
    memory.prepare(Memory(), model)
    if with_peer:
        found["mamba_ssm"] = worst(fused, gradients(peer_of(model), ids))
    for name, (difference, where) in found.items():
        print(f"parity: fused block against {name}: {difference:.1e} ({where})", flush=True)
    if max(d for d, _ in found.values()) > LIMIT:
        sys.exit("parity failed: nothing was timed")
    return found


def step_of(model: nn.Module, ids: torch.Tensor):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(model: nn.Module, ids: torch.Tensor, repeats: int, mode: str) -> dict:
    """Median milliseconds of a step in a memory mode and peak GiB; or why there is none."""
    memory.prepare(Memory(mode), model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step, times = step_of(model, ids), []
    try:
        for _ in range(repeats + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    except torch.OutOfMemoryError:
        model.zero_grad()
        return {"failed": "out of memory"}
    ms = statistics.median(times[2:])
    return {"ms": ms, "gib": torch.cuda.max_memory_allocated() / 2**30, "tokens_per_s": ids.numel() / ms * 1e3}


def profile(model: nn.Module, ids: torch.Tensor, target: Path) -> None:
    step = step_of(model, ids)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as p:
        step()
        torch.cuda.synchronize()
    target.mkdir(parents=True, exist_ok=True)
    table = p.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    (target / "profile.txt").write_text(table)
    rows = [(e.self_device_time_total, e.count, e.key) for e in p.key_averages() if e.self_device_time_total > 0]
    rows = [r for r in rows if not r[2].startswith(("aten::", "Optimizer", "cuda", "autograd::"))]
    for micros, count, name in sorted(rows, reverse=True)[:32]:
        print(f"{micros / 1e3:9.2f} ms {count:5d}  {name[:110]}")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shapes", nargs="*", default=["8x16384", "1x131072", "1x1048576"], help="batch x length")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpoint", action="store_true", help="also with block checkpointing")
    parser.add_argument("--separate", action="store_true", help="also our separate operators")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--peer-checkpoint", action="store_true", help="the peer with checkpointing only (deep stacks)")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU that torch can use (see nvidia-smi)")
    with_peer = not options.skip_peer
    if with_peer:
        try:
            import mamba_ssm.modules.mamba_simple  # noqa: F401
        except Exception as e:
            print(f"mamba_ssm is left out: {e}")
            with_peer = False
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": options.layers}
    result["parity"] = gate(with_peer)
    print(f"training step, {options.layers} layers, d_model 256, bidirectional, bfloat16, {result['gpu']}")
    result["steps"] = []
    for shape in options.shapes:
        batch, length = (int(n) for n in shape.split("x"))
        ids = torch.randint(7, 11, (batch, length), device="cuda")
        model = build(options.layers)
        cases = [("seqlab", model, "plain"), ("seqlab, memory states", model, "states")]
        cases += [("seqlab, checkpointing", model, "block")] if options.checkpoint else []
        cases += [("seqlab, separate operators", separate(model), "plain")] if options.separate else []
        if with_peer:
            peer = peer_of(model)
            cases += [] if options.peer_checkpoint else [("mamba_ssm", peer, "plain")]
            cases += [("mamba_ssm, checkpointing", peer, "block")] if options.checkpoint or options.peer_checkpoint else []
        for name, which, mode in cases:
            row = {"shape": shape, "model": name, **measure(which, ids, options.repeats, mode)}
            result["steps"].append(row)
            text = row.get("failed") or f"{row['ms']:9.1f} ms {row['gib']:7.2f} GiB {row['tokens_per_s']:12,.0f} tokens/s"
            print(f"  {shape:<12} {name:<28} {text}", flush=True)
        memory.prepare(Memory(), model)
        if options.profile and shape == options.shapes[-1]:
            profile(model, ids, options.profile)
        del model, cases, which
        if with_peer:
            del peer
        torch.cuda.empty_cache()
    line = json.dumps(result)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
