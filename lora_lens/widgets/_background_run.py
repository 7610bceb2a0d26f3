"""One training run that another thread can pause and end, and ask how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Thread

from lora_lens.training.run import Progress, Run


class BackgroundRun:
    """A run in a thread of its own.

    Attributes:
        progress: how far it is; None before the first step is reached.
        run: what it did, once it is done; None where it failed.
        error: why it failed.
        done: nothing comes any more.
        ending: it was asked to end, and does so within a step.

    Args:
        train: does the work: is given what :func:`lora_lens.finetune` takes as ``on_step``, and returns its
            result.
    """

    def __init__(self, train: Callable[[Callable[[Progress], bool]], Run]) -> None:
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
            self.run = self._train(self._on_step)
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

    def _on_step(self, progress: Progress) -> bool:
        self.progress = progress
        self._going.wait()
        return self.ending
