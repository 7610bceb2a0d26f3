from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lora_lens.forgetting import predictors

RATES = (0.1, 0.2, 0.4, 0.8)
POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


def swept(seeds: int = 4, noise: float = 0.01) -> pd.DataFrame:
    """Forgetting of every position, rate and seed: rising with the rate, falling with the position."""
    random = np.random.default_rng(0)
    rows = [
        {"run": f"{p} {lr} {s}", "method": "window", "rank": 8, "position": p, "start": None, "lr": lr,
         "seed": s, "accuracy": 0.9, "forgetting": lr * (0.5 - 0.3 * p) + random.normal(0, noise)}
        for p in POSITIONS for lr in RATES for s in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def drifts(table: pd.DataFrame, **measures: np.ndarray) -> pd.DataFrame:
    """One layer for each run; what is not given is the same for all."""
    same = {"layer": "a", "update": 1.0, "relative": 0.1, "cka": 1.0, "relative_change": 0.5}
    return pd.DataFrame({"run": table["run"]}).assign(**same | measures)


def test_layers_become_runs_in_the_way_of_each_measure():
    layers = pd.DataFrame(
        {
            "run": ["a", "a", "b", "b"], "layer": ["x", "y"] * 2,
            "update": [3.0, 4.0, 1.0, 0.0], "relative": [0.3, 0.4, 0.1, 0.0],
            "inside": [0.0, 1.0, 0.25, np.nan], "above": [np.nan] * 4,
            "first_left": [0.2, 0.4, 0.1, 0.1], "intruders": [1, 2, 0, 0],
            "cka": [0.9, 0.9, 0.7, 0.7], "relative_change": [0.5, 0.5, 0.6, 0.6],
        }
    )  # fmt: skip
    found = predictors.by_run(layers).set_index("run")
    assert found["update"].tolist() == [5, 1]
    assert found.loc["a", "relative"] == pytest.approx(5 / np.hypot(10, 10))
    assert found["inside"].tolist() == [16 / 25, 0.25] and found["above"].isna().all()
    assert found["first_left"].tolist() == pytest.approx([0.3, 0.1])
    assert found["intruders"].tolist() == [3, 0]
    assert found["cka_loss"].tolist() == pytest.approx([0.1, 0.3])
    assert found["relative_change"].tolist() == [0.5, 0.6]
    with pytest.raises(ValueError, match="no column cka"):
        predictors.by_run(layers.drop(columns="cka"))


def test_a_measure_that_rises_with_forgetting_predicts_it_and_noise_does_not():
    table = swept()
    noise = np.random.default_rng(2).normal(size=len(table))
    moved = drifts(table, relative_change=np.exp(5 * table["forgetting"]), first_left=noise)
    result = predictors.predict_forgetting(table, moved, resamples=100).set_index("measure")
    best, nothing = result.loc["relative_change"], result.loc["first_left"]
    assert result.index[0] == "relative_change" and best["r2"] > 0.95 and best["spearman"] == pytest.approx(1)
    assert (best["spearman_low"], best["spearman_high"]) == pytest.approx((1, 1))
    assert nothing["r2"] < 0.1 and nothing["spearman_low"] < 0 < nothing["spearman_high"]
    assert result["r2"].is_monotonic_decreasing and (result["runs"] == len(table)).all()
    assert {"lr", "position"} <= set(result.index)
    assert "cka_loss" not in result.index and "accuracy" not in result.index  # the same for all runs


def test_a_measure_that_falls_with_forgetting_predicts_it_as_well():
    table = swept()
    result = predictors.predict_forgetting(
        table, drifts(table, first_left=-(table["forgetting"] ** 3)), resamples=50
    )
    row = result.set_index("measure").loc["first_left"]
    assert row["spearman"] == pytest.approx(-1) and row["r2"] > 0.95


def test_a_measure_that_only_tells_cells_apart_gains_nothing_by_their_copies():
    # both are random numbers of the cell: with some of its seeds in the training part, a monotone function
    # explains 15% of the variance of the rest
    table = swept(seeds=6)
    cells = table.groupby(["position", "lr"], sort=False).ngroup().to_numpy()
    random, gained = np.random.default_rng(3), []
    for _ in range(5):
        told, forgotten = random.normal(size=(2, len(POSITIONS) * len(RATES)))[:, cells]
        result = predictors.predict_forgetting(
            table.assign(forgetting=forgotten), drifts(table, first_left=told), resamples=10
        )
        gained.append(result.set_index("measure").loc["first_left", "r2"])
    assert np.mean(gained) < 0


def test_the_interval_of_the_rank_correlation_holds_the_true_one_though_seeds_are_copies():
    # of normal values with correlation r, Spearman's is 6 / pi * arcsin(r / 2); an interval that took the
    # six seeds of each cell for independent runs would be 2.4 times too narrow
    truth, random, held = 6 / np.pi * np.arcsin(0.6 / 2), np.random.default_rng(0), []
    table = pd.DataFrame({"run": range(180), "rank": np.repeat(range(30), 6)}).assign(
        method="window", position=0.5, start=None, lr=0.1, accuracy=0.9
    )
    for _ in range(60):
        x, y = random.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=30).T[:, table["rank"]]
        moved = drifts(table, first_left=x + random.normal(0, 0.01, 180))
        row = predictors.predict_forgetting(table.assign(forgetting=y), moved, resamples=150).iloc[0]
        held.append(row["spearman_low"] <= truth <= row["spearman_high"])
    assert 0.85 <= np.mean(held) <= 1


