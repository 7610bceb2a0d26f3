"""Windows: contiguous ranges of components on a spectrum."""

from __future__ import annotations

import builtins
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lora_lens._base import validate
from lora_lens._base.errors import InputError

MOST_WINDOWS = 100_000  # more than any spectrum has components


class Placement(ABC):
    """Which ``rank`` components of a spectrum are trained; a rule that holds for every weight.

    :class:`Window` is one; :mod:`lora_lens.spectrum.placement` has others. For a rule of your own, subclass
    with a frozen dataclass that has a ``rank`` and a ``select``.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> import lora_lens as ll
        >>> @dataclass(frozen=True)
        ... class BelowOne(ll.spectrum.Placement):
        ...     rank: int
        ...
        ...     def select(self, singular_values, name="this weight"):
        ...         start = int((singular_values >= 1).sum())
        ...         return slice(start, start + self.rank)
        >>> spectrum = ll.spectrum.factorize("w", torch.diag(torch.tensor([4.0, 2.0, 0.5, 0.25])))
        >>> spectrum.components_of(BelowOne(rank=2))
        tensor([2, 3])
    """

    rank: int

    @abstractmethod
    def select(self, singular_values: Tensor, name: str = "this weight") -> slice | Tensor:
        """The component indices: a range, or (rank,) integers, ascending.

        Args:
            singular_values: (k,), descending.
            name: of the weight, for messages.

        Raises:
            ValueError: the rule gives nothing for this spectrum; the message names ``name``.
        """

    def components(self, singular_values: Tensor, name: str = "this weight") -> slice | Tensor:
        """What :meth:`select` says, once it is known to be ``rank`` components of this spectrum.

        Raises:
            ValueError: as :meth:`select`; or a rule of your own gives another number of components, one
                twice, in another order, or some that the spectrum does not have.
            TypeError: it gives something else, such as a mask.
        """
        found, k = self.select(singular_values, name), len(singular_values)
        places: Sequence[int]
        if isinstance(found, slice):
            places = range(k)[found]
        else:
            places = [
                validate.whole_number(place, f"each component that {self} selects")
                for place in validate.sequence(found, f"what {self} selects", "whole numbers")
            ]
        ascending = all(a < b for a, b in pairwise(places))
        if len(places) != self.rank or not ascending or places[0] < 0 or places[-1] >= k:
            raise InputError(
                f"{self} must select {self.rank} different components of {name}, in ascending order, of 0 to "
                f"{k - 1}, not {validate.shown(found)}"
            )
        return found if isinstance(found, slice) else torch.tensor(places)


def validate_rank(rank: object) -> int:
    """A rank as an ``int``.

    Raises:
        TypeError, ValueError: it is no whole number of at least 1.
    """
    return validate.whole_number(rank, "rank", least=1)


def require_fit(rank: int, k: int, name: str) -> None:
    """Raise a ValueError that names the weight if it has fewer than ``rank`` components."""
    if rank > k:
        raise InputError(
            f"rank {rank} does not fit {name}: its spectrum has {k} components; "
            f"use a rank of at most {k} or leave this weight out of the targets"
        )


@dataclass(frozen=True)
class Window(Placement):
    """``rank`` consecutive components, placed by relative ``position`` or absolute ``start``.

    On a spectrum of k components the window is the half-open range
    [start, start + rank), with start = round(position * (k - rank)).
    Position 0 is PiSSA (Meng et al. 2024), position 1 is MiLoRA (Wang et al.
    2024), and what lies between is what Quercia et al. (arXiv 2602.03493)
    recommend. Weights of different k share a position, not a start.

    Attributes:
        rank: how many components, at least 1.
        position: in [0, 1], from the largest singular values to the smallest; or None.
        start: the first component, counted from 0; or None.

    Raises:
        TypeError, ValueError: rank below 1, not exactly one of position and
            start, a position outside [0, 1], a negative start.

    Example:
        >>> import lora_lens as ll
        >>> window = ll.Window(rank=8, position=0.5)
        >>> window.slice(64)  # half-way between [0, 8) and [56, 64)
        slice(28, 36, None)
        >>> print(window)
        window of rank 8 at position 0.5
    """

    rank: int
    position: float | None = None
    start: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", validate_rank(self.rank))
        if (self.position is None) == (self.start is None):
            raise InputError(
                f"give a window either a position in [0, 1] or a start, not "
                f"position={self.position!r} and start={self.start!r}"
            )
        if self.position is not None:
            position = validate.number(self.position, "position", least=0, most=1)
            object.__setattr__(self, "position", position)
        else:
            object.__setattr__(self, "start", validate.whole_number(self.start, "start", least=0))

    @classmethod
    def first(cls, rank: int) -> Window:
        """The largest singular values: PiSSA's start."""
        return cls(rank, position=0.0)

    @classmethod
    def middle(cls, rank: int) -> Window:
        """Half-way between first and last."""
        return cls(rank, position=0.5)

    @classmethod
    def last(cls, rank: int) -> Window:
        """The smallest singular values: MiLoRA's start."""
        return cls(rank, position=1.0)

    def slice(self, k: int, name: str = "this weight") -> builtins.slice:
        """The component indices on a spectrum of ``k`` components.

        Raises:
            ValueError: the window does not fit; the message names ``name``.
        """
        require_fit(self.rank, k, name)
        start = self.start if self.position is None else round(self.position * (k - self.rank))
        assert start is not None  # one of the two is given
        if start + self.rank > k:
            raise InputError(
                f"window [{start}, {start + self.rank}) does not fit {name}: its spectrum has "
                f"{k} components, so start must be at most {k - self.rank}"
            )
        return builtins.slice(start, start + self.rank)

    def select(self, singular_values: Tensor, name: str = "this weight") -> builtins.slice:
        """As :meth:`slice`, whatever the singular values."""
        return self.slice(len(singular_values), name)

    def __str__(self) -> str:
        where = f"position {self.position:g}" if self.position is not None else f"start {self.start}"
        return f"window of rank {self.rank} at {where}"


def windows(rank: int, count: int = 9) -> list[Window]:
    """``count`` windows, evenly spaced from the first (PiSSA) to the last (MiLoRA).

    Args:
        rank: of each, at least 1.
        count: how many, in [2, 100000].

    Raises:
        TypeError, ValueError: ``rank`` is below 1, ``count`` not in [2, 100000], or one is no whole number.

    Example:
        >>> import lora_lens as ll
        >>> [window.position for window in ll.windows(rank=8, count=5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    rank, count = validate_rank(rank), validate.whole_number(count, "count", least=2, most=MOST_WINDOWS)
    return [Window(rank, position=float(p)) for p in np.linspace(0, 1, count)]
