"""A stack of fused blocks that keeps no block's input: going back, inputs are recovered from outputs.

    x_{k+1} = x_k + y_k W_out        y_k: the sum of the scans' outputs, (b l d), kept anyway for the gradient of W_out

so x_k = x_{k+1} - y_k W_out, the same product as in the forward pass, to the bit; adding and subtracting it costs one rounding
of x in float32. (r | B | C) is made again too, from the convolution that the backward pass makes again in any case. Kept in
all: the sum of y and the scan's states, 1.2 of 2.4 kB a token and block at d_model 256 in bfloat16, both directions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlab.ops.block import cuda


class Stack(torch.autograd.Function):
    """Stack.apply(specs, x, mask, *parameters) -> out like x (b l d_model).

    One spec a block (residual, no states returned), and its parameters in the order of cuda.Block's: norm_weight, in_weight,
    in_bias, out_weight, out_bias, *directions. x is float32 or the specs' dtype.
    """

    @staticmethod
    def forward(ctx, specs: tuple[cuda.Spec, ...], x: Tensor, mask: Tensor | None, *parameters):
        each = len(parameters) // len(specs)
        x, kept = x.contiguous(), []
        for k, spec in enumerate(specs):
            mine = parameters[k * each : (k + 1) * each]
            x, _, _, (total, *rest) = cuda._apart(cuda._forward, spec, x, mask, None, None, *mine)
            kept.append([total, *rest[1::3]])  # without (r | B | C)
        ctx.specs, ctx.each = specs, each
        # this node's own work: nothing that autograd must watch, and to be freed block by block on the way back
        ctx.kept, ctx.last = kept, x.detach()
        ctx.save_for_backward(mask, *parameters)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor):
        mask, *parameters = ctx.saved_tensors
        if ctx.kept is None:
            raise RuntimeError("a stack of fused blocks goes back once; run it forward again")
        kept, x, ctx.kept, ctx.last = ctx.kept, ctx.last, None, None
        gradients: list[Tensor | None] = []
        for k in range(len(ctx.specs) - 1, -1, -1):
            mine, own = parameters[k * ctx.each : (k + 1) * ctx.each], kept.pop()
            x = cuda._apart(_input, ctx.specs[k], x, own[0], *mine)
            grads = cuda._apart(_backward, ctx.specs[k], x, mask, own, dout, *mine)
            dout = grads[0]
            found = [None if g is None else g.to(t.dtype) for t, g in zip(mine, grads[4:], strict=True)]
            gradients = [*found, *gradients]
        return None, dout, None, *gradients


def _input(spec: cuda.Spec, out: Tensor, total: Tensor, norm_weight, in_weight, in_bias, out_weight, out_bias, *rest) -> Tensor:
    added = F.linear(total, cuda._half(out_weight, spec.dtype), cuda._half(out_bias, spec.dtype))
    return torch.sub(out, added)


def _backward(spec: cuda.Spec, x: Tensor, mask, own: list[Tensor], dout: Tensor, *parameters):
    """cuda._backward without (r | B | C); takes `own` apart, so that what it holds can be freed on the way."""
    total, *snapshots = own
    own.clear()
    kept = [total]
    for states in snapshots:
        kept += [None, states, None]
    del total, snapshots
    return cuda._backward(spec, (x, mask, None, None, *parameters), kept, dout, None, None)


