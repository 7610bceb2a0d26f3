from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

import lora_lens as ll


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def table() -> pd.DataFrame:
    """Made-up scores in the columns of a sweep: pictures need points, not training."""
    points = [("window", p) for p in (0, 0.25, 0.5, 0.75, 1)] + [
        ("LoRA", np.nan),
        ("full fine-tuning", np.nan),
    ]
    rows = [
        {"method": m, "rank": 8, "position": p, "start": np.nan, "lr": lr, "seed": s,
         "accuracy": 0.9 - 0.01 * i - s * 0.01, "retained_accuracy": 0.9 - 30 * lr - 0.02 * abs(i - 2),
         "forgetting": 30 * lr + 0.02 * abs(i - 2) + 0.01 * s}
        for lr in (1e-3, 3e-3) for s in (0, 1) for i, (m, p) in enumerate(points)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_spectrum_is_drawn_as_it_is_with_the_window_on_it(spectra):
    window = ll.Window.middle(8)
    ax = ll.plots.spectrum(spectra, window)
    assert len(ax.lines) == 24 and ax.get_yscale() == "log"
    np.testing.assert_allclose(ax.lines[0].get_ydata(), next(iter(spectra.values())).singular_values)
    (band,) = ax.patches
    assert (band.get_x(), band.get_width()) == (43.5, 8)
    assert ax.get_xlabel() and ax.get_ylabel()


@pytest.mark.parametrize(
    ("draw", "column"), [("forgetting_curve", "forgetting"), ("accuracy_curve", "accuracy")]
)
def test_curves_show_the_mean_of_each_rate_and_the_references(table, draw, column):
    ax = getattr(ll.plots, draw)(table)
    curves = [line for line in ax.lines if len(line.get_xdata()) == 5]
    expected = table[(table["method"] == "window") & (table["lr"] == 1e-3)].groupby("position")[column].mean()
    np.testing.assert_allclose(curves[0].get_ydata(), expected)
    flat = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() in ("--", ":")]
    assert len(curves) == 2 and len(ax.collections) == 2 and len(flat) == 4
    assert min(flat) == pytest.approx(
        table[table["method"] == "LoRA"].groupby("lr")[column].mean().min(), abs=0.05
    )
    assert {t.get_text().strip() for t in ax.texts} == {"PiSSA", "MiLoRA"}
    assert "position" in ax.get_xlabel()
    assert "%" in ax.get_ylabel() or "points" in ax.get_ylabel()


def test_a_rate_looks_the_same_whichever_others_are_shown(table):
    both, one = ll.plots.forgetting_curve(table), ll.plots.forgetting_curve(table, rates=[3e-3])
    curves = {line.get_label(): line for line in both.lines if line.get_label() in ("0.001", "0.003")}
    (alone,) = [line for line in one.lines if line.get_label() in curves]
    assert alone.get_label() == "0.003"
    assert (alone.get_color(), alone.get_marker()) == (
        curves["0.003"].get_color(),
        curves["0.003"].get_marker(),
    )
    assert len(ll.plots.tradeoff(table, rates=[3e-3]).collections) == 7


def test_a_backend_that_turns_interactive_within_the_style_stays_so():
    before = plt.isinteractive()
    try:
        plt.ioff()
        with ll.plots.house_style():
            plt.ion()
        assert plt.isinteractive()
    finally:
        (plt.ion if before else plt.ioff)()


def test_the_plane_holds_one_point_per_method_and_rate_and_the_front(table):
    ax = ll.plots.tradeoff(table)
    points = {tuple(c.get_offsets()[0]) for c in ax.collections}
    means = ll.metrics.seed_means(table)
    assert points == {tuple(p) for p in means[["accuracy", "retained_accuracy"]].to_numpy()}
    front = means[ll.metrics.pareto_front(means)]
    assert set(ax.lines[0].get_xdata()) == set(front["accuracy"])


def test_pictures_go_on_the_axes_given_and_leave_the_style_alone(table, spectra):
    before = dict(plt.rcParams)
    figure, axes = plt.subplots(2, 2)
    assert ll.plots.forgetting_curve(table, ax=axes[0, 0]) is axes[0, 0]
    assert ll.plots.tradeoff(table, ax=axes[0, 1]) is axes[0, 1]
    assert ll.plots.by_depth(spectra.table(), ax=axes[1, 0]) is axes[1, 0]
    assert plt.get_fignums() == [figure.number]
    assert dict(plt.rcParams) == before


def test_the_three_parts_of_a_weight(spectra):
    axes = ll.plots.decomposition(spectra["blocks.0.attn.proj"], ll.Window.first(8))
    whole, part, rest = (ax.images[0].get_array() for ax in axes)
    np.testing.assert_allclose(whole, part + rest, atol=1e-6)


def test_a_table_without_windows_is_refused(table):
    with pytest.raises(ValueError, match="no runs of windows"):
        ll.plots.forgetting_curve(table[table["method"] == "LoRA"])


def test_the_curve_of_a_run(model, source, digits):
    run = ll.finetune(
        ll.attach(model, ll.LinearProbe()), digits.subset(32, 20), source.subset(10, 20),
        steps=2, batch_size=16, evaluations=3, progress=False,
    )  # fmt: skip
    ax = ll.plots.learning_curve(run)
    assert isinstance(ax, Axes)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), run.curve["accuracy"])
