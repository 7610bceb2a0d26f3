from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from lora_lens.experiments.continual import metrics as cm
from lora_lens.forgetting import fair_comparison

unit = st.floats(0, 1)
matrices = st.integers(1, 6).flatmap(lambda tasks: arrays(float, (tasks, tasks), elements=unit))
several_tasks = matrices.filter(lambda accuracies: len(accuracies) > 1)

# Task 0 goes on improving while task 1 is learnt and is forgotten later; task 2 is helped by those before.
THREE = np.array([[0.6, 0.2, 0.3], [0.8, 0.9, 0.5], [0.5, 0.7, 1.0]])
BEFORE = np.array([0.1, 0.1, 0.2])

# Correct answers among 400 of a perceptron (64, 64, 10) that learns scikit-learn's 8x8 digits turned by 0,
# 180, 90 and 270 degrees (8 epochs each), before training and after each. It was trained by the Naive
# strategy of avalanche-lib 0.6.0 with torch 2.14.1; the scores in the tests are what its plugins logged in
# that run. It is no dependency, as it brings some 25 packages and a top-level package of its own, "tests".
AVALANCHE_BEFORE = np.array([27, 22, 34, 83]) / 400
AVALANCHE = (
    np.array([[363, 163, 46, 60], [248, 363, 51, 48], [174, 277, 368, 170], [148, 189, 245, 360]]) / 400
)


# the scores of a matrix


def test_scores_worked_out_by_hand():
    assert cm.average_accuracy(THREE) == pytest.approx(2.2 / 3)  # 0.5 + 0.7 + 1.0
    assert cm.learning_accuracy(THREE) == pytest.approx(2.5 / 3)  # 0.6 + 0.9 + 1.0
    assert cm.backward_transfer(THREE) == pytest.approx(-0.15)  # 0.5 - 0.6 and 0.7 - 0.9
    assert cm.forward_transfer(THREE, BEFORE) == pytest.approx(0.2)  # 0.2 - 0.1 and 0.5 - 0.2
    assert cm.average_forgetting(THREE) == pytest.approx(0.25)  # 0.8 - 0.5 and 0.9 - 0.7
    assert cm.forgetting_curve(THREE) == pytest.approx([np.nan, -0.2, 0.25], nan_ok=True)  # 0.6 - 0.8
    assert cm.accuracy_curve(THREE) == pytest.approx([0.6, 0.85, 2.2 / 3])  # (0.8 + 0.9) / 2
    assert cm.intransigence(THREE, [0.9, 0.8, 1.0]) == pytest.approx(0.2 / 3)  # 0.3 - 0.1 + 0


def test_the_scores_are_those_that_avalanche_logged():
    assert cm.average_accuracy(AVALANCHE) == pytest.approx(0.58875)  # Top1_Acc_Stream, of equal test sets
    assert cm.backward_transfer(AVALANCHE) == pytest.approx(-0.4266666666666666)  # StreamBWT
    assert cm.forward_transfer(AVALANCHE, AVALANCHE_BEFORE) == pytest.approx(0.20416666666666664)
    # StreamForgetting starts from the accuracy right after learning, here the best of every task
    assert cm.average_forgetting(AVALANCHE) == pytest.approx(0.4266666666666666)
    so_far = [0.2875, 0.34375, 0.4266666666666666]  # StreamForgetting after each task
    assert cm.forgetting_curve(AVALANCHE)[1:] == pytest.approx(so_far)


def test_the_scores_along_the_way_are_those_that_avalanche_logged():
    """StreamBWT and StreamForwardTransfer after two and three tasks."""
    for tasks, backward, forward in [(2, -0.2875, 0.3525), (3, -0.34375, 0.19749999999999998)]:
        so_far, before = AVALANCHE[:tasks, :tasks], AVALANCHE_BEFORE[:tasks]
        assert cm.backward_transfer(so_far) == pytest.approx(backward)
        assert cm.forward_transfer(so_far, before) == pytest.approx(forward)


def test_a_task_that_improved_later_is_forgotten_from_its_best():
    """Against the code of mammoth (utils/metrics.py of aimagelab/mammoth), run once on this matrix."""
    nan = np.nan
    accuracies = [[0.8, nan, nan, nan], [0.9, 0.7, nan, nan], [0.6, 0.75, 0.8, nan], [0.5, 0.6, 0.7, 0.9]]
    assert cm.backward_transfer(accuracies) == pytest.approx(-0.1666666666666667)
    assert cm.average_forgetting(accuracies) == pytest.approx(0.2166666666666667)


def test_the_example_that_tells_forgetting_from_backward_transfer():
    """0.7, 0.8, 0.6, 0.5 on one task: transfer -0.2, forgetting 0.3 (after Chaudhry et al. 2018)."""
    accuracies = np.full((4, 4), 0.5)  # the other tasks stay as they were
    accuracies[:, 0] = [0.7, 0.8, 0.6, 0.5]
    assert cm.backward_transfer(accuracies) * 3 == pytest.approx(-0.2)
    assert cm.average_forgetting(accuracies) * 3 == pytest.approx(0.3)


