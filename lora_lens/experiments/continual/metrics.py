"""What the tables of sequences say: the accuracies of a run, its scores, and their means over runs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens.experiments.continual.formulas import (
    average_accuracy,
    average_forgetting,
    backward_transfer,
    forward_transfer,
    intransigence,
    learning_accuracy,
)
from lora_lens.forgetting.run_groups import WINDOW, mean_and_interval, window_columns

ENDED = ["failed", "reason"]
RESULTS = ["after", "task", "place", "accuracy", "loss", "retained_before", "retained_accuracy", "diverged"]
SCORES = [
    "average_accuracy",
    "average_forgetting",
    "backward_transfer",
    "forward_transfer",
    "learning_accuracy",
    "intransigence",
    "retained_before",
    "retained_accuracy",
    "retained_forgetting",
]
SAME_METHOD, OTHER_METHOD = "separate, same method", "separate, LoRA"


def accuracy_matrix(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The accuracies of one run: R (T, T), and those before any training (T,), both by place.

    Args:
        table: the rows of one run in the table of :func:`lora_lens.experiments.continual_sweep`, such as
            ``table[table["run"] == run]``.

    Raises:
        ValueError: the rows are those of several runs or of none, a column is missing, or the run has not
            exactly one row for every number of tasks trained and every task.

    Example:
        >>> import lora_lens as ll
        >>> import pandas as pd
        >>> rows = [(0, 0, 0.1), (0, 1, 0.1), (1, 0, 0.9), (1, 1, 0.2), (2, 0, 0.6), (2, 1, 0.8)]
        >>> table = pd.DataFrame(rows, columns=["after", "place", "accuracy"]).assign(run="a")
        >>> accuracies, before = ll.experiments.continual.accuracy_matrix(table)
        >>> accuracies.tolist(), before.tolist()
        ([[0.9, 0.2], [0.6, 0.8]], [0.1, 0.1])
    """
    table = checked(table, ["run", "after", "place", "accuracy"], source="ll.experiments.continual_sweep")
    if table["run"].nunique() != 1:
        raise InputError(
            f"a matrix needs the rows of one run, not of {table['run'].nunique()}; "
            'pass table[table["run"] == run]'
        )
    run, tasks = table["run"].iloc[0], table["place"].nunique()
    measured = table.set_index(["after", "place"])["accuracy"]
    expected = pd.MultiIndex.from_product([range(tasks + 1), range(tasks)])
    if not measured.index.sort_values().equals(expected):
        raise InputError(
            f"run {run} should have one row for each of {tasks} tasks after 0 to {tasks} of them were "
            f"trained, {len(expected)} in all, not {len(measured)}; pass all its rows, each once"
        )
    accuracies = measured.reindex(expected).to_numpy(float).reshape(tasks + 1, tasks)
    return accuracies[1:], accuracies[0]


def continual_scores(table: pd.DataFrame) -> pd.DataFrame:
    """How much each sequence of tasks learnt, forgot and transferred.

    The intransigence compares with the run of the strategy "separate" (each task trained alone, from the
    pretrained model) of the same method, rank, position, start (and variant), setting, learning rate, order
    and seed. If there is none, with the mean over the separate runs of LoRA of any rank, of the same
    setting, rate, order and seed; without those it is NaN. A joint run has one model for all tasks: no
    forgetting, transfer, learning accuracy or intransigence.

    Args:
        table: from :func:`lora_lens.experiments.continual_sweep`; several tables may be joined.

    Returns:
        One row per run. Columns: the settings, which are all columns of ``table`` but the results and those
        that vary within a run (run, strategy, method, rank, position, start, setting, order, lr, seed, ...);
        average_accuracy, average_forgetting, backward_transfer, forward_transfer, learning_accuracy,
        intransigence (see :mod:`lora_lens.experiments.continual.formulas`); reference (what the
        intransigence compares with: "separate, same method", "separate, LoRA" or missing); retained_before
        and retained_accuracy (on the pretrained task before any training and at the end),
        retained_forgetting (the one minus the other, positive = forgot); diverged (whether any of the run's
        trainings did).

    Raises:
        ValueError: a column is missing, there are no runs, a run is incomplete (see :func:`accuracy_matrix`),
            or two separate runs could both be the reference of one run.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.experiments.ContinualSweep.open("data/results/texts.jsonl.xz")
        >>> scores = ll.experiments.continual.continual_scores(sweep.only("seed == 0").table)
        >>> {"strategy", "order", "average_accuracy", "retained_forgetting"} <= set(scores)
        True
    """
    alike = ["setting", "lr", "order", "seed"]
    table = checked(
        table, ["run", "strategy", *WINDOW, *alike, *RESULTS], source="ll.experiments.continual_sweep"
    )
    needed = table[["run", *RESULTS]]  # all columns of all runs take long to copy
    runs = [rows for _, rows in needed.groupby("run", sort=False)]
    matrices = [accuracy_matrix(rows) for rows in runs]
    references = _references(table.drop_duplicates("run"), [matrix for matrix, _ in matrices], alike)
    scores = pd.DataFrame(
        [
            _scores(rows, *matrix, *found)
            for rows, matrix, found in zip(runs, matrices, references, strict=True)
        ]
    )
    settings = table[_settings(table)].drop_duplicates("run").reset_index(drop=True)
    return pd.concat([settings, scores], axis=1)


