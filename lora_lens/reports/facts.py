"""What a report says of the runs themselves: what they were, with what, and what they cannot tell."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pandas as pd

from lora_lens._base.errors import LoraLensError
from lora_lens._base.naming import block_and_kind, counted, listed
from lora_lens.experiments.sweeps import RESULTS
from lora_lens.forgetting.examples import forgetting_interval
from lora_lens.forgetting.fair_comparison import LEVEL, at_equal_rate, rate_robustness
from lora_lens.forgetting.run_groups import window_columns
from lora_lens.reports.page import MISSING, beside, heading, html_table, paragraph, plain, points
from lora_lens.reports.words import Pieces, placed, span

MANY_SEEDS = 20  # from here on the bootstrap is hardly too narrow
PACKAGES = ("lora_lens", "torch", "peft", "timm", "accelerate")
IDENTITY = ("method", "rank", "position", "start", "lr", "seed")
ENDED = ("diverged", "failed", "reason")
COMMON_NAMES = {
    "targets": "adapted layers",
    "trainable": "adapter parameters trained",
    "retained_before": "accuracy on the retained task before (%)",
}


@dataclass(frozen=True)
class Kept:
    """What the store of a sweep knows beyond its table; None where it kept none."""

    experiment: dict[str, dict[str, str]]
    curves: pd.DataFrame
    answers: pd.DataFrame | None
    drifts: pd.DataFrame | None


def task_names(kept: Kept) -> dict[str, str]:
    """The tasks' names without their hashes."""
    return {name: kept.experiment["identity"][name].rsplit(" ", 1)[0] for name in ("task", "retain")}


def settings_of(table: pd.DataFrame) -> list[str]:
    return [column for column in table if column not in ("run", "variant", *IDENTITY, *RESULTS, *ENDED)]


def facts_section(table: pd.DataFrame, kept: Kept | None, failed: int = 0) -> Pieces:
    """Of the runs in ``table``, beside which ``failed`` others came to nothing."""
    return [
        heading("What was run"),
        paragraph(_in_words(table, kept, failed)),
        html_table(_varied(table), "What differs between runs.", words=["values"]),
        beside(
            [
                html_table(_common(table), "What all runs share.", words=["value"]),
                html_table(_versions(kept), "Versions of the software."),
                *([html_table(_identity(kept), "What the runs belong to.", words=["hash"])] if kept else []),
            ]
        ),
    ]


def _in_words(table: pd.DataFrame, kept: Kept | None, failed: int) -> str:
    methods = table[window_columns(table)].drop_duplicates()
    windows = int((methods["method"] == "window").sum())
    others = methods.loc[methods["method"] != "window", "method"].unique()
    parts = [counted(windows, "window")] if windows else []
    if len(others):
        many = counted(len(others), "other method" if windows else "method")
        parts.append(f"{many} ({'; '.join(others)})")
    rates, seeds = table["lr"].nunique(), table["seed"].nunique()
    diverged, learned = int(table["diverged"].sum()), ""
    if kept:
        tasks = task_names(kept)
        learned = f", learning {tasks['task']} and measuring what is forgotten of {tasks['retain']}"
    lost = f" {counted(failed, 'more run')} failed, and this page leaves them out." if failed else ""
    return (
        f"{' and '.join(parts)} at {counted(rates, 'learning rate')} with {counted(seeds, 'seed')}: "
        f"{counted(len(table), 'run')}{learned}. {diverged or 'None'} diverged.{lost}"
    )


def _varied(table: pd.DataFrame) -> pd.DataFrame:
    windows = table[table["method"] == "window"]
    values = {
        "method": list(table["method"].unique()),
        "rank": _ranks(table),
        "variant": [str(v) for v in table["variant"].dropna().unique()] if "variant" in table else [],
        "position of the window": [f"{v:.3g}" for v in sorted(placed(table)["position"].unique())],
        "start of the window": [f"{v:g}" for v in sorted(windows["start"].dropna().unique())],
        "learning rate": [plain(v) for v in sorted(table["lr"].unique())],
        "seed": [str(v) for v in sorted(table["seed"].unique())],
        **{c: [_shown(c, v) for v in table[c].unique()] for c in settings_of(table)},
    }
    always = ("learning rate", "seed")
    rows = [(n, str(len(v)), "; ".join(v)) for n, v in values.items() if len(v) > 1 or n in always]
    return pd.DataFrame(rows, columns=["setting", "count", "values"])


