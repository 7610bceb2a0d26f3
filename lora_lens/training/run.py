"""The result of a run, and the progress of one that is under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
from torch import nn

from lora_lens.training.settings import Training


@dataclass(frozen=True, eq=False)
class Run:
    """The result of a training run.

    Attributes:
        config: the settings of the run.
        curve: one row per evaluation: step, loss (mean training loss since the row before, in nats, without
            a regularizer; NaN at step 0), accuracy and test_loss (of the new task's test set),
            retained_accuracy and retained_loss (of the retained task's; NaN without one), update (how far the
            adapted weights have moved, sqrt(sum ||dW||_F^2) over layers; NaN of what is no LoRA from attach,
            or has DoRA). Losses of a language task are in nats per token, others in nats per example.
        diverged: True when the loss became NaN or infinite; the run stopped there.
        seconds: wall-clock time in seconds, evaluations included.
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
        """Accuracy on the retained task before the first step, in [0, 1]; NaN without one."""
        return float(self.curve["retained_accuracy"].iloc[0])

    @property
    def retained_accuracy(self) -> float:
        """Accuracy on the retained task after the last step, with its own head; as ``retained_before``."""
        return float(self.curve["retained_accuracy"].iloc[-1])

    @property
    def forgetting(self) -> float:
        """``retained_before - retained_accuracy``, in [-1, 1]: positive = forgot."""
        return self.retained_before - self.retained_accuracy

    @property
    def loss_rise(self) -> float:
        """The retained task's loss after the last step minus before the first, in nats: positive = forgot.

        Per example, or per token for a language task; there it is what PEFT's method comparison calls
        forgetting.
        """
        losses = self.curve["retained_loss"]
        return float(losses.iloc[-1] - losses.iloc[0])


@dataclass(frozen=True)
class Progress:
    """How far a run has come: the argument of :func:`finetune`'s ``on_step``.

    Attributes:
        step: how many steps are done, 0 before the first.
        steps: how many the whole run has.
        loss: of this step's batch, in nats, regularizer included; NaN at step 0.
        rows: one per evaluation so far, see ``curve``.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> adapted = ll.attach(model, ll.Window.middle(4))
        >>> def enough(progress):
        ...     print(f"step {progress.step} of {progress.steps}, {len(progress.curve)} evaluations")
        ...     return progress.step == 1
        >>> run = ll.finetune(adapted, task, steps=4, batch_size=10, progress=False, on_step=enough)
        step 0 of 4, 1 evaluations
        step 1 of 4, 2 evaluations
        >>> run.stopped
        True
    """

    step: int
    steps: int
    loss: float
    rows: tuple[Mapping[str, float], ...] = field(repr=False)

    @property
    def curve(self) -> pd.DataFrame:
        """The evaluations so far, as in :class:`Run`."""
        return pd.DataFrame(self.rows)
