"""Every fast back end against the float64 reference: outputs and every gradient, over lengths, directions, masks, states,
optional arguments, data types, and sizes that fill their tiles badly. The last tests are about the helper itself."""

import itertools

import pytest
import torch
from parity import close, compare, conv_arguments, parameter_dtype, results, scan_arguments

from seqlab.ops import backends, causal_conv1d, selective_scan
from seqlab.ops.dispatch import Request

LENGTHS = (1, 2, 3, 7, 64, 65, 1000)
CHANNELS = (1, 3, 16, 17, 40)
STATES = (1, 2, 16, 17)
WIDTHS = (1, 2, 3, 4, 7)
OPTIONAL = (("D", "z", "delta_bias"), (), ("D",), ("z",), ("delta_bias",), ("D", "z"))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "mamba_ssm")]


def need(op, backend):
    """The device a back end is for, or skip with the back end's own reason."""
    module = backends(op).get(backend)
    if module is None:
        pytest.skip(f"{op} has no back end {backend}")
    reason = module.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return "cuda" if backend in ("cuda", "mamba_ssm") else "cpu"


def can(op, backend, device, dtype, d, *, b=1, l=1, n=0, w=0, state=False, final=True, reverse=False):
    request = Request(device, dtype, d, b, l, n, w, state, final, grad=True, reverse=reverse)
    return backends(op)[backend].unavailable(request) is None


