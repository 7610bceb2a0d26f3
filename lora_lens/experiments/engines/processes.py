"""Processes of this machine, each of which computes one item at a time."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import cloudpickle
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import (
    BrokenProcessPool,
    ShutdownExecutorError,
    TerminatedWorkerError,
)

from lora_lens.experiments.engines.attempts import attempt_here, attempt_on_worker
from lora_lens.experiments.engines.protocol import Attempt, Call, Item, Shared, packed

IDLE = 300  # seconds, after which a process that waits for the next call ends
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

# Pools of one process, so that it is known which run a process died of, and which GPU it has; no more than
# were ever used at a time. They stay for the next call: a process takes seconds to import torch.
_workers: dict[tuple[int, str | None], ProcessPoolExecutor] = {}


class Processes:
    """One process, which is this one, or several."""

    def __init__(self, jobs: int, gpus: Sequence[str] = ()) -> None:
        self.jobs = jobs
        self.places = [(place, gpus[place] if gpus else None) for place in range(jobs)]

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
            with whole.open("wb") as stream:
                cloudpickle.dump(shared, stream)
            yield from self._on_workers(whole, call, deque(items))

    def _on_workers(
        self, whole: Path, call: Call, waiting: deque[Item]
    ) -> Iterator[tuple[Item, Attempt | None]]:
        free = self.places[: len(waiting)]
        running: dict[Future, tuple[tuple[int, str | None], Item]] = {}
        try:
            while waiting or running:
                while free and waiting:
                    place, item = free.pop(0), waiting.popleft()
                    running[_submitted(place, call, packed(item), whole.read_bytes)] = place, item
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    place, item = running[future]
                    try:
                        ended = future.result()
                    except TerminatedWorkerError:
                        ended = None
                    del running[future]
                    free.append(place)
                    yield item, ended
        finally:
            for place, _ in running.values():  # of a call that was stopped
                if pool := _workers.pop(place, None):
                    pool.shutdown(wait=False, kill_workers=True)


def _submitted(place: tuple[int, str | None], *work: object) -> Future:
    for _ in range(2):
        if place not in _workers:
            gpu = {} if place[1] is None else {"CUDA_VISIBLE_DEVICES": place[1]}
            _workers[place] = ProcessPoolExecutor(1, timeout=IDLE, env=ONE_THREAD | gpu)
        try:
            return _workers[place].submit(attempt_on_worker, *work)
        except (BrokenProcessPool, ShutdownExecutorError) as error:  # its process was killed
            broken = error
            del _workers[place]
    raise broken
