"""What comparisons of runs share: which rows are one window, and what its seeds say together.

Except for :func:`groups`, these functions trust the tables that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import resample_count, seed_number

WINDOW = ["method", "rank", "position", "start"]
DRIFTS = ("the table of drifts", "sweep.drifts()")
FEWEST_SEEDS = 4  # for a test, and for choosing on one half of the seeds


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
            f"two runs of {_named(row[windows].to_dict())} share learning rate {row['lr']:g} "
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
            f"no seed of {_named(names)} was run at all its rates {rates_in(group)}; "
            "run the missing ones or drop a rate"
        )
    return by_seed


def rates_in(table: pd.DataFrame) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(table["lr"].unique()))


def interval(
    statistic: Callable[[np.ndarray], ArrayLike],
    n: int,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of a statistic of n seeds by the percentile bootstrap; NaN for fewer than two.

    scipy.stats.bootstrap draws the same seeds and gives the same numbers, at three times the cost.

    Args:
        statistic: of places of seeds, drawn with replacement, (resamples, n): its value for each row that
            has one.
    """
    resamples, seed = resample_count(resamples), seed_number(seed)
    if n < 2:
        return float("nan"), float("nan")
    found = statistic(np.random.default_rng(seed).integers(n, size=(resamples, n)))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) if len(found) else (np.nan, np.nan)
    return float(low), float(high)


def mean_and_interval(name: str, values: ArrayLike) -> dict[str, float]:
    """The mean over seeds and its interval, named; NaN where there are no values."""
    values = np.asarray(values, float)
    mean = float(values.mean()) if len(values) else np.nan
    return {name: mean} | named_interval(name, lambda rows: values[rows].mean(1), len(values))


def named_interval(
    name: str, statistic: Callable[[np.ndarray], ArrayLike], n: int, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """The 95% :func:`interval`, by the names of its ends."""
    low, high = interval(statistic, n, resamples=resamples, seed=seed)
    return {f"{name}_low": low, f"{name}_high": high}


def _named(names: dict[str, object]) -> str:
    details = [f"{name} {value}" for name, value in names.items() if name != "method" and pd.notna(value)]
    return f"{names['method']} ({', '.join(details)})" if details else str(names["method"])
