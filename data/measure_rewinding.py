"""Does the choice of the window still matter after rewinding? Write ``results/rewinding.csv``.

    python data/measure_rewinding.py                      # what the file lacks; 2 h from nothing
    python data/measure_rewinding.py digits --seeds 3
    python data/measure_rewinding.py --opponents          # results/rewound_opponents.csv: 0.5 h a setting

Each method is trained at several rates, with seeds that no stored sweep has seen, and the whole update is
then scaled by t. By accuracy - forgetting on 400 test examples of each task two points are chosen for each
seed: a rate for the trained model (t = 1), and a rate together with a t. Scores are measured on other
examples: 1,000 of each task, 500 in minilm. In the language models the rate is the stored sweep's best for
the method (the largest mean of accuracy - forgetting); in smollm2 t is chosen on 150 film reviews and 30
newspaper texts, and measured on 300 and 60. Settings and seeds that the file holds already are not run again.

With --opponents all methods of run_second_round.py's ``digits_opponents`` and ``new_classes_opponents`` are
measured in this way at two rates: their stored sweep's best, and the next above it that was tried, since what
goes back may have gone too far. t scales the change of the merged weights where ``ll.rewind`` does not take
the method.

One row per measured point. Columns: setting, method, lr, seed; part, "validation" or "test", which
has the two chosen points, or one where they are the same; t, accuracy, forgetting.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from run_second_round import SCALES, opponents
from run_sweeps import BATCH, EXAMPLES, STEPS
from sweeping import HERE

import lora_lens as ll
from lora_lens.experiments.identity import named_method
from lora_lens.forgetting.temporary_factors import require_rewindable
from lora_lens.tasks.readouts import HeadReadout
from lora_lens.training.regularizers.base import regularizer_of

METHODS = {
    "first": ll.Window.first(8),
    "middle": ll.Window.middle(8),
    "last": ll.Window.last(8),
    "LoRA": ll.LoRA(8),
}
RATES = (0.001, 0.002, 0.005, 0.01)
POINTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FIRST_SEED = 100


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, what it learns, what it knew, how many test examples give scores, and how it is trained.

    ``chosen_on`` are the test examples of each task that a rate and a t of ``points`` are chosen on.
    Without rates it is the one where the method did best in the stored sweep.
    """

    model: torch.nn.Module
    task: ll.Task
    retain: ll.Task
    tested: tuple[int, int] = (EXAMPLES["test"], EXAMPLES["test"])
    train: int | None = EXAMPLES["train"]
    steps: int = STEPS
    batch: int = BATCH
    chosen_on: tuple[range, range] = (range(1000, 1400), range(1000, 1400))
    points: tuple[float, ...] = POINTS
    rates: tuple[float, ...] = RATES


@cache
def digits() -> Setting:
    model, fashion = ll.tasks.bundled.vision()
    return Setting(model, ll.tasks.bundled.digits(), fashion)


@cache
def new_classes() -> Setting:
    model, known, new = ll.tasks.bundled.vision_of_known_classes()
    return Setting(model, new, known)


@cache  # its probe takes a while
def minilm() -> Setting:
    """As in run_language_sweeps.py, but in float32."""
    model, tokenizer = ll.tasks.bundled.minilm(), ll.tasks.bundled.minilm_tokenizer()
    texts = ll.tasks.bundled_texts
    movies, genres = (ll.tasks.text_task(c, tokenizer) for c in (texts.sentiment("movies"), texts.genres()))
    return Setting(
        model, movies, ll.tasks.probed(model, genres, examples=2000), (500, 500), None, steps=100, rates=()
    )


