"""What pictures of sweeps share: names and units of scores, looks of rates, positions and methods."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from textwrap import shorten

import pandas as pd
import seaborn as sns
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lora_lens._base.errors import InputError
from lora_lens._base.schema import is_agreement
from lora_lens._base.validate import choice
from lora_lens.plots._style import colour_bar, literal

LABELS = {
    "accuracy": "accuracy on the new task",
    "retained_accuracy": "accuracy on the retained task",
    "forgetting": "forgetting",
    "loss_rise": "rise of the retained task's loss",
}
OF_AGREEMENT = {  # where what was retained are the pretrained model's own answers
    "retained_accuracy": "agreement with the pretrained model",
    "loss_rise": "divergence from the pretrained model",
}
UNITS = {"accuracy": "%", "retained_accuracy": "%", "forgetting": "percentage points", "loss_rise": "nats"}
LOST = ("forgetting", "loss_rise")
PERCENT = FuncFormatter(lambda share, _: f"{round(100 * share, 6) + 0:.6g}")  # + 0: no minus before a zero
# Colours in full, not "C0": a cycle's colours are looked up when the figure is drawn, after the style's end.
WINDOWS, OTHERS = "#0072B2", "#404040"
NO_POSITION = "0.5"
POSITIONS = (0, 0.25, 0.5, 0.75, 1)
RATE_MARKERS = "osD^vP*X"
LONGEST_LABEL = 44  # characters


def in_words(score: str, table: pd.DataFrame) -> str:
    """A score of the runs of a table."""
    return (OF_AGREEMENT if is_agreement(table) else LABELS).get(score, LABELS[score])


def with_unit(score: str, table: pd.DataFrame) -> str:
    """A score in words, with its unit."""
    return f"{in_words(score, table)} ({UNITS[score]})"


def show_unit(ax: Axes, score: str) -> None:
    """Let the ticks of the vertical axis count in the score's unit."""
    if UNITS[score] != "nats":
        ax.yaxis.set_major_formatter(PERCENT)


def require_score(score: str, choices: Collection[str] = tuple(LABELS)) -> None:
    choice(score, "score", choices)


def placed_windows(rows: pd.DataFrame) -> pd.Series:
    return (rows["method"] == "window") & rows["position"].notna()


def require_placed(table: pd.DataFrame) -> None:
    if not placed_windows(table).any():
        raise InputError("the table has no runs of windows placed by position")


def method_name(row: pd.Series) -> str:
    """A window by its place, or another method by its name."""
    if row["method"] != "window":
        return str(row["method"])
    if pd.notna(row["position"]):
        return f"window at {row['position']:.3g}"
    return f"window from {row['start']:g}"


def shortened(name: object, letters: int = LONGEST_LABEL) -> str:
    """As a label of a picture."""
    return literal(shorten(str(name), letters, placeholder=" ..."))


def position_colour(position: float, without: str = NO_POSITION) -> tuple[float, float, float, float]:
    return colormaps["cividis"](float(position)) if pd.notna(position) else to_rgba(without)


def position_bar(ax: Axes) -> None:
    colour_bar(ScalarMappable(Normalize(0, 1), "cividis"), ax, "position of the window")


def position_ticks(ax: Axes) -> None:
    ax.set_xticks(POSITIONS, [f"{position:g}" for position in POSITIONS])


def rate_markers(rates: Iterable[float]) -> dict[float, str]:
    rates = sorted(set(rates))
    return dict(zip(rates, RATE_MARKERS * len(rates), strict=False))


def line_in_range(ax: Axes, scores: pd.api.typing.SeriesGroupBy, **look: object) -> None:
    """The mean of each group in a band from its lowest to its highest value."""
    mean = scores.mean()
    ax.fill_between(mean.index, scores.min(), scores.max(), color=look["color"], alpha=0.2, linewidth=0)
    ax.plot(mean.index, mean, **look)


def method_colours(methods: Iterable[str]) -> dict[str, object]:
    """Of all methods but windows, in their order."""
    others = [method for method in dict.fromkeys(methods) if method != "window"]
    return dict(zip(others, sns.color_palette("bright", len(others)).as_hex(), strict=True))


def plane_legend(
    markers: Mapping[float, str],
    edges: Mapping[str, object],
    front: str,
    colour: str,
    letters: int = LONGEST_LABEL,
) -> list[Line2D]:
    """Handles for a trade-off plane: rates by shape, methods as hollow points, the line of the front."""
    plain = {"linestyle": "", "color": "0.3"}
    hollow = {"marker": "o", "linestyle": "", "markerfacecolor": "white", "markeredgewidth": 1.6}
    return [
        *(Line2D([], [], marker=m, label=f"rate {rate:g}", **plain) for rate, m in markers.items()),
        *(Line2D([], [], markeredgecolor=e, label=shortened(n, letters), **hollow) for n, e in edges.items()),
        Line2D([], [], color=colour, linewidth=1.3, label=front),
    ]
