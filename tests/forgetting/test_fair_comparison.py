from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import ttest_1samp
from sweep_tables import runs

from lora_lens.forgetting import fair_comparison
from lora_lens.forgetting.rate_ranges import rate_robustness

unit = st.floats(0, 1, allow_nan=False)


# intervals


@given(st.lists(st.floats(0, 1).map(lambda x: round(x, 6)), min_size=2, max_size=12))
def test_an_interval_is_that_of_the_one_sample_t_test(values):
    low, high = fair_comparison.seed_interval(values, level=0.9)
    assert (low + high) / 2 == pytest.approx(np.mean(values))
    if np.ptp(values):
        assert (low, high) == pytest.approx(tuple(ttest_1samp(values, 0).confidence_interval(0.9)), abs=1e-9)
    else:
        assert low == pytest.approx(high, abs=1e-12)


def test_an_interval_computed_by_hand():
    # 0.1, 0.2, 0.3: s is 0.1, and t with 2 degrees of freedom is 4.302653
    assert fair_comparison.seed_interval([0.1, 0.2, 0.3]) == pytest.approx(
        (0.2 - 4.302653 * 0.1 / 3**0.5, 0.2 + 4.302653 * 0.1 / 3**0.5), rel=1e-6
    )


def test_one_value_has_no_interval_and_none_or_missing_ones_are_refused():
    assert np.isnan(fair_comparison.seed_interval([0.3])).all()
    for values in ([], [0.1, np.nan]):
        with pytest.raises(ValueError, match="none of them missing"):
            fair_comparison.seed_interval(values)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), not 95"):
        fair_comparison.seed_interval([1, 2], level=95)


# at equal and at the best rates


def test_a_run_that_failed_is_left_out_and_counted_nowhere():
    table = runs({(p, lr): [0.8, 0.6, 0.7] for p in (0.0, 0.5, 1.0) for lr in (0.1, 0.2, 0.4)})
    failed = (table["lr"] == 0.4) | ((table["lr"] == 0.2) & (table["seed"] == 0) & (table["position"] == 0.5))
    measures = ["accuracy", "retained_before", "retained_accuracy", "forgetting", "diverged"]
    table[measures] = table[measures].astype(object).where(~failed, None)
    rows = fair_comparison.at_equal_rate(table).set_index(["position", "lr"])
    assert rows.loc[(0.5, 0.2), ["seeds", "accuracy"]].tolist() == [2, pytest.approx(0.65)]
    assert rows.loc[(0.0, 0.4), "seeds"] == 0 and np.isnan(rows.loc[(0.0, 0.4), "accuracy"])
    best = fair_comparison.at_own_best_rate(table).set_index("position")
    assert best["lr"].tolist() == [0.1] * 3 and best["seeds"].tolist() == [3, 2, 3]
    assert best["rates"].tolist() == [2, 2, 2]
    assert rate_robustness(table)["highest"].tolist() == [0.2] * 3
    steps = [
        {"run": r, "step": s, "accuracy": s, "retained_accuracy": 0.5}
        for r in table.loc[~failed, "run"]
        for s in (0, 1)
    ]
    reached = fair_comparison.at_matched_accuracy(table, pd.DataFrame(steps), 0.5).set_index(
        ["position", "lr"]
    )
    assert reached.loc[(0.5, 0.2), ["seeds", "reached"]].tolist() == [3, 2]


def test_means_at_equal_rates_come_with_seeds_and_intervals():
    table = runs({(0.0, 0.1): [0.8, 0.6], (0.5, 0.1): [0.9]}, {(0.0, 0.1): [0.2, 0.4]})
    table.loc[0, "diverged"] = True
    first, second = fair_comparison.at_equal_rate(table).to_dict("records")
    assert (first["position"], first["lr"], first["seeds"], first["diverged"]) == (0.0, 0.1, 2, 1)
    assert first["accuracy"] == pytest.approx(0.7) and first["forgetting"] == pytest.approx(0.3)
    half = 12.706205 * 0.1  # t with one degree of freedom
    assert (first["accuracy_low"], first["accuracy_high"]) == pytest.approx((0.7 - half, 0.7 + half))
    assert (first["forgetting_low"], first["forgetting_high"]) == pytest.approx((0.3 - half, 0.3 + half))
    assert second["seeds"] == 1 and np.isnan(second["accuracy_low"])


