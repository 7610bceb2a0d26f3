from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from one_weight import moved, one_layer, only_row, spectra_of, with_update
from safetensors.torch import save_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_lens as ll
from lora_lens.forgetting.basis_rotation import turned
from lora_lens.forgetting.representations import feature_change
from lora_lens.forgetting.weight_drift import drift, drift_between
from lora_lens.spectrum.layer_weights import set_weight_matrix, weight_matrix
from lora_lens.spectrum.placement import Components

SHARES = ["inside", "above", "below", "mixed", "outside"]
WINDOW = ll.Window(4, start=6)


class Shapes(nn.Module):
    """Every kind of layer that can be adapted, never called."""

    def __init__(self, out: int, inputs: int) -> None:
        super().__init__()
        self.linear, self.conv1d = nn.Linear(inputs, out), Conv1D(out, inputs)
        self.convolution = nn.Conv2d(3, out, (2, inputs))


def between(model: nn.Module, update: torch.Tensor, window: object = WINDOW) -> pd.Series:
    after = copy.deepcopy(model)
    set_weight_matrix(after[0], weight_matrix(model[0]).double() + update)
    return only_row(drift_between(model, after, spectra_of(model), window=window))


def reference(update: torch.Tensor, weight: torch.Tensor, components: torch.Tensor) -> dict[str, float]:
    """The columns from the whole matrices, entry by entry."""
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    c = (left.T @ update @ right.T).square()
    k, (first, last) = len(c), (int(components[0]), int(components[-1]))
    place = torch.full((k,), -1)  # between the window's components
    place[:first], place[last + 1 :], place[components] = 1, 2, 0
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    total = update.square().sum()
    found = {n: c[(rows == p) & (columns == p)].sum() for p, n in enumerate(SHARES[:3])}
    found["mixed"] = c[(rows != columns) | (rows == -1)].sum()
    found["outside"] = total - c.sum()
    found["left_inside"] = (left[:, components].T @ update).square().sum()
    found["right_inside"] = (update @ right[components].T).square().sum()
    return {n: float(x / total) for n, x in found.items()} | {"diagonal": float(c.diagonal().sum() / c.sum())}


