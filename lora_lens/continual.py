"""Continual learning: tasks one after the other, all of them tested after each."""

from __future__ import annotations

import copy
import io
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed
from peft import PeftModel
from torch import Tensor, nn

from lora_lens.adapter import attach, chosen_layers, planned
from lora_lens.drift import effective_weight
from lora_lens.evaluation import evaluate
from lora_lens.injection import lora_layer
from lora_lens.layers import Targets, weight_matrix
from lora_lens.memories import Memory
from lora_lens.methods import Method, Penalty, Variant, inner_method, penalty_of
from lora_lens.progress import progress_bar
from lora_lens.readouts import Readout
from lora_lens.scenarios import SCENARIOS, Scenario, TaskIncremental, all_at_once, one_of
from lora_lens.spectrum import SpectrumSet
from lora_lens.spectrum import spectra as compute_spectra
from lora_lens.store import (
    all_records,
    model_fingerprint,
    open_store,
    read_run,
    replace_file,
    run_name,
    write_atomically,
)
from lora_lens.strategies import Continued, Joint, Moving, Separate, Strategy, method_of, require_method
from lora_lens.sweep import METHOD_NAMES, Grid, one_thread
from lora_lens.tasks import Task
from lora_lens.training import Training, finetune
from lora_lens.window import Placement
from lora_lens.window_survival import WindowComponents, components_of, survival

SEEDS_APART = 1000  # between the seeds of two tasks of one sequence
Point = tuple[Method, tuple[int, ...], float, int]  # method, order, learning rate, seed


def continual(
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
    progress: bool = True,
    **settings: object,
) -> pd.DataFrame:
    """Train ``tasks`` in order and test all of them after each, for every point of ``grid`` and every order.

    Every task gets the same number of steps. A sequence that is stopped goes on from its last finished task
    and ends with the same numbers; what is kept meanwhile does not grow with the number of tasks, but for
    their heads.

    Args:
        model: the pretrained model; it is left as it was.
        tasks: what to learn.
        strategy: what one task hands on to the next, see :mod:`lora_lens.strategies`.
        grid: methods (windows, LoRA, FullFineTuning, also under a penalty), learning rates and seeds.
        setting: "task-incremental" (a head for each task), "domain-incremental" (one head) or
            "class-incremental" (one head that grows), see :mod:`lora_lens.scenarios`. ``Separate`` has a
            head for each task in any setting.
        orders: permutations of range(len(tasks)); default the order given.
        retain: what the pretrained model could do, tested after each task.
        store: a folder that keeps one file per finished sequence and one checkpoint per unfinished one;
            strategies and settings may share it. Without it nothing is kept.
        targets, alpha, variant: as for :func:`lora_lens.attach`.
        spectra: of this model, if they are at hand. With all vectors, what became of the weights is measured
            after each task: see :func:`continual_drifts`.
        jobs: processes; default all cores (one where there is a GPU). Every run computes with one thread.
        settings: of :class:`lora_lens.Training`, for each task; steps are those of one task.

    Returns:
        One row per sequence, number of tasks trained and task. Columns: run (identity), strategy, method,
        rank, position, start, setting, order (the tasks' numbers as they are trained), alpha, targets, lr,
        seed and the other settings; after (0 to the number of tasks: how many were trained); task (name);
        place (of the task in the order, from 0); accuracy (in [0, 1]) and loss (nats) on the task's test set,
        NaN where it has no head yet; retained_before and retained_accuracy (NaN without ``retain``);
        diverged. The accuracy matrix R[i, j] of the literature has after = i + 1 and place = j; see
        :mod:`lora_lens.continual_metrics`.

    Raises:
        ValueError: fewer than two tasks, an order that is no permutation, another setting, tasks that do not
            fit the model or the setting, a window that does not fit, or ``store`` holds another experiment.
        TypeError: a strategy, or a method that it cannot chain.
    """
    tasks = list(tasks)
    if not isinstance(strategy, Strategy):
        raise TypeError(f"expected a strategy such as Merged(), not {strategy!r}")
    for taken in ("lr", "seed", "evaluations"):
        if taken in settings:
            where = "is the grid's" if taken != "evaluations" else "has no sense here, as tests follow tasks"
            raise ValueError(f"{taken} {where}: do not give it to continual")
    orders = _orders(orders, len(tasks))
    training, variant = Training(evaluations=2, **settings), variant or Variant()
    layers = _checked(
        model, tasks, strategy, grid, setting, retain, targets, alpha, spectra, variant, training
    )
    experiment = Sequential(
        model, tasks, strategy, setting, retain, layers, alpha, variant, spectra, training
    )
    points = [(m, order, lr, s) for order in orders for m, lr, s in grid]
    with open_store(store, _identity(model, tasks, retain)) as folder:
        plan = [(point, folder / f"{run_name(experiment.describe(*point))}.json") for point in points]
        missing = [(point, path) for point, path in plan if read_run(path) is None]
        cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
        done = Parallel(n_jobs=min(jobs or cores, max(1, len(missing))), return_as="generator_unordered")(
            delayed(_learn_and_keep)(experiment, point, path) for point, path in missing
        )
        initial = len(plan) - len(missing)
        with progress_bar(
            shown=progress, total=len(plan), initial=initial, desc=str(strategy), unit="sequence"
        ) as bar:
            for _ in done:
                bar.update()
        return _table([read_run(path) for _, path in plan])


