"""What comparisons of runs share: which rows are one window, and what its seeds say together.

The tables that these functions are given were checked at the door of whoever calls them.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    table: pd.DataFrame, keys: list[str], columns: list[str]
) -> Iterator[tuple[dict[str, object], pd.DataFrame]]:
    """(the keys' values by name, their rows), in the table's order, after checking the table."""
    table = checked(table, [*keys, "lr", "seed", *columns])
    twice = table.duplicated([*window_columns(table), "lr", "seed"])
    if twice.any():
        # Two runs of one seed are not two seeds: their interval would be too narrow.
        row = table[twice].iloc[0]
        raise InputError(
            f"two runs of {_named(row[window_columns(table)].to_dict())} share learning rate {row['lr']:g} "
            f"and seed {row['seed']}; pass the runs of one sweep, with one value of every other setting"
        )
    groups = table.groupby(keys, dropna=False, sort=False)
    return ((dict(zip(keys, values, strict=True)), group) for values, group in groups)


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


def resampled(n: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, n) places of n values, drawn with replacement."""
    resamples, seed = resample_count(resamples), seed_number(seed)
    return np.random.default_rng(seed).integers(n, size=(resamples, n))


def interval(
    values: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """As :func:`lora_lens.forgetting.bootstrap_interval`, for an array of at least one number."""
    if values.size == 1:
        return float("nan"), float("nan")
    means = values[resampled(len(values), resamples, seed)].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_and_interval(name: str, values: ArrayLike) -> dict[str, float]:
    """The mean over seeds and its interval, named; NaN where there are no values."""
    values = np.asarray(values, float)
    mean = float(values.mean()) if len(values) else np.nan
    low, high = interval(values) if len(values) else (np.nan, np.nan)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _named(names: dict[str, object]) -> str:
    details = [f"{name} {value}" for name, value in names.items() if name != "method" and pd.notna(value)]
    return f"{names['method']} ({', '.join(details)})" if details else str(names["method"])
