"""Pictures of single runs, or of the runs of two windows: along training, and layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens.forgetting.run_groups import DRIFTS
from lora_lens.plots._style import literal, styled

LOOKS = (
    {"color": "#0072B2", "marker": "o"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
)  # beside colour and line, another marker
TITLES = {"accuracy": "New task", "retained_accuracy": "Retained task"}
ROOM_OF_BLOCK = 11  # points that its number takes
LETTER = 0.62  # width of a letter, in font sizes
SMALLEST, LARGEST = 7, 9  # font sizes of kinds


@styled
def two_curves(curves: Mapping[str, pd.DataFrame], column: str = "accuracy", *, ax: Axes) -> Axes:
    """One score along training: the mean over runs, in a band from the lowest to the highest.

    Args:
        curves: from :meth:`lora_lens.Sweep.curves`, by the name in the legend; at most two.
        column: "accuracy", on the new task, or "retained_accuracy".

    Raises:
        ValueError: a column is missing.
    """
    for look, (name, curve) in zip(LOOKS, curves.items(), strict=False):
        curve = checked(curve, ["step", column], "the table of curves", "sweep.curves()")
        along = curve.groupby("step")[column]
        ax.fill_between(
            along.mean().index, along.min(), along.max(), color=look["color"], alpha=0.2, linewidth=0
        )
        ax.plot(along.mean(), label=literal(name), markersize=5, **look)
    ax.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1.02), title=TITLES.get(column, column))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="best")
    return ax


@styled
def relative_updates(drifts: Mapping[str, pd.DataFrame], *, ax: Axes) -> Axes:
    """How far training moved each weight, ||dW|| / ||W||, kind by kind, in each from the first block on.

    Args:
        drifts: from :meth:`lora_lens.Sweep.drifts`, by the name in the legend; at most two, of the same
            model. Rows of several runs are averaged, and a layer that only one has is shown of that one.

    Raises:
        ValueError: a column is missing, or there is no layer.
    """
    if not drifts:
        raise InputError("there is no layer to show; pass what sweep.drifts() returned")
    columns = ["layer", "kind", "block", "relative"]
    drifts = {name: checked(drift, columns, *DRIFTS) for name, drift in drifts.items()}
    layers = _in_order(pd.concat(drifts.values()))
    for look, (name, drift) in zip(LOOKS, drifts.items(), strict=False):
        means = 100 * drift.groupby("layer")["relative"].mean()
        for number, (_, of_kind) in enumerate(layers.groupby("kind", sort=False)):
            label = literal(name) if number == 0 else None
            ax.plot(
                of_kind["place"],
                means.reindex(of_kind["layer"]),
                markersize=5,
                linewidth=1.4,
                label=label,
                **look,
            )
    _name_layers(ax, layers)
    ax.set(ylabel="update / weight (%)", title="How far each weight moved", ylim=(0, None))
    if len(drifts) > 1:
        ax.legend(loc="best")
    return ax


def _in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """layer, kind, block and place of each layer: kinds in the order of their first, with a gap between."""
    layers = rows.drop_duplicates("layer")[["layer", "kind", "block"]]
    layers["kind"] = pd.Categorical(layers["kind"], layers["kind"].unique())
    layers = layers.sort_values(["kind", "block"], kind="stable").astype({"kind": str})
    gap = (layers["kind"] != layers["kind"].shift()).cumsum() - 1
    return layers.assign(place=np.arange(len(layers)) + gap)


def _name_layers(ax: Axes, layers: pd.DataFrame) -> None:
    """The blocks, as many as have room, and under them their kinds, where it is narrow in two rows."""
    width = 72 * 0.85 * ax.figure.get_figwidth()  # points
    every = -(-len(layers) * ROOM_OF_BLOCK // width)
    named = layers[(layers["block"] >= 0) & (layers["block"] % every == 0)]
    ax.set_xticks(named["place"], named["block"].astype(str), fontsize=8)
    kinds = layers.groupby("kind", sort=False)["place"]
    a_layer = width / (len(layers) + kinds.ngroups - 1)
    names = _brief_names(kinds.groups)
    size = min(a_layer * (len(places) + 0.8) / LETTER / len(names[kind]) for kind, places in kinds)
    rows = 1 if size >= SMALLEST else 2
    size = float(np.clip(rows * size, SMALLEST, LARGEST))
    for number, (kind, places) in enumerate(kinds):
        below = (0, -20 - 11 * (number % rows))
        ax.annotate(
            literal(names[kind]), (places.mean(), 0), below, xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="top", fontsize=size,
        )  # fmt: skip
    ax.set_xlabel("block, and kind of weight", labelpad=18 if rows == 1 else 29)
    ax.grid(axis="x", visible=False)


def _brief_names(kinds: Iterable[str]) -> dict[str, str]:
    """Of each dotted name the shortest end that no other one has, or all of it."""
    kinds = list(kinds)
    brief = {}
    for kind in kinds:
        parts = kind.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        alone = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in kinds) == 1)
        brief[kind] = next(alone, kind)
    return brief
