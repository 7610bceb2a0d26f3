"""Sweeps of a small model for any engine, and runs that do what a test asks for; workers import this."""

from __future__ import annotations

import copy
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from small_sequences import pairs, retained, small_vit

import lora_lens as ll
from lora_lens.training import Regularizer

FAST = {"steps": 2, "batch_size": 8, "evaluations": 2, "warmup": 0.0, "progress": False}
WRONG = {  # how a run goes wrong, and the beginning of its reason
    "a bug": "ZeroDivisionError",
    "no pickle": "no such luck",
    "exits": "SystemExit",
    "killed": "its process was killed, also when it ran alone",
}


class TwoWords(ll.errors.InputError):
    """Cannot be unpickled, as many exceptions with arguments of their own."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


@dataclass(frozen=True)
class Goes(Regularizer):
    """Goes wrong in the way asked for, where the seed is 1 or more."""

    strength: float = 0.0
    wrong: str = ""

    def begin(self, model, past, config):
        if config.seed >= 1:
            match self.wrong:
                case "refused":
                    raise ll.errors.InputError("no such luck")
                case "a bug":
                    raise ZeroDivisionError("division by zero")
                case "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory")
                case "no pickle":
                    raise TwoWords("no such", "luck")
                case "exits":
                    sys.exit(3)
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
        return lambda: 0.0


@dataclass(frozen=True)
class Noting(Regularizer):
    """Adds nothing; notes which process a run is in."""

    file: str
    dies_once: bool = False
    processes: int = 1  # it waits until so many have noted something
    strength: float = 0.0

    def begin(self, model, past, config):
        if config.steps == 1:  # the caller's rehearsal
            return lambda: 0.0
        first = not Path(self.file).exists()
        with open(self.file, "a") as stream:
            stream.write(f"{os.getpid()}\n")
        if self.dies_once and first:
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for(lambda: len(lines_of(Path(self.file))) >= self.processes)
        return lambda: 0.0


@dataclass(frozen=True)
class Removes(Regularizer):
    """Removes what is in the store's folder of runs, or what workers have noted there."""

    store: str = ""
    what: str = ""
    strength: float = 0.0

    def begin(self, model, past, config):
        for path in Path(self.store, "runs").glob(self.what):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return lambda: 0.0


class NotesUnpickling:
    """Part of a model: tells a file each time that it arrives in a process."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __deepcopy__(self, _memo: dict) -> NotesUnpickling:
        return self

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        with self.file.open("a") as stream:
            stream.write(f"{os.getpid()}\n")


def swept(*methods: object, seeds=(0, 1), store: Path | None = None, **others: object) -> pd.DataFrame:
    grid = ll.Grid(lr=1e-2, seed=seeds, baselines=[ll.LoRA(2), *methods])
    settings = {"model": small_vit(), "task": pairs()[0], "retain": retained()} | FAST | others
    return ll.sweep(grid, store=store, **settings).table


def many(store: Path | None = None, **engine: object) -> pd.DataFrame:
    """Twelve runs, long enough to be killed half way."""
    return swept(ll.Window.middle(2), ll.LoRA(4), seeds=range(4), store=store, steps=20, **engine)


@cache
def many_alone() -> pd.DataFrame:
    """The table of these runs as this process computes them."""
    return many(jobs=1)


def noting_model(file: Path) -> torch.nn.Module:
    model = copy.deepcopy(small_vit())
    model.notes = NotesUnpickling(file)
    return model


def lines_of(file: Path) -> Counter[str]:
    return Counter(file.read_text().splitlines())


def finished(store: Path) -> list[Path]:
    return list(store.glob("runs/[!.]*.json"))


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.01)


def meanwhile(store: Path, runs: int, action: Callable[[], object]) -> threading.Thread:
    """Act once so many runs are on the disk."""

    def watch() -> None:
        wait_for(lambda: len(finished(store)) >= runs)
        action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def in_processes(work: Callable[[int], object], count: int) -> list[int]:
    """The exit codes of ``count`` processes that do ``work(number)`` at the same time."""
    context = multiprocessing.get_context("fork")  # nothing to import, so that they truly meet
    barrier = context.Barrier(count)

    def begin(number: int) -> None:
        barrier.wait()
        work(number)

    processes = [context.Process(target=begin, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
