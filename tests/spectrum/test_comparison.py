from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import lora_lens as ll
from lora_lens.spectrum.comparison import (
    change,
    compare,
    intruder_dimensions,
    overlap,
    overlap_matrix,
    principal_angles,
)
from lora_lens.spectrum.factorizing import factorize

SIDES = ["left", "right"]


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def weight(out: int = 60, inputs: int = 40, seed: int = 0) -> torch.Tensor:
    """A weight with well separated singular values, from 10 down to 1."""
    k = min(out, inputs)
    s = torch.logspace(1, 0, k, dtype=torch.float64)
    return orthonormal(out, k, seed) * s @ orthonormal(inputs, k, seed + 1).T


def turned(spectrum: ll.Spectrum, i: int, j: int, angle: float) -> ll.Spectrum:
    """The spectrum with its left vectors i and j turned in their plane."""
    left = spectrum.left.double().clone()
    c, s = math.cos(angle), math.sin(angle)
    left[:, [i, j]] = left[:, [i, j]] @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return replace(spectrum, left=left.float())


def signs_flipped(spectrum: ll.Spectrum) -> ll.Spectrum:
    signs = torch.ones(spectrum.k).index_fill(0, torch.arange(0, spectrum.k, 2), -1)
    return replace(spectrum, left=spectrum.left * signs, right=signs[:, None] * spectrum.right)


@pytest.mark.parametrize("shape", [(60, 40), (40, 40), (30, 50)])
def test_nothing_changed(shape):
    before = factorize("w", weight(*shape))
    for after in (before, factorize("w", weight(*shape)), signs_flipped(before)):
        for side in SIDES:
            assert principal_angles(before, after, ll.Window.middle(8), side).max() < 1e-6
            assert overlap(before, after, ll.Window.middle(8), side) == pytest.approx(1, abs=1e-12)
            np.testing.assert_allclose(overlap_matrix(before, after, 6, side), np.eye(6), atol=1e-6)
            assert len(intruder_dimensions(before, after, side=side)) == 0
        assert change(before, after) == pytest.approx((0, 0, 0), abs=1e-6)


@pytest.mark.parametrize("angle", [1e-5, 1e-3, 0.3, 1.0, 1.5, math.pi / 2])
def test_a_known_turn_out_of_the_window(angle):
    before = factorize("w", weight())
    after = turned(before, 3, 20, angle)
    window = ll.Window(6, start=0)
    angles = principal_angles(before, after, window)
    assert angles.shape == (6,) and (angles.diff() >= 0).all()
    assert angles[-1] == pytest.approx(angle, abs=3e-7)
    assert angles[:-1].max() < 1e-6
    assert overlap(before, after, window) == pytest.approx((5 + math.cos(angle) ** 2) / 6)
    assert principal_angles(before, after, window, "right").max() < 1e-12
    # a turn within the window leaves its subspace where it is
    assert principal_angles(before, turned(before, 1, 4, angle), window).max() < 1e-6


@pytest.mark.parametrize("side", SIDES)
def test_random_bases_overlap_by_chance(side):
    before, after = factorize("w", weight(60, 40, 0)), factorize("w", weight(60, 40, 7))
    dimension = {"left": 60, "right": 40}[side]
    windows = [ll.Window(10, start=i) for i in range(0, 31, 5)]
    mean = np.mean([overlap(before, after, w, side) for w in windows])
    assert mean == pytest.approx(10 / dimension, rel=0.15)
    matrix = overlap_matrix(before, after, 4, side)
    assert matrix.mean() == pytest.approx(10 / dimension, rel=0.05)
    angles = principal_angles(before, after, ll.Window.first(1), side)
    assert 0.8 < angles[0] <= math.pi / 2


