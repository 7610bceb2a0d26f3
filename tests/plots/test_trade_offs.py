"""The pictures of comparisons hold the numbers of their tables; read back from the Axes."""

from __future__ import annotations

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

import lora_lens as ll
from lora_lens.plots._scores import PERCENT

POSITIONS = (0, 0.25, 0.5, 0.75, 1)
RATES = (1e-3, 3e-3, 9e-3)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def runs_of(method: str, position: float, loss: float = 0.0, rank: int = 8) -> pd.DataFrame:
    """Made-up runs: the middle rate learns best, and forgetting grows with the rate and with ``loss``."""
    rows = [
        {"method": method, "rank": rank, "position": position, "start": np.nan, "lr": lr, "seed": seed,
         "accuracy": accuracy + 0.01 * seed, "forgetting": 10 * lr + loss + 0.002 * seed * (1 + loss),
         "retained_accuracy": 0.9 - 10 * lr - loss, "diverged": False, "steps": 120}
        for lr, accuracy in zip(RATES, (0.8, 0.9, 0.3), strict=True) for seed in range(3)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(run=lambda t: f"{method}{position}{rank}-" + t.index.astype(str))


@pytest.fixture
def table() -> pd.DataFrame:
    windows = [runs_of("window", p, 0.1 * abs(p - 0.5)) for p in POSITIONS]
    return pd.concat([*windows, runs_of("LoRA", np.nan, 0.02)], ignore_index=True)


def texts(labels: list) -> list[str]:
    return [label.get_text() for label in labels]


def named(ax: Axes, label: str) -> list[Line2D]:
    return [line for line in ax.lines if line.get_label() == label]


def lines_of(ax: Axes, label: str) -> list[list[float]]:
    return [line.get_ydata().tolist() for line in named(ax, label)]


def test_the_surface_holds_the_means_and_frames_the_best_rates(table):
    shuffled = table.sample(frac=1, random_state=0)
    ax = ll.plots.surface(shuffled, "forgetting")
    cells = ax.collections[0].get_array().reshape(6, 3)
    for row, (method, position) in enumerate([*(("window", p) for p in POSITIONS), ("LoRA", np.nan)]):
        runs = table[
            (table["method"] == method) & (table["position"].fillna(9) == np.nan_to_num(position, nan=9))
        ]
        np.testing.assert_allclose(cells[row], 100 * runs.groupby("lr")["forgetting"].mean())
    assert texts(ax.get_yticklabels()) == ["0", "0.25", "0.5", "0.75", "1", "LoRA"]
    assert texts(ax.get_xticklabels()) == ["0.001", "0.003", "0.009"]
    assert [frame.get_xy() for frame in ax.patches] == [(1, row) for row in range(6)]
    assert texts(ax.texts)[:3] == [f"{value:.1f}" for value in cells[0]]
    accuracy = ll.plots.surface(table, "accuracy").collections[0].get_array()
    assert accuracy.max() == pytest.approx(91)


def test_the_rise_of_the_loss_is_in_nats(table):
    table = table.assign(loss_rise=4 * table["forgetting"])
    ax = ll.plots.surface(table, "loss_rise")
    cells = ax.collections[0].get_array().reshape(6, 3)
    np.testing.assert_allclose(cells[5], table[table["method"] == "LoRA"].groupby("lr")["loss_rise"].mean())
    assert texts(ax.texts)[:3] == [f"{value:.2f}" for value in cells[0]]
    assert ax.figure.axes[1].get_ylabel() == "rise of the retained task's loss (nats)"
    lines = ll.plots.by_setting(table[table["lr"] == 3e-3], "rank", "loss_rise")
    assert lines.get_ylabel().endswith("(nats)") and lines.yaxis.get_major_formatter() is not PERCENT


def test_a_surface_of_many_rows_grows_or_its_numbers_shrink_and_vanish():
    many = sweep_of(*(("window", p) for p in np.linspace(0, 1, 40)))
    ax = ll.plots.surface(many)
    ax.figure.canvas.draw()
    heights = [label.get_window_extent().height for label in ax.get_yticklabels()]
    assert max(heights) < ax.get_window_extent().height / 40 and len(ax.texts) == 120
    low = plt.subplots(figsize=(6, 3))[1]
    assert ll.plots.surface(many, ax=low) is low and not low.texts
    assert low.get_yticklabels()[0].get_fontsize() < ax.get_yticklabels()[0].get_fontsize()


def test_the_surface_tells_ranks_and_starts_apart_and_leaves_missing_cells_empty(table):
    first = runs_of("window", 0.0, rank=16)
    absolute = runs_of("window", np.nan).assign(start=40.0)
    ax = ll.plots.surface(pd.concat([table, first[first["lr"] < 9e-3], absolute]))
    assert texts(ax.get_yticklabels())[4:] == ["1, rank 8", "from 40, rank 8", "0, rank 16", "LoRA, rank 8"]
    assert np.ma.getmaskarray(ax.collections[0].get_array()).reshape(8, 3)[6].tolist() == [False, False, True]


def test_pictures_of_tables_refuse_what_they_would_mix_or_do_not_know(table):
    for draw in (ll.plots.surface, ll.plots.fronts_by_method):
        with pytest.raises(ValueError, match=r"two runs of window .* share learning rate"):
            draw(pd.concat([table, table.assign(steps=30)]))
        with pytest.raises(ValueError, match="the table is empty"):
            draw(table.iloc[:0])
    with pytest.raises(
        ValueError, match="score must be one of 'accuracy', 'retained_accuracy', 'forgetting'"
    ):
        ll.plots.surface(table, "loss")


@pytest.mark.parametrize("score", ["forgetting", "accuracy"])
def test_a_comparison_shows_every_mean_with_its_interval(table, score):
    result = ll.forgetting.at_own_best_rate(table.sample(frac=1, random_state=0))
    ax = ll.plots.comparison(result, score)
    order = result.sort_values("position", na_position="last")
    assert [y for (y,) in lines_of(ax, "_mean")] == pytest.approx(order[score].tolist())
    np.testing.assert_allclose(lines_of(ax, "_interval"), order[[f"{score}_low", f"{score}_high"]])
    places = [line.get_xdata()[0] for line in named(ax, "_mean")]
    assert places[:5] == list(POSITIONS) and places[5] > 1
    assert dict(zip(ax.get_xticks(), texts(ax.get_xticklabels()), strict=True))[places[5]] == "LoRA"
    assert ax.yaxis.get_major_formatter()(0.125, 0) == "12.5"


def test_seeds_that_did_not_get_there_show_as_hollow_or_missing_markers(table):
    windows = ll.forgetting.at_own_best_rate(table[table["method"] == "window"]).sort_values("position")
    result = windows.assign(reached=[3, 2, 0, 3, 3])
    result.loc[result["reached"] == 0, ["forgetting", "forgetting_low", "forgetting_high"]] = np.nan
    means = named(ll.plots.comparison(result), "_mean")
    assert [line.get_xdata()[0] for line in means] == [0, 0.25, 0.75, 1]
    assert [to_hex(line.get_markerfacecolor()) == "#ffffff" for line in means] == [False, True, False, False]


def test_a_single_seed_is_a_mean_without_an_interval(table):
    ax = ll.plots.comparison(ll.forgetting.at_own_best_rate(table[table["seed"] == 0]))
    assert len(named(ax, "_mean")) == 6 and not named(ax, "_interval")


def test_ranks_are_lines_of_their_own(table):
    both = pd.concat([table, *(runs_of("window", p, 0.3, rank=2) for p in (0.0, 1.0))])
    ax = ll.plots.comparison(ll.forgetting.at_own_best_rate(both))
    assert texts(ax.get_legend().get_texts()) == ["rank 2", "rank 8"]
    assert named(ax, "rank 2")[0].get_xdata().tolist() == [0, 1]
    assert len(named(ax, "_mean")) == 8


def test_results_of_several_tables_keep_every_method_of_each(table):
    # Concatenated results repeat their index.
    more = pd.concat([runs_of("DoRA", np.nan, 0.2), runs_of("an anchor of strength 1", np.nan, 0.1)])
    ax = ll.plots.comparison(pd.concat([ll.forgetting.at_own_best_rate(t) for t in (table, more)]))
    assert len(named(ax, "_mean")) == 8
    assert texts(ax.get_xticklabels())[5:] == ["LoRA", "DoRA", "an anchor of\nstrength 1"]
    alone = ll.plots.comparison(ll.forgetting.at_own_best_rate(more))
    assert len(alone.get_xticks()) == 2 and alone.get_xlabel() == "method"


def test_a_comparison_of_several_rates_or_of_nothing_is_refused(table):
    with pytest.raises(ValueError, match=r"window at position 0\.0 has several rows; choose one rate"):
        ll.plots.comparison(ll.forgetting.at_equal_rate(table))
    result = ll.forgetting.at_own_best_rate(table)
    with pytest.raises(ValueError, match="no column forgetting_low"):
        ll.plots.comparison(result.drop(columns="forgetting_low"))
    with pytest.raises(ValueError, match="the result is empty"):
        ll.plots.comparison(result.iloc[:0])
    with pytest.raises(ValueError, match="score must be one of"):
        ll.plots.comparison(result.assign(step=1.0, step_low=0.0, step_high=2.0), "step")


def test_bars_span_the_rates_that_cost_little(table):
    result = ll.forgetting.rate_robustness(table, tolerance=0.15)
    ax = ll.plots.robustness(result)
    bars, dots = ([line for line in ax.lines if (line.get_marker() == m)] for m in ("None", "o"))
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert [list(bar.get_xdata()) for bar in bars] == [[1e-3, 3e-3]] * 6
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(3e-3, row) for row in range(6)]
    assert [cross.get_xdata()[0] for cross in crosses] == [9e-3] * 6
    assert texts(ax.get_yticklabels()) == ["0", "0.25", "0.5", "0.75", "1", "LoRA"]
    assert ax.get_xscale() == "log" and ax.yaxis_inverted()
    assert texts(ax.get_xticklabels()) == ["0.001", "0.003", "0.009"]


