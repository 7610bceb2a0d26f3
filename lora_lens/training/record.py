"""What is noted of a run while it goes on: its tests before, between and after the steps."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from lora_lens._base import validate
from lora_lens.tasks.evaluation import Answers, evaluate
from lora_lens.tasks.readouts import HeadReadout, Readout
from lora_lens.tasks.task import Task
from lora_lens.training.run import Run
from lora_lens.training.settings import Training
from lora_lens.training.updates import update_norms

Test = tuple[Task, Readout]


@dataclass(frozen=True, eq=False)
class Before:
    """Answers before the first step that are at hand, from :func:`lora_lens.evaluate`.

    Attributes:
        task: to the new task's test examples.
        retain: to the retained task's.
        watch: to those of each watched task, in their order.

    Raises:
        TypeError: something else.

    Example:
        >>> import lora_lens as ll
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> images = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**images, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> examples = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), examples, examples)
        >>> before = ll.training.Before(retain=ll.evaluate(model, task))
        >>> adapted = ll.attach(model, ll.LoRA(2))
        >>> run = ll.finetune(adapted, task, task, before=before, steps=2, batch_size=4, progress=False)
        >>> run.retained_before == before.retain.accuracy
        True
    """

    task: Answers | None = None
    retain: Answers | None = None
    watch: Sequence[Answers] | None = None

    def __post_init__(self) -> None:
        expected = "answers from ll.evaluate, or None"
        for name in ("task", "retain"):
            validate.instance(getattr(self, name), (Answers, type(None)), name, expected)
        if self.watch is not None:
            answers = validate.sequence(self.watch, "watch", "answers from ll.evaluate", one=Answers)
            object.__setattr__(self, "watch", answers)


class Record:
    """The tests of one run.

    Attributes:
        rows: one per evaluation, see :class:`lora_lens.Run`.
        losses: of the steps since the last evaluation, in nats.
    """

    def __init__(
        self,
        config: Training,
        new: Test,
        retained: Test | None = None,
        watched: Sequence[Test] = (),
        before: Before | None = None,
    ) -> None:
        self.config, self.new, self.retained, self.watched = config, new, retained, watched
        self.before = before or Before()
        self.rows: list[dict[str, float]] = []
        self.losses: list[float] = []
        self._answers: list[Answers] = []  # to the retained task's test examples, one per evaluation
        self._watched_before: Sequence[Answers] = ()

    def begin(self, model: nn.Module, norms: Mapping[str, float] | None = None) -> None:
        """All tests before the first step."""
        self.evaluate(model, 0, norms)
        known = self.before.watch
        self._watched_before = [self._ask(model, test) for test in self.watched] if known is None else known

    def evaluate(self, model: nn.Module, step: int, norms: Mapping[str, float] | None = None) -> None:
        """Test the new and the retained task: one row more.

        Args:
            model: as it is now.
            step: that it has done.
            norms: of its updates by layer, where the model cannot tell them.
        """
        known = self.before if step == 0 else Before()
        new = known.task or self._ask(model, self.new)
        norms = update_norms(model) if norms is None else norms
        row = {
            "step": step,
            "loss": float(np.mean(self.losses)) if self.losses else float("nan"),
            "accuracy": new.accuracy,
            "test_loss": new.loss,
            "retained_accuracy": float("nan"),
            "retained_loss": float("nan"),
            "update": math.hypot(*norms.values()) if norms else float("nan"),
        }
        if self.retained is not None:
            self._answers.append(known.retain or self._ask(model, self.retained))
            row |= {"retained_accuracy": self._answers[-1].accuracy, "retained_loss": self._answers[-1].loss}
        self.rows.append(row)
        self.losses.clear()

    def end(self, model: nn.Module, started: float, *, diverged: bool, stopped: bool = False) -> Run:
        """What the run did, after the last tests; ``started`` is what time.monotonic said."""
        readout, watched = self.new[1], self._test_watched(model)
        return Run(
            self.config,
            pd.DataFrame(self.rows),
            diverged,
            time.monotonic() - started,
            readout.head if isinstance(readout, HeadReadout) else None,
            _items(self._answers),
            watched,
            stopped,
        )

    def _ask(self, model: nn.Module, test: Test) -> Answers:
        return evaluate(model, *test, precision=self.config.precision)

    def _test_watched(self, model: nn.Module) -> pd.DataFrame | None:
        rows: list[Mapping[str, object]] = []
        for test, old in zip(self.watched, self._watched_before, strict=True):
            new = self._ask(model, test)
            rows.append(
                {
                    "task": test[0].name,
                    "before": old.accuracy,
                    "after": new.accuracy,
                    "loss_before": old.loss,
                    "loss_after": new.loss,
                }
            )
        return pd.DataFrame(rows) if rows else None


def _items(answers: Sequence[Answers]) -> pd.DataFrame | None:
    if not answers:
        return None
    first, last = answers[0], answers[-1]
    return pd.DataFrame({"label": first.labels, "before": first.predicted, "after": last.predicted})
