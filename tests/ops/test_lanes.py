"""The CPU kernels' own exp2, exp, softplus and sigmoid over their whole range, against numpy in float64 (longdouble)."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

FUNCTIONS = ("exp2", "exp", "softplus", "slope", "sigmoid")


@pytest.fixture(scope="module")
def evaluate():
    from numba import njit

    from seqlab.ops import lanes

    exp2, exp, softplus, sigmoid, load, store = (
        lanes.exp2, lanes.exp, lanes.softplus, lanes.sigmoid, lanes.load, lanes.store,
    )  # fmt: skip

    @njit
    def kernel(work, x, y, count, size, which):
        for i in range(0, count, 16):
            v = load(work, x + i * size)
            if which == 0:
                r = exp2(v)
            elif which == 1:
                r = exp(v)
            elif which == 2:
                r, _ = softplus(work, v)
            elif which == 3:
                _, r = softplus(work, v)
            else:
                r = sigmoid(work, v)
            store(work, y + i * size, r)

    def f(name, x):
        padded = np.concatenate([x, np.zeros(-len(x) % 16, x.dtype)])
        y = np.full_like(padded, np.nan)
        kernel(x.dtype.type(0), padded.ctypes.data, y.ctypes.data, len(padded), x.itemsize, FUNCTIONS.index(name))
        return y[: len(x)]

    return f


def exact(name, x):
    x = x.astype(np.longdouble)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if name == "exp2":
            return np.exp2(x)
        if name == "exp":
            return np.exp(x)
        if name == "softplus":
            return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
        return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("dtype, reach", [(np.float32, 86.0), (np.float64, 700.0)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_two_units_in_the_last_place(evaluate, name, dtype, reach):
    g = np.random.default_rng(0)
    x = np.concatenate([g.uniform(-reach, reach, 200_000), g.uniform(-1, 1, 50_000), g.normal(0, 1e-3, 20_000)])
    x = x.astype(dtype)
    want = exact(name, x)
    error = np.abs((evaluate(name, x) - want) / want).max() / np.finfo(dtype).eps
    assert error < 2, f"{name}: {error:.2f} eps"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ends_of_the_range(evaluate, dtype):
    inf, nan = np.inf, np.nan
    x = np.array([0.0, -0.0, -inf, inf, nan, -1e30, 1e30, -160.0 if dtype == np.float32 else -1100.0], dtype)
    np.testing.assert_array_equal(evaluate("exp2", x), np.array([1, 1, 0, inf, nan, 0, inf, 0], dtype))
    np.testing.assert_array_equal(evaluate("exp", x), np.array([1, 1, 0, inf, nan, 0, inf, 0], dtype))
    np.testing.assert_array_equal(evaluate("slope", x), np.array([0.5, 0.5, 0, 1, nan, 0, 1, 0], dtype))
    np.testing.assert_array_equal(evaluate("sigmoid", x), np.array([0.5, 0.5, 0, 1, nan, 0, 1, 0], dtype))
    ln2 = dtype(np.log(2))
    got = evaluate("softplus", x)
    np.testing.assert_allclose(got[:2], ln2, rtol=2 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(got[2:], np.array([0, inf, nan, 0, 1e30, 0], dtype))


def test_integers_are_exact_powers(evaluate):
    x = np.arange(-126, 128).astype(np.float32)
    np.testing.assert_array_equal(evaluate("exp2", x), np.ldexp(np.float32(1), x.astype(int)))


def test_bfloat16_rounds_to_nearest_even():
    import torch
    from numba import njit

    from seqlab.ops import lanes

    load, store = lanes.load, lanes.store

    @njit
    def convert(work, like, x, y, count):
        for i in range(0, count, 16):
            store(like, y + 2 * i, load(work, x + 4 * i))

    bits = np.arange(0, 1 << 32, 9973, dtype=np.uint32)
    bits = np.concatenate([bits, np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF], np.uint32)])
    bits = np.concatenate([bits, np.zeros(-len(bits) % 16, np.uint32)])
    out = np.zeros(len(bits), np.uint16)
    convert(np.float32(0), np.uint16(0), bits.ctypes.data, out.ctypes.data, len(bits))
    want = torch.from_numpy(bits.view(np.float32)).bfloat16()
    got = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()], want[~want.isnan()])


def test_kernels_are_compiled_where_no_cache_can_be_written(monkeypatch):
    """In a container's read-only file system the loops of gene models and of sound's baselines were refused by numba."""
    from seqlab.ops import compiled

    real = compiled.njit

    def nowhere(**options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(compiled, "njit", nowhere)

    @compiled.compiled(nogil=True)
    def double(x):
        return 2 * x

    assert double(21) == 42
    sources = {path.name: path.read_text() for path in (Path(compiled.__file__).parents[1]).rglob("*.py")}
    assert [name for name, text in sources.items() if "cache=True" in text] == ["compiled.py"]
