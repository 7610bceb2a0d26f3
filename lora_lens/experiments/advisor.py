"""What a finished sweep recommends to train with, and how sure that is.

What is good is a matter of taste, so it is stated: the value of a run is

    value = accuracy on the new task - weight * forgetting of the retained one,

both as shares in [0, 1]. Weight 1 counts a point forgotten as much as a point learnt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from textwrap import fill

import numpy as np
import pandas as pd

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.schema import checked
from lora_lens._base.validate import number, shown
from lora_lens.adapters.methods import LoRA, MethodLike
from lora_lens.forgetting.run_groups import LEVEL, WINDOW, at_rates_of_others, student_interval
from lora_lens.spectrum.window import Placement, Window
from lora_lens.training.regularizers.base import Regularized
from lora_lens.training.regularizers.l2_to_initial import L2ToInitial

SETTINGS = ["alpha", "targets", "variant", "steps", "batch_size", "warmup", "weight_decay"]
NAMED = 4  # rows that words list; the evidence has them all
ENOUGH_SEEDS = 3  # with fewer a row takes no part in the choice, where others have more


@dataclass(frozen=True, eq=False, repr=False)
class Advice:
    """A recommendation and what it rests on.

    Attributes:
        method: a window or another method, to give to :func:`lora_lens.attach` or, as one of the
            baselines, to :class:`lora_lens.Grid`; of a method that a table cannot make again, such as one
            of PEFT's, its name.
        lr: the learning rate to train it with.
        value: of a sweep, accuracy - weight * forgetting, the mean over seeds of what the choice of the
            *other* seeds has at each. Where nothing was trained, what the method gained on average over the
            middle window in the stored sweeps, see :func:`lora_lens.advise`.
        interval: its 95% interval, over these seeds by :func:`lora_lens.forgetting.seed_interval`, or
            over the stored settings and their seeds.
        words: the recommendation, how it was found and how sure it is, in sentences.
        evidence: the table behind it, see the function that gave the advice.
        rule: "sweep", or "stored" (by stored sweeps of other tasks).

    Example:
        >>> import lora_lens as ll
        >>> advice = ll.experiments.advise_from(ll.Sweep.open("data/results/digits.jsonl.xz").table)
        >>> advice.rank, advice.rule, advice.interval[0] < advice.value < advice.interval[1]
        (8, 'sweep', True)
    """

    method: MethodLike | str
    lr: float
    value: float
    interval: tuple[float, float]
    words: str
    evidence: pd.DataFrame
    rule: str

    @property
    def window(self) -> Placement | None:
        """The method, if it is a window; None where the advice is to use none."""
        return self.method if isinstance(self.method, Placement) else None

    @property
    def rank(self) -> int | None:
        """The rank of the window or method; None where it has none, or only its name is known."""
        return getattr(self.method, "rank", None)

    def __repr__(self) -> str:
        return f"Advice({self.method}, lr={self.lr:g}, rule={self.rule!r})\n{fill(self.words, 100)}"


def advise_from(table: pd.DataFrame, weight: float = 1.0) -> Advice:
    """What a finished sweep has as its best, a window or another method and its rate; and how sure that is.

    The best of many noisy means is higher than it ought to be. So the choice is made by all seeds, but told
    by what it is worth where it took no part: each seed is judged at what the *other* seeds would choose.
    Intervals are Student's, wider by what each seed's part in its own choice would gain, as those of
    :func:`lora_lens.forgetting.against_baseline`.

    The choice is among all windows and methods and their rates, on the seeds that all of them have; those
    with fewer than 3 seeds take no part where others have more. Another row differs from the choice if the
    interval of their differences at equal seeds leaves out 0; together all these intervals hold the truth in
    95% of sweeps (Bonferroni), so with few seeds and many rows hardly any differs. With one seed none does.

    Args:
        table: from :func:`lora_lens.sweep`, or that of :meth:`lora_lens.Sweep.open`.
        weight: of forgetting in the value, 0 or more.

    Returns:
        Advice whose evidence has one row per window or method and rate, the best first. Columns: method,
        rank, position, start, lr; seeds (of those that chose), value (mean over them); difference (value
        minus what the choice of the other seeds has, at equal seeds; 0 in the recommended row),
        difference_low and difference_high (its interval), apart (whether that leaves out 0), recommended.
        Where there are windows and other methods, the words also say what choosing among windows alone is
        worth beside choosing among the others.

    Raises:
        TypeError: ``table`` is no table, or ``weight`` no number.
        ValueError: ``weight`` is negative, a column is missing, the windows differ in another setting, two
            runs share window, rate and seed, or no seed was run everywhere.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"position": [0.0, 0.0, 0.5, 0.5], "seed": [0, 1, 0, 1]})
        >>> runs = runs.assign(method="window", rank=8, start=None, lr=5e-3)
        >>> runs["accuracy"], runs["forgetting"] = [0.90, 0.92, 0.88, 0.90], [0.30, 0.20, 0.10, 0.06]
        >>> advice = ll.experiments.advise_from(runs)
        >>> print(advice.window, round(advice.value, 2))
        window of rank 8 at position 0.5 0.81
    """
    weight = _checked_weight(weight)
    table = checked(table, [*WINDOW, "lr", "seed", "accuracy", "forgetting"])
    cells, values = _cells(table, weight)
    complete = _complete(values)
    told, settled, best = _chosen(complete)
    evidence = _compared(cells, values, told, settled, best)
    row = evidence[evidence["recommended"]].iloc[0]
    interval = student_interval(told, extra=(settled.mean() - told.mean()) ** 2)
    method = _method(row)
    take = "Take" if "window" in row["method"] else "Use no window: take"
    seeds = len(told)
    how = "each seed judged at the choice of the others" if seeds > 1 else "and the value leans upwards"
    words = (
        f"{take} {_named(row)}: {_in_words(told.mean(), interval, seeds, weight)}. It is the best of "
        f"{complete.shape[1]} windows and methods with their rates, {how}. "
        f"{_windows_or_others(cells, complete)}{_rivals(evidence, seeds)}"
    )
    return Advice(method, float(row["lr"]), float(told.mean()), interval, words, evidence, "sweep")


def _checked_weight(weight: object) -> float:
    """``weight`` as a float; raises TypeError where it is no number, ValueError where it is negative."""
    try:
        return number(weight, "weight", least=0)
    except InputError:
        costs = "it says how much a point of forgetting costs"
        raise InputError(f"weight must be 0 or more, not {shown(weight)}: {costs}") from None


def _value_of(table: pd.DataFrame, weight: float) -> pd.Series:
    """accuracy - weight * forgetting of every row."""
    return table["accuracy"] - weight * table["forgetting"]


def _in_words(value: float, interval: tuple[float, float], seeds: int, weight: float) -> str:
    low, high = interval
    sure = "1 seed, so there is no interval"
    if seeds > 1:
        sure = f"95% interval {low:.3f} to {high:.3f} over {seeds} seeds"
    return f"value {value:.3f} ({sure}), where value = accuracy - {weight:g} * forgetting"


def _cells(table: pd.DataFrame, weight: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Windows and methods at each rate, one row each, and their values (seeds, such rows)."""
    swept = table[table["method"] == "window"]
    for setting in (s for s in SETTINGS if s in table and swept[s].nunique(dropna=False) > 1):
        found = listed(map(str, swept[setting].unique()), most=NAMED)
        raise InputError(f"the windows differ in {setting} ({found}); pass the rows with one value of it")
    keys = [*WINDOW, *(["variant"] if "variant" in table else []), "lr"]
    cell = table.groupby(keys, dropna=False, sort=False).ngroup()
    runs = table.assign(cell=cell, value=_value_of(table, weight))
    if (twice := runs.duplicated(["cell", "seed"])).any():
        row = runs[twice].iloc[0]
        raise InputError(
            f"two runs of {_named(row)} have seed {row['seed']}; pass the runs of one sweep, with one value "
            "of every other setting"
        )
    return (
        runs.drop_duplicates("cell").set_index("cell")[keys],
        runs.pivot(index="seed", columns="cell", values="value"),
    )


