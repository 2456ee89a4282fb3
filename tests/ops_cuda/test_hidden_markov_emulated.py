"""The CUDA source of hidden_markov, run on the processor (emulate.py), against the float64 reference."""

import emulate
import pytest
import torch

from seqlab.ops.hidden_markov import cuda, reference

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="g++ is not installed; it compiles the emulated kernels")


@pytest.mark.parametrize("rows, length, models, states", [(1, 1, 1, 1), (3, 2, 2, 7), (16, 50, 1, 7), (37, 61, 3, 7), (5, 40, 2, 13)])
def test_the_kernel_equals_the_reference(monkeypatch, rows, length, models, states):
    monkeypatch.setattr(cuda, "_device", lambda index: emulate.Device(cuda.SOURCE, ("follow",)))
    g = torch.Generator().manual_seed(rows)
    base = torch.randint(-1, 4, (rows, length), generator=g, dtype=torch.int32)
    context = torch.randint(0, 21, (rows, length), generator=g, dtype=torch.int32)
    tables = [
        torch.randn(models, 21, states, 4, generator=g).softmax(-1),
        torch.randn(models, states, states, generator=g).softmax(-1),
        torch.randn(rows, models, states, generator=g).softmax(-1),
    ]
    found = cuda.follow(base, context, *tables)
    for mine, expected in zip(found, reference.run(base, context, *(x.double() for x in tables))):
        torch.testing.assert_close(mine.double(), expected, rtol=2e-5, atol=2e-6)
