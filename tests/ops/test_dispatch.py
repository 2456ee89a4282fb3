"""Choosing a back end, the messages when that fails, argument checks, and what importing costs."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from parity import conv_arguments, scan_arguments

from seqlab.ops import backends, causal_conv1d, dispatch, selective_scan
from seqlab.ops.causal_conv1d import cpu as conv_cpu
from seqlab.ops.selective_scan import cpu as scan_cpu
from seqlab.ops.self_check import self_check


def scan(**changes):
    t = scan_arguments(2, 5, 3, 2, torch.float32, softplus=True) | changes
    return selective_scan(**t)


def conv(**changes):
    return causal_conv1d(**(conv_arguments(2, 5, 3, 4, torch.float32) | changes))


def test_names_and_order():
    for op in ("selective_scan", "causal_conv1d"):
        names = list(backends(op))
        assert tuple(names) == dispatch.ORDER == ("cuda", "mamba_ssm", "cpu", "reference")
        for module in backends(op).values():
            reason = module.unavailable()
            assert reason is None or isinstance(reason, str)
    with pytest.raises(ValueError, match="'scan' does not exist; allowed: selective_scan, causal_conv1d"):
        backends("scan")


def test_auto_takes_the_fast_one_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.delenv("SEQLAB_BACKEND", raising=False)
    calls = []
    run = scan_cpu.run
    monkeypatch.setattr(scan_cpu, "run", lambda *a: calls.append(1) or run(*a))
    with caplog.at_level(logging.INFO, logger="seqlab"):
        scan()
        scan()
    assert len(calls) == 2
    assert [r.getMessage() for r in caplog.records] == ["selective_scan: back end cpu on cpu"]


def test_auto_passes_over_what_cannot_run(monkeypatch):
    monkeypatch.setattr(scan_cpu, "unavailable", lambda request=None: "numba is not installed: pip install numba")
    monkeypatch.setattr(scan_cpu, "run", None)
    torch.testing.assert_close(scan(), scan(backend="reference"))


def test_environment_forces_a_back_end(monkeypatch):
    monkeypatch.setattr(scan_cpu, "run", None)
    monkeypatch.setenv("SEQLAB_BACKEND", "reference")
    scan()
    monkeypatch.setenv("SEQLAB_BACKEND", "refrence")
    with pytest.raises(ValueError, match="SEQLAB_BACKEND 'refrence' is not a back end; .*did you mean 'reference'"):
        scan()
    monkeypatch.setenv("SEQLAB_BACKEND", "mamba_ssm")
    with pytest.raises(RuntimeError, match="asked for by SEQLAB_BACKEND"):
        scan()
    scan(backend="reference")  # the argument wins


@pytest.mark.parametrize("name", ["persistent", "graph", "solo"])
def test_a_decoders_back_end_in_the_environment_leaves_other_operators_alone(monkeypatch, name):
    """`SEQLAB_BACKEND=solo seqlab generate ...` failed at the prompt, which scans read."""
    monkeypatch.setenv("SEQLAB_BACKEND", name)
    torch.testing.assert_close(scan(), scan(backend="reference"))
    assert not dispatch.forces_another("cuda") and not dispatch.forces_another("cpu")


def test_what_the_environment_keeps_from_a_block(monkeypatch):
    for given, cuda, cpu in (("", False, False), ("auto", False, False), ("cuda", False, True), ("cpu", True, False), ("reference", True, True), ("none", True, True)):
        monkeypatch.setenv("SEQLAB_BACKEND", given)
        assert (dispatch.forces_another("cuda"), dispatch.forces_another("cpu")) == (cuda, cpu)


def test_explicit_back_end_never_falls_back(monkeypatch):
    monkeypatch.setattr(conv_cpu, "unavailable", lambda request=None: "numba is not installed: pip install numba")
    with pytest.raises(RuntimeError) as error:
        conv(backend="cpu")
    message = str(error.value)
    assert "back end 'cpu'" in message and "cpu: numba is not installed: pip install numba" in message
    assert "mamba_ssm: " in message and "pip install" in message and "reference: can run this" in message
    with pytest.raises(ValueError, match="'cuad' is not a back end; allowed: auto, .*reference"):
        conv(backend="cuad")


def test_mamba_ssm_says_what_it_lacks(monkeypatch):
    from seqlab.ops.causal_conv1d import mamba_ssm as conv_mamba
    from seqlab.ops.selective_scan import mamba_ssm as scan_mamba

    for module in (scan_mamba, conv_mamba):
        monkeypatch.setattr(module, "_extension_missing", lambda: None)
    request = dispatch.Request("cuda", torch.bfloat16, 512, 1, 4096, 16, 4, grad=True)

    def refusal(module, **changes):
        return module.unavailable(dispatch.Request(**(vars(request) | changes)))

    assert refusal(scan_mamba) is None and refusal(conv_mamba) is None
    assert "no initial state" in refusal(scan_mamba, initial_state=True)
    assert "gradient of the final state" in refusal(scan_mamba, final_state=True)
    assert refusal(scan_mamba, final_state=True, grad=False) is None
    assert "256" in refusal(scan_mamba, d_state=257)
    assert "65535" in refusal(scan_mamba, channels=65536)
    assert "2^32" in refusal(scan_mamba, length=1 << 23)
    assert "snapshots" in refusal(scan_mamba, batch=1 << 21, length=1)
    assert "on cpu" in refusal(scan_mamba, device="cpu")
    assert "float64" in refusal(scan_mamba, dtype=torch.float64)
    assert "2 to 4" in refusal(conv_mamba, width=5)
    assert "multiple of 8" in refusal(conv_mamba, channels=12)
    assert "positions" in refusal(conv_mamba, length=1 << 23)
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in refusal(scan_mamba) and "deterministic" in refusal(conv_mamba)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"u": torch.zeros(2, 5)}, r"u must be \(batch length channels\), got shape \(2, 5\)"),
        ({"u": torch.zeros(2, 5, 3).half()}, "u is float16, whose range"),
        ({"u": torch.zeros(2, 5, 3).int()}, "u is torch.int32; allowed: bfloat16, float32, float64"),
        ({"A": torch.zeros(4, 2)}, r"A must be .* = \(3, n\) .* got shape \(4, 2\)"),
        ({"A": torch.zeros(3, 0)}, "at least one state"),
        ({"delta": torch.zeros(2, 5, 4)}, r"delta has shape \(2, 5, 4\), expected \(2, 5, 3\)"),
        ({"B": torch.zeros(2, 2, 5)}, r"B has shape \(2, 2, 5\), expected \(2, 5, 2\)"),
        ({"C": torch.zeros(2, 5, 3)}, r"C has shape"),
        ({"D": torch.zeros(2)}, r"D has shape \(2,\), expected \(3,\)"),
        ({"z": torch.zeros(2, 5, 3).half()}, "z is torch.float16; .*use bfloat16"),
        ({"initial_state": torch.zeros(2, 2, 3)}, r"initial_state has shape \(2, 2, 3\), expected \(2, 3, 2\)"),
        ({"mask": torch.ones(2, 5)}, "mask is torch.float32, expected bool"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has shape \(2, 4\), expected \(2, 5\)"),
        ({"delta_bias": torch.zeros(3, device="meta")}, "delta_bias is on meta, u on cpu"),
        ({"A": torch.zeros(3, 2, dtype=torch.cfloat)}, "A is torch.complex64"),
    ],
)
def test_scan_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        scan(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(2, 5)}, r"x must be \(batch length channels\), got shape \(2, 5\)"),
        ({"x": torch.zeros(2, 5, 3).half()}, "x is float16"),
        ({"weight": torch.zeros(4, 3)}, r"weight must be .* = \(3, w\) .* got shape \(4, 3\)"),
        ({"weight": torch.zeros(3, 9)}, "width 9; allowed: 1 to 8"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\), expected \(3,\)"),
        ({"initial_state": torch.zeros(2, 4, 3)}, r"initial_state has shape \(2, 4, 3\), expected \(2, 3, 3\)"),
        ({"activation": "swish"}, "activation 'swish' does not exist; allowed: None, 'silu'"),
        ({"mask": torch.ones(2, 5)}, "mask is torch.float32, expected bool"),
    ],
)
def test_conv_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        conv(**changes)


@pytest.mark.parametrize("place", ["cpu", "cuda", "torch.func"])
@pytest.mark.parametrize(
    "call, name, value, message",
    [
        (scan, "u", np.zeros((2, 5, 3)), r"selective_scan: u is of type numpy.ndarray; it must be a torch.Tensor: torch.as_tensor\(u\)"),
        (scan, "A", None, "selective_scan: A is None; it must be a torch.Tensor$"),
        (scan, "B", [[[1.0]]], r"selective_scan: B is of type list; it must be a torch.Tensor: torch.as_tensor\(B\)"),
        (scan, "D", 1.0, "selective_scan: D is of type float; it must be a torch.Tensor or None"),
        (scan, "mask", np.ones((2, 5), dtype=bool), "selective_scan: mask is of type numpy.ndarray; it must be a torch.Tensor or None"),
        (conv, "x", None, "causal_conv1d: x is None; it must be a torch.Tensor$"),
        (conv, "weight", np.zeros((3, 4)), "causal_conv1d: weight is of type numpy.ndarray; it must be a torch.Tensor"),
        (conv, "bias", 0, "causal_conv1d: bias is of type int; it must be a torch.Tensor or None"),
    ],
)
def test_what_is_no_tensor_is_refused(call, name, value, message, place, monkeypatch):
    """It was an AttributeError of whatever was looked at first, another one on a GPU and in a transform."""
    if place == "cuda":  # as far as what is found out of a call before its checks
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(TypeError, match=message):
        if place == "torch.func":
            torch.func.grad(lambda x: call(**{name: value}).sum() * x)(torch.ones(()))
        else:
            call(**{name: value})


@pytest.mark.parametrize("call, name", [(scan, "u"), (scan, "A"), (scan, "mask"), (conv, "x"), (conv, "bias"), (conv, "mask")])
def test_what_is_not_dense_is_refused(call, name):
    """It was a NotImplementedError of torch, about the dispatcher."""
    shape = {"A": (3, 2), "bias": (3,), "mask": (2, 5)}.get(name, (2, 5, 3))
    value = torch.ones(shape, dtype=torch.bool if name == "mask" else torch.float32).to_sparse()
    with pytest.raises(ValueError, match=rf"{name} is laid out as torch.sparse_coo; it must be dense: {name}.to_dense\(\)"):
        call(**{name: value})


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "hidden_markov"])
def test_self_check(op, monkeypatch):
    for name in ("cpu", "reference"):
        assert self_check(op, name) < 1e-5
    module = backends(op)["cpu"]
    right = module.run

    def wrong(*arguments):
        return right(*(x * 1.01 if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments))

    monkeypatch.setattr(module, "run", wrong)
    assert self_check(op, "cpu") > 1e-3
    with pytest.raises(ValueError, match="not a back end"):
        self_check(op, "gpu")
    monkeypatch.setattr(module, "unavailable", lambda request=None: "gone fishing")
    with pytest.raises(RuntimeError, match="gone fishing"):
        self_check(op, "cpu")


HEAVY = ("numba", "llvmlite", "triton", "torch._dynamo", "torch._inductor", "mamba_ssm", "causal_conv1d")


def loaded(code):
    """Which heavy packages a fresh interpreter has loaded after running `code`."""
    program = f"import sys\n{code}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


def test_importing_the_operators_costs_torch_alone():
    assert loaded("import seqlab.ops") == []


def test_running_does_not_import_the_compiler():
    code = (
        "import torch\n"
        "from seqlab.ops import causal_conv1d, selective_scan\n"
        "u, B = torch.ones(1, 3, 2, requires_grad=True), torch.ones(1, 3, 1)\n"
        "y = causal_conv1d(u, torch.ones(2, 2), backend='cpu')\n"
        "selective_scan(y, u, -torch.ones(2, 1), B, B, backend='cpu').sum().backward()\n"
    )
    assert not {"torch._dynamo", "torch._inductor"} & set(loaded(code))


def test_that_test_can_fail():
    assert "numba" in loaded("import seqlab.ops.lanes")


def test_kernels_work_where_nothing_can_be_written(tmp_path):
    """No cache directory at all (read-only package, no home): compile in memory, run, do not complain."""
    code = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "import torch\n"
        "from seqlab.ops import causal_conv1d\n"
        "y = causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 2), backend='cpu')\n"
        "assert y[0, :, 0].tolist() == [1, 2, 2]\n"
    )
    assert "numba" in loaded(code)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
def test_threads_survive_a_fork():
    code = (
        "import os, torch\n"
        "from seqlab.ops import causal_conv1d\n"
        "torch.set_num_threads(2)\n"
        "x, weight = torch.ones(1, 4000, 64), torch.ones(64, 4)\n"
        "f = lambda: causal_conv1d(x, weight, backend='cpu').numpy().tobytes()\n"  # torch's own threads would hang
        "want = f()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if f() == want else 3)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
    )
    loaded(code)


def test_recent_calls_are_told_apart_by_everything_but_values(monkeypatch):
    """What it takes for the same call has skipped the checks: each difference that they look at must count."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    recent, x, y = dispatch.Recent(), torch.randn(2, 3), torch.randn(3)
    assert recent.find("cuda", (x, y, None), True) is None
    recent.keep("first", "cuda", (x, y, None), True)
    assert recent.find("cuda", (torch.randn(2, 3), y.clone(), None), True) == "first"
    others = (
        (torch.randn(3, 2), y), (torch.randn(3, 2).t(), y), (x.double(), y), (x.requires_grad_(), y), (x.detach(), torch.randn(4)),
        (x.detach().to("meta"), y), (torch.nn.Parameter(x.detach(), requires_grad=False), y),
    )  # fmt: skip
    for other in others:
        assert recent.find("cuda", (*other, None), True) is None, other
    x = x.detach()
    assert recent.find("cpu", (x, y, None), True) is None and recent.find("cuda", (x, y, None), False) is None
    with torch.no_grad():
        assert recent.find("cuda", (x, y, None), True) is None
    for number in range(dispatch.Recent.MOST):
        recent.keep(number, "cuda", (torch.randn(5 + number, 3), y, None), True)
    assert recent.find("cuda", (x, y, None), True) is None and recent.find("cuda", (torch.randn(5, 3), y, None), True) == 0


