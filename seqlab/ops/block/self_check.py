"""Compare the fused block with the separate operators in float64 on this machine, quickly: what `seqlab doctor` shows."""

import copy

import torch
from torch import Tensor, nn

from seqlab.backbones.bidirectional import BidirectionalMamba
from seqlab.backbones.mamba import BackboneConfig
from seqlab.ops import block


def self_check(backend: str = "cuda", device: str = "cuda") -> float:
    """Largest error over the output and every gradient of a bidirectional block, in float32, relative to the largest value
    of each. About 1e-6 is right.

    Raises RuntimeError where the back end cannot run here; the message is its reason.
    """
    if device == "cuda" and (reason := block.BACKENDS[backend].unavailable()) is not None:
        raise RuntimeError(f"block: back end {backend!r} is not available: {reason}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exact = BidirectionalMamba(BackboneConfig(d_model=32, n_layer=1, d_state=8, direction="bidirectional")).layers[0]
    x = torch.randn(2, 150, 32, generator=torch.Generator().manual_seed(0))
    fused = copy.deepcopy(exact).to(device)
    both = fused.mixer.directions()
    found = _results(fused, x.to(device), lambda x: block.mamba_block(x, *fused._operands(both), (False, True))[0])
    wanted = _results(exact.double(), x.double(), lambda x: exact(x, None, None, False)[0])
    errors = [((f.cpu().double() - w).abs().max() / w.abs().max()).item() for f, w in zip(found, wanted, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def _results(layer: nn.Module, x: Tensor, function) -> list[Tensor]:
    """The output, then the gradient of half its square with respect to x and to each parameter."""
    with torch.enable_grad():
        y = function(x.requires_grad_())
        return [y.detach(), *torch.autograd.grad(y.square().sum() / 2, [x, *layer.parameters()])]
