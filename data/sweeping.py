"""What the scripts that run sweeps share: names on the command line, a store and a packed file for each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import lora_lens as ll

HERE = Path(__file__).parent


def main(description: str, names: Iterable[str], run: Callable[[str, Path, int | None], None]) -> None:
    """Run the sweeps that the command line names, all by default, and pack each into one file.

    Args:
        description: of the script, for ``--help``.
        names: the sweeps that there are.
        run: does one of them, given its name, the folder to keep its runs in, and the number of processes.
    """
    names = list(names)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(names)}; default all")
    parser.add_argument("--store", type=Path, default=HERE.parent / "results" / "sweeps")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--jobs", type=int, help="processes; default all cores, or one where there is a GPU")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in names]:
        parser.error(f"there is no sweep {unknown[0]!r}; there are {', '.join(names)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or names:
        started = time.monotonic()
        run(name, arguments.store / name, arguments.jobs)
        path = ll.experiments.pack(arguments.store / name, arguments.output / f"{name}.jsonl.xz")
        count = len(list((arguments.store / name / "runs").glob("*.json")))
        minutes = (time.monotonic() - started) / 60
        size = path.stat().st_size / 1e6
        print(f"{name}: {count} runs, {minutes:.1f} min, {size:.2f} MB", flush=True)
