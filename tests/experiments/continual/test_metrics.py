from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lora_lens.experiments.continual import formulas, metrics as cm
from lora_lens.forgetting import fair_comparison

THREE = np.array([[0.6, 0.2, 0.3], [0.8, 0.9, 0.5], [0.5, 0.7, 1.0]])
BEFORE = np.array([0.1, 0.1, 0.2])


def sequence(
    accuracies: np.ndarray, before: np.ndarray | None = None, retained: float = 0.9, **settings: object
) -> pd.DataFrame:
    """The rows of one run; the retained task falls from 0.9 to ``retained`` with the last task."""
    tasks = len(accuracies)
    described = {
        "strategy": "merged", "method": "window", "rank": 8, "position": 0.5, "start": None,
        "setting": "domain-incremental", "order": "0 1 2", "lr": 1e-3, "steps": 100, "seed": 0,
    } | settings  # fmt: skip
    described = {"run": " ".join(str(v) for v in described.values()), **described}
    rows = np.vstack([np.full(tasks, np.nan) if before is None else before, accuracies])
    return pd.DataFrame(
        [
            {
                **described, "after": after, "task": f"task {place}", "place": place, "accuracy": accuracy,
                "loss": 1.0 - accuracy, "retained_before": 0.9,
                "retained_accuracy": retained if after == tasks else 0.9, "diverged": False,
            }
            for after, row in enumerate(rows)
            for place, accuracy in enumerate(row)
        ]
    )  # fmt: skip


def joined(*tables: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True)


ALONE = np.array([[0.8, 0.2, 0.3], [0.8, 0.9, 0.5], [0.8, 0.9, 1.0]])
ALONE_LORA = np.array([[0.7, 0.2, 0.3], [0.7, 0.7, 0.5], [0.7, 0.7, 0.7]])
JOINT = np.array([[np.nan] * 3, [np.nan] * 3, [0.9, 0.8, 0.7]])


def test_the_matrix_of_a_run_whatever_the_order_of_its_rows():
    rows = sequence(THREE, BEFORE).sample(frac=1, random_state=0)
    accuracies, before = cm.accuracy_matrix(rows)
    assert accuracies.tolist() == THREE.tolist() and before.tolist() == BEFORE.tolist()


def test_the_rows_of_several_runs_of_none_or_of_half_a_run_are_no_matrix():
    table = sequence(THREE, BEFORE)
    with pytest.raises(ValueError, match="the rows of one run, not of 2"):
        cm.accuracy_matrix(joined(table, sequence(THREE, seed=1)))
    with pytest.raises(ValueError, match="the table is empty"):
        cm.accuracy_matrix(table.iloc[:0])
    with pytest.raises(ValueError, match="no column place"):
        cm.accuracy_matrix(table.drop(columns="place"))
    for wrong in (table.iloc[1:], table[table["after"] > 0], joined(table, table.iloc[:1])):
        with pytest.raises(
            ValueError, match="one row for each of 3 tasks after 0 to 3 of them were trained, 12"
        ):
            cm.accuracy_matrix(wrong)


def test_the_scores_of_a_run_come_with_its_settings():
    table = sequence(THREE, BEFORE, retained=0.7)
    table.loc[3, "diverged"] = True
    row = cm.continual_scores(table.assign(seconds=range(12), note=None)).to_dict("records")
    assert len(row) == 1 and "seconds" not in row[0]
    assert list(row[0])[:11] == [
        "run", "strategy", "method", "rank", "position", "start", "setting", "order", "lr", "steps", "seed",
    ]  # fmt: skip
    assert "note" in row[0] and "after" not in row[0] and row[0]["steps"] == 100 and row[0]["diverged"]
    expected = {
        "average_accuracy": formulas.average_accuracy(THREE),
        "average_forgetting": formulas.average_forgetting(THREE),
        "backward_transfer": formulas.backward_transfer(THREE),
        "forward_transfer": formulas.forward_transfer(THREE, BEFORE),
        "learning_accuracy": formulas.learning_accuracy(THREE),
        "intransigence": np.nan,
        "retained_before": 0.9,
        "retained_accuracy": 0.7,
        "retained_forgetting": 0.2,
    }
    assert {score: row[0][score] for score in cm.SCORES} == pytest.approx(expected, nan_ok=True)
    assert list(expected) == cm.SCORES and pd.isna(row[0]["reference"])


def test_intransigence_is_told_against_the_same_method_alone():
    table = joined(
        sequence(THREE),
        sequence(THREE, strategy="moving", start=np.nan),
        sequence(ALONE, strategy="separate"),
        sequence(ALONE_LORA, strategy="separate", method="LoRA", position=np.nan),
    )
    scores = cm.continual_scores(table)
    # 0.8 - 0.6, 0.9 - 0.9 and 1.0 - 1.0
    assert scores["intransigence"].tolist() == pytest.approx([0.2 / 3, 0.2 / 3, 0, 0])
    assert set(scores["reference"]) == {"separate, same method"}
    assert scores["strategy"].tolist() == ["merged", "moving", "separate", "separate"]
    # a model for each task forgets nothing
    assert scores["average_forgetting"].iloc[2] == scores["backward_transfer"].iloc[2] == 0


