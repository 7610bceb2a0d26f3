"""Workers of a Dask cluster; nothing else imports Dask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from importlib.metadata import version

from distributed import Client, as_completed
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

from lora_lens._base.errors import EngineError, InputError
from lora_lens._base.warning import warn
from lora_lens.experiments.engines.attempts import attempt_on_worker
from lora_lens.experiments.engines.protocol import (
    PACKAGES,
    Attempt,
    Call,
    Item,
    Shared,
    packed,
    require_same_versions,
)

TRIES = 3  # in a row in which no run ended and all workers died


class DaskWorkers:
    """Those that a client sees, also ones that come later."""

    def __init__(self, client: Client) -> None:
        if client.asynchronous:
            raise InputError("engine is an asynchronous Client, and lora_lens waits: make one without that")
        if client.status != "running":
            raise InputError(f"engine is a Client that is {client.status}: connect a new one")
        threads = client.nthreads()
        if not threads:
            raise InputError(
                "engine is a Client without workers: start some, and call client.wait_for_workers(1)"
            )
        require_same_versions({name: client.run(version, name, on_error="return") for name in PACKAGES})
        if (most := max(threads.values())) > 1:
            warn(
                f"Dask's workers have up to {most} threads each and compute one run at a time: more workers "
                "with threads_per_worker=1 would be faster",
            )
        self.client = client

    def width(self) -> int:
        try:
            return len(self.client.nthreads()) if self.client.status == "running" else 0
        except OSError:  # the scheduler is gone, which attempts() says
            return 0

    def attempts(
        self, shared: Shared, call: Call, items: Sequence[Item]
    ) -> Iterator[tuple[Item, Attempt | None]]:
        whole, tries = packed(shared), 0
        while items:
            try:
                self.client.wait_for_workers(1)
                data = self.client.scatter(whole, broadcast=True, hash=False)
            except OSError as error:
                raise _gone(error, items) from error
            futures = {
                self.client.submit(_attempt, call, packed(item), data, pure=False): item for item in items
            }
            given_up, reason = [], None
            try:
                for future in as_completed(list(futures)):
                    item = futures.pop(future)
                    try:
                        yield item, future.result()
                    except KilledWorker:
                        yield item, None
                    except (CancelledError, CommClosedError) as error:
                        given_up, reason = [*given_up, item], error
            finally:
                self.client.cancel(list(futures))
            if self.client.status != "running":
                raise _gone(reason, given_up)
            # Dask gives up tasks if all workers that held the data died: they are handed to those that come.
            tries = tries + 1 if len(given_up) == len(items) else 0
            if tries == TRIES:
                yield from ((item, None) for item in given_up)
                return
            items = given_up


def _gone(reason: BaseException | None, left: Sequence[Item]) -> EngineError:
    return EngineError(
        f"Dask's scheduler is gone ({reason}), and {sum(map(len, left))} runs are left; those that have "
        "ended are kept: connect a client to a cluster and call this again"
    )


def _attempt(call: Call, item: bytes, whole: bytes) -> Attempt | None:
    return attempt_on_worker(call, item, lambda: whole)
