"""What was gained and what was lost: pure functions on arrays and tables."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked


def pareto_front(table: pd.DataFrame, x: str = "accuracy", y: str = "retained_accuracy") -> pd.Series:
    """Which rows no other row beats: True where none is as good in both columns and better in one.

    Larger is better in both. Rows with a missing value are never on the front.
    """
    points = checked(table, [x, y], empty=True, keep_failed=True)[[x, y]].to_numpy(float)
    known = np.flatnonzero(~np.isnan(points).any(1))
    order = known[np.lexsort(-points[known].T[::-1])]  # x falls, and among equal x y falls
    xs, ys = points[order].T
    first = np.append(True, xs[1:] != xs[:-1])[: len(xs)]  # of each x, which has its largest y
    group = first.cumsum() - 1
    highest = ys[first]
    to_the_right = np.maximum.accumulate(np.append(-np.inf, highest))[:-1]  # the largest y of all larger x
    front = np.zeros(len(points), bool)
    front[order] = (ys == highest[group]) & ((ys > to_the_right[group]) | (group == 0))
    return pd.Series(front, index=table.index, name="pareto")


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


def ends_and_interior(table: pd.DataFrame) -> pd.DataFrame:
    """The question of the paper, one row per learning rate: do the ends forget more than the interior?

    Columns: lr; first, last (forgetting at position 0, PiSSA, and 1, MiLoRA);
    best (the least forgetting among the windows between), best_position;
    first_excess and last_excess (the ends' forgetting minus the best's), and
    for each its smallest value over seeds, ``*_min``; u_shape (True when both
    excesses are positive for every seed). All are means over seeds unless
    said otherwise. The best window is the one with the least mean, so with
    few seeds the excesses lean upwards; it is a description. The test is
    :func:`lora_lens.forgetting.u_shape_test`.

    Raises:
        ValueError: no window between the ends, an end is missing, or the table
            mixes ranks or variants.
    """
    table = checked(table, ["method", "position", "lr", "seed", "forgetting"])
    swept = table[table["method"] == "window"].dropna(subset=["position"])
    rows = []
    for lr, group in swept.groupby("lr"):
        if group.duplicated(["seed", "position"]).any():
            raise InputError(
                f"several runs share seed and position at learning rate {lr:g}: "
                "give the rows of one rank and variant"
            )
        by_seed = group.pivot_table(index="seed", columns="position", values="forgetting")
        if 0.0 not in by_seed or 1.0 not in by_seed or by_seed.shape[1] < 3:
            raise InputError(
                f"a comparison of ends and interior needs windows at positions 0, 1 and between; "
                f"at learning rate {lr:g} there are {sorted(by_seed.columns)}"
            )
        by_seed = by_seed.dropna()  # or a mean would be over other seeds than its neighbour's
        if by_seed.empty:
            raise InputError(
                f"no seed was run at every position at learning rate {lr:g}; run the missing ones"
            )
        interior = by_seed.drop(columns=[0.0, 1.0])
        best = interior.mean().idxmin()
        first, last = by_seed[0.0] - interior[best], by_seed[1.0] - interior[best]
        rows.append(
            {
                "lr": lr,
                "first": by_seed[0.0].mean(),
                "best": interior[best].mean(),
                "last": by_seed[1.0].mean(),
                "best_position": best,
                "first_excess": first.mean(),
                "first_excess_min": first.min(),
                "last_excess": last.mean(),
                "last_excess_min": last.min(),
                "u_shape": bool(first.min() > 0 and last.min() > 0),
            }
        )
    if not rows:
        raise InputError("the table has no runs of windows placed by position")
    return pd.DataFrame(rows)
