"""Made-up tables of sweeps, for the tests of what compares windows."""

from __future__ import annotations

import numpy as np
import pandas as pd

NINE = np.linspace(0, 1, 9)


def runs(
    accuracy: dict[tuple[float, float], list[float]],
    forgetting: dict[tuple[float, float], list[float]] | None = None,
) -> pd.DataFrame:
    """A table from lists over seeds, by (position, learning rate); forgetting is 0.1 unless given."""
    rows = []
    for (position, lr), scores in accuracy.items():
        forgotten = (forgetting or {}).get((position, lr), [0.1] * len(scores))
        for seed, (score, lost) in enumerate(zip(scores, forgotten, strict=True)):
            rows.append(
                {"method": "window", "rank": 8, "position": position, "start": None, "lr": lr, "seed": seed,
                 "accuracy": score, "retained_before": 0.9, "retained_accuracy": 0.9 - lost,
                 "forgetting": lost, "diverged": False, "run": f"{position} {lr} {seed}"}
            )  # fmt: skip
    return pd.DataFrame(rows)


def swept(forgetting: np.ndarray, positions: np.ndarray = NINE) -> pd.DataFrame:
    """A table at one learning rate from forgetting (seeds, positions)."""
    columns = {(p, 1e-3): forgetting[:, i].tolist() for i, p in enumerate(positions)}
    return runs({key: [0.8] * len(forgetting) for key in columns}, columns)
