"""The explorer of spectra: of one model or of several, with a window to slide over them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import pandas as pd
from ipywidgets import HTML, FloatSlider, IntSlider, Layout

from lora_lens._base.errors import InputError
from lora_lens._base.naming import counted
from lora_lens._base.validate import whole_number
from lora_lens.plots.spectra import named_spectra, some_spectra
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.spectrum.window import Window
from lora_lens.widgets._explorer import (
    ALL,
    Explorer,
    dropdown,
    explorer,
    html_table,
    offer_with_all,
    table_box,
)
from lora_lens.widgets._follower import Follower, followed
from lora_lens.widgets._live_pictures import SpectrumPicture


@explorer
def spectrum_explorer(spectra: SpectrumSet | Mapping[str, SpectrumSet], rank: int = 8) -> Explorer:
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

    Example:
        >>> import lora_lens as ll, torch
        >>> spectra = ll.SpectrumSet([ll.spectrum.factorize("blocks.0.fc", torch.randn(6, 4))])
        >>> explorer = ll.widgets.spectrum_explorer(spectra, rank=2)  # the last line of a cell shows it
        >>> [control.description for control in explorer.children[1].children]
        ['kind', 'block']
    """
    models = {"": some_spectra(spectra)} if isinstance(spectra, SpectrumSet) else named_spectra(spectra)
    rank = whole_number(rank, "rank", least=1)
    tables = {name: some.table() for name, some in models.items()}
    model, kind, block = dropdown("model", models), dropdown("kind"), dropdown("block")
    size, position = rank_slider(rank, *models.values()), position_slider()
    picture, numbers = HTML(), table_box()
    follower = Follower(rank=size, position=position)

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

    @lru_cache(maxsize=4)
    def picture_of(name: str, layers: tuple[str, ...]) -> tuple[SpectrumPicture, dict[str, object]]:
        curves = SpectrumPicture(SpectrumSet([models[name][layer] for layer in layers]))
        return curves, curves.for_page()

    def draw() -> None:
        offer()
        table = tables[model.value]
        wanted = {"kind": kind.value, "block": block.value}
        for column, value in wanted.items():
            table = table if value == ALL else table[table[column] == value]
        if table.empty:
            raise InputError(f"block {block.value} has no {kind.value}; choose another block or kind")
        chosen = SpectrumSet([models[model.value][name] for name in table["layer"]])
        window = Window(size.value, position=position.value)
        starts = [window.slice(s.k, s.name).start for s in chosen.values()]
        table = table.assign(start=starts, energy=[s.energy(window) for s in chosen.values()])
        curves, for_page = picture_of(model.value, tuple(chosen))
        shaded = curves.html(
            window,
            f"singular values of {counted(len(chosen), 'weight')}{model.value and f' of {model.value}'}, "
            f"with the {window} shaded",
        )
        name = f"{model.value} {kind.value} {block.value}"
        picture.value = followed(shaded, name, window.slice(curves.k))
        follower.parts = {name: for_page}
        numbers.value = html_table(_by_kind(table, window))

    choices = [kind, block] if isinstance(spectra, SpectrumSet) else [model, kind, block]
    return Explorer([choices, [size, position]], [picture, numbers, follower], draw)


def rank_slider(rank: int, *models: SpectrumSet) -> IntSlider:
    for spectra in models:
        require_rank(rank, spectra)
    largest = max(spectrum.k for spectra in models for spectrum in spectra.values())
    return IntSlider(rank, 1, largest, description="rank")


def require_rank(rank: int, spectra: SpectrumSet) -> None:
    """Refuse a rank that one of the weights has no window of."""
    for spectrum in spectra.values():
        Window.first(rank).slice(spectrum.k, spectrum.name)


def position_slider() -> FloatSlider:
    wide = Layout(width="34em", max_width="98%")  # a pixel is less than a step
    return FloatSlider(0.5, min=0, max=1, step=0.01, description="position", layout=wide)


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