def test_variants_and_baselines_without_a_position_keep_their_own_rows():
    window = runs({(0.5, 0.1): [0.8, 0.6]}).assign(variant=None)
    other = window.assign(variant="DoRA", run="x")
    probe = window.assign(method="linear probe", rank=None, position=np.nan, run="y")
    result = fair_comparison.at_equal_rate(pd.concat([window, other, probe], ignore_index=True))
    assert result["seeds"].tolist() == [2, 2, 2] and result["variant"].tolist()[1] == "DoRA"


def test_tables_without_runs_or_columns_and_with_a_seed_twice_are_refused():
    table = runs({(0.5, 0.1): [0.8, 0.6]})
    for function in (
        fair_comparison.at_equal_rate,
        fair_comparison.at_own_best_rate,
        rate_robustness,
    ):
        with pytest.raises(ValueError, match="no column accuracy"):
            function(table.drop(columns="accuracy"))
        with pytest.raises(ValueError, match=r"share learning rate 0.1 and seed 0"):
            function(pd.concat([table, table]))
        with pytest.raises(ValueError, match="the table is empty"):
            function(table.iloc[:0])


def test_each_seed_is_judged_at_the_rate_that_is_best_by_the_others():
    # without seed 0 the means are 0.6 and 0.7, without 1 they are 0.7 and 0.65, without 2 0.8 and 0.65
    table = runs({(0.5, 0.1): [0.9, 0.7, 0.5], (0.5, 0.2): [0.6, 0.7, 0.7]})
    row = fair_comparison.at_own_best_rate(table).iloc[0]
    assert (row["lr"], row["seeds"], row["rates"], row["selected_on"]) == (0.1, 3, 2, "other seeds")
    assert row["accuracy"] == pytest.approx((0.6 + 0.7 + 0.5) / 3)
    # if seed 0 had a say in its own choice, all would be at 0.1, where the mean is 0.7 instead of 0.6
    half = 4.302653 * (np.var([0.6, 0.7, 0.5], ddof=1) / 3 + 0.1**2) ** 0.5
    assert row["accuracy_high"] - row["accuracy"] == pytest.approx(half, rel=1e-6)


def test_a_lone_seed_is_told_by_itself_and_a_tie_goes_to_the_lower_rate():
    table = runs({(0.5, 0.2): [0.5, 1.0], (0.5, 0.1): [0.75] * 2, (1.0, 0.1): [0.3], (1.0, 0.2): [0.4]})
    row, single = fair_comparison.at_own_best_rate(table).to_dict("records")
    assert (row["lr"], row["seeds"], row["selected_on"]) == (0.1, 2, "other seeds")
    assert row["accuracy"] == pytest.approx((0.5 + 0.75) / 2)  # seed 1 takes 0.1, which suited seed 0 better
    assert single["lr"] == 0.2 and np.isnan(single["accuracy_low"]) and single["selected_on"] == "same seeds"


def test_choosing_on_other_seeds_removes_the_optimism():
    noise = np.random.default_rng(0).normal(0.5, 0.05, size=(200, 8, 6))  # windows, rates, seeds: all equal
    table = runs({(w, 0.1 * 2**r): noise[w, r].tolist() for w in range(200) for r in range(8)})
    honest = fair_comparison.at_own_best_rate(table)["accuracy"].mean()
    flattered = noise.mean(-1).max(-1).mean()
    assert honest == pytest.approx(0.5, abs=0.006)  # the standard error is 0.002
    assert flattered > 0.52


def test_only_seeds_run_at_every_rate_choose_the_best():
    table = runs({(0.5, 0.1): [0.5, 0.5, 0.5], (0.5, 0.2): [0.6]})
    assert fair_comparison.at_own_best_rate(table)["seeds"].item() == 1
    with pytest.raises(ValueError, match=r"window .*position 0.5.* at all its rates 0.1, 0.2"):
        fair_comparison.at_own_best_rate(table[(table["seed"] > 0) | (table["lr"] > 0.1)])
    with pytest.raises(ValueError, match="score must be"):
        fair_comparison.at_own_best_rate(table, score="forgetting")


