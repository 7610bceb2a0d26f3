"""What inside a model predicts how much it forgot: measures of drift against forgetting, run by run."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.isotonic import IsotonicRegression

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import whole_number
from lora_lens.forgetting.fair_comparison import relative_updates
from lora_lens.forgetting.run_groups import DRIFTS, WINDOW, named_interval, resampled_interval, window_columns

WEIGHTED = (
    "inside", "above", "below", "mixed", "outside", "left_inside", "right_inside", "diagonal",
)  # shares of ||dW||^2, so the layers' mean is weighted by it  # fmt: skip
MEANS = (
    "effective_rank", "stable_rank", "stretch", "rotation", "turned_left", "turned_right",
    "first_left", "first_right", "degrees_left", "degrees_right",
)  # fmt: skip
OUTSIDE = ("lr", "position", "accuracy")  # known without looking inside: what a measure must beat


def by_run(drifts: pd.DataFrame) -> pd.DataFrame:
    """One row per run instead of one per layer.

    Args:
        drifts: from :meth:`lora_lens.Sweep.drifts`.

    Returns:
        Columns: run; update, the root of the sum over layers of ||dW||_F^2; relative, that over the same
        of the weights (see :func:`lora_lens.forgetting.relative_updates`); inside, above, below, mixed,
        outside, left_inside, right_inside and diagonal, means over layers weighted by ||dW||_F^2, so
        that they are the shares of the whole update (diagonal nearly so: it is a share of ||C||_F^2);
        effective_rank, stable_rank, stretch, rotation, turned, first and degrees (left and right), plain
        means over layers; intruders, their sum; relative_change, cka_loss = 1 - cka and neighbours_lost
        = 1 - neighbours, of the features of the retained task's test examples.
        What a method has no value for is NaN.

    Raises:
        ValueError: a column is missing.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> drifts = pd.DataFrame({"run": ["a", "a"], "update": [3.0, 4.0], "norm": [6.0, 8.0]})
        >>> drifts = drifts.assign(relative=0.5, inside=[1.0, 0.5], cka=0.9, relative_change=0.2)
        >>> ll.forgetting.by_run(drifts).round(2)
          run  update  relative  inside  relative_change  cka_loss
        0   a     5.0       0.5    0.68              0.2       0.1
    """
    drifts = checked(drifts, ["run", "update", "relative", "cka", "relative_change"], *DRIFTS)
    groups = drifts.groupby("run", sort=False)
    squares = drifts["update"] ** 2
    table = pd.DataFrame({"update": np.sqrt(squares.groupby(drifts["run"], sort=False).sum())})
    table["relative"] = relative_updates(drifts)
    for name in (n for n in WEIGHTED if n in drifts):
        weight = squares.where(drifts[name].notna())
        sums = pd.DataFrame({"part": drifts[name] * weight, "whole": weight}).groupby(drifts["run"]).sum()
        table[name] = sums["part"] / sums["whole"]
    for name in (n for n in MEANS if n in drifts):
        table[name] = groups[name].mean()
    if "intruders" in drifts:
        table["intruders"] = groups["intruders"].sum(min_count=1)
    table["relative_change"] = groups["relative_change"].first()
    table["cka_loss"] = 1 - groups["cka"].first()
    if "neighbours" in drifts:
        table["neighbours_lost"] = 1 - groups["neighbours"].first()
    return table.rename_axis("run").reset_index()


def predict_forgetting(
    table: pd.DataFrame, drifts: pd.DataFrame, *, folds: int = 10, resamples: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Which measure of drift predicts best how much a run forgot.

    Each measure alone predicts forgetting by the best monotone function of it (isotonic regression, rising
    or falling as the training part says; constant beyond its ends). It is judged on runs that it was not
    fitted to: a fold holds out all seeds of some windows at some rates at once. Seeds of one window and
    rate are nearly copies of each other, and with one of them in the training part a measure could look
    good by recognizing *which* window and rate it was. Learning rate, position and accuracy on the new task,
    which are known without looking inside, are in the same table: what to beat. A monotone function
    misses a U-shape over position, so read that row as the rise or fall alone.

    Three things to know. The squares are dominated by the rates that forget much; spearman_within gives
    every rate the same weight. Features are taken of the retained task's test examples, some of those
    that forgetting is counted on, just before the classifier, so their change is near to forgetting
    itself; what is measured in the weights needs no examples. And shares and position are judged on fewer
    runs than the rest where the table has other methods than windows: pass the windows alone to judge all
    on the same runs.

    Args:
        table: from :func:`lora_lens.sweep`; runs without a drift are left out.
        drifts: from :meth:`lora_lens.Sweep.drifts`.
        folds: of the cross-validation, at least 2; one for each window and rate where there are fewer.
        resamples: how many, for the intervals.
        seed: of the intervals and of the folds.

    Returns:
        One row per measure, the best first. Columns: measure; runs (that have a value for it); spearman (rank
        correlation over runs) with spearman_low and spearman_high, its 95% interval when pairs of window
        and rate are resampled, all their seeds together; spearman_within (the mean over learning rates of
        the rank correlation among the runs at one rate: what is left once the rate is known); r2
        (cross-validated, 1 - residual / variance of the held-out runs' forgetting; 0 for the mean of the
        training part, negative for worse) with r2_low and r2_high, its 95% interval when the windows and
        rates that are predicted are resampled, with the fits and folds as they are, so read it as a lower
        bound of the uncertainty.

    Raises:
        ValueError: a column is missing, there are fewer than 3 windows and rates with a drift, all runs
            forgot the same, or ``folds`` or ``resamples`` is out of range.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"run": list("abcdef"), "lr": [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3]})
        >>> runs["forgetting"], runs["accuracy"] = 50 * runs["lr"], [0.9, 0.8, 0.9, 0.8, 0.9, 0.8]
        >>> runs = runs.assign(method="window", rank=8, position=0.5, start=None, seed=0)
        >>> drifts = pd.DataFrame({"run": list("abcdef"), "update": 9 * runs["lr"], "norm": 1.0, "cka": 0.9})
        >>> drifts = drifts.assign(relative=drifts["update"], relative_change=0.1)
        >>> found = ll.forgetting.predict_forgetting(runs, drifts, resamples=20).set_index("measure")["r2"]
        >>> bool(found["relative"] > 0.5 > found["accuracy"])
        True
    """
    folds = whole_number(folds, "folds", least=2)  # one part is fitted, the other predicted
    table = checked(table, ["run", *WINDOW, *OUTSIDE, "forgetting"], once=True)
    columns = list(dict.fromkeys(["run", *window_columns(table), *OUTSIDE, "forgetting"]))
    measured = by_run(drifts)
    runs = table[columns].merge(measured, on="run")
    cell = runs.groupby([*window_columns(table), "lr"], dropna=False).ngroup().to_numpy()
    if len(np.unique(cell)) < 3:
        raise InputError("a prediction needs runs of at least 3 windows and rates with their drift")
    if runs["forgetting"].nunique() < 2:
        raise InputError("all runs forgot the same, so there is nothing to predict; add rates or windows")
    rows = []
    for measure in [*measured.columns.drop("run"), *OUTSIDE]:
        known = np.isfinite(runs[[measure, "forgetting"]].to_numpy(float)).all(1)
        x, y = runs.loc[known, measure].to_numpy(float), runs.loc[known, "forgetting"].to_numpy(float)
        if len(np.unique(cell[known])) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
            continue
        row = {"measure": measure, "runs": len(x)}
        row |= _rank_correlations(x, y, cell[known], resamples, seed)
        row["spearman_within"] = _within(x, y, runs.loc[known, "lr"].to_numpy())
        rows.append(row | _held_out_r2(x, y, cell[known], folds, resamples, seed))
    return pd.DataFrame(rows).sort_values("r2", ascending=False, kind="stable", ignore_index=True)


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def _within(x: np.ndarray, y: np.ndarray, rates: np.ndarray) -> float:
    """The mean rank correlation at one rate; NaN where no rate has different values of both."""
    parts = [(x[rates == rate], y[rates == rate]) for rate in np.unique(rates)]
    found = [_spearman(a, b) for a, b in parts if np.ptp(a) > 0 and np.ptp(b) > 0]
    return float(np.mean(found)) if found else float("nan")


