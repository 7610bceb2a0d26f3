"""Every exercise's right answer passes, and plausible wrong ones get its hints."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import lora_lens as ll
from lora_lens.course.exercises import EXERCISES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "data" / "results"


@cache
def vision() -> tuple[torch.nn.Module, ll.Task, ll.SpectrumSet]:
    model, source = ll.tasks.bundled.vision()
    return model, source, ll.spectra(model, progress=False)


@cache
def encoder() -> tuple[torch.nn.Module, ll.SpectrumSet]:
    model = ll.tasks.bundled.minilm()
    return model, ll.spectra(model, "encoder.*", progress=False)


def effective_rank(s: torch.Tensor) -> float:
    q = s[s > 0] / s.sum()
    return float(torch.exp(-(q * q.log()).sum()))


def least_forgetting(table: pd.DataFrame, accuracy: float) -> float:
    reached = table[table["accuracy"] >= accuracy].sort_values(["forgetting", "t"], ascending=[True, False])
    return reached["t"].iloc[0]


@cache
def digits() -> ll.Sweep:
    return ll.Sweep.open(RESULTS / "digits.jsonl.xz")


def ranks() -> pd.DataFrame:
    return ll.Sweep.open(RESULTS / "ranks.jsonl.xz").table


def share_of_features(placement: object) -> float:
    model, source, spectra = vision()
    layer, images = "blocks.2.mlp.fc1", source.test.inputs[:64]
    return float(ll.forgetting.feature_split(model, layer, spectra[layer], placement, images).shares.mean())


def scaled(**how: object) -> torch.nn.Module:
    model, _, spectra = vision()
    return ll.attach(model, ll.Window.middle(8), spectra=spectra, **how)


def flattery(part: str = "validation") -> float:
    points = pd.read_csv(RESULTS / "rewinding.csv")
    points["value"] = 100 * (points["accuracy"] - points["forgetting"])
    chosen = points[points["part"] == "test"].drop(columns="part")
    same = chosen.merge(
        points[points["part"] == part], on=["setting", "method", "lr", "seed", "t"], suffixes=("_told", "")
    )
    same["better"] = same["value"] - same["value_told"]
    of_each = same.sort_values("t").groupby(["setting", "method", "seed"])["better"]
    return float((of_each.first() - of_each.last()).mean())


def one_factor(**variant: str) -> torch.nn.Module:
    model, spectra = encoder()
    how = {"targets": "encoder.*", "variant": ll.Variant(**variant)}
    return ll.attach(model, ll.Window.middle(8), spectra=spectra, **how)


def mixed(*order: str) -> torch.nn.Module:
    model, spectra = encoder()
    rules = {"all-attention": ll.Window.middle(8), "all-linear": ll.spectrum.AfterEnergy(8, 0.9)}
    plan = {name: rules[name] for name in order}
    return ll.attach(model, plan, targets="encoder.layer.[0-4].*", spectra=spectra)


def half_of(power: int) -> int:
    values = vision()[2]["blocks.0.attn.qkv"].singular_values ** power
    return int((values.cumsum(0) < values.sum() / 2).sum()) + 1


def by_rank(score: str) -> pd.DataFrame:
    return ranks().groupby(["rank", "position"], as_index=False)[[score]].mean()


def left_of_the_excess(first: float, middle: float) -> float:
    """From the forgetting at equal update, and at 0.005 that of the same windows."""
    table = digits().table
    at_rate = table[table["lr"] == 0.005].groupby("position")["forgetting"].mean()
    return (first - middle) / (at_rate[0.0] - at_rate[0.5])


@cache
def moved_as_far() -> pd.Series:
    sweep = digits()
    found = ll.forgetting.at_matched_update(sweep.table, sweep.drifts(), update=0.3)
    return found[found["method"] == "window"].set_index("position")["forgetting"]


def chosen_on_others(table: pd.DataFrame) -> float:
    read = []
    for seed in table["seed"].unique():
        others, own = table[table["seed"] != seed], table[table["seed"] == seed]
        best = others.groupby("position")["forgetting"].mean().sort_values().index[0]
        read += own.loc[own["position"] == best, "forgetting"].to_list()
    return sum(read) / len(read)


def nats(position: float) -> float:
    table = ll.Sweep.open(RESULTS / "smollm2.jsonl.xz").table
    return float(table.loc[table["position"] == position, "loss_rise"].mean())


def by_luck(differences: np.ndarray, least: Callable = np.greater_equal) -> float:
    signs = 1 - 2 * ((np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences))) & 1)
    sums = (signs * differences).sum(axis=1)
    return float(np.mean(least(sums, sums[0])))


def spread(paired: bool) -> float:
    table = ll.experiments.ContinualSweep.open(RESULTS / "split_fashion.jsonl.xz").table
    either = (table["position"] == 0.5) | (table["method"] == "LoRA")
    scores = ll.experiments.continual.continual_scores(table[(table["strategy"] == "merged") & either])
    scores["name"] = scores["position"].astype(object).where(scores["position"].notna(), scores["method"])
    both = scores.pivot(index=["order", "seed"], columns="name", values="average_forgetting")[[0.5, "LoRA"]]
    return float((both[0.5] - both["LoRA"]).std() if paired else both.var().sum() ** 0.5)


# An exercise, and what makes an answer to it: the right one, and a wrong one that somebody might give.
RIGHT: dict[str, Callable[[], object]] = {
    "01-1": lambda: effective_rank,
    "01-2": lambda: half_of(2),
    "02-1": lambda: sum(p.numel() for p in scaled().parameters() if p.requires_grad),
    "02-2": lambda: scaled(alpha=32),
    "02-4": lambda: share_of_features(ll.spectrum.SpreadComponents(8)),
    "03-1": lambda: 6.3,  # 8.9 - 2.6, as the notebook's solution has it
    "03-2": lambda: by_rank("forgetting"),
    "04-4": lambda: left_of_the_excess(*moved_as_far()[[0.0, 0.5]]),
    "04-5": lambda: chosen_on_others,
    "05-3": lambda: np.exp(nats(1.0)) / np.exp(nats(0.5)),
    "05-4": lambda: by_luck,
    "06-2": lambda: one_factor(split="A", train="A"),
    "06-3": lambda: mixed("all-attention", "all-linear"),
    "07-1": lambda: lambda R: np.mean(np.nanmax(R[:-1, :-1], axis=0) - R[-1, :-1]),
    "07-5": lambda: spread(paired=False) / spread(paired=True),
    "08-2": lambda: flattery(),
    "08-6": lambda: least_forgetting,
}
WRONG: dict[str, Callable[[], object]] = {
    "01-1": lambda: lambda s: torch.exp(-(s / s.sum() * (s / s.sum()).log()).sum()),
    "01-2": lambda: half_of(1),
    "02-1": lambda: sum(p.numel() for n, p in scaled().named_parameters() if "lora_A" in n),
    "02-2": lambda: scaled(),
    "02-4": lambda: share_of_features(ll.Window.middle(8)),
    "03-1": lambda: 19.4,  # at equal rates: 22.0 - 2.6
    "03-2": lambda: ranks()[["rank", "position", "forgetting"]],
    "04-4": lambda: left_of_the_excess(moved_as_far()[0.0], 0.0),  # not beside the middle window
    "04-5": lambda: lambda table: table.groupby("position")["forgetting"].mean().min(),
    "05-3": lambda: nats(1.0) / nats(0.5),
    "05-4": lambda: lambda differences: by_luck(differences, np.greater),
    "06-2": lambda: one_factor(train="A"),
    "06-3": lambda: mixed("all-linear", "all-attention"),
    "07-1": lambda: lambda R: np.mean((R.diagonal() - R[-1])[:-1]),  # minus the backward transfer
    "07-5": lambda: spread(paired=False),
    "08-2": lambda: flattery("test"),
    "08-6": lambda: lambda table, accuracy: table.loc[table["forgetting"].idxmin(), "t"],
}


def test_all_exercises_are_tried():
    assert list(EXERCISES) == list(RIGHT) == list(WRONG)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_right_answer_passes(exercise):
    verdict = ll.course.check(exercise, RIGHT[exercise]())
    assert verdict, verdict
    assert verdict.text.startswith(f"{exercise}: right")


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_plausible_wrong_answer_gets_the_hints_in_turn(exercise, monkeypatch):
    monkeypatch.setattr("lora_lens.course.checking._wrong", Counter())
    wrong = WRONG[exercise]()
    texts = [ll.course.check(exercise, wrong).text for _ in range(3)]
    for text, number in zip(texts, (1, 2, 2), strict=True):
        assert text.startswith(f"{exercise}: not yet. ")
        assert text.endswith(ll.course.hint(exercise, number))
        assert "\n" not in text


@pytest.mark.parametrize("exercise", ["01-2", "02-1", "02-4", "03-1", "04-4", "05-3", "07-5", "08-2"])
def test_no_hint_and_no_complaint_tells_the_number_that_is_asked_for(exercise):
    right = RIGHT[exercise]()
    said = ll.course.check(exercise, right + 1).text + " ".join(EXERCISES[exercise].hints)
    telling = {f"{right:g}", *(f"{right:.{digits}f}" for digits in (1, 2, 3))}
    assert not telling & set(re.findall(r"\d+\.?\d*", said))


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_answer_of_another_kind_is_refused_in_words(exercise):
    with pytest.raises(ll.errors.InputTypeError, match="must be"):
        ll.course.check(exercise, "it depends")


def test_a_function_that_fails_is_told_how():
    verdict = ll.course.check("01-1", lambda s: s.entropy())
    assert "five equal values the function raises AttributeError" in verdict.text
    assert "the function returns None, which is no number" in ll.course.check("01-1", lambda s: None).text


@pytest.mark.parametrize(
    ("exercise", "wrong"),
    [
        ("04-5", lambda table: table.groupby("seed")["forgetting"].min().mean()),
        ("05-4", lambda differences: 2.0 ** -len(differences)),
        ("05-4", lambda differences: min(1, 2 * by_luck(differences))),
        ("07-1", lambda R: np.mean(R[:-1].max(axis=0) - R[-1])),
        ("07-1", lambda R: np.mean(R[:-1, :-1].max(axis=0) - R[-1, :-1])),  # of empty cells nan
    ],
)
def test_other_wrong_functions_are_told_the_case(exercise, wrong):
    verdict = ll.course.check(exercise, wrong)
    assert not verdict and "the function returns" in verdict.text


@pytest.mark.parametrize("exercise", ["01-1", "04-5", "05-4", "07-1", "08-6"])
def test_the_function_that_the_notebook_folds_away_is_right(exercise):
    (path,) = (ROOT / "notebooks").glob(f"{exercise[:2]}_*.ipynb")
    text = "".join(line for cell in json.loads(path.read_text())["cells"] for line in cell["source"])
    solution = text.split(f"**{exercise[3:]}.** ")[-1].split("```python\n")
    code = next(block.split("```")[0] for block in solution if "def answer(" in block)
    names = {"torch": torch}
    body = [
        node
        for node in ast.parse(code).body
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)
    ]
    exec(compile(ast.Module(body, []), path.name, "exec"), names)
    verdict = ll.course.check(exercise, names["answer"])
    assert verdict, verdict


def test_a_model_that_was_trained_no_longer_answers_as_before(digits):
    trained = scaled(alpha=32)
    ll.finetune(trained, digits.first(train=64, test=8), lr=0.01, steps=2, evaluations=2, progress=False)
    assert "differ from the pretrained model's by" in ll.course.check("02-2", trained).text


def test_a_table_without_a_column_is_refused():
    with pytest.raises(ll.errors.InputError, match="position"):
        ll.course.check("03-2", by_rank("forgetting").drop(columns="position"))


def test_a_table_in_percent_is_told_so():
    percent = by_rank("forgetting").assign(forgetting=lambda table: 100 * table["forgetting"])
    assert "which is no share; 80% is 0.8" in ll.course.check("03-2", percent).text


def test_a_grouped_table_keeps_its_index():
    assert ll.course.check("03-2", ranks().groupby(["rank", "position"])[["forgetting"]].mean())


def test_without_the_stored_runs_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("lora_lens.course.exercises.RESULTS", tmp_path)
    with pytest.raises(ll.errors.MissingFileError, match="stored runs in ranks"):
        ll.course.check("03-2", pd.DataFrame({"rank": [4], "position": [0.0], "forgetting": [0.1]}))


def test_numbers_may_come_from_numpy_or_torch():
    right = half_of(2)
    assert ll.course.check("01-2", np.int64(right)) and ll.course.check("01-2", torch.tensor(right))
