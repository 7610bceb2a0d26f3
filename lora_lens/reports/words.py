"""How a report names windows, and how it answers its question: is forgetting U-shaped?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from lora_lens._base.errors import LoraLensError
from lora_lens.forgetting.run_groups import holm
from lora_lens.forgetting.u_shape import LEVEL, UShape, u_shape_test
from lora_lens.reports.page import Piece, Table, decimal, plain, with_interval


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Windows by rank and place, then the other methods; rates and seeds ascend."""
    keys = ["method", "rank", "position", "start", "lr", "seed"]
    return table.sort_values(
        keys, key=lambda c: c != "window" if c.name == "method" else pd.to_numeric(c), kind="stable"
    )


def names_of(result: pd.DataFrame) -> list[str]:
    """Each row's window or method in words; rank and variant are named where one place has several."""
    places = result.groupby(["method", "position", "start"], dropna=False)
    differ = [c for c in ("rank", "variant") if c in result and places[c].nunique(dropna=False).max() > 1]
    return [_name(row, differ) for row in result.to_dict("records")]


def _name(row: dict[str, object], differ: list[str]) -> str:
    name = str(row["method"])
    if name == "window" and pd.notna(row["position"]):
        name += f" at {row['position']:.3g}{ {0.0: ' (PiSSA)', 1.0: ' (MiLoRA)'}.get(row['position'], '') }"
    elif name == "window" and pd.notna(row["start"]):
        name += f" from component {row['start']:g}"
    return ", ".join([name, *(_detail(c, row[c]) for c in differ if pd.notna(row[c]))])


def _detail(column: str, value: object) -> str:
    return f"rank {value:g}" if column == "rank" else str(value)


def parts_by_rank(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(what it is, its rows) for each rank and variant of windows, with the methods to compare them with."""
    windows = table[table["method"] == "window"]
    columns = [c for c in ("rank", "variant") if c in table and windows[c].nunique(dropna=False) > 1]
    if not columns:
        yield "", table
        return
    for values, _ in windows.groupby(columns, dropna=False, sort=True):
        mine = np.ones(len(table), bool)
        for column, value in zip(columns, values, strict=True):
            mine &= table[column].isna() | (table[column] == value)
        yield ", ".join(map(_detail, columns, values)), table[mine]


def titled(part: str) -> str:
    return f"{part.capitalize()}: " if part else ""


def placed(table: pd.DataFrame) -> pd.DataFrame:
    """The runs of windows placed by position."""
    return table[(table["method"] == "window") & table["position"].notna()]


def span(counts: pd.Series, unit: str = "seed") -> str:
    """ "5 seeds" or "3 to 5 seeds"."""
    low, high = int(counts.min()), int(counts.max())
    plural = unit if high == 1 else f"{unit}s"
    return f"{low} {plural}" if low == high else f"{low} to {high} {plural}"


def u_shape_section(table: pd.DataFrame) -> list[Piece]:
    """Is forgetting U-shaped? One test for each rate (and rank), adjusted for their number."""
    positions = placed(table)["position"].nunique()
    if positions < 3:
        needed = "a U-shape needs windows at positions 0, 1 and between"
        return [f"Not tested: {needed}, and the number of positions is {positions}."]
    found, refused = [], []
    for part, rows in parts_by_rank(table):
        for lr in sorted(placed(rows)["lr"].unique()):
            try:
                found.append((part, u_shape_test(rows, lr)))
            except LoraLensError as error:
                refused.append(f"{titled(part)}No test at learning rate {plain(lr)}: {error}.")
    answers = {"bullets": [f"{titled(part)}{test.words}" for part, test in found] + refused}
    if not found:
        return [answers]
    adjusted = holm([test.p for _, test in found])
    return [_verdict(found, adjusted), answers, _u_shape_table(found, adjusted)]


def _verdict(found: list[tuple[str, UShape]], adjusted: np.ndarray) -> str:
    tests = int((~np.isnan(adjusted)).sum())
    if not tests:
        return "The seeds are too few for a test."
    how = f"after Holm's adjustment for {tests} tests" if tests > 1 else "in the one test"
    how += f" (level {LEVEL:g})"
    rates = [titled(p).lower() + plain(t.lr) for (p, t), q in zip(found, adjusted, strict=True) if q <= LEVEL]
    if rates:
        return f"A U-shape is established {how} at learning rate {', '.join(rates)}."
    verdict, seeds = f"No U-shape is established at any learning rate {how}.", max(t.seeds for _, t in found)
    smallest = min(tests * 2.0**-seeds, 1.0)  # one p is at least 2^-seeds, and then adjusted
    if smallest <= LEVEL:
        return verdict
    below = f"{smallest:.3g}{' after the adjustment' if tests > 1 else ''}"
    needed = int(np.ceil(np.log2(tests / LEVEL)))
    return f"{verdict} None could be: {seeds} seeds cannot give a p value below {below}. It takes {needed}."


def _u_shape_table(found: list[tuple[str, UShape]], adjusted: np.ndarray) -> Table:
    tests = [test for _, test in found]
    cells = {
        "learning rate": [", ".join(filter(None, (plain(t.lr), part))) for part, t in found],
        "seeds": [str(t.seeds) for t in tests],
        "best between": [f"{t.position:.3g}" for t in tests],
        "PiSSA end, excess": [with_interval(t.first_excess, *t.first_interval) for t in tests],
        "MiLoRA end, excess": [with_interval(t.last_excess, *t.last_interval) for t in tests],
        "p": [_p(t.p) for t in tests],
        "p, adjusted": [_p(p) for p in adjusted],
    }
    return Table(
        cells,
        "What the end windows forget more than the best window between, in points, with 95% intervals. p: "
        "sign-flip test that both ends forget more (Berger 1982; Romano and Wolf 2005); adjusted for the "
        "number of tests after Holm 1979.",
    )


def _p(p: float) -> str:
    return "<0.001" if p < 0.0005 else decimal(p, 3)
