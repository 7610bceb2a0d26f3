"""The door for tables: whatever is given, what goes on is a table with the columns that are needed."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.validate import SYNONYMS, shown, suggestion

# Columns that hold words; all others that a function needs hold numbers.
WORDS = frozenset(
    ["run", "method", "variant", "strategy", "setting", "order", "task", "layer", "kind", "measure"]
)
SWEEP = ("method", "rank", "position", "start", "lr", "seed", "accuracy", "retained_accuracy", "forgetting")
SHARES = ("accuracy", "retained_before", "retained_accuracy")
NEVER_MISSING = ("run", "method", "lr", "seed")
MOST_NAMED = 20  # columns in a message


def checked(
    table: object,
    columns: Iterable[str],
    name: str = "the table",
    source: str = "ll.sweep",
    *,
    once: bool = False,
    empty: bool = False,
    keep_failed: bool = False,
    any_type: str | None = None,
) -> pd.DataFrame:
    """``table`` if it is one with rows and these columns, without the rows of runs that failed.

    Args:
        name, source: what it is and what returns it, for the messages.
        once: each run may have one row only, as in the table of a sweep.
        empty: it may have no rows.
        keep_failed: rows stay as they are.
        any_type: a column among ``columns`` that may hold anything.

    Raises:
        InputTypeError: it is no table.
        InputError: it is empty, all its runs failed, a column is missing or holds other things than
            numbers where numbers are meant or percentages in place of shares, or a run stands in it twice.
    """
    table = table_of(table)
    if not isinstance(table, pd.DataFrame):
        raise InputTypeError(
            f"{name} must be what {source} returns, a table, not {shown(table)}{_hint(table)}"
        )
    columns = list(dict.fromkeys(columns))
    if table.empty and not (empty and set(columns) <= set(table)):
        raise InputError(f"{name} is empty, it has no rows; pass what {source} returns")
    _require(table, columns, name, source)
    rows = table if keep_failed else _finished(table, name)
    for column in columns:
        if column in NEVER_MISSING and rows[column].isna().any():
            raise InputError(f"{name} has rows without a value of {column}; drop them")
        if column not in WORDS and column != any_type:
            rows = _with_numbers(rows, column, name)
        if column in SHARES and (wrong := ~rows[column].between(0, 1) & rows[column].notna()).any():
            raise InputError(
                f"{name} has {rows.loc[wrong, column].iloc[0]:g} in its column {column}, which holds shares "
                "in [0, 1]; 80% is 0.8"
            )
    if once and "run" in rows and (twice := rows["run"].duplicated()).any():
        raise InputError(
            f"{name} holds run {rows.loc[twice, 'run'].iloc[0]} twice, which would count as two seeds; "
            "drop it: table.drop_duplicates('run')"
        )
    return rows


def sweep_table(table: object, *more: str, once: bool = False) -> pd.DataFrame:
    """The runs of a sweep that did not fail, with ``more`` columns, if it is the table of one.

    Raises:
        InputTypeError, InputError: as :func:`checked`, or no run has a score.
    """
    table = checked(table, [*SWEEP, *more], once=once)
    for score in ("accuracy", "retained_accuracy"):
        if table[score].isna().all():
            raise InputError(f"no run of the table has a value of {score}, so there is nothing to show")
    return table


def table_of(value: object) -> object:
    """The table of a sweep; anything else as it is."""
    table = getattr(value, "table", None)
    return table if isinstance(table, pd.DataFrame) and not isinstance(value, pd.DataFrame) else value


def is_agreement(table: pd.DataFrame) -> bool:
    """Whether what was retained are the pretrained model's own answers, as ``ll.tasks.agreement`` asks for.

    Before training these have an accuracy of 1 and a loss of exactly 0 nats.
    """
    needed = ["retained_before", "retained_loss", "loss_rise"]
    rows = table.reindex(columns=needed).dropna()
    own = (rows["retained_before"] == 1) & (rows["retained_loss"] == rows["loss_rise"])
    return len(rows) > 0 and bool(own.all())


def _hint(value: object) -> str:
    if isinstance(value, (str, Path)):
        return "; a store is opened with ll.Sweep.open(path)"
    if isinstance(value, (list, tuple, dict)) and value:
        return "; pandas.DataFrame(...) makes a table of rows or columns"
    return ""


def _require(table: pd.DataFrame, columns: list[str], name: str, source: str) -> None:
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()][0]
        raise InputError(f"{name} has two columns called {twice!r}; rename or drop one")
    has = [str(column) for column in table.columns]
    missing = [column for column in columns if column not in table]
    if missing:
        named = ", ".join(has[:MOST_NAMED]) + (", ..." if len(has) > MOST_NAMED else "")
        meant = next((f"; did you mean {c!r}?" for c in has if SYNONYMS.get(c) == missing[0]), "")
        meant = meant or suggestion(missing[0], has)
        raise InputError(
            f"{name} has no column {', '.join(missing)}{meant}; it has {named}; pass what {source} returns"
        )


def _finished(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Without the runs that failed: they have a reason, and no results."""
    if "failed" not in table:
        return table
    failed = table["failed"].eq(True)
    if len(table) and failed.all():
        reason = f", such as: {table['reason'].iloc[0]}" if "reason" in table else ""
        raise InputError(f"all {len(table)} runs in {name} failed{reason}; there is nothing to compare")
    if not failed.any():
        return table
    rows = table[~failed].infer_objects()
    # pandas before 3 makes numbers of what were truths beside a missing value
    whole = "diverged" in rows and rows["diverged"].isin([False, True]).all()
    return rows.astype({"diverged": bool}) if whole else rows


def _with_numbers(table: pd.DataFrame, column: str, name: str) -> pd.DataFrame:
    """The column as numbers: a sweep of baselines alone has a column of None, whose type is object."""
    values = table[column]
    if is_numeric_dtype(values.dtype) and isinstance(values.dtype, np.dtype):
        return table
    known = values[values.notna()]
    bad = next((v for v in known if not isinstance(v, (Real, np.bool_))), None)
    if bad is not None:
        raise InputError(f"{name} must hold numbers in its column {column}, not {shown(bad)}")
    return table.assign(**{column: pd.to_numeric(values.astype(object).where(values.notna(), np.nan))})