def continual_runs(store: str | Path) -> pd.DataFrame:
    """All finished sequences of a results folder, or of a file from :func:`lora_lens.pack`.

    Returns:
        The columns of :func:`continual`, by setting, strategy, method, rank, position, order, rate and seed.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it holds no sequences.
    """
    records = [record for record in all_records(store).values() if "rows" in record]
    if not records:
        raise ValueError(f"{store} holds no sequences of tasks; single runs are read by ll.runs")
    keys = ["setting", "strategy", "method", "rank", "position", "order", "lr", "seed", "after", "place"]
    return _table(records).sort_values(keys, kind="stable", ignore_index=True)


def continual_drifts(store: str | Path, table: pd.DataFrame) -> pd.DataFrame:
    """What became of the weights over each sequence in ``table``, as far as it was measured.

    Returns:
        One row per run, number of tasks trained and layer: run, after, layer, update
        (||W - W_0||_F / ||W_0||_F with W_0 the pretrained weight), and for windows overlap_left,
        overlap_right and block_change: what is left of the first task's window as it stood after that task,
        see :func:`lora_lens.window_survival.survival`; NaN for other methods.

    Raises:
        ValueError: nothing was measured: ``continual`` had no spectra with all vectors.
    """
    records = all_records(store)
    wanted = [records[run] for run in table["run"].unique() if run in records]
    parts = [pd.DataFrame(r["drift"]).assign(run=r["run"]) for r in wanted if r.get("drift")]
    if not parts:
        raise ValueError(
            f"no sequence in {store} was kept with its drift; continual measures it when it is given "
            "spectra=ll.spectra(model), with all vectors"
        )
    together = pd.concat(parts, ignore_index=True)
    return together[["run", *together.columns.drop("run")]]


@dataclass(frozen=True, eq=False)
class Sequential:
    """What all sequences of one call share."""

    model: nn.Module
    tasks: Sequence[Task]
    strategy: Strategy
    setting: str
    retain: Task | None
    layers: Mapping[Method, list[str]]
    alpha: float | None
    variant: Variant
    spectra: SpectrumSet | None
    training: Training

    def describe(self, method: Method, order: Sequence[int], lr: float, seed: int) -> dict[str, object]:
        """The plain values that describe one sequence; their hash is its identity."""
        settings = asdict(replace(self.training, lr=float(lr), seed=int(seed)))
        del settings["evaluations"]
        return {
            "strategy": str(self.strategy),
            "method": METHOD_NAMES.get(type(method)) or str(method),
            "rank": getattr(method, "rank", None),
            "position": getattr(method, "position", None),
            "start": getattr(method, "start", None),
            "setting": self.setting,
            "order": " ".join(map(str, order)),
            "alpha": None if self.alpha is None else float(self.alpha),
            "targets": " ".join(self.layers[method]),
            **({} if self.variant == Variant() else {"variant": str(self.variant)}),
            **settings,
        }


