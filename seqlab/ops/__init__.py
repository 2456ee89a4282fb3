"""Operators: one folder each, with a slow reference beside every fast back end.

Importing this costs torch alone; a back end's own packages are looked for when it is first asked to run.
"""

import importlib
from types import ModuleType

from seqlab.ops.causal_conv1d import causal_conv1d
from seqlab.ops.selective_scan import selective_scan

__all__ = ["OPERATORS", "backends", "causal_conv1d", "selective_scan"]

OPERATORS = ("selective_scan", "causal_conv1d", "block", "hidden_markov", "decode")
"""The folders here."""


def backends(op: str) -> dict[str, ModuleType]:
    """Back ends of an operator, name -> module, fastest first.

    `backends(op)[name].unavailable()` is None or the reason why this machine cannot run it.
    """
    if op not in OPERATORS:
        raise ValueError(f"op {op!r} does not exist; allowed: {', '.join(OPERATORS)}")
    return dict(importlib.import_module(f"seqlab.ops.{op}").BACKENDS)
