"""The pictures of sequences of tasks hold the numbers of their tables; read back from the Axes."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from continual_tables import sequence, together
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

import lora_lens as ll
from lora_lens.experiments.continual.sequence_sweeps import continual_sweep
from lora_lens.experiments.continual.strategies import Merged
from lora_lens.forgetting.fair_comparison import seed_interval
from lora_lens.plots.continual import accuracy_heatmap, accuracy_over_time, update_over_time, window_survival

NAN = np.nan
ONE = [[0.9, NAN, NAN], [0.8, 0.95, NAN], [0.6, 0.85, 0.99]]
OTHER = [[0.7, NAN, NAN], [0.6, 0.75, NAN], [0.5, 0.65, 0.79]]
RETAINED = [0.88, 0.87, 0.8, 0.705]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def table() -> pd.DataFrame:
    """Two orders of one method."""
    return pd.concat(
        [sequence(ONE, RETAINED), sequence(OTHER, RETAINED, order=(2, 0, 1), seed=1)], ignore_index=True
    )


def texts(labels: list) -> list[str]:
    return [label.get_text() for label in labels]


def named(ax: Axes, label: str) -> list[Line2D]:
    return [line for line in ax.lines if line.get_label() == label]


def line_of(ax: Axes, label: str) -> dict[float, float]:
    (line,) = named(ax, label)
    return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))


def cells(ax: Axes) -> np.ndarray:
    """What the colours show, with the gap and the retained task in the last two columns."""
    return np.ma.filled(ax.collections[0].get_array(), NAN)


def frames(ax: Axes) -> list[tuple[float, float]]:
    return [patch.get_xy() for patch in ax.patches if not patch.get_hatch()]


def hatched(ax: Axes) -> set[tuple[float, float]]:
    return {patch.get_xy() for patch in ax.patches if patch.get_hatch()}


# the accuracy on every task after each


def test_a_heatmap_of_one_run_holds_its_accuracies_in_percent_and_the_retained_task_apart():
    ax = accuracy_heatmap(sequence(ONE, RETAINED).sample(frac=1, random_state=0))
    shown = cells(ax)
    np.testing.assert_allclose(shown[:, :3], 100 * np.array(ONE))
    assert np.isnan(shown[:, 3]).all()
    np.testing.assert_allclose(shown[:, 4], [87, 80, 70.5])
    numbers = {tuple(np.round(text.get_position(), 2)): text.get_text() for text in ax.texts}
    assert numbers[(0.5, 2.5)] == "60.0" and numbers[(2.5, 2.5)] == "99.0" and numbers[(3.75, 2.5)] == "70.5"
    assert len(numbers) == 6 + 3
    assert texts(ax.get_xticklabels())[:3] == ["red", "green", "blue"]
    assert texts(ax.get_xticklabels())[3].split() == ["retained", "(88.0", "before)"]
    assert texts(ax.get_yticklabels()) == ["1", "2", "3"] and ax.yaxis_inverted()
    assert ax.collections[0].get_clim() == (0, 100) and ax.get_title() == "merged: window at 0.5"


def test_cells_without_a_value_are_hatched_and_what_was_just_learnt_is_framed():
    ax = accuracy_heatmap(sequence(ONE, RETAINED))
    assert hatched(ax) == {(1, 0), (2, 0), (2, 1)}
    assert frames(ax) == [(0, 0), (1, 1), (2, 2)]


def test_with_one_head_the_upper_triangle_has_numbers_too():
    whole = [[0.9, 0.5, 0.4], [0.8, 0.95, 0.45], [0.6, 0.85, 0.99]]
    ax = accuracy_heatmap(sequence(whole, RETAINED, setting="domain-incremental", before=[0.3, 0.4, 0.2]))
    np.testing.assert_allclose(cells(ax)[:, :3], 100 * np.array(whole))
    assert not hatched(ax) and len(ax.texts) == 12


def test_runs_of_other_orders_are_averaged_by_place_and_those_of_one_order_keep_their_names(table):
    ax = accuracy_heatmap(table)
    np.testing.assert_allclose(cells(ax)[2, :3], [55, 75, 89])
    assert texts(ax.get_xticklabels())[:3] == ["1st task", "2nd task", "3rd task"]
    assert ax.get_title() == "merged: window at 0.5, mean of 2 runs"
    seeds = pd.concat([sequence(ONE, RETAINED), sequence(OTHER, RETAINED, seed=1)])
    same = accuracy_heatmap(seeds)
    np.testing.assert_allclose(cells(same), cells(ax))
    assert texts(same.get_xticklabels())[:3] == ["red", "green", "blue"]
    one = accuracy_heatmap(table, run=table["run"].iloc[-1])
    np.testing.assert_allclose(cells(one)[:, :3], 100 * np.array(OTHER))
    assert texts(one.get_xticklabels())[:3] == ["blue", "red", "green"]


def test_without_a_retained_task_there_is_no_column_for_it_and_no_line(table):
    alone = table.assign(retained_before=NAN, retained_accuracy=NAN)
    assert cells(accuracy_heatmap(alone)).shape == (3, 3)
    assert not named(accuracy_over_time(alone), "retained task")


def test_joint_training_has_numbers_in_its_last_row_only():
    ax = accuracy_heatmap(together(0.8))
    assert sorted(texts(ax.texts)) == ["80.0", "80.0", "80.0", "85.0"] and frames(ax) == [(2, 2)]
    assert line_of(accuracy_over_time(together(0.8)), "green") == {3: pytest.approx(0.8)}


@pytest.mark.parametrize("size", [(7, 4), (4.5, 4)])
def test_names_of_tasks_and_numbers_stay_within_their_cells(size):
    names = [f"digits, rotated by {15 * i} degrees" for i in range(10)]
    rows = [
        {
            **sequence(ONE, RETAINED).iloc[0],
            "after": after,
            "place": place,
            "task": names[place],
            "accuracy": 1.0,
        }
        for after in range(11)
        for place in range(10)
    ]
    with ll.plots.house_style():
        ax = plt.subplots(figsize=size)[1]
    accuracy_heatmap(pd.DataFrame(rows), ax=ax)
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert len(boxes) == 11 and all(one.x1 < two.x0 for one, two in pairwise(boxes))
    cell = ax.get_window_extent().width / 11.25
    assert max(text.get_window_extent().width for text in ax.texts) < cell


# along the tasks


def test_lines_show_the_mean_of_every_task_from_when_it_was_learnt(table):
    ax = accuracy_over_time(table.sample(frac=1, random_state=0))
    assert line_of(ax, "1st task") == pytest.approx({1: 0.8, 2: 0.7, 3: 0.55})
    assert line_of(ax, "2nd task") == pytest.approx({2: 0.85, 3: 0.75})
    assert line_of(ax, "3rd task") == pytest.approx({3: 0.89})
    assert line_of(ax, "retained task") == pytest.approx(dict(enumerate(RETAINED)))
    assert named(ax, "retained task")[0].get_linestyle() == "--"
    assert texts(ax.get_legend().get_texts()) == ["1st task", "2nd task", "3rd task", "retained task"]
    assert ax.yaxis.get_major_formatter()(0.125, 0) == "12.5"


def test_a_task_starts_where_its_colour_stands_upright(table):
    ax = accuracy_over_time(table)
    starts = {line.get_xdata()[0]: to_hex(line.get_color()) for line in named(ax, "_start")}
    lines = [to_hex(named(ax, f"{n} task")[0].get_color()) for n in ("1st", "2nd", "3rd")]
    assert starts == dict(enumerate(lines)) and len(set(lines)) == 3


def test_bands_are_the_intervals_over_runs_and_one_run_has_none(table):
    ax = accuracy_over_time(table)
    first = ax.collections[0].get_paths()[0].vertices
    low, high = seed_interval([0.6, 0.5])
    at_end = first[first[:, 0] == 3][:, 1]
    assert (at_end.min(), at_end.max()) == (pytest.approx(low), pytest.approx(high)) and low < high
    assert not accuracy_over_time(table[table["seed"] == 0]).collections


# what is refused


def test_pictures_of_one_method_refuse_what_they_would_mix_or_do_not_know(table):
    for draw in (accuracy_heatmap, accuracy_over_time):
        with pytest.raises(
            ValueError, match=r"has 2, such as merged: window at 0\.5 and joint: window at 0\.5"
        ):
            draw(pd.concat([table, together(0.8)]))
        with pytest.raises(
            ValueError, match=r"differ in lr: 0\.001 and 0\.002; .* table\[table\['lr'\] == 0\.001"
        ):
            draw(pd.concat([table, sequence(ONE, RETAINED, lr=0.002)]))
        with pytest.raises(ValueError, match="learnt different tasks: blue, green, red and blue, red"):
            draw(pd.concat([table[table["seed"] == 0], table[(table["seed"] == 1) & (table["place"] < 2)]]))
        with pytest.raises(ValueError, match="stand twice"):
            draw(pd.concat([table, table]))
        with pytest.raises(ValueError, match="the table is empty"):
            draw(table.iloc[:0])
        with pytest.raises(ValueError, match="no column place"):
            draw(table.drop(columns="place"))
    with pytest.raises(ValueError, match="the table has no run 'mine'; it has merged-window"):
        accuracy_heatmap(table, run="mine")
    mixed = pd.concat([table, together(0.8)])
    assert accuracy_heatmap(mixed, run=mixed["run"].iloc[-1]).get_title() == "joint: window at 0.5"


# what is left of the first window


def drifts_of(run: str, changes: list[list[float]], windows: bool = True) -> pd.DataFrame:
    """(tasks, layers) changes of the first window's block; other measures follow from them."""
    rows = [
        {"run": run, "after": after, "layer": f"layer {i}", "update": 0.01 * after + change,
         "overlap_left": 1 - change if windows else NAN, "overlap_right": 1 - 2 * change if windows else NAN,
         "block_change": change if windows else NAN}
        for after, layers in enumerate(changes, 1) for i, change in enumerate(layers)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def runs() -> pd.DataFrame:
    """Two seeds of a window at 0.5, a window at 0 that goes on, and a LoRA."""
    parts = [
        sequence(ONE, RETAINED),
        sequence(ONE, RETAINED, seed=1),
        sequence(ONE, RETAINED, strategy="continued", position=0.0),
        sequence(ONE, RETAINED, method="LoRA", position=NAN),
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def drifts(runs) -> pd.DataFrame:
    changes = [[0, 0], [0.1, 0.3], [0.2, 0.4]], [[0, 0], [0.2, 0.4], [0.3, 0.5]], [[0, 0]] + [[0.1, 0.1]] * 2
    names = runs["run"].unique()
    parts = [drifts_of(run, change) for run, change in zip(names, changes, strict=False)]
    return pd.concat([*parts, drifts_of(names[3], [[0.5, 0.5]] * 3, windows=False)], ignore_index=True)


def test_survival_is_the_mean_over_layers_and_runs_by_position(runs, drifts):
    ax = window_survival(drifts.sample(frac=1, random_state=0), runs)
    merged, continued = named(ax, "_window")
    assert merged.get_xdata().tolist() == [1, 2, 3]
    assert merged.get_ydata().tolist() == pytest.approx([0, 0.25, 0.35])
    assert continued.get_ydata().tolist() == pytest.approx([0, 0.1, 0.1])
    scale = colormaps["cividis"]
    assert [to_hex(line.get_color()) for line in (merged, continued)] == [
        to_hex(scale(0.5)),
        to_hex(scale(0.0)),
    ]
    assert [line.get_linestyle() for line in (merged, continued)] == ["-", "--"]
    assert texts(ax.get_legend().get_texts()) == ["merged: windows", "continued: windows"]
    assert ax.figure.axes[1].get_ylabel() == "position of the window"
    band = ax.collections[0].get_paths()[0].vertices
    at_end = band[band[:, 0] == 3][:, 1]
    low, high = seed_interval([0.3, 0.4])  # of the runs, not of their layers
    assert (at_end.min(), at_end.max()) == (pytest.approx(low), pytest.approx(high))
    assert len(ax.collections) == 1  # a single run has no band


@pytest.mark.parametrize(("measure", "last"), [("overlap_left", 0.65), ("overlap_right", 0.3)])
def test_overlaps_are_drawn_by_name(runs, drifts, measure, last):
    ax = window_survival(drifts, runs[runs["strategy"] == "merged"], measure)
    (line,) = named(ax, "_window")
    assert line.get_ydata().tolist()[::2] == pytest.approx([1, last])
    assert measure.split("_")[1] in ax.get_ylabel() and ax.get_legend() is None


def test_updates_are_drawn_for_every_method(runs, drifts):
    ax = update_over_time(drifts, runs)
    assert [line.get_ydata()[-1] for line in named(ax, "_window")] == pytest.approx([0.38, 0.13])
    assert line_of(ax, "merged: LoRA") == pytest.approx({1: 0.51, 2: 0.52, 3: 0.53})
    assert texts(ax.get_legend().get_texts()) == ["merged: windows", "continued: windows", "merged: LoRA"]
    alone = update_over_time(drifts, runs[runs["method"] == "LoRA"])
    assert len(alone.figure.axes) == 1 and not named(alone, "_window")


def test_pictures_of_drifts_refuse_what_they_would_mix_or_do_not_know(runs, drifts):
    with pytest.raises(ValueError, match="measure must be one of 'overlap_left', 'overlap_right'"):
        window_survival(drifts, runs, "update")
    with pytest.raises(ValueError, match="none of the drifts is of a window placed by position"):
        window_survival(drifts, runs[runs["method"] == "LoRA"])
    with pytest.raises(ValueError, match="none of the table's runs has a drift"):
        update_over_time(drifts, runs.assign(run="another"))
    with pytest.raises(ValueError, match="no column layer"):
        update_over_time(drifts.drop(columns="layer"), runs)
    faster = runs.assign(lr=np.where(runs["seed"] == 1, 0.005, runs["lr"]))
    with pytest.raises(ValueError, match=r"merged: window at 0\.5 differ in lr: 0\.001 and 0\.005"):
        window_survival(drifts, faster)


# a real sequence


def test_a_real_sequence_shows_what_it_measured(model, source, digits):
    def small(task: ll.Task, name: str) -> ll.Task:
        return ll.Task(name, task.classes, task.train.first(64), task.test.first(40))

    pairs = ("0", "1"), ("2", "3")
    tasks = [small(ll.tasks.only_classes(digits, pair), " and ".join(pair)) for pair in pairs]
    table = continual_sweep(
        model, tasks, Merged(), ll.Grid([ll.Window(4, position=0.5)], lr=2e-3, seed=0), jobs=1,
        retain=small(source, "clothes"), steps=2, batch_size=16, progress=False,
    ).table  # fmt: skip
    ax = accuracy_heatmap(table)
    assert texts(ax.get_xticklabels())[:2] == ["0 and 1", "2 and 3"] and hatched(ax) == {(1, 0)}
    at_end = table[table["after"] == 2].sort_values("place")
    expected = [*at_end["accuracy"], NAN, at_end["retained_accuracy"].iloc[0]]
    np.testing.assert_allclose(cells(ax)[1], 100 * np.array(expected))
    assert list(line_of(accuracy_over_time(table), "retained task")) == [0, 1, 2]