# at matched accuracy


def curve(run: str, accuracy: list[float], retained: list[float]) -> pd.DataFrame:
    steps = 10 * np.arange(len(accuracy))
    return pd.DataFrame({"run": run, "step": steps, "accuracy": accuracy, "retained_accuracy": retained})


def test_forgetting_is_read_where_each_run_first_reaches_the_accuracy():
    table = runs({(0.0, 0.1): [0.8, 0.4]})
    curves = pd.concat(
        [
            curve("0.0 0.1 0", [0.2, 0.4, 0.3, 0.8], [0.9, 0.8, 0.75, 0.55]),
            curve("0.0 0.1 1", [0.2, 0.4, 0.4, 0.4], [0.9, 0.8, 0.7, 0.6]),
            curve("of another sweep", [1.0], [0.0]),
        ]
    )
    row = fair_comparison.at_matched_accuracy(table, curves, 0.6).iloc[0]
    # between 0.4, the best so far, and 0.8: half way from step 20 to 30 and from 0.75 to 0.55
    assert (row["seeds"], row["reached"], row["most_reached"]) == (2, 1, True)
    assert row["step"] == pytest.approx(25) and row["forgetting"] == pytest.approx(0.25)
    both = fair_comparison.at_matched_accuracy(table, curves.sample(frac=1, random_state=0), 0.3).iloc[0]
    assert both["reached"] == 2 and both["forgetting"] == pytest.approx(0.05)
    assert both["step"] == both["step_low"] == both["step_high"] == pytest.approx(5)
    at_start = fair_comparison.at_matched_accuracy(table, curves, 0.1).iloc[0]
    assert at_start["step"] == 0 and at_start["forgetting"] == 0
    never = fair_comparison.at_matched_accuracy(table, curves, 0.9).iloc[0]
    assert never["reached"] == 0 and np.isnan(never["forgetting"]) and np.isnan(never["step_low"])


@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=8), unit)
def test_a_crossing_lies_between_the_evaluations_around_it(points, target):
    accuracy, retained = (list(column) for column in zip(*points, strict=True))
    table = runs({(0.0, 0.1): [accuracy[-1]]})
    row = fair_comparison.at_matched_accuracy(table, curve("0.0 0.1 0", accuracy, retained), target).iloc[0]
    assert row["reached"] == (max(accuracy) >= target)
    if row["reached"]:
        first = next(i for i, a in enumerate(accuracy) if a >= target)
        around = retained[max(first - 1, 0) : first + 1]
        assert 10 * (first - 1) <= row["step"] <= 10 * first
        assert min(around) - 1e-9 <= 0.9 - row["forgetting"] <= max(around) + 1e-9


def test_each_window_has_one_rate_that_most_runs_reach_the_accuracy_at():
    table = runs({(0.0, 0.4): [0.9, 0.9], (0.0, 0.2): [0.9, 0.9], (0.0, 0.1): [0.9, 0.2], (1.0, 0.1): [0.2]})
    curves = pd.concat(curve(r.run, [0.0, r.accuracy], [0.9, 0.8]) for r in table.itertuples())
    result = fair_comparison.at_matched_accuracy(table, curves, 0.5)
    assert result["most_reached"].tolist() == [False, True, False, True]
    assert result["reached"].tolist() == [2, 2, 1, 0]


def test_matching_refuses_percent_missing_curves_and_missing_columns():
    table = runs({(0.0, 0.1): [0.8]})
    good = curve("0.0 0.1 0", [0.2], [0.9])
    with pytest.raises(ValueError, match=r"80% is 0.8"):
        fair_comparison.at_matched_accuracy(table, good, 80)
    with pytest.raises(ValueError, match=r"no curves of 1 runs, such as 0.0 0.1 0"):
        fair_comparison.at_matched_accuracy(table, good.assign(run="x"), 0.5)
    with pytest.raises(ValueError, match="no column step"):
        fair_comparison.at_matched_accuracy(table, good.drop(columns="step"), 0.5)
    with pytest.raises(ValueError, match="no column retained_before"):
        fair_comparison.at_matched_accuracy(table.drop(columns="retained_before"), good, 0.5)


