from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from lora_lens.forgetting import aggregate, fair_comparison, pareto


def runs(
    accuracy: dict[tuple[float, float], list[float]], forgetting: dict[tuple[float, float], list[float]]
) -> pd.DataFrame:
    """A table from lists over seeds, by (position, learning rate)."""
    rows = []
    for (position, lr), scores in accuracy.items():
        for seed, (score, lost) in enumerate(zip(scores, forgetting[position, lr], strict=True)):
            rows.append(
                {"method": "window", "rank": 8, "position": position, "start": None, "lr": lr, "seed": seed,
                 "accuracy": score, "retained_accuracy": 0.9 - lost, "forgetting": lost}
            )  # fmt: skip
    return pd.DataFrame(rows)


def forgetting_nothing(accuracy: dict[tuple[float, float], list[float]]) -> pd.DataFrame:
    return runs(accuracy, {key: [0.1] * len(scores) for key, scores in accuracy.items()})


def test_wins_in_both_scores_are_counted_over_equal_seeds_and_rates():
    accuracy = {
        (0.0, 0.1): [0.5, 0.5],
        (0.0, 0.2): [0.5, 0.5],
        (1.0, 0.1): [0.6, 0.6],
        (1.0, 0.2): [0.4, 0.5],
    }
    lost = {(0.0, 0.1): [0.2, 0.2], (0.0, 0.2): [0.2, 0.2], (1.0, 0.1): [0.1, 0.1], (1.0, 0.2): [0.3, 0.1]}
    row = pareto.dominance(runs(accuracy, lost)).iloc[0]
    assert (row["position_a"], row["position_b"], row["pairs"], row["seeds"]) == (0.0, 1.0, 4, 2)
    assert row["a_beats_b"] == 0.25 and row["b_beats_a"] == 0.5  # the fourth is a tie in accuracy
    of_each_seed = fair_comparison.seed_interval([0.5, 0.0])
    assert (row["a_beats_b_low"], row["a_beats_b_high"]) == pytest.approx(of_each_seed)
    assert (row["b_beats_a_low"], row["b_beats_a_high"]) == (0.5, 0.5)


def test_windows_without_a_common_rate_are_not_compared():
    row = pareto.dominance(forgetting_nothing({(0.0, 0.1): [0.5], (1.0, 0.2): [0.6]})).iloc[0]
    assert row["pairs"] == 0 and np.isnan(row["a_beats_b"])
    with pytest.raises(ValueError, match="at least two windows"):
        pareto.dominance(forgetting_nothing({(0.0, 0.1): [0.5]}))
    with pytest.raises(ValueError, match="no column retained_accuracy"):
        pareto.dominance(forgetting_nothing({(0.0, 0.1): [0.5]}).drop(columns="retained_accuracy"))


def test_three_windows_make_three_pairs():
    table = forgetting_nothing({(p, 0.1): [0.5, 0.6] for p in (0.0, 0.5, 1.0)})
    assert len(pareto.dominance(table)) == 3


def test_the_area_under_a_known_front():
    points = [(1, 3), (2, 2), (3, 1), (1, 1), (2, 2), (np.nan, 9), (9, -1)]
    assert pareto.hypervolume(points) == 6
    assert pareto.hypervolume(points, reference=(1, 1)) == 1
    assert pareto.hypervolume([]) == 0
    with pytest.raises(ValueError, match="must be pairs"):
        pareto.hypervolume([1, 2])


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=12))
def test_the_area_is_the_number_of_unit_squares_below_some_point(points):
    squares = {(i, j) for x, y in points for i in range(x) for j in range(y)}
    assert pareto.hypervolume(points) == len(squares)
    table = pd.DataFrame(points, columns=["accuracy", "retained_accuracy"]) / 12
    front = 12 * table[aggregate.pareto_front(table)].to_numpy()
    assert pareto.hypervolume(front) == pytest.approx(len(squares))


def test_a_front_of_known_rates_and_the_area_it_covers():
    # means over seeds: (0.5, 0.8), (0.6, 0.6) and (0.4, 0.5), which the first beats
    accuracy = {(0.5, 0.1): [0.4, 0.6], (0.5, 0.2): [0.6, 0.6], (0.5, 0.4): [0.4, 0.4]}
    lost = {(0.5, 0.1): [0.1, 0.1], (0.5, 0.2): [0.3, 0.3], (0.5, 0.4): [0.4, 0.4]}
    row = pareto.front_by_method(runs(accuracy, lost)).iloc[0]
    assert (row["seeds"], row["rates"], row["on_front"]) == (2, 3, 2)
    assert row["hypervolume"] == pytest.approx(0.5 * 0.8 + 0.1 * 0.6)
    # each seed alone covers 0.4 * 0.8 + 0.2 * 0.6 = 0.44 or 0.6 * 0.8 = 0.48; t is 12.7 with one degree
    assert row["hypervolume_high"] - row["hypervolume"] == pytest.approx(12.7062 * 0.02, rel=1e-5)
    assert row["hypervolume"] - row["hypervolume_low"] == pytest.approx(12.7062 * 0.02, rel=1e-5)
    guessing = pareto.front_by_method(runs(accuracy, lost), reference=(0.1, 0.1)).iloc[0]
    assert guessing["hypervolume"] == pytest.approx(0.4 * 0.7 + 0.1 * 0.5)
    assert guessing["hypervolume_high"] == pytest.approx(0.33 + 12.7062 * 0.02, rel=1e-5)  # 0.31 and 0.35


def test_the_interval_of_one_rate_is_that_of_its_mean():
    accuracy = np.random.default_rng(0).uniform(0.5, 0.7, 8)
    row = pareto.front_by_method(forgetting_nothing({(0.5, 0.1): accuracy.tolist()})).iloc[0]
    expected = 0.8 * np.array(fair_comparison.seed_interval(accuracy))  # all retain 0.8
    assert row[["hypervolume_low", "hypervolume_high"]].tolist() == pytest.approx(expected.tolist())


def test_a_front_takes_the_seeds_that_were_run_at_every_rate():
    accuracy = {(0.5, 0.1): [0.5, 0.9], (0.5, 0.2): [0.4], (1.0, 0.1): [0.5, 0.5]}
    first, second = pareto.front_by_method(forgetting_nothing(accuracy)).to_dict("records")
    assert (first["seeds"], first["rates"], second["seeds"], second["rates"]) == (1, 2, 2, 1)
    assert first["hypervolume"] == pytest.approx(0.4) and np.isnan(first["hypervolume_low"])
    with pytest.raises(ValueError, match="no column retained_accuracy"):
        pareto.front_by_method(forgetting_nothing(accuracy).drop(columns="retained_accuracy"))
    apart = forgetting_nothing({(0.5, 0.1): [0.5], (0.5, 0.2): [0.4]})
    with pytest.raises(ValueError, match="was run at all its rates"):
        pareto.front_by_method(apart.assign(seed=[0, 1]))
