"""What does it cost to open a store of ten thousand runs: table, curves and answers?

The runs are one real short run, kept under ten thousand seeds. The peer is the way of 0.1: every run file is
parsed again for each of the three, and becomes a table of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from measuring import RESULTS

import lora_lens as ll
from lora_lens.experiments.columns import FILE
from lora_lens.experiments.identity import run_name

RUNS, RETAINED, REPEATS = 10_000, 64, 3


def made(folder: Path) -> Path:
    """A store of ``RUNS`` runs."""
    model, source = ll.tasks.bundled.vision()
    settings = {"steps": 10, "evaluations": 5, "batch_size": 16, "jobs": 1, "progress": False}
    tasks = {"task": ll.tasks.bundled.digits().first(64, 64), "retain": source.first(16, RETAINED)}
    spectra = ll.spectra(model, "attn.proj", progress=False)
    grid = ll.Grid(ll.Window.middle(4))
    ll.sweep(grid, model=model, **tasks, targets="attn.proj", spectra=spectra, store=folder, **settings)
    (one,) = (folder / "runs").iterdir()
    record = json.loads(one.read_text())
    for seed in range(1, RUNS):
        record["settings"]["seed"] = seed
        record["run"] = run_name(record["settings"], record.get("exact", {}))
        (folder / "runs" / f"{record['run']}.json").write_text(json.dumps(record, indent=1))
    return folder


def one_by_one(store: Path) -> tuple[pd.DataFrame, ...]:
    """Table, curves and answers as 0.1 read them."""

    def records() -> list[dict]:
        return [json.loads(file.read_bytes()) for file in sorted((store / "runs").glob("*.json"))]

    table = pd.DataFrame([{"run": r["run"], **r["settings"], **r["result"]} for r in records()])
    curves = [pd.DataFrame(r["curve"]).assign(run=r["run"]) for r in records()]
    answers = [
        pd.DataFrame(r["items"]).rename_axis("item").reset_index().assign(run=r["run"]) for r in records()
    ]
    return table, pd.concat(curves, ignore_index=True), pd.concat(answers, ignore_index=True)


def as_columns(store: Path) -> tuple[pd.DataFrame, ...]:
    sweep = ll.Sweep.open(store)
    return sweep.table, sweep.curves(), sweep.answers()


def seconds(read, store: Path) -> tuple[float, tuple[pd.DataFrame, ...]]:
    started = time.perf_counter()
    found = read(store)
    return time.perf_counter() - started, found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = made(Path(folder) / "store")
        first, _ = seconds(as_columns, store)  # reads the run files, and keeps the columns
        rows = []
        for _ in range(REPEATS):
            before, old = seconds(one_by_one, store)
            now, new = seconds(as_columns, store)
            assert [len(table) for table in old] == [len(table) for table in new]
            assert set(old[2]["run"]) == set(new[2]["run"])
            rows.append({"one by one": before, "columns": now, "ratio": before / now})
        size = (store / FILE).stat().st_size / sum(f.stat().st_size for f in (store / "runs").iterdir())
    table = pd.DataFrame(rows).round(2)
    text = f"{table.to_string()}\nfirst opening {first:.1f} s; columns take {size:.1%} of the run files' size"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "opening.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
