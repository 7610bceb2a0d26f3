from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from small_regularizers import disturbed

import lora_lens as ll
from lora_lens.adapters.injection import lora_layers
from lora_lens.training import KLAnchor, L2ToInitial
from lora_lens.training.regularizers.base import Past
from lora_lens.training.regularizers.l2_to_initial import squared_change

SHORT = {"steps": 6, "batch_size": 16, "evaluations": 2, "lr": 1e-2, "warmup": 0.0, "progress": False}
SOME = "blocks.[05].*"
ADAPTED = [ll.Window.first(4), ll.LoRA(4)]


def effective(layer) -> torch.Tensor:
    """s B A with a gradient, float64."""
    b, a = (part["default"].weight.double() for part in (layer.lora_B, layer.lora_A))
    return layer.scaling["default"] * b @ a


@pytest.mark.parametrize("method", [*ADAPTED, ll.FullFineTuning()], ids=str)
def test_l2_of_strength_0_is_no_regularizer_bit_for_bit(method, adapt, tasks):
    runs = [ll.finetune(adapt(method), *tasks, regularizer=p, **SHORT) for p in (None, L2ToInitial(0))]
    pd.testing.assert_frame_equal(runs[0].curve, runs[1].curve, check_exact=True)
    assert torch.equal(runs[0].head.weight, runs[1].head.weight)


@pytest.mark.parametrize("alpha", [None, 16.0])
@pytest.mark.parametrize("method", ADAPTED, ids=str)
def test_l2_is_half_the_squared_change_of_the_weights_and_so_is_its_gradient(method, alpha, adapt):
    adapted = adapt(method, alpha=alpha)
    layers = lora_layers(adapted)
    before = {name: effective(layer).detach() for name, layer in layers.items()}
    extra = L2ToInitial(0.3).begin(adapted, Past(None), ll.Training())
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
    extra = L2ToInitial(2).begin(full, Past(None), ll.Training())
    with torch.no_grad():
        full.blocks[0].attn.qkv.weight[3, 5] += 0.5
        full.blocks[2].norm1.bias[0] -= 1.0
    assert float(extra()) == pytest.approx(1.25, rel=1e-5)
    assert L2ToInitial(2).begin(ll.attach(model, ll.LinearProbe()), Past(None), ll.Training())() == 0


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
        ll.finetune(adapted, *tasks, regularizer=L2ToInitial(strength), **SHORT | {"steps": 20, "lr": 1e-3})
        whole = adapted.merge_and_unload() if hasattr(adapted, "merge_and_unload") else adapted
        pairs = zip(whole.blocks.parameters(), model.blocks.parameters(), strict=True)
        moved.append(float(sum((now - before).square().sum() for now, before in pairs)) ** 0.5)
    assert moved[1] < 0.5 * moved[0]


def test_a_term_that_explodes_ends_the_run(adapt, tasks):
    run = ll.finetune(
        adapt(ll.FullFineTuning()), *tasks, regularizer=L2ToInitial(1e38), **SHORT | {"lr": 1e3}
    )
    assert run.diverged and np.isfinite(run.accuracy)


def test_regularizers_say_what_they_need(model, adapt, tasks):
    with pytest.raises(ValueError, match="there is none: give finetune retain="):
        ll.finetune(adapt(ll.LoRA(4)), tasks[0], regularizer=KLAnchor(1), **SHORT)
    with pytest.raises(ValueError, match="half of each batch, and batch_size is 1"):
        ll.finetune(adapt(ll.LoRA(4)), *tasks, regularizer=KLAnchor(1), **SHORT | {"batch_size": 1})
    dora = ll.attach(model, ll.LoRA(4), targets=SOME, variant=ll.Variant(dora=True))
    with pytest.raises(ValueError, match="DoRA changes the lengths of the rows"):
        ll.finetune(dora, *tasks, regularizer=L2ToInitial(1), **SHORT)
    for strength in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="strength must be at least 0 and finite, not"):
            KLAnchor(strength)
