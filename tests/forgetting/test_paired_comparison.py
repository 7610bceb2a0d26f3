from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student, ttest_rel
from sweep_tables import runs

import lora_lens as ll
from lora_lens.forgetting import against_baseline, early_updates, relative_updates, seed_interval
from lora_lens.forgetting.run_groups import resampled_interval

MIDDLE = {"method": "window", "position": 0.5}
RATES = 1e-3 * 2.0 ** np.arange(4)


def table(values: np.ndarray) -> pd.DataFrame:
    """Of methods m0, m1, ... from accuracies (methods, rates, seeds); all forget 0.1."""
    method, rate, seed = (axis.ravel() for axis in np.indices(values.shape))
    columns = {"method": [f"m{i}" for i in method], "rank": 8, "position": np.nan, "start": None}
    columns |= {"lr": RATES[rate], "seed": seed, "accuracy": values.ravel(), "forgetting": 0.1}
    return pd.DataFrame(columns)


def simulated(
    effects: np.ndarray, seeds: int, random: np.random.Generator, noise: np.ndarray | float = 1.0
) -> pd.DataFrame:
    """m0 at 0.7 and others that are better by ``effects``, with what seeds do to all and to each."""
    means = 0.7 + np.array([0.0, *effects])[:, None, None] - 0.02 * (np.arange(4)[:, None] - 2) ** 2
    of_seed = random.normal(0, 0.02, (1, 1, seeds))
    of_method = random.normal(0, 0.007, (len(means), 1, seeds)) + random.normal(
        0, 0.007, (len(means), 4, seeds)
    )
    return table(means + of_seed + of_method * np.reshape(noise, (-1, 1, 1)))


# on simulated tables


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_student_s_interval_holds_the_truth_as_often_as_it_says_and_a_bootstrap_does_not(seeds):
    random = np.random.default_rng(seeds)
    samples = random.normal(0, 1, (1000, seeds))
    held = [low <= 0 <= high for low, high in map(seed_interval, samples)]
    resampled = [resampled_interval(lambda rows, x=x: x[rows].mean(1), seeds, 200) for x in samples[:400]]
    assert 0.93 <= np.mean(held) <= 0.97
    assert np.mean([low <= 0 <= high for low, high in resampled]) < {3: 0.8, 5: 0.9, 10: 0.93}[seeds]


@pytest.mark.parametrize(("seeds", "noise"), [(3, 1.0), (7, [1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0])])
def test_all_intervals_together_hold_the_truth_and_few_differences_are_invented(seeds, noise):
    random, effects = np.random.default_rng(0), np.array([0.0, 0.0, 0.0, 0.03, 0.03, 0.03])
    one, of_six = student.ppf([0.975, 1 - 0.025 / 6], seeds - 1)
    held, alone, invented, found = [], [], [], []
    for _ in range(60):
        result = against_baseline(simulated(effects, seeds, random, noise), "m0")
        low, high, called = result["difference_low"], result["difference_high"], result["p"] <= 0.05
        off, half = (result["difference"] - effects).abs(), (high - low) / 2
        held.append((off <= half).all())
        alone.append((off <= half * one / of_six).all())  # as it would be without a correction
        invented.append(called[:3].any())
        found.append(called[3:].mean())
        assert called[(low > 0) | (high < 0)].all()
    assert np.mean(held) >= 0.9 > 0.87 > np.mean(alone)
    assert np.mean(invented) <= 0.09
    assert np.mean(found) > {3: 0.05, 7: 0.7}[seeds]


def test_little_is_invented_where_all_rates_are_equally_good():
    random = np.random.default_rng(1)
    swept = [table(random.normal(0.5, 0.05, (7, 4, 7))) for _ in range(40)]
    found = [against_baseline(runs, "m0", "accuracy") for runs in swept]
    assert np.mean([(result["p"] <= 0.05).any() for result in found]) <= 0.1
    uncorrected = [against_baseline(runs[runs["method"].isin(["m0", "m1"])], "m0") for runs in swept]
    assert np.mean([result["p"].item() <= 0.05 for result in uncorrected]) <= 0.15


def test_a_choice_among_rates_flatters_neither():
    random, values = np.random.default_rng(0), []
    for _ in range(50):  # all rates are equally good, and m1 has four of them to choose from
        result = against_baseline(table(random.normal(0.5, 0.05, (2, 4, 5))), "m0", "accuracy")
        values.append(result["value"].item())
    assert np.mean(values) == pytest.approx(0.5, abs=0.01)  # the best of four means is 0.52


# small cases, by hand


