"""Records of runs as columns, in one Parquet file beside them: ten thousand run files are opened as one.

Each row is a run: its name; ``about``, all that is known of it but its tables, as JSON; and for each column
of each table (its curve, its answers, ...) a list. The file follows the run files whenever it is read, and
may be deleted at any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from os import scandir
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lora_lens._base.errors import InputError
from lora_lens._base.files import replace_file
from lora_lens.experiments.records import TABLES, packed, read_runs, store_path

FILE = "columns.parquet"
FORMAT = b"1"  # of the columns; another one is made anew
WORTH = 100  # files read one by one, from which on their columns are kept
RUN, ABOUT, STAMP = "run", "about", "stamp"


def columns_of(records: Iterable[Mapping], stamps: Sequence[str] | None = None) -> pa.Table:
    """The records of runs as columns, in their order.

    Raises:
        InputError: a column of a table holds numbers in one run and words in another.
    """
    records = list(records)
    about = [{k: v for k, v in record.items() if k not in TABLES} for record in records]
    found = {
        RUN: pa.array([record["run"] for record in records], pa.string()),
        ABOUT: pa.array([json.dumps(one) for one in about], pa.string()),
        STAMP: pa.array(stamps or [""] * len(records), pa.string()),
    }
    names = dict.fromkeys(
        (table, column) for record in records for table in TABLES for column in record.get(table, ())
    )
    for table, column in names:
        lists = [record.get(table, {}).get(column) for record in records]
        try:
            found[f"{table}/{column}"] = pa.array(lists)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(f"the runs differ in what their {table} holds as {column}: {error}") from None
    return pa.table(found)


def read_columns(store: str | Path) -> pa.Table:
    """The columns of a results folder or of a packed file, by run.

    What the folder's columns lack is read from its run files, and kept beside them where that is possible.

    Raises:
        MissingFileError: there is no such folder or file.
        InputError: it is no packed file.
    """
    store = store_path(store)
    if not store.is_dir():
        packed(store)  # raises
        state = store.stat()
        return _of_packed(store.resolve(), state.st_mtime_ns, state.st_size)
    files, kept = _stamps(store / "runs"), _kept(store / FILE)
    known = dict(zip(kept[RUN].to_pylist(), kept[STAMP].to_pylist(), strict=True))
    missing = sorted(run for run, stamp in files.items() if known.get(run) != stamp)
    if not missing and len(kept) == len(files):
        return kept
    found = read_runs([store / "runs" / f"{run}.json" for run in missing], "passed over")
    new = columns_of(found.values(), [files[path.stem] for path in found])
    stay = pa.array([files.get(run) == stamp for run, stamp in known.items()], pa.bool_())
    both = [part for part in (kept.filter(stay), new) if len(part)] or [new]
    try:
        together = pa.concat_tables(both, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"the runs in {store} differ in what their tables hold: {error}") from None
    together = together.take(pc.sort_indices(together[RUN]))
    if len(missing) >= WORTH:
        with suppress(OSError):  # a folder that may only be read is read more slowly
            keep_columns(store, together)
    return together


def keep_columns(store: Path, columns: pa.Table) -> None:
    """Write the columns of a results folder beside its run files, whole or not at all."""
    sink = pa.BufferOutputStream()
    described = {**(columns.schema.metadata or {}), b"lora_lens": FORMAT}
    pq.write_table(columns.replace_schema_metadata(described), sink, compression="zstd")
    replace_file(store / FILE, sink.getvalue())


def records_in(columns: pa.Table) -> list[dict]:
    """What is known of each run but its tables."""
    return [json.loads(about) for about in columns[ABOUT].to_pylist()]


def rows_of(columns: pa.Table, table: str) -> pd.DataFrame:
    """One row for each row that the runs have in ``table``, with the column run in front; empty without any.

    A column that a run lacks is NaN there.
    """
    lists = {
        name.partition("/")[2]: columns[name].combine_chunks()
        for name in columns.column_names
        if name.partition("/")[0] == table and "/" in name
    }
    if not lists:
        return pd.DataFrame({RUN: []})
    lengths = {name: pc.fill_null(pc.list_value_length(found), 0).to_numpy() for name, found in lists.items()}
    most = np.max(list(lengths.values()), axis=0)
    runs = columns[RUN].combine_chunks().take(pa.array(np.repeat(np.arange(len(columns)), most)))
    return pd.DataFrame({RUN: runs.to_pandas()} | {n: _flat(f, lengths[n], most) for n, f in lists.items()})


def _flat(lists: pa.Array, lengths: np.ndarray, most: np.ndarray) -> pd.Series:
    values = lists.flatten()
    if not np.array_equal(lengths, most):
        has = np.repeat(lengths > 0, most)
        places = np.where(has, np.cumsum(has) - 1, 0)
        values = values.take(pa.array(places, mask=~has))
    return values.to_pandas()


def _stamps(folder: Path) -> dict[str, str]:
    """When each run file was changed last, and how large it is; none where there is no such folder."""
    if not folder.is_dir():
        return {}
    stamps = {}
    with scandir(folder) as files:
        for file in files:
            if file.name.endswith(".json"):
                with suppress(FileNotFoundError):  # taken away meanwhile
                    state = file.stat()
                    stamps[file.name.removesuffix(".json")] = f"{state.st_mtime_ns} {state.st_size}"
    return stamps


def _kept(file: Path) -> pa.Table:
    """The columns as they were kept; none where there is no such file, or a damaged or foreign one."""
    with suppress(OSError, pa.ArrowException):
        columns = pq.read_table(file, memory_map=False)
        named = {RUN, ABOUT, STAMP} <= set(columns.column_names)
        if named and (columns.schema.metadata or {}).get(b"lora_lens") == FORMAT:
            return columns
    return columns_of([])


@lru_cache(maxsize=2)
def _of_packed(file: Path, _changed: int, _size: int) -> pa.Table:
    return columns_of(sorted(packed(file)[1:], key=lambda record: record["run"]))
