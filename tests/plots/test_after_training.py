from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest

import lora_lens as ll


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def made_up() -> pd.DataFrame:
    """Two ways back, as ll.rewind gives them."""
    whole = pd.DataFrame({"path": "whole update", "t": [0, 0.5, 1, 1.2], "accuracy": [0.1, 0.7, 0.9, 0.89]})
    first = whole.assign(path="update in the first 8 components", accuracy=[0.2, 0.75, 0.9, 0.9])
    table = pd.concat([whole, first], ignore_index=True)
    table = table.assign(update=table["t"], retained_accuracy=0.9 - 0.2 * table["t"] ** 2)
    return table.assign(forgetting=0.9 - table["retained_accuracy"], loss_rise=table["t"] ** 2)


def test_each_way_back_is_a_line_through_its_points():
    table = made_up()
    ax = ll.plots.rewinding(table)
    assert [line.get_label() for line in ax.lines] == list(table["path"].unique())
    for line, (_, points) in zip(ax.lines, table.groupby("path", sort=False), strict=True):
        assert line.get_xdata().tolist() == points["accuracy"].tolist()
        assert line.get_ydata().tolist() == points["retained_accuracy"].tolist()
    assert [text.get_text() for text in ax.texts] == ["t = 0", "0.5", "trained"]


def test_the_rise_of_the_loss_runs_downwards():
    ax = ll.plots.rewinding(made_up(), "loss_rise")
    low, high = ax.get_ylim()
    assert low > high and "nats" in ax.get_ylabel()


def test_what_own_answers_tell_is_called_agreement():
    own = made_up().assign(retained_before=1.0, retained_loss=lambda table: table["loss_rise"])
    assert ll.plots.rewinding(own).get_ylabel() == "agreement with the pretrained model (%)"
    assert ll.plots.rewinding(own, "loss_rise").get_ylabel() == "divergence from the pretrained model (nats)"
    for labelled in (own.assign(retained_before=0.9), own.assign(retained_loss=own["loss_rise"] + 0.1)):
        assert ll.plots.rewinding(labelled).get_ylabel() == "accuracy on the retained task (%)"


def test_one_path_alone_needs_no_legend():
    table = made_up()
    assert ll.plots.rewinding(table[table["path"] == "whole update"]).get_legend() is None


@pytest.mark.parametrize("score", ["update", "relative", "rotation", "forgetting", "loss_rise"])
def test_growth_is_drawn_by_step(score):
    table = pd.DataFrame({"step": [20, 0, 10], score: [0.3, 0.0, 0.1]})
    (line,) = ll.plots.growth(table, score).lines
    assert line.get_xdata().tolist() == [0, 10, 20] and line.get_ydata().tolist() == [0, 0.1, 0.3]


def test_what_is_not_to_be_drawn_is_refused():
    with pytest.raises(ValueError, match="score must be one of"):
        ll.plots.rewinding(made_up(), "forgetting")
    with pytest.raises(ValueError, match="no column t"):
        ll.plots.rewinding(made_up().drop(columns="t"))
    with pytest.raises(ValueError, match="no checkpoint has a value of rotation"):
        ll.plots.growth(pd.DataFrame({"step": [0, 1], "rotation": [None, None]}), "rotation")
