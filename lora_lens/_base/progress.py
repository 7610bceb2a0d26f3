"""The one progress bar: gone when the work is done, and silent where it is not wanted."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def progress_bar(iterable: Iterable[T] | None = None, *, shown: bool, **options: object) -> tqdm[T]:
    """A tqdm bar. ``shown=False`` hides it, and so does the environment variable TQDM_DISABLE=1."""
    # tqdm itself does not heed the variable in notebooks
    hidden = not shown or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return tqdm(iterable, leave=False, disable=hidden, **options)
