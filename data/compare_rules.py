"""Which rule says best what to train with? Write ``results/rules.csv``: one row per goal and rule.

    python data/compare_rules.py          # a minute; it reads the stored sweeps and trains nothing

A *setting* is a model, a task and what else was fixed; settings with the same model and the same new data
are one *family*. A rule is judged on settings whose family took no part in it: what it leaves open (a rate,
a sign, a threshold, a regression) is what had the least regret in the other families.

Goals:
- kept: the most accuracy with at most 2 points forgotten. The value of a run is its accuracy, less what it
  forgot beyond 2 points. "kept, of 0" and "kept, of 5" allow as many points instead, and in "kept, thrice"
  each point beyond the two counts thrice.
- area: the area under the trade-off that a method offers over its rates, ``ll.forgetting.hypervolume`` of
  accuracy and the share retained. A rule names no rate then.

A cell is a method at a rate (for the area, a method). A rule's regret at a seed is the value of the setting's
best cell, chosen by its mean over the *other* seeds, minus that of the cell that the rule names, both at this
seed. So no seed is measured that chose, and a regret can be negative. Means are over seeds, then over the
settings of a family, then over families.

Rules, by what they need:
- nothing: a window, LoRA, or LoRA under L2 (0.01, where it is stored), at 0.002, 0.005 or 0.01, or at
  the rate that suits other families ("rate of others"), or the best of all these in the others; where a
  setting lacks the rate, at the nearest it has. "ridge on rate and position" predicts the value.
- a gradient: foreseen, by ``ll.forgetting.foresee``; some short runs: pilot and rate pilot. What they said
  for three other seeds is in ``results/advisor.csv``, from before they were deleted because they lost.
- a run of every window at one rate: the least or most of a measure of ``ll.forgetting.by_run``.
- all runs: the most accurate of the windows and LoRA whose measure is below or above a threshold; "ridge on
  measures"; and own sweep, the best on the setting's other seeds. They see other seeds than the measured one.

Columns: goal, rule, families, settings; regret, worst (of a family); better (families where it has less
regret than the middle window at 0.005), difference (of the two in the settings that both have; negative
is better than the middle window), low and high (its 95% interval over families), p (two-sided, of the same
t) and p_holm (adjusted for all rules of the goal, after Holm); then the difference in each family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lora_lens as ll
from lora_lens.forgetting.predictors import MEANS, WEIGHTED
from lora_lens.forgetting.run_groups import holm, student_interval, student_p

RESULTS = Path(__file__).parent / "results"
FAMILIES = {
    "digits": ("digits", "elsewhere", "few_digits", "few_digits_l2", "lengths", "ranks", "layers"),
    "noise": ("noise", "noise_l2"),
    "new_classes": ("new_classes", "new_classes_l2"),
    "minilm": ("minilm", "minilm_attention", "minilm_mlp"),
    "smollm2": ("smollm2",),
}
PENALIZED = {f"{name}_l2": name for name in ("few_digits", "noise", "new_classes")}
SAME = {"elsewhere": "digits"} | PENALIZED  # two files, one setting
NO_DRIFT = ("smollm2", *PENALIZED)  # kept without it
USUAL_RATE = 5e-3
ALLOWED = {"kept": (0.02, 1), "kept, of 0": (0, 1), "kept, of 5": (0.05, 1), "kept, thrice": (0.02, 3)}
GOALS = (*ALLOWED, "area")
RATES, NAMED_RATES = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2), (2e-3, 5e-3, 1e-2)
MIDDLE, L2 = "window 0.5", "LoRA, L2 to initial 0.01"
FIXED = ("window 0", "window 0.25", MIDDLE, "window 0.75", "window 1", "LoRA", L2)
REFERENCE = f"{MIDDLE}, 0.005"
MEASURES = (
    "update", "relative", *WEIGHTED, *MEANS, "intruders", "relative_change", "cka_loss", "neighbours_lost",
)  # fmt: skip
FEW_MEASURES = ["x", "accuracy", "relative", "cka_loss", "rotation"]


def settings(folder: Path = RESULTS) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(name, family, runs and their measures) of the stored settings, at the seeds that all cells have."""
    parts: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for family, store in ((family, store) for family, stores in FAMILIES.items() for store in stores):
        sweep = ll.Sweep.open(folder / f"{store}.jsonl.xz")
        runs = sweep.table.astype({"position": float})
        if store not in NO_DRIFT:
            runs = runs.merge(ll.forgetting.by_run(sweep.drifts()), on="run", how="left")
        window = "window " + runs["position"].map("{:g}".format)
        other = runs["method"].str.replace(r"^LoRA of rank \d+", "LoRA", regex=True)
        runs = runs.assign(cell=window.where(runs["method"] == "window", other))
        varied = [key for key in ("steps", "rank", "targets") if runs[key].nunique() > 1]
        for values, part in runs.groupby(varied) if varied else [((), runs)]:
            name = " ".join([SAME.get(store, store), *map(str, values)])
            parts.setdefault((name, family), []).append(part)
    for (name, family), found in parts.items():
        runs = pd.concat(found)
        cells = runs.groupby("seed").size()
        yield name, family, runs[runs["seed"].isin(cells.index[cells == cells.max()])]