def test_a_bar_that_ends_with_the_grid_is_pale_and_said_to_be_a_bound(table):
    result = ll.forgetting.rate_robustness(table, tolerance=0.15)
    result["at_grid_end"] = result["position"] == 0
    ax = ll.plots.robustness(result.assign(collapse=np.nan))
    bars = [line for line in ax.lines if line.get_marker() == "None"]
    assert bars[0].get_alpha() < bars[1].get_alpha() == bars[5].get_alpha()
    assert "at least: the grid ends here" in texts(ax.get_legend().get_texts())
    assert "accuracy halves" not in texts(ax.get_legend().get_texts())
    with pytest.raises(ValueError, match="the result is empty"):
        ll.plots.robustness(result.iloc[:0])


def test_fronts_join_the_rates_that_no_other_of_the_window_beats(table):
    ax = ll.plots.fronts_by_method(table)
    paths, fronts = named(ax, "_every rate"), [*named(ax, "_front"), *named(ax, "LoRA")]
    assert len(paths) == len(fronts) == 6
    means = ll.forgetting.seed_means(table)
    for path, front, position in zip(paths[:5], fronts, POSITIONS, strict=False):
        rows = means[means["position"] == position].sort_values("lr")
        np.testing.assert_allclose(path.get_xdata(), rows["accuracy"])
        np.testing.assert_allclose(path.get_ydata(), rows["retained_accuracy"])
        np.testing.assert_allclose(front.get_xdata(), rows["accuracy"][:2])  # the highest rate is beaten
    low, high = ax.get_xlim()
    assert 0.31 < low < 0.81 and 0.91 < high < 0.95
    assert len({to_hex(line.get_color()) for line in fronts}) == 6
    assert [axes.get_ylabel() for axes in ax.figure.axes[1:]] == ["position of the window"]


