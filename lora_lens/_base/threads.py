"""How many threads torch and BLAS take: numbers of the whole process, which several callers change at once.

They are limited here and nowhere else, so that all is as before once the last caller is done, in any order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from threadpoolctl import threadpool_limits

_lock = threading.Lock()
_users = 0
_usual = (
    0  # of torch's threads, before the first of them came: torch hands the last number set to new threads
)
_own = threading.local()
_blas = threading.Lock()


def thread_count() -> int:
    """How many threads torch may take for what this thread asks of it, whatever others have limited."""
    with _lock:
        return _usual if _users and not getattr(_own, "limited", False) else torch.get_num_threads()


@contextmanager
def limited_threads(torch_threads: int, blas: int | None = None) -> Iterator[None]:
    """At most so many threads for a while: torch's for this thread, BLAS's for the whole process.

    BLAS is limited by one caller at a time, which puts it back. Others leave it alone meanwhile: the number
    that they would note, to put it back later, would be the limit itself.

    Args:
        blas: where it differs.
    """
    global _users, _usual
    before, outer = thread_count(), getattr(_own, "limited", False)
    with _lock:
        _usual = _usual if _users else before
        _users += 1
    _own.limited = True
    try:
        with ExitStack() as undo:
            if _blas.acquire(blocking=False):
                undo.callback(_blas.release)
                undo.enter_context(threadpool_limits(blas or torch_threads, user_api="blas"))
            torch.set_num_threads(torch_threads)
            yield
    finally:
        _own.limited = outer
        with _lock:  # after threadpoolctl, which puts back OpenMP's threads as well
            torch.set_num_threads(before)
            _users -= 1
