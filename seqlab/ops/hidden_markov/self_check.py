"""Compare a back end of hidden_markov with the float64 reference on this machine, quickly: what `seqlab doctor` shows."""

import torch

from seqlab.ops.hidden_markov import BACKENDS, hidden_markov, reference

ROWS, LENGTH, MODELS, CONTEXTS, STATES = 3, 150, 2, 21, 7


def self_check(backend: str) -> float:
    """Largest error of log p and of q, relative to the largest of each. About 1e-6 is right.

    Raises RuntimeError where the back end cannot run here; the message is its reason.
    """
    if (reason := BACKENDS[backend].unavailable()) is not None:
        raise RuntimeError(f"hidden_markov: back end {backend!r} is not available: {reason}")
    g = torch.Generator().manual_seed(0)
    base = torch.randint(-1, 4, (ROWS, LENGTH), generator=g, dtype=torch.int32)
    context = torch.randint(0, CONTEXTS, (ROWS, LENGTH), generator=g, dtype=torch.int32)
    tables = [
        torch.randn(*shape, generator=g).softmax(-1)
        for shape in ((MODELS, CONTEXTS, STATES, 4), (MODELS, STATES, STATES), (ROWS, MODELS, STATES))
    ]
    device = "cuda" if backend == "cuda" else "cpu"
    found = hidden_markov(*(x.to(device) for x in (base, context, *tables)), backend=backend)
    exact = reference.run(base, context, *(x.double() for x in tables))
    errors = [((f.cpu().double() - e).abs().max() / e.abs().max()).item() for f, e in zip(found, exact, strict=True)]
    return max(error if error == error else float("inf") for error in errors)
