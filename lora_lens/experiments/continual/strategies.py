"""How a sequence of tasks is learnt: what one task hands on to the next.

A strategy chains the runs of a method; the method (a window, LoRA, full fine-tuning) says what each run
trains. :func:`lora_lens.experiments.continual_sweep` combines them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.validate import instance
from lora_lens.adapters.methods import LoRA, MethodLike, as_method
from lora_lens.experiments.identity import exact
from lora_lens.spectrum.window import Placement, Window, require_fit, validate_rank
from lora_lens.training.regularizers.base import Regularized, Regularizer, trained_part
from lora_lens.training.regularizers.ewc import EWC
from lora_lens.training.regularizers.orthogonal import Orthogonal
from lora_lens.training.regularizers.replay import Replay


class Strategy(ABC):
    """How the runs of a method on several tasks are chained.

    Attributes:
        regularizer: keeps the model from forgetting earlier tasks while it learns a later one; may be None.
        one_adapter: whether the adapter of the first task is trained on through all of them.
        own_adapters: whether each task has an adapter of its own, on the pretrained model.
        together: whether all tasks are learnt at once.
    """

    regularizer: Regularizer | None = None
    one_adapter: ClassVar[bool] = False
    own_adapters: ClassVar[bool] = False
    together: ClassVar[bool] = False

    @abstractmethod
    def __str__(self) -> str: ...

    def method_at(self, method: MethodLike, place: int) -> MethodLike:
        """The method for the task at this place of the sequence, counted from 0."""
        return method

    def require_method(self, method: MethodLike) -> None:
        """Check that the method can be chained.

        Raises:
            TypeError: it cannot.
        """
        if not as_method(method).sequential:
            raise InputTypeError(
                "a sequence of tasks is learnt by windows, LoRA, FullFineTuning, PEFT's methods that need no "
                f"data, or one of them under a regularizer, not by {method!r}"
            )


@dataclass(frozen=True)
class Continued(Strategy):
    """One adapter, attached before the first task and trained on through all of them.

    Attributes:
        regularizer: against forgetting earlier tasks, see :mod:`lora_lens.training.regularizers`.

    Raises:
        TypeError: the regularizer does not fit: :class:`lora_lens.training.Orthogonal` compares the adapters
            of different tasks, and here is only one.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.experiments.continual.Continued(ll.training.EWC(100)))
        continued, EWC 100
    """

    regularizer: Regularizer | None = None
    one_adapter: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_regularizer(self.regularizer)
        if isinstance(self.regularizer, Orthogonal):
            raise InputTypeError(
                "Orthogonal keeps each task's adapter apart from the earlier ones, and Continued has one "
                "adapter for all; use Merged(Orthogonal(...))"
            )

    def __str__(self) -> str:
        return _named("continued", self.regularizer)


@dataclass(frozen=True)
class Merged(Strategy):
    """Attach, train, merge; the next task's adapter starts from the spectrum of the merged weight.

    With the first window this is PiSSA, with the last MiLoRA, started again for every task; with LoRA it is
    the usual sequential LoRA.

    Attributes:
        regularizer: against forgetting earlier tasks, see :mod:`lora_lens.training.regularizers`.

    Raises:
        TypeError: the regularizer does not fit: :class:`lora_lens.training.EWC` holds the same parameters
            near their values, and here every task has new ones.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.experiments.continual.Merged(ll.training.Replay(200)))
        merged, replay 200
    """

    regularizer: Regularizer | None = None

    def __post_init__(self) -> None:
        _check_regularizer(self.regularizer)
        if isinstance(self.regularizer, EWC):
            raise InputTypeError(
                "EWC holds parameters near the values that earlier tasks left, and Merged gives every task "
                "new ones; use Continued(EWC(...))"
            )

    def __str__(self) -> str:
        return _named("merged", self.regularizer)

    def require_method(self, method: MethodLike) -> None:
        super().require_method(method)
        if isinstance(self.regularizer, Orthogonal) and not isinstance(trained_part(method), LoRA):
            raise InputTypeError(
                f"Orthogonal keeps LoRA's A apart from those of earlier tasks (O-LoRA); {method!r} starts "
                "from given components: use LoRA(rank)"
            )


@dataclass(frozen=True)
class Moving(Strategy):
    """As :class:`Merged`, but each task's window follows the last one's, so that none is shared.

    The spectrum is divided into slots of ``rank`` components; the first task takes the slot at the window's
    position, the others the next ones towards the smaller singular values and, past the last, those from
    the largest on. Components are those of the merged weight at the time.

    Raises:
        TypeError: a sweep combines it with something else than a window with a position.
        ValueError: there are more tasks than slots.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.experiments.continual.Moving())
        moving
    """

    def __str__(self) -> str:
        return "moving"

    def method_at(self, method: MethodLike, place: int) -> MethodLike:
        inner = trained_part(method)
        slot = Slot(inner.rank, inner.position, place)
        return replace(method, method=slot) if isinstance(method, Regularized) else slot

    def require_method(self, method: MethodLike) -> None:
        super().require_method(method)
        inner = trained_part(method)
        if not (isinstance(inner, Window) and inner.position is not None):
            raise InputTypeError(f"Moving moves a window with a position, not {method!r}")


@dataclass(frozen=True)
class Separate(Strategy):
    """One adapter and head per task, each on the pretrained model; at test time the task is known.

    Nothing is forgotten and nothing transferred: the upper bound on retention.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.experiments.continual.Separate())
        separate
    """

    own_adapters: ClassVar[bool] = True

    def __str__(self) -> str:
        return "separate"


@dataclass(frozen=True)
class Joint(Strategy):
    """All tasks at once, in mixed batches, for as many steps as the others take in all.

    The upper bound on accuracy; there is no sequence, so forgetting is not defined.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.experiments.continual.Joint())
        joint
    """

    together: ClassVar[bool] = True

    def __str__(self) -> str:
        return "joint"


def exact_strategy(strategy: Strategy) -> dict[str, object]:
    """What a sequence's name takes in place of the strategy's text; nothing where that is exact."""
    text_is_exact = type(strategy.regularizer) in (type(None), Replay)  # whose text is a whole number
    return {} if text_is_exact else {"strategy": exact(strategy, f"the strategy {strategy}")}


@dataclass(frozen=True)
class Slot(Placement):
    """The slot of ``rank`` components ``shift`` slots behind the one at ``position``, in a circle."""

    rank: int
    position: float
    shift: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", validate_rank(self.rank))

    def select(self, singular_values: Tensor, name: str = "this weight") -> slice:
        require_fit(self.rank, len(singular_values), name)
        slots = len(singular_values) // self.rank
        if self.shift >= slots:
            raise InputError(
                f"{name} has {len(singular_values)} components, which is {slots} slots of rank {self.rank}, "
                f"and task {self.shift + 1} needs another; use a smaller rank or fewer tasks"
            )
        start = (round(self.position * (slots - 1)) + self.shift) % slots * self.rank
        return slice(start, start + self.rank)

    def __str__(self) -> str:
        return f"slot of rank {self.rank}, {self.shift} behind position {self.position:g}"


def _check_regularizer(regularizer: Regularizer | None) -> None:
    instance(regularizer, (Regularizer, type(None)), "regularizer", "one such as Replay(200), or None")


def _named(name: str, regularizer: Regularizer | None) -> str:
    return name if regularizer is None else f"{name}, {regularizer}"