@cache
def smollm2() -> Setting:
    """As in run_language_sweeps.py, but in float32."""
    model, tokenizer = ll.tasks.bundled.smollm2(), ll.tasks.bundled.smollm2_tokenizer()
    texts = ll.tasks.bundled_texts
    return Setting(
        model,
        ll.tasks.label_word_task(texts.sentiment("movies"), tokenizer),
        ll.tasks.language_task(texts.articles(), tokenizer),
        tested=(300, 60),
        train=None,
        steps=60,
        batch=16,
        chosen_on=(range(1000, 1150), range(100, 130)),
        points=(0.4, 0.55, 0.7, 0.85, 1.0),
        rates=(),
    )


SETTINGS = {"digits": digits, "new_classes": new_classes, "minilm": minilm, "smollm2": smollm2}


@dataclass(frozen=True)
class Trained:
    """A method, the rates that it is trained at, and how its adapters are built."""

    name: str
    method: ll.adapters.Method | ll.Window
    rates: tuple[float, ...]
    variant: ll.Variant | None = None


def stored(table: pd.DataFrame, method: ll.adapters.Method | ll.Window) -> pd.Series:
    """Means of accuracy - forgetting of a method in a sweep's table, by rate."""
    about = named_method(method)
    rows = table[table["method"] == about["method"]]
    rows = rows if about["position"] is None else rows[rows["position"] == about["position"]]
    return (rows["accuracy"] - rows["forgetting"]).groupby(rows["lr"]).mean()


def usual_methods(setting: str, folder: Path) -> Iterator[Trained]:
    """Three windows and LoRA."""
    table = ll.Sweep.open(folder / f"{setting}.jsonl.xz").table
    for name, method in METHODS.items():
        rates = SETTINGS[setting]().rates or (float(stored(table, method).idxmax()),)
        yield Trained(name, method, rates)


def opposing_methods(setting: str, folder: Path) -> Iterator[Trained]:
    """All of run_second_round.py's opponents, at the stored sweep's best rate and the next above it."""
    table = ll.Sweep.open(folder / f"{setting}_opponents.jsonl.xz").table
    table["variant"] = table["variant"].fillna("")
    for grid, settings in opponents(SCALES[setting], seeds=1):
        variant = settings.get("variant")
        built = "" if variant is None else str(variant)
        for method in grid.methods:
            about = named_method(method)
            name = about["method"] + (f", {built}" if built else "")
            name = name if about["position"] is None else f"window {about['position']:g}"
            values = stored(table[table["variant"] == built], method)
            yield Trained(name, method, tuple(values.loc[values.idxmax() :].index[:2]), variant)


def points(name: str, seed: int, methods: list[Trained]) -> Iterator[dict[str, object]]:
    setting = SETTINGS[name]()
    model, tasks = setting.model, (setting.task, setting.retain)
    choosing = [
        replace(one, test=one.test.take(torch.tensor(part)))
        for one, part in zip(tasks, setting.chosen_on, strict=True)
    ]
    testing = [one.first(test=count) for one, count in zip(tasks, setting.tested, strict=True)]
    task, retain = setting.task.first(setting.train, test=50), setting.retain.first(test=50)
    spectra = ll.spectra(model, progress=False)
    for trained in methods:
        at_rates, curves = {}, []
        for lr in trained.rates:
            adapted = ll.attach(
                model,
                trained.method,
                spectra=spectra,
                variant=trained.variant,
                seed=seed,
                task=task,
                retain=retain,
            )
            run = ll.finetune(
                adapted,
                task,
                retain,
                regularizer=regularizer_of(trained.method),
                steps=setting.steps,
                batch_size=setting.batch,
                lr=lr,
                seed=seed,
                evaluations=2,
                progress=False,
            )
            at_rates[lr] = adapted, run.head
            curves.append(curve(model, adapted, run.head, choosing, setting.points).assign(lr=lr))
        chosen = pd.concat(curves, ignore_index=True)
        value = (chosen["accuracy"] - chosen["forgetting"])[::-1]  # of equals the longest way
        best = chosen.loc[list({value[chosen["t"] == 1].idxmax(), value.idxmax()})]
        measured = [
            curve(model, *at_rates[lr], testing, sorted(rows["t"])).assign(lr=lr)
            for lr, rows in best.groupby("lr")
        ]
        about = {"setting": name, "method": trained.name, "lr": None, "seed": seed}
        for part, rewound in (("validation", chosen), ("test", pd.concat(measured))):
            for row in rewound.to_dict("records"):
                yield about | {"part": part} | row


