"""What holds a model back from forgetting while it learns: the protocol of all regularizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from lora_lens._base import validate
from lora_lens._base.errors import InputError, InputTypeError
from lora_lens.adapters.methods import Method, MethodLike, as_method
from lora_lens.adapters.requests import Request
from lora_lens.spectrum.placement import ByLayer
from lora_lens.tasks.scenarios import Scenario, TaskIncremental
from lora_lens.tasks.task import Task
from lora_lens.training.settings import Training

LossTerm = Callable[[], Tensor | float]


class Regularizer(ABC):
    """What is added to the loss of the new task against forgetting.

    A run takes one by :func:`lora_lens.finetune`'s ``regularizer=``, a grid by :class:`Regularized`, a
    sequence of tasks by its strategy. For one of your own, subclass with a frozen dataclass.

    Attributes:
        share: of each batch's examples, which are taken from what the model knows instead of the new task, so
            that a step costs the same.
    """

    share: ClassVar[float] = 0.0

    @abstractmethod
    def begin(self, model: nn.Module, past: Past, config: Training) -> LossTerm:
        """Note what must be known before the first step; what is returned gives the loss to add at each.

        Args:
            model: the one that is trained, as it starts.
            past: what it knows.
            config: the run's settings.

        Raises:
            ValueError: the regularizer does not fit the model, the settings or what the model knows.
        """

    def keep(self, model: nn.Module, past: Past, config: Training) -> dict[str, Tensor]:
        """What to keep of the task at ``past.place``, for the tasks after it, and of those before.

        Args:
            model: as that task left it, with its adapter.
        """
        return {}


@dataclass(frozen=True, eq=False)
class Past:
    """What a model knows before a run.

    Attributes:
        retain: the retained task, if there is one.
        kept: what the regularizer kept of earlier tasks of the sequence; None outside of sequences.
        scenario: the tasks of the sequence with their readouts.
        place: the number of the task in the sequence.
    """

    retain: Task | None
    kept: Mapping[str, Tensor] | None = None
    scenario: Scenario | None = None
    place: int = 0

    def known_to(self, regularizer: Regularizer, model: nn.Module, config: Training) -> Past:
        """Itself in a sequence; else what ``regularizer`` keeps of the retained task, as the one before.

        Raises:
            ValueError: there is no such task.
        """
        if self.kept is not None:
            return self
        if self.retain is None:
            raise InputError(
                f"{regularizer} guards what the model knows, and nothing is retained: give finetune retain="
            )
        scenario = TaskIncremental([self.retain], readouts={0: self.retain.own_readout(model)})
        before = Past(self.retain, {}, scenario)
        return replace(before, kept=regularizer.keep(model, before, config), place=1)


@dataclass(frozen=True)
class Regularized(Method):
    """A method that is trained under a regularizer, for a :class:`lora_lens.Grid`.

    Attributes:
        method: a window or another method that trains weights of the model.
        regularizer: what its runs add to the loss.

    Raises:
        TypeError: no such method, or no regularizer.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.training.Regularized(ll.Window.middle(8), ll.training.L2ToInitial(0.01)))
        window of rank 8 at position 0.5, L2 to initial 0.01
    """

    method: MethodLike
    regularizer: Regularizer

    def __post_init__(self) -> None:
        if isinstance(self.method, Mapping):
            object.__setattr__(self, "method", ByLayer(self.method))
        inner = as_method(self.method)
        if isinstance(inner, Regularized) or not inner.trains_weights:
            raise InputTypeError(
                f"expected a method that trains weights to put under a regularizer, not {self.method!r}"
            )
        validate.instance(self.regularizer, Regularizer, "regularizer", "one such as KLAnchor(1.0)")

    @property
    def rank(self) -> int | None:
        """The inner method's; None where it has no single one."""
        return getattr(self.method, "rank", None)

    @property
    def sequential(self) -> bool:
        return as_method(self.method).sequential

    @property
    def adapts_in_place(self) -> bool:
        return as_method(self.method).adapts_in_place

    def __str__(self) -> str:
        return f"{self.method}, {self.regularizer}"

    def plan(self, request: Request) -> Mapping[str, object]:
        return as_method(self.method).plan(request)

    def attach(self, request: Request, plan: Mapping[str, object]) -> nn.Module:
        return as_method(self.method).attach(request, plan)


def trained_part(method: MethodLike) -> MethodLike:
    """What is trained, without the regularizer that it is trained under."""
    return method.method if isinstance(method, Regularized) else method


def regularizer_of(method: MethodLike) -> Regularizer | None:
    """What a method's runs add to their loss, if anything."""
    return method.regularizer if isinstance(method, Regularized) else None


def own_examples(regularizer: Regularizer, config: Training) -> int:
    """How many examples of each batch are a regularizer's own, rounded down.

    Raises:
        ValueError: none.
    """
    if (count := int(config.batch_size * regularizer.share)) < 1:
        raise InputError(
            f"{regularizer} needs half of each batch, and batch_size is {config.batch_size}: use 2 or more"
        )
    return count


def check_strength(regularizer: Regularizer) -> None:
    """Its strength as a float.

    Raises:
        ValueError: it is negative or not finite.
    """
    strength = validate.number(regularizer.strength, "a regularizer's strength", least=0)
    object.__setattr__(regularizer, "strength", strength)


def check_count(regularizer: Regularizer, name: str) -> None:
    """One of its counts as an int.

    Raises:
        ValueError, TypeError: it is no whole number of at least 1.
    """
    count = validate.whole_number(getattr(regularizer, name), name, least=1)
    object.__setattr__(regularizer, name, count)
