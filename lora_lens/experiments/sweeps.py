"""Many runs: a grid of windows, learning rates and seeds, kept on disk as the runs finish."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from itertools import chain, product
from numbers import Real
from pathlib import Path

import torch
from torch import nn

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.naming import Targets
from lora_lens._base.validate import flag, instance, number, seed_number, sequence, shown, whole_number
from lora_lens.adapters.attaching import attach, planned
from lora_lens.adapters.low_rank import chosen_layers
from lora_lens.adapters.methods import LinearProbe, LoRA, Method, MethodLike, as_method
from lora_lens.adapters.variant import Variant
from lora_lens.experiments.engines.attempts import by_itself
from lora_lens.experiments.engines.choice import chosen_engine
from lora_lens.experiments.engines.missing_runs import kept_records, missing, run_missing
from lora_lens.experiments.engines.protocol import Planned, Shared
from lora_lens.experiments.identity import exact, experiment_identity
from lora_lens.experiments.pretrained import ask_pretrained
from lora_lens.experiments.results import Sweep
from lora_lens.experiments.runs import Experiment, Point, groups_of, run_one, run_together
from lora_lens.experiments.store import experiment, new_experiment, open_store, require_writable
from lora_lens.spectrum.factorizing import spectra as compute_spectra
from lora_lens.spectrum.placement import ByLayer
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.spectrum.window import Placement, Window
from lora_lens.tasks.task import Task
from lora_lens.training.finetuning import finetune
from lora_lens.training.regularizers.base import regularizer_of
from lora_lens.training.settings import Training, training_with

METHODS = (Method, Placement, ByLayer)
FUSED_ON_ACCELERATOR = 16  # runs: a small run by itself does little but launch kernels
A_METHOD = "a window, such as ll.Window(8, 0.5), or another method"
A_TASK = "a lora_lens.Task, such as those of ll.tasks.bundled, ll.tasks.folder_task or ll.tasks.text_task"


@dataclass(frozen=True)
class Grid:
    """Every method at every learning rate with every seed.

    Attributes:
        window: the windows, such as ``windows(rank=8, count=9)``; other placements and mappings of
            target patterns to placements may be among them or among the baselines.
        lr: learning rates.
        seed: seeds.
        baselines: other methods to run beside the windows, also PEFT's and methods under a
            regularizer (:class:`lora_lens.PeftMethod`, :class:`lora_lens.training.Regularized`).

    Each may be a single value. A placement of your own must be a frozen dataclass: its fields and the code of
    its methods are what its runs are found by in a store (what those methods read elsewhere is not).

    Raises:
        ValueError: a value is there twice, a rate is not positive, or there is nothing to run.
        TypeError: a value is of another type.

    Example:
        >>> import lora_lens as ll
        >>> grid = ll.Grid(ll.windows(8, count=9), lr=[2e-3, 5e-3], seed=range(3), baselines=[ll.LoRA(8)])
        >>> len(grid)  # (9 + 1) * 2 * 3 runs
        60
    """

    window: Sequence[Window] = ()
    lr: Sequence[float] = (1e-3,)
    seed: Sequence[int] = (0,)
    baselines: Sequence[MethodLike] = ()

    def __post_init__(self) -> None:
        for name in ("window", "baselines"):
            given = sequence(getattr(self, name), name, "windows and other methods", (*METHODS, Mapping))
            methods = tuple(ByLayer(m) if isinstance(m, Mapping) else m for m in given)
            for method in methods:
                instance(method, METHODS, f"each of {name}", A_METHOD)
            object.__setattr__(self, name, methods)
        rates, seeds = (_one_or_more(getattr(self, name), name) for name in ("lr", "seed"))
        object.__setattr__(self, "lr", tuple(number(rate, "lr", above=0) for rate in rates))
        object.__setattr__(self, "seed", tuple(seed_number(seed) for seed in seeds))
        for name in ("window", "lr", "seed", "baselines"):
            _require_different(getattr(self, name), name)
        _require_different(self.methods, "window and baselines together")
        if not (self.methods and self.lr and self.seed):
            raise InputError("a grid needs at least one window or baseline, one lr and one seed")

    @property
    def methods(self) -> tuple[MethodLike, ...]:
        return (*self.window, *self.baselines)

    def __len__(self) -> int:
        return len(self.methods) * len(self.lr) * len(self.seed)

    def __iter__(self) -> Iterator[tuple[MethodLike, float, int]]:
        """(method, lr, seed), a whole seed before the next, so that a stopped sweep is balanced."""
        return ((m, lr, s) for s in self.seed for lr in self.lr for m in self.methods)


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
    drift: bool | None = None,
    jobs: int | None = None,
    engine: object = None,
    fuse: int | None = None,
    each_seed: Callable[[Sweep], object] | None = None,
    progress: bool = True,
    **settings: object,
) -> Sweep:
    """Run every point of ``grid`` on a fresh copy of ``model``; one factorization serves all windows.

    Args:
        grid: what to vary.
        model: the pretrained model; it is left as it was.
        task: what to learn.
        retain: what the model can do and should not forget.
        watch: more that it can do; the results are in :meth:`lora_lens.Sweep.watched`.
        targets: which layers, as for :func:`lora_lens.attach`.
        alpha: LoRA's alpha, as there.
        variant: how the adapters are built, as there.
        store: a folder that keeps one small file per finished run. A sweep
            that was interrupted, or a larger grid, runs only what is missing.
            Without it nothing is kept.
        spectra: of this model, if they are at hand. Spectra in a metric make windows in it, which the column
            variant tells from plain ones.
        drift: whether every run's is measured and kept, see :meth:`lora_lens.Sweep.drifts`, which makes most
            of what a store takes. Default: where ``spectra`` hold all vectors of all layers. True computes
            those that are missing; by spectra in a metric no drift is measured, so plain ones are computed.
        jobs: how many processes; default one per core that may be used, or one for each GPU. Every run
            computes with one thread, so the numbers do not depend on it.
        engine: who computes the runs: None for processes of this machine, a dask.distributed.Client for the
            workers of its cluster, or "ray". The table is the same; see docs/clusters.md.
        fuse: how many runs are trained as one program, where they differ in window (or ordinary LoRA of the
            same rank), rate and seed alone, in float32, with a head for the new task. Their numbers are those
            of single runs up to rounding. Default 1, as processors gain little by it, and 16 where there is a
            GPU. Groups depend on the grid, not on what is there already or on who computes them.
        each_seed: is called with a Sweep of all finished seeds, first if there are any at the start and then
            whenever another one is through: to draw a first picture long before the last run ends.
        progress: show a bar.
        settings: of :class:`lora_lens.Training`, the same for all runs.

    A run that fails, even one whose process is killed because memory ran out, ends no other: its row has the
    reason and no results, a warning counts such runs, and the next call tries them again.

    Returns:
        A :class:`lora_lens.Sweep`, whose table has one row per run in the grid's order. Columns: run
        (identity), method (window, LoRA, linear probe, full fine-tuning, or another method in words), rank,
        position, start, alpha, variant (if one was given, or a metric), lr, seed and the other settings;
        trainable (adapter parameters trained, without the new head); loss (nats, mean since the last
        evaluation, without a regularizer); accuracy, retained_before, retained_accuracy (in [0, 1]);
        forgetting (retained_before - retained_accuracy; positive = forgot); retained_loss and loss_rise (its
        rise over the run, nats per example, of a language task per token; positive = forgot); diverged;
        failed and reason (why, else ""). Two methods that are described alike have a few digits of their
        identity behind.

    Raises:
        ValueError, TypeError: as ``attach`` and ``finetune`` do, before the first run; ``store`` holds a
            different experiment or is no folder; or all runs failed, with the first one's reason (of an error
            that is not ours RuntimeError).
        OSError: ``store`` cannot be written to.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> once = {"steps": 2, "batch_size": 10, "jobs": 1, "progress": False}
        >>> ll.sweep(ll.Grid(ll.windows(rank=2, count=3)), model=model, task=task, retain=task, **once)
        <Sweep: 3 runs; 3 windows; 1 learning rate; 1 seed>
    """
    instance(grid, Grid, "grid", "a lora_lens.Grid of windows, learning rates and seeds")
    watch = sequence(watch, "watch", "tasks", Task)
    if retain is None:
        raise InputTypeError(
            "retain must be the task that the model knows, as a sweep measures what is forgotten of it; to "
            "train without one there is ll.finetune"
        )
    for name, given in (("task", task), ("retain", retain), *(("each of watch", one) for one in watch)):
        instance(given, Task, name, A_TASK)
    require_shared(model, variant, spectra)
    training = shared_training("sweep", sweep, settings)
    engine, progress, fuse = chosen_engine(engine, jobs), flag(progress, "progress"), _checked_fuse(fuse)
    if each_seed is not None and not callable(each_seed):
        raise InputTypeError(f"each_seed must be a function of a Sweep, not {shown(each_seed)}")
    require_writable(store)
    drift = None if drift is None else flag(drift, "drift")
    variant = variant or Variant()
    usual = list(chosen_layers(model, targets, spectra))
    choices = {"targets": targets, "alpha": alpha, "spectra": spectra, "variant": variant}
    plans = {method: planned(model, method, **choices) for method in grid.methods}
    for lr, seed in product(grid.lr, grid.seed):
        replace(training, lr=lr, seed=seed)  # raises where they are impossible
    one, watched = (task.subset(1, 1), retain.subset(1, 1)), [t.subset(1, 1) for t in watch]
    once = {"steps": 1, "evaluations": 2, "watch": watched, "progress": False}
    with by_itself():
        for regularizer in {regularizer_of(method) for method in grid.methods} | {None}:
            rehearsal = attach(model, LoRA(1), targets=usual, variant=Variant(dora=variant.dora))
            finetune(rehearsal, *one, regularizer=regularizer, batch_size=training.batch_size, **once)
        if not all(as_method(method).trains_weights for method in grid.methods):
            finetune(attach(model, LinearProbe()), *one, **once)

    identity = experiment_identity(model, task, retain, watch)
    with open_store(store, identity) as folder:
        layers = {method: list(plan) or usual for method, plan in plans.items()}
        drifts_by = _spectra_for_drifts(model, drift, spectra, chain.from_iterable(layers.values()), progress)
        if spectra is None:
            spectra = drifts_by
        if spectra is None:
            wanted = _placements_by_layer(plans.values())
            spectra = (
                compute_spectra(model, list(wanted), vectors=wanted, progress=progress) if wanted else None
            )
        shared = Experiment(model, task, retain, watch, layers, alpha, variant, spectra, drifts_by, training)
        plan = [(point, folder.absolute() / f"{shared.record(*point)['run']}.json") for point in grid]
        bar = {"shown": progress, "desc": "sweep", "unit": "run"}
        groups: list[list[Point]] = []
        if missing(plan):
            known = ask_pretrained(model, task, retain, watch, training.precision)
            shared = replace(shared, pretrained=known)
            groups = [group for group in groups_of(shared, list(grid), fuse) if len(group) > 1]
        runs = Shared(partial(run_one, shared), shared.lost, partial(run_together, shared))
        made = new_experiment(identity) if store is None else experiment(store)
        sweep_of = partial(Sweep.of, experiment=made, path=None if store is None else Path(store))
        told = None if each_seed is None else _by_seed(plan, lambda records: each_seed(sweep_of(records)))
        records = run_missing(runs, plan, engine, groups=groups, told=told, **bar)
    return sweep_of(records)


def _by_seed(
    plan: Sequence[Planned], tell: Callable[[list[dict]], object]
) -> Callable[[Iterable[Path]], None]:
    """A function of files of runs that have ended, which tells of all finished seeds when one more is.

    Of those that are there already it tells at once.
    """
    seeds: dict[int, list[Path]] = {}
    for (_, _, seed), path in plan:
        seeds.setdefault(seed, []).append(path)
    absent = {path for _, path in missing(plan)}
    left = {seed: absent.intersection(paths) for seed, paths in seeds.items()}

    def tell_of_all() -> None:
        through = [path for seed, paths in seeds.items() if not left[seed] for path in paths]
        if through:
            tell(kept_records(through))

    def told(ended: Iterable[Path]) -> None:
        before = sum(map(bool, left.values()))
        for paths in left.values():
            paths.difference_update(ended)
        if sum(map(bool, left.values())) < before:
            tell_of_all()

    tell_of_all()
    return told


def _checked_fuse(fuse: int | None) -> int:
    """How many runs are trained as one program: by default one, or many where there is an accelerator."""
    if fuse is None:
        return FUSED_ON_ACCELERATOR if torch.accelerator.is_available() else 1
    return whole_number(fuse, "fuse, the number of runs that are trained together,", least=1)


def require_shared(model: nn.Module, variant: Variant | None, spectra: SpectrumSet | None) -> None:
    """What sweep and continual are given alike."""
    instance(model, nn.Module, "model", "a torch.nn.Module, the pretrained model")
    if variant is not None:
        instance(variant, Variant, "variant", "a lora_lens.Variant, such as ll.Variant(rslora=True)")
    if spectra is not None:
        instance(spectra, SpectrumSet, "spectra", "what ll.spectra(model) returns")


def shared_training(name: str, function: Callable, settings: Mapping[str, object]) -> Training:
    """The settings that all runs share.

    Raises:
        InputTypeError: there is no such setting.
        InputError: it is one of the grid's, or has an impossible value.
    """
    for taken in ("lr", "seed"):
        if taken in settings:
            raise InputError(f"lr and seed are the grid's: give them to Grid, not to {name}")
    return training_with(settings, name, also=list(signature(function).parameters)[:-1])


def _one_or_more(value: object, name: str) -> tuple[object, ...]:
    """One number, or several."""
    return (value,) if getattr(value, "ndim", None) == 0 else sequence(value, name, "numbers", Real)


def _require_different(values: Sequence[object], name: str) -> None:
    """By equality, and for methods also by content: two names for one run are one too many."""
    try:
        same = len(set(values)) < len(values)
    except TypeError:  # from hash()
        raise InputTypeError(
            f"{name} holds something that cannot be hashed, and so cannot be told apart: {shown(values)}; a "
            "placement of your own must be a frozen dataclass, with tuples for lists and arrays"
        ) from None
    contents = {json.dumps(exact(value, f"one of {name}")) for value in values}
    if same or len(contents) < len(values):
        raise InputError(f"{name} holds the same value twice: {values}")


def _spectra_for_drifts(
    model: nn.Module, wanted: bool | None, given: SpectrumSet | None, layers: Iterable[str], progress: bool
) -> SpectrumSet | None:
    """Plain spectra of all layers with all vectors; None where no drift is to be measured."""
    names, known = list(dict.fromkeys(layers)), given or {}
    complete = all(name in known and known[name].has_all_vectors for name in names)
    if not (complete if wanted is None else wanted):
        return None
    if complete and not given.metric:
        return given
    return compute_spectra(model, names, progress=progress)


def _placements_by_layer(plans: Iterable[Mapping[str, object]]) -> dict[str, list[Placement]]:
    wanted: dict[str, list[Placement]] = {}
    for plan in plans:
        for name, placement in plan.items():
            if isinstance(placement, Placement):
                wanted.setdefault(name, []).append(placement)
    return wanted
