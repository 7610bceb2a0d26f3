"""What one weight costs as it grows, square and four times as tall, against LAPACK, PEFT and the floor.

    python benchmarks/scaling.py [--largest 4096] [--threads 1 2] [--repeats 5] [--out benchmarks/results]

Random weights, float32. ``lora_lens`` factorizes a model of this one linear layer, without the disk
cache; PEFT puts an adapter of rank 16 that starts as "pissa" on such a model. Making the model is not
measured, checking the weight for NaN and infinite values is. Repeats alternate between contenders;
from 2048 on there is one repeat, and 4096 takes most of the time (``--largest 2048`` leaves it out).

The floor is a count of floating-point operations over the rate of a float64 product of two matrices
of side 2048, measured in the same run. For a weight (m, n) with n <= m it counts

- values: m n^2 for the Gram matrix, one half of it, and 4/3 n^3 for its reduction to tridiagonal form;
- vectors: those, 2 n^3 to take the eigenvectors back from the tridiagonal form, and 2 m n^2 for W V.

It leaves out the eigenproblem of the tridiagonal matrix, whose cost depends on its values, and all
traffic of memory. Half of a one-stage reduction is products of a matrix and a vector, which no
machine does at this rate, so the floor lies below what any such program can reach.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from measuring import alternating, machine, markdown, options, peft_start, publish, seconds, spread, threads
from torch import nn

import lora_lens as ll

SIZES = (256, 512, 1024, 2048, 4096)
TALL = 4
ONE_REPEAT_FROM = 2048
RANK = 16
OURS_VALUES, OURS_VECTORS = "lora_lens, values", "lora_lens, vectors"
SVDVALS, SVD, PISSA = "torch.linalg.svdvals", "torch.linalg.svd", "PEFT pissa"
FLOOR_VALUES, FLOOR_VECTORS = "floor, values", "floor, vectors"
STYLES = {
    OURS_VALUES: ("#0072b2", "o", "--"),
    OURS_VECTORS: ("#0072b2", "o", "-"),
    SVDVALS: ("#d55e00", "s", "--"),
    SVD: ("#d55e00", "s", "-"),
    PISSA: ("#009e73", "^", "-"),
    FLOOR_VALUES: ("#999999", "", "--"),
    FLOOR_VECTORS: ("#999999", "", "-"),
}

Measured = dict[tuple[int, int], dict[str, list[float]]]  # seconds by (m, n) and contender


def contenders(rows: int, columns: int) -> dict[str, Callable[[], float]]:
    model = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(columns, rows, bias=False))})
    weight = model["layers"][0].weight.detach()
    settings = {"targets": "layers.0", "cache": False, "progress": False}
    return {
        OURS_VALUES: lambda: seconds(lambda: ll.spectra(model, vectors=False, **settings)),
        OURS_VECTORS: lambda: seconds(lambda: ll.spectra(model, vectors=True, **settings)),
        SVDVALS: lambda: seconds(lambda: torch.linalg.svdvals(weight)),
        SVD: lambda: seconds(lambda: torch.linalg.svd(weight, full_matrices=False)),
        PISSA: lambda: peft_start(model, ["layers.0"], RANK, "pissa"),
    }


def floors(rows: int, columns: int, rate: float) -> dict[str, list[float]]:
    values = rows * columns**2 + 4 / 3 * columns**3
    vectors = values + 2 * columns**3 + 2 * rows * columns**2
    return {FLOOR_VALUES: [values / rate], FLOOR_VECTORS: [vectors / rate]}


def product_rate(side: int) -> float:
    """Floating-point operations a second of a float64 matrix product, the best of five."""
    left, right = torch.randn(2, side, side, dtype=torch.float64)
    return max(2 * side**3 / seconds(lambda: left @ right) for _ in range(5))


def measure(sizes: list[int], repeats: int, count: int, rate: float) -> Measured:
    measured: Measured = {}
    for tall in (1, TALL):
        for work in contenders(tall * 64, 64).values():
            work()  # so that the first row pays for no library's start
        for size in sizes:
            shape = (tall * size, size)
            label = f"{shape[0]} x {shape[1]}, {count} threads"
            times = alternating(contenders(*shape), 1 if size >= ONE_REPEAT_FROM else repeats, label)
            measured[shape] = times | floors(*shape, rate)
    return measured


def table(measured: Measured) -> str:
    pairs = ((OURS_VALUES, FLOOR_VALUES), (OURS_VECTORS, FLOOR_VECTORS), (PISSA, OURS_VECTORS))
    rows = []
    for (height, width), times in measured.items():
        median = {name: statistics.median(each) for name, each in times.items()}
        ratios = [f"{median[over] / median[under]:.1f}x" for over, under in pairs]
        rows.append((f"{height} x {width}", *map(spread, times.values()), *ratios))
    names = next(iter(measured.values()))
    over = ("values / floor", "vectors / floor", "pissa / vectors")
    return markdown(("weight", *(f"{name}, s" for name in names), *over), rows)


def picture(panels: dict[int, Measured]) -> Figure:
    figure, axes = plt.subplots(
        len(panels), 2, figsize=(10, 3.6 * len(panels)), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, (count, measured) in zip(axes, panels.items(), strict=True):
        for axis, tall in zip(row, (1, TALL), strict=True):
            chosen = {n: times for (m, n), times in measured.items() if m == tall * n}
            for name, (color, marker, line) in STYLES.items():
                middle = [statistics.median(times[name]) for times in chosen.values()]
                axis.loglog(list(chosen), middle, color=color, marker=marker, linestyle=line, label=name)
            axis.set_xticks(list(chosen), map(str, chosen))
            axis.minorticks_off()
            shape = "n x n" if tall == 1 else f"{tall}n x n"
            axis.set_title(f"{shape}, {count} thread{'s' if count > 1 else ''}", loc="left", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("seconds")
    for axis in axes[-1]:
        axis.set_xlabel("n")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="leave out larger weights")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5, help=f"of weights below {ONE_REPEAT_FROM}")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sizes = [size for size in SIZES if size <= arguments.largest]
    if not sizes:
        parser.error(f"--largest must be at least {SIZES[0]}")

    panels: dict[int, Measured] = {}
    parts = ["# Cost of one weight as it grows", machine()]
    for count in arguments.threads:
        with threads(count):
            rate = product_rate(2048)
            panels[count] = measure(sizes, arguments.repeats, count, rate)
        about = f"float64 products at {rate / 1e9:.0f} GFLOP/s; median seconds (smallest to largest)"
        parts += [f"## {count} thread{'s' if count > 1 else ''}", about, table(panels[count])]
    publish(arguments.out, "scaling", "\n\n".join(parts), picture(panels))


if __name__ == "__main__":
    main()
