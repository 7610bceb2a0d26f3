from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import lora_lens as ll
from lora_lens.layers import classifier
from lora_lens.readouts import features_of
from lora_lens.tasks import shuffled_rows

SHORT = {"steps": 12, "batch_size": 32, "evaluations": 3, "progress": False}


@pytest.fixture(scope="module")
def small(source, digits) -> tuple[ll.Task, ll.Task]:
    return digits.subset(400, 200), source.subset(100, 200)


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


def test_batches_visit_every_example_before_any_comes_again():
    batches = shuffled_rows(10, batch_size=4, seed=0)
    seen = torch.cat([next(batches) for _ in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": 0}, "lr must be positive, not 0"),
        ({"lr": float("nan")}, "lr must be positive, not nan"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"warmup": 1.0}, "warmup must be in"),
        ({"evaluations": 1}, "evaluations must be at least 2"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        ll.Training(**setting)


def test_a_retained_task_that_is_not_the_head_s_is_refused(model, small):
    task, retain = small
    two = ll.Task(
        "two", ("a", "b"), *(ll.Examples(e.inputs, e.labels % 2) for e in (retain.train, retain.test))
    )
    with pytest.raises(ValueError, match="two has 2 classes, but the model's own head has 10"):
        ll.finetune(ll.attach(model, ll.LinearProbe()), task, two)
    with pytest.raises(ValueError, match="has no linear classifier"):
        ll.finetune(nn.Sequential(nn.Linear(2, 2)), task)
