"""What it costs to prepare adapters: one factorization for all windows against one each.

    python benchmarks/preparation.py [--threads 1 2] [--out benchmarks/results]

ViT-B/16 with random weights (its shapes decide the cost) and SmolLM2-135M with its own, rank 16, all
linear layers but the head. Both sides adapt a copy of the model in place, and copying is counted for
neither. "Nine" are nine windows from the first to the last components, over a residual base and in the
offset form; PEFT has no windows, so it starts nine times from the first (three in each of three repeats, and
the sum of the nine is given).
MiCA is timed because it, too, starts from a full decomposition; what it trains is something else.
``pissa_niter_16`` is randomized, so it is not exact.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure
from measuring import (
    OTHERS,
    OURS,
    alternating,
    machine,
    markdown,
    models,
    options,
    peft_start,
    publish,
    seconds,
    spread,
    threads,
)
from torch import nn

import lora_lens as ll

RANK = 16
NINE = ll.windows(RANK, 9)
REPEATS = 3
ALL, OURS_NINE, OURS_ONE = "lora_lens: all vectors", "lora_lens: nine windows", "lora_lens: one window"
OURS_OFFSET = "lora_lens: nine windows, offset form"
LAPACK, PEFT_NINE, PEFT_ONE = "torch.linalg.svd, float32", "PEFT pissa, nine times", "PEFT pissa"


def in_place(
    model: nn.Module, spectra: ll.SpectrumSet | None, window: ll.Window, form: str = "residual"
) -> float:
    copied, variant = copy.deepcopy(model), ll.Variant(base=form)
    return seconds(lambda: ll.attach(copied, window, spectra=spectra, variant=variant, inplace=True))


def nine_windows(model: nn.Module, form: str = "residual") -> float:
    made = []
    spent = seconds(lambda: made.append(ll.spectra(model, vectors=NINE, cache=False, progress=False)))
    return spent + sum(in_place(model, made[0], window, form) for window in NINE)


def lapack(model: nn.Module, layers: list[str]) -> float:
    weights = [model.get_submodule(name).weight.detach() for name in layers]
    return seconds(lambda: [torch.linalg.svd(w, full_matrices=False) for w in weights])


def rows_of(model: nn.Module) -> dict[str, Callable[[], float]]:
    layers = list(ll.spectra(model, vectors=False, progress=False))
    return {
        ALL: lambda: seconds(lambda: ll.spectra(model, cache=False, progress=False)),
        OURS_NINE: lambda: nine_windows(model),
        OURS_OFFSET: lambda: nine_windows(model, "offset"),
        OURS_ONE: lambda: in_place(model, None, ll.Window.middle(RANK)),
        LAPACK: lambda: lapack(model, layers),
        PEFT_ONE: lambda: peft_start(model, layers, RANK, "pissa"),
        "PEFT pissa_niter_16": lambda: peft_start(model, layers, RANK, "pissa_niter_16"),
        "PEFT mica": lambda: peft_start(model, layers, RANK, "mica"),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    measured: dict[tuple[str, int], dict[str, list[float]]] = {}
    with TemporaryDirectory() as folder:
        os.environ["LORA_LENS_CACHE"] = folder  # nothing is found from earlier runs
        for name, model in models().items():
            for count in arguments.threads:
                with threads(count):
                    often = {PEFT_ONE: len(NINE) // REPEATS}
                    label = f"{name}, {count} threads"
                    times = alternating(rows_of(model), REPEATS, label, oftener=often)
                times[PEFT_NINE] = [sum(times[PEFT_ONE])]
                measured[name, count] = times

    columns = [f"{name}, {count} thread{'s' * (count > 1)}" for name, count in measured]
    names = list(next(iter(measured.values())))
    table = [[row, *(spread(times[row]) for times in measured.values())] for row in names]
    middle = [{row: statistics.median(t) for row, t in times.items()} for times in measured.values()]
    ratios = [
        ["nine windows: PEFT / lora_lens", *(f"{m[PEFT_NINE] / m[OURS_NINE]:.1f}x" for m in middle)],
        ["in the offset form", *(f"{m[PEFT_NINE] / m[OURS_OFFSET]:.1f}x" for m in middle)],
        ["one window: PEFT / lora_lens", *(f"{m[PEFT_ONE] / m[OURS_ONE]:.1f}x" for m in middle)],
    ]
    text = f"Preparing adapters of rank {RANK}: seconds, median and range. {machine()}.\n\n"
    text += markdown(["", *columns], table) + "\n\n" + markdown(["ratio", *columns], ratios)

    publish(arguments.out, "preparation", text, picture(dict(zip(columns, middle, strict=True))))


def picture(panels: dict[str, dict[str, float]]) -> Figure:
    """Points, because bars have no honest start on a logarithmic axis."""
    figure = Figure(figsize=(9, 0.6 + 2.1 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, (title, medians) in zip(axes, panels.items(), strict=True):
        for row, (name, value) in enumerate(medians.items()):
            ax.plot(value, row, "o", color=OURS if name.startswith("lora_lens") else OTHERS)
            ax.annotate(
                f"{value:.3g} s", (value, row), xytext=(7, 0), textcoords="offset points", va="center"
            )
        ax.set_yticks(range(len(medians)), medians)
        ax.set(title=title, xscale="log")
        ax.grid(axis="x", which="both", linewidth=0.4, alpha=0.5)
        ax.margins(x=0.12)
        ax.invert_yaxis()
    axes[-1].set_xlabel("seconds")
    return figure


if __name__ == "__main__":
    main()
