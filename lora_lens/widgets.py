"""Explorers for notebooks: the library's own calls, pictures and tables under sliders.

Each returns one container that already shows a sensible view. Bad arguments
raise at the door; what does not work later, at some setting of the controls,
is said in place until the controls are moved again.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from html import escape
from io import BytesIO

import numpy as np
import pandas as pd
import torch
from ipywidgets import (
    HTML,
    Checkbox,
    Dropdown,
    FloatSlider,
    HBox,
    IntSlider,
    Layout,
    ToggleButtons,
    VBox,
)
from ipywidgets import Widget as Control
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from lora_lens import plots
from lora_lens.adapter import attach, chosen_layers, function_error
from lora_lens.features import FeatureSplit, feature_split, patch_grid, splittable
from lora_lens.metrics import seed_means
from lora_lens.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum_plots import show_image
from lora_lens.tasks import Task
from lora_lens.window import Window

SWEEP_COLUMNS = (
    "method",
    "rank",
    "position",
    "start",
    "lr",
    "seed",
    "accuracy",
    "retained_accuracy",
    "forgetting",
)
IMAGES_WITH_FEATURES = 3
ALL = ""  # not None, for which ipywidgets shows an empty box
CURVES = {"forgetting": plots.forgetting_curve, "accuracy": plots.accuracy_curve}


def spectrum_explorer(spectra: SpectrumSet | Mapping[str, SpectrumSet], rank: int = 8) -> VBox:
    """Spectra of one weight, one kind or one block, with a window to slide over them.

    Controls: model, if there are several; kind, block, rank and position of
    the window. Another model keeps the choices that it has, too. Shown: the
    singular values with the window shaded, and one row per kind with the
    effective rank, the stable rank and the window's share of the energy
    (means, where a row stands for several weights).

    Args:
        spectra: from :func:`lora_lens.spectra`, with or without vectors; or several, by the
            model's name.
        rank: of the window at first.

    Raises:
        ValueError: there are no spectra, or the rank does not fit one of them.
    """
    models = {"": spectra} if isinstance(spectra, SpectrumSet) else dict(spectra)
    _require_spectra(*models.values())
    tables = {name: some.table() for name, some in models.items()}
    model, kind, block = _dropdown("model", models), _dropdown("kind"), _dropdown("block")
    size, position = _rank_slider(rank, *models.values()), _position_slider()
    picture, numbers = HTML(), _table()

    def offer() -> None:
        """Let the controls hold what the model has; what is chosen already stays if it can."""
        table = tables[model.value]
        _offer(kind, [(k, k) for k in table["kind"].unique()])
        _offer(block, [(str(b) if b >= 0 else "none", b) for b in sorted(table["block"].unique().tolist())])
        if size.max != table["k"].max():
            size.max = int(table["k"].max())
            size.value = min(size.value, int(table["k"].min()))

    def draw() -> None:
        offer()
        table = tables[model.value]
        wanted = {"kind": kind.value, "block": block.value}
        for column, value in wanted.items():
            table = table if value == ALL else table[table[column] == value]
        if table.empty:
            raise ValueError(f"block {block.value} has no {kind.value}; choose another block or kind")
        chosen = SpectrumSet([models[model.value][name] for name in table["layer"]])
        window = Window(size.value, position=position.value)
        starts = [window.slice(s.k, s.name).start for s in chosen.values()]
        table = table.assign(start=starts, energy=[s.energy(window) for s in chosen.values()])
        picture.value = _drawn(
            lambda figure: plots.spectrum(chosen, window, ax=_fixed_axes(figure)),
            f"singular values of {_weights(len(chosen))}{model.value and f' of {model.value}'}, "
            f"with the {window} shaded",
        )
        numbers.value = _html(_by_kind(table, window))

    choices = [kind, block] if isinstance(spectra, SpectrumSet) else [model, kind, block]
    return _explorer([choices, [size, position]], [picture, numbers], draw)


def window_explorer(
    model: nn.Module, spectra: SpectrumSet, task: Task, rank: int = 8, images: int = 8
) -> VBox:
    """Cut a window out of every weight, look at one of them, and see that the model still says the same.

    Controls: the layer to look at, rank and position of the window. Shown:
    the layer's spectrum with the window shaded; what the window and the residual
    carry of the features of three images (:func:`lora_lens.feature_split`); the
    weight, the window's slice of it and the residual; the window's energy in this
    layer and in these features; the predictions for a few test images before and
    after :func:`lora_lens.attach`, and the largest difference of the logits
    (:func:`lora_lens.function_error`).

    Args:
        model: the pretrained model; it is only read.
        spectra: its spectra. The layers to look at are those whose inputs are an image's tokens on a
            square grid: linear layers, no convolutions.
        task: what the model can do; its first test inputs are shown, (n, channels, height, width).
        rank: of the window at first.
        images: how many test images to show with their predictions.

    Raises:
        ValueError: there are no spectra or they are another model's, the rank
            does not fit a weight, the inputs are no images, no layer has tokens on
            a grid, or the task has other classes than the model.
    """
    _require_spectra(spectra)
    inputs = task.test.first(images).inputs
    if inputs.ndim != 4:
        raise ValueError(
            f"{task.name} has inputs of shape {tuple(inputs.shape[1:])}; this explorer shows images, "
            "(channels, height, width)"
        )
    inputs = inputs.to(next(model.parameters()).device)
    before = _classes(model, inputs, task)
    seen = inputs[:IMAGES_WITH_FEATURES]
    prefix = getattr(model, "num_prefix_tokens", None)  # timm's count of class token and registers
    layer = _dropdown("layer", _on_a_grid(model, spectra, seen, prefix))
    cuts = SpectrumSet([spectra[name] for name in chosen_layers(model, None, spectra)])
    size, position = _rank_slider(rank, cuts), _position_slider()
    place, cut, answers, numbers = HTML(), HTML(), HTML(), _table()

    def draw() -> None:
        window = Window(size.value, position=position.value)
        adapted = attach(model, window, spectra=spectra)
        after = _classes(adapted, inputs, task)
        same = sum(a == b for a, b in zip(after, before, strict=True))
        spectrum = spectra[layer.value]
        part = window.slice(spectrum.k, spectrum.name)
        split = feature_split(model, layer.value, spectrum, window, seen)
        place.value = _drawn(
            lambda figure: _draw_place(figure, spectrum, window, seen, split, prefix),
            f"{layer.value}: singular values with the {window} shaded, and maps of what window and residual "
            f"carry of the features of {len(seen)} images",
            size=(10, 4.3),
        )
        cut.value = _drawn(
            lambda figure: plots.decomposition(spectrum, window, _fixed_row(figure, 3)),
            f"{layer.value}: the weight, the slice in the {window}, and the residual",
            size=(10, 3.4),
        )
        answers.value = _drawn(
            lambda figure: _draw_answers(figure, inputs, before, after),
            f"{len(after)} test images with the predicted class before and after attaching",
            size=(10, 1.85),
        )
        facts = {
            "window": f"[{part.start}, {part.stop}) of {spectrum.k}",
            "energy in the window": f"{spectrum.energy(window):.2%}",
            "energy in the residual": f"{1 - spectrum.energy(window):.2%}",
            f"of the features of {len(seen)} images": f"{float(split.shares.mean()):.2%} in the window",
            "same predictions": f"{same} of {len(after)}",
            "largest logit difference (relative)": f"{function_error(adapted, model, inputs):.1e}",
        }
        numbers.value = _html(pd.DataFrame([facts]))

    return _explorer([[layer], [size, position]], [place, numbers, cut, answers], draw)


def tradeoff_explorer(table: pd.DataFrame) -> VBox:
    """A sweep's table as curves and in the trade-off plane.

    Controls: the score of the curves, and which learning rates to show.
    Shown: the score against the window's position, the trade-off plane, and
    the means over seeds.

    Args:
        table: from :func:`lora_lens.sweep`; runs of windows placed by position.

    Raises:
        ValueError: the table is empty, lacks columns of a sweep, or has no
            run of a window placed by position.
    """
    if table.empty:
        raise ValueError("the table is empty: there are no runs to show")
    absent = [column for column in SWEEP_COLUMNS if column not in table]
    if absent:
        raise ValueError(
            f"this is no table of a sweep: it lacks {', '.join(absent)}; use what ll.sweep returns"
        )
    score = ToggleButtons(options=list(CURVES), description="score")
    rates = {rate: _checkbox(f"{rate:g}") for rate in sorted(table["lr"].unique())}
    curve, plane, numbers = HTML(), HTML(), _table()

    def draw() -> None:
        chosen = [rate for rate, box in rates.items() if box.value]
        if not chosen:
            raise ValueError("choose at least one learning rate")
        curve.value = _drawn(
            lambda figure: CURVES[score.value](table, chosen, ax=figure.subplots()),
            f"{score.value} against the position of the window, one line per learning rate",
        )
        plane.value = _drawn(
            lambda figure: plots.tradeoff(table, chosen, ax=figure.subplots()),
            "accuracy on the retained task against accuracy on the new task",
            size=(8, 4.8),
        )
        numbers.value = _html(_means(table[table["lr"].isin(chosen)]), rows_in_view=10)

    return _explorer([[score], [HTML("learning rates"), *rates.values()]], [curve, plane, numbers], draw)


def _explorer(rows: list[list[Control]], results: list[Control], draw: Callable[[], None]) -> VBox:
    """Rows of controls over a message over results; the first view raises, later ones say what is wrong.

    ``draw`` may change controls itself; that draws nothing again.
    """
    message, shown = HTML(), VBox(results)
    draw()
    drawing = False

    def redraw(_change: object) -> None:
        nonlocal drawing
        if drawing:
            return
        drawing = True
        try:
            draw()
        except ValueError as error:
            message.value = f'<p role="alert"><b>{escape(str(error))}</b></p>'
            shown.layout.display = "none"  # a stale picture would answer another question
        else:
            message.value = ""
            shown.layout.display = None
        finally:
            drawing = False

    for row in rows:
        for control in row:
            control.observe(redraw, "value")
    wrapped = Layout(flex_flow="row wrap", grid_gap="0 12px")
    return VBox([*(HBox(row, layout=wrapped) for row in rows), message, shown])


def _dropdown(description: str, options: Iterable[str] = ()) -> Dropdown:
    options = list(options)
    return Dropdown(options=options, index=0 if options else None, description=description)


def _offer(dropdown: Dropdown, options: list[tuple[str, object]]) -> None:
    """``all`` and ``options``; the value stays if it is among them."""
    options = [("all", ALL), *options]
    if tuple(options) != dropdown.options:
        kept = dropdown.value
        dropdown.options = options
        dropdown.value = kept if kept in dict(options).values() else ALL


def _checkbox(description: str) -> Checkbox:
    return Checkbox(True, description=description, indent=False, layout=Layout(width="max-content"))


def _rank_slider(rank: int, *models: SpectrumSet) -> IntSlider:
    all_spectra = [spectrum for spectra in models for spectrum in spectra.values()]
    for spectrum in all_spectra:
        Window.first(rank).slice(spectrum.k, spectrum.name)
    largest = max(spectrum.k for spectrum in all_spectra)
    return IntSlider(rank, 1, largest, description="rank", continuous_update=False)


def _position_slider() -> FloatSlider:
    return FloatSlider(0.5, min=0, max=1, step=0.01, description="position", continuous_update=False)


def _require_spectra(*models: SpectrumSet) -> None:
    if not models or not all(models):
        raise ValueError("there are no spectra to explore; make them with ll.spectra(model)")


def _table() -> HTML:
    numbers = HTML()
    numbers.add_class("jp-RenderedHTMLCommon")  # so that it looks like every other table of the notebook
    return numbers


def _drawn(draw: Callable[[Figure], object], alt: str, size: tuple[float, float] = (8, 4.2)) -> str:
    """A picture of constant size as an HTML image with a text for screen readers.

    Not ipywidgets' Image: that has no alternative text, and its view fails in some versions of
    JupyterLab. Drawn without pyplot, so that no figure stays open.
    """
    with plots.house_style():
        figure = Figure(figsize=size)
        draw(figure)
        png = BytesIO()
        FigureCanvasAgg(figure).print_png(png)
    source = b64encode(png.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{source}" style="max-width: 100%">'


def _fixed_axes(figure: Figure) -> Axes:
    """Axes that stay where they are as labels change, without the time that arranging them takes."""
    figure.set_layout_engine("none")
    return figure.add_axes((0.085, 0.14, 0.9, 0.77))


def _fixed_row(figure: Figure, count: int, **margins: float) -> np.ndarray:
    """Likewise ``count`` Axes side by side; shape (count,)."""
    figure.set_layout_engine("none")
    places = {"left": 0.065, "right": 0.99, "bottom": 0.15, "top": 0.86, "wspace": 0.17, **margins}
    return figure.subplots(1, count, squeeze=False, gridspec_kw=places)[0]


def _html(table: pd.DataFrame, rows_in_view: int | None = None) -> str:
    text = table.to_html(index=False, border=0, na_rep="")
    if rows_in_view is None or len(table) <= rows_in_view:
        return text
    height = f"max-height: {2 * rows_in_view}em; overflow: auto"
    return f'<div tabindex="0" role="region" aria-label="table" style="{height}">{text}</div>'


def _by_kind(table: pd.DataFrame, window: Window) -> pd.DataFrame:
    groups = table.groupby("kind", sort=False)
    stop = table["start"] + window.rank
    place = "[" + table["start"].astype(str) + ", " + stop.astype(str) + ") of " + table["k"].astype(str)
    return pd.DataFrame(
        {
            "weights": groups.size().astype(str),
            "window": place.groupby(table["kind"], sort=False).agg(lambda p: "; ".join(dict.fromkeys(p))),
            "largest s": groups["largest"].mean().map("{:.3g}".format),
            "smallest s": groups["smallest"].mean().map("{:.3g}".format),
            "effective rank": groups["effective_rank"].mean().map("{:.1f}".format),
            "stable rank": groups["stable_rank"].mean().map("{:.1f}".format),
            "energy in the window": groups["energy"].mean().map("{:.2%}".format),
        }
    ).reset_index()


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


def _weights(count: int) -> str:
    return f"{count} weight" + "s" * (count != 1)


@torch.inference_mode()
def _classes(model: nn.Module, inputs: Tensor, task: Task) -> list[str]:
    """The names of the classes that ``model`` predicts."""
    was_training = model.training
    logits = model.eval()(inputs)  # (n, classes)
    model.train(was_training)
    if logits.shape[-1] != len(task.classes):
        raise ValueError(
            f"{task.name} has {len(task.classes)} classes, but the model's own head has {logits.shape[-1]}; "
            "give the task that the model was pretrained on"
        )
    return [task.classes[i] for i in logits.argmax(-1).tolist()]


def _draw_answers(figure: Figure, inputs: Tensor, before: list[str], after: list[str]) -> None:
    axes = _fixed_row(figure, len(inputs), bottom=0.02, top=0.76, wspace=0.1)
    for ax, image, old, new in zip(axes, inputs, before, after, strict=True):
        show_image(ax, image)
        ax.set_title(f"before: {old}\nafter: {new}", fontsize=8, loc="center")


def _draw_place(
    figure: Figure,
    spectrum: Spectrum,
    window: Window,
    images: Tensor,
    split: FeatureSplit,
    prefix: int | None,
) -> None:
    """The spectrum with the window on the left, the images' features on the right."""
    figure.set_layout_engine("none")
    plots.spectrum(spectrum, window, ax=figure.add_axes((0.105, 0.13, 0.37, 0.75)))
    axes = figure.subplots(
        len(images), 3, squeeze=False,
        gridspec_kw={"left": 0.53, "right": 0.99, "bottom": 0.06, "top": 0.88, "wspace": 0.05, "hspace": 0.3},
    )  # fmt: skip
    plots.feature_maps(images, split, prefix=prefix, axes=axes)


def _on_a_grid(model: nn.Module, spectra: SpectrumSet, images: Tensor, prefix: int | None) -> list[str]:
    """The layers with a spectrum whose inputs are tokens that lie on the images."""
    found = []
    for name, positions in splittable(model, spectra, images).items():
        with suppress(ValueError):
            patch_grid(positions, prefix)
            found.append(name)
    if not found:
        raise ValueError(
            f"none of the layers with a spectrum ({spectra!r}) is a linear one whose inputs are an image's "
            "tokens on a square grid, so there are no features to lay over the images"
        )
    return found
