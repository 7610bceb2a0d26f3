"""What one run of a sweep did, as boxes for an explorer: its numbers, its curve, its weights, its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from ipywidgets import HTML, HBox, Layout

from lora_lens import plots
from lora_lens._base.errors import InputError, LoraLensError
from lora_lens._base.schema import require_store, sweep_table
from lora_lens.experiments.store import all_records
from lora_lens.forgetting import examples
from lora_lens.plots.examples import shown_as
from lora_lens.plots.single_runs import relative_updates
from lora_lens.tasks.task import Task
from lora_lens.training.loop import Run, Training
from lora_lens.widgets._explorer import Parts, drawn, html_table, plain_texts
from lora_lens.widgets.forgotten import require_same_examples, shown_examples, window_names

EXAMPLES = 12
SCORES = ("accuracy", "retained_before", "retained_accuracy", "forgetting")
SETTINGS = (
    "method", "variant", "rank", "position", "start", "alpha", "targets", "lr", "steps", "batch_size",
    "warmup", "weight_decay", "precision", "seed", "trainable",
)  # fmt: skip
LONGEST_SETTING = 60  # characters
SIZE = (4.7, 3.2)


class KeptRuns:
    """What a store keeps of the runs of a table, read once: the whole file is unpacked for a single run.

    Args:
        store: the folder or file.
        runs: the names of all runs that may be asked for.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it is no such file, or holds none of these runs.
    """

    def __init__(self, store: str | Path, runs: Iterable[str]) -> None:
        require_store(store)
        self._store, wanted = store, set(runs)
        self._records = {run: record for run, record in all_records(store).items() if run in wanted}
        if not self._records:
            raise InputError(f"{store} holds none of the table's runs; give the store of this sweep")

    def curves(self, runs: Iterable[str]) -> pd.DataFrame:
        """As :func:`lora_lens.experiments.curves`, but a run that the store lacks is a ValueError."""
        kept = self._kept(runs, "curve", "its learning curve")
        return pd.concat([pd.DataFrame(found).assign(run=run) for run, found in kept.items()])

    def drifts(self, runs: Iterable[str]) -> pd.DataFrame:
        """As :func:`lora_lens.experiments.drifts`, but a run without a drift is a ValueError, too."""
        kept = self._kept(runs, "drift", "its update of each weight; a sweep notes it when given spectra")
        return pd.concat([pd.DataFrame(found).assign(run=run) for run, found in kept.items()])

    def answers(self, runs: Iterable[str]) -> pd.DataFrame:
        """As :func:`lora_lens.experiments.answers`, but a run that the store lacks is a ValueError."""
        kept = self._kept(runs, "items", "its answers, by an earlier version")
        return pd.concat(
            [
                pd.DataFrame(found).rename_axis("item").reset_index().assign(run=run)
                for run, found in kept.items()
            ]
        )

    def answered(self) -> list[str]:
        """The runs whose answers were kept."""
        return [run for run, record in self._records.items() if "items" in record]

    def _kept(self, runs: Iterable[str], key: str, what: str) -> dict[str, dict]:
        runs = list(runs)
        if absent := [run for run in runs if run not in self._records]:
            raise InputError(f"{self._store} does not hold run {absent[0]}")
        if without := [run for run in runs if key not in self._records[run]]:
            raise InputError(f"run {without[0]} was kept without {what}")
        return {run: self._records[run][key] for run in runs}


class RunView:
    """Boxes that show one run: settings and scores, and what a store keeps of it.

    Args:
        table: from :func:`named_runs`, with the column run.
        kept: None shows settings and scores alone.
        task: the retained task, to show the examples that were forgotten.

    Attributes:
        boxes: to be shown, in this order.
    """

    def __init__(self, table: pd.DataFrame, kept: KeptRuns | None, task: Task | None) -> None:
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
        curve = self._kept.curves([run])
        config = Training(lr=float(self._rows.at[run, "lr"]))
        kept = Run(config, curve, diverged=False, seconds=np.nan, head=None)
        return drawn(
            lambda figure: plots.learning_curve(kept, ax=figure.subplots()).set_title("Along this run"),
            f"accuracy on both tasks along the run, {len(curve)} evaluations",
            size=SIZE,
        )

    def _draw_drift(self, run: str) -> str:
        drift = self._kept.drifts([run])
        return drawn(
            lambda figure: relative_updates({"": drift}, ax=figure.subplots()),
            f"how far the run moved each of {len(drift)} weights: by {span(drift)} of its size",
            size=SIZE,
        )

    def _show_forgotten(self, run: str) -> str:
        kind = shown_as(self._task)
        given = self._kept.answers([run])
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


def require_task(kept: KeptRuns, task: Task | None) -> None:
    """Refuse a task whose examples are not those that the runs answered.

    Raises:
        ValueError: they are others, or are neither images nor texts with classes.
    """
    if task is None:
        return
    shown_as(task)
    if answered := kept.answered():
        require_same_examples(kept.answers(answered[:1]), task)


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


def run_in_words(row: pd.Series) -> str:
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
