"""Is forgetting U-shaped over the window's position? A test that allows for choosing the best window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import permutation_test

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import number, resample_count, seed_number
from lora_lens.forgetting.run_groups import FEWEST_SEEDS, rates_in, student_interval

LEVEL = 0.05  # below this p value a U-shape is called one


@dataclass(frozen=True)
class UShape:
    """Whether the windows between forget less than both ends, at one learning rate.

    Attributes:
        lr: the learning rate.
        seeds: how many, all run at every position.
        position: of the window between the ends with the least mean forgetting.
        first_excess, last_excess: what the windows at position 0 (PiSSA) and 1 (MiLoRA) forget more than
            the best one between. For each seed the best one is chosen on the other seeds, so that the
            choice does not flatter it; means over seeds, NaN for one seed.
        first_interval, last_interval: their 95% intervals (low, high).
        p: the p value of "at least one end forgets no more than every window between"; NaN without a test.
        words: the answer in one sentence.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"position": [0.0, 0.5, 1.0], "forgetting": [0.3, 0.1, 0.2]})
        >>> found = ll.forgetting.u_shape_test(runs.assign(method="window", lr=5e-3, seed=0), lr=5e-3)
        >>> found.seeds, found.position, found.p
        (1, 0.5, nan)
    """

    lr: float
    seeds: int
    position: float
    first_excess: float
    first_interval: tuple[float, float]
    last_excess: float
    last_interval: tuple[float, float]
    p: float
    words: str


def u_shape_test(table: pd.DataFrame, lr: float, resamples: int = 2000, seed: int = 0) -> UShape:
    """Do both ends forget more than the best window between them, beyond what the seeds explain?

    The best window is the best by luck, too, so comparing it with the ends as if it had been named
    beforehand finds U-shapes in noise. For each end the statistic is therefore the largest of its mean
    excesses over all windows between, and its null distribution, with the same maximum, comes from
    turning the signs of whole seeds: where no window differs, a seed's differences (from all windows at
    once) are as likely as their negatives. That is exact when the noise is symmetric, however unequal or
    correlated the windows are; ``docs/measures.md`` has a simulation where it is not. All 2^n
    sign patterns of n seeds are used, or ``resamples`` random ones where that is fewer. The p value is the
    larger of the two ends' (intersection-union test: a U needs both), so a single high end is not a U.
    The smallest possible p is 2^-n: it takes 5 seeds to fall below 0.05.

    Berger 1982, "Multiparameter hypothesis testing and acceptance sampling" (intersection-union); Romano
    and Wolf 2005, "Exact and approximate stepdown methods for multiple hypothesis testing" (maximum over
    comparisons, by resampling).

    Args:
        table: with method, position, lr, seed, forgetting, and one rank and variant at this rate.
        lr: a learning rate of the table.
        resamples: of the sign patterns, where there are too many for all.
        seed: of these.

    Raises:
        ValueError: a column is missing, no windows at this rate, none at an end or between the ends, two
            runs share position and seed, or no seed was run at every position.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> curve = {0.0: 0.3, 0.5: 0.1, 1.0: 0.2}
        >>> rows = [(p, seed, f + 0.01 * seed) for p, f in curve.items() for seed in range(5)]
        >>> runs = pd.DataFrame(rows, columns=["position", "seed", "forgetting"])
        >>> found = ll.forgetting.u_shape_test(runs.assign(method="window", lr=5e-3), lr=5e-3)
        >>> found.position, round(found.first_excess, 2), round(found.last_excess, 2), found.p
        (0.5, 0.2, 0.1, 0.03125)
    """
    resamples, seed = resample_count(resamples), seed_number(seed)
    forgetting = _seeds_by_position(table, number(lr, "lr", above=0))
    positions, values = forgetting.columns.to_numpy(float), forgetting.to_numpy(float)
    between = values[:, 1:-1]
    position = float(positions[1:-1][between.mean(0).argmin()])
    ends = {"first": values[:, 0], "last": values[:, -1]}
    p = float("nan")
    if len(values) >= FEWEST_SEEDS:
        p = max(_sign_flip_p(end[:, None] - between, resamples, seed) for end in ends.values())
    result = {"lr": float(lr), "seeds": len(values), "position": position, "p": p}
    for name, end in ends.items():
        excess = _excess(end, between)
        result[f"{name}_excess"] = float(excess.mean())
        result[f"{name}_interval"] = student_interval(excess)
    return UShape(**result, words=_in_words(result))


def _in_words(result: dict) -> str:
    """The answer of :func:`u_shape_test` in one sentence."""
    at = f"at learning rate {result['lr']:g}"
    if result["seeds"] < FEWEST_SEEDS:
        seeds = "1 seed is" if result["seeds"] == 1 else f"{result['seeds']} seeds are"
        return f"No test {at}: {seeds} too few, at least {FEWEST_SEEDS} are needed (5 to find a U-shape)."
    excesses = " and ".join(
        "{:+.1f} points at the {} end (95% interval {:+.1f} to {:+.1f})".format(
            _points(result[f"{end}_excess"]), name, *(_points(v) for v in result[f"{end}_interval"])
        )
        for end, name in (("first", "PiSSA"), ("last", "MiLoRA"))
    )
    evidence = f"p = {result['p']:.3g}, {result['seeds']} seeds"
    if result["p"] <= LEVEL:
        return (
            f"A U-shape {at}: forgetting exceeds that of the best window between by {excesses}; {evidence}."
        )
    smallest = 2.0 ** -result["seeds"]
    if smallest > LEVEL:
        evidence += f", which cannot give less than {smallest:g}"
    return f"No evidence of a U-shape {at}: against the best window between, {excesses}; {evidence}."


def _points(share: float) -> float:
    """In percentage points with one decimal, without the sign of a zero."""
    return round(100 * share, 1) + 0.0


def _seeds_by_position(table: pd.DataFrame, lr: float) -> pd.DataFrame:
    """Forgetting (seeds, positions from 0 to 1) of the windows at one rate."""
    table = checked(table, ["method", "position", "lr", "seed", "forgetting"])
    swept = table[(table["method"] == "window") & np.isclose(table["lr"], lr, rtol=1e-9, atol=0)]
    swept = swept.dropna(subset=["position"])
    if swept.empty:
        raise InputError(
            f"no windows placed by position at learning rate {lr:g}; there are {rates_in(table)}"
        )
    twice = swept.duplicated(["position", "seed"])
    if twice.any():
        row = swept[twice].iloc[0]
        raise InputError(
            f"two runs at position {row['position']:g} with seed {row['seed']} and learning rate {lr:g}; "
            "keep one rank, variant and setting"
        )
    by_seed = swept.pivot(index="seed", columns="position", values="forgetting").sort_index(axis=1)
    if 0.0 not in by_seed or 1.0 not in by_seed or by_seed.shape[1] < 3:
        raise InputError(
            f"a comparison of ends and interior needs windows at positions 0, 1 and between; "
            f"at learning rate {lr:g} there are {[float(p) for p in by_seed.columns]}"
        )
    complete = by_seed.dropna()
    if complete.empty:
        raise InputError(f"no seed was run at every position at learning rate {lr:g}; run the missing ones")
    return complete


def _excess(end: np.ndarray, between: np.ndarray) -> np.ndarray:
    """For each seed the end's forgetting minus that of the window which is best on the other seeds."""
    n = len(end)
    if n == 1:
        return np.full(1, np.nan)
    others = (between.sum(0) - between) / (n - 1)
    return end - between[np.arange(n), others.argmin(1)]


def _sign_flip_p(differences: np.ndarray, resamples: int, seed: int) -> float:
    """How often turned signs make the largest mean of a column (seeds, windows) as large as it is."""

    def largest(signs: np.ndarray, axis: int) -> np.ndarray:  # (patterns, seeds), or (seeds,)
        means = signs @ differences / len(differences)
        return means.max(axis).round(12)  # equal patterns differ by rounding

    return float(
        permutation_test(
            (np.ones(len(differences)),),  # a lone sample is permuted by turning the signs of its values
            largest,
            permutation_type="samples",
            alternative="greater",
            n_resamples=max(resamples, 2**FEWEST_SEEDS),
            vectorized=True,
            rng=seed,
        ).pvalue
    )
