"""Two windows side by side: what their runs gained and lost, and where."""

from __future__ import annotations

from functools import lru_cache, partial
from html import escape

import numpy as np
import pandas as pd
from ipywidgets import HTML, Dropdown
from matplotlib.figure import Figure

from lora_lens import plots
from lora_lens._base.errors import InputError, LoraLensError
from lora_lens._base.naming import counted
from lora_lens.experiments.results import Sweep, require_sweep
from lora_lens.forgetting import examples
from lora_lens.forgetting.run_groups import groups, mean_and_interval
from lora_lens.plots._image import drawn
from lora_lens.plots.examples import shown_as
from lora_lens.plots.single_runs import relative_updates
from lora_lens.tasks.task import Task
from lora_lens.widgets._explorer import WORDS, Explorer, Parts, explorer, html_table, table_box
from lora_lens.widgets._run_view import named_runs, of_all_classes, or_why_not, require_task, span, those
from lora_lens.widgets.forgotten import shown_examples

SIDES = ("A", "B")
EXAMPLES = 6
SCORES = {
    "accuracy": "accuracy on the new task",
    "retained_accuracy": "accuracy on the retained task",
    "forgetting": "forgetting of the retained task",
}
Runs = tuple[tuple[str, tuple[str, ...]], ...]  # what A and B are, and the names of their runs


@explorer
def pair_explorer(sweep: Sweep, retain: Task | None = None) -> Explorer:
    """Two windows or methods side by side.

    Controls: window or method A and B, and a learning rate for each; at first the first and the middle
    window. Shown: the means of both and their difference, paired by seed, with its 95% interval
    (:func:`lora_lens.forgetting.seed_interval`); the learning curves, means over seeds in a band from
    the lowest to the highest; how far each moved every weight; and of the retained task which examples more
    than half of the runs of A, of B or of both forgot.

    Args:
        sweep: from :func:`lora_lens.sweep` or :meth:`lora_lens.Sweep.open`: runs with one value of every
            setting but window, rate and seed. What was not kept of them is said in place.
        retain: the retained task, with its test examples in the order of the sweep; without it no examples
            are shown.

    Raises:
        ValueError: the table is empty or lacks columns of a sweep, there is one window only, two runs share
            window, rate and seed, or the test examples of ``retain`` are others or are neither images nor
            texts with classes.

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
        >>> explorer = ll.widgets.pair_explorer(sweep, task)  # the last line of a cell shows it
        >>> [control.description for control in explorer.children[1].children]
        ['A', 'learning rate of A']
    """
    require_sweep(sweep)
    table, task = named_runs(sweep, "run"), retain
    groups(table, [])  # no two runs of a window, rate and seed
    require_task(sweep, task)
    table = table.sort_values(["method", "position", "start"], ascending=[False, True, True], kind="stable")
    first, middle = _first_and_middle(table)
    names = list(table["window"].unique())
    windows = [
        Dropdown(options=names, value=v, description=s) for s, v in zip(SIDES, (first, middle), strict=True)
    ]
    rates = [Dropdown(description=f"learning rate of {side}", style=WORDS) for side in SIDES]
    learns_most = table.groupby("lr")["accuracy"].mean().idxmax()
    numbers, sentence, forgotten, curves, drift = table_box(), HTML(), HTML(), HTML(), HTML()
    forgotten.add_class("jp-RenderedHTMLCommon")

    made = lru_cache(maxsize=64)(lambda make, runs: or_why_not(lambda: make(sweep, runs)))
    slow = [(curves, _curves), (drift, _drifts)]
    if task is not None:
        slow.append((forgotten, partial(_forgotten, task=task)))

    def offer() -> None:
        """Only rates that the window was run at; the one chosen stays, or the nearest one comes."""
        for window, rate in zip(windows, rates, strict=True):
            found = sorted(table.loc[table["window"] == window.value, "lr"].unique())
            options = tuple((f"{lr:g}", lr) for lr in found)
            if rate.options != options:
                wanted = rate.value or learns_most
                rate.options = options
                rate.value = min(found, key=lambda lr: abs(np.log(lr / wanted)))

    def draw() -> Parts:
        offer()
        if windows[0].value == windows[1].value and rates[0].value == rates[1].value:
            raise InputError(
                "A and B are the same runs; choose another window, method or learning rate for one"
            )
        sides = [
            table[(table["window"] == window.value) & (table["lr"] == rate.value)]
            for window, rate in zip(windows, rates, strict=True)
        ]
        numbers.value = html_table(_numbers(*sides))
        sentence.value = f"<p>{escape(_seeds_in_words(*sides))}</p>"
        names = [f"{side}: {window.value}" for side, window in zip(SIDES, windows, strict=True)]
        runs = tuple((name, tuple(side["run"])) for name, side in zip(names, sides, strict=True))
        return ((box, made(make, runs)) for box, make in slow)

    choices = [[window, rate] for window, rate in zip(windows, rates, strict=True)]
    return Explorer(choices, [numbers, sentence, curves, drift, forgotten], draw)


