"""What a model forgets while a loop trains it: scores on a retained task, and how far each layer moved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from peft import PeftModel
from torch import nn

from lora_lens._base.errors import InputError
from lora_lens._base.precision import PRECISIONS
from lora_lens._base.validate import choice, instance, number, share, whole_number
from lora_lens.adapters.injection import (
    attached,
    lora_layers,
    moved_buffers,
    require_enabled,
    require_unmerged,
    whole_modules,
)
from lora_lens.adapters.start import factor_matrix, is_dora
from lora_lens.tasks.evaluation import Answers, evaluate
from lora_lens.tasks.own_answers import require_own_answers
from lora_lens.tasks.task import Task
from lora_lens.training.record import Before
from lora_lens.training.updates import is_attached, update_norms

SAME = 1e-3  # nats, of losses that should be equal but for rounding
BEFORE = "pass before=ll.training.Before(retain=ll.evaluate(pretrained, retain)), the pretrained answers"


class ForgettingMonitor:
    """Measures, whenever it is asked, what a model has forgotten of ``retain``, in a loop of your own.

    "Before" is always the pretrained model. Of a model from :func:`lora_lens.attach` it is the function that
    the adapter started from, also where the adapter is trained already, and never the residual that is left
    of the base when a window is taken out of it, which is what PEFT's ``disable_adapter`` shows. Of another
    model it is what it answers when the monitor is made, before training.

    Args:
        model: to be trained, by any loop.
        retain: what it could do before; :func:`lora_lens.tasks.agreement` makes one without labels.
        weight: of forgetting in ``trade_off`` = accuracy - weight * forgetting, 0 or more.
        at_least: an accuracy in [0, 1]; then ``trade_off`` is -forgetting where it is reached, and below -1
            elsewhere, so that its highest value is the least forgetting at that accuracy.
        before: the pretrained answers, where the model at hand does not tell; its ``retain`` counts.
        precision: of the evaluations, as of :class:`lora_lens.Training`.

    Raises:
        ValueError: the task does not fit the model, or retains another model's own answers; a number is out
            of its range, the adapter is merged, or "before" is unknown: an adapter from elsewhere does not
            start as the identity, or was trained already; an adapter with DoRA, or with modules that PEFT
            trains in full, was trained already.
        TypeError: an argument of another type; there is no retained task.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model, fashion = ll.tasks.bundled.vision()
        >>> known = ll.tasks.agreement(model, fashion.test.inputs[:20])
        >>> adapted = ll.attach(model, ll.Window.middle(4), targets="blocks.5.mlp.fc1")
        >>> monitor = ll.training.ForgettingMonitor(adapted, known)
        >>> with torch.no_grad():  # in place of training
        ...     _ = [p.mul_(1.05) for p in adapted.parameters() if p.requires_grad]
        >>> row = monitor.measure(step=1, accuracy=0.8)
        >>> row["forgetting"], row["trade_off"]
        (0.0, 0.8)
        >>> monitor.table[["step", "retained_accuracy", "update"]].round(2)
           step  retained_accuracy  update
        0     0                1.0    0.00
        1     1                1.0    0.07
    """

    def __init__(
        self,
        model: nn.Module,
        retain: Task,
        *,
        weight: float = 1.0,
        at_least: float | None = None,
        before: Before | None = None,
        precision: str = "float32",
    ) -> None:
        instance(model, nn.Module, "model", "a torch model")
        self.retain = checked_retain(retain)
        self.weight = number(weight, "weight", least=0)
        self.at_least = None if at_least is None else share(at_least, "at_least")
        self.precision = choice(precision, "precision", PRECISIONS)
        instance(before, (Before, type(None)), "before", "an ll.training.Before, or None")
        self.model, self.readout = model, retain.own_readout(model)
        self.before = (before and before.retain) or self._pretrained_answers()
        require_own_answers(retain, self.before)
        self._rows = [self._row(0, self.before) | dict.fromkeys(self._drift(), 0.0)]

    @property
    def table(self) -> pd.DataFrame:
        """One row per measurement, the first of the pretrained model.

        Columns: step, accuracy (as it was given), retained_accuracy and forgetting (in [0, 1]), retained_loss
        and loss_rise (nats), trade_off, update (||dW||_F over all adapted layers together), and update/NAME
        of each.
        """
        return pd.DataFrame(self._rows)

    @property
    def best(self) -> pd.Series | None:
        """The row with the highest ``trade_off``; None where none has one."""
        values = self.table["trade_off"]
        return None if values.isna().all() else self.table.loc[values.idxmax()]

    def measure(self, step: int, accuracy: float | None = None) -> dict[str, float]:
        """Test the model as it is now: one row more, which is returned.

        Args:
            step: how many steps were done.
            accuracy: on the new task, for ``trade_off``, which is NaN without it.

        Raises:
            ValueError: ``accuracy`` is infinite, or the adapter is merged or disabled.
        """
        self._rows.append(self._row(whole_number(step, "step", least=0), self._answers()) | self._drift())
        return dict(self._rows[-1]) if accuracy is None else self.complete(accuracy)

    def complete(self, accuracy: float) -> dict[str, float]:
        """Give the last row an accuracy that became known after it; the row is returned.

        Raises:
            ValueError: it is infinite or NaN.
        """
        accuracy = number(accuracy, "accuracy")
        row = self._rows[-1]
        row |= {"accuracy": accuracy, "trade_off": self.trade_off(accuracy, row["forgetting"])}
        return dict(row)

    def trade_off(self, accuracy: float, forgetting: float) -> float:
        """What is best where it is highest, see the class."""
        if self.at_least is None:
            return accuracy - self.weight * forgetting
        return -forgetting if accuracy >= self.at_least else accuracy - self.at_least - 2

    def _answers(self) -> Answers:
        if is_attached(self.model):
            require_enabled(attached(self.model)[0])
        return evaluate(self.model, self.retain, self.readout, precision=self.precision)

    def _row(self, step: int, now: Answers) -> dict[str, float]:
        return {
            "step": step,
            "accuracy": float("nan"),
            "retained_accuracy": now.accuracy,
            "forgetting": self.before.accuracy - now.accuracy,
            "retained_loss": now.loss,
            "loss_rise": now.loss - self.before.loss,
            "trade_off": float("nan"),
        }

    def _drift(self) -> dict[str, float]:
        """How far all layers together and each moved, as far as that is known."""
        if not (norms := update_norms(self.model)):
            return {}
        return {"update": math.hypot(*norms.values())} | {f"update/{name}": n for name, n in norms.items()}

    def _pretrained_answers(self) -> Answers:
        if is_attached(self.model):
            with at_start(self.model):
                return self._answers()
        now = self._answers()
        if peft_model := next((m for m in self.model.modules() if isinstance(m, PeftModel)), None):
            with peft_model.disable_adapter():
                base = self._answers()
            if not abs(base.loss - now.loss) <= SAME:
                raise InputError(
                    f"this model loses {now.loss:.3g} nats on {self.retain.name} with its adapter and "
                    f"{base.loss:.3g} without it, so either was trained or cut out of the other, and neither "
                    f"can be trusted to be the pretrained model; {BEFORE}"
                )
        return now


def checked_retain(retain: object) -> Task:
    """``retain`` if it is a task.

    Raises:
        TypeError: it is none.
    """
    return instance(
        retain, Task, "retain", "a task, such as ll.tasks.agreement(model, inputs), which needs no labels"
    )


@contextmanager
def at_start(model: nn.Module) -> Iterator[None]:
    """For a while the function that a model from attach started from: its adapter has its first factors.

    Raises:
        ValueError: the adapter is merged; or it was trained, and what else was trained with it is not known
            from before.
    """
    peft_model, record = attached(model)
    require_unmerged(peft_model)
    layers = lora_layers(peft_model)
    kept = []
    for name, layer in layers.items():
        factors, start = [factor_matrix(f) for f in (layer.lora_B, layer.lora_A)], record.starts.get(name)
        first = [torch.zeros_like(factors[0]), factors[1]] if start is None else start.taken(layer)
        kept += [(factor, factor.clone(), one) for factor, one in zip(factors, first, strict=True)]
    trained = any(not torch.equal(now, first.to(now)) for _, now, first in kept)
    if trained and (any(map(is_dora, layers.values())) or whole_modules(peft_model)):
        raise InputError(
            "this adapter is trained already, and so are the lengths of its rows (DoRA) or the modules that "
            f"PEFT trains in full (modules_to_save), so the pretrained model cannot be told from it; {BEFORE}"
        )
    if moved_buffers(peft_model, record):
        raise InputError(
            f"this model's buffers moved since attach, such as the statistics of batch norms; {BEFORE}"
        )
    try:
        with torch.no_grad():
            for factor, _, first in kept:
                factor.copy_(first)
        yield
    finally:
        with torch.no_grad():
            for factor, now, _ in kept:
                factor.copy_(now)
