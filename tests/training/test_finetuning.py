from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from explored import narrow_vit
from torch import nn
from tqdm.auto import tqdm

import lora_lens as ll
from lora_lens._base.errors import LoraLensError
from lora_lens.spectrum.heads import classifier
from lora_lens.tasks.readouts import HeadReadout, features_of
from lora_lens.tasks.task import shuffled_rows
from lora_lens.training.run import Progress

SHORT = {"steps": 12, "batch_size": 32, "evaluations": 3, "progress": False}


@pytest.fixture(scope="module")
def small(source, digits) -> tuple[ll.Task, ll.Task]:
    return digits.first(400, 80), source.first(100, 80)


def test_a_run_learns_and_tells_its_curve(model, spectra, small):
    task, retain = small
    adapted = ll.attach(model, ll.Window.middle(8), spectra=spectra)
    run = ll.finetune(adapted, task, retain, **SHORT | {"steps": 40}, lr=3e-3)
    assert run.curve["step"].tolist() == [0, 20, 40]
    assert run.accuracy > run.curve["accuracy"].iloc[0] + 0.3
    assert run.retained_before >= 0.85
    assert run.forgetting == pytest.approx(run.retained_before - run.retained_accuracy)
    assert np.isnan(run.curve["loss"].iloc[0]) and run.curve["loss"].iloc[2] < run.curve["loss"].iloc[1]
    assert run.head.out_features == 10 and run.config.lr == 3e-3 and not run.diverged


def test_the_retained_score_is_that_of_the_old_head_on_the_adapted_features(model, spectra, small):
    task, retain = small
    adapted = ll.attach(model, ll.Window.first(8), spectra=spectra)
    run = ll.finetune(adapted, task, retain, **SHORT, lr=1e-2)
    with torch.inference_mode():
        plain = (adapted(retain.test.inputs).argmax(-1) == retain.test.labels).float().mean()
        old = classifier(adapted.get_base_model())
        assert torch.equal(old.weight, model.head.weight) and torch.equal(old.bias, model.head.bias)
        with features_of(old) as features:
            adapted(task.test.inputs)
        new = (run.head(features[0]).argmax(-1) == task.test.labels).float().mean()
    assert run.retained_accuracy == pytest.approx(float(plain))
    assert run.accuracy == pytest.approx(float(new))
    assert run.forgetting != 0


def test_the_same_seed_gives_the_same_run_and_another_seed_another(model, spectra, small):
    task, retain = small

    def run(seed: int) -> pd.DataFrame:
        adapted = ll.attach(model, ll.Window.last(8), spectra=spectra)
        return ll.finetune(adapted, task, retain, **SHORT, seed=seed).curve

    first = run(0)
    torch.manual_seed(99)  # the global random state plays no part
    pd.testing.assert_frame_equal(first, run(0), check_exact=True)
    assert not first.equals(run(1))


@pytest.mark.parametrize(
    "method", [ll.Window.middle(8), ll.LoRA(8), ll.LinearProbe(), ll.FullFineTuning()], ids=str
)
def test_only_what_the_method_trains_changes(method, model, small):
    adapted = ll.attach(model, method)
    before = copy.deepcopy(adapted.state_dict())
    frozen = {n for n, p in adapted.named_parameters() if not p.requires_grad}
    run = ll.finetune(adapted, *small, **SHORT)
    changed = {n for n, t in adapted.state_dict().items() if not torch.equal(t, before[n])}
    assert not changed & frozen
    if isinstance(method, ll.LinearProbe):
        assert not changed and run.forgetting == 0
    else:
        assert changed


def test_a_readout_that_is_given_is_trained_instead_of_a_new_one(model, spectra, small):
    task = small[0]
    given, start = (task.new_readout(model, seed=0) for _ in range(2))
    runs = [
        ll.finetune(ll.attach(model, ll.LoRA(4), spectra=spectra), task, readout=readout, **SHORT)
        for readout in (None, given)
    ]
    pd.testing.assert_frame_equal(runs[0].curve, runs[1].curve, check_exact=True)
    assert runs[1].head is given.head and torch.equal(runs[0].head.weight, given.head.weight)
    assert not torch.equal(given.head.weight, start.head.weight)
    again = ll.finetune(
        ll.attach(model, ll.LoRA(4), spectra=spectra), task, readout=given, **SHORT | {"steps": 1}
    )
    assert again.curve["test_loss"].iloc[0] != runs[0].curve["test_loss"].iloc[0]