# at matched update


def drifts(updates: dict[str, list[float]]) -> pd.DataFrame:
    """Of two weights of norm 3 and 4, so 5 together, from each run's relative update of both."""
    rows = [
        {"run": run, "layer": f"layer {i}", "update": share * norm, "relative": share}
        for run, shares in updates.items()
        for i, (share, norm) in enumerate(zip(shares, (3.0, 4.0), strict=True))
    ]
    return pd.DataFrame(rows)


def test_the_relative_update_of_a_run_is_over_all_its_layers():
    table = drifts({"a": [0.1, 0.1], "c": [0.0, 0.0]})
    sizes = fair_comparison.relative_updates(table)
    assert sizes["a"] == pytest.approx(0.1) and sizes["c"] == 0
    other = drifts({"a": [0.3, 0.1]})
    one_still = drifts({"a": [0.1, 0.0], "b": [0.1, 0.1]})  # norms 3 and 4; a's second layer never moved
    assert fair_comparison.relative_updates(one_still)["a"] == pytest.approx(0.3 / 5)
    assert fair_comparison.relative_updates(one_still[one_still["run"] == "a"].assign(norm=[3.0, 4.0]))[
        "a"
    ] == (pytest.approx(0.3 / 5))
    assert fair_comparison.relative_updates(other)["a"] == pytest.approx(np.hypot(0.9, 0.4) / 5)
    with pytest.raises(ValueError, match="no column relative"):
        fair_comparison.relative_updates(table.drop(columns="relative"))


