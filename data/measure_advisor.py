"""Does the advisor beat fixed rules? Write ``results/advisor.csv``: one row per setting, rule and seed.

    python data/measure_advisor.py                        # settings whose sweep is in data/results
    python data/measure_advisor.py digits --results FOLDER --store FOLDER --seeds 3

The exhaustive sweep of a setting says what a window and a rate are worth: the mean over its seeds of
value = accuracy - forgetting on test examples. Every rule names one of its (window, rate) pairs of the
five-window grid, and its regret is the best pair's value minus that of the named one. The best of many noisy
means is too high, by the same amount for every rule: compare the rules, the level is an upper bound.

Rules, by window and rate:
- first, middle, last, random (a window drawn by the seed), each with "fixed rate", 5e-3, and with
  "rate pilot", the rate whose one run of full length is best on held-out training examples;
- foreseen: the window of the largest ratio of ``ll.forgetting.foresee``, with the fixed rate, and with
  "scaled rate": the rate at which it disturbs as much as the middle window does at the fixed one;
- advisor: ``ll.advise`` with its usual budget. It has as many steps to choose by as a rate pilot, and its
  final runs, which choose nothing.

Columns: setting, rule, seed, position, lr, value, best, regret, steps_spent (all optimizer steps that the
rule took).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from math import log
from pathlib import Path

import pandas as pd
from run_sweeps import BATCH, RATES, STEPS, Setting, sweeps
from sweeping import HERE

import lora_lens as ll
from lora_lens.experiments.advisor import value_of
from lora_lens.experiments.pilot import USUAL_RATE, judged_on_training_examples

SETTINGS = ("digits", "new_classes", "few_digits", "noise")
WINDOWS = ll.windows(rank=8, count=5)
FIXED = {"first": WINDOWS[0], "middle": WINDOWS[2], "last": WINDOWS[4]}
FIRST_SEED = 100  # the exhaustive sweeps start at 0: a pilot must not see their heads and batches
Recommendation = tuple[str, int, ll.Window, float, int]  # rule, seed, window, rate, steps spent


def cell_values(table: pd.DataFrame, positions: Sequence[float], weight: float = 1.0) -> pd.Series:
    """The mean value over seeds by (position, lr), of the windows at these positions."""
    swept = table[(table["method"] == "window") & table["position"].isin(positions)]
    return value_of(swept, weight).groupby([swept["position"], swept["lr"]]).mean()


def regret_row(setting: str, recommendation: Recommendation, values: pd.Series) -> dict[str, object]:
    """One row of the file."""
    rule, seed, window, lr, spent = recommendation
    value, best = float(values[window.position, lr]), float(values.max())
    scores = {"value": value, "best": best, "regret": best - value, "steps_spent": spent}
    return {"setting": setting, "rule": rule, "seed": seed, "position": window.position, "lr": lr} | scores


def nearest(rates: Sequence[float], rate: float) -> float:
    """The one of ``rates`` with the smallest ratio to ``rate``."""
    return min(rates, key=lambda r: abs(log(r / rate)))


def foreseen(table: pd.DataFrame) -> tuple[ll.Window, float]:
    """From foresee's table of the five windows: that of the largest ratio, and its scaled rate."""
    best = table["ratio"].idxmax()
    scale = table["disturbance"].iloc[len(table) // 2] / table["disturbance"][best]
    return WINDOWS[best], nearest(RATES, USUAL_RATE * scale)


def recommendations(
    setting: Setting, seeds: Sequence[int], store: Path, steps: int = STEPS, jobs: int | None = None
) -> Iterator[Recommendation]:
    """What every rule says for every seed."""
    model, task, retain = setting
    spectra = ll.spectra(model, progress=False)
    for seed in seeds:
        fixed = FIXED | {"random": random.Random(seed).choice(WINDOWS)}
        for name, window in fixed.items():
            yield f"{name}, fixed rate", seed, window, USUAL_RATE, 0
        known = retain.train.first(500)
        window, rate = foreseen(
            ll.forgetting.foresee(model, task, known, WINDOWS, spectra=spectra, seed=seed)
        )
        yield "foreseen, fixed rate", seed, window, USUAL_RATE, 0
        yield "foreseen, scaled rate", seed, window, rate, 0

        shared = {"spectra": spectra, "store": store / f"seed_{seed}", "batch_size": BATCH, "jobs": jobs}
        tried = ll.sweep(
            ll.Grid(list(dict.fromkeys(fixed.values())), lr=RATES, seed=[seed]),
            model=model,
            steps=steps,
            evaluations=2,
            **judged_on_training_examples(task, retain, seed),
            **shared,
        ).table
        held_out = cell_values(tried, [w.position for w in WINDOWS])
        for name, window in fixed.items():
            yield f"{name}, rate pilot", seed, window, held_out[window.position].idxmax(), steps * len(RATES)
        choices = {"windows": WINDOWS, "rates": RATES, "steps": steps, "seed": seed, "budget": None}
        advice = ll.advise(model, task, retain, **choices, **shared)
        yield "advisor", seed, advice.window, advice.lr, advice.spent


def results_of(name: str, folder: Path) -> Path | None:
    """The sweep's folder or packed file, if there is one."""
    return next((p for p in (folder / name, folder / f"{name}.jsonl.xz") if p.exists()), None)


def main() -> None:
    known = {name: sweep for name, sweep in sweeps() if name in SETTINGS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(known)}; default all")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="of run_sweeps.py")
    parser.add_argument("--store", type=Path, default=HERE.parent / "results" / "advisor")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "advisor.csv")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"there is no setting {unknown[0]!r}; there are {', '.join(known)}")
    found = {name: results_of(name, arguments.results) for name in arguments.names or known}
    if missing := [name for name, path in found.items() if path is None]:
        parser.error(f"{arguments.results} has no sweep of {', '.join(missing)}; run run_sweeps.py first")

    rows = []
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    for name, path in found.items():
        started = time.monotonic()
        values = cell_values(ll.Sweep.open(path).table, [w.position for w in WINDOWS])
        for recommendation in recommendations(known[name].setting(), seeds, arguments.store / name):
            rows.append(regret_row(name, recommendation, values))
        print(f"{name}: {(time.monotonic() - started) / 60:.1f} min")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).round(6).to_csv(arguments.output, index=False)
    table = pd.DataFrame(rows)
    print(table.pivot_table(index="rule", columns="setting", values="regret", margins=True).round(4))


if __name__ == "__main__":
    main()
