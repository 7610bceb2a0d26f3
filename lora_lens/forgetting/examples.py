"""Which examples of the retained task were forgotten, and by whom: pure functions on tables of answers.

All take ``items`` with one row per run and test example: run, item, label, before and after (the
predicted class before and after training), as :meth:`lora_lens.Sweep.answers` returns them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import (
    choice,
    instance,
    number,
    sequence,
    whole_number,
)
from lora_lens.forgetting.run_groups import groups, named_interval, student_interval

COLUMNS = ("run", "item", "label", "before", "after")
MOST_CLASSES = 30_000  # whose square fits a memory
NEAR_TIES = 0.02  # of the examples, whose first answer may hang on rounding


def transitions(items: pd.DataFrame, by: str | Sequence[str] = "run") -> pd.DataFrame:
    """How many examples went from right to wrong and from wrong to right.

    Args:
        items: from :meth:`lora_lens.Sweep.answers`.
        by: what makes a group: "run", or for each class ["run", "label"].

    Returns:
        One row per group: ``by``; kept (right before and after), forgotten (right, then wrong),
        gained (wrong, then right), never (wrong both times), which sum to examples; changed (another
        class than before, right or wrong); forgetting = (forgotten - gained) / examples, the fall of the
        accuracy. Two runs with the same forgetting may have very different forgotten and gained.

    Raises:
        ValueError: a column is missing.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> answers = pd.DataFrame({"run": ["a", "a", "a", "b", "b", "b"], "item": [0, 1, 2, 0, 1, 2]})
        >>> answers["label"], answers["before"] = [0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0]
        >>> answers["after"] = [1, 1, 1, 1, 0, 0]
        >>> counts = ll.forgetting.transitions(answers)
        >>> counts[["run", "kept", "forgotten", "gained", "never", "forgetting"]].round(2)
          run  kept  forgotten  gained  never  forgetting
        0   a     1          1       1      0        0.00
        1   b     0          2       0      1        0.67
    """
    by = list(sequence(by, "by", "columns", str))
    for column in by:
        instance(column, str, "each of by", "the name of a column")
    if not by:
        raise InputError("by is empty; name at least one column, such as 'run'")
    items = _answers(items, *by)
    right, still = items["before"] == items["label"], items["after"] == items["label"]
    flags = pd.DataFrame(
        {
            "kept": right & still,
            "forgotten": right & ~still,
            "gained": ~right & still,
            "never": ~right & ~still,
            "changed": items["before"] != items["after"],
        }
    )
    counts = flags.groupby([items[column] for column in by], sort=False).sum()
    counts["examples"] = counts[["kept", "forgotten", "gained", "never"]].sum(axis=1)
    counts["forgetting"] = (counts["forgotten"] - counts["gained"]) / counts["examples"]
    return counts.reset_index()


def forgotten_by(items: pd.DataFrame, by: str | None = None) -> pd.DataFrame:
    """For each example that was right before: which share of the runs forgot it.

    Args:
        items: from :meth:`lora_lens.Sweep.answers`.
        by: a column of ``items``, such as a position merged from the table of runs, to see who forgot it.
            Runs without a value there, such as those of other methods, have no column.

    Returns:
        One row per such example, the most forgotten first: item, label, runs (how many), forgotten
        (how many of them end wrong), share (of the runs, in [0, 1]), instead (the wrong class that is
        predicted most often; missing if none). With ``by`` one more column for each of its values: the
        share of that value's runs. So rows with 1 in all of these were forgotten by everyone, and
        :func:`forgotten_by_one` lists those that one alone forgot. An example between two classes, whose
        answer before training hangs on the rounding of each run's start, is left out.

    Raises:
        ValueError: a column is missing, or the runs do not start from the same answers.
        TypeError: ``items`` is no table, or ``by`` no name.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> answers = pd.DataFrame({"run": ["a", "a", "a", "b", "b", "b"], "item": [0, 1, 2, 0, 1, 2]})
        >>> answers["label"], answers["before"] = [0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0]
        >>> answers["after"] = [1, 1, 1, 1, 0, 0]
        >>> ll.forgetting.forgotten_by(answers)
           item  label  runs  forgotten  share  instead
        0     0      0     2          2    1.0        1
        1     1      1     2          1    0.5        0
    """
    items = _answers(items)
    if by is not None and instance(by, str, "by", "the name of a column, or None") not in items:
        raise InputError(f"the answers have no column {by!r}; merge it from the table of runs first")
    differ = items.groupby("item")["before"].nunique() > 1
    if differ.mean() > NEAR_TIES:
        raise InputError("the runs start from different answers: they belong to different pretrained models")
    known = items[(items["before"] == items["label"]) & ~items["item"].map(differ)]
    known = known.assign(wrong=known["after"] != known["label"])
    wrong = known[known["wrong"]]
    groups = known.groupby("item")
    table = pd.DataFrame({"label": groups["label"].first(), "runs": groups.size()})
    table["forgotten"] = groups["wrong"].sum()
    table["share"] = table["forgotten"] / table["runs"]
    table["instead"] = wrong.groupby("item")["after"].agg(lambda a: a.mode()[0]).reindex(table.index)
    table["instead"] = table["instead"].astype("Int64")
    if by is not None:
        table = table.join(known.pivot_table(index="item", columns=by, values="wrong", aggfunc="mean"))
    return table.sort_values(["share", "item"], ascending=[False, True], kind="stable").reset_index()


def forgotten_by_one(items: pd.DataFrame, by: str, threshold: float = 0.5) -> pd.DataFrame:
    """The examples that the runs of one value of ``by`` forgot, and those of no other.

    Args:
        items: from :meth:`lora_lens.Sweep.answers`.
        by: a column of ``items``, such as a position merged from the table of runs.
        threshold: forgotten means: by more than this share of a value's runs, in [0, 1).

    Returns:
        Rows of :func:`forgotten_by` with its columns, and only (the one value that forgot it).

    Raises:
        ValueError: as :func:`forgotten_by`, or ``threshold`` out of range.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> answers = pd.DataFrame({"run": ["a", "a", "a", "b", "b", "b"], "item": [0, 1, 2, 0, 1, 2]})
        >>> answers["label"], answers["before"] = [0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0]
        >>> answers["after"] = [1, 1, 1, 1, 0, 0]
        >>> answers["position"] = answers["run"].map({"a": 0.0, "b": 0.5})
        >>> ll.forgetting.forgotten_by_one(answers, "position")[["item", "label", "only"]]
           item  label only
        0     1      1  0.5
    """
    if not 0 <= number(threshold, "threshold") < 1:
        raise InputError(f"threshold must be a share in [0, 1), not {threshold!r}")
    instance(by, str, "by", "the name of a column, such as a position merged from the table of runs")
    items = _answers(items)
    table = forgotten_by(items, by)
    forgot = table[sorted(items[by].dropna().unique())] > threshold
    alone = forgot.sum(axis=1) == 1
    return table[alone].assign(only=forgot[alone].idxmax(axis=1)).reset_index(drop=True)


def forgetting_interval(items: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """How sure forgetting is when the test examples are a sample as well as the seeds.

    The interval over seeds answers: would other seeds say the same of *these* examples? This one adds the
    variance of the mean over examples to that over seeds, and answers for other examples of the kind, too. It
    errs on the wide side, since chance that is of neither is in both (Owen 2007, "The pigeonhole bootstrap").
    It is Student's, with Satterthwaite's degrees of freedom.

    Args:
        items: the answers of all runs of ``table``.
        table: from :func:`lora_lens.sweep` (run, method, rank, position, start, lr, seed).

    Returns:
        One row per window and rate: method, rank, position, start (and variant, where the table has one),
        lr, seeds, examples; forgetting (its mean, share in [0, 1]) with forgetting_low and
        forgetting_high, the 95% interval over seeds and examples. For one seed it is over examples alone.

    Raises:
        ValueError: a column is missing, two runs share window, rate and seed, a run has no answers, or the
            runs do not share their examples.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> answers = pd.DataFrame({"run": ["a", "a", "a", "b", "b", "b"], "item": [0, 1, 2, 0, 1, 2]})
        >>> answers["label"], answers["before"] = [0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0]
        >>> answers["after"] = [1, 1, 1, 1, 0, 0]
        >>> runs = pd.DataFrame({"run": ["a", "b"], "seed": [0, 1]})
        >>> runs = runs.assign(method="window", rank=8, position=0.5, start=None, lr=5e-3)
        >>> ll.forgetting.forgetting_interval(answers, runs)[["seeds", "examples", "forgetting"]].round(3)
           seeds  examples  forgetting
        0      2         3       0.333
    """
    items = _answers(items)
    windows = list(groups(table, ["run"], by_rate=True))
    right = items.assign(
        lost=(items["before"] == items["label"]).astype(float) - (items["after"] == items["label"])
    )
    by_run = right.pivot(index="run", columns="item", values="lost")
    if without := [run for _, group in windows for run in group["run"] if run not in by_run.index]:
        raise InputError(f"no answers of {len(without)} runs, such as {without[0]}; pass those of this table")
    if by_run.isna().any(axis=None):
        raise InputError("the runs were tested on different examples; compare runs of one sweep")
    rows = []
    for names, group in windows:
        lost = by_run.loc[group["run"]].to_numpy()  # (seeds, examples)
        row = {"seeds": len(lost), "examples": lost.shape[1], "forgetting": lost.mean()}
        both = student_interval(lost.mean(1), lost.mean(0))
        rows.append(names | row | named_interval("forgetting", both))
    return pd.DataFrame(rows)


def confusion(items: pd.DataFrame, classes: int, when: str = "after") -> np.ndarray:
    """How often each class (row) was taken for each class (column), over all runs: (classes, classes) counts.

    Args:
        items: of one run, or of several, whose counts are summed.
        classes: how many there are.
        when: "before" or "after" training.

    Raises:
        ValueError: a column is missing, another ``when``, or a class outside ``classes``.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> answers = pd.DataFrame({"run": ["a", "a", "a", "b", "b", "b"], "item": [0, 1, 2, 0, 1, 2]})
        >>> answers["label"], answers["before"] = [0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0]
        >>> answers["after"] = [1, 1, 1, 1, 0, 0]
        >>> ll.forgetting.confusion(answers, classes=2)
        array([[0, 2],
               [2, 2]])
    """
    items, classes = _answers(items), whole_number(classes, "classes", least=1, most=MOST_CLASSES)
    choice(when, "when", ("before", "after"))
    label, predicted = items["label"].to_numpy(), items[when].to_numpy()
    for found in (label, predicted):
        if len(found) and not (found.min() >= 0 and found.max() < classes):
            raise InputError(f"expected classes from 0 to {classes - 1}, not {found.min()} to {found.max()}")
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (label, predicted), 1)
    return counts


def _answers(items: object, *more: str) -> pd.DataFrame:
    return checked(items, [*COLUMNS, *more], "the table of answers", "sweep.answers()")
