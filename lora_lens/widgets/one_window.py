"""The explorer of one window: what it cuts out of a weight and of features, while all answers stay."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from textwrap import shorten
from threading import Lock

import pandas as pd
import torch
from ipywidgets import HTML, Dropdown, HBox, Layout
from matplotlib.figure import Figure
from torch import Tensor, nn

from lora_lens import plots
from lora_lens._base.errors import InputError
from lora_lens._base.torch_tools import evaluating
from lora_lens._base.validate import instance, whole_number
from lora_lens.adapters.attaching import attach
from lora_lens.adapters.low_rank import chosen_layers
from lora_lens.adapters.variant import Variant
from lora_lens.forgetting.features import (
    FeatureEnergies,
    FeatureNorms,
    feature_energies,
    patch_grid,
    splittable,
)
from lora_lens.plots._image import drawn
from lora_lens.plots._style import literal
from lora_lens.plots.spectra import some_spectra
from lora_lens.plots.windows import show_image
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.spectrum.window import Window
from lora_lens.tasks.readouts import to_device
from lora_lens.tasks.task import Examples, Task
from lora_lens.tasks.tokens import TokenExamples
from lora_lens.widgets._explorer import Explorer, Parts, dropdown, explorer, html_table, table_box
from lora_lens.widgets._follower import Follower, followed, small_parts
from lora_lens.widgets._live_pictures import DecompositionPicture, FeatureMapsPicture, SpectrumPicture
from lora_lens.widgets._picture import fixed_row
from lora_lens.widgets.spectra import position_slider, rank_slider

IMAGES_WITH_FEATURES = 3
LETTERS = 300  # of a text
HALF = (5, 4)  # inches, of two pictures side by side
SIDE_BY_SIDE = Layout(flex_flow="row wrap")
SHARE = {"flex": "1 1 20em", "min_width": "0"}  # of a row, on a phone all of it


@explorer
def window_explorer(
    model: nn.Module, spectra: SpectrumSet, task: Task, rank: int = 8, images: int = 8
) -> Explorer:
    """Cut a window out of every weight, look at one of them, and see that the model still says the same.

    Controls: the layer to look at, rank and position of the window, and of texts which one; and the form, by
    which the frozen base holds the residual or, offset, the pretrained weight (:class:`lora_lens.Variant`).
    Shown while the window moves: the layer's spectrum with the window shaded; what the window and the
    residual carry of the features of three images, or of each token of the text
    (:func:`lora_lens.forgetting.feature_split`); the window's energy in this layer and in these features; the
    weight, the window's slice of it and the residual. Once it rests: the task's predictions for a few test
    examples before and after :func:`lora_lens.attach`, and with the adapter switched off, and the largest
    differences of the logits, relative to the largest. Of a language task, whose predictions are tokens, it
    is counted how many are the same.

    Args:
        model: the pretrained model; it is only read.
        spectra: its spectra. The layers to look at are those whose inputs are an image's tokens on a
            square grid, or a text's tokens: linear layers, no convolutions.
        task: what the model can do, by itself or with the head of :func:`lora_lens.tasks.probed`; its first
            test examples are shown, images (n, channels, height, width) or texts.
        rank: of the window at first.
        images: how many test images or texts to show with their predictions.

    Raises:
        ValueError: there are no spectra or they are another model's, the rank
            does not fit a weight, the inputs are neither images nor texts, no layer has their tokens, or the
            model cannot do the task.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> spectra = ll.spectra(model, targets="blocks.0.attn.*", progress=False)
        >>> explorer = ll.widgets.window_explorer(model, spectra, task)  # the last line of a cell shows it
        >>> explorer.children[1].children[0].options
        ('blocks.0.attn.qkv', 'blocks.0.attn.proj')
    """
    instance(model, nn.Module, "model", "the pretrained model, a torch module")
    some_spectra(spectra)
    instance(task, Task, "task", "a Task that the model can do, such as that of ll.tasks.bundled.vision()")
    rank, images = whole_number(rank, "rank", least=1), whole_number(images, "images", least=1)
    examples = task.test.first(images)
    look = _look_of(task, examples)
    device = next(model.parameters()).device
    before = _logits(model, task, examples)
    prefix = getattr(model, "num_prefix_tokens", None)  # timm's count of class token and registers
    layer = dropdown("layer", look.layers(model, spectra, prefix))
    cuts = SpectrumSet([spectra[name] for name in chosen_layers(model, None, spectra)])
    size, position = rank_slider(rank, cuts), position_slider()
    form = dropdown("form", ["residual", "offset"])
    reading = Lock()  # one thread at a time: reading switches the model to evaluation and back
    place, seen = HTML(layout=Layout(**SHARE)), HTML(layout=Layout(**SHARE))
    numbers, cut, answers = table_box(), HTML(), HTML()
    follower = Follower(rank=size, position=position)

    @lru_cache(maxsize=1)
    def spectrum_of(name: str) -> tuple[SpectrumPicture, DecompositionPicture]:
        return SpectrumPicture(spectra[name], size=HALF), DecompositionPicture(spectra[name])

    @lru_cache(maxsize=1)
    def features_of(name: str, rows: tuple[int, ...]) -> FeatureEnergies:
        inputs = to_device(examples.batch(torch.tensor(rows)), device)
        with reading:
            return feature_energies(model, name, spectra[name], inputs)

    @lru_cache(maxsize=1)
    def parts_of(name: str, rows: tuple[int, ...]) -> dict[str, dict[str, object]]:
        """For the page, to follow the sliders; it leaves what is too large, or has none, to the kernel."""
        curve, matrices = spectrum_of(name)
        parts = {"spectrum": curve.for_page(), "matrices": matrices.for_page()}
        parts |= look.features_for_page(features_of(name, rows))
        return small_parts({f"{name}: {what}": part for what, part in parts.items()})

    def draw() -> Parts:
        window = Window(size.value, position=position.value)
        for s in cuts.values():
            window.slice(s.k, s.name)
        spectrum = spectra[layer.value]
        part = window.slice(spectrum.k)
        name, rows = layer.value, tuple(look.rows().tolist())
        curve, matrices = spectrum_of(name)
        split = features_of(name, rows).norms(window)
        shaded = curve.html(window, f"{name}: singular values with the {window} shaded")
        place.value = followed(shaded, f"{name}: spectrum", part)
        maps = look.features(split, prefix, f"{name}, {window}: {look.features_in_words()}")
        seen.value = followed(maps, f"{name}: features", part)
        sliced = matrices.html(window, f"{name}: the weight, the slice in the {window}, and the residual")
        cut.value = followed(sliced, f"{name}: matrices", part)
        follower.parts = parts_of(name, rows)
        facts = {
            "window": f"[{part.start}, {part.stop}) of {spectrum.k}",
            "energy in the window": f"{spectrum.energy(window):.2%}",
            "energy in the residual": f"{1 - spectrum.energy(window):.2%}",
            f"of the features of {look.what()}": f"{float(split.shares.mean()):.2%} in the window",
        }
        numbers.value = html_table(pd.DataFrame([facts]))
        return attached(window, form.value)

    def attached(window: Window, base: str) -> Parts:
        """All weights get their adapter, which takes a while in a large model."""
        with reading:
            adapted = attach(model, window, spectra=spectra, variant=Variant(base=base))
        yield
        after = _logits(adapted, task, examples)
        yield
        with adapted.disable_adapter():
            off = _logits(adapted, task, examples)
        same = [int((before.argmax(-1) == now.argmax(-1)).sum()) for now in (after, off)]
        error, error_off = (_relative_difference(now, before) for now in (after, off))
        words = (
            f"<p>Same predictions after attaching: {same[0]} of {before.argmax(-1).numel()}. Largest "
            f"difference of the logits, relative to the largest: {error:.1e}.</p><p>With the adapter "
            f"switched off, the {base} form gives {same[1]} of them; the difference is {error_off:.1e}.</p>"
        )
        yield answers, words + look.answers(before, after, off)

    shown = [HBox([place, seen], layout=SIDE_BY_SIDE), numbers, cut, answers, follower]
    return Explorer([[layer, *look.controls, form], [size, position]], shown, draw)


@torch.inference_mode()
def _logits(model: nn.Module, task: Task, examples: Examples) -> Tensor:
    """What the model answers as it does the task by itself, (items, choices)."""
    device = next(model.parameters()).device
    inputs = to_device(examples.batch(torch.arange(len(examples))), device)
    with evaluating(model):
        return task.own_readout(model).to(device)(model, inputs, examples.labels.to(device))[0].float()


def _relative_difference(now: Tensor, reference: Tensor) -> float:
    return float((now.double() - reference).abs().max() / reference.abs().max())


def _look_of(task: Task, examples: Examples) -> _Look:
    if hasattr(examples, "pieces"):
        return _Texts(task, examples)
    if len(examples.shape) == 3:
        return _Images(task, examples)
    raise InputError(
        f"{task.name} has inputs of shape {tuple(examples.shape)}; this explorer shows images, "
        "(channels, height, width), and texts"
    )


class _Images:
    """How images are looked at: the first three with maps of their features, all with their answers."""

    def __init__(self, task: Task, examples: Examples) -> None:
        self.task, self.examples = task, examples
        self.controls: list[Dropdown] = []
        self.maps: FeatureMapsPicture | None = None

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
            with suppress(InputError):
                if patch_grid(positions, prefix)[1] > 1:  # one position is no map
                    found.append(name)
        if not found:
            raise InputError(
                f"none of the layers with a spectrum ({spectra!r}) is a linear one whose inputs are an "
                "image's tokens on a square grid, so there are no features to lay over the images"
            )
        return found

    def features(self, split: FeatureNorms, prefix: int | None, alt: str) -> str:
        if self.maps is None:
            self.maps = FeatureMapsPicture(self.examples.batch(self.rows()), split, prefix, HALF)
        return self.maps.html(split, alt)

    def features_for_page(self, split: FeatureEnergies) -> dict[str, dict[str, object]]:
        return {} if self.maps is None else {"features": self.maps.for_page(split)}

    def answers(self, *logits: Tensor) -> str:
        """Before and after attaching, and switched off."""
        names = [[self.task.classes[i] for i in some.argmax(-1).tolist()] for some in logits]

        def draw(figure: Figure) -> None:
            axes = fixed_row(figure, len(self.examples), bottom=0.02, top=0.7, wspace=0.1)
            for ax, image, old, new, off in zip(axes, self.examples.inputs, *names, strict=True):
                show_image(ax, image)
                ax.set_title(literal(f"before: {old}\nafter: {new}\noff: {off}"), fontsize=8, loc="center")

        alt = f"{len(names[0])} test images with the class predicted before, after attaching and switched off"
        return drawn(draw, alt, size=(10, 2))


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
            raise InputError(
                f"none of the layers with a spectrum ({spectra!r}) is a linear one whose inputs are a text's "
                "tokens, so there are no features to show of them"
            )
        return found

    def features(self, split: FeatureNorms, _prefix: int | None, alt: str) -> str:
        def draw(figure: Figure) -> None:
            figure.set_layout_engine("none")
            ax = figure.add_axes((0.02, 0.04, 0.96, 0.84))
            plots.token_shares(self.examples.pieces(int(self.rows())), split.position_shares[0], ax=ax)

        return drawn(draw, alt, HALF)

    def features_for_page(self, _split: FeatureEnergies) -> dict[str, dict[str, object]]:
        """None: most of this picture is words."""
        return {}

    def answers(self, *logits: Tensor) -> str:
        """A table; nothing for a language task, whose answers are tokens."""
        if not self.task.classes:
            return ""
        right, old, new, off = (
            [self.task.classes[i] for i in numbers.tolist()]
            for numbers in (self.examples.labels, *(some.argmax(-1) for some in logits))
        )
        texts = [self._written(row, LETTERS) for row in range(len(self.examples))]
        columns = {"class": right, "before": old, "after": new, "switched off": off, "text": texts}
        with pd.option_context("display.max_colwidth", None):
            return html_table(pd.DataFrame(columns), headings="left")

    def _written(self, row: int, letters: int) -> str:
        texts = self.examples.texts
        whole = "".join(self.examples.pieces(row)) if texts is None else texts[row]
        return shorten(whole, letters, placeholder=" ...")


_Look = _Images | _Texts