def test_a_run_without_a_retained_task(model, small):
    run = ll.finetune(ll.attach(model, ll.LinearProbe()), small[0], **SHORT)
    assert np.isnan(run.forgetting) and run.accuracy > 0


def test_a_loss_that_explodes_ends_the_run_and_is_told(model, spectra, small):
    adapted = ll.attach(model, ll.Window.first(8), spectra=spectra)
    run = ll.finetune(adapted, *small, **SHORT, lr=1e20, warmup=0.0)
    assert run.diverged and run.curve["step"].iloc[-1] < 12
    assert 0 <= run.accuracy <= 1


@pytest.fixture
def adapted() -> nn.Module:
    return ll.attach(narrow_vit(0), ll.Window.first(4))


@pytest.fixture(scope="module")
def pair(digits) -> tuple[ll.Task, ll.Task]:
    """What to learn, and what the untrained narrow model has for a known task."""
    return digits.first(64, 40), digits.first(64, 30)


@pytest.fixture(scope="module")
def alone(pair) -> ll.Run:
    """What nobody watches."""
    return ll.finetune(ll.attach(narrow_vit(0), ll.Window.first(4)), *pair, **SHORT)


def test_whoever_watches_is_told_of_every_step_and_changes_nothing(adapted, alone, pair):
    told: list[Progress] = []
    run = ll.finetune(adapted, *pair, **SHORT, on_step=told.append)
    pd.testing.assert_frame_equal(run.curve, alone.curve, check_exact=True)
    assert torch.equal(run.head.weight, alone.head.weight) and not run.stopped
    assert [(p.step, p.steps) for p in told] == [(step, 12) for step in range(13)]
    assert [len(p.rows) for p in told] == [1] * 6 + [2] * 6 + [3]
    pd.testing.assert_frame_equal(told[-1].curve, run.curve, check_exact=True)
    assert np.isnan(told[0].loss) and np.mean([p.loss for p in told[1:7]]) == run.curve["loss"].iloc[1]


@pytest.mark.parametrize(("at", "tested"), [(0, [0]), (4, [0, 4]), (6, [0, 6]), (9, [0, 6, 9])])
def test_a_run_that_is_ended_is_tested_where_it_ends_and_returned_as_usual(adapted, alone, pair, at, tested):
    watched = ll.Task("watched", pair[1].classes, *(e.first(50) for e in (pair[1].train, pair[1].test)))
    run = ll.finetune(adapted, *pair, **SHORT, watch=[watched], on_step=lambda p: p.step == at)
    assert run.stopped and not run.diverged and run.curve["step"].tolist() == tested
    common = [step for step in tested if step in (0, 6)]
    pd.testing.assert_frame_equal(
        *(r.curve[r.curve["step"].isin(common)].reset_index(drop=True) for r in (run, alone)),
        check_exact=True,
    )
    assert run.accuracy == ll.evaluate(adapted, pair[0], HeadReadout(run.head, "model")).accuracy
    assert run.retained_accuracy == ll.evaluate(adapted, pair[1]).accuracy
    assert run.watched["after"].item() == ll.evaluate(adapted, watched).accuracy
    assert not adapted.training


def test_a_wish_to_end_after_the_last_step_comes_too_late(adapted, pair):
    run = ll.finetune(adapted, *pair, **SHORT, on_step=lambda p: p.step == 12)
    assert not run.stopped and run.curve["step"].tolist() == [0, 6, 12]


