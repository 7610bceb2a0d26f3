"""Other placements than one window everywhere: rules read from a spectrum, a choice per layer, controls."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_lens._base import validate
from lora_lens._base.errors import InputError, InputTypeError
from lora_lens.spectrum.measures import effective_rank
from lora_lens.spectrum.window import Placement, Window, require_fit, validate_rank


@dataclass(frozen=True)
class _OfRank(Placement):
    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", validate_rank(self.rank))


@dataclass(frozen=True)
class _OfShare(_OfRank):
    """``share`` is of the energy, in (0, 1)."""

    share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        share = validate.number(self.share, "share of the energy", above=0, below=1)
        object.__setattr__(self, "share", share)


@dataclass(frozen=True)
class AtEffectiveRank(_OfRank):
    """The window that starts at the spectrum's effective rank (Roy and Vetterli 2007), rounded.

    Where fewer than ``rank`` components follow, it is the last window.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> s = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])  # of effective rank 3
        >>> ll.spectrum.AtEffectiveRank(rank=2).select(s)
        slice(3, 5, None)
    """

    def select(self, singular_values: Tensor, name: str = "this weight") -> slice:
        return _from(round(effective_rank(singular_values)), self.rank, singular_values, name)

    def __str__(self) -> str:
        return f"window of rank {self.rank} at the effective rank"


@dataclass(frozen=True)
class AfterEnergy(_OfShare):
    """The window that starts behind the fewest first components that hold ``share`` of the energy.

    The energy is the squared Frobenius norm, sum(s^2). Where fewer than ``rank``
    components follow, it is the last window.

    Raises:
        ValueError: a share outside (0, 1).

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> s = torch.tensor([3.0, 2.0, 1.0, 1.0])  # 9, 4, 1 and 1 fifteenths of the energy
        >>> ll.spectrum.AfterEnergy(rank=2, share=0.8).select(s)
        slice(2, 4, None)
    """

    def select(self, singular_values: Tensor, name: str = "this weight") -> slice:
        cumulative = _cumulative_energy(singular_values)
        start = int((cumulative[1:] < self.share * cumulative[-1]).sum()) + 1
        return _from(start, self.rank, singular_values, name)

    def __str__(self) -> str:
        return f"window of rank {self.rank} behind {self.share:.4g} of the energy"


@dataclass(frozen=True)
class HoldingEnergy(_OfShare):
    """The last window, counted from the largest singular values, that holds ``share`` of the energy itself.

    The energy is the squared Frobenius norm, sum(s^2), so this equalises over
    the weights how much of each is trained.

    Raises:
        ValueError: a share outside (0, 1); :meth:`select`: not even the first window holds it.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> s = torch.tensor([3.0, 2.0, 1.0, 1.0])  # 9, 4, 1 and 1 fifteenths of the energy
        >>> ll.spectrum.HoldingEnergy(rank=2, share=0.3).select(s)
        slice(1, 3, None)
    """

    def select(self, singular_values: Tensor, name: str = "this weight") -> slice:
        require_fit(self.rank, len(singular_values), name)
        cumulative = _cumulative_energy(singular_values)
        held = (cumulative[self.rank :] - cumulative[: -self.rank]) / cumulative[-1]
        if not held[0] >= self.share:
            raise InputError(
                f"no window of rank {self.rank} holds {self.share:.4g} of the energy of {name}: the first "
                f"holds {float(held[0]):.4g}; use a larger rank or a smaller share"
            )
        start = int((held >= self.share).nonzero().max())
        return slice(start, start + self.rank)

    def __str__(self) -> str:
        return f"window of rank {self.rank} that holds {self.share:.4g} of the energy"


@dataclass(frozen=True)
class Components(Placement):
    """These components of every weight, counted from the largest singular value: any set, not only a range.

    Raises:
        TypeError, ValueError: no whole numbers of at least 0, none, or one twice.

    Example:
        >>> import lora_lens as ll
        >>> chosen = ll.spectrum.Components([0, 5, 9])
        >>> print(chosen, chosen.rank)
        3 components 0, 5, 9 3
    """

    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        given = validate.sequence(self.indices, "components", "whole numbers")
        chosen = tuple(sorted(validate.whole_number(i, "a component") for i in given))
        if not chosen or chosen[0] < 0 or len(set(chosen)) < len(chosen):
            raise InputError(
                f"components must be different whole numbers of at least 0, not {self.indices!r}"
            )
        object.__setattr__(self, "indices", chosen)
        object.__setattr__(self, "rank", len(chosen))

    def select(self, singular_values: Tensor, name: str = "this weight") -> Tensor:
        k = len(singular_values)
        if self.indices[-1] >= k:
            raise InputError(
                f"component {self.indices[-1]} does not fit {name}: its spectrum has {k} components, "
                f"0 to {k - 1}"
            )
        return torch.tensor(self.indices)

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.indices[:6])) + (", ..." if self.rank > 6 else "")
        return f"{self.rank} components {shown}"


@dataclass(frozen=True)
class RandomComponents(_OfRank):
    """``rank`` components drawn without replacement, anew for each weight: a control for windows.

    The draw depends on ``seed``, the weight's name and the number of its components, and on nothing else.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> draw = ll.spectrum.RandomComponents(rank=4, seed=0)
        >>> draw.select(torch.ones(64), "blocks.0.attn.qkv")
        tensor([13, 20, 29, 41])
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seed", validate.seed_number(self.seed))

    def select(self, singular_values: Tensor, name: str = "this weight") -> Tensor:
        k = len(singular_values)
        require_fit(self.rank, k, name)
        draw = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return torch.from_numpy(np.sort(draw.choice(k, self.rank, replace=False)))

    def __str__(self) -> str:
        return f"{self.rank} random components, seed {self.seed}"


