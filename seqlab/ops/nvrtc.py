"""CUDA C++ compiled at first use with the compiler library that comes inside torch's packages, kept on disk, launched on
torch's stream. The user needs the NVIDIA driver and nothing else.

A source file declares `struct Params { ... }` whose fields are all 8 bytes wide (pointers, i64); it is the one argument
of every kernel in it, and this module reads its layout from the source. Everything is called through ctypes: libnvrtc
(compile, works without a GPU) and libcuda (load, launch).
"""

import ctypes
import ctypes.util
import functools
import hashlib
import importlib.util
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from seqlab.ops.dispatch import dispatch_modes, memorise

try:  # what compiled code takes its memory with
    from torch._C._dynamo.guards import _empty_strided_cuda
except ImportError:  # torch's own affair, which may go
    _empty_strided_cuda = None

CACHE = "SEQLAB_CACHE"
OLDEST = (8, 0)  # Ampere: bf16 conversion instructions
HERE = Path(__file__).resolve().parent
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_lock = threading.RLock()


class NativeError(RuntimeError):
    """The compiler, the driver or the GPU cannot do what is asked; the message says which and why."""


# ------------------------------------------------------------------------------------------------------ libraries
def _candidates() -> list[str]:
    """Where libnvrtc may be: torch's nvidia packages (both layouts), torch's own folder, the system."""
    names = ("libnvrtc.so.*", "nvrtc64_*.dll")
    found: list[str] = []
    roots: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    if spec is not None and spec.submodule_search_locations:
        roots += [Path(p) for p in spec.submodule_search_locations]
    wanted = (torch.version.cuda or "").split(".")[0]
    for root in roots:
        for name in names:
            hits = [*root.glob(f"*/lib/{name}"), *root.glob(f"*/bin/{name}"), *root.glob(f"*/bin/*/{name}")]
            hits = [h for h in hits if "builtins" not in h.name and "alt" not in h.name]
            # The one made for the CUDA that torch was built with goes first: the driver is known to take its output.
            found += [str(h) for h in sorted(hits, key=lambda h: (f".{wanted}" not in h.name, h.name))]
    lib = Path(torch.__file__).resolve().parent / "lib"
    for name in names:
        found += [str(h) for h in sorted(lib.glob(name)) if "builtins" not in h.name and "alt" not in h.name]
    found += [f"libnvrtc.so.{wanted}", "libnvrtc.so"] if sys.platform != "win32" else [f"nvrtc64_{wanted}0_0.dll"]
    return found


@functools.cache
def compiler() -> ctypes.CDLL:
    """libnvrtc, or NativeError with what was tried."""
    tried = []
    for name in _candidates():
        try:
            lib = ctypes.CDLL(name)
            lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            return lib
        except (OSError, AttributeError) as e:
            tried.append(f"{name}: {e}")
    raise NativeError(
        "no NVRTC library found beside torch; install one with `pip install nvidia-cuda-nvrtc` "
        f"(tried: {'; '.join(tried) or 'nothing'})"
    )


