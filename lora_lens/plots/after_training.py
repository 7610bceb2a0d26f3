"""Pictures of what can be done, and seen, after training: ways back, and checkpoints over time."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens.forgetting.rewound import Rewound
from lora_lens.plots._scores import PERCENT, require_score, shortened, show_unit, with_unit
from lora_lens.plots._style import styled

HEIGHTS = ("retained_accuracy", "loss_rise")
ENDS = {0.0: "t = 0", 0.5: "0.5", 1.0: "trained"}  # points that are named in the plane
GROWTH = {  # column of a table of checkpoints: its name, and whether it is a share
    "update": ("size of the update", False),
    "relative": ("update / weight", True),
    "rotation": ("rotation / weight", True),
    "forgetting": ("forgetting", True),
    "loss_rise": ("rise of the retained loss (nats)", False),
}


@styled
def rewinding(rewound: Rewound | pd.DataFrame, y: str = "retained_accuracy", *, ax: Axes) -> Axes:
    """The ways back in the trade-off plane: one line for each path, from what it leaves at t = 0 to t = 1.

    Args:
        rewound: from :func:`lora_lens.rewind`, or its table.
        y: retained_accuracy; or loss_rise, of the retained task, in nats, which runs downwards.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: another ``y``, a column is missing, or there are no points.

    Example:
        >>> import lora_lens as ll, pandas as pd
        >>> table = pd.DataFrame({"path": "whole update", "t": [0, 0.5, 1], "accuracy": [0.1, 0.8, 0.9]})
        >>> ll.plots.rewinding(table.assign(retained_accuracy=[0.9, 0.88, 0.7])).get_ylabel()
        'accuracy on the retained task (%)'
    """
    require_score(y, HEIGHTS)
    table = rewound_table(rewound, y)
    paths = table.groupby("path", sort=False)
    for (path, points), colour in zip(paths, sns.color_palette("colorblind", len(paths)), strict=True):
        points = points.sort_values("t")
        ax.plot(points["accuracy"], points[y], "o-", color=colour, markersize=4, label=shortened(path))
        for t, accuracy, height in points[["t", "accuracy", y]].itertuples(index=False):
            if t in ENDS and path == table["path"].iloc[0]:  # those of other paths lie beside
                place = {"xytext": (0, -12), "textcoords": "offset points", "fontsize": 8}
                lines_below = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}
                ax.annotate(ENDS[t], (accuracy, height), **place, bbox=lines_below, zorder=5)
    if len(paths) > 1:
        ax.legend(loc="best")
    ax.xaxis.set_major_formatter(PERCENT)
    show_unit(ax, y)
    if y == "loss_rise":
        ax.invert_yaxis()
    ax.set(
        xlabel=with_unit("accuracy", table),
        ylabel=with_unit(y, table),
        title="Ways back from the trained model",
    )
    return ax


def rewound_table(rewound: object, *scores: str) -> pd.DataFrame:
    """The table of what :func:`lora_lens.rewind` returns, with these columns.

    Raises:
        ValueError, TypeError: it is none.
    """
    return checked(rewound, ["path", "t", "accuracy", *scores], "the table", "ll.rewind", any_type="path")


@styled
def growth(table: pd.DataFrame, score: str = "relative", *, ax: Axes) -> Axes:
    """How one measure of an adapter grew over the checkpoints of its training.

    Args:
        table: from :func:`lora_lens.forgetting.growth`.
        score: update, relative, rotation, forgetting or loss_rise, as far as the table has them.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: another ``score``, a column is missing, or there are no checkpoints.

    Example:
        >>> import lora_lens as ll, pandas as pd
        >>> table = pd.DataFrame({"step": [0, 10, 20], "relative": [0, 0.1, 0.15]})
        >>> ll.plots.growth(table).get_xlabel()
        'step'
    """
    require_score(score, tuple(GROWTH))
    table = checked(table, ["step", score], "the table", "ll.forgetting.growth").sort_values("step")
    if table[score].isna().all():
        raise InputError(f"no checkpoint has a value of {score}; give growth the model, and retain=")
    name, share = GROWTH[score]
    ax.plot(table["step"], table[score], "o-", color="#0072B2")
    if share:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    ax.set(xlabel="step", ylabel=name, title=f"Over the checkpoints: {name.partition(' (')[0]}")
    return ax