def random_mask(b, l, seed):
    mask = torch.rand(b, l, generator=torch.Generator().manual_seed(seed)) > 0.3
    if b > 1:
        mask[0, : l // 2] = False  # left padding
    return mask


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", *GPU])
def test_scan(backend, dtype, length, reverse):
    device = need("selective_scan", backend)
    sizes = itertools.cycle([(d, n) for i, d in enumerate(CHANNELS) for n in STATES[i % 2 :: 2]])
    for _ in range(LENGTHS.index(length) + 7 * reverse):
        next(sizes)
    cases = list(itertools.product((False, True), (False, True), OPTIONAL, (False, True)))
    cases = cases[:: 17 if length == 1000 else 5 if length >= 64 else 3]
    ran = 0
    for i, (masked, state, optional, softplus) in enumerate(cases):
        d, n = next(sizes)
        final = True
        if not can("selective_scan", backend, device, dtype, d, l=length, n=n, state=state, reverse=reverse):
            state = final = False
            if not can("selective_scan", backend, device, dtype, d, n=n, final=False, reverse=reverse):
                continue
        b = 1 + i % 2
        t = scan_arguments(b, length, d, n, dtype, softplus=softplus, state=state, optional=optional, seed=i)
        options = {"delta_softplus": softplus, "reverse": reverse}
        if masked:
            options["mask"] = random_mask(b, length, i)
        compare(
            "selective_scan", t, options, backend=backend, dtype=dtype, device=device, final_grad=final,
            factor=3 if length == 1000 else 1,
        )  # fmt: skip
        ran += 1
    if not ran:
        pytest.skip(f"{backend} does not take {dtype}")


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", *GPU])
def test_conv(backend, dtype, length, reverse):
    device = need("causal_conv1d", backend)
    sizes = itertools.cycle(itertools.product(CHANNELS, WIDTHS))
    if device == "cuda":  # mamba_ssm takes few of the others
        sizes = itertools.cycle([*itertools.product(CHANNELS, WIDTHS), (16, 4), (40, 3)])
    for _ in range(LENGTHS.index(length) + 7 * reverse):
        next(sizes)
    cases = list(itertools.product((False, True), (False, True), (False, True), (None, "silu"), range(2)))
    ran = 0
    for i, (masked, state, bias, activation, _) in enumerate(cases):
        d, w = next(sizes)
        if not can("causal_conv1d", backend, device, dtype, d, l=length, w=w, state=state, reverse=reverse):
            continue
        b = 1 + i % 2
        options = {"activation": activation, "reverse": reverse}
        if masked:
            options["mask"] = random_mask(b, length, i)
        t = conv_arguments(b, length, d, w, dtype, state=state, bias=bias, seed=i)
        # in bfloat16 dx is the sum of two rounded parts, through y and through the final state
        factor = 3 if dtype == torch.bfloat16 else 1
        compare("causal_conv1d", t, options, backend=backend, dtype=dtype, device=device, factor=factor)
        ran += 1
    if not ran:
        pytest.skip(f"{backend} does not take {dtype}")


@pytest.mark.parametrize("n", [33, 70])
def test_scan_many_states(n):
    """Other chunk lengths: 128 and 256 steps."""
    t = scan_arguments(1, 300, 5, n, torch.float32, softplus=True)
    compare("selective_scan", t, {"delta_softplus": True}, backend="cpu", dtype=torch.float32, factor=3)


def test_scan_many_channels_and_segments(monkeypatch):
    """More tiles than groups, and a backward in several segments."""
    from seqlab.ops.selective_scan import cpu

    monkeypatch.setattr(cpu, "GROUPS_MAX", 2)
    monkeypatch.setattr(cpu, "PARTIAL_BYTES", 1)
    t = scan_arguments(2, 200, 100, 3, torch.float64, softplus=True)
    for reverse in (False, True):
        compare(
            "selective_scan", t, {"delta_softplus": True, "reverse": reverse}, backend="cpu", dtype=torch.float64
        )


def test_conv_many_cells(monkeypatch):
    """More stretches of time than shares of the gradients."""
    from seqlab.ops.causal_conv1d import cpu

    monkeypatch.setattr(cpu, "STEPS", 5)
    monkeypatch.setattr(cpu, "UNITS_MAX", 3)
    for reverse in (False, True):
        t = conv_arguments(2, 33, 17, 4, torch.float64)
        options = {"activation": "silu", "reverse": reverse}
        compare("causal_conv1d", t, options, backend="cpu", dtype=torch.float64)


@pytest.mark.parametrize("backend", ["reference", "cpu", *GPU])
def test_masked_values_never_matter(backend):
    """NaN at masked positions changes no bit of any result; outputs and gradients there are 0."""
    for op, make, options in (
        ("selective_scan", lambda: scan_arguments(2, 40, 8, 4, torch.float32, softplus=True), {"delta_softplus": True}),
        ("selective_scan", lambda: scan_arguments(2, 40, 8, 4, torch.float32, softplus=False), {}),
        ("causal_conv1d", lambda: conv_arguments(2, 40, 8, 4, torch.float32), {"activation": "silu"}),
    ):
        device = need(op, backend)
        mask = random_mask(2, 40, 3)
        t = make()
        final = True
        if not can(op, backend, device, torch.float32, 8, n=4, w=4, state=True):
            t.pop("initial_state")
            final = False
        bad = {k: torch.where(mask[:, :, None], v, torch.nan) if v.shape[:2] == (2, 40) else v for k, v in t.items()}
        kept = {"backend": backend, "dtype": torch.float32, "device": device, "final_grad": final}
        clean = results(op, t, options | {"mask": mask}, **kept)
        dirty = results(op, bad, options | {"mask": mask}, **kept)
        for name, value in clean.items():
            if backend == "mamba_ssm":  # adds with atomics
                torch.testing.assert_close(dirty[name], value)
            else:
                assert torch.equal(value, dirty[name]), (op, name)
            if value.shape[:2] == (2, 40):
                assert (value[~mask.to(value.device)] == 0).all(), (op, name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_masked_is_removed(op, reverse):
    """Packing with a mask equals running the real positions alone, state and all."""
    if op == "selective_scan":
        t, options = scan_arguments(1, 30, 5, 3, torch.float64, softplus=True), {"delta_softplus": True}
        function = selective_scan
    else:
        t, options, function = conv_arguments(1, 30, 5, 4, torch.float64), {"activation": "silu"}, causal_conv1d
    for backend in ("reference", "cpu"):
        mask = random_mask(1, 30, 5)
        kwargs = options | {"reverse": reverse, "return_final_state": True, "backend": backend}
        y, final = function(**t, **kwargs, mask=mask)
        short = {k: v[:, mask[0]] if v.shape[:2] == (1, 30) else v for k, v in t.items()}
        y_short, final_short = function(**short, **kwargs)
        torch.testing.assert_close(y[:, mask[0]], y_short)
        torch.testing.assert_close(final, final_short)
        none = torch.zeros(1, 30, dtype=torch.bool)
        y, final = function(**t, **kwargs, mask=none)
        assert (y == 0).all() and torch.equal(final, t["initial_state"])


@pytest.mark.parametrize("softplus", [False, True])
def test_generic_mask_for_back_ends_without_one(softplus, monkeypatch):
    """The filling done in __init__ for back ends that know no masks."""
    from seqlab.ops.selective_scan import reference

    t = scan_arguments(2, 12, 3, 2, torch.float64, softplus=softplus)
    options = {"delta_softplus": softplus, "mask": random_mask(2, 12, 1)}
    bad = {
        k: torch.where(options["mask"][:, :, None], v, torch.nan) if v.shape[:2] == (2, 12) else v
        for k, v in t.items()
    }
    native = results("selective_scan", t, options, backend="reference", dtype=torch.float64)
    monkeypatch.setattr(reference, "NATIVE_MASK", False)
    filled = results("selective_scan", bad, options, backend="reference", dtype=torch.float64)
    for name, value in native.items():
        close(filled[name], value, torch.float64, name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pieces_are_the_whole(backend, op, reverse):
    """Cut anywhere, carry the state: the same outputs, the same final state, the same gradients."""
    device, dtype = need(op, backend), torch.float32 if backend == "cuda" else torch.float64
    if op == "selective_scan":
        t, options = scan_arguments(2, 131, 5, 3, dtype, softplus=True), {"delta_softplus": True}
        function = selective_scan
    else:
        t, options, function = conv_arguments(2, 131, 5, 4, dtype), {"activation": "silu"}, causal_conv1d
    t = {k: v.to(device).requires_grad_() for k, v in t.items()}
    options |= {"reverse": reverse, "return_final_state": True, "backend": backend}

    y, final = function(**t, **options)
    # a loss that is linear: one that bends (y.sin()) makes of rounding in y, which is large here, errors in the gradients
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x) for x in (y, final)]

    def grads(y, final):
        return torch.autograd.grad((y * weights[0]).sum() + (final * weights[1]).sum(), list(t.values()))

    whole = grads(y, final)
    for cuts in ([0, 131], [0, 1, 2, 131], [0, 64, 131], [0, 63, 64, 66, 130, 131]):
        pieces, state = [], t["initial_state"]
        spans = list(itertools.pairwise(cuts))
        for start, stop in reversed(spans) if reverse else spans:
            part = {k: v[:, start:stop] if v.shape[:2] == (2, 131) else v for k, v in t.items()}
            out, state = function(**(part | {"initial_state": state}), **options)
            pieces.append(out)
        joined = torch.cat(pieces[::-1] if reverse else pieces, dim=1)
        close(joined, y, dtype, "y")
        close(state, final, dtype, "final")
        for name, got, want in zip(t, grads(joined, state), whole, strict=True):
            close(got, want, dtype, name)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_reverse_is_flipped(backend):
    device = need("selective_scan", backend)
    t = {k: v.to(device) for k, v in scan_arguments(1, 70, 17, 4, torch.float32, softplus=True).items()}
    flipped = {k: v.flip(1) if v.shape[:2] == (1, 70) else v for k, v in t.items()}
    kwargs = {"delta_softplus": True, "return_final_state": True, "backend": backend}
    y, final = selective_scan(**t, **kwargs, reverse=True)
    y2, final2 = selective_scan(**flipped, **kwargs)
    close(y, y2.flip(1), torch.float32)
    close(final, final2, torch.float32)


@pytest.mark.parametrize("backend", ["cpu", *GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_that_are_views(backend, dtype):
    """Chunks of one projection, expanded rows, transposed storage: the same answer as for copies."""
    device = need("selective_scan", backend)
    b, l, d, n = 2, 50, 24, 4
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(b, l, 3 * d + 2 * n, generator=g).to(device, dtype)
    u, z, delta, B, C = wide.split([d, d, d, n, n], dim=-1)
    views = {
        "u": u,
        "delta": delta.transpose(1, 2).contiguous().transpose(1, 2),
        "A": -torch.rand(n, d, generator=g).to(device).t(),
        "B": B,
        "C": C[:1].expand(b, l, n),
        "D": torch.randn(1, generator=g).to(device).expand(d),
        "z": z,
    }
    kwargs = {"delta_softplus": True, "backend": backend}
    y = selective_scan(**views, **kwargs)
    torch.testing.assert_close(y, selective_scan(**{k: v.contiguous() for k, v in views.items()}, **kwargs))
    leaves = {k: v.detach().requires_grad_() for k, v in views.items()}  # keeps the strides
    copies = {k: v.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for k, v in views.items()}
    weight = torch.randn(l, b, d, generator=g).to(device, dtype).transpose(0, 1)
    for x in (leaves, copies):
        selective_scan(**x, **kwargs).backward(weight)
    for name in views:
        close(leaves[name].grad, copies[name].grad, dtype, name)
    if d % 8 == 0:
        weight, x = torch.randn(3, d, generator=g).to(device).t(), wide[..., d : 2 * d]
        one = causal_conv1d(x, weight, activation="silu", backend=backend)
        torch.testing.assert_close(one, causal_conv1d(x.contiguous(), weight.contiguous(), activation="silu", backend=backend))


@pytest.mark.parametrize("backend", ["reference", "cpu", *GPU])
@pytest.mark.parametrize("b, l", [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(backend, b, l):
    """An empty batch or sequence: shapes as documented, the state passes, gradients are zeros."""
    device = need("selective_scan", backend)
    has_state = can("selective_scan", backend, device, torch.float32, 8, n=2, state=True)
    t = scan_arguments(b, l, 8, 2, torch.float32, softplus=True, state=has_state)
    t = {k: v.to(device).requires_grad_() for k, v in t.items()}
    y, final = selective_scan(**t, return_final_state=has_state, backend=backend) if has_state else (
        selective_scan(**t, backend=backend), torch.zeros(b, 8, 2))  # fmt: skip
    assert y.shape == (b, l, 8) and final.shape == (b, 8, 2)
    if has_state:
        torch.testing.assert_close(final, t["initial_state"])
    y.sum().backward()
    assert all(v.grad is None or (v.grad == 0).all() for v in t.values())
    x = torch.zeros(b, l, 8, device=device)
    y, state = causal_conv1d(x, torch.ones(8, 4, device=device), return_final_state=True, backend=backend)
    assert y.shape == x.shape and state.shape == (b, 3, 8) and (state == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time_on_any_number_of_threads(dtype):
    """Large enough that the work is really split."""
    scan = scan_arguments(2, 700, 100, 16, dtype, softplus=True)
    conv = conv_arguments(2, 1500, 100, 4, dtype)
    before = torch.get_num_threads()
    seen = {}
    try:
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            for op, t, options in (
                ("selective_scan", scan, {"delta_softplus": True}),
                ("causal_conv1d", conv, {"activation": "silu", "reverse": True}),
            ):
                got = results(op, t, options, backend="cpu", dtype=dtype)
                for name, value in got.items():
                    assert torch.equal(seen.setdefault((op, name), value), value), (threads, op, name)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_same_bits_every_time_on_the_gpu(op):
    device = need(op, "cuda")
    if op == "selective_scan":
        t, options = scan_arguments(2, 3000, 100, 16, torch.bfloat16, softplus=True), {"delta_softplus": True}
    else:
        t, options = conv_arguments(2, 3000, 100, 4, torch.bfloat16), {"activation": "silu"}
    first, second = (results(op, t, options, backend="cuda", dtype=torch.bfloat16, device=device) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_mixed_types_follow_u():
    """Under autocast delta, z, B, C and the parameters arrive in other types than u."""
    t = scan_arguments(1, 9, 4, 2, torch.bfloat16, softplus=True)
    mixed = t | {k: t[k].float() for k in ("delta", "B", "z")} | {k: t[k].bfloat16() for k in ("A", "D", "delta_bias")}
    rounded = t | {k: t[k].bfloat16().float() for k in ("A", "D", "delta_bias")}
    y, final = selective_scan(**mixed, delta_softplus=True, return_final_state=True, backend="cpu")
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert torch.equal(y, selective_scan(**rounded, delta_softplus=True, backend="cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, selective_scan(**mixed, delta_softplus=True, backend="cpu"))
        close(y, selective_scan(**mixed, delta_softplus=True, backend="reference"), torch.bfloat16)


def test_positive_A_and_extreme_steps():
    """Growth, underflow to 0 and no step at all: as the reference has them, no NaN."""
    t = scan_arguments(1, 20, 17, 4, torch.float32, softplus=True)
    t["A"] = torch.linspace(-200, 0.5, 17 * 4).reshape(17, 4)
    t["delta"] = torch.linspace(-120, 3, 20).reshape(1, 20, 1).expand(1, 20, 17).contiguous()
    compare("selective_scan", t, {"delta_softplus": True}, backend="cpu", dtype=torch.float32, factor=5)


def test_nan_is_not_swallowed():
    """A NaN in real data must reach the output: a watchdog looks there."""
    for name in ("u", "delta", "B", "C", "z"):
        t = scan_arguments(1, 8, 3, 2, torch.float32, softplus=True)
        t[name][0, 2] = torch.nan
        y = selective_scan(**t, delta_softplus=True, backend="cpu")
        assert y[0, 2].isnan().all() and not y[0, :2].isnan().any(), name


# ------------------------------------------------------------------------------------------------ the helper itself


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_comparison_fails_on_a_wrong_answer(dtype):
    want = torch.randn(50, dtype=torch.float64)
    close(want.to(dtype), want, dtype)
    wrong = want.clone()
    wrong[7] += 0.05
    with pytest.raises(AssertionError, match="error"):
        close(wrong, want, dtype)
    wrong[7] = torch.nan
    with pytest.raises(AssertionError, match="nan"):
        close(wrong, want, dtype)
    with pytest.raises(AssertionError, match="shape"):
        close(want[:-1], want, dtype)


def test_comparison_fails_on_a_wrong_back_end(monkeypatch):
    """A dropped term in one gradient is caught through the whole machinery."""
    from seqlab.ops.selective_scan import reference

    module = backends("selective_scan")["cpu"]
    right = reference.run

    def wrong(u, delta, A, B, C, D, *rest):
        return right(u, delta, A.detach() + 0.999 * (A - A.detach()), B, C, D, *rest)

    monkeypatch.setattr(module, "run", wrong)
    t = scan_arguments(1, 7, 3, 2, torch.float32, softplus=True)
    with pytest.raises(AssertionError, match="dA"):
        compare("selective_scan", t, {"delta_softplus": True}, backend="cpu", dtype=torch.float32)


def test_memory_is_poisoned():
    """The fixture that makes unwritten memory NaN works, for torch and for the CPU back ends' scratch."""
    from seqlab.ops.selective_scan import cpu

    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
    assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
    assert cpu.np.isnan(cpu.np.empty(8, cpu.np.uint8).view(cpu.np.float32)).all()
    assert parameter_dtype(torch.bfloat16) == torch.float32
