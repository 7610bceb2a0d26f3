from __future__ import annotations

import copy
import math

import pytest
import torch
from one_weight import moved, only_row, orthonormal
from torch import nn

import lora_lens as ll
from lora_lens.forgetting.representations import cka, feature_change


def features(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(50, 10), (10, 50), (20, 20)])
def test_cka_is_one_for_features_that_are_turned_scaled_and_shifted(shape):
    x = features(*shape, 0) * torch.logspace(1, -1, shape[1])
    turn = orthonormal(shape[1], shape[1], 1)
    assert cka(x, x) == pytest.approx(1, abs=1e-12)
    assert cka(x, -3.7 * x @ turn + 100) == pytest.approx(1, abs=1e-10)
    y = x + features(*shape, 2)
    assert 0.05 < cka(x, y) < 0.999
    assert cka(x @ turn, y) == pytest.approx(cka(x, y), abs=1e-10) == cka(y, x)
    assert cka(x.float(), y.float()) == pytest.approx(cka(x, y), abs=1e-5)


@pytest.mark.parametrize("shape", [(6, 20), (50, 3)])
def test_constant_features_have_no_cka_whatever_rounding_leaves(shape):
    other = features(*shape, seed=0)
    for value in (0.0, 0.1, 1e6 / 3):
        constant = torch.full(shape, value, dtype=torch.float64) * torch.linspace(0.7, 1.3, shape[1])
        assert math.isnan(cka(constant, other)) and math.isnan(cka(other, constant))
    assert math.isnan(cka(other[:1], other[:1]))
    assert cka(1e5 + other, other) == pytest.approx(1, abs=1e-6)


def test_cka_of_independent_features_is_what_chance_gives():
    assert cka(features(20_000, 8, 0), features(20_000, 5, 1)) < 1e-3
    for n, p, q in [(400, 30, 60), (100, 300, 200)]:
        chance = math.sqrt(p * q / ((n + p) * (n + q)))
        assert cka(features(n, p, 0), features(n, q, 1)) == pytest.approx(chance, rel=0.1)


def test_cka_is_the_same_through_either_gram_matrix():
    x, y = features(30, 6, 0), features(30, 9, 1)
    wide = torch.cat([y, torch.zeros(30, 40, dtype=torch.float64)], dim=1)  # through the examples'
    assert cka(x, wide) == pytest.approx(cka(x, y), abs=1e-12)
    centred = [f - f.mean(0) for f in (x, y)]
    k, l_ = (f @ f.T for f in centred)
    assert cka(x, y) == pytest.approx(float((k * l_).sum() / (k.norm() * l_.norm())), abs=1e-12)
    assert math.isnan(cka(torch.ones(30, 6), y))
    with pytest.raises(ValueError, match=r"shapes \(30, 6\) and \(29, 9\): expected \(n, p\) and \(n, q\)"):
        cka(x, y[:-1])


def test_features_change_where_the_model_did(model, spectra, source):
    inputs = source.test.inputs[:40]
    adapted = moved(ll.attach(model, ll.Window.first(4), targets="blocks.2.*", spectra=spectra), 0.1)
    layers = ["blocks.1", "blocks.2.mlp.fc1", "blocks.2", "head"]
    modes = [m.training for m in adapted.modules()]
    table = feature_change(model, adapted, inputs, layers).set_index("layer")
    assert list(table.index) == layers
    assert table.loc["blocks.1"].tolist() == pytest.approx([1, 0], abs=1e-6)
    assert (table.loc[layers[1:], "cka"] < 1 - 1e-4).all()
    assert (table.loc[layers[1:], "relative_change"] > 1e-2).all()
    assert [m.training for m in adapted.modules()] == modes
    assert not any(m._forward_hooks for x in (model, adapted) for m in x.modules())
    with torch.no_grad():
        old, new = (m(inputs).double() for m in (model.eval(), adapted.eval()))
    assert table.loc["head", "relative_change"] == pytest.approx(
        float((new - old).norm() / old.norm()), rel=1e-4
    )
    assert table.loc["head", "cka"] == pytest.approx(cka(old, new), abs=1e-5)


def test_features_are_by_default_what_the_classifier_reads(model, source):
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.fc_norm.weight.mul_(1.5), scaled.fc_norm.bias.mul_(1.5)
    inputs = source.test.inputs[:30]
    row = only_row(feature_change(model, scaled, inputs))
    assert row["layer"] == "head"
    assert row["cka"] == pytest.approx(1, abs=1e-6)
    assert row["relative_change"] == pytest.approx(0.5, abs=1e-5)


def test_features_of_a_text_model_with_an_attention_mask():
    bert = ll.tasks.bundled.minilm()
    inputs = {"input_ids": torch.arange(60).reshape(6, 10) + 1000, "attention_mask": torch.ones(6, 10).long()}
    table = feature_change(bert, copy.deepcopy(bert), inputs, ["encoder.layer.0", "encoder"])
    assert table["cka"].tolist() == pytest.approx([1, 1]) and table["relative_change"].tolist() == [0, 0]


def test_features_that_do_not_compare_are_refused(model, source):
    inputs = source.test.inputs[:8]
    with pytest.raises(ValueError, match=r"VisionTransformer has no module 'blocks.9'"):
        feature_change(model, model, inputs, ["blocks.9"])
    with pytest.raises(ValueError, match="BertModel has no linear classifier"):
        feature_change(
            ll.tasks.bundled.minilm(), ll.tasks.bundled.minilm(), {"input_ids": torch.ones(2, 3).long()}
        )
    silent = copy.deepcopy(model)
    silent.add_module("spare", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="made its output without calling spare"):
        feature_change(silent, silent, inputs, ["spare"])
    other = copy.deepcopy(model)
    other.head = nn.Linear(96, 3)
    with pytest.raises(
        ValueError, match=r"of head have shape \(8, 10\) before and \(8, 3\) after for a batch"
    ):
        feature_change(model, other, inputs, ["head"])
