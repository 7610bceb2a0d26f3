"""A score against the window's position for each value of another setting of a sweep."""

from __future__ import annotations

from numbers import Real
from textwrap import fill

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lora_lens._base.errors import InputError
from lora_lens._base.naming import block_and_kind
from lora_lens._base.schema import checked
from lora_lens._base.validate import instance
from lora_lens.plots._scores import (
    in_words,
    line_in_range,
    placed_windows,
    position_ticks,
    require_score,
    show_unit,
    with_unit,
)
from lora_lens.plots._style import literal, styled
from lora_lens.plots.trade_offs import LONGEST


@styled
def by_setting(table: pd.DataFrame, setting: str, score: str = "forgetting", *, ax: Axes) -> Axes:
    """A score against the window's position, one line per value of another column, at one learning rate.

    Lines are means over seeds in a band from the lowest to the highest seed; flat dashed lines of the same
    colour are ordinary LoRA. Other methods are not shown.

    Args:
        table: runs at one learning rate that differ in ``setting``, such as rank, steps or targets.
        score: accuracy, retained_accuracy, forgetting or loss_rise (in nats).
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: another ``score``, a column is missing, the table has several rates or no window placed by
            position, or two runs of a seed differ in more than ``setting`` and position.

    Example:
        >>> import lora_lens as ll
        >>> table = ll.Sweep.open("data/results/ranks.jsonl.xz").table
        >>> ll.plots.by_setting(table, "rank").get_title()
        'Forgetting by rank'
    """
    require_score(score)
    instance(setting, str, "setting", "the name of a column, such as 'rank'")
    columns = [setting, "method", "position", "lr", "seed", score]
    table = checked(table, columns, any_type=setting)
    if table["lr"].nunique() != 1:
        rates = ", ".join(f"{rate:g}" for rate in sorted(table["lr"].unique()))
        raise InputError(
            f"one picture shows one learning rate, and the table has {rates or 'none'}; choose one, such as "
            "table[table['lr'] == 0.005]"
        )
    windows = table[placed_windows(table) & table[setting].notna()]
    if windows.empty:
        raise InputError(f"the table has no runs of windows placed by position and with a {setting}")
    lora = table[table["method"] == "LoRA"]
    for part in (windows, lora):
        if (twice := part.duplicated([setting, "position", "seed"])).any():
            row = part[twice].iloc[0]
            raise InputError(
                f"two runs of {row['method']} with {setting} {row[setting]} and seed {row['seed']} differ in "
                f"something else; pass runs that differ in {setting} only"
            )
    values = sorted(windows[setting].unique(), key=lambda v: (isinstance(v, str), v))
    references = lora[lora[setting].isin(values)].dropna(subset=score)
    for value, colour in zip(values, sns.color_palette("colorblind", len(values)), strict=True):
        by_position = windows[windows[setting] == value].groupby("position")[score]
        line_in_range(ax, by_position, color=colour, marker="o", label=_setting_name(value))
        flat = references.loc[references[setting] == value, score].mean()
        if pd.notna(flat):
            ax.axhline(flat, color=colour, linestyle="--", linewidth=1.2)
    handles, _ = ax.get_legend_handles_labels()
    if len(references):
        handles.append(Line2D([], [], color="0.3", linestyle="--", linewidth=1.2, label="LoRA"))
    words = literal("layers" if setting == "targets" else setting.replace("_", " "))
    ax.legend(handles=handles, title=words, loc="best")
    position_ticks(ax)
    show_unit(ax, score)
    title = f"{in_words(score, table).capitalize()} by {words}"
    ax.set(xlabel="position of the window", ylabel=with_unit(score, table), title=title)
    return ax


def _setting_name(value: object) -> str:
    """A number, or a list of layers by their kinds: "attn.qkv, attn.proj (12 weights)"."""
    if not isinstance(value, str):
        return f"{value:g}" if isinstance(value, Real) else literal(value)
    layers = value.split()
    kinds = dict.fromkeys(block_and_kind(layer)[1] for layer in layers)
    words = f"{', '.join(kinds)} ({len(layers)} weights)"
    return literal(fill(words, LONGEST, max_lines=4, placeholder=" ..."))