def test_rows_of_a_complete_basis_sum_to_one():
    before, after = factorize("w", weight(50, 30, 0)), factorize("w", weight(50, 30, 7))
    for bins in (1, 7, 30):
        right = overlap_matrix(before, after, bins, "right")
        assert right.shape == (bins, bins) and (right >= 0).all()
        np.testing.assert_allclose(right.sum(1), 1, atol=1e-5)
    left = overlap_matrix(before, after, 5, "left").sum(1)
    assert left.mean() == pytest.approx(30 / 50, rel=0.05)


def test_the_overlap_matrix_shows_where_a_component_went():
    before = factorize("w", weight())
    swapped = overlap_matrix(before, turned(before, 3, 20, math.pi / 2), bins=4)
    expected = np.eye(4)  # bands of 10: component 3 is in the first, 20 in the third
    expected[[0, 2], [0, 2]], expected[[0, 2], [2, 0]] = 0.9, 0.1
    np.testing.assert_allclose(swapped, expected, atol=1e-5)


def test_a_stretch_is_no_rotation_and_a_rotation_no_stretch():
    before = factorize("w", weight())
    stretched = replace(before, singular_values=before.singular_values * 1.1)
    assert change(before, stretched) == pytest.approx((0.1, 0.1, 0), abs=1e-3)

    angle, (s, t) = 0.3, before.singular_values[[3, 20]].tolist()
    found = change(before, turned(before, 3, 20, angle))
    expected = math.sqrt(2 * (s**2 + t**2) * (1 - math.cos(angle))) / before.singular_values.norm().item()
    assert found == pytest.approx((expected, 0, expected), abs=1e-6)


def test_the_update_is_that_of_the_weights_and_splits_by_pythagoras():
    w = weight()
    update = 0.3 * torch.outer(orthonormal(60, 1, 5)[:, 0], orthonormal(40, 1, 6)[:, 0])
    found = change(factorize("w", w), factorize("w", w + update))
    assert found.update == pytest.approx(0.3 / w.norm().item(), rel=1e-4)
    assert found.update**2 == pytest.approx(found.stretch**2 + found.rotation**2)
    assert 0 < found.stretch < found.rotation


def test_the_rotation_of_a_random_basis():
    first, second = weight(300, 200, 0), weight(300, 200, 7)
    assert change(factorize("w", first), factorize("w", second)).rotation == pytest.approx(
        math.sqrt(2), rel=0.03
    )
    assert change(factorize("w", first), factorize("w", -first)).rotation == pytest.approx(2, rel=1e-5)


def test_rotation_does_not_depend_on_the_basis_of_equal_values():
    before = factorize("w", 3 * orthonormal(50, 30, 0) @ orthonormal(30, 30, 1).T)
    turn = orthonormal(30, 30, 2).float()  # another decomposition of the same weight
    after = replace(before, left=before.left @ turn, right=turn.T @ before.right)
    assert change(before, after).rotation < 1e-6
    assert overlap(before, after, ll.Window.first(5)) < 0.5


def test_a_planted_direction_is_the_one_intruder():
    w = weight(60, 40)
    outside = orthonormal(60, 60, 3)[:, -1]
    outside -= factorize("w", w).left.double() @ (factorize("w", w).left.double().T @ outside)
    new = torch.outer(outside / outside.norm(), orthonormal(40, 1, 4)[:, 0])
    before, after = factorize("w", w), factorize("w", w + 30 * new)
    assert intruder_dimensions(before, after, count=10).tolist() == [0]
    assert intruder_dimensions(before, after, threshold=0).tolist() == []
    table = compare(before, after)
    assert table["intruders"].tolist() == [1]


def test_components_that_only_grow_or_swap_are_no_intruders():
    before = factorize("w", weight())
    values = before.singular_values.clone()
    values[30] *= 100
    after = factorize("w", replace(before, singular_values=values).component(ll.Window(40, start=0)))
    for side in SIDES:
        assert intruder_dimensions(before, after, side=side).tolist() == []


