"""The pictures of what training did inside hold the numbers of their tables; read back from the Axes."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

import lora_lens as ll

SHARES = ["inside", "above", "below", "mixed", "outside"]
RATES = (0.001, 0.004)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def texts(labels: list) -> list[str]:
    return [label.get_text() for label in labels]


# turned bases


def test_the_matrix_of_turned_bases_is_shown_as_it_is_above_the_faintest():
    turned = torch.tensor([[1.0, 0.0, 0.02], [0.5, 1e-5, 0.2], [0.001, 0.3, 0.9]])
    ax = ll.plots.rotation_matrix(turned)
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), turned.clamp_min(1e-3))
    assert image.get_clim() == (1e-3, 1) and not ax.lines
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("component after", "component before")
    assert [bar.get_ylabel() for bar in ax.figure.axes[1:]] == ["|cos| (log)"]


@pytest.mark.parametrize(
    ("window", "ends"),
    [
        (ll.Window(4, position=0.0), (-0.5, 3.5)),
        (ll.Window(4, position=1.0), (7.5, 11.5)),
        (ll.Window(2, start=5), (4.5, 6.5)),
        (ll.Window(12, position=0.5), (-0.5, 11.5)),
    ],
)
def test_lines_mark_the_components_of_the_window_before_and_after(window, ends):
    ax = ll.plots.rotation_matrix(torch.eye(12), window)
    across = [line.get_ydata()[0] for line in ax.lines if line.get_xdata() == [0, 1]]
    down = [line.get_xdata()[0] for line in ax.lines if line.get_ydata() == [0, 1]]
    assert sorted(across) == sorted(down) == list(ends)


def test_the_window_s_colour_is_that_of_the_house_when_the_figure_is_drawn_later():
    ax = ll.plots.rotation_matrix(torch.eye(12), ll.Window(4, position=0.0))
    with plt.style.context("default"):
        assert {to_hex(line.get_color()) for line in ax.lines} == {"#56b4e9"}


def test_a_window_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="rank 8 does not fit"):
        ll.plots.rotation_matrix(torch.eye(4), ll.Window(8, position=0.0))


def test_a_real_layer_that_was_not_trained_is_a_bright_diagonal(model, spectra):
    name = next(iter(spectra))
    window = ll.Window.middle(8)
    adapted = ll.attach(model, window, spectra=spectra, targets=[name])
    ax = ll.plots.rotation_matrix(ll.forgetting.turned(adapted, name, spectra[name]), window)
    shown = np.asarray(ax.images[0].get_array())
    assert shown.shape == (spectra[name].k,) * 2
    np.testing.assert_allclose(shown.diagonal(), 1, atol=1e-2)


# where the updates lie


def drifts() -> pd.DataFrame:
    """Two layers of a run at each of two positions, and of a LoRA."""
    rows = [
        (0.0, 3.0, [0.2, 0.0, 0.5, 0.2, 0.1]),
        (0.0, 1.0, [0.6, 0.0, 0.1, 0.2, 0.1]),
        (0.5, 2.0, [0.1, 0.3, 0.3, 0.3, 0.0]),
        (0.5, 2.0, [0.3, 0.1, 0.1, 0.5, 0.0]),
        (np.nan, 5.0, [np.nan] * 5),
    ]
    return pd.DataFrame(
        [{"position": p, "update": u, **dict(zip(SHARES, s, strict=True))} for p, u, s in rows]
    )


def stacked(ax: Axes) -> list[list[float]]:
    """The heights of the bars, (shares, positions), after a look that each stands on those before it."""
    bars = [container.patches for container in ax.containers]
    below = np.zeros(len(bars[0]))
    for row in bars:
        np.testing.assert_allclose([bar.get_y() for bar in row], below, atol=1e-12)
        below += [bar.get_height() for bar in row]
    np.testing.assert_allclose(below, 1)
    return [[bar.get_height() for bar in row] for row in bars]


def test_shares_are_weighted_by_the_square_of_each_layer_s_update():
    ax = ll.plots.shares(drifts().sample(frac=1, random_state=0))
    # 9 and 1 of 10 at position 0, half and half at 0.5
    expected = [[0.24, 0.2], [0.0, 0.2], [0.46, 0.2], [0.2, 0.4], [0.1, 0.0]]
    np.testing.assert_allclose(stacked(ax), expected, atol=1e-12)
    assert texts(ax.get_xticklabels()) == ["0", "0.5"]
    assert texts(ax.get_legend().get_texts())[0] == "inside the window" and len(ax.containers) == 5
    assert ax.yaxis.get_major_formatter()(0.5) == "50"


@pytest.mark.parametrize("count", [2, 9, 33])
def test_positions_below_the_bars_are_apart_however_many(count):
    even = pd.DataFrame({"position": np.linspace(0, 1, count).round(3), "update": 1.0}).assign(
        **dict.fromkeys(SHARES, 0.2)
    )
    ax = ll.plots.shares(even)
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert len(boxes) == count and all(one.x1 < two.x0 for one, two in pairwise(boxes))


def test_one_window_is_one_bar():
    one = drifts().query("position == 0.5")
    assert np.shape(stacked(ll.plots.shares(one))) == (5, 1)


def test_shares_without_placed_windows_or_columns_are_refused():
    with pytest.raises(ValueError, match="no windows placed by position with a drift; merge position"):
        ll.plots.shares(drifts().assign(position=np.nan))
    with pytest.raises(ValueError, match="no column position"):
        ll.plots.shares(drifts().drop(columns="position"))
    with pytest.raises(ValueError, match="no column outside"):
        ll.plots.shares(drifts().drop(columns="outside"))


def test_shares_of_positions_that_did_not_move_are_left_out():
    still = drifts().query("position == 0.5").assign(position=1.0, update=0.0)
    ax = ll.plots.shares(pd.concat([drifts(), still]))
    assert texts(ax.get_xticklabels()) == ["0", "0.5"]
    with pytest.raises(ValueError, match="no windows placed by position with a drift"):
        ll.plots.shares(still)


# what predicts forgetting


def predicted() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "measure": ["relative", "lr", "intruders", "of my own"],
            "r2": [0.6, 0.9, -0.4, 0.0],
            "spearman": [0.8, 0.95, -0.25, 0.0],
        }
    )


def test_bars_of_predictors_are_their_r2_and_worse_than_the_mean_is_no_bar():
    ax = ll.plots.predictors(predicted())
    names = ["intruder dimensions", "of my own", "relative update, ||dW|| / ||W||", "learning rate"]
    assert texts(ax.get_yticklabels()) == names
    assert [bar.get_width() for bar in ax.patches] == [0, 0, 0.6, 0.9]
    assert [text[4:] for text in texts(ax.texts)] == ["-0.25", "+0.00", "+0.80", "+0.95"]
    places = [(0.01, 0), (0.01, 1), (0.61, 2), (0.91, 3)]
    np.testing.assert_allclose([text.get_position() for text in ax.texts], places)
    grey, *others = (to_hex(bar.get_facecolor()) for bar in reversed(ax.patches))
    assert grey == "#999999" and set(others) == {"#0072b2"}  # what is known without looking inside is grey
    assert texts(ax.get_legend().get_texts()) == ["from the weights", "known without looking inside"]


def test_measures_that_need_the_retained_task_have_their_own_colour():
    table = predicted().assign(measure=["relative_change", "cka_loss", "update", "accuracy"])
    ax = ll.plots.predictors(table)
    colours = {
        name: to_hex(bar.get_facecolor())
        for name, bar in zip(texts(ax.get_yticklabels()), ax.patches, strict=True)
    }
    assert colours["change of the features"] == colours["1 - CKA of the features"] == "#e69f00"
    assert colours["update, ||dW||"] == "#0072b2" and colours["accuracy on the new task"] == "#999999"
    legend = ax.get_legend()
    named = dict(zip(texts(legend.get_texts()), legend.get_patches(), strict=True))
    assert to_hex(named["from features of the retained task"].get_facecolor()) == "#e69f00"


def test_intervals_of_predictors_are_thin_lines_and_the_words_stand_beyond_them():
    assert not ll.plots.predictors(predicted()).collections
    ax = ll.plots.predictors(
        predicted().assign(r2_low=[0.5, 0.8, -0.6, -0.2], r2_high=[0.7, 0.95, -0.1, 0.2])
    )
    (lines,) = ax.collections
    expected = [[(0, 0), (0, 0)], [(0, 1), (0.2, 1)], [(0.5, 2), (0.7, 2)], [(0.8, 3), (0.95, 3)]]
    np.testing.assert_allclose(lines.get_segments(), expected)
    places = [text.get_position() for text in ax.texts]
    np.testing.assert_allclose(places, [(0.01, 0), (0.21, 1), (0.71, 2), (0.96, 3)])


@pytest.mark.parametrize("count", [1, 30])
def test_names_of_predictors_fit_however_many(count):
    table = pd.DataFrame({"measure": [f"measure {i}" for i in range(count)], "r2": 0.5, "spearman": 0.5})
    ax = ll.plots.predictors(table)
    ax.figure.canvas.draw()
    boxes = sorted((label.get_window_extent() for label in ax.get_yticklabels()), key=lambda box: box.y0)
    assert len(boxes) == count
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))


def test_predictors_without_rows_or_columns_are_refused():
    with pytest.raises(ValueError, match="no column r2"):
        ll.plots.predictors(predicted().drop(columns="r2"))
    with pytest.raises(ValueError, match="the result is empty"):
        ll.plots.predictors(predicted().iloc[:0])


# one measure against forgetting


def measured() -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table of runs, and measures of all but one of them."""
    rows = [
        {"run": f"{method} {position} {lr}", "method": method, "position": position, "lr": lr,
         "forgetting": 0.1 * i + 20 * lr}
        for i, (method, position) in enumerate([("window", 0.0), ("window", 1.0), ("LoRA", np.nan)])
        for lr in RATES
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    measures = pd.DataFrame({"run": table["run"], "intruders": np.arange(len(table)) ** 2.0})
    return table, measures.iloc[:-1]


def points(ax: Axes) -> dict[tuple[float, float], str]:
    """The colours of all points by place; "none" where hollow."""
    found = {}
    for group in ax.collections:
        faces = group.get_facecolors()
        for i, place in enumerate(group.get_offsets()):
            found[tuple(place)] = to_hex(faces[i % len(faces)]) if len(faces) else "none"
    return found


def test_every_measured_run_is_a_point_coloured_by_its_position():
    table, measures = measured()
    ax = ll.plots.against_forgetting(table, measures.sample(frac=1, random_state=0), "intruders")
    runs = table.merge(measures, on="run")
    found = points(ax)
    assert set(found) == set(zip(runs["intruders"], runs["forgetting"], strict=True)) and len(found) == 5
    cividis = plt.get_cmap("cividis")
    for run in runs.itertuples():
        colour = "none" if run.method == "LoRA" else to_hex(cividis(run.position))
        assert found[run.intruders, run.forgetting] == colour
    assert ax.get_xlabel() == "intruder dimensions"
    assert [bar.get_ylabel() for bar in ax.figure.axes[1:]] == ["position of the window"]
    assert float(ax.yaxis.get_major_formatter()(0.25)) == 25


def test_rates_differ_in_shape_and_are_named_once():
    ax = ll.plots.against_forgetting(*measured(), "intruders")
    assert texts(ax.get_legend().get_texts()) == ["0.001", "0.004", "LoRA"]
    shapes = {len(group.get_paths()[0].vertices) for group in ax.collections}
    assert len(shapes) == 2
    many = pd.concat([measured()[0].assign(lr=0.001 * i) for i in range(1, 13)], ignore_index=True)
    many["run"] = many.index
    measures = pd.DataFrame({"run": many["run"].unique(), "own": 1.0})
    ax = ll.plots.against_forgetting(many, measures, "own")  # more rates than shapes
    assert len(ax.get_legend().get_texts()) == 12 + 1 and ax.get_xlabel() == "own"


@pytest.mark.parametrize("kept", ["one window", "no windows", "windows by start", "one run"])
def test_points_of_few_runs_can_be_drawn(kept):
    table, measures = measured()
    if kept == "windows by start":
        table = table.assign(position=np.nan)
    else:
        condition = {"one window": "position == 0", "no windows": "method == 'LoRA'", "one run": "index == 0"}
        table = table.query(condition[kept])
    ax = ll.plots.against_forgetting(table, measures, "intruders")
    ax.figure.canvas.draw()
    assert len(points(ax)) == len(table.merge(measures, on="run"))
    assert texts(ax.get_legend().get_texts())[0] == "0.001"
    if kept == "windows by start":
        assert set(points(ax).values()) == {"#cc79a7", "none"}  # no colour of a position that they lack
        assert texts(ax.get_legend().get_texts())[-2:] == ["LoRA", "no position"]


def test_several_other_methods_share_one_name():
    table, measures = measured()
    table.loc[1, ["method", "position"]] = ["random components", np.nan]
    ax = ll.plots.against_forgetting(table, measures, "intruders")
    assert texts(ax.get_legend().get_texts()) == ["0.001", "0.004", "other methods"]


def test_measures_of_other_runs_and_missing_columns_are_refused():
    table, measures = measured()
    with pytest.raises(ValueError, match="no column depth"):
        ll.plots.against_forgetting(table, measures, "depth")
    with pytest.raises(ValueError, match="no column forgetting"):
        ll.plots.against_forgetting(table.drop(columns="forgetting"), measures, "intruders")
    with pytest.raises(ValueError, match="none of the table's runs has a value of intruders"):
        ll.plots.against_forgetting(
            table.assign(run=table["run"] + " of another sweep"), measures, "intruders"
        )
    with pytest.raises(ValueError, match="none of the table's runs has a value of intruders"):
        ll.plots.against_forgetting(table, measures.assign(intruders=np.nan), "intruders")


# all of them


def test_pictures_draw_on_the_axes_they_are_given_and_leave_the_style_alone():
    before = dict(plt.rcParams)
    figure, axes = plt.subplots(1, 4)
    drawn = [
        ll.plots.rotation_matrix(torch.eye(5), ax=axes[0]),
        ll.plots.shares(drifts(), ax=axes[1]),
        ll.plots.predictors(predicted(), ax=axes[2]),
        ll.plots.against_forgetting(*measured(), "intruders", ax=axes[3]),
    ]
    assert drawn == list(axes) and plt.get_fignums() == [figure.number]
    assert dict(plt.rcParams) == before
    figure.canvas.draw()
