"""``make zoo``: try every family of timm and transformers, and write the table in tests/zoo/README.md.

Each family runs in a process of its own, limited in time and memory, so that no stranger's model can stop the
rest. ``python -m zoo transformers:llama timm:resnet10t`` tries these alone and writes no table.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from zoo.checks import TOLERANCE, check
from zoo.families import build, timm_models, transformers_types

SECONDS, BYTES = 300, 16 << 30
JOBS = int(os.environ.get("JOBS", "2"))
TABLE = Path(__file__).parent / "README.md"
LONGEST = 160
_forking = threading.Lock()


def main() -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    families = sys.argv[1:] or [*timm_models(), *transformers_types()]
    found = []
    with ThreadPoolExecutor(JOBS) as pool:
        for row in pool.map(_in_a_process, families):
            found.append(row)
            print(f"{len(found)}/{len(families)}", _in_words(row), flush=True)
    if not sys.argv[1:]:
        TABLE.write_text(_page(found), encoding="utf-8")
        print(f"table: {TABLE}")
    return int(any(row.get("problems") for row in found))


def _in_a_process(family: str) -> dict:
    """What was seen of a family: the fields of :class:`zoo.checks.Row`, or why it could not be tried."""
    with _forking:  # or another child would hold this one's pipe open
        read, write = os.pipe()
        child = os.fork()  # the imports, which take longer than most families, are done
        if child == 0:
            os.close(read)
            with open(write, "wb") as stream:
                stream.write(json.dumps(_tried(family)).encode())
            os._exit(0)
        os.close(write)
    with open(read, "rb") as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return (
        json.loads(text)
        if text
        else {"family": family, "unbuilt": f"more than {SECONDS} s of processor time, or killed"}
    )


def _tried(family: str) -> dict:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # of its own time, on a busy machine, too
    warnings.simplefilter("ignore")
    begin, row = time.monotonic(), {"family": family}
    try:
        model, inputs = build(family)
    except BaseException as error:
        return row | {"unbuilt": _one_line(f"{type(error).__name__}: {error}")}
    row["class"] = type(model).__name__
    try:
        row |= asdict(check(model, inputs))
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        row["problems"] = [
            f"raised {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        ]
    return row | {"seconds": round(time.monotonic() - begin, 1)}


def _in_words(row: dict) -> str:
    if "unbuilt" in row:
        return f"{row['family']}: not tried: {row['unbuilt']}"
    if row["problems"]:
        return f"{row['family']}: PROBLEM: {row['problems']}"
    return f"{row['family']}: {row['layers']} layers, error {row['error']:.0e}, {row['seconds']} s"


def _page(found: list[dict]) -> str:
    tried = [row for row in found if "unbuilt" not in row]
    good = [row for row in tried if not row["problems"]]
    adapted = [row for row in good if row["layers"]]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "timm", "peft"))
    lines = [
        "# The zoo: what `ll.attach` does to every family",
        "",
        f"Written by `make zoo` with {packages}.",
        "The smallest model of each module of timm and a small one of each model type of transformers, with",
        "random weights. On each: attach by default and to each group of layers, and compare the outputs",
        f"(at most {TOLERANCE:g} of the largest may change); see that every adapter acts on the output where",
        "its weight does; change the factors, export, load with plain PEFT and compare; take the spectra of",
        "the model and of the files that it saves.",
        "",
        f"{len(found)} families: {len(tried)} tried, {len(adapted)} adapted without a fault, "
        f"{len(good) - len(adapted)} without a layer to adapt, {len(tried) - len(good)} with a problem, "
        f"{len(found) - len(tried)} not tried (the reasons are below).",
        "",
        "*layers*: adapted by default (convolutions, where a model has no linear layer). *error*: the",
        "largest change of any output at the start. *idle*: adapters whose weight has no effect on the tried",
        "output, such as an expert that no token chose or a tower without its input.",
        "",
        "| family | class | layers | error | idle | left out, and notes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in tried:
        notes = [f"**{p}**" for p in row["problems"]] + row.get("left_out", []) + row.get("notes", [])
        cells = (row["family"], row["class"], row.get("layers", 0), f"{row.get('error', 0):.0e}")
        text = "; ".join(_one_line(n) for n in notes)
        lines.append(f"| {' | '.join(map(str, cells))} | {len(row.get('idle', []))} | {text} |")
    lines += ["", "## Not tried", "", "| family | why |", "| --- | --- |"]
    lines += [f"| {row['family']} | {row['unbuilt']} |" for row in found if "unbuilt" in row]
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition(" ")[0] + " ..."


if __name__ == "__main__":
    sys.exit(main())
