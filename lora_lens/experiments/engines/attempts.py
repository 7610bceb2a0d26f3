"""What a worker does with an item."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle

from lora_lens._base.errors import InputError, LoraLensError, StoreError
from lora_lens._base.files import write_atomically
from lora_lens._base.lazy import uncollected
from lora_lens._base.threads import limited_threads
from lora_lens.experiments.engines.protocol import Attempt, Call, Item, Shared

LAUNCHED = (  # what torchrun and accelerate launch hand to their processes
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip

Failures = type[BaseException] | tuple[type[BaseException], ...]
ON_WORKER = (Exception, SystemExit)  # the latter ends a worker, and here it may be meant for the caller

_slot: dict[str, Shared] = {}  # of the last call that this worker served; no more than that
one_at_a_time = threading.Lock()  # a run seeds the generators of its process


def attempt_here(shared: Shared, item: Item, *, failures: Failures = Exception) -> Attempt:
    """Do an item and keep its records, or the reason why there are none; ``failures`` end no more than it."""
    records, ended = _attempted(shared, item, failures)
    for (_, path), record in zip(item, records, strict=False):  # those of a group that failed are none
        write_atomically(path, record)
    return ended


def attempt_on_worker(call: Call, item: bytes, read: Callable[[], bytes]) -> Attempt | None:
    """The same in a worker, which gets what the runs share by ``read`` if it does not have it yet.

    Returns:
        With the records, where this process does not see the store or may not write into it; None if a worker
        died of this item (such as Dask hands to the next).

    Raises:
        InputError: this worker cannot import what the runs need.
    """
    with one_at_a_time:
        item = _unpacked(item)
        begun = call.notes / f"{item[0][1].stem}.{len(item)}{'.again' if call.again else ''}"
        ended_before = begun.with_name(f"{begun.name}.ended")
        noted = False
        if _sees(call):
            if ended_before.exists():  # and what it returned was lost with its worker
                return Attempt()
            try:
                begun.touch(exist_ok=False)
                noted = True
            except FileExistsError:
                return None
            except OSError:  # the folder may only be read, or was just removed
                pass
        if noted:
            ended = attempt_here(_loaded(call.key, read), item, failures=ON_WORKER)
            with suppress(OSError):  # the notes were removed meanwhile, and the records are there
                begun.rename(ended_before)
        else:
            with tempfile.TemporaryDirectory() as own:  # for checkpoints
                records, ended = _attempted(_loaded(call.key, read), item, ON_WORKER, Path(own))
            ended = replace(ended, records=tuple(records))
        return replace(ended, error=_able_to_travel(ended.error))


def _attempted(
    shared: Shared, item: Item, failures: Failures, folder: Path | None = None
) -> tuple[list[dict], Attempt]:
    with limited_threads(1), by_itself():  # so that numbers do not depend on the cores
        try:
            if len(item) > 1:
                return shared.together([point for point, _ in item]), Attempt()
            ((point, path),) = item
            return [shared.run(point, path if folder is None else folder / path.name)], Attempt()
        except StoreError:  # the disk's fault: no other run could be kept, either
            raise
        except failures as error:  # one bad run, or even a bug that it meets, ends no sweep
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
        _slot[key] = _unpacked(read())
    return _slot[key]


def _unpacked(content: bytes) -> Any:
    try:
        with uncollected():  # it imports nearly everything
            return pickle.loads(content)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"a worker cannot load what the runs need ({type(error).__name__}: {error}): modules that the "
            "model, the tasks or the methods come from must be installed where the workers are"
        ) from None


def _able_to_travel(error: LoraLensError | None) -> LoraLensError | None:
    """The error, or one of ours with its words where pickle does not take it to another process and back."""
    try:
        pickle.loads(cloudpickle.dumps(error))
    except Exception:  # whatever the user's class raises
        return InputError(str(error))
    return error


@contextmanager
def by_itself() -> Iterator[None]:
    """Hide what torchrun said to this process: a run must not wait for others."""
    before = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
