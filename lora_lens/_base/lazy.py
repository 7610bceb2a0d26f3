"""Packages whose names are imported when they are first used, with the garbage collector off meanwhile.

PyTorch, transformers and PEFT make half a million objects that stay. The collector would go through them
again and again, which took one second of eight.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lazy_loader  # type: ignore[import-untyped]


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector off, around what makes many objects that stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def attach_stub(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """As :func:`lazy_loader.attach_stub`: a package's ``__getattr__``, ``__dir__`` and ``__all__``."""
    imported, listed, names = lazy_loader.attach_stub(package, file)

    def __getattr__(name: str) -> Any:
        with uncollected():
            return imported(name)

    return __getattr__, listed, names
