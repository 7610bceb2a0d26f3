"""Run the sweeps of the second round and pack each into one file under ``results``.

    python data/run_second_round.py                    # all, the most decisive first, see below for hours
    python data/run_second_round.py digits_opponents   # one
    python data/run_second_round.py --store FOLDER     # keep the runs there; finished ones are not run again

In the order in which they run, with hours of one core (a usual run of 120 steps took 7.5 to 8.5 s of a core
that was shared, one of EfficientNet about 10 s, one of MiniLM 6.5 minutes). What was stopped goes on
where it was.

| sweep | runs | hours |
|---|---|---|
| new_classes_opponents, digits_opponents | 777 each | 1.6 each |
| new_classes_mlp, digits_mlp | 28 each | 0.1 each |
| new_classes_metric, digits_metric | 150 each | 0.3 each |
| new_classes_ranks, digits_ranks | 135 each | 0.3 each |
| new_classes_alpha, digits_alpha | 90 each | 0.2 each |
| new_classes_lengths, digits_lengths | 55 each | 0.7 each |
| efficientnet_fashion, efficientnet_digits | 253 each | 0.7 each |
| minilm_long | 12 | 1.3 |

- opponents: windows, LoRA, its variants, penalties, PEFT's starts and methods and full fine-tuning, at rank 8
  or with about as many trained numbers, each at four or five rates around the one where it learns most.
- mlp: LoRA of the MLPs alone, in a file of its own as only its targets tell it from LoRA.
- metric: windows in the metric of the retained task's inputs, of the new task's, and of the new task's
  relative to the retained one's. The column variant tells which.
- ranks, lengths, alpha: first, middle and last window, and LoRA with and without a penalty, at other ranks,
  with 4 and 16 times the steps, and with alpha = 2 r and r / 4 in place of r.
- efficientnet: a network pretrained on ImageNet learns Fashion-MNIST or digits in colour; retained is what it
  answers to parts of two photographs. KaSA, OSF and SHiRA refuse its convolutions and have a row each with
  the reason; PEFT's starts are for linear layers alone and have none.
- minilm_long: the sentiment of film reviews at 4 times the steps of run_language_sweeps.py, in float32,
  and with a probe of the genres that was fitted to other texts than there.

``opponents`` and ``metric`` keep every run's drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import HiraConfig, LoraConfig, OFTConfig, OSFConfig, ShiraConfig
from peft.tuners.lora.config import KasaConfig
from run_language_sweeps import minilm
from run_sweeps import BATCH, STEPS, after_fashion, digits, known_classes
from sklearn.datasets import load_sample_images
from sweeping import main
from torch import Tensor
from torch.nn.functional import interpolate

import lora_lens as ll

RANK = 8
AROUND = (0.25, 0.5, 1.0, 2.0)  # of the rate where a method learns most
SIZE = 48  # pixels a side of EfficientNet's images
CURVES = {"steps": STEPS, "batch_size": BATCH, "evaluations": 3}
ENDS = {**CURVES, "evaluations": 2}  # where the comparison is of what is learned at the end
LORA = ll.LoRA(RANK)
OFT = ll.PeftMethod(OFTConfig())  # whose usual blocks train nearly as much as LoRA of rank 8
OSF = ll.PeftMethod(OSFConfig(effective_rank=96 - RANK))  # trains what the first 88 components leave of 96
KASA = ll.PeftMethod(LoraConfig(r=RANK, kasa_config=KasaConfig()))
SHIRA, HIRA = ll.PeftMethod(ShiraConfig(r=RANK)), ll.PeftMethod(HiraConfig(r=RANK))
Setting = dict[str, object]  # of ll.sweep's arguments: model, what to learn, what to retain
Grids = list[tuple[ll.Grid, dict[str, object]]]


@dataclass(frozen=True)
class Sweep:
    """A setting, grids with what differs from the usual in each, and in which metrics windows are taken.

    Attributes:
        drift: whether every run's is kept, which makes most of a file.
        metrics: of the setting, each for all grids; without any the plain spectra.
        usual: what the grids' runs are trained with where they say nothing else.
    """

    setting: Callable[[], Setting]
    grids: Grids
    drift: bool = False
    metrics: Callable[[Setting], list[ll.spectrum.Metric]] | None = None
    usual: dict[str, object] = field(default_factory=lambda: CURVES)


def vision(setting: Callable[[], tuple]) -> Setting:
    return dict(zip(("model", "task", "retain"), setting(), strict=True))


def penalized(strength: float = 0.01, rank: int = RANK) -> ll.training.Regularized:
    return ll.training.Regularized(ll.LoRA(rank), ll.training.L2ToInitial(strength))


def anchored(method: ll.adapters.Method | ll.Window) -> ll.training.Regularized:
    return ll.training.Regularized(method, ll.training.KLAnchor(1.0))


def opponents(scale: float, seeds: int) -> Grids:
    """All methods, each at rates around its best one, which is ``scale`` times that on digits."""

    def around(
        best: float, *methods: object, factors: tuple[float, ...] = AROUND, **settings: object
    ) -> tuple[ll.Grid, dict[str, object]]:
        rates = [best * scale * factor for factor in factors]
        return ll.Grid(lr=rates, seed=range(seeds), baselines=methods), settings

    def lower(best: float, *methods: object, **settings: object) -> tuple[ll.Grid, dict[str, object]]:
        """With one rate below: on the first setting these did best at the lowest of the usual four."""
        return around(best, *methods, factors=(AROUND[0] / 2, *AROUND), **settings)

    starts = {name: ll.PeftMethod(name, RANK) for name in ll.adapters.PEFT_STARTS}
    first, second, *others = ll.windows(rank=RANK, count=5)
    both_anchored = anchored(LORA), anchored(ll.Window.middle(RANK))
    return [
        around(1e-2, *others, LORA, penalized(), *both_anchored, starts["corda"], KASA),
        lower(1e-2, second, starts["orthogonal"], SHIRA),
        lower(5e-3, first, *(starts[name] for name in ("pissa", "olora", "lora_ga", "eva"))),
        around(2e-2, penalized(0.1), starts["mica"]),
        around(4e-2, HIRA, OSF),
        lower(2.5e-3, OFT),
        lower(6.25e-4, ll.FullFineTuning()),
        around(2.5e-3, LORA, variant=ll.Variant(rslora=True)),
        lower(1e-2, LORA, variant=ll.Variant(dora=True)),
    ]


def few(rates: tuple[float, ...], seeds: range, rank: int = RANK) -> ll.Grid:
    """First, middle and last window, and LoRA with and without a penalty."""
    return ll.Grid(
        ll.windows(rank=rank, count=3),
        lr=rates,
        seed=seeds,
        baselines=[ll.LoRA(rank), penalized(rank=rank)],
    )


def metrics_of(setting: Setting) -> list[ll.spectrum.Metric]:
    task, retain = setting["task"], setting["retain"]
    return [
        ll.spectrum.Metric(retain),
        ll.spectrum.Metric(task),
        ll.spectrum.Metric(task, relative_to=retain),
    ]


def photographs(generator: torch.Generator, count: int, *, left: bool) -> Tensor:
    """Square parts of scikit-learn's two photographs, of one half each, as EfficientNet takes them."""
    found, both = [], [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    for number in range(count):
        half = both[number % 2][..., :320] if left else both[number % 2][..., 320:]
        side = int(torch.randint(SIZE, 321, (), generator=generator))
        top, start = (
            int(torch.randint(length - side + 1, (), generator=generator)) for length in half.shape[1:]
        )
        part = half[None, :, top : top + side, start : start + side].float()
        found.append(interpolate(part, (SIZE, SIZE), mode="bilinear", antialias=True) / 127.5 - 1)
    return torch.cat(found)


def coloured(examples: ll.Examples, colours: bool) -> ll.Examples:
    """Grey images as EfficientNet takes them, white on black or of two random colours each."""
    mean, std = ll.tasks.bundled.FASHION_MEAN, ll.tasks.bundled.FASHION_STD
    grey = interpolate(examples.inputs * std + mean, (SIZE, SIZE), mode="bilinear")
    ends = torch.tensor([0.0, 1.0]).expand(len(grey), 3, 2)
    if colours:
        ends = torch.rand(len(grey), 3, 2, generator=torch.Generator().manual_seed(len(grey)))
    paper, ink = ends[..., None, None].unbind(2)
    return ll.Examples(2 * (paper + grey * (ink - paper)) - 1, examples.labels)


def efficientnet(task: ll.Task, colours: bool = False) -> Setting:
    model, generator = ll.tasks.bundled.efficientnet(), torch.Generator().manual_seed(0)
    known, other = (photographs(generator, 300, left=left) for left in (True, False))
    task = task.first(train=1000, test=300)
    return {
        "model": model,
        "task": ll.Task(
            f"{task.name} for EfficientNet",
            task.classes,
            coloured(task.train, colours),
            coloured(task.test, colours),
        ),
        "retain": ll.tasks.agreement(model, known, train=other, name="parts of photographs"),
        "targets": "all-conv",
    }


def minilm_long() -> Setting:
    known = minilm()
    return {"model": known.model, "task": known.task, "retain": known.retain}


def of_efficientnet() -> Grids:
    rates = (2.5e-4, 5e-4, 1e-3, 2e-3)
    methods = [LORA, penalized(), penalized(0.1), anchored(LORA)]
    usual = ll.Grid(ll.windows(rank=RANK, count=5), lr=rates, seed=range(4), baselines=methods)
    more = few(rates, range(4, 7))
    lower = ll.Grid(ll.windows(rank=RANK, count=3), lr=rates[0] / 2, seed=range(7))
    fierce = ll.Grid(lr=(1e-5, 3e-5, 1e-4), seed=range(4), baselines=[ll.FullFineTuning(), OFT])
    refused = ll.Grid(lr=1e-3, baselines=[LORA, KASA, OSF, SHIRA])  # rows with PEFT's reasons
    return [(grid, {}) for grid in (usual, more, lower, fierce, refused)]


SCALES = {"new_classes": 0.5, "digits": 1.0}  # of the best rates
SETTINGS = {
    "new_classes": partial(vision, known_classes),
    "digits": partial(vision, after_fashion(digits)),
}


def sweeps() -> Iterator[tuple[str, Sweep]]:
    rates = {
        name: tuple(scale * rate for rate in (2.5e-3, 5e-3, 1e-2, 2e-2)) for name, scale in SCALES.items()
    }
    for name, setting in SETTINGS.items():
        yield f"{name}_opponents", Sweep(setting, opponents(SCALES[name], seeds=7), drift=True)
        mlp = ll.Grid(lr=rates[name], seed=range(7), baselines=[LORA])
        yield f"{name}_mlp", Sweep(setting, [(mlp, {"targets": "all-mlp"})])
    for name, setting in SETTINGS.items():
        grid = ll.Grid(ll.windows(rank=RANK, count=5), lr=rates[name][1:3], seed=range(5))
        yield f"{name}_metric", Sweep(setting, [(grid, {})], drift=True, metrics=metrics_of, usual=ENDS)
    for name, setting in SETTINGS.items():
        grids = [(few(rates[name][:3], range(3), rank), {}) for rank in (4, 32, 64)]
        yield f"{name}_ranks", Sweep(setting, grids, usual=ENDS)
        grids = [(few(rates[name][:3], range(3)), {"alpha": alpha}) for alpha in (2.0 * RANK, RANK / 4)]
        yield f"{name}_alpha", Sweep(setting, grids, usual=ENDS)
    for name, setting in SETTINGS.items():
        long, longest = few(rates[name][:2], range(4)), few(rates[name][:1], range(3))
        grids = [(long, {"steps": 4 * STEPS}), (longest, {"steps": 16 * STEPS})]
        yield f"{name}_lengths", Sweep(setting, grids)
    usual = {"steps": 40, "batch_size": 16, "evaluations": 4}
    for name, task, colours in (
        ("efficientnet_fashion", ll.tasks.bundled.fashion, False),
        ("efficientnet_digits", ll.tasks.bundled.digits, True),
    ):
        yield name, Sweep(lambda t=task, c=colours: efficientnet(t(), c), of_efficientnet(), usual=usual)
    usual = {"steps": 400, "batch_size": 32, "evaluations": 2}
    windows = [ll.Window(RANK, position=position) for position in (0.5, 1)]
    grid = ll.Grid(windows, lr=1e-3, seed=range(3), baselines=[LORA, penalized()])
    yield "minilm_long", Sweep(minilm_long, [(grid, {})], usual=usual)


def run(name: str, store: Path, jobs: int | None) -> None:
    sweep = dict(sweeps())[name]
    setting = sweep.setting()
    model, targets = setting["model"], setting.get("targets")
    spectra = [None]
    if sweep.metrics is not None:
        spectra = [
            ll.spectra(model, targets, metric=metric, progress=False) for metric in sweep.metrics(setting)
        ]
    for known in spectra:
        for grid, settings in sweep.grids:
            arguments = setting | sweep.usual | settings
            ll.sweep(grid, spectra=known, drift=sweep.drift, store=store, jobs=jobs, **arguments)


if __name__ == "__main__":
    main(__doc__, dict(sweeps()), run)
