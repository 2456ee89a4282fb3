"""What the processes of test_parallel.py run: a case's model on this rank's piece, and what came out of it."""

import contextlib
import shutil
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from seqlab.backbones.bidirectional import BidirectionalMamba
from seqlab.backbones.mamba import BackboneConfig, Mamba
from seqlab.backbones.strand import ReverseComplementEquivariant
from seqlab.training.parallel import share_mixers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops_cuda"))
COMPILER = shutil.which("g++")


@dataclass(frozen=True)
class Case:
    """A model and how 1, 2, 3 or 4 ranks cut its sequence: `pieces` of four; fewer ranks take neighbours together."""

    name: str
    pieces: tuple[int, int, int, int]
    options: dict = field(default_factory=dict)
    masked: bool = False
    two_strands: bool = False
    checkpoint_blocks: bool = False
    fused: bool = False  # as a fused block on a GPU, its kernels run on the processor, in float32

    def lengths(self, ranks: int) -> list[int]:
        groups = torch.arange(4) * ranks // 4
        return [sum(n for n, g in zip(self.pieces, groups) if g == rank) for rank in range(ranks)]


CASES = [
    Case("causal", (8, 7, 7, 8)),
    Case("causal uneven", (3, 20, 1, 13), {"d_conv": 5, "d_state": 3}),
    Case("causal pieces shorter than the convolution", (1, 2, 1, 1), {"d_conv": 4}),
    Case("causal pieces of one, convolution of eight", (1, 1, 1, 1), {"d_conv": 8, "n_layer": 3}),
    Case("causal with empty pieces", (5, 0, 2, 9)),
    Case("causal without convolution", (4, 5, 3, 5), {"d_conv": 1}),
    Case("causal masked", (6, 2, 3, 10), masked=True),
    Case("causal checkpointed", (6, 2, 5, 4), checkpoint_blocks=True),
    Case("causal ten times as long", (80, 70, 70, 80)),
    Case("causal long memory", (40, 30, 35, 41), {"dt_min": 1e-4, "dt_max": 1e-3}),
    Case("bidirectional", (8, 7, 7, 8), {"direction": "bidirectional"}),
    Case("bidirectional short pieces", (1, 1, 2, 1), {"direction": "bidirectional", "d_conv": 4}),
    Case("bidirectional masked", (6, 2, 3, 10), {"direction": "bidirectional"}, masked=True),
    Case(
        "bidirectional untied, multiplied, checkpointed",
        (9, 3, 0, 4),
        {"direction": "bidirectional", "tie_projections": False, "combine": "multiply"},
        checkpoint_blocks=True,
    ),
    Case("both strands", (5, 6, 2, 1), {"direction": "bidirectional"}, two_strands=True),
    Case("fused causal", (9, 2, 3, 12), fused=True),
    Case("fused causal masked, checkpointed", (9, 12, 5, 6), masked=True, checkpoint_blocks=True, fused=True),
    Case("fused bidirectional", (7, 2, 2, 9), {"direction": "bidirectional"}, fused=True),
    Case("fused both strands masked", (7, 6, 4, 9), {"direction": "bidirectional"}, True, True, fused=True),
    Case("both strands masked", (3, 6, 2, 4), {"direction": "bidirectional"}, masked=True, two_strands=True),
]


class Positionwise(torch.nn.Module):
    """A backbone with the interface of a token model, but on vectors, so that the input has a gradient too."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, state=None, mask=None, return_state=False):
        return self.backbone(x, state, mask, return_state=return_state)


class TwoStrands(ReverseComplementEquivariant):
    """The same arrangement of strands on vectors: complementing is a permutation of the channels."""

    def forward(self, x, state=None, mask=None, return_state=False):
        both = torch.cat([x, x.flip(1)[..., self.complement]])
        both_mask = None if mask is None else torch.cat([mask, mask.flip(1)])
        one, other = self.model(both, mask=both_mask, return_state=False)[0].chunk(2)
        return one + other.flip(1)[..., self.complement], None


def build(case: Case) -> torch.nn.Module:
    torch.manual_seed(3)
    config = BackboneConfig(**{"d_model": 6, "n_layer": 2, "d_state": 4, **case.options})
    backbone = (Mamba if config.direction == "causal" else BidirectionalMamba)(config).double()
    backbone.checkpoint_blocks = case.checkpoint_blocks
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model = Positionwise(backbone)
    return TwoStrands(model, torch.arange(5, -1, -1)).double() if case.two_strands else model


def data(case: Case):
    """x (b l d), mask (b l) or None, the weights of the loss (b l d)."""
    generator = torch.Generator().manual_seed(4)
    x, weight = (torch.randn(2, sum(case.pieces), 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = None
    if case.masked:
        mask = torch.rand(2, sum(case.pieces), generator=generator) > 0.4
        x = torch.where(mask[..., None], x, 7.0)  # the residual stream passes masked positions; mixers must not see them
    return x, mask, weight


@contextlib.contextmanager
def fused_blocks():
    """Blocks take their fused path, on emulated kernels."""
    import emulate

    from seqlab.backbones import mamba
    from seqlab.ops.block import cuda, rows
    from seqlab.ops.causal_conv1d import cuda as conv
    from seqlab.ops.selective_scan import cuda as scan

    with contextlib.ExitStack() as patches:
        for module in (conv, scan, rows):
            device = emulate.Device(module.SOURCE, module.KERNELS, 2, 2)
            patches.enter_context(mock.patch.object(module, "_device", lambda x, device=device: device))
        patches.enter_context(mock.patch.object(mamba.block, "unavailable", lambda *arguments: None))
        taken = patches.enter_context(mock.patch.object(cuda, "_forward", wraps=cuda._forward))
        yield
        assert taken.called


def outcome(case: Case, start: int = 0, stop: int | None = None, group=None) -> dict:
    """Output, gradients and traffic of the positions start .. stop, alone or as a rank of `group`."""
    fused = case.fused and group is not None
    kind = torch.float32 if fused else torch.float64
    model = build(case).to(kind)
    ranks = None if group is None else share_mixers(model, group)
    x, mask, weight = (t if t is None else t[:, start:stop] for t in data(case))
    x, weight = x.to(kind, copy=True).requires_grad_(), weight.to(kind)
    with fused_blocks() if fused else contextlib.nullcontext():
        y, _ = model(x, mask=mask)
        (y * weight).sum().backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    traffic = None if ranks is None else (ranks.traffic.collectives, ranks.traffic.bytes)
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients, "traffic": traffic}


def main(rank: int, world: int, store: str, out: str) -> None:
    """Every case on groups of the first 1, 2, ... `world` ranks."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=180)
    )
    results = {}
    for size in range(1, world + 1):
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        for case in CASES:
            if case.fused and not COMPILER:
                continue
            lengths = case.lengths(size)
            results[size, case.name] = outcome(case, sum(lengths[:rank]), sum(lengths[: rank + 1]), group)
    torch.save(results, Path(out) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
