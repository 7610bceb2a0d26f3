from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pandas as pd
import pytest
from sweep_tables import NINE, swept

from lora_lens.forgetting.u_shape import u_shape_test


def test_a_clear_u_is_called_one_with_its_best_window_and_excesses():
    noise = np.random.default_rng(0).normal(0, 0.005, size=(6, 9))
    u = u_shape_test(swept(0.4 * (NINE - 0.5) ** 2 + noise), 1e-3)
    assert u.position == pytest.approx(0.5, abs=0.126) and u.seeds == 6
    assert u.p == 2**-6  # no other sign pattern gives as much
    assert u.first_excess == pytest.approx(0.1, abs=0.02) and u.last_excess == pytest.approx(0.1, abs=0.02)
    assert u.first_interval[0] < u.first_excess < u.first_interval[1]
    assert u.words.startswith("A U-shape at learning rate 0.001: ") and "p = 0.0156, 6 seeds" in u.words
    assert u == u_shape_test(swept(0.4 * (NINE - 0.5) ** 2 + noise), 1e-3)
    with pytest.raises(FrozenInstanceError):
        u.p = 0.0


def test_a_slope_is_not_a_u():
    noise = np.random.default_rng(0).normal(0, 0.005, size=(6, 9))
    slope = u_shape_test(swept(0.3 - 0.2 * NINE + noise), 1e-3)
    assert slope.p > 0.9 and slope.last_excess < 0 < slope.first_excess
    assert slope.words.startswith("No evidence of a U-shape")


def test_the_p_value_of_a_known_table():
    # one window between, so no maximum: of 16 patterns of the differences 1, 2, 3, -1 those with the
    # largest sums are 7 (one), and 5 (two: the given one, and that with 1 turned but -1, too)
    ends = np.array([1.0, 2.0, 3.0, -1.0])
    table = swept(np.stack([ends, 0 * ends, ends], 1), np.array([0, 0.5, 1]))
    u = u_shape_test(table, 1e-3)
    assert u.p == 3 / 16
    assert u.first_excess == pytest.approx(1.25)


def test_the_best_window_of_a_seed_is_chosen_on_the_other_seeds():
    forgetting = np.array([[1.0, 0.0, 0.5, 1.0], [1.0, 0.6, 0.1, 1.0]])
    u = u_shape_test(swept(forgetting, np.array([0, 0.3, 0.7, 1])), 1e-3)
    # each seed alone prefers a window that is bad for the other
    assert u.first_excess == pytest.approx(np.mean([1 - 0.5, 1 - 0.6]))
    assert u.position == pytest.approx(0.3)  # means of 0.3 each: the first


def test_with_too_few_seeds_there_is_no_test_and_it_says_so():
    curve = 40 * (NINE - 0.5) ** 2
    three = u_shape_test(swept(np.tile(curve, (3, 1))), 1e-3)
    assert np.isnan(three.p) and "3 seeds are too few" in three.words
    one = u_shape_test(swept(curve[None]), 1e-3)
    assert np.isnan([one.p, one.first_excess, *one.last_interval]).all() and "1 seed is too few" in one.words
    assert one.position == 0.5
    four = u_shape_test(swept(np.tile(curve, (4, 1))), 1e-3)
    assert four.p == 2**-4 and "cannot give less than 0.0625" in four.words


def test_many_seeds_use_random_sign_patterns():
    noise = np.random.default_rng(0).normal(0, 0.01, size=(14, 9))
    u = u_shape_test(swept(0.4 * (NINE - 0.5) ** 2 + noise), 1e-3, resamples=999)
    assert u.p == pytest.approx(1 / 1000)


def test_a_u_shape_needs_ends_windows_and_one_setting():
    table = swept(np.zeros((5, 9)))
    for positions in (NINE[1:], NINE[:-1], NINE[[0, -1]]):
        with pytest.raises(ValueError, match="needs windows at positions 0, 1 and between"):
            u_shape_test(table[table["position"].isin(positions)], 1e-3)
    with pytest.raises(ValueError, match=r"no windows .* at learning rate 0.5; there are 0.001"):
        u_shape_test(table, 0.5)
    with pytest.raises(ValueError, match="no windows"):
        u_shape_test(table.assign(method="LoRA"), 1e-3)
    with pytest.raises(ValueError, match="keep one rank"):
        u_shape_test(pd.concat([table, table.assign(rank=4)]), 1e-3)
    with pytest.raises(ValueError, match="no column forgetting"):
        u_shape_test(table.drop(columns="forgetting"), 1e-3)
    with pytest.raises(ValueError, match="no seed was run at every position"):
        u_shape_test(table[(table["seed"] == 0) ^ (table["position"] == 0)], 1e-3)
    assert u_shape_test(table.iloc[1:], 1e-3).seeds == 4  # the incomplete seed is left out


@pytest.mark.parametrize(
    ("ends", "noise", "least", "most"),
    [
        pytest.param((0.0, 0.0), 2.0, 0, 0.07, id="flat"),
        pytest.param((20.0, 0.0), 2.0, 0, 0.07, id="only the PiSSA end is high"),
        pytest.param((0.0, 20.0), 2.0, 0, 0.07, id="only the MiLoRA end is high"),
        pytest.param((20.0, 0.0), [2.0] * 8 + [5.0], 0, 0.07, id="one end is high, the other is noisy"),
        pytest.param((4.0, 4.0), 2.0, 0.8, 1, id="U"),
    ],
)
def test_u_shapes_are_found_and_rarely_invented(ends, noise, least, most):
    random = np.random.default_rng(0)
    means = np.array([ends[0], *[0.0] * 7, ends[1]])
    called = []  # for each of 300 experiments with 6 seeds; the noise is in percentage points
    for _ in range(300):
        points = means + random.normal(0, 1, size=(6, 9)) * noise
        called.append(u_shape_test(swept(points / 100), 1e-3, resamples=100).p <= 0.05)
    assert least <= np.mean(called) <= most