@dataclass(eq=False)
class State:
    """Where a sequence stands: all that the next task needs.

    Attributes:
        model: what the next task trains, or attaches to.
        scenario: the heads.
        kept: of the strategy's memory.
        window: the first task's window as it stood after that task, by layer.
        after: how many tasks are trained.
        own: of ``Separate``, each task's accuracy and loss under its own adapter.
        rows, drift, seconds: what was measured.
    """

    model: nn.Module
    scenario: Scenario
    kept: dict[str, Tensor] = field(default_factory=dict)
    window: dict[str, WindowComponents] = field(default_factory=dict)
    after: int = 0
    own: list[tuple[float, float]] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)
    drift: list[dict[str, object]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Terms:
    """A method's penalty and a strategy's memory as one penalty, for :func:`lora_lens.finetune`."""

    penalty: Penalty | None
    memory: Memory | None
    state: State

    @property
    def share(self) -> float:
        return sum(part.share for part in (self.penalty, self.memory) if part is not None)

    def begin(self, model: nn.Module, retain: Task | None, config: Training):
        terms = [] if self.penalty is None else [self.penalty.begin(model, retain, config)]
        if self.memory is not None:
            state = self.state
            terms.append(self.memory.term(state.kept, model, state.scenario, state.after, config))
        return lambda: sum(term() for term in terms)


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
) -> dict[Method, list[str]]:
    """The layers of each method, after every check that can be made before the first step."""
    if len(tasks) < 2:
        raise ValueError(
            f"a sequence needs at least two tasks, not {len(tasks)}; for one there is ll.finetune"
        )
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"two tasks have one name, and their rows could not be told apart: {names}")
    if setting not in SCENARIOS:
        raise ValueError(f"setting must be one of {', '.join(SCENARIOS)}, not {setting!r}")
    SCENARIOS[setting](tasks)
    for task in tasks:
        task.new_readout(model, seed=0)
    if retain is not None:
        retain.own_readout(model)
    if isinstance(strategy, Joint):
        all_at_once(setting, tasks, model, seed=0)
    for lr in grid.lr:
        replace(training, lr=lr)
    memory = getattr(strategy, "memory", None)
    layers = {}
    for method in grid.methods:
        require_method(strategy, method)
        penalty, share = penalty_of(method), 0 if memory is None else memory.share
        if penalty is not None and penalty.share + share >= 1:
            raise ValueError(f"{penalty} and {memory} would leave no place for new examples in a batch")
        if training.batch_size * share < 1 <= share * 2:
            raise ValueError(f"{memory} needs half of each batch, and batch_size is {training.batch_size}")
        for place in range(len(tasks) if isinstance(strategy, Moving) else 1):
            inner = inner_method(method_of(strategy, method, place))
            plan = planned(model, inner, targets=targets, alpha=alpha, spectra=spectra, variant=variant)
            for name, placement in plan.items():
                if isinstance(strategy, Moving):
                    layer = weight_matrix(model.get_submodule(name))
                    placement.select(torch.ones(min(layer.shape)), name)
        layers[method] = list(plan) or list(chosen_layers(model, targets, spectra))
    return layers


def _orders(orders: Sequence[Sequence[int]] | None, count: int) -> list[tuple[int, ...]]:
    orders = [tuple(range(count))] if orders is None else [tuple(map(int, order)) for order in orders]
    for order in orders:
        if sorted(order) != list(range(count)):
            raise ValueError(f"an order is a permutation of 0 to {count - 1}, not {order}")
    if len(set(orders)) < len(orders):
        raise ValueError(f"an order is given twice: {orders}")
    return orders


