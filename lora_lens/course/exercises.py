"""The exercises that can be checked: what each asks for, what makes an answer right, and two hints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import nn

from lora_lens._base.errors import InputTypeError, MissingFileError
from lora_lens._base.schema import checked
from lora_lens._base.validate import instance, number, shown
from lora_lens.adapters.exactness import function_error, summary
from lora_lens.adapters.injection import lora_layers
from lora_lens.adapters.peft_names import ADAPTER
from lora_lens.experiments.continual.formulas import average_forgetting
from lora_lens.experiments.continual.metrics import accuracy_matrix, continual_scores
from lora_lens.experiments.continual.sequence_sweeps import ContinualSweep
from lora_lens.experiments.results import Sweep
from lora_lens.forgetting.features import feature_split
from lora_lens.spectrum.factorizing import spectra
from lora_lens.spectrum.placement import AfterEnergy, SpreadComponents
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum.window import Window
from lora_lens.tasks import bundled

RESULTS = Path(__file__).parents[2] / "data" / "results"
ROUNDING = 1e-4  # float32 models answer the same up to here, whatever the machine


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        kind: of answer that it asks for, in words.
        complaint: what is wrong with an answer, without the solution; "" if it is right. Raises where the
            answer is of another kind.
        hints: two, the second the better one.
        precision: behind the word "right", how close it had to be.
    """

    kind: str
    complaint: Callable[[object], str]
    hints: tuple[str, str]
    precision: str = ""


def _exact(right: Callable[[], float], *hints: str) -> Exercise:
    def complaint(answer: object) -> str:
        found = number(answer, "answer")
        return "" if found == right() else f"{found:g} is another number"

    return Exercise("a number", complaint, hints, ", exactly")


def _near(unit: str, tolerance: float, right: Callable[[], float], *hints: str) -> Exercise:
    def complaint(answer: object) -> str:
        found = number(answer, "answer")
        close = abs(found - right()) <= tolerance
        return "" if close else f"{found:g} is off by more than the {tolerance:g} that would do"

    return Exercise(f"a number ({unit})", complaint, hints, f", to within {tolerance:g}")


def _tried(answer: object, case: str, right: float, *arguments: object) -> str:
    """The complaint about a function on one case."""
    try:
        found = answer(*arguments)
    except Exception as error:  # whatever the student's own code raises
        return f"With {case} the function raises {type(error).__name__}: {shown(str(error))}"
    try:
        found = float(found)
    except (TypeError, ValueError):
        return f"With {case} the function returns {shown(found)}, which is no number"
    return "" if abs(found - right) <= 1e-3 else f"With {case} the function returns {found:.4g}"


def _function(answer: object, arguments: str) -> Callable:
    if not callable(answer):
        raise InputTypeError(f"answer must be a function of {arguments}, not {shown(answer)}")
    return answer


@cache
def _vision() -> tuple[nn.Module, SpectrumSet, torch.Tensor]:
    model, source = bundled.vision()
    return model, spectra(model, progress=False), source.test.inputs[:64]


def _stored(name: str) -> Path:
    if not (RESULTS / name).exists():
        raise MissingFileError(
            f"this exercise is about the stored runs in {name}, and {RESULTS} does not hold it; "
            "check it in a copy of the whole repository"
        )
    return RESULTS / name


# 01


def _effective_rank(answer: object) -> str:
    rank = _function(answer, "singular values")
    cases = {
        "five equal values": torch.full((5,), 2.0, dtype=torch.float64),
        "a single value that is not 0": torch.tensor([3.0, 0, 0, 0], dtype=torch.float64),
        "the values of a trained weight": _vision()[1]["blocks.2.mlp.fc1"].singular_values,
    }
    complaints = (
        _tried(rank, case, Spectrum("case", (len(s), len(s)), s).effective_rank, s)
        for case, s in cases.items()
    )
    return next(filter(None, complaints), "")


def _half_of_the_energy() -> int:
    squares = _vision()[1]["blocks.0.attn.qkv"].singular_values.square()
    return int((squares.cumsum(0) < squares.sum() / 2).sum()) + 1


# 02


def _trained_numbers() -> int:
    return sum(8 * sum(s.shape) for s in _vision()[1].values())


def _spread_share() -> float:
    model, found, images = _vision()
    layer = "blocks.2.mlp.fc1"
    return float(feature_split(model, layer, found[layer], SpreadComponents(8), images).shares.mean())


def _adapted(answer: object) -> pd.DataFrame:
    """The summary of an answer that must be an adapted model."""
    return summary(instance(answer, PeftModel, "answer", "a model from ll.attach"))


