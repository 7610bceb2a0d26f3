"""Continual learning: tasks one after the other, all of them tested after each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Self

import pandas as pd
import pyarrow as pa
import torch
from torch import nn

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.naming import Targets, counted, listed
from lora_lens._base.validate import choice, flag, instance, sequence, whole_number
from lora_lens.adapters.attaching import planned
from lora_lens.adapters.low_rank import chosen_layers
from lora_lens.adapters.methods import MethodLike
from lora_lens.adapters.variant import Variant
from lora_lens.experiments.columns import columns_of, records_in, rows_of
from lora_lens.experiments.continual.metrics import ENDED, RESULTS, SCORES, continual_scores, score_means
from lora_lens.experiments.continual.sequence_training import Sequential, checkpoint_of, learn
from lora_lens.experiments.continual.strategies import Moving, Strategy
from lora_lens.experiments.engines.choice import chosen_engine
from lora_lens.experiments.engines.missing_runs import run_missing
from lora_lens.experiments.engines.protocol import Shared
from lora_lens.experiments.identity import ANSWERS, model_identity, sample_loss
from lora_lens.experiments.records import with_distinct_names
from lora_lens.experiments.results import MOST_SHOWN, Kept
from lora_lens.experiments.store import experiment, new_experiment, open_store, require_writable
from lora_lens.experiments.sweeps import A_TASK, Grid, require_shared, shared_training
from lora_lens.spectrum.layer_weights import layers_at, matrix_shape
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.tasks.scenarios import SCENARIOS, all_at_once
from lora_lens.tasks.task import Task
from lora_lens.training.regularizers.base import regularizer_of
from lora_lens.training.settings import Training

SHOWN = ["strategy", "method", "position", "lr", *SCORES, "runs"]  # in a cell


def continual_sweep(
    model: nn.Module,
    tasks: Sequence[Task],
    strategy: Strategy,
    grid: Grid,
    *,
    setting: str = "task-incremental",
    orders: Sequence[Sequence[int]] | None = None,
    retain: Task | None = None,
    store: str | Path | None = None,
    targets: Targets = None,
    alpha: float | None = None,
    variant: Variant | None = None,
    spectra: SpectrumSet | None = None,
    jobs: int | None = None,
    engine: object = None,
    progress: bool = True,
    **settings: object,
) -> ContinualSweep:
    """Train ``tasks`` in order and test all of them after each, for every point of ``grid`` and every order.

    Every task gets the same number of steps. A sequence that is stopped goes on from its last finished task
    and ends with the same numbers; what is kept meanwhile does not grow with the number of tasks, but for
    their heads.

    Args:
        model: the pretrained model; it is left as it was.
        tasks: what to learn.
        strategy: what one task hands on to the next, see :mod:`lora_lens.experiments.continual.strategies`.
        grid: methods (windows, LoRA, FullFineTuning, PEFT's, also under a
            regularizer), learning rates and seeds.
        setting: "task-incremental" (a head for each task), "domain-incremental" (one head) or
            "class-incremental" (one head that grows), see :mod:`lora_lens.tasks.scenarios`. ``Separate`` has
            a head for each task in any setting.
        orders: permutations of range(len(tasks)); default the order given.
        retain: what the pretrained model could do, tested after each task.
        store: a folder that keeps one file per finished sequence and one checkpoint per unfinished one;
            strategies and settings may share it. Without it nothing is kept.
        targets: which layers, as for :func:`lora_lens.attach`.
        alpha: LoRA's alpha, as there.
        variant: how the adapters are built, as there.
        spectra: of this model, if they are at hand. With all vectors, what became of the weights is measured
            after each task: see :meth:`ContinualSweep.drifts`.
        jobs: how many processes, as for :func:`lora_lens.sweep`.
        engine: who computes the sequences, as there.
        progress: show a bar.
        settings: of :class:`lora_lens.Training`, for each task; steps are those of one task.

    Returns:
        A :class:`ContinualSweep`, whose table has one row per sequence, number of tasks trained and task: run
        (identity), strategy, method, rank, position, start, setting, order (the tasks' numbers as they are
        trained), alpha, targets, lr, seed and the other settings; after (0 to the number of tasks: how many
        were trained); task (name); place (of the task in the order, from 0); accuracy (in [0, 1]) and loss
        (nats) on the task's test set, NaN where it has no head yet; retained_before and retained_accuracy
        (NaN without ``retain``); diverged (such a sequence is not trained further, unless by ``Separate``);
        failed and reason (why, else ""): such a sequence has rows without results, ends no other, and is
        tried again, from its last finished task, by the next call. The accuracy matrix R[i, j] of the
        literature has after = i + 1 and place = j; see :mod:`lora_lens.experiments.continual.formulas`.

    Raises:
        ValueError: fewer than two tasks, an order that is no permutation, another setting, tasks that do not
            fit the model or the setting, a window that does not fit, ``store`` holds another experiment, or
            all sequences failed, with the first one's reason (of an error that is not ours RuntimeError).
        OSError: ``store`` cannot be written to.
        TypeError: ``strategy`` is none, or cannot chain one of the methods.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> tasks = [task, ll.Task("again", ("even", "odd"), images, images)]
        >>> strategy, grid = ll.experiments.continual.Merged(), ll.Grid(ll.Window.middle(2))
        >>> once = {"steps": 2, "batch_size": 10, "jobs": 1, "progress": False}
        >>> sweep = ll.experiments.continual_sweep(model, tasks, strategy, grid, **once)
        >>> sweep.table[["after", "task", "place"]]
           after   task  place
        0      0  noise      0
        1      0  again      1
        2      1  noise      0
        3      1  again      1
        4      2  noise      0
        5      2  again      1
    """
    instance(grid, Grid, "grid", "a lora_lens.Grid of methods, learning rates and seeds")
    tasks = sequence(tasks, "tasks", "tasks", Task)
    for name, given in (("each of tasks", one) for one in tasks):
        instance(given, Task, name, A_TASK)
    if retain is not None:
        instance(retain, Task, "retain", A_TASK)
    if not isinstance(strategy, Strategy):
        raise InputTypeError(f"expected a strategy such as Merged(), not {strategy!r}")
    require_shared(model, variant, spectra)
    if spectra is not None and spectra.metric:
        raise InputError(
            f"spectra are in the {spectra.metric}, and of a sequence only the first task would start from "
            "them: give plain ones, ll.spectra(model) without metric="
        )
    if "evaluations" in settings:
        raise InputError(
            "evaluations has no sense here, as tests follow tasks: do not give it to continual_sweep"
        )
    training = shared_training("continual_sweep", continual_sweep, {**settings, "evaluations": 2})
    variant = variant or Variant()
    engine, progress = chosen_engine(engine, jobs), flag(progress, "progress")
    require_writable(store)
    orders = _orders(orders, len(tasks))
    layers = _checked(
        model, tasks, strategy, grid, setting, retain, targets, alpha, spectra, variant, training
    )
    shared = Sequential(model, tasks, strategy, setting, retain, layers, alpha, variant, spectra, training)
    points = [(m, order, lr, s) for order in orders for m, lr, s in grid]
    identity = _identity(model, tasks, retain)
    with open_store(store, identity) as folder:
        plan = [(point, folder / f"{shared.record(*point)['run']}.json") for point in points]
        bar = {"shown": progress, "desc": str(strategy), "unit": "sequence"}
        records = run_missing(Shared(partial(learn, shared), shared.lost), plan, engine, **bar)
        for (_, path), record in zip(plan, records, strict=True):
            if "failed" not in record:
                checkpoint_of(path).unlink(missing_ok=True)
    if store is None:
        return ContinualSweep.of(records, new_experiment(identity))
    return ContinualSweep.of(records, experiment(store), Path(store))


class ContinualSweep(Kept):
    """Sequences of tasks: their scores after each task, and what was kept of each.

    Attributes:
        table: one row per sequence, number of tasks trained and task; see :func:`continual_sweep`.
        path: the folder or packed file that keeps the sequences; None where nothing was kept on disk.

    Example:
        >>> import lora_lens as ll
        >>> ll.experiments.ContinualSweep.open("data/results/texts.jsonl.xz").only("strategy == 'merged'")
        <ContinualSweep: 36 sequences; merged; data/results/texts.jsonl.xz>
    """

    @classmethod
    def of(cls, records: list[dict], experiment: Mapping, path: Path | None = None) -> Self:
        """From the records of its sequences, in their order."""
        columns = columns_of(records)
        return cls(_table(records, columns), columns, experiment, path)

    @classmethod
    def _read(cls, columns: pa.Table, path: str | Path) -> pd.DataFrame:
        records = [record for record in records_in(columns) if "result" not in record]
        if not records:
            raise InputError(f"{path} holds no sequences of tasks; single runs are opened by ll.Sweep.open")
        keys = ["setting", "strategy", "method", "rank", "position", "order", "lr", "seed", "after", "place"]
        return _table(records, columns).sort_values(keys, kind="stable", ignore_index=True)

    def drifts(self) -> pd.DataFrame:
        """What became of the weights over each sequence, as far as it was measured.

        Returns:
            One row per run, number of tasks trained and layer: run, after, layer, update
            (||W - W_0||_F / ||W_0||_F with W_0 the pretrained weight), and for windows overlap_left,
            overlap_right and block_change: what is left of the first task's window as it stood after that
            task, see :func:`lora_lens.forgetting.window_survival.survival`; NaN for other methods.

        Raises:
            ValueError: nothing was measured: there were no spectra with all vectors.
        """
        found = self._rows("drift")
        if found.empty:
            raise InputError(
                f"no sequence in {self!r} was kept with its drift; continual_sweep measures it when it is "
                "given spectra=ll.spectra(model), with all vectors"
            )
        return found

    def scores(self) -> pd.DataFrame:
        """What each sequence learnt and forgot: :func:`~lora_lens.experiments.continual.continual_scores`."""
        return continual_scores(self.table)

    def __repr__(self) -> str:
        strategies = listed(self.table["strategy"].unique(), most=4)
        where = f"; {self.path}" if self.path else ""
        return f"<ContinualSweep: {counted(self.table['run'].nunique(), 'sequence')}; {strategies}{where}>"

    def _repr_html_(self) -> str:
        means = score_means(self.scores())
        shown = means[[c for c in SHOWN if c in means and means[c].notna().any()]].head(MOST_SHOWN)
        table = shown.to_html(index=False, float_format="{:.3g}".format, na_rep="", border=0)
        return f"<p>{escape(repr(self))}</p>{table}"


def _checked(
    model: nn.Module,
    tasks: Sequence[Task],
    strategy: Strategy,
    grid: Grid,
    setting: str,
    retain: Task | None,
    targets: Targets,
    alpha: float | None,
    spectra: SpectrumSet | None,
    variant: Variant,
    training: Training,
) -> dict[MethodLike, list[str]]:
    """The layers of each method, after every check that can be made before the first step."""
    if len(tasks) < 2:
        raise InputError(
            f"a sequence needs at least two tasks, not {len(tasks)}; for one there is ll.finetune"
        )
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise InputError(f"two tasks have one name, and their rows could not be told apart: {names}")
    choice(setting, "setting", SCENARIOS)
    SCENARIOS[setting](tasks)
    for task in tasks:
        task.new_readout(model, seed=0)
    if retain is not None:
        retain.own_readout(model)
    if strategy.together:
        all_at_once(setting, tasks, model, seed=0)
    for lr, seed in product(grid.lr, grid.seed):
        replace(training, lr=lr, seed=seed)
    guard = strategy.regularizer
    layers = {}
    for method in grid.methods:
        strategy.require_method(method)
        regularizer, share = regularizer_of(method), 0 if guard is None else guard.share
        if regularizer is not None and regularizer.share + share >= 1:
            raise InputError(f"{regularizer} and {guard} would leave no place for new examples in a batch")
        if regularizer is not None and regularizer.share and retain is None:
            raise InputError(f"{regularizer} needs examples of what is to be retained: give retain=")
        if training.batch_size * share < 1 <= share * 2:
            raise InputError(f"{guard} needs half of each batch, and batch_size is {training.batch_size}")
        for place in range(len(tasks) if isinstance(strategy, Moving) else 1):
            now = strategy.method_at(method, place)
            plan = planned(model, now, targets=targets, alpha=alpha, spectra=spectra, variant=variant)
            for name, layer in layers_at(model, plan).items() if isinstance(strategy, Moving) else ():
                plan[name].components(torch.ones(min(matrix_shape(layer))), name)
        layers[method] = list(plan) or list(chosen_layers(model, targets, spectra))
    return layers


def _orders(orders: Sequence[Sequence[int]] | None, count: int) -> list[tuple[int, ...]]:
    given = [range(count)] if orders is None else sequence(orders, "orders", "orders of the tasks")
    orders = [
        tuple(
            whole_number(place, "a task's number in an order")
            for place in sequence(one, "an order", "numbers")
        )
        for one in given
    ]
    if not orders:
        raise InputError("orders is empty: give at least one, or None for the order of the tasks")
    for order in orders:
        if sorted(order) != list(range(count)):
            raise InputError(f"an order is a permutation of 0 to {count - 1}, not {order}")
    if len(set(orders)) < len(orders):
        raise InputError(f"an order is given twice: {orders}")
    return orders


def _identity(model: nn.Module, tasks: Sequence[Task], retain: Task | None) -> dict[str, str]:
    return {
        "lora_lens": version("lora_lens"),
        **model_identity(model),
        "tasks": "; ".join(f"{task.name} {task.fingerprint()}" for task in tasks),
        "retain": "nothing" if retain is None else f"{retain.name} {retain.fingerprint()}",
        **({} if retain is None else {ANSWERS: sample_loss(model, retain)}),
    }


def _table(records: Iterable[dict], columns: pa.Table) -> pd.DataFrame:
    about = [
        {
            "run": record["run"],
            **record["settings"],
            "failed": "failed" in record,
            "reason": record.get("failed", ""),
        }
        for record in with_distinct_names(records)
    ]
    together = pd.DataFrame(about).merge(rows_of(columns, "rows"), on="run")
    for name in ("rank", "position", "start", "alpha"):
        together[name] = pd.to_numeric(together[name])  # NaN, where all are None, too
    last = [*RESULTS, *ENDED]
    return together[["run", *together.columns.drop(["run", *last]), *last]]
