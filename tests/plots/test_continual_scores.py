"""The pictures of strategies as a whole hold the scores of their runs; read back from the Axes."""

from __future__ import annotations

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from continual_tables import forgetful, together
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from lora_lens.experiments.continual.metrics import continual_scores, score_means
from lora_lens.plots.continual_scores import continual_tradeoff, forgetting_by_position

POSITIONS = (0.0, 0.5, 1.0)
NAN = np.nan


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Three seeds of windows that are merged or go on, of LoRA, and of the two bounds."""
    runs = []
    for seed in range(3):
        step = 0.01 * seed
        for strategy, worse in (("merged", 0.0), ("continued", 0.1)):
            for position in POSITIONS:
                lost = 0.1 + worse + 0.2 * abs(position - 0.5) + step
                runs.append(
                    forgetful(0.7 - worse + step, lost, strategy=strategy, position=position, seed=seed)
                )
        runs.append(forgetful(0.75 + step, 0.15, method="LoRA", position=NAN, seed=seed))
        runs.append(forgetful(0.8 + step, 0.0, strategy="separate", method="LoRA", position=NAN, seed=seed))
        runs.append(together(0.9 + step, method="LoRA", position=NAN, seed=seed))
    return pd.concat(runs, ignore_index=True)


@pytest.fixture(scope="module")
def scores(table) -> pd.DataFrame:
    return continual_scores(table)


@pytest.fixture(scope="module")
def means(scores) -> pd.DataFrame:
    return score_means(scores).set_index(["strategy", "method", "position"]).sort_index()


def texts(labels: list) -> list[str]:
    return [label.get_text() for label in labels]


def named(ax: Axes, label: str) -> list[Line2D]:
    return [line for line in ax.lines if line.get_label() == label]


def points(lines: list[Line2D]) -> list[tuple[float, float]]:
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines]


# learning against forgetting


def test_made_up_runs_have_the_scores_they_were_made_for(means):
    row = means.loc[("merged", "window", 0.5)]
    assert row["average_accuracy"] == pytest.approx(0.71) and row["average_forgetting"] == pytest.approx(0.11)
    assert row["retained_forgetting"] == pytest.approx(0.055)


def test_windows_are_points_by_position_that_a_line_joins(scores, means):
    ax = continual_tradeoff(scores.sample(frac=1, random_state=0))
    scale = colormaps["cividis"]
    found = {
        (to_hex(line.get_color()), line.get_marker()): points([line])[0] for line in named(ax, "_window")
    }
    shapes = {name: named(ax, f"{name}: windows")[0].get_marker() for name in ("merged", "continued")}
    assert len(found) == 6 and len(set(shapes.values())) == 2
    for strategy, marker in shapes.items():
        for position in POSITIONS:
            row = means.loc[(strategy, "window", position)]
            expected = row["average_accuracy"], row["average_forgetting"]
            assert found[(to_hex(scale(position)), marker)] == pytest.approx(expected)
    joining = {tuple(np.round(line.get_ydata(), 6)) for line in named(ax, "_windows")}
    assert joining == {(0.21, 0.11, 0.21), (0.31, 0.21, 0.31)}
    assert ax.figure.axes[1].get_ylabel() == "position of the window"


def test_other_methods_are_hollow_and_separate_adapters_forget_nothing(scores):
    ax = continual_tradeoff(scores)
    (lora,), (separate,) = named(ax, "merged: LoRA"), named(ax, "separate: LoRA")
    assert points([lora, separate]) == [pytest.approx((0.76, 0.15)), pytest.approx((0.81, 0.0))]
    assert lora.get_marker() != separate.get_marker()
    assert to_hex(lora.get_markerfacecolor()) == "#ffffff"
    labels = {"merged: windows", "continued: windows", "merged: LoRA", "joint: LoRA", "separate: LoRA"}
    assert set(texts(ax.get_legend().get_texts())) == labels
    assert ax.yaxis_inverted() and not ax.xaxis_inverted()


def test_joint_training_is_an_upright_line_with_its_interval(scores, means):
    ax = continual_tradeoff(scores)
    (line,) = named(ax, "joint: LoRA")
    assert line.get_xdata() == [pytest.approx(0.91)] * 2 and list(line.get_ydata()) == [0, 1]
    (band,) = ax.patches
    row = means.xs(("joint", "LoRA")).iloc[0]
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx(
        (row["average_accuracy_low"], row["average_accuracy_high"])
    )
    # The pretrained task can be forgotten by joint training, too.
    (point,) = named(continual_tradeoff(scores, "retained_forgetting"), "joint: LoRA")
    assert points([point]) == [pytest.approx((0.91, 0.05))]


def test_bars_are_the_intervals_of_both_scores(scores, means):
    ax = continual_tradeoff(scores)
    bars = [tuple(np.round([*line.get_xdata(), *line.get_ydata()], 9)) for line in named(ax, "_interval")]
    row = means.loc[("merged", "window", 0.5)]
    x, y = row["average_accuracy"], row["average_forgetting"]
    across = (row["average_accuracy_low"], row["average_accuracy_high"], y, y)
    upwards = (x, x, row["average_forgetting_low"], row["average_forgetting_high"])
    assert tuple(np.round(across, 9)) in bars and tuple(np.round(upwards, 9)) in bars
    assert len(bars) == 2 * 8  # of all but joint
    assert not named(continual_tradeoff(scores[scores["seed"] == 0]), "_interval")


def test_a_table_of_runs_is_scored_first(table, scores):
    for draw in (continual_tradeoff, forgetting_by_position):
        one, two = draw(table), draw(scores)
        for a, b in zip(one.lines, two.lines, strict=True):
            np.testing.assert_array_equal(a.get_xydata(), b.get_xydata())


def test_without_windows_there_is_no_scale_of_positions(scores):
    ax = continual_tradeoff(scores[scores["method"] == "LoRA"])
    assert len(ax.figure.axes) == 1 and not named(ax, "_window")


def test_twenty_methods_are_told_apart_in_a_legend_that_covers_nothing(scores):
    strategies = [f"continued, EWC {10**i:g}" for i in range(7)]
    methods = ("LoRA", "full fine-tuning", "LoRA of rank 8, L2 to initial 0.01")
    runs = scores[(scores["strategy"] == "merged") & (scores["method"] == "LoRA")]
    many = [runs.assign(strategy=s, method=m) for s in strategies for m in methods]
    ax = continual_tradeoff(pd.concat([scores, *many]))
    ax.figure.canvas.draw()
    entries = ax.get_legend().get_texts()
    assert len(entries) == 5 + 21
    looks = [
        (line.get_marker(), to_hex(line.get_markerfacecolor()))
        for line in ax.lines
        if line.get_label().startswith("continued, EWC")
    ]
    assert len(looks) == len(set(looks)) == 21
    boxes = [entry.get_window_extent() for entry in entries]
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))
    below = ax.xaxis.label.get_window_extent().y0
    assert all(box.y1 < below for box in boxes)
    assert ax.get_window_extent().height > 200 and ax.get_window_extent().width > 400


# against the position


@pytest.mark.parametrize("score", ["average_forgetting", "average_accuracy", "retained_forgetting"])
def test_lines_by_position_hold_the_means_and_bands_the_intervals(scores, means, score):
    ax = forgetting_by_position(scores.sample(frac=1, random_state=0), score)
    for strategy in ("merged", "continued"):
        (line,) = named(ax, f"{strategy}: windows")
        rows = means.loc[(strategy, "window")].sort_index()
        assert line.get_xdata().tolist() == list(POSITIONS)
        np.testing.assert_allclose(line.get_ydata(), rows[score])
        (band,) = (b for b in ax.collections if to_hex(b.get_facecolor()[0][:3]) == to_hex(line.get_color()))
        ends = band.get_paths()[0].vertices[:, 1]
        assert ends.min() == pytest.approx(rows[f"{score}_low"].min())
        assert ends.max() == pytest.approx(rows[f"{score}_high"].max())
    assert len(ax.collections) == 2


def test_other_methods_are_flat_lines_dashed_by_method_in_their_strategy_s_colour(scores, means):
    ax = forgetting_by_position(scores, "average_accuracy")
    (lora,), (windows,) = named(ax, "merged: LoRA"), named(ax, "merged: windows")
    assert list(lora.get_ydata()) == [pytest.approx(0.76)] * 2 and lora.get_xdata()[0] == 0
    assert to_hex(lora.get_color()) == to_hex(windows.get_color()) and lora.get_linestyle() == "--"
    (joint,) = named(ax, "joint: LoRA")
    assert list(joint.get_ydata()) == [pytest.approx(0.91)] * 2 and joint.get_linestyle() == "--"
    assert to_hex(joint.get_color()) != to_hex(lora.get_color())
    rows = means.drop("window", level="method")
    bars = {tuple(np.round(line.get_ydata(), 9)) for line in named(ax, "_interval")}
    ends = rows[["average_accuracy_low", "average_accuracy_high"]].round(9)
    assert bars == set(ends.itertuples(index=False, name=None))
    assert all(line.get_xdata()[0] > 1 for line in named(ax, "_interval"))


def test_a_method_without_the_score_has_no_line(scores):
    ax = forgetting_by_position(scores)  # joint training has no forgetting
    assert not named(ax, "joint: LoRA")
    assert "joint: LoRA" not in texts(ax.get_legend().get_texts())
    assert ax.get_ylabel() == "average forgetting (percentage points)"


def test_ranks_are_lines_of_their_own(scores):
    wider = scores[scores["strategy"] == "merged"].assign(rank=16)
    names = {f"merged: {method} of rank {rank}" for method in ("windows", "LoRA") for rank in (8, 16)}
    for draw in (continual_tradeoff, forgetting_by_position):
        assert names <= set(texts(draw(pd.concat([scores, wider])).get_legend().get_texts()))


# what is refused


def test_pictures_of_scores_refuse_what_they_would_mix_or_do_not_know(scores):
    with pytest.raises(ValueError, match="score must be one of 'average_forgetting', 'retained"):
        continual_tradeoff(scores, "average_accuracy")
    with pytest.raises(
        ValueError, match="score must be one of 'average_accuracy', 'retained_accuracy', 'learning"
    ):
        forgetting_by_position(scores, "loss")
    with pytest.raises(ValueError, match="no runs of windows placed by position"):
        forgetting_by_position(scores[scores["method"] == "LoRA"])
    for draw in (continual_tradeoff, forgetting_by_position):
        with pytest.raises(ValueError, match="the table is empty"):
            draw(scores.iloc[:0])
        with pytest.raises(ValueError, match="no column average_forgetting"):
            draw(scores.drop(columns="average_forgetting"))
        for setting, value in (("lr", 0.01), ("setting", "domain-incremental"), ("steps", 9)):
            with pytest.raises(ValueError, match=rf"differ in {setting}: .*; choose one, such as table\["):
                draw(pd.concat([scores, scores.assign(**{setting: value})]))
