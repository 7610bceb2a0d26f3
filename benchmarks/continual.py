"""Twenty tasks in sequence: time and memory of each, and what is kept between them.

    python benchmarks/continual.py [--tasks 20] [--steps 50] [--test 500] [--out benchmarks/results]

The embedded vision model learns digits at one angle after the other, with one head (domain-incremental), one
thread. Each strategy runs in a fresh process. Seconds are by the clock and include the tests: after n tasks
all of them are tested, so this part is the same for each task here, where even the tasks to come can be
tested. The peak of resident memory starts afresh at every checkpoint (needs Linux). Neither may grow with
the number of tasks; what it takes to hold their examples is there from the start.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from measuring import machine, markdown, options, publish, threads

import lora_lens as ll
from lora_lens.experiments.continual.strategies import Continued, Merged, Strategy
from lora_lens.tasks.transforms import rotated
from lora_lens.training import EWC, Orthogonal, Replay

CASES: dict[str, tuple[Strategy, object]] = {
    "merged, window": (Merged(), ll.Window.middle(8)),
    "continued, LoRA, EWC": (Continued(EWC(100.0)), ll.LoRA(8)),
    "merged, LoRA, O-LoRA": (Merged(Orthogonal(0.5)), ll.LoRA(8)),
    "merged, window, replay": (Merged(Replay(200)), ll.Window.middle(8)),
}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # of Okabe and Ito
MARKS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Result:
    """Of each task seconds and peak resident bytes, of each checkpoint bytes; the share of time in tests."""

    seconds: list[float]
    peaks: list[int]
    sizes: list[int]
    testing: float


# --- in the measured process ---


def measure(name: str, count: int, steps: int, test: int) -> None:
    strategy, method = CASES[name]
    model, _ = ll.tasks.bundled.vision()
    digits = ll.tasks.bundled.digits().first(train=1000, test=test)
    tasks = [rotated(digits, 360 * number / count) for number in range(count)]
    windows = isinstance(method, ll.Window)
    grid = ll.Grid([method] if windows else [], lr=[1e-3], baselines=[] if windows else [method])
    peaks, sizes, tested = [], [], []

    def watch(event: str, arguments: tuple) -> None:
        if event == "os.rename" and str(arguments[1]).endswith(".pt"):
            sizes.append(os.path.getsize(arguments[0]))
            peaks.append(peak())

    sequences = importlib.import_module("lora_lens.experiments.continual.sequence_training")
    own = sequences.examine

    def timed(*arguments: object, **others: object) -> None:
        started = time.perf_counter()
        own(*arguments, **others)
        tested.append(time.perf_counter() - started)

    sequences.examine = timed
    sys.addaudithook(watch)
    same = {"setting": "domain-incremental", "steps": steps, "jobs": 1, "progress": False}
    with tempfile.TemporaryDirectory() as folder, threads(1):
        peak()
        ll.experiments.continual_sweep(model, tasks, strategy, grid, store=Path(folder) / "store", **same)
        peaks.append(peak())
        (record,) = (json.loads(f.read_text()) for f in Path(folder).glob("store/runs/*.json"))
    share = sum(tested[1:]) / sum(record["seconds"])
    print(json.dumps({"seconds": record["seconds"], "peaks": peaks, "sizes": sizes, "testing": share}))


def peak() -> int:
    """The largest resident memory since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return found


# --- in the measuring process ---


def result(name: str, arguments: argparse.Namespace) -> Result:
    print(f"measuring {name}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--measure", name]
    command += [f"--{key}={getattr(arguments, key)}" for key in ("tasks", "steps", "test")]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(answer, file=sys.stderr, flush=True)
    return Result(**json.loads(answer.splitlines()[-1]))


def table(results: dict[str, Result]) -> str:
    rows = []
    for name, found in results.items():
        early, late = found.seconds[1:6], found.seconds[-5:]
        rows.append(
            [
                name,
                f"{statistics.median(early):.2f}",
                f"{statistics.median(late):.2f}",
                f"{found.testing:.0%}",
                f"{found.peaks[2] / 1e6:.0f}",
                f"{found.peaks[-1] / 1e6:.0f}",
                f"{found.sizes[2] / 1e6:.2f}",
                f"{found.sizes[-1] / 1e6:.2f}",
            ]
        )
    seconds = ("s per task, first (2 to 6)", "last 5", "of it testing")
    memory = (
        "peak resident at task 3, MB",
        "at the last",
        "checkpoint after task 3, MB",
        "after the last but one",
    )
    return markdown(("", *seconds, *memory), rows)


def picture(results: dict[str, Result]) -> Figure:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = ("seconds", "peak resident memory, MB", "checkpoint, MB")
    for number, (name, found) in enumerate(results.items()):
        series = (found.seconds, [p / 1e6 for p in found.peaks], [s / 1e6 for s in found.sizes])
        for ax, values in zip(axes, series, strict=True):
            style = {"color": COLORS[number], "marker": MARKS[number], "markersize": 3}
            ax.plot(range(1, len(values) + 1), values, label=name, **style)
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
        ax.set_xlabel("task")
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50, help="of each task")
    parser.add_argument("--test", type=int, default=500, help="test examples of each task")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.tasks, arguments.steps, arguments.test)
        return
    results = {name: result(name, arguments) for name in CASES}
    counts = f"{arguments.steps} steps and {arguments.test} test examples each"
    title = f"# {arguments.tasks} tasks in sequence, {counts}"
    publish(arguments.out, "continual", "\n\n".join((title, machine(), table(results))), picture(results))


if __name__ == "__main__":
    main()
