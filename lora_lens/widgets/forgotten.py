"""The explorer of what was forgotten, example by example."""

from __future__ import annotations

from html import escape
from textwrap import shorten

import pandas as pd
from ipywidgets import HTML
from matplotlib.figure import Figure

from lora_lens import plots
from lora_lens._base.errors import InputError
from lora_lens._base.schema import sweep_table
from lora_lens.experiments.results import Sweep, require_sweep
from lora_lens.forgetting import examples as items
from lora_lens.plots._image import drawn
from lora_lens.plots._style import panels
from lora_lens.plots.examples import shown_as
from lora_lens.tasks.task import Task
from lora_lens.widgets._explorer import (
    ALL,
    Explorer,
    dropdown,
    explorer,
    html_table,
    plain_texts,
    rate_choice,
    table_box,
    window_choice,
)

EXAMPLES, IN_A_ROW = 12, 6
LETTERS = 400  # of a text


@explorer
def forgotten_explorer(sweep: Sweep, retain: Task) -> Explorer:
    """Which images or texts of the retained task were forgotten, and what they were taken for.

    Controls: windows and other methods (several may be chosen), learning rate, class. Shown: how many of
    the class's examples every window kept, forgot and gained (:func:`lora_lens.forgetting.transitions`, means
    over its runs); those that most of the chosen runs forgot (:func:`lora_lens.forgetting.forgotten_by`); and
    for all classes, which was taken for which before and after (:func:`lora_lens.forgetting.confusion`).

    Args:
        sweep: the runs with their answers, from :func:`lora_lens.sweep` or :meth:`lora_lens.Sweep.open`.
        retain: the retained task, with its test examples in the order of the sweep; a longer test set that
            starts with them will do.

    Raises:
        ValueError: the sweep has no runs or no answers, or the test
            examples of ``retain`` are others, or are neither images nor texts with classes.

    Example:
        >>> from collections import OrderedDict
        >>> import lora_lens as ll, torch
        >>> images = ll.Examples(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
        >>> task = ll.Task("squares", ("dark", "light"), images, images)
        >>> flat, body, head = torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Linear(8, 2)
        >>> model = torch.nn.Sequential(OrderedDict(flat=flat, body=body, head=head))
        >>> grid = ll.Grid(window=ll.windows(2, 3), lr=[0.01], seed=[0])
        >>> fast = {"steps": 1, "evaluations": 2, "batch_size": 4, "jobs": 1, "progress": False}
        >>> sweep = ll.sweep(grid, model=model, task=task, retain=task, **fast)
        >>> explorer = ll.widgets.forgotten_explorer(sweep, task)  # the last line of a cell shows it
        >>> explorer.children[1].children[0].options
        ('window at 0', 'window at 0.5', 'window at 1')
    """
    require_sweep(sweep)
    table, task = sweep_table(sweep, "run"), retain
    kind = shown_as(task)
    table = table.assign(window=window_names(table))
    table = table.sort_values(["method", "position"], ascending=[False, True], kind="stable")
    given = sweep.only(table).answers()
    require_same_examples(given, task)
    names = list(table["window"].unique())
    windows, rate = window_choice(names), rate_choice(table)
    label = dropdown("class", [("all", ALL), *((name, i) for i, name in enumerate(task.classes))])
    numbers, sentence, examples, taken = table_box(), HTML(), HTML(), HTML()

    def draw() -> None:
        if not windows.value:
            raise InputError("choose at least one window or method")
        runs = table[table["window"].isin(windows.value) & (table["lr"] == rate.value)]
        if runs.empty:
            raise InputError(f"no runs of these windows at learning rate {rate.value:g}; choose others")
        answered = given[given["run"].isin(runs["run"])]
        of_class = answered if label.value == ALL else answered[answered["label"] == label.value]
        if of_class.empty:
            raise InputError(f"the test set has no {kind} of {label.label}; choose another class")
        forgotten = items.forgotten_by(of_class)
        sentence.value = f"<p>{_forgotten_in_words(forgotten, len(runs), kind)}</p>"
        numbers.value = html_table(_moved(of_class, runs, kind))
        forgotten = forgotten[forgotten["forgotten"] > 0].head(EXAMPLES)
        about = "" if label.value == ALL else f" of {label.label}"
        title = f"the {len(forgotten)} {kind}{about} that most of {len(runs)} runs forgot"
        examples.value = "" if forgotten.empty else shown_examples(task, forgotten, title)
        taken.value = drawn(
            lambda figure: _draw_confusion(figure, answered, task),
            f"which of {len(task.classes)} classes was taken for which, before and after, {len(runs)} runs",
            size=(10, 4.9),
        )

    return Explorer([[windows], [rate, label]], [sentence, numbers, examples, taken], draw)