def test_differences_are_of_equal_seeds_at_each_method_s_own_best_rate():
    accuracy = {
        (0.5, 0.1): [0.80, 0.70, 0.60],  # the best for all
        (0.5, 0.2): [0.10, 0.10, 0.10],
        (0.0, 0.1): [0.20, 0.20, 0.20],
        (0.0, 0.2): [0.85, 0.75, 0.75],  # better by 0.05, 0.05 and 0.15
    }
    row = against_baseline(runs(accuracy), MIDDLE, "accuracy").iloc[0]
    assert (row["position"], row["seeds"], row["rates"], row["lr"]) == (0.0, 3, 2, 0.2)
    assert row["value"] == pytest.approx(2.35 / 3) and row["baseline_value"] == pytest.approx(0.7)
    assert row["difference"] == pytest.approx(0.25 / 3)
    assert [row["difference_low"], row["difference_high"]] == pytest.approx(seed_interval([0.05, 0.05, 0.15]))
    assert row["p"] == pytest.approx(ttest_rel(accuracy[0.0, 0.2], accuracy[0.5, 0.1]).pvalue)


def test_each_seed_is_judged_at_the_rate_that_is_best_by_the_others():
    accuracy = {(0.5, 0.1): [0.5] * 3, (0.5, 0.2): [0.1] * 3}
    accuracy |= {(0.0, 0.1): [0.9, 0.7, 0.5], (0.0, 0.2): [0.6, 0.7, 0.7]}
    row = against_baseline(runs(accuracy), MIDDLE, "accuracy").iloc[0]
    assert row["value"] == pytest.approx((0.6 + 0.7 + 0.5) / 3) and row["lr"] == 0.1
    # at 0.1, which all seeds together would take, it is 0.7: the choice is open, and the interval wider
    half = student.ppf(0.975, 2) * (np.var([0.1, 0.2, 0.0], ddof=1) / 3 + 0.1**2) ** 0.5
    assert row["difference_high"] - row["difference"] == pytest.approx(half)
    t = row["difference"] / half * student.ppf(0.975, 2)
    assert row["p"] == pytest.approx(2 * student.sf(t, 2))


def test_more_comparisons_widen_the_intervals_and_raise_p():
    values = np.array([[0.5, 0.6, 0.7], [0.62, 0.74, 0.80], [0.52, 0.61, 0.74]])[:, None]
    two = against_baseline(table(values), "m0")
    alone = against_baseline(table(values[:2]), "m0").iloc[0]
    differences = [0.12, 0.14, 0.10]
    assert [alone["difference_low"], alone["difference_high"]] == pytest.approx(seed_interval(differences))
    first = two.iloc[0]
    assert [first["difference_low"], first["difference_high"]] == pytest.approx(
        seed_interval(differences, level=0.975)
    )
    p = [ttest_rel(values[i, 0], values[0, 0]).pvalue for i in (1, 2)]
    assert two["p"].tolist() == pytest.approx([2 * p[0], max(2 * p[0], p[1])])
    of_ten = against_baseline(table(values), "m0", comparisons=10)
    assert of_ten["p"].tolist() == pytest.approx([10 * p[0], min(9 * p[1], 1)])
    assert of_ten["difference_low"].iloc[0] == pytest.approx(seed_interval(differences, level=0.995)[0])
    with pytest.raises(ValueError, match="comparisons must be at least 2, not 1"):
        against_baseline(table(values), "m0", comparisons=1)


def test_equal_methods_do_not_differ_by_rounding():
    values = np.array([[0.1 + 0.2, 0.7, 0.6], [0.3, 0.7, 0.6], [0.5, 0.9, 0.8]])[:, None]
    result = against_baseline(table(values), "m0")
    assert result["p"].tolist() == pytest.approx([1, 0]) and result["difference"].tolist() == pytest.approx(
        [0, 0.2]
    )


def test_at_equal_accuracy_runs_are_read_where_they_first_reach_it():
    # every run's accuracy rises along a line to 0.8 in 20 steps, in which it forgets the share given
    lost = {(0.5, 0.1): [0.4, 0.2], (0.0, 0.1): [0.2, 0.2], (1.0, 0.1): [0.0, 0.0]}
    swept = runs({key: [0.8, 0.8] for key in lost}, lost)
    swept.loc[swept["position"] == 1.0, "accuracy"] = [0.8, 0.3]  # a seed that never gets there
    curves = pd.concat(
        pd.DataFrame(
            {"run": r.run, "step": [0, 20], "accuracy": [0.0, r.accuracy]}
            | {"retained_accuracy": [0.9, 0.9 - r.forgetting]}
        )
        for r in swept.itertuples()
    )
    first, last = against_baseline(swept, MIDDLE, accuracy=0.4, curves=curves).to_dict("records")
    assert first["baseline_value"] == pytest.approx(0.4 - 0.15) and first["value"] == pytest.approx(0.4 - 0.1)
    assert first["difference"] == pytest.approx(0.05) and first["seeds"] == 2
    assert last["seeds"] == 0 and last["rates"] == 1 and np.isnan(last["p"]) and np.isnan(last["lr"])
    assert [first["difference_low"], first["difference_high"]] == pytest.approx(seed_interval([0.1, 0]))


