"""One run of the live panel, which another thread can pause and end, and ask how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Thread

from lora_lens.adapters.methods import FullFineTuning, LoRA, MethodLike
from lora_lens.spectrum.window import Window
from lora_lens.training.run import Progress, Run
from lora_lens.training.settings import Training

WINDOW, ORDINARY, FULL = "window", "LoRA", "full fine-tuning"
KINDS = {Window: WINDOW, LoRA: ORDINARY, FullFineTuning: FULL}


class BackgroundRun:
    """A run in a thread of its own.

    Attributes:
        progress: how far it is; None before the first step is reached.
        run: what it did, once it is done; None where it failed.
        error: why it failed.
        done: nothing comes any more.
        ending: it was asked to end, and does so within a step.

    Args:
        train: does the work: is given ``method``, ``config`` and what :func:`lora_lens.finetune` takes as
            ``on_step``, and returns its result.
        method: what is trained.
        config: how.
    """

    def __init__(self, train: Callable[..., Run], method: MethodLike, config: Training) -> None:
        self.method, self.config = method, config
        self.progress: Progress | None = None
        self.run: Run | None = None
        self.error: Exception | None = None
        self.done = self.ending = False
        self._train = train
        self._going = Event()
        self._going.set()
        self._spent, self._since = 0.0, time.monotonic()

    def start(self) -> None:
        """Begin, and return at once. The thread ends with the process, if not before."""
        Thread(target=self.work, name="training", daemon=True).start()

    def work(self) -> None:
        """All of it in this thread."""
        try:
            self.run = self._train(self.method, self.config, self._on_step)
        except Exception as error:
            self.error = error
        finally:
            self._spent = self.seconds
            self.done = True

    def pause(self) -> None:
        """Wait after this step."""
        self._spent = self.seconds
        self._going.clear()

    def go_on(self) -> None:
        """After a pause."""
        self._since = time.monotonic()
        self._going.set()

    def end(self) -> None:
        """After this step, and out of a pause, too."""
        self.ending = True
        if self.paused:
            self.go_on()

    @property
    def paused(self) -> bool:
        return not self._going.is_set()

    @property
    def seconds(self) -> float:
        """How long it has been training, without the pauses."""
        return self._spent if self.done or self.paused else self._spent + time.monotonic() - self._since

    @property
    def last_step(self) -> int:
        return int(self.run.curve["step"].iloc[-1])

    def row(self, number: int) -> dict[str, object]:
        """Of the table of all runs of the panel; of one that has ended."""
        last, config = self.last_step, self.config
        end = "diverged" if self.run.diverged else "stopped" if self.run.stopped else ""
        position, rank = getattr(self.method, "position", None), getattr(self.method, "rank", None)
        return {
            "run": number,
            "trained": KINDS[type(self.method)],
            "position": "" if position is None else f"{position:g}",
            "rank": "" if rank is None else rank,
            "learning rate": f"{config.lr:g}",
            "steps": f"{last} of {config.steps}" if end else f"{last}",
            "accuracy (%)": f"{100 * self.run.accuracy:.1f}",
            "forgetting (points)": f"{100 * self.run.forgetting:.1f}",
            "end": end,
        }

    def _on_step(self, progress: Progress) -> bool:
        self.progress = progress
        self._going.wait()
        return self.ending
