from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import lora_lens as ll
from lora_lens.experiments import pilot
from lora_lens.experiments.pilot import advise, judged_on_training_examples, unless_better

SMALL = {"steps": 4, "batch_size": 16, "progress": False, "jobs": 1}
CHOICE = {"windows": ll.windows(rank=8, count=3), "rates": [5e-3, 2e-2]}


@pytest.fixture(scope="module")
def experiment(model, source, digits, spectra) -> dict:
    return {
        "model": model,
        "task": digits.first(100, 50),
        "retain": source.first(100, 50),
        "spectra": spectra,
    }


@pytest.fixture
def quick(patch_vit, experiment) -> dict:
    """The same tasks and a small random model, for what does not depend on the model."""
    return experiment | {"model": patch_vit, "spectra": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pilot") / "store"


@pytest.fixture(scope="module")
def advice(experiment, folder):
    return advise(**experiment, **SMALL, **CHOICE, budget=None, store=folder)


def test_a_pilot_tries_rates_then_windows_then_fresh_seeds_of_its_choice(advice):
    runs = advice.evidence
    assert runs["rung"].tolist() == ["rates"] * 2 + ["windows"] * 2 + ["final"] * 3
    assert runs["steps"].tolist() == [2] * 4 + [4] * 3
    assert advice.spent == 2 * 4 + 3 * 4
    assert set(runs.loc[runs["rung"] == "rates", "position"]) == {0.5}
    assert sorted(runs.loc[runs["rung"] == "windows", "position"]) == [0, 1]
    assert runs["seed"].tolist() == [0] * 4 + [1, 2, 3]
    assert runs["stands_for"].tolist()[:2] == [5e-3, 2e-2]
    factor = np.array([2**0.5] * 4 + [1] * 3)  # half the steps, as far from the start
    np.testing.assert_allclose(runs["lr"], runs["stands_for"] * factor)
    np.testing.assert_allclose(runs["value"], runs["accuracy"] - runs["forgetting"])


def test_its_advice_is_what_the_final_runs_say(advice):
    final = advice.evidence[advice.evidence["rung"] == "final"]
    assert final["position"].tolist() == [advice.window.position] * 3
    assert final["lr"].tolist() == [advice.lr] * 3
    assert advice.value == final["value"].mean()
    assert advice.interval[0] <= advice.value <= advice.interval[1]
    assert (advice.rule, advice.rank) == ("pilot", 8)
    for part in (
        "accuracy - 1 * forgetting",
        "20 optimizer steps (5 full runs)",
        "in runs of 2 steps",
        "at 1.41 times",
    ):
        assert part in advice.words


def test_a_pilot_goes_on_from_its_store_and_never_reads_test_examples(advice, experiment, folder):
    times = {f: f.stat().st_mtime_ns for f in folder.rglob("*.json")}
    task = experiment["task"]
    spoilt = replace(task.test, labels=task.test.labels.roll(1), inputs=torch.zeros_like(task.test.inputs))
    unseen = experiment | {
        "task": replace(task, test=spoilt),
        "retain": replace(experiment["retain"], test=experiment["retain"].test.first(1)),
    }
    again = advise(**unseen, **SMALL, **CHOICE, budget=None, store=folder)
    assert again.evidence.equals(advice.evidence)
    assert (again.window, again.lr, again.words) == (advice.window, advice.lr, advice.words)
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*.json")} == times


def test_a_usual_rate_that_ruins_the_model_is_left(experiment):
    # 1 is closer to 5e-3 than 1e-5, by the ratio, and far too high.
    one = {"windows": [ll.Window.middle(8)], "rates": [1e-5, 1.0]}
    advice = advise(**experiment, **SMALL, **one, budget=None)
    assert advice.lr == 1e-5
    assert "left the window of rank 8 at position 0.5 with learning rate 1 for" in advice.words
    assert advice.evidence["rung"].tolist() == ["rates"] * 2 + ["final"] * 3


def test_a_budget_makes_the_short_runs_longer_up_to_full_length(quick):
    one = {"windows": [ll.Window.middle(8)], "rates": [5e-3, 2e-2]}
    advice = advise(**quick, **SMALL | {"steps": 3}, **one, budget=1000)
    assert advice.evidence["steps"].tolist() == [3] * 5
    assert advice.spent == 15


def test_with_nothing_to_choose_from_only_the_final_runs_are_made(quick):
    advice = advise(**quick, **SMALL | {"steps": 1}, windows=[ll.Window.last(4)], rates=[1e-3], budget=None)
    assert advice.evidence["rung"].tolist() == ["final"] * 3
    assert (advice.window, advice.lr, advice.spent) == (ll.Window.last(4), 1e-3, 3)
    assert "nothing else to choose from" in advice.words


def test_advice_on_spectra_in_a_metric_says_which(quick):
    found = ll.spectra(quick["model"], metric=quick["task"], progress=False)
    only = {"windows": [ll.Window.last(4)], "rates": [1e-3], "budget": None}
    advice = advise(**quick | {"spectra": found}, **SMALL | {"steps": 1}, **only)
    assert f"position 1 with learning rate 0.001 in the {found.metric}: " in advice.words
    assert set(advice.evidence["variant"]) == {found.metric}


def test_without_a_budget_the_usual_choice_comes_and_the_model_does_not_run(
    experiment, patch_vit, monkeypatch
):
    patch_vit.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    monkeypatch.setattr(pilot, "compute_spectra", lambda *_, **__: pytest.fail("weights were factorized"))
    unseen = experiment | {"model": patch_vit, "spectra": None}
    assert advise(**unseen, rank=4).rule == "stored"
    advice = advise(**unseen, windows=ll.windows(rank=4, count=5))
    assert (advice.window, advice.lr) == (ll.Window.middle(4), 5e-3)
    assert (advice.rule, advice.spent) == ("fixed", 0)
    assert np.isnan([advice.value, *advice.interval]).all()
    assert advice.evidence["position"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert advice.evidence["usual"].tolist() == [False, False, True, False, False]
    assert "Nothing was trained" in advice.words


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), min_size=1, max_size=6),
    st.integers(0, 5),
)
def test_the_usual_is_left_only_for_the_best_and_by_more_than_its_error(pairs, usual):
    values, errors = np.array(pairs).T
    usual %= len(values)
    place = unless_better(values, errors, usual)
    assert place in (usual, values.argmax())
    assert (place != usual) == (values.max() - values[usual] > errors[values.argmax()])


