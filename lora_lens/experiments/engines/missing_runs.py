"""Many runs on an engine: only those that are missing, and one that fails takes no other with it."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from lora_lens._base.errors import StoreError
from lora_lens._base.files import write_atomically
from lora_lens._base.naming import listed
from lora_lens._base.progress import progress_bar
from lora_lens._base.warning import warn
from lora_lens.experiments.engines.protocol import Attempt, Call, Engine, Item, Planned, Point, Shared
from lora_lens.experiments.records import read_runs

KILLED = "its process was killed, also when it ran alone: most likely memory ran out"
REASONS = 3  # in the warning
Told = Callable[[Sequence[Path]], object]  # which runs have just ended


def run_missing(
    shared: Shared,
    plan: Sequence[Planned],
    engine: Engine,
    *,
    groups: Sequence[Sequence[Point]] = (),
    told: Told | None = None,
    **bar: object,
) -> list[dict]:
    """Run every point whose file is not there yet, or says that the run failed; keep those that fail, too.

    Args:
        shared: does one point, or several together.
        plan: points, with their files.
        engine: computes them.
        groups: points of the plan that are computed together, if one of them is missing. Where that fails,
            or kills a worker twice, they are run one by one.
        told: is called with the files of runs that have ended, failed ones included.
        bar: of :func:`lora_lens._base.progress.progress_bar`.

    Returns:
        The records of all points; those of failed ones have the key failed, with the reason.

    Raises:
        StoreError: a record cannot be written.
        EngineError: the cluster is gone.
        LoraLensError, RuntimeError: all of the runs failed; the first one's reason.
    """
    plan = [(point, path.absolute()) for point, path in plan]  # workers are in other folders
    failures = []
    if waiting := missing(plan):
        lacking, paths = {path for _, path in waiting}, dict(plan) if groups else {}
        items = [tuple((point, paths[point]) for point in group) for group in groups]
        items = [item for item in items if any(path in lacking for _, path in item)]
        grouped = {path for item in items for _, path in item}
        items += [(one,) for one in waiting if one[1] not in grouped]
        places = {path: place for place, (_, path) in enumerate(plan)}
        items.sort(key=lambda item: places[item[0][1]])  # a whole seed before the next, as in the plan
        with (
            _noted(plan[0][1].parent) as call,
            progress_bar(total=len(plan), initial=len(plan) - len(waiting), **bar) as shown,
        ):
            failures = _run_all(engine, shared, call, items, lacking, told, shown)
    records = kept_records([path for _, path in plan])
    _tell(records, failures)
    return records


def kept_records(paths: Sequence[Path]) -> list[dict]:
    """The records of runs that have ended.

    Raises:
        StoreError: one is not there any more.
    """
    found = read_runs(paths)
    if gone := [path.name for path in paths if path not in found]:
        raise StoreError(
            f"{len(gone)} of {len(paths)} runs were written to {paths[0].parent} and cannot be read any more "
            f"({listed(gone, most=REASONS)}), as if the folder had been changed meanwhile: call this again, "
            "and only what is missing is run"
        )
    return [found[path] for path in paths]


def missing(plan: Sequence[Planned]) -> list[Planned]:
    """Those of the plan whose file is not there yet, or says that the run failed."""
    kept = read_runs(path for _, path in plan)
    return [(point, path) for point, path in plan if "failed" in kept.get(path, {"failed": ""})]


def _run_all(
    engine: Engine,
    shared: Shared,
    call: Call,
    items: Sequence[Item],
    lacking: set[Path],
    told: Told | None,
    shown: tqdm,
) -> list[Attempt]:
    """Those that failed."""
    failures: list[Attempt] = []
    left, most = set(lacking), max(map(len, items))
    alone: list[Item] = []  # the runs of groups that cannot be computed together

    def ended(item: Item) -> None:
        paths = [path for _, path in item if path in left]
        left.difference_update(paths)
        running = 0 if shown.disable else min(len(left), most * engine.width())
        counts = {"failed": len(failures), "running": running}
        shown.set_postfix_str(", ".join(f"{n} {what}" for what, n in counts.items() if n), refresh=False)
        shown.update(len(paths))
        if told is not None:
            told(paths)

    def died_of(items: Sequence[Item], call: Call) -> list[Item]:
        died = []
        for item, attempt in engine.attempts(shared, call, items):
            if attempt is None:
                died.append(item)
                continue
            if attempt.failed and len(item) > 1:
                alone.extend((one,) for one in item if one[1] in lacking)
                if attempt.origin:  # no refusal of ours
                    warn(
                        f"{len(item)} runs could not be computed together, and are computed one by one: "
                        f"{attempt.origin}",
                    )
                continue
            for (_, path), record in zip(item, attempt.records, strict=False):
                write_atomically(path, record)
            if attempt.failed:
                failures.append(replace(attempt, records=()))
            ended(item)
        return died

    while items:
        for item in died_of(items, call):
            # Once more, with nothing beside it that takes memory.
            if not died_of([item], replace(call, again=True)):
                continue
            if len(item) > 1:
                alone.extend((one,) for one in item if one[1] in lacking)
                continue
            ((point, path),) = item
            write_atomically(path, shared.lost(point) | {"failed": KILLED})
            failures.append(Attempt())
            ended(item)
        items, alone = alone, []
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
    warn(
        f"{len(reasons)} of {len(records)} runs failed; their rows have the reason and no results, and the "
        f"next call tries them again: {listed(several, most=REASONS)}{origin and chr(10) + origin}",
    )
