"""Factorizations of many matrices: small ones side by side, large ones one by one with all threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import TypeVar

import torch

from lora_lens._base.threads import limited_threads, thread_count

Item = TypeVar("Item")
Result = TypeVar("Result")
SMALL = 2**22  # entries up to which a matrix gets one thread, beside others, and from which on all of them


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], shape: Callable[[Item], Sequence[int]]
) -> Iterator[Result]:
    """``work`` of each item, whose matrix has this shape, in the order of completion.

    LAPACK gains little from threads on small matrices, so each gets one.
    """
    threads = thread_count()
    small = [item for item in items if math.prod(shape(item)) < SMALL]
    large = [item for item in items if math.prod(shape(item)) >= SMALL]
    yield from _in_workers(work, small, workers=threads, blas=1)
    yield from _in_workers(work, large, workers=1, blas=threads)


def _in_workers(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, blas: int
) -> Iterator[Result]:
    """BLAS shares a matrix among ``blas`` threads; torch's own, which would wait spinning, are off."""
    if not items:
        return
    pool = ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1))
    with limited_threads(1, blas):
        try:
            for finished in as_completed([pool.submit(work, item) for item in items]):
                yield finished.result()
        finally:
            pool.shutdown(cancel_futures=True)