def _held_out_r2(
    x: np.ndarray, y: np.ndarray, cell: np.ndarray, folds: int, resamples: int, seed: int
) -> dict[str, float]:
    cells, of_cell = np.unique(cell, return_inverse=True)
    order = np.random.default_rng(seed).permutation(cells)
    predicted, plain = np.empty_like(y), np.empty_like(y)
    for part in np.array_split(order, min(folds, len(cells))):
        held = np.isin(cell, part)
        predicted[held] = _monotone(x[~held], y[~held], x[held])
        plain[held] = y[~held].mean()
    residual, whole = (np.bincount(of_cell, np.square(y - guess)) for guess in (predicted, plain))

    def r2(draws: np.ndarray) -> np.ndarray:
        wholes = whole[draws].sum(1)
        some = wholes > 0  # not only windows and rates that forgot exactly what the others did
        return 1 - residual[draws].sum(1)[some] / wholes[some]

    found = float(1 - residual.sum() / whole.sum())
    return {"r2": found} | named_interval("r2", resampled_interval(r2, len(cells), resamples, seed))


def _monotone(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Isotonic regression of y on x, at new places; falling where the rank correlation is negative."""
    rising = bool(np.ptp(x) == 0 or _spearman(x, y) >= 0)
    return IsotonicRegression(increasing=rising, out_of_bounds="clip").fit(x, y).predict(new)


def _rank_correlations(
    x: np.ndarray, y: np.ndarray, cell: np.ndarray, resamples: int, seed: int
) -> dict[str, float]:
    cells = [np.flatnonzero(cell == c) for c in np.unique(cell)]

    def spearmans(draws: np.ndarray) -> list[float]:
        found = [np.concatenate([cells[i] for i in draw]) for draw in draws]
        return [_spearman(x[rows], y[rows]) for rows in found if np.ptp(x[rows]) > 0 and np.ptp(y[rows]) > 0]

    found = {"spearman": _spearman(x, y)}
    return found | named_interval("spearman", resampled_interval(spearmans, len(cells), resamples, seed))
