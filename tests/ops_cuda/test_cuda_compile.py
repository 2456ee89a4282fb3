"""Every kernel compiles for Ampere, Hopper and Blackwell, without a GPU."""

import pytest

from seqlab.model import ModelConfig, build_model
from seqlab.ops import nvrtc
from seqlab.ops.block import rows
from seqlab.ops.causal_conv1d import cuda as conv
from seqlab.ops.decode import batched, clustered, persistent, solo
from seqlab.ops.decode.program import Program
from seqlab.ops.hidden_markov import cuda as markov
from seqlab.ops.selective_scan import cuda as scan

try:
    nvrtc.compiler()
    MISSING = None
except nvrtc.NativeError as e:
    MISSING = str(e)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

ARCHITECTURES = (80, 90, 100)
# states, warps, bf16, paired, wide, fine, gated, grouped
SCAN = (
    (16, 4, 1, 1, 1, 0, 1, 0), (5, 1, 0, 0, 0, 0, 1, 0), (16, 3, 0, 1, 1, 0, 0, 0), (16, 4, 1, 1, 1, 1, 1, 0), (5, 1, 0, 0, 0, 1, 0, 1),
    (16, 3, 0, 1, 1, 1, 1, 0),
)  # fmt: skip
SHORT = (  # states, across, times, cluster, tile going forward, bf16, paired, wide
    (16, 4, 8, 2, 16, 1, 1, 1), (5, 1, 4, 1, 8, 0, 0, 0), (32, 2, 1, 1, 16, 0, 1, 1), (16, 8, 2, 8, 8, 1, 1, 1),
)  # fmt: skip
CONV = ((4, 4, 1, 0, 1, 0), (8, 1, 0, 0, 0, 1))  # width, vector, bf16, paired, silu, masked
NORM = ((256, 4, 1, 1, 0), (7, 1, 0, 1, 0))  # channels, vector, bf16, wide, paired


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("values", SCAN)
def test_scan_compiles(arch, values):
    names = ("STATES", "WARPS", "BF16", "PAIRED", "WIDE", "FINE", "GATED", "GROUPED")
    defines = tuple(zip(names, values, strict=True))
    image = nvrtc.compile_source(nvrtc.source(scan.SOURCE), nvrtc.options(defines, arch), scan.SOURCE)
    assert image[:4] == b"\x7fELF"
    for kernel in scan.KERNELS:
        assert kernel.encode() in image


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("values", SHORT)
def test_short_scan_compiles(arch, values):
    defines = dict(zip(("STATES", "ACROSS", "TIMES", "CLUSTER", "TILE", "BF16", "PAIRED", "WIDE"), values, strict=True))
    if arch < 90:
        defines["CLUSTER"] = 1
    for forward in (1, 0):
        for both in (0, 1):
            all_of_it = defines | {"FORWARD": forward, "BOTH": both} | ({} if forward else {"TILE": scan.TILE})
            flags = nvrtc.options(tuple(all_of_it.items()), arch)
            image = nvrtc.compile_source(nvrtc.source(scan.SHORT_SOURCE), flags, scan.SHORT_SOURCE)
            assert image[:4] == b"\x7fELF"
            for kernel in scan.SHORT_KERNELS:
                wanted = ("forward" in kernel) == bool(forward)
                assert (kernel.encode() in image) == wanted and (f"{kernel}_pair".encode() in image) == (wanted and bool(both))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("values", CONV)
def test_convolution_compiles(arch, values):
    defines = tuple(zip(("WIDTH", "VEC", "BF16", "PAIRED", "SILU", "MASKED"), values, strict=True))
    image = nvrtc.compile_source(nvrtc.source(conv.SOURCE), nvrtc.options(defines, arch), conv.SOURCE)
    assert image[:4] == b"\x7fELF"
    for kernel in conv.KERNELS:
        assert kernel.encode() in image


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("values", NORM)
def test_norm_compiles(arch, values):
    defines = tuple(zip(("CHANNELS", "VEC", "BF16", "WIDE", "PAIRED"), values, strict=True))
    image = nvrtc.compile_source(nvrtc.source(rows.SOURCE), nvrtc.options(defines, arch), rows.SOURCE)
    assert image[:4] == b"\x7fELF"
    for kernel in rows.KERNELS:
        assert kernel.encode() in image


@pytest.mark.parametrize(
    "arch, cluster, streams, half", [(80, 1, 8, 1), (90, 8, 1, 1), (100, 2, 4, 0)]
)
def test_decoder_compiles(arch, cluster, streams, half):
    values = persistent.defines(persistent.Shape(cluster, streams, bool(half)), 16, 4)
    image = nvrtc.compile_source(nvrtc.source(persistent.SOURCE), nvrtc.options(values, arch), persistent.SOURCE)
    assert image[:4] == b"\x7fELF" and persistent.KERNEL.encode() in image


