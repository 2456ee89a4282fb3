"""Run a kernel that drops the interpreter lock over a range of units, on torch.get_num_threads() threads.

Which thread does which unit never changes a result: units write to places of their own.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def parallel(kernel: Callable[[int, int, int], None], units: int, threads: int) -> None:
    """Call kernel(slot, first, last) so that the ranges cover 0..units. `slot` < threads picks a scratch area.

    The calling thread does the first share itself.
    """
    threads = min(threads, units)
    if threads <= 1:
        if units:
            kernel(0, 0, units)
        return
    borders = [units * i // threads for i in range(threads + 1)]
    pool = _get_pool(threads - 1)
    others = [pool.submit(kernel, i, borders[i], borders[i + 1]) for i in range(1, threads)]
    try:
        kernel(0, borders[0], borders[1])
    finally:  # the others write into memory of the caller's: never return before they are done
        wait(others)
    for future in others:
        future.result()


def thread_count(work: float, worth: float) -> int:
    """How many threads to use for `work`, when a thread should get at least `worth` of it."""
    return max(1, min(torch.get_num_threads(), int(work / worth)))


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread: many small sums in a row take ten times as long where threads wait for each other and for other programs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _get_pool(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < size:
        _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="seqlab-ops"), size
    return _pool


def _forget_pool() -> None:
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):  # threads do not survive a fork; a child makes its own
    os.register_at_fork(after_in_child=_forget_pool)
