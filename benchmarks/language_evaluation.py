"""What lower precision saves in evaluation, and what it changes: bfloat16, and int8 for the linear layers.

    python benchmarks/language_evaluation.py [--repeats 3] [--out benchmarks/results]

The pretrained models of language.py on its film snippets, MiniLM with a linear probe, SmolLM2 with label
words and on running newspaper text as well. int8 is PyTorch's dynamic quantization: weights once, inputs at
every product. "Other answers" are the items whose likeliest choice is not that of float32. One thread,
processor's time.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from language import CASES, Case, cpu_seconds
from matplotlib.figure import Figure
from measuring import OTHERS, alternating, machine, markdown, options, publish, spread, threads
from torch import nn

import lora_lens as ll
from lora_lens.tasks.evaluation import Answers

EXACT = "float32"


def quantized(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def tasks_of(case: Case) -> Iterator[ll.Task]:
    movies = case.task.first(train=1000, test=200)
    if case.name == "MiniLM":
        yield ll.tasks.probed(case.model, movies)
    else:
        yield movies
        yield ll.tasks.language_task(ll.tasks.bundled_texts.articles(), case.tokenizer).first(test=24)


def ways_of(case: Case) -> dict[str, Callable[[ll.Task], Answers]]:
    return {
        EXACT: partial(ll.evaluate, case.model),
        "bfloat16": partial(ll.evaluate, case.model, precision="bfloat16"),
        "int8": partial(ll.evaluate, quantized(case.model)),
    }


def rows_of(case: Case, repeats: int) -> list[dict[str, object]]:
    """One for each task and way."""
    rows = []
    ways = ways_of(case)
    for task in tasks_of(case):
        label = f"{case.name}, {task.name}"
        answers = {way: answer(task) for way, answer in ways.items()}
        work = {way: partial(cpu_seconds, partial(answer, task)) for way, answer in ways.items()}
        times = alternating(work, repeats, label)
        for way, got in answers.items():
            rows.append(
                {
                    "task": label,
                    "way": way,
                    "seconds": times[way],
                    "faster": statistics.median(e / t for e, t in zip(times[EXACT], times[way], strict=True)),
                    "loss": got.loss,
                    "accuracy": got.accuracy,
                    "other answers": float((got.predicted != answers[EXACT].predicted).mean()),
                }
            )
    return rows


def picture(rows: list[dict[str, object]]) -> Figure:
    figure = Figure(figsize=(8, 0.8 + 0.3 * len(rows)), layout="constrained")
    ax = figure.subplots()
    ax.barh(range(len(rows)), [statistics.median(row["seconds"]) for row in rows], color=OTHERS)
    ax.set_yticks(range(len(rows)), [f"{row['task']}, {row['way']}" for row in rows])
    ax.set_xlabel("CPU seconds, 1 thread")
    ax.invert_yaxis()
    return figure


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with threads(1):
        rows = [row for make in CASES.values() for row in rows_of(make(), arguments.repeats)]
    table = [
        [
            row["task"],
            row["way"],
            spread(row["seconds"]),
            f"{row['faster']:.2f}x",
            f"{row['loss']:.4f}",
            f"{row['accuracy']:.4f}",
            f"{row['other answers']:.2%}",
        ]
        for row in rows
    ]
    text = f"Evaluation, CPU seconds, 1 thread; median and range. {machine()}.\n\n"
    publish(arguments.out, "language_evaluation", text + markdown(list(rows[0]), table), picture(rows))
    (arguments.out / "language_evaluation.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