def test_fronts_of_methods_alone_need_no_scale_of_positions(table):
    names = [f"method {i}" for i in range(6)]
    ax = ll.plots.fronts_by_method(pd.concat([runs_of(name, np.nan, 0.01) for name in names]))
    assert len(ax.figure.axes) == 1
    assert texts(ax.get_legend().get_texts()) == [*names, "all rates"]


def test_settings_are_lines_of_means_in_bands_from_seed_to_seed(table):
    usual = table[table["lr"] == 3e-3]
    longer = usual.assign(steps=480, forgetting=usual["forgetting"] * 2)
    ax = ll.plots.by_setting(pd.concat([longer, usual]), "steps")
    windows = usual[usual["method"] == "window"].groupby("position")["forgetting"]
    short, long = (named(ax, steps)[0] for steps in ("120", "480"))
    np.testing.assert_allclose(short.get_ydata(), windows.mean())
    np.testing.assert_allclose(long.get_ydata(), 2 * windows.mean())
    band = ax.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((windows.min().min(), windows.max().max()))
    lora = usual.loc[usual["method"] == "LoRA", "forgetting"].mean()
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == pytest.approx([lora, 2 * lora])
    assert texts(ax.get_legend().get_texts()) == ["120", "480", "LoRA"]


def test_settings_of_layers_are_named_by_kind_and_number(table):
    windows = table[(table["lr"] == 3e-3) & (table["method"] == "window")]
    some = ["blocks.0.attn.qkv blocks.0.attn.proj", "blocks.0.attn.qkv blocks.1.attn.qkv"]
    ax = ll.plots.by_setting(pd.concat([windows.assign(targets=t) for t in some]), "targets", "accuracy")
    labels = texts(ax.get_legend().get_texts())
    assert labels == ["attn.qkv, attn.proj (2 weights)", "attn.qkv (2 weights)"]
    assert ax.get_legend().get_title().get_text() == "layers"


