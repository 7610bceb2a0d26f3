"""Pictures under a slider: drawn once by the library's own plots, then only what a window moves."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from lora_lens import plots
from lora_lens.forgetting.features import FeatureNorms
from lora_lens.plots.windows import part_maps
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
