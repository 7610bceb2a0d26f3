"""One sequence of tasks: train, hand on, test all, from its last checkpoint to its end."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens.adapters.attaching import attach
from lora_lens.adapters.injection import planned_layers
from lora_lens.adapters.methods import MethodLike, as_method
from lora_lens.adapters.start import effective_weight
from lora_lens.adapters.variant import Variant
from lora_lens.experiments.continual.checkpoint import State, keep, restored
from lora_lens.experiments.continual.metrics import RESULTS
from lora_lens.experiments.continual.strategies import Strategy, exact_strategy
from lora_lens.experiments.identity import exact, exact_method, named_method, named_record
from lora_lens.experiments.runs import ended_without_numbers, short
from lora_lens.forgetting.weight_drift import merged_copy
from lora_lens.forgetting.window_survival import components_of, survival
from lora_lens.spectrum.factorizing import spectra as compute_spectra
from lora_lens.spectrum.layer_weights import Layer, layers_at, weight_matrix
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.spectrum.window import Placement
from lora_lens.tasks.evaluation import Answers, evaluate
from lora_lens.tasks.readouts import Readout
from lora_lens.tasks.scenarios import SCENARIOS, TaskIncremental, all_at_once, one_of
from lora_lens.tasks.task import Task
from lora_lens.training.finetuning import finetune
from lora_lens.training.lean_forward import lean_layers
from lora_lens.training.regularizers.base import (
    LossTerm,
    Past,
    Regularizer,
    regularizer_of,
    trained_part,
)
from lora_lens.training.settings import Training

SEEDS_APART = 1000  # between the seeds of two tasks of one sequence
Point = tuple[MethodLike, tuple[int, ...], float, int]  # method, order, learning rate, seed


@dataclass(frozen=True, eq=False)
class Sequential:
    """What all sequences of one call share."""

    model: nn.Module
    tasks: Sequence[Task]
    strategy: Strategy
    setting: str
    retain: Task | None
    layers: Mapping[MethodLike, list[str]]
    alpha: float | None
    variant: Variant
    spectra: SpectrumSet | None
    training: Training

    def record(self, method: MethodLike, order: Sequence[int], lr: float, seed: int) -> dict[str, object]:
        """What is known of a sequence before it runs: its name, and its settings for people and exactly."""
        training = asdict(replace(self.training, lr=lr, seed=seed))
        del training["evaluations"]
        settings = {
            "strategy": str(self.strategy),
            **named_method(method),
            "setting": self.setting,
            "order": " ".join(map(str, order)),
            "alpha": None if self.alpha is None else float(self.alpha),
            "targets": " ".join(self.layers[method]),
            **({} if self.variant == Variant() else {"variant": str(self.variant)}),
            **{name: exact(value, name) for name, value in training.items()},
        }
        return named_record(settings, exact_method(method) | exact_strategy(self.strategy))

    def lost(self, point: Point) -> dict[str, object]:
        """The record of a sequence that has no results: rows without numbers."""
        order, unknown = point[1], float("nan")
        rows = [
            (after, self.tasks[number].name, place, unknown, unknown, unknown, unknown, False)
            for after in range(len(order) + 1)
            for place, number in enumerate(order)
        ]
        columns = (list(column) for column in zip(*rows, strict=True))
        return self.record(*point) | {"rows": dict(zip(RESULTS, columns, strict=True))}


class _InSequence(Regularizer):
    """A method's regularizer, which guards the retained task, and a strategy's, which guards earlier ones."""

    def __init__(self, own: Regularizer | None, guard: Regularizer | None, past: Past) -> None:
        self.own, self.guard, self.past = own, guard, past
        self.share = sum(part.share for part in (own, guard) if part is not None)

    def begin(self, model: nn.Module, past: Past, config: Training) -> LossTerm:
        terms = [] if self.own is None else [self.own.begin(model, past, config)]
        terms += [] if self.guard is None else [self.guard.begin(model, self.past, config)]
        return lambda: sum(term() for term in terms)


def learn(experiment: Sequential, point: Point, path: Path) -> dict[str, object]:
    """The record of one sequence, trained to its end from its checkpoint, if ``path`` has one.

    The checkpoint stays until the next call: the record is not on the disk yet.
    """
    checkpoint = checkpoint_of(path)
    if experiment.strategy.together:
        state = _joint(experiment, point)
    else:
        state = restored(checkpoint, partial(_fresh, experiment, point))
        state = state or _started(experiment, point)
        while state.after < len(experiment.tasks):
            _next_task(experiment, point, state)
            if state.after < len(experiment.tasks):
                keep(state, experiment.model, checkpoint)
    return {
        **experiment.record(*point),
        "rows": pd.DataFrame(state.rows).to_dict("list"),
        "drift": pd.DataFrame(state.drift).to_dict("list"),
        "seconds": state.seconds,
    }


def checkpoint_of(path: Path) -> Path:
    """Where an unfinished sequence is kept whose record will be at ``path``."""
    return path.parent / "unfinished" / f"{path.stem}.pt"


def _started(experiment: Sequential, point: Point) -> State:
    """Before the first task, everything tested."""
    state = _fresh(experiment, point)
    examine(experiment, state, point[1], diverged=False)
    return state


def _fresh(experiment: Sequential, point: Point) -> State:
    """As the pretrained model is, adapted if one adapter serves all tasks."""
    method, order, _, seed = point
    tasks = [experiment.tasks[number] for number in order]
    separate = experiment.strategy.own_adapters
    model = copy.deepcopy(experiment.model)
    if experiment.strategy.one_adapter:
        model = _attached(experiment, model, method, seed, experiment.spectra)
        if getattr(model, "start_change", 0):
            raise InputError(
                f"{method} starts with another function than the pretrained one, so a sequence could not "
                "tell what is forgotten; use ll.experiments.continual.Merged()"
            )
    scenario = (TaskIncremental if separate else SCENARIOS[experiment.setting])(tasks)
    scenario.prepare(model, seed)
    return State(model, scenario)


def _next_task(experiment: Sequential, point: Point, state: State) -> None:
    method, order, lr, seed = point
    strategy, place = experiment.strategy, state.after
    started = time.monotonic()
    config = replace(experiment.training, lr=lr, seed=seed + SEEDS_APART * place)
    if state.rows[-1]["diverged"] and not strategy.own_adapters:
        # Nothing can start from weights that are no numbers any more: there is no spectrum, no Fisher.
        state.scenario.begin(place, state.model, config.seed)
        state.after += 1
        examine(experiment, state, order, diverged=True)
        state.seconds.append(time.monotonic() - started)
        return
    if strategy.one_adapter:
        adapted = state.model
    elif strategy.own_adapters:
        adapted = copy.deepcopy(experiment.model)
        adapted = _attached(experiment, adapted, method, config.seed, experiment.spectra)
    else:
        now = strategy.method_at(method, place)
        known = experiment.spectra if place == 0 else None
        adapted = _attached(experiment, state.model, now, config.seed, known)
    state.scenario.begin(place, adapted, config.seed)
    guard, past = strategy.regularizer, Past(experiment.retain, state.kept, state.scenario, place)
    both = _InSequence(regularizer_of(method), guard if place else None, past)
    diverged = _train(experiment, adapted, *state.scenario.trained(place), config, both)
    if guard is not None and not diverged:
        state.kept = guard.keep(adapted, past, config)
    state.after += 1
    if strategy.own_adapters:
        answers = _answers(experiment, adapted, *state.scenario.trained(place))
        state.own.append((answers.accuracy, answers.loss))
    else:
        keeps = strategy.one_adapter or not isinstance(adapted, PeftModel)
        state.model = adapted if keeps else adapted.merge_and_unload()
        _measure_weights(experiment, state, strategy.method_at(method, 0))
    examine(experiment, state, order, diverged)
    state.seconds.append(time.monotonic() - started)


def _attached(
    experiment: Sequential, model: nn.Module, method: MethodLike, seed: int, spectra: SpectrumSet | None
) -> nn.Module:
    """``model`` itself, adapted; spectra of merged weights go to no cache: nothing asks for them again."""
    inner, names = trained_part(method), experiment.layers
    targets = names.get(method) or next(iter(names.values()))
    if spectra is None and isinstance(inner, Placement):
        wanted = {name: [inner] for name in targets}
        spectra = compute_spectra(model, targets, vectors=wanted, cache=False, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(peft_config|second time).*")  # of the merged one before
        return attach(
            model,
            method,
            targets=targets,
            alpha=experiment.alpha,
            spectra=spectra,
            variant=experiment.variant,
            inplace=as_method(method).adapts_in_place,
            seed=seed,
        )


def _train(
    experiment: Sequential,
    adapted: nn.Module,
    task: Task,
    readout: Readout,
    config: Training,
    regularizer: _InSequence,
) -> bool:
    """Whether it diverged. Tests follow once the task is learnt, so that finetune's own see one example."""
    needed = regularizer.own is not None and experiment.retain is not None
    retain = experiment.retain.subset(test=1) if needed else None
    used = None if regularizer.own is None and regularizer.guard is None else regularizer
    run = finetune(
        adapted, task.subset(test=1), retain, config, regularizer=used, readout=readout, progress=False
    )
    return ended_without_numbers(run)


