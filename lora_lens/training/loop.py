"""The training loop: its state, a step, the tests between, and who is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import get_cosine_schedule_with_warmup

from lora_lens._base.errors import InputError
from lora_lens._base.precision import autocast
from lora_lens._base.processes import average_gradients
from lora_lens._base.random_state import seeded
from lora_lens.tasks.evaluation import Answers, evaluate
from lora_lens.tasks.readouts import HeadReadout, Readout, ask
from lora_lens.tasks.task import Task
from lora_lens.training.lean_layers import lean_layers
from lora_lens.training.prefix_cache import FrozenPrefix, frozen_prefix
from lora_lens.training.regularizers.base import Past, Regularizer
from lora_lens.training.run import Progress, Run
from lora_lens.training.settings import Training

OWN_DROPOUT = 2**20  # between the seeds of two processes, whose dropout would be the same otherwise
Callback = Callable[[Progress], object]
Test = tuple[Task, Readout]


@dataclass(frozen=True, eq=False)
class Before:
    """Answers before the first step that are at hand, from :func:`lora_lens.evaluate`.

    Attributes:
        task: to the new task's test examples.
        retain: to the retained task's.
        watch: to those of each watched task, in their order.
    """

    task: Answers | None = None
    retain: Answers | None = None
    watch: Sequence[Answers] | None = None


class TrainingLoop:
    """One run of a model, its readout and a task that fit each other, which nobody checks here.

    Attributes:
        step: steps done.
        rows: one per evaluation, see :class:`Run`.
        diverged: the loss is not finite any more.
        stopped: a callback asked to stop before the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        new: Test,
        config: Training,
        accelerator: Accelerator,
        *,
        retained: Test | None = None,
        watched: Sequence[Test] = (),
        regularizer: Regularizer | None = None,
        before: Before | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Note what the regularizer must know, and start all processes alike.

        Args:
            model: as the readouts on the accelerator's device.
            new: what is learnt and tested, and its readout, which is trained too.
            retained, watched: what is tested besides, and their readouts.
            before: answers that count as those before the first step; the rest is asked.
            callbacks: called before the first step and after each; the run ends where one returns
                something true in any process.

        Raises:
            ValueError: there is nothing to train, or the regularizer does not fit.
        """
        self.model, self.config, self.accelerator = model, config, accelerator
        self.new, self.retained, self.watched, self.callbacks = new, retained, watched, callbacks
        self.before = before or Before()
        task, readout = new
        self.batch_size = new_examples(config, regularizer)
        self.parameters = [p for p in [*model.parameters(), *readout.parameters()] if p.requires_grad]
        if not self.parameters:
            raise InputError(
                f"there is nothing to train: {task.name} has no head of its own, and all of the model is "
                "frozen; attach an adapter first"
            )
        if accelerator.num_processes > 1:
            for p in self.parameters:  # all start as the main process does, whatever each has drawn
                p.data = broadcast(p.data)
        past = Past(None if retained is None else retained[0])
        self.added_loss = regularizer.begin(model, past, config) if regularizer else lambda: 0.0
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, weight_decay=config.weight_decay, fused=_can_fuse(self.parameters)
        )
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, round(config.warmup * config.steps), config.steps
        )
        self.step, self.diverged, self.stopped = 0, False, False
        self.rows: list[dict[str, float]] = []
        self.answers: list[Answers] = []  # to the retained task's test examples, one per evaluation
        self.losses: list[float] = []  # of the steps since the last evaluation

    def run(self) -> Run:
        """All steps, or as many as are wanted, and the tests."""
        started, config = time.monotonic(), self.config
        with lean_layers(self.model, config.precision):
            return self._run(started)

    def _run(self, started: float) -> Run:
        config, (task, readout) = self.config, self.new
        set_training_mode(self.model)
        self.evaluate()
        before = self.before.watch
        before = [self.answers_to(test) for test in self.watched] if before is None else before
        device, process = self.accelerator.device, self.accelerator.process_index
        with seeded(config.seed + OWN_DROPOUT * process, device):
            batches = task.train.shuffled(self.batch_size, config.seed)
            visits = config.steps * self.batch_size
            prefix = frozen_prefix(self.model, readout, task.train, visits=visits, precision=config.precision)
            self.stopped = self.tell(float("nan"))
            while self.step < config.steps and not (self.stopped or self.diverged):
                self.advance(batches, prefix)
        after = [self.answers_to(test) for test in self.watched]
        self.model.eval()
        return Run(
            config,
            pd.DataFrame(self.rows),
            self.diverged,
            time.monotonic() - started,
            readout.head if isinstance(readout, HeadReadout) else None,
            _items(self.answers),
            _watched([test[0].name for test in self.watched], before, after),
            self.stopped,
        )

    def advance(self, batches: Iterator[Tensor], prefix: FrozenPrefix) -> None:
        """One step, with the evaluation that is due after it, and the callbacks."""
        value = self.take_step(next(batches), prefix)
        self.step += 1
        self.diverged = not np.isfinite(value)
        if self.diverged or self.step in self.config.evaluation_steps:
            self.evaluate()
        wanted = self.tell(value)
        self.stopped = wanted and self.step < self.config.steps and not self.diverged
        if self.stopped and self.rows[-1]["step"] < self.step:
            self.evaluate()

    def take_step(self, batch: Tensor, prefix: FrozenPrefix) -> float:
        """Learn from a batch of row numbers, unless its loss is not finite: the loss, in nats."""
        accelerator, (task, readout) = self.accelerator, self.new
        mine = batch[accelerator.process_index :: accelerator.num_processes]
        with autocast(accelerator.device, self.config.precision), prefix.of(mine):
            logits, labels = ask(readout, self.model, task.train, mine)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss = loss * (len(mine) * accelerator.num_processes / len(batch))  # their mean is the batch's
        self.losses.append(accelerator.reduce(loss.detach(), "mean").item())
        loss = loss + self.added_loss()
        value = accelerator.reduce(loss.detach(), "mean").item()
        if np.isfinite(value):
            self.optimizer.zero_grad()
            loss.backward()
            average_gradients(accelerator, self.parameters)
            self.optimizer.step()
            self.schedule.step()
        return value

    def evaluate(self) -> None:
        """Test the new and the retained task: one row more."""
        known = self.before if self.step == 0 else Before()
        new = known.task or self.answers_to(self.new)
        row = {
            "step": self.step,
            "loss": float(np.mean(self.losses)) if self.losses else float("nan"),
            "accuracy": new.accuracy,
            "test_loss": new.loss,
            "retained_accuracy": float("nan"),
            "retained_loss": float("nan"),
        }
        if self.retained is not None:
            self.answers.append(known.retain or self.answers_to(self.retained))
            row |= {"retained_accuracy": self.answers[-1].accuracy, "retained_loss": self.answers[-1].loss}
        self.rows.append(row)
        self.losses.clear()

    def answers_to(self, test: Test) -> Answers:
        return evaluate(self.model, *test, precision=self.config.precision)

    def tell(self, loss: float) -> bool:
        """Call the callbacks; True if one of them, in any process, asks to stop."""
        if not self.callbacks:
            return False
        progress = Progress(self.step, self.config.steps, loss, tuple(self.rows))
        wishes = [bool(callback(progress)) for callback in self.callbacks]
        total = torch.tensor(float(any(wishes)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(total, "sum").item())


def _can_fuse(parameters: Sequence[Tensor]) -> bool:
    """Whether one kernel may take the step of all parameters: plain ones on one device that has it."""
    kinds = {(p.device.type, type(p.data), p.dtype.is_floating_point) for p in parameters}
    return len(kinds) == 1 and kinds <= {(kind, Tensor, True) for kind in ("cpu", "cuda")}


def new_examples(config: Training, regularizer: Regularizer | None) -> int:
    """How many examples of a batch are of the new task."""
    return config.batch_size - int(config.batch_size * (regularizer.share if regularizer else 0))


def set_training_mode(model: nn.Module) -> None:
    """Training mode, but for batch norms with frozen parameters: their statistics are pretrained, too."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


def _items(answers: Sequence[Answers]) -> pd.DataFrame | None:
    if not answers:
        return None
    first, last = answers[0], answers[-1]
    return pd.DataFrame({"label": first.labels, "before": first.predicted, "after": last.predicted})


def _watched(
    names: Sequence[str], before: Sequence[Answers], after: Sequence[Answers]
) -> pd.DataFrame | None:
    rows: list[Mapping[str, object]] = [
        {
            "task": name,
            "before": old.accuracy,
            "after": new.accuracy,
            "loss_before": old.loss,
            "loss_after": new.loss,
        }
        for name, old, new in zip(names, before, after, strict=True)
    ]
    return pd.DataFrame(rows) if rows else None
