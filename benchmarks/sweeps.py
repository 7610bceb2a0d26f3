"""What does a sweep cost, against the build before: notebook 03's setting, and one run of it.

The peer is another checkout, whose folder is the first argument; both builds run in turn, each in a process
of its own, with two processes for the sweep and one thread for the single run. Processor seconds are those of
the process and all its children, so that a busy machine changes them less than the clock.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

REPEATS = 3
STEPS = {"steps": 120, "batch_size": 32, "evaluations": 2, "progress": False}


def measured(part: str) -> dict[str, float]:
    """Seconds that one part takes with whichever build is imported."""
    import torch

    import lora_lens as ll

    bundled = ll.tasks.bundled if hasattr(ll, "Sweep") else getattr(ll, "embedded")  # noqa: B009 - the name of 0.1
    model, source = bundled.vision()
    digits, source = bundled.digits().subset(test=1000), source.subset(test=1000)
    spectra = ll.spectra(model, progress=False)
    torch.set_num_threads(1)
    started, spent = time.monotonic(), _processor_seconds()
    if part == "run":
        adapted = ll.attach(model, ll.Window.middle(8), spectra=spectra)
        ll.finetune(adapted, digits, source, lr=1e-2, **STEPS)
    else:
        grid = ll.Grid(window=ll.windows(8, 9), lr=[1e-2], baselines=[ll.LoRA(8), ll.FullFineTuning()])
        fuse = {"fuse": int(part.partition(" ")[2])} if " " in part else {}
        tasks = {"model": model, "task": digits, "retain": source}
        ll.sweep(grid, **tasks, spectra=spectra, jobs=2, **STEPS, **fuse)
    return {"clock": time.monotonic() - started, "processor": _processor_seconds() - spent}


def _processor_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def in_build(folder: Path, part: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, "--part", part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(before: Path) -> None:
    now, rows = Path(__file__).resolve().parents[1], []
    for repeat in range(REPEATS):
        for part in ("run", "sweep", "sweep 6"):
            for build, folder in (("before", before), ("now", now)):
                if part == "sweep 6" and build == "before":
                    continue
                rows.append({"part": part, "build": build, "repeat": repeat} | in_build(folder, part))
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby(["part", "build"])[["clock", "processor"]].min().unstack()
    print(table.round(1).to_string())


if __name__ == "__main__":
    if sys.argv[1] == "--part":
        print(json.dumps(measured(sys.argv[2])))
    else:
        main(Path(sys.argv[1]).resolve())
