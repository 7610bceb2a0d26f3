"""Methods: which part of a model is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens.adapters.copying import copy_around
from lora_lens.adapters.low_rank import attach_factors, plan_layers
from lora_lens.adapters.requests import Request
from lora_lens.spectrum.placement import ByLayer
from lora_lens.spectrum.window import Placement, validate_rank


class Method(ABC):
    """Which part of a model is trained: the base class of all methods that are not windows.

    Wherever a method is expected, a window, another placement or a mapping of patterns to placements will do.
    For a method of your own, write a subclass that is a frozen dataclass.

    Attributes:
        trains_weights: whether weights of the model itself are trained.
        trains_factors: whether these are A and B of adapted layers alone.
        sequential: whether it can learn several tasks one after the other.
        adapts_in_place: whether :meth:`attach` works without a copy of the model.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> import lora_lens as ll
        >>> @dataclass(frozen=True)
        ... class Biases(ll.adapters.Method):
        ...     def plan(self, request):
        ...         return {}
        ...     def attach(self, request, plan):
        ...         adapted = ll.FullFineTuning().attach(request, plan)
        ...         for name, parameter in adapted.named_parameters():
        ...             parameter.requires_grad_(name.endswith("bias"))
        ...         return adapted
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> adapted = ll.attach(model, Biases())
        >>> [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        ['0.bias', '2.bias']
    """

    trains_weights: ClassVar[bool] = True
    trains_factors: ClassVar[bool] = False
    adapts_in_place: ClassVar[bool] = True

    @property
    def sequential(self) -> bool:
        return True

    @abstractmethod
    def plan(self, request: Request) -> Mapping[str, Any]:
        """What each layer gets, after every check that needs no factorization or training.

        Args:
            request: the model and the other arguments of :func:`lora_lens.attach`; it is not changed.

        Returns:
            By name of the layer; empty where no layer gets an adapter.

        Raises:
            ValueError: the method does not fit the model or one of the other arguments.
        """

    @abstractmethod
    def attach(self, request: Request, plan: Mapping[str, Any]) -> nn.Module:
        """The model, or a copy of it, ready for training; it computes the pretrained function.

        Args:
            request: as for :meth:`plan`.
            plan: what :meth:`plan` gave.

        Raises:
            ValueError: as :meth:`plan`, for reasons that show only now.
        """


MethodLike = Method | Placement | Mapping[str, Placement]


@dataclass(frozen=True)
class Components(Method):
    """The method that trains the components which a placement, or one for each layer, picks."""

    placement: Placement | ByLayer
    trains_factors: ClassVar[bool] = True

    @property
    def sequential(self) -> bool:
        return isinstance(self.placement, Placement)

    def plan(self, request: Request) -> Mapping[str, Any]:
        return plan_layers(self.placement, request)

    def attach(self, request: Request, plan: Mapping[str, Any]) -> nn.Module:
        return attach_factors(self.placement, request, plan)


@dataclass(frozen=True)
class LoRA(Method):
    """Ordinary LoRA: random A, zero B, base untouched (Hu et al. 2022, arXiv 2106.09685).

    Attributes:
        rank: of each layer's B A, at least 1.

    Raises:
        ValueError: the rank is less than 1.
        TypeError: it is no whole number.

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

    def plan(self, request: Request) -> Mapping[str, Any]:
        variant = request.variant
        if variant.split != "balanced" or variant.train == "A":
            raise InputError(
                f"ordinary LoRA starts at B = 0, which leaves no sense in the variant: {variant}"
            )
        return plan_layers(self, request)

    def attach(self, request: Request, plan: Mapping[str, Any]) -> nn.Module:
        return attach_factors(self, request, plan)


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Every weight is trained, without an adapter.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.FullFineTuning())
        full fine-tuning
    """

    def __str__(self) -> str:
        return "full fine-tuning"

    def plan(self, request: Request) -> Mapping[str, Any]:
        return {}

    def attach(self, request: Request, plan: Mapping[str, Any]) -> nn.Module:
        return _whole(request).requires_grad_(True)


@dataclass(frozen=True)
class LinearProbe(Method):
    """Only the new head is trained, so nothing is forgotten: the upper bound on retention.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.LinearProbe())
        linear probe
    """

    trains_weights: ClassVar[bool] = False

    @property
    def sequential(self) -> bool:
        return False

    def __str__(self) -> str:
        return "linear probe"

    def plan(self, request: Request) -> Mapping[str, Any]:
        return {}

    def attach(self, request: Request, plan: Mapping[str, Any]) -> nn.Module:
        if request.modules_to_save:
            raise InputError("a linear probe trains nothing of the model, so it takes no modules_to_save")
        return _whole(request).requires_grad_(False)


def as_method(method: MethodLike) -> Method:
    """A method, or a placement or mapping that is used as one, as a :class:`Method`.

    Raises:
        TypeError: it is none of these.
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