def _identity(model: nn.Module, tasks: Sequence[Task], retain: Task | None) -> dict[str, str]:
    return {
        "lora_lens": version("lora_lens"),
        "model": model_fingerprint(model),
        "tasks": "; ".join(f"{task.name} {task.fingerprint()}" for task in tasks),
        "retain": "nothing" if retain is None else f"{retain.name} {retain.fingerprint()}",
    }


def _learn_and_keep(experiment: Sequential, point: Point, path: Path) -> None:
    """Train one sequence to its end, from its checkpoint if there is one, and write what came of it."""
    with one_thread():
        if isinstance(experiment.strategy, Joint):
            state = _joint(experiment, point)
        else:
            checkpoint = path.parent / "unfinished" / f"{path.stem}.pt"
            state = _restored(experiment, point, checkpoint) or _started(experiment, point)
            while state.after < len(experiment.tasks):
                _next_task(experiment, point, state)
                if state.after < len(experiment.tasks):
                    _keep(experiment, state, checkpoint)
            checkpoint.unlink(missing_ok=True)
    record = {
        "run": path.stem,
        "settings": experiment.describe(*point),
        "rows": pd.DataFrame(state.rows).to_dict("list"),
        "drift": pd.DataFrame(state.drift).to_dict("list"),
        "seconds": state.seconds,
    }
    write_atomically(path, record)


def _started(experiment: Sequential, point: Point) -> State:
    """Before the first task: adapted if one adapter serves all, heads made, everything tested."""
    state = _unmeasured(experiment, point)
    _test(experiment, state, point[1], diverged=False)
    return state


def _unmeasured(experiment: Sequential, point: Point) -> State:
    method, order, _, seed = point
    tasks = [experiment.tasks[number] for number in order]
    separate = isinstance(experiment.strategy, Separate)
    model = copy.deepcopy(experiment.model)
    if isinstance(experiment.strategy, Continued):
        model = _attached(experiment, model, method, seed, experiment.spectra)
    scenario = (TaskIncremental if separate else SCENARIOS[experiment.setting])(tasks)
    scenario.prepare(model, seed)
    return State(model, scenario)


def _next_task(experiment: Sequential, point: Point, state: State) -> None:
    method, order, lr, seed = point
    strategy, place = experiment.strategy, state.after
    started = time.monotonic()
    config = replace(experiment.training, lr=lr, seed=seed + SEEDS_APART * place)
    if isinstance(strategy, Continued):
        adapted = state.model
    elif isinstance(strategy, Separate):
        adapted = copy.deepcopy(experiment.model)
        adapted = _attached(experiment, adapted, method, config.seed, experiment.spectra)
    else:
        now = method_of(strategy, method, place)
        known = experiment.spectra if place == 0 else None
        adapted = _attached(experiment, state.model, now, config.seed, known)
    state.scenario.begin(place, adapted, config.seed)
    memory = getattr(strategy, "memory", None)
    diverged = _train(experiment, method, adapted, state, config, memory if place else None)
    if memory is not None:
        state.kept = memory.learnt(state.kept, adapted, state.scenario, place, config)
    state.after += 1
    if isinstance(strategy, Separate):
        answers = evaluate(adapted, *state.scenario.trained(place), precision=config.precision)
        state.own.append((answers.accuracy, answers.loss))
    else:
        keeps = isinstance(strategy, Continued) or not isinstance(adapted, PeftModel)
        state.model = adapted if keeps else adapted.merge_and_unload()
        _measure_weights(experiment, state, method_of(strategy, method, 0))
    _test(experiment, state, order, diverged)
    state.seconds.append(time.monotonic() - started)


