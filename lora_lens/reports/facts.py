"""What a report says about the runs themselves: what they were, made with what, and their limits."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

import numpy as np
import pandas as pd

from lora_lens._base.errors import LoraLensError
from lora_lens._base.naming import block_and_kind, counted, listed
from lora_lens.experiments.runs import RESULTS
from lora_lens.forgetting.examples import forgetting_interval
from lora_lens.forgetting.fair_comparison import at_equal_rate
from lora_lens.forgetting.rate_ranges import rate_robustness
from lora_lens.forgetting.run_groups import window_columns
from lora_lens.forgetting.u_shape import LEVEL
from lora_lens.plots._scores import in_words
from lora_lens.reports.page import MISSING, Piece, Table, plain, points
from lora_lens.reports.words import placed, span

PACKAGES = ("lora_lens", "torch", "peft", "timm", "accelerate")
IDENTITY = ("method", "rank", "position", "start", "lr", "seed")
TASKS = {"model": "pretrained model", "task": "new task", "retain": "retained task"}
COMMON_NAMES = {
    "targets": "adapted layers",
    "trainable": "adapter parameters trained",
}


def task_names(experiment: Mapping) -> tuple[str, str]:
    """The new and the retained task without their hashes."""
    return tuple(experiment["identity"][task].rsplit(" ", 1)[0] for task in ("task", "retain"))


def settings_of(table: pd.DataFrame) -> list[str]:
    others = ("run", "variant", *IDENTITY, *RESULTS, "diverged", "failed", "reason")
    return [column for column in table if column not in others]


def facts_section(table: pd.DataFrame, experiment: Mapping | None, failed: int = 0) -> list[Piece]:
    """Of the runs in ``table``, beside which ``failed`` others came to nothing."""
    here = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    versions, belongs = {"package": list(here), "of this report": list(here.values())}, []
    if experiment:
        there = experiment["versions"] | {"lora_lens": experiment["identity"]["lora_lens"]}
        versions["of the first runs"] = [there.get(name, MISSING) for name in here]
        hashes = [experiment["identity"][key] for key in TASKS]  # of weights and examples
        cells = {"part": list(TASKS.values()), "hash": hashes}
        belongs = [Table(cells, "What the runs belong to.", words=["hash"])]
    varied, shared = _settings(table)
    beside = [shared, Table(versions, "Versions of the software."), *belongs]
    return [_in_words(table, experiment, failed), varied, {"beside": beside}]


def _in_words(table: pd.DataFrame, experiment: Mapping | None, failed: int) -> str:
    methods = table[window_columns(table)].drop_duplicates()
    windows = int((methods["method"] == "window").sum())
    others = methods.loc[methods["method"] != "window", "method"].unique()
    parts = [counted(windows, "window")] if windows else []
    if len(others):
        many = counted(len(others), "other method" if windows else "method")
        parts.append(f"{many} ({'; '.join(others)})")
    rates, seeds = counted(table["lr"].nunique(), "learning rate"), counted(table["seed"].nunique(), "seed")
    learned = ""
    if experiment:
        learned = ", learning {} and measuring what is forgotten of {}".format(*task_names(experiment))
    lost = f" {counted(failed, 'more run')} failed, and this page leaves them out." if failed else ""
    return (
        f"{' and '.join(parts)} at {rates} with {seeds}: {counted(len(table), 'run')}{learned}. "
        f"{int(table['diverged'].sum()) or 'None'} diverged.{lost}"
    )


def _settings(table: pd.DataFrame) -> tuple[Table, Table]:
    """What differs between the runs, and what they share."""
    ranks = [f"{rank:g}" for rank in sorted(table["rank"].dropna().unique())]
    starts = table.loc[table["method"] == "window", "start"].dropna().unique()
    settings = {c: [_shown(c, v) for v in table[c].unique()] for c in settings_of(table)}
    measured = {c: table[c].unique() for c in ("trainable", "retained_before") if c in table}
    values = {
        "method": list(table["method"].unique()),
        "rank": ranks,
        "variant": [str(v) for v in table["variant"].dropna().unique()] if "variant" in table else [],
        "position of the window": [f"{v:.3g}" for v in sorted(placed(table)["position"].unique())],
        "start of the window": [f"{v:g}" for v in sorted(starts)],
        "learning rate": [plain(v) for v in sorted(table["lr"].unique())],
        "seed": [str(v) for v in sorted(table["seed"].unique())],
        **settings,
    }
    always = ("learning rate", "seed")
    rows = [(n, len(v), "; ".join(v)) for n, v in values.items() if len(v) > 1 or n in always]
    cells = pd.DataFrame(rows, columns=["setting", "count", "values"])
    varied = Table(cells, "What differs between runs.", words=["values"])
    shared = {"rank": ranks} | settings | {c: [_shown(c, v) for v in found] for c, found in measured.items()}
    before = {"retained_before": f"{in_words('retained_accuracy', table)} before (%)"}
    rows = [((COMMON_NAMES | before).get(name, name), v[0]) for name, v in shared.items() if len(v) == 1]
    cells = pd.DataFrame(rows, columns=["setting", "value"])
    return varied, Table(cells, "What all runs share.", words=["value"])


def _shown(column: str, value: object) -> str:
    if column == "targets":
        layers = str(value).split()
        kinds = dict.fromkeys(block_and_kind(name)[1] for name in layers)
        return f"{counted(len(layers), 'layer')}: {listed(kinds)}"
    if column == "retained_before":
        return points(value)
    if column == "alpha" and pd.isna(value):
        return "the rank (default)"
    return str(value) if isinstance(value, (bool, np.bool_, str)) else plain(value)


def limits(table: pd.DataFrame, answers: pd.DataFrame | None) -> str:
    """The limits of the page, from its own facts."""
    sentences = [
        "All runs start from one pretrained model and learn one task: another model or task may differ.",
        *_of_seeds(table),
        *_of_rates(table),
    ]
    if diverged := int(table["diverged"].sum()):
        sentences.append(f"{counted(diverged, 'run')} diverged; the scores after that are part of the means.")
    unknown = "How many test examples the scores rest on is not known here."
    return " ".join([*sentences, unknown if answers is None else _of_examples(table, answers)])


def _of_seeds(table: pd.DataFrame) -> list[str]:
    seeds = at_equal_rate(table)["seeds"]
    if seeds.max() == 1:
        return ["There is one seed, so nothing distinguishes a difference between windows from chance."]
    sentences = [f"Intervals are Student's, over {span(seeds)}, each for itself."]
    if (fewer := int((seeds < seeds.max()).sum())) > 0:
        sentences.append(
            f"{fewer} of {len(seeds)} cells of window and rate have fewer seeds than the others."
        )
    if len(placed(table)) and (smallest := 2.0 ** -int(seeds.max())) > LEVEL:
        few = f"{seeds.max()} cannot give a p value below {smallest:g}"
        sentences.append(f"A single test of a U-shape needs 5 seeds: {few}.")
    return sentences


def _of_rates(table: pd.DataFrame) -> list[str]:
    rates = sorted(table["lr"].unique())
    if len(rates) == 1:
        return [f"There is one learning rate, {plain(rates[0])}: at another one the order may differ."]
    try:
        best = rate_robustness(table)["best_lr"]
    except LoraLensError:
        return []
    ends = int(best.isin([rates[0], rates[-1]]).sum())
    if not ends:
        return ["Best rates are the best of those tried."]
    grid = f"the grid ({plain(rates[0])} to {plain(rates[-1])}), so a better one may lie outside."
    return [f"For {ends} of {len(best)} windows and methods the best rate is an end of {grid}"]


def _of_examples(table: pd.DataFrame, answers: pd.DataFrame) -> str:
    over_seeds, over_both = (
        points((rows["forgetting_high"] - rows["forgetting_low"]).median())
        for rows in (at_equal_rate(table), forgetting_interval(answers, table))
    )
    instead = "" if over_seeds == MISSING else f" instead of {over_seeds}"
    return (
        f"The retained task has {answers['item'].nunique()} test examples, which intervals take as fixed. "
        f"With the variance over examples added, the median 95% interval of forgetting at one rate is "
        f"{over_both} points wide{instead}."
    )
