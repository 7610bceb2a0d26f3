"""What does a curve of eleven points cost, against eleven evaluations, and how much memory does it take?

The bundled vision model, and with the argument ``smollm2`` SmolLM2. Curve and evaluations run in turn, in one
process and thread; seconds are the processor's. Memory is the largest resident set during the curve, beyond
that after the same evaluations, beside the size of the model.
"""

from __future__ import annotations

import sys
import threading
import time

import psutil
import torch

import lora_lens as ll
from lora_lens.forgetting.rewinding import USUAL, task_readout

REPEATS = 3
Setting = tuple[torch.nn.Module, ll.Task, ll.Task, torch.nn.Module | None]


def vision() -> Setting:
    model, source = ll.tasks.bundled.vision()
    digits = ll.tasks.bundled.digits().first(1000, 500)
    adapted = ll.attach(model, ll.Window.middle(8))
    run = ll.finetune(adapted, digits, steps=10, progress=False)
    return adapted, digits, source.first(test=500), run.head


def smollm2() -> Setting:
    model, tokenizer = ll.tasks.bundled.smollm2(), ll.tasks.bundled.smollm2_tokenizer()
    movies = ll.tasks.bundled_texts.sentiment("movies")
    task = ll.tasks.label_word_task(movies, tokenizer).first(8, 16)
    retain = ll.tasks.language_task(ll.tasks.bundled_texts.sentiment("newspaper"), tokenizer).first(8, 8)
    return ll.attach(model, ll.Window.middle(8), inplace=True), task, retain, None


class Peak:
    """The largest resident set of this process while it lasts, in bytes."""

    def __enter__(self) -> Peak:
        self.most, self._done, process = 0, threading.Event(), psutil.Process()

        def watch() -> None:
            while not self._done.wait(0.005):
                self.most = max(self.most, process.memory_info().rss)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main(make: str) -> None:
    torch.set_num_threads(1)
    adapted, task, retain, head = {"vision": vision, "smollm2": smollm2}[make]()
    readout = task_readout(adapted, task, head)
    size = sum(p.numel() * p.element_size() for p in adapted.parameters())

    def evaluations() -> None:
        for _ in USUAL:
            ll.evaluate(adapted, task, readout)
            ll.evaluate(adapted, retain)

    def curve() -> None:
        ll.rewind(adapted, task, retain, readout=head, progress=False)

    seconds: dict[str, list[float]] = {"evaluations": [], "curve": []}
    peaks: dict[str, list[int]] = {"evaluations": [], "curve": []}
    for _ in range(REPEATS if make == "vision" else 1):
        for name, work in (("evaluations", evaluations), ("curve", curve)):
            started = time.process_time()
            with Peak() as peak:
                work()
            seconds[name].append(time.process_time() - started)
            peaks[name].append(peak.most)
    ratios = [c / e for c, e in zip(seconds["curve"], seconds["evaluations"], strict=True)]
    more = (max(peaks["curve"]) - max(peaks["evaluations"])) / 1e6
    print(f"{make}: seconds {seconds}; curve / evaluations {[round(r, 3) for r in ratios]}")
    print(f"memory beyond the evaluations' peak: {more:.0f} MB; the model takes {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "vision")
