"""Every scan kernel once in each of its ways, for compute-sanitizer: small sizes, little of torch beside them.

    for tool in memcheck racecheck initcheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 python tests/ops_cuda/sanitize.py
    done

Values are checked too, against the float64 reference on the processor. Without torch's own cache every tensor is an
allocation of its own, so that reading past one, or what nobody wrote, is seen.
"""

import sys

import torch

from seqlab.ops.selective_scan import cuda as scan
from seqlab.ops.selective_scan import reference

FLOAT, HALF = torch.float32, torch.bfloat16
TOLERANCE = {FLOAT: 1e-5, HALF: 4e-3}
CASES = (  # batch, length, channels, states, reverse, masked, D and z and bias and initial state
    (2, 131, 70, 5, False, False, True),
    (1, 77, 64, 16, True, True, True),
    (1, 600, 6, 16, False, False, False),
    (1, 40, 130, 20, True, False, True),
)
SIDES = ((2, 4), (1, 2, 1, 16), (8, 2, 1, 16), (4, 2))
"""Blocks of scan_short.cu: pairs across, warps, blocks of a cluster, steps of a thread going forward."""
CLUSTERS = ((8, 2, 4, 16), (4, 2, 2), (8, 4, 4, 16), (8, 1, 2))
"""The same where the GPU has clusters."""


def check(batch, length, channels, states, reverse, masked, options, dtype, pair=False, fine=False) -> None:
    """Forward and backward of the chosen kernels; exits where a value is wrong. fine: the state of every tile is kept."""
    g = torch.Generator().manual_seed(length)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    u, delta, z, dy = (random(batch, length, channels).to(dtype) for _ in range(4))
    B, C = (random(batch, length, states).to(dtype) for _ in range(2))
    A, dfinal = -torch.rand(channels, states, generator=g) - 1e-4, random(batch, channels, states)
    D, bias, initial = (random(channels), random(channels) - 2, random(batch, channels, states)) if options else (None,) * 3
    inputs = [u, delta, A, B, C, D, z if options else None, bias, initial]
    mask = torch.rand(batch, length, generator=g) > 0.3 if masked else None
    segment = scan.TILE if fine else scan.segment_length(batch, length, channels)
    on = [None if x is None else x.cuda() for x in (*inputs, mask)]
    if pair:  # the same twice, once from each side; the one asked for is looked at
        dfinal, inputs[-1] = torch.zeros_like(dfinal), None
        results = scan.forward_pair((on[:8], on[:8]), on[9], True, segment)
        y, _ = results[reverse]
        grads = scan.backward_pair(dy.cuda(), (on[:8], on[:8]), on[9], [kept for _, kept in results], True, segment)[reverse]
    else:
        y, final, kept, ungated = scan.forward(*on, True, reverse, segment)
        grads = scan.backward(dy.cuda(), dfinal.cuda(), *on, kept, True, reverse, segment, ungated)
    exact = [None if x is None else x.double().requires_grad_() for x in inputs]
    y64, final64 = reference.run(*exact[:8], True, exact[8], mask, reverse, True)
    seen = dy.double() if mask is None else torch.where(mask[..., None], dy.double(), 0.0)
    torch.autograd.backward((y64, final64), (seen, dfinal.double()))
    pairs = [(y, y64)] + ([] if pair else [(final, final64)]) + [(a, x.grad) for a, x in zip(grads, exact, strict=True) if x is not None]
    for number, (a, r) in enumerate(pairs):
        error = float((a.cpu().double() - r.detach()).norm() / r.detach().norm())
        if not error < TOLERANCE[dtype]:
            sys.exit(f"result {number} is off by {error:.1e}: {batch, length, channels, states, reverse, masked, options, dtype}")


def forget() -> None:
    """What was found out about calls, the choice of kernels included."""
    for memory in (scan._recipes, scan._recent):
        memory.clear()


def main() -> None:
    choose, cases = scan.short, 0
    for dtype in (FLOAT, HALF):
        scan.short = lambda *a, **k: None
        forget()
        for case in CASES:
            check(*case, dtype)
            check(*case, dtype, fine=True)
            cases += 2
        clusters = torch.cuda.get_device_capability() >= (9, 0)
        for case, sides in [*zip(CASES, SIDES, strict=True), *(zip(CASES, CLUSTERS, strict=True) if clusters else ())]:
            forward, backward = scan.Sides(*sides), scan.Sides(*sides[:3])
            backward = backward._replace(blocks=backward.blocks * forward.tile // backward.tile if clusters and backward.blocks > 1 else 1)
            scan.short = lambda *a, pair=(forward, backward), **k: pair[len(a) > 6 and a[6]]
            forget()
            check(*case, dtype)
            check(*case, dtype, True)
            cases += 2
    scan.short = choose
    print(f"{cases} cases agree with the reference")


if __name__ == "__main__":
    main()
