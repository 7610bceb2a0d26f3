from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from lora_lens.experiments.continual import formulas

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


def test_scores_worked_out_by_hand():
    assert formulas.average_accuracy(THREE) == pytest.approx(2.2 / 3)  # 0.5 + 0.7 + 1.0
    assert formulas.learning_accuracy(THREE) == pytest.approx(2.5 / 3)  # 0.6 + 0.9 + 1.0
    assert formulas.backward_transfer(THREE) == pytest.approx(-0.15)  # 0.5 - 0.6 and 0.7 - 0.9
    assert formulas.forward_transfer(THREE, BEFORE) == pytest.approx(0.2)  # 0.2 - 0.1 and 0.5 - 0.2
    assert formulas.average_forgetting(THREE) == pytest.approx(0.25)  # 0.8 - 0.5 and 0.9 - 0.7
    assert formulas.forgetting_curve(THREE) == pytest.approx([np.nan, -0.2, 0.25], nan_ok=True)  # 0.6 - 0.8
    assert formulas.accuracy_curve(THREE) == pytest.approx([0.6, 0.85, 2.2 / 3])  # (0.8 + 0.9) / 2
    assert formulas.intransigence(THREE, [0.9, 0.8, 1.0]) == pytest.approx(0.2 / 3)  # 0.3 - 0.1 + 0


def test_the_scores_are_those_that_avalanche_logged():
    assert formulas.average_accuracy(AVALANCHE) == pytest.approx(
        0.58875
    )  # Top1_Acc_Stream, of equal test sets
    assert formulas.backward_transfer(AVALANCHE) == pytest.approx(-0.4266666666666666)  # StreamBWT
    assert formulas.forward_transfer(AVALANCHE, AVALANCHE_BEFORE) == pytest.approx(0.20416666666666664)
    # StreamForgetting starts from the accuracy right after learning, here the best of every task
    assert formulas.average_forgetting(AVALANCHE) == pytest.approx(0.4266666666666666)
    so_far = [0.2875, 0.34375, 0.4266666666666666]  # StreamForgetting after each task
    assert formulas.forgetting_curve(AVALANCHE)[1:] == pytest.approx(so_far)


def test_the_scores_along_the_way_are_those_that_avalanche_logged():
    """StreamBWT and StreamForwardTransfer after two and three tasks."""
    for tasks, backward, forward in [(2, -0.2875, 0.3525), (3, -0.34375, 0.19749999999999998)]:
        so_far, before = AVALANCHE[:tasks, :tasks], AVALANCHE_BEFORE[:tasks]
        assert formulas.backward_transfer(so_far) == pytest.approx(backward)
        assert formulas.forward_transfer(so_far, before) == pytest.approx(forward)


def test_a_task_that_improved_later_is_forgotten_from_its_best():
    """Against the code of mammoth (utils/metrics.py of aimagelab/mammoth), run once on this matrix."""
    nan = np.nan
    accuracies = [[0.8, nan, nan, nan], [0.9, 0.7, nan, nan], [0.6, 0.75, 0.8, nan], [0.5, 0.6, 0.7, 0.9]]
    assert formulas.backward_transfer(accuracies) == pytest.approx(-0.1666666666666667)
    assert formulas.average_forgetting(accuracies) == pytest.approx(0.2166666666666667)


def test_the_example_that_tells_forgetting_from_backward_transfer():
    """0.7, 0.8, 0.6, 0.5 on one task: transfer -0.2, forgetting 0.3 (after Chaudhry et al. 2018)."""
    accuracies = np.full((4, 4), 0.5)  # the other tasks stay as they were
    accuracies[:, 0] = [0.7, 0.8, 0.6, 0.5]
    assert formulas.backward_transfer(accuracies) * 3 == pytest.approx(-0.2)
    assert formulas.average_forgetting(accuracies) * 3 == pytest.approx(0.3)


def test_one_task_has_no_earlier_ones():
    assert formulas.average_accuracy([[0.7]]) == formulas.learning_accuracy([[0.7]]) == 0.7
    assert formulas.intransigence([[0.7]], [0.8]) == pytest.approx(0.1)
    assert formulas.accuracy_curve([[0.7]]).tolist() == [0.7]
    for score in (formulas.backward_transfer, formulas.average_forgetting):
        assert np.isnan(score([[0.7]]))
    assert np.isnan(formulas.forward_transfer([[0.7]], [0.1]))
    assert np.isnan(formulas.forgetting_curve([[0.7]])).tolist() == [True]


