"""What was gained and what was lost: pure functions on arrays and tables."""

from __future__ import annotations

import pandas as pd

from lora_lens._base.schema import checked


def pareto_front(table: pd.DataFrame, x: str = "accuracy", y: str = "retained_accuracy") -> pd.Series:
    """Which rows no other row beats: True where none is as good in both columns and better in one.

    Larger is better in both. Rows with a missing value are never on the front.

    Args:
        table: such as that of :func:`lora_lens.sweep`, one row per point.
        x: the name of one column of numbers.
        y: the name of the other.

    Returns:
        A Series of bool with the table's index.

    Raises:
        ValueError: a column is missing or holds no numbers.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> table = pd.DataFrame({"accuracy": [0.9, 0.8, 0.7], "retained_accuracy": [0.5, 0.7, 0.6]})
        >>> ll.forgetting.pareto_front(table).tolist()
        [True, True, False]
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

    Args:
        table: from :func:`lora_lens.sweep`.

    Returns:
        Columns: method, rank, position, start, lr, seeds (how many have an accuracy), accuracy,
        retained_accuracy, forgetting (means), and each of the three with the suffix ``_std`` (sample
        standard deviation over seeds; NaN for one seed).

    Raises:
        ValueError: a column is missing, or a run is in the table twice.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"position": [0.0, 0.0, 0.5, 0.5], "seed": [0, 1, 0, 1]})
        >>> runs = runs.assign(method="window", rank=8, start=None, lr=5e-3)
        >>> runs["accuracy"], runs["retained_accuracy"] = [0.90, 0.92, 0.88, 0.90], [0.6, 0.7, 0.8, 0.84]
        >>> runs["forgetting"] = 0.9 - runs["retained_accuracy"]
        >>> ll.forgetting.seed_means(runs)[["position", "seeds", "forgetting", "forgetting_std"]].round(3)
           position  seeds  forgetting  forgetting_std
        0       0.0      2        0.25           0.071
        1       0.5      2        0.08           0.028
    """
    scores = ["accuracy", "retained_accuracy", "forgetting"]
    table = checked(table, ["method", "lr", *scores], once=True)
    keys = [key for key in ("method", "variant", "rank", "position", "start", "lr") if key in table]
    groups = table.groupby(keys, dropna=False, sort=False)
    means = groups[scores].mean()
    spread = groups[scores].std().add_suffix("_std")
    return pd.concat([groups["accuracy"].count().rename("seeds"), means, spread], axis=1).reset_index()