def curve(
    model: torch.nn.Module,
    adapted: torch.nn.Module,
    head: torch.nn.Module | None,
    tasks: list[ll.Task],
    places: Sequence[float],
) -> pd.DataFrame:
    """Columns t, accuracy and forgetting at each of some places on the way back."""
    try:
        require_rewindable(adapted)
    except ll.errors.LoraLensError:  # DoRA, or no LoRA
        moved = deepcopy(adapted)
    else:
        table = ll.rewind(adapted, *tasks, t=places, readout=head, progress=False).table
        return table[["t", "accuracy", "forgetting"]]
    moved = moved.merge_and_unload() if hasattr(moved, "merge_and_unload") else moved
    start, end = (deepcopy(one.state_dict()) for one in (model, moved))
    before, rows = ll.evaluate(model, tasks[1]).accuracy, []
    for t in places:
        moved.load_state_dict({name: torch.lerp(start[name], end[name], t) for name in start})
        learned = ll.evaluate(moved, tasks[0], HeadReadout(head, tasks[0].pooling)).accuracy
        rows.append((t, learned, before - ll.evaluate(moved, tasks[1]).accuracy))
    return pd.DataFrame(rows, columns=["t", "accuracy", "forgetting"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means of accuracy - forgetting over seeds, and differences from LoRA with their intervals."""
    tested = table[table["part"] == "test"].assign(value=lambda rows: rows["accuracy"] - rows["forgetting"])
    keys = ["setting", "method", "seed"]
    trained = tested[tested["t"] == 1].set_index(keys)["value"]
    rewound = tested.sort_values("t").drop_duplicates(keys).set_index(keys)["value"]
    rows = []
    for at, values in (("trained", trained), ("rewound", rewound)):
        values = values.sort_index()
        for (setting, method), group in values.groupby(level=["setting", "method"]):
            own = group.droplevel(["setting", "method"])
            lead = own - values[setting, "LoRA"]
            row = {"setting": setting, "at": at, "method": method, "value": own.mean(), "lead": lead.mean()}
            if method != "LoRA":
                row["low"], row["high"] = ll.forgetting.seed_interval(lead.to_numpy())
            rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(SETTINGS)}; default all")
    parser.add_argument("--opponents", action="store_true", help="instead, of digits and new_classes")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="of the sweeps")
    parser.add_argument("--output", type=Path, help="default in data/results")
    parser.add_argument("--seeds", type=int, help="default 5, of opponents 3")
    arguments = parser.parse_args()
    if arguments.opponents:
        methods_of, names, seeds, file = opposing_methods, ("digits", "new_classes"), 3, "rewound_opponents"
    else:
        methods_of, names, seeds, file = usual_methods, tuple(SETTINGS), 5, "rewinding"
    output = arguments.output or HERE / "results" / f"{file}.csv"
    table = pd.read_csv(output) if output.exists() else pd.DataFrame()
    held = set() if table.empty else set(zip(table["setting"], table["seed"], strict=True))
    for seed in range(FIRST_SEED, FIRST_SEED + (arguments.seeds or seeds)):
        for setting in arguments.names or names:
            if (setting, seed) in held:
                continue
            methods = list(methods_of(setting, arguments.results))
            table = pd.concat([table, pd.DataFrame(points(setting, seed, methods))])
            table.round(6).to_csv(output, index=False)
            print(f"{setting}, seed {seed}: {time.process_time() / 60:.1f} min of the processor", flush=True)
    print(summary(table).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
