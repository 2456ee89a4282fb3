"""seqlab: Mamba models on DNA and raw audio at million-token context.

Importing this costs torch alone: no device is touched, nothing is compiled, no logging is set up. Parts are imported when they
are first named, as in `import seqlab; seqlab.ops.selective_scan(...)`.
"""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
    """A module or package of the library that was not imported yet."""
    full = f"{__name__}.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
