"""One short fine-tuning run: learn a task, and watch what the model forgets meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from accelerate.utils import broadcast
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import get_cosine_schedule_with_warmup

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.precision import autocast
from lora_lens._base.processes import accelerator as accelerator_of_all, average_gradients
from lora_lens._base.progress import progress_bar
from lora_lens._base.random_state import seeded
from lora_lens._base.validate import flag, instance, sequence, shown
from lora_lens.adapters.methods import Penalty
from lora_lens.tasks.evaluation import Answers, check_examples, evaluate
from lora_lens.tasks.readouts import HeadReadout, Readout, ask
from lora_lens.tasks.task import Task
from lora_lens.training.prefix_cache import frozen_prefix
from lora_lens.training.settings import Training, training_with

OWN_DROPOUT = 2**20  # between the seeds of two processes, whose dropout would be the same otherwise


@dataclass(frozen=True, eq=False)
class Run:
    """What a run did.

    Attributes:
        config: its settings.
        curve: one row per evaluation: step, loss (mean training loss since the
            row before, in nats, without a penalty; NaN at step 0), accuracy and test_loss (of the new task's
            test set), retained_accuracy and retained_loss (of the retained task's; NaN without one). Losses
            of a language task are in nats per token, others in nats per example.
        diverged: True when the loss became NaN or infinite; the run stopped there.
        seconds: wall-clock time, evaluations included.
        head: the new task's trained classifier; None where the task is read from the model's own words.
        items: one row per test example of the retained task, in its order: label, before and after
            (the predicted class before the first and after the last step); None without such a task. The
            examples of a language task are its tokens.
        watched: one row per watched task: task (its name), before and after (accuracies), loss_before and
            loss_after; None where none was watched.
        stopped: True when it was ended from outside before its last step.
    """

    config: Training
    curve: pd.DataFrame
    diverged: bool
    seconds: float
    head: nn.Linear | None = field(repr=False)
    items: pd.DataFrame | None = field(default=None, repr=False)
    watched: pd.DataFrame | None = field(default=None, repr=False)
    stopped: bool = False

    def __repr__(self) -> str:
        ended = " diverged" if self.diverged else " was stopped" if self.stopped else ""
        done = f"{int(self.curve['step'].iloc[-1])} steps at rate {self.config.lr:g}{ended}"
        scores = f"accuracy {100 * self.accuracy:.1f}%, forgetting {100 * self.forgetting:.1f} points"
        return f"<Run of {done}: {scores}, {self.seconds:.0f} s>"

    @property
    def accuracy(self) -> float:
        """Test accuracy on the new task after the last step, in [0, 1]."""
        return float(self.curve["accuracy"].iloc[-1])

    @property
    def retained_before(self) -> float:
        """Accuracy on the retained task before the first step."""
        return float(self.curve["retained_accuracy"].iloc[0])

    @property
    def retained_accuracy(self) -> float:
        """Accuracy on the retained task after the last step, with its own old head."""
        return float(self.curve["retained_accuracy"].iloc[-1])

    @property
    def forgetting(self) -> float:
        """``retained_before - retained_accuracy``: positive = forgot."""
        return self.retained_before - self.retained_accuracy

    @property
    def loss_rise(self) -> float:
        """The retained task's loss after the last step minus before the first, in nats: positive = forgot.

        Per token for a language task; there it is what PEFT's method comparison calls forgetting.
        """
        losses = self.curve["retained_loss"]
        return float(losses.iloc[-1] - losses.iloc[0])


@dataclass(frozen=True)
class Progress:
    """How far a run has come: what :func:`finetune` tells after each step.

    Attributes:
        step: steps done, 0 before the first.
        steps: of the whole run.
        loss: of this step's batch, in nats, penalty included; NaN at step 0.
        rows: of the evaluations so far, see ``curve``.
    """

    step: int
    steps: int
    loss: float
    rows: tuple[Mapping[str, float], ...] = field(repr=False)

    @property
    def curve(self) -> pd.DataFrame:
        """The evaluations so far, as in :class:`Run`."""
        return pd.DataFrame(self.rows)


def finetune(
    model: nn.Module,
    task: Task,
    retain: Task | None = None,
    config: Training | None = None,
    *,
    penalty: Penalty | None = None,
    readout: Readout | None = None,
    watch: Sequence[Task] = (),
    progress: bool = True,
    on_step: Callable[[Progress], object] | None = None,
    **settings: object,
) -> Run:
    """Train what is trainable in ``model``, and what the task needs beside it, on ``task``.

    A classification by a head gets a new one, which reads the same features as the model's own; that stays
    as it is, and tests the retained task on the adapted features. Batch norms that are frozen keep their
    statistics. Blocks below the first that is trained run once per example where that changes nothing
    (:mod:`lora_lens.training.prefix_cache`). The model is trained in place, on the device that accelerate
    picks; started by torchrun or accelerate launch, each process takes its part of every batch, and all end
    with the same weights. The same seed on the same machine with the same number of threads gives the same
    numbers.

    Args:
        model: from :func:`lora_lens.attach` or :func:`lora_lens.adapters.attach_start`.
        task: what to learn.
        retain: what the model could do before, by itself or with the head of :func:`lora_lens.tasks.probed`.
        config: the settings; ``settings`` given by name replace its values.
        penalty: added to the loss of every step against forgetting, see :mod:`lora_lens.training.penalties`.
            One that needs examples of its own takes them out of ``batch_size``, so a step costs the same.
        readout: what reads the task and is trained with the model; default a new one, from the task.
        watch: more that the model could do before, tested before the first and after the last step only.
        progress: show a bar with the loss and both scores.
        on_step: called with a :class:`Progress` before the first step and after each. The run waits for it,
            and ends where it returns something true; then the tasks are tested there, as after the last
            step. Each of several processes calls it, and all end where one of them says so.

    Raises:
        ValueError: there is nothing to train, a task does not fit the model (another tokenizer, texts that
            are too long, images of another size, no linear classifier, other classes than the model's head),
            the penalty does not fit, gradients are off, or a batch has fewer examples than there are
            processes.
        TypeError: an argument is of another type, or there is no such setting.
    """
    config = training_with(settings, "finetune", config)
    watch = _checked(model, task, retain, watch, penalty, readout, on_step)
    progress = flag(progress, "progress")
    names = [t.name for t in watch]
    if len(set(names)) < len(names):
        raise InputError(f"two watched tasks have one name, and their rows could not be told apart: {names}")
    readout = task.new_readout(model, config.seed) if readout is None else readout
    known = None if retain is None else retain.own_readout(model)
    watching = [(t, t.own_readout(model)) for t in watch]
    started = time.monotonic()
    accelerator = accelerator_of_all()
    size = config.batch_size - int(config.batch_size * (penalty.share if penalty else 0))
    if size < accelerator.num_processes:
        raise InputError(
            f"{size} new examples per step cannot be shared by {accelerator.num_processes} processes; use a "
            f"larger batch_size than {config.batch_size}"
        )
    device = accelerator.device
    for part in (model, readout):
        part.to(device)
    parameters = [p for p in [*model.parameters(), *readout.parameters()] if p.requires_grad]
    if not parameters:
        raise InputError(
            f"there is nothing to train: {task.name} has no head of its own, and all of the model is frozen; "
            "attach an adapter first"
        )
    for one, reading in [(task, readout), *([(retain, known)] if retain is not None else []), *watching]:
        check_examples(model, one, reading, precision=config.precision)
    if accelerator.num_processes > 1:
        for p in parameters:  # all start as the main process does, whatever each has drawn or factorized
            p.data = broadcast(p.data)
    penalty_now = penalty.begin(model, retain, config) if penalty else lambda: 0.0
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * config.steps), config.steps)
    rows: list[dict[str, float]] = []
    answers: list[Answers] = []  # to the retained task's test examples, one per evaluation
    losses: list[float] = []
    bar = progress_bar(
        shown=progress and accelerator.is_main_process, total=config.steps, desc=task.name, unit="step"
    )

    def tested() -> list[Answers]:
        return [evaluate(model, t, r, precision=config.precision) for t, r in watching]

    def test(step: int) -> None:
        new = evaluate(model, task, readout, precision=config.precision)
        row = {
            "step": step,
            "loss": float(np.mean(losses)) if losses else float("nan"),
            "accuracy": new.accuracy,
            "test_loss": new.loss,
            "retained_accuracy": float("nan"),
            "retained_loss": float("nan"),
        }
        if retain is not None:
            answers.append(evaluate(model, retain, known, precision=config.precision))
            row |= {"retained_accuracy": answers[-1].accuracy, "retained_loss": answers[-1].loss}
        rows.append(row)
        losses.clear()

    def ended(step: int, loss: float) -> bool:
        """Whether somebody who watches wants no more steps."""
        if on_step is None:
            return False
        wish = float(bool(on_step(Progress(step, config.steps, loss, tuple(rows)))))
        return bool(accelerator.reduce(torch.tensor(wish, device=device), "sum").item())

    _train(model)
    test(0)
    before = tested()
    diverged = stopped = False
    with bar, seeded(config.seed + OWN_DROPOUT * accelerator.process_index, device):
        batches = task.train.shuffled(size, config.seed)
        visits = config.steps * size
        prefix = frozen_prefix(model, readout, task.train, visits=visits, precision=config.precision)
        stopped = ended(0, float("nan"))
        for step in () if stopped else range(1, config.steps + 1):
            batch = next(batches)
            mine = batch[accelerator.process_index :: accelerator.num_processes]
            with autocast(device, config.precision), prefix.of(mine):
                logits, labels = ask(readout, model, task.train, mine)
            loss = nn.functional.cross_entropy(logits.float(), labels)
            loss = loss * (len(mine) * accelerator.num_processes / len(batch))  # their mean is the batch's
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            loss = loss + penalty_now()
            value = accelerator.reduce(loss.detach(), "mean").item()
            diverged = not np.isfinite(value)
            if not diverged:
                optimizer.zero_grad()
                loss.backward()
                average_gradients(accelerator, parameters)
                optimizer.step()
                schedule.step()
            if diverged or step in config.evaluation_steps:
                test(step)
            bar.update()
            bar.set_postfix(
                loss=f"{value:.3f}",
                accuracy=f"{rows[-1]['accuracy']:.3f}",
                retained=f"{rows[-1]['retained_accuracy']:.3f}",
                refresh=False,
            )
            stopped = ended(step, value) and step < config.steps and not diverged
            if stopped and rows[-1]["step"] < step:
                test(step)
            if diverged or stopped:
                break
    after = tested()
    model.eval()
    head = readout.head if isinstance(readout, HeadReadout) else None
    return Run(
        config,
        pd.DataFrame(rows),
        diverged,
        time.monotonic() - started,
        head,
        _items(answers),
        _watched(names, before, after),
        stopped,
    )


def _checked(
    model: nn.Module,
    task: Task,
    retain: Task | None,
    watch: Sequence[Task],
    penalty: Penalty | None,
    readout: Readout | None,
    on_step: Callable[[Progress], object] | None,
) -> tuple[Task, ...]:
    """The watched tasks, after everything that :func:`finetune` is given was seen to be of its type."""
    instance(model, nn.Module, "model", "a torch model, such as from ll.attach")
    if not torch.is_grad_enabled():
        raise InputError(
            "gradients are off, so nothing can be trained; call finetune outside torch.no_grad() and "
            "torch.inference_mode()"
        )
    if any(p.is_inference() for p in model.parameters()):
        raise InputError(
            f"this {type(model).__name__} was made under torch.inference_mode(), so its weights cannot be "
            "trained; make it outside"
        )
    of_task = "a task, such as from ll.tasks.folder_task or ll.tasks.text_task"
    instance(task, Task, "task", of_task)
    instance(retain, (Task, type(None)), "retain", f"{of_task}, or None")
    watch = sequence(watch, "watch", "tasks", one=Task)
    for one in watch:
        instance(one, Task, "each of watch", of_task)
    expected = "a penalty such as ll.training.L2ToInitial(1.0), or None"
    if penalty is not None and (isinstance(penalty, type) or not hasattr(penalty, "begin")):
        raise InputTypeError(f"penalty must be {expected}, not {shown(penalty)}")
    instance(readout, (nn.Module, type(None)), "readout", "what task.new_readout gives, or None")
    if on_step is not None and not callable(on_step):
        raise InputTypeError(f"on_step must be a function of a Progress, not {shown(on_step)}")
    return watch


def _train(model: nn.Module) -> None:
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
    if not names:
        return None
    rows = zip(names, before, after, strict=True)
    return pd.DataFrame(
        [
            {
                "task": name,
                "before": old.accuracy,
                "after": new.accuracy,
                "loss_before": old.loss,
                "loss_after": new.loss,
            }
            for name, old, new in rows
        ]
    )
