"""The explorer of a sweep's trade-offs: filter, brush and pick runs."""

from __future__ import annotations

from functools import lru_cache
from html import escape

import numpy as np
import pandas as pd
from ipywidgets import HTML, ToggleButtons

from lora_lens import plots
from lora_lens._base.errors import InputError
from lora_lens.experiments.results import Sweep
from lora_lens.forgetting.aggregate import seed_means
from lora_lens.plots._image import drawn
from lora_lens.plots._scores import require_placed
from lora_lens.tasks.task import Task
from lora_lens.widgets._clickable import Spot, clickable
from lora_lens.widgets._explorer import Explorer, Parts, checkbox, explorer, html_table, table_box
from lora_lens.widgets._page import Page
from lora_lens.widgets._run_choice import RANGED, STEP, RunChoice
from lora_lens.widgets._run_plane import RunPlane
from lora_lens.widgets._run_view import RunView, named_runs, require_task, run_in_words

HINT = (
    "<div>Pick a point to see its run. Drag the mouse to choose runs, hold Shift while arrow keys go from "
    "point to point, or move the sliders. Of thousands of runs, one in each crowd can be picked; a rectangle "
    "around it shows more.</div>"
)
MOST_SPOTS = 500  # points that are buttons: a page with thousands is slow
FINEST = 0.002  # of accuracy; points nearer than that are one to the eye
CELLS = 10**6  # more than there are of them along an axis
CURVES = {"forgetting": plots.forgetting_curve, "accuracy": plots.accuracy_curve}


