"""What one run of a sweep did, as boxes for an explorer: its numbers, its curve, its weights, its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from html import escape

import pandas as pd
from ipywidgets import HTML, HBox, Layout

from lora_lens import plots
from lora_lens._base.errors import InputError, LoraLensError
from lora_lens._base.schema import sweep_table
from lora_lens.experiments.results import Sweep
from lora_lens.forgetting import examples
from lora_lens.plots._image import drawn
from lora_lens.plots.examples import shown_as
from lora_lens.plots.single_runs import relative_updates
from lora_lens.tasks.task import Task
from lora_lens.widgets._explorer import Parts, html_table, plain_texts
from lora_lens.widgets.forgotten import require_same_examples, shown_examples, window_names

EXAMPLES = 12
SCORES = ("accuracy", "retained_before", "retained_accuracy", "forgetting")
SETTINGS = (
    "method", "variant", "rank", "position", "start", "alpha", "targets", "lr", "steps", "batch_size",
    "warmup", "weight_decay", "precision", "seed", "trainable",
)  # fmt: skip
LONGEST_SETTING = 60  # characters
SIZE = (4.7, 3.2)


def those(sweep: Sweep, runs: Iterable[str]) -> Sweep:
    """The sweep with these runs alone."""
    return sweep.only(sweep.table[sweep.table["run"].isin(list(runs))])


class RunView:
    """Boxes that show one run: settings and scores, and what a store keeps of it.

    Args:
        table: from :func:`named_runs`, with the column run.
        kept: None shows settings and scores alone.
        task: the retained task, to show the examples that were forgotten.

    Attributes:
        boxes: to be shown, in this order.
    """

    def __init__(self, table: pd.DataFrame, kept: Sweep | None, task: Task | None) -> None:
        self._rows = table.set_index("run")
        self._kept, self._task = kept, task
        self._about, self._curve, self._drift, self._forgotten = HTML(), HTML(), HTML(), HTML()
        for box in (self._about, self._forgotten):
            box.add_class("jp-RenderedHTMLCommon")
        for box in (self._curve, self._drift):
            box.layout = Layout(flex="1 1 20em", min_width="0")
            box.add_class("ll-small")
        side_by_side = HBox(
            [self._curve, self._drift], layout=Layout(flex_flow="row wrap", grid_gap="0 12px")
        )
        self.boxes = [self._about] if kept is None else [self._about, side_by_side, self._forgotten]
        self._made = lru_cache(maxsize=64)(lambda make, run: or_why_not(lambda: make(run)))
        self._asked: str | None = None
        self._complete = False

    def show(self, run: str) -> Parts | None:
        """Show settings, scores and curve, and return the slower rest for an explorer, unless it is there.

        Raises:
            ValueError: the table has no such run.
        """
        if run not in self._rows.index:
            raise InputError(f"the table has no run {run!r}; pick one of the points")
        if run == self._asked and self._complete:
            return None
        self._asked, self._complete = run, self._kept is None
        self._about.value = _about(self._rows.loc[run])
        if self._kept is None:
            return None
        self._curve.value = self._made(self._draw_curve, run)
        return self._rest(run)

    def _rest(self, run: str) -> Iterator[tuple[HTML, str]]:
        yield self._drift, self._made(self._draw_drift, run)
        if self._task is not None:
            yield self._forgotten, self._made(self._show_forgotten, run)
        self._complete = run == self._asked

    def _draw_curve(self, run: str) -> str:
        curve = those(self._kept, [run]).curves()
        return drawn(
            lambda figure: plots.learning_curve(curve, ax=figure.subplots()).set_title("Along this run"),
            f"accuracy on both tasks along the run, {len(curve)} evaluations",
            size=SIZE,
        )

    def _draw_drift(self, run: str) -> str:
        drift = those(self._kept, [run]).drifts()
        return drawn(
            lambda figure: relative_updates({"": drift}, ax=figure.subplots()),
            f"how far the run moved each of {len(drift)} weights: by {span(drift)} of its size",
            size=SIZE,
        )

    def _show_forgotten(self, run: str) -> str:
        kind = shown_as(self._task)
        given = those(self._kept, [run]).answers()
        known = examples.forgotten_by(given)
        forgotten = known[known["forgotten"] > 0]
        gained = int(examples.transitions(given)["gained"].iloc[0])
        told = (
            f"<p>Of {len(known)} {kind} that were classified right before, the run forgot {len(forgotten)}; "
            f"{gained} that were classified wrong before are right now.</p>"
        )
        if forgotten.empty:
            return told
        some = of_all_classes(forgotten, EXAMPLES)
        title = f"{len(some)} of {len(forgotten)} {kind} that the run forgot, and what it takes them for"
        return told + shown_examples(self._task, some, title, shares=False)


def named_runs(table: object, *more: str) -> pd.DataFrame:
    """A sweep's table, with ``more`` columns, a plain index and the column window: a name for each method.

    Raises:
        ValueError: it is empty or lacks columns of a sweep.
    """
    table = sweep_table(table, *more, once=True).reset_index(drop=True)
    return table.assign(window=window_names(table))


def require_task(sweep: Sweep, task: Task | None) -> None:
    """Refuse a task whose examples are not those that the runs answered.

    Raises:
        ValueError: they are others, or are neither images nor texts with classes.
    """
    if task is None:
        return
    shown_as(task)
    try:
        answered = sweep.only(sweep.table.query("not failed").head(1)).answers()
    except LoraLensError:  # an earlier version's, without answers, or no longer there
        return
    require_same_examples(answered, task)


def or_why_not(make: Callable[[], str]) -> str:
    """What was made, or in its place why it was not: one part less, and the others stay."""
    try:
        return make()
    except LoraLensError as error:
        return f'<p class="ll-missing">Not shown: {escape(str(error))}.</p>'


def of_all_classes(forgotten: pd.DataFrame, count: int) -> pd.DataFrame:
    """The first of each class, then the second of each, up to ``count``: no class hides the others."""
    turn = forgotten.groupby("label").cumcount().rename("turn")
    order = pd.concat([turn, forgotten["label"]], axis=1).sort_values(["turn", "label"], kind="stable")
    return forgotten.loc[order.index].head(count)


def run_in_words(row: Mapping[str, object]) -> str:
    """Which run it is and how it ended, in one line."""
    return (
        f"{row['window']}, learning rate {row['lr']:g}, seed {row['seed']}: accuracy "
        f"{100 * row['accuracy']:.1f}%, forgetting {100 * row['forgetting']:.1f} points"
    )


def span(drift: pd.DataFrame) -> str:
    """The smallest and the largest update relative to the weight."""
    return f"{100 * drift['relative'].min():.1f} to {100 * drift['relative'].max():.1f}%"


def _about(row: pd.Series) -> str:
    """Which run it is, how it ended, and its settings."""
    scores = {f"{name.replace('_', ' ')} (%)": f"{100 * row[name]:.1f}" for name in SCORES if name in row}
    if row.get("diverged", False):
        scores["diverged"] = "yes"
    given = [name for name in SETTINGS if name in row and not pd.isna(row[name])]
    settings = [f"{name.replace('_', ' ')} {_brief(row[name])}" for name in given]
    title = f"{row['window']}, learning rate {row['lr']:g}, seed {row['seed']}"
    return (
        f"<b>The run: {escape(title)}</b>{html_table(pd.DataFrame([scores]))}"
        f"<p>{escape('; '.join(settings))}</p>"
    )


def _brief(setting: object) -> str:
    """A number or a name; of many names how many they are."""
    text = plain_texts(pd.Series([setting]))[0]
    return text if len(text) <= LONGEST_SETTING else f"{len(text.split())} names, from {text.split()[0]} on"
