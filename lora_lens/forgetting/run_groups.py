"""What comparisons of runs share: which rows are one window, and what its seeds say together.

Except for :func:`groups`, these functions trust the tables that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit  # as scipy.stats.t has them, but imported in no time

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import resample_count, seed_number

WINDOW = ["method", "rank", "position", "start"]
DRIFTS = ("the table of drifts", "sweep.drifts()")
FEWEST_SEEDS = 4  # for a test
LEVEL = 0.95  # of all intervals, unless a caller says otherwise


def window_columns(table: pd.DataFrame) -> list[str]:
    """The columns that tell windows and methods apart."""
    return [*WINDOW, *(["variant"] if "variant" in table else [])]


def groups(
    table: object, columns: Sequence[str], *, by_rate: bool = False
) -> Iterator[tuple[dict[str, object], pd.DataFrame]]:
    """(what names it, its rows) of each window, or of each window and rate, in the table's order.

    Args:
        table: of a sweep; what it needs beside ``columns`` is checked here.
        columns: that the caller reads.
        by_rate: one group per window and learning rate, named by both.
    """
    table = checked(table, [*WINDOW, "lr", "seed", *columns])
    windows = window_columns(table)
    twice = table.duplicated([*windows, "lr", "seed"])
    if twice.any():
        # Two runs of one seed are not two seeds: their interval would be too narrow.
        row = table[twice].iloc[0]
        raise InputError(
            f"two runs of {named(row[windows].to_dict())} share learning rate {row['lr']:g} "
            f"and seed {row['seed']}; pass the runs of one sweep, with one value of every other setting"
        )
    keys = [*windows, "lr"] if by_rate else windows
    found = table.groupby(keys, dropna=False, sort=False)
    return ((dict(zip(keys, values, strict=True)), group) for values, group in found)


def seeds_by_rate(group: pd.DataFrame, score: str, names: dict[str, object]) -> pd.DataFrame:
    """``score`` (seeds, rates), both ascending, of the seeds that were run at every rate.

    A rate at which every run failed is no rate to choose.
    """
    by_seed = group.pivot(index="seed", columns="lr", values=score).dropna(axis=1, how="all").dropna()
    if by_seed.empty:
        raise InputError(
            f"no seed of {named(names)} was run at all its rates {rates_in(group)}; "
            "run the missing ones or drop a rate"
        )
    return by_seed


def rates_in(table: pd.DataFrame) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(table["lr"].unique()))


def at_rates_of_others(by_seed: pd.DataFrame) -> tuple[np.ndarray, int]:
    """(for each seed the place of the rate with the best mean over the *other* seeds, that over all).

    Of equals it is the lowest. A lone seed has no others, so it chooses for itself.

    Where rates are nearly as good as each other, seeds choose different ones, and Student's t of what each
    has there is too narrow: a seed is high where the others are not, so such values hang together, and all
    of them move if one seed does. What the mean would be if each seed took part in its own choice tells how
    much; its squared distance is the ``extra`` variance to add. ``docs/measures.md`` has the simulation.

    Args:
        by_seed: scores (seeds, rates).
    """
    scores = by_seed.to_numpy(float)
    others = scores.sum(0) - scores if len(scores) > 1 else scores
    return others.round(12).argmax(1), int(scores.sum(0).round(12).argmax())  # equals differ by rounding


def student_interval(*samples: ArrayLike, level: float = LEVEL, extra: float = 0.0) -> tuple[float, float]:
    """(low, high) of a mean by Student's t; NaN where no sample has two values.

    Args:
        samples: values whose mean is wanted, one per seed. Several samples of one mean are its means over
            seeds and over examples, both drawn at random: their variances add up, with the degrees of
            freedom of Welch and Satterthwaite (Satterthwaite 1946, "An approximate distribution of estimates
            of variance components").
        level: of the interval.
        extra: variance of the mean that the samples do not show, see :func:`at_rates_of_others`.
    """
    mean, error, freedom = _student(samples, extra)
    half = error * stdtrit(freedom, (1 + level) / 2)
    return float(mean - half), float(mean + half)


def student_p(values: ArrayLike, extra: float = 0.0) -> float:
    """The two-sided p value of a mean of 0, of the same t; NaN for fewer than two values."""
    mean, error, freedom = _student([values], extra)
    if error == 0:
        return float(mean == 0)
    return float(2 * stdtr(freedom, -abs(mean) / error))


def _student(samples: Sequence[ArrayLike], extra: float) -> tuple[float, float, float]:
    """(mean, its standard error, degrees of freedom)."""
    arrays = [np.asarray(sample, float) for sample in samples]
    spread = [(a.var(ddof=1) / len(a), len(a) - 1) for a in arrays if len(a) > 1]
    if not spread:
        return (float("nan"),) * 3
    variance = sum(v for v, _ in spread)
    freedom = variance**2 / sum(v**2 / n for v, n in spread) if variance else spread[0][1]
    return arrays[0].mean(), np.sqrt(variance + extra), freedom


def resampled_interval(
    statistic: Callable[[np.ndarray], ArrayLike], n: int, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95% interval of what is no mean, by the percentile bootstrap; NaN for fewer than two.

    It is for dozens of cells, and for counts of steps on a grid; of a mean over few seeds it is too narrow,
    see :func:`student_interval`. scipy.stats.bootstrap draws the same and gives the same numbers, at three
    times the cost.

    Args:
        statistic: of places drawn with replacement from n, (resamples, n): its value for each row that
            has one.
    """
    resamples, seed = resample_count(resamples), seed_number(seed)
    if n < 2:
        return float("nan"), float("nan")
    found = statistic(np.random.default_rng(seed).integers(n, size=(resamples, n)))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(found) else (np.nan, np.nan)
    return float(low), float(high)


def mean_and_interval(name: str, values: ArrayLike, extra: float = 0.0) -> dict[str, float]:
    """The mean over seeds and its interval, named; NaN where there are no values."""
    values = np.asarray(values, float)
    mean = float(values.mean()) if len(values) else np.nan
    return {name: mean} | named_interval(name, student_interval(values, extra=extra))


def named_interval(name: str, interval: tuple[float, float]) -> dict[str, float]:
    """An interval by the names of its ends."""
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}


def holm(p: ArrayLike) -> np.ndarray:
    """p values adjusted for their number; NaN are no tests and stay.

    Holm 1979, "A simple sequentially rejective multiple test procedure": of m values in ascending order,
    the i-th (from 0) is multiplied by m - i, and none becomes smaller than the one before or larger than 1.
    """
    p = np.asarray(p, float)
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]  # NaN come last
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1)
    return adjusted


def named(names: dict[str, object]) -> str:
    details = [f"{name} {value}" for name, value in names.items() if name != "method" and pd.notna(value)]
    return f"{names['method']} ({', '.join(details)})" if details else str(names["method"])
