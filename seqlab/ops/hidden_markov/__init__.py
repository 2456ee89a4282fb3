"""hidden_markov: several hidden Markov models follow a sequence, and each says, before every base, how likely A, C, G and T are.

With q_t = P(state at t | bases before t), one model, E its emissions and A its transitions:

    p_t[v]  = sum_s q_t[s] E[context_t, s, v]
    a_t[s]  = q_t[s] E[context_t, s, base_t] / p_t[base_t]       (a_t = q_t where the base is not known)
    q_t+1   = a_t A

which is the forward algorithm (Rabiner 1989, section III), scaled at every step: the log p_t[base_t] of a sequence add up to its
log-likelihood. The tables are constants, so there is no gradient.

Shapes: b batch, l length, m models, k contexts, s states.
"""

from types import ModuleType

import torch
from torch import Tensor

from seqlab.ops import dispatch
from seqlab.ops.hidden_markov import cpu, cuda, reference

BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "cpu": cpu, "reference": reference}
MAX_STATES = 32


@torch.no_grad()
def hidden_markov(
    base: Tensor, context: Tensor, emissions: Tensor, transitions: Tensor, start: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Follow every row with every model.

    Args:
        base: (b l) int32, 0 to 3, anything else where the base is not known.
        context: (b l) int32, 0 to k-1: which emissions hold at this position, for whatever precedes it.
        emissions: (m k s 4) float32, above 0, adding up to 1 over the last dimension.
        transitions: (m s s) float32, from a state (rows) to the next one; rows add up to 1. s is at most 32.
        start: (b m s) float32, q of the first position.
        backend: "auto", or the name of one back end, which is then used or refused, never replaced.

    Returns:
        log p (b l m 4), nats, and q after each position (b l m s), of which the last continues the sequence; float32.
        Each row and model is computed by itself, in the same order whatever its company.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or an unknown back end.
        RuntimeError: the back end asked for cannot run this; lists every back end with its reason.
    """
    _check(base, context, emissions, transitions, start)
    known = not torch.compiler.is_compiling()
    name = dispatch.choose(
        "hidden_markov",
        _modules,
        backend,
        device=base.device.type,
        dtype=emissions.dtype,
        channels=emissions.shape[0],
        batch=base.shape[0] if known else 0,
        length=base.shape[1] if known else 0,
        d_state=emissions.shape[2],
    )
    module = reference if base.numel() == 0 else BACKENDS[name]
    return module.run(*(x.contiguous() for x in (base, context, emissions, transitions, start)))


def _modules() -> dict[str, ModuleType]:
    return BACKENDS


def _check(base, context, emissions, transitions, start) -> None:
    if base.dim() != 2 or base.dtype != torch.int32:
        raise ValueError(f"hidden_markov: base must be (batch length) int32, got {tuple(base.shape)} {base.dtype}")
    if emissions.dim() != 4 or emissions.shape[-1] != 4:
        raise ValueError(f"hidden_markov: emissions must be (models contexts states 4), got {tuple(emissions.shape)}")
    models, _, states, _ = emissions.shape
    if not 1 <= states <= MAX_STATES:
        raise ValueError(f"hidden_markov: emissions have {states} states; allowed: 1 to {MAX_STATES}")
    expected = (
        ("context", context, tuple(base.shape), torch.int32),
        ("emissions", emissions, tuple(emissions.shape), torch.float32),
        ("transitions", transitions, (models, states, states), torch.float32),
        ("start", start, (base.shape[0], models, states), torch.float32),
    )
    for name, x, shape, dtype in expected:
        if tuple(x.shape) != shape or x.dtype != dtype:
            raise ValueError(
                f"hidden_markov: {name} is {tuple(x.shape)} {x.dtype}, expected {shape} {dtype} to go with base "
                f"{tuple(base.shape)} and emissions {tuple(emissions.shape)}"
            )
        if x.device != base.device:
            raise ValueError(f"hidden_markov: {name} is on {x.device}, base on {base.device}; move one of them")
