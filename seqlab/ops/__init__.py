"""Operators: one folder each, with a slow reference beside every fast back end.

Importing this costs torch alone; a back end's own packages are looked for when it is first asked to run.
"""

import importlib
from types import ModuleType

from seqlab.ops.causal_conv1d import causal_conv1d
from seqlab.ops.selective_scan import selective_scan

__all__ = ["backends", "causal_conv1d", "selective_scan"]


def backends(op: str) -> dict[str, ModuleType]:
    """Back ends of an operator ("selective_scan" or "causal_conv1d"), name -> module, fastest first.

    `backends(op)[name].unavailable()` is None or the reason why this machine cannot run it.
    """
    if op not in ("selective_scan", "causal_conv1d"):
        raise ValueError(f"op {op!r} does not exist; allowed: selective_scan, causal_conv1d")
    return dict(importlib.import_module(f"seqlab.ops.{op}").BACKENDS)
