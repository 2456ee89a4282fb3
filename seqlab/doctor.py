"""What works here and why not: versions, devices, memory, every operator back end and a quick self-check of each."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Status = Literal["ok", "absent", "problem"]

LIMIT = 1e-3  # of the relative error in the self-check: about 1e-6 is right, more than this is broken
PACKAGES = ("torch", "torchaudio", "lightning", "numba", "numpy", "safetensors", "triton", "mamba-ssm", "causal-conv1d")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to type where something is missing or wrong."""

    section: str
    name: str
    status: Status
    detail: str
    remedy: str | None = None


def examine() -> list[Finding]:
    """Everything `seqlab doctor` prints. It never raises for a broken installation: that is what it reports."""
    return [*versions(), torch_and_torchaudio(), *devices(), *sound(), *back_ends()]


def versions() -> list[Finding]:
    import seqlab

    found = [
        Finding("versions", "seqlab", "ok", seqlab.__version__),
        Finding("versions", "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            optional = name in ("triton", "mamba-ssm", "causal-conv1d")
            found.append(
                Finding(
                    "versions",
                    name,
                    "absent" if optional else "problem",
                    "not installed" + (" (optional)" if optional else ""),
                    None if optional else "pip install seqlab",
                )
            )
            continue
        if name == "torch":
            version += f" (CUDA {torch.version.cuda})" if torch.version.cuda else " (CPU-only build)"
        found.append(Finding("versions", name, "ok", version))
    return found


def torch_and_torchaudio() -> Finding:
    """torchaudio's compiled part must match torch's CUDA; its metadata asks for no torch version, so pip cannot check."""
    remedy = "pip install 'torch>=2.11,!=2.13.*,<2.15' 'torchaudio==2.11.*'"
    try:
        importlib.metadata.version("torchaudio")
    except importlib.metadata.PackageNotFoundError:
        return Finding("versions", "torch + torchaudio", "problem", "torchaudio is not installed", remedy)
    try:
        importlib.import_module("torchaudio")
    except Exception as error:  # RuntimeError (CUDA versions differ), OSError (CPU-only torch), ImportError
        first = " ".join(str(error).split())[:160]
        return Finding("versions", "torch + torchaudio", "problem", f"import fails: {first}", remedy)
    return Finding("versions", "torch + torchaudio", "ok", "match")


def devices() -> list[Finding]:
    found = [
        Finding("devices", "CPU", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
        Finding("devices", "memory", "ok", _memory()),
    ]
    free = shutil.disk_usage(Path.cwd()).free
    found.append(Finding("devices", "disk", "ok" if free > 2**30 else "problem", f"{_gib(free)} free here"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            detail = (
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{_gib(free)} of {_gib(total)} free"
            )
            found.append(Finding("devices", f"GPU {i}", "ok", detail))
    else:
        found.append(Finding("devices", "GPU", "absent", why_no_gpu()))
    return found


def sound() -> list[Finding]:
    """What reads sound files: libsndfile inside soundfile, and ffmpeg for what it cannot read."""
    try:
        soundfile = importlib.import_module("soundfile")
        first = Finding("sound files", "libsndfile", "ok", f"{soundfile.__libsndfile_version__}: wav flac ogg mp3 aiff ...")
    except Exception as error:  # ImportError, OSError (a broken libsndfile)
        reason = " ".join(str(error).split())[:160]
        first = Finding("sound files", "libsndfile", "problem", f"import fails: {reason}", "pip install soundfile")
    program = shutil.which("ffmpeg")
    detail = f"{program}: m4a aac wma ..." if program else "not on PATH; needed for m4a, aac, wma and others only"
    return [first, Finding("sound files", "ffmpeg", "ok" if program else "absent", detail)]


def why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "none usable: this torch is a CPU-only build"
    if not Path("/proc/driver/nvidia/version").exists() and sys.platform == "linux":
        return "none: no NVIDIA driver is loaded"
    return "none usable: the driver is loaded, but torch cannot start CUDA (see `nvidia-smi`)"


def back_ends() -> list[Finding]:
    """Each operator's back ends: available with the error of a quick check, or the exact reason and remedy."""
    from seqlab.ops import OPERATORS, backends
    from seqlab.ops.self_check import self_check

    against = {"decode": "parallel forward pass", "block": "separate operators in float64"}
    found = []
    for op in OPERATORS:
        for name, module in backends(op).items():
            reason = module.unavailable(None)
            if reason is not None:
                found.append(Finding(f"back ends of {op}", name, "absent", reason))
                continue
            try:
                error = self_check(op, name)
            except Exception as problem:
                first = " ".join(f"{type(problem).__name__}: {problem}".split())[:160]
                found.append(Finding(f"back ends of {op}", name, "problem", f"self-check failed: {first}"))
                continue
            limit = getattr(module, "TOLERANCE", LIMIT)
            status: Status = "ok" if error <= limit else "problem"
            detail = f"works; largest error against the {against.get(op, 'float64 reference')} {error:.1e} (limit {limit:.0e})"
            found.append(Finding(f"back ends of {op}", name, status, detail))
    return found


def _memory() -> str:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        return f"{_gib(free)} of {_gib(total)} available"
    except (OSError, KeyError, ValueError):
        return "unknown on this system"


def _gib(n: int) -> str:
    return f"{n / 2**30:.1f} GiB"
