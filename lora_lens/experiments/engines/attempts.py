"""What a worker does with a run."""

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
    """Do a run and keep its record, or the reason why there is none."""
    record, ended = _attempted(shared, item)
    write_atomically(item[1], record)
    return ended


def attempt_on_worker(call: Call, point: bytes, path: Path, read: Callable[[], bytes]) -> Attempt | None:
    """The same in a worker, which gets what the runs share by ``read`` if it does not have it yet.

    Returns:
        With the record, where this process does not see the store; None if a worker died of this run (such
        as Dask hands to the next).
    """
    with _one_at_a_time:
        if not _sees(call):
            item = pickle.loads(point), path
            with tempfile.TemporaryDirectory() as own:  # for checkpoints
                record, ended = _attempted(_loaded(call.key, read), item, Path(own))
            return replace(ended, record=record)
        begun = call.notes / f"{path.stem}{'.again' if call.again else ''}"
        ended_before = begun.with_name(f"{begun.name}.ended")
        if ended_before.exists():  # and what it returned was lost with its worker
            return Attempt()
        try:
            begun.touch(exist_ok=False)
        except FileExistsError:
            return None
        ended = attempt_here(_loaded(call.key, read), (pickle.loads(point), path))
        begun.rename(ended_before)
        return ended


def _attempted(shared: Shared, item: Item, folder: Path | None = None) -> tuple[dict, Attempt]:
    point, path = item
    with limited_threads(1), by_itself():  # so that numbers do not depend on the cores
        try:
            return shared.run(point, path if folder is None else folder / path.name), Attempt()
        except StoreError:  # the disk's fault: no other run could be kept, either
            raise
        except Exception as error:  # one bad run, or even a bug that it meets, ends no sweep
            ours = isinstance(error, LoraLensError)
            words = str(error) if ours else f"{type(error).__name__}: {error}"
            ended = Attempt(error=error if ours else None, origin="" if ours else traceback.format_exc())
            return shared.lost(point) | {"failed": words}, ended


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
