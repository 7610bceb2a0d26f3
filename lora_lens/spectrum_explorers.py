"""Explorers of spectra and of the windows cut out of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from textwrap import shorten

import pandas as pd
import torch
from ipywidgets import HTML, Dropdown, FloatSlider, IntSlider, VBox
from matplotlib.figure import Figure
from torch import Tensor, nn

from lora_lens import plots
from lora_lens.adapter import attach, chosen_layers, evaluating
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
from lora_lens.readouts import to_device
from lora_lens.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum_plots import show_image
from lora_lens.tasks import Examples, Task
from lora_lens.token_examples import TokenExamples
from lora_lens.window import Window

IMAGES_WITH_FEATURES = 3
LETTERS = 300  # of a text


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

    Controls: the layer to look at, rank and position of the window, and of texts
    which one. Shown: the layer's spectrum with the window shaded; what the window and the residual
    carry of the features of three images, or of each token of the text
    (:func:`lora_lens.feature_split`); the
    weight, the window's slice of it and the residual; the window's energy in this
    layer and in these features; the task's predictions for a few test examples before and
    after :func:`lora_lens.attach`, and the largest difference of the logits, relative to the largest.
    Of a language task, whose predictions are tokens, it is counted how many are the same.

    Args:
        model: the pretrained model; it is only read.
        spectra: its spectra. The layers to look at are those whose inputs are an image's tokens on a
            square grid, or a text's tokens: linear layers, no convolutions.
        task: what the model can do, by itself or with the head of :func:`lora_lens.probed`; its first test
            examples are shown, images (n, channels, height, width) or texts.
        rank: of the window at first.
        images: how many test images or texts to show with their predictions.

    Raises:
        ValueError: there are no spectra or they are another model's, the rank
            does not fit a weight, the inputs are neither images nor texts, no layer has their tokens, or the
            model cannot do the task.
    """
    _require_spectra(spectra)
    examples = task.test.first(images)
    look = _look_of(task, examples)
    device = next(model.parameters()).device
    before = _logits(model, task, examples)
    prefix = getattr(model, "num_prefix_tokens", None)  # timm's count of class token and registers
    layer = dropdown("layer", look.layers(model, spectra, prefix))
    cuts = SpectrumSet([spectra[name] for name in chosen_layers(model, None, spectra)])
    size, position = _rank_slider(rank, cuts), _position_slider()
    place, cut, answers, numbers = HTML(), HTML(), HTML(), table_box()

    def draw() -> None:
        window = Window(size.value, position=position.value)
        adapted = attach(model, window, spectra=spectra)
        after = _logits(adapted, task, examples)
        same = before.argmax(-1) == after.argmax(-1)
        spectrum = spectra[layer.value]
        part = window.slice(spectrum.k, spectrum.name)
        seen = to_device(examples.batch(look.rows()), device)
        split = feature_split(model, layer.value, spectrum, window, seen)
        place.value = drawn(
            lambda figure: _draw_place(figure, spectrum, window, split, look, prefix),
            f"{layer.value}: singular values with the {window} shaded, and {look.features_in_words()}",
            size=(10, 4.3),
        )
        cut.value = drawn(
            lambda figure: plots.decomposition(spectrum, window, fixed_row(figure, 3)),
            f"{layer.value}: the weight, the slice in the {window}, and the residual",
            size=(10, 3.4),
        )
        answers.value = look.answers(before, after)
        facts = {
            "window": f"[{part.start}, {part.stop}) of {spectrum.k}",
            "energy in the window": f"{spectrum.energy(window):.2%}",
            "energy in the residual": f"{1 - spectrum.energy(window):.2%}",
            f"of the features of {look.what()}": f"{float(split.shares.mean()):.2%} in the window",
            "same predictions": f"{int(same.sum())} of {len(same)}",
            "largest logit difference (relative)": f"{_relative_difference(after, before):.1e}",
        }
        numbers.value = html_table(pd.DataFrame([facts]))

    return explorer([[layer, *look.controls], [size, position]], [place, numbers, cut, answers], draw)


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
def _logits(model: nn.Module, task: Task, examples: Examples) -> Tensor:
    """What the model answers as it does the task by itself, (items, choices)."""
    device = next(model.parameters()).device
    inputs = to_device(examples.batch(torch.arange(len(examples))), device)
    with evaluating(model):
        return task.own_readout(model).to(device)(model, inputs, examples.labels.to(device))[0].float()


def _relative_difference(now: Tensor, reference: Tensor) -> float:
    return float((now.double() - reference).abs().max() / reference.abs().max())


def _draw_place(
    figure: Figure, spectrum: Spectrum, window: Window, split: FeatureSplit, look: _Look, prefix: int | None
) -> None:
    """The spectrum with the window on the left, the features on the right."""
    figure.set_layout_engine("none")
    plots.spectrum(spectrum, window, ax=figure.add_axes((0.105, 0.13, 0.37, 0.75)))
    look.draw_features(figure, split, prefix)