def _scaled(answer: object) -> str:
    layers, (model, found, images) = _adapted(answer), _vision()
    if set(layers["layer"]) != set(found):
        return f"{len(layers)} layers are adapted, where the vision model has {len(found)}"
    middle = Window.middle(8)
    if any(layers["rank"] != 8) or any(layers["first"] != middle.slice(96).start):
        return "It is another window than the middle one of rank 8"
    if any(layers["scaling"] != 32 / 8):
        return f"Its products B A are scaled by {layers['scaling'].iloc[0]:g}"
    error = function_error(answer, model, images)
    return "" if error < ROUNDING else f"Its answers differ from the pretrained model's by {error:.2g}"


# 03


def _more_than_the_middle() -> float:
    """Points that PiSSA forgets more, at the rate at which it learns as much as the middle at 0.005."""
    table = Sweep.open(_stored("digits.jsonl.xz")).table
    means = table.groupby(["position", "lr"])[["accuracy", "forgetting"]].mean()
    first, middle = means.loc[0.0], means.loc[(0.5, 0.005)]
    rate = (first["accuracy"] - middle["accuracy"]).abs().idxmin()
    return 100 * (first.loc[rate, "forgetting"] - middle["forgetting"])


def _by_rank(answer: object) -> str:
    answer = answer.to_frame("forgetting") if isinstance(answer, pd.Series) else answer
    instance(answer, pd.DataFrame, "answer", "a table")
    keys = ["rank", "position"]
    answer = answer.reset_index([name for name in answer.index.names if name in keys])
    answer = checked(answer, [*keys, "forgetting"], "the answer", "groupby(...).mean()")
    if (percent := answer["forgetting"][answer["forgetting"].abs() > 1]).size:
        return f"The column forgetting holds {percent.iloc[0]:g}, which is no share; 80% is 0.8"
    right = Sweep.open(_stored("ranks.jsonl.xz")).table.groupby(keys)["forgetting"].mean()
    found = answer.groupby(keys)["forgetting"].agg(["mean", "size"]).reindex(right.index)
    if len(answer) != len(right) or (found["size"] != 1).any():
        return f"The table has {len(answer)} rows, where each of the {len(right)} windows should have one"
    off = (found["mean"] - right).abs() > 1e-3
    return f"The forgetting of {int(off.sum())} of {len(right)} windows is another" if off.any() else ""


# 04


@cache
def _left_of_the_excess() -> float:
    """Of what the first window forgets more than the middle one at 0.005, the share at equal update."""
    sweep = Sweep.open(_stored("digits.jsonl.xz"))
    at_rate, moved = (
        found.set_index("position")["forgetting"] for found in (sweep.fair(lr=0.005), sweep.fair(update=0.3))
    )
    return float((moved[0.0] - moved[0.5]) / (at_rate[0.0] - at_rate[0.5]))


def _chosen_on_others(answer: object) -> str:
    choose = _function(answer, "a table of runs")
    for name, rate in (("digits", 0.01), ("few_digits", 0.02), ("new_classes", 0.01)):
        runs = Sweep.open(_stored(f"{name}.jsonl.xz")).only(f"method == 'window' and lr == {rate}").table
        by_seed = runs.pivot(index="seed", columns="position", values="forgetting")
        best = {seed: by_seed.drop(index=seed).mean().idxmin() for seed in by_seed.index}
        right = float(np.mean([by_seed.loc[seed, position] for seed, position in best.items()]))
        if complaint := _tried(choose, f"the windows of {name} at {rate:g}", right, runs.copy()):
            return complaint
    return ""


# 05


def _dearer_than_the_middle() -> float:
    table = Sweep.open(_stored("smollm2.jsonl.xz")).table
    rises = table.groupby("position")["loss_rise"].mean()
    return float(np.exp(rises[1.0] - rises[0.5]))


def _by_luck(answer: object) -> str:
    share = _function(answer, "the seeds' differences")
    nats = Sweep.open(_stored("smollm2.jsonl.xz")).table.pivot_table("loss_rise", "seed", "position")
    cases = {
        "three seeds that agree": np.array([1.0, 2.0, 4.0]),
        "five seeds of which one is below 0": np.array([3.0, 5.0, -1.0, 2.0, 9.0]),
        "differences of which one is 0": np.array([4.0, 0.0, 1.0, -2.0]),
        "the windows at 0.625 and 0.75 of SmolLM2": (nats[0.625] - nats[0.75]).to_numpy(),
    }
    for case, differences in cases.items():
        signs = np.array(list(product((1, -1), repeat=len(differences))))  # the first are those seen
        means = (signs * differences).mean(axis=1)
        if complaint := _tried(share, case, float((means >= means[0]).mean()), differences.copy()):
            return complaint
    return ""


# 06


@cache
def _encoder(targets: str) -> tuple[nn.Module, SpectrumSet]:
    model = bundled.minilm()
    return model, spectra(model, targets, vectors=False, progress=False)


