"""Three settings of continual learning: what is known of the task when the model is asked.

van de Ven, Tuytelaars and Tolias (2022), "Three types of incremental learning", Nature Machine
Intelligence 4, 1185-1197, with their names:

- task-incremental: it is known which task an example belongs to; each task has its own head.
- domain-incremental: the tasks have the same classes; one head serves all of them.
- class-incremental: every task brings new classes; one head tells all classes seen so far apart, and so
  has to find out the task, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count as count_from

import torch
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens.tasks.readouts import HeadReadout, Inputs, Readout, pooled_features
from lora_lens.tasks.task import Examples, Task, fresh_head

HeadState = dict[str, dict[str, Tensor]]


@dataclass(eq=False)
class _Scenario:
    """What the settings have in common, and the readout of those that have one for all tasks."""

    tasks: Sequence[Task]
    readout: Readout | None = None

    def prepare(self, model: nn.Module, seed: int) -> None:
        """Make what is there before any training."""

    def begin(self, place: int, model: nn.Module, seed: int) -> None:
        """Make what is trained beside the model on the task at ``place``."""

    def trained(self, place: int) -> tuple[Task, Readout]:
        """The task with the labels it is trained with, and its readout."""
        return self.tasks[place], self.readout

    def asked(self, place: int, after: int) -> tuple[Task, Readout] | None:
        """How the task at ``place`` is tested once ``after`` tasks were trained; None where it cannot be."""
        return self.trained(place) if place < after else None

    def shared(self) -> Readout | None:
        """The readout that all tasks train, if there is one."""
        return self.readout

    def state(self) -> HeadState:
        return {} if self.readout is None else {"": _state(self.readout)}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> None:
        if "" in state:
            self.readout = _readout(self.tasks[0], model, state[""])


@dataclass(eq=False)
class TaskIncremental(_Scenario):
    """A new head for each task; earlier heads stay as their task left them."""

    readouts: dict[int, Readout] = field(default_factory=dict)

    def begin(self, place: int, model: nn.Module, seed: int) -> None:
        for readout in self.readouts.values():
            readout.requires_grad_(False)
        self.readouts[place] = self.tasks[place].new_readout(model, seed)

    def trained(self, place: int) -> tuple[Task, Readout]:
        return self.tasks[place], self.readouts[place]

    def state(self) -> HeadState:
        return {str(place): _state(readout) for place, readout in self.readouts.items()}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> None:
        for place, kept in state.items():
            self.readouts[int(place)] = _readout(self.tasks[int(place)], model, kept).requires_grad_(False)


@dataclass(eq=False)
class DomainIncremental(_Scenario):
    """One readout for all tasks, whose classes must be the same.

    Raises:
        ValueError: two tasks have different classes.
    """

    def __post_init__(self) -> None:
        first = self.tasks[0]
        for task in self.tasks[1:]:
            if len(task.classes) != len(first.classes):
                raise InputError(
                    f"domain-incremental tasks share one head, so they need the same classes: {first.name} "
                    f"has {len(first.classes)}, {task.name} has {len(task.classes)}; use "
                    'setting="task-incremental"'
                )
        _require_one_reading(self.tasks, "share one head")

    def prepare(self, model: nn.Module, seed: int) -> None:
        self.readout = self.tasks[0].new_readout(model, seed)

    def asked(self, place: int, after: int) -> tuple[Task, Readout] | None:
        return self.trained(place)


@dataclass(eq=False)
class ClassIncremental(_Scenario):
    """One head that grows by each task's classes; the loss and the answers are over all classes seen so far.

    Raises:
        ValueError: a task is read from the model's own words, so that there is no head to grow.
    """

    def __post_init__(self) -> None:
        for task in self.tasks:
            if type(task) is not Task:
                raise InputError(
                    f"{task.name} is read from the model's own words, so there is no head that could grow; "
                    'use setting="task-incremental" or "domain-incremental"'
                )
        _require_one_reading(self.tasks, "share one head")

    def begin(self, place: int, model: nn.Module, seed: int) -> None:
        new = self.tasks[place].new_readout(model, seed)
        if self.readout is not None:
            new.head = grown(self.readout.head, new.head)
        self.readout = new

    def trained(self, place: int) -> tuple[Task, Readout]:
        """The task with its classes numbered among all that the head has."""
        names = [name for task in self.tasks for name in task.classes][: self.readout.head.out_features]
        return relabelled(self.tasks[place], offset_of(self.tasks, place), names), self.readout


Scenario = TaskIncremental | DomainIncremental | ClassIncremental
SCENARIOS: dict[str, Callable[[Sequence[Task]], Scenario]] = {
    "task-incremental": TaskIncremental,
    "domain-incremental": DomainIncremental,
    "class-incremental": ClassIncremental,
}


class OwnHeads(nn.Module):
    """The heads of several tasks side by side, each example read by its task's own.

    ``forward`` gives logits (batch, classes of all tasks), -inf outside of the task that the label belongs
    to, so that the cross-entropy is that of the task's own head.

    Args:
        head: from the features to the classes of all tasks.
        sizes: how many classes each task has.
    """

    def __init__(self, head: nn.Linear, sizes: Sequence[int], pooling: str) -> None:
        super().__init__()
        self.head, self.pooling = head, pooling
        self.register_buffer("task_of_class", torch.repeat_interleave(torch.tensor(list(sizes))))

    def forward(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(pooled_features(model, inputs, self.pooling).to(self.head.weight.dtype))
        others = self.task_of_class[labels][:, None] != self.task_of_class
        return logits.masked_fill(others, -torch.inf), labels


def all_at_once(setting: str, tasks: Sequence[Task], model: nn.Module, seed: int) -> tuple[Task, Readout]:
    """One task made of all of them, and the readout to train on it.

    Raises:
        ValueError: the tasks are read in different ways, or as the setting.
    """
    SCENARIOS[setting](tasks)
    first = tasks[0]
    _require_one_reading(tasks, "are trained at once")
    if setting == "domain-incremental" or type(first) is not Task:
        together = replace(first, name="all tasks", train=first.train.joined(*(t.train for t in tasks[1:])))
        return together, first.new_readout(model, seed)
    names = tuple(name for task in tasks for name in task.classes)
    parts = [relabelled(task, offset_of(tasks, place), names) for place, task in enumerate(tasks)]
    together = replace(parts[0], name="all tasks", train=parts[0].train.joined(*(p.train for p in parts[1:])))
    readout = together.new_readout(model, seed)
    if setting == "class-incremental":
        return together, readout
    return together, OwnHeads(readout.head, [len(task.classes) for task in tasks], first.pooling)


def one_of(setting: str, tasks: Sequence[Task], place: int, readout: Readout) -> tuple[Task, Readout]:
    """How one of the tasks is tested after :func:`all_at_once` was trained."""
    task, offset = tasks[place], offset_of(tasks, place)
    if isinstance(readout, OwnHeads):
        part = slice(offset, offset + len(task.classes))
        return task, HeadReadout(_linear(readout.head.weight[part], readout.head.bias[part]), readout.pooling)
    if setting == "class-incremental":
        return relabelled(task, offset, [name for t in tasks for name in t.classes]), readout
    return task, readout


def relabelled(task: Task, offset: int, classes: Sequence[str]) -> Task:
    """The task with ``offset`` added to its labels, among more classes; a name's second is "name (2)"."""
    different: dict[str, None] = {}
    for name in classes:
        again = (f"{name} ({count})" for count in count_from(2))
        different[next(one for one in chain([name], again) if one not in different)] = None

    def moved(examples: Examples) -> Examples:
        return replace(examples, labels=examples.labels + offset)

    return replace(task, classes=tuple(different), train=moved(task.train), test=moved(task.test), head=None)


