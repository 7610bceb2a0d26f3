"""Made-up tables of continual learning, for the tests of its pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

TASKS = ("red", "green", "blue")


def sequence(
    accuracies: Sequence[Sequence[float]],
    retained: Sequence[float],
    order: Sequence[int] = (0, 1, 2),
    before: Sequence[float] | None = None,
    **names: object,
) -> pd.DataFrame:
    """The rows of one run, as ``ll.experiments.continual_sweep`` gives them.

    Args:
        accuracies: R, after each task (rows) on each by its place in the order (columns).
        retained: on the pretrained task, before all training and after each task.
        order: which task stands at which place.
        before: on each task before all training; default NaN.
        names: other settings than those of a merged window at 0.5.
    """
    settings = {
        "strategy": "merged", "method": "window", "rank": 8, "position": 0.5, "start": np.nan,
        "setting": "task-incremental", "order": " ".join(map(str, order)),
        "lr": 0.001, "steps": 50, "seed": 0,
    } | names  # fmt: skip
    by_task = [before or [np.nan] * len(order), *accuracies]
    rows = [
        {"run": "-".join(map(str, settings.values())), **settings,
         "after": after, "task": TASKS[order[place]], "place": place, "accuracy": accuracy, "loss": 0.5,
         "retained_before": retained[0], "retained_accuracy": retained[after], "diverged": False}
        for after, row in enumerate(by_task) for place, accuracy in enumerate(row)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def forgetful(final: float, lost: float, **names: object) -> pd.DataFrame:
    """A run whose average accuracy is ``final`` and average forgetting ``lost``; the retained loses half."""
    # Forgetting is the mean over the two earlier tasks, so their first scores are those at the end plus it.
    first, last = final + lost, final
    rows = [[first, np.nan, np.nan], [first, first, np.nan], [last, last, final]]
    return sequence(rows, [0.9, 0.9, 0.9, 0.9 - lost / 2], **names)


def together(final: float, **names: object) -> pd.DataFrame:
    """A run of joint training, tested at its end only."""
    nothing = [np.nan] * 3
    rows = [nothing, nothing, [final] * 3]
    return sequence(rows, [0.9, np.nan, np.nan, 0.85], **{"strategy": "joint"} | names)
