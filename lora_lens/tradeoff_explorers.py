"""Explorers of a sweep: what windows gained and lost, compared in several ways."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from ipywidgets import (
    HTML,
    Dropdown,
    FloatLogSlider,
    FloatSlider,
    Layout,
    ToggleButtons,
    VBox,
)

from lora_lens import plots, tradeoffs
from lora_lens.clickable import Spot, clickable, picked_text
from lora_lens.explorer import (
    WORDS,
    Parts,
    brief_errors,
    checkbox,
    drawn,
    dropdown,
    explorer,
    html_table,
    plain_texts,
    rate_choice,
    require_sweep,
    table_box,
)
from lora_lens.metrics import seed_means
from lora_lens.run_choice import RANGED, RunChoice
from lora_lens.run_plane import RunPlane
from lora_lens.run_view import KeptRuns, RunView, named_runs, require_task, run_in_words
from lora_lens.store import curves, drifts
from lora_lens.tasks import Task
from lora_lens.u_shape import u_shape_test

HINT = (
    "<div>Pick a point to see its run. Press the mouse on free space and drag to choose runs, or move the "
    "sliders.</div>"
)
CURVES = {"forgetting": plots.forgetting_curve, "accuracy": plots.accuracy_curve}
LONG = {"width": "36em", "max_width": "98%"}  # of sliders with long names
EQUAL_RATE, OWN_BEST_RATE = "equal learning rate", "own best rate"
MATCHED_ACCURACY, MATCHED_UPDATE = "matched accuracy", "matched update"


@brief_errors
def tradeoff_explorer(table: pd.DataFrame, store: str | Path | None = None, task: Task | None = None) -> VBox:
    """A sweep's runs as curves and in the trade-off plane, to be filtered, brushed and picked.

    Controls: the score of the curves; which learning rates to show; which windows and methods; and ranges of
    both accuracies, as sliders and as a rectangle that is drawn in the plane. Shown: the score against the
    window's position; the plane, a point per run, where runs outside of the choice are pale; how many runs
    are inside, and their means over seeds; and one run, that with the largest sum of both accuracies until
    another point is picked. Of that run: its scores and settings; with ``store`` its learning curve, and how
    far it moved every weight; and with ``task`` examples that it forgot.

    Args:
        table: from :func:`lora_lens.sweep`; runs of windows placed by position.
        store: the folder or file that keeps these runs. What it does not keep of one is said in place.
        task: the retained task, with its test examples in the order of the sweep; a longer test set that
            starts with them will do. It needs the store.

    Raises:
        ValueError: the table is empty, lacks columns of a sweep, or has no run of a window placed by
            position; the store holds none of its runs; there is a task without a store, or its test examples
            are others, or are neither images nor texts with classes.
        FileNotFoundError: there is no such store.
    """
    table = _with_run(named_runs(table), store)
    if not ((table["method"] == "window") & table["position"].notna()).any():
        raise ValueError("the table has no runs of windows placed by position")
    if task is not None and store is None:
        raise ValueError("examples that were forgotten are read from the store; give it along with the task")
    kept = None if store is None else KeptRuns(store, table["run"])
    if kept is not None:
        require_task(kept, task)
    score = ToggleButtons(options=list(CURVES), description="score")
    rates = {rate: checkbox(f"{rate:g}") for rate in sorted(table["lr"].unique())}
    choice, picked = RunChoice(table), picked_text(table.loc[_best(table), "run"])
    curve, plane, sentence, numbers = HTML(), HTML(), HTML(), table_box()
    points, view = RunPlane(table), RunView(table, kept, task)

    @lru_cache(maxsize=16)
    def curve_of(score: str, rates: tuple[float, ...], windows: tuple[str, ...]) -> str:
        runs = table[table["window"].isin(windows)]
        if runs["position"].isna().all():
            return "<p>None of these is a window placed by position, so there is no curve.</p>"
        return drawn(
            lambda figure: CURVES[score](runs, rates, ax=figure.subplots()),
            f"{score} against the position of the window, one line per learning rate",
        )

    @lru_cache(maxsize=1)
    def plane_of(rates: tuple[float, ...], windows: tuple[str, ...], *ranges: tuple[float, float]) -> str:
        """Kept as it is while points are picked: the page marks them, and the focus stays where it is."""
        shown = table["lr"].isin(rates)
        inside = shown & choice.inside()
        alt = (
            "accuracy on the retained task against accuracy on the new task, a point per run, "
            f"{inside.sum()} of {len(table)} in colour"
        )
        image = points.html(shown, inside, choice.narrowed(), alt)
        rows = table[shown].assign(aside=~inside).sort_values(RANGED)
        spots = [
            Spot(row["accuracy"], row["retained_accuracy"], run_in_words(row), row["run"], row["aside"])
            for _, row in rows.iterrows()
        ]
        return clickable(image, points.ax, spots, name="runs", picked=picked.value, brush=True)

    def draw() -> Parts | None:
        chosen = tuple(rate for rate, box in rates.items() if box.value)
        if not chosen:
            raise ValueError("choose at least one learning rate")
        choice.take_brush(points.ax)
        windows, *ranges = choice.values()
        curve.value = curve_of(score.value, chosen, windows)
        plane.value = plane_of(chosen, windows, *ranges)
        runs = table[table["lr"].isin(chosen) & choice.inside()]
        sentence.value = f"<p>{_chosen_in_words(runs, len(table))}</p>"
        numbers.value = html_table(_means(runs), rows_in_view=10) if len(runs) else ""
        return view.show(picked.value)

    controls = [[score], [HTML("learning rates"), *rates.values()], choice.controls, [picked]]
    return explorer(controls, [curve, HTML(HINT), plane, sentence, *view.boxes, numbers], draw)


def _with_run(table: pd.DataFrame, store: str | Path | None) -> pd.DataFrame:
    """Each row with the name of its run: the store's, or without a store any."""
    if store is not None:
        tradeoffs.require_columns(table, ["run"])
    elif "run" not in table:
        table = table.assign(run=table.index.astype(str))
    if (twice := table["run"].duplicated()).any():
        raise ValueError(f"the table holds run {table.loc[twice, 'run'].iloc[0]} twice; give every run once")
    return table


