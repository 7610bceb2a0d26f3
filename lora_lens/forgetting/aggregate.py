"""What was gained and what was lost: pure functions on arrays and tables."""

from __future__ import annotations

import pandas as pd

from lora_lens._base.schema import checked


def pareto_front(table: pd.DataFrame, x: str = "accuracy", y: str = "retained_accuracy") -> pd.Series:
    """Which rows no other row beats: True where none is as good in both columns and better in one.

    Larger is better in both. Rows with a missing value are never on the front.
    """
    rows = checked(table, [x, y], empty=True, keep_failed=True)
    points = pd.DataFrame({"x": rows[x].to_numpy(float), "y": rows[y].to_numpy(float)}).dropna()
    highest = points.groupby("x")["y"].max().sort_index(ascending=False)  # of each x
    to_the_right = highest.cummax().shift()  # the highest of all larger x; none for the largest
    by_x = points["x"].map
    front = (points["y"] == by_x(highest)) & ~(points["y"] <= by_x(to_the_right))
    return pd.Series(front.reindex(range(len(rows)), fill_value=False).to_numpy(), rows.index, name="pareto")


def seed_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method (and variant, if the table has that column) and learning rate: means over seeds.

    Columns: method, rank, position, start, lr, seeds (how many have an accuracy), accuracy,
    retained_accuracy, forgetting (means), and each of the three with the
    suffix ``_std`` (sample standard deviation over seeds; NaN for one seed).
    """
    scores = ["accuracy", "retained_accuracy", "forgetting"]
    table = checked(table, ["method", "lr", *scores], once=True)
    keys = [key for key in ("method", "variant", "rank", "position", "start", "lr") if key in table]
    groups = table.groupby(keys, dropna=False, sort=False)
    means = groups[scores].mean()
    spread = groups[scores].std().add_suffix("_std")
    return pd.concat([groups["accuracy"].count().rename("seeds"), means, spread], axis=1).reset_index()
