"""One sweep on one page: what was run, what came out, how sure it is, and where it ends.

The page is a single HTML file for readers who have neither the data nor Python. All numbers are those of
the public functions; the page only puts them into words, tables and pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path

import pandas as pd

from lora_lens._base.errors import InputError, LoraLensError
from lora_lens._base.files import replace_file
from lora_lens._base.schema import sweep_table, table_of
from lora_lens._base.validate import instance, share
from lora_lens.experiments.results import Sweep
from lora_lens.forgetting.run_groups import window_columns
from lora_lens.reports.facts import IDENTITY, Kept, facts_section, limits, settings_of, task_names
from lora_lens.reports.figures import figures_section, matched_figures
from lora_lens.reports.page import heading, html_page, page_path, paragraph
from lora_lens.reports.tables import (
    dominance_section,
    drift_section,
    equal_rate_section,
    items_section,
    matched_accuracy,
    matched_section,
    own_best_section,
)
from lora_lens.reports.words import Pieces, in_order, u_shape_section

GENERATOR = "lora_lens report"
NEEDED = (*IDENTITY, "accuracy", "retained_before", "retained_accuracy", "forgetting", "diverged")


def report(
    sweep: Sweep | pd.DataFrame,
    path: str | Path,
    *,
    title: str | None = None,
    accuracy: float | None = None,
) -> Path:
    """Write all that a sweep shows into one HTML file that opens anywhere and prints on A4.

    In this order: what was run and with which versions; whether forgetting is U-shaped, tested at every
    rate and adjusted for their number; figures; tables with 95% intervals at equal rates, at own best
    rates and of windows against each other; unless there is a table alone, also at equal accuracy, by class
    of the retained task and what the weights did; and the limits of all that.

    Args:
        sweep: from :func:`lora_lens.sweep` or :meth:`lora_lens.Sweep.open`: windows, methods, ranks, rates
            and seeds may differ, nothing else.
        path: the file to write, ``.html``. An earlier report is replaced when the new one is complete.
        title: of the page; a description by default.
        accuracy: on the new task, in [0, 1], to compare forgetting at; by default the highest whole
            percentage that 80% of every method's runs reach at one of its rates.

    Returns:
        ``path``.

    Raises:
        ValueError: ``path`` does not end in .html, the table is empty, lacks a column or mixes
            settings, or ``accuracy`` is given beside a table alone or is no share.
        FileNotFoundError: there is no such folder.
        FileExistsError: something else than a report is at ``path``.
    """
    kept = sweep if isinstance(sweep, Sweep) else None
    table = _checked(sweep)
    failed = len(table_of(sweep)) - len(table)
    path = page_path(path, GENERATOR)
    if accuracy is not None and kept is None:
        raise InputError("to compare at an accuracy, report needs the curves of the runs: pass the ll.Sweep")
    accuracy = None if accuracy is None else share(accuracy, "accuracy")
    if title is not None:
        instance(title, str, "title", "the page's title in words")
    table = in_order(table)
    kept = None if kept is None else _kept(kept.only(table))
    title = title or _title(table, kept)
    pieces = [
        heading(title, 1),
        f'<p class="date">{date.today().isoformat()}</p>',
        *facts_section(table, kept, failed),
        *_results(table, kept, accuracy),
        *_section("Limits", lambda: [paragraph(" ".join(limits(table, kept)))]),
    ]
    replace_file(path, html_page(title, pieces, GENERATOR).encode())
    return path


def _checked(sweep: object) -> pd.DataFrame:
    table = sweep_table(sweep, *NEEDED, *(["run"] if isinstance(sweep, Sweep) else []))
    if table.duplicated([*window_columns(table), "lr", "seed"]).any():
        differ = [c for c in settings_of(table) if table[c].nunique(dropna=False) > 1]
        if not differ:
            raise InputError("the table holds some runs twice; drop them: table.drop_duplicates('run')")
        first = f"table[{differ[0]!r}]"
        raise InputError(
            f"a report is about one sweep, and the table mixes values of {', '.join(differ)}; "
            f"report one at a time, such as the first: table[{first} == {first}.iloc[0]]"
        )
    return table


def _kept(sweep: Sweep) -> Kept:
    return Kept(sweep.experiment, sweep.curves(), _if_kept(sweep.answers), _if_kept(sweep.drifts))


def _if_kept(read: Callable[[], pd.DataFrame]) -> pd.DataFrame | None:
    try:
        return read()
    except InputError:  # kept without it
        return None


def _title(table: pd.DataFrame, kept: Kept | None) -> str:
    what = "Windows" if (table["method"] == "window").any() else "Methods"
    if kept is None:
        return f"{what} of LoRA: what was learned and what was forgotten"
    task, retain = (task_names(kept)[name] for name in ("task", "retain"))
    return f"{what} of LoRA: learning {task}, forgetting {retain}"


def _results(table: pd.DataFrame, kept: Kept | None, accuracy: float | None) -> Pieces:
    pieces = [
        *_section("Is forgetting U-shaped?", lambda: u_shape_section(table)),
        *_section("Figures", lambda: figures_section(table)),
        *_section("At equal learning rates", lambda: equal_rate_section(table)),
        *_section("At each window's own best learning rate", lambda: own_best_section(table)),
        *_section("Which window beats which", lambda: dominance_section(table)),
    ]
    if kept is None:
        return pieces
    pieces += _section("At equal accuracy", lambda: _at_equal_accuracy(table, kept.curves, accuracy))
    if kept.answers is not None:
        pieces += _section("What was forgotten", lambda: items_section(table, kept.answers))
    if kept.drifts is not None:
        pieces += _section("What happened to the weights", lambda: drift_section(table, kept.drifts))
    return pieces


def _section(title: str, write: Callable[[], Pieces]) -> Pieces:
    """What a half-finished sweep cannot tell is said so, and the rest of the page stands."""
    try:
        return [heading(title), *write()]
    except LoraLensError as error:
        return [heading(title), paragraph(f"Not given: {error}.")]


def _at_equal_accuracy(table: pd.DataFrame, curves: pd.DataFrame, asked: float | None) -> Pieces:
    accuracy = matched_accuracy(table, curves, asked)
    return [
        *matched_section(table, curves, accuracy, asked=asked is not None),
        *matched_figures(table, curves, accuracy),
    ]
