"""How well does agreement, which needs no labels, tell how much was forgotten? Runs the sweep and measures.

    python data/run_agreement.py                 # the sweep, about 4 minutes of processor time, and the table
    python data/run_agreement.py --store FOLDER  # keep the runs there; finished runs are not run again

The sweep ``agreement`` retains labelled Fashion-MNIST, and watches what the pretrained model itself answers
to four references: other images of the kind that it knows (500 that are not among the retained ones), the
digits that it learns, Fashion-MNIST with strong noise, and noise alone.

``results/agreement.csv`` has a row for each reference and measure, and for the first choices on the retained
images themselves in the sweeps that are stored already, whose runs hold their answers before and after.
Columns: setting, reference, measure, runs, rank_correlation (Spearman's) with labelled forgetting and its
95% interval (bootstrap over groups of method and rate); slope and error (of the least-squares line through
the origin that turns the measure into forgetting: its slope, and the root of the mean squared residual in
points of accuracy); same_rate, the rank correlation among runs of one rate, mean over rates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from sweeping import HERE, main

import lora_lens as ll

STORED = ("digits", "new_classes", "few_digits", "noise", "elsewhere", "minilm", "smollm2")
GRID = ll.Grid(ll.windows(8, count=3), lr=(2e-3, 5e-3, 1e-2), seed=[0], baselines=[ll.LoRA(8)])
RESAMPLES = 500


def references(model: torch.nn.Module, fashion: ll.Task, digits: ll.Task) -> list[ll.Task]:
    """The pretrained model's own answers to images without labels."""
    other = fashion.test.take(torch.arange(2000, 2500))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, *fashion.test.shape, generator=generator)
    inputs = {
        "other known images": other.inputs,
        "the new task's images": digits.train.inputs[-500:],
        "known images in noise": ll.tasks.corrupted(fashion, "gaussian_noise", 5).test.inputs[2000:2500],
        "noise": noise,
    }
    return [ll.tasks.agreement(model, images, name=name) for name, images in inputs.items()]


def run(name: str, store: Path, jobs: int | None) -> None:
    model, fashion = ll.tasks.bundled.vision()
    digits = ll.tasks.bundled.digits()
    ll.sweep(
        GRID,
        model=model,
        task=digits.first(train=2500, test=500),
        retain=fashion.first(test=1000),
        watch=references(model, fashion, digits),
        spectra=ll.spectra(model, progress=False),
        store=store,
        jobs=jobs,
        steps=75,
        batch_size=32,
        evaluations=2,
    )


def told(setting: str, reference: str, measure: str, table: pd.DataFrame, values: pd.Series) -> dict:
    """A row: how well ``values``, one per run of ``table``, tell its forgetting."""
    rows = table.assign(value=values, group=table["method"] + table["position"].astype(str))
    rows = rows.dropna(subset=["value", "forgetting"])
    groups = [part for _, part in rows.groupby(["group", "lr"], dropna=False)]
    random = np.random.default_rng(0)
    drawn = [
        pd.concat([groups[i] for i in random.integers(len(groups), size=len(groups))])
        for _ in range(RESAMPLES)
    ]
    low, high = np.nanpercentile(
        [spearmanr(d["value"], d["forgetting"]).statistic for d in drawn], [2.5, 97.5]
    )
    slope = float((rows["value"] * rows["forgetting"]).sum() / rows["value"].pow(2).sum())
    within = [
        spearmanr(part["value"], part["forgetting"]).statistic
        for _, part in rows.groupby("lr")
        if len(part) > 4
    ]
    return {
        "setting": setting,
        "reference": reference,
        "measure": measure,
        "runs": len(rows),
        "rank_correlation": spearmanr(rows["value"], rows["forgetting"]).statistic,
        "low": low,
        "high": high,
        "same_rate": np.nanmean(within) if within else np.nan,
        "slope": slope,
        "error_in_points": 100 * float(np.sqrt((slope * rows["value"] - rows["forgetting"]).pow(2).mean())),
    }


def from_stored(name: str) -> dict:
    """First choices on the retained examples themselves, from the answers that a sweep's runs hold."""
    sweep = ll.Sweep.open(HERE / "results" / f"{name}.jsonl.xz")
    answers = sweep.answers()
    changed = (answers["before"] != answers["after"]).groupby(answers["run"]).mean()
    table = sweep.table[sweep.table["run"].isin(changed.index)]
    return told(name, "the retained examples", "1 - agreement", table, table["run"].map(changed))


def measure(results: Path) -> pd.DataFrame:
    sweep = ll.Sweep.open(results / "agreement.jsonl.xz")
    rows = []
    watched = sweep.watched()
    for reference, part in watched.groupby("task", sort=False):
        part = part.set_index("run")
        for name, column in (("1 - agreement", 1 - part["after"]), ("divergence", part["loss_after"])):
            rows.append(told("agreement", reference, name, sweep.table, sweep.table["run"].map(column)))
    found = from_stored("agreement") | {"setting": "agreement"}
    return pd.DataFrame([found, *rows, *(from_stored(name) for name in STORED)])


if __name__ == "__main__":
    main(__doc__, ["agreement"], run)
    table = measure(HERE / "results")
    table.round(4).to_csv(HERE / "results" / "agreement.csv", index=False)
    print(table.round(3).to_string())