def test_recent_calls_are_neither_found_nor_kept_in_a_dispatch_mode(monkeypatch):
    """It would not see the tensors that a call found again makes."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    recent, x = dispatch.Recent(), torch.randn(2)
    with Watch():
        recent.keep("inside", "cuda", (x,))
        assert recent.find("cuda", (x,)) is None
    assert recent.find("cuda", (x,)) is None
    recent.keep("outside", "cuda", (x,))
    with Watch():
        assert recent.find("cuda", (x,)) is None
    assert recent.find("cuda", (x,)) == "outside"


def test_recent_calls_are_none_without_torchs_guards(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "TensorGuards", None)
    recent, x = dispatch.Recent(), torch.randn(2)
    recent.keep("first", "cuda", (x,))
    assert recent.find("cuda", (x,)) is None


def test_tensors_inside_a_transform_have_no_address_and_so_no_layout(monkeypatch):
    """torch.func.grad of a scan or convolution on a GPU was "Cannot access data pointer of Tensor that doesn't have storage"."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))  # as far as `layout` can see
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    x = torch.ones(3)
    assert dispatch.layout("auto", (x,)) is not None
    seen = []
    torch.func.grad(lambda x: seen.append(dispatch.layout("auto", (x,))) or x.sum())(x)
    assert seen == [None]