def test_whoever_watches_and_fails_leaves_random_state_and_bar_as_they_were(adapted, pair, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    torch.manual_seed(5)
    before, bars = torch.random.get_rng_state(), len(tqdm._instances)

    def fails(progress: Progress) -> None:
        torch.rand(progress.step + 1)
        if progress.step == 3:
            raise RuntimeError("the page is gone")

    with pytest.raises(RuntimeError, match="the page is gone"):
        ll.finetune(adapted, *pair, **SHORT | {"progress": True}, on_step=fails)
    assert torch.equal(torch.random.get_rng_state(), before) and len(tqdm._instances) == bars


def test_batches_visit_every_example_before_any_comes_again():
    batches = shuffled_rows(10, batch_size=4, seed=0)
    seen = torch.cat([next(batches) for _ in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": 0}, "lr must be positive and finite, not 0"),
        ({"lr": float("nan")}, "lr must be positive and finite, not nan"),
        ({"lr": float("inf")}, "lr must be positive and finite, not inf"),
        ({"lr": 1e300}, r"lr must be at most 1e\+30 and finite, not 1e\+300"),
        ({"weight_decay": 1e300}, "weight_decay must be at most"),
        ({"lr": "1e-3"}, "lr must be a number, not '1e-3'"),
        ({"steps": 1.5}, "steps must be a whole number, not 1.5"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0 and finite, not nan"),
        ({"precision": "bfloat"}, "not 'bfloat'; did you mean 'bfloat16'"),
        ({"precision": torch.bfloat16}, "precision must be one of 'float32', 'bfloat16', not dtype torch"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"warmup": 1.0}, "warmup must be in"),
        ({"evaluations": 1}, "evaluations must be at least 2"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises((ValueError, TypeError), match=message) as met:
        ll.Training(**setting)
    assert isinstance(met.value, LoraLensError)


def test_settings_are_plain_numbers_whatever_they_came_as():
    given = {"steps": np.int64(3), "lr": np.float32(0.5), "seed": torch.tensor(7), "warmup": 0}
    config = ll.Training(**given, batch_size=np.array(2))
    assert config == ll.Training(steps=3, lr=0.5, seed=7, warmup=0.0, batch_size=2)
    assert [type(getattr(config, n)) for n in ("steps", "lr", "seed", "warmup", "batch_size")] == [
        int, float, int, float, int,
    ]  # fmt: skip
    assert json.loads(json.dumps(asdict(config))) == asdict(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 1e-3}, "finetune has no setting 'learning_rate'; did you mean 'lr'"),
        ({"step": 3}, "finetune has no setting 'step'; did you mean 'steps'"),
        ({"config": {"lr": 1e-3}}, r"config must be an ll.Training, not \{'lr': 0.001\}"),
        ({"model": None}, "model must be a torch model, .* not None"),
        ({"task": None}, "task must be a task, .* not None"),
        ({"retain": ["mnist"]}, r"retain must be a task, .* or None, not \['mnist'\]"),
        ({"watch": "digits"}, "watch must be a sequence of tasks"),
        ({"watch": [None]}, "each of watch must be a task, .* not None"),
        ({"regularizer": "l2"}, "regularizer must be one such as .* not 'l2'"),
        ({"regularizer": ll.training.L2ToInitial}, "regularizer must be one such as"),
        ({"readout": "head"}, "readout must be what task.new_readout gives, or None, not 'head'"),
        ({"on_step": 3}, "on_step must be a function of a Progress, not 3"),
        ({"progress": "no"}, "progress must be True or False, not 'no'"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(adapted, pair, given, message):
    with pytest.raises(TypeError, match=message) as met:
        ll.finetune(**{"model": adapted, "task": pair[0]} | given)
    assert isinstance(met.value, LoraLensError)


def test_one_task_to_watch_needs_no_list_and_what_is_tested_beside_changes_nothing(adapted, alone, pair):
    run = ll.finetune(adapted, pair[0], watch=pair[1], **SHORT)
    assert run.watched["task"].tolist() == [pair[1].name]
    learnt = ["step", "loss", "accuracy", "test_loss"]
    pd.testing.assert_frame_equal(run.curve[learnt], alone.curve[learnt], check_exact=True)


@pytest.mark.parametrize("role", ["task", "retain", "watch"])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 28, 28)])
def test_images_that_the_model_cannot_take_are_met_before_the_first_step(adapted, pair, role, shape):
    def unfit(examples: ll.Examples) -> ll.Examples:
        return ll.Examples(torch.zeros(len(examples), *shape), examples.labels)

    wrong = ll.Task("wrong", pair[0].classes, unfit(pair[0].train), unfit(pair[0].test))
    tasks = {"task": pair[0], "retain": pair[1]} | {role: wrong}
    message = re.escape(f"VisionTransformer does not take wrong, which holds inputs of shape {shape}: ")
    with pytest.raises(ValueError, match=message) as met:
        ll.finetune(adapted, **tasks, **SHORT, on_step=lambda _: pytest.fail("it began"))
    assert isinstance(met.value, LoraLensError)


def test_a_retained_task_that_is_not_the_head_s_is_refused(model, small):
    task, retain = small
    two = ll.Task(
        "two", ("a", "b"), *(ll.Examples(e.inputs, e.labels % 2) for e in (retain.train, retain.test))
    )
    with pytest.raises(ValueError, match="two has 2 classes, but the model's own head has 10"):
        ll.finetune(ll.attach(model, ll.LinearProbe()), task, two)
    with pytest.raises(ValueError, match="has no linear classifier"):
        ll.finetune(nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)), task)
