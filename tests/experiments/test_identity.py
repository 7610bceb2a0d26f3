from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from small_sequences import SETTINGS, pairs, retained, small_vit

import lora_lens as ll
from lora_lens.experiments.continual.strategies import Continued, Merged, exact_strategy
from lora_lens.experiments.identity import exact, exact_method, named_method, reads_spectra, run_name
from lora_lens.spectrum.placement import AfterEnergy, ByLayer, Components, HoldingEnergy, RandomComponents
from lora_lens.spectrum.window import Placement
from lora_lens.training import EWC, KLAnchor, L2ToInitial, Regularized, Replay

FEW = {key: value for key, value in SETTINGS.items() if key != "jobs"}
FIRST, OTHER = Components(range(8)), Components((0, 1, 2, 3, 4, 5, 20, 21))


class OwnLoRA(ll.LoRA):
    """What a method of somebody else does with spectra that it is given, nobody knows."""


def test_every_method_that_may_start_from_spectra_is_told_apart_by_their_metric():
    without = (ll.LoRA(2), ll.LinearProbe(), ll.FullFineTuning(), ll.PeftMethod("pissa", 2))
    within = (FIRST, ll.Window.first(2), ByLayer({"a": FIRST}), OwnLoRA(2))
    assert not any(map(reads_spectra, (*without, Regularized(ll.LoRA(2), KLAnchor(1)))))
    assert all(map(reads_spectra, (*within, Regularized(FIRST, KLAnchor(1)))))


def name(method: object) -> str:
    return run_name(named_method(method), exact_method(method))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FIRST, OTHER),
        (AfterEnergy(4, 0.5), AfterEnergy(4, 0.5 + 1e-12)),
        (HoldingEnergy(4, 0.1), HoldingEnergy(4, 0.1 + 1e-16)),
        (ByLayer({"a": FIRST}), ByLayer({"a": OTHER})),
        (Regularized(FIRST, KLAnchor(1)), Regularized(OTHER, KLAnchor(1))),
        (Regularized(ll.LoRA(2), KLAnchor(1)), Regularized(ll.LoRA(2), KLAnchor(1 + 1e-15))),
        (
            Regularized(ll.Window(8, 0.1234567), L2ToInitial(1)),
            Regularized(ll.Window(8, 0.12345671), L2ToInitial(1)),
        ),
        (
            Regularized({"a": ll.Window(8, 0.1234567)}, L2ToInitial(1)),
            Regularized({"a": ll.Window(8, 0.12345671)}, L2ToInitial(1)),
        ),
    ],
)
def test_methods_that_differ_have_different_names_whatever_their_texts(one, other):
    assert name(one) != name(other)


@pytest.mark.parametrize("field", [f.name for f in fields(ll.Variant)])
def test_every_field_of_a_variant_tells(field):
    others = {"split": "A", "train": "A", "dropout": 0.1, "dtype": torch.float64, "base": "offset"}
    assert str(replace(ll.Variant(), **{field: others.get(field, True)})) != str(ll.Variant())


def test_dropouts_that_differ_in_the_last_digit_are_told_apart():
    assert str(ll.Variant(dropout=0.1)) == "dropout 0.1"  # as in the names of earlier versions
    assert str(ll.Variant(dropout=0.12345678)) != str(ll.Variant(dropout=0.1234567))


def test_a_strategy_is_told_by_its_regularizer():
    assert exact_strategy(Merged()) == exact_strategy(Merged(Replay(4))) == {}
    assert exact_strategy(Continued(EWC(1.0))) != exact_strategy(Continued(EWC(1.0 + 1e-15)))
    assert exact_strategy(Continued(EWC(1.0))) != exact_strategy(Continued(EWC(1.0, examples=7)))


def mine(shift: int) -> Placement:
    @dataclass(frozen=True)
    class Mine(Placement):
        rank: int

        def select(self, singular_values, name="this weight"):
            return slice(shift, shift + self.rank)

    return Mine(2)


def edited() -> Placement:
    @dataclass(frozen=True)
    class Mine(Placement):
        rank: int

        def select(self, singular_values, name="this weight"):
            return slice(0, self.rank) if self.rank > 2 else slice(1, 1 + self.rank)

    Mine.__qualname__ = "mine.<locals>.Mine"
    return Mine(2)


def test_a_user_s_rule_is_told_by_its_code_as_well():
    assert exact(mine(1), "it") == exact(mine(1), "it") != exact(mine(2), "it")
    assert exact(edited(), "it") != exact(mine(1), "it")


@dataclass(frozen=True)
class Shared(Regularized):
    share: ClassVar[float] = 0.5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), (2, 1)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),  # the first pattern that matches counts
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (np.zeros(2), np.zeros((2, 1))),
        (torch.float32, torch.float64),
        (0.1, 0.1 + 1e-17 + 1e-16),
        (ll.LoRA(2), "LoRA(rank=2)"),
        (Regularized(ll.LoRA(2), KLAnchor(1)), Shared(ll.LoRA(2), KLAnchor(1))),
    ],
)
def test_content_is_told_apart(one, other):
    told = [json.dumps(exact(value, "it")) for value in (one, one, other)]
    assert told[0] == told[1] != told[2]
    assert exact({3, 1}, "it") == exact({1, 3}, "it") and exact(np.float64(0.5), "it") == 0.5


@dataclass(frozen=True)
class WithFunction(Placement):
    rank: int
    rule: object

    def select(self, singular_values, name="this weight"):
        return self.rule(singular_values)


class NoDataclass(Placement):
    rank = 2

    def select(self, singular_values, name="this weight"):
        return slice(0, 2)


@dataclass
class NotFrozen(Placement):
    rank: int

    def select(self, singular_values, name="this weight"):
        return slice(0, 2)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (WithFunction(2, lambda values: slice(0, 2)), "rule of one of window has nothing that tells it from"),
        (NoDataclass(), "use a frozen dataclass whose fields are numbers"),
        (NotFrozen(2), "must be a frozen dataclass"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(method, message):
    with pytest.raises(TypeError, match=message):
        ll.Grid([method])


@dataclass(frozen=True)
class Called(Placement):
    rank: int
    start: int  # not in the text
    label: str = "mine"

    def select(self, singular_values, name="this weight"):
        return slice(self.start, self.start + self.rank)

    def __str__(self):
        return self.label


def test_two_methods_of_one_text_are_two_runs_and_two_rows_in_words(tmp_path):
    sets = [Components(range(7)), Components((0, 1, 2, 3, 4, 5, 20)), RandomComponents(7)]
    grid = ll.Grid(lr=1e-2, baselines=[*sets, Called(2, 0), Called(2, 4), ll.LoRA(2), Called(2, 0, "LoRA")])
    same = {"model": small_vit(), "task": pairs()[0], "retain": retained(), "evaluations": 2} | SETTINGS
    table = ll.sweep(grid, store=tmp_path / "s", **same).table
    assert table["run"].is_unique and table["method"].is_unique
    assert table["method"].iloc[2] == "7 random components, seed 0"  # alone with its text
    assert table["method"].iloc[5] == "LoRA" and table["method"].iloc[6].startswith("LoRA [")
    runs = ll.Sweep.open(tmp_path / "s").table.set_index("run")
    assert runs.loc[table["run"], "method"].tolist() == table["method"].tolist()
    adapted = ll.attach(small_vit(), sets[1])
    run = ll.finetune(adapted, pairs()[0], retained(), lr=1e-2, evaluations=2, **FEW)
    assert table["loss"].iloc[1] == pytest.approx(run.curve["loss"].iloc[-1], rel=1e-4)
