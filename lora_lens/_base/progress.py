"""The one progress bar: gone when the work is done, and silent where it is not wanted."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar, overload

from tqdm.auto import tqdm

T = TypeVar("T")


@overload
def progress_bar(iterable: Iterable[T], *, shown: bool, **options: Any) -> tqdm[T]: ...


@overload
def progress_bar(*, shown: bool, **options: Any) -> tqdm[NoReturn]: ...


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool, **options: Any) -> tqdm[Any]:
    """A tqdm bar. ``shown=False`` hides it, and so does the environment variable TQDM_DISABLE=1."""
    # tqdm itself does not heed the variable in notebooks
    hidden = not shown or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    bar: tqdm[Any] = tqdm(iterable, leave=False, disable=hidden, **options)
    return bar
