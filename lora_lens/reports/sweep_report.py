"""One sweep on one page: what was run, what came out, how sure it is, and where it ends.

The page is a single HTML file for readers who have neither the data nor Python. All numbers are those of
the public functions; the page only puts them into words, tables and pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from lora_lens._base.errors import InputError, LoraLensError
from lora_lens._base.files import replace_file
from lora_lens._base.schema import sweep_table, table_of
from lora_lens._base.validate import instance, share
from lora_lens.experiments.results import Sweep
from lora_lens.forgetting.run_groups import window_columns
from lora_lens.reports import tables
from lora_lens.reports.facts import IDENTITY, facts_section, limits, settings_of, task_names
from lora_lens.reports.figures import figures_section
from lora_lens.reports.page import Piece, html_page, page_path
from lora_lens.reports.words import in_order, u_shape_section

NEEDED = (*IDENTITY, "accuracy", "retained_before", "retained_accuracy", "forgetting", "diverged")


def report(
    sweep: Sweep | pd.DataFrame, path: str | Path, *, title: str | None = None, accuracy: float | None = None
) -> Path:
    """Write everything a sweep shows into one HTML file that opens anywhere and prints on A4.

    In this order: what was run and with which versions; whether forgetting is U-shaped, tested at every
    rate and adjusted for their number; figures; tables with 95% intervals at equal rates, at own best
    rates and of windows against each other; of a sweep with its store also at equal accuracy, by class of the
    retained task and what the weights did; and the limits of all that.

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
            settings, or ``accuracy`` is given with a table alone or is no share.
        FileNotFoundError: there is no such folder.
        FileExistsError: something other than a report is at ``path``.

    Example:
        >>> import tempfile
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"method": ["window", "LoRA"], "start": [0, None], "accuracy": [0.9, 0.8]})
        >>> runs["retained_accuracy"], runs["forgetting"] = [0.6, 0.8], [0.3, 0.1]
        >>> runs = runs.assign(position=None, rank=8, lr=5e-3, seed=0, retained_before=0.9, diverged=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = ll.reports.report(runs, f"{folder}/page.html", title="Two runs")
        ...     "<title>Two runs</title>" in path.read_text(encoding="utf-8")
        True
    """
    kept = sweep if isinstance(sweep, Sweep) else None
    table = _checked(sweep)
    failed = len(table_of(sweep)) - len(table)
    path = page_path(path)
    if accuracy is not None and kept is None:
        raise InputError("to compare at an accuracy, report needs the curves of the runs: pass the ll.Sweep")
    accuracy = None if accuracy is None else share(accuracy, "accuracy")
    instance(title, (str, type(None)), "title", "the page's title in words")
    table = in_order(table)
    kept = None if kept is None else kept.only(table)
    sections = _sections(table, kept, accuracy, failed)
    replace_file(path, html_page(title or _title(table, kept), sections).encode())
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


def _if_kept(read: Callable[[], pd.DataFrame]) -> pd.DataFrame | None:
    try:
        return read()
    except InputError:  # kept without it
        return None


def _title(table: pd.DataFrame, kept: Sweep | None) -> str:
    what = "Windows" if (table["method"] == "window").any() else "Methods"
    if kept is None:
        return f"{what} of LoRA: what was learned and what was forgotten"
    task, retain = task_names(kept.experiment)
    return f"{what} of LoRA: learning {task}, forgetting {retain}"


def _sections(table: pd.DataFrame, kept: Sweep | None, accuracy: float | None, failed: int) -> list[dict]:
    experiment, answers = None if kept is None else kept.experiment, None
    write = {
        "What was run": partial(facts_section, table, experiment, failed),
        "Is forgetting U-shaped?": partial(u_shape_section, table),
        "Figures": partial(figures_section, table),
        "At equal learning rates": partial(tables.equal_rate_section, table),
        "At each window's own best learning rate": partial(tables.own_best_section, table),
        "Which window beats which": partial(tables.dominance_section, table),
    }
    if kept is not None:
        answers, drifts = _if_kept(kept.answers), _if_kept(kept.drifts)
        write["At equal accuracy"] = partial(tables.equal_accuracy_section, table, kept.curves(), accuracy)
        if answers is not None:
            write["What was forgotten"] = partial(tables.items_section, table, answers)
        if drifts is not None:
            write["What happened to the weights"] = partial(tables.drift_section, table, drifts)
    write["Limits"] = lambda: [limits(table, answers)]
    return [{"heading": heading, "pieces": _pieces(section)} for heading, section in write.items()]


def _pieces(write: Callable[[], list[Piece]]) -> list[Piece]:
    """A section that a half-finished sweep cannot fill says so, and the rest of the page is written."""
    try:
        return write()
    except LoraLensError as error:
        return [f"Not given: {error}."]