Cells = dict[str, np.ndarray]  # columns (cells,) of means over seeds, by name; score is the mean of the value
Choice = Callable[[Cells], int | None]  # the place of a cell


@dataclass
class Setting:
    """Its cells for one goal.

    Attributes:
        values: (cells, seeds).
        seen: for each seed what the other seeds say of the cells.
    """

    name: str
    family: str
    values: np.ndarray
    seen: list[Cells]

    @classmethod
    def of(cls, name: str, family: str, runs: pd.DataFrame, goal: str) -> Setting:
        allowed, price = ALLOWED.get(goal, (0, 1))
        runs = runs.assign(
            value=runs["accuracy"] - price * (runs["forgetting"] - allowed).clip(lower=0),
            retained=1 - runs["forgetting"] / runs["retained_before"],
        )
        keys = ["cell"] if goal == "area" else ["cell", "lr"]
        if goal == "area":  # more rates cover more, so only those count that all cells have
            runs = runs[runs.groupby("lr")["cell"].transform("nunique") == runs["cell"].nunique()]
        by_seed = runs.groupby([*keys, "seed"])
        numbers = by_seed[[c for c in runs.select_dtypes("number") if c not in (*keys, "seed")]].mean()
        if goal == "area":
            numbers["value"] = by_seed[["accuracy", "retained"]].apply(ll.forgetting.hypervolume)
        values = numbers["value"].unstack("seed")
        cells, seeds = values.shape
        every = numbers.to_numpy(float).reshape(cells, seeds, -1)
        names = values.index.get_level_values("cell")
        window = names.str.fullmatch(r"window [\d.]+")
        rates = np.full(cells, USUAL_RATE) if goal == "area" else values.index.get_level_values("lr")
        known = {"cell": names.to_numpy(), "window": window, "plain": window | (names == "LoRA")}
        known["x"] = np.log(np.asarray(rates, float) / USUAL_RATE)
        seen = []
        for seed in range(seeds):
            means = np.delete(every, seed, axis=1).mean(1)
            seen.append(dict(zip(numbers.columns, means.T, strict=True)) | known)
            seen[-1]["score"] = seen[-1].pop("value")
        return cls(name, family, values.to_numpy(), seen)

    def regret(self, choice: Choice) -> np.ndarray:
        """(seeds,), NaN where the choice is none of the setting's cells."""
        found = np.full(len(self.seen), np.nan)
        for seed, cells in enumerate(self.seen):
            if (place := choice(cells)) is not None:
                found[seed] = self.values[cells["score"].argmax(), seed] - self.values[place, seed]
        return found


def best_of(scores: np.ndarray, allowed: np.ndarray) -> int | None:
    """The place of the highest score among those allowed that have one."""
    allowed = allowed & ~np.isnan(scores)
    return int(np.where(allowed, scores, -np.inf).argmax()) if allowed.any() else None


