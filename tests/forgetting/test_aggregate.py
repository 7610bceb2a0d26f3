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


def test_means_over_seeds():
    means = aggregate.seed_means(swept({0.0: [0.5, 0.4], 1.0: [0.3, 0.1]}))
    assert means["forgetting"].tolist() == pytest.approx([0.45, 0.2])
    assert means["seeds"].tolist() == [2, 2]
    assert means["forgetting_std"].iloc[1] == pytest.approx(np.std([0.3, 0.1], ddof=1))


def test_variants_are_not_averaged():
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
