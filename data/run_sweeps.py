"""Run the sweeps behind notebook 04 and pack each into one file under ``results``.

    python data/run_sweeps.py                    # all of them: about an hour and a half on 2 cores
    python data/run_sweeps.py digits ranks       # these
    python data/run_sweeps.py --store FOLDER     # keep the runs there; finished runs are not run again

Every file holds all its runs with their settings, curves, answers and drift, and the versions that made
them: ``ll.Sweep.open("data/results/digits.jsonl.xz")`` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sweeping import main
from timm.models.vision_transformer import VisionTransformer

import lora_lens as ll

STEPS, BATCH = 120, 32  # every one of 4,000 training images about once
EXAMPLES = {"train": 4000, "test": 1000}
RATES = (2e-3, 5e-3, 1e-2, 2e-2)
Setting = tuple[VisionTransformer, ll.Task, ll.Task]  # model, what to learn, what to retain


def after_fashion(task: Callable[[ll.Task], ll.Task]) -> Callable[[], Setting]:
    """The setting where the model pretrained on all of Fashion-MNIST learns what ``task`` makes of it."""

    def setting() -> Setting:
        model, fashion = ll.tasks.bundled.vision()
        return model, task(fashion), fashion.first(test=EXAMPLES["test"])

    return setting


def known_classes() -> Setting:
    model, known, new = ll.tasks.bundled.vision_of_known_classes()
    return model, new.first(**EXAMPLES), known.first(test=EXAMPLES["test"])


def digits(_fashion: ll.Task) -> ll.Task:
    return ll.tasks.bundled.digits().first(**EXAMPLES)


def few_digits(_fashion: ll.Task) -> ll.Task:
    return ll.tasks.few_shot(ll.tasks.bundled.digits(), 20).first(test=EXAMPLES["test"])


def noisy(fashion: ll.Task) -> ll.Task:
    return ll.tasks.corrupted(fashion.first(**EXAMPLES), "gaussian_noise", 5)


@dataclass(frozen=True)
class Sweep:
    """A setting, and grids with what differs from the usual training in each."""

    setting: Callable[[], Setting]
    grids: list[tuple[ll.Grid, dict[str, object]]] = field(default_factory=list)


def windows_and_lora(seeds: int, rates: tuple[float, ...] = RATES, rank: int = 8) -> ll.Grid:
    return ll.Grid(
        window=ll.windows(rank=rank, count=5), lr=rates, seed=range(seeds), baselines=[ll.LoRA(rank)]
    )


def sweeps() -> Iterator[tuple[str, Sweep]]:
    controls = [ll.LoRA(8), ll.spectrum.RandomComponents(8)]
    grid = ll.Grid(ll.windows(rank=8, count=9), lr=RATES, seed=range(5), baselines=controls)
    yield "digits", Sweep(after_fashion(digits), [(grid, {"evaluations": 5})])
    others = {
        "new_classes": known_classes,
        "few_digits": after_fashion(few_digits),
        "noise": after_fashion(noisy),
    }
    for name, setting in others.items():
        # 6 seeds where 3 showed something like a U: the test of it at one rate needs 5 at least.
        seeds = 6 if name == "new_classes" else 3
        yield name, Sweep(setting, [(windows_and_lora(seeds), {})])

    elsewhere = [
        *(ll.PeftMethod(start, 8) for start in ll.adapters.PEFT_STARTS if start != "pissa"),
        *(ll.training.Regularized(ll.LoRA(8), ll.training.L2ToInitial(strength)) for strength in (0.01, 0.1)),
        *(
            ll.training.Regularized(method, ll.training.KLAnchor(1.0))
            for method in (ll.LoRA(8), ll.Window.middle(8))
        ),
    ]
    grid = ll.Grid(lr=RATES, seed=range(3), baselines=elsewhere)
    yield "elsewhere", Sweep(after_fashion(digits), [(grid, {})])

    # LoRA under L2 where the sweeps above lack it: what ll.advise rests on beside them.
    penalized = ll.training.Regularized(ll.LoRA(8), ll.training.L2ToInitial(0.01))
    for name, setting in others.items():
        yield f"{name}_l2", Sweep(setting, [(ll.Grid(lr=RATES, seed=range(3), baselines=[penalized]), {})])

    def at_5e3(seeds: int, rank: int = 8) -> ll.Grid:
        return windows_and_lora(seeds, rates=(5e-3,), rank=rank)

    lengths = [(at_5e3(seeds=5), {"steps": steps}) for steps in (30, 480)]
    ranks = [(at_5e3(seeds=3, rank=rank), {}) for rank in (4, 16, 64)]
    layers = [(at_5e3(seeds=3), {"targets": targets}) for targets in ("all-attention", "all-mlp")]
    for name, grids in {"lengths": lengths, "ranks": ranks, "layers": layers}.items():
        yield name, Sweep(after_fashion(digits), grids)


def run(name: str, store: Path, jobs: int | None) -> None:
    sweep = dict(sweeps())[name]
    model, task, retain = sweep.setting()
    spectra = ll.spectra(model, progress=False)
    for grid, settings in sweep.grids:
        usual = {"steps": STEPS, "batch_size": BATCH, "evaluations": 3}
        ll.sweep(
            grid,
            model=model,
            task=task,
            retain=retain,
            spectra=spectra,
            store=store,
            jobs=jobs,
            **usual | settings,
        )


if __name__ == "__main__":
    main(__doc__, dict(sweeps()), run)
