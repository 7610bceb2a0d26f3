"""The explorer of comparisons: what was forgotten, with the learning made equal in one way or another."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from html import escape

import numpy as np
import pandas as pd
from ipywidgets import HTML, Dropdown, FloatLogSlider, FloatSlider, Layout, ToggleButtons

from lora_lens import plots
from lora_lens._base.errors import InputError, LoraLensError
from lora_lens._base.naming import counted
from lora_lens._base.schema import sweep_table
from lora_lens.experiments.results import Sweep
from lora_lens.forgetting import fair_comparison
from lora_lens.forgetting.rate_ranges import rate_robustness
from lora_lens.forgetting.u_shape import u_shape_test
from lora_lens.plots._image import drawn
from lora_lens.widgets._explorer import (
    WORDS,
    Explorer,
    checkbox,
    dropdown,
    explorer,
    html_table,
    percent,
    plain_texts,
    rate_choice,
    table_box,
)

EQUAL_RATE, OWN_BEST_RATE = "equal learning rate", "own best rate"
MATCHED_ACCURACY, MATCHED_UPDATE = "matched accuracy", "matched update"


@explorer
def comparison_explorer(sweep: Sweep | pd.DataFrame) -> Explorer:
    """Forgetting against the window's position, with the learning made equal in one way or another.

    Controls: the comparison, at one learning rate (:func:`lora_lens.forgetting.at_equal_rate`), at each
    window's own best rate (:func:`~lora_lens.forgetting.at_own_best_rate`), at one accuracy on the new task
    (:func:`~lora_lens.forgetting.at_matched_accuracy`, at the rate that most runs reached it with) or at one
    size of the update (:func:`~lora_lens.forgetting.at_matched_update`); the rate, accuracy or update that
    it is made at; the score; which seeds take part; and the accuracy that a learning rate may cost before
    it counts as off. Shown: the score with its 95% intervals over seeds; at an equal rate the answer of
    :func:`lora_lens.forgetting.u_shape_test`; the numbers; and how far each window's rate may be off
    (:func:`~lora_lens.forgetting.rate_robustness`).

    Args:
        sweep: from :func:`lora_lens.sweep`: runs with one value of every setting but window, rate and seed.
            Matched accuracy needs their curves and matched update their drifts; for a table alone, or
            without drifts, that comparison is not offered.

    Raises:
        ValueError: the table is empty or lacks columns of a sweep, two runs share window, rate and seed,
            or no seed of a window was run at all its rates.

    Example:
        >>> import lora_lens as ll, pandas as pd
        >>> settings = {"method": "window", "rank": 8, "start": None, "lr": 0.01, "seed": 0}
        >>> scores = {"accuracy": [0.9, 0.9, 0.8], "retained_accuracy": [0.6, 0.8, 0.7], "forgetting": 0.1}
        >>> table = pd.DataFrame({"position": [0, 0.5, 1], **settings, **scores}).assign(diverged=False)
        >>> explorer = ll.widgets.comparison_explorer(table)  # the last line of a cell shows it
        >>> explorer.children[1].children[0].options
        ('equal learning rate', 'own best rate')
    """
    table = sweep_table(sweep, "diverged", *(["run"] if isinstance(sweep, Sweep) else []))
    kept = sweep.only(table) if isinstance(sweep, Sweep) else None
    along = None if kept is None else kept.curves()
    moved = None if kept is None else _drifts_in(kept)
    rate = rate_choice(table)
    compare: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
        EQUAL_RATE: lambda runs: fair_comparison.at_equal_rate(runs[runs["lr"] == rate.value]),
        OWN_BEST_RATE: fair_comparison.at_own_best_rate,
    }
    settings = {EQUAL_RATE: rate}
    if along is not None:
        settings[MATCHED_ACCURACY] = accuracy = _accuracy_slider(table, along)
        compare[MATCHED_ACCURACY] = lambda runs: _most_reached(
            fair_comparison.at_matched_accuracy(runs, along, accuracy.value)
        )
    if moved is not None:
        settings[MATCHED_UPDATE] = update = _update_slider(table, moved)
        compare[MATCHED_UPDATE] = lambda runs: fair_comparison.at_matched_update(
            runs, moved[moved["run"].isin(runs["run"])], update.value
        )
    comparison = dropdown("comparison", compare)
    score = ToggleButtons(options=list(fair_comparison.SCORES[::-1]), description="score")
    seeds = {seed: checkbox(f"{seed}") for seed in sorted(table["seed"].unique())}
    tolerance = FloatSlider(
        2, min=0.5, max=10, step=0.5, readout_format=".1f", description="tolerance (points of accuracy)",
        **_long_slider(),
    )  # fmt: skip
    picture, sentence, numbers, bars = HTML(), HTML(), table_box(), HTML()

    @lru_cache(maxsize=16)
    def robustness(chosen: tuple[int, ...], points: float) -> str:
        widths = rate_robustness(table[table["seed"].isin(chosen)], points / 100)
        return drawn(
            lambda figure: plots.robustness(widths, ax=figure.subplots()),
            f"learning rates that cost at most {points:g} points of accuracy, one bar for each of "
            f"{len(widths)} windows and methods, means over {counted(widths['seeds'].max(), 'seed')}",
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
            raise InputError("choose at least one seed")
        runs = table[table["seed"].isin(chosen)]
        result = compare[comparison.value](runs)
        at = _at(comparison.value, settings.get(comparison.value))
        picture.value = drawn(
            lambda figure: plots.comparison(result, score=score.value, ax=figure.subplots()),
            f"{score.value} against the position of the window at {at}, with intervals over "
            f"{counted(result['seeds'].max(), 'seed')}",
        )
        sentence.value = f"<p>{escape(_in_words(result, runs, comparison.value))}</p>"
        numbers.value = html_table(_compared(result))
        bars.value = robustness(chosen, tolerance.value)

    rows = [[comparison, *settings.values()], [score, HTML("seeds"), *seeds.values()], [tolerance]]
    return Explorer(rows, [picture, sentence, numbers, bars], draw)


def _drifts_in(sweep: Sweep) -> pd.DataFrame | None:
    try:
        return sweep.drifts()
    except InputError:  # none was kept: a comparison fewer, not an error
        return None


def _long_slider() -> dict[str, object]:
    """For one with a long name, that asks for more than a picture while it moves."""
    return {"continuous_update": False, "style": WORDS, "layout": Layout(width="36em", max_width="98%")}


def _accuracy_slider(table: pd.DataFrame, along: pd.DataFrame) -> FloatSlider:
    """From where training begins to the best of all; at first what all seeds of every window reach."""
    begin = along.loc[along.groupby("run")["step"].idxmin(), "accuracy"].mean()
    worst_seed = table.groupby([*fair_comparison.WINDOW, "lr"], dropna=False)["accuracy"].min()
    reached = worst_seed.groupby(level=fair_comparison.WINDOW, dropna=False).max().min()
    low, start, high = (np.floor(100 * v) / 100 for v in (begin, reached, along["accuracy"].max()))
    return FloatSlider(
        np.clip(start, low, high), min=low, max=high, step=0.01, readout_format=".0%",
        description="accuracy to match", **_long_slider(),
    )  # fmt: skip


def _update_slider(table: pd.DataFrame, moved: pd.DataFrame) -> FloatLogSlider:
    """From the smallest to the largest update of a run; at first the middle of what most windows span."""
    spans = table.assign(update=table["run"].map(fair_comparison.relative_updates(moved))).query("update > 0")
    update = spans["update"]
    low, high = np.log10(update.min()), np.log10(update.max())
    spans = spans.groupby(fair_comparison.WINDOW, dropna=False)["update"].agg(["min", "max"])
    start = np.sqrt(spans["min"].median() * spans["max"].median())
    return FloatLogSlider(
        start, base=10, min=low, max=high, step=(high - low) / 100 or 0.01, readout_format=".3f",
        description="update to match", **_long_slider(),
    )  # fmt: skip


def _most_reached(result: pd.DataFrame) -> pd.DataFrame:
    return result[result["most_reached"]].drop(columns="most_reached")


def _at(comparison: str, control: Dropdown | FloatSlider | FloatLogSlider | None) -> str:
    """The comparison and its value in words, as in "equal learning rate 0.005"."""
    if comparison == OWN_BEST_RATE:
        return "each one's own best learning rate"
    value = control.value
    return f"{comparison} {f'{value:.0%}' if comparison == MATCHED_ACCURACY else f'{value:.3g}'}"


def _in_words(result: pd.DataFrame, runs: pd.DataFrame, comparison: str) -> str:
    """What to know before one reads the picture, in one sentence."""
    if comparison == EQUAL_RATE:
        try:
            return u_shape_test(runs, float(result["lr"].iloc[0])).words
        except LoraLensError as error:  # one rank too many or one end too few: the picture stands without it
            return f"No test of a U-shape: {error}."
    if comparison == OWN_BEST_RATE:
        same = int((result["selected_on"] == "same seeds").sum())
        if not same:
            return "Each seed is judged at the rate that is best over the other seeds."
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
    for score in fair_comparison.SCORES:
        if score in result:
            shown[f"{score} (%) [95% interval]"] = [
                percent(*result.loc[row, [score, f"{score}_low", f"{score}_high"]]) for row in result.index
            ]
    return pd.DataFrame(shown)
