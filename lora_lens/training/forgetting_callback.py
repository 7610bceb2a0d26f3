"""Forgetting in the log of transformers' Trainer and of TRL's trainers, which call the same callbacks."""

from __future__ import annotations

import gc
import math
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy

from lora_lens._base.errors import InputError
from lora_lens._base.precision import PRECISIONS
from lora_lens._base.validate import choice, flag, instance, number, share, whole_number
from lora_lens.tasks.task import Task
from lora_lens.training.forgetting_monitor import BEFORE, ForgettingMonitor, checked_retain
from lora_lens.training.record import Before
from lora_lens.training.updates import is_attached

PREFIX = "eval_"  # without it a trainer takes no score for the best model's


class ForgettingCallback(TrainerCallback):
    """Logs what a model forgets while transformers' Trainer, or one of TRL's, trains it.

    Into the trainer's log, so into ``state.log_history``, TensorBoard, Weights & Biases and whatever else it
    reports to, go eval_retained_accuracy, eval_forgetting, eval_retained_loss, eval_loss_rise, and of a model
    from :func:`lora_lens.attach` eval_update and eval_update/LAYER (norms of the updates), all as in
    :class:`ForgettingMonitor`, which also says what "before" means. With ``score`` eval_trade_off joins them
    at each evaluation of the trainer: ``metric_for_best_model="trade_off", greater_is_better=True`` and
    ``load_best_model_at_end=True`` among its arguments keep the best checkpoint by it, and transformers'
    EarlyStoppingCallback, after this one, stops by it.

    Args:
        retain: what the model could do before; :func:`lora_lens.tasks.agreement` makes one without labels.
        every: measured after this many steps and after the last; default at each evaluation of the trainer.
        score: the trainer's own metric that says how well the new task is learnt, higher for better, such as
            "eval_accuracy" or TRL's "eval_mean_token_accuracy"; without it there is no trade-off.
        weight, at_least: of the trade-off, see :class:`ForgettingMonitor`.
        before, precision: as there.
        layers: whether each layer's update is logged beside that of all.

    Attributes:
        monitor: the measurements so far; None before training.

    Raises:
        ValueError: a number is out of its range. When training begins: the trainer never evaluates and
            ``every`` is not given, or as :class:`ForgettingMonitor`; where training goes on from a checkpoint
            and the model is not from attach, "before" is unknown. At an evaluation: there is no such score.
        TypeError: an argument of another type; there is no retained task.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from transformers import PrinterCallback, Trainer, TrainingArguments
        >>> from lora_lens.tasks.tokens import TokenExamples
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=40, intermediate_size=16, **small))
        >>> texts = [{"input_ids": torch.randint(40, (8,)), "labels": i % 2} for i in range(8)]
        >>> tokens = torch.cat([text["input_ids"] for text in texts])
        >>> known = TokenExamples(tokens, torch.full((8,), 8), torch.zeros(8).long())
        >>> watch = ll.training.ForgettingCallback(ll.tasks.agreement(model, known), every=1)
        >>> quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
        >>> args = TrainingArguments("out", max_steps=2, **quiet)
        >>> adapted = ll.attach(model, ll.LoRA(2), targets="query")
        >>> trainer = Trainer(adapted, args, train_dataset=texts, callbacks=[watch])
        >>> trainer.remove_callback(PrinterCallback)
        >>> _ = trainer.train()
        >>> [row["step"] for row in trainer.state.log_history if "eval_forgetting" in row]
        [1, 2]
    """

    def __init__(
        self,
        retain: Task,
        every: int | None = None,
        *,
        score: str | None = None,
        weight: float = 1.0,
        at_least: float | None = None,
        before: Before | None = None,
        precision: str = "float32",
        layers: bool = True,
    ) -> None:
        self.retain = checked_retain(retain)
        self.every = None if every is None else whole_number(every, "every", least=1)
        self.score = None if score is None else instance(score, str, "score", "a metric's name")
        self._options = {
            "weight": number(weight, "weight", least=0),
            "at_least": None if at_least is None else share(at_least, "at_least"),
            "before": instance(before, (Before, type(None)), "before", "an ll.training.Before, or None"),
            "precision": choice(precision, "precision", PRECISIONS),
        }
        self.layers = flag(layers, "layers")
        self.monitor: ForgettingMonitor | None = None
        self._measured: int | None = None  # after how many steps, while the model is still the same
        self._logged = True
        self._without_score: list[str] | None = None  # the scores of an evaluation that lacks the wanted one

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Ask the pretrained model, before the first step."""
        if self.every is None and args.eval_strategy == IntervalStrategy.NO:
            raise InputError(
                "this trainer never evaluates, so forgetting would never be measured: give "
                "ForgettingCallback every=, or the trainer eval_strategy and an eval_dataset"
            )
        if self.score is None and str(args.metric_for_best_model).removeprefix(PREFIX) == "trade_off":
            raise InputError(
                'metric_for_best_model="trade_off" needs the trainer\'s own score of the new task: give '
                'ForgettingCallback score=, such as "eval_accuracy"'
            )
        if state.global_step and self._options["before"] is None and not is_attached(model):
            raise InputError(
                f"training goes on after step {state.global_step}, so the model is not the pretrained one "
                f"any more; {BEFORE}"
            )
        self._stand_first()
        self.monitor, self._measured = ForgettingMonitor(model, self.retain, **self._options), None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After an evaluation there must be a score."""
        self._require_score()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure if it is due, and let the trainer log it."""
        last = state.global_step >= state.max_steps
        if self.every is not None and (state.global_step % self.every == 0 or last):
            self._measure(state)
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Put the scores into what the trainer logs: with its evaluation, or with its next row."""
        if self.monitor is None or logs is None:
            return
        if any(key.startswith(PREFIX) for key in logs):
            found = self._evaluated(state, logs)
        elif not self._logged and self._measured == state.global_step:
            found = self._named(self.monitor.table.iloc[-1])
        else:
            return
        self._logged = True
        logs.update(found)
        state.log_history[-1].update(found)  # noted before the callbacks are called

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Put the scores beside the trainer's own, among which it looks for the best model's."""
        if self.monitor is not None and metrics is not None:
            metrics.update(self._evaluated(state, metrics))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The trainer may have loaded its best checkpoint, which would have to be measured anew."""
        self._measured = None
        self._require_score()

    def _require_score(self) -> None:
        if self._without_score is not None:
            raise InputError(
                f"the trainer's evaluation has no {self.score!r}, which score= names; it has "
                f"{', '.join(self._without_score)}; what the trainer's compute_metrics= returns, it has with "
                f"{PREFIX!r} before its name"
            )

    def _measure(self, state: TrainerState) -> None:
        if self._measured != state.global_step:
            self.monitor.measure(state.global_step)
            self._measured, self._logged = state.global_step, False

    def _evaluated(self, state: TrainerState, metrics: dict[str, float]) -> dict[str, float]:
        """The scores after as many steps, with the trade-off."""
        self._measure(state)
        if self.score is not None and self.score in metrics:
            self._without_score = None
            return self._named(self.monitor.complete(metrics[self.score]))
        if self.score is not None and math.isnan(self.monitor.table["accuracy"].iloc[-1]):
            own = self._named(self.monitor.table.iloc[-1])
            self._without_score = sorted(set(metrics) - set(own))  # another evaluation set may have it
        return self._named(self.monitor.table.iloc[-1])

    def _named(self, row: dict[str, float]) -> dict[str, float]:
        return {
            f"{PREFIX}{name}": float(value)
            for name, value in dict(row).items()
            if name not in ("step", "accuracy")
            and not math.isnan(value)
            and (self.layers or not name.startswith("update/"))
        }

    def _stand_first(self) -> None:
        """Before the callbacks that report a row elsewhere, and those that look for a score in it.

        A trainer calls the user's callbacks last and shows them none of the others; its list is what refers
        to this one and holds the callback that every trainer has.
        """
        for found in gc.get_referrers(self):
            if isinstance(found, list) and any(isinstance(one, DefaultFlowCallback) for one in found):
                found.remove(self)
                found.insert(0, self)