def score_means(scores: pd.DataFrame) -> pd.DataFrame:
    """The scores of each strategy and method, on average over orders and seeds.

    Intervals are those of :func:`lora_lens.forgetting.seed_interval` and take every run as a sample of
    its own. Runs of one order share that order, so with few orders they are too narrow for other orders. A
    score that some runs lack is the mean of the others.

    Args:
        scores: from :func:`continual_scores`.

    Returns:
        One row per strategy, window or method, setting and learning rate. Columns: strategy, method, rank,
        position, start (variant, if there), setting, lr; runs, orders and seeds (how many), diverged (how
        many runs did); and the mean of each score of :func:`continual_scores`, with the suffixes ``_low``
        and ``_high`` for its 95% interval (NaN for one run).

    Raises:
        ValueError: a column is missing, there are no runs, or two of a row share order and seed.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.experiments.ContinualSweep.open("data/results/texts.jsonl.xz")
        >>> means = ll.experiments.continual.score_means(sweep.only("strategy == 'joint'").scores())
        >>> means[["strategy", "method", "rank", "runs", "orders", "seeds"]]
          strategy method  rank  runs  orders  seeds
        0    joint   LoRA     8     9       3      3
    """
    columns = ["strategy", *WINDOW, "setting", "lr", "order", "seed", "diverged", *SCORES]
    scores = checked(scores, columns, "the table of scores", "ll.experiments.continual.continual_scores")
    keys = ["strategy", *window_columns(scores), "setting", "lr"]
    _require_one_each(scores, [*keys, "order", "seed"])
    rows = []
    for values, group in scores.groupby(keys, dropna=False, sort=False):
        row = dict(zip(keys, values, strict=True)) | {"runs": len(group)}
        row |= {"orders": group["order"].nunique(), "seeds": group["seed"].nunique()}
        row |= {"diverged": int(group["diverged"].sum())}
        for score in SCORES:
            row |= mean_and_interval(score, group[score].dropna())
        rows.append(row)
    return pd.DataFrame(rows)


def _scores(
    rows: pd.DataFrame,
    accuracies: np.ndarray,
    before: np.ndarray,
    reference: np.ndarray | None,
    compared_with: str | None,
) -> dict[str, object]:
    """The scores of one run, in the order of SCORES."""
    at_end = rows[rows["after"] == len(accuracies)].iloc[0]
    retained_before, retained_accuracy = (float(at_end[c]) for c in ("retained_before", "retained_accuracy"))
    return {
        "average_accuracy": average_accuracy(accuracies),
        "average_forgetting": average_forgetting(accuracies),
        "backward_transfer": backward_transfer(accuracies),
        "forward_transfer": forward_transfer(accuracies, before),
        "learning_accuracy": learning_accuracy(accuracies),
        "intransigence": float("nan") if reference is None else intransigence(accuracies, reference),
        "reference": compared_with,
        "retained_before": retained_before,
        "retained_accuracy": retained_accuracy,
        "retained_forgetting": retained_before - retained_accuracy,
        "diverged": bool(rows["diverged"].any()),
    }


def _references(
    runs: pd.DataFrame, matrices: list[np.ndarray], alike: list[str]
) -> Iterator[tuple[np.ndarray | None, str | None]]:
    """For each run the accuracies (T,) its intransigence compares with, and what they are."""
    method = [*window_columns(runs), *alike]
    separate = (runs["strategy"] == "separate").to_numpy()
    _require_one_each(runs[separate], ["strategy", *method])
    own, of_lora = {}, {}
    for (_, row), matrix, is_separate in zip(runs.iterrows(), matrices, separate, strict=True):
        if is_separate:
            own[_key(row, method)] = matrix.diagonal()
        if is_separate and row["method"] == "LoRA":
            of_lora.setdefault(_key(row, alike), []).append(matrix.diagonal())
    for _, row in runs.iterrows():
        if (found := own.get(_key(row, method))) is not None:
            yield found, SAME_METHOD
        elif found := of_lora.get(_key(row, alike)):
            yield np.mean(found, axis=0), OTHER_METHOD
        else:
            yield None, None


def _key(row: pd.Series, columns: list[str]) -> tuple[object, ...]:
    """Values to look a row up by; all kinds of missing ones are alike."""
    return tuple(None if pd.isna(row[column]) else row[column] for column in columns)


def _settings(table: pd.DataFrame) -> list[str]:
    """The columns that describe a run: no results, and one value in each run."""
    distinct = table.groupby("run", sort=False).nunique(dropna=False)
    return ["run", *(c for c in distinct if c not in (*RESULTS, *ENDED) and (distinct[c] <= 1).all())]


def _require_one_each(runs: pd.DataFrame, columns: list[str]) -> None:
    twice = runs.duplicated(columns)
    if twice.any():
        row = runs[twice].iloc[0]
        named = ", ".join(f"{c} {row[c]}" for c in columns if pd.notna(row[c]))
        raise InputError(f"two runs share {named}; pass runs with one value of every other setting")
