from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from one_weight import moved, one_layer, only_row, spectra_of, with_update

import lora_lens as ll
from lora_lens.forgetting.basis_rotation import rotations, turned
from lora_lens.forgetting.weight_drift import drift
from lora_lens.spectrum.layer_weights import weight_matrix


@pytest.mark.parametrize("angle", [1e-3, 0.3, 1.2])
def test_two_vectors_that_turn_by_a_known_angle(angle):
    model = one_layer()
    left, s, right = torch.linalg.svd(weight_matrix(model[0]).double(), full_matrices=False)
    c, d = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c - 1, -d], [d, c - 1]], dtype=torch.float64)
    update = left[:, [3, 12]] @ turn * s[[3, 12]] @ right[[3, 12]]
    adapted = with_update(model, update, ll.LoRA(2))
    matrix = turned(adapted, "0", spectra_of(model)["0"], "left")
    expected = torch.eye(16)
    expected[3, 3] = expected[12, 12] = abs(c)
    expected[3, 12] = expected[12, 3] = abs(d)
    assert matrix.shape == (16, 16) and matrix.dtype == torch.float32
    np.testing.assert_allclose(matrix, expected, atol=1e-5)
    np.testing.assert_allclose(turned(adapted, "0", spectra_of(model)["0"], "right"), np.eye(16), atol=1e-5)

    # C = [[c - 1, -d], [d, c - 1]] diag(s): (c - 1)^2 / ((c - 1)^2 + d^2) = (1 - c) / 2
    row = only_row(drift(adapted, spectra_of(model), window=ll.Window(2, start=12)))
    assert row["diagonal"] == pytest.approx(math.sin(angle / 2) ** 2, rel=1e-2, abs=1e-6)
    # u_12 is the window's, u_3 is above it: the pairs (3, 12) and (12, 3) are mixed
    parts = torch.tensor(
        [(c - 1) ** 2 * s[12] ** 2, (c - 1) ** 2 * s[3] ** 2, d**2 * (s[3] ** 2 + s[12] ** 2)]
    )
    parts = (parts / parts.sum()).tolist()
    assert row[["inside", "above", "mixed"]].tolist() == pytest.approx(parts, abs=1e-5)


def test_a_turned_dora_layer_is_that_of_its_merged_weight(model, spectra):
    adapted = moved(
        ll.attach(model, ll.Window.first(4), spectra=spectra, variant=ll.Variant(dora=True)), 0.05
    )
    name = "blocks.1.mlp.fc1"
    found = turned(adapted, name, spectra[name], "right")
    after = ll.spectra(adapted.merge_and_unload(), name, progress=False)[name]
    np.testing.assert_allclose(found, (spectra[name].right @ after.right.T).abs(), atol=1e-3)
    assert found.max() <= 1


@pytest.mark.parametrize("angle", [1e-3, 0.3, 1.2])
def test_rotations_tell_a_known_angle(angle):
    model = one_layer()
    left, s, right = torch.linalg.svd(weight_matrix(model[0]).double(), full_matrices=False)
    turn = torch.tensor([[math.cos(angle) - 1, -math.sin(angle)], [math.sin(angle), math.cos(angle) - 1]])
    update = left[:, [3, 12]] @ turn.double() * s[[3, 12]] @ right[[3, 12]]
    row = only_row(rotations(with_update(model, update, ll.LoRA(2)), spectra_of(model), count=5))
    assert row["turned_left"] == pytest.approx(2 / 16 * math.sin(angle) ** 2, abs=1e-5)
    assert row["first_left"] == pytest.approx(math.sin(angle) ** 2 / 5, abs=1e-5)
    assert row["degrees_left"] == pytest.approx(math.degrees(angle), abs=0.02)
    assert row["turned_right"] == pytest.approx(0, abs=1e-5) and row["degrees_right"] < 0.02
    assert row["stretch"] == pytest.approx(0, abs=1e-5)
    assert row["rotation"] == pytest.approx(float(update.norm() / s.norm()), rel=1e-3)
    # u_3 and u_12 are evenly mixed at 45 degrees; the old basis still holds both, so neither is new
    assert row["intruders"] == 0


def test_a_direction_from_outside_the_old_basis_is_an_intruder():
    model = one_layer()
    left, _, right = torch.linalg.svd(weight_matrix(model[0]).double(), full_matrices=True)
    new = 30 * left[:, [20]] @ right[[15]]  # the left basis has 16 directions of 24
    adapted = with_update(model, new, ll.LoRA(1))
    row = only_row(rotations(adapted, spectra_of(model)))
    assert row["intruders"] == 1
    assert only_row(rotations(adapted, spectra_of(model), threshold=0))["intruders"] == 0
    assert row["degrees_left"] > 60


def test_nothing_trained_turns_nothing(model, spectra):
    table = rotations(ll.attach(model, ll.Window.middle(8), spectra=spectra), spectra)
    assert list(table["layer"]) == list(spectra)
    assert (table[["stretch", "rotation"]] < 1e-4).all(axis=None)
    assert (table[["first_left", "first_right"]] < 1e-3).all(axis=None) and (table["intruders"] == 0).all()
