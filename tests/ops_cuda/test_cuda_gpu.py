"""The native back ends on a GPU: parity with the float64 reference, determinism, pieces, compile, graphs, large offsets."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from seqlab.ops import causal_conv1d, selective_scan
from seqlab.ops.selective_scan import cuda as native
from seqlab.ops.selective_scan.ends import piece_ends, torch_piece_ends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
FLOAT, HALF = torch.float32, torch.bfloat16
TOLERANCE = {FLOAT: 1e-5, HALF: 4e-3}


def relative(a, r):
    error = float((a.detach().double() - r.detach().double()).norm() / (r.detach().double().norm() + 1e-30))
    return float("inf") if error != error else error


def scan_inputs(batch, length, channels, states, dtype, options=True, decay=1.0, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=g)

    u, delta, z = (random(batch, length, channels).to(dtype) for _ in range(3))
    B, C = (random(batch, length, states).to(dtype) for _ in range(2))
    A = -torch.rand(channels, states, device="cuda", generator=g) * decay - 1e-4
    D, bias, initial = random(channels), random(channels) - 2, random(batch, channels, states)
    return [u, delta, A, B, C, *((D, z, bias, initial) if options else (None,) * 4)]


def call(inputs, backend, **kwargs):
    u, delta, A, B, C, D, z, bias, initial = inputs
    return selective_scan(u, delta, A, B, C, D, z, bias, True, initial, return_final_state=True, backend=backend, **kwargs)


def check_scan(inputs, tolerance, **kwargs):
    """Output, final state and every gradient of "cuda" against the reference in float64."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    exact = [None if x is None else x.double().requires_grad_() for x in inputs]
    y, final = call(leaves, "cuda", **kwargs)
    y64, final64 = call(exact, "reference", **kwargs)
    g = torch.Generator("cuda").manual_seed(1)
    dy, dfinal = (torch.randn(x.shape, device="cuda", generator=g).to(x.dtype) for x in (y, final))
    mine = torch.autograd.grad((y, final), [x for x in leaves if x is not None], (dy, dfinal))
    true = torch.autograd.grad((y64, final64), [x for x in exact if x is not None], (dy.double(), dfinal.double()))
    pairs = list(zip((y, final, *mine), (y64, final64, *true), strict=True))
    errors = [relative(a, r) for a, r in pairs]
    # a gradient of one number (one channel's D or bias) is a sum of random terms that may nearly cancel
    limits = [tolerance if r.numel() > 1 else 100 * tolerance for _, r in pairs]
    assert all(error < limit for error, limit in zip(errors, limits)), errors


@pytest.fixture(params=("in chunks", "in one launch"))
def kernels(request, monkeypatch):
    """Both ways of running a scan (scan.cu, scan_short.cu), whichever is chosen for its size."""
    for limit in ("SHORT_FORWARD", "SHORT_BACKWARD"):
        monkeypatch.setattr(native, limit, 0 if request.param == "in chunks" else 1 << 62)
    monkeypatch.setattr(native, "SAVED", math.inf)
    operator = selective_scan.__globals__
    for memory in (native._recipes, native._recent, operator["_known"], operator["_recent"]):
        memory.clear()
    native.short.cache_clear()
    yield request.param
    for memory in (native._recipes, native._recent, operator["_known"], operator["_recent"]):
        memory.clear()
    native.short.cache_clear()


@pytest.fixture
def every_tile(monkeypatch):
    """States are kept at every tile for the backward pass, however small the problem."""
    device = native._device(torch.empty(1, device="cuda"))
    monkeypatch.setattr(device, "keep_limit", 1 << 40)
    monkeypatch.setattr(native, "FINE_ABOVE", 0)
    operator = selective_scan.__globals__
    for memory in (native._recipes, native._recent, operator["_known"], operator["_recent"]):
        memory.clear()
    yield device
    for memory in (native._recipes, native._recent, operator["_known"], operator["_recent"]):
        memory.clear()


@pytest.mark.parametrize("length,channels,states", ((1, 6, 16), (7, 70, 5), (65, 64, 16), (1000, 130, 16), (3000, 512, 16), (600, 40, 100)))
@pytest.mark.parametrize("reverse,masked,options", ((False, False, True), (True, True, True), (True, False, False)))
@pytest.mark.parametrize("dtype", (FLOAT, HALF))
def test_states_kept_at_every_tile(length, channels, states, reverse, masked, options, dtype, every_tile):
    mask = torch.rand(2, length, device="cuda") > 0.3 if masked else None
    inputs = scan_inputs(2, length, channels, states, dtype, options)
    assert native.kept_every(every_tile, 2, length, channels, states) == native.TILE
    check_scan(inputs, TOLERANCE[dtype], reverse=reverse, mask=mask)


