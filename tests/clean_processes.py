"""Scripts in processes of their own that begin with everything imported, which would take each many seconds.

They come from one server, which imports it once and does nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

IMPORTED = [
    "lora_lens.experiments.sweeps",
    "lora_lens.tasks.bundled",
    "timm.models.vision_transformer",
    "distributed",
]
forking = multiprocessing.get_context("forkserver")
forking.set_forkserver_preload(IMPORTED)


def started(script: str, *arguments: object, **environment: str) -> BaseProcess:
    """A process that runs a script, with one thread; its exit code is 1 after an error, which it prints."""
    process = forking.Process(target=_run, args=(script, list(map(str, arguments)), environment))
    process.start()
    return process


def printed(script: str, *arguments: object) -> str:
    """What a script prints, which must come to its end without an error."""
    with tempfile.TemporaryDirectory() as folder:
        process = forking.Process(target=_run, args=(script, list(map(str, arguments)), {}, folder))
        process.start()
        process.join(600)
        output, errors = Path(folder, "1").read_text(), Path(folder, "2").read_text()
    assert process.exitcode == 0, errors[-3000:]
    return output


def _run(script: str, arguments: list[str], environment: dict[str, str], folder: str | None = None) -> None:
    for stream in (1, 2) if folder else ():
        os.dup2(os.open(Path(folder, str(stream)), os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    sys.argv[1:] = arguments
    torch.set_num_threads(1)
    try:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        os._exit(1)