def _ranks(table: pd.DataFrame) -> list[str]:
    return [f"{rank:g}" for rank in sorted(table["rank"].dropna().unique())]


def _common(table: pd.DataFrame) -> pd.DataFrame:
    shared = [c for c in (*settings_of(table), "trainable", "retained_before") if c in table]
    rows = [
        (COMMON_NAMES.get(c, c), _shown(c, table[c].iloc[0]))
        for c in shared
        if table[c].nunique(dropna=False) == 1
    ]
    rank = [("rank", r) for r in _ranks(table)]
    return pd.DataFrame((rank if len(rank) == 1 else []) + rows, columns=["setting", "value"])


def _shown(column: str, value: object) -> str:
    if column == "targets":
        layers = str(value).split()
        kinds = dict.fromkeys(block_and_kind(name)[1] for name in layers)
        return f"{counted(len(layers), 'layer')}: {listed(kinds)}"
    if column == "retained_before":
        return points(value)
    if column == "alpha" and pd.isna(value):
        return "the rank (default)"
    if isinstance(value, (bool, np.bool_, str)):
        return str(value)
    return plain(value)


def _versions(kept: Kept | None) -> pd.DataFrame:
    here = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    there = (
        {}
        if kept is None
        else kept.experiment["versions"] | {"lora_lens": kept.experiment["identity"]["lora_lens"]}
    )
    columns = {"package": list(here), "of this report": list(here.values())}
    if there:
        columns["of the first runs"] = [there.get(name, MISSING) for name in here]
    return pd.DataFrame(columns)


def _identity(kept: Kept) -> pd.DataFrame:
    """Model and tasks, with the hashes of their weights and examples."""
    identity = kept.experiment["identity"]
    named = {"model": "pretrained model", "task": "new task", "retain": "retained task"}
    return pd.DataFrame([(words, identity[key]) for key, words in named.items()], columns=["part", "hash"])


def limits(table: pd.DataFrame, kept: Kept | None) -> list[str]:
    """Sentences on what the page cannot tell, from its own facts."""
    said = [
        "All runs start from one pretrained model and learn one task: another model or task may differ.",
        *_of_seeds(table),
        *_of_rates(table),
    ]
    if diverged := int(table["diverged"].sum()):
        said.append(f"{counted(diverged, 'run')} diverged; the scores after that are part of the means.")
    if kept is not None and kept.answers is not None:
        said += _of_examples(table, kept.answers)
    else:
        said.append("How many test examples the scores rest on is not known here.")
    return said


def _of_seeds(table: pd.DataFrame) -> list[str]:
    seeds = at_equal_rate(table)["seeds"]
    if seeds.max() == 1:
        return ["There is one seed, so nothing tells a difference between windows from chance."]
    said = [
        f"Intervals resample {span(seeds)}; with so few they are too narrow rather than too wide."
        if seeds.min() < MANY_SEEDS
        else f"Intervals resample {span(seeds)}."
    ]
    if (fewer := int((seeds < seeds.max()).sum())) > 0:
        said.append(f"{fewer} of {len(seeds)} cells of window and rate have fewer seeds than the others.")
    if len(placed(table)) and (smallest := 2.0 ** -int(seeds.max())) > LEVEL:
        said.append(
            f"A single test of a U-shape needs 5 seeds: {seeds.max()} cannot give a p value below "
            f"{smallest:g}."
        )
    return said


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
    return [
        f"For {ends} of {len(best)} windows and methods the best rate is an end of the grid "
        f"({plain(rates[0])} to {plain(rates[-1])}), so a better one may lie outside."
    ]


def _of_examples(table: pd.DataFrame, answers: pd.DataFrame) -> list[str]:
    examples = answers["item"].nunique()
    over_seeds, over_both = at_equal_rate(table), forgetting_interval(answers, table)
    widths = [(r["forgetting_high"] - r["forgetting_low"]).median() for r in (over_seeds, over_both)]
    said = (
        f"The retained task has {examples} test examples, which intervals take as fixed. Resampling them, "
        f"too, the median 95% interval of forgetting at one rate is {points(widths[1])} points wide"
    )
    return [f"{said}." if np.isnan(widths[0]) else f"{said} instead of {points(widths[0])}."]
