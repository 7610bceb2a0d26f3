"""Explorers on one page, under tabs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ipywidgets import HTML, Tab, VBox, Widget

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.validate import instance, shown
from lora_lens.widgets._explorer import alarm, said

WAITING = "<p>making this page ...</p>"


def pages(explorers: Mapping[str, Callable[[], Widget]]) -> Tab:
    """Explorers under tabs, each made when its tab is first opened: a page is there as soon as its first is.

    Args:
        explorers: what makes an explorer, by the name on its tab. If it raises, the tab says why, and makes
            it anew when it is opened again.

    Raises:
        ValueError: there are none.

    Example:
        >>> import lora_lens as ll, torch
        >>> spectra = ll.SpectrumSet([ll.spectrum.factorize("blocks.0.fc", torch.randn(6, 4))])
        >>> tabs = ll.widgets.pages({"Spectrum": lambda: ll.widgets.spectrum_explorer(spectra, rank=2)})
        >>> tabs.titles
        ('Spectrum',)
    """
    instance(explorers, Mapping, "explorers", "a dict of functions by the names on their tabs")
    if not explorers:
        raise InputError("there are no explorers to show; give a name and a function for each")
    for name, make in explorers.items():
        if not callable(make):
            raise InputTypeError(
                f"{name!r} must be a function that makes an explorer, such as "
                f"lambda: spectrum_explorer(spectra), not {shown(make)}"
            )
    makers = list(explorers.values())
    places = [VBox([HTML(WAITING)]) for _ in makers]
    tabs = Tab(places, titles=list(explorers), selected_index=0)
    made: set[int] = set()

    def open_page(number: int | None) -> None:
        if number is None or number in made:
            return
        try:
            places[number].children = [makers[number]()]
            made.add(number)
        except Exception as error:  # whatever a maker meets, the other pages go on
            places[number].children = [HTML(alarm(said(error, "this page")))]

    tabs.observe(lambda change: open_page(change["new"]), "selected_index")
    open_page(0)
    return tabs
