"""What came out of a sweep, as pieces of a page: answers in words, and tables.

Every function takes the table of a sweep, with its rows in the order in which windows shall stand, and
returns pieces of HTML. All numbers are those of the public functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd

from lora_lens.forgetting.examples import forgotten_by
from lora_lens.forgetting.fair_comparison import (
    at_equal_rate,
    at_matched_accuracy,
    at_own_best_rate,
    rate_robustness,
)
from lora_lens.forgetting.pareto import dominance
from lora_lens.forgetting.predictors import by_run
from lora_lens.forgetting.run_groups import window_columns
from lora_lens.reports.page import (
    MISSING,
    beside,
    decimal,
    html_table,
    paragraph,
    plain,
    points,
    with_interval,
)
from lora_lens.reports.words import Pieces, names_of, parts_by_rank, span, titled

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


def equal_rate_section(table: pd.DataFrame) -> Pieces:
    result = at_equal_rate(table)
    seeds = span(result["seeds"])
    tables = [
        _by_rate(result, score, f"{words} at equal learning rates: mean over {seeds} and 95% interval.")
        for score, words in (
            ("accuracy", "Accuracy on the new task (%)"),
            ("forgetting", "Forgetting of the retained task (points)"),
        )
    ]
    return [beside(tables)]


def _by_rate(result: pd.DataFrame, score: str, caption: str) -> str:
    keys = window_columns(result)
    named = result.assign(
        name=names_of(result),
        cell=[with_interval(*row) for row in result[[score, f"{score}_low", f"{score}_high"]].to_numpy()],
    )
    rates = sorted(named["lr"].unique())
    rows = []
    for _, group in named.groupby(keys, dropna=False, sort=False):
        cells = dict(zip(group["lr"], group["cell"], strict=True))
        rows.append([group["name"].iloc[0], *(cells.get(rate, MISSING) for rate in rates)])
    return html_table(pd.DataFrame(rows, columns=["window or method", *map(plain, rates)]), caption)


def own_best_section(table: pd.DataFrame) -> Pieces:
    if table["lr"].nunique() == 1:
        return [paragraph(f"All runs share the learning rate {plain(table['lr'].iloc[0])}: none to choose.")]
    own, robust = at_own_best_rate(table), rate_robustness(table)
    best = pd.DataFrame(
        {
            "window or method": names_of(own),
            "best rate": own["lr"].map(plain),
            "of": own["rates"].map(str),
            "chosen on": own["selected_on"],
            "seeds": own["seeds"].map(str),
            "accuracy (%)": _intervals(own, "accuracy"),
            "forgetting (points)": _intervals(own, "forgetting"),
        }
    )
    octaves = robust[["octaves", "octaves_low", "octaves_high"]].to_numpy()
    width = pd.DataFrame(
        {
            "window or method": names_of(robust),
            "best rate": robust["best_lr"].map(plain),
            "accuracy (%)": _intervals(robust, "accuracy"),
            "lowest rate": robust["lowest"].map(plain),
            "highest rate": robust["highest"].map(plain),
            "octaves": [with_interval(*row, show=decimal) for row in octaves],
            "grid ends there": robust["at_grid_end"].map({True: "yes", False: "no"}),
            "collapses at": robust["collapse"].map(plain),
        }
    )
    return [
        html_table(
            best,
            "At each window's own best learning rate, by accuracy on the new task. Chosen on other seeds: "
            "the rate was picked on one half of the seeds, and the numbers come from the other half.",
            words=["chosen on"],
        ),
        html_table(
            width,
            "How far the learning rate may be off: the rates around the best one that lose at most 2 points. "
            "Where the grid ends there, the range may be wider. Collapses: less than half of the accuracy.",
            words=["grid ends there"],
        ),
    ]


def dominance_section(table: pd.DataFrame) -> Pieces:
    """Matrices: how often the window of a row beats that of a column on both tasks at once."""
    return [_who_beats_whom(part, rows) for part, rows in _compared_at_once(table)]


def _compared_at_once(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """All windows, or one rank after the other if they are many and each rank has several."""
    parts = list(parts_by_rank(table))
    sizes = [len(rows[window_columns(rows)].drop_duplicates()) for _, rows in [("", table), *parts]]
    return parts if sizes[0] > MOST_COLUMNS and min(sizes) > 1 else [("", table)]


def _who_beats_whom(part: str, table: pd.DataFrame) -> str:
    pairs = dominance(table)
    keys = window_columns(table)
    names = names_of(table[keys].drop_duplicates())
    beats = np.full((len(names), len(names)), np.nan)
    upper = np.triu_indices(len(names), 1)  # dominance lists each pair once, in the table's order
    beats[upper], beats.T[upper] = pairs["a_beats_b"], pairs["b_beats_a"]
    cells = pd.DataFrame([[points(v) for v in row] for row in beats], columns=range(1, len(names) + 1))
    cells.insert(0, "window or method", [f"{i}. {name}" for i, name in enumerate(names, 1)])
    cells["beats, mean"] = [points(np.nanmean(row)) if np.isfinite(row).any() else MISSING for row in beats]
    caption = (
        f"{titled(part)}How often the row is better on both tasks at once than the column with the same "
        f"number, in % of the seeds and rates that both were run at ({span(pairs['pairs'], 'pair')}). The "
        "rest are trade-offs and ties."
    )
    return html_table(cells, caption)


def matched_section(table: pd.DataFrame, curves: pd.DataFrame, accuracy: float, asked: bool) -> Pieces:
    """Forgetting where the runs first reach ``accuracy``; ``asked`` for, or chosen here."""
    why = (
        "as asked for"
        if asked
        else f"the highest whole percentage that {REACH:.0%} of the runs of every window and method reach at "
        "one of its learning rates"
    )
    result = at_matched_accuracy(table, curves, accuracy)
    result = result[result["most_reached"]]
    cells = pd.DataFrame(
        {
            "window or method": names_of(result),
            "learning rate": result["lr"].map(plain),
            "reached": [f"{r} of {s}" for r, s in zip(result["reached"], result["seeds"], strict=True)],
            "step": _intervals(result, "step", partial(decimal, digits=0)),
            "forgetting (points)": _intervals(result, "forgetting"),
        }
    )
    caption = (
        f"Where the runs first reach an accuracy of {points(accuracy)}% on the new task ({why}), at the rate "
        "at which most runs get there. Means with 95% intervals over the runs that got there, read off "
        f"straight lines between {span(curves.groupby('run').size(), 'evaluation')} of each run."
    )
    return [html_table(cells, caption)]


def matched_accuracy(table: pd.DataFrame, curves: pd.DataFrame, asked: float | None = None) -> float:
    """``asked``, or the highest whole percentage that ``REACH`` of every method's runs reach at some rate.

    Methods that train nothing but the classifier reach little and forget nothing, so they do not count.
    """
    if asked is not None:
        return asked
    best = table["run"].map(curves.groupby("run")["accuracy"].max())
    scored = table.assign(best=best)
    adapts = scored[scored["trainable"] > 0] if "trainable" in scored else scored
    scored = adapts if len(adapts) else scored
    keys = window_columns(scored)
    by_rate = scored.groupby([*keys, "lr"], dropna=False)["best"].agg(_reached_by_most)
    return float(np.floor(100 * by_rate.groupby(level=keys, dropna=False).max().min() + 1e-9) / 100)


def _reached_by_most(best: pd.Series) -> float:
    enough = int(np.ceil(REACH * len(best) - 1e-9))
    return float(best.sort_values(ascending=False).iloc[enough - 1])


def items_section(table: pd.DataFrame, answers: pd.DataFrame) -> Pieces:
    """Which classes of the retained task were forgotten."""
    known = forgotten_by(answers)
    lost = answers[(answers["before"] == answers["label"]) & (answers["after"] != answers["label"])]
    instead = lost.groupby("label")["after"].agg(lambda a: a.mode()[0])
    groups = known.groupby("label")["share"]
    classes = pd.DataFrame(
        {
            "known": groups.size(),
            "share": groups.mean(),
            "some": groups.agg(lambda s: int((s > 0).sum())),
            "most": groups.agg(lambda s: int((s > 0.5).sum())),
            "all": groups.agg(lambda s: int((s == 1).sum())),
        }
    ).sort_values("share", ascending=False)
    shown = classes.head(MOST_CLASSES)
    cells = pd.DataFrame(
        {
            "class": [str(label) for label in shown.index],
            "right before": shown["known"].map(str),
            "forgotten (%)": shown["share"].map(points),
            "by some run": shown["some"].map(str),
            "by most runs": shown["most"].map(str),
            "by every run": shown["all"].map(str),
            "mostly taken for": [str(instead[c]) if c in instead else MISSING for c in shown.index],
        }
    )
    examples = answers["item"].nunique()
    told = (
        f"Of {examples} test examples of the retained task {len(known)} were right before. "
        f"{int((known['share'] == 0).sum())} of these were kept by all of the {len(table)} runs, "
        f"{int((known['share'] > 0.5).sum())} forgotten by most and {int((known['share'] == 1).sum())} by "
        "every run."
    )
    cut = f" The first {MOST_CLASSES} of {len(classes)} classes." if len(classes) > MOST_CLASSES else ""
    caption = f"Test examples by class, over all runs, the most forgotten class first.{cut}"
    return [paragraph(told), html_table(cells, caption)]


def drift_section(table: pd.DataFrame, drifts: pd.DataFrame) -> Pieces:
    """What training did to the weights, at each window's own best rate."""
    own = at_own_best_rate(table)
    keys = window_columns(table)
    groups = table.groupby(keys, dropna=False, sort=False)  # as those of ``own``
    at_best = pd.concat([g[g["lr"] == lr] for (_, g), lr in zip(groups, own["lr"], strict=True)])
    measured = by_run(drifts)
    measures = [name for name in MECHANISM if name in measured]
    rows = at_best.merge(measured, on="run")
    means = rows.groupby(keys, dropna=False, sort=False)[measures].mean().reset_index()
    cells = pd.DataFrame({"window or method": names_of(means)})
    for name in measures:
        words, show = MECHANISM[name]
        cells[words] = means[name].map(show)
    rates = table["lr"].unique()
    at = "each window's own best rate" if len(rates) > 1 else f"learning rate {plain(rates[0])}"
    return [html_table(cells, f"What training did to the weights at {at}: means over runs.")]


def _intervals(result: pd.DataFrame, name: str, show: Callable[[float], str] = points) -> list[str]:
    values = result[[name, f"{name}_low", f"{name}_high"]].to_numpy(float)
    return [with_interval(*row, show=show) for row in values]
