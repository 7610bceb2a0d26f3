"""Pictures of single runs, or of the runs of two windows: along training, and layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import instance, whole_number
from lora_lens.forgetting.run_groups import DRIFTS
from lora_lens.plots._scores import line_in_range
from lora_lens.plots._style import literal, styled
from lora_lens.training.run import Run

LOOKS = (
    {"color": "#0072B2", "marker": "o"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
)  # beside colour and line, another marker
ALONG = {  # how the two scores of a run look along its steps
    "accuracy": ("new task", {"color": "#0072B2", "linestyle": "-", "marker": "o"}),
    "retained_accuracy": ("retained task", {"color": "#E69F00", "linestyle": "--", "marker": "s"}),
}
APART = 0.04  # ends of lines that are closer than this share one label
ROOM_OF_BLOCK = 11  # points that its number takes
LETTER = 0.62  # width of a letter, in font sizes
SMALLEST, LARGEST = 7, 9  # font sizes of kinds


@styled
def learning_curve(
    run: Run | pd.DataFrame | Mapping[str, pd.DataFrame], score: str = "accuracy", *, ax: Axes
) -> Axes:
    """Accuracy along training: of one run on both tasks, or one score of two windows side by side.

    Where there are several runs, a line is their mean in a band from the lowest to the highest.

    Args:
        run: what :func:`lora_lens.finetune` returns, or runs' curves from :meth:`lora_lens.Sweep.curves`; or
            such curves by the name in the legend, at most two.
        score: of curves by name: "accuracy", on the new task, or "retained_accuracy".
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: a column is missing, or there are no curves.
        TypeError: ``run`` is none of these.

    Example:
        >>> import lora_lens as ll, pandas as pd
        >>> scores = {"accuracy": [0.1, 0.7, 0.9], "retained_accuracy": [0.9, 0.8, 0.7]}
        >>> curve = pd.DataFrame({"step": [0, 60, 120], **scores})
        >>> [line.get_label() for line in ll.plots.learning_curve(curve).lines]
        ['new task', 'retained task']
        >>> ll.plots.learning_curve({"A": curve, "B": curve}, "retained_accuracy").get_title()
        'Retained task'
    """
    instance(run, (Run, pd.DataFrame, Mapping), "run", "a Run, which ll.finetune returns, or sweep.curves()")
    if isinstance(run, Mapping):
        looks = zip(run.items(), LOOKS, strict=False)
        lines = [(literal(name), curve, score, look) for (name, curve), look in looks]
        title = ALONG[score][0].capitalize() if score in ALONG else score
    else:
        curve = run.curve if isinstance(run, Run) else run
        lines = [(label, curve, column, look) for column, (label, look) in ALONG.items()]
        title = f"One run at learning rate {run.config.lr:g}" if isinstance(run, Run) else "Along training"
    if not lines:
        raise InputError("there are no curves to show; pass what sweep.curves() returned, by a name")
    for label, curve, column, look in lines:
        if not isinstance(run, Run):
            curve = checked(curve, ["step", column], "the table of curves", "sweep.curves()")
        if curve[column].notna().any():
            line_in_range(ax, curve.groupby("step")[column], label=label, markersize=5, **look)
    ax.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1.02), title=title)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend()
    return ax


@styled
def learning_curves(
    runs: Mapping[str, pd.DataFrame],
    steps: int,
    tasks: tuple[str, str] = ("new task", "retained task"),
    *,
    ax: Axes,
) -> Axes:
    """Accuracy on the new and on the retained task along several runs: the last in full, the others pale.

    Args:
        runs: the curve of each :class:`lora_lens.Run` by a short name, which stands at the ends of the pale
            lines. The last may still be empty; its two lines are the first of the Axes.
        steps: where the horizontal axis ends.
        tasks: what to call the two tasks.
        ax: to draw on; default a new pyplot figure.

    Example:
        >>> import lora_lens as ll, pandas as pd
        >>> curve = pd.DataFrame({"step": [0, 10], "accuracy": [0.1, 0.9], "retained_accuracy": [0.9, 0.7]})
        >>> runs = {"1": curve, "2": curve.head(1)}
        >>> ax = ll.plots.learning_curves(runs, steps=10, tasks=("digits", "clothes"))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['digits', 'clothes', 'earlier runs']
    """
    instance(runs, Mapping, "runs", "a dict of curves, such as {'first': run.curve}")
    if not runs:
        raise InputError("there are no runs to show; pass a curve by its name, such as {'first': run.curve}")
    for curve in runs.values():
        instance(curve, pd.DataFrame, "each curve", "the curve of a Run, run.curve")
    steps = whole_number(steps, "steps", least=1)
    *earlier, last = runs.items()
    for (column, (_, look)), task in zip(ALONG.items(), tasks, strict=True):
        known = last[1].reindex(columns=["step", column])
        ax.plot(known["step"], known[column], label=literal(task), zorder=3, clip_on=False, **look)
    ends: list[tuple[float, float, str]] = []
    for (column, (_, look)), line in zip(ALONG.items(), list(ax.lines), strict=True):
        pale = {"color": line.get_color(), "alpha": 0.35, "linewidth": 1.3, "linestyle": look["linestyle"]}
        for name, curve in earlier:
            ax.plot(curve["step"], curve[column], zorder=1, **pale)
            ends.append((float(curve["step"].iloc[-1]), float(curve[column].iloc[-1]), name))
    for step, height, names in _labels(ends):
        place = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": "0.35"}
        ax.annotate(literal(names), (step, height), (6, 0), **place)
    handles = ax.get_legend_handles_labels()[0]
    if earlier:
        handles.append(Line2D([], [], color="0.35", alpha=0.5, linewidth=1.3, label="earlier runs"))
    beside = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "borderpad": 0, "borderaxespad": 0}
    ax.legend(handles=handles, ncols=3, handlelength=3, **beside)
    ax.set(xlabel="step", ylabel="test accuracy", xlim=(0, steps), ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    return ax


def _labels(ends: Collection[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Step, height and names; lines that end close to each other have their names in one label."""
    groups: list[list[tuple[float, float, str]]] = []
    for end in sorted(ends):
        near = groups and groups[-1][0][0] == end[0] and end[1] - groups[-1][-1][1] < APART
        groups[-1].append(end) if near else groups.append([end])
    order = list(dict.fromkeys(name for *_, name in ends))
    return [
        (
            group[0][0],
            float(np.mean([height for _, height, _ in group])),
            " ".join(sorted({name for *_, name in group}, key=order.index)),
        )
        for group in groups
    ]


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
