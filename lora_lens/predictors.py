"""What inside a model tells how much it forgot: measures of drift against measured forgetting, run by run."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

from lora_lens.tradeoffs import relative_updates, require_columns, window_columns

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
        drifts: from :func:`lora_lens.drifts`.

    Returns:
        Columns: run; update, the root of the sum over layers of ||dW||_F^2; relative, that over the same
        of the weights (see :func:`lora_lens.tradeoffs.relative_updates`); inside, above, below, mixed,
        outside, left_inside, right_inside and diagonal, means over layers weighted by ||dW||_F^2;
        effective_rank, stable_rank, stretch, rotation, turned, first and degrees (left and right), plain
        means over layers; intruders, their sum; relative_change and cka_loss = 1 - cka, of the features.
        What a method has no value for is NaN.

    Raises:
        ValueError: a column is missing.
    """
    require_columns(drifts, ["run", "update", "relative", "cka", "relative_change"])
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
    return table.rename_axis("run").reset_index()


def predict_forgetting(
    table: pd.DataFrame, drifts: pd.DataFrame, *, folds: int = 10, resamples: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Which measure of drift tells best how much a run forgot.

    Each measure alone predicts forgetting by the best monotone function of it (isotonic regression, rising
    or falling as the training part says; constant beyond its ends). It is judged on runs that it was not
    fitted to: a fold holds out all seeds of some windows at some rates at once. Seeds of one window and
    rate are nearly copies of each other, and with one of them in the training part a measure could look
    good by telling *which* window and rate it was. Learning rate, position and accuracy on the new task,
    which are known without looking inside, stand in the same table: what to beat.

    Args:
        table: from :func:`lora_lens.sweep`; runs without a drift are left out.
        drifts: from :func:`lora_lens.drifts`.
        folds: of the cross-validation, at most as many as there are windows and rates.
        resamples, seed: of the interval, and the seed also of the folds.

    Returns:
        One row per measure, the best first. Columns: measure; runs (that have a value for it); spearman (rank
        correlation over runs) with spearman_low and spearman_high, its 95% interval when pairs of window
        and rate are resampled, all their seeds together; spearman_within (the mean over learning rates of
        the rank correlation among the runs at one rate: what is left once the rate is known); r2 (cross-validated, 1 - residual / variance of
        the held-out runs' forgetting; 0 for the mean of the training part, negative for worse).

    Raises:
        ValueError: a column is missing, there are fewer than 3 windows and rates with a drift, or all runs
            forgot the same.
    """
    require_columns(table, ["run", "method", "rank", "position", "start", "lr", "forgetting", "accuracy"])
    runs = table.merge(by_run(drifts), on="run")
    cell = runs.groupby([*window_columns(table), "lr"], dropna=False).ngroup().to_numpy()
    if len(np.unique(cell)) < 3:
        raise ValueError("a prediction needs runs of at least 3 windows and rates with their drift")
    if runs["forgetting"].nunique() < 2:
        raise ValueError("all runs forgot the same, so there is nothing to predict; add rates or windows")
    measures = [c for c in by_run(drifts).columns if c != "run"] + list(OUTSIDE)
    rows = []
    for measure in measures:
        known = runs[measure].notna().to_numpy() & runs["forgetting"].notna().to_numpy()
        x, y = runs.loc[known, measure].to_numpy(float), runs.loc[known, "forgetting"].to_numpy(float)
        if len(np.unique(cell[known])) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
            continue
        low, high = _spearman_interval(x, y, cell[known], resamples, seed)
        rows.append(
            {
                "measure": measure,
                "runs": len(x),
                "spearman": float(spearmanr(x, y).statistic),
                "spearman_low": low,
                "spearman_high": high,
                "spearman_within": _within(x, y, runs.loc[known, "lr"].to_numpy()),
                "r2": _held_out_r2(x, y, cell[known], folds, seed),
            }
        )
    return pd.DataFrame(rows).sort_values("r2", ascending=False, kind="stable", ignore_index=True)


def _within(x: np.ndarray, y: np.ndarray, rates: np.ndarray) -> float:
    """The mean rank correlation at one rate; NaN where no rate has different values of both."""
    parts = [(x[rates == rate], y[rates == rate]) for rate in np.unique(rates)]
    found = [spearmanr(a, b).statistic for a, b in parts if np.ptp(a) > 0 and np.ptp(b) > 0]
    return float(np.mean(found)) if found else float("nan")


def _held_out_r2(x: np.ndarray, y: np.ndarray, cell: np.ndarray, folds: int, seed: int) -> float:
    cells = np.unique(cell)
    order = np.random.default_rng(seed).permutation(cells)
    predicted, plain = np.empty_like(y), np.empty_like(y)
    for part in np.array_split(order, min(folds, len(cells))):
        held = np.isin(cell, part)
        predicted[held] = _monotone(x[~held], y[~held], x[held])
        plain[held] = y[~held].mean()
    return float(1 - np.square(y - predicted).sum() / np.square(y - plain).sum())


def _monotone(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Isotonic regression of y on x, at new places; falling where the rank correlation is negative."""
    places, where = np.unique(x, return_inverse=True)
    counts = np.bincount(where)
    means = np.bincount(where, y) / counts
    rising = len(places) < 2 or spearmanr(x, y).statistic >= 0
    fitted = isotonic_regression(means, weights=counts, increasing=bool(rising)).x
    return np.interp(new, places, fitted)


def _spearman_interval(
    x: np.ndarray, y: np.ndarray, cell: np.ndarray, resamples: int, seed: int
) -> tuple[float, float]:
    random = np.random.default_rng(seed)
    cells = [np.flatnonzero(cell == c) for c in np.unique(cell)]
    found = []
    for _ in range(resamples):
        rows = np.concatenate([cells[i] for i in random.integers(len(cells), size=len(cells))])
        if np.ptp(x[rows]) > 0 and np.ptp(y[rows]) > 0:
            found.append(spearmanr(x[rows], y[rows]).statistic)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
