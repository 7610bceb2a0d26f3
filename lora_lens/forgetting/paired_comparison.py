"""Which methods beat a baseline? Paired by seed, each at its own best rate, corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.naming import listed
from lora_lens._base.schema import checked
from lora_lens._base.validate import number, shown, whole_number
from lora_lens.forgetting.fair_comparison import SCORES, first_crossings, score_at_size
from lora_lens.forgetting.run_groups import (
    LEVEL,
    WINDOW,
    at_rates_of_others,
    groups,
    holm,
    named,
    named_interval,
    seeds_by_rate,
    student_interval,
    student_p,
)

MOST_COMPARISONS = 10**6


def against_baseline(
    table: pd.DataFrame,
    baseline: str | Mapping[str, object],
    value: str = "accuracy - forgetting",
    *,
    accuracy: float | None = None,
    curves: pd.DataFrame | None = None,
    update: float | None = None,
    sizes: pd.Series | None = None,
    comparisons: int | None = None,
    level: float = LEVEL,
) -> pd.DataFrame:
    """How much better than a baseline each window and method is, and which of that is more than chance.

    Each is taken at its own best rate. The best of several noisy means is higher than it ought to be, so each
    seed is judged at the rate with the best mean value over the *other* seeds. The differences from the
    baseline are those of equal seeds; what a seed does to both cancels.

    Their intervals and p values are Student's, wider where the rate is an open choice: its variance is
    increased by the square of what the difference gains if each seed takes part in its own choice. Both allow
    for the number of comparisons: together all intervals hold the truth in ``level`` of cases (Bonferroni;
    Dunn 1961, "Multiple comparisons among means"), and p is adjusted after Holm 1979, "A simple sequentially
    rejective multiple test procedure". Holm's is the sharper: wherever an interval leaves out 0, p is at most
    1 - ``level``, but not the other way round. ``docs/measures.md`` has how often both err in simulated
    tables, and how few differences they find with few seeds.

    Three comparisons are possible, of which the first is the default:

    - at the end of training, each at its own best rate;
    - at equal learned accuracy: each run is read where it first reaches ``accuracy``, as in
      :func:`lora_lens.forgetting.at_matched_accuracy`. A rate takes part if all seeds get there with it;
    - at equal size of the update: no rate is chosen, the value is read off the curve through a seed's runs at
      ``update``, as in :func:`lora_lens.forgetting.at_matched_update`.

    Args:
        table: from :func:`lora_lens.sweep`.
        baseline: what the others are compared with: its name in the column method, or the columns that tell
            it from others, such as ``{"method": "window", "position": 0.5}``.
        value: what is compared, larger being better: a column, or an expression of several.
        accuracy: on the new task, to compare at, in [0, 1]; needs ``curves``.
        curves: from :meth:`lora_lens.Sweep.curves`.
        update: size of the update to compare at; needs ``sizes``.
        sizes: of the runs' updates, by run: at the end of training from
            :func:`lora_lens.forgetting.relative_updates`, early in it from
            :func:`lora_lens.forgetting.early_updates`.
        comparisons: how many are made in all, where the table is one of several; the methods of this table
            (without the baseline) otherwise.
        level: of all intervals together, in (0, 1).

    Returns:
        One row per window or method other than the baseline. Columns: method, rank, position, start; seeds
        (in both, after what did not get there is left out), rates; lr (the best rate by all seeds, NaN at
        equal update); value and baseline_value (means over these seeds), difference with difference_low and
        difference_high, and p. They are NaN where fewer than two seeds got there, which makes no
        comparison.

    Raises:
        TypeError: the baseline is neither a name nor columns.
        ValueError: the baseline is not one row's, ``value`` is no expression of columns, a column is missing,
            two runs share window, rate and seed, a method shares fewer than two seeds with the baseline, one
            was run at one rate and others at several, or ``accuracy`` or ``update`` lack their table or
            exclude each other.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
        >>> found = ll.forgetting.against_baseline(sweep, "LoRA").set_index("position")
        >>> found.loc[0.5, ["lr", "difference", "difference_low", "difference_high"]].astype(float).round(3)
        lr                 0.005
        difference         0.009
        difference_low    -0.024
        difference_high    0.041
        Name: 0.5, dtype: float64
    """
    level = number(level, "level", above=0, below=1)
    for name, at, needs, given in (
        ("accuracy", accuracy, "curves=sweep.curves()", curves),
        ("update", update, "sizes, such as ll.forgetting.relative_updates(sweep.drifts())", sizes),
    ):
        if (at is None) != (given is None):
            raise InputError(f"a comparison at equal {name} needs both {name} and {needs}")
    if accuracy is not None and update is not None:
        raise InputError("compare at one of accuracy and update, not at both")
    table = checked(table, [*WINDOW, "lr", "seed", *SCORES])
    if accuracy is not None:
        table = first_crossings(table, curves, accuracy)
    elif update is not None:
        update = number(update, "update", above=0)
        table = table.assign(size=table["run"].map(sizes))
    table = table.assign(value=_values(table, value))
    found = [(names, group) for names, group in groups(table, ["lr"])]
    place = _place(baseline, [names for names, _ in found])
    _require_rates(found)
    reached = update is None and accuracy is not None
    read = [_read(names, group, update, reached=reached) for names, group in found]
    base = read[place][0].add_prefix("baseline_")
    rows, pairs = [], []
    for (names, _), (own, lr, rates) in zip(found, read, strict=True):
        if len(shared := own.index.intersection(base.index)) < 2:
            raise InputError(
                f"{named(names)} and the baseline have {len(shared)} seeds in common, at least 2 are needed; "
                "run both with the same seeds, or drop the rows"
            )
        pairs.append(own.join(base).dropna())
        means = pairs[-1].mean()[["value", "baseline_value"]]
        rows.append({**names, "seeds": len(pairs[-1]), "rates": rates, "lr": lr, **means})
    del rows[place], pairs[place]
    if not rows:
        raise InputError("there is nothing but the baseline; sweep some windows or methods")
    differences = [(p["value"] - p["baseline_value"]).round(12) for p in pairs]  # 0.3 - 0.1 is not 0.2
    settled = [(p["settled"] - p["baseline_settled"]).mean() for p in pairs]
    extra = [(after - d.mean()) ** 2 for after, d in zip(settled, differences, strict=True)]
    made = max(sum(len(d) > 1 for d in differences), 1)
    if comparisons is not None:
        made = whole_number(comparisons, "comparisons", least=made, most=MOST_COMPARISONS)
    told = list(zip(differences, extra, strict=True))
    intervals = [student_interval(d, extra=more, level=1 - (1 - level) / made) for d, more in told]
    p = np.array([student_p(d, more) for d, more in told])
    unknown = np.ones(made - int((~np.isnan(p)).sum()))  # of the other tables: as if none differed
    return pd.DataFrame(rows).assign(
        difference=[d.mean() for d in differences],
        **pd.DataFrame([named_interval("difference", interval) for interval in intervals]),
        p=holm(np.append(p, unknown))[: len(p)],
    )


def early_updates(curves: pd.DataFrame) -> pd.Series:
    """How far each run had moved its adapted weights at the first evaluation after the start, by run.

    Args:
        curves: from :meth:`lora_lens.Sweep.curves`, with a column update (sqrt(sum ||dW||_F^2) over layers).

    Raises:
        ValueError: a column is missing.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> curves = pd.DataFrame({"run": ["a", "a", "a"], "step": [0, 10, 20], "update": [0.0, 0.3, 0.5]})
        >>> ll.forgetting.early_updates(curves).to_dict()
        {'a': 0.3}
    """
    if isinstance(curves, pd.DataFrame) and curves.get("update", pd.Series(dtype=float)).isna().all():
        raise InputError(
            "these runs were kept without the size of their update at the evaluations; sweep again, "
            "or compare at its size at the end, ll.forgetting.relative_updates(sweep.drifts())"
        )
    curves = checked(curves, ["run", "step", "update"], "the table of curves", "sweep.curves()")
    return curves[curves["step"] > 0].sort_values("step").groupby("run", sort=False)["update"].first()


def _values(table: pd.DataFrame, value: str) -> pd.Series:
    """``value`` of each run, larger being better."""
    try:
        found = table.infer_objects().eval(value)
        return pd.to_numeric(found).astype(float)
    except (NameError, SyntaxError, TypeError, ValueError) as error:
        columns = listed(table.select_dtypes("number").columns, most=20)
        raise InputError(
            f"value must be a column of numbers or an expression of such, not {shown(value)}: {error}; "
            f"there are {columns}"
        ) from None


def _place(baseline: object, found: list[dict[str, object]]) -> int:
    """Which of the windows and methods ``baseline`` is."""
    if not isinstance(baseline, str | Mapping):
        raise InputTypeError(
            f"baseline must be the name of a method or a dictionary of columns, not {shown(baseline)}"
        )
    wanted = {"method": baseline} if isinstance(baseline, str) else dict(baseline)
    fits = [i for i, names in enumerate(found) if all(names.get(k) == v for k, v in wanted.items())]
    if len(fits) != 1:
        raise InputError(
            f"baseline {shown(baseline)} fits {len(fits)} of the {len(found)} windows and methods, and must "
            f"fit one: {listed(map(named, found), most=20)}; a window is told by its columns, such as "
            '{"method": "window", "position": 0.5}'
        )
    return fits[0]


def _require_rates(found: list[tuple[dict[str, object], pd.DataFrame]]) -> None:
    counts = [group["lr"].nunique() for _, group in found]
    if min(counts) == 1 < max(counts):
        alone = named(found[counts.index(1)][0])
        raise InputError(
            f"{alone} was run at one learning rate and others at up to {max(counts)}, so its best one is not "
            "known; run it at more, drop it, or pass the rows of one rate"
        )


def _read(
    names: dict[str, object], group: pd.DataFrame, update: float | None, *, reached: bool
) -> tuple[pd.DataFrame, float, int]:
    """(by seed value and settled, best rate by all seeds, how many rates) of one window or method.

    Value is that at the rate which the other seeds choose, settled that at the one which all do.
    """
    if update is not None:
        seeds = {seed: runs[runs["size"] > 0] for seed, runs in group.groupby("seed")}
        at = {s: score_at_size(runs, update, ["value"]) if len(runs) else None for s, runs in seeds.items()}
        values = pd.Series({seed: np.nan if one is None else one[0] for seed, one in at.items()})
        return pd.DataFrame({"value": values, "settled": values}), np.nan, group["lr"].nunique()
    by_seed = seeds_by_rate(group, "retained_before" if reached else "value", names)
    rates = by_seed.shape[1]
    if reached:
        values = group.pivot(index="seed", columns="lr", values="value")
        by_seed = values.loc[by_seed.index, by_seed.columns].dropna(axis=1)
        if by_seed.empty:
            return pd.DataFrame(np.nan, by_seed.index, ["value", "settled"]), np.nan, rates
    places, best = at_rates_of_others(by_seed)
    values = by_seed.to_numpy(float)
    both = {"value": values[np.arange(len(values)), places], "settled": values[:, best]}
    return pd.DataFrame(both, by_seed.index), float(by_seed.columns[best]), rates
