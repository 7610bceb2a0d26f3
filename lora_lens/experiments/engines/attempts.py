"""What a worker does with an item."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lora_lens._base.errors import LoraLensError, StoreError
from lora_lens._base.files import write_atomically
from lora_lens._base.threads import limited_threads
from lora_lens.experiments.engines.protocol import Attempt, Call, Item, Shared

LAUNCHED = (  # what torchrun and accelerate launch hand to their processes
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip

_slot: dict[str, Shared] = {}  # of the last call that this worker served; no more than that
_one_at_a_time = threading.Lock()  # a run seeds the generators of its process


def attempt_here(shared: Shared, item: Item) -> Attempt:
    """Do an item and keep its records, or the reason why there are none."""
    records, ended = _attempted(shared, item)
    for (_, path), record in zip(item, records, strict=False):  # those of a group that failed are none
        write_atomically(path, record)
    return ended


def attempt_on_worker(call: Call, item: bytes, read: Callable[[], bytes]) -> Attempt | None:
    """The same in a worker, which gets what the runs share by ``read`` if it does not have it yet.

    Returns:
        With the records, where this process does not see the store; None if a worker died of this item (such
        as Dask hands to the next).
    """
    with _one_at_a_time:
        item = pickle.loads(item)
        if not _sees(call):
            with tempfile.TemporaryDirectory() as own:  # for checkpoints
                records, ended = _attempted(_loaded(call.key, read), item, Path(own))
            return replace(ended, records=tuple(records))
        begun = call.notes / f"{item[0][1].stem}.{len(item)}{'.again' if call.again else ''}"
        ended_before = begun.with_name(f"{begun.name}.ended")
        if ended_before.exists():  # and what it returned was lost with its worker
            return Attempt()
        try:
            begun.touch(exist_ok=False)
        except FileExistsError:
            return None
        ended = attempt_here(_loaded(call.key, read), item)
        begun.rename(ended_before)
        return ended


def _attempted(shared: Shared, item: Item, folder: Path | None = None) -> tuple[list[dict], Attempt]:
    with limited_threads(1), by_itself():  # so that numbers do not depend on the cores
        try:
            if len(item) > 1:
                return shared.together([point for point, _ in item]), Attempt()
            ((point, path),) = item
            return [shared.run(point, path if folder is None else folder / path.name)], Attempt()
        except StoreError:  # the disk's fault: no other run could be kept, either
            raise
        except Exception as error:  # one bad run, or even a bug that it meets, ends no sweep
            ours = isinstance(error, LoraLensError)
            words = str(error) if ours else f"{type(error).__name__}: {error}"
            ended = Attempt(error=error if ours else None, origin="" if ours else traceback.format_exc())
            alone = [shared.lost(point) | {"failed": words} for point, _ in item]
            return alone if len(item) == 1 else [], ended


def _sees(call: Call) -> bool:
    try:
        return (call.notes / call.key).read_text() == call.key
    except OSError:
        return False


def _loaded(key: str, read: Callable[[], bytes]) -> Shared:
    if key not in _slot:
        _slot.clear()  # before the next is loaded: memory holds one
        _slot[key] = pickle.loads(read())
    return _slot[key]


@contextmanager
def by_itself() -> Iterator[None]:
    """Hide what torchrun said to this process: a run must not wait for others."""
    before = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
