from __future__ import annotations

import pandas as pd
import pytest
from explored import alts, control, numbers, pictures, shows_results

import lora_lens as ll


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    whole = pd.DataFrame({"path": "whole update", "t": [0, 0.5, 1], "accuracy": [0.1, 0.7, 0.9]})
    first = whole.assign(path="update in the first 8 components", t=[0, 0.75, 1], accuracy=[0.2, 0.85, 0.9])
    table = pd.concat([whole, first], ignore_index=True)
    table = table.assign(update=table["t"], retained_accuracy=0.9 - 0.2 * table["t"])
    return table.assign(forgetting=0.2 * table["t"], loss_rise=table["t"] ** 2)


def test_the_trained_model_is_shown_first_and_both_scores_follow_t(table):
    explorer = ll.widgets.rewind_explorer(table)
    (before,) = pictures(explorer)
    assert control(explorer, "t").value == 1 and shows_results(explorer)
    control(explorer, "t").value = 0.5
    assert pictures(explorer) != [before]
    (said,) = alts(explorer)
    assert said == (
        "whole update at t = 0.5: accuracy on the new task 70.0%, accuracy on the retained task 80.0%"
    )
    here, trained = numbers(explorer)
    assert (here["point"], here["accuracy"], here["forgetting"]) == ("t = 0.5", "70.0%", "10.0%")
    assert (trained["point"], trained["accuracy"]) == ("trained", "90.0%")


def test_a_path_without_a_point_at_t_shows_the_nearest_and_says_so(table):
    """The slider keeps its options: a move in the browser never means those of the path before."""
    explorer = ll.widgets.rewind_explorer(table)
    assert [value for _, value in control(explorer, "t").options] == [0, 0.5, 0.75, 1]
    control(explorer, "t").value = 0.5
    control(explorer, "path").value = "update in the first 8 components"
    assert control(explorer, "t").value == 0.5
    here = numbers(explorer)[0]
    assert (here["point"], here["accuracy"]) == ("t = 0.75, the nearest measured", "85.0%")
    control(explorer, "t").value = 0.75
    assert numbers(explorer)[0]["point"] == "t = 0.75"
    before = pictures(explorer)
    control(explorer, "forgetting as").value = "loss_rise"
    assert pictures(explorer) != before


def test_what_ll_rewind_returns_is_taken_and_other_tables_are_not(table):
    with pytest.raises(ValueError, match=r"no column forgetting, loss_rise.*pass what ll\.rewind returns"):
        ll.widgets.rewind_explorer(table.drop(columns=["forgetting", "loss_rise"]))
    with pytest.raises(ValueError, match="it has no rows"):
        ll.widgets.rewind_explorer(table.iloc[:0])
