"""Pictures of spectra: of one weight, of all weights of a model, of several models."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from lora_lens._base.errors import InputError
from lora_lens._base.naming import block_and_kind
from lora_lens._base.schema import checked
from lora_lens._base.validate import flag, instance, number, sequence, share_matrix, whole_number
from lora_lens.plots._style import colour_bar, house_style, literal, panels, some_axes, styled
from lora_lens.spectrum.measures import cumulative_energy as energy_until
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum.window import Window

WINDOW_COLOUR = "#E69F00"
LINE_STYLES = ("-", "--", "-.", ":")
HEAT = "cividis"
FLOOR = 1e-12  # smaller singular values are drawn here: a logarithmic axis has no zero


@styled
def spectrum(spectra: SpectrumSet | Spectrum, window: Window | None = None, *, ax: Axes) -> Axes:
    """Singular values by component, one line per weight, one colour per kind, later blocks paler.

    Args:
        spectra: from :func:`lora_lens.spectra`, or one of them.
        window: shaded where it lies on the widest spectrum; default none.
        ax: to draw on; default a new pyplot figure.

    Example:
        >>> import lora_lens as ll
        >>> model, _ = ll.tasks.bundled.vision()
        >>> spectra = ll.spectra(model, "attn.*", vectors=False, progress=False)
        >>> ll.plots.spectrum(spectra, ll.Window.middle(8)).get_title()
        'Spectra of 12 weights'
    """
    weights = [spectra] if isinstance(spectra, Spectrum) else list(some_spectra(spectra).values())
    if window is not None:
        instance(window, Window, "window", "a Window, such as ll.Window.middle(8)")
    kinds = list(dict.fromkeys(block_and_kind(s.name)[1] for s in weights))
    colours = dict(zip(kinds, sns.color_palette("colorblind", len(kinds)), strict=True))
    blocks = sorted({block_and_kind(s.name)[0] for s in weights})
    for s in weights:
        block, kind = block_and_kind(s.name)
        paleness = 1 - 0.65 * (block - blocks[0]) / max(blocks[-1] - blocks[0], 1)
        values = s.singular_values.clamp_min(FLOOR).numpy()
        ax.plot(values, color=colours[kind], alpha=paleness, linewidth=1.4)
    k = max(s.k for s in weights)
    if window is not None:
        part = window.slice(k)
        ax.axvspan(part.start - 0.5, part.stop - 0.5, color=WINDOW_COLOUR, alpha=0.3, linewidth=0)
    ax.set(
        yscale="log",
        xlim=(-0.5, k - 0.5),
        xlabel="component i (0 = largest)",
        ylabel="singular value",
        title=literal(weights[0].name) if len(weights) == 1 else f"Spectra of {len(weights)} weights",
    )
    _thin_ticks(ax)
    if len(kinds) > 1:
        handles = [Line2D([], [], color=c, label=literal(kind)) for kind, c in colours.items()]
        # Spectra fall, so this corner is free; a search for the best place slows down many lines.
        ax.legend(handles=handles, title="pale = late block" if len(blocks) > 1 else None, loc="lower left")
    return ax


def small_multiples(
    spectra: SpectrumSet, *, columns: int = 4, relative: bool = False, axes: np.ndarray | None = None
) -> np.ndarray:
    """Singular values by component, one panel per kind of weight, one line per block.

    Args:
        spectra: of any number of blocks; their colours are one scale, explained by a colour bar.
            Weights outside the blocks are grey.
        columns: panels in a row.
        relative: count components in shares of k, i / k, which compares weights of different size.
        axes: to draw on, at least one per kind, all in one figure; default a new pyplot figure.

    Returns:
        The Axes, one per kind in the model's order, shape (kinds,).

    Raises:
        ValueError: there are fewer ``axes`` than kinds.

    Example:
        >>> import lora_lens as ll
        >>> model, _ = ll.tasks.bundled.vision()
        >>> spectra = ll.spectra(model, "attn.*", vectors=False, progress=False)
        >>> [ax.get_title() for ax in ll.plots.small_multiples(spectra)]
        ['attn.qkv', 'attn.proj']
    """
    columns, relative = whole_number(columns, "columns", least=1), flag(relative, "relative")
    places = {name: block_and_kind(name) for name in some_spectra(spectra)}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    blocks = [block for block, _ in places.values() if block >= 0] or [0]
    scale = plt.Normalize(min(blocks), max(blocks))
    colours = ScalarMappable(scale, sns.color_palette("crest", as_cmap=True))
    with house_style():
        alone = axes is None
        if alone:
            axes = panels(len(kinds), columns, None, (2.6, 2.3), (1, 0.5), sharex=True, sharey=True)
        else:
            axes = some_axes(axes, len(kinds), "kinds of weights")
        axes = axes[: len(kinds)]
        by_kind = dict(zip(kinds, axes, strict=True))
        for name, (block, kind) in places.items():
            values = spectra[name].singular_values.clamp_min(FLOOR).numpy()
            steps = np.arange(len(values)) / (len(values) if relative else 1)
            colour = colours.to_rgba(block) if block >= 0 else "0.5"
            by_kind[kind].plot(steps, values, color=colour, linewidth=1)
        for kind, ax in by_kind.items():
            ax.set(yscale="log", title=literal(kind))
            _thin_ticks(ax)
        across = "component, i / k" if relative else "component i (0 = largest)"
        if alone:
            axes[0].figure.supxlabel(across, fontsize=11)
            axes[0].figure.supylabel("singular value", fontsize=11)
        else:
            plt.setp(axes, xlabel=across, ylabel="singular value")
        if len(set(blocks)) > 1:
            colour_bar(colours, axes, "block").ax.yaxis.get_major_locator().set_params(integer=True)
    return axes


@styled
def cumulative_energy(spectra: SpectrumSet | Mapping[str, SpectrumSet], *, ax: Axes) -> Axes:
    """The share of the energy, sum(s^2), that the largest components hold together.

    One line per kind of weight, or per model if ``spectra`` maps names to
    models: the median over its weights, in a band from the 10th to the 90th
    percentile. Both axes are shares, so weights of any size compare. Equal
    singular values would give the grey diagonal.

    Args:
        spectra: of one model, or of several by the models' names.
        ax: to draw on; default a new pyplot figure.

    Example:
        >>> import lora_lens as ll
        >>> model, _ = ll.tasks.bundled.vision()
        >>> spectra = ll.spectra(model, "attn.*", vectors=False, progress=False)
        >>> [line.get_label() for line in ll.plots.cumulative_energy({"ViT": spectra}).lines]
        ['ViT', 'equal values']
    """
    if isinstance(spectra, SpectrumSet):
        some_spectra(spectra)
        groups: dict[str, list[Spectrum]] = {}
        for s in spectra.values():
            groups.setdefault(block_and_kind(s.name)[1], []).append(s)
    else:
        groups = {name: list(model.values()) for name, model in named_spectra(spectra).items()}
    shares = np.linspace(0, 1, 201)
    colours = sns.color_palette("colorblind", len(groups))
    for i, (name, weights) in enumerate(groups.items()):
        curves = np.stack([np.interp(shares, *_cumulated(s)) for s in weights])
        low, median, high = np.percentile(curves, [10, 50, 90], axis=0)
        ax.fill_between(shares, low, high, color=colours[i], alpha=0.15, linewidth=0)
        ax.plot(
            shares, median, color=colours[i], linestyle=LINE_STYLES[i % len(LINE_STYLES)], label=literal(name)
        )
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="equal values")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=""))
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1.01),
        xlabel="largest components (% of k)",
        ylabel="energy (%)",
        title="Cumulative energy: median, 10th to 90th percentile",
    )
    ax.legend(loc="lower right")
    return ax


@styled
def by_depth(
    table: pd.DataFrame,
    column: str = "effective_rank",
    *,
    heat_map: bool = False,
    share: bool = False,
    limits: tuple[float, float] | None = None,
    ax: Axes,
) -> Axes:
    """One column of ``SpectrumSet.table()`` against the block: a line per kind of weight, or a heat map.

    Args:
        table: one row per weight of a model of any depth.
        column: any numeric one; means, where a block has several weights of a kind.
        heat_map: kinds by blocks instead of lines; up to 12 blocks have their values written in.
        share: divide by k, the number of components, such as the ranks, which count components.
        limits: the lowest and the highest value shown, to compare several pictures; default that of the
            values.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: a column is missing, the table is empty, or ``limits`` are not two.

    Example:
        >>> import lora_lens as ll
        >>> model, _ = ll.tasks.bundled.vision()
        >>> spectra = ll.spectra(model, "attn.*", vectors=False, progress=False)
        >>> ll.plots.by_depth(spectra.table(), "stable_rank").get_ylabel()
        'stable rank'
        >>> ax = ll.plots.by_depth(spectra.table(), heat_map=True, share=True, limits=(0, 1))
        >>> ax.images[0].get_array().shape
        (2, 6)
    """
    instance(column, str, "column", "the name of a column, such as 'effective_rank'")
    columns = ["kind", "block", *(["k"] if flag(share, "share") else []), column]
    table = checked(table, columns, "the table of spectra", "SpectrumSet.table()")
    if limits is not None:
        limits = [number(limit, "each of limits") for limit in sequence(limits, "limits", "two numbers")]
        if len(limits) != 2:
            raise InputError(f"limits are the lowest and the highest value, not {len(limits)} numbers")
    table = table.assign(
        value=table[column] / table["k"] if share else table[column], kind=table["kind"].map(literal)
    )
    name = literal(column.replace("_", " "))
    label, title = (f"{name} / k", ", as a share of k") if share else (name, "")
    if flag(heat_map, "heat_map"):
        _draw_depth_map(ax, table, limits, label)
        ax.set(xlabel="block", title=f"{name.capitalize()} by block{title}")
        return ax
    sns.lineplot(
        table, x="block", y="value", hue="kind", style="kind", markers=True, dashes=False,
        palette=sns.color_palette("colorblind", table["kind"].nunique()), ax=ax,
    )  # fmt: skip
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="block", ylabel=label, ylim=limits, title=f"{name.capitalize()} by depth{title}")
    sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title=None)
    return ax


def _draw_depth_map(ax: Axes, table: pd.DataFrame, limits: list[float] | None, label: str) -> None:
    cells = table.pivot_table("value", "kind", "block", sort=False)
    cells = cells[sorted(cells.columns)].where(np.isfinite)
    low, high = limits or (cells.min(axis=None), cells.max(axis=None))
    image = ax.imshow(cells, cmap=HEAT, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    if len(cells.columns) <= 12:
        _write_in(ax, cells.to_numpy(), low, high)
    every = -(-len(cells.columns) // 12)
    shown = range(0, len(cells.columns), every)
    ax.set_xticks(shown, [str(cells.columns[i]) if cells.columns[i] >= 0 else "none" for i in shown])
    ax.set_yticks(range(len(cells)), cells.index)
    ax.grid(False)
    colour_bar(image, ax, label)


@styled
def overlap(matrix: np.ndarray, *, ax: Axes) -> Axes:
    """How much bands of components of one weight share between two states of it, as a heat map.

    Args:
        matrix: (bands before, bands after), in [0, 1], the largest components first; up to 10
            bands have their values written in.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: the matrix is not 2-D, or holds values outside [0, 1].
        TypeError: it is a table, or holds no numbers.

    Example:
        >>> import lora_lens as ll, numpy as np
        >>> ll.plots.overlap(np.eye(4)).get_xlabel()
        'band of components after (0 = largest)'
    """
    matrix = share_matrix(matrix, "matrix", "ll.spectrum.overlap_matrix")
    image = ax.imshow(matrix, cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
    if max(matrix.shape) <= 10:
        _write_in(ax, matrix, 0, 1)
    for axis, name in ((ax.xaxis, "after"), (ax.yaxis, "before")):
        axis.get_major_locator().set_params(integer=True)
        axis.set_label_text(f"band of components {name} (0 = largest)")
    ax.set_title("Overlap of the components before and after")
    ax.grid(False)
    colour_bar(image, ax, "overlap")
    return ax


def some_spectra(spectra: object) -> SpectrumSet:
    """``spectra`` if there are any."""
    found = instance(spectra, SpectrumSet, "spectra", "what ll.spectra(model) returns")
    if not found:
        raise InputError("there are no spectra to show; make them with ll.spectra(model)")
    return found


def named_spectra(models: object) -> dict[str, SpectrumSet]:
    """The spectra of several models by name, if there are any of each."""
    expected = "what ll.spectra(model) returns, or a dict of such by the models' names"
    instance(models, Mapping, "spectra", expected)
    if not models:
        raise InputError("there are no spectra to show; make them with ll.spectra(model)")
    return {
        name: some_spectra(instance(model, SpectrumSet, "spectra", expected))
        for name, model in models.items()
    }


def _thin_ticks(ax: Axes) -> None:
    """No minor ticks on a logarithmic axis of many decades: they say little and cost most of the time."""
    low, high = ax.get_ylim()
    if high > 100 * low:
        ax.yaxis.minorticks_off()


def _cumulated(s: Spectrum) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the components, from 0 to 1, and the share of the energy that they hold."""
    energy = np.concatenate([[0], energy_until(s.singular_values).numpy()])
    return np.linspace(0, 1, len(energy)), energy


def _write_in(ax: Axes, cells: np.ndarray, low: float, high: float) -> None:
    style = ".2f" if np.nanmax(cells) < 10 else ".3g"
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            colour = "white" if value < (low + high) / 2 else "black"
            ax.text(column, row, f"{value:{style}}", ha="center", va="center", color=colour, fontsize=8.5)