@functools.cache
def driver() -> ctypes.CDLL:
    """libcuda, or NativeError."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as e:
        raise NativeError(f"no NVIDIA driver ({name}: {e}); install the driver of your GPU") from e


def _nvrtc(status: int, what: str) -> None:
    if status:
        raise NativeError(f"{what}: {compiler().nvrtcGetErrorString(status).decode()}")


def _cuda(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise NativeError(f"{what}: {(text.value or b'error').decode()} ({status})")


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc(compiler().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


@functools.cache
def architectures() -> tuple[int, ...]:
    """Compute capabilities (80, 90, 100, ...) that NVRTC can compile for."""
    count = ctypes.c_int()
    _nvrtc(compiler().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    values = (ctypes.c_int * count.value)()
    _nvrtc(compiler().nvrtcGetSupportedArchs(values), "nvrtcGetSupportedArchs")
    return tuple(sorted(values))


# -------------------------------------------------------------------------------------------------------- compile
@functools.cache
def source(name: str) -> str:
    """Text of a kernel file (path inside seqlab/ops) with the common header in front and what it includes in place."""
    text = (HERE / "device.cuh").read_text(encoding="utf-8") + (HERE / name).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda match: (HERE / match[1]).read_text(encoding="utf-8"), text, flags=re.M)


def options(defines: tuple[tuple[str, int], ...], arch: int) -> list[str]:
    """Compiler options for a set of macros and a compute capability (90: sm_90)."""
    known = architectures()
    if arch in known:
        target = f"sm_{arch}"
    else:  # a GPU newer than the compiler: portable code that the driver finishes
        older = [a for a in known if a <= arch]
        if not older:
            raise NativeError(f"NVRTC {version()[0]}.{version()[1]} cannot compile for sm_{arch}; it knows {known}")
        target = f"compute_{older[-1]}"
    flags = [f"--gpu-architecture={target}", "--std=c++17", "--fmad=true", "--ftz=true", "--extra-device-vectorization"]
    return flags + [f"-D{k}={v}" for k, v in defines]


def compile_source(text: str, flags: list[str], name: str = "kernel.cu") -> bytes:
    """Compile to machine code (cubin), or to PTX when the target is a virtual one."""
    lib, program = compiler(), ctypes.c_void_p()
    _nvrtc(lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None), "nvrtcCreateProgram")
    try:
        argv = (ctypes.c_char_p * len(flags))(*[f.encode() for f in flags])
        status = lib.nvrtcCompileProgram(program, len(flags), argv)
        if status:
            size = ctypes.c_size_t()
            lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            lib.nvrtcGetProgramLog(program, log)
            raise NativeError(f"NVRTC could not compile {name} ({' '.join(flags)}): {log.value.decode(errors='replace')}")
        kind = "PTX" if any("compute_" in f for f in flags) else "CUBIN"
        size = ctypes.c_size_t()
        _nvrtc(getattr(lib, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)), f"nvrtcGet{kind}Size")
        code = ctypes.create_string_buffer(size.value)
        _nvrtc(getattr(lib, f"nvrtcGet{kind}")(program, code), f"nvrtcGet{kind}")
        return code.raw
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: $SEQLAB_CACHE, else the user's cache folder. None for a user without a home, such as a number
    that a container was told to run as."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]) / "kernels"
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return base / "seqlab" / "kernels"


def code(name: str, defines: tuple[tuple[str, int], ...], arch: int) -> bytes:
    """Machine code of a kernel file for a set of macros, from the disk cache where it is there and whole."""
    flags = options(defines, arch)
    key = hashlib.sha256("\0".join([source(name), *flags, str(version())]).encode()).hexdigest()
    folder = cache_folder()
    if folder is None:
        return compile_source(source(name), flags, name)
    path = folder / f"{key[:40]}.bin"
    try:
        stored = path.read_bytes()
        if stored[:32] == hashlib.sha256(stored[32:]).digest():
            return stored[32:]
    except OSError:
        pass
    built = compile_source(source(name), flags, name)
    try:  # a cache that cannot be written costs time, not correctness
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as f:
            f.write(hashlib.sha256(built).digest() + built)
        os.replace(temporary, path)
    except OSError:
        pass
    return built


@functools.cache
def params_type(name: str) -> type[ctypes.Structure]:
    """The source's `struct Params` as a ctypes structure. Fields are set by name; pointers as integers."""
    body = re.search(r"struct Params \{(.*?)\n\};", source(name), re.S).group(1)
    body = re.sub(r"//[^\n]*", "", body)
    fields = []
    for declaration in body.split(";"):
        text = " ".join(declaration.split())
        if not text:
            continue
        pointer = "*" in text
        if not pointer and not text.startswith("i64 "):
            raise NativeError(f"{name}: Params field {text!r} is neither a pointer nor i64")
        names = re.sub(r"^(const )?(unsigned )?\w+ ", "", text.replace("*", " * "))
        for field in names.split(","):
            fields.append((field.replace("*", "").strip(), ctypes.c_void_p if pointer else ctypes.c_int64))
    return type("Params", (ctypes.Structure,), {"_fields_": fields})