def _best(table: pd.DataFrame) -> int:
    """The row with the largest sum of both accuracies."""
    return table[RANGED].sum(axis=1, min_count=2).fillna(-1).idxmax()


def _chosen_in_words(runs: pd.DataFrame, count: int) -> str:
    if runs.empty:
        return f"0 of {count} runs: none lies in these ranges; widen them, or choose more windows or rates."
    if len(runs) == 1:
        return f"1 of {count} runs: {escape(run_in_words(runs.iloc[0]))}."
    units = {**dict.fromkeys(RANGED, "%"), "forgetting": " points"}
    spans = [
        f"{score.replace('_', ' ')} from {100 * runs[score].min():.1f} to {100 * runs[score].max():.1f}{unit}"
        for score, unit in units.items()
    ]
    return f"{len(runs)} of {count} runs: {', '.join(spans)}."


@brief_errors
def comparison_explorer(table: pd.DataFrame, store: str | Path | None = None) -> VBox:
    """Forgetting against the window's position, with the learning made equal in one way or another.

    Controls: the comparison, at one learning rate (:func:`lora_lens.tradeoffs.at_equal_rate`), at each
    window's own best rate (:func:`~lora_lens.tradeoffs.at_own_best_rate`), at one accuracy on the new task
    (:func:`~lora_lens.tradeoffs.at_matched_accuracy`, at the rate that most runs reached it with) or at one
    size of the update (:func:`~lora_lens.tradeoffs.at_matched_update`); the rate, accuracy or update that
    it is made at; the score; which seeds take part; and the accuracy that a learning rate may cost before
    it counts as off. Shown: the score with its 95% intervals over seeds; at an equal rate the answer of
    :func:`lora_lens.u_shape_test`; the numbers; and how far each window's rate may be off
    (:func:`~lora_lens.tradeoffs.rate_robustness`).

    Args:
        table: from :func:`lora_lens.sweep` or :func:`lora_lens.runs`: the runs of one sweep, with one value
            of every setting but window, rate and seed.
        store: the folder or file that keeps these runs. Matched accuracy needs their curves and matched
            update their drifts; without a store, or without drifts in it, that comparison is not offered.

    Raises:
        ValueError: the table is empty or lacks columns of a sweep, two runs share window, rate and seed,
            or no seed of a window was run at all its rates.
        FileNotFoundError: a run is not in the store.
    """
    require_sweep(table)
    along = None if store is None else curves(store, table)
    moved = None if store is None else _drifts_in(store, table)
    rate = rate_choice(table)
    compare: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
        EQUAL_RATE: lambda runs: tradeoffs.at_equal_rate(runs[runs["lr"] == rate.value]),
        OWN_BEST_RATE: tradeoffs.at_own_best_rate,
    }
    settings = {EQUAL_RATE: rate}
    if along is not None:
        settings[MATCHED_ACCURACY] = accuracy = _accuracy_slider(table, along)
        compare[MATCHED_ACCURACY] = lambda runs: _most_reached(
            tradeoffs.at_matched_accuracy(runs, along, accuracy.value)
        )
    if moved is not None:
        settings[MATCHED_UPDATE] = update = _update_slider(table, moved)
        compare[MATCHED_UPDATE] = lambda runs: tradeoffs.at_matched_update(
            runs, moved[moved["run"].isin(runs["run"])], update.value
        )
    comparison = dropdown("comparison", compare)
    score = ToggleButtons(options=list(tradeoffs.SCORES[::-1]), description="score")
    seeds = {seed: checkbox(f"{seed}") for seed in sorted(table["seed"].unique())}
    tolerance = FloatSlider(
        2, min=0.5, max=10, step=0.5, readout_format=".1f", description="tolerance (points of accuracy)",
        continuous_update=False, style=WORDS, layout=Layout(**LONG),
    )  # fmt: skip
    picture, sentence, numbers, bars = HTML(), HTML(), table_box(), HTML()

    @lru_cache(maxsize=16)
    def robustness(chosen: tuple[int, ...], points: float) -> str:
        widths = tradeoffs.rate_robustness(table[table["seed"].isin(chosen)], points / 100)
        return drawn(
            lambda figure: plots.robustness(widths, ax=figure.subplots()),
            f"learning rates that cost at most {points:g} points of accuracy, one bar for each of "
            f"{len(widths)} windows and methods, means over {_seeds(widths['seeds'].max())}",
            size=(8, 1.6 + 0.28 * len(widths)),
        )

    def draw() -> None:
        for name, control in settings.items():
            control.disabled = name != comparison.value
        score.disabled = comparison.value == MATCHED_ACCURACY
        if score.disabled:
            score.value = "forgetting"  # the accuracies are equal by design
        chosen = tuple(seed for seed, box in seeds.items() if box.value)
        if not chosen:
            raise ValueError("choose at least one seed")
        runs = table[table["seed"].isin(chosen)]
        result = compare[comparison.value](runs)
        at = _at(comparison.value, settings.get(comparison.value))
        picture.value = drawn(
            lambda figure: plots.comparison(result, score=score.value, ax=figure.subplots()),
            f"{score.value} against the position of the window at {at}, with intervals over "
            f"{_seeds(result['seeds'].max())}",
        )
        sentence.value = f"<p>{escape(_in_words(result, runs, comparison.value))}</p>"
        numbers.value = html_table(_compared(result))
        bars.value = robustness(chosen, tolerance.value)

    rows = [[comparison, *settings.values()], [score, HTML("seeds"), *seeds.values()], [tolerance]]
    return explorer(rows, [picture, sentence, numbers, bars], draw)