def examine(experiment: Sequential, state: State, order: Sequence[int], diverged: bool) -> None:
    """Rows of accuracies, one per task."""
    separate = experiment.strategy.own_adapters

    def answers_to(place: int) -> tuple[float, float]:
        if separate:
            return state.own[place] if place < state.after else (float("nan"),) * 2
        return _tested(experiment, state.model, state.scenario.asked(place, state.after))

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


def _tested(
    experiment: Sequential, model: nn.Module, test: tuple[Task, Readout] | None
) -> tuple[float, float]:
    if test is None:
        return float("nan"), float("nan")
    answers = _answers(experiment, model, *test)
    return answers.accuracy, answers.loss


def _answers(experiment: Sequential, model: nn.Module, task: Task, readout: Readout | None = None) -> Answers:
    precision = experiment.training.precision
    with lean_layers(model, precision):
        return evaluate(model, task, readout, precision=precision)


def _retained(experiment: Sequential, model: nn.Module) -> float:
    if experiment.retain is None:
        return float("nan")
    return _answers(experiment, model, experiment.retain).accuracy


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
    both = _InSequence(regularizer_of(method), None, Past(experiment.retain))
    diverged = _train(experiment, adapted, together, readout, config, both)
    for state.after in range(1, count):
        _note(experiment, state, order, nothing, float("nan"), False)
    state.after = count
    tests = [one_of(experiment.setting, tasks, place, readout) for place in range(count)]
    answers = [_tested(experiment, adapted, test) for test in tests]
    _note(experiment, state, order, answers, _retained(experiment, adapted), diverged)
    state.seconds.append(time.monotonic() - started)
    return state


