"""Explorers of spectra and of the windows cut out of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import pandas as pd
import torch
from ipywidgets import HTML, FloatSlider, IntSlider, VBox
from matplotlib.figure import Figure
from torch import Tensor, nn

from lora_lens import plots
from lora_lens.adapter import attach, chosen_layers, function_error
from lora_lens.explorer import (
    ALL,
    drawn,
    dropdown,
    explorer,
    fixed_axes,
    fixed_row,
    html_table,
    offer_with_all,
    table_box,
)
from lora_lens.features import FeatureSplit, feature_split, patch_grid, splittable
from lora_lens.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum_plots import show_image
from lora_lens.tasks import Task
from lora_lens.window import Window

IMAGES_WITH_FEATURES = 3


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
    model, kind, block = dropdown("model", models), dropdown("kind"), dropdown("block")
    size, position = _rank_slider(rank, *models.values()), _position_slider()
    picture, numbers = HTML(), table_box()

    def offer() -> None:
        """Let the controls hold what the model has; what is chosen already stays if it can."""
        table = tables[model.value]
        offer_with_all(kind, [(k, k) for k in table["kind"].unique()])
        offer_with_all(
            block, [(str(b) if b >= 0 else "none", b) for b in sorted(table["block"].unique().tolist())]
        )
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
        picture.value = drawn(
            lambda figure: plots.spectrum(chosen, window, ax=fixed_axes(figure)),
            f"singular values of {_weights(len(chosen))}{model.value and f' of {model.value}'}, "
            f"with the {window} shaded",
        )
        numbers.value = html_table(_by_kind(table, window))

    choices = [kind, block] if isinstance(spectra, SpectrumSet) else [model, kind, block]
    return explorer([choices, [size, position]], [picture, numbers], draw)


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
    layer = dropdown("layer", _on_a_grid(model, spectra, seen, prefix))
    cuts = SpectrumSet([spectra[name] for name in chosen_layers(model, None, spectra)])
    size, position = _rank_slider(rank, cuts), _position_slider()
    place, cut, answers, numbers = HTML(), HTML(), HTML(), table_box()

    def draw() -> None:
        window = Window(size.value, position=position.value)
        adapted = attach(model, window, spectra=spectra)
        after = _classes(adapted, inputs, task)
        same = sum(a == b for a, b in zip(after, before, strict=True))
        spectrum = spectra[layer.value]
        part = window.slice(spectrum.k, spectrum.name)
        split = feature_split(model, layer.value, spectrum, window, seen)
        place.value = drawn(
            lambda figure: _draw_place(figure, spectrum, window, seen, split, prefix),
            f"{layer.value}: singular values with the {window} shaded, and maps of what window and residual "
            f"carry of the features of {len(seen)} images",
            size=(10, 4.3),
        )
        cut.value = drawn(
            lambda figure: plots.decomposition(spectrum, window, fixed_row(figure, 3)),
            f"{layer.value}: the weight, the slice in the {window}, and the residual",
            size=(10, 3.4),
        )
        answers.value = drawn(
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
        numbers.value = html_table(pd.DataFrame([facts]))

    return explorer([[layer], [size, position]], [place, numbers, cut, answers], draw)


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
    axes = fixed_row(figure, len(inputs), bottom=0.02, top=0.76, wspace=0.1)
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