def at_rate(cells: Cells, allowed: np.ndarray, rate: float) -> np.ndarray:
    """Which of the allowed cells are at the rate that is nearest by its ratio."""
    away = np.where(allowed, np.abs(cells["x"] - log(rate / USUAL_RATE)), np.inf)
    return allowed & (away <= away.min() + 1e-9)


def fixed(cell: str, rate: float) -> Choice:
    return lambda cells: best_of(cells["score"], at_rate(cells, cells["cell"] == cell, rate))  # it is one


def extreme(measure: str, sign: int, rate: float) -> Choice:
    """The window with the most (sign 1) or least of a measure, at one rate."""
    return lambda cells: (
        best_of(sign * cells[measure], at_rate(cells, cells["window"], rate)) if measure in cells else None
    )


def threshold(measure: str, sign: int, limit: float) -> Choice:
    """The most accurate window or LoRA on the allowed side of a limit; of none, the nearest to it."""

    def choose(cells: Cells) -> int | None:
        if measure not in cells:
            return None
        room = sign * (limit - cells[measure])
        inside = best_of(cells["accuracy"], cells["plain"] & (room >= 0))
        return best_of(room, cells["plain"]) if inside is None else inside

    return choose


def own_sweep(kind: str) -> Choice:
    return lambda cells: best_of(
        cells["score"], cells["window"] if kind == "windows" else cells["cell"] == kind
    )


def inputs(cells: Cells, measures: bool) -> tuple[np.ndarray, np.ndarray]:
    """What a regression sees (cells, n), and of which cells: windows, LoRA, and LoRA under L2 (0.01)."""
    allowed = cells["plain"] | (cells["cell"] == L2)
    if measures:
        missing = np.full(len(allowed), np.nan)
        columns = [cells.get(name, missing) for name in FEW_MEASURES]
    else:
        x, position = cells["x"], cells["position"]
        columns = [x, x**2, np.nan_to_num(position, nan=0.5), position == 0]
        columns += [cells["cell"] == name for name in ("LoRA", L2)]
    found = np.stack(columns, 1).astype(float)
    return found, allowed & ~np.isnan(found).any(1)


def ridge(others: list[Setting], measures: bool) -> Choice:
    """Predicts how far a cell is above its setting's mean."""
    seen, scores = [], []
    for cells in (cells for setting in others for cells in setting.seen):
        x, allowed = inputs(cells, measures)
        if allowed.any():
            seen.append(x[allowed])
            scores.append(cells["score"][allowed] - cells["score"][allowed].mean())
    model = make_pipeline(StandardScaler(), Ridge(1.0)).fit(np.concatenate(seen), np.concatenate(scores))

    def choose(cells: Cells) -> int | None:
        x, allowed = inputs(cells, measures)
        return best_of(model.predict(np.nan_to_num(x)), allowed)

    return choose


def candidates(all_settings: list[Setting], goal: str) -> dict[str, list[Choice]]:
    """Of each rule, what the other families choose from."""
    rates, named = ((USUAL_RATE,), (USUAL_RATE,)) if goal == "area" else (RATES, NAMED_RATES)
    rules = {f"{cell}, {rate:g}": [fixed(cell, rate)] for cell in FIXED for rate in named}
    by_cell = {cell: [fixed(cell, rate) for rate in rates] for cell in FIXED}
    if goal != "area":
        rules |= {f"{cell}, rate of others": found for cell, found in by_cell.items()}
    rules["best fixed window of others"] = [c for cell in FIXED[:5] for c in by_cell[cell]]
    rules["best fixed of others"] = [c for found in by_cell.values() for c in found]
    for kind in ("windows", MIDDLE, "LoRA", L2):
        rules[f"own sweep of {kind}"] = [own_sweep(kind)]
    for measure in MEASURES:
        rules[f"window by {measure}"] = [extreme(measure, sign, rate) for sign in (1, -1) for rate in rates]
        if goal != "area":
            known = np.concatenate([s.seen[0][measure] for s in all_settings if measure in s.seen[0]])
            limits = np.nanquantile(known, np.linspace(0.05, 0.95, 10))
            rules[f"threshold of {measure}"] = [
                threshold(measure, sign, limit) for sign in (1, -1) for limit in limits
            ]
    return rules


