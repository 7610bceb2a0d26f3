"""What a finished sweep recommends to train with, and how sure that is.

What is good is a matter of taste, so it is stated: the value of a run is

    value = accuracy on the new task - weight * forgetting of the retained one,

both as shares in [0, 1]. Weight 1 counts a point forgotten as much as a point learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import fill

import pandas as pd

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.schema import checked
from lora_lens._base.validate import number, shown
from lora_lens.adapters.methods import MethodLike
from lora_lens.forgetting.run_groups import FEWEST_SEEDS, WINDOW, student_interval
from lora_lens.spectrum.window import Placement, Window

SETTINGS = ["alpha", "targets", "variant", "steps", "batch_size", "warmup", "weight_decay"]
NAMED = 4  # rows that words list; the evidence has them all


@dataclass(frozen=True, eq=False, repr=False)
class Advice:
    """A recommendation and what it rests on.

    Attributes:
        method: a window or another method, to give to :func:`lora_lens.attach` or, as one of the
            baselines, to :class:`lora_lens.Grid`.
        lr: the learning rate to train it with.
        value: of a sweep, accuracy - weight * forgetting, the mean over the seeds that did not take part in
            the choice. Where nothing was trained, what the method gained on average over the middle window
            in the stored sweeps, see :func:`lora_lens.advise`.
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

    method: MethodLike
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
    def rank(self) -> int:
        """The rank of the window or method."""
        return self.method.rank

    def __repr__(self) -> str:
        return f"Advice({self.method}, lr={self.lr:g}, rule={self.rule!r})\n{fill(self.words, 100)}"


def advise_from(table: pd.DataFrame, weight: float = 1.0) -> Advice:
    """The window and rate of a finished sweep with the highest mean value, and which others may be as good.

    The best of many noisy means is higher than it ought to be. With at least 4 seeds the choice is made on
    the lower half of them (by number), and all reported numbers come from the other half. Only windows are
    recommended, on the seeds that were run with every one of them at every rate; other methods take part in
    the comparison.

    Another row differs from the recommended one if Student's 95% interval of their differences at equal
    seeds excludes 0. With one seed no rows differ. The interval is not corrected for the number of rows, so
    among many a few differ by chance; :func:`lora_lens.forgetting.against_baseline` corrects.

    Args:
        table: from :func:`lora_lens.sweep`, or that of :meth:`lora_lens.Sweep.open`.
        weight: of forgetting in the value, 0 or more.

    Returns:
        Advice whose evidence has one row per window or method and rate, the best first. Columns: method,
        rank, position, start, lr; seeds (how many did not take part in the choice), value (mean over them);
        difference (value minus the recommended row's, at equal seeds), difference_low and difference_high
        (its interval), apart (whether that excludes 0), recommended. Because other seeds chose, the
        recommended row need not be the first. A method that lacks these seeds has missing values.

    Raises:
        TypeError: ``table`` is no table, or ``weight`` no number.
        ValueError: ``weight`` is negative, a column is missing, there are no windows, the windows differ
            in another setting, two runs share window, rate and seed, or no seed was run everywhere.

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
    if not (table["method"] == "window").any():
        raise InputError("the table has no windows to recommend; sweep some, such as ll.windows(rank=8)")
    cells, values = _cells(table, weight)
    choosing, seeds, others = _halves(values[cells.index[cells["method"] == "window"]])
    best = choosing.mean().idxmax()
    evidence = _compared(cells, values, best, seeds)
    row = evidence[evidence["recommended"]].iloc[0]
    interval = student_interval(values.loc[seeds, best])
    how = "chosen on other seeds" if others else "chosen on the same seeds, so the value leans upwards"
    words = (
        f"Take {_named(row)}: {_in_words(row['value'], interval, len(seeds), weight)}. It is the best of "
        f"{choosing.shape[1]} windows and rates, {how}. {_rivals(evidence, len(seeds))}"
    )
    return Advice(_window(row), float(row["lr"]), float(row["value"]), interval, words, evidence, "sweep")


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


def _halves(values: pd.DataFrame) -> tuple[pd.DataFrame, pd.Index, bool]:
    """(values to choose by, seeds to tell by, whether those are others), of seeds that every column has."""
    complete = values.dropna()
    if complete.empty:
        raise InputError("no seed was run with every window and rate; run the missing ones or drop some rows")
    half = len(complete) // 2 if len(complete) >= FEWEST_SEEDS else 0
    return complete.iloc[: half or None], complete.index[half:], half > 0


def _compared(cells: pd.DataFrame, values: pd.DataFrame, best: int, seeds: pd.Index) -> pd.DataFrame:
    """The evidence of :func:`advise_from`."""
    rows = []
    for cell, names in cells.iterrows():
        own = values.loc[seeds, cell].dropna()
        difference = own - values.loc[own.index, best]
        low, high = student_interval(difference)
        row = {"seeds": len(own), "value": own.mean(), "difference": difference.mean()}
        row |= {"difference_low": low, "difference_high": high, "apart": bool(low > 0 or high < 0)}
        rows.append({**names, **row, "recommended": cell == best})
    return pd.DataFrame(rows).sort_values("value", ascending=False, kind="stable", ignore_index=True)


def _rivals(evidence: pd.DataFrame, seeds: int) -> str:
    rivals = evidence[~evidence["apart"] & ~evidence["recommended"]]
    by = "1 seed" if seeds == 1 else f"{seeds} seeds"
    if rivals.empty:
        return f"By {by} it can be told apart from every other row."
    names = listed((_named(row) for _, row in rivals.iterrows()), most=NAMED)
    return f"By {by} it cannot be told apart from {len(rivals)} of the {len(evidence) - 1} others: {names}."


def _window(row: pd.Series) -> Window:
    if pd.notna(row["position"]):
        return Window(int(row["rank"]), position=float(row["position"]))
    return Window(int(row["rank"]), start=int(row["start"]))


def _named(row: pd.Series) -> str:
    what = f"the {_window(row)}" if row["method"] == "window" else str(row["method"])
    return f"{what} with learning rate {row['lr']:g}"