def test_measures_that_some_methods_lack_are_judged_on_the_others():
    table = swept()
    lora = table[table["position"] == 0.5].assign(
        method="LoRA", position=np.nan, run=lambda t: "L" + t["run"]
    )
    both = pd.concat([table, lora], ignore_index=True)
    inside = np.where(both["method"] == "window", both["forgetting"], np.nan)
    result = predictors.predict_forgetting(both, drifts(both, inside=inside), resamples=50)
    runs = result.set_index("measure")["runs"]
    assert runs["inside"] == runs["position"] == len(table) and runs["lr"] == len(both)


def test_runs_without_a_finite_value_are_not_judged_and_other_columns_do_no_harm():
    table = swept(seeds=2)
    measure = table["forgetting"].to_numpy().copy()
    measure[:2] = np.inf, np.nan
    moved = drifts(table, first_left=measure)
    result = predictors.predict_forgetting(table, moved, resamples=50).set_index("measure")
    assert result.loc["first_left", "runs"] == len(table) - 2 and result.loc["first_left", "r2"] > 0.95
    merged = table.merge(predictors.by_run(moved), on="run")  # holds the measures already
    again = predictors.predict_forgetting(merged, moved, resamples=50).set_index("measure")
    pd.testing.assert_frame_equal(again, result)


def test_one_fold_for_each_window_and_rate_is_the_closed_form():
    # three cells with one run each, and the held-out one always at an end or between the two others
    table = swept(seeds=1).iloc[:3].assign(forgetting=[0.0, 1.0, 2.0])
    moved = drifts(table, first_left=np.array([0.0, 1.0, 4.0]))
    row = predictors.predict_forgetting(table, moved, folds=10).set_index("measure").loc["first_left"]
    # fitted: lines through the other two, constant beyond: 1, 2 * 1 / 4, 1; means of the others: 1.5, 1, 0.5
    assert row["r2"] == pytest.approx(1 - (1 + 0.25 + 1) / (2.25 + 0 + 2.25))
    # a draws of an end and b of the middle, which adds nothing to be explained; three of the middle are none
    ratios = sorted({1 - (a + 0.25 * b) / (2.25 * a) for a, b in [(1, 2), (2, 1), (3, 0)]})
    assert ratios[0] - 1e-9 <= row["r2_low"] <= row["r2"] <= row["r2_high"] <= ratios[-1] + 1e-9