def test_settings_refuse_what_would_be_mixed(table):
    with pytest.raises(ValueError, match=r"one learning rate, and the table has 0\.001, 0\.003, 0\.009"):
        ll.plots.by_setting(table, "rank")
    usual = table[table["lr"] == 3e-3]
    with pytest.raises(ValueError, match="with rank 8 and seed 0 differ in something else"):
        ll.plots.by_setting(pd.concat([usual, usual.assign(steps=480)]), "rank")
    with pytest.raises(ValueError, match="no column tides"):
        ll.plots.by_setting(usual, "tides")
    with pytest.raises(ValueError, match="no runs of windows placed by position and with a rank"):
        ll.plots.by_setting(usual[usual["method"] == "LoRA"], "rank")


def test_pictures_draw_on_the_axes_they_are_given(table):
    figure, axes = plt.subplots(1, 5)
    at_rate = table[table["lr"] == 3e-3]
    drawn = [
        ll.plots.surface(table, ax=axes[0]),
        ll.plots.comparison(ll.forgetting.at_own_best_rate(table), ax=axes[1]),
        ll.plots.robustness(ll.forgetting.rate_robustness(table), ax=axes[2]),
        ll.plots.fronts_by_method(table, ax=axes[3]),
        ll.plots.by_setting(at_rate, "rank", ax=axes[4]),
    ]
    assert drawn == list(axes) and plt.get_fignums() == [figure.number]


# what a sweep may hold


def sweep_of(*methods: tuple[str, float]) -> pd.DataFrame:
    return pd.concat([runs_of(method, position) for method, position in methods], ignore_index=True)


PICTURES = {
    "surface": ll.plots.surface,
    "comparison": lambda table, **axes: ll.plots.comparison(ll.forgetting.at_own_best_rate(table), **axes),
    "robustness": lambda table, **axes: ll.plots.robustness(ll.forgetting.rate_robustness(table), **axes),
    "fronts": ll.plots.fronts_by_method,
    "by setting": lambda table, **axes: ll.plots.by_setting(table[table["lr"] == RATES[0]], "steps", **axes),
}
ONE, LORA, BY_START = ("window", 0.5), ("LoRA", np.nan), ("window", np.nan)
SWEEPS = {
    "one window": sweep_of(ONE, LORA),
    "one window alone": sweep_of(ONE),
    "no baselines": sweep_of(*(("window", p) for p in POSITIONS)),
    "one seed": sweep_of(ONE, LORA).query("seed == 0"),
    "one rate": sweep_of(ONE, LORA).query("lr == 0.001"),
    "one run": sweep_of(ONE).head(1),
    "a window by start": pd.concat([sweep_of(ONE, LORA), sweep_of(BY_START).assign(start=40)]),
    "a method without a rank": pd.concat([sweep_of(ONE), sweep_of(LORA).assign(rank=np.nan)]),
    "methods with long names": sweep_of(ONE, *((f"a method of the long name {i}", np.nan) for i in range(9))),
    "methods alone": sweep_of(LORA, ("full fine-tuning", np.nan)),
    "variants": pd.concat([sweep_of(ONE, LORA), sweep_of(("window", 1.0)).assign(variant="DoRA")]),
}