# --------------------------------------------------------------------------------------------------- load and launch
CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # cuda.h: CU_LAUNCH_ATTRIBUTE_...


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [("id", ctypes.c_int32), ("pad", ctypes.c_int32), ("value", ctypes.c_int32 * 16)]


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [(name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")] + [
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_One = ctypes.c_void_p * 1
"""The addresses of a kernel's arguments: there is one."""
_addressof = ctypes.addressof


class Module:
    """One compiled file on one device."""

    def __init__(self, name: str, defines: tuple[tuple[str, int], ...], device: int):
        major, minor = torch.cuda.get_device_capability(device)
        image = code(name, defines, 10 * major + minor)
        self.device = device
        self._image, self._handle, self._functions = image, ctypes.c_void_p(), {}
        self._large_clusters = dict(defines).get("CLUSTER", 1) > 8  # more than every GPU with clusters allows
        self._launches: dict[tuple, Callable] = {}  # those seen before
        with torch.cuda.device(device):
            make_current(device)
            _cuda(driver().cuModuleLoadData(ctypes.byref(self._handle), image), f"loading {name}")

    def function(self, kernel: str, shared: int, beside: bool = False) -> ctypes.c_void_p:
        """A kernel, allowed `shared` bytes of dynamic shared memory. beside: of a multiprocessor's memory, as much as can be is
        shared memory, so that blocks of other such kernels find room in the rest."""
        known = self._functions.get(kernel)
        if known is None or known[1] < shared:
            make_current(self.device)
            f = ctypes.c_void_p()
            _cuda(driver().cuModuleGetFunction(ctypes.byref(f), self._handle, kernel.encode()), kernel)
            if shared > 48 * 1024:
                _cuda(driver().cuFuncSetAttribute(f, 8, shared), f"{kernel}: {shared} bytes of shared memory")
            if self._large_clusters:  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
                _cuda(driver().cuFuncSetAttribute(f, 14, 1), kernel)
            if beside:  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent
                _cuda(driver().cuFuncSetAttribute(f, 9, 100), kernel)
            known = self._functions[kernel] = (f, shared)
        return known[0]

    @functools.lru_cache(maxsize=256)  # noqa: B019 (modules live as long as the process)
    def resident(self, kernel: str, block: int, shared: int) -> int:
        """How many blocks of a kernel one multiprocessor holds at a time."""
        count = ctypes.c_int()
        f = self.function(kernel, shared)
        make_current(self.device)
        _cuda(
            driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(ctypes.byref(count), f, block, ctypes.c_size_t(shared)),
            kernel,
        )
        if count.value == 0:
            raise NativeError(f"{kernel}: a block of {block} threads with {shared} bytes does not fit this GPU")
        return count.value

    def clusters(self, kernel: str, block: int, shared: int, size: int) -> int:
        """How many clusters of `size` blocks of a kernel the GPU runs at a time."""
        count = ctypes.c_int()
        f = self.function(kernel, shared)
        make_current(self.device)
        attribute = _Attribute(CLUSTER_DIMENSION, 0, (ctypes.c_int32 * 16)(size, 1, 1))
        config = _Config(size, 1, 1, block, 1, 1, shared, None, ctypes.pointer(attribute), 1)
        _cuda(driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), f, ctypes.byref(config)), kernel)
        return count.value

    def launch(
        self, kernel: str, grid: int, block: int, shared: int, params: ctypes.Structure | ctypes.Array, early: bool = False
    ) -> None:
        """Queue a kernel on torch's current stream of this module's device, which must be the current one.

        early: it may begin as soon as all blocks of the kernel before have said so (griddepcontrol), and waits for that one's
        end by itself; compute capability 9.0."""
        what = (kernel, grid, block, shared, early)
        launch = self._launches.get(what)
        if launch is None:
            launch = memorise(self._launches, what, self.launcher(*what))
        launch(params)

    def launcher(self, kernel: str, grid: int, block: int, shared: int, early: bool = False) -> Callable[[ctypes.Structure | ctypes.Array], None]:
        """`launch` but for the parameters, for those who launch the same again and again."""
        device, known, address, stream_of = self.device, {}, _addressof, torch._C._cuda_getCurrentRawStream

        def launch(params: ctypes.Structure | ctypes.Array) -> None:
            stream = stream_of(device)
            ready = known.get(stream)
            if ready is None:
                if grid == 0:
                    return
                ready = memorise(known, stream, self._prepare(kernel, grid, block, shared, stream, early))
            queue, config, function = ready
            arguments = _One(address(params))
            status = queue(config, function, arguments, None)
            if status:
                if status == NO_CONTEXT:  # a thread, such as autograd's, in which torch has not touched the GPU yet
                    make_current(device)
                    status = queue(config, function, arguments, None)
                _cuda(status, kernel)

        return launch

    def _prepare(self, kernel: str, grid: int, block: int, shared: int, stream: int, early: bool) -> tuple:
        """cuLaunchKernelEx and its first two arguments, made once: converting a dozen of them takes as long as the launch."""
        if grid >= 1 << 31:
            raise NativeError(f"{kernel}: {grid} blocks are more than one launch takes (2^31 - 1)")
        config = _Config(grid, 1, 1, block, 1, 1, shared, stream)
        if early:
            attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int32 * 16)(1))
            config.attributes, config.count = ctypes.pointer(attribute), 1
        return driver().cuLaunchKernelEx, ctypes.byref(config), self.function(kernel, shared, beside=early)