def _require_one_reading(tasks: Sequence[Task], what: str) -> None:
    first, *others = ((type(task), task.pooling, getattr(task, "words", None)) for task in tasks)
    for task, reading in zip(tasks[1:], others, strict=True):
        if reading != first:
            raise InputError(
                f"tasks that {what} must be read in the same way, by one pooling or the same words, and "
                f"{tasks[0].name} and {task.name} are not"
            )


def offset_of(tasks: Sequence[Task], place: int) -> int:
    return sum(len(task.classes) for task in tasks[:place])


def grown(old: nn.Linear, new: nn.Linear) -> nn.Linear:
    """A head with the classes of the old one, as it is, and then those of the new one."""
    weight, bias = (
        torch.cat([getattr(h, part).detach().cpu() for h in (old, new)]) for part in ("weight", "bias")
    )
    return _linear(weight, bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    head = fresh_head(weight.shape[1], weight.shape[0], seed=0)
    with torch.no_grad():
        head.weight.copy_(weight), head.bias.copy_(bias)
    return head


def _state(readout: Readout) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in readout.state_dict().items()}


def _readout(task: Task, model: nn.Module, state: Mapping[str, Tensor]) -> Readout:
    """A readout of the task's kind with these parameters."""
    readout = task.new_readout(model, seed=0)
    if state:
        readout.head = _linear(state["head.weight"], state["head.bias"])
    return readout
