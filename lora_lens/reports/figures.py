"""The pictures of a report on a sweep, each with its caption and its description for screen readers."""

from __future__ import annotations

from functools import partial

import pandas as pd

from lora_lens._base.errors import LoraLensError
from lora_lens.forgetting.fair_comparison import at_own_best_rate
from lora_lens.forgetting.rate_ranges import rate_robustness
from lora_lens.plots._scores import in_words
from lora_lens.plots.settings import by_setting
from lora_lens.plots.sweeps import accuracy_curve, forgetting_curve, tradeoff
from lora_lens.plots.trade_offs import comparison, fronts_by_method, robustness, surface
from lora_lens.reports.page import Piece, picture, plain, points
from lora_lens.reports.words import names_of, parts_by_rank, placed, titled


def figures_section(table: pd.DataFrame) -> list[Piece]:
    """The pictures of a sweep, for each rank of windows its own."""
    pieces = _by_rank(table)
    for part, rows in parts_by_rank(table):
        pieces += [{"heading": part.capitalize()}] if part else []
        pieces += _at_each_rate(rows)
        try:
            pieces += _over_rates(rows)
        except LoraLensError as error:  # a half-finished sweep has no best rate yet
            pieces.append(f"No pictures over learning rates: {error}.")
    return pieces


def _by_rank(table: pd.DataFrame) -> list[Piece]:
    windows = placed(table)
    if windows["rank"].nunique() == 1 or table["lr"].nunique() > 1 or "variant" in table or windows.empty:
        return []
    described = ", ".join(
        f"rank {rank:g} from {points(mean.iloc[0])} at position {mean.index[0]:.3g} to "
        f"{points(mean.iloc[-1])} at {mean.index[-1]:.3g}"
        for rank, rows in windows.groupby("rank")
        for mean in [rows.groupby("position")["forgetting"].mean()]
    )
    return [
        picture(
            partial(by_setting, table, "rank"),
            f"Line chart of forgetting against the position of the window, one line per rank: {described}.",
            "One line per rank: mean over seeds, in a band from lowest to highest. Dashed lines are LoRA.",
        )
    ]


def _at_each_rate(table: pd.DataFrame) -> list[Piece]:
    plane = picture(
        partial(tradeoff, table),
        f"Scatter of {in_words('retained_accuracy', table)} against accuracy on the new task, one point per "
        "window or method and learning rate; the numbers are in the tables at equal learning rates.",
        "Means over seeds. The line joins the points that no other point beats on both tasks.",
        height=4.8,
    )
    if placed(table).empty:
        return ["No curves over positions: the table has no windows placed by position.", plane]
    reading = (
        "One line per learning rate: mean over seeds, in a band from the lowest to the highest seed. "
        "Flat lines are methods without a position."
    )
    curves = {"forgetting": forgetting_curve, "accuracy": accuracy_curve}
    pieces = [
        picture(partial(draw, table), _described_by_rate(table, s), reading) for s, draw in curves.items()
    ]
    return [*pieces, plane]


def _described_by_rate(table: pd.DataFrame, score: str) -> str:
    """The curve in words: ends and extremes at every rate."""
    described = [f"Line chart of {score} against the position of the window."]
    for lr, rows in placed(table).groupby("lr"):
        mean = rows.groupby("position")[score].mean()
        described.append(
            f"At learning rate {plain(lr)}: {points(mean.iloc[0])} at position {mean.index[0]:.3g}, lowest "
            f"{points(mean.min())} at {mean.idxmin():.3g}, highest {points(mean.max())} at "
            f"{mean.idxmax():.3g}, {points(mean.iloc[-1])} at {mean.index[-1]:.3g}."
        )
    return " ".join(described)


def _over_rates(table: pd.DataFrame) -> list[Piece]:
    if table["lr"].nunique() == 1:
        return []
    own, robust = at_own_best_rate(table), rate_robustness(table)
    tall = 1.6 + 0.3 * len(own)
    ranges = ", ".join(
        f"{name} {plain(low)} to {plain(high)}"
        for name, low, high in zip(names_of(robust), robust["lowest"], robust["highest"], strict=True)
    )
    collapse = " Cross: the accuracy halves." if robust["collapse"].notna().any() else ""
    return [
        *(
            picture(
                partial(surface, table, score=score),
                f"Heat map of {score}, windows and methods by learning rates; the numbers are in the table "
                "at equal learning rates.",
                "Means over seeds in points. A frame marks each row's rate with the highest accuracy.",
                height=tall,
            )
            for score in ("forgetting", "accuracy")
        ),
        picture(
            partial(fronts_by_method, table),
            f"Lines of {in_words('retained_accuracy', table)} against accuracy on the new task, one line per "
            "window or method from its lowest rate to its highest; the numbers are in the tables at equal "
            "rates.",
            "What each window offers when only its learning rate is chosen.",
            height=4.8,
        ),
        _compared(
            own,
            "Forgetting at each window's own best rate",
            "Each seed at the rate with the highest accuracy over the others; 95% intervals over seeds.",
        ),
        picture(
            partial(robustness, robust),
            f"Bars of the learning rates within 2 points of the best accuracy: {ranges}.",
            f"Bars: rates within 2 points of the best accuracy. Dot: best rate.{collapse}",
            height=tall,
        ),
    ]


def matched_figures(result: pd.DataFrame, accuracy: float) -> list[Piece]:
    """Forgetting where the runs first reach ``accuracy``, for each rank of windows."""
    caption = f"Forgetting at {points(accuracy)}% on the new task. Hollow: not all runs got there."
    return [
        _compared(rows, f"{titled(part)}Forgetting at equal accuracy", titled(part) + caption)
        for part, rows in parts_by_rank(result)
    ]


def _compared(result: pd.DataFrame, what: str, caption: str) -> Piece:
    described = ", ".join(
        f"{n} {points(v)}" for n, v in zip(names_of(result), result["forgetting"], strict=True)
    )
    draw = partial(comparison, result, score="forgetting")
    return picture(draw, f"{what}, in points: {described}.", caption, height=4.6)
