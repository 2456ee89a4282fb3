"""numba's compiler with its cache on disk, where one can be written. Only files of kernels import this: it imports numba."""

from collections.abc import Callable

from numba import njit


def compiled(**options) -> Callable[[Callable], Callable]:
    """Decorator: numba.njit(**options), cached beside the source or else in the user's cache directory. Where neither can be
    written (a container's read-only file system) a kernel is compiled anew in each process, where numba alone would refuse."""

    def decorate(function: Callable) -> Callable:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # numba: "no locator available"
            return njit(**options)(function)

    return decorate
