from __future__ import annotations

import pytest
import torch
from one_weight import one_layer, orthonormal, spectra_of

import lora_lens as ll
from lora_lens.experiments.continual.strategies import Slot
from lora_lens.forgetting.window_survival import components_of, survival
from lora_lens.spectrum.comparison import overlap
from lora_lens.spectrum.layer_weights import set_weight_matrix, weight_matrix

WINDOWS = [ll.Window.first(4), ll.Window.middle(4), ll.Window.last(4), Slot(4, 0.5, 1)]


def weight_of(model: torch.nn.Module) -> torch.Tensor:
    return weight_matrix(model[0]).detach().double()


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_weight_that_stays_keeps_its_window(window):
    weight = weight_of(one_layer())
    before = components_of(weight, window)
    assert before.left.shape == (24, 4) and before.right.shape == (4, 16)
    left = survival(before, weight, window)
    assert left == pytest.approx({"overlap_left": 1, "overlap_right": 1, "block_change": 0}, abs=1e-6)
    assert survival(before, 3 * weight, window) == pytest.approx(
        {"overlap_left": 1, "overlap_right": 1, "block_change": 2}, abs=1e-5
    )


@pytest.mark.parametrize("window", WINDOWS[:3], ids=str)
def test_overlaps_are_those_of_a_comparison(window):
    then, now = one_layer(), one_layer()
    update = 0.2 * torch.randn(24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    set_weight_matrix(now[0], weight_of(then) + update)
    found = survival(components_of(weight_of(then), window), weight_of(now), window)
    spectra = [spectra_of(model)["0"] for model in (then, now)]
    for side in ("left", "right"):
        expected = overlap(*spectra, window, side)
        assert found[f"overlap_{side}"] == pytest.approx(expected, abs=1e-5) and expected < 0.999


def test_numbers_by_hand():
    left, right = orthonormal(24, 16, 0), orthonormal(16, 16, 1)
    values = torch.logspace(1, 0, 16, dtype=torch.float64)
    weight, window = left * values @ right.T, ll.Window.first(4)
    before = components_of(weight, window)

    swapped = values.clone()
    swapped[[1, 6]] = values[[6, 1]]  # of the four components one leaves the window
    lost = float((values[1] - values[6]) / values[:4].norm())
    assert survival(before, left * swapped @ right.T, window) == pytest.approx(
        {"overlap_left": 0.75, "overlap_right": 0.75, "block_change": lost}, abs=1e-5
    )

    turned = left.clone()
    turned[:, [1, 6]] = left[:, [6, 1]]  # its output goes elsewhere
    gone = float(values[1] / values[:4].norm())
    assert survival(before, turned * values @ right.T, window) == pytest.approx(
        {"overlap_left": 0.75, "overlap_right": 1, "block_change": gone}, abs=1e-5
    )


def test_what_moves_the_window_s_own_components_but_not_its_block_is_told_apart():
    left, right = orthonormal(24, 16, 0), orthonormal(16, 16, 1)
    values = torch.logspace(1, 0, 16, dtype=torch.float64)
    window = ll.Window.first(4)
    before = components_of(left * values @ right.T, window)
    larger = values.clone()
    larger[12:] = 20.0  # four components outside overtake those of the window
    assert survival(before, left * larger @ right.T, window) == pytest.approx(
        {"overlap_left": 0, "overlap_right": 0, "block_change": 0}, abs=1e-5
    )


def test_a_window_must_fit():
    with pytest.raises(ValueError, match="fc1"):
        components_of(torch.ones(3, 5), ll.Window.first(4), "fc1")
