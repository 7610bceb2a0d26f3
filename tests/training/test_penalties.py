from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import lora_lens as ll
from lora_lens.adapters.injection import lora_layers
from lora_lens.adapters.methods import PeftStart, Penalized
from lora_lens.training.penalties import KLAnchor, L2ToInitial, squared_change

SHORT = {"steps": 6, "batch_size": 16, "evaluations": 2, "lr": 1e-2, "warmup": 0.0, "progress": False}
SOME = "blocks.[05].*"
ADAPTED = [ll.Window.first(4), ll.LoRA(4)]


@pytest.fixture(scope="module")
def tasks(source, digits) -> tuple[ll.Task, ll.Task]:
    return digits.first(200, 100), source.first(200, 300)


@pytest.fixture
def adapt(model, spectra):
    def adapt(method, **choices):
        own = None if isinstance(method, ll.FullFineTuning) else spectra
        return ll.attach(model, method, targets=None if own is None else SOME, spectra=own, **choices)

    return adapt


def effective(layer) -> torch.Tensor:
    """s B A with a gradient, float64."""
    b, a = (part["default"].weight.double() for part in (layer.lora_B, layer.lora_A))
    return layer.scaling["default"] * b @ a


def disturbed(adapted: nn.Module) -> nn.Module:
    """With every factor a little off its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return adapted


@pytest.mark.parametrize("method", [*ADAPTED, ll.FullFineTuning()], ids=str)
def test_l2_of_strength_0_is_no_penalty_bit_for_bit(method, adapt, tasks):
    runs = [ll.finetune(adapt(method), *tasks, penalty=p, **SHORT) for p in (None, L2ToInitial(0))]
    pd.testing.assert_frame_equal(runs[0].curve, runs[1].curve, check_exact=True)
    assert torch.equal(runs[0].head.weight, runs[1].head.weight)


@pytest.mark.parametrize("alpha", [None, 16.0])
@pytest.mark.parametrize("method", ADAPTED, ids=str)
def test_l2_is_half_the_squared_change_of_the_weights_and_so_is_its_gradient(method, alpha, adapt):
    adapted = adapt(method, alpha=alpha)
    layers = lora_layers(adapted)
    before = {name: effective(layer).detach() for name, layer in layers.items()}
    extra = L2ToInitial(0.3).begin(adapted, None, ll.Training())
    assert extra().item() == 0
    disturbed(adapted)

    factors = [p for p in adapted.parameters() if p.requires_grad]
    value = extra()
    found = torch.autograd.grad(value, factors)
    formed = 0.15 * sum((effective(layer) - before[name]).square().sum() for name, layer in layers.items())
    expected = torch.autograd.grad(formed, factors)
    assert value.item() == pytest.approx(formed.item(), rel=1e-5) and formed.item() > 0.1
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_l2_of_full_fine_tuning_is_over_all_parameters(model):
    full = ll.attach(model, ll.FullFineTuning())
    extra = L2ToInitial(2).begin(full, None, ll.Training())
    with torch.no_grad():
        full.blocks[0].attn.qkv.weight[3, 5] += 0.5
        full.blocks[2].norm1.bias[0] -= 1.0
    assert float(extra()) == pytest.approx(1.25, rel=1e-5)
    assert L2ToInitial(2).begin(ll.attach(model, ll.LinearProbe()), None, ll.Training())() == 0


def test_tiny_changes_are_not_lost_to_rounding(adapt):
    adapted = adapt(ll.Window.first(4))
    layer = lora_layers(adapted)["blocks.0.attn.qkv"]
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    b0, a0 = b.detach().clone(), a.detach().clone()
    with torch.no_grad():
        b[0, 0] += 1e-5
    step = float((b - b0)[0, 0])
    expected = step**2 * float(a0[0].square().sum())
    assert float(squared_change(layer, b0, a0)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", [*ADAPTED, ll.FullFineTuning()], ids=str)
def test_a_strong_l2_keeps_the_weights_near_their_start(method, model, adapt, tasks):
    moved = []
    for strength in (0, 1000):
        adapted = adapt(method)
        ll.finetune(adapted, *tasks, penalty=L2ToInitial(strength), **SHORT | {"steps": 20, "lr": 1e-3})
        whole = adapted.merge_and_unload() if hasattr(adapted, "merge_and_unload") else adapted
        pairs = zip(whole.blocks.parameters(), model.blocks.parameters(), strict=True)
        moved.append(float(sum((now - before).square().sum() for now, before in pairs)) ** 0.5)
    assert moved[1] < 0.5 * moved[0]


def test_the_anchor_is_0_at_the_start_and_the_mean_divergence_later(adapt, model, tasks):
    adapted = adapt(ll.Window.first(4)).eval()
    config = ll.Training(batch_size=9, steps=60, seed=2)
    extra = KLAnchor(2.0).begin(adapted, tasks[1], config)
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
    extra = KLAnchor(1.0).begin(adapted, tasks[1], ll.Training(batch_size=8, steps=2))
    disturbed(adapted)
    extra().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in trained)
    assert all(p.grad is None for p in adapted.get_base_model().head.parameters())


def test_the_anchor_halves_the_new_examples_and_reduces_forgetting(adapt, tasks):
    settings = SHORT | {"steps": 40, "batch_size": 32, "lr": 2e-2}
    free, anchored = (
        ll.finetune(adapt(ll.Window.first(4)), *tasks, penalty=KLAnchor(strength), **settings)
        for strength in (0.0, 3.0)
    )
    assert free.forgetting > 0.1
    assert anchored.forgetting < 0.5 * free.forgetting
    halved = ll.finetune(adapt(ll.Window.first(4)), *tasks, **settings | {"batch_size": 16})
    pd.testing.assert_frame_equal(free.curve, halved.curve, check_exact=True)


def test_the_loss_in_the_curve_is_that_of_the_new_task_alone(adapt, tasks):
    once = SHORT | {"steps": 1}
    plain = ll.finetune(adapt(ll.LoRA(4)), *tasks, **once | {"batch_size": 8})
    anchored = ll.finetune(adapt(ll.LoRA(4)), *tasks, penalty=KLAnchor(100), **once)
    assert anchored.curve["loss"].iloc[1] == plain.curve["loss"].iloc[1]


def test_a_penalty_that_explodes_ends_the_run(adapt, tasks):
    run = ll.finetune(adapt(ll.FullFineTuning()), *tasks, penalty=L2ToInitial(1e38), **SHORT | {"lr": 1e3})
    assert run.diverged and np.isfinite(run.accuracy)


def test_penalties_say_what_they_need(model, adapt, tasks):
    with pytest.raises(ValueError, match="there is none: give finetune retain="):
        ll.finetune(adapt(ll.LoRA(4)), tasks[0], penalty=KLAnchor(1), **SHORT)
    with pytest.raises(ValueError, match="half of each batch, and batch_size is 1"):
        ll.finetune(adapt(ll.LoRA(4)), *tasks, penalty=KLAnchor(1), **SHORT | {"batch_size": 1})
    dora = ll.attach(model, ll.LoRA(4), targets=SOME, variant=ll.Variant(dora=True))
    with pytest.raises(ValueError, match="DoRA changes the lengths of the rows"):
        ll.finetune(dora, *tasks, penalty=L2ToInitial(1), **SHORT)
    for strength in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="strength must be at least 0 and finite, not"):
            KLAnchor(strength)


def test_methods_under_a_penalty_are_plain_values():
    anchored = Penalized(ll.LoRA(8), KLAnchor(1))
    assert str(anchored) == "LoRA of rank 8, KL anchor 1" and anchored.rank == 8
    assert anchored == Penalized(ll.LoRA(8), KLAnchor(1.0)) and hash(anchored) == hash(
        Penalized(ll.LoRA(8), KLAnchor(1.0))
    )
    assert anchored != Penalized(ll.LoRA(8), L2ToInitial(1)) and KLAnchor(1) != L2ToInitial(1)
    assert str(Penalized(ll.FullFineTuning(), L2ToInitial(0.01))) == "full fine-tuning, L2 to initial 0.01"
    assert Penalized(ll.FullFineTuning(), L2ToInitial(1)).rank is None
    assert str(Penalized(PeftStart("olora", 8), KLAnchor(0.5))) == "PEFT's olora of rank 8, KL anchor 0.5"
    assert len({Penalized({"all-mlp": ll.Window.first(4)}, KLAnchor(1))}) == 1
    with pytest.raises(TypeError, match="expected a placement, LoRA, FullFineTuning or PeftStart"):
        Penalized(ll.LinearProbe(), KLAnchor(1))
    with pytest.raises(TypeError, match="expected a penalty such as KLAnchor"):
        Penalized(ll.LoRA(8), 1.0)
