"""Token embeddings whose gradient has the same bits on every run."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlab.ops import dispatch

ROWS = 1 << 16
"""Positions whose one-hot matrix exists at a time in the backward pass."""


class _Lookup(torch.autograd.Function):
    """weight (v d), ids (...) -> (... d). torch's own gradient adds rows with atomics on a GPU, in any order; here it is
    one-hot(ids)^T times the incoming gradient, a matrix product, piece by piece in a fixed order."""

    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocab_size = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (ids,) = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.vocab_size, grad.shape[1], dtype=wide)
        for rows, chosen in zip(grad.split(ROWS), ids.reshape(-1).split(ROWS), strict=True):
            one_hot = rows.new_zeros(len(rows), ctx.vocab_size).scatter_(1, chosen[:, None], 1.0)
            total += one_hot.T @ rows
        return total.to(grad.dtype), None


class TokenEmbedding(nn.Embedding):
    """nn.Embedding for small vocabularies (symbols, samples, classes): ids (...) of any integer type -> (... d)."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be integers, got {ids.dtype} of shape {tuple(ids.shape)}; one-hot letters: letters.argmax(-1)")
        ids = ids.long()
        if not (ids.is_cuda and ids.numel() and torch.is_grad_enabled() and self.weight.requires_grad):
            return F.embedding(ids, self.weight)
        if not torch.compiler.is_compiling() and dispatch.transforming():  # which know torch's own operators
            return F.embedding(ids, self.weight)
        return _Lookup.apply(self.weight, ids)
