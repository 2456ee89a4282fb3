"""One Mamba block on NVIDIA GPUs, norm to residual sum, with a backward pass written by hand.

    s = rms_norm(x);  (u | z) = s W_in;  for each direction:  c = silu(conv(u)),  (r | B | C) = c W_x,
    delta = r W_dt,  y = scan(c, delta, B, C, z);  out = x + (sum of y) W_out

Two directions share the gate z, which is then applied to the sum of their scans, in a pass of its own (Spec.gate_after).

Kept for the backward pass: x, y (of two directions: the sum before the gate), (r | B | C), and the scan's states every few
hundred steps, or every eight (Spec.every_state). s, (u | z), c and delta are made again. Gradients of both directions meet in one (du | dz), which goes through
W_in once. Two dozen (b l d) tensors of the same block written as separate operators become five kept or passing at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlab.ops import nvrtc
from seqlab.ops.block import rows
from seqlab.ops.block.parameters import Direction
from seqlab.ops.causal_conv1d import cuda as conv
from seqlab.ops.causal_conv1d import last_real_positions
from seqlab.ops.dispatch import Request
from seqlab.ops.selective_scan import cuda as scan


def unavailable(request: Request | None = None) -> str | None:
    """Why the kernels of a block cannot run here (or cannot run this); None if they can."""
    return scan.unavailable(request) or conv.unavailable(request)


@dataclass(frozen=True)
class Spec:
    """What is not a tensor."""

    epsilon: float
    reverse: tuple[bool, ...]  # one direction, either way; or (False, True): both, whose outputs are added, without states
    residual: bool  # add x to the result
    dtype: torch.dtype  # of matrix products and (b l d) tensors: bfloat16 or float32
    return_state: bool  # also the states that continue the sequence (one direction)
    keep: bool  # for the backward pass
    # Two directions: apply the gate they share once, to their sum, which is kept in place of the gated one. Faster; without
    # it the output of the scans is kept as it goes into W_out.
    gate_after: bool = True
    every_state: bool = False  # keep a state every 8 steps, so that no scan goes forward again; and a gated scan's output before it
    spare: bool = False  # in the backward pass hold as little as possible at one time, and make the norm twice for it
    ranks: Any = None  # those that share the sequence, x being this one's piece (seqlab/training/parallel.py); without states


def _half(w: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return w if w is None else w.detach().to(dtype)


def _single(w: Tensor | None) -> Tensor | None:
    return w if w is None else w.detach().float().contiguous()


def weight_gradient(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in float32, a (rows m), b (rows n): a long sum into a small matrix, cut so that it fills the GPU. The order of
    the sum depends on the shapes alone."""
    rows = a.shape[0]
    if not a.is_cuda:  # tests
        a, b = a.float(), b.float()
    parts = max(1, min(64, rows // 2048))
    each = rows // parts
    whole = parts * each
    first, second = a[:whole].unflatten(0, (parts, each)).transpose(1, 2), b[:whole].unflatten(0, (parts, each))
    out = _bmm(first, second).sum(0)
    return out if whole == rows else out.addmm_(a[whole:].float().t(), b[whole:].float())


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    try:
        return torch.bmm(a, b, out_dtype=torch.float32)
    except TypeError:  # torch before 2.8
        return torch.bmm(a, b).float()


def _conv_state(u: Tensor, width: int, before: Tensor | None, mask: Tensor | None, reverse: bool) -> Tensor:
    """The last w-1 real inputs (reverse: the first), those of `before` (b w-1 d; None: zeros) included, in sequence order."""
    if before is None:
        before = u.new_zeros(u.shape[0], width - 1, u.shape[2])
    if mask is not None:
        now, old, there = (t.unsqueeze(-1) for t in last_real_positions(mask, width, reverse))
        wide = (-1, -1, u.shape[2])
        return torch.where(there, u.gather(1, now.expand(wide)), before.gather(1, old.expand(wide)))
    keep = min(width - 1, u.shape[1])
    if reverse:
        return torch.cat((u[:, :keep], before), 1)[:, : width - 1]
    return torch.cat((before, u[:, u.shape[1] - keep :]), 1)[:, keep:]


def _conv_state_backward(dstate: Tensor, mask: Tensor | None, reverse: bool, du: Tensor, dbefore: Tensor | None) -> None:
    """Adds the gradient of `_conv_state` to those of u and of the state before."""
    places, length = dstate.shape[1], du.shape[1]
    if mask is not None:
        now, old, there = (t.unsqueeze(-1) for t in last_real_positions(mask, places + 1, reverse))
        du.scatter_add_(1, now.expand(dstate.shape), torch.where(there, dstate, 0.0).to(du.dtype))
        if dbefore is not None:
            dbefore.scatter_add_(1, old.expand(dstate.shape), torch.where(there, 0.0, dstate).to(dbefore.dtype))
        return
    here = min(places, length)  # shorter than the window: part of the old state is in the new one
    if reverse:
        du[:, :here] += dstate[:, :here]
        if dbefore is not None:
            dbefore[:, : places - here] += dstate[:, here:]
    else:
        du[:, length - here :] += dstate[:, places - here :]
        if dbefore is not None:
            dbefore[:, here:] += dstate[:, : places - here]


def _segment(spec: Spec, u: Tensor) -> int:
    """Steps between the scan's snapshots; twice as many where memory counts, for a hundredth of the time."""
    if spec.every_state:  # at any size, so that memory grows with the length alone
        return scan.TILE
    usual = scan.segment_length(*u.shape)
    return 256 if spec.spare and usual == 128 else usual


def _scanned_together(spec: Spec, u: Tensor, directions: list[Direction], backward: bool = False) -> list[tuple[int, ...]]:
    """The directions, grouped by which scans run at once."""
    n = directions[0].A_log.shape[1]
    together = len(directions) == 2 and spec.ranks is None and not spec.every_state and scan.pair_pays(u, n, backward)
    return [(0, 1)] if together else [(i,) for i in range(len(directions))]


def _convolved(spec: Spec, u: Tensor, directions: list[Direction], states: list, real: conv.Real | None) -> list[Tensor]:
    """silu(conv(u)) of every direction, given the inputs before it (None: zeros); two without read u once."""
    weights, biases = [_single(p.conv_weight) for p in directions], [_single(p.conv_bias) for p in directions]
    if len(directions) == 2 and spec.ranks is None:
        return list(conv.forward_pair(u, weights, biases, True, real))
    return [
        conv.forward(u, w, b, state, True, reverse, real)
        for w, b, state, reverse in zip(weights, biases, states, spec.reverse, strict=True)
    ]


def _convolved_backward(spec: Spec, dcs: list[Tensor], u: Tensor, directions: list[Direction], states: list, real, into):
    """The gradient of u into `into`; gradients of the weights, the biases and the states (lists)."""
    weights, biases = [_single(p.conv_weight) for p in directions], [_single(p.conv_bias) for p in directions]
    if len(directions) == 2 and spec.ranks is None:
        return *conv.backward_pair(*dcs, u, weights, biases, True, into, real), [None, None]
    grads = [
        conv.backward(dcs[i], u, weights[i], biases[i], states[i], True, spec.reverse[i], real, into=into, add=i > 0)[1:]
        for i in range(len(directions))
    ]
    return tuple(list(g) for g in zip(*grads, strict=True))


def _halos(spec: Spec, u: Tensor, directions: list[Direction], conv_state: Tensor | None, mask: Tensor | None):
    """The inputs before each direction's first, and with several ranks where everybody's come from (else None)."""
    if spec.ranks is None:
        return [conv_state] * len(directions), [None] * len(directions)
    found = [
        spec.ranks.halo(u, p.conv_weight.shape[1] - 1, mask, reverse) if p.conv_weight.shape[1] > 1 else (None, None)
        for p, reverse in zip(directions, spec.reverse, strict=True)
    ]
    return [halo for halo, _ in found], [source for _, source in found]


def _forward(spec: Spec, x, mask, conv_state, ssm_state, norm_weight, in_weight, in_bias, out_weight, out_bias, *rest):
    """(out, conv state, ssm state, kept tensors)."""
    dtype = spec.dtype
    conv_state, ssm_state = _half(conv_state, dtype), _single(ssm_state)
    normed = rows.norm_forward(x, _single(norm_weight), spec.epsilon, dtype)
    xz = F.linear(normed, _half(in_weight, dtype), _half(in_bias, dtype))
    del normed
    u, z = xz.chunk(2, -1)
    directions = [Direction(*rest[7 * i : 7 * i + 7]) for i in range(len(spec.reverse))]
    after_sum = spec.gate_after and len(directions) == 2
    gate = None if after_sum else z
    halos, sources = _halos(spec, u, directions, conv_state, mask)
    convolved = _convolved(spec, u, directions, halos, conv.real_positions(mask))
    outputs, kept, after, sums = [], [], (None, None), None
    segment = _segment(spec, u) if spec.keep else 0
    for group in _scanned_together(spec, u, directions):
        scans, projections = [], []
        for i in group:
            c, p = convolved.pop(0), directions[i]
            dbl = F.linear(c, _half(p.x_weight, dtype))
            rank, states = p.dt_weight.shape[1], p.A_log.shape[1]
            r, B, C = dbl.split([rank, states, states], -1)
            delta, A, bias = F.linear(r, _half(p.dt_weight, dtype)), -torch.exp(_single(p.A_log)), _single(p.dt_bias)
            scans.append((c, delta, A, B, C, _single(p.D), gate, bias))
            projections.append(dbl)
            del c, dbl, r, B, C, delta
        if len(group) == 2:
            found = scan.forward_pair(tuple(scans), mask, True, segment)
            for (y, snapshots), dbl in zip(found, projections, strict=True):
                outputs.append(y)
                if spec.keep:
                    kept += [dbl, snapshots, None]
        else:
            entering = ssm_state
            if spec.ranks is not None:
                c, delta, A, B, _, _, _, bias = scans[0]
                entering, sums = spec.ranks.entering_state(c, delta, A, B, bias, True, mask, spec.reverse[i])
                del c, delta, B
            y, final, snapshots, ungated = scan.forward(*scans[0], entering, mask, True, spec.reverse[i], segment)
            outputs.append(y)
            if spec.keep:
                kept += [projections[0], snapshots, ungated]
                kept += [] if spec.ranks is None else [halos[i], sources[i], entering, sums]
            if spec.return_state:
                after = (_conv_state(u, p.conv_weight.shape[1], conv_state, mask, spec.reverse[i]), final)
            del snapshots, ungated
        del scans, projections, y
    if after_sum:
        total, y = rows.gate_forward(*outputs, z)
    else:
        total = y = outputs[0] if len(outputs) == 1 else rows.add(*outputs, outputs[0])
    del xz, u, z, gate, outputs
    out = F.linear(y, _half(out_weight, dtype), _half(out_bias, dtype))
    if spec.residual:
        out = rows.add(x, out, torch.empty_like(x))
    return out, *after, [total, *kept] if spec.keep else []


def _backward(spec: Spec, tensors, kept, dout, dconv, dssm):
    """Gradients of the tensors given to `_forward`, in their order; None for what is absent."""
    x, mask, conv_state, ssm_state, norm_weight, in_weight, in_bias, out_weight, out_bias, *rest = tensors
    dtype, (batch, length, _) = spec.dtype, x.shape
    conv_state, ssm_state = _half(conv_state, dtype), _single(ssm_state)
    total = kept.pop(0)
    d_inner = out_weight.shape[1]
    normed = rows.norm_forward(x, _single(norm_weight), spec.epsilon, dtype)
    w_in = _half(in_weight, dtype)
    xz = F.linear(normed, w_in, _half(in_bias, dtype))
    if spec.spare:
        normed = None
    u, z = xz.chunk(2, -1)
    after_sum = spec.gate_after and len(spec.reverse) == 2
    dxz = dz = None
    if after_sum or not spec.spare:
        dxz = torch.empty_like(xz) if mask is None else torch.zeros_like(xz)
        dz = dxz.chunk(2, -1)[1]
    gate = None if after_sum else z
    dout = dout.contiguous()
    half = dout.to(dtype).flatten(0, 1)  # (rows d_model)
    dy = (half @ _half(out_weight, dtype)).unflatten(0, (batch, length))
    if after_sum:
        dy, y = rows.gate_backward(dy, total, z, dz)
    else:
        y = total
    d_out_weight = weight_gradient(half, y.flatten(0, 1))
    d_out_bias = None if out_bias is None else half.sum(0, dtype=torch.float32)
    del half, total, y
    directions = [Direction(*rest[7 * i : 7 * i + 7]) for i in range(len(spec.reverse))]
    real, each = conv.real_positions(mask), len(kept) // len(directions)
    kept = [[*kept[each * i : each * (i + 1)], conv_state, None, ssm_state, None][:7] for i in range(len(directions))]
    halos = [halo for _, _, _, halo, _, _, _ in kept]
    convolved, dcs, grads, d_ssm_state = _convolved(spec, u, directions, halos, real), [], [], None
    for group in _scanned_together(spec, u, directions, True):
        scans, projections = [], []
        for i in group:
            c, p, dbl = convolved.pop(0), directions[i], kept[i][0]
            rank, states, A = p.dt_weight.shape[1], p.A_log.shape[1], -torch.exp(_single(p.A_log))
            w_dt, w_x = _half(p.dt_weight, dtype), _half(p.x_weight, dtype)
            dbl = F.linear(c, w_x) if dbl is None else dbl  # seqlab/ops/block/stack.py does not keep it
            r, B, C = dbl.split([rank, states, states], -1)
            scans.append((c, F.linear(r, w_dt), A, B, C, _single(p.D), gate, _single(p.dt_bias)))
            projections.append((r, w_dt, w_x))
            del c, dbl, r, B, C
        if len(group) == 2:
            found = scan.backward_pair(dy, scans, mask, [kept[i][1] for i in group], True, _segment(spec, u))
        else:
            _, snapshots, ungated, _, _, entering, sums = kept[i]
            if spec.ranks is not None:
                _, delta, A, _, C, _, _, bias = scans[0]
                dssm = spec.ranks.leaving_gradient(dy, delta, A, C, gate, bias, True, mask, sums, spec.reverse[i])
                del delta, C
            found = [
                scan.backward(dy, dssm, *scans[0], entering, mask, snapshots, True, spec.reverse[i], _segment(spec, u), ungated)
            ]
            del snapshots, ungated
        scans = [(c, A) for c, _, A, *_ in scans]  # delta is done with
        for i in group:
            dc, ddelta, dA, dB, dC, dD, dz_here, d_dt_bias, d_ssm_state = found.pop(0)
            (c, A), (r, w_dt, w_x) = scans.pop(0), projections.pop(0)
            if dz is None:
                dz = dz_here
            elif not after_sum:
                dz.copy_(dz_here) if i == 0 and not spec.spare else rows.add(dz, dz_here, dz)
            del dz_here
            ddelta = ddelta.flatten(0, 1)
            ddbl = (ddelta @ w_dt).unflatten(0, (batch, length))
            ddbl = torch.cat((ddbl, dB, dC), -1).flatten(0, 1)
            d_dt_weight = weight_gradient(ddelta, r.flatten(0, 1))
            del ddelta, dB, dC
            d_x_weight = weight_gradient(ddbl, c.flatten(0, 1))
            del c
            dc.view(-1, d_inner).addmm_(ddbl, w_x)
            del ddbl
            dcs.append(dc)
            del dc
            grads.append([d_x_weight, d_dt_weight, d_dt_bias, dA * A, dD])
    if dxz is None:
        dxz = torch.empty_like(xz) if mask is None else torch.zeros_like(xz)
        dxz.chunk(2, -1)[1].copy_(dz)
    du, dz = dxz.chunk(2, -1)
    d_conv_weights, d_conv_biases, dhalos = _convolved_backward(spec, dcs, u, directions, halos, real, du)
    d_conv_state = dhalos[0]
    grads = [
        g
        for i, p in enumerate(directions)
        for g in (d_conv_weights[i], None if p.conv_bias is None else d_conv_biases[i], *grads[i])
    ]
    del dcs
    del dy, xz, u, z, gate
    if spec.ranks is not None:
        for dhalo, (_, _, _, _, source, _, _), reverse in zip(dhalos, kept, spec.reverse, strict=True):
            if source is not None:
                spec.ranks.add_halo_gradient(du, dhalo, source, mask, reverse)
    if dconv is not None:
        _conv_state_backward(dconv, mask, spec.reverse[0], du, d_conv_state if conv_state is not None else None)
    flat = dxz.flatten(0, 1)
    if normed is None:
        normed = rows.norm_forward(x, _single(norm_weight), spec.epsilon, dtype)
    d_in_weight = weight_gradient(flat, normed.flatten(0, 1))
    d_in_bias = None if in_bias is None else flat.sum(0, dtype=torch.float32)
    del normed
    d_normed = (flat @ w_in).view(x.shape)
    del dxz, du, dz, flat
    dx, d_norm_weight = rows.norm_backward(d_normed, x, _single(norm_weight), spec.epsilon, dout if spec.residual else None)
    return [
        dx, None, None if conv_state is None else d_conv_state, None if ssm_state is None else d_ssm_state, d_norm_weight,
        d_in_weight, d_in_bias, d_out_weight, d_out_bias, *grads,
    ]  # fmt: skip


def _apart(function, spec: Spec, x: Tensor, *rest):
    """function(spec, x, *rest) on x's device, without autocast: every dtype is chosen here."""
    with torch.autocast(x.device.type, enabled=False):
        if not x.is_cuda:
            return function(spec, x, *rest)
        return nvrtc.on_device(lambda _, *given: function(spec, x, *given), x, *rest)


class Block(torch.autograd.Function):
    """Block.apply(spec, x, mask, conv_state, ssm_state, norm_weight, in_weight, in_bias, out_weight, out_bias, *directions) ->
    (out, conv_state, ssm_state); the states are None unless the spec asks for them.

    x (b l d_model) in float32 or the spec's dtype; out like x with `residual`, else in the spec's dtype.
    """

    @staticmethod
    def forward(ctx, spec, x, *rest):
        x = x.contiguous()
        out, conv_state, ssm_state, kept = _apart(_forward, spec, x, *rest)
        ctx.spec, ctx.count = spec, 1 + len(rest)
        ctx.save_for_backward(x, *rest, *kept)
        ctx.set_materialize_grads(False)
        return out, conv_state, ssm_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dconv, dssm):
        saved = ctx.saved_tensors  # once: under checkpointing every look recomputes
        tensors, kept, x = saved[: ctx.count], list(saved[ctx.count :]), saved[0]
        if dout is None:
            dout = torch.zeros(x.shape, dtype=x.dtype if ctx.spec.residual else ctx.spec.dtype, device=x.device)

        def run(spec, _, *given):
            return _backward(spec, *given)

        grads = _apart(run, ctx.spec, x, tensors, kept, dout, dconv, dssm)
        return None, *(None if g is None else g.to(t.dtype) for t, g in zip(tensors, grads, strict=True))
