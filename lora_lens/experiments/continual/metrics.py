"""How well a sequence of tasks was learnt: accuracy, forgetting and transfer, from the matrix of accuracies.

R (T, T) holds the accuracy R[i, j] on the task in place j after i + 1 tasks, all counted from 0, as in
Lopez-Paz and Ranzato 2017, "Gradient episodic memory for continual learning", arXiv 1706.08840, section 2.
Accuracies are shares in [0, 1]; differences of them are in [-1, 1]. NaN stands for what was not measured,
such as a task without a head yet, and makes a score NaN where the score needs it. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import numbers
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


def average_accuracy(accuracies: ArrayLike) -> float:
    """How good the last model is at all tasks: the mean of R[T-1, j] over j, in [0, 1].

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840, equation 2.

    Args:
        accuracies: R (T, T), after each task and by place, shares in [0, 1].

    Raises:
        ValueError: ``accuracies`` is not square or holds no shares.

    Example:
        >>> import lora_lens as ll
        >>> accuracies = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]]  # R, by tasks trained and place
        >>> round(ll.experiments.continual.average_accuracy(accuracies), 2)
        0.73
    """
    return float(_matrix(accuracies)[-1].mean())


def learning_accuracy(accuracies: ArrayLike) -> float:
    """How well each task was learnt at its turn: the mean of R[j, j] over j, in [0, 1].

    Riemer et al. 2019, "Learning to learn without forgetting by maximizing transfer and minimizing
    interference", arXiv 1810.11910 (LA). It equals the average accuracy minus (T - 1) / T times the
    backward transfer.

    Args:
        accuracies: R (T, T), after each task and by place, shares in [0, 1].

    Raises:
        ValueError: as :func:`average_accuracy`.

    Example:
        >>> import lora_lens as ll
        >>> accuracies = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]]  # R, by tasks trained and place
        >>> round(ll.experiments.continual.learning_accuracy(accuracies), 2)
        0.87
    """
    return float(_matrix(accuracies).diagonal().mean())


def backward_transfer(accuracies: ArrayLike) -> float:
    """What later tasks did to the earlier ones: the mean of R[T-1, j] - R[j, j] over j < T-1.

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840, equation 3. Negative = forgot; NaN for one task. The
    authors' published code also counts the last task, as 0, so its numbers are (T - 1) / T of these.

    Args:
        accuracies: R (T, T), after each task and by place, shares in [0, 1].

    Raises:
        ValueError: as :func:`average_accuracy`.

    Example:
        >>> import lora_lens as ll
        >>> accuracies = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]]  # R, by tasks trained and place
        >>> round(ll.experiments.continual.backward_transfer(accuracies), 2)
        -0.2
    """
    accuracies = _matrix(accuracies)
    return _mean((accuracies[-1] - accuracies.diagonal())[:-1])


def forward_transfer(accuracies: ArrayLike, before: ArrayLike) -> float:
    """What the earlier tasks did for one not trained yet: the mean of R[j-1, j] - before[j] over j > 0.

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840, equation 4, where ``before`` is the accuracy of a network
    at random initialization; here it is that of the pretrained model. NaN for one task, and where a task
    has no head before its turn. The authors' published code counts the first task as 0, see
    :func:`backward_transfer`.

    Args:
        accuracies: R (T, T), after each task and by place, shares in [0, 1].
        before: (T,) accuracies before any training, by place.

    Raises:
        ValueError: as :func:`average_accuracy`, or ``before`` has another length.

    Example:
        >>> import lora_lens as ll
        >>> accuracies = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]]  # R, by tasks trained and place
        >>> round(ll.experiments.continual.forward_transfer(accuracies, before=[0.1, 0.1, 0.1]), 2)
        0.05
    """
    accuracies = _matrix(accuracies)
    before = _by_place("before", before, accuracies)
    return _mean(accuracies.diagonal(1) - before[1:])


def average_forgetting(accuracies: ArrayLike) -> float:
    """How far the earlier tasks are below their best: the mean over j < T-1 of max_l R[l, j] - R[T-1, j].

    The maximum is over all models before the last, l < T-1. Chaudhry et al. 2018, "Riemannian walk for
    incremental learning", arXiv 1801.10112, equation 3 and its mean F_k. Positive = forgot, negative = the
    last task improved the others; never less than minus the backward transfer, which starts from R[j, j]
    rather than from the best. NaN for one task. Missing accuracies of a task that had not been trained yet
    (l < j) are left out of the maximum.

    Args:
        accuracies: R (T, T), after each task and by place, shares in [0, 1].

    Raises:
        ValueError: as :func:`average_accuracy`.

    Example:
        >>> import lora_lens as ll
        >>> accuracies = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]]  # R, by tasks trained and place
        >>> round(ll.experiments.continual.average_forgetting(accuracies), 2)
        0.2
    """
    return float(forgetting_curve(accuracies)[-1])


def forgetting_curve(accuracies: ArrayLike) -> np.ndarray:
    """(T,) the average forgetting after each task, of the tasks before it; the first is NaN.

    F_k of Chaudhry et al. 2018, arXiv 1801.10112, for k = 1 to T, see :func:`average_forgetting`.

    Args:
        accuracies: R (T, T), after each task and by place, shares in [0, 1].

    Raises:
        ValueError: as :func:`average_accuracy`.

    Example:
        >>> import lora_lens as ll
        >>> accuracies = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]]  # R, by tasks trained and place
        >>> ll.experiments.continual.forgetting_curve(accuracies).round(2)
        array([nan, 0.2, 0.2])
    """
    accuracies = _matrix(accuracies)
    not_yet = np.triu(np.ones(accuracies.shape, bool), 1)
    known = np.where(not_yet & np.isnan(accuracies), -np.inf, accuracies)
    best = np.maximum.accumulate(known)  # NaN below the diagonal stays
    return np.array([_mean(best[k - 1, :k] - accuracies[k, :k]) if k else np.nan for k in range(len(best))])


def accuracy_curve(accuracies: ArrayLike) -> np.ndarray:
    """(T,) the mean accuracy after each task over the tasks seen so far, in [0, 1].

    A_k of Chaudhry et al. 2018, arXiv 1801.10112, for k = 1 to T. Its mean over k is the average
    incremental accuracy of Rebuffi et al. 2017, "iCaRL", arXiv 1611.07725, where tasks are equally large.

    Args:
        accuracies: R (T, T), after each task and by place, shares in [0, 1].

    Raises:
        ValueError: as :func:`average_accuracy`.

    Example:
        >>> import lora_lens as ll
        >>> accuracies = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]]  # R, by tasks trained and place
        >>> ll.experiments.continual.accuracy_curve(accuracies).round(2)
        array([0.9 , 0.75, 0.73])
    """
    return np.array([row[: i + 1].mean() for i, row in enumerate(_matrix(accuracies))])


def intransigence(accuracies: ArrayLike, reference: ArrayLike) -> float:
    """How much the sequence got in the way of learning: the mean over j of reference[j] - R[j, j].

    Positive = the tasks were learnt worse than by the reference. A model that gives up all it knew can
    score below 0, so read it next to the forgetting. Chaudhry et al. 2018, arXiv 1801.10112, section 3,
    define it for the last task; the mean takes in all of them. Their reference for a task is a model trained
    on the data of that task and all before it. A cheaper one is a model trained on that task alone.

    Args:
        accuracies: R (T, T), after each task and by place, shares in [0, 1].
        reference: (T,) accuracies of the reference models on each task, by place.

    Raises:
        ValueError: as :func:`average_accuracy`, or ``reference`` has another length.

    Example:
        >>> import lora_lens as ll
        >>> accuracies = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]]  # R, by tasks trained and place
        >>> round(ll.experiments.continual.intransigence(accuracies, reference=[0.9, 0.9, 0.9]), 2)
        0.03
    """
    accuracies = _matrix(accuracies)
    return float((_by_place("reference", reference, accuracies) - accuracies.diagonal()).mean())


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
        intransigence (see the functions of these names); reference (what the intransigence compares with:
        "separate, same method", "separate, LoRA" or missing); retained_before and retained_accuracy (on the
        pretrained task before any training and at the end), retained_forgetting (the one minus the other,
        positive = forgot); diverged (whether any of the run's trainings did).

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
    runs = [rows for _, rows in table.groupby("run", sort=False)]
    matrices = [accuracy_matrix(rows) for rows in runs]
    first = pd.DataFrame([rows.iloc[0] for rows in runs])
    references = _references(first, [matrix for matrix, _ in matrices], alike)
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

    Intervals are those of :func:`lora_lens.forgetting.bootstrap_interval` and take every run as a sample of
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


def _matrix(accuracies: ArrayLike) -> np.ndarray:
    """R (T, T), float, after checking it."""
    accuracies = numbers(accuracies, "accuracies")
    if accuracies.ndim != 2 or accuracies.shape[0] != accuracies.shape[1] or not accuracies.size:
        raise InputError(
            f"accuracies must be square, one row per task trained and one column per task, "
            f"not {accuracies.shape}; leave out the row from before training"
        )
    return _shares("accuracies", accuracies)


def _by_place(name: str, values: ArrayLike, accuracies: np.ndarray) -> np.ndarray:
    """(T,) as many values as there are tasks."""
    values = numbers(values, name)
    if values.shape != accuracies.shape[:1]:
        raise InputError(
            f"{name} must hold one accuracy for each of {len(accuracies)} tasks, not {values.shape}"
        )
    return _shares(name, values)


def _shares(name: str, values: np.ndarray) -> np.ndarray:
    outside = values[(values < 0) | (values > 1)]
    if outside.size:
        raise InputError(f"{name} must be shares in [0, 1] or NaN, not {outside[0]:g}; 80% is 0.8")
    return values


def _mean(values: np.ndarray) -> float:
    """NaN for no values, without a warning."""
    return float(values.mean()) if values.size else float("nan")


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
