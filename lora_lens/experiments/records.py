"""The files of a results folder, read forgivingly: what is damaged or foreign is named and passed over."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from os import PathLike
from pathlib import Path

import pandas as pd

from lora_lens._base.errors import InputError, InputTypeError, MissingFileError
from lora_lens._base.naming import listed
from lora_lens._base.validate import shown
from lora_lens._base.warning import warn
from lora_lens.experiments.identity import run_name

NEEDED = frozenset(("method", "rank", "position", "start", "lr", "seed", "steps"))
SCORES = frozenset(("loss", "accuracy", "retained_before", "retained_accuracy", "forgetting", "diverged"))
TABLES = ("curve", "items", "watched", "drift", "rows")  # of a record, as lists by column
NAMED = 3  # files in a warning


def store_path(
    store: str | Path, name: str = "store", expected: str = "the folder or packed file of a sweep"
) -> Path:
    """The path of a store, or a TypeError that says what it is instead."""
    if not isinstance(store, (str, PathLike)):
        raise InputTypeError(f"{name} must be {expected}, not {shown(store)}")
    return Path(store)


def require_runs(table: pd.DataFrame) -> list[str]:
    """The runs that a table names, each once, in its order.

    Raises:
        InputTypeError: it is no table.
        InputError: it has no column run, or no rows.
    """
    if not isinstance(table, pd.DataFrame):
        raise InputTypeError(f"table must be the table of an ll.Sweep, not {shown(table)}")
    if "run" not in table:
        raise InputError(
            f"the table has no column run; it has {listed(map(str, table.columns), most=20)}; pass "
            "the table of an ll.Sweep"
        )
    if table.empty:
        raise InputError("the table has no runs; pass the table of an ll.Sweep")
    return list(dict.fromkeys(table["run"]))


def all_records(store: str | Path) -> dict[str, dict]:
    """The records of a folder or of a packed file by run.

    Raises:
        MissingFileError: there is no such folder or file.
        InputError: it is no packed file.
    """
    store = store_path(store)
    if not store.is_dir():
        return {record["run"]: record for record in packed(store)[1:]}
    found = read_runs(sorted((store / "runs").glob("*.json")), "passed over")
    return {record["run"]: record for record in found.values()}


def read_runs(paths: Iterable[Path], otherwise: str = "run again") -> dict[Path, dict]:
    """The records in those of the files that are there and hold one; one warning names the others."""
    found, damaged = {}, []
    for path in paths:
        try:
            found[path] = _record(path.read_bytes(), path.stem)
        except FileNotFoundError:
            continue
        except (OSError, InputError) as error:
            damaged.append(f"{path.name} ({error})")
    if damaged:
        some = listed(damaged, most=NAMED)
        where, are = path.parent, "is" if len(damaged) == 1 else "are"
        files = "1 file" if len(damaged) == 1 else f"{len(damaged)} files"
        text = f"{files} in {where} {are} damaged or no run of a sweep, and {are} {otherwise}: {some}"
        warn(text)
    return found


def _record(content: bytes, name: str | None = None) -> dict:
    """A run's record, called ``name`` if that is given.

    Raises:
        InputError: it is none.
    """
    try:
        record = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise InputError("no whole JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("run"), str):
        raise InputError("no record of a run")
    settings, exact_parts = record.get("settings"), record.get("exact", {})
    if not (isinstance(settings, dict) and settings.keys() >= NEEDED and isinstance(exact_parts, dict)):
        raise InputError("no record of a run")
    if name is not None and record["run"] != name:
        raise InputError(f"holds run {record['run']}")
    if run_name(settings, exact_parts) != record["run"]:
        raise InputError("its settings are not those that the run was made with")
    if not _has_results(record):
        raise InputError("its results are damaged")
    return record


def _has_results(record: Mapping) -> bool:
    """Whether all that a run keeps, or has in place of it where it failed, is there to be read."""
    result = record.get("result", {})
    scores = isinstance(result, dict) and all(isinstance(value, (int, float)) for value in result.values())
    tables = [record[key] for key in TABLES if key in record]
    whole = all(
        isinstance(table, dict)
        and all(isinstance(column, list) for column in table.values())
        and len({len(column) for column in table.values()}) <= 1
        for table in tables
    )
    failed = isinstance(record.get("failed", ""), str)
    if "rows" in record:
        return whole and failed
    of_run = "failed" in record or "curve" in record
    of_drift = "drift" not in record or isinstance(record.get("features"), dict)
    return scores and result.keys() >= SCORES and whole and failed and of_run and of_drift


def packed(file: Path) -> list[dict]:
    """The experiment in a packed file, then its records; not to be changed, as they are kept for a while."""
    if not file.exists():
        raise MissingFileError(f"there is no results folder or file {file}")
    state = file.stat()
    return _packed(file.resolve(), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=2)
def _packed(file: Path, _changed: int, _size: int) -> list[dict]:
    try:
        first, *lines = lzma.decompress(file.read_bytes()).splitlines()
        return [experiment_in(first), *map(_record, lines)]
    except (lzma.LZMAError, EOFError, ValueError) as error:  # InputError, or no line at all
        raise InputError(f"{file} is damaged or was not written by ll.experiments.pack: {error}") from None


def experiment_in(content: bytes) -> dict[str, dict[str, str]]:
    """What a folder's runs belong to.

    Raises:
        InputError: it does not say so.
    """
    try:
        described = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise InputError("no whole JSON") from None
    identity = described.get("identity") if isinstance(described, dict) else None
    if not (isinstance(identity, dict) and identity and all(isinstance(v, str) for v in identity.values())):
        raise InputError("no description of an experiment")
    return described


def row_of(record: Mapping) -> dict[str, object]:
    """A run's row in the table of a sweep."""
    ended = {"failed": "failed" in record, "reason": record.get("failed", "")}
    return {"run": record["run"], **record["settings"], **record["result"], **ended}


def with_distinct_names(records: Iterable[dict]) -> Iterator[dict]:
    """The records, with different texts for different methods and strategies.

    Those of one text, which is made for people and may leave something out, get a few digits of their
    identity behind it.
    """
    records = list(records)
    for column in ("method", "strategy"):
        identities: dict[str, set[str]] = {}
        for record in records:
            identities.setdefault(record["settings"].get(column), set()).add(_identity(record, column))
        records = [
            {**record, "settings": {**record["settings"], column: f"{text} [{identity}]"}}
            if (identity := _identity(record, column))
            and len(identities[text := record["settings"][column]]) > 1
            else record
            for record in records
        ]
    return iter(records)


def _identity(record: Mapping, column: str) -> str:
    """Four digits for an exact part; "" where the settings are exact, or an earlier version made the run."""
    part = record.get("exact", {}).get(column)
    return "" if part is None else hashlib.sha256(json.dumps(part).encode()).hexdigest()[:4]
