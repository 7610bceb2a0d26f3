"""What can be trained of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens.adapters.copying import copy_around
from lora_lens.adapters.low_rank import attach_factors, plan_layers
from lora_lens.adapters.requests import Request
from lora_lens.spectrum.placement import ByLayer
from lora_lens.spectrum.window import Placement, validate_rank


class Method(ABC):
    """What is trained of a model, where it is no window.

    Windows, other placements and mappings of patterns to placements stand wherever a method does. For a
    method of your own, subclass with a frozen dataclass.

    Attributes:
        trains_weights: whether weights of the model itself are trained.
        trains_factors: whether these are A and B of adapted layers alone.
        sequential: whether tasks can be learnt with it one after the other.
        adapts_in_place: whether :meth:`attach` can do without a copy of the model.
    """

    trains_weights: ClassVar[bool] = True
    trains_factors: ClassVar[bool] = False
    sequential: ClassVar[bool] = True
    adapts_in_place: ClassVar[bool] = True

    @abstractmethod
    def plan(self, request: Request) -> Mapping[str, object]:
        """What each layer gets, by name, after every check that needs no work. It changes nothing.

        Returns:
            Nothing where no layer gets an adapter.

        Raises:
            ValueError: the method does not fit the model or what else is asked for.
        """

    @abstractmethod
    def attach(self, request: Request, plan: Mapping[str, object]) -> nn.Module:
        """The model, or a copy, with what is trained; its function is the pretrained one.

        Raises:
            ValueError: as :meth:`plan`, for reasons that only the work shows.
        """


MethodLike = Method | Placement | Mapping[str, Placement]


@dataclass(frozen=True)
class Components(Method):
    """A placement, or one per layer, as a method: what :func:`as_method` makes of them."""

    placement: Placement | ByLayer
    trains_factors: ClassVar[bool] = True

    @property
    def sequential(self) -> bool:
        return isinstance(self.placement, Placement)

    def plan(self, request: Request) -> Mapping[str, object]:
        return plan_layers(self.placement, request)

    def attach(self, request: Request, plan: Mapping[str, object]) -> nn.Module:
        return attach_factors(self.placement, request, plan)


@dataclass(frozen=True)
class LoRA(Method):
    """Ordinary LoRA: random A, zero B, base untouched (Hu et al. 2022, arXiv 2106.09685).

    Attributes:
        rank: of each layer's B A, at least 1.

    Raises:
        TypeError, ValueError: the rank is no whole number of at least 1.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.LoRA(8))
        LoRA of rank 8
    """

    rank: int
    trains_factors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", validate_rank(self.rank))

    def __str__(self) -> str:
        return f"LoRA of rank {self.rank}"

    def plan(self, request: Request) -> Mapping[str, object]:
        variant = request.variant
        if variant.split != "balanced" or variant.train == "A":
            raise InputError(
                f"ordinary LoRA starts at B = 0, which leaves no sense in the variant: {variant}"
            )
        return plan_layers(self, request)

    def attach(self, request: Request, plan: Mapping[str, object]) -> nn.Module:
        return attach_factors(self, request, plan)


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Every weight is trained.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.FullFineTuning())
        full fine-tuning
    """

    def __str__(self) -> str:
        return "full fine-tuning"

    def plan(self, request: Request) -> Mapping[str, object]:
        return {}

    def attach(self, request: Request, plan: Mapping[str, object]) -> nn.Module:
        return _whole(request).requires_grad_(True)


@dataclass(frozen=True)
class LinearProbe(Method):
    """Nothing but the new head is trained: the bound on retention.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.LinearProbe())
        linear probe
    """

    trains_weights: ClassVar[bool] = False
    sequential: ClassVar[bool] = False

    def __str__(self) -> str:
        return "linear probe"

    def plan(self, request: Request) -> Mapping[str, object]:
        return {}

    def attach(self, request: Request, plan: Mapping[str, object]) -> nn.Module:
        if request.modules_to_save:
            raise InputError("a linear probe trains nothing of the model, so it takes no modules_to_save")
        return _whole(request).requires_grad_(False)


def as_method(method: MethodLike) -> Method:
    """What stands for a method, as one.

    Raises:
        TypeError: it is none.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, Placement):
        return Components(method)
    if isinstance(method, Mapping):
        return Components(ByLayer(method))
    raise InputTypeError(
        "expected a Window or another placement, a mapping of patterns to placements, LoRA, LinearProbe, "
        f"FullFineTuning or PeftMethod, not {method!r}"
    )


def _whole(request: Request) -> nn.Module:
    return request.model if request.inplace else copy_around(request.model, [])
