"""What an engine is, and what it is handed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cloudpickle

from lora_lens._base.errors import InputError, LoraLensError

PACKAGES = ("lora_lens", "torch")  # numbers depend on their versions

Point = tuple[Any, ...]  # one of the grid: a method, a rate, a seed
Run = Callable[[Point, Path], dict]  # its record, without a name
Lost = Callable[[Point], dict]  # what stands in the record's place if it fails
Together = Callable[[Sequence[Point]], list[dict]]  # the records of runs that are computed as one program
Planned = tuple[Point, Path]  # a run to do, and the file that its record belongs into
Item = tuple[Planned, ...]  # what a worker is given at a time: one run, or several to be computed together


class Shared(NamedTuple):
    """What all runs of a call share, model and data included: it travels once per worker."""

    run: Run
    lost: Lost
    together: Together | None = None


@dataclass(frozen=True)
class Call:
    """What a worker is told of the call beside its run.

    Attributes:
        key: nobody else's; by it a worker knows what it has loaded already.
        notes: a folder beside the runs, of which the caller has written the file ``key``: a worker that can
            read that sees the store.
        again: whether this item's worker died before.
    """

    key: str
    notes: Path
    again: bool = False


@dataclass(frozen=True)
class Attempt:
    """How an item ended.

    Attributes:
        records: if the worker could not write them, as it does not see the store.
        error: why the run failed, if we raised it on purpose.
        origin: the traceback of any other error.
    """

    records: tuple[dict, ...] = ()
    error: LoraLensError | None = None
    origin: str = ""

    @property
    def failed(self) -> bool:
        return self.error is not None or bool(self.origin)


class Engine(Protocol):
    """Something that computes items, each with one thread."""

    def width(self) -> int:
        """How many items it computes at the same time, as things are."""
        ...

    def attempts(
        self, shared: Shared, call: Call, items: Sequence[Item]
    ) -> Iterator[tuple[Item, Attempt | None]]:
        """Do the items; each comes as it ends, with None if its worker died.

        When the iterator is closed early, what has not begun is given up.
        """
        ...


def packed(travelling: Item | Shared) -> bytes:
    """As it travels: with the code of classes from a notebook or script."""
    with able_to_travel():
        return cloudpickle.dumps(travelling)


@contextmanager
def able_to_travel() -> Iterator[None]:
    """Say what to do where something cannot be pickled."""
    try:
        yield
    except OSError:  # of the disk that it is written to
        raise
    except Exception as error:  # pickle has no error of its own for this
        raise InputError(
            f"the model, the tasks or the methods cannot travel to other processes ({type(error).__name__}: "
            f"{error}): take off what they hold of that kind, such as hooks with open files; jobs=1 computes "
            "all runs in this process"
        ) from None


def require_same_versions(found: Mapping[str, Mapping[str, object]]) -> None:
    """Raise if a worker computes with other code than this process.

    Args:
        found: by package, by worker, the version or the error that came in its place.

    Raises:
        InputError: a worker has another version or none.
    """
    for package, by_worker in found.items():
        here = version(package)
        for worker, there in by_worker.items():
            if isinstance(there, PackageNotFoundError):
                raise InputError(f"worker {worker} has no {package}: install {package}=={here} there")
            if not isinstance(there, str):
                raise InputError(f"worker {worker} cannot say which {package} it has: {there}")
            # What is behind the plus says for which GPU a wheel was built.
            if there.split("+")[0] != here.split("+")[0]:
                raise InputError(
                    f"worker {worker} has {package} {there}, and here it is {here}: results would depend on "
                    "who computes them; install one version everywhere"
                )