def _one_factor(answer: object) -> str:
    layers, found = _adapted(answer), _encoder("encoder.*")[1]
    if set(layers["layer"]) != set(found):
        return f"{len(layers)} layers are adapted, where the encoder's blocks have {len(found)}"
    trained = [name for name, p in answer.named_parameters() if p.requires_grad]
    if others := [name for name in trained if "lora_A" not in name]:
        return f"{others[0]} is trained as well"
    if any(layers["rank"] != 8) or len(trained) != len(found):
        return "Not every layer has a factor A of rank 8 that is trained"
    for layer in lora_layers(answer).values():
        b = layer.lora_B[ADAPTER].weight.detach().double()
        if (b.T @ b - torch.eye(8, dtype=b.dtype)).abs().max() > ROUNDING:
            return "The columns of B are not orthonormal, so the singular values are not all in A"
    return ""


def _mixed(answer: object) -> str:
    layers = _adapted(answer).set_index("layer")
    model, found = _encoder("encoder.layer.[0-4].*")
    if set(layers.index) != set(found):
        return f"{len(layers)} layers are adapted, where the five blocks have {len(found)}"
    for name in found:
        rule = Window.middle(8) if ".attention." in name else AfterEnergy(8, 0.9)
        start = int(SpectrumSet([found[name]]).table(rule)["start"].iloc[0])
        if layers.loc[name, "rank"] != 8 or layers.loc[name, "first"] != start:
            return f"{name} has another window, from component {layers.loc[name, 'first']} on"
    error = function_error(answer, model, {"input_ids": torch.arange(2000, 2016)[None]})
    return "" if error < ROUNDING else f"Its answers differ from the pretrained model's by {error:.2g}"


# 07


def _average_forgetting(answer: object) -> str:
    of_matrix = _function(answer, "R")
    table = ContinualSweep.open(_stored("split_fashion.jsonl.xz")).table
    cases = {
        "a task that gets better before it gets worse": np.array(
            [[0.8, 0, 0], [0.9, 0.7, 0], [0.6, 0.5, 0.9]]
        ),
        "tasks that go on getting better": np.array([[0.6, 0, 0], [0.7, 0.8, 0], [0.9, 0.8, 0.7]]),
        "a stored run": accuracy_matrix(table[table["run"] == table["run"].iloc[0]])[0],
    }
    cases["empty cells above the diagonal"] = np.where(np.tri(3) > 0, next(iter(cases.values())), np.nan)
    complaints = (_tried(of_matrix, case, average_forgetting(r), r.copy()) for case, r in cases.items())
    return next(filter(None, complaints), "")


@cache
def _wider_without_pairs() -> float:
    """The spread of the difference between the middle window and LoRA: without pairs, as a multiple."""
    sweep = ContinualSweep.open(_stored("split_fashion.jsonl.xz"))
    scores = continual_scores(
        sweep.only("strategy == 'merged' and (position == 0.5 or method == 'LoRA')").table
    ).set_index(["order", "seed"])
    middle, lora = (runs["average_forgetting"] for _, runs in scores.groupby("method", sort=True))
    return float(np.hypot(middle.std(), lora.std()) / (middle - lora).std())


# 08


@cache
def _rewound() -> pd.DataFrame:
    return pd.read_csv(_stored("rewinding.csv"))


def _flattery() -> float:
    """Points that going back gains more on the images that were chosen by; mean over all trainings."""
    points = _rewound().assign(value=lambda rows: 100 * (rows["accuracy"] - rows["forgetting"]))
    values = points.set_index(["part", "setting", "method", "seed", "lr", "t"])["value"]
    measured = values["test"].sort_index(level="t")
    better = values["validation"].loc[measured.index] - measured
    of_each = better.groupby(level=["setting", "method", "seed"])
    return float((of_each.first() - of_each.last()).mean())


def _least_forgetting(answer: object) -> str:
    choose = _function(answer, "a table and an accuracy")
    points = _rewound().query("part == 'validation'")
    for (setting, method, *_), curve in points.groupby(["setting", "method", "seed", "lr"]):
        curve = curve.reset_index(drop=True)
        least = curve["accuracy"].quantile(0.6)
        reached = curve[curve["accuracy"] >= least]
        t = reached.loc[reached["forgetting"] == reached["forgetting"].min(), "t"].max()
        case = f"a curve of {setting}, {method}, and an accuracy of {least:.3f},"
        if complaint := _tried(choose, case, t, curve.copy(), least):
            return complaint
    return ""