def updated(
    sizes: dict[tuple[float, float], list[float]], **scores: dict
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table with these relative updates over seeds, by (position, learning rate), and its drifts."""
    table = runs(**scores)
    by_run = {f"{p} {lr} {s}": [v, v] for (p, lr), values in sizes.items() for s, v in enumerate(values)}
    return table, drifts({run: shares for run, shares in by_run.items() if shares[0] >= 0})


def test_scores_are_read_off_over_the_logarithm_of_the_update():
    rates = (0.1, 0.2, 0.4)
    sizes = {(0.5, lr): [s, s] for lr, s in zip(rates, (0.01, 0.1, 1.0), strict=True)}
    accuracy = {(0.5, lr): [a, a + 0.1] for lr, a in zip(rates, (0.2, 0.4, 0.6), strict=True)}
    lost = {(0.5, lr): [f, f] for lr, f in zip(rates, (0.0, 0.1, 0.2), strict=True)}
    table, moved = updated(sizes, accuracy=accuracy, forgetting=lost)
    for size, score, forgotten in ((0.01, 0.2, 0), (10**-1.5, 0.3, 0.05), (0.1, 0.4, 0.1), (1.0, 0.6, 0.2)):
        row = fair_comparison.at_matched_update(table, moved, size).iloc[0]
        assert (row["seeds"], row["reached"]) == (2, 2)
        assert row["accuracy"] == pytest.approx(score + 0.05)
        assert row["forgetting"] == pytest.approx(forgotten)
        assert row["accuracy_high"] == pytest.approx(fair_comparison.seed_interval([score, score + 0.1])[1])
    shuffled = table.sample(frac=1, random_state=0).set_index(np.zeros(len(table), int))
    again = fair_comparison.at_matched_update(shuffled, moved, 0.1).iloc[0]
    assert again["accuracy"] == pytest.approx(0.45)


def test_where_forgetting_rises_ever_faster_the_curve_errs_less_than_straight_lines():
    sizes = np.array([0.2, 0.3, 0.5, 1.0])
    forgotten = 0.6 * sizes**2
    keys = [(0.5, lr) for lr in (0.1, 0.2, 0.4, 0.8)]
    table, moved = updated(
        {key: [s] for key, s in zip(keys, sizes, strict=True)},
        accuracy={key: [0.9] for key in keys},
        forgetting={key: [f] for key, f in zip(keys, forgotten, strict=True)},
    )
    read = fair_comparison.at_matched_update(table, moved, 0.7)["forgetting"].item()
    straight = np.interp(np.log(0.7), np.log(sizes), forgotten)
    assert abs(read - 0.6 * 0.7**2) < 0.5 * abs(straight - 0.6 * 0.7**2)
    assert forgotten[2] < read < forgotten[3]


@given(
    st.lists(st.tuples(st.integers(1, 40), unit), min_size=1, max_size=6, unique_by=lambda p: p[0]),
    st.integers(1, 40),
)
@settings(deadline=None)
def test_what_is_read_off_lies_between_the_runs_around_it(points, size):
    keys = [(0.5, 0.1 * 2**i) for i in range(len(points))]
    table, moved = updated(
        {key: [s / 40] for key, (s, _) in zip(keys, points, strict=True)},
        accuracy={key: [a] for key, (_, a) in zip(keys, points, strict=True)},
    )
    row = fair_comparison.at_matched_update(table, moved, size / 40).iloc[0]
    below, above = ([p for p in points if p[0] <= size], [p for p in points if p[0] >= size])
    if size not in (min(points)[0], max(points)[0]):  # at an end rounding decides
        assert row["reached"] == bool(below and above)
    if row["reached"]:
        around = max(below, default=min(points))[1], min(above, default=max(points))[1]
        assert min(around) - 1e-9 <= row["accuracy"] <= max(around) + 1e-9


def test_seeds_whose_runs_do_not_span_the_update_did_not_get_there():
    sizes = {(0.0, 0.1): [0.1, 0.3, -1], (0.0, 0.2): [0.2, 0.4, 0.2], (1.0, 0.1): [0.5, 0.5, 0.0]}
    accuracy = {key: [0.6, 0.7, 0.8] for key in sizes}
    table, moved = updated(sizes, accuracy=accuracy)
    first, second = fair_comparison.at_matched_update(table, moved, 0.15).to_dict("records")
    assert (first["seeds"], first["reached"], second["reached"]) == (3, 1, 0)
    assert first["accuracy"] == pytest.approx(0.6) and np.isnan(first["accuracy_low"])
    assert np.isnan([second["accuracy"], second["forgetting_high"]]).all()


def test_runs_that_moved_nothing_or_have_no_drift_span_nothing_and_equally_far_ones_count_as_one():
    rates = [(0.5, lr) for lr in (0.1, 0.2, 0.4)]
    sizes = dict(zip(rates, ([0.0, -1, 0.1], [0.2, -1, 0.2], [0.4, -1, 0.2]), strict=True))
    accuracy = dict(zip(rates, ([0.1, 0.1, 0.3], [0.5, 0.1, 0.6], [0.7, 0.1, 0.8]), strict=True))
    table, moved = updated(sizes, accuracy=accuracy)
    below, at = (fair_comparison.at_matched_update(table, moved, size).iloc[0] for size in (0.14142135, 0.2))
    assert (below["seeds"], below["reached"]) == (3, 1)  # nothing moved leads to no size in between
    assert below["accuracy"] == pytest.approx(0.5, abs=1e-6)  # half way from 0.3 to the mean of 0.6 and 0.8
    assert at["reached"] == 2 and at["accuracy"] == pytest.approx((0.5 + 0.7) / 2)


def test_matching_updates_refuses_what_is_no_size_and_the_drifts_of_other_runs():
    table, moved = updated({(0.5, 0.1): [0.1]}, accuracy={(0.5, 0.1): [0.8]})
    for size in (0, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"update, .*, must be positive"):
            fair_comparison.at_matched_update(table, moved, size)
    with pytest.raises(ValueError, match="none of the table's runs has"):
        fair_comparison.at_matched_update(table, moved.assign(run="x"), 0.1)
    with pytest.raises(ValueError, match="no column run"):
        fair_comparison.at_matched_update(table, moved.drop(columns="run"), 0.1)
    with pytest.raises(ValueError, match=r"share learning rate 0.1 and seed 0"):
        fair_comparison.at_matched_update(pd.concat([table, table]), moved, 0.1)
