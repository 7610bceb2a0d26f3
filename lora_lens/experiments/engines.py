"""Many runs in several processes: only those that are missing, and one that fails takes no other with it."""

from __future__ import annotations

import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import torch
from joblib import Parallel, delayed

from lora_lens._base.errors import InputError, LoraLensError, StoreError
from lora_lens._base.files import write_atomically
from lora_lens._base.naming import listed
from lora_lens._base.progress import progress_bar
from lora_lens._base.threads import limited_threads
from lora_lens._base.validate import whole_number
from lora_lens.experiments.records import read_runs

LAUNCHED = (  # what torchrun and accelerate launch hand to their processes
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
KILLED = "its process was killed, also when it ran alone: most likely memory ran out"
REASONS = 3  # in the warning

Point = tuple[Any, ...]  # one of the grid: a method, a rate, a seed
Run = Callable[[Point, Path], dict]  # its record, without a name
Lost = Callable[[Point], dict]  # what stands in the record's place if it fails


@dataclass(frozen=True)
class _Failure:
    """Why a run failed: the error if we raised it on purpose, else where it came from."""

    error: LoraLensError | None
    origin: str = ""


def checked_jobs(jobs: int | None) -> int:
    """How many processes: by default all cores that this one may use, or one where there is an accelerator.

    Raises:
        InputTypeError, InputError: ``jobs`` is no whole number of at least 1; or torchrun has started
            several processes.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: torchrun or accelerate launch started several "
            "processes, which would all do the same runs; start this with plain python, jobs= shares out "
            "the runs"
        )
    if jobs is None:
        return 1 if torch.accelerator.is_available() else joblib.cpu_count()
    return whole_number(jobs, "jobs, the number of processes (by default all cores),", least=1)


def run_missing(
    run: Run,
    lost: Lost,
    plan: Sequence[tuple[Point, Path]],
    jobs: int,
    *,
    silent: bool = False,
    **bar: object,
) -> list[dict]:
    """Run every point whose file is not there yet, or says that the run failed; keep those that fail, too.

    Args:
        run: does one point.
        lost: gives the record of a point without its results.
        plan: points, with their files.
        jobs: processes.
        silent: neither raise nor warn of runs that failed.
        bar: of :func:`lora_lens._base.progress.progress_bar`.

    Returns:
        The records of all points; those of failed ones have the key failed, with the reason.

    Raises:
        StoreError: a record cannot be written.
        LoraLensError, RuntimeError: all of the runs failed; the first one's reason.
    """
    waiting = missing(plan)
    failures: list[_Failure] = []
    before = len(plan) - len(waiting)
    with (
        tempfile.TemporaryDirectory() as notes,
        progress_bar(total=len(plan), initial=before, **bar) as shown,
    ):
        attempt = partial(_attempt, run, lost, Path(notes))
        while waiting:
            try:
                for failure in _in_processes(attempt, waiting, min(jobs, len(waiting))):
                    shown.update()
                    failures += [failure] if failure else []
                break
            except BrokenProcessPool:  # one was killed, and with it ended the others
                waiting = [(point, path) for point, path in waiting if not _ended(notes, path).exists()]
                suspects = [(point, path) for point, path in waiting if _begun(notes, path).exists()]
                if not suspects:
                    raise
                for point, path in suspects:
                    failures += _alone(attempt, lost, point, path)
                waiting = [one for one in waiting if one not in suspects]
                shown.update(len(plan) - len(waiting) - shown.n)
    found = read_runs(path for _, path in plan)
    records = [found[path] for _, path in plan]
    if not silent:
        _tell(records, failures)
    return records


def missing(plan: Sequence[tuple[Point, Path]]) -> list[tuple[Point, Path]]:
    """Those of the plan whose file is not there yet, or says that the run failed."""
    kept = read_runs(path for _, path in plan)
    return [(point, path) for point, path in plan if "failed" in kept.get(path, {"failed": ""})]


def _in_processes(
    attempt: Callable[[Point, Path], _Failure | None], points: Sequence[tuple[Point, Path]], processes: int
) -> Iterator[_Failure | None]:
    return Parallel(n_jobs=processes, return_as="generator_unordered")(
        delayed(attempt)(point, path) for point, path in points
    )


def _alone(attempt: Callable, lost: Lost, point: Point, path: Path) -> list[_Failure]:
    """Once more, with nothing beside it that takes memory; not in this process, as it may be killed."""
    try:
        return [failure for failure in _in_processes(attempt, [(point, path)], 2) if failure]
    except BrokenProcessPool:
        write_atomically(path, lost(point) | {"failed": KILLED})
        return [_Failure(None)]


def _attempt(run: Run, lost: Lost, notes: Path, point: Point, path: Path) -> _Failure | None:
    """Do one run and keep its record, or the reason why there is none."""
    _begun(notes, path).touch()
    failure = None
    with limited_threads(1), by_itself():  # so that numbers do not depend on the cores
        try:
            record = run(point, path)
        except StoreError:  # the disk's fault: no other run could be kept, either
            raise
        except Exception as error:  # one bad run, or even a bug that it meets, ends no sweep
            ours = isinstance(error, LoraLensError)
            failure = _Failure(error if ours else None, "" if ours else traceback.format_exc())
            words = str(error) if ours else f"{type(error).__name__}: {error}"
            record = lost(point) | {"failed": words}
    write_atomically(path, record)
    _begun(notes, path).rename(_ended(notes, path))
    return failure


def _begun(notes: str | Path, path: Path) -> Path:
    return Path(notes) / path.stem


def _ended(notes: str | Path, path: Path) -> Path:
    return Path(notes) / f"{path.stem}.ended"


def _tell(records: Sequence[dict], failures: Sequence[_Failure]) -> None:
    """Raise if nothing came of all the runs, warn if nothing came of some."""
    reasons = [record["failed"] for record in records if "failed" in record]
    if not reasons:
        return
    origin = next((failure.origin for failure in failures if failure.origin), "")
    if len(reasons) == len(records):
        first = next((failure.error for failure in failures if failure.error), None)
        if first is None:
            first = RuntimeError(f"all runs failed, the first with: {reasons[0]}")
            first.add_note(origin)
        raise first
    several = list(dict.fromkeys(reasons))
    warnings.warn(
        f"{len(reasons)} of {len(records)} runs failed; their rows have the reason and no results, and the "
        f"next call tries them again: {listed(several, most=REASONS)}{origin and chr(10) + origin}",
        stacklevel=4,
    )


@contextmanager
def by_itself() -> Iterator[None]:
    """Hide what torchrun said to this process: a run must not wait for others."""
    before = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