def _drifts_in(store: str | Path, table: pd.DataFrame) -> pd.DataFrame | None:
    try:
        return drifts(store, table)
    except ValueError:  # none was kept: a comparison fewer, not an error
        return None


def _accuracy_slider(table: pd.DataFrame, along: pd.DataFrame) -> FloatSlider:
    """From where training begins to the best of all; at first what all seeds of every window reach."""
    begin = along.loc[along.groupby("run")["step"].idxmin(), "accuracy"].mean()
    worst_seed = table.groupby([*tradeoffs.WINDOW, "lr"], dropna=False)["accuracy"].min()
    reached = worst_seed.groupby(level=tradeoffs.WINDOW, dropna=False).max().min()
    low, start, high = (np.floor(100 * v) / 100 for v in (begin, reached, along["accuracy"].max()))
    return FloatSlider(
        np.clip(start, low, high), min=low, max=high, step=0.01, readout_format=".0%",
        description="accuracy to match", continuous_update=False, style=WORDS, layout=Layout(**LONG),
    )  # fmt: skip


def _update_slider(table: pd.DataFrame, moved: pd.DataFrame) -> FloatLogSlider:
    """From the smallest to the largest update of a run; at first the middle of what most windows span."""
    spans = table.assign(update=table["run"].map(tradeoffs.relative_updates(moved))).query("update > 0")
    update = spans["update"]
    low, high = np.log10(update.min()), np.log10(update.max())
    spans = spans.groupby(tradeoffs.WINDOW, dropna=False)["update"].agg(["min", "max"])
    start = np.sqrt(spans["min"].median() * spans["max"].median())
    return FloatLogSlider(
        start, base=10, min=low, max=high, step=(high - low) / 100 or 0.01, readout_format=".3f",
        description="update to match", continuous_update=False, style=WORDS, layout=Layout(**LONG),
    )  # fmt: skip