def _complete(values: pd.DataFrame) -> pd.DataFrame:
    """(seeds, cells) without gaps: what a choice can be made from."""
    counts = values.notna().sum()
    complete = values.loc[:, counts >= min(ENOUGH_SEEDS, counts.max())].dropna()
    if complete.empty:
        raise InputError(
            "no seed was run with every window, method and rate; run the missing ones or drop some rows"
        )
    return complete


def _chosen(complete: pd.DataFrame) -> tuple[pd.Series, pd.Series, int]:
    """(by seed the value of what the other seeds choose, that of what all choose, the latter's cell)."""
    places, best = at_rates_of_others(complete)
    told = complete.to_numpy(float)[np.arange(len(complete)), places]
    return pd.Series(told, complete.index), complete.iloc[:, best], complete.columns[best]


def _compared(
    cells: pd.DataFrame, values: pd.DataFrame, told: pd.Series, settled: pd.Series, best: int
) -> pd.DataFrame:
    """The evidence of :func:`advise_from`."""
    rows = []
    level = 1 - (1 - LEVEL) / max(len(cells) - 1, 1)
    for cell, names in cells.iterrows():
        own = values.loc[told.index, cell].dropna()
        difference = own - (own if cell == best else told[own.index])
        extra = 0.0 if cell == best else (settled[own.index] - told[own.index]).mean() ** 2
        low, high = student_interval(difference, level=level, extra=extra)
        row = {"seeds": len(own), "value": own.mean(), "difference": difference.mean()}
        row |= {"difference_low": low, "difference_high": high, "apart": bool(low > 0 or high < 0)}
        rows.append({**names, **row, "recommended": cell == best})
    return pd.DataFrame(rows).sort_values("value", ascending=False, kind="stable", ignore_index=True)