EXERCISES = {
    "01-1": Exercise(
        "a function of singular values",
        _effective_rank,
        (
            "Divide the values by their sum, then take exp of the entropy of these shares.",
            "A share of 0 adds nothing, but 0 * log(0) is nan: leave such shares out.",
        ),
        ", on hidden cases, to within 0.001",
    ),
    "01-2": _exact(
        _half_of_the_energy,
        "Energy is the sum of the squares of singular values, not of the values.",
        "cumsum adds the squares up from the largest; count those sums that are below half, and one more.",
    ),
    "02-1": _exact(
        _trained_numbers,
        "An adapter adds two matrices to every weight: A of shape (r, in) and B of shape (out, r).",
        "Count the numbers in both for one row of spectra.table(), then add up over all rows.",
    ),
    "02-2": Exercise(
        "a model from ll.attach",
        _scaled,
        (
            "alpha is an argument of ll.attach; the scaling is alpha / r.",
            "Attach the middle window of rank 8 anew, with alpha=32 and nothing else, and do not train it.",
        ),
        ", and it answers as the pretrained model does",
    ),
    "02-4": _near(
        "a share in [0, 1]",
        0.005,
        _spread_share,
        "ll.spectrum.SpreadComponents(8) goes wherever a window goes, into ll.forgetting.feature_split, too.",
        "Take the mean of the split's shares over the 64 images, as a share: 50 % is 0.5.",
    ),
    "03-1": _near(
        "points",
        0.1,
        _more_than_the_middle,
        "Which of PiSSA's rates gives the accuracy nearest to that of the middle window at 0.005?",
        "Take means over seeds, subtract the middle window's forgetting from PiSSA's, and multiply by 100.",
    ),
    "03-2": Exercise(
        "a table with the columns rank, position and forgetting",
        _by_rank,
        (
            "Group the stored runs by rank and position, and take the mean over their seeds.",
            "Leave forgetting a share, as it is stored, with one row for each rank and position.",
        ),
        ", to within 0.001",
    ),
    "04-4": _near(
        "a share in [0, 1]",
        0.005,
        _left_of_the_excess,
        "Subtract the middle window's forgetting from the first one's in either comparison, then divide.",
        "Above stands what is left, from moved; below the whole excess, from means of table at 0.005.",
    ),
    "04-5": Exercise(
        "a function of a table of runs",
        _chosen_on_others,
        (
            "Leave a seed out, take the window that forgets least in the others, and read it in that seed.",
            "Each seed is left out in turn and may get another window; return the mean of what was read.",
        ),
        ", on hidden cases",
    ),
    "05-3": _near(
        "a factor",
        0.01,
        _dearer_than_the_middle,
        "Perplexity is the exponential of the loss in nats, so a difference in nats becomes a factor.",
        "Subtract the windows' mean loss_rise, and only then take the exponential.",
    ),
    "05-4": Exercise(
        "a function of the seeds' differences",
        _by_luck,
        (
            "itertools.product((1, -1), repeat=n) has all patterns of signs; take the mean of each.",
            "The pattern that was seen is one of them and counts, as does every other with a mean as large.",
        ),
        ", on hidden cases, to within 0.001",
    ),
    "06-2": Exercise(
        "a model from ll.attach",
        _one_factor,
        (
            "ll.Variant says which factor is trained, and which one gets the singular values.",
            "Neither split nor train has its default, and B must not hold any of the singular values.",
        ),
        ": it trains A alone",
    ),
    "06-3": Exercise(
        "a model from ll.attach",
        _mixed,
        (
            "In a mapping the first pattern that matches a layer counts, so the narrower group comes first.",
            "targets leaves out the last block: a pattern may hold a range, as [0-2] for 0, 1 and 2.",
        ),
        ": every layer has its window, and it answers as the pretrained model does",
    ),
    "07-1": Exercise(
        "a function of R",
        _average_forgetting,
        (
            "The last task has not been followed by another: the mean is over the columns before it.",
            "A task may be at its best after it was learnt: take np.nanmax of all rows but the last.",
        ),
        ", on hidden cases, to within 0.001",
    ),
    "07-5": _near(
        "a factor",
        0.02,
        _wider_without_pairs,
        "Without pairs the variances of the two methods add up; the root of their sum is the spread.",
        'With ["order", "seed"] as the index of both, pandas subtracts in pairs; divide by the std of that.',
    ),
    "08-2": _near(
        "points",
        0.05,
        _flattery,
        "For each method and seed: accuracy - forgetting at the least t, less that at t = 1, on either part.",
        'The points to take are those that the part "test" has; subtract the gain on "test" from the other.',
    ),
    "08-6": Exercise(
        "a function of a table and an accuracy",
        _least_forgetting,
        (
            "First leave out the points that are less accurate, then look for the least forgetting.",
            "Where several points forget least, return the largest t of theirs, not the first one found.",
        ),
        ", on hidden cases",
    ),
}