def test_examples_are_held_out_of_the_training_set(digits, source):
    numbered = replace(digits.train, inputs=torch.arange(len(digits.train)).float()[:, None, None, None])
    held = judged_on_training_examples(replace(digits, train=numbered), source, seed=3)
    train, test = (set(part.inputs.flatten().tolist()) for part in (held["task"].train, held["task"].test))
    assert len(test) == 500 and len(train) == 7000
    assert not train & test
    assert len(held["retain"].test) == 500
    few = judged_on_training_examples(digits.first(44), source.first(30), seed=3)
    assert [len(few["task"].train), len(few["task"].test), len(few["retain"].test)] == [36, 8, 30]


def test_what_cannot_be_advised_is_met_before_the_first_run(experiment, tmp_path, digits):
    def asked(**changes: object) -> None:
        advise(**experiment | {"store": tmp_path / "s", "budget": None} | changes)

    with pytest.raises(ValueError, match="advice needs the task that the model knows"):
        asked(retain=None)
    with pytest.raises(ValueError, match="weight must be 0 or more, not -1"):
        asked(weight=-1)
    with pytest.raises(ValueError, match=r"rank 97 does not fit blocks.0.attn.qkv"):
        asked(rank=97)
    with pytest.raises(ValueError, match=r"100 steps is too small: 8 short runs of 30 .* take 600"):
        asked(budget=100)
    with pytest.raises(ValueError, match="there is nothing to choose from"):
        asked(rates=[])
    with pytest.raises(ValueError, match=r"rates holds the same value twice: 0.01, 0.01"):
        asked(rates=[0.01, 0.01])
    with pytest.raises(ValueError, match=r"each rate must be positive and finite, not 0.0"):
        asked(rates=[0, 0.01])
    with pytest.raises(ValueError, match="has 4 training examples: a pilot needs at least 5"):
        asked(task=digits.first(4, 1))
    with pytest.raises(TypeError, match="advise has no setting 'learning_rate'; there are targets, alpha"):
        asked(learning_rate=1e-3)
    with pytest.raises(TypeError, match="advise has no setting 'batchsize'; did you mean 'batch_size'"):
        asked(batchsize=3)
    with pytest.raises(TypeError, match=r"steps must be a whole number, not 1\.5"):
        asked(steps=1.5)
    with pytest.raises(TypeError, match="retain must be a task"):
        asked(retain=[1])
    assert not (tmp_path / "s").exists()