def left_out(all_settings: list[Setting], choices: list[Choice]) -> dict[str, np.ndarray]:
    """A rule's regret (seeds,) in every setting that has it; other families chose what it leaves open."""
    regrets = [{s.name: s.regret(choice) for s in all_settings} for choice in choices]
    means = pd.DataFrame(regrets).map(np.mean)  # (choices, settings)
    family = {s.name: s.family for s in all_settings}
    by_family = means.T.groupby(family).mean().T
    found = {}
    for setting in all_settings:
        usable = means[setting.name].notna()
        elsewhere = by_family.drop(columns=setting.family).mean(axis=1)[usable]
        if len(choices) == 1 and usable.any():
            found[setting.name] = regrets[0][setting.name]
        elif elsewhere.notna().any():
            found[setting.name] = regrets[elsewhere.idxmin()][setting.name]
    return found


def regressions(all_settings: list[Setting]) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for name, measures in (("rate and position", False), ("measures", True)):
        regrets = {}
        for setting in all_settings:
            choice = ridge([s for s in all_settings if s.family != setting.family], measures)
            regrets[setting.name] = setting.regret(choice)
        found[f"ridge on {name}"] = {k: r for k, r in regrets.items() if not np.isnan(r).any()}
    return found


def piloted(all_settings: list[Setting], folder: Path = RESULTS) -> dict[str, dict[str, np.ndarray]]:
    """Of rules whose choices are stored: the mean over their seeds."""
    said = pd.read_csv(folder / "advisor.csv")
    said["rule"] = said["rule"].replace("advisor", "pilot")
    said = said[said["rule"].str.contains("pilot|foreseen")]
    found: dict[str, dict[str, np.ndarray]] = {}
    by_name = {s.name: s for s in all_settings}
    for (rule, name), rows in said.groupby(["rule", "setting"]):
        pairs = zip(rows["position"], rows["lr"], strict=True)
        regrets = [by_name[name].regret(fixed(f"window {p:g}", lr)) for p, lr in pairs]
        found.setdefault(rule, {})[name] = np.mean(regrets, axis=0)
    return found


def compared(regrets: dict[str, np.ndarray], middle: dict[str, np.ndarray], family: dict[str, str]) -> dict:
    """The row of one rule."""
    means = pd.Series({name: r.mean() for name, r in regrets.items()})
    by_family = means.groupby(family).mean()
    row = {"families": len(by_family), "settings": len(means), "regret": by_family.mean()}
    pairs = {name: (regrets[name] - middle[name]).mean() for name in means.index if name in middle}
    differences = pd.Series(pairs).groupby(family).mean()
    better = int((differences < 0).sum())
    row |= {"worst": by_family.max(), "better": better, "difference": differences.mean()}
    row["low"], row["high"] = student_interval(differences)
    row["p"] = student_p(differences) if differences.any() else np.nan
    return row | differences.to_dict()


def compare(goal: str, runs: list[tuple[str, str, pd.DataFrame]]) -> pd.DataFrame:
    """The rows of one goal, the least regret first."""
    found = [Setting.of(*setting, goal) for setting in runs]
    rules = {name: left_out(found, choices) for name, choices in candidates(found, goal).items()}
    rules |= regressions(found) | piloted(found)
    family = {s.name: s.family for s in found}
    rows = [
        {"goal": goal, "rule": name} | compared(regrets, rules[REFERENCE], family)
        for name, regrets in rules.items()
        if regrets
    ]
    table = pd.DataFrame(rows)
    table.insert(table.columns.get_loc("p") + 1, "p_holm", holm(table["p"]))
    return table.sort_values(["regret", "rule"], ignore_index=True)


def main() -> None:
    runs = list(settings())
    table = pd.concat([compare(goal, runs) for goal in GOALS], ignore_index=True)
    table.round(4).to_csv(RESULTS / "rules.csv", index=False)
    points = ["regret", "worst", "difference", "low", "high", *FAMILIES]
    print(table.assign(**{c: 100 * table[c] for c in points}).round(2).to_string())


if __name__ == "__main__":
    main()
