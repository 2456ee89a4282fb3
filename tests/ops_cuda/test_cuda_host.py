"""The host side of the native kernels: parameters, planning, reasons."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlab.ops import nvrtc
from seqlab.ops.causal_conv1d import cuda as conv
from seqlab.ops.dispatch import Request
from seqlab.ops.selective_scan import cuda as scan


def test_parameters_follow_the_source():
    fields = [name for name, _ in nvrtc.params_type(scan.SOURCE)._fields_]
    assert fields[: len(scan.READ)] == list(scan.READ)
    assert fields[-2:] == ["softplus", "reverse"]
    assert "mask" in fields and "scratch" in fields and len(set(fields)) == len(fields)
    assert [name for name, _ in nvrtc.params_type(scan.SHORT_SOURCE)._fields_] == fields
    assert [name for name, _ in nvrtc.params_type(conv.SOURCE)._fields_][-2:] == ["reverse", "add"]


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(1, 64),
    length=st.integers(1, 1 << 21),
    channels=st.integers(1, 4096),
    resident=st.integers(1, 2000),
    warps=st.integers(1, 8),
)
def test_plan_covers_the_sequence(batch, length, channels, resident, warps):
    segment = scan.segment_length(batch, length, channels)
    cut = scan.plan(batch, length, channels, resident, warps, segment)
    assert cut.chunk % segment == 0 and segment % scan.STAGE == 0
    assert (cut.chunks - 1) * cut.chunk < length <= cut.chunks * cut.chunk
    assert cut.warps <= warps and 64 * cut.warps * cut.channel_blocks >= channels
    assert 64 * cut.warps * (cut.channel_blocks - 1) < channels


def test_long_sequence_fills_the_gpu_and_short_wide_batch_needs_no_first_pass():
    assert scan.plan(1, 1 << 20, 512, 396, 4, 256).chunks * 2 >= 0.9 * 396
    assert scan.plan(64, 2048, 4096, 396, 4, 256).chunks <= 2


def test_chunks_fill_a_wave_exactly_where_every_state_is_kept():
    """Multiples of 128 steps left up to a twentieth of the multiprocessors without work in the last."""
    for channels, slots, warps in ((512, 396, 4), (256, 264, 4), (128, 792, 2)):
        grain = scan._grain(scan.TILE, 1, 1 << 20, channels)
        cut = scan.plan(1, 1 << 20, channels, slots, warps, grain)
        assert grain == scan.STAGE and 0.98 * slots <= cut.chunks * cut.channel_blocks <= slots
    assert scan._grain(scan.TILE, 64, 2048, 2048) == scan._grain(0, 64, 2048, 2048) == 128 and scan._grain(64, 1, 1 << 20, 64) == 64


def test_states_kept_are_one_in_many_steps():
    assert scan.segment_length(1, 1 << 20, 512) == 128
    assert scan.segment_length(1, 512, 128) == 32


def test_short_scans_fit_and_cover_the_sequence():
    class Gpu:
        multiprocessors, shared_limit, clusters = 132, 227 * 1024, True

    class Small(Gpu):
        shared_limit, clusters = 99 * 1024, False

    assert scan.short(Gpu, 1, 1, 1, 16, 2) == scan.short(Small, 1, 1, 1, 16, 2) and scan.short(Gpu, 1, 1, 1, 16, 2).times == 1
    assert scan.short(Gpu, 1, 1 << 20, 512, 16, 2) is None and scan.short(Gpu, 1, 512, 128, 33, 2) is None
    assert scan.short(Gpu, 8, 512, 512, 16, 2) is not None and scan.short(Gpu, 8, 2048, 512, 16, 2, True) is None
    for device in (Gpu, Small):
        for batch, length, channels in ((1, 512, 128), (1, 4096, 16), (8, 512, 128), (1, 512, 2048), (8, 512, 512), (1, 2048, 512)):
            for n in (1, 16, 32):
                for size in (2, 4):
                    for back in (False, True):
                        sides = scan.short(device, batch, length, channels, n, size, back)
                        if sides is None:
                            continue
                        assert sides.shared(n, size, back) <= device.shared_limit
                        assert sides.blocks == 1 or device.clusters and sides.covers >= length
                        assert not back or sides.tile == scan.TILE and sides.span % scan.segment_length(batch, length, channels) == 0


def test_two_scans_run_at_once_where_one_leaves_room():
    class Gpu:
        multiprocessors, shared_limit, clusters = 132, 227 * 1024, True

    for backward in (False, True):
        assert scan.short(Gpu, 1, 512, 128, 16, 2, backward, 2) is not None  # 12 instead of 22 microseconds forward, 24 instead of 45 backward
        assert scan.short(Gpu, 8, 512, 512, 16, 2, backward, 2) is None
    assert scan.short(Gpu, 1, 2048, 128, 16, 2, True, 2) is None  # 84 instead of 55: no room for sixteen more clusters


def test_clusters_are_no_more_than_run_at_one_time_if_that_can_be():
    """An H200 runs 66 clusters of two blocks of eight warps at a time, but 30 of four: the other two would take as long again."""

    class Gpu:
        multiprocessors, shared_limit, clusters = 132, 227 * 1024, True

    assert scan.Sides(8, 8, 4, 16).at_once(132) == 30 and scan.Sides(4, 8, 2, 16).at_once(132) == 66
    sides = scan.short(Gpu, 1, 2048, 512, 16, 2)
    assert sides.clusters(1, 512) <= sides.at_once(132) and sides.covers >= 2048


def test_fewer_warps_where_states_fill_the_shared_memory():
    hopper, smallest = 227 * 1024, 99 * 1024
    assert scan._most_warps("scan_backward", 16, 4, hopper) == 4
    for n in range(1, scan.GROUP + 1):
        for kernel in ("scan_ends", "scan_forward"):
            assert scan._shared_bytes(kernel, n, scan._most_warps(kernel, n, 4, smallest)) <= smallest
    for n in range(1, scan.BACKWARD_GROUP + 1):
        assert scan._shared_bytes("scan_backward", n, scan._most_warps("scan_backward", n, 4, smallest)) <= smallest


def test_paired_access_needs_even_rows():
    x = torch.empty(2, 8, 6, dtype=torch.bfloat16)
    assert scan._paired(x) == 1
    assert scan._paired(x[..., 1:5]) == 0
    assert scan._paired(torch.empty(2, 8, 5)) == 0


def test_kinds_of_calls_tell_which_tensor_is_misaligned():
    """Once it was only known that some tensor was, and a recipe that reads pairs of u could meet a u between two pairs."""
    memory = torch.empty(2, 66, dtype=torch.bfloat16)
    even, odd = (memory[i, i : i + 64].view(1, 16, 4) for i in range(2))
    assert odd.data_ptr() % 4 == 2 and even.stride() == odd.stride()
    A = torch.empty(4, 4)
    assert scan._kind(None, "forward", (even, A, even, odd)) != scan._kind(None, "forward", (odd, A, even, even))


def test_vector_width_follows_alignment():
    x = torch.empty(2, 8, 64, dtype=torch.bfloat16)
    assert conv._vector(8, x) == 8
    assert conv._vector(8, x[..., 4:]) == 4
    assert conv._vector(2, torch.empty(1, 4, 3)) == 1


@pytest.mark.parametrize("module", (scan, conv))
def test_reasons(module):
    reason = module.unavailable(Request("cpu", torch.float32, 4))
    assert isinstance(reason, str) and reason
    if torch.cuda.is_available():
        assert "float64" in module.unavailable(Request("cuda", torch.float64, 4))
    else:
        assert "CUDA" in module.unavailable() or "GPU" in module.unavailable()


def test_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(nvrtc, "machine", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old")
    assert "Old has compute capability 7.0" in nvrtc.gpu.__wrapped__(0)


def test_missing_compiler_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: ["libnothing.so"])
    with pytest.raises(nvrtc.NativeError, match="pip install nvidia-cuda-nvrtc"):
        nvrtc.compiler.__wrapped__()


def test_rows_too_far_apart_are_refused():
    u = torch.empty(1, 1, 4)
    far = torch.as_strided(u, (1, 1, 4), (4, 1 << 29, 1))
    with pytest.raises(ValueError, match="allowed: below 2\\^29"):
        scan._template(u, far, u[0].t(), u, u, None, True, False, scan.plan(1, 1, 4, 1, 1, 32))


def test_bytes_of_a_shape_match_the_formula():
    slots, staged, inputs = 16 * 32 * 16 * 4, 4 * 16 * 36 * 2, 3 * 8 * 64 * 2 * 4
    assert scan._shared_bytes("scan_forward", 16, 4, 2, 1) == slots + 2 * staged + inputs  # B and C twice: one stage ahead
    assert scan._shared_bytes("scan_forward", 64, 1, 4, 0) == 8 * 32 * 64 + 4 * 64 * 36 * 2 + 3 * 8 * 64 * 4
    assert 2 * (scan._shared_bytes("scan_backward", 16, 4) + 1024) <= 228 * 1024  # two blocks a Hopper multiprocessor
    assert 4 * (scan._shared_bytes("scan_backward", 16, 2) + 1024) <= 228 * 1024  # once three fitted: 1.35 times the time
    assert 2 * (scan._shared_bytes("scan_backward", 16, 3, 4) + 1024) <= 228 * 1024
    for size in (2, 4):  # where the state of every tile is kept
        assert 2 * (scan._shared_bytes("scan_backward", 16, 4, size, 0, 1) + 1024) <= 228 * 1024


def test_states_are_kept_at_every_tile_where_they_fit(monkeypatch):
    class Gpu:
        keep_limit = scan.keep_limit(140 << 30)

    shape = 1, 1 << 20, 512
    assert scan.kept_every(Gpu, *shape, 16) == scan.TILE and scan.kept_every(Gpu, 8, 1 << 17, 512, 16) == scan.TILE
    assert scan.kept_every(Gpu, 1, 1 << 21, 512, 16) == scan.kept_every(Gpu, *shape, 64) == 128  # 8 and 16 GiB
    assert scan.kept_every(Gpu, 1, 1024, 128, 16) == scan.segment_length(1, 1024, 128)  # the host is what takes time
    for text, kept in (("0", 128), ("3.9", 128), ("4", scan.TILE)):
        monkeypatch.setenv(scan.KEEP_LIMIT, text)
        Gpu.keep_limit = scan.keep_limit(140 << 30)
        assert scan.kept_every(Gpu, *shape, 16) == kept
    for text in ("much", "4GB", "nan", "inf", "-1"):
        monkeypatch.setenv(scan.KEEP_LIMIT, text)
        with pytest.raises(ValueError, match="SEQLAB_SCAN_KEEP is .*; allowed: a number of GiB"):
            scan.keep_limit(140 << 30)


def test_a_launch_is_prepared_once_for_every_stream_and_sets_the_context_where_a_thread_has_none(monkeypatch):
    prepared, launched, current, made = [], [], [7], []
    answers = iter((0, 0, nvrtc.NO_CONTEXT, 0, 0))

    def queue(config, function, arguments, extra):
        launched.append((config, arguments[0]))
        return next(answers)

    module = object.__new__(nvrtc.Module)
    module.device, module._launches = 3, {}
    monkeypatch.setattr(module, "_prepare", lambda *what: prepared.append(what) or (queue, what[4], None))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: current[0] + 10 * device, raising=False)
    monkeypatch.setattr(nvrtc, "make_current", made.append)
    params = nvrtc.params_type(scan.SOURCE)()
    launch, address = module.launcher("kernel", 2, 32, 0), ctypes.addressof(params)
    launch(params)
    launch(params)
    current[0] = 8
    launch(params)  # tried twice: this thread has no context yet
    assert launched == [(37, address)] * 2 + [(38, address)] * 2 and made == [3]
    assert prepared == [("kernel", 2, 32, 0, stream, False) for stream in (37, 38)]
    module.launch("kernel", 2, 32, 0, params)
    module.launch("kernel", 0, 32, 0, params)  # no blocks: nothing to launch
    assert len(launched) == 5 and len(module._launches) == 2


def test_memory_is_seen_by_dispatch_modes(monkeypatch):
    """What compiled code takes memory with goes past them."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    quick, seen = object(), []
    monkeypatch.setattr(nvrtc, "_empty_strided_cuda", quick)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert nvrtc.memory(gpu) is quick and nvrtc.memory(cpu) is not quick
    with Watch():
        assert nvrtc.memory(gpu) is not quick
        x = nvrtc.memory(cpu)((2, 3), (3, 1), torch.bfloat16)
    assert seen and x.shape == (2, 3) and x.is_contiguous() and x.dtype == torch.bfloat16
    monkeypatch.setattr(nvrtc, "_empty_strided_cuda", None)
    assert nvrtc.memory(gpu) is not None


def test_results_have_no_gaps():
    for shape in ((2, 5, 6), (1, 1, 1), (1, 7, 1)):
        u = torch.empty(*shape, dtype=torch.bfloat16)
        batch, length, channels = shape
        what = scan._results(u, 3, 4)
        wanted = (batch, length, channels), (batch, length, 3), (channels, 3), (channels,), (batch, channels, 3), (batch, 4, 3, channels)
        for (sizes, strides, dtype), shape, half in zip(what[1:], wanted, (True, True, False, False, False, False), strict=True):
            alike = torch.empty(shape)
            assert sizes == shape and strides == alike.stride() and dtype == (u.dtype if half else torch.float32)


def test_rows_of_results_are_as_aligned_as_those_read():
    """Inputs may be slices of longer rows; results have none to spare, and are written in pieces of 16 bytes, too."""
    x = torch.empty(1, 4, 80, dtype=torch.bfloat16)
    assert scan._wide(16, x) == 1 and scan._wide(16, x[..., :72]) == 1 and scan._wide(16, x[..., :76]) == 0
