"""Comparisons that hold: forgetting at equal learning, and how sure the seeds let us be.

A method that learns less looks as if it forgot less. So forgetting is compared at equal learning rates,
at every method's own best rate, and where the runs pass the same accuracy on the new task; and each mean
comes with the number of seeds and an interval. All functions are pure and take the table of
:func:`lora_lens.sweep`, one row per run. A window is a row's method, rank, position and start (and
variant, where the table has one); baselines are told apart in the same way. Accuracies and forgetting are
shares in [0, 1], rates are those of the grid.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import choice, number, numbers, share
from lora_lens.forgetting.run_groups import (
    DRIFTS,
    LEVEL,
    WINDOW,
    at_rates_of_others,
    groups,
    mean_and_interval,
    seeds_by_rate,
    student_interval,
    window_columns,
)

SCORES = ["accuracy", "forgetting"]


def seed_interval(values: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """(low, high) of the mean of ``values``, one per seed: mean -+ t s / sqrt(n).

    Student 1908, "The probable error of a mean". It is what all intervals over seeds in this package are,
    since it covers the truth as often as it says with 3 seeds, too, where bootstraps are far too narrow;
    ``docs/measures.md`` has the simulation. One value has no interval: (NaN, NaN).

    Args:
        values: one number per seed, or one difference per pair, shape (n,).
        level: the interval's, in (0, 1).

    Raises:
        ValueError: no values or a missing one, or ``level`` out of range.

    Example:
        >>> import lora_lens as ll
        >>> low, high = ll.forgetting.seed_interval([0.30, 0.20, 0.25])
        >>> round(low, 3), round(high, 3)
        (0.126, 0.374)
    """
    values = numbers(values, "values").ravel()
    if values.size == 0 or np.isnan(values).any():
        raise InputError(f"an interval needs values, none of them missing, not {values}; drop those runs")
    return student_interval(values, level=number(level, "level", above=0, below=1))


def at_equal_rate(table: pd.DataFrame) -> pd.DataFrame:
    """What every window gained and lost at each learning rate, all at the same number of steps.

    Args:
        table: from :func:`lora_lens.sweep`.

    Returns:
        One row per window and rate. Columns: method, rank, position, start, lr; seeds (those with both
        scores: a run that failed has none) and diverged (how many of them did); accuracy and forgetting
        (means over seeds), and each of the two with the suffixes ``_low`` and ``_high``, its 95% interval
        (see :func:`seed_interval`).

    Raises:
        ValueError: a column is missing, or two runs share window, rate and seed.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"position": [0.0, 0.0, 0.5, 0.5], "seed": [0, 1, 0, 1]})
        >>> runs = runs.assign(method="window", rank=8, start=None, lr=5e-3)
        >>> runs["accuracy"], runs["forgetting"] = [0.90, 0.92, 0.88, 0.90], [0.30, 0.20, 0.10, 0.06]
        >>> fair = ll.forgetting.at_equal_rate(runs.assign(diverged=False))
        >>> fair[["position", "seeds", "accuracy", "forgetting", "forgetting_low"]].round(2)
           position  seeds  accuracy  forgetting  forgetting_low
        0       0.0      2      0.91        0.25           -0.39
        1       0.5      2      0.89        0.08           -0.17
    """
    runs = groups(table, [*SCORES, "diverged"], by_rate=True)
    return pd.DataFrame([{**names, **_summary(group)} for names, group in runs])


def at_own_best_rate(table: pd.DataFrame, score: str = "accuracy") -> pd.DataFrame:
    """What every window gained and lost at the learning rate that suits it best.

    The best rate has the highest mean of ``score`` over seeds; of equals, the lowest. The best of several
    noisy means is higher than it ought to be, the more so the more rates were tried. So each seed is judged
    at the rate that is best by the *other* seeds, which may be another one for one seed than for the rest.
    Only the seeds that were run at every rate of the window take part.

    Args:
        table: from :func:`lora_lens.sweep`.
        score: accuracy or retained_accuracy.

    Returns:
        One row per window with the columns of :func:`at_equal_rate` (lr is the best rate by all seeds, the
        one to use), and rates (how many it was chosen from) and selected_on ("other seeds", or "same seeds"
        where there is one alone: then the score leans upwards).

    Raises:
        ValueError: ``score`` is not accuracy or retained_accuracy, a column is missing, two runs share
            window, rate and seed, or no seed of a window was run at all its rates.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"position": [0.0, 0.0, 0.5, 0.5], "lr": [1e-3, 1e-2, 1e-3, 1e-2]})
        >>> runs = runs.assign(method="window", rank=8, start=None, seed=0, diverged=False)
        >>> runs["accuracy"], runs["forgetting"] = [0.9, 0.5, 0.6, 0.8], [0.3, 0.6, 0.0, 0.1]
        >>> ll.forgetting.at_own_best_rate(runs)[["position", "lr", "forgetting", "rates", "selected_on"]]
           position     lr  forgetting  rates selected_on
        0       0.0  0.001         0.3      2  same seeds
        1       0.5  0.010         0.1      2  same seeds
    """
    score = choice(score, "score", ("accuracy", "retained_accuracy"))
    rows = []
    for names, group in groups(table, [score, *SCORES, "diverged"]):
        by_seed = seeds_by_rate(group, score, names)
        places, best = at_rates_of_others(by_seed)
        rates = pd.Series(by_seed.columns[places], by_seed.index)
        chosen = group[group["lr"] == group["seed"].map(rates)]
        settled = group[(group["lr"] == by_seed.columns[best]) & group["seed"].isin(rates.index)]
        row = {"lr": by_seed.columns[best], **_summary(chosen, settled), "rates": by_seed.shape[1]}
        row["selected_on"] = "other seeds" if len(by_seed) > 1 else "same seeds"
        rows.append({**names, **row})
    return pd.DataFrame(rows)


def at_matched_accuracy(table: pd.DataFrame, curves: pd.DataFrame, accuracy: float) -> pd.DataFrame:
    """What the runs had forgotten when they first reached ``accuracy`` on the new task.

    Along a run's evaluations the accuracy so far (its running maximum) is joined by straight lines, and
    so is the retained accuracy; the first crossing is read off both. A run whose first evaluation is good
    enough already is read there. With ``most_reached`` the rows reduce to one per window:
    ``result[result["most_reached"]]``. The rate is picked by reach alone, never by forgetting, so the
    forgetting at it is not flattered by the choice.

    Args:
        table: from :func:`lora_lens.sweep`.
        curves: from :meth:`lora_lens.Sweep.curves` (run, step, accuracy, retained_accuracy).
        accuracy: the accuracy to compare at, in [0, 1].

    Returns:
        One row per window and rate. Columns: method, rank, position, start, lr; seeds, and reached (how
        many of them got there); step and forgetting (means over the runs that got there, NaN without
        any), and each of the two with ``_low`` and ``_high``, its 95% interval; most_reached (True for
        the rate of each window with the largest share of runs that got there; of equals, the lowest).
        Where reached is less than seeds, the means are of the better runs only: compare with care.

    Raises:
        ValueError: ``accuracy`` is out of range, a column is missing, a run has no curve, or two runs
            share window, rate and seed.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"run": ["a", "b"], "seed": [0, 1]}).assign(retained_before=0.9)
        >>> runs = runs.assign(method="window", rank=8, position=0.5, start=None, lr=5e-3)
        >>> curves = pd.DataFrame({"run": ["a", "a", "b", "b"], "step": [0, 100, 0, 100]})
        >>> curves["accuracy"], curves["retained_accuracy"] = [0.1, 0.9, 0.1, 0.5], [0.9, 0.6, 0.9, 0.8]
        >>> found = ll.forgetting.at_matched_accuracy(runs, curves, accuracy=0.5)
        >>> found[["seeds", "reached", "step", "forgetting"]].round(2)
           seeds  reached  step  forgetting
        0      2        2  75.0        0.12
    """
    table = first_crossings(table, curves, accuracy)
    rows = []
    for names, group in groups(table, ["retained_before"], by_rate=True):
        there = group.dropna(subset="step")
        row = {"seeds": len(group), "reached": len(there)}
        row |= mean_and_interval("step", there["step"]) | mean_and_interval("forgetting", there["forgetting"])
        rows.append(names | row)
    result = pd.DataFrame(rows)
    order = result.assign(share=result["reached"] / result["seeds"]).sort_values(
        ["share", "lr"], ascending=[False, True], kind="stable"
    )
    first = ~order.duplicated(window_columns(table))
    return result.assign(most_reached=first.reindex(result.index))


def first_crossings(table: pd.DataFrame, curves: pd.DataFrame, accuracy: float) -> pd.DataFrame:
    """The runs with what :func:`at_matched_accuracy` reads off each: NaN where it never got there.

    Columns step, accuracy, retained_accuracy and forgetting are those of the first crossing.
    """
    accuracy = share(accuracy, "accuracy")
    table = checked(table, [*WINDOW, "lr", "seed", "run", "retained_before"])
    curves = checked(
        curves,
        ["run", "step", "accuracy", "retained_accuracy"],
        "the table of curves",
        "sweep.curves()",
    )
    by_run = dict(tuple(curves[curves["run"].isin(table["run"])].sort_values("step").groupby("run")))
    scored = table.dropna(subset="retained_before")["run"]  # a run that failed has no curve
    without = [run for run in scored if run not in by_run]
    if without:
        raise InputError(
            f"no curves of {len(without)} runs, such as {without[0]}; pass those of the same table"
        )
    found = [_first_crossing(by_run.get(run, curves[:0]), accuracy) for run in table["run"]]
    step, retained = np.array(found, float).T
    return table.assign(
        step=step,
        accuracy=np.where(np.isnan(step), np.nan, accuracy),
        retained_accuracy=retained,
        forgetting=table["retained_before"].to_numpy(float) - retained,
    )


def relative_updates(drifts: pd.DataFrame) -> pd.Series:
    """How far each run moved its adapted weights, by run: sqrt(sum ||dW||_F^2 / sum ||W||_F^2) over layers.

    Args:
        drifts: from :meth:`lora_lens.Sweep.drifts` (run, update, relative, and norm, which stores from
            before it was kept lack: there a layer that a run left unmoved has the norm that it has in the
            other runs, and is left out where none moved it).

    Raises:
        ValueError: a column is missing.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> drifts = pd.DataFrame({"run": ["a", "a"], "update": [3.0, 4.0], "norm": [6.0, 8.0]})
        >>> drifts["relative"] = drifts["update"] / drifts["norm"]
        >>> ll.forgetting.relative_updates(drifts).to_dict()
        {'a': 0.5}
    """
    drifts = checked(drifts, ["run", "update", "relative"], *DRIFTS)
    norms = drifts["norm"] if "norm" in drifts else pd.Series(np.nan, drifts.index)
    norms = norms.fillna(drifts["update"] / drifts["relative"])
    if "layer" in drifts:
        norms = norms.fillna(norms.groupby(drifts["layer"]).transform("max"))
    squares = pd.DataFrame({"update": drifts["update"], "weight": norms}) ** 2
    sums = squares.groupby(drifts["run"], sort=False).sum()
    still = sums["update"] == 0  # whatever its weights are
    return np.sqrt(sums["update"] / sums["weight"].mask(still, 1.0)).rename("update")


def at_matched_update(table: pd.DataFrame, drifts: pd.DataFrame, update: float) -> pd.DataFrame:
    """What every window gained and lost where its runs had moved the weights equally far.

    A method that moves the weights less forgets less, whatever it moves. So for each window and seed the
    runs are put in the order of their relative update (see :func:`relative_updates`), which the learning
    rate drives, and accuracy and forgetting are joined by a curve over its logarithm and read off at
    ``update``. All runs are taken at their end, so the number of steps is the same.

    The curve is the cubic that is monotone wherever the runs are (Fritsch and Carlson 1980, "Monotone
    piecewise cubic interpolation"); through two runs it is a straight line. Straight lines are off more,
    the more so for windows whose runs are far from ``update``, and that alone can look like a U-shape. The
    curve is not free of it: compare close to the updates of measured runs. ``docs/measures.md`` says how far
    off both were on digits.

    Args:
        table: from :func:`lora_lens.sweep`.
        drifts: from :meth:`lora_lens.Sweep.drifts`; runs that diverged or trained no adapter have none
            and are left out.
        update: the relative update to compare at, a share of the weights' norm, such as 0.1.

    Returns:
        One row per window. Columns: method, rank, position, start; seeds, and reached (how many of them
        have runs on both sides of ``update``); accuracy and forgetting (means over these, NaN without
        any), and each of the two with ``_low`` and ``_high``, its 95% interval over seeds.

    Raises:
        ValueError: ``update`` is not positive, a column is missing, no run of the table has a drift, or two
            runs share window, rate and seed.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"run": ["a", "b"], "lr": [1e-3, 4e-3]})
        >>> runs = runs.assign(method="window", rank=8, position=0.5, start=None, seed=0)
        >>> runs["accuracy"], runs["forgetting"] = [0.8, 0.9], [0.1, 0.3]
        >>> drifts = pd.DataFrame({"run": ["a", "b"], "update": [1.0, 4.0], "relative": [0.1, 0.4]})
        >>> fair = ll.forgetting.at_matched_update(runs, drifts, update=0.2)
        >>> fair[["reached", "accuracy", "forgetting"]].round(2)
           reached  accuracy  forgetting
        0        1      0.85         0.2
    """
    update = number(update, "update, a share of the weights' norm,", above=0)
    table = checked(table, [*WINDOW, "lr", "seed", "run", *SCORES])
    drifts = checked(drifts, ["run", "update", "relative"], *DRIFTS)
    if not table["run"].isin(drifts["run"]).any():
        raise InputError("none of the table's runs has a drift; pass sweep.drifts()")
    sized = table.assign(size=table["run"].map(relative_updates(drifts)))
    rows = []
    for names, group in groups(sized, SCORES):
        found = [score_at_size(runs, update, SCORES) for _, runs in group[group["size"] > 0].groupby("seed")]
        found = np.array([f for f in found if f is not None], float).reshape(-1, len(SCORES))
        row = {"seeds": group["seed"].nunique(), "reached": len(found)}
        for score, values in zip(SCORES, found.T, strict=True):
            row |= mean_and_interval(score, values)
        rows.append({**names, **row})
    return pd.DataFrame(rows)


def _first_crossing(curve: pd.DataFrame, accuracy: float) -> tuple[float, float]:
    """(step, retained accuracy) where the accuracy so far first reaches ``accuracy``; NaN if never."""
    steps, retained = curve["step"].to_numpy(float), curve["retained_accuracy"].to_numpy(float)
    so_far = np.maximum.accumulate(curve["accuracy"].to_numpy(float))
    good = np.flatnonzero(so_far >= accuracy)
    if not len(good):
        return float("nan"), float("nan")
    i = good[0]
    if i == 0:
        return steps[0], retained[0]
    share = (accuracy - so_far[i - 1]) / (so_far[i] - so_far[i - 1])
    return tuple(v[i - 1] + share * (v[i] - v[i - 1]) for v in (steps, retained))


def score_at_size(runs: pd.DataFrame, update: float, names: list[str]) -> list[float] | None:
    """The scores of one window and seed at this size of the update; None where its runs do not span it."""
    scores = runs.groupby("size")[names].mean()  # ascending, runs of equal size as one
    sizes = np.log(scores.index.to_numpy(float))
    if not sizes[0] <= np.log(update) <= sizes[-1]:
        return None
    if len(scores) == 1:
        return scores.iloc[0].to_list()
    return PchipInterpolator(sizes, scores.to_numpy(float))(np.log(update)).tolist()


def _summary(group: pd.DataFrame, settled: pd.DataFrame | None = None) -> dict[str, float]:
    """Seeds, how many diverged, and the scores with their intervals, of the runs of one window and rate.

    Args:
        settled: the same seeds' runs at the rate that is best over all of them, where the group's are at
            those that others chose.
    """
    scored = group.dropna(subset=SCORES)
    row = {"seeds": len(scored), "diverged": int(scored["diverged"].sum())}
    for score in SCORES:
        moved = 0.0 if settled is None else settled[score].mean() - scored[score].mean()
        row |= mean_and_interval(score, scored[score], extra=moved**2)
    return row
