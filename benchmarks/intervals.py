"""How often intervals over few seeds hold the truth, and what the correction for many comparisons costs.

    python benchmarks/intervals.py          # about a minute of one core; docs/measures.md has what it prints

Simulated is a sweep: methods at four rates, of which the best is 2 points better than the next; what a seed
does to all (2 points), to each method (0.7) and to each run (0.7). Noise is normal, skewed (exponential) or
heavy-tailed (t with 3 degrees of freedom); "one wild" has a method whose noise is five times as large. Each
seed is judged at the rate that is best by the others, and paired with the baseline.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

RANDOM = np.random.default_rng(0)
SEEDS, RATES, TABLES, RESAMPLES = (3, 5, 7, 10), 4, 2000, 1000
NOISES = {
    "normal": lambda shape: RANDOM.normal(size=shape),
    "skewed": lambda shape: RANDOM.exponential(size=shape) - 1,
    "heavy": lambda shape: RANDOM.standard_t(3, size=shape) / 3**0.5,
}


def differences(n: int, means: np.ndarray, kind: str, wild: float = 1.0, tables: int = TABLES) -> np.ndarray:
    """(tables, n seeds, methods): each minus the first, at the rates that the other seeds choose."""
    draw, m = NOISES[kind], len(means)
    scale = np.where(np.arange(m) == 1, wild, 1.0)[:, None] * 0.007
    noise = (draw((tables, n, m, 1)) + draw((tables, n, m, RATES))) * scale
    values = means[:, None] - 0.02 * (np.arange(RATES) - 2) ** 2 + noise
    values += 0.02 * RANDOM.normal(size=(tables, n, 1, 1))
    others = values.sum(1, keepdims=True) - values
    chosen = np.take_along_axis(values, others.argmax(-1)[..., None], -1)[..., 0]
    return chosen[..., 1:] - chosen[..., :1]


def covering(samples: np.ndarray) -> dict[str, float]:
    """How often each interval of the mean of (tables, n) holds 0."""
    n, options = samples.shape[1], {"n_resamples": RESAMPLES, "axis": 1, "rng": RANDOM, "batch": 100}
    found = {"Student's t": stats.ttest_1samp(samples, 0, axis=1).confidence_interval()}
    for name in ("percentile", "BCa"):
        found[name] = stats.bootstrap((samples,), np.mean, method=name, **options).confidence_interval
    drawn = samples[:, RANDOM.integers(n, size=(RESAMPLES, n))]
    mean, error = samples.mean(1), samples.std(1, ddof=1) / n**0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (drawn.mean(2) - mean[:, None]) / (drawn.std(2, ddof=1) / n**0.5)
    low, high = np.nanquantile(np.where(np.isfinite(ratios), ratios, np.nan), [0.025, 0.975], axis=1)
    found["studentized"] = mean - high * error, mean - low * error
    return {name: np.mean((low <= 0) & (high >= 0)) for name, (low, high) in found.items()}


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p of (tables, comparisons)."""
    order = p.argsort(1)
    adjusted = np.maximum.accumulate(np.take_along_axis(p, order, 1) * np.arange(p.shape[1], 0, -1), 1)
    return np.take_along_axis(adjusted, order.argsort(1), 1)


def corrected(n: int, count: int, kind: str, wild: float) -> dict[str, float]:
    """Of ``count`` comparisons: how often any is wrong, and how many of those 3 points apart are found."""
    row: dict[str, float] = {"any wrong, uncorrected": 0, "any wrong": 0, "interval misses": 0}
    for effect in (0.0, 0.03):
        means = np.where(np.arange(count + 1) % 2, effect, 0.0)
        apart = means[1:] > 0
        found = differences(n, means, kind, wild)
        p = stats.ttest_1samp(found, 0, axis=1).pvalue
        off = stats.ttest_1samp(found, means[1:], axis=1).pvalue
        row["interval misses"] = max(row["interval misses"], (off.min(1) * count < 0.05).mean())
        for name, adjusted in (("any wrong, uncorrected", p), ("any wrong", holm(p))):
            row[name] = max(row[name], (adjusted[:, ~apart] <= 0.05).any(1).mean())
    return row | {
        "found": (holm(p)[:, apart] <= 0.05).mean(),
        "by intervals": (p[:, apart] * count <= 0.05).mean(),
    }


def main() -> None:
    two = np.zeros(2)
    coverage = {(kind, n): covering(differences(n, two, kind)[..., 0]) for kind in NOISES for n in SEEDS}
    print(pd.DataFrame(coverage).T.round(3).to_string())
    cases = {
        (kind, wild, count, n): corrected(n, count, kind, wild)
        for kind in NOISES
        for wild in (1.0, 5.0)
        for count in (5, 20)
        for n in SEEDS
    }
    print(pd.DataFrame(cases).T.round(3).to_string())


if __name__ == "__main__":
    main()
