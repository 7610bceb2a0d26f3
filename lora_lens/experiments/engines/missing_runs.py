"""Many runs on an engine: only those that are missing, and one that fails takes no other with it."""

from __future__ import annotations

import secrets
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lora_lens._base.errors import StoreError
from lora_lens._base.files import write_atomically
from lora_lens._base.naming import listed
from lora_lens._base.progress import progress_bar
from lora_lens.experiments.engines.protocol import Attempt, Call, Engine, Item, Lost, Run, Shared
from lora_lens.experiments.records import read_runs

KILLED = "its process was killed, also when it ran alone: most likely memory ran out"
REASONS = 3  # in the warning


def run_missing(run: Run, lost: Lost, plan: Sequence[Item], engine: Engine, **bar: object) -> list[dict]:
    """Run every point whose file is not there yet, or says that the run failed; keep those that fail, too.

    Args:
        run: does one point.
        lost: gives the record of a point without its results.
        plan: points, with their files.
        engine: computes them.
        bar: of :func:`lora_lens._base.progress.progress_bar`.

    Returns:
        The records of all points; those of failed ones have the key failed, with the reason.

    Raises:
        StoreError: a record cannot be written.
        EngineError: the cluster is gone.
        LoraLensError, RuntimeError: all of the runs failed; the first one's reason.
    """
    waiting, failures = missing(plan), []
    if waiting:
        with _noted(plan[0][1].absolute().parent) as call:
            failures = _run_all(engine, Shared(run, lost), call, waiting, len(plan), bar)
    found = read_runs(path for _, path in plan)
    records = [found[path] for _, path in plan]
    _tell(records, failures)
    return records


def missing(plan: Sequence[Item]) -> list[Item]:
    """Those of the plan whose file is not there yet, or says that the run failed."""
    kept = read_runs(path for _, path in plan)
    return [(point, path) for point, path in plan if "failed" in kept.get(path, {"failed": ""})]


def _run_all(
    engine: Engine, shared: Shared, call: Call, items: Sequence[Item], total: int, bar: dict[str, object]
) -> list[Attempt]:
    """Those that failed."""
    failures: list[Attempt] = []
    with progress_bar(total=total, initial=total - len(items), **bar) as shown:

        def died_of(items: Sequence[Item], call: Call) -> list[Item]:
            died, left = [], len(items)
            items = [(point, path.absolute()) for point, path in items]  # workers are in other folders
            for item, attempt in engine.attempts(shared, call, items):
                left -= 1
                if attempt is None:
                    died.append(item)
                    continue
                if attempt.record is not None:
                    write_atomically(item[1], attempt.record)
                if attempt.failed:
                    failures.append(replace(attempt, record=None))
                ended(left)
            return died

        def ended(left: int) -> None:
            counts = {"failed": len(failures), "running": 0 if shown.disable else min(left, engine.width())}
            shown.set_postfix_str(", ".join(f"{n} {what}" for what, n in counts.items() if n), refresh=False)
            shown.update()

        for point, path in died_of(items, call):
            # Once more, with nothing beside it that takes memory.
            if died_of([(point, path)], replace(call, again=True)):
                write_atomically(path, shared.lost(point) | {"failed": KILLED})
                failures.append(Attempt())
                ended(0)
    return failures


@contextmanager
def _noted(runs: Path) -> Iterator[Call]:
    """A folder for what workers note, with the file by which they see that it is the caller's."""
    call = Call(key := secrets.token_hex(8), runs / f".call.{key}")
    try:
        call.notes.mkdir()
        (call.notes / key).write_text(key)
    except OSError as error:
        raise StoreError(f"cannot write into {runs}: {error.strerror or error}") from None
    try:
        yield call
    finally:
        shutil.rmtree(call.notes, ignore_errors=True)


def _tell(records: Sequence[dict], failures: Sequence[Attempt]) -> None:
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
