"""Pictures under a slider: drawn once by the library's own plots, then only what a window moves."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from lora_lens import plots
from lora_lens.forgetting.features import FeatureEnergies, FeatureNorms, patch_grid
from lora_lens.plots.spectra import HEAT
from lora_lens.plots.windows import ROUNDING, SIGNED, part_maps
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum.window import Window
from lora_lens.widgets._picture import Picture, fixed_axes, fixed_row

LABELS = 0.95  # inches, for an axis of few decades: its numbers are written as products
PIXELS = 128  # of a matrix that are drawn in each direction


class SpectrumPicture:
    """:func:`lora_lens.plots.spectrum`, in which the window moves."""

    def __init__(self, spectra: SpectrumSet | Spectrum, size: tuple[float, float] = (8, 4.2)) -> None:
        self.k = spectra.k if isinstance(spectra, Spectrum) else max(s.k for s in spectra.values())

        def draw(figure: Figure) -> list[Artist]:
            left = LABELS / size[0]
            ax = plots.spectrum(
                spectra, Window.first(1), ax=fixed_axes(figure, (left, 0.14, 0.98 - left, 0.77))
            )
            self.span = ax.patches[-1]
            return [self.span]

        self.picture = Picture(draw, size)

    def html(self, window: Window, alt: str) -> str:
        part = window.slice(self.k)
        self.span.set_x(part.start - 0.5)
        self.span.set_width(part.stop - part.start)
        return self.picture.html(alt)

    def for_page(self) -> dict[str, object]:
        """What a page needs to draw the window by itself (follower.js)."""
        ax = self.span.axes
        return {
            "kind": "spectrum",
            "k": self.k,
            "boxes": [_box(ax)],
            "under": self.picture.below(),
            "limits": ax.get_xlim(),
            "shade": to_hex(self.span.get_facecolor(), keep_alpha=True),
        }


class DecompositionPicture:
    """:func:`lora_lens.plots.decomposition`, in which slice and residual change.

    Of a large matrix every n-th row and column is drawn, as a picture of this size shows little more.
    """

    def __init__(self, spectrum: Spectrum, size: tuple[float, float] = (9, 3.2)) -> None:
        self.spectrum = spectrum
        self.drawn = tuple(slice(None, None, -(-length // PIXELS)) for length in spectrum.shape)

        def draw(figure: Figure) -> list[Artist]:
            axes = plots.decomposition(spectrum, Window.first(1), fixed_row(figure, 3))
            weight, self.slice, self.residual = (ax.images[0] for ax in axes)
            self.whole = np.asarray(weight.get_array())[self.drawn]
            weight.set_data(self.whole)
            self.title = axes[1].title
            lines = [spine for ax in axes[1:] for spine in ax.spines.values()]  # which lie over the images
            return [self.slice, self.residual, self.title, *lines]

        self.picture = Picture(draw, size)

    def html(self, window: Window, alt: str) -> str:
        (left, right), (rows, columns) = self.spectrum.vectors(window), self.drawn
        values = self.spectrum.singular_values[self.spectrum.components_of(window)].float()
        part = (left[rows] * values @ right[:, columns].contiguous()).numpy()
        top = np.abs(part).max()
        self.slice.set_data(part)
        self.slice.set_clim(-top, top)
        self.residual.set_data(self.whole - part)
        self.title.set_text(f"slice\n(colours ±{top:.2g})")
        return self.picture.html(alt)

    def for_page(self) -> dict[str, object]:
        """What a page needs to draw slice and residual by itself (follower.js)."""
        (left, right), (rows, columns) = self.spectrum.vectors(Window(self.spectrum.k, start=0)), self.drawn
        values = self.spectrum.singular_values.float()
        return {
            "kind": "matrices",
            "k": self.spectrum.k,
            "boxes": [_box(image.axes) for image in (self.slice, self.residual)],
            "rows": self.whole.shape[0],
            "columns": self.whole.shape[1],
            "left": _floats(left[rows] * values),
            "right": _floats(right[:, columns]),
            "whole": _floats(self.whole),
            "scale": self.residual.get_clim()[1],
            "colours": _colours(SIGNED),
        }


class FeatureMapsPicture:
    """:func:`lora_lens.plots.feature_maps` of the same images, in which the maps change."""

    def __init__(
        self, images: Tensor, split: FeatureNorms, prefix: int | None, size: tuple[float, float]
    ) -> None:
        self.prefix = prefix
        places = {"left": 0.01, "right": 0.99, "bottom": 0.07, "top": 0.87, "wspace": 0.05, "hspace": 0.3}

        def draw(figure: Figure) -> Iterable[Artist]:
            figure.set_layout_engine("none")
            axes = figure.subplots(len(images), 3, squeeze=False, gridspec_kw=places)
            plots.feature_maps(images, split, prefix=prefix, axes=axes)
            self.columns = axes[:, 1:].T
            for column in self.columns:
                yield column[0].title
                for ax in column:
                    yield from (ax.images[0], ax.xaxis.label)

        self.picture = Picture(draw, size)

    def html(self, split: FeatureNorms, alt: str) -> str:
        for column, part in zip(self.columns, part_maps(split, self.prefix), strict=True):
            column[0].title.set_text(part.title)
            for ax, norms, label in zip(column, part.norms, part.labels, strict=True):
                ax.images[0].set_data(norms)
                ax.images[0].set_clim(0, part.top)
                ax.xaxis.label.set_text(label)
        return self.picture.html(alt)

    def for_page(self, split: FeatureEnergies) -> dict[str, object]:
        """What a page needs to draw the maps by itself (follower.js)."""
        lead, side = patch_grid(split.energies.shape[1], self.prefix)
        return {
            "kind": "maps",
            "k": split.spectrum.k,
            "boxes": [_box(ax) for column in self.columns for ax in column],
            "side": side,
            "energies": _floats(split.energies[:, lead:]),
            "rounding": ROUNDING,
            "colours": _colours(HEAT),
        }


def _box(ax: Axes) -> tuple[float, float, float, float]:
    """Left, top, width and height in shares of the picture."""
    place = ax.get_position()
    return place.x0, 1 - place.y1, place.width, place.height


def _floats(values: Tensor | np.ndarray) -> bytes:
    return np.ascontiguousarray(values, "<f4").tobytes()


def _colours(name: str) -> bytes:
    """256 of red, green, blue and opacity."""
    return matplotlib.colormaps[name](np.arange(256), bytes=True).tobytes()