@pytest.mark.parametrize("arch, module, d_model, half", [(80, batched, 96, 1), (90, batched, 256, 0), (90, solo, 256, 1), (100, solo, 64, 0)])
def test_decoders_of_one_size_compile(arch, module, d_model, half):
    program = Program(build_model(ModelConfig(d_model=d_model, n_layer=1, vocab_size=64)))
    device = (227 * 1024,) if module is batched else (227 * 1024, 1, 132)
    sizes = module.Sizes.of(program, bool(half), *device)
    values = sizes.defines(program) if module is batched else sizes.defines()
    image = nvrtc.compile_source(nvrtc.source(module.SOURCE), nvrtc.options(values, arch), module.SOURCE)
    assert image[:4] == b"\x7fELF"
    for kernel in batched.KERNELS if module is batched else (solo.KERNEL,):
        assert kernel.encode() in image


@pytest.mark.parametrize("arch, d_model", [(90, 64), (90, 256), (100, 512)])
def test_clusters_of_streams_compile(arch, d_model):
    program = Program(build_model(ModelConfig(d_model=d_model, n_layer=2, vocab_size=64)))
    sizes = clustered.Sizes.of(program, 512, clustered.at_once(d_model // 32, 132), 227 * 1024)
    image = nvrtc.compile_source(nvrtc.source(clustered.SOURCE), nvrtc.options(sizes.defines(), arch), clustered.SOURCE)
    assert image[:4] == b"\x7fELF" and clustered.KERNEL.encode() in image


def test_error_carries_the_compilers_words():
    with pytest.raises(nvrtc.NativeError, match="undeclared_thing"):
        nvrtc.compile_source('extern "C" __global__ void k() { undeclared_thing(); }', nvrtc.options((), 90), "k.cu")


def test_gpu_newer_than_the_compiler_gets_portable_code():
    newest = nvrtc.architectures()[-1]
    flags = nvrtc.options((), newest + 90)
    assert f"--gpu-architecture=compute_{newest}" in flags
    image = nvrtc.compile_source('extern "C" __global__ void k(float* p) { *p = 1.f; }', flags, "k.cu")
    assert b".target sm_" in image


def test_gpu_older_than_the_compiler_is_refused():
    with pytest.raises(nvrtc.NativeError, match="cannot compile for sm_10"):
        nvrtc.options((), 10)


def test_cache_is_used_checked_and_mended(tmp_path, monkeypatch):
    monkeypatch.setenv(nvrtc.CACHE, str(tmp_path))
    defines = (("WIDTH", 2), ("VEC", 1), ("BF16", 0), ("PAIRED", 0), ("SILU", 1), ("MASKED", 0))
    first = nvrtc.code(conv.SOURCE, defines, 90)
    (stored,) = (tmp_path / "kernels").iterdir()
    with monkeypatch.context() as m:
        m.setattr(nvrtc, "compile_source", lambda *a: pytest.fail("compiled again"))
        assert nvrtc.code(conv.SOURCE, defines, 90) == first
    stored.write_bytes(stored.read_bytes()[:-1])  # a torn file
    assert nvrtc.code(conv.SOURCE, defines, 90) == first
    assert len(list((tmp_path / "kernels").iterdir())) == 1


def test_cache_folder_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(nvrtc.CACHE, str(tmp_path / "file"))
    defines = (("WIDTH", 2), ("VEC", 1), ("BF16", 0), ("PAIRED", 0), ("SILU", 1), ("MASKED", 0))
    assert nvrtc.code(conv.SOURCE, defines, 90)[:4] == b"\x7fELF"


def test_a_user_without_a_home_is_no_obstacle(monkeypatch):
    """A container told to run as some number has no name for it, and without $HOME no home: every kernel was a RuntimeError."""
    for name in (nvrtc.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(nvrtc.Path, "home", unknown)
    assert nvrtc.cache_folder() is None
    monkeypatch.setattr(nvrtc, "compile_source", lambda *arguments: b"built")
    assert nvrtc.code(conv.SOURCE, (("WIDTH", 2),), 90) == b"built"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("states", (1, 7, 32))
def test_hidden_markov_compiles(arch, states):
    image = nvrtc.compile_source(nvrtc.source(markov.SOURCE), nvrtc.options(markov.defines(states), arch), markov.SOURCE)
    assert image[:4] == b"\x7fELF" and b"follow" in image
