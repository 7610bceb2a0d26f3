from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from lora_lens.forgetting import aggregate

unit = st.floats(0, 1, allow_nan=False)


def test_the_front_of_a_known_table():
    table = pd.DataFrame(
        {"accuracy": [0.9, 0.8, 0.7, 0.8, 0.9, np.nan], "retained_accuracy": [0.5, 0.6, 0.6, 0.7, 0.5, 1.0]},
        index=list("abcdef"),
    )
    assert aggregate.pareto_front(table).to_dict() == {
        "a": True,
        "b": False,
        "c": False,
        "d": True,
        "e": True,
        "f": False,
    }


@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=30))
def test_a_point_is_off_the_front_exactly_when_another_beats_it(points):
    table = pd.DataFrame(points, columns=["accuracy", "retained_accuracy"])
    front = aggregate.pareto_front(table)
    assert front.any()
    for (x, y), on_front in zip(points, front, strict=True):
        assert on_front != any(a >= x and b >= y and (a > x or b > y) for a, b in points)


def swept(forgetting: dict[float, list[float]], lr: float = 1e-3) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"method": "window", "rank": 8, "position": p, "start": None, "lr": lr, "seed": seed,
             "accuracy": 0.9, "retained_accuracy": 0.9 - f, "forgetting": f}
            for p, values in forgetting.items()
            for seed, f in enumerate(values)
        ]
    )  # fmt: skip


def test_a_u_shape_is_found_and_a_slope_is_not():
    u = aggregate.ends_and_interior(swept({0.0: [0.5, 0.4], 0.5: [0.1, 0.2], 1.0: [0.3, 0.25]})).iloc[0]
    assert u["u_shape"] and u["best_position"] == 0.5
    assert u["first_excess"] == pytest.approx(0.3) and u["first_excess_min"] == pytest.approx(0.2)
    assert u["last_excess"] == pytest.approx(0.125) and u["last_excess_min"] == pytest.approx(0.05)
    slope = aggregate.ends_and_interior(swept({0.0: [0.5, 0.4], 0.5: [0.2, 0.2], 1.0: [0.1, 0.3]})).iloc[0]
    assert not slope["u_shape"]


def test_a_seed_that_misses_a_window_takes_no_part():
    table = swept({0.0: [0.3, 0.3], 0.5: [0.1, 0.2], 1.0: [0.3, np.nan]})
    row = aggregate.ends_and_interior(table).iloc[0]
    assert (row["first"], row["best"], row["last"]) == pytest.approx((0.3, 0.1, 0.3))
    table.loc[(table["position"] == 0) & (table["seed"] == 0), "forgetting"] = np.nan
    with pytest.raises(ValueError, match="no seed was run at every position"):
        aggregate.ends_and_interior(table)


def test_a_comparison_without_both_ends_is_refused():
    with pytest.raises(ValueError, match="needs windows at positions 0, 1 and between"):
        aggregate.ends_and_interior(swept({0.0: [0.5], 0.5: [0.2]}))
    with pytest.raises(ValueError, match="no runs of windows"):
        aggregate.ends_and_interior(swept({0.0: [0.5]}).assign(method="LoRA"))


def test_means_over_seeds():
    means = aggregate.seed_means(swept({0.0: [0.5, 0.4], 1.0: [0.3, 0.1]}))
    assert means["forgetting"].tolist() == pytest.approx([0.45, 0.2])
    assert means["seeds"].tolist() == [2, 2]
    assert means["forgetting_std"].iloc[1] == pytest.approx(np.std([0.3, 0.1], ddof=1))


def test_variants_are_not_averaged_and_mixed_tables_are_not_compared():
    rows = [
        {"method": "window", "rank": 8, "position": p, "start": None, "lr": 1e-3, "seed": 0, "variant": v,
         "accuracy": 0.9, "retained_accuracy": 0.8, "forgetting": 0.1 + i}
        for i, v in enumerate(("plain", "dora")) for p in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    assert (
        len(aggregate.seed_means(table)) == 6
        and len(aggregate.seed_means(table.drop(columns="variant"))) == 3
    )
    with pytest.raises(ValueError, match=r"several runs share seed and position at learning rate 0.001"):
        aggregate.ends_and_interior(table)


def test_the_front_is_that_of_all_pairs_and_takes_no_memory_for_them():
    draw = np.random.default_rng(0)
    for n in range(30):  # few values, so that many are equal; some missing, some infinite
        points = draw.choice([0.0, 1.0, 2.0, np.inf, -np.inf, np.nan], size=(n, 2))
        as_good = (points[None] >= points[:, None]).all(-1)
        better = (points[None] > points[:, None]).any(-1)
        expected = ~(as_good & better).any(1) & ~np.isnan(points).any(1)
        assert aggregate.pareto_front(pd.DataFrame(points), x=0, y=1).tolist() == expected.tolist()
    many = pd.DataFrame(draw.random((200_000, 2)))  # all pairs would take 40 GB
    assert 1 <= aggregate.pareto_front(many, x=0, y=1).sum() < 100
