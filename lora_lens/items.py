"""Which examples of the retained task were forgotten, and by whom: pure functions on tables of answers.

All take ``items`` with one row per run and test example: run, item, label, before and after (the
predicted class before and after training), as :func:`lora_lens.answers` returns them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

COLUMNS = ("run", "item", "label", "before", "after")


def transitions(items: pd.DataFrame, by: str | Sequence[str] = "run") -> pd.DataFrame:
    """How many examples went from right to wrong and from wrong to right.

    Args:
        by: what makes a group: "run", or for each class ["run", "label"].

    Returns:
        One row per group: ``by``; kept (right before and after), forgotten (right, then wrong),
        gained (wrong, then right), never (wrong both times), which sum to examples; changed (another
        class than before, right or wrong); forgetting = (forgotten - gained) / examples, the fall of the
        accuracy. Two runs with the same forgetting may have very different forgotten and gained.

    Raises:
        ValueError: a column is missing.
    """
    _require(items)
    by = [by] if isinstance(by, str) else list(by)
    right, still = items["before"] == items["label"], items["after"] == items["label"]
    flags = pd.DataFrame(
        {
            "kept": right & still,
            "forgotten": right & ~still,
            "gained": ~right & still,
            "never": ~right & ~still,
            "changed": items["before"] != items["after"],
        }
    )
    counts = flags.groupby([items[column] for column in by], sort=False).sum()
    counts["examples"] = counts[["kept", "forgotten", "gained", "never"]].sum(axis=1)
    counts["forgetting"] = (counts["forgotten"] - counts["gained"]) / counts["examples"]
    return counts.reset_index()


def forgotten_by(items: pd.DataFrame) -> pd.DataFrame:
    """For each example that was right before: which share of the runs forgot it.

    Returns:
        One row per such example, the most forgotten first: item, label, runs (how many), forgotten
        (how many of them end wrong), share (of the runs, in [0, 1]), instead (the wrong class that is
        predicted most often; missing if none).

    Raises:
        ValueError: a column is missing, or the runs do not start from the same answers.
    """
    _require(items)
    if (items.groupby("item")["before"].nunique() > 1).any():
        raise ValueError("the runs start from different answers: they belong to different pretrained models")
    known = items[items["before"] == items["label"]]
    wrong = known[known["after"] != known["label"]]
    groups = known.groupby("item")
    table = pd.DataFrame({"label": groups["label"].first(), "runs": groups.size()})
    table["forgotten"] = wrong.groupby("item").size().reindex(table.index, fill_value=0)
    table["share"] = table["forgotten"] / table["runs"]
    table["instead"] = wrong.groupby("item")["after"].agg(lambda a: a.mode()[0]).reindex(table.index)
    table["instead"] = table["instead"].astype("Int64")
    return table.sort_values(["share", "item"], ascending=[False, True], kind="stable").reset_index()


def confusion(items: pd.DataFrame, classes: int, when: str = "after") -> np.ndarray:
    """How often each class (row) was taken for each class (column), over all runs: (classes, classes) counts.

    Args:
        items: of one run, or of several, whose counts are summed.
        classes: how many there are.
        when: "before" or "after" training.

    Raises:
        ValueError: a column is missing, another ``when``, or a class outside ``classes``.
    """
    _require(items)
    if when not in ("before", "after"):
        raise ValueError(f"when must be 'before' or 'after', not {when!r}")
    label, predicted = items["label"].to_numpy(), items[when].to_numpy()
    for found in (label, predicted):
        if len(found) and not (found.min() >= 0 and found.max() < classes):
            raise ValueError(f"expected classes from 0 to {classes - 1}, not {found.min()} to {found.max()}")
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (label, predicted), 1)
    return counts


def _require(items: pd.DataFrame) -> None:
    if missing := [column for column in COLUMNS if column not in items]:
        raise ValueError(
            f"this is no table of answers: it lacks {', '.join(missing)}; use ll.answers(store, table)"
        )