def test_tasks_without_a_head_before_their_turn_cost_no_score_but_the_forward_transfer():
    accuracies = np.where(np.triu(np.ones((3, 3)), 1) == 1, np.nan, THREE)
    assert np.isnan(formulas.forward_transfer(accuracies, [np.nan] * 3))
    for score in (
        formulas.average_accuracy,
        formulas.learning_accuracy,
        formulas.backward_transfer,
        formulas.average_forgetting,
    ):
        assert score(accuracies) == score(THREE)
    assert formulas.accuracy_curve(accuracies).tolist() == formulas.accuracy_curve(THREE).tolist()


def test_what_was_learnt_ahead_of_its_turn_can_be_forgotten():
    """Equation 3 of Chaudhry et al. takes the maximum over all models before the last."""
    accuracies = [[0.5, 0.9, 0.0], [0.5, 0.6, 0.0], [0.5, 0.6, 0.5]]
    assert formulas.average_forgetting(accuracies) == pytest.approx(0.15)
    assert formulas.backward_transfer(accuracies) == 0


def test_a_missing_accuracy_makes_the_scores_missing_that_need_it():
    lost = THREE.copy()
    lost[1, 0] = np.nan
    assert np.isnan(formulas.average_forgetting(lost)) and np.isnan(formulas.accuracy_curve(lost)[1])
    assert formulas.backward_transfer(lost) == formulas.backward_transfer(THREE)
    lost[2, 2] = np.nan
    for score in (formulas.average_accuracy, formulas.learning_accuracy):
        assert np.isnan(score(lost))
    assert formulas.backward_transfer(lost) == formulas.backward_transfer(THREE)


@given(matrices)
def test_what_was_learnt_plus_what_was_transferred_is_what_is_known(accuracies):
    tasks = len(accuracies)
    transferred = 0 if tasks == 1 else formulas.backward_transfer(accuracies) * (tasks - 1) / tasks
    assert formulas.learning_accuracy(accuracies) + transferred == pytest.approx(
        formulas.average_accuracy(accuracies)
    )
    assert formulas.accuracy_curve(accuracies)[-1] == pytest.approx(formulas.average_accuracy(accuracies))


@given(several_tasks)
def test_forgetting_is_the_lost_transfer_when_no_task_improves_and_more_otherwise(accuracies):
    assert formulas.average_forgetting(accuracies) >= -formulas.backward_transfer(accuracies) - 1e-12
    falling = np.sort(accuracies, axis=0)[::-1]
    learnt = np.where(np.triu(np.ones_like(falling), 1) == 1, 0, falling)
    assert formulas.average_forgetting(learnt) == pytest.approx(
        -formulas.backward_transfer(learnt), abs=1e-12
    )


@given(several_tasks, st.data())
def test_the_curve_is_the_forgetting_of_every_shorter_sequence(accuracies, data):
    tasks = data.draw(st.integers(2, len(accuracies)))
    expected = formulas.average_forgetting(accuracies[:tasks, :tasks])
    assert formulas.forgetting_curve(accuracies)[tasks - 1] == pytest.approx(expected, abs=1e-12)


@given(several_tasks)
def test_a_model_that_never_changes_transfers_and_forgets_nothing(accuracies):
    same = np.repeat(accuracies[:1], len(accuracies), axis=0)
    assert formulas.backward_transfer(same) == formulas.average_forgetting(same) == 0
    assert formulas.forward_transfer(same, accuracies[0]) == formulas.intransigence(same, accuracies[0]) == 0


@pytest.mark.parametrize("shape", [(2, 3), (4,), (0, 0), (4, 3)])
def test_a_matrix_that_is_not_square_is_refused(shape):
    with pytest.raises(ValueError, match="one row per task trained and one column per task"):
        formulas.average_accuracy(np.full(shape, 0.5))


def test_percentages_and_other_numbers_of_tasks_are_refused():
    with pytest.raises(ValueError, match=r"shares in \[0, 1\] or NaN, not 60; 80% is 0.8"):
        formulas.backward_transfer(THREE * 100)
    with pytest.raises(ValueError, match=r"before must be shares in \[0, 1\] or NaN, not -0.1"):
        formulas.forward_transfer(THREE, -BEFORE)
    with pytest.raises(ValueError, match="before must hold one accuracy for each of 3 tasks"):
        formulas.forward_transfer(THREE, [0.1, 0.2])
    with pytest.raises(ValueError, match="reference must hold one accuracy for each of 3 tasks"):
        formulas.intransigence(THREE, [0.1])
