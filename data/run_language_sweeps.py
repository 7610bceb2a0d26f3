"""Run the sweeps behind notebook 05 and pack each into one file under ``results``.

    python data/run_language_sweeps.py                # all: about two and a half hours on 2 cores
    python data/run_language_sweeps.py minilm         # one
    python data/run_language_sweeps.py --store FOLDER # keep the runs there; finished runs are not run again
    python data/run_language_sweeps.py smollm2 --jobs 8    # 8 processes: 4 minutes on one H100

- minilm: all-MiniLM-L6-v2 learns the sentiment of film reviews; retained is a linear probe's accuracy at
  telling where a text comes from, watched are probes of the sentiment in the three other corpora.
- smollm2: SmolLM2-135M-Instruct learns the same by label words; retained is running newspaper text (next
  tokens), watched is what it says of the sentiment in the three other corpora. The stored runs were
  made on one H100, which differs from a CPU by rounding: see data/README.md.
- minilm_attention, minilm_mlp: as minilm, but only one part of each block is trained, by the four last
  windows at one rate. Is it attention, whose weights are nearly singular, that makes the last one forget?

``ll.Sweep.open("data/results/minilm.jsonl.xz")`` reads a file, its ``watched()`` gives what was
watched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sweeping import main
from torch import nn

import lora_lens as ll

OTHERS = ("products", "tweets", "newspaper")


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, what it learns, what it knew, and what else is looked at."""

    model: nn.Module
    task: ll.Task
    retain: ll.Task
    watch: list[ll.Task]
    spectra: ll.SpectrumSet | None = None


@cache  # three sweeps have it
def minilm() -> Setting:
    model, tokenizer = ll.tasks.bundled.minilm(), ll.tasks.bundled.minilm_tokenizer()

    def task(corpus: ll.tasks.Corpus, test: int) -> ll.Task:
        return ll.tasks.text_task(corpus, tokenizer).first(test=test)

    known = [task(ll.tasks.bundled_texts.sentiment(name), 400) for name in OTHERS]
    return Setting(
        model,
        task(ll.tasks.bundled_texts.sentiment("movies"), 500),
        ll.tasks.probed(model, task(ll.tasks.bundled_texts.genres(), 1000), examples=2000),
        [ll.tasks.probed(model, corpus) for corpus in known],
        ll.spectra(model, progress=False),
    )


def smollm2() -> Setting:
    model, tokenizer = ll.tasks.bundled.smollm2(), ll.tasks.bundled.smollm2_tokenizer()
    model.set_attn_implementation("eager")  # on short texts a quarter faster than the fused one, on a CPU

    def task(name: str, test: int) -> ll.Task:
        return ll.tasks.label_word_task(ll.tasks.bundled_texts.sentiment(name), tokenizer).first(test=test)

    running_text = ll.tasks.language_task(ll.tasks.bundled_texts.articles(), tokenizer).first(test=24)
    return Setting(model, task("movies", 300), running_text, [task(name, 150) for name in OTHERS])


def windows_and_baselines(count: int, rates: tuple[float, ...], seeds: int) -> ll.Grid:
    baselines = [ll.LoRA(8), ll.training.Regularized(ll.LoRA(8), ll.training.L2ToInitial(0.01))]
    return ll.Grid(ll.windows(rank=8, count=count), lr=rates, seed=range(seeds), baselines=baselines)


ONE_PART = [ll.Grid([ll.Window(8, position=p) for p in (0.5, 0.75, 0.875, 1)], lr=3e-3, seed=range(3))]
MINILM = {"steps": 100, "batch_size": 32, "evaluations": 3}
SWEEPS: dict[str, tuple[Callable[[], Setting], list[ll.Grid], dict[str, object]]] = {
    "minilm": (
        minilm,
        [
            windows_and_baselines(9, rates=(1e-3, 3e-3, 1e-2), seeds=2),
            windows_and_baselines(9, rates=(1e-3, 3e-3), seeds=3),
            # The test of a U needs five seeds at least.
            ll.Grid(ll.windows(rank=8, count=9), lr=(1e-3, 3e-3), seed=range(3, 5)),
        ],
        MINILM,
    ),
    "smollm2": (
        smollm2,
        [windows_and_baselines(9, rates=(2e-3,), seeds=5)],
        {"steps": 60, "batch_size": 16, "evaluations": 2},
    ),
    "minilm_attention": (minilm, ONE_PART, {**MINILM, "targets": "all-attention"}),
    "minilm_mlp": (minilm, ONE_PART, {**MINILM, "targets": "all-mlp"}),
}


def run(name: str, store: Path, jobs: int | None) -> None:
    make, grids, settings = SWEEPS[name]
    setting = make()
    for grid in grids:
        ll.sweep(
            grid,
            model=setting.model,
            task=setting.task,
            retain=setting.retain,
            watch=setting.watch,
            spectra=setting.spectra,
            store=store,
            precision="bfloat16",
            jobs=jobs,
            **settings,
        )


if __name__ == "__main__":
    main(__doc__, SWEEPS, run)