def _windows_or_others(cells: pd.DataFrame, complete: pd.DataFrame) -> str:
    """What it is worth to choose among the windows beside choosing among the others, in a sentence."""
    is_window = cells.loc[complete.columns, "method"].str.contains("window").to_numpy()  # also penalized
    if is_window.all() or not is_window.any() or len(complete) == 1:
        return ""
    windows, others = (_chosen(complete.loc[:, some]) for some in (is_window, ~is_window))
    difference = windows[0] - others[0]
    extra = ((windows[1] - others[1]).mean() - difference.mean()) ** 2
    low, high = student_interval(difference, extra=extra)
    return (
        f"Choosing among the windows is worth {difference.mean():+.3f} beside choosing among the other "
        f"methods (95% interval {low:+.3f} to {high:+.3f}). "
    )


def _rivals(evidence: pd.DataFrame, seeds: int) -> str:
    rivals = evidence[~evidence["apart"] & ~evidence["recommended"]]
    by = "1 seed" if seeds == 1 else f"{seeds} seeds"
    if rivals.empty:
        return f"By {by} it can be told apart from every other row."
    names = listed((_named(row) for _, row in rivals.iterrows()), most=NAMED)
    return f"By {by} it cannot be told apart from {len(rivals)} of the {len(evidence) - 1} others: {names}."


def _method(row: pd.Series) -> MethodLike | str:
    """What a row of a table names, as far as its name tells how to make it."""
    if row["method"] == "window":
        return _window(row)
    if row["method"] == "LoRA":
        return LoRA(int(row["rank"]))
    penalized = re.fullmatch(r"LoRA of rank (\d+), L2 to initial ([\d.e-]+)", str(row["method"]))
    return (
        Regularized(LoRA(int(penalized[1])), L2ToInitial(float(penalized[2]))) if penalized else row["method"]
    )


def _window(row: pd.Series) -> Window:
    if pd.notna(row["position"]):
        return Window(int(row["rank"]), position=float(row["position"]))
    return Window(int(row["rank"]), start=int(row["start"]))


def _named(row: pd.Series) -> str:
    what = f"the {_window(row)}" if row["method"] == "window" else str(row["method"])
    return f"{what} with learning rate {row['lr']:g}"
