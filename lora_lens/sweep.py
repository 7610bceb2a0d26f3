"""Many runs: a grid of windows, learning rates and seeds, kept on disk as the runs finish."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from joblib import Parallel, delayed
from peft import PeftModel
from torch import nn

from lora_lens.adapter import attach, chosen_layers, planned
from lora_lens.drift import drift, drift_between
from lora_lens.errors import InputError, InputTypeError
from lora_lens.evaluation import example_features
from lora_lens.feature_change import difference
from lora_lens.layers import Targets
from lora_lens.methods import (
    FullFineTuning,
    LinearProbe,
    LoRA,
    Method,
    PeftStart,
    Penalized,
    Variant,
    inner_method,
    penalty_of,
)
from lora_lens.neighbours import neighbour_agreement
from lora_lens.peft_starts import attach_start, planned_start
from lora_lens.placement import ByLayer
from lora_lens.progress import progress_bar
from lora_lens.rotation import rotations
from lora_lens.spectrum import SpectrumSet
from lora_lens.spectrum import spectra as compute_spectra
from lora_lens.store import experiment_identity, open_store, read_run, row_of, run_name, write_atomically
from lora_lens.tasks import Task
from lora_lens.training import Training, finetune
from lora_lens.window import Placement, Window

EXAMPLES_OF_FEATURES = 500  # of the retained task, to compare features on
METHOD_NAMES = {
    Window: "window",
    LoRA: "LoRA",
    LinearProbe: "linear probe",
    FullFineTuning: "full fine-tuning",
}


@dataclass(frozen=True)
class Grid:
    """Every method at every learning rate with every seed.

    Attributes:
        window: the windows, such as ``windows(rank=8, count=9)``; other placements and mappings of
            target patterns to placements may be among them or among the baselines.
        lr: learning rates.
        seed: seeds.
        baselines: other methods to run beside the windows, also PEFT's own starts and methods under
            a penalty (:class:`lora_lens.methods.PeftStart`, :class:`lora_lens.methods.Penalized`).
    """

    window: Sequence[Window] = ()
    lr: Sequence[float] = (1e-3,)
    seed: Sequence[int] = (0,)
    baselines: Sequence[Method] = ()

    def __post_init__(self) -> None:
        for name in ("window", "lr", "seed", "baselines"):
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, (Sequence, range)) else (value,)
            values = tuple(ByLayer(v) if isinstance(v, Mapping) else v for v in values)
            if len(set(values)) != len(values):
                raise InputError(f"{name} holds the same value twice: {values}")
            object.__setattr__(self, name, values)
        for method in self.methods:
            if not isinstance(method, (Placement, ByLayer, PeftStart, Penalized, *METHOD_NAMES)):
                raise InputTypeError(f"a grid is made of windows and baselines, not {method!r}")
        if not (self.methods and self.lr and self.seed):
            raise InputError("a grid needs at least one window or baseline, one lr and one seed")

    @property
    def methods(self) -> tuple[Method, ...]:
        return (*self.window, *self.baselines)

    def __len__(self) -> int:
        return len(self.methods) * len(self.lr) * len(self.seed)

    def __iter__(self) -> Iterator[tuple[Method, float, int]]:
        """(method, lr, seed), a whole seed before the next, so that a stopped sweep is balanced."""
        return ((m, lr, s) for s in self.seed for lr in self.lr for m in self.methods)


@dataclass(frozen=True, eq=False)
class Experiment:
    """What all runs of a sweep share."""

    model: nn.Module
    task: Task
    retain: Task
    watch: tuple[Task, ...]
    layers: dict[Method, list[str]]
    alpha: float | None
    variant: Variant
    spectra: SpectrumSet | None
    training: Training

    def describe(self, method: Method, lr: float, seed: int) -> dict[str, object]:
        """The plain values that describe one run; their hash is its identity."""
        variant = {} if self.variant == Variant() else {"variant": str(self.variant)}
        settings = asdict(replace(self.training, lr=float(lr), seed=int(seed)))
        if self.training.precision == Training.precision:  # so that earlier versions' runs are found
            del settings["precision"]
        return {
            **named_method(method),
            "alpha": None if self.alpha is None else float(self.alpha),
            "targets": " ".join(self.layers[method]),
            **variant,
            **settings,
        }


def sweep(
    grid: Grid,
    *,
    model: nn.Module,
    task: Task,
    retain: Task,
    watch: Sequence[Task] = (),
    store: str | Path | None = None,
    targets: Targets = None,
    alpha: float | None = None,
    variant: Variant | None = None,
    spectra: SpectrumSet | None = None,
    jobs: int | None = None,
    progress: bool = True,
    **settings: object,
) -> pd.DataFrame:
    """Run every point of ``grid`` on a fresh copy of ``model``; one factorization serves all windows.

    Args:
        grid: what to vary.
        model, task, retain, watch, targets, alpha, variant: as for ``attach`` and ``finetune``; what was
            watched is in :func:`lora_lens.watched`.
        store: a folder that keeps one small file per finished run. A sweep
            that was interrupted, or a larger grid, runs only what is missing.
            Without it nothing is kept.
        spectra: of this model, if they are at hand. With all vectors, every run's drift is measured and
            kept, too: see :func:`lora_lens.drifts`.
        jobs: processes; default all cores (one where there is a GPU). Every
            run computes with one thread, so the numbers do not depend on it.
        settings: of :class:`lora_lens.Training`, the same for all runs.

    Returns:
        One row per run in the grid's order. Columns: run (identity), method
        (window, LoRA, linear probe, full fine-tuning, or another method in words), rank, position,
        start, alpha, variant (if one was given), lr, seed and the other settings; trainable (adapter
        parameters trained, without the new head); loss (nats, mean since the last
        evaluation, without a penalty); accuracy, retained_before, retained_accuracy (in [0, 1]);
        forgetting (retained_before - retained_accuracy; positive = forgot); retained_loss and loss_rise
        (its rise over the run, nats per example, of a language task per token; positive = forgot);
        diverged.

    Raises:
        ValueError: as ``attach`` and ``finetune`` do, before the first run;
            or ``store`` holds a different experiment.
    """
    if {"lr", "seed"} & set(settings):
        raise InputError("lr and seed are the grid's: give them to Grid, not to sweep")
    training, watch = Training(**settings), tuple(watch)
    variant = variant or Variant()
    usual = list(chosen_layers(model, targets, spectra))
    choices = {"targets": targets, "alpha": alpha, "spectra": spectra, "variant": variant}
    plans = {method: _planned(model, method, choices) for method in grid.methods}
    for lr in grid.lr:
        replace(training, lr=lr)  # raises for an impossible rate
    one, watched = (task.subset(1, 1), retain.subset(1, 1)), [t.subset(1, 1) for t in watch]
    once = {"steps": 1, "evaluations": 2, "watch": watched, "progress": False}
    for penalty in {penalty_of(method) for method in grid.methods} | {None}:
        rehearsal = attach(model, LoRA(1), targets=usual, variant=Variant(dora=variant.dora))
        finetune(rehearsal, *one, penalty=penalty, batch_size=training.batch_size, **once)
    if any(isinstance(method, LinearProbe) for method in grid.methods):
        finetune(attach(model, LinearProbe()), *one, **once)

    with open_store(store, experiment_identity(model, task, retain, watch)) as folder:
        if spectra is None:
            wanted = _placements_by_layer(plans.values())
            spectra = (
                compute_spectra(model, list(wanted), vectors=wanted, progress=progress) if wanted else None
            )
        layers = {method: list(plan) or usual for method, plan in plans.items()}
        experiment = Experiment(model, task, retain, watch, layers, alpha, variant, spectra, training)
        plan = [(point, folder / f"{run_name(experiment.describe(*point))}.json") for point in grid]
        run_missing(partial(_run_and_keep, experiment), plan, jobs, shown=progress, desc="sweep", unit="run")
        return pd.DataFrame([row_of(read_run(path)) for _, path in plan])


def run_missing(
    run: Callable[[Any, Path], None], plan: Sequence[tuple[Any, Path]], jobs: int | None, **bar: object
) -> None:
    """Run every point whose file is not there yet, in several processes.

    Args:
        run: does one point, and writes its file.
        plan: points, with their files.
        jobs: processes; default all cores, or one where there is a GPU.
        bar: of :func:`lora_lens.progress.progress_bar`.
    """
    missing = [(point, path) for point, path in plan if read_run(path) is None]
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    workers = min(jobs or cores, max(1, len(missing)))
    runs = Parallel(n_jobs=workers, return_as="generator_unordered")(
        delayed(run)(point, path) for point, path in missing
    )
    with progress_bar(total=len(plan), initial=len(plan) - len(missing), **bar) as shown:
        for _ in runs:
            shown.update()


def named_method(method: Method) -> dict[str, object]:
    """What tells a method apart in a table."""
    return {
        "method": METHOD_NAMES.get(type(method)) or str(method),
        "rank": getattr(method, "rank", None),
        "position": getattr(method, "position", None),
        "start": getattr(method, "start", None),
    }


def _planned(
    model: nn.Module, method: Method, choices: Mapping[str, object]
) -> dict[str, Placement | LoRA | PeftStart]:
    inner = inner_method(method)
    return (planned_start if isinstance(inner, PeftStart) else planned)(model, inner, **choices)


def _attached(experiment: Experiment, method: Method, seed: int) -> nn.Module:
    inner = inner_method(method)
    same = {"targets": experiment.layers[method], "alpha": experiment.alpha, "seed": seed}
    if isinstance(inner, PeftStart):
        return attach_start(experiment.model, inner, experiment.task, experiment.retain, **same)
    return attach(experiment.model, inner, variant=experiment.variant, spectra=experiment.spectra, **same)


def _placements_by_layer(plans: Iterable[Mapping[str, object]]) -> dict[str, list[Placement]]:
    wanted: dict[str, list[Placement]] = {}
    for plan in plans:
        for name, placement in plan.items():
            if isinstance(placement, Placement):
                wanted.setdefault(name, []).append(placement)
    return wanted


def _run_and_keep(experiment: Experiment, point: tuple[Method, float, int], path: Path) -> None:
    method, lr, seed = point
    with one_thread():
        adapted = _attached(experiment, method, seed)
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        config = replace(experiment.training, lr=lr, seed=seed)
        run = finetune(
            adapted,
            experiment.task,
            experiment.retain,
            config,
            penalty=penalty_of(method),
            watch=experiment.watch,
            progress=False,
        )
        mechanism = {} if run.diverged else _mechanism(experiment, method, adapted)
    result = {
        "trainable": trainable,
        "loss": float(run.curve["loss"].iloc[-1]),
        "accuracy": run.accuracy,
        "retained_before": run.retained_before,
        "retained_accuracy": run.retained_accuracy,
        "forgetting": run.forgetting,
        "retained_loss": float(run.curve["retained_loss"].iloc[-1]),
        "loss_rise": run.loss_rise,
        "diverged": run.diverged,
    }
    record = {
        "run": path.stem,
        "settings": experiment.describe(*point),
        "result": result,
        "curve": run.curve.to_dict("list"),
        "items": run.items.to_dict("list"),
        **({} if run.watched is None else {"watched": run.watched.to_dict("list")}),
        **mechanism,
        "seconds": run.seconds,
    }
    write_atomically(path, record)


def _mechanism(experiment: Experiment, method: Method, adapted: nn.Module) -> dict[str, object]:
    """What the run did to weights and features, if the spectra tell; nothing for a linear probe."""
    known = experiment.spectra or {}
    names = experiment.layers[method]
    if not all(name in known and known[name].has_all_vectors for name in names):
        return {}
    spectra = SpectrumSet([known[name] for name in names])
    if isinstance(adapted, PeftModel):
        moved = drift(adapted, spectra).merge(rotations(adapted, spectra), on="layer")
    elif any(p.requires_grad for p in adapted.parameters()):
        moved = drift_between(experiment.model, adapted, spectra)
    else:
        return {}
    some = experiment.retain.test.sampled(EXAMPLES_OF_FEATURES)
    before, after = (example_features(m, experiment.retain, some) for m in (experiment.model, adapted))
    return {
        "drift": {column: [short(v) for v in values] for column, values in moved.to_dict("list").items()},
        "features": difference(before, after) | {"neighbours": neighbour_agreement(before, after)},
    }


def short(value: object) -> object:
    """Six digits are more than one run's noise, and half the space."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