def _measure_weights(experiment: Sequential, state: State, method: MethodLike) -> None:
    """Drift and survival, if the pretrained spectra are known with all vectors."""
    known, inner = experiment.spectra or {}, trained_part(method)
    names = next(iter(experiment.layers.values()))
    if not all(name in known and known[name].has_all_vectors for name in names):
        return
    model = state.model if hasattr(state.model, "attachment") else merged_copy(state.model)
    if model is None:
        return
    layers = planned_layers(model) if isinstance(model, PeftModel) else layers_at(model, names)
    for name, pretrained in layers_at(experiment.model, names).items():
        before, now = _matrix(pretrained), _matrix(layers[name])
        row = {"after": state.after, "layer": name}
        row["update"] = float(torch.linalg.norm(now - before) / torch.linalg.norm(before))
        lost = dict.fromkeys(("overlap_left", "overlap_right", "block_change"), float("nan"))
        if isinstance(inner, Placement) and torch.isfinite(now).all():
            if state.after == 1:
                state.window[name] = components_of(now, inner, name)
            if name in state.window:  # not where the first task was learnt without spectra
                lost = survival(state.window[name], now, inner)
        state.drift.append({key: short(value) for key, value in (row | lost).items()})


def _matrix(layer: Layer | LoraLayer) -> Tensor:
    """The weight, with its adapter if it has one, float64, on the CPU."""
    if hasattr(layer, "lora_A"):
        return effective_weight(layer)
    return weight_matrix(layer).detach().cpu().double()
