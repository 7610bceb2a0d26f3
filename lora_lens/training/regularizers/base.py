"""Regularizers: what is added to a loss against forgetting, and how a run uses it."""

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
    """A term that is added to the loss of the new task against forgetting: the base class of all of them.

    A single run takes one as :func:`lora_lens.finetune`'s ``regularizer=``, a grid in a
    :class:`Regularized`, a sequence of tasks in its strategy. For one of your own, write a subclass that is
    a frozen dataclass.

    Attributes:
        share: which share of each batch, in [0, 1), are examples of what the model knows instead of the new
            task, so that a step costs the same.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> @dataclass(frozen=True)
        ... class SmallFactors(ll.training.Regularizer):
        ...     strength: float
        ...     def begin(self, model, past, config):
        ...         factors = [p for name, p in model.named_parameters() if "lora_" in name]
        ...         return lambda: self.strength * sum(p.square().sum() for p in factors)
        >>> adapted, short = ll.attach(model, ll.LoRA(2)), {"steps": 2, "batch_size": 10, "progress": False}
        >>> run = ll.finetune(adapted, task, retain=task, regularizer=SmallFactors(0.1), **short)
        >>> run.diverged
        False
    """

    share: ClassVar[float] = 0.0

    @abstractmethod
    def begin(self, model: nn.Module, past: Past, config: Training) -> LossTerm:
        """Prepare a run, before its first step.

        Args:
            model: the model to be trained, as it starts.
            past: what it knows.
            config: the run's settings.

        Returns:
            A function that is called at every step, and returns the loss to add in nats, a scalar.

        Raises:
            ValueError: the regularizer does not fit the model, the settings or what the model knows.
        """

    def keep(self, model: nn.Module, past: Past, config: Training) -> dict[str, Tensor]:
        """What the tasks after the one at ``past.place`` will need of it, and of those before.

        Args:
            model: as that task left it, with its adapter.
            past: what the model knew before that task.
            config: the settings of that task's run.

        Returns:
            Tensors by name, as ``past.kept`` of the next task.
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
        self.retain.to_guard()  # raises where nothing may be trained on it
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
        TypeError: ``method`` trains no weights of the model or is under a regularizer already, or
            ``regularizer`` is none.

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
    """A method without the regularizer that it may be under."""
    return method.method if isinstance(method, Regularized) else method


def regularizer_of(method: MethodLike) -> Regularizer | None:
    """The regularizer that a method is under; None without one."""
    return method.regularizer if isinstance(method, Regularized) else None


def own_examples(regularizer: Regularizer, config: Training) -> int:
    """How many examples of each batch a regularizer takes, rounded down.

    Raises:
        ValueError: the batch is so small that there would be none.
    """
    if (count := int(config.batch_size * regularizer.share)) < 1:
        raise InputError(
            f"{regularizer} needs half of each batch, and batch_size is {config.batch_size}: use 2 or more"
        )
    return count


def check_strength(regularizer: Regularizer) -> None:
    """Make a regularizer's strength a float.

    Raises:
        ValueError: it is negative or not finite.
    """
    strength = validate.number(regularizer.strength, "a regularizer's strength", least=0)
    object.__setattr__(regularizer, "strength", strength)


def check_count(regularizer: Regularizer, name: str) -> None:
    """Make one of a regularizer's counts an int.

    Raises:
        ValueError, TypeError: it is no whole number of at least 1.
    """
    count = validate.whole_number(getattr(regularizer, name), name, least=1)
    object.__setattr__(regularizer, name, count)
