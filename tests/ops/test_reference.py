"""The references themselves: by hand, by gradcheck, and against independent formulas."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from parity import conv_arguments, scan_arguments

from seqlab.ops import causal_conv1d, selective_scan

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]


def silu(x):
    return x / (1 + math.exp(-x))


def test_scan_by_hand():
    """One channel, one state, two steps, on paper: h = exp(delta A) h + delta B u; y = (C h + D u) silu(z)."""
    ln2 = math.log(2)
    y, final = selective_scan(
        u=torch.tensor([[[3.0], [5.0]]], dtype=torch.float64),
        delta=torch.tensor([[[1.0], [2.0]]], dtype=torch.float64),
        A=torch.tensor([[-ln2]], dtype=torch.float64),
        B=torch.tensor([[[2.0], [1.0]]], dtype=torch.float64),
        C=torch.tensor([[[1.0], [10.0]]], dtype=torch.float64),
        D=torch.tensor([7.0], dtype=torch.float64),
        z=torch.tensor([[[1.0], [-2.0]]], dtype=torch.float64),
        initial_state=torch.tensor([[[4.0]]], dtype=torch.float64),
        return_final_state=True,
        backend="reference",
    )
    # h1 = 4/2 + 1*2*3 = 8; y1 = (8 + 21) silu(1).  h2 = 8/4 + 2*1*5 = 12; y2 = (120 + 35) silu(-2).
    expected = torch.tensor([[[29 * silu(1.0)], [155 * silu(-2.0)]]], dtype=torch.float64)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(final, torch.tensor([[[12.0]]], dtype=torch.float64))


def test_scan_by_hand_reverse_with_softplus_and_mask():
    """Right to left: the state enters beside the last position; the masked middle one is skipped."""
    bias = 0.25
    raw = math.log(math.e - 1) - bias  # softplus(raw + bias) = 1
    y, final = selective_scan(
        u=torch.tensor([[[3.0], [math.nan], [5.0]]]),
        delta=torch.tensor([[[raw], [math.nan], [raw]]]),
        A=torch.tensor([[-math.log(2)]]),
        B=torch.tensor([[[2.0], [math.nan], [1.0]]]),
        C=torch.tensor([[[1.0], [math.nan], [10.0]]]),
        delta_bias=torch.tensor([bias]),
        delta_softplus=True,
        initial_state=torch.tensor([[[4.0]]]),
        mask=torch.tensor([[True, False, True]]),
        reverse=True,
        return_final_state=True,
        backend="reference",
    )
    # position 2: h = 4/2 + 5 = 7, y = 70.  position 0: h = 7/2 + 6 = 9.5, y = 9.5
    torch.testing.assert_close(y, torch.tensor([[[9.5], [0.0], [70.0]]]))
    torch.testing.assert_close(final, torch.tensor([[[9.5]]]))


def test_conv_by_hand():
    x = torch.tensor([[[1.0], [2.0], [4.0]]])
    weight = torch.tensor([[100.0, 10.0, 1.0]])
    state = torch.tensor([[[7.0], [8.0]]])
    y, final = causal_conv1d(
        x, weight, torch.tensor([0.5]), initial_state=state, return_final_state=True, backend="reference"
    )
    assert y.flatten().tolist() == [781.5, 812.5, 124.5] and final.flatten().tolist() == [2, 4]
    y, final = causal_conv1d(
        x, weight, initial_state=state, reverse=True, return_final_state=True, backend="reference"
    )
    # the mirror image: 1 + 20 + 400, 2 + 40 + 700, 4 + 70 + 800
    assert y.flatten().tolist() == [421, 742, 874] and final.flatten().tolist() == [1, 2]
    y, final = causal_conv1d(
        torch.tensor([[[1.0], [math.nan], [4.0]]]),
        weight,
        initial_state=state,
        mask=torch.tensor([[True, False, True]]),
        return_final_state=True,
        backend="reference",
    )
    assert y.flatten().tolist() == [781, 0, 814] and final.flatten().tolist() == [1, 4]


def test_conv_is_torchs_conv():
    t = conv_arguments(2, 9, 3, 4, torch.float64, state=False)
    y = causal_conv1d(**t, activation="silu", backend="reference")
    padded = F.pad(t["x"].transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded, t["weight"].unsqueeze(1), t["bias"], groups=3)).transpose(1, 2)
    torch.testing.assert_close(y, expected)


def test_scan_is_the_sum_over_the_past():
    """y_t = sum_s C_t exp(A sum_{s<r<=t} delta_r) delta_s B_s u_s: no recurrence anywhere."""
    t = scan_arguments(1, 6, 2, 3, torch.float64, softplus=False, optional=(), state=False)
    y = selective_scan(**t, backend="reference")[0]
    total = t["delta"][0].cumsum(0)  # (l d)
    for i in range(6):
        expected = torch.zeros(2, dtype=torch.float64)
        for s in range(i + 1):
            decay = torch.exp(t["A"] * (total[i] - total[s])[:, None])
            expected += (decay * t["B"][0, s] * t["C"][0, i]).sum(1) * t["delta"][0, s] * t["u"][0, s]
        torch.testing.assert_close(y[i], expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_scan_gradcheck(reverse, masked, softplus):
    t = {k: v.requires_grad_() for k, v in scan_arguments(2, 4, 2, 2, torch.float64, softplus=softplus).items()}
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]]) if masked else None

    def f(*values):
        return selective_scan(
            **dict(zip(t, values, strict=True)),
            delta_softplus=softplus,
            mask=mask,
            reverse=reverse,
            return_final_state=True,
            backend="reference",
        )

    assert torch.autograd.gradcheck(f, tuple(t.values()))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv_gradcheck(reverse, masked, activation):
    t = {k: v.requires_grad_() for k, v in conv_arguments(2, 4, 2, 3, torch.float64).items()}
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]]) if masked else None

    def f(*values):
        return causal_conv1d(
            **dict(zip(t, values, strict=True)),
            activation=activation,
            mask=mask,
            reverse=reverse,
            return_final_state=True,
            backend="reference",
        )

    assert torch.autograd.gradcheck(f, tuple(t.values()))


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_second_gradients_are_right_or_refused(op):
    """A fast back end's gradients were taken for constants when differentiated again, with no more than a warning."""
    if op == "selective_scan":
        function = functools.partial(selective_scan, delta_softplus=True)
        tensors = scan_arguments(1, 3, 2, 2, torch.float64, softplus=True)
    else:
        function = functools.partial(causal_conv1d, activation="silu")
        tensors = conv_arguments(1, 3, 2, 4, torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def run(backend):
        return lambda *values: function(**dict(zip(tensors, values, strict=True)), backend=backend)

    assert torch.autograd.gradgradcheck(run("reference"), leaves)
    gradient = torch.autograd.grad(run("auto")(*leaves).sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_forward_derivatives_are_right_or_refused(op, masked):
    """A fast back end dropped the tangent: the derivative was 0, without a word."""
    if op == "selective_scan":
        function, tensors = functools.partial(selective_scan, delta_softplus=True), scan_arguments(1, 3, 2, 2, torch.float64, softplus=True)
    else:
        function, tensors = functools.partial(causal_conv1d, activation="silu"), conv_arguments(1, 3, 2, 4, torch.float64)
    tangents = {name: torch.randn_like(t) for name, t in tensors.items()}
    mask = torch.tensor([[True, False, True]]) if masked else None

    def run(backend):
        return lambda *values: function(**dict(zip(tensors, values, strict=True)), mask=mask, backend=backend).sum()

    values, directions = tuple(tensors.values()), tuple(tangents.values())
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(values, directions)]
        _, got = torch.autograd.forward_ad.unpack_dual(run("auto")(*duals))
        with pytest.raises(RuntimeError, match="knows no forward-mode derivative"):
            run("cpu")(*duals)
        run("cpu")(*values)  # without a tangent nothing is lost
    leaves = [t.detach().requires_grad_() for t in values]
    gradients = torch.autograd.grad(run("auto")(*leaves), leaves)
    expected = sum((g * d).sum() for g, d in zip(gradients, directions))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_gradients_by_torch_func(op, device):
    """Of each row by itself (vmap of grad): torch refused them with words of its own, on a GPU for want of an address."""
    if op == "selective_scan":
        function, tensors = functools.partial(selective_scan, delta_softplus=True), scan_arguments(2, 3, 2, 2, torch.float64, softplus=True)
        rows = ("u", "delta", "B", "C", "z", "initial_state")
    else:
        function, tensors = functools.partial(causal_conv1d, activation="silu"), conv_arguments(2, 3, 2, 4, torch.float64)
        rows = ("x", "initial_state")
    tensors = {k: v.to(device) for k, v in tensors.items()}
    shared = {k: v for k, v in tensors.items() if k not in rows}
    own = {k: v for k, v in tensors.items() if k in rows}

    def loss(shared, own):
        return function(**shared, **{k: v[None] for k, v in own.items()}).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(shared, own)
    leaves = {k: v.clone().requires_grad_() for k, v in shared.items()}
    for row in range(2):
        expected = torch.autograd.grad(loss(leaves, {k: v[row] for k, v in own.items()}), list(leaves.values()))
        for name, value in zip(leaves, expected):
            torch.testing.assert_close(each[name][row], value)
    with pytest.raises(RuntimeError, match="no torch.func"):
        torch.func.grad(lambda s: function(**s, **own, backend="cpu").sum())(shared)