@dataclass(frozen=True)
class SpreadComponents(_OfRank):
    """``rank`` components evenly spread over the spectrum, the first and the last among them: a control.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> ll.spectrum.SpreadComponents(rank=4).select(torch.ones(16))
        tensor([ 0,  5, 10, 15])
    """

    def select(self, singular_values: Tensor, name: str = "this weight") -> Tensor:
        k = len(singular_values)
        require_fit(self.rank, k, name)
        return torch.from_numpy(np.linspace(0, k - 1, self.rank).round().astype(np.int64))

    def __str__(self) -> str:
        return f"{self.rank} components evenly spread"


class ByLayer(Mapping[str, Placement]):
    """One placement per layer or kind: target patterns to placements; the first pattern that matches counts.

    Layers that no pattern matches are not adapted. It can be hashed, so that a :class:`lora_lens.Grid` may
    hold it; :func:`lora_lens.attach` takes a plain dict as well.

    Raises:
        TypeError, ValueError: it is empty, or a value is no placement.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.spectrum.ByLayer({"all-attention": ll.Window.middle(8), "all-mlp": ll.Window.last(8)}))
        all-attention: window of rank 8 at position 0.5; all-mlp: window of rank 8 at position 1
    """

    def __init__(self, placements: Mapping[str, Placement]):
        validate.instance(placements, Mapping, "placements", "a mapping of target patterns to placements")
        for pattern in placements:
            validate.instance(pattern, str, "a pattern of placements", "a string, such as 'all-linear'")
        for pattern, placement in placements.items():
            if not isinstance(placement, Placement):
                raise InputTypeError(
                    f"expected a window or another placement for {pattern!r}, not {placement!r}; "
                    "only these can differ from layer to layer"
                )
        if not placements:
            raise InputError(
                "no placements: give at least one pattern, such as {'all-linear': Window.middle(8)}"
            )
        self._placements = dict(placements)

    def __getitem__(self, pattern: str) -> Placement:
        return self._placements[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._placements)

    def __len__(self) -> int:
        return len(self._placements)

    def __hash__(self) -> int:
        return hash(tuple(self._placements.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByLayer) and list(self.items()) == list(other.items())

    def __str__(self) -> str:
        return "; ".join(f"{pattern}: {placement}" for pattern, placement in self.items())


def _from(start: int, rank: int, singular_values: Tensor, name: str) -> slice:
    k = len(singular_values)
    require_fit(rank, k, name)
    return Window(rank, start=min(start, k - rank)).slice(k, name)


def _cumulative_energy(singular_values: Tensor) -> Tensor:
    """(k + 1,): the squared singular values summed from the first on, beginning with 0."""
    squares = singular_values.double().square()
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)])
