"""Runs the package's CUDA sources on the processor: g++ compiles them against emulator.h."""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from seqlab.model import ModelConfig, build_model
from seqlab.ops import nvrtc
from seqlab.ops.decode.sampling import stream_key

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("g++")


@functools.cache
def _library(name: str, defines: tuple[tuple[str, int], ...], kernels: tuple[str, ...]) -> ctypes.CDLL:
    folder = Path(tempfile.gettempdir()) / "seqlab-emulated"
    folder.mkdir(exist_ok=True)
    text = f'#include "{HERE / "emulator.h"}"\n' + nvrtc.source(name)
    takes = dict(re.findall(r"^KERNEL\b.*? (\w+)\(const (\w+) p\)", text, re.MULTILINE))
    for kernel in kernels:
        text += (
            f'\nextern "C" void run_{kernel}(unsigned grid, unsigned block, unsigned long shared, const {takes[kernel]}* p) '
            f"{{ run_grid<{takes[kernel]}>({kernel}, p, grid, block, shared); }}\n"
        )
    flags = ["-DSEQLAB_EMULATED", "-O1", "-shared", "-fPIC", "-std=c++17", "-w", *(f"-D{k}={v}" for k, v in defines)]
    key = hashlib.sha256((text + (HERE / "emulator.h").read_text() + repr(flags)).encode()).hexdigest()[:24]
    target = folder / f"{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as mine:  # the ranks of a test come here at the same time
            unit, built = Path(mine) / "unit.cpp", Path(mine) / "unit.so"
            unit.write_text(text)
            subprocess.run([COMPILER, *flags, str(unit), "-o", str(built)], check=True)
            built.replace(target)
    return ctypes.CDLL(str(target))


class Module:
    """Stands in for nvrtc.Module."""

    def __init__(self, name, defines, kernels, resident):
        self._library, self._resident = _library(name, defines, kernels), resident

    def resident(self, kernel, block, shared):
        return self._resident

    def clusters(self, kernel, block, shared, size):
        return self._resident

    def launch(self, kernel, grid, block, shared, params, early=False):
        call = getattr(self._library, f"run_{kernel}")
        call(ctypes.c_uint(grid), ctypes.c_uint(block), ctypes.c_ulong(shared), ctypes.byref(params))

    def launcher(self, *what):
        return functools.partial(self.launch, *what)


class Device:
    """Stands in for a back end's device: a GPU of `multiprocessors` that hold `resident` blocks each."""

    def __init__(self, name: str, kernels: tuple[str, ...], multiprocessors: int = 2, resident: int = 2):
        self.name, self.kernels, self._resident = name, kernels, resident
        self.multiprocessors, self.shared_limit, self.keep_limit, self.clusters = multiprocessors, 227 * 1024, 0, True

    def module(self, defines, name=None):
        if name in (None, self.name):
            return Module(self.name, defines, self.kernels, self._resident)
        kernels = re.findall(r"^KERNEL\b.*? (\w+)\(const (\w+) p\)", nvrtc.source(name), re.MULTILINE)
        wanted = "Pair" if dict(defines).get("BOTH") else "Params"  # scan_short.cu: one scan at a time, or two
        forward = bool(dict(defines).get("FORWARD"))
        found = (kernel for kernel, takes in kernels if takes == wanted and forward == ("forward" in kernel))
        return Module(name, defines, tuple(found), self._resident)


def decoded_model(options: dict, shifts: float = 0.5):
    """A language model for the decoding kernels to be compared with, of more than zeros and ones, and with logits as large as a
    trained model's. `shifts`: the spread of matrices that begin as zero."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter += 0.2 * torch.randn_like(parameter)
            if "embedding" in name or "lm_head" in name:
                parameter.mul_(20)
            if any(part in name for part in ("class_shifts", "prediction_head.weight", "prediction_head.input")):
                parameter.normal_(std=shifts)
    return model


def decoded_beside(runner, exact, model, batch: int, classes, steps: int, sampling, given: bool):
    """A prompt, then `steps` tokens in two runs of `runner` and in one of `exact`: the largest differences of log-probabilities and of the states
    after them, and the tokens (b steps) of both. `given`: the tokens are not drawn."""
    keys = torch.tensor([stream_key(sampling.seed, s) for s in range(batch)])
    prompt = torch.randint(0, model.config.vocab_size, (batch, 5))
    state = model(prompt[:, :4], **({} if classes is None else {"classes": classes}))[1]
    runner.load(state)
    exact.load(state)
    forced = torch.randint(0, model.config.vocab_size, (batch, steps)) if given else None
    first, rest = (None, None) if forced is None else forced.split([4, steps - 4], 1)
    got = [runner.run(prompt[:, 4], 5, 4, sampling, keys, first)]
    got.append(runner.run(got[0][0][:, -1], 9, steps - 4, sampling, keys, rest))
    tokens, log_probs = (torch.cat(parts, 1) for parts in zip(*got))
    expected, expected_lp = exact.run(prompt[:, 4], 5, steps, sampling, keys, forced)
    worst = float((log_probs - expected_lp).abs().max())
    states = max(float((x - y).abs().max()) for a, b in zip(runner.state(), exact.state()) for x, y in zip(a, b))
    return worst, states, tokens, expected