def test_at_equal_update_the_value_is_read_off_each_seed_s_runs():
    swept = runs(
        {(p, lr): [0.8, 0.8] for p in (0.5, 0.0) for lr in (0.1, 0.4)},
        {(0.5, 0.1): [0.1, 0.1], (0.5, 0.4): [0.3, 0.3], (0.0, 0.1): [0.0, 0.1], (0.0, 0.4): [0.2, 0.1]},
    )
    sizes = pd.Series({run: float(run.split()[1]) for run in swept["run"]})
    row = against_baseline(swept, MIDDLE, "-forgetting", update=0.2, sizes=sizes).iloc[0]
    assert row["baseline_value"] == pytest.approx(-0.2) and row["value"] == pytest.approx(-0.1)
    assert row["difference"] == pytest.approx(0.1) and np.isnan(row["lr"])
    none = against_baseline(swept, MIDDLE, update=0.5, sizes=sizes).iloc[0]
    assert none["seeds"] == 0 and np.isnan(none["difference_low"]) and np.isnan(none["p"])


def test_a_rate_at_which_a_run_failed_costs_that_seed_and_not_the_method():
    accuracy = {(p, lr): [0.8, 0.7, 0.6] for p in (0.0, 0.5) for lr in (0.1, 0.2)}
    swept = runs(accuracy)
    failed = (swept["position"] == 0) & (swept["lr"] == 0.2) & (swept["seed"] == 1)
    swept["failed"] = failed
    swept[["accuracy", "forgetting"]] = swept[["accuracy", "forgetting"]].astype(object).where(~failed, None)
    assert against_baseline(swept, MIDDLE)["seeds"].tolist() == [2]
    assert against_baseline(swept.drop(columns="failed"), MIDDLE)["seeds"].tolist() == [2]


# what cannot be compared


def test_what_cannot_be_compared_is_refused_in_words():
    swept = runs({(p, lr): [0.8, 0.7, 0.6] for p in (0.0, 0.5) for lr in (0.1, 0.2)})
    first = swept["position"] == 0
    for given, options, message in (
        (swept, {"baseline": "LoRA"}, r"'LoRA' fits 0 of the 2 .*: window \(rank 8, position 0.0\), window"),
        (swept, {"baseline": "window"}, "'window' fits 2 of the 2"),
        (swept, {"value": "correct"}, "not 'correct': .* there are rank, position"),
        (swept, {"value": "method"}, "a column of numbers"),
        (swept, {"value": "accuracy +"}, "expression"),
        (swept[swept["seed"] == 0], {}, "have 1 seeds in common, at least 2"),
        (swept.assign(seed=swept["seed"] + 2 * first), {}, "position 0.0.* have 1 seeds in common"),
        (swept[~first | (swept["lr"] == 0.1)], {}, "position 0.0.* one learning rate and others at up to 2"),
        (swept[~first], {}, "nothing but the baseline"),
        (pd.concat([swept, swept]), {}, "share learning rate 0.1 and seed 0"),
        (swept, {"accuracy": 0.5}, r"needs both accuracy and curves=sweep.curves\(\)"),
        (swept, {"sizes": pd.Series(dtype=float)}, "needs both update and sizes"),
        (swept, {"level": 95}, "level must be in"),
        (swept.drop(columns="seed"), {}, "no column seed"),
    ):
        with pytest.raises(ValueError, match=message):
            against_baseline(given, **{"baseline": MIDDLE} | options)
    with pytest.raises(TypeError, match="the name of a method or a dictionary of columns, not 3"):
        against_baseline(swept, 3)


def test_early_updates_are_of_the_first_evaluation_after_the_start():
    curves = pd.DataFrame({"run": ["a", "b"] * 3, "step": [20, 20, 0, 0, 10, 10]})
    curves["update"] = [0.9, 0.8, 0.0, 0.0, 0.3, np.nan]
    found = early_updates(curves)
    assert found["a"] == 0.3
    with pytest.raises(ValueError, match="kept without the size of their update"):
        early_updates(curves.drop(columns="update"))


# on a stored sweep


def test_a_stored_sweep_is_compared_in_all_ways():
    sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
    pd.testing.assert_frame_equal(sweep.against("LoRA"), against_baseline(sweep.table, "LoRA"))
    pd.testing.assert_frame_equal(
        sweep.against("LoRA", accuracy=0.8),
        against_baseline(sweep, "LoRA", accuracy=0.8, curves=sweep.curves()),
    )
    sizes = relative_updates(sweep.drifts())
    pd.testing.assert_frame_equal(
        sweep.against("LoRA", update=0.2), against_baseline(sweep, "LoRA", update=0.2, sizes=sizes)
    )
    with pytest.raises(ValueError, match="one of accuracy, update and early_update, not at accuracy"):
        sweep.against("LoRA", accuracy=0.8, update=0.2)
    with pytest.raises(ValueError, match="kept without the size"):
        sweep.against("LoRA", early_update=0.2)
