"""The explorer of a mixture's experts: how their spectra differ, and whether their windows do."""

from __future__ import annotations

import re
from functools import lru_cache

import pandas as pd
import torch
from ipywidgets import HTML, HBox, Layout, SelectionSlider
from matplotlib.artist import Artist
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from lora_lens import plots
from lora_lens._base.errors import InputError
from lora_lens._base.naming import block_and_kind
from lora_lens._base.validate import whole_number
from lora_lens.plots._style import colour_bar
from lora_lens.plots.drift import FAINTEST
from lora_lens.plots.spectra import HEAT, some_spectra
from lora_lens.spectrum.comparison import Side
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum.window import Window
from lora_lens.widgets._explorer import Explorer, Parts, dropdown, explorer, html_table, table_box
from lora_lens.widgets._live_pictures import LABELS
from lora_lens.widgets._picture import Picture, fixed_axes
from lora_lens.widgets._run_view import or_why_not
from lora_lens.widgets.one_window import SHARE, SIDE_BY_SIDE
from lora_lens.widgets.spectra import position_slider, rank_slider

# The number of an expert: of one tensor for all, or of a layer for each.
EXPERT = re.compile(r"\[(\d+)\]|(?:^|\.)experts?\.(?:[a-z]+_)?(\d+)(?=\.)")
MEASURES = {"norm": "{:.3g}", "largest": "{:.3g}", "effective_rank": "{:.1f}", "stable_rank": "{:.1f}"}
MEASURES["energy"] = "{:.2%}"
WORDS = {"largest": "largest s", "energy": "energy in the window"}
SIDES = {"left": "output", "right": "input"}
SIZE = (5.4, 4)  # inches, of two pictures side by side


@explorer
def expert_explorer(spectra: SpectrumSet, rank: int = 8) -> Explorer:
    """The experts of one tensor: which is unlike the others, and do their windows hold the same directions?

    Controls: the tensor, its block, one expert, which directions (of the outputs, the left singular vectors,
    or of the inputs), and rank and position of the window. Shown: the singular values of all experts, with
    this one's in front and the window shaded; its norm, largest singular value, effective and stable rank and
    the window's share of the energy, beside the mean, the least and the most of all; and, once the window
    rests, how many directions of the window every two experts share (:func:`lora_lens.spectrum.overlap`).

    Args:
        spectra: from :func:`lora_lens.spectra` with ``"all-experts"``; other weights are left out. Without
            vectors the directions are not shown.
        rank: of the window at first.

    Raises:
        ValueError: there are no experts among the spectra, or the rank does not fit one of them.

    Example:
        >>> import lora_lens as ll, torch
        >>> names = [f"layers.0.mlp.experts.down_proj[{i}]" for i in range(3)]
        >>> spectra = ll.SpectrumSet([ll.spectrum.factorize(name, torch.randn(8, 6)) for name in names])
        >>> explorer = ll.widgets.expert_explorer(spectra, rank=2)  # the last line of a cell shows it
        >>> [control.description for control in explorer.children[1].children]
        ['tensor', 'block']
    """
    tensors = _experts_by_tensor(some_spectra(spectra))
    every = SpectrumSet([s for experts in tensors.values() for s in experts.values()])
    tensor = dropdown("tensor", dict.fromkeys(kind for _, kind in tensors))
    tensor.layout = Layout(width="28em", max_width="98%")
    places = sorted({block for block, _ in tensors})
    block = SelectionSlider(
        options=[("none" if place < 0 else str(place), place) for place in places],
        index=places.index(next(iter(tensors))[0]),  # a value of 0 would leave it without a label
        description="block",
    )
    numbers = sorted({number for experts in tensors.values() for number in experts})
    expert = SelectionSlider(options=numbers, description="expert")
    size, position = rank_slider(whole_number(rank, "rank", least=1), every), position_slider()
    side = dropdown("directions", [(name, side) for side, name in SIDES.items()])
    curves, common = HTML(layout=Layout(**SHARE)), HTML(layout=Layout(**SHARE))
    table = table_box()

    @lru_cache(maxsize=4)
    def picture_of(block: int, kind: str) -> _Spectra:
        return _Spectra(tensors[block, kind])

    matrix_of = lru_cache(maxsize=4)(_Common)

    def draw() -> Parts:
        experts = tensors.get((block.value, tensor.value), {})
        if expert.value not in experts:
            raise InputError(
                f"block {block.label} has no expert {expert.value} of {tensor.value}; choose another"
            )
        window = Window(size.value, position=position.value)
        drawn = picture_of(block.value, tensor.value)
        curves.value = drawn.html(
            expert.value,
            window,
            f"singular values of {len(experts)} experts of {tensor.value} in block {block.label}, expert "
            f"{expert.value} in front, with the {window} shaded",
        )
        energy = [s.energy(window) for s in experts.values()]
        table.value = html_table(_beside_others(drawn.table.assign(energy=energy), expert.value))
        return slow(experts, window, side.value)

    def slow(experts: dict[int, Spectrum], window: Window, side: str) -> Parts:
        """The more experts and the higher the rank, the longer it takes."""
        yield common, or_why_not(lambda: in_common(experts, window, side))

    def in_common(experts: dict[int, Spectrum], window: Window, side: str) -> str:
        shared = _shared(experts, window, side)
        chance = window.rank / next(iter(experts.values())).shape[side == "right"]
        words = _shared_in_words(shared, list(experts), chance)
        return f"{matrix_of(len(experts)).html(shared, words)}<p>{words}.</p>"

    shown = [HBox([curves, common], layout=SIDE_BY_SIDE), table]
    return Explorer([[tensor, block], [expert, side], [size, position]], shown, draw)


