"""Does the choice of the window still matter after rewinding? Write ``results/rewinding.csv``.

    python data/measure_rewinding.py                      # digits and new_classes: 15 minutes of one core
    python data/measure_rewinding.py digits --seeds 3

Each method is trained at its own best rate of the stored sweep (the largest mean of accuracy - forgetting),
with seeds that the sweep has not seen. The whole update is then scaled by t; t is chosen by accuracy -
forgetting on 400 test examples of each task, and scores are measured on 1,000 others.

One row per measured point. Columns: setting, method, lr, seed; part, "validation" or "test", which
has the trained model (t = 1) and the chosen t; t, accuracy, forgetting.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from run_sweeps import BATCH, EXAMPLES, RATES, STEPS
from sweeping import HERE

import lora_lens as ll
from lora_lens.experiments.advisor import value_of

METHODS = {
    "first": ll.Window.first(8),
    "middle": ll.Window.middle(8),
    "last": ll.Window.last(8),
    "LoRA": ll.LoRA(8),
}
POINTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CHOOSING = torch.arange(EXAMPLES["test"], EXAMPLES["test"] + 400)  # test examples that no score is taken from
FIRST_SEED = 100


def digits() -> tuple[torch.nn.Module, ll.Task, ll.Task]:
    model, fashion = ll.tasks.bundled.vision()
    return model, ll.tasks.bundled.digits(), fashion


def new_classes() -> tuple[torch.nn.Module, ll.Task, ll.Task]:
    model, known, new = ll.tasks.bundled.vision_of_known_classes()
    return model, new, known


SETTINGS = {"digits": digits, "new_classes": new_classes}


def best_rates(setting: str, folder: Path) -> dict[str, float]:
    """Of each method, by the stored sweep."""
    table = ll.Sweep.open(folder / f"{setting}.jsonl.xz").table
    table = table[table["lr"].isin(RATES)].assign(value=value_of(table, 1.0))
    places = {"first": 0.0, "middle": 0.5, "last": 1.0}
    found = {}
    for name in METHODS:
        rows = table["position"] == places[name] if name in places else table["method"] == "LoRA"
        rows = table[rows & ((table["method"] == "window") if name in places else True)]
        found[name] = float(rows.groupby("lr")["value"].mean().idxmax())
    return found


def points(setting: str, seed: int, folder: Path) -> Iterator[dict[str, object]]:
    model, task, retain = SETTINGS[setting]()
    choosing = [replace(one, test=one.test.take(CHOOSING)) for one in (task, retain)]
    task, retain = task.first(**EXAMPLES), retain.first(test=EXAMPLES["test"])
    for name, lr in best_rates(setting, folder).items():
        adapted = ll.attach(model, METHODS[name], seed=seed)
        settings = {"steps": STEPS, "batch_size": BATCH, "lr": lr, "seed": seed, "evaluations": 2}
        run = ll.finetune(adapted, task.first(test=50), progress=False, **settings)
        shared = {"readout": run.head, "progress": False}
        chosen = ll.rewind(adapted, *choosing, t=POINTS, **shared)
        measured = ll.rewind(adapted, task, retain, t=[chosen.best().t, 1], **shared)
        about = {"setting": setting, "method": name, "lr": lr, "seed": seed}
        for part, rewound in (("validation", chosen), ("test", measured)):
            for row in rewound.table[["t", "accuracy", "forgetting"]].to_dict("records"):
                yield about | {"part": part} | row


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means of accuracy - forgetting over seeds, and differences from LoRA with their intervals."""
    tested = table[table["part"] == "test"].assign(value=lambda rows: rows["accuracy"] - rows["forgetting"])
    keys = ["setting", "method", "seed"]
    trained = tested[tested["t"] == 1].set_index(keys)["value"]
    rewound = tested.sort_values("t").drop_duplicates(keys).set_index(keys)["value"]
    rows = []
    for at, values in (("trained", trained), ("rewound", rewound)):
        for (setting, method), group in values.groupby(level=["setting", "method"]):
            own = group.droplevel(["setting", "method"])
            lead = own - values[setting, "LoRA"]
            row = {"setting": setting, "at": at, "method": method, "value": own.mean(), "lead": lead.mean()}
            if method != "LoRA":
                row["low"], row["high"] = ll.forgetting.bootstrap_interval(lead.to_numpy())
            rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(SETTINGS)}; default all")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="of run_sweeps.py")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "rewinding.csv")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        for setting in arguments.names or SETTINGS:
            rows += points(setting, seed, arguments.results)
            pd.DataFrame(rows).round(6).to_csv(arguments.output, index=False)
            print(f"{setting}, seed {seed}: {time.process_time() / 60:.1f} min of the processor", flush=True)
    print(summary(pd.DataFrame(rows)).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