def make_current(device: int) -> None:
    """Make the context that torch uses on a GPU the calling thread's, if that has none."""
    context = ctypes.c_void_p()
    _cuda(driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        _cuda(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(device)), "cuDevicePrimaryCtxRetain")
        _cuda(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


_modules: dict[tuple, Module] = {}


def module(name: str, defines: tuple[tuple[str, int], ...], device: int) -> Module:
    """Compile (or fetch) and load a file; once per process, device and set of macros."""
    key = (name, defines, device)
    found = _modules.get(key)
    if found is None:
        with _lock:
            found = _modules.get(key)
            if found is None:
                found = _modules[key] = Module(name, defines, device)
    return found


def on_device(function, x: torch.Tensor, *rest):
    """function(x, *rest) with x's GPU as the current one; free of cost where it already is."""
    if x.device.index == torch.cuda.current_device():
        return function(x, *rest)
    with torch.cuda.device(x.device):
        return function(x, *rest)


def memory(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
    """What makes tensors that nobody has written yet, of given sizes, strides and dtype, on the current device, which must be `device`:
    what compiled code uses, in half of the time of torch.empty_like, unless a dispatch mode wants to see it."""
    if _empty_strided_cuda is not None and device.type == "cuda" and not dispatch_modes():
        return _empty_strided_cuda
    return lambda sizes, strides, dtype: torch.empty_strided(sizes, strides, dtype=dtype, device=device)


def once_differentiable(backward):
    """torch's decorator of the same name, which is entered only where a graph of the gradients is asked for."""
    guarded = torch.autograd.function.once_differentiable(backward)

    def call(ctx, *grads):
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return call


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_limit(device: int) -> int:
    """Bytes of shared memory one block may have; 99 KiB, the least among supported GPUs, where torch does not say."""
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024))


@functools.cache
def machine() -> str | None:
    """Why native kernels cannot run on this machine; None if they can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install one that has it: pip install torch"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use (see nvidia-smi)"
    try:
        driver()
        compiler()
        architectures()
    except NativeError as e:
        return str(e)
    return None


@functools.cache
def gpu(device: int) -> str | None:
    """Why native kernels cannot run on this GPU; None if they can."""
    if (reason := machine()) is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
            f"the native kernels need {OLDEST[0]}.{OLDEST[1]} (Ampere) or newer"
        )
    return None
