"""Whether a back end whose kernels numba compiles can be used: the answer of every `cpu` back end."""

import importlib.util
from functools import lru_cache

from seqlab.ops.dispatch import Request


@lru_cache(maxsize=1)
def _numba_missing() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install numba"
    return None


def unavailable(request: Request | None = None) -> str | None:
    """Needs numba and tensors on the CPU."""
    missing = _numba_missing()
    if missing is not None:
        return missing
    if request is not None and request.device != "cpu":
        return f"tensors are on {request.device}; move them with .cpu()"
    return None
