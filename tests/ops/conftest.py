"""Memory that nobody wrote reads as NaN in these tests, so that using it fails them."""

import numpy as np
import pytest
import torch

from seqlab.ops.causal_conv1d import cpu as conv_cpu
from seqlab.ops.selective_scan import cpu as scan_cpu

with torch.device("meta"):  # here torch learns what its constructors are, once: not the poisoned ones, which later tests have no more
    torch.empty(0)


class _PoisonedNumpy:
    """numpy, but `empty` holds 0xFF bytes: NaN in any floating type."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def empty(*args, **kwargs):
        array = np.empty(*args, **kwargs)
        array.view(np.uint8).fill(0xFF)
        return array


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    def poisoned(function):
        def wrapper(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    for module in (scan_cpu, conv_cpu):
        monkeypatch.setattr(module, "np", _PoisonedNumpy())