def require_same_examples(given: pd.DataFrame, task: Task) -> None:
    """The labels in the answers are the only trace of the examples that the store keeps.

    Raises:
        ValueError: the task's test examples are others, or are neither images nor texts with classes.
    """
    kind = shown_as(task)
    labels = given.drop_duplicates("item").set_index("item")["label"].sort_index()
    if len(labels) > len(task.test) or (labels != task.test.labels[labels.index].numpy()).any():
        raise InputError(
            f"the answers are to {len(labels)} other test {kind} than those of {task.name}; "
            "give the retained task of the sweep"
        )


def window_names(table: pd.DataFrame) -> pd.Series:
    """A name for the window or method of each row, different where they differ."""
    position, start = (table[column].astype(float).map("{:g}".format) for column in ("position", "start"))
    names = table["method"].where(table["position"].isna(), "window at " + position)
    names = names.where(table["start"].isna(), "window from " + start)
    for column in ("rank", "variant"):
        if column in table and (table[column].groupby(names).nunique() > 1).any():
            named = f", {column} " + pd.Series(plain_texts(table[column]), table.index)
            names = names + named.where(table[column].notna(), "")
    return names


def _moved(answered: pd.DataFrame, runs: pd.DataFrame, kind: str) -> pd.DataFrame:
    """What every window kept and lost of the examples, means over its runs."""
    counts = items.transitions(answered)
    groups = counts.groupby(counts["run"].map(runs.set_index("run")["window"]).rename("window"), sort=False)
    means = groups[["kept", "forgotten", "gained", "never"]].mean()
    means = means.rename(columns=lambda name: f"{name} ({kind})").map("{:.1f}".format)
    shown = means.assign(**{"forgetting (%)": (100 * groups["forgetting"].mean()).map("{:.1f}".format)})
    shown.insert(0, "runs", groups.size())
    return shown.reset_index()


def _forgotten_in_words(forgotten: pd.DataFrame, runs: int, kind: str) -> str:
    some, every = int((forgotten["forgotten"] > 0).sum()), int((forgotten["share"] == 1).sum())
    return (
        f"Of {len(forgotten)} {kind} that were classified right before, {some} were forgotten in at least "
        f"one of {runs} runs, and {every} in all of them."
    )


def shown_examples(task: Task, forgotten: pd.DataFrame, title: str, shares: bool = True) -> str:
    """Images in one picture, texts in a table, each with its class and what it was taken for.

    Args:
        forgotten: rows of :func:`lora_lens.forgetting.forgotten_by`, at least one.
        shares: False where there is one run, to leave out which share of the runs forgot each.
    """
    return (_pictures if shown_as(task) == "images" else _texts)(task, forgotten, title, shares)


def _pictures(task: Task, forgotten: pd.DataFrame, title: str, shares: bool) -> str:
    height = (1.95 if shares else 1.8) * -(-len(forgotten) // IN_A_ROW)
    return drawn(lambda figure: _draw_images(figure, task, forgotten, shares), title, size=(10, height))


def _draw_images(figure: Figure, task: Task, forgotten: pd.DataFrame, shares: bool) -> None:
    count = len(forgotten)
    for ax in plots.forgotten_examples(task, forgotten, count=count, axes=panels(count, IN_A_ROW, figure)):
        if not shares:
            ax.title.set_text(ax.get_title().rpartition("\n")[0])


def _texts(task: Task, forgotten: pd.DataFrame, title: str, shares: bool) -> str:
    """As a table: texts can be selected and read aloud there, and in a picture they cannot."""
    rows = [
        {
            "class": task.classes[row.label],
            "taken for": task.classes[row.instead],
            "runs": f"{row.share:.0%}",
            "text": shorten(task.test.texts[row.item], LETTERS, placeholder=" ..."),
        }
        for row in forgotten.itertuples()
    ]
    shown = pd.DataFrame(rows).drop(columns=[] if shares else "runs")
    with pd.option_context("display.max_colwidth", None):
        return f"<b>{escape(title[0].upper() + title[1:])}</b>{html_table(shown, headings='left')}"


def _draw_confusion(figure: Figure, answered: pd.DataFrame, task: Task) -> None:
    for ax, when in zip(figure.subplots(1, 2), ("before", "after"), strict=True):
        plots.confusion(items.confusion(answered, len(task.classes), when), task.classes, ax=ax)
        ax.set_title(f"{when} training")