def test_without_the_same_method_alone_it_is_told_against_lora_of_any_rank():
    lora = {"strategy": "separate", "method": "LoRA", "position": np.nan}
    others = [
        sequence(ALONE * 0.5, **lora, rank=4, setting="class-incremental"),
        sequence(ALONE * 0.5, **lora, rank=4, lr=1e-2),
        sequence(ALONE * 0.5, **lora, rank=4, seed=1),
        sequence(ALONE * 0.5, **lora, rank=4, order="2 1 0"),
        sequence(ALONE * 0.5, strategy="separate", position=0.0),
    ]
    table = joined(sequence(THREE), sequence(ALONE_LORA, **lora), sequence(ALONE, **lora, rank=16), *others)
    found = cm.continual_scores(table).iloc[0]
    # means over ranks: 0.75, 0.8 and 0.85, less 0.6, 0.9 and 1.0
    assert found["intransigence"] == pytest.approx((0.15 - 0.1 - 0.15) / 3)
    assert found["reference"] == "separate, LoRA"
    found = cm.continual_scores(joined(sequence(THREE), *others)).iloc[0]
    assert np.isnan(found["intransigence"]) and pd.isna(found["reference"])


def test_variants_have_references_of_their_own():
    table = joined(
        sequence(THREE, variant="DoRA"),
        sequence(ALONE, variant="DoRA", strategy="separate"),
        sequence(ALONE_LORA, variant=None, strategy="separate"),
    )
    assert cm.continual_scores(table)["intransigence"].iloc[0] == pytest.approx(0.2 / 3)


def test_two_references_are_one_too_many():
    table = joined(sequence(ALONE, strategy="separate"), sequence(ALONE, strategy="separate", steps=50))
    with pytest.raises(ValueError, match="two runs share strategy separate, method window, rank 8"):
        cm.continual_scores(table)


def test_a_joint_run_has_an_accuracy_and_nothing_to_forget():
    scores = cm.continual_scores(
        joined(sequence(JOINT, strategy="joint"), sequence(ALONE, strategy="separate"))
    )
    joint = scores.iloc[0]
    assert joint["average_accuracy"] == pytest.approx(0.8)
    for score in ("average_forgetting", "backward_transfer", "forward_transfer", "learning_accuracy"):
        assert np.isnan(joint[score]), score
    assert np.isnan(joint["intransigence"])


def test_tables_without_runs_or_columns_are_refused():
    table = sequence(THREE)
    with pytest.raises(ValueError, match=r"the table is empty.*ll\.experiments\.continual_sweep returns"):
        cm.continual_scores(table.iloc[:0])
    for column in ("order", "retained_before", "method"):
        with pytest.raises(ValueError, match=f"no column {column}"):
            cm.continual_scores(table.drop(columns=column))


# means over orders and seeds


def many() -> pd.DataFrame:
    """Four runs of windows (two orders, two seeds), each worse than the one before, and one joint run."""
    runs = [(order, seed) for order in ("0 1 2", "2 1 0") for seed in (0, 1)]
    windows = [
        sequence(THREE * (1 - 0.1 * i), retained=0.8 - 0.1 * i, order=order, seed=seed)
        for i, (order, seed) in enumerate(runs)
    ]
    return cm.continual_scores(joined(*windows, sequence(JOINT, strategy="joint")))


def test_means_over_orders_and_seeds_come_with_intervals():
    scores = many()
    windows, joint = cm.score_means(scores).to_dict("records")
    assert [windows[key] for key in ("strategy", "runs", "orders", "seeds", "diverged")] == [
        "merged",
        4,
        2,
        2,
        0,
    ]
    assert windows["average_accuracy"] == pytest.approx(2.2 / 3 * 0.85)
    assert windows["retained_forgetting"] == pytest.approx(0.25)  # 0.1 to 0.4
    low, high = fair_comparison.seed_interval(scores["average_accuracy"][:4])
    assert (windows["average_accuracy_low"], windows["average_accuracy_high"]) == (low, high) and low < high
    assert joint["runs"] == 1 and joint["average_accuracy"] == pytest.approx(0.8)
    assert np.isnan(joint["average_accuracy_low"]) and np.isnan(joint["average_forgetting"])


def test_runs_that_differ_in_more_than_order_and_seed_keep_their_own_rows():
    table = joined(
        *(sequence(THREE, position=p, lr=lr) for p in (0.0, 1.0) for lr in (1e-3, 1e-2)),
        sequence(THREE, setting="class-incremental"),
        sequence(THREE, strategy="merged, EWC 100"),
        sequence(THREE, method="LoRA", position=np.nan),
        sequence(THREE, method="LoRA", position=np.nan, seed=1),
    )
    means = cm.score_means(cm.continual_scores(table))
    assert means["runs"].tolist() == [1] * 6 + [2]


def test_a_score_that_some_runs_lack_is_the_mean_of_the_others():
    alone = sequence(ALONE, strategy="separate", seed=1)
    means = cm.score_means(cm.continual_scores(joined(sequence(THREE), sequence(THREE, seed=1), alone)))
    assert means["runs"].tolist() == [2, 1] and means["intransigence"].iloc[0] == pytest.approx(0.2 / 3)


def test_runs_that_are_not_samples_of_one_thing_are_not_averaged():
    scores = cm.continual_scores(joined(sequence(THREE), sequence(THREE, steps=50)))
    with pytest.raises(ValueError, match=r"share strategy merged, method window, .*order 0 1 2, seed 0"):
        cm.score_means(scores)
    with pytest.raises(ValueError, match="the table of scores is empty"):
        cm.score_means(scores.iloc[:0])
    with pytest.raises(ValueError, match="no column intransigence"):
        cm.score_means(scores.drop(columns="intransigence"))
