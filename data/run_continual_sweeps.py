"""Run the sequences behind notebook 07 and pack each set of them into one file under ``results``.

    python data/run_continual_sweeps.py                       # all: about an hour and a half on 2 cores
    python data/run_continual_sweeps.py split_fashion texts  # these
    python data/run_continual_sweeps.py --store FOLDER       # keep the runs there; what is there goes on

- split_fashion: a vision transformer that has seen digits only learns Fashion-MNIST in five tasks of two
  classes, with a head for each; split_fashion_classes: the same with one growing head.
- images: one that has seen six classes of Fashion-MNIST learns all ten, digits, noisy digits, and
  Fashion-MNIST turned by 90 degrees.
- texts: all-MiniLM-L6-v2 learns the sentiment in films, products, tweets and newspapers with one head.

``ll.experiments.ContinualSweep.open("data/results/split_fashion.jsonl.xz")`` reads a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sweeping import main
from torch import nn

import lora_lens as ll
from lora_lens.experiments.continual.strategies import Continued, Joint, Merged, Moving, Separate, Strategy
from lora_lens.training import EWC, Orthogonal, Replay

ORDERS, SEEDS = 3, 3
LORA, MIDDLE = ll.LoRA(8), ll.Window.middle(8)
WINDOWS = ll.windows(rank=8, count=5)
NEAR_LAST = ll.training.Regularized(LORA, ll.training.L2ToInitial(0.01))
Plan = Sequence[tuple[Strategy, Sequence[ll.adapters.Method], float]]  # methods, rate


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, what it learns, in which of the three settings, and what it knew."""

    model: nn.Module
    tasks: list[ll.Task]
    kind: str
    retain: ll.Task
    spectra: ll.SpectrumSet | None


def split_fashion(kind: str = "task-incremental") -> Setting:
    model, digits = ll.tasks.bundled.vision_of_digits()
    tasks = ll.tasks.sequences.split_fashion(test=200)
    return Setting(model, tasks, kind, digits.first(test=300), ll.spectra(model, progress=False))


def split_fashion_classes() -> Setting:
    return split_fashion("class-incremental")


def images() -> Setting:
    model, known, _ = ll.tasks.bundled.vision_of_known_classes()
    tasks = ll.tasks.sequences.fashion_digits_corrupted_rotated(test=300)
    return Setting(model, tasks, "task-incremental", known.first(test=300), ll.spectra(model, progress=False))


def texts() -> Setting:
    model, tokenizer = ll.tasks.bundled.minilm(), ll.tasks.bundled.minilm_tokenizer()
    tasks = ll.tasks.sequences.text_corpora(tokenizer, test=150)
    genres = ll.tasks.text_task(ll.tasks.bundled_texts.genres(), tokenizer).first(test=200)
    retain = ll.tasks.probed(model, genres, examples=2000)
    return Setting(model, tasks, "domain-incremental", retain, None)


def referee(lr: float, full: float) -> Plan:
    """What a referee asks for, windows first; full fine-tuning has a learning rate of its own."""
    return [
        (Merged(), [*WINDOWS, LORA, NEAR_LAST], lr),
        (Continued(), [WINDOWS[0], MIDDLE, WINDOWS[-1], LORA, NEAR_LAST], lr),
        (Moving(), [MIDDLE], lr),
        (Merged(Orthogonal(0.5)), [LORA], lr),
        (Continued(EWC(1000)), [LORA], lr),
        (Merged(Replay(200)), [MIDDLE, LORA], lr),
        (Separate(), [MIDDLE, LORA], lr),
        (Joint(), [LORA], lr),
        (Continued(), [ll.FullFineTuning()], full),
    ]


def fewer(lr: float) -> Plan:
    return [
        (Merged(), [WINDOWS[0], MIDDLE, WINDOWS[-1], LORA, NEAR_LAST], lr),
        (Continued(), [LORA], lr),
        (Merged(Replay(200)), [LORA], lr),
        (Separate(), [LORA], lr),
        (Joint(), [LORA], lr),
    ]


def of_classes(lr: float) -> Plan:
    return [
        (Merged(), [MIDDLE, LORA], lr),
        (Merged(Replay(200)), [MIDDLE, LORA], lr),
        (Joint(), [LORA], lr),
    ]


def of_texts(lr: float) -> Plan:
    return [
        (Merged(), [WINDOWS[0], MIDDLE, WINDOWS[-1], LORA], lr),
        (Continued(), [LORA], lr),
        (Merged(Replay(200)), [LORA], lr),
        (Joint(), [LORA], lr),
    ]


SWEEPS: dict[str, tuple[Callable[[], Setting], Plan, dict[str, object]]] = {
    "split_fashion": (
        split_fashion,
        referee(3e-3, full=3e-4),
        {"steps": 60, "batch_size": 32},
    ),
    "split_fashion_classes": (split_fashion_classes, of_classes(3e-3), {"steps": 60, "batch_size": 32}),
    "images": (images, fewer(3e-3), {"steps": 60, "batch_size": 32}),
    "texts": (texts, of_texts(2e-3), {"steps": 30, "batch_size": 32, "precision": "bfloat16"}),
}


def run(name: str, store: Path, jobs: int | None) -> None:
    make, plan, settings = SWEEPS[name]
    setting = make()
    for order in ll.tasks.sequences.orders(len(setting.tasks), ORDERS):
        for strategy, methods, lr in plan:  # all of them before the next order, so a stopped set is balanced
            ll.experiments.continual_sweep(
                setting.model,
                setting.tasks,
                strategy,
                ll.Grid(lr=lr, seed=range(SEEDS), baselines=methods),
                setting=setting.kind,
                orders=[order],
                retain=setting.retain,
                spectra=setting.spectra,
                store=store,
                jobs=jobs,
                **settings,
            )


if __name__ == "__main__":
    main(__doc__, SWEEPS, run)
