from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

import lora_lens as ll
from lora_lens._base.files import write_atomically
from lora_lens.forgetting.examples import (
    confusion,
    forgetting_interval,
    forgotten_by,
    forgotten_by_one,
    transitions,
)
from lora_lens.forgetting.fair_comparison import seed_interval


@pytest.fixture
def items() -> pd.DataFrame:
    """Two runs over five examples, of which the first four were right before."""
    label, before = [0, 0, 1, 2, 2], [0, 0, 1, 2, 1]
    after = {"a": [0, 1, 1, 0, 2], "b": [0, 1, 1, 2, 0]}
    parts = [
        pd.DataFrame({"run": run, "item": range(5), "label": label, "before": before, "after": answers})
        for run, answers in after.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_transitions_count_every_example_once(items):
    table = transitions(items).set_index("run")
    counts = table[["kept", "forgotten", "gained", "never", "changed", "examples"]]
    assert counts.loc["a"].tolist() == [2, 2, 1, 0, 3, 5]
    assert counts.loc["b"].tolist() == [3, 1, 0, 1, 2, 5]
    assert table["forgetting"].tolist() == pytest.approx([0.2, 0.2])  # equal, and yet not the same
    by_class = transitions(items, by=["run", "label"])
    assert by_class.query("run == 'a' and label == 2")[["forgotten", "gained"]].values.tolist() == [[1, 1]]


def test_the_examples_that_all_forget_come_first(items):
    table = forgotten_by(items)
    assert table["item"].tolist() == [1, 3, 0, 2]
    assert table["share"].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert table["instead"].tolist()[:2] == [1, 0] and table["instead"].isna().tolist()[2:] == [True, True]
    assert (table["runs"] == 2).all()


def test_confusion_counts_what_was_taken_for_what(items):
    assert confusion(items, 3, "before").tolist() == [[4, 0, 0], [0, 2, 0], [0, 2, 2]]
    assert confusion(items[items["run"] == "a"], 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_who_forgot_an_example_is_told_by_a_column_of_the_answers(items):
    third = items[items["run"] == "b"].assign(run="c")
    baseline = items[items["run"] == "a"].assign(run="LoRA")
    position = {"a": 0.0, "b": 1.0, "c": 1.0}  # none for LoRA
    answers = pd.concat([items, third, baseline])
    answers = answers.assign(position=answers["run"].map(position))
    answers.loc[(answers["run"] == "c") & (answers["item"] == 1), "after"] = 0
    table = forgotten_by(answers, "position").set_index("item")
    assert table[0.0].to_dict() == {0: 0, 1: 1, 2: 0, 3: 1}
    assert table[1.0].to_dict() == {0: 0, 1: 0.5, 2: 0, 3: 0}
    assert table["share"].to_dict() == {0: 0, 1: 0.75, 2: 0, 3: 0.5}  # of all four runs
    assert table.columns.tolist() == ["label", "runs", "forgotten", "share", "instead", 0.0, 1.0]


def test_an_example_that_one_alone_forgot_is_forgotten_by_most_of_its_runs_and_of_no_others(items):
    answers = items.assign(who=items["run"].map({"a": "early", "b": "late"}))
    alone = forgotten_by_one(answers, "who")
    assert alone[["item", "only"]].values.tolist() == [[3, "early"]]  # both forgot example 1
    assert alone["early"].tolist() == [1] and alone["late"].tolist() == [0]
    again = answers.assign(run=answers["run"] + "2", after=answers["label"])  # a second seed, all right
    half = pd.concat([answers, again])
    none = forgotten_by_one(half, "who")  # a half is not more than a half
    assert none.empty and "only" in none
    assert forgotten_by_one(half, "who", threshold=0.4)["item"].tolist() == [3]


def test_runs_of_methods_without_a_position_do_not_count_where_one_window_alone_forgot(items):
    answers = items.assign(position=items["run"].map({"a": 0.5, "b": 1.0}))
    lora = answers[answers["run"] == "a"].assign(run="LoRA", position=np.nan)
    alone = forgotten_by_one(pd.concat([answers, lora]), "position")
    assert alone[["item", "only"]].values.tolist() == [[3, 0.5]]


def test_who_forgot_needs_a_column_and_a_share(items):
    with pytest.raises(ValueError, match="the answers have no column 'position'; merge it"):
        forgotten_by(items, "position")
    for threshold in (-0.1, 1, 50):
        with pytest.raises(ValueError, match=r"threshold must be a share in \[0, 1\)"):
            forgotten_by_one(items, "run", threshold)


# intervals over seeds and examples


def answered(lost: np.ndarray, position: float = 0.5) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Answers and table of one window from what was forgotten (seeds, examples), of ones and zeros."""
    seeds, examples = lost.shape
    runs = [f"{position} {seed}" for seed in range(seeds)]
    table = pd.DataFrame(
        {"run": runs, "method": "window", "rank": 8, "position": position, "start": None, "lr": 1e-3}
    ).assign(seed=range(seeds))
    answers = {"run": np.repeat(runs, examples), "item": np.tile(np.arange(examples), seeds)}
    return pd.DataFrame(answers | {"label": 1, "before": 1, "after": 1 - lost.ravel()}), table


def test_the_interval_is_that_of_the_crossed_variances():
    random = np.random.default_rng(0)
    hard, harsh = random.random(400), random.normal(0, 0.15, size=(30, 1))
    lost = (random.random((30, 400)) < hard + harsh).astype(int)
    row = forgetting_interval(*answered(lost)).iloc[0]
    assert (row["seeds"], row["examples"], row["forgetting"]) == (30, 400, pytest.approx(lost.mean()))
    of_seeds, of_examples = (lost.mean(axis) - lost.mean() for axis in (1, 0))
    seeds, examples = of_seeds.var(ddof=1) / 30, of_examples.var(ddof=1) / 400
    freedom = (seeds + examples) ** 2 / (seeds**2 / 29 + examples**2 / 399)
    half = student.ppf(0.975, freedom) * (seeds + examples) ** 0.5
    assert row["forgetting_high"] - row["forgetting_low"] == pytest.approx(2 * half)
    assert (row["forgetting_high"] + row["forgetting_low"]) / 2 == pytest.approx(lost.mean())


def test_with_one_seed_the_interval_is_over_examples_and_with_equal_examples_over_seeds():
    one = (np.arange(500) < 100).astype(int)[None]
    row = forgetting_interval(*answered(one)).iloc[0]
    assert row["seeds"] == 1
    assert row["forgetting_high"] - row["forgetting_low"] == pytest.approx(
        3.92 * (0.16 / 500) ** 0.5, rel=0.06
    )
    equal = np.tile([[0], [0], [1], [1], [1], [0]], 20)
    row = forgetting_interval(*answered(equal)).iloc[0]
    expected = seed_interval(equal.mean(1))
    assert (row["forgetting_low"], row["forgetting_high"]) == pytest.approx(expected)


def test_it_holds_for_other_examples_of_the_kind_where_the_interval_over_seeds_does_not():
    random = np.random.default_rng(0)
    both, over_seeds = [], []
    for _ in range(200):  # a third of all images is hard, and every seed forgets nearly the same ones
        chance = np.where(random.random(60) < 1 / 3, 0.9, 0.05)
        lost = (random.random((8, 60)) < chance).astype(int)
        row = forgetting_interval(*answered(lost)).iloc[0]
        truth = 0.9 / 3 + 0.05 * 2 / 3
        both.append(row["forgetting_low"] <= truth <= row["forgetting_high"])
        low, high = seed_interval(lost.mean(1))
        over_seeds.append(low <= truth <= high)
    assert 0.9 <= np.mean(both) <= 1
    assert np.mean(over_seeds) < 0.6


def test_each_window_rate_and_variant_has_its_own_interval():
    random = np.random.default_rng(0)
    parts = [answered((random.random((3, 40)) < p).astype(int), p) for p in (0.1, 0.6)]
    items, table = (pd.concat(part, ignore_index=True) for part in zip(*parts, strict=True))
    result = forgetting_interval(items, table)
    assert result.columns.tolist() == [
        "method", "rank", "position", "start", "lr", "seeds", "examples",
        "forgetting", "forgetting_low", "forgetting_high",
    ]  # fmt: skip
    assert result["position"].tolist() == [0.1, 0.6]
    means = transitions(items).groupby(transitions(items)["run"].str[:3])["forgetting"].mean()
    assert result["forgetting"].tolist() == pytest.approx(means.tolist())
    assert (result["forgetting_low"] < result["forgetting"]).all()
    assert (result["forgetting"] < result["forgetting_high"]).all()
    assert result.equals(forgetting_interval(items, table))
    shuffled = forgetting_interval(items.sample(frac=1, random_state=0), table)
    assert result.equals(shuffled)
    baseline = table.assign(method=["LoRA"] * 3 + ["window"] * 3, position=[np.nan] * 3 + [0.6] * 3)
    assert forgetting_interval(items, baseline)["seeds"].tolist() == [3, 3]
    variants = table.assign(position=0.5, variant=[None] * 3 + ["DoRA"] * 3)
    assert forgetting_interval(items, variants)["forgetting"].tolist() == pytest.approx(means.tolist())


def test_gained_examples_count_against_forgotten_ones(items):
    table = answered(np.zeros((2, 5), int))[1].assign(run=["a", "b"])
    assert forgetting_interval(items, table)["forgetting"].item() == pytest.approx(0.2)


def test_intervals_refuse_runs_that_do_not_belong_together():
    items, table = answered(np.eye(3, dtype=int))
    with pytest.raises(ValueError, match=r"no column seed.*pass what ll\.sweep returns"):
        forgetting_interval(items, table.drop(columns="seed"))
    with pytest.raises(ValueError, match=r"share learning rate .* and seed 0; pass the runs of one"):
        forgetting_interval(items, table.assign(seed=[0, 0, 1]))
    with pytest.raises(ValueError, match=r"no answers of 1 runs, such as 0.5 0"):
        forgetting_interval(items[items["run"] != "0.5 0"], table)
    with pytest.raises(ValueError, match="tested on different examples"):
        forgetting_interval(items.iloc[1:], table)


def test_other_tables_are_refused(items):
    with pytest.raises(ValueError, match=r"the table of answers has no column after; .* sweep\.answers\(\)"):
        transitions(items.drop(columns="after"))
    with pytest.raises(ValueError, match="when must be one of 'before', 'after', not 'now'"):
        confusion(items, 3, "now")
    with pytest.raises(ValueError, match="expected classes from 0 to 1, not 0 to 2"):
        confusion(items, 2)
    with pytest.raises(ValueError, match="start from different answers"):
        forgotten_by(items.assign(before=np.arange(10) % 3))


def test_an_example_whose_first_answer_hangs_on_rounding_is_left_out():
    many = pd.DataFrame({"item": range(100), "label": 0, "before": 0, "after": 1})
    runs = pd.concat([many.assign(run="a"), many.assign(run="b", before=[1, *[0] * 99])])
    assert forgotten_by(runs)["item"].tolist() == list(range(1, 100))
    with pytest.raises(ValueError, match="start from different answers"):
        forgotten_by(pd.concat([many.assign(run="a"), many.assign(run="b", before=[1] * 3 + [0] * 97)]))


def test_a_sweep_keeps_the_answers_of_every_run(patch_vit, digits, source, tmp_path):
    retain = source.first(1, 30)
    grid = ll.Grid(window=ll.windows(2, 2), lr=[1e-2])
    settings = {"model": patch_vit, "task": digits.first(64, 20), "retain": retain, "store": tmp_path / "s"}
    table = ll.sweep(grid, steps=4, evaluations=2, jobs=1, progress=False, **settings).table
    items = ll.Sweep.open(tmp_path / "s").only(table).answers()
    assert len(items) == 2 * 30
    assert (items["label"].to_numpy().reshape(2, 30) == retain.test.labels.numpy()).all()
    counted = transitions(items).set_index("run")["forgetting"]
    assert counted.loc[table["run"]].tolist() == pytest.approx(table["forgetting"].tolist())
    with pytest.raises(FileNotFoundError, match="holds no run nothing"):
        ll.Sweep.open(tmp_path / "s").only(pd.DataFrame({"run": ["nothing"]})).answers()
    for path in (tmp_path / "s" / "runs").iterdir():
        record = json.loads(path.read_bytes())
        del record["items"]
        write_atomically(path, record)
    with pytest.raises(ValueError, match="was kept without its answers, by an earlier version"):
        ll.Sweep.open(tmp_path / "s").only(table).answers()