def test_states_kept_at_every_tile_or_not_give_the_same_gradients(every_tile):
    """The chunks are others, so the last bits may be too; dz is made of outputs rounded to bfloat16."""
    x = scan_inputs(1, 70000, 512, 16, HALF)
    dy = torch.randn_like(x[0])
    found = []
    for segment in (128, native.TILE):
        y, final, kept, ungated = native.forward(*x, None, True, False, segment)
        found.append((y, final, *native.backward(dy, final, *x, None, kept, True, False, segment, ungated)))
    errors = [relative(a, b) for a, b in zip(*found, strict=True)]
    assert max(e for i, e in enumerate(errors) if i != 8) < 1e-3 and errors[8] < 4e-3, errors


@pytest.mark.parametrize("length", (1, 2, 3, 7, 64, 65, 1000))
@pytest.mark.parametrize("reverse,masked,options", itertools.product((False, True), repeat=3))
@pytest.mark.parametrize("dtype", (FLOAT, HALF))
def test_scan(length, reverse, masked, options, dtype, kernels):
    mask = torch.rand(2, length, device="cuda") > 0.3 if masked else None
    check_scan(scan_inputs(2, length, 70, 5, dtype, options), TOLERANCE[dtype], reverse=reverse, mask=mask)


@pytest.mark.parametrize("length,channels", ((1, 6), (65, 70), (1000, 128), (512, 512)))
@pytest.mark.parametrize("masked,gate", ((True, True), (False, False)))
@pytest.mark.parametrize("dtype", (FLOAT, HALF))
def test_both_directions_at_once(length, channels, masked, gate, dtype):
    """Against one after the other: the same kernels on blocks of other widths."""
    scans = [scan_inputs(2, length, channels, 16, dtype, seed=seed)[:8] for seed in (0, 1)]
    if not gate:
        scans = [[*x[:6], None, x[7]] for x in scans]
    mask = torch.rand(2, length, device="cuda") > 0.3 if masked else None
    dy, segment = torch.randn(2, length, channels, device="cuda").to(dtype), native.segment_length(2, length, channels)
    assert native.pair_pays(scans[0][0], 16) and native.pair_pays(scans[0][0], 16, True)
    found = native.forward_pair(tuple(scans), mask, True, segment)
    grads = native.backward_pair(dy, scans, mask, [kept for _, kept in found], True, segment)
    for i, (x, (y, kept), mine) in enumerate(zip(scans, found, grads, strict=True)):
        alone, _, kept_alone, _ = native.forward(*x, None, mask, True, i > 0, segment, False)
        theirs = native.backward(dy, None, *x, None, mask, kept_alone, True, i > 0, segment)
        pairs = [(y, alone), (kept, kept_alone), *((a, b) for a, b in zip(mine, theirs, strict=True) if b is not None)]
        assert all(relative(a, b) < TOLERANCE[dtype] for a, b in pairs), [relative(a, b) for a, b in pairs]


@pytest.mark.parametrize("states", (1, 16, 20, 32, 64, 100, 256))
def test_numbers_of_states(states, kernels):
    check_scan(scan_inputs(1, 130, 40, states, FLOAT), TOLERANCE[FLOAT])


@pytest.mark.parametrize("decay", (1e-3, 0.03, 30.0, 3000.0))
def test_slow_and_fast_decay(decay, kernels):
    check_scan(scan_inputs(1, 2000, 64, 16, FLOAT, decay=decay), TOLERANCE[FLOAT])


def test_slow_states_do_not_drift(kernels):
    """A state multiplies as many decays as it remembers steps, here about 60: an error of each that has a sign adds up, that of
    ex2.approx to 1.6e-6."""
    g = torch.Generator("cuda").manual_seed(0)
    delta = 0.5 * torch.randn(1, 4000, 64, device="cuda", generator=g) - 7
    ones = torch.ones_like(delta)
    A, B = torch.full((64, 1), -16.0, device="cuda"), torch.ones(1, 4000, 1, device="cuda")
    y = selective_scan(ones, delta, A, B, B, delta_softplus=True, backend="cuda")
    exact = selective_scan(*(x.double() for x in (ones, delta, A, B, B)), delta_softplus=True, backend="reference")
    assert relative(y, exact) < 8e-7