def _look_of(task: Task, examples: Examples) -> _Look:
    if hasattr(examples, "pieces"):
        return _Texts(task, examples)
    if examples.inputs.ndim == 4:
        return _Images(task, examples)
    raise ValueError(
        f"{task.name} has inputs of shape {tuple(examples.inputs.shape[1:])}; this explorer shows images, "
        "(channels, height, width), and texts"
    )


class _Images:
    """How images are looked at: the first three with maps of their features, all with their answers."""

    def __init__(self, task: Task, examples: Examples) -> None:
        self.task, self.examples = task, examples
        self.controls: list[Dropdown] = []

    def rows(self) -> Tensor:
        """The examples whose features are shown."""
        return torch.arange(min(IMAGES_WITH_FEATURES, len(self.examples)))

    def what(self) -> str:
        return f"{len(self.rows())} images"

    def features_in_words(self) -> str:
        return f"maps of what window and residual carry of the features of {self.what()}"

    def layers(self, model: nn.Module, spectra: SpectrumSet, prefix: int | None) -> list[str]:
        """Those with a spectrum whose inputs are tokens that lie on the images."""
        inputs = to_device(self.examples.batch(self.rows()), next(model.parameters()).device)
        found = []
        for name, positions in splittable(model, spectra, inputs).items():
            with suppress(ValueError):
                patch_grid(positions, prefix)
                found.append(name)
        if not found:
            raise ValueError(
                f"none of the layers with a spectrum ({spectra!r}) is a linear one whose inputs are an "
                "image's tokens on a square grid, so there are no features to lay over the images"
            )
        return found

    def draw_features(self, figure: Figure, split: FeatureSplit, prefix: int | None) -> None:
        places = {"left": 0.53, "right": 0.99, "bottom": 0.06, "top": 0.88, "wspace": 0.05, "hspace": 0.3}
        axes = figure.subplots(len(self.rows()), 3, squeeze=False, gridspec_kw=places)
        plots.feature_maps(self.examples.batch(self.rows()), split, prefix=prefix, axes=axes)

    def answers(self, before: Tensor, after: Tensor) -> str:
        names = [[self.task.classes[i] for i in logits.argmax(-1).tolist()] for logits in (before, after)]

        def draw(figure: Figure) -> None:
            axes = fixed_row(figure, len(self.examples), bottom=0.02, top=0.76, wspace=0.1)
            for ax, image, old, new in zip(axes, self.examples.inputs, *names, strict=True):
                show_image(ax, image)
                ax.set_title(f"before: {old}\nafter: {new}", fontsize=8, loc="center")

        alt = f"{len(after)} test images with the predicted class before and after attaching"
        return drawn(draw, alt, size=(10, 1.85))


class _Texts:
    """How texts are looked at: one, chosen among them, token by token, and all with their answers."""

    def __init__(self, task: Task, examples: TokenExamples) -> None:
        self.task, self.examples = task, examples
        self.beginnings = [self._written(row, 40) for row in range(len(examples))]
        options = [(f"{row + 1}: {start}", row) for row, start in enumerate(self.beginnings)]
        self.controls = [Dropdown(options=options, description="text")]

    def rows(self) -> Tensor:
        """The examples whose features are shown."""
        return torch.tensor([self.controls[0].value])

    def what(self) -> str:
        return f"text {self.controls[0].value + 1}"

    def features_in_words(self) -> str:
        return f"the window's share of the features of each token of {self.what()}"

    def layers(self, model: nn.Module, spectra: SpectrumSet, _prefix: int | None) -> list[str]:
        """Those with a spectrum whose inputs are the texts' tokens."""
        inputs = to_device(self.examples.batch(self.rows()), next(model.parameters()).device)
        tokens = inputs["input_ids"].shape[1]
        found = [name for name, number in splittable(model, spectra, inputs).items() if number == tokens]
        if not found:
            raise ValueError(
                f"none of the layers with a spectrum ({spectra!r}) is a linear one whose inputs are a text's "
                "tokens, so there are no features to show of them"
            )
        return found

    def draw_features(self, figure: Figure, split: FeatureSplit, _prefix: int | None) -> None:
        ax = figure.add_axes((0.53, 0.04, 0.46, 0.84))
        plots.token_shares(self.examples.pieces(int(self.rows())), split.position_shares[0], ax=ax)

    def answers(self, before: Tensor, after: Tensor) -> str:
        """A table; nothing for a language task, whose answers are tokens."""
        if not self.task.classes:
            return ""
        right, old, new = (
            [self.task.classes[i] for i in numbers.tolist()]
            for numbers in (self.examples.labels, before.argmax(-1), after.argmax(-1))
        )
        texts = [self._written(row, LETTERS) for row in range(len(self.examples))]
        columns = {"class": right, "before": old, "after": new, "text": texts}
        with pd.option_context("display.max_colwidth", None):
            return html_table(pd.DataFrame(columns))

    def _written(self, row: int, letters: int) -> str:
        texts = self.examples.texts
        whole = "".join(self.examples.pieces(row)) if texts is None else texts[row]
        return shorten(whole, letters, placeholder=" ...")


_Look = _Images | _Texts
