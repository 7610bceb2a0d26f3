"""Processes of this machine, each of which computes one item at a time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from itertools import islice, repeat
from multiprocessing.util import Finalize
from pathlib import Path

import cloudpickle
from joblib.externals.loky.process_executor import (
    BrokenProcessPool,
    ProcessPoolExecutor,
    ShutdownExecutorError,
    TerminatedWorkerError,
)

from lora_lens.experiments.engines.attempts import attempt_here, attempt_on_worker, one_at_a_time
from lora_lens.experiments.engines.protocol import Attempt, Call, Item, Shared, able_to_travel, packed

IDLE = 300  # seconds, after which a process that waits for the next call ends
# Seconds, after which it is not asked any more: if it has ended, loky starts another in its place, whose
# death it may not see (joblib 1.6), and the call would wait for ever.
REUSED = IDLE / 2
LOOKS = 1  # second between a process's looks for its caller
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

# Pools of one process, so that it is known which run a process died of, and which GPU it has. They stay for
# the next call, as a process takes seconds to import torch; a call that runs in another thread meanwhile has
# its own, and a fork of this process does not touch them. Each with the time since when it waits.
_idle: dict[tuple[int, str | None], list[tuple[ProcessPoolExecutor, float]]] = {}


class Processes:
    """One process, which is this one, or several."""

    def __init__(self, jobs: int, gpus: Sequence[str] = ()) -> None:
        self.jobs, self.gpus = jobs, gpus

    def width(self) -> int:
        return self.jobs

    def attempts(
        self, shared: Shared, call: Call, items: Sequence[Item]
    ) -> Iterator[tuple[Item, Attempt | None]]:
        if min(self.jobs, len(items)) == 1 and not call.again:
            for item in items:
                yield item, attempt_here(shared, item)
            return
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "shared.pickle"
            with whole.open("wb") as stream, able_to_travel():
                cloudpickle.dump(shared, stream)  # a copy in memory might not fit
            yield from self._on_workers(whole, call, deque(items))

    def _on_workers(
        self, whole: Path, call: Call, waiting: deque[Item]
    ) -> Iterator[tuple[Item, Attempt | None]]:
        free = list(islice(self.gpus or repeat(None), min(self.jobs, len(waiting))))
        running: dict[Future, tuple[ProcessPoolExecutor, str | None, Item]] = {}
        try:
            while waiting or running:
                while free and waiting:
                    gpu, item = free.pop(0), waiting.popleft()
                    pool, future = _submitted(gpu, call, packed(item), whole.read_bytes)
                    running[future] = pool, gpu, item
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    pool, gpu, item = running[future]
                    try:
                        ended = future.result()
                    except TerminatedWorkerError:
                        ended = None
                    else:
                        _waiting_for(gpu).append((pool, time.monotonic()))
                    del running[future]
                    free.append(gpu)
                    yield item, ended
        finally:
            for pool, *_ in running.values():  # of a call that was stopped
                pool.shutdown(wait=False, kill_workers=True)


def _waiting_for(gpu: str | None) -> list[tuple[ProcessPoolExecutor, float]]:
    return _idle.setdefault((os.getpid(), gpu), [])


def _submitted(gpu: str | None, *work: object) -> tuple[ProcessPoolExecutor, Future]:
    """The work in a process that waits for some, or in a new one."""
    while idle := _waiting_for(gpu):
        with suppress(IndexError, BrokenProcessPool, ShutdownExecutorError):  # another thread's; killed
            pool, since = idle.pop()
            if time.monotonic() - since < REUSED:
                return pool, pool.submit(attempt_on_worker, *work)
            pool.shutdown(wait=False, kill_workers=True)
    pool = _new_pool(gpu)
    return pool, pool.submit(attempt_on_worker, *work)


def _new_pool(gpu: str | None) -> ProcessPoolExecutor:
    environment = ONE_THREAD | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    pool = ProcessPoolExecutor(1, timeout=IDLE, env=environment, initializer=_end_with_the_caller)
    # A process that multiprocessing started would wait at its end until they are idle for too long.
    if multiprocessing.parent_process() is not None:
        Finalize(None, pool.shutdown, kwargs={"wait": False, "kill_workers": True}, exitpriority=0)
    return pool


def _end_with_the_caller() -> None:
    """Watch whether the process that started this one was killed, and then end after the item."""
    caller = os.getppid()

    def watch() -> None:
        while os.getppid() == caller:
            time.sleep(LOOKS)
        with one_at_a_time:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