@pytest.mark.parametrize("channels", (1, 2, 63, 64, 65, 96, 128, 300, 512))
def test_numbers_of_channels(channels, kernels):
    check_scan(scan_inputs(1, 100, channels, 16, FLOAT), TOLERANCE[FLOAT])
    check_scan(scan_inputs(1, 100, channels, 16, HALF), TOLERANCE[HALF])


@pytest.mark.parametrize("batch,length,channels", ((1, 20001, 128), (3, 3000, 200), (1, 3000, 1024)))
@pytest.mark.parametrize("reverse", (False, True))
def test_many_chunks_and_channel_blocks(batch, length, channels, reverse, kernels):
    check_scan(scan_inputs(batch, length, channels, 16, HALF), TOLERANCE[HALF], reverse=reverse)


def test_scan_of_slices_of_a_projection(kernels):
    inputs = scan_inputs(2, 100, 64, 16, HALF)
    both = torch.cat((inputs[0], inputs[6]), -1)
    inputs[0], inputs[6] = both[..., :64], both[..., 64:]
    check_scan(inputs, TOLERANCE[HALF])


def test_parameters_may_begin_anywhere(kernels):
    """As in a flat buffer of all parameters: D and the bias were once read two channels at a time."""
    inputs = scan_inputs(1, 100, 64, 16, HALF)
    flat = torch.cat((torch.zeros(1, device="cuda"), inputs[5], torch.zeros(2, device="cuda"), inputs[7]))
    inputs[5], inputs[7] = flat[1:65], flat[67:]
    y, true = call(inputs, "cuda")[0], call([x.double() for x in inputs], "reference")[0]
    assert flat[1:].data_ptr() % 8 and relative(y, true) < TOLERANCE[HALF]


def test_launch_from_a_thread_that_has_not_touched_the_gpu():
    """Autograd's threads are such: the driver has no context there until somebody sets it."""
    x = torch.randn(1, 40, 8, device="cuda")
    A, B = -torch.ones(8, 4, device="cuda"), torch.randn(1, 40, 4, device="cuda")
    with torch.no_grad():
        expected = selective_scan(x, x, A, B, B, backend="cuda")
        torch.cuda.synchronize()
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(torch.no_grad()(selective_scan), x, x, A, B, B, backend="cuda").result()
    assert torch.equal(found, expected)


