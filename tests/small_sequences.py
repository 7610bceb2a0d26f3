"""Sequences of short tasks for an untrained vision transformer of a few thousand weights.

As a script it starts the sequences of KILLED in the folder it is given, each in a process of its own that is
killed while it writes a checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import lora_lens as ll
from lora_lens.experiments.continual.strategies import Continued, Merged, Moving, Separate, Strategy
from lora_lens.tasks.transforms import only_classes, rotated
from lora_lens.training import EWC, Orthogonal, Replay

WINDOW, LORA = ll.Window.middle(4), ll.LoRA(4)
SETTINGS = {"steps": 3, "batch_size": 8, "warmup": 0.0, "jobs": 1, "progress": False}


@cache
def small_vit() -> VisionTransformer:
    """Two blocks of width 32, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2
        ).eval()


@cache
def small_spectra() -> ll.SpectrumSet:
    return ll.spectra(small_vit(), cache=False, progress=False)


@cache
def retained() -> ll.Task:
    """Ten classes for the model's own head."""
    return ll.tasks.bundled.digits().first(10, 30)


@cache
def pairs() -> list[ll.Task]:
    """Digits in four tasks of two classes each."""
    whole = ll.tasks.bundled.digits().first(400, 200)
    parts = [only_classes(whole, [2 * i, 2 * i + 1]) for i in range(4)]
    return [task.first(train=40, test=20) for task in parts]


@cache
def turned() -> list[ll.Task]:
    """Two digits at twelve angles."""
    task = only_classes(ll.tasks.bundled.digits().first(300, 100), [3, 8]).first(train=30, test=8)
    return [rotated(task, 9 * i) for i in range(12)]


def grid(method: object, lr: float = 2e-2, seeds: Sequence[int] = (0,)) -> ll.Grid:
    if isinstance(method, ll.Window):
        return ll.Grid([method], lr=[lr], seed=seeds)
    return ll.Grid(lr=[lr], seed=seeds, baselines=[method])


def learn(
    strategy: Strategy | None = None,
    method: object = WINDOW,
    *,
    tasks: Sequence[ll.Task] | None = None,
    model: nn.Module | None = None,
    lr: float = 2e-2,
    seeds: Sequence[int] = (0,),
    **others: object,
) -> pd.DataFrame:
    """A sequence of short tasks, by default three in which a window is merged."""
    return ll.experiments.continual_sweep(
        small_vit() if model is None else model,
        pairs()[:3] if tasks is None else tasks,
        Merged() if strategy is None else strategy,
        grid(method, lr, seeds),
        **SETTINGS | others,
    ).table


@dataclass(frozen=True)
class Killed:
    """A sequence, and the number of the checkpoint whose writing it does not survive."""

    strategy: Strategy
    method: object
    setting: str
    tasks: str = "pairs"
    at: int = 3

    def run(self, store: Path | None, **others: object) -> pd.DataFrame:
        tasks = pairs() if self.tasks == "pairs" else turned()
        settings = SETTINGS | {"retain": retained(), "spectra": small_spectra()}
        if len(tasks) == 12:
            settings |= {"spectra": None, "targets": "blocks.1.mlp.*", "steps": 2}
        return ll.experiments.continual_sweep(
            small_vit(), tasks, self.strategy, grid(self.method), setting=self.setting, store=store,
            **settings | others,
        ).table  # fmt: skip


KILLED = {
    "ewc": Killed(Continued(EWC(50.0, examples=5)), LORA, "class-incremental"),
    "replay": Killed(Merged(Replay(9)), WINDOW, "class-incremental"),
    "orthogonal": Killed(Merged(Orthogonal(0.5)), LORA, "task-incremental"),
    "separate": Killed(Separate(), WINDOW, "task-incremental"),
    "moving": Killed(Moving(), WINDOW, "domain-incremental"),
    "full": Killed(Continued(), ll.FullFineTuning(), "domain-incremental", at=2),
    "twelve": Killed(Merged(), WINDOW, "domain-incremental", "turned", at=7),
    "twelve, ewc": Killed(Continued(EWC(50.0, examples=5)), LORA, "task-incremental", "turned", at=11),
    "twelve, orthogonal": Killed(Merged(Orthogonal(0.5)), LORA, "task-incremental", "turned", at=11),
    "twelve, replay": Killed(Merged(Replay(40)), LORA, "task-incremental", "turned", at=11),
}


def run_until_killed(name: str, store: Path) -> None:
    """Note the sizes of the checkpoints in sizes.json, and die just before the last takes its place."""
    sizes: list[int] = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "os.rename" and str(arguments[1]).endswith(".pt"):
            sizes.append(os.path.getsize(arguments[0]))
            if len(sizes) == KILLED[name].at:
                store.with_suffix(".json").write_text(json.dumps(sizes))
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    KILLED[name].run(store)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    small_vit(), retained(), pairs(), turned(), small_spectra()  # once for all children
    for name in KILLED:
        child = os.fork()
        if child == 0:
            run_until_killed(name, folder / name)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise SystemExit(f"{name} was not killed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
