"""How wide the range of good learning rates is: how far off a rate may be before it costs accuracy."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from lora_lens._base.validate import number
from lora_lens.forgetting.run_groups import (
    groups,
    mean_and_interval,
    named_interval,
    resampled_interval,
    seeds_by_rate,
)


def rate_robustness(table: pd.DataFrame, tolerance: float = 0.02) -> pd.DataFrame:
    """How much the learning rate may be off before it costs accuracy on the new task.

    Args:
        table: from :func:`lora_lens.sweep`.
        tolerance: how much less accuracy than at the best rate still counts as good, a share in [0, 1].

    Returns:
        One row per window. Columns: method, rank, position, start; seeds (those run at every rate; the
        others are left out), rates; best_lr (of equals, the lowest) and accuracy with accuracy_low and
        accuracy_high there (chosen on the same seeds, so it leans upwards, see
        :func:`lora_lens.forgetting.at_own_best_rate`); lowest and highest (the ends of the unbroken run of
        rates around the best one whose mean accuracy is within ``tolerance`` of it); octaves (log2 of
        highest / lowest) with octaves_low and octaves_high, its 95% interval when the seeds are resampled;
        at_grid_end (True where that run of rates ends at an end of the grid: then the width is a lower
        bound); collapse (the lowest rate above the best at which the mean accuracy is below half of the
        best; NaN if the grid holds none).

    Raises:
        ValueError: ``tolerance`` is negative, a column is missing, two runs share window, rate and seed,
            or no seed of a window was run at all its rates.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"lr": [1e-3, 2e-3, 4e-3, 8e-3], "accuracy": [0.80, 0.90, 0.89, 0.30]})
        >>> runs = runs.assign(method="window", rank=8, position=0.5, start=None, seed=0)
        >>> ll.forgetting.rate_robustness(runs)[["best_lr", "lowest", "highest", "octaves", "collapse"]]
           best_lr  lowest  highest  octaves  collapse
        0    0.002   0.002    0.004      1.0     0.008
    """
    tolerance = number(tolerance, "tolerance", least=0)
    rows = []
    for names, group in groups(table, ["accuracy"]):
        by_seed = seeds_by_rate(group, "accuracy", names)
        rates, scores = by_seed.columns.to_numpy(float), by_seed.to_numpy(float)
        means = scores.mean(0)
        low, best, high = _plateau(means, tolerance)
        widths = partial(_widths, scores, rates, tolerance)
        too_high = rates[best + 1 :][means[best + 1 :] < means[best] / 2]
        rows.append(
            {
                **names,
                "seeds": len(scores),
                "rates": len(rates),
                "best_lr": rates[best],
                **mean_and_interval("accuracy", scores[:, best]),
                "lowest": rates[low],
                "highest": rates[high],
                "octaves": np.log2(rates[high] / rates[low]),
                **named_interval("octaves", resampled_interval(widths, len(scores))),
                "at_grid_end": low == 0 or high == len(rates) - 1,
                "collapse": too_high[0] if len(too_high) else np.nan,
            }
        )
    return pd.DataFrame(rows)


def _plateau(means: np.ndarray, tolerance: float) -> tuple[int, int, int]:
    """(first, best, last): the unbroken run around the best mean of those within ``tolerance`` of it."""
    best = low = high = int(means.argmax())
    enough = means >= means[best] - tolerance - 1e-12  # 0.90 - 0.88 is more than 0.02 by rounding
    while low > 0 and enough[low - 1]:
        low -= 1
    while high < len(means) - 1 and enough[high + 1]:
        high += 1
    return low, best, high


def _widths(scores: np.ndarray, rates: np.ndarray, tolerance: float, draws: np.ndarray) -> np.ndarray:
    """The plateau's width in octaves for each row of ``draws``, places of seeds."""
    low, _, high = np.array([_plateau(means, tolerance) for means in scores[draws].mean(1)]).T
    return np.log2(rates[high] / rates[low])
