"""What came out of a sweep, in tables.

Every function takes the table of a sweep, with its rows in the order in which windows shall stand. All
numbers are those of the public functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd

from lora_lens.forgetting import fair_comparison as fair
from lora_lens.forgetting.examples import forgotten_by
from lora_lens.forgetting.pareto import dominance
from lora_lens.forgetting.predictors import by_run
from lora_lens.forgetting.rate_ranges import rate_robustness
from lora_lens.forgetting.run_groups import window_columns
from lora_lens.reports.figures import matched_figures
from lora_lens.reports.page import MISSING, Piece, Table, decimal, plain, points, with_interval
from lora_lens.reports.words import names_of, parts_by_rank, span, titled

NAME = "window or method"
REACH = 0.8  # of the runs at a rate: what "reached" means when the accuracy is chosen
MOST_CLASSES = 25
MOST_COLUMNS = 12  # of a matrix that a page can hold
MECHANISM = {
    "relative": ("size of the update (% of the weights)", points),
    "effective_rank": ("effective rank of the update", decimal),
    "inside": ("inside the window (%)", points),
    "rotation": ("rotation (% of the weights)", points),
    "intruders": ("intruders (sum over layers)", decimal),
    "cka_loss": ("change of features (1 - CKA)", partial(decimal, digits=3)),
}  # columns of predictors.by_run


def equal_rate_section(table: pd.DataFrame) -> list[Piece]:
    result = fair.at_equal_rate(table)
    how = f"at equal learning rates: mean over {span(result['seeds'])} and 95% interval."
    accuracy = _by_rate(result, "accuracy", f"Accuracy on the new task (%) {how}")
    forgetting = _by_rate(result, "forgetting", f"Forgetting of the retained task (points) {how}")
    return [{"beside": [accuracy, forgetting]}]


def _by_rate(result: pd.DataFrame, score: str, caption: str) -> Table:
    named = result.assign(name=names_of(result), cell=_intervals(result, score))
    rates = sorted(named["lr"].unique())
    rows = [
        [group["name"].iloc[0], *group.set_index("lr")["cell"].reindex(rates, fill_value=MISSING)]
        for _, group in named.groupby(window_columns(result), dropna=False, sort=False)
    ]
    return Table(pd.DataFrame(rows, columns=[NAME, *map(plain, rates)]), caption)


def own_best_section(table: pd.DataFrame) -> list[Piece]:
    if table["lr"].nunique() == 1:
        return [f"All runs share the learning rate {plain(table['lr'].iloc[0])}: none to choose."]
    own, robust = fair.at_own_best_rate(table), rate_robustness(table)
    best = {
        NAME: names_of(own),
        "best rate": own["lr"].map(plain),
        "of": own["rates"],
        "chosen on": own["selected_on"],
        "seeds": own["seeds"],
        "accuracy (%)": _intervals(own, "accuracy"),
        "forgetting (points)": _intervals(own, "forgetting"),
    }
    width = {
        NAME: names_of(robust),
        "best rate": robust["best_lr"].map(plain),
        "accuracy (%)": _intervals(robust, "accuracy"),
        "lowest rate": robust["lowest"].map(plain),
        "highest rate": robust["highest"].map(plain),
        "octaves": _intervals(robust, "octaves", decimal),
        "grid ends there": robust["at_grid_end"].map({True: "yes", False: "no"}),
        "collapses at": robust["collapse"].map(plain),
    }
    return [
        Table(
            best,
            "At each window's own best learning rate, by accuracy on the new task. Chosen on other seeds: "
            "each seed is read at the rate that is best over the others.",
            words=["chosen on"],
        ),
        Table(
            width,
            "How far the learning rate may be off: the rates around the best one that lose at most 2 points. "
            "Where the grid ends there, the range may be wider. Collapses: less than half of the accuracy.",
            words=["grid ends there"],
        ),
    ]


def dominance_section(table: pd.DataFrame) -> list[Piece]:
    """Matrices: how often the window of a row beats that of a column on both tasks at once.

    Of all windows, or of one rank after the other if they are many and each rank has several.
    """
    whole, parts = ("", table), list(parts_by_rank(table))
    sizes = [len(rows[window_columns(rows)].drop_duplicates()) for _, rows in [whole, *parts]]
    by_part = sizes[0] > MOST_COLUMNS and min(sizes) > 1
    return [_who_beats_whom(part, rows) for part, rows in (parts if by_part else [whole])]


def _who_beats_whom(part: str, table: pd.DataFrame) -> Table:
    pairs = dominance(table)
    names = names_of(table[window_columns(table)].drop_duplicates())
    beats = np.full((len(names), len(names)), np.nan)
    upper = np.triu_indices(len(names), 1)  # dominance lists each pair once, in the table's order
    beats[upper], beats.T[upper] = pairs["a_beats_b"], pairs["b_beats_a"]
    numbered = [f"{i}. {name}" for i, name in enumerate(names, 1)]
    columns = {i: [points(v) for v in column] for i, column in enumerate(beats.T, 1)}
    means = [points(np.nanmean(row)) if np.isfinite(row).any() else MISSING for row in beats]
    return Table(
        {NAME: numbered, **columns, "beats, mean": means},
        f"{titled(part)}How often the row is better on both tasks at once than the column with the same "
        f"number, in % of the seeds and rates that both were run at ({span(pairs['pairs'], 'pair')}). The "
        "rest are trade-offs and ties.",
    )


def equal_accuracy_section(table: pd.DataFrame, curves: pd.DataFrame, requested: float | None) -> list[Piece]:
    """Forgetting where the runs first reach an accuracy, ``requested`` or chosen here."""
    accuracy, why = matched_accuracy(table, curves, requested), "as asked for"
    if requested is None:
        most = f"{REACH:.0%} of the runs of every window and method"
        why = f"the highest whole percentage that {most} reach at one of its learning rates"
    result = fair.at_matched_accuracy(table, curves, accuracy).query("most_reached")
    cells = {
        NAME: names_of(result),
        "learning rate": result["lr"].map(plain),
        "reached": [f"{r} of {s}" for r, s in zip(result["reached"], result["seeds"], strict=True)],
        "step": _intervals(result, "step", partial(decimal, digits=0)),
        "forgetting (points)": _intervals(result, "forgetting"),
    }
    caption = (
        f"Where the runs first reach an accuracy of {points(accuracy)}% on the new task ({why}), at the rate "
        "at which most runs get there. Means with 95% intervals over the runs that got there, read off "
        f"straight lines between {span(curves.groupby('run').size(), 'evaluation')} of each run."
    )
    return [Table(cells, caption), *matched_figures(result, accuracy)]


def matched_accuracy(table: pd.DataFrame, curves: pd.DataFrame, requested: float | None = None) -> float:
    """``requested``, or the highest whole percentage that 80% of every method's runs reach at some rate.

    Methods that train nothing but the classifier reach little and forget nothing, so they do not count.
    """
    if requested is not None:
        return requested
    scored = table.assign(best=table["run"].map(curves.groupby("run")["accuracy"].max()))
    if "trainable" in scored and (scored["trainable"] > 0).any():
        scored = scored[scored["trainable"] > 0]
    keys = window_columns(scored)
    by_rate = scored.groupby([*keys, "lr"], dropna=False)["best"].agg(_reached_by_most)
    return float(np.floor(100 * by_rate.groupby(level=keys, dropna=False).max().min() + 1e-9) / 100)


def _reached_by_most(best: pd.Series) -> float:
    enough = int(np.ceil(REACH * len(best) - 1e-9))
    return float(best.sort_values(ascending=False).iloc[enough - 1])


def items_section(table: pd.DataFrame, answers: pd.DataFrame) -> list[Piece]:
    """Which classes of the retained task were forgotten."""
    known = forgotten_by(answers)
    label, share = known["label"], known["share"]
    by = pd.DataFrame({"by some run": share > 0, "by most runs": share > 0.5, "by every run": share == 1})
    classes = share.groupby(label).agg(["size", "mean"]).sort_values("mean", ascending=False)
    shown = classes.head(MOST_CLASSES)
    lost = answers[(answers["before"] == answers["label"]) & (answers["after"] != answers["label"])]
    instead = lost.groupby("label")["after"].agg(lambda a: a.mode()[0])
    cells = {
        "class": [str(name) for name in shown.index],
        "right before": shown["size"],
        "forgotten (%)": shown["mean"].map(points),
        **by.groupby(label).sum().loc[shown.index],
        "mostly taken for": [instead.get(name, MISSING) for name in shown.index],
    }
    summary = (
        f"Of {answers['item'].nunique()} test examples of the retained task {len(known)} were right before. "
        f"{(share == 0).sum()} of these were kept by all of the {len(table)} runs, "
        f"{by['by most runs'].sum()} forgotten by most and {by['by every run'].sum()} by every run."
    )
    cut = f" The first {MOST_CLASSES} of {len(classes)} classes." if len(classes) > MOST_CLASSES else ""
    caption = f"Test examples by class, over all runs, the most forgotten class first.{cut}"
    return [summary, Table(cells, caption)]


def drift_section(table: pd.DataFrame, drifts: pd.DataFrame) -> list[Piece]:
    """What training did to the weights, at each window's own best rate."""
    own = fair.at_own_best_rate(table)
    keys = window_columns(table)
    groups = table.groupby(keys, dropna=False, sort=False)  # as those of ``own``
    at_best = pd.concat([g[g["lr"] == lr] for (_, g), lr in zip(groups, own["lr"], strict=True)])
    measured = by_run(drifts)
    measures = [name for name in MECHANISM if name in measured]
    means = at_best.merge(measured, on="run").groupby(keys, dropna=False, sort=False)[measures].mean()
    cells = {NAME: names_of(means.reset_index())}
    for words, show, name in ((*MECHANISM[name], name) for name in measures):
        cells[words] = means[name].map(show)
    rates = table["lr"].unique()
    at = "each window's own best rate" if len(rates) > 1 else f"learning rate {plain(rates[0])}"
    return [Table(cells, f"What training did to the weights at {at}: means over runs.")]


def _intervals(result: pd.DataFrame, name: str, show: Callable[[float], str] = points) -> list[str]:
    values = result[[name, f"{name}_low", f"{name}_high"]].to_numpy(float)
    return [with_interval(*row, show=show) for row in values]