def _experts_by_tensor(spectra: SpectrumSet) -> dict[tuple[int, str], dict[int, Spectrum]]:
    """By block and by name, with * in place of both numbers, the experts by their number."""
    found: dict[tuple[int, str], dict[int, Spectrum]] = {}
    for name, s in spectra.items():
        if match := EXPERT.search(name):
            start, stop = match.span(match.lastindex)
            tensor = f"{name[:start]}*{name[stop:]}"
            block, kind = block_and_kind(tensor)
            if block >= 0:
                tensor = f"{tensor.removesuffix(f'{block}.{kind}')}*.{kind}"
            found.setdefault((block, tensor), {})[int(name[start:stop])] = s
    if not found:
        raise InputError(
            f'there are no experts among {spectra!r}; make them with ll.spectra(model, "all-experts")'
        )
    return found


def _beside_others(table: pd.DataFrame, number: int) -> pd.DataFrame:
    """One row per measure: of this expert, of all as a mean, and the least and the most of one."""
    rows = []
    for column, form in MEASURES.items():
        of = table[column]
        row = {
            "measure": WORDS.get(column, column.replace("_", " ")),
            f"expert {number}": form.format(of[number]),
        }
        row |= {f"mean of {len(of)}": form.format(of.mean())}
        ends = {"least": of.idxmin(), "most": of.idxmax()}
        rows.append(row | {end: f"{form.format(of[i])} (expert {i})" for end, i in ends.items()})
    return pd.DataFrame(rows)


def _shared(experts: dict[int, Spectrum], window: Window, side: Side) -> Tensor:
    """The share of the window's directions that every two experts have in common: (experts, experts).

    Raises:
        ValueError: vectors are missing, or there is one expert only.
    """
    if len(experts) < 2:
        raise InputError("there is one expert only, so there is nothing to compare its window with")
    pairs = [s.vectors(window) for s in experts.values()]
    vectors = torch.cat([left if side == "left" else right.T for left, right in pairs], 1)
    squares = (vectors.T @ vectors).square()  # (experts * rank, experts * rank)
    return squares.reshape(2 * (len(experts), window.rank)).sum((1, 3)) / window.rank


def _shared_in_words(shared: Tensor, numbers: list[int], chance: float) -> str:
    pairs = shared.triu(1)
    first, second = divmod(int(pairs.argmax()), len(numbers))
    mean = float(pairs.sum()) / (len(numbers) * (len(numbers) - 1) / 2)
    return (
        f"Of their windows' directions two experts have {mean:.1%} in common on average, {chance:.1%} by "
        f"chance; most alike are {numbers[first]} and {numbers[second]}, {float(pairs.max()):.1%}"
    )


class _Common:
    """What every two experts have in common, of which the colours change."""

    def __init__(self, count: int) -> None:
        def draw(figure: Figure) -> list[Artist]:
            ax = fixed_axes(figure, (0.1, 0.14, 0.72, 0.77))
            self.image = ax.imshow(torch.eye(count).numpy(), cmap=HEAT, norm=LogNorm(FAINTEST, 1, clip=True))
            for axis in (ax.xaxis, ax.yaxis):
                axis.get_major_locator().set_params(integer=True)
            ax.set(xlabel="expert", ylabel="expert", title="Directions in common")
            ax.grid(False)
            colour_bar(self.image, ax, "share (log)")
            return [self.image, *ax.spines.values()]

        self.picture = Picture(draw, SIZE)

    def html(self, shared: Tensor, alt: str) -> str:
        self.image.set_data(shared.numpy())
        return self.picture.html(alt)


class _Spectra:
    """Singular values of all experts, in which the one in front and the window move.

    Attributes:
        table: of the spectra and their norms, by the experts' numbers.
    """

    def __init__(self, experts: dict[int, Spectrum]) -> None:
        self.experts = experts
        self.k = max(s.k for s in experts.values())
        self.table = SpectrumSet(experts.values()).table().set_index(pd.Index(experts))
        self.table["norm"] = [float(s.singular_values.norm()) for s in experts.values()]

        def draw(figure: Figure) -> list[Artist]:
            left = LABELS / SIZE[0]
            axes = fixed_axes(figure, (left, 0.14, 0.98 - left, 0.77))
            ax = plots.spectrum(SpectrumSet(experts.values()), Window.first(1), ax=axes)
            for line in ax.lines:
                line.set(color="0.75", alpha=1, linewidth=1)
            if legend := ax.get_legend():
                legend.remove()
            ax.set_title(f"Spectra of {len(experts)} experts")
            self.span = ax.patches[-1]
            (self.front,) = ax.plot([], [], color="#0072B2")
            return [self.span, self.front]

        self.picture = Picture(draw, SIZE)

    def html(self, number: int, window: Window, alt: str) -> str:
        part, values = window.slice(self.k), self.experts[number].singular_values
        self.span.set_x(part.start - 0.5)
        self.span.set_width(window.rank)
        self.front.set_data(range(len(values)), values)
        return self.picture.html(alt)
