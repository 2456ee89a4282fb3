"""Make a function a torch operator, as torch.library.custom_op does, without importing the compiler at the first call.

custom_op wraps kernels so that their first call imports torch._dynamo (about two seconds that a process which compiles
nothing should not pay). The functions it is made of do not.
"""

from collections.abc import Callable

import torch


def operator(name: str, devices: str | None = None) -> Callable[[Callable], torch._ops.OpOverload]:
    """Decorator: define "seqlab::<name>" with the schema of the function's annotations, mutating nothing, and run the
    function for it on `devices` ("cpu", "cuda"; None: any). The operator takes the function's place.

    It wants a fake and a gradient registered too: `torch.library.register_fake(op, ...)`,
    `torch.library.register_autograd(op, ...)`.
    """

    def register(function: Callable) -> torch._ops.OpOverload:
        qualified = f"seqlab::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, devices or "default")(function)
        return getattr(torch.ops.seqlab, name).default

    return register


def only_once(backward: torch._ops.OpOverload) -> None:
    """Say of an operator that computes gradients that it has none itself. Without this torch warns, once, and then takes
    its outputs for constants: a gradient penalty, a Hessian or a sharpness would be wrong and look right."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{backward.name()} has no gradient of its own: only back end 'reference' can be differentiated twice "
            "(backend='reference', or SEQLAB_BACKEND=reference)"
        )

    torch.library.register_autograd(backward, refuse)
