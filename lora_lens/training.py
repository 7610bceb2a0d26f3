"""One short fine-tuning run: learn a task, and watch what the model forgets meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import index

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import get_cosine_schedule_with_warmup

from lora_lens import metrics
from lora_lens.layers import classifier
from lora_lens.methods import Penalty
from lora_lens.progress import progress_bar
from lora_lens.tasks import Examples, Task

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Training:
    """The settings of a run.

    Attributes:
        lr: AdamW's peak learning rate, for the adapter and the new head alike.
        steps: optimizer steps.
        batch_size: examples per step.
        warmup: share of the steps in which the rate rises linearly from 0;
            then it falls to 0 along a cosine.
        weight_decay: AdamW's. 0 by default: decaying the factors of a window
            would shrink pretrained components, which is forgetting by design.
        evaluations: how many times both tasks are tested, evenly spaced from
            before the first step to after the last; at least 2.
        seed: of the new head and of the order of the examples.
    """

    lr: float = 1e-3
    steps: int = 150
    batch_size: int = 64
    warmup: float = 0.1
    weight_decay: float = 0.0
    evaluations: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "lr": (self.lr > 0, "positive"),
            "steps": (self.steps >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "evaluations": (self.evaluations >= 2, "at least 2"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name} must be {expected}, not {getattr(self, name)!r}")
        object.__setattr__(self, "seed", index(self.seed))

    @property
    def evaluation_steps(self) -> list[int]:
        """The steps after which both tasks are tested, from 0 to ``steps``."""
        return sorted({round(s) for s in np.linspace(0, self.steps, self.evaluations)})


@dataclass(frozen=True, eq=False)
class Run:
    """What a run did.

    Attributes:
        config: its settings.
        curve: one row per evaluation: step, loss (mean training loss since the
            row before, in nats, without a penalty; NaN at step 0), accuracy (of the new task's
            test set), retained_accuracy (of the retained task's; NaN without one).
        diverged: True when the loss became NaN or infinite; the run stopped there.
        seconds: wall-clock time, evaluations included.
        head: the new task's trained classifier.
        items: one row per test example of the retained task, in its order: label, before and after
            (the predicted class before the first and after the last step); None without such a task.
    """

    config: Training
    curve: pd.DataFrame
    diverged: bool
    seconds: float
    head: nn.Linear = field(repr=False)
    items: pd.DataFrame | None = field(default=None, repr=False)

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
        return metrics.forgetting(self.retained_before, self.retained_accuracy)


def finetune(
    model: nn.Module,
    task: Task,
    retain: Task | None = None,
    config: Training | None = None,
    *,
    penalty: Penalty | None = None,
    progress: bool = True,
    **settings: float,
) -> Run:
    """Train what is trainable in ``model``, and a new head, on ``task``.

    The model's own classifier is kept as it is: the new head reads the same
    features, and the retained task is tested with the old head on the adapted
    features. Batch norms that are frozen keep their statistics. The model is
    trained in place, on the device that accelerate picks. The same seed on the
    same machine with the same number of threads gives the same numbers.

    Args:
        model: from :func:`lora_lens.attach` or :func:`lora_lens.peft_starts.attach_start`.
        task: what to learn.
        retain: what the model's own classifier could do before.
        config: the settings; ``settings`` given by name replace its values.
        penalty: added to the loss of every step against forgetting, see :mod:`lora_lens.penalties`. One
            that needs examples of its own takes them out of ``batch_size``, so a step costs the same.
        progress: show a bar with the loss and both scores.

    Raises:
        ValueError: the model has no linear classifier, the retained task
            has other classes than it, or the penalty does not fit.
    """
    config = replace(config or Training(), **settings)
    old_head = classifier(model.get_base_model() if isinstance(model, PeftModel) else model)
    if retain is not None and len(retain.classes) != old_head.out_features:
        raise ValueError(
            f"{retain.name} has {len(retain.classes)} classes, but the model's own head has "
            f"{old_head.out_features}; retain the task that the model was pretrained on"
        )
    started = time.monotonic()
    accelerator = Accelerator()
    model, new_head = accelerator.prepare(model, fresh_head(old_head, task, config.seed))
    penalty_now = penalty.begin(model, retain, config) if penalty else lambda: 0.0
    parameters = [p for p in [*model.parameters(), *new_head.parameters()] if p.requires_grad]
    optimizer = accelerator.prepare(
        torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * config.steps), config.steps)
    rows: list[dict[str, float]] = []
    answers: list[np.ndarray] = []  # to the retained task's test examples, one array per evaluation
    losses: list[float] = []
    bar = progress_bar(shown=progress, total=config.steps, desc=task.name, unit="step")

    def evaluate(step: int) -> None:
        model.eval()
        new, retained = _predictions(model, old_head, new_head, task.test)[0], float("nan")
        if retain is not None:
            answers.append(_predictions(model, old_head, new_head, retain.test)[1])
            retained = metrics.accuracy(answers[-1], retain.test.labels)
        _train(model)
        rows.append(
            {
                "step": step,
                "loss": float(np.mean(losses)) if losses else float("nan"),
                "accuracy": metrics.accuracy(new, task.test.labels),
                "retained_accuracy": retained,
            }
        )
        losses.clear()

    evaluate(0)
    diverged = False
    with features_of(old_head) as features, bar:
        own = config.batch_size - int(config.batch_size * (penalty.share if penalty else 0))
        batches = shuffled_rows(len(task.train), own, config.seed)
        for step in range(1, config.steps + 1):
            chosen = next(batches)
            inputs, labels = task.train.inputs[chosen], task.train.labels[chosen]
            model(inputs.to(accelerator.device))
            loss = nn.functional.cross_entropy(new_head(features[0]), labels.to(accelerator.device))
            losses.append(loss.item())
            loss = loss + penalty_now()
            diverged = not np.isfinite(loss.item())
            if not diverged:
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
            if diverged or step in config.evaluation_steps:
                evaluate(step)
            bar.update()
            bar.set_postfix(
                loss=f"{loss.item():.3f}",
                accuracy=f"{rows[-1]['accuracy']:.3f}",
                retained=f"{rows[-1]['retained_accuracy']:.3f}",
                refresh=False,
            )
            if diverged:
                break
    model.eval()
    items = None
    if retain is not None:
        columns = {"label": retain.test.labels.numpy(), "before": answers[0], "after": answers[-1]}
        items = pd.DataFrame(columns)
    return Run(config, pd.DataFrame(rows), diverged, time.monotonic() - started, new_head, items)


def fresh_head(old_head: nn.Linear, task: Task, seed: int) -> nn.Linear:
    """A new classifier of ``task`` on the features that ``old_head`` reads; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(old_head.in_features, len(task.classes))


def _train(model: nn.Module) -> None:
    """Training mode, but for batch norms with frozen parameters: their statistics are pretrained, too."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


@contextmanager
def features_of(head: nn.Module) -> Iterator[list[Tensor]]:
    """A list whose only item is always the last input that ``head`` was given, (batch, features).

    It turns any classifier into a feature extractor without knowing how the
    model pools its tokens.
    """
    features: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features[:] = inputs[:1]

    handle = head.register_forward_pre_hook(keep)
    try:
        yield features
    finally:
        handle.remove()


@torch.inference_mode()
def _predictions(
    model: nn.Module, old_head: nn.Module, new_head: nn.Module, examples: Examples
) -> tuple[np.ndarray, np.ndarray]:
    """The classes that the new and the old head predict, each (n,)."""
    device = next(model.parameters()).device
    new, old = [], []
    with features_of(old_head) as features:
        for inputs in examples.inputs.split(EVALUATION_BATCH):
            old.append(model(inputs.to(device)).argmax(-1).cpu())
            new.append(new_head(features[0]).argmax(-1).cpu())
    return torch.cat(new).numpy(), torch.cat(old).numpy()


def shuffled_rows(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of row numbers below ``count``; every row comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(0, dtype=torch.long)
    while True:
        while len(rows) < batch_size:
            rows = torch.cat([rows, torch.randperm(count, generator=generator)])
        batch, rows = rows[:batch_size], rows[batch_size:]
        yield batch
