"""How a sequence of tasks is learnt: what one task hands on to the next.

A strategy chains the runs of a method; the method (a window, LoRA, full fine-tuning) says what each run
trains. :func:`lora_lens.experiments.continual_sweep` combines them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens.adapters.methods import FullFineTuning, LoRA, Method, Penalized, inner_method
from lora_lens.experiments.identity import exact
from lora_lens.spectrum.window import Placement, Window, require_fit, validate_rank
from lora_lens.training.memories import EWC, Memory, Orthogonal, Replay


@dataclass(frozen=True)
class Continued:
    """One adapter, attached before the first task and trained on through all of them.

    Attributes:
        memory: what is kept of earlier tasks, see :mod:`lora_lens.training.memories`.

    Raises:
        TypeError: the memory does not fit: :class:`lora_lens.training.Orthogonal` compares the adapters of
            different tasks, and here is only one.
    """

    memory: Memory | None = None

    def __post_init__(self) -> None:
        _require_memory(self.memory)
        if isinstance(self.memory, Orthogonal):
            raise InputTypeError(
                "Orthogonal keeps each task's adapter apart from the earlier ones, and Continued has one "
                "adapter for all; use Merged(Orthogonal(...))"
            )

    def __str__(self) -> str:
        return _named("continued", self.memory)


@dataclass(frozen=True)
class Merged:
    """Attach, train, merge; the next task's adapter starts from the spectrum of the merged weight.

    With the first window this is PiSSA, with the last MiLoRA, started again for every task; with LoRA it is
    the usual sequential LoRA.

    Raises:
        TypeError: the memory does not fit: :class:`lora_lens.training.EWC` holds the same parameters near
            their values, and here every task has new ones.
    """

    memory: Memory | None = None

    def __post_init__(self) -> None:
        _require_memory(self.memory)
        if isinstance(self.memory, EWC):
            raise InputTypeError(
                "EWC holds parameters near the values that earlier tasks left, and Merged gives every task "
                "new ones; use Continued(EWC(...))"
            )

    def __str__(self) -> str:
        return _named("merged", self.memory)


@dataclass(frozen=True)
class Moving:
    """As :class:`Merged`, but each task's window lies behind the last one's, so that none is shared.

    The spectrum is cut into slots of ``rank`` components; the first task takes the slot at the window's
    position, the others the next ones towards the smaller singular values and, past the last, those from
    the largest on. Components are those of the merged weight at the time.
    """

    def __str__(self) -> str:
        return "moving"


@dataclass(frozen=True)
class Separate:
    """One adapter and head per task, each from the pretrained model; which task is asked is known.

    Nothing is forgotten and nothing handed on: the upper bound on retention.
    """

    def __str__(self) -> str:
        return "separate"


@dataclass(frozen=True)
class Joint:
    """All tasks at once, in mixed batches, for as many steps as the others take in all.

    The upper bound on accuracy; there is no sequence, so nothing is said of forgetting.
    """

    def __str__(self) -> str:
        return "joint"


Strategy = Continued | Merged | Moving | Separate | Joint


def exact_strategy(strategy: Strategy) -> dict[str, object]:
    """What a sequence's name takes in place of the strategy's text; nothing where that is exact."""
    told = type(getattr(strategy, "memory", None)) in (type(None), Replay)  # whose text is a whole number
    return {} if told else {"strategy": exact(strategy, f"the strategy {strategy}")}


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


def method_of(strategy: Strategy, method: Method, place: int) -> Method:
    """What the task at this place of the sequence trains."""
    if not isinstance(strategy, Moving):
        return method
    if isinstance(method, Penalized):
        return replace(method, method=method_of(strategy, method.method, place))
    return Slot(method.rank, method.position, place)


def require_method(strategy: Strategy, method: Method) -> None:
    """Raise a TypeError where a strategy cannot chain a method."""
    inner = inner_method(method)
    if not isinstance(inner, (Placement, LoRA, FullFineTuning)):
        raise InputTypeError(
            f"a sequence of tasks is learnt by windows, LoRA, FullFineTuning or one of them under a penalty, "
            f"not by {method!r}"
        )
    if isinstance(strategy, Moving) and not (isinstance(inner, Window) and inner.position is not None):
        raise InputTypeError(f"Moving moves a window with a position, not {method!r}")
    if isinstance(getattr(strategy, "memory", None), Orthogonal) and not isinstance(inner, LoRA):
        raise InputTypeError(
            f"Orthogonal keeps LoRA's A apart from those of earlier tasks (O-LoRA); {method!r} starts from "
            "given components: use LoRA(rank)"
        )


def _require_memory(memory: Memory | None) -> None:
    if memory is not None and not isinstance(memory, Memory):
        raise InputTypeError(f"expected a memory such as Replay(200), not {memory!r}")


def _named(name: str, memory: Memory | None) -> str:
    return name if memory is None else f"{name}, {memory}"
