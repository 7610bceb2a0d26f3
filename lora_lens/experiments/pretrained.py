"""What the pretrained model makes of a sweep's tasks: the same for all runs, so asked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lora_lens._base.processes import accelerator
from lora_lens._base.threads import limited_threads
from lora_lens.adapters.copying import copy_around
from lora_lens.tasks.evaluation import Answers, answers_from, evaluate, example_features
from lora_lens.tasks.readouts import HeadReadout
from lora_lens.tasks.task import Task
from lora_lens.training.record import Before

EXAMPLES_OF_FEATURES = 500  # of the retained task, to compare features on


@dataclass(frozen=True, eq=False)
class Pretrained:
    """The pretrained model's answers and features.

    Attributes:
        model, task: whose.
        precision: in which they were computed.
        features: of the new task's test examples, (n, features), where a new head reads it.
        task_answers: to these, where the model needs no new head.
        retain, watch: answers to the other tasks' test examples.
        compared: features of some test examples of the retained task, (n, features).
    """

    model: nn.Module
    task: Task
    precision: str
    features: Tensor | None
    task_answers: Answers | None
    retain: Answers
    watch: tuple[Answers, ...]
    compared: Tensor

    def before(self, seed: int) -> Before:
        """The answers before the first step of a run with this seed, which determines a new head."""
        answers = self.task_answers
        if self.features is not None:
            head = self.task.new_readout(self.model, seed).head
            answers = answers_from(head.cpu(), self.features, self.task.test.labels)
        return Before(answers, self.retain, self.watch)


def ask_pretrained(
    model: nn.Module, task: Task, retain: Task, watch: Sequence[Task], precision: str
) -> Pretrained:
    """One pass over the test examples of each task, with one thread, as the runs have."""
    there = model
    if next(model.parameters()).device != (device := accelerator().device):
        there = copy_around(model, []).to(device)  # where the runs will be
    with limited_threads(1):
        readout = task.new_readout(there, seed=0)
        by_head = isinstance(readout, HeadReadout)
        return Pretrained(
            model,
            task,
            precision,
            example_features(there, task, task.test, precision=precision) if by_head else None,
            None if by_head else evaluate(there, task, readout, precision=precision),
            evaluate(there, retain, precision=precision),
            tuple(evaluate(there, one, precision=precision) for one in watch),
            example_features(there, retain, retain.test.sampled(EXAMPLES_OF_FEATURES)),
        )