@explorer
def tradeoff_explorer(sweep: Sweep | pd.DataFrame, retain: Task | None = None) -> Explorer:
    """A sweep's runs as curves and in the trade-off plane, to be filtered, brushed and picked.

    Controls: the score of the curves; which learning rates to show; which windows and methods; and ranges of
    both accuracies, as sliders and as a rectangle that is drawn in the plane. Shown: the score against the
    window's position; the plane, a point per run, where runs outside of the choice are pale; how many runs
    are inside, and their means over seeds; and one run, that with the largest sum of both accuracies until
    another point is picked. Of that run: its scores and settings; unless there is a table alone, its learning
    curve, and how far it moved every weight; and with ``retain`` examples that it forgot.

    Args:
        sweep: from :func:`lora_lens.sweep`; runs of windows placed by position. What was not kept of one is
            said in place.
        retain: the retained task, with its test examples in the order of the sweep; a longer test set that
            starts with them will do. It needs more than a table.

    Raises:
        ValueError: the table is empty, lacks columns of a sweep, or has no run of a window placed by
            position; there is a retained task beside a table alone, or its test examples are others, or are
            neither images nor texts with classes.

    Example:
        >>> import lora_lens as ll, pandas as pd
        >>> settings = {"method": "window", "rank": 8, "start": None, "lr": 0.01, "seed": 0}
        >>> scores = {"accuracy": [0.9, 0.9, 0.8], "retained_accuracy": [0.6, 0.8, 0.7], "forgetting": 0.1}
        >>> table = pd.DataFrame({"position": [0, 0.5, 1], **settings, **scores}).assign(diverged=False)
        >>> explorer = ll.widgets.tradeoff_explorer(table)  # the last line of a cell shows it
        >>> [box.description for box in explorer.children[2].children[1:]]
        ['0.01']
    """
    kept, task = sweep if isinstance(sweep, Sweep) else None, retain
    table = _with_run(named_runs(sweep, *(["run"] if kept is not None else [])))
    require_placed(table)
    if task is not None and kept is None:
        raise InputError(
            "examples that were forgotten are no part of a table; with retain, give the ll.Sweep"
        )
    if kept is not None:
        require_task(kept, task)
    score = ToggleButtons(options=list(CURVES), description="score")
    rates = {rate: checkbox(f"{rate:g}") for rate in sorted(table["lr"].unique())}
    page = Page(picked=table.loc[_best(table), "run"])
    choice = RunChoice(table, page)
    curve, plane, sentence, numbers = HTML(), HTML(), HTML(), table_box()
    points, view = RunPlane(table), RunView(table, kept, task)
    names, places = table["run"].to_numpy(), table[RANGED].to_numpy(float)
    spoken = [run_in_words(row) for row in table.to_dict("records")]

    @lru_cache(maxsize=16)
    def curve_of(score: str, rates: tuple[float, ...], windows: tuple[str, ...]) -> str:
        runs = table[table["window"].isin(windows)]
        if runs["position"].isna().all():
            return "<p>None of these is a window placed by position, so there is no curve.</p>"
        there = [rate for rate in rates if rate in set(runs["lr"])]
        return drawn(
            lambda figure: CURVES[score](runs, there, ax=figure.subplots()),
            f"{score} against the position of the window, one line per learning rate",
        )

    @lru_cache(maxsize=1)
    def offered(rates: tuple[float, ...], windows: tuple[str, ...]) -> dict[str, object]:
        """Sent anew where these change, and not with every rectangle."""
        return points.for_page(table["lr"].isin(rates).to_numpy() & choice.of_windows(), STEP)

    @lru_cache(maxsize=1)
    def plane_of(rates: tuple[float, ...], windows: tuple[str, ...], *ranges: tuple[float, float]) -> str:
        """Kept as it is while points are picked: the page marks them, and the focus stays where it is."""
        shown = table["lr"].isin(rates).to_numpy()
        inside = shown & choice.inside()
        alt = (
            "accuracy on the retained task against accuracy on the new task, a point per run, "
            f"{inside.sum()} of {len(table)} in colour"
        )
        image = points.html(shown, inside, choice.narrowed(), alt)
        page.points = offered(rates, windows)
        rows = _pickable(places, shown, inside, names == page.picked)
        spots = [Spot(*places[row], spoken[row], names[row], not inside[row]) for row in rows]
        return clickable(image, points.ax, spots, name="runs", picked=page.picked, brush=True)

    def draw() -> Parts | None:
        chosen = tuple(rate for rate, box in rates.items() if box.value)
        if not chosen:
            raise InputError("choose at least one learning rate")
        choice.take_brush(points.ax)
        windows, *ranges = choice.values()
        curve.value = curve_of(score.value, chosen, windows)
        plane.value = plane_of(chosen, windows, *ranges)
        runs = table[table["lr"].isin(chosen).to_numpy() & choice.inside()]
        sentence.value = f"<p>{_chosen_in_words(runs, len(table))}</p>"
        numbers.value = html_table(_means(runs), rows_in_view=10) if len(runs) else ""
        return view.show(page.picked)

    controls = [[score], [HTML("learning rates"), *rates.values()], choice.controls]
    return Explorer(controls, [curve, HTML(HINT), plane, sentence, *view.boxes, numbers], draw, page)


def _with_run(table: pd.DataFrame) -> pd.DataFrame:
    """Each row with the name of its run: the store's, or without a store any."""
    return table if "run" in table else table.assign(run=table.index.astype(str))


def _pickable(places: np.ndarray, shown: np.ndarray, inside: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """At most ``MOST_SPOTS`` of the rows shown, from left to right: one stands for neighbours in a crowd.

    Chosen runs come before those aside, so that a rectangle around a crowd makes more of it pickable.

    Args:
        places: (rows, 2), accuracy and retained accuracy.
        shown, inside, picked: (rows,) of bool.
    """
    rows = np.flatnonzero(shown & np.isfinite(places).all(axis=1))
    rows = rows[np.argsort(~(inside | picked)[rows], kind="stable")]
    cell = FINEST
    while len(rows) > MOST_SPOTS:
        x, y = (places[rows] / cell).round().astype(int).T
        rows = rows[np.sort(np.unique((x * CELLS + y) * 2 + inside[rows], return_index=True)[1])]
        cell *= 1.5
    return rows[np.lexsort(places[rows, ::-1].T)]


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