def _attached(
    experiment: Sequential, model: nn.Module, method: Method, seed: int, spectra: SpectrumSet | None
) -> nn.Module:
    """``model`` itself, adapted; spectra of merged weights go to no cache: nothing asks for them again."""
    inner, names = inner_method(method), experiment.layers
    targets = names.get(method) or next(iter(names.values()))
    if spectra is None and isinstance(inner, Placement):
        wanted = {name: [inner] for name in targets}
        spectra = compute_spectra(model, targets, vectors=wanted, cache=False, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(peft_config|second time).*")  # of the merged one before
        return attach(
            model,
            inner,
            targets=targets,
            alpha=experiment.alpha,
            spectra=spectra,
            variant=experiment.variant,
            inplace=True,
            seed=seed,
        )


def _train(
    experiment: Sequential,
    method: Method,
    adapted: nn.Module,
    state: State,
    config: Training,
    memory: Memory | None,
) -> bool:
    """Whether it diverged. Tests follow once the task is learnt, so that finetune's own see one example."""
    task, readout = state.scenario.trained(state.after)
    penalty = penalty_of(method)
    retain = None if penalty is None or experiment.retain is None else experiment.retain.subset(test=1)
    terms = None if penalty is None and memory is None else _Terms(penalty, memory, state)
    run = finetune(
        adapted, task.subset(test=1), retain, config, penalty=terms, readout=readout, progress=False
    )
    return run.diverged


def _test(experiment: Sequential, state: State, order: Sequence[int], diverged: bool) -> None:
    """Rows of accuracies, one per task."""
    separate = isinstance(experiment.strategy, Separate)

    def answers_to(place: int) -> tuple[float, float]:
        if separate:
            return state.own[place] if place < state.after else (float("nan"),) * 2
        return _asked(experiment, state.model, state.scenario.asked(place, state.after))

    retained = (
        state.rows[0]["retained_before"] if separate and state.rows else _retained(experiment, state.model)
    )
    _note(experiment, state, order, [answers_to(place) for place in range(len(order))], retained, diverged)


def _note(
    experiment: Sequential,
    state: State,
    order: Sequence[int],
    answers: Sequence[tuple[float, float]],
    retained: float,
    diverged: bool,
) -> None:
    before = state.rows[0]["retained_before"] if state.rows else retained
    for place, (accuracy, loss) in enumerate(answers):
        state.rows.append(
            {
                "after": state.after,
                "task": experiment.tasks[order[place]].name,
                "place": place,
                "accuracy": accuracy,
                "loss": loss,
                "retained_before": before,
                "retained_accuracy": retained,
                "diverged": diverged,
            }
        )


def _asked(
    experiment: Sequential, model: nn.Module, asked: tuple[Task, Readout] | None
) -> tuple[float, float]:
    if asked is None:
        return float("nan"), float("nan")
    answers = evaluate(model, *asked, precision=experiment.training.precision)
    return answers.accuracy, answers.loss


def _retained(experiment: Sequential, model: nn.Module) -> float:
    if experiment.retain is None:
        return float("nan")
    return evaluate(model, experiment.retain, precision=experiment.training.precision).accuracy


def _joint(experiment: Sequential, point: Point) -> State:
    """All tasks at once; between the start and the end there is nothing to test."""
    method, order, lr, seed = point
    tasks, count = [experiment.tasks[number] for number in order], len(order)
    started = time.monotonic()
    adapted = _attached(experiment, copy.deepcopy(experiment.model), method, seed, experiment.spectra)
    together, readout = all_at_once(experiment.setting, tasks, adapted, seed)
    state = State(adapted, TaskIncremental(tasks))
    nothing = [(float("nan"),) * 2] * count
    _note(experiment, state, order, nothing, _retained(experiment, adapted), False)
    config = replace(experiment.training, lr=lr, seed=seed, steps=experiment.training.steps * count)
    penalty = penalty_of(method)
    retain = None if penalty is None or experiment.retain is None else experiment.retain.subset(test=1)
    run = finetune(
        adapted, together.subset(test=1), retain, config, penalty=penalty, readout=readout, progress=False
    )
    for state.after in range(1, count):
        _note(experiment, state, order, nothing, float("nan"), False)
    state.after = count
    asked = [one_of(experiment.setting, tasks, place, readout) for place in range(count)]
    answers = [_asked(experiment, adapted, one) for one in asked]
    _note(experiment, state, order, answers, _retained(experiment, adapted), run.diverged)
    state.seconds.append(time.monotonic() - started)
    return state


def _measure_weights(experiment: Sequential, state: State, method: Method) -> None:
    """Drift and survival, if the pretrained spectra are known with all vectors."""
    known, inner = experiment.spectra or {}, inner_method(method)
    names = next(iter(experiment.layers.values()))
    if not all(name in known and known[name].has_all_vectors for name in names):
        return
    for name in names:
        layer = experiment.model.get_submodule(name)
        before = weight_matrix(layer).detach().cpu().double()
        now = _matrix(state.model, name)
        row = {"after": state.after, "layer": name}
        row["update"] = float(torch.linalg.norm(now - before) / torch.linalg.norm(before))
        lost = dict.fromkeys(("overlap_left", "overlap_right", "block_change"), float("nan"))
        if isinstance(inner, Placement) and torch.isfinite(now).all():
            if state.after == 1:
                state.window[name] = components_of(now, inner, name)
            lost = survival(state.window[name], now, inner)
        state.drift.append({key: _short(value) for key, value in (row | lost).items()})


def _matrix(model: nn.Module, name: str) -> Tensor:
    """The weight with its adapter, float64, on the CPU."""
    if isinstance(model, PeftModel):
        return effective_weight(lora_layer(model, name))
    return weight_matrix(model.get_submodule(name)).detach().cpu().double()


def _short(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _keep(experiment: Sequential, state: State, path: Path) -> None:
    """A checkpoint in place of the last one."""
    content = {
        "model": _changed(experiment.model, state.model),
        "heads": state.scenario.state(),
        "kept": dict(state.kept),
        "window": {name: (w.left, w.values, w.right) for name, w in state.window.items()},
        **{name: getattr(state, name) for name in ("after", "own", "rows", "drift", "seconds")},
    }
    path.parent.mkdir(exist_ok=True)
    stream = io.BytesIO()
    torch.save(content, stream)
    replace_file(path, stream.getvalue())


def _changed(pretrained: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """What cannot be had again from the pretrained model: all that was trained, and buffers."""
    if isinstance(model, PeftModel):
        return dict(_trained_tensors(model))
    before = pretrained.state_dict()
    return {
        name: tensor.cpu()
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor.cpu(), before[name].cpu())
    }


def _trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach().cpu()
    for name, buffer in model.named_buffers():
        yield name, buffer.cpu()


def _restored(experiment: Sequential, point: Point, path: Path) -> State | None:
    """The state in a checkpoint; None where there is none, or it cannot be read."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:  # whatever is wrong with it, the sequence can start again
        warnings.warn(f"{path} is damaged ({error}); the sequence starts again", stacklevel=2)
        return None
    state = _unmeasured(experiment, point)
    with torch.no_grad():
        state.model.load_state_dict(content["model"], strict=False)
    state.scenario.restore(content["heads"], state.model)
    state.kept = content["kept"]
    state.window = {name: WindowComponents(*parts) for name, parts in content["window"].items()}
    for name in ("after", "own", "rows", "drift", "seconds"):
        setattr(state, name, content[name])
    return state


def _table(records: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    parts = [
        pd.DataFrame(record["rows"]).assign(run=record["run"], **record["settings"]) for record in records
    ]
    together = pd.concat(parts, ignore_index=True)
    own = ["after", "task", "place", "accuracy", "loss", "retained_before", "retained_accuracy", "diverged"]
    return together[["run", *together.columns.drop(["run", *own]), *own]]
