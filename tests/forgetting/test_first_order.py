from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import lora_lens as ll
from lora_lens.adapters.injection import lora_layers
from lora_lens.forgetting.first_order import LayerSums, foresee
from lora_lens.spectrum.factorizing import factorize
from lora_lens.tasks.linear_probe import drawn, fitted_head
from lora_lens.tasks.readouts import features_of

WINDOWS = ll.windows(rank=8, count=3)


@pytest.fixture(scope="module")
def task(digits) -> ll.Task:
    return digits.first(64, 10)


@pytest.fixture(scope="module")
def table(model, task, source, spectra):
    return foresee(model, task, source.train.first(64), WINDOWS, spectra=spectra)


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


@pytest.mark.parametrize("metric", [None, matrix(9, 2, seed=3).float()], ids=["plain", "in a metric"])
def test_the_expected_change_is_the_mean_over_all_signs(metric):
    weight, inputs = matrix(3, 2, seed=0), matrix(5, 2, seed=1)
    model = nn.Sequential(linear(weight))
    spectrum = ll.spectra(model, metric=metric, progress=False)["0"]
    for start in (0, 1):
        window = ll.Window(1, start=start)
        left, right = (factor.double() for factor in spectrum.vectors(window))
        root = spectrum.singular_values[start].sqrt()
        b, a = left * root, root * right
        changes = []
        for signs in product([1.0, -1.0], repeat=5):  # 3 entries of B and 2 of A
            moved = torch.tensor(signs, dtype=torch.float64)
            update = moved[:3, None] @ a + b @ moved[None, 3:]
            changes.append(float((inputs @ update.T).square().sum(1).mean()))
        sums = LayerSums(linear(weight), spectrum, [window])
        sums.add_inputs(inputs[:2])
        sums.add_inputs(inputs[2:])
        assert sums.change(window) == pytest.approx(sum(changes) / len(changes), rel=1e-5)
        assert sums.output == pytest.approx(float((inputs @ weight.T).square().sum(1).mean()), rel=1e-5)


def test_the_learning_is_the_size_of_the_adapter_s_own_gradient(model, task, spectra, table):
    examples = drawn(task.train, 500, seed=0)
    for row, window in zip(table.itertuples(), WINDOWS, strict=True):
        adapted = ll.attach(model, window, spectra=spectra).eval()
        head = adapted.get_base_model().head
        with features_of(head) as features:
            adapted(examples.inputs)
            logits = fitted_head(features[0].detach(), examples.labels, 10)(features[0])
        nn.functional.cross_entropy(logits, examples.labels).backward()
        factors = [
            p for layer in lora_layers(adapted).values() for p in layer.parameters() if p.requires_grad
        ]
        assert row.learning == pytest.approx(float(sum(p.grad.abs().sum() for p in factors)), rel=1e-3)


def test_a_first_gain_is_what_a_small_sign_step_gains():
    weight, gradient = matrix(4, 3, seed=2), matrix(4, 3, seed=3)
    spectrum, window = factorize("w", weight), ll.Window(2, start=1)
    left, right = (factor.double() for factor in spectrum.vectors(window))
    roots = spectrum.singular_values[1:].sqrt()
    b, a, lr = left * roots, roots[:, None] * right, 1e-7
    after = (b - lr * (gradient @ a.T).sign()) @ (a - lr * (b.T @ gradient).sign())
    gain = float((gradient * (b @ a - after)).sum())
    sums = LayerSums(linear(weight), spectrum, [ll.Window(1, start=0), window])
    sums.add_gradient(gradient - 1)
    sums.add_gradient(torch.ones_like(gradient))
    assert sums.learning(window) == pytest.approx(gain / lr, rel=1e-5)


def test_a_layer_without_output_disturbs_nothing_and_gradients_are_left_alone(task, patch_vit):
    dead = patch_vit.blocks[1].mlp.fc2
    nn.init.zeros_(dead.weight)
    patch_vit.head.weight.grad = marker = torch.ones_like(patch_vit.head.weight)
    windows = ll.windows(rank=4, count=2)
    few = task.train.first(16)
    whole = foresee(patch_vit, task, few, windows, examples=16)
    assert np.isfinite(whole[["learning", "disturbance", "ratio"]]).all(axis=None)
    others = [name for name in ll.spectra(patch_vit, progress=False) if name != "blocks.1.mlp.fc2"]
    assert (
        whole["disturbance"].tolist()
        == foresee(patch_vit, task, few, windows, examples=16, targets=others)["disturbance"].tolist()
    )
    alone = foresee(patch_vit, task, few, windows, examples=16, targets="blocks.1.mlp.fc2")
    assert (alone["learning"] == 0).all() and alone[["disturbance", "ratio"]].isna().all(axis=None)
    assert patch_vit.head.weight.grad is marker
    assert all(p.grad is None for name, p in patch_vit.named_parameters() if name != "head.weight")


def test_no_two_gradients_are_held_at_a_time(model, task, source, spectra):
    held = []
    weights = [model.get_submodule(name).weight for name in spectra]
    handles = [
        w.register_post_accumulate_grad_hook(lambda _: held.append(sum(p.grad is not None for p in weights)))
        for w in weights
    ]
    foresee(model, task, source.train.first(8), WINDOWS, spectra=spectra, examples=8)
    for handle in handles:
        handle.remove()
    assert len(held) == len(weights) and max(held) == 1


def test_large_components_learn_faster_and_disturb_more(table):
    assert list(table.columns) == ["position", "start", "learning", "disturbance", "ratio"]
    assert table["position"].tolist() == [0, 0.5, 1]
    assert table["learning"].is_monotonic_decreasing and table["disturbance"].is_monotonic_decreasing
    assert (table["ratio"] == table["learning"] / table["disturbance"]).all()


def test_it_leaves_the_model_as_it_was_and_depends_on_the_seed_alone(model, task, source, spectra, table):
    before = {name: p.clone() for name, p in model.named_parameters()}
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    model.blocks[0].train()
    again = foresee(model, task, source.train.first(64), WINDOWS, spectra=spectra)
    other = foresee(model, task, source.train.first(64), WINDOWS, spectra=spectra, examples=32, seed=1)
    assert again.equals(table)
    assert (other["learning"] != table["learning"]).all()
    assert (other["disturbance"] == table["disturbance"]).all()
    assert model.blocks[0].training and not model.blocks[1].training
    model.eval()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad == frozen[name]
        assert parameter.grad is None


def test_what_cannot_be_foreseen_is_refused(model, task, source, spectra, patch_vit):
    inputs = source.train.first(8)
    with pytest.raises(ValueError, match="give at least one window"):
        foresee(model, task, inputs, [], spectra=spectra)
    with pytest.raises(ValueError, match="examples must be at least 1, not 0"):
        foresee(model, task, inputs, WINDOWS, spectra=spectra, examples=0)
    with pytest.raises(ValueError, match="rank 97 does not fit"):
        foresee(model, task, inputs, [ll.Window.first(97)], spectra=spectra)
    quantization = pytest.importorskip("torchao.quantization")
    quantized = copy.deepcopy(model)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"qkv is quantized \(.*no gradient, which foresee needs"):
        foresee(quantized, task, inputs, WINDOWS, targets="qkv")
    with pytest.raises(ValueError, match=r"patch_embed.proj is a Conv2d"):
        foresee(patch_vit, task, inputs, WINDOWS, targets="patch_embed.proj")