def test_one_task_has_no_earlier_ones():
    assert cm.average_accuracy([[0.7]]) == cm.learning_accuracy([[0.7]]) == 0.7
    assert cm.intransigence([[0.7]], [0.8]) == pytest.approx(0.1)
    assert cm.accuracy_curve([[0.7]]).tolist() == [0.7]
    for score in (cm.backward_transfer, cm.average_forgetting):
        assert np.isnan(score([[0.7]]))
    assert np.isnan(cm.forward_transfer([[0.7]], [0.1]))
    assert np.isnan(cm.forgetting_curve([[0.7]])).tolist() == [True]


def test_tasks_without_a_head_before_their_turn_cost_no_score_but_the_forward_transfer():
    accuracies = np.where(np.triu(np.ones((3, 3)), 1) == 1, np.nan, THREE)
    assert np.isnan(cm.forward_transfer(accuracies, [np.nan] * 3))
    for score in (cm.average_accuracy, cm.learning_accuracy, cm.backward_transfer, cm.average_forgetting):
        assert score(accuracies) == score(THREE)
    assert cm.accuracy_curve(accuracies).tolist() == cm.accuracy_curve(THREE).tolist()


def test_what_was_learnt_ahead_of_its_turn_can_be_forgotten():
    """Equation 3 of Chaudhry et al. takes the maximum over all models before the last."""
    accuracies = [[0.5, 0.9, 0.0], [0.5, 0.6, 0.0], [0.5, 0.6, 0.5]]
    assert cm.average_forgetting(accuracies) == pytest.approx(0.15)
    assert cm.backward_transfer(accuracies) == 0


def test_a_missing_accuracy_makes_the_scores_missing_that_need_it():
    lost = THREE.copy()
    lost[1, 0] = np.nan
    assert np.isnan(cm.average_forgetting(lost)) and np.isnan(cm.accuracy_curve(lost)[1])
    assert cm.backward_transfer(lost) == cm.backward_transfer(THREE)
    lost[2, 2] = np.nan
    for score in (cm.average_accuracy, cm.learning_accuracy):
        assert np.isnan(score(lost))
    assert cm.backward_transfer(lost) == cm.backward_transfer(THREE)


@given(matrices)
def test_what_was_learnt_plus_what_was_transferred_is_what_is_known(accuracies):
    tasks = len(accuracies)
    transferred = 0 if tasks == 1 else cm.backward_transfer(accuracies) * (tasks - 1) / tasks
    assert cm.learning_accuracy(accuracies) + transferred == pytest.approx(cm.average_accuracy(accuracies))
    assert cm.accuracy_curve(accuracies)[-1] == pytest.approx(cm.average_accuracy(accuracies))


@given(several_tasks)
def test_forgetting_is_the_lost_transfer_when_no_task_improves_and_more_otherwise(accuracies):
    assert cm.average_forgetting(accuracies) >= -cm.backward_transfer(accuracies) - 1e-12
    falling = np.sort(accuracies, axis=0)[::-1]
    learnt = np.where(np.triu(np.ones_like(falling), 1) == 1, 0, falling)
    assert cm.average_forgetting(learnt) == pytest.approx(-cm.backward_transfer(learnt), abs=1e-12)


@given(several_tasks, st.data())
def test_the_curve_is_the_forgetting_of_every_shorter_sequence(accuracies, data):
    tasks = data.draw(st.integers(2, len(accuracies)))
    expected = cm.average_forgetting(accuracies[:tasks, :tasks])
    assert cm.forgetting_curve(accuracies)[tasks - 1] == pytest.approx(expected, abs=1e-12)


@given(several_tasks)
def test_a_model_that_never_changes_transfers_and_forgets_nothing(accuracies):
    same = np.repeat(accuracies[:1], len(accuracies), axis=0)
    assert cm.backward_transfer(same) == cm.average_forgetting(same) == 0
    assert cm.forward_transfer(same, accuracies[0]) == cm.intransigence(same, accuracies[0]) == 0


@pytest.mark.parametrize("shape", [(2, 3), (4,), (0, 0), (4, 3)])
def test_a_matrix_that_is_not_square_is_refused(shape):
    with pytest.raises(ValueError, match="one row per task trained and one column per task"):
        cm.average_accuracy(np.full(shape, 0.5))


def test_percentages_and_other_numbers_of_tasks_are_refused():
    with pytest.raises(ValueError, match=r"shares in \[0, 1\] or NaN, not 60; 80% is 0.8"):
        cm.backward_transfer(THREE * 100)
    with pytest.raises(ValueError, match=r"before must be shares in \[0, 1\] or NaN, not -0.1"):
        cm.forward_transfer(THREE, -BEFORE)
    with pytest.raises(ValueError, match="before must hold one accuracy for each of 3 tasks"):
        cm.forward_transfer(THREE, [0.1, 0.2])
    with pytest.raises(ValueError, match="reference must hold one accuracy for each of 3 tasks"):
        cm.intransigence(THREE, [0.1])


# the table of a sequence


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
        "average_accuracy": cm.average_accuracy(THREE),
        "average_forgetting": cm.average_forgetting(THREE),
        "backward_transfer": cm.backward_transfer(THREE),
        "forward_transfer": cm.forward_transfer(THREE, BEFORE),
        "learning_accuracy": cm.learning_accuracy(THREE),
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
    low, high = fair_comparison.bootstrap_interval(scores["average_accuracy"][:4])
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