def test_the_interval_of_r2_tells_a_noisy_measure_from_an_exact_one():
    table = swept(seeds=3)
    moved = drifts(
        table, first_left=table["forgetting"] + np.random.default_rng(1).normal(0, 0.05, len(table))
    )
    row = predictors.predict_forgetting(table, moved).set_index("measure").loc["first_left"]
    assert 0 < row["r2_low"] < row["r2"] < row["r2_high"] < 1
    exact = drifts(table, first_left=table["forgetting"])
    best = predictors.predict_forgetting(table, exact).set_index("measure").loc["first_left"]
    assert best["r2_low"] > row["r2_high"]


def test_exact_copies_of_the_runs_change_nothing():
    told = np.random.default_rng(4).normal(size=len(POSITIONS) * len(RATES))
    results = []
    for seeds in (1, 6):
        table = swept(seeds=seeds, noise=0)
        moved = drifts(table, first_left=table["forgetting"] + 0.05 * np.repeat(told, seeds))
        results.append(predictors.predict_forgetting(table, moved).set_index("measure").drop(columns="runs"))
    pd.testing.assert_frame_equal(*results)


def test_the_same_seed_gives_the_same_numbers_and_runs_without_a_drift_are_left_out():
    table = swept(seeds=2)
    moved = drifts(table, first_left=table["forgetting"] ** 2)
    one, two = (predictors.predict_forgetting(table, moved, resamples=50) for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
    fewer = predictors.predict_forgetting(table, moved.iloc[:-3], resamples=50)
    assert (fewer["runs"] == len(table) - 3).all()


def test_without_enough_runs_or_anything_to_predict_it_says_so():
    table = swept()
    with pytest.raises(ValueError, match="at least 3 windows and rates"):
        predictors.predict_forgetting(table, drifts(table.head(8)))
    with pytest.raises(ValueError, match="all runs forgot the same"):
        predictors.predict_forgetting(table.assign(forgetting=0.1), drifts(table))
    with pytest.raises(ValueError, match="folds must be at least 2, not 1"):
        predictors.predict_forgetting(table, drifts(table), folds=1)
    moved = drifts(table, first_left=table["forgetting"])
    with pytest.raises(ValueError, match="resamples must be at least 1, not 0"):
        predictors.predict_forgetting(table, moved, resamples=0)
    with pytest.raises(ValueError, match="no column forgetting"):
        predictors.predict_forgetting(table.drop(columns="forgetting"), drifts(table))


def test_what_a_measure_tells_beyond_the_learning_rate():
    """The first measure is the rate and noise, the second orders the runs at each rate."""
    random = np.random.default_rng(0)
    rates = np.repeat([1e-3, 1e-2], 30)
    inside = np.tile(np.arange(30), 2)
    forgetting = 100 * rates + inside / 1000
    found = predictors._within(rates + 1e-6 * random.normal(size=60), forgetting, rates)
    assert abs(found) < 0.4
    assert predictors._within(-inside.astype(float), forgetting, rates) == pytest.approx(-1)
    assert np.isnan(predictors._within(rates, forgetting, rates))
    against = np.where(rates < 5e-3, inside, -inside)  # rising at one rate, falling at the other
    assert predictors._within(against, forgetting, rates) == pytest.approx(0)


def test_places_with_more_runs_weigh_more_where_neighbours_are_pooled():
    x, y = np.array([0.0, 1, 1, 1, 2]), np.array([0.0, 3, 3, 3, 1])
    fitted = predictors._monotone(x, y, np.array([0.0, 0.5, 1, 2, 9]))
    assert fitted == pytest.approx([0, 1.25, 2.5, 2.5, 2.5])  # (3 * 3 + 1) / 4
