"""What pictures of sequences share: which runs are of one strategy and method, and what to call it."""

from __future__ import annotations

from numbers import Integral
from textwrap import shorten

import pandas as pd

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import instance
from lora_lens.forgetting.run_groups import DRIFTS
from lora_lens.plots._scores import method_name

METHOD = ["strategy", "method", "rank", "position", "start"]  # what tells the lines of a picture apart
# Of which the runs of a line share one value each.
SETTINGS = ("setting", "lr", "steps", "batch_size", "warmup", "weight_decay", "precision", "alpha", "targets")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
OTHER_MARKERS = ("X", "P", "v", "<", ">", "*", "d", "p")
LINES = ("-", "--", ":", "-.", (0, (7, 2, 1, 2, 1, 2)), (0, (9, 4)))


def of_one_method(table: pd.DataFrame, run: str | None = None) -> pd.DataFrame:
    """The rows of one run, or of the runs of one strategy and method on the same tasks, checked."""
    keys = ["run", "after", "place"]
    columns = [*keys, *METHOD, "order", "task", "accuracy", "retained_before", "retained_accuracy"]
    table = checked(table, columns, source="ll.experiments.continual_sweep")
    if run is not None:
        instance(run, (str, Integral), "run", "one of the table's column run, or None")
    rows = table if run is None else table[[one == run for one in table["run"]]]
    if rows.empty:
        raise InputError(
            f"the table has no run {run!r}; it has {shorten(', '.join(map(str, table['run'].unique())), 80)}"
        )
    if rows.duplicated(keys).any():
        raise InputError(
            "some rows stand twice in the table; pass what ll.experiments.continual_sweep returned"
        )
    methods = rows.drop_duplicates(METHOD)
    if len(methods) > 1:
        first, second, *_ = method_names(methods)
        raise InputError(
            f"one picture shows one strategy and method, and the table has {len(methods)}, such as {first} "
            f"and {second}; choose one, such as table[table['strategy'] == '{methods['strategy'].iloc[0]}'], "
            "or pass a run"
        )
    require_one_setting(rows)
    tasks = rows.groupby("run")["task"].agg(lambda names: ", ".join(sorted(set(names))))
    if tasks.nunique() > 1:
        one, two, *_ = tasks.unique()
        raise InputError(f"the runs learnt different tasks: {one} and {two}; pass runs of the same tasks")
    return rows


def require_one_setting(rows: pd.DataFrame) -> None:
    """Runs that differ in more than their order and seed have no common mean."""
    for setting in (*SETTINGS, "variant"):
        if setting not in rows:
            continue
        for _, group in rows.groupby(METHOD, dropna=False, sort=False):
            if len(values := group[setting].unique().tolist()) > 1:
                (name,) = method_names(group.head(1))
                raise InputError(
                    f"the runs of {name} differ in {setting}: {values[0]} and {values[1]}; choose one, such "
                    f"as table[table['{setting}'] == {values[0]!r}]"
                )


def drifts_by_run(drifts: pd.DataFrame, table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """One row per run and number of tasks: the mean of a measure over layers, with what names the run."""
    drifts = checked(drifts, ["run", "after", "layer", measure], *DRIFTS)
    table = checked(table, ["run", *METHOD], source="ll.experiments.continual_sweep")
    named = table.drop_duplicates("run")
    require_one_setting(named[named["run"].isin(drifts["run"])])
    by_run = drifts.groupby(["run", "after"])[measure].mean().reset_index()
    return named[["run", *METHOD]].merge(by_run, on="run")


def name_of_windows(strategy: str, rank: float, several_ranks: bool) -> str:
    """Of the windows at all positions together."""
    return f"{strategy}: windows" + (f" of rank {rank:g}" if several_ranks else "")


def method_names(rows: pd.DataFrame) -> list[str]:
    """What tells rows apart, such as "merged: LoRA"; with the rank where there are several."""
    several_ranks = rows["rank"].nunique() > 1
    names = []
    for _, row in rows.iterrows():
        name = method_name(row)
        if several_ranks and pd.notna(row["rank"]) and "rank" not in name:
            name += f" of rank {row['rank']:g}"
        names.append(f"{row['strategy']}: {name}")
    return names