# One pair (output, input) of components for each place, counted from the largest singular value.
PLACES = {
    "inside": (7, 9),
    "above": (5, 0),
    "below": (15, 10),
    "mixed": (2, 12),
    "outside": (20, 3),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_update_between_two_components_is_where_they_are(place):
    model = one_layer()
    left, _, right = torch.linalg.svd(weight_matrix(model[0]).double())
    i, j = PLACES[place]
    update = 0.3 * torch.outer(left[:, i], right[j])
    for row in (
        between(model, update),
        only_row(drift(with_update(model, update, ll.LoRA(2)), spectra_of(model), window=WINDOW)),
    ):
        assert row["update"] == pytest.approx(0.3, rel=1e-5)
        norm = float(torch.linalg.norm(weight_matrix(model[0]).double()))
        assert row["relative"] == pytest.approx(0.3 / norm, rel=1e-5)
        assert row["effective_rank"] == pytest.approx(1, abs=1e-4)
        assert row["stable_rank"] == pytest.approx(1, abs=1e-6)
        expected = [float(name == place) for name in SHARES]
        np.testing.assert_allclose(row[SHARES].astype(float), expected, atol=1e-6)
        if place != "outside":
            assert row["diagonal"] < 1e-6


def test_a_window_that_moves_only_within_itself_is_inside():
    model = one_layer()
    left, _, right = torch.linalg.svd(weight_matrix(model[0]).double())
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    adapted = with_update(model, left[:, 6:10] @ mix @ right[6:10], WINDOW)
    row = only_row(drift(adapted, spectra_of(model)))
    np.testing.assert_allclose(row[SHARES].astype(float), [1, 0, 0, 0, 0], atol=1e-6)
    assert row[["left_inside", "right_inside"]].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert row["diagonal"] == pytest.approx(float((mix.diag().norm() / mix.norm()) ** 2), abs=1e-5)
    assert row[["layer", "block", "kind", "rank"]].tolist() == ["0", 0, "0", 4]
    # seen from another window, the same update is above it
    row = only_row(drift(adapted, spectra_of(model), window=ll.Window.last(3)))
    np.testing.assert_allclose(row[SHARES].astype(float), [0, 1, 0, 0, 0], atol=1e-6)


def test_a_stretch_of_the_window_is_diagonal():
    model = one_layer()
    adapted = ll.attach(model, WINDOW, targets="0", spectra=spectra_of(model))
    with torch.no_grad():
        adapted.get_base_model()[0].lora_B["default"].weight *= 1.2
    row = only_row(drift(adapted, spectra_of(model)))
    s = torch.logspace(1, 0, 16, dtype=torch.float64)
    assert row["update"] == pytest.approx(0.2 * float(s[6:10].norm()), rel=1e-5)
    assert row["relative"] == pytest.approx(0.2 * float(s[6:10].norm() / s.norm()), rel=1e-5)
    assert row["diagonal"] == pytest.approx(1, abs=1e-6) and row["inside"] == pytest.approx(1, abs=1e-6)
    assert row["stable_rank"] == pytest.approx(float((s[6:10] / s[6]).square().sum()), rel=1e-4)
    for side in ("left", "right"):
        np.testing.assert_allclose(
            turned(adapted, "0", spectra_of(model)["0"], side)[:5, :5], np.eye(5), atol=1e-5
        )


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(3, 12),
    inputs=st.integers(3, 12),
    position=st.floats(0, 1),
    alpha=st.sampled_from([None, 7.0]),
    rank=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_shares_sum_to_one_and_are_those_of_the_whole_matrices(out, inputs, position, alpha, rank, seed):
    torch.manual_seed(seed)
    model = Shapes(out, inputs)
    targets = ["linear", "conv1d", "convolution"]
    spectra = ll.spectra(model, targets, progress=False)
    window = ll.Window(rank, position=position)
    for dora in (False, True):
        adapted = ll.attach(
            model, window, targets=targets, spectra=spectra, alpha=alpha, variant=ll.Variant(dora=dora)
        )
        table = drift(moved(adapted, 0.2, seed), spectra).set_index("layer")
        merged = adapted.merge_and_unload()
        assert list(table.index) == targets
        for name, row in table.iterrows():
            np.testing.assert_allclose(row[SHARES].sum(), 1, atol=1e-6)
            assert (row[SHARES] >= 0).all()
            before, after = (weight_matrix(m.get_submodule(name)).double() for m in (model, merged))
            update = after - before
            expected = reference(update, before, spectra[name].components_of(window))
            np.testing.assert_allclose(row[list(expected)].astype(float), list(expected.values()), atol=2e-4)
            values = torch.linalg.svdvals(update)
            assert row["update"] == pytest.approx(float(values.norm()), rel=1e-4)
            assert row["stable_rank"] == pytest.approx(ll.spectrum.measures.stable_rank(values), rel=1e-3)


def test_components_between_those_of_a_placement_are_neither_above_nor_below():
    model = one_layer()
    placement = Components((4, 7, 11))
    adapted = moved(ll.attach(model, placement, targets="0", spectra=spectra_of(model)), 0.3)
    row = only_row(drift(adapted, spectra_of(model)))
    after, before = (weight_matrix(m[0]).double() for m in (adapted.merge_and_unload(), model))
    expected = reference(after - before, before, torch.tensor(placement.indices))
    np.testing.assert_allclose(row[list(expected)].astype(float), list(expected.values()), atol=1e-5)
    left, _, right = torch.linalg.svd(before)
    assert between(model, torch.outer(left[:, 5], right[6]), placement)["mixed"] == pytest.approx(1, abs=1e-6)


def test_nothing_trained_is_an_update_of_zero_without_shares(model, spectra):
    for method in (ll.Window.middle(4), ll.LoRA(4)):
        adapted = ll.attach(model, method, spectra=spectra)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = drift(adapted, spectra)
            both = drift_between(model, model, spectra, window=ll.Window.first(2))
        for found in (table, both):
            assert len(found) == 24
            assert (found[["update", "relative", "effective_rank", "stable_rank"]] == 0).all(axis=None)
            assert found[[*SHARES, "left_inside", "right_inside", "diagonal"]].isna().all(axis=None)
    adapted = ll.attach(model, ll.Window.middle(4), spectra=spectra, variant=ll.Variant(dora=True))
    assert drift(adapted, spectra)["relative"].max() < 1e-6


def test_ordinary_lora_has_shares_once_a_window_is_given(model, spectra):
    adapted = moved(ll.attach(model, ll.LoRA(4), spectra=spectra))
    table = drift(adapted, spectra)
    assert table[["inside", "above", "below", "mixed", "left_inside", "right_inside"]].isna().all(axis=None)
    assert table[["update", "outside", "diagonal"]].notna().all(axis=None)
    table = drift(adapted, spectra, window=ll.Window.middle(4))
    np.testing.assert_allclose(table[SHARES].sum(axis=1), 1, atol=1e-6)


def test_a_low_rank_update_and_the_difference_of_weights_say_the_same(model, spectra, tmp_path):
    adapted = moved(ll.attach(model, ll.Window.middle(4), spectra=spectra))
    table = drift(adapted, spectra)
    merged = copy.deepcopy(adapted).merge_and_unload()
    dense = drift_between(model, merged, spectra, window=ll.Window.middle(4))
    assert list(dense.columns) == [c for c in table.columns if c != "rank"]
    for column in dense.columns[3:]:
        np.testing.assert_allclose(table[column], dense[column], rtol=1e-3, atol=1e-5)
    save_model(model, str(tmp_path / "before.safetensors"))
    save_model(merged, str(tmp_path / "after.safetensors"))
    files = drift_between(
        tmp_path / "before.safetensors", tmp_path / "after.safetensors", spectra, window=ll.Window.middle(4)
    )
    pd.testing.assert_frame_equal(files, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(model, dtype):
    half = copy.deepcopy(model).to(dtype)
    spectra = ll.spectra(half, progress=False)
    table = drift(moved(ll.attach(half, ll.Window.first(4), spectra=spectra)), spectra)
    np.testing.assert_allclose(table[SHARES].sum(axis=1), 1, atol=1e-6)


def test_what_does_not_belong_together_is_refused(model, spectra):
    adapted = moved(ll.attach(model, ll.Window.middle(4), spectra=spectra))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[2].mlp.fc1.weight.mul_(1.1)
    foreign = ll.spectra(other, progress=False)
    spectrum = spectra["blocks.0.attn.qkv"]
    with pytest.raises(ValueError, match=r"of blocks.2.mlp.fc1, shape .* pretrained weight: take ll.spectra"):
        drift(adapted, foreign)
    with pytest.raises(ValueError, match=r"spectrum of blocks.2.mlp.fc1"):
        drift_between(model, other, foreign)
    with pytest.raises(ValueError, match=r"is not that of blocks.0.attn.proj's pretrained"):
        turned(adapted, "blocks.0.attn.proj", spectrum)
    with pytest.raises(ValueError, match=r"'head' is not adapted; these layers are: blocks.0.attn.qkv"):
        turned(adapted, "head", spectrum)
    with pytest.raises(ValueError, match="side must be one of 'left', 'right', not 'top'"):
        turned(adapted, "blocks.0.attn.qkv", spectrum, "top")
    for lacking, said in [
        (replace(spectrum, left=None, right=None), "has no singular vectors"),
        (
            replace(
                spectrum, left=spectrum.left[:, :4], right=spectrum.right[:4], components=torch.arange(4)
            ),
            "holds vectors for other components",
        ),
    ]:
        few = ll.SpectrumSet([lacking])
        with pytest.raises(ValueError, match=said):
            drift(ll.attach(model, ll.LoRA(4), targets=spectrum.name), few)
        with pytest.raises(ValueError, match=said):
            drift_between(model, model, few)
    with pytest.raises(ValueError, match=r"expected a model from ll.attach"):
        drift(model, spectra)
    with pytest.raises(ll.errors.InputError, match="no spectrum of"):
        drift(adapted, ll.SpectrumSet([spectrum]))
    with pytest.raises(ValueError, match=r"does not fit blocks.0.attn.qkv"):
        drift(adapted, spectra, window=ll.Window(97, start=0))
    wide = copy.deepcopy(model)
    wide.blocks[0].attn.proj = nn.Linear(96, 97)
    with pytest.raises(
        ValueError, match=r"blocks.0.attn.proj has shape \(96, 96\) before and \(97, 96\) after"
    ):
        drift_between(model, wide, spectra)


def test_merged_and_diverged_adapters_are_refused(model, spectra):
    adapted = ll.attach(model, ll.Window.middle(4), spectra=spectra)
    adapted.merge_adapter()
    for ask in (drift, lambda m, s: turned(m, "blocks.0.attn.qkv", s["blocks.0.attn.qkv"])):
        with pytest.raises(ValueError, match=r"blocks.0.attn.qkv is merged.*unmerge_adapter"):
            ask(adapted, spectra)
    adapted.unmerge_adapter()
    with torch.no_grad():
        adapted.get_base_model().blocks[1].mlp.fc2.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"trained of blocks.1.mlp.fc2 holds NaN.*diverged"):
        drift(adapted, spectra)
    with pytest.raises(ValueError, match=r"trained of blocks.1.mlp.fc2 holds NaN"):
        turned(adapted, "blocks.1.mlp.fc2", spectra["blocks.1.mlp.fc2"])


# What a rank of 8 would hold of a random update of these weights: at most (8 / 96)^2 = 0.7 %.
@pytest.mark.parametrize("window", [ll.Window.first(8), ll.Window.last(8)], ids=str)
def test_training_moves_the_window_first(window, model, spectra, digits, source):
    def after(steps: int) -> tuple[pd.DataFrame, nn.Module]:
        adapted = ll.attach(model, window, spectra=spectra)
        ll.finetune(
            adapted, digits.first(test=50), steps=steps, lr=5e-3, warmup=0, evaluations=2, progress=False
        )
        return drift(adapted, spectra), adapted

    one, _ = after(1)
    table, adapted = after(10)
    for found in (one, table):
        assert np.isfinite(found.drop(columns=["layer", "kind"]).astype(float)).all(axis=None)
        np.testing.assert_allclose(found[SHARES].sum(axis=1), 1, atol=1e-6)
        assert found["effective_rank"].between(1, 16).all()
        square = found["kind"] == "attn.proj"
        assert (found.loc[square, "outside"] < 1e-6).all()
    assert (table["update"] > one["update"]).all()
    assert one["inside"].mean() > 3 * (8 / 96) ** 2
    assert (one["inside"] <= one[["left_inside", "right_inside"]].min(axis=1) + 1e-9).all()
    # a pair of components that are both elsewhere moves in the second order only
    elsewhere = "below" if window.position == 0 else "above"
    assert one[elsewhere].mean() < 0.1 < one["mixed"].mean()
    other = "above" if window.position == 0 else "below"
    assert (table[other] == 0).all()

    features = feature_change(model, adapted, source.test.inputs[:300])
    assert features["layer"].tolist() == ["head"]
    assert 0.3 < features["cka"][0] < 1 - 1e-4 and features["relative_change"][0] > 0.01


def test_windows_in_a_metric_drift_between_components_of_the_plain_spectrum(model, source, spectra):
    """Their numbers say nothing about the plain spectrum's components, so no share is made up from them."""
    images, name = source.train.inputs[:20], "blocks.0.attn.proj"
    found = ll.spectra(model, name, metric=images, progress=False)
    adapted = ll.attach(model, ll.Window.first(4), targets=name, spectra=found)
    with torch.no_grad():
        adapted.get_parameter(f"base_model.model.{name}.lora_B.default.weight").mul_(1.1)
    row = only_row(drift(adapted, spectra))
    assert row[["inside", "above", "below", "mixed", "left_inside"]].isna().all()
    assert row["update"] == pytest.approx(
        0.1 * float(found[name].component(ll.Window.first(4)).norm()), rel=1e-4
    )
    assert only_row(drift(adapted, spectra, window=ll.Window.first(4)))["inside"] < 1
    for refused in (drift, ll.forgetting.rotations):
        with pytest.raises(
            ValueError, match=r"needs the plain spectrum of .*proj, and this one is in the metric"
        ):
            refused(adapted, found)
    with pytest.raises(ValueError, match="needs the plain spectrum"):
        turned(adapted, name, found[name])
    with pytest.raises(ValueError, match="needs the plain spectrum"):
        drift_between(model, model, found)
