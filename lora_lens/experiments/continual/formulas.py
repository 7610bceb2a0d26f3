"""How well a sequence of tasks was learnt: accuracy, forgetting and transfer, from the matrix of accuracies.

R (T, T) holds the accuracy R[i, j] on the task in place j after i + 1 tasks, all counted from 0, as in
Lopez-Paz and Ranzato 2017, "Gradient episodic memory for continual learning", arXiv 1706.08840, section 2.
Accuracies are shares in [0, 1]; differences of them are in [-1, 1]. NaN stands for what was not measured,
such as a task without a head yet, and makes a score NaN where the score needs it. All functions are pure.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lora_lens._base.errors import InputError
from lora_lens._base.validate import numbers


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
