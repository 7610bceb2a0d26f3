"""The explorer of continual learning: one strategy and method at a time, task by task."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from html import escape

import pandas as pd
from ipywidgets import HTML, Dropdown, Layout, SelectionSlider
from matplotlib.figure import Figure

from lora_lens import plots
from lora_lens._base.errors import InputError
from lora_lens._base.naming import counted
from lora_lens._base.schema import checked, table_of
from lora_lens.experiments.continual.metrics import SCORES, continual_scores, score_means
from lora_lens.forgetting.run_groups import DRIFTS
from lora_lens.plots._image import drawn
from lora_lens.plots._scores import placed_windows
from lora_lens.plots._sequences import method_names, name_of_windows
from lora_lens.widgets._explorer import (
    ALL,
    WORDS,
    Explorer,
    explorer,
    html_table,
    offer_with_all,
    percent,
    table_box,
)

DRIFT = ["run", "after", "layer", "update", "block_change"]


@explorer
def continual_explorer(table: pd.DataFrame, drifts: pd.DataFrame | None = None) -> Explorer:
    """What one strategy and method learnt and forgot in a sequence of tasks.

    Controls: the setting; the strategy with its method; the window's position, for windows placed by one;
    the learning rate; the order and the seed, or all of them. Shown: the accuracy on every task after each
    (means over the chosen runs), the same over time, the scores of
    :func:`lora_lens.experiments.continual.score_means`; and with ``drifts`` how far the weights moved and
    what was left of the first task's window, for windows at all positions that the other controls leave.

    Args:
        table: from :func:`lora_lens.experiments.continual_sweep`, the sweep or its table.
        drifts: of the same runs, from :meth:`lora_lens.experiments.ContinualSweep.drifts`.

    Raises:
        ValueError: the table is empty, lacks a column or the rows of a run (see
            :func:`lora_lens.experiments.continual.continual_scores`), runs of the first choice differ in a
            setting that is no control; ``drifts`` lacks a column or has none of the table's runs.

    Example:
        >>> import lora_lens as ll, pandas as pd
        >>> places = [(after, place) for after in (0, 1, 2) for place in (0, 1)]
        >>> table = pd.DataFrame(places, columns=["after", "place"])
        >>> table["task"] = table["place"].map({0: "clothes", 1: "digits"})
        >>> table["accuracy"] = [None, None, 0.9, None, 0.7, 0.8]
        >>> names = {"strategy": "continued", "method": "window", "rank": 8, "position": 0.5}
        >>> names |= {"start": None, "run": "a", "setting": "a", "lr": 0.01, "order": "first", "seed": 0}
        >>> table = table.assign(**names, loss=1.0, diverged=False)
        >>> table = table.assign(retained_before=0.9, retained_accuracy=0.8)
        >>> explorer = ll.widgets.continual_explorer(table)  # the last line of a cell shows it
        >>> [control.description for control in explorer.children[1].children]
        ['setting', 'strategy and method', 'position']
    """
    table = table_of(table)
    scores = continual_scores(table)
    scores = scores.assign(named=_named(scores))
    if drifts is not None:
        drifts = checked(drifts, DRIFT, *DRIFTS)
        if not scores["run"].isin(drifts["run"]).any():
            raise InputError("none of the table's runs has a drift; pass sweep.drifts(), or no drifts")
    setting, method = _choice("setting"), _choice("strategy and method", "32em")
    rate, order, seed = _choice("learning rate", "14em"), _choice("order"), _choice("seed", "12em")
    position = SelectionSlider(
        options=[("none", ALL)], description="position", continuous_update=False, style=WORDS
    )
    sentence, heat, time, weights, numbers = HTML(), HTML(), HTML(), HTML(), table_box()

    def chosen() -> tuple[pd.DataFrame, pd.DataFrame]:
        """The scores of the runs that the controls ask for, and of those at all positions.

        Each control offers what the ones before it leave.
        """
        _offer(setting, [(name, name) for name in scores["setting"].unique()])
        runs = scores[scores["setting"] == setting.value]
        names = runs["named"].unique().tolist()
        windows = [names.index(name) for name in runs.loc[placed_windows(runs), "named"]]
        _offer(method, [(name, name) for name in names], first=min(windows, default=0))
        runs = runs[runs["named"] == method.value]
        placed = sorted(runs["position"].dropna().unique())
        if placed:
            _offer(position, [(f"{p:g}", p) for p in placed], first=len(placed) // 2)
        position.disabled = len(placed) < 2
        runs = runs.assign(here=runs["position"].eq(position.value) if placed else True)
        learnt = runs[runs["here"]].groupby("lr")["average_accuracy"].mean()
        _offer(rate, [(f"{lr:g}", lr) for lr in learnt.index], first=int(learnt.to_numpy().argmax()))
        runs = runs[runs["lr"] == rate.value]
        offer_with_all(order, [(o, o) for o in runs.loc[runs["here"], "order"].unique()])
        offer_with_all(seed, [(str(s), s) for s in sorted(runs.loc[runs["here"], "seed"].unique())])
        for control, column in ((order, "order"), (seed, "seed")):
            if control.value != ALL:
                runs = runs[runs[column] == control.value]
        if not runs["here"].any():
            raise InputError(
                f"{method.value} was not run with order {order.value} and seed {seed.value}; "
                "choose another order or seed"
            )
        return runs[runs["here"]], runs

    @lru_cache(maxsize=16)
    def weights_of(runs: tuple[str, ...], name: str) -> str:
        moved = drifts[drifts["run"].isin(runs)]
        survives = bool(moved["block_change"].notna().any())
        return drawn(
            lambda figure: _weights(figure, moved, table[table["run"].isin(runs)], survives),
            f"how far the weights moved{' and how the first window changed' * survives}, task by task, "
            f"{name}",
        )

    def draw() -> None:
        runs, at_all_positions = chosen()
        rows = table[table["run"].isin(runs["run"])]
        (name,) = method_names(runs.head(1))
        end = rows[rows["after"] == rows["after"].max()].groupby("place")["accuracy"].mean()
        at_end = ", ".join(f"{100 * accuracy:.0f}" for accuracy in end)
        heat.value = drawn(
            lambda figure: plots.accuracy_heatmap(rows, ax=figure.subplots()),
            f"accuracy on every task after each was learnt, {name}; at the end, in percent: {at_end}",
        )
        time.value = drawn(
            lambda figure: plots.accuracy_over_time(rows, ax=figure.subplots()),
            f"accuracy on every task while the tasks are learnt one after another, {name}",
            size=(8, 3.8),
        )
        followed = drifts is not None and bool(runs["run"].isin(drifts["run"]).any())
        weights.value = weights_of(tuple(at_all_positions["run"]), method.value) if followed else ""
        sentence.value = f"<p>{escape(_in_words(rows, runs, drifts is None or followed))}</p>"
        numbers.value = html_table(_numbers(runs))

    rows = [[setting, method, position], [rate, order, seed]]
    return Explorer(rows, [sentence, heat, time, weights, numbers], draw)


def _choice(description: str, width: str = "19em") -> Dropdown:
    return Dropdown(description=description, style=WORDS, layout=Layout(width=width, max_width="98%"))


def _offer(choice: Dropdown | SelectionSlider, options: Iterable[tuple[str, object]], first: int = 0) -> None:
    """These options, at first the one numbered ``first``; the value stays if it is among them."""
    options = list(options)
    if tuple(options) != choice.options:
        kept, values = choice.value, [value for _, value in options]
        choice.options = options
        choice.value = kept if kept in values else values[first]
    choice.disabled = len(options) < 2


def _named(runs: pd.DataFrame) -> list[str]:
    """The strategies and methods, with the windows of all positions under one name."""
    several_ranks = runs["rank"].nunique() > 1
    return [
        name_of_windows(run.strategy, run.rank, several_ranks) if placed else name
        for run, placed, name in zip(runs.itertuples(), placed_windows(runs), method_names(runs), strict=True)
    ]


def _weights(figure: Figure, drifts: pd.DataFrame, rows: pd.DataFrame, survives: bool) -> None:
    axes = figure.subplots(1, 2)
    plots.update_over_time(drifts, rows, ax=axes[0])
    if survives:
        plots.window_survival(drifts, rows, ax=axes[1])
    else:
        axes[1].set_axis_off()


def _in_words(rows: pd.DataFrame, runs: pd.DataFrame, followed: bool) -> str:
    """What the pictures are of."""
    if runs["order"].nunique() == 1:
        by_place = rows.drop_duplicates("place").sort_values("place")["task"]
        words = "Learnt in this order: " + "; ".join(by_place) + "."
    else:
        words = "The places are those of each run's own order, whichever task stood there."
    if len(runs) > 1:
        orders, seeds = (counted(runs[column].nunique(), column) for column in ("order", "seed"))
        words = f"Means over {len(runs)} runs, {orders} and {seeds}. {words}"
    if diverged := int(runs["diverged"].sum()):
        words += f" {counted(diverged, 'run')} diverged."
    if not followed:
        words += " The weights of these runs were not followed."
    return words


def _numbers(runs: pd.DataFrame) -> pd.DataFrame:
    """The mean scores in percent that there are."""
    means = score_means(runs).iloc[0]
    shown = [score for score in SCORES if pd.notna(means[score])]
    return pd.DataFrame(
        {
            "score": [score.replace("_", " ") for score in shown],
            "percent [95% interval]": [
                percent(*(means[score + end] for end in ("", "_low", "_high"))) for score in shown
            ],
        }
    )
