"""Peak memory of the singular values of whole models, each measured in a process of its own.

    python benchmarks/memory.py [--gigabytes 2] [--width 4096] [--threads 2] [--out benchmarks/results]

Needs Linux. A fresh process imports everything and does the same work once on a 64 x 64 weight, which
warms the libraries up; its peak counts from there. A model in memory is loaded before that and does
not count, only what comes on top of it. Two peaks are reported:

- resident: all pages, by the kernel's own record. Those of mapped safetensors files count as well,
  though the kernel drops them when memory runs short;
- anonymous: pages of the process alone, which is what can run out; sampled every 2 ms from outside.

Both are divided by the largest matrix in float64; at most 4 is the aim, and resident, the larger,
decides. The synthetic checkpoint has a Llama's shapes (four blocks, a shard each, one in float32 and
three in bfloat16; width 4096 gives 2.0 GB) and random values. It lies in the system's temporary
folder (TMPDIR moves it) and is removed at the end, on an error and on Ctrl-C. Factorizing it takes
the most time by far: its weights are large. Of WeightWatcher, slower still on such weights, one
of the largest matrices is measured; it reads the folder tensor by tensor, too.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from measuring import (
    OTHERS,
    OURS,
    Peak,
    done,
    machine,
    markdown,
    options,
    peak_of,
    publish,
    ready,
    smollm2_gguf,
    threads,
    vit,
    weightwatcher,
)
from safetensors.torch import save_file
from torch import nn

import lora_lens as ll
from lora_lens.spectrum.sources.matrices import weights

AIM = 4  # largest matrices in float64
BLOCKS = (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16)
LARGEST = "model.layers.1.mlp.down_proj"  # of the float32 block
IN_MEMORY = "vit"


@dataclass(frozen=True)
class Case:
    """What is measured: ``source`` is IN_MEMORY or a path."""

    label: str
    tool: str
    source: str


@dataclass(frozen=True)
class Result:
    case: Case
    peak: Peak
    weights: int
    largest: int  # bytes in float64


# --- in the measured process ---


def measure(tool: str, source: str, count: int) -> None:
    opened = vit() if source == IN_MEMORY else Path(source)
    work = {"lora_lens": ours, "WeightWatcher": theirs, "WeightWatcher, 1 weight": one_of_theirs}[tool]
    with threads(count):
        warm_up(ours if work is ours else theirs)
        ready()
        shapes = work(opened)
        largest = max(rows * columns for rows, columns in shapes)
        done(json.dumps({"weights": len(shapes), "largest": 8 * largest}))


def warm_up(work: Callable[[nn.Module | Path], list[tuple[int, int]]]) -> None:
    import gguf  # noqa: F401, imported late by lora_lens, but a library all the same

    with tempfile.TemporaryDirectory() as folder:
        save_file({"layers.0.q_proj.weight": torch.eye(64)}, Path(folder) / "model.safetensors")
        work(Path(folder))
    work(nn.ModuleDict({"layers": nn.Sequential(nn.Linear(64, 64), nn.ReLU())}))


def ours(source: nn.Module | Path) -> list[tuple[int, int]]:
    return [spectrum.shape for spectrum in ll.spectra(source, vectors=False, cache=False).values()]


def theirs(source: nn.Module | Path) -> list[tuple[int, int]]:
    watcher = watching(source)
    known = watcher.describe(min_evals=1, max_evals=0)
    ids = known.layer_id[known.longname.isin([weight.name for weight in weights(source)])]
    return analyzed(watcher, ids.tolist())


def one_of_theirs(source: Path) -> list[tuple[int, int]]:
    return analyzed(watching(source), [LARGEST])


def watching(source: nn.Module | Path) -> object:
    logging.disable(logging.WARNING)
    return weightwatcher().WeightWatcher(model=source if isinstance(source, nn.Module) else str(source))


def analyzed(watcher: object, layers: list) -> list[tuple[int, int]]:
    details = watcher.analyze(layers=layers, svd_method="accurate", min_evals=1, max_evals=0)
    return list(zip(details.N, details.M, strict=True))


# --- in the measuring process ---


def write_checkpoint(folder: Path, width: int, gigabytes: float) -> None:
    """Blocks of a Llama in as many shards, with their index, until there are about so many gigabytes."""
    hidden = round(width * 11008 / 4096)
    shapes = dict.fromkeys([f"self_attn.{part}_proj" for part in "qkvo"], (width, width)) | {
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    per_round = sum(rows * columns for rows, columns in shapes.values()) * sum(d.itemsize for d in BLOCKS)
    dtypes = BLOCKS * max(1, round(gigabytes * 1e9 / per_round))
    if shutil.disk_usage(folder).free < 1.1 * per_round * len(dtypes) / len(BLOCKS):
        raise SystemExit(f"no room for {gigabytes} GB in {folder}; set TMPDIR to a folder on a larger disk")
    places = {}
    for block, dtype in enumerate(dtypes):
        shard = f"model-{block + 1:05}-of-{len(dtypes):05}.safetensors"
        names = {kind: f"model.layers.{block}.{kind}.weight" for kind in shapes}
        save_file(
            {names[kind]: torch.randn(shape).to(dtype) for kind, shape in shapes.items()}, folder / shard
        )
        places |= dict.fromkeys(names.values(), shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def cases(folder: Path, width: int, gigabytes: float) -> list[Case]:
    stored, checkpoint = folder / "vit.safetensors", folder / "checkpoint"
    save_file(vit().state_dict(), stored)
    checkpoint.mkdir()
    write_checkpoint(checkpoint, width, gigabytes)
    size = sum(file.stat().st_size for file in checkpoint.iterdir()) / 1e9
    sharded = f"synthetic checkpoint of {size:.1f} GB, width {width}"
    found = [
        Case("ViT-B/16 in memory", "lora_lens", IN_MEMORY),
        Case("ViT-B/16 in memory", "WeightWatcher", IN_MEMORY),
        Case("ViT-B/16, safetensors", "lora_lens", str(stored)),
    ]
    if (file := smollm2_gguf()) is not None:
        found.append(Case("SmolLM2-135M, GGUF", "lora_lens", str(file)))
    return [
        *found,
        Case(sharded, "lora_lens", str(checkpoint)),
        Case(sharded, "WeightWatcher, 1 weight", str(checkpoint)),
    ]


def result(case: Case, count: int) -> Result:
    print(f"measuring {case.tool} on {case.label}", file=sys.stderr, flush=True)
    measured = ["--measure", case.tool, case.source, "--threads", str(count)]
    peak, answer = peak_of([sys.executable, __file__, *measured])
    return Result(case, peak, **json.loads(answer))


def table(results: list[Result]) -> str:
    rows = [
        (
            r.case.label,
            r.case.tool,
            r.weights,
            f"{r.largest / 1e6:.1f}",
            f"{r.peak.anonymous / 1e6:.1f} ({r.peak.anonymous / r.largest:.2f}x)",
            f"{r.peak.resident / 1e6:.1f} ({r.peak.resident / r.largest:.2f}x)",
            "yes" if r.peak.resident <= AIM * r.largest else "no",
        )
        for r in results
    ]
    header = ("source", "tool", "weights", "largest matrix in float64, MB")
    peaks = ("peak anonymous, MB (x largest)", "peak resident, MB (x largest)", f"within {AIM}x")
    return markdown((*header, *peaks), rows)


def picture(results: list[Result], count: int) -> Figure:
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.55 * len(results)), layout="constrained")
    labels = [f"{r.case.label}\n{r.case.tool}" for r in results]
    colors = [OURS if r.case.tool == "lora_lens" else OTHERS for r in results]
    axis.barh(labels, [r.peak.resident / r.largest for r in results], color=colors, alpha=0.4)
    axis.barh(labels, [r.peak.anonymous / r.largest for r in results], color=colors, height=0.4)
    axis.axvline(AIM, color="black", linewidth=1, linestyle="--")
    axis.invert_yaxis()
    axis.set_xlabel(f"peak / largest matrix in float64, {count} threads\nwide: resident, narrow: anonymous")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the synthetic checkpoint")
    parser.add_argument("--width", type=int, default=4096, help="width of its blocks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments.threads)
        return
    weightwatcher()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a killed run, too, removes its files
    with tempfile.TemporaryDirectory(prefix="lora_lens_memory_") as folder:
        planned = cases(Path(folder), arguments.width, arguments.gigabytes)
        results = [result(case, arguments.threads) for case in planned]
    lines = (f"# Peak memory of singular values, {arguments.threads} threads", machine(), table(results))
    publish(arguments.out, "memory", "\n\n".join(lines), picture(results, arguments.threads))


if __name__ == "__main__":
    main()
