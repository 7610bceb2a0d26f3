"""The one progress bar: gone when the work is done, and silent where it is not wanted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def progress_bar(iterable: Iterable[T] | None = None, *, shown: bool, **options: object) -> tqdm[T]:
    """A tqdm bar. ``shown=False`` hides it, and so does the environment variable TQDM_DISABLE=1."""
    hidden = {} if shown else {"disable": True}
    return tqdm(iterable, leave=False, **hidden, **options)
