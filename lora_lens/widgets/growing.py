"""The explorer of a training's checkpoints: what was forgotten by then, and which layers had moved."""

from __future__ import annotations

from functools import lru_cache

import pandas as pd
from ipywidgets import HTML, Dropdown, HBox, Layout, SelectionSlider
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from lora_lens import plots
from lora_lens._base.validate import instance
from lora_lens.forgetting.measuring import Growth
from lora_lens.plots._image import drawn
from lora_lens.plots.after_training import GROWTH
from lora_lens.plots.drift import SHARES
from lora_lens.widgets._explorer import WORDS, Explorer, Parts, explorer, html_table, table_box
from lora_lens.widgets._picture import Picture, fixed_axes
from lora_lens.widgets.one_window import SHARE, SIDE_BY_SIDE

# Of a layer, in percent: how far it moved, and between which components of its pretrained weight.
LAYERS = {"relative": "relative update", "diagonal": "share that changes singular values"} | {
    column: f"share {words}" for column, words in SHARES.items()
}


@explorer
def growth_explorer(growth: Growth) -> Explorer:
    """A training's checkpoints: go through them, and see what was forgotten and which layers had moved.

    Controls: the step, at first the last; the measure whose curve is shown, at first forgetting, if it was
    measured; and of each layer how far it moved, or which share of its update lies between which components
    of the pretrained weight (of a window; those of :func:`lora_lens.forgetting.drift`, with spectra). Shown:
    the curve with the step marked; all measures at that step beside the last, and the layer that moved most;
    and a map of the layers, whose colours are those of one scale over all steps.

    Args:
        growth: from :func:`lora_lens.forgetting.growth`.

    Raises:
        TypeError: it is another table.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> adapted = ll.attach(model, ll.LoRA(2), targets="0")
        >>> with TemporaryDirectory() as folder:
        ...     for step in (10, 20):  # as a trainer does
        ...         _ = adapted.get_parameter("base_model.model.0.lora_B.default.weight").data.add_(0.1)
        ...         adapted.save_pretrained(f"{folder}/checkpoint-{step}")
        ...     growth = ll.forgetting.growth(folder, model)
        >>> explorer = ll.widgets.growth_explorer(growth)  # the last line of a cell shows it
        >>> [control.description for control in explorer.children[1].children]
        ['step', 'measure', 'of each layer']
    """
    instance(growth, Growth, "growth", "what ll.forgetting.growth returns, with its layers")
    layers = growth.layers
    measures = [(name, score) for score, (name, _) in GROWTH.items() if score in growth]
    steps = [(f"{step:g}", step) for step in layers["step"].unique()]
    wide = Layout(width="30em", max_width="98%")
    step = SelectionSlider(options=steps, index=len(steps) - 1, description="step", layout=wide)
    first = "forgetting" if "forgetting" in growth else "relative"
    measure = Dropdown(options=measures, value=first, description="measure")
    known = [
        (name, column) for column, name in LAYERS.items() if column in layers and layers[column].notna().any()
    ]
    of_layers = Dropdown(options=known, description="of each layer", style=WORDS)
    curve, depth = HTML(layout=Layout(**SHARE)), HTML(layout=Layout(**SHARE))
    numbers = table_box()

    @lru_cache(maxsize=8)
    def curve_of(score: str) -> _Curve:
        return _Curve(growth, score)

    @lru_cache(maxsize=64)
    def map_of(at: int, column: str) -> str:
        name = f"{LAYERS[column]} (%)"
        percent = layers.assign(**{name: 100 * layers[column]})
        top = percent[name].max() if column == "relative" else 100
        moved = percent[percent["step"] == at]
        return drawn(
            lambda figure: _draw_map(figure, moved, name, top),
            f"{LAYERS[column]} by layer at step {at:g}, {moved[name].min():.3g} to {moved[name].max():.3g}%",
            size=(6.5, 5.2),
        )

    def draw() -> Parts:
        here, last = (growth[growth["step"] == at].iloc[0] for at in (step.value, steps[-1][1]))
        said = _in_words(measure.value, here[measure.value])
        alt = f"{measure.label} over the steps; at step {step.label} it is {said}"
        curve.value = curve_of(measure.value).html(here, alt)
        rows = {f"step {step.label}": here}
        if step.value != last["step"]:
            rows[f"step {steps[-1][0]}, the last"] = last
        shown = {name: [_in_words(score, row[score]) for row in rows.values()] for name, score in measures}
        most = [
            layers.loc[layers.loc[layers["step"] == row["step"], "relative"].idxmax()]
            for row in rows.values()
        ]
        shown["moved most"] = [f"{row['layer']}, by {row['relative']:.2%} of its weight" for row in most]
        numbers.value = html_table(pd.DataFrame({"checkpoint": list(rows), **shown}))
        return slow(step.value, of_layers.value)

    def slow(at: int, column: str) -> Parts:
        yield depth, map_of(at, column)

    shown = [HBox([curve, depth], layout=SIDE_BY_SIDE), numbers]
    return Explorer([[step, measure, of_layers]], shown, draw)


def _in_words(score: str, value: float) -> str:
    return f"{value:.2%}" if GROWTH[score][1] else f"{value:.3g}"


def _draw_map(figure: Figure, moved: pd.DataFrame, name: str, top: float) -> None:
    ax = plots.by_depth(moved, name, heat_map=True, limits=(0, top), ax=figure.subplots())
    ax.set_title(name.removesuffix(" (%)").capitalize())


class _Curve:
    """:func:`lora_lens.plots.growth`, in which the step moves."""

    def __init__(self, growth: Growth, score: str) -> None:
        self.score = score

        def draw(figure: Figure) -> list[Artist]:
            ax = plots.growth(growth, score, ax=fixed_axes(figure, (0.17, 0.14, 0.8, 0.77)))
            ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": "black", "linestyle": ""}
            (self.point,) = ax.plot(growth["step"].iloc[-1:], growth[score].iloc[-1:], "o", **ring)
            return [self.point]

        self.picture = Picture(draw, (5, 4))

    def html(self, here: pd.Series, alt: str) -> str:
        self.point.set_data([here["step"]], [here[self.score]])
        return self.picture.html(alt)
