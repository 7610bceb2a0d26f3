"""The runs of a sweep: one by itself, or several as one program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from lora_lens._base.errors import LoraLensError
from lora_lens._base.warning import warn
from lora_lens.adapters.attaching import attach
from lora_lens.adapters.methods import MethodLike, as_method
from lora_lens.adapters.variant import Variant
from lora_lens.experiments.identity import exact, exact_method, named_method, named_record, reads_spectra
from lora_lens.experiments.pretrained import EXAMPLES_OF_FEATURES, Pretrained
from lora_lens.forgetting.basis_rotation import rotations
from lora_lens.forgetting.neighbours import neighbour_agreement
from lora_lens.forgetting.representations import difference
from lora_lens.forgetting.weight_drift import drift, drift_between, merged_copy
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.tasks.evaluation import example_features
from lora_lens.tasks.task import Task
from lora_lens.training.finetuning import finetune
from lora_lens.training.fused_loop import FusedLoop, factors_of, set_factors
from lora_lens.training.lean_forward import lean_layers
from lora_lens.training.record import Record
from lora_lens.training.regularizers.base import regularizer_of
from lora_lens.training.run import Run
from lora_lens.training.settings import Training

Point = tuple[MethodLike, float, int]  # method, learning rate, seed
RESULTS = (
    "trainable", "loss", "accuracy", "retained_before", "retained_accuracy", "forgetting", "retained_loss",
    "loss_rise",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Experiment:
    """What all runs of a sweep share."""

    model: nn.Module
    task: Task
    retain: Task
    watch: tuple[Task, ...]
    layers: dict[MethodLike, list[str]]
    alpha: float | None
    variant: Variant
    spectra: SpectrumSet | None
    drifts_by: SpectrumSet | None  # plain, with all vectors; None where no drift is measured
    training: Training
    pretrained: Pretrained | None = None

    def record(self, method: MethodLike, lr: float, seed: int) -> dict[str, object]:
        """What is known of a run before it runs: its name, and its settings for people and exactly."""
        # A metric changes how a window is built, and nothing of other methods.
        metric = self.spectra.metric if self.spectra and reads_spectra(method) else None
        built = [*([] if self.variant == Variant() else [str(self.variant)]), *([metric] if metric else [])]
        variant = {"variant": "; ".join(built)} if built else {}
        training = asdict(replace(self.training, lr=lr, seed=seed))
        if self.training.precision == Training.precision:  # so that earlier versions' runs are found
            del training["precision"]
        settings = {
            **named_method(method),
            "alpha": None if self.alpha is None else float(self.alpha),
            "targets": " ".join(self.layers[method]),
            **variant,
            **{name: exact(value, name) for name, value in training.items()},
        }
        return named_record(settings, exact_method(method))

    def lost(self, point: tuple[MethodLike, float, int]) -> dict[str, object]:
        """The record of a run that has no results."""
        return self.record(*point) | {"result": dict.fromkeys(RESULTS, float("nan")) | {"diverged": False}}


def run_one(experiment: Experiment, point: Point, _path: Path | None = None) -> dict[str, object]:
    """The record of one run."""
    method, lr, seed = point
    adapted = _attached(experiment, method, seed)
    trainable = _count_trainable(adapted)
    run = finetune(
        adapted,
        experiment.task,
        experiment.retain,
        replace(experiment.training, lr=lr, seed=seed),
        regularizer=regularizer_of(method),
        before=experiment.pretrained.before(seed),
        watch=experiment.watch,
        progress=False,
    )
    return _record(experiment, point, adapted, trainable, run)


def run_together(experiment: Experiment, points: Sequence[Point]) -> list[dict[str, object]]:
    """The records of several runs, trained as one program; where memory does not hold them, half at a time.

    Raises:
        CannotFuse: they must be trained one by one.
    """
    try:
        return _fused(experiment, points)
    except RuntimeError as error:
        if len(points) == 1 or not should_reduce_batch_size(error):
            raise
    half = len(points) // 2
    warn(f"memory does not hold {len(points)} runs at once; they are trained {half} at a time")
    return [*run_together(experiment, points[:half]), *run_together(experiment, points[half:])]


def groups_of(experiment: Experiment, points: Sequence[Point], size: int) -> list[list[Point]]:
    """The points in their order, but those that may be trained together in groups of at most ``size``.

    The groups depend on the points alone, so that a sweep that goes on forms the same ones.
    """
    groups: list[list[Point]] = []
    open_ones: dict[object, list[Point]] = {}
    for point in points:
        key = _shape(experiment, point[0]) if size > 1 else None
        if key is None or len(open_ones.get(key, ())) in (0, size):
            groups.append([point])
            if key is not None:
                open_ones[key] = groups[-1]
        else:
            open_ones[key].append(point)
    return groups


def _shape(experiment: Experiment, method: MethodLike) -> object:
    """What methods that can be trained together have in common; None for one that cannot be."""
    variant, rank = experiment.variant, getattr(method, "rank", None)
    plain = not (variant.dora or variant.dropout or variant.dtype) and variant.train == "both"
    if not plain or experiment.training.precision != "float32" or experiment.pretrained.features is None:
        return None
    return (rank, *experiment.layers[method]) if as_method(method).trains_factors and rank else None


def _fused(experiment: Experiment, points: Sequence[Point]) -> list[dict[str, object]]:
    factors, counts, records = [], [], []
    for method, lr, seed in points:
        adapted = _attached(experiment, method, seed)
        factors.append(factors_of(adapted))
        counts.append(_count_trainable(adapted))
        tests = [(experiment.task, experiment.task.new_readout(adapted, seed))]
        tests += [(task, task.own_readout(adapted)) for task in (experiment.retain, *experiment.watch)]
        config = replace(experiment.training, lr=lr, seed=seed)
        records.append(Record(config, tests[0], tests[1], tests[2:], experiment.pretrained.before(seed)))
        del adapted  # beside the model, only factors are kept
    loop = FusedLoop(experiment.model, factors, records)
    loop.require_agreement()
    runs, found = loop.run(), []
    for number, (point, run) in enumerate(zip(points, runs, strict=True)):
        adapted = _attached(experiment, point[0], point[2])
        set_factors(adapted, loop.factors(number))
        adapted.to(loop.device)
        found.append(_record(experiment, point, adapted, counts[number], run))
    return found


def _attached(experiment: Experiment, method: MethodLike, seed: int) -> nn.Module:
    return attach(
        experiment.model,
        method,
        targets=experiment.layers[method],
        alpha=experiment.alpha,
        spectra=experiment.spectra,
        variant=experiment.variant,
        seed=seed,
        task=experiment.task,
        retain=experiment.retain,
    )


def _count_trainable(adapted: nn.Module) -> int:
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def _record(
    experiment: Experiment, point: Point, adapted: nn.Module, trainable: int, run: Run
) -> dict[str, object]:
    method = point[0]
    diverged = ended_without_numbers(run)
    values = (
        trainable,
        float(run.curve["loss"].iloc[-1]),
        run.accuracy,
        run.retained_before,
        run.retained_accuracy,
        run.forgetting,
        float(run.curve["retained_loss"].iloc[-1]),
        run.loss_rise,
    )
    return {
        **experiment.record(*point),
        "result": dict(zip(RESULTS, values, strict=True)) | {"diverged": diverged},
        "curve": run.curve.to_dict("list"),
        "items": run.items.to_dict("list"),
        **({} if run.watched is None else {"watched": run.watched.to_dict("list")}),
        **({} if diverged else _mechanism(experiment, method, adapted)),
        "seconds": run.seconds,
    }


def ended_without_numbers(run: Run) -> bool:
    """Whether it diverged, be it with the last step, which only the tests after it show."""
    last = run.curve.iloc[-1]
    losses = last[["test_loss"] if run.items is None else ["test_loss", "retained_loss"]]
    return run.diverged or not np.isfinite(losses.to_numpy(float)).all()


def _mechanism(experiment: Experiment, method: MethodLike, adapted: nn.Module) -> dict[str, object]:
    """What the run did to weights and features, if that is asked; nothing for a linear probe."""
    if experiment.drifts_by is None:
        return {}
    spectra = SpectrumSet([experiment.drifts_by[name] for name in experiment.layers[method]])
    if hasattr(adapted, "attachment"):
        moved = drift(adapted, spectra).merge(rotations(adapted, spectra), on="layer")
    elif any(p.requires_grad for p in adapted.parameters()):
        if (whole := merged_copy(adapted)) is None:
            return {}
        moved = drift_between(experiment.model, whole, spectra)
    else:
        return {}
    some = experiment.retain.test.sampled(EXAMPLES_OF_FEATURES)
    before = experiment.pretrained.compared
    with lean_layers(adapted, "float32"):
        after = example_features(adapted, experiment.retain, some)
    try:
        neighbours = neighbour_agreement(before, after)
    except LoraLensError:  # too few examples, or features without a direction: one measure less
        neighbours = float("nan")
    return {
        "drift": {column: [short(v) for v in values] for column, values in moved.to_dict("list").items()},
        "features": difference(before, after) | {"neighbours": neighbours},
    }


def short(value: object) -> object:
    """Six digits are more than one run's noise, and half the space."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
