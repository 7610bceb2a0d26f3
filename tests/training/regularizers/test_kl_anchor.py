from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from small_regularizers import disturbed

import lora_lens as ll
from lora_lens.training import KLAnchor
from lora_lens.training.regularizers.base import Past

SHORT = {"steps": 6, "batch_size": 16, "evaluations": 2, "lr": 1e-2, "warmup": 0.0, "progress": False}


def test_the_anchor_is_0_at_the_start_and_the_mean_divergence_later(adapt, model, tasks):
    adapted = adapt(ll.Window.first(4)).eval()
    config = ll.Training(batch_size=9, steps=60, seed=2)
    extra = KLAnchor(2.0).begin(adapted, Past(tasks[1]), config)
    assert float(extra()) == pytest.approx(0, abs=1e-6)

    disturbed(adapted)
    images = tasks[1].train.inputs
    with torch.no_grad():
        old, new = (m(images).softmax(-1).double() for m in (copy.deepcopy(model).eval(), adapted))
        later = [float(extra()) for _ in range(49)]  # 4 of 200 images each: with the first, every image once
    divergences = 2 * (old * (old / new).log()).sum(-1)
    assert all(value > 0 for value in later)
    unseen = 200 * float(divergences.mean()) - 4 * sum(later)  # of the 4 images of the first step
    assert 0 <= unseen <= 4 * float(divergences.max())


def test_the_anchor_s_gradient_spares_the_old_head_and_reaches_the_adapter(adapt, tasks):
    adapted = disturbed(adapt(ll.LoRA(4)))
    extra = KLAnchor(1.0).begin(adapted, Past(tasks[1]), ll.Training(batch_size=8, steps=2))
    disturbed(adapted)
    extra().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in trained)
    assert all(p.grad is None for p in adapted.get_base_model().head.parameters())


def test_the_anchor_halves_the_new_examples_and_reduces_forgetting(adapt, tasks):
    settings = SHORT | {"steps": 40, "batch_size": 32, "lr": 2e-2}
    free, anchored = (
        ll.finetune(adapt(ll.Window.first(4)), *tasks, regularizer=KLAnchor(strength), **settings)
        for strength in (0.0, 3.0)
    )
    assert free.forgetting > 0.1
    assert anchored.forgetting < 0.5 * free.forgetting
    halved = ll.finetune(adapt(ll.Window.first(4)), *tasks, **settings | {"batch_size": 16})
    pd.testing.assert_frame_equal(free.curve, halved.curve, check_exact=True)


def test_the_loss_in_the_curve_is_that_of_the_new_task_alone(adapt, tasks):
    once = SHORT | {"steps": 1}
    plain = ll.finetune(adapt(ll.LoRA(4)), *tasks, **once | {"batch_size": 8})
    anchored = ll.finetune(adapt(ll.LoRA(4)), *tasks, regularizer=KLAnchor(100), **once)
    assert anchored.curve["loss"].iloc[1] == plain.curve["loss"].iloc[1]
