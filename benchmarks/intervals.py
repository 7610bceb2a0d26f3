"""How often intervals over few seeds hold the truth, and what the correction for many comparisons costs.

    python benchmarks/intervals.py          # half a minute of one core; docs/measures.md has what it says

Simulated is a sweep: methods at four rates, of which the best is better than the next by 2 points ("clear")
or by nothing ("flat"); what a seed does to all (2 points), to each method (0.7) and to each run (0.7). Noise
is normal, skewed (exponential) or heavy-tailed (t with 3 degrees of freedom); "wild" has a method whose noise
is five times as large. Each seed is judged at the rate that is best by the others, and paired with the
baseline.
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


def differences(
    n: int, means: np.ndarray, kind: str, gap: float = 0.02, wild: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Each method minus the first (tables, n, methods), and what they gain by choosing for themselves."""
    draw, m = NOISES[kind], len(means)
    scale = np.where(np.arange(m) == 1, wild, 1.0)[:, None] * 0.007
    noise = (draw((TABLES, n, m, 1)) + draw((TABLES, n, m, RATES))) * scale
    values = means[:, None] - gap * (np.arange(RATES) - 2) ** 2 + noise
    values += 0.02 * RANDOM.normal(size=(TABLES, n, 1, 1))
    sums = values.sum(1, keepdims=True)
    places = (sums - values).argmax(-1), np.broadcast_to(sums.argmax(-1), values.shape[:-1])
    chosen, settled = (np.take_along_axis(values, p[..., None], -1)[..., 0] for p in places)
    found = chosen[..., 1:] - chosen[..., :1]
    return found, (settled[..., 1:] - settled[..., :1]).mean(1) - found.mean(1)


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


def p_values(found: np.ndarray, gain: np.ndarray | float, truth: np.ndarray | float = 0.0) -> np.ndarray:
    """Student's (tables, methods), with the gain's square as variance, as ``at_rates_of_others`` says."""
    n = found.shape[1]
    error = np.sqrt(found.var(1, ddof=1) / n + np.square(gain))
    return 2 * stats.t.sf(abs(found.mean(1) - truth) / error, n - 1)


def corrected(n: int, count: int, kind: str, gap: float, wild: float) -> dict[str, float]:
    """Of ``count`` comparisons: how often any is wrong, and how many of those 3 points apart are found."""
    nothing = differences(n, np.zeros(count + 1), kind, gap, wild)
    p, without = p_values(*nothing), p_values(nothing[0], 0.0)
    means = np.where(np.arange(count + 1) % 2, 0.03, 0.0)
    found, gain = differences(n, means, kind, gap, wild)
    apart = means[1:] > 0
    return {
        "wrong, uncorrected": (p <= 0.05).any(1).mean(),
        "wrong, choice ignored": (holm(without) <= 0.05).any(1).mean(),
        "wrong": (holm(p) <= 0.05).any(1).mean(),
        "intervals miss": (p_values(found, gain, means[1:]).min(1) * count < 0.05).mean(),
        "found": (holm(p_values(found, gain))[:, apart] <= 0.05).mean(),
    }


def main() -> None:
    coverage = {
        (kind, n): covering(differences(n, np.zeros(2), kind)[0][..., 0]) for kind in NOISES for n in SEEDS
    }
    print(pd.DataFrame(coverage).T.round(3).to_string())
    cases = {
        (kind, rates, noise, count, n): corrected(n, count, kind, gap, wild)
        for kind in NOISES
        for rates, gap in (("clear", 0.02), ("flat", 0.0))
        for noise, wild in (("alike", 1.0), ("wild", 5.0))
        for count in (5, 20)
        for n in SEEDS
    }
    print(pd.DataFrame(cases).T.round(3).to_string())


if __name__ == "__main__":
    main()
