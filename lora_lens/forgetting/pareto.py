"""Both tasks at once: which trade-offs a window offers, and which window beats which.

All functions are pure and take the table of :func:`lora_lens.sweep`, as those of
:mod:`lora_lens.forgetting.fair_comparison`.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lora_lens._base.errors import InputError
from lora_lens._base.validate import numbers
from lora_lens.forgetting.aggregate import pareto_front
from lora_lens.forgetting.run_groups import (
    groups,
    mean_and_interval,
    named_interval,
    seeds_by_rate,
    student_interval,
)


def dominance(table: pd.DataFrame) -> pd.DataFrame:
    """How often one window beats another on both tasks at once, at equal seed and learning rate.

    Args:
        table: from :func:`lora_lens.sweep`.

    Returns:
        One row per pair of windows. Columns: method, rank, position, start with the suffix ``_a`` for the
        one and ``_b`` for the other; pairs (seeds and rates that both were run at) and seeds among them;
        a_beats_b (share of pairs in which a is higher in both accuracy and retained_accuracy; the mean
        over seeds of each seed's share) and b_beats_a, each with ``_low`` and ``_high``, its 95% interval
        over seeds. The two need not sum to 1: the rest is a trade-off or a tie. Without pairs the shares
        are NaN.

    Raises:
        ValueError: a column is missing, two runs share window, rate and seed, or there is one window only.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"position": [0.0, 0.0, 0.5, 0.5], "seed": [0, 1, 0, 1]})
        >>> runs = runs.assign(method="window", rank=8, start=None, lr=5e-3)
        >>> runs["accuracy"], runs["retained_accuracy"] = [0.8, 0.9, 0.9, 0.8], [0.6, 0.7, 0.8, 0.9]
        >>> found = ll.forgetting.dominance(runs)
        >>> found[["position_a", "position_b", "pairs", "a_beats_b", "b_beats_a"]]
           position_a  position_b  pairs  a_beats_b  b_beats_a
        0         0.0         0.5      2        0.0        0.5
    """
    both = ["accuracy", "retained_accuracy"]
    found = [(names, group.set_index(["seed", "lr"])[both]) for names, group in groups(table, both)]
    if len(found) < 2:
        raise InputError(f"a comparison needs at least two windows or methods, not {len(found)}")
    rows = []
    for (names_a, a), (names_b, b) in combinations(found, 2):
        shared = a.index.intersection(b.index)
        difference = a.loc[shared] - b.loc[shared]
        row = {f"{k}_a": v for k, v in names_a.items()} | {f"{k}_b": v for k, v in names_b.items()}
        row |= {"pairs": len(shared), "seeds": shared.get_level_values("seed").nunique()}
        for name, sign in (("a_beats_b", 1), ("b_beats_a", -1)):
            wins = (sign * difference > 0).all(axis=1).astype(float)
            row |= mean_and_interval(name, wins.groupby(level="seed").mean())
        rows.append(row)
    return pd.DataFrame(rows)


def hypervolume(points: ArrayLike, reference: tuple[float, float] = (0, 0)) -> float:
    """The area between ``reference`` and the front of ``points`` (n, 2), larger being better in both.

    Zitzler and Thiele 1998, "Multiobjective optimization using evolutionary algorithms - a comparative
    case study", where it is called the size of the space covered; exact, by sorting. Points that are not
    above ``reference`` in both, or have a missing value, cover nothing. It grows with the number of points,
    so compare only sets of equal size.

    Args:
        points: pairs of shares in [0, 1] (or any two scores), shape (n, 2).
        reference: the pair that is worth nothing.

    Raises:
        ValueError: ``points`` are not pairs.

    Example:
        >>> import lora_lens as ll
        >>> ll.forgetting.hypervolume([[1.0, 0.5], [0.5, 1.0]])
        0.75
    """
    points, reference = numbers(points, "points"), numbers(reference, "reference")
    if reference.shape != (2,):
        raise InputError(f"reference must be a pair of accuracies, not of shape {reference.shape}")
    if points.size == 0:
        return 0.0
    if points.ndim != 2 or points.shape[1] != 2:
        raise InputError(f"points must be pairs, of shape (n, 2), not {points.shape}")
    above = points - reference
    above = above[(above > 0).all(1)]  # also drops the missing
    above = above[np.argsort(-above[:, 0], kind="stable")]
    heights = np.maximum.accumulate(above[:, 1])
    steps = np.diff(heights, prepend=0.0)  # what each point adds above those further right
    return float((above[:, 0] * steps).sum())


def front_by_method(table: pd.DataFrame, reference: tuple[float, float] = (0.0, 0.0)) -> pd.DataFrame:
    """The trade-off that each window offers over its learning rates, and the area that it covers.

    Args:
        table: from :func:`lora_lens.sweep`.
        reference: accuracies on the new and the retained task that are worth nothing, such as those of
            guessing.

    Returns:
        One row per window. Columns: method, rank, position, start; seeds, rates; on_front (how many of
        its rates no other of its rates beats, by means over seeds); hypervolume (of these means, see
        :func:`hypervolume`) with hypervolume_low and hypervolume_high, its 95% interval over the seeds that
        were run at every rate, from what leaving each of them out does (Tukey's jackknife). More
        rates cover more, so windows compare only where ``rates`` is equal.

    Raises:
        ValueError: a column is missing, two runs share window, rate and seed, or no seed of a window was
            run at all its rates.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"lr": [1e-3, 1e-2], "accuracy": [0.5, 1.0], "retained_accuracy": [1.0, 0.5]})
        >>> runs = runs.assign(method="window", rank=8, position=0.5, start=None, seed=0)
        >>> ll.forgetting.front_by_method(runs)[["position", "seeds", "rates", "on_front", "hypervolume"]]
           position  seeds  rates  on_front  hypervolume
        0       0.5      1      2         2         0.75
    """
    both, rows = ["accuracy", "retained_accuracy"], []
    for names, group in groups(table, both):
        scores = np.stack([seeds_by_rate(group, score, names).to_numpy(float) for score in both], axis=-1)
        means = scores.mean(0)  # (rates, 2), from (seeds, rates, 2)
        row = {"seeds": len(scores), "rates": len(means)}
        row["on_front"] = int(pareto_front(pd.DataFrame(means, columns=both)).sum())
        row["hypervolume"] = hypervolume(means, reference)
        row |= named_interval("hypervolume", _jackknifed(scores, reference, row["hypervolume"]))
        rows.append(names | row)
    return pd.DataFrame(rows)


def _jackknifed(scores: np.ndarray, reference: tuple[float, float], area: float) -> tuple[float, float]:
    """The interval around ``area`` of the mean scores, (seeds, rates, 2): Student's, of the pseudo-values.

    Tukey 1958, "Bias and confidence in not-quite large samples".
    """
    n = len(scores)
    if n == 1:
        return float("nan"), float("nan")
    without = np.array([hypervolume(np.delete(scores, i, axis=0).mean(0), reference) for i in range(n)])
    return student_interval(area + (n - 1) * (without.mean() - without))
