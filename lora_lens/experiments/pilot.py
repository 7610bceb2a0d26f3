"""Which window and learning rate to use for a task: by a short pilot, or without any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.validate import instance, known_settings, number, seed_number, sequence, whole_number
from lora_lens.adapters.attaching import planned
from lora_lens.experiments.advisor import Advice, checked_weight, in_words, value_of
from lora_lens.experiments.engines.choice import chosen_engine
from lora_lens.experiments.records import store_path
from lora_lens.experiments.stored_advice import by_stored_sweeps
from lora_lens.experiments.sweeps import Grid, sweep
from lora_lens.forgetting.fair_comparison import bootstrap_interval
from lora_lens.spectrum.factorizing import spectra as compute_spectra
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.spectrum.window import Placement, Window, windows as evenly_spaced
from lora_lens.tasks.task import Task
from lora_lens.training.settings import MOST_STEPS, SETTINGS, training_with

USUAL_RATE = 5e-3  # with the middle window the best guess before any run; see data/measure_advisor.py
RATES = (2e-3, 5e-3, 1e-2, 2e-2)
FINAL_SEEDS = 3
HELD_OUT = 500  # examples of each task
TAKEN = ("lr", "seed", "steps")  # by arguments of its own
SETTINGS_OF_ALL = (
    "targets", "alpha", "variant", "watch", "jobs", "engine", "progress",
    *(s for s in SETTINGS if s not in TAKEN),
)  # fmt: skip


def advise(
    model: nn.Module,
    task: Task,
    retain: Task,
    *,
    rank: int = 8,
    windows: Sequence[Window] | None = None,
    rates: Sequence[float] = RATES,
    steps: int = 120,
    budget: int | None = 0,
    spectra: SpectrumSet | None = None,
    weight: float = 1.0,
    seed: int = 0,
    store: str | Path | None = None,
    **settings: object,
) -> Advice:
    """What to train with: by stored sweeps of other tasks, or with a ``budget`` a window by a short pilot.

    Without training the advice is the rule that had the least regret in the stored sweeps
    (data/compare_rules.py): ordinary LoRA under a small L2, and no window. Where ``windows`` are given it
    is the usual one of these, at the usual rate. Neither looks at the task. The pilot, which was no better
    there than the usual window, seeks a high value = accuracy - weight * forgetting among windows alone.
    It doubts window and rate, in three rungs: every rate with
    the middle window; the other windows at the rate that came out; and three fresh seeds of the choice at
    full length, which choose nothing and give the value and its interval. One coordinate after the
    other costs rates + windows - 1 short runs, where all pairs would cost rates * windows.

    The first two rungs leave the usual choice only for one that is more than a standard error better
    (Breiman et al. 1984, "Classification and regression trees", section 3.4.3). The error is that of the
    difference of two values made of independent shares, the root of the sum over both of
    a (1 - a) / n + weight^2 r (1 - r) / m, for accuracies a and r on n new and m retained examples.

    Short runs have half the steps by default, and sqrt(steps / short) times the rate that they stand for: a
    step of Adam is about as long as its rate, so where the steps' directions are independent, both runs end
    as far from their start. At equal rates a short run rewards what learns fast. With the middle window and
    half the steps, 1e-2 was better than 5e-3 by 1.8 points on digits and 2.7 on new classes; runs of full
    length lost 0.5 and 5.6 points by it, short runs at scaled rates gained 0.2 and lost 5.0 (2 seeds each).
    Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943; Li et al. 2018, "Hyperband") would
    start with far shorter runs: with an eighth of the steps 1e-2 or 2e-2 came first on four of five tasks.

    Runs are judged on training examples: at most 500, and at most a fifth, of the new task's, which are
    held out; and at most 500 of the retained task's. Test examples are not touched. The final runs
    are judged on the same ones, so a choice that suits them by chance still flatters the value a little.

    Args:
        model: the pretrained model; it is left as it was.
        task: what to learn.
        retain: what the model can do and should not forget; its training examples are used.
        rank: of the windows, unless they are given.
        windows: to choose from; default five of ``rank`` for a pilot. The one in the middle of the list is
            the usual one.
        rates: to choose from; the one closest to 5e-3, by its logarithm, is the usual one.
        steps: of the run that the advice is for.
        budget: optimizer steps for all runs together; 0 for no training. None is the usual pilot: short runs
            of half the ``steps`` and the final ones, 7 full runs with the default windows and rates. More
            makes the short runs longer, up to full length; the rest is not spent.
        spectra: of this model with all vectors, if they are at hand.
        weight: of forgetting in the value, 0 or more.
        seed: of the held-out examples and of the short runs; the final ones have the three numbers after it.
        store: a folder that keeps the runs, as for ``sweep``; an interrupted pilot goes on from there.
        settings: targets, alpha, variant, watch, jobs, engine and progress as for :func:`lora_lens.sweep`,
            and those of :class:`lora_lens.Training`, the same for all runs.

    Returns:
        Advice whose evidence is, after a pilot, the table of all its runs as from ``sweep``, with rung
        (rates, windows or final), stands_for (the rate at full length; lr is that of the run) and value;
        without training, rules and their regret in the stored sweeps (the columns of data/results/rules.csv),
        or of given windows position, start and usual (whether it is the one that is advised).

    Raises:
        ValueError: no retained task, a negative ``weight``, nothing to choose from, a rank or window that
            does not fit, too few examples to hold some out, or too small a budget; all before the first run.
        TypeError: an argument is of another type.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> advice = ll.advise(model, task, retain=task, rank=2)
        >>> print(advice.method, "with learning rate", advice.lr)
        LoRA of rank 2, L2 to initial 0.01 with learning rate 0.005
        >>> adapted = ll.attach(model, advice.method)
    """
    weight = checked_weight(weight)
    known_settings(settings, SETTINGS_OF_ALL, "advise")
    steps = whole_number(steps, "steps", least=1, most=MOST_STEPS)
    seed = seed_number(seed)
    budget = None if budget is None else whole_number(budget, "budget", least=0)
    training_with({key: settings[key] for key in settings if key in SETTINGS}, "advise")
    if store is not None:
        store_path(store)
    if retain is None:
        raise InputError(
            "advice needs the task that the model knows: its forgetting is half of what is weighed"
        )
    for name, given in (("task", task), ("retain", retain)):
        instance(given, Task, name, "a task, such as from ll.tasks.folder_task or ll.tasks.text_task")
    of_any = windows is None
    windows = evenly_spaced(rank, count=5) if of_any else sequence(windows, "windows", "windows")
    rates = [number(rate, "each rate", above=0) for rate in sequence(rates, "rates", "learning rates")]
    usual = _usual(windows, rates)
    short = _short_steps(budget, steps, len(rates) + len(windows) - 1)
    targets = settings.get("targets")
    checked = {key: settings[key] for key in ("targets", "alpha", "variant") if key in settings}
    for window in windows:
        instance(window, Placement, "each of windows", "a window, such as those of ll.windows(rank=8)")
        planned(model, window, spectra=spectra, **checked)
    if not short:
        return by_stored_sweeps(rank) if of_any else _untrained(usual, windows)
    judged = judged_on_training_examples(task, retain, seed)
    chosen_engine(settings.get("engine"), settings.get("jobs"))  # raises before the spectra are computed
    if spectra is None:
        spectra = compute_spectra(model, targets, progress=False)
    shared = {"model": model, "spectra": spectra, "store": store, "evaluations": 2, **settings, **judged}
    return _piloted(Pilot(windows, rates, usual, short, steps, weight, seed), shared)


@dataclass(frozen=True)
class Choice:
    """A window and the rate to train it with."""

    window: Window
    lr: float

    def __str__(self) -> str:
        return f"the {self.window} with learning rate {self.lr:g}"


@dataclass(frozen=True)
class Pilot:
    """What a pilot chooses from, and how long its runs are."""

    windows: Sequence[Window]
    rates: Sequence[float]
    usual: Choice
    short: int  # steps of the runs that choose
    steps: int  # of the final ones
    weight: float
    seed: int

    @property
    def chooses(self) -> bool:
        return len(self.windows) + len(self.rates) > 2


def unless_better(values: np.ndarray, errors: np.ndarray, usual: int) -> int:
    """The place of the highest value if it exceeds the usual one's by more than its error, else ``usual``.

    Args:
        values: (n,).
        errors: (n,), standard errors of each value's difference from the usual one's.
    """
    best = int(np.argmax(values))  # the first of equals
    return best if values[best] - values[usual] > errors[best] else usual


def judged_on_training_examples(task: Task, retain: Task, seed: int) -> dict[str, Task]:
    """Both tasks with training examples as their test examples, the new one's taken out of its training set.

    Nothing trains on the retained task here, so its examples stay where they are.
    """
    count = min(HELD_OUT, len(task.train) // 5)
    if count == 0:
        raise InputError(
            f"{task.name} has {len(task.train)} training examples: a pilot needs at least 5, to hold out "
            "a fifth of them; budget=0 gives advice without one"
        )
    rows = _shuffled(len(task.train), seed)
    known = _shuffled(len(retain.train), seed)[:HELD_OUT]
    return {
        "task": replace(task, train=task.train.take(rows[count:]), test=task.train.take(rows[:count])),
        "retain": replace(retain, test=retain.train.take(known)),
    }


def _piloted(pilot: Pilot, shared: dict[str, object]) -> Advice:
    """The three rungs; ``shared`` goes to every sweep."""

    def run(
        rung: str, windows: Sequence[Window], rates: Sequence[float], seeds: Sequence[int], steps: int
    ) -> pd.DataFrame:
        faster = sqrt(pilot.steps / steps)
        stands_for = {rate * faster: rate for rate in rates}
        table = sweep(Grid(windows, lr=list(stands_for), seed=seeds), steps=steps, **shared).table
        value, stands_for = value_of(table, pilot.weight), table["lr"].map(stands_for)
        return table.assign(rung=rung, stands_for=stands_for, value=value)

    def chosen(runs: pd.DataFrame, usual: int) -> int:
        examples = len(shared["task"].test), len(shared["retain"].test)
        values = runs["value"].fillna(-np.inf).to_numpy()  # a run that failed is never chosen
        errors = np.nan_to_num(_errors(runs, usual, pilot.weight, *examples))
        return unless_better(values, errors, usual)

    window, rate, rungs = pilot.usual.window, pilot.usual.lr, []
    if pilot.chooses:
        at_rates = run("rates", [window], pilot.rates, [pilot.seed], pilot.short)
        place = chosen(at_rates, pilot.rates.index(rate))
        rate, rungs = pilot.rates[place], [at_rates]
        if others := [other for other in pilot.windows if other != window]:
            at_windows = run("windows", others, [rate], [pilot.seed], pilot.short)
            place = chosen(pd.concat([at_rates.iloc[[place]], at_windows]), 0)
            window, rungs = [window, *others][place], [at_rates, at_windows]
    fresh = range(pilot.seed + 1, pilot.seed + 1 + FINAL_SEEDS)
    final = run("final", [window], [rate], fresh, pilot.steps)
    evidence = pd.concat([*rungs, final], ignore_index=True)
    values = final["value"].dropna()  # of seeds that failed the sweep has warned
    value, interval = float(values.mean()), bootstrap_interval(values)
    spent = int(evidence["steps"].sum())
    choice = Choice(window, rate)
    within = f" in the {metric}" if (metric := shared["spectra"].metric) else ""
    words = (
        f"Take {choice}{within}: {in_words(value, interval, len(values), pilot.weight)}, on training "
        f"examples that no run was trained on. {_how(pilot, choice, spent)}"
    )
    return Advice(window, rate, value, interval, words, evidence, "pilot", spent)


def _how(pilot: Pilot, choice: Choice, spent: int) -> str:
    cost = f"{spent} optimizer steps ({spent / pilot.steps:.3g} full runs)"
    if not pilot.chooses:
        return f"There was nothing else to choose from; that took {cost}."
    verdict = f"kept {choice}" if choice == pilot.usual else f"left {pilot.usual} for {choice}"
    factor = sqrt(pilot.steps / pilot.short)
    scaled = f" at {factor:.3g} times the rates they stand for" if factor > 1 else ""
    return (
        f"A pilot of {cost} {verdict}: it tried {len(pilot.rates)} rates, then {len(pilot.windows)} windows, "
        f"in runs of {pilot.short} steps with one seed{scaled}. It leaves the usual choice only for one "
        "that is more than a standard error better, so it does not see smaller gains."
    )


def _untrained(usual: Choice, windows: Sequence[Window]) -> Advice:
    words = (
        f"Take {usual}. Nothing was trained: this is the usual choice, not one for this task, and its value "
        "is unknown. ll.forgetting.foresee tells how fast each window would start to learn, and what "
        "that would disturb."
    )
    evidence = pd.DataFrame(
        [
            {
                "position": getattr(window, "position", None),
                "start": getattr(window, "start", None),
                "usual": window == usual.window,
            }
            for window in windows
        ]
    )
    nothing = float("nan"), float("nan")
    return Advice(usual.window, usual.lr, float("nan"), nothing, words, evidence, "fixed")


def _errors(runs: pd.DataFrame, usual: int, weight: float, learnt: int, retained: int) -> np.ndarray:
    """Standard errors of each value's difference from the usual one's, see :func:`advise`."""
    a, r = runs["accuracy"].to_numpy(), runs["retained_accuracy"].to_numpy()
    variances = a * (1 - a) / learnt + weight**2 * r * (1 - r) / retained
    return np.sqrt(variances + variances[usual])


def _short_steps(budget: int | None, steps: int, cells: int) -> int:
    """Steps of each run that chooses; 0 where nothing is to be trained."""
    if budget is None:
        return ceil(steps / 2)
    if budget == 0:
        return 0
    cells = cells if cells > 1 else 0
    least = ceil(steps / 4)  # shorter runs tell who learns fast, not what is good in the end
    minimum = cells * least + FINAL_SEEDS * steps
    if not budget >= minimum:
        raise InputError(
            f"a budget of {budget} steps is too small: {cells} short runs of {least} steps and {FINAL_SEEDS} "
            f"of {steps} take {minimum}; give that, fewer windows or rates, or 0 for advice without a pilot"
        )
    return min(steps, (budget - FINAL_SEEDS * steps) // cells) if cells else steps


def _usual(windows: Sequence[Window], rates: Sequence[float]) -> Choice:
    if not windows or not rates:
        raise InputError("there is nothing to choose from: give at least one window and one rate")
    for name, values in (("windows", windows), ("rates", rates)):
        if len(set(values)) < len(values):
            raise InputError(f"{name} holds the same value twice: {listed(map(str, values))}")
    return Choice(windows[len(windows) // 2], min(rates, key=lambda rate: abs(log(rate / USUAL_RATE))))


def _shuffled(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