@pytest.mark.parametrize(
    ("picture", "name"),
    [pair for pair in product(PICTURES, SWEEPS) if pair != ("by setting", "methods alone")],  # refused
)
def test_every_sweep_has_its_picture_without_a_name_that_is_missing(picture, name):
    before = dict(plt.rcParams)
    figure, ax = plt.subplots()
    assert PICTURES[picture](SWEEPS[name].reset_index(drop=True), ax=ax) is ax
    assert dict(plt.rcParams) == before
    figure.canvas.draw()
    assert ax.lines or ax.collections
    legend = texts(ax.get_legend().get_texts()) if ax.get_legend() else []
    written = [*texts(ax.get_xticklabels()), *texts(ax.get_yticklabels()), *legend]
    assert written and not any(word in text for text in written for word in ("nan", "None"))


def test_a_row_without_any_accuracy_has_no_frame_and_the_score_it_has(table):
    table.loc[table["position"] == 0.5, "accuracy"] = np.nan
    ax = ll.plots.surface(table)
    assert [frame.get_xy()[1] for frame in ax.patches] == [0, 1, 3, 4, 5]
    assert not np.ma.getmaskarray(ax.collections[0].get_array()).any()


def test_windows_that_no_seed_brought_there_leave_the_picture_empty(table):
    result = ll.forgetting.at_own_best_rate(table).assign(reached=0)
    ax = ll.plots.comparison(result.assign(forgetting=np.nan, forgetting_low=np.nan, forgetting_high=np.nan))
    ax.figure.canvas.draw()
    assert not named(ax, "_mean") and not named(ax, "_interval")


def test_windows_placed_by_start_stand_beside_those_on_the_line(table):
    absolute = runs_of("window", np.nan).assign(start=40.0)
    ax = ll.plots.comparison(ll.forgetting.at_own_best_rate(pd.concat([table, absolute])))
    assert named(ax, "rank 8")[0].get_xdata().tolist() == list(POSITIONS)
    assert "window\nfrom 40" in texts(ax.get_xticklabels())[5:]


def test_variants_are_lines_of_their_own_and_the_plain_one_has_no_name(table):
    windows = table[table["method"] == "window"]
    both = pd.concat([windows, windows.assign(variant="DoRA", forgetting=0.5)])
    ax = ll.plots.comparison(ll.forgetting.at_own_best_rate(both))
    assert set(texts(ax.get_legend().get_texts())) == {"rank 8", "rank 8, DoRA"}
    assert lines_of(ax, "rank 8, DoRA") == [[0.5] * 5]


def test_fronts_have_the_colour_of_their_position(table):
    colours = [to_hex(line.get_color()) for line in named(ll.plots.fronts_by_method(table), "_front")]
    assert colours == [to_hex(plt.get_cmap("cividis")(float(p))) for p in POSITIONS]


def test_lora_is_named_only_where_it_is_drawn(table):
    usual = table[table["lr"] == 3e-3]
    alpha = usual["rank"].where(usual["method"] == "window")  # LoRA has none in this table
    ax = ll.plots.by_setting(usual.assign(alpha=alpha), "alpha")
    assert texts(ax.get_legend().get_texts()) == ["8"]
    assert not [line for line in ax.lines if line.get_linestyle() == "--"]


def test_a_setting_without_runs_or_placed_windows_is_refused(table):
    usual = table[table["lr"] == 3e-3]
    with pytest.raises(ValueError, match="the table is empty"):
        ll.plots.by_setting(table.iloc[:0], "rank")
    with pytest.raises(ValueError, match="no runs of windows placed by position"):
        ll.plots.by_setting(usual.assign(position=np.nan, start=40), "rank")
    with pytest.raises(ValueError, match=r"score must be one of .*, not 'loss'"):
        ll.plots.by_setting(usual, "rank", "loss")


def test_columns_that_a_picture_needs_are_named_where_they_lack(table):
    wide = ll.forgetting.rate_robustness(table)
    for draw, source, column in (
        (ll.plots.surface, table, "accuracy"),
        (ll.plots.fronts_by_method, table, "retained_accuracy"),
        (ll.plots.robustness, wide, "collapse"),
    ):
        with pytest.raises(ValueError, match=f"no column {column}"):
            draw(source.drop(columns=column))


def test_fronts_of_runs_without_any_score_are_refused(table):
    with pytest.raises(ValueError, match="no run of the table has a value of accuracy"):
        ll.plots.fronts_by_method(table.assign(accuracy=np.nan))