def test_same_bits_on_ten_runs(kernels):
    inputs = [x.requires_grad_() for x in scan_inputs(1, 4000, 200, 16, HALF)]
    results = []
    for _ in range(10):
        y, final = call(inputs, "cuda")
        results.append((y, final, *torch.autograd.grad(y.float().square().sum(), inputs)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("reverse", (False, True))
def test_pieces_equal_whole(reverse, kernels):
    u, delta, A, B, C, D, z, bias, initial = scan_inputs(1, 3000, 64, 16, FLOAT)
    whole, final = call([u, delta, A, B, C, D, z, bias, initial], "cuda", reverse=reverse)
    cuts = [slice(0, 700), slice(700, 701), slice(701, 3000)]
    state, parts = initial, []
    for cut in cuts[::-1] if reverse else cuts:
        y, state = call([u[:, cut], delta[:, cut], A, B[:, cut], C[:, cut], D, z[:, cut], bias, state], "cuda", reverse=reverse)
        parts.append(y)
    assert relative(torch.cat(parts[::-1] if reverse else parts, 1), whole) < 1e-6
    assert relative(state, final) < 1e-6


def test_scan_in_a_compiled_graph(kernels):
    inputs = [x.requires_grad_() for x in scan_inputs(1, 300, 64, 16, FLOAT)]

    def step(*x):
        return call(list(x), "cuda")[0].square().sum()

    expected = torch.autograd.grad(step(*inputs), inputs)
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(*inputs), inputs)
    assert max(relative(a, r) for a, r in zip(found, expected, strict=True)) < 1e-5


def test_scan_and_convolution_in_a_cuda_graph(kernels):
    inputs = [x.requires_grad_() for x in scan_inputs(1, 300, 64, 16, FLOAT)]
    weight = torch.randn(64, 4, device="cuda", requires_grad=True)

    def step():
        u = causal_conv1d(inputs[0], weight, activation="silu", backend="cuda")
        y = call([u, *inputs[1:]], "cuda")[0]
        return torch.autograd.grad(y.square().sum(), [*inputs, weight])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("length,channels", (((1 << 31) // 2048 + 1000, 2048), ((1 << 32) // 4096 + 1000, 4096)))
def test_beyond_32_bit_offsets(length, channels):
    g = torch.Generator("cuda").manual_seed(0)
    u = torch.randn(1, length, channels, device="cuda", generator=g, dtype=HALF)
    A = -torch.rand(channels, 2, device="cuda") - 0.5
    B, C = (torch.randn(1, length, 2, device="cuda", generator=g, dtype=HALF) for _ in range(2))
    with torch.no_grad():
        whole, final = selective_scan(u, u, A, B, C, delta_softplus=True, return_final_state=True, backend="cuda")
        state = None
        for begin in range(0, length, 1 << 17):
            cut = slice(begin, begin + (1 << 17))
            y, state = selective_scan(u[:, cut], u[:, cut], A, B[:, cut], C[:, cut], None, None, None, True, state,
                                      return_final_state=True, backend="cuda")  # fmt: skip
            assert relative(whole[:, cut], y) < 2e-3
        assert relative(final, state) < 1e-4
        weight = torch.randn(channels, 4, device="cuda")
        conv = causal_conv1d(u, weight, activation="silu", backend="cuda")
        cut = slice(length - 1000, length)
        assert torch.equal(conv[:, cut][:, 3:], causal_conv1d(u[:, cut], weight, activation="silu", backend="cuda")[:, 3:])


@pytest.mark.parametrize("length", (1, 2, 7, 65, 1000))
@pytest.mark.parametrize("width", (1, 2, 4, 8))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("dtype,channels", ((FLOAT, 7), (HALF, 64)))
def test_convolution(length, width, reverse, dtype, channels):
    x = torch.randn(2, length, channels, device="cuda").to(dtype)
    weight, bias = torch.randn(channels, width, device="cuda"), torch.randn(channels, device="cuda")
    initial = torch.randn(2, width - 1, channels, device="cuda").to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, initial)]
    exact = [t.double().requires_grad_() for t in (x, weight, bias, initial)]
    y = causal_conv1d(*leaves[:3], "silu", leaves[3], reverse=reverse, backend="cuda")
    y64 = causal_conv1d(*exact[:3], "silu", exact[3], reverse=reverse, backend="reference")
    dy = torch.randn_like(y)
    mine, true = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(y64, exact, dy.double())
    errors = [relative(a, r) for a, r in zip((y, *mine), (y64, *true), strict=True) if r.numel()]
    assert max(errors) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype,tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("states,near", ((16, 65536), (16, 300), (70, 65536)))
def test_what_a_piece_does_to_a_state(monkeypatch, dtype, tolerance, reverse, states, near):
    """ends.py: the kernels' summary of a piece, whole or part by part, against torch in float64."""
    monkeypatch.setitem(piece_ends.__globals__, "NEAR", {"cuda": near})
    torch.manual_seed(0)
    batch, length, channels = 2, 5000, 130
    x, delta, z, dy = (torch.randn(batch, length, channels, device="cuda").to(dtype) for _ in range(4))
    B, C = (torch.randn(batch, length, states, device="cuda").to(dtype) for _ in range(2))
    A, bias = -torch.rand(channels, states, device="cuda") * 0.1, torch.randn(channels, device="cuda") - 4
    mask = torch.rand(batch, length, device="cuda") > 0.2
    shared = (A, bias, True, mask, reverse)
    end, sums = piece_ends(x, B, delta, *shared)
    start, _ = piece_ends(dy, C, delta, *shared, gate=z, adjoint=True)
    exact = [t.double() for t in (x, B, dy, C, delta, A, bias, z)]
    for got, right in zip(
        (end, sums, start),
        (
            *torch_piece_ends(exact[0], exact[1], exact[4], exact[5], exact[6], mask, True, reverse),
            torch_piece_ends(exact[2], exact[3], exact[4], exact[5], exact[6], mask, True, reverse, exact[7], True)[0],
        ),
    ):
        assert (got.double() - right).norm() / right.norm() < tolerance