def test_compare_is_one_row_per_weight(spectra):
    table = compare(spectra, spectra, ll.Window.middle(8))
    assert table["layer"].tolist() == list(spectra)
    assert list(table) == [
        *("layer", "block", "kind", "update", "stretch", "rotation", "intruders", "start"),
        *("overlap_left", "overlap_right", "degrees_left", "degrees_right"),
    ]
    assert (table[["update", "stretch", "rotation", "intruders"]] == 0).all(axis=None)
    assert (table["start"] == 44).all() and (table[["degrees_left", "degrees_right"]] < 1e-4).all(axis=None)
    np.testing.assert_allclose(table[["overlap_left", "overlap_right"]], 1)
    assert "start" not in compare(spectra, spectra)


def test_training_the_last_window_turns_it(model, spectra, digits):
    window, targets = ll.Window.last(4), ["blocks.5.attn.*", "blocks.5.mlp.*"]
    adapted = ll.attach(copy.deepcopy(model), window, targets=targets, spectra=spectra)
    ll.finetune(adapted, digits.first(test=50), steps=3, evaluations=2, lr=1e-2, progress=False)
    after = ll.spectra(adapted.merge_and_unload(), progress=False)
    table = compare(spectra, after, window)
    trained = table["block"] == 5
    assert (table.loc[~trained, "update"] < 1e-6).all() and (table.loc[trained, "update"] > 1e-3).all()
    assert (table.loc[trained, "degrees_left"] > 1).all()
    np.testing.assert_allclose(table["update"] ** 2, table["stretch"] ** 2 + table["rotation"] ** 2)
    for name, old in spectra.items():
        exact = after[name].component(ll.Window(96, start=0)) - old.component(ll.Window(96, start=0))
        assert torch.linalg.matrix_norm(exact) == pytest.approx(
            change(old, after[name]).update * old.singular_values.norm().item(), rel=1e-5, abs=1e-6
        )


def test_updates_of_different_rank_compare():
    first = factorize("w", weight())
    window = ll.Window(10, start=0)
    left, right = first.vectors(window)
    second = ll.Spectrum("w", first.shape, first.singular_values[:10], left, right)
    tail = float(first.singular_values[10:].norm() / first.singular_values.norm())
    assert change(first, second) == pytest.approx((tail, tail, 0), abs=1e-3)
    assert overlap(first, second, window) == pytest.approx(1)
    bands = overlap_matrix(first, second, bins=2)  # of 20 and of 5 components
    np.testing.assert_allclose(bands, [[0.25, 0.25], [0, 0]], atol=1e-6)


def test_what_does_not_compare_is_told(spectra):
    first, window = factorize("w", weight()), ll.Window.first(4)
    other = factorize("w", weight(60, 30))
    for function in (principal_angles, overlap):
        with pytest.raises(ValueError, match=r"w has shape \(60, 40\) before and w has \(60, 30\) after"):
            function(first, other, window)
    for function in (overlap_matrix, change, intruder_dimensions, compare):
        with pytest.raises(ValueError, match="only spectra of one weight compare"):
            function(first, other)

    bare = ll.Spectrum("w", first.shape, first.singular_values)
    for function in (overlap_matrix, change, intruder_dimensions, compare):
        with pytest.raises(ValueError, match="the spectrum of w has no singular vectors"):
            function(first, bare)
    with pytest.raises(ValueError, match="rank 41 does not fit w"):
        overlap(first, first, ll.Window.first(41))
    with pytest.raises(ValueError, match="41 bins do not fit w: its spectrum has 40 components"):
        overlap_matrix(first, first, 41)
    with pytest.raises(ValueError, match="side must be one of 'left', 'right', not 'top'"):
        overlap(first, first, window, "top")
    with pytest.raises(ValueError, match=r"only one of the two has a spectrum of blocks.0.attn.qkv; compare"):
        compare(spectra, ll.SpectrumSet([s for n, s in spectra.items() if n != "blocks.0.attn.qkv"]))
