"""What Dask costs: a sweep on two of its workers against one in two processes.

    python benchmarks/engines.py [--repeats 3]

The embedded model, 10 runs of 20 steps; both sides have imported everything before the clock starts, and take
turns. Read the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

from distributed import Client, LocalCluster

import lora_lens as ll

GRID = ll.Grid(window=ll.windows(rank=8, count=5), lr=[1e-3, 1e-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    model, source = ll.tasks.bundled.vision()
    task, retain = ll.tasks.bundled.digits().first(500, 200), source.first(10, 200)
    spectra = ll.spectra(model, progress=False)

    def seconds(grid: ll.Grid, **engine: object) -> float:
        begun = time.perf_counter()
        settings = {"steps": 20, "evaluations": 2, "progress": False, "spectra": spectra}
        ll.sweep(grid, model=model, task=task, retain=retain, **settings, **engine)
        return time.perf_counter() - begun

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        sides = {"two processes": {"jobs": 2}, "two workers of Dask": {"engine": client}}
        for engine in sides.values():
            seconds(ll.Grid(window=[GRID.window[0]], lr=[1e-4, 1e-5]), **engine)
        times = {name: [] for name in sides}
        for _ in range(repeats):
            for name, engine in sides.items():
                times[name].append(seconds(GRID, **engine))
    for name, spent in times.items():
        print(f"{name}: {statistics.median(spent):.2f} s ({min(spent):.2f} to {max(spent):.2f})")
    here, dask = times.values()
    ratios = [b / a for a, b in zip(here, dask, strict=True)]
    print(f"Dask / processes: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