def _most_reached(result: pd.DataFrame) -> pd.DataFrame:
    return result[result["most_reached"]].drop(columns="most_reached")


def _at(comparison: str, control: Dropdown | FloatSlider | FloatLogSlider | None) -> str:
    """The comparison and its value in words, as in "equal learning rate 0.005"."""
    if comparison == OWN_BEST_RATE:
        return "each one's own best learning rate"
    value = control.value
    return f"{comparison} {f'{value:.0%}' if comparison == MATCHED_ACCURACY else f'{value:.3g}'}"


def _seeds(count: int) -> str:
    return f"{count} seed" + ("" if count == 1 else "s")


def _in_words(result: pd.DataFrame, runs: pd.DataFrame, comparison: str) -> str:
    """What to know before one reads the picture, in one sentence."""
    if comparison == EQUAL_RATE:
        try:
            return u_shape_test(runs, float(result["lr"].iloc[0])).words
        except ValueError as error:  # one rank too many or one end too few: the picture stands without it
            return f"No test of a U-shape: {error}."
    if comparison == OWN_BEST_RATE:
        same = int((result["selected_on"] == "same seeds").sum())
        if not same:
            return "Every rate was chosen on half of the seeds; the numbers come from the other half."
        return (
            f"For {same} of {len(result)} windows and methods the rate was chosen on the seeds that the "
            "numbers come from, so their accuracy leans upwards."
        )
    missed = int((result["reached"] < result["seeds"]).sum())
    if not missed:
        return f"All seeds of all {len(result)} windows and methods got there."
    return (
        f"For {missed} of {len(result)} windows and methods not every seed got there: where fewer did, the "
        "means are of those only."
    )


def _compared(result: pd.DataFrame) -> pd.DataFrame:
    """The numbers of a comparison as text, with the columns that it has."""
    result = result.sort_values(["method", "position"], ascending=[False, True], kind="stable")
    shown = {"method": result["method"].to_numpy()}
    for column in ("variant", "rank", "position", "start"):
        if column in result and result[column].nunique() > 1:
            shown[column] = plain_texts(result[column])
    if "lr" in result:
        shown["learning rate"] = plain_texts(result["lr"])
    if "selected_on" in result:
        shown["rate chosen on"] = result["selected_on"].to_numpy()
    seeds = result["seeds"].astype(int).astype(str)
    if "reached" in result:
        seeds = result["reached"].astype(int).astype(str) + " of " + seeds
    shown["seeds that got there" if "reached" in result else "seeds"] = seeds.to_numpy()
    for score in tradeoffs.SCORES:
        if score in result:
            shown[f"{score} (%) [95% interval]"] = [
                _percent(*result.loc[row, [score, f"{score}_low", f"{score}_high"]]) for row in result.index
            ]
    return pd.DataFrame(shown)


def _percent(mean: float, low: float, high: float) -> str:
    if pd.isna(mean):
        return ""
    return f"{100 * mean:.1f}" + ("" if pd.isna(low) else f" [{100 * low:.1f}, {100 * high:.1f}]")


def _means(table: pd.DataFrame) -> pd.DataFrame:
    means = seed_means(table).sort_values(["lr", "method", "position"], ascending=[True, False, True])
    scores = {
        name.replace("_", " ") + " (%)": [
            f"{100 * mean:.1f}" + ("" if pd.isna(spread) else f" ± {100 * spread:.1f}")
            for mean, spread in zip(means[name], means[f"{name}_std"], strict=True)
        ]
        for name in ("accuracy", "retained_accuracy", "forgetting")
    }
    return pd.DataFrame(
        {
            "method": means["method"].to_numpy(),
            "position": ["" if pd.isna(p) else f"{p:g}" for p in means["position"]],
            "learning rate": [f"{rate:g}" for rate in means["lr"]],
            "seeds": means["seeds"].to_numpy(),
            **scores,
        }
    )