def _first_and_middle(table: pd.DataFrame) -> tuple[str, str]:
    """The windows at the first position and nearest the middle, or else the first two of the table.

    Raises:
        ValueError: there is one window only.
    """
    names = table["window"].unique()
    if len(names) < 2:
        raise InputError(
            f"a comparison needs at least two windows or methods; this table has {names[0]} only"
        )
    placed = table.dropna(subset=["position"])
    if placed["position"].nunique() < 2:
        return names[0], names[1]
    middle = (placed["position"] - 0.5).abs().idxmin()
    first = placed["position"].idxmin()
    return table.at[first, "window"], table.at[middle, "window"]


def _numbers(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Scores of both, means over their seeds, and the difference by seed, as text."""
    differences = _differences(a, b)
    rows = []
    for score, words in SCORES.items():
        row = {"score": f"{words} (%)"}
        row |= {side: f"{100 * runs[score].mean():.1f}" for side, runs in zip(SIDES, (a, b), strict=True)}
        row["A - B (points) [95% interval]"] = _points(differences[score])
        rows.append(row)
    return pd.DataFrame(rows)


def _differences(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """A - B of each score, one row per seed that both have."""
    scores = list(SCORES)
    return (a.set_index("seed")[scores] - b.set_index("seed")[scores]).dropna()


def _points(differences: pd.Series) -> str:
    if differences.empty:
        return "no seed in common"
    told = mean_and_interval("mean", differences)
    interval = "" if len(differences) == 1 else " [{mean_low:+.1f}, {mean_high:+.1f}]"
    return ("{mean:+.1f}" + interval).format(**{name: 100 * value for name, value in told.items()})


def _seeds_in_words(a: pd.DataFrame, b: pd.DataFrame) -> str:
    """How far the difference can be trusted."""
    of_each = [counted(len(side), "seed") for side in (a, b)]
    shared = len(set(a["seed"]) & set(b["seed"]))
    means = f"A is the mean of {of_each[0]}, B of {of_each[1]}"
    if shared == 0:
        return f"{means}; they share no seed, so there is no difference by seed: what differs may be chance."
    if shared == 1:
        return f"{means}; they share one seed, so the difference has no interval: it may be chance."
    return (
        f"{means}. The difference is that of {shared} seeds which both have, each with itself; where its "
        "interval holds 0, chance alone may have made it."
    )


def _curves(sweep: Sweep, runs: Runs) -> str:
    along = {name: those(sweep, some).curves() for name, some in runs}

    def draw(figure: Figure) -> None:
        for ax, column in zip(figure.subplots(1, 2), ("accuracy", "retained_accuracy"), strict=True):
            plots.learning_curve(along, column, ax=ax)

    ends = {name: curve[curve["step"] == curve["step"].max()] for name, curve in along.items()}
    told = "; ".join(
        f"{name} ends at {end['accuracy'].mean():.0%} and {end['retained_accuracy'].mean():.0%}"
        for name, end in ends.items()
    )
    return drawn(draw, f"accuracy on the new and on the retained task along training: {told}", size=(10, 3.5))


def _drifts(sweep: Sweep, runs: Runs) -> str:
    moved, missing = {}, []
    for name, some in runs:
        try:
            moved[name] = those(sweep, some).drifts()
        except LoraLensError as error:
            missing.append(f"{name}: {error}")
    if not moved:
        raise InputError("; ".join(missing))
    told = "; ".join(f"{name} by {span(drift)}" for name, drift in moved.items())
    picture = drawn(
        lambda figure: relative_updates(moved, ax=figure.subplots()),
        f"how far each weight moved relative to its size, layer by layer: {told}",
        size=(10, 3.5),
    )
    return picture + "".join(f'<p class="ll-missing">Not shown of {escape(words)}.</p>' for words in missing)


def _forgotten(sweep: Sweep, runs: Runs, task: Task) -> str:
    """Counts of what A alone, B alone and both forgot, and some of each."""
    kind = shown_as(task)
    of_each = [
        those(sweep, some).answers().assign(side=side) for side, (_, some) in zip(SIDES, runs, strict=True)
    ]
    given = pd.concat(of_each)
    known = examples.forgotten_by(given, by="side")
    lost = known[list(SIDES)] > 0.5
    groups = {
        "A only": lost["A"] & ~lost["B"],
        "B only": lost["B"] & ~lost["A"],
        "both": lost["A"] & lost["B"],
        "neither": ~lost["A"] & ~lost["B"],
    }
    counts = pd.DataFrame(
        [{f"forgotten by {name} ({kind})": int(rows.sum()) for name, rows in groups.items()}]
    )
    often = " in more than half of the runs" if max(len(some) for _, some in runs) > 1 else ""
    told = f"Of {len(known)} {kind} that were classified right before, forgotten{often}:"
    shown = [f"<p>{told}</p>{html_table(counts)}"]
    shares = {"A only": known["A"], "B only": known["B"], "both": known[list(SIDES)].mean(axis=1)}
    for name, share in shares.items():
        of_group = known.assign(share=share)[groups[name]].sort_values(
            "share", ascending=False, kind="stable"
        )
        some = of_all_classes(of_group, EXAMPLES)
        if some.empty:
            continue
        title = f"forgotten by {name}: {len(some)} of {len(of_group)} {kind}"
        heading = f"<b>{title[0].upper()}{title[1:]}</b>" if kind == "images" else ""
        shown.append(heading + shown_examples(task, some, title, shares=bool(often)))
    return "".join(shown)
