"""The explorer of one weight's spectra in several metrics: does data choose other components?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import pandas as pd
from ipywidgets import HTML
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from lora_lens import plots
from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.validate import whole_number
from lora_lens.plots._scores import PERCENT
from lora_lens.plots._style import literal
from lora_lens.plots.spectra import WINDOW_COLOUR, named_spectra
from lora_lens.spectrum.measures import cumulative_energy
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum.window import Window
from lora_lens.widgets._explorer import WORDS, Explorer, dropdown, explorer, html_table, table_box
from lora_lens.widgets._picture import Picture, fixed_row
from lora_lens.widgets.spectra import position_slider, rank_slider

MOST = 0.9  # of the energy: how many components hold it


@explorer
def metric_explorer(spectra: Mapping[str, SpectrumSet], rank: int = 8) -> Explorer:
    """One weight's spectra in several metrics, and whether a window holds the same directions in each.

    Controls: the layer; the spectrum that the others are compared with, at first the first one; rank and
    position of the window. Shown: the share of the energy that the largest components hold, in each metric,
    with the window shaded; and, for each component of the spectrum compared with, which share of its output
    direction the same window of another metric holds: 1 within the shaded window and 0 elsewhere if both
    windows hold the same directions, rank / k everywhere if data has nothing to do with the weight. In
    numbers: the effective rank, how many components hold 90% of the energy, the window's share of it, and
    the share of directions in common (:func:`lora_lens.spectrum.overlap`).

    Args:
        spectra: from :func:`lora_lens.spectra` with all vectors: of one model, plain and with ``metric=``, at
            least two, by names of your choice. Layers that only some of them have are left out.
        rank: of the window at first.

    Raises:
        ValueError: there are fewer than two sets of spectra, they have no layer in common or differ in its
            shape, vectors are missing, or the rank does not fit a weight.

    Example:
        >>> import lora_lens as ll, torch
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 6)), torch.randn(50, 8) * torch.arange(8)
        >>> metrics = {"plain": None, "inputs": x}
        >>> spectra = {name: ll.spectra(model, metric=m, progress=False) for name, m in metrics.items()}
        >>> explorer = ll.widgets.metric_explorer(spectra, rank=2)  # the last line of a cell shows it
        >>> [control.description for control in explorer.children[1].children]
        ['layer', 'compared with']
    """
    sets = _of_one_model(named_spectra(spectra))
    layer = dropdown("layer", next(iter(sets.values())))
    reference = dropdown("compared with", sets)
    reference.style = WORDS
    size, position = rank_slider(whole_number(rank, "rank", least=1), *sets.values()), position_slider()
    picture, numbers = HTML(), table_box()

    @lru_cache(maxsize=4)
    def picture_of(name: str, compared: str) -> _Picture:
        return _Picture({metric: some[name] for metric, some in sets.items()}, compared)

    def draw() -> None:
        window = Window(size.value, position=position.value)
        weights = {metric: some[layer.value] for metric, some in sets.items()}
        compared = weights[reference.value]
        part = window.slice(compared.k, layer.value)
        shares = {
            metric: _shares(compared, s, window) for metric, s in weights.items() if metric != reference.value
        }
        in_common = {metric: f"{float(share[part].mean()):.1%}" for metric, share in shares.items()}
        picture.value = picture_of(layer.value, reference.value).html(
            window,
            shares,
            f"{layer.value}: cumulative energy in {listed(weights)}, with the {window} shaded, and which "
            f"components of {reference.value} lie in it: "
            + ", ".join(f"of {metric} {share} in common" for metric, share in in_common.items()),
        )
        rows = [
            {
                "spectrum": metric,
                "effective rank": f"{s.effective_rank:.1f} of {s.k}",
                f"components for {MOST:.0%}": int((cumulative_energy(s.singular_values) < MOST).sum()) + 1,
                "energy in the window": f"{s.energy(window):.2%}",
                f"in common with {reference.value}": in_common.get(metric, ""),
                "by chance": f"{window.rank / s.k:.1%}" if metric in in_common else "",
            }
            for metric, s in weights.items()
        ]
        numbers.value = html_table(pd.DataFrame(rows))

    return Explorer([[layer, reference], [size, position]], [picture, numbers], draw)


def _of_one_model(sets: dict[str, SpectrumSet]) -> dict[str, SpectrumSet]:
    """The layers that all have.

    Raises:
        ValueError: there is one set only, or they are of different models.
    """
    if len(sets) < 2:
        raise InputError(
            f"there are spectra of {listed(sets)} only; give at least two, plain and with metric="
        )
    first, *others = sets.values()
    layers = [name for name in first if all(name in some for some in others)]
    if not layers:
        raise InputError(f"{listed(sets)} have no layer in common; give spectra of one model")
    for name in layers:
        if len(shapes := {some[name].shape for some in sets.values()}) > 1:
            raise InputError(f"{name} has the shapes {listed(map(str, shapes))}; give spectra of one model")
    return {metric: SpectrumSet([some[name] for name in layers]) for metric, some in sets.items()}


def _shares(compared: Spectrum, other: Spectrum, window: Window) -> Tensor:
    """Of the output direction of each component: what the other's window holds, (k,), in [0, 1]."""
    every, _ = compared.vectors(Window(compared.k, start=0))
    return (every.T @ other.vectors(window)[0]).square().sum(1)


class _Picture:
    """Energies on the left, the window's directions on the right, where the window moves over both."""

    def __init__(self, weights: Mapping[str, Spectrum], compared: str) -> None:
        self.k = weights[compared].k

        def draw(figure: Figure) -> list[Artist]:
            energy, directions = fixed_row(figure, 2, top=0.9, wspace=0.2)
            plots.cumulative_energy({metric: SpectrumSet([s]) for metric, s in weights.items()}, ax=energy)
            energy.set_title("Energy that the largest components hold")
            self.lines = {
                metric: directions.plot(range(self.k), [0] * self.k, color=line.get_color(), linewidth=1.4)[0]
                for metric, line in zip(weights, energy.lines, strict=False)  # the last is the diagonal
                if metric != compared
            }
            directions.yaxis.set_major_formatter(PERCENT)
            directions.set(
                xlim=(-0.5, self.k - 0.5),
                ylim=(0, 1.02),
                xlabel=literal(f"component of {compared} (0 = largest)"),
                ylabel="within the window (%)",
                title="Directions that the window holds",
            )
            self.spans = [
                ax.axvspan(0, 1, color=WINDOW_COLOUR, alpha=0.3, linewidth=0) for ax in (energy, directions)
            ]
            return [*self.spans, *self.lines.values()]

        self.picture = Picture(draw, (11, 4.2))

    def html(self, window: Window, shares: Mapping[str, Tensor], alt: str) -> str:
        part = window.slice(self.k)
        for span, scale, shift in zip(self.spans, (1 / self.k, 1), (0, -0.5), strict=True):
            span.set_x(part.start * scale + shift)
            span.set_width(window.rank * scale)
        for metric, share in shares.items():
            self.lines[metric].set_ydata(share)
        return self.picture.html(alt)
