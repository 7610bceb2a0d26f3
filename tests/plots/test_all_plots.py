from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes

import lora_lens as ll
from lora_lens.forgetting.features import FeatureSplit
from lora_lens.plots._scores import PERCENT


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


def made_up(blocks: int) -> ll.SpectrumSet:
    """Spectra of a model of any depth, falling faster in later blocks, and of one weight outside them."""
    shapes = {"attn.q": (64, 64), "attn.k": (32, 64), "mlp.up": (128, 64)}
    names = {f"blocks.{b}.{kind}": (b, shape) for b in range(blocks) for kind, shape in shapes.items()}
    return ll.SpectrumSet(
        [
            ll.Spectrum(name, shape, torch.linspace(1, -block / blocks, min(shape)).double().exp())
            for name, (block, shape) in {**names, "pooler": (0, (64, 64))}.items()
        ]
    )


@pytest.mark.parametrize("blocks", [1, 6, 12, 30, 80])
def test_small_multiples_hold_every_weight_in_the_panel_of_its_kind(blocks):
    spectra = made_up(blocks)
    axes = ll.plots.small_multiples(spectra, columns=3)
    assert [ax.get_title() for ax in axes] == ["attn.q", "attn.k", "mlp.up", "pooler"]
    assert [len(ax.lines) for ax in axes] == [blocks, blocks, blocks, 1]
    np.testing.assert_allclose(axes[0].lines[-1].get_ydata(), list(spectra.values())[-4].singular_values)
    colours = {line.get_color() for line in axes[0].lines}
    assert len(colours) == blocks and axes[3].lines[0].get_color() not in colours
    bars = [ax for ax in axes[0].figure.axes if ax not in axes]
    assert [bar.get_ylabel() for bar in bars] == (["block"] if blocks > 1 else [])


def test_small_multiples_count_in_shares_of_k_on_the_axes_given():
    figure, axes = plt.subplots(1, 4)
    drawn = ll.plots.small_multiples(made_up(2), relative=True, axes=axes)
    assert list(drawn) == list(axes) and plt.get_fignums() == [figure.number]
    assert [ax.lines[0].get_xdata()[-1] for ax in axes[:2]] == [63 / 64, 31 / 32]
    assert all("i / k" in ax.get_xlabel() for ax in axes) and not figure.get_supxlabel()
    with pytest.raises(ValueError, match="4 kinds of weights but only 3 axes"):
        ll.plots.small_multiples(made_up(2), axes=axes[:3])


def test_cumulative_energy_is_the_energy_of_the_first_window(spectra):
    ax = ll.plots.cumulative_energy(ll.SpectrumSet([spectra["blocks.0.attn.qkv"]]))
    curve, reference = ax.lines
    at_quarter = curve.get_ydata()[np.isclose(curve.get_xdata(), 0.25)]
    assert at_quarter == pytest.approx(spectra["blocks.0.attn.qkv"].energy(ll.Window.first(24)))
    assert curve.get_ydata()[0] == 0 and curve.get_ydata()[-1] == pytest.approx(1)
    np.testing.assert_array_equal(reference.get_xdata(), reference.get_ydata())


def test_cumulative_energy_compares_kinds_or_models(spectra):
    def labels(ax: Axes) -> list[str]:
        return [text.get_text() for text in ax.get_legend().get_texts()]

    assert labels(ll.plots.cumulative_energy(made_up(80))) == [
        "attn.q", "attn.k", "mlp.up", "pooler", "equal values",
    ]  # fmt: skip
    models = {"ViT": spectra, "made up": made_up(3)}
    assert labels(ll.plots.cumulative_energy(models)) == ["ViT", "made up", "equal values"]


def test_equal_and_zero_singular_values_have_a_cumulative_energy():
    equal, zero = (ll.Spectrum(n, (8, 8), torch.full((8,), v).double()) for n, v in (("one", 1), ("zero", 0)))
    flat, none, _ = ll.plots.cumulative_energy(ll.SpectrumSet([equal, zero])).lines
    np.testing.assert_allclose(flat.get_ydata(), flat.get_xdata(), atol=1e-12)
    assert not none.get_ydata().any()


@pytest.mark.parametrize("blocks", [6, 80])
def test_the_depth_map_holds_every_block_and_is_annotated_if_there_is_room(blocks):
    table = made_up(blocks).table()
    ax = ll.plots.by_depth(table, heat_map=True, share=True)
    cells = ax.images[0].get_array()
    assert cells.shape == (4, blocks + 1) and np.ma.count(cells) == 3 * blocks + 1
    row = table[table["layer"] == "blocks.2.attn.k"].iloc[0]
    assert cells[1, 3] == pytest.approx(row["effective_rank"] / 32)
    assert len(ax.texts) == (3 * blocks + 1 if blocks == 6 else 0)
    assert len(ax.get_xticks()) <= 13 and ax.get_xticklabels()[0].get_text() == "none"


def test_the_depth_map_divides_by_k_where_it_is_asked_to():
    table = made_up(3).table()
    largest = ll.plots.by_depth(table, "largest", heat_map=True).images[0]
    assert largest.get_array().max() == pytest.approx(np.e)
    endless = table.assign(condition_number=[np.inf, *range(len(table) - 1)])
    assert ll.plots.by_depth(endless, "condition_number", heat_map=True).images[0].get_clim() == (
        0,
        len(table) - 2,
    )
    whole = ll.plots.by_depth(table, heat_map=True, limits=(0, 64)).images[0]
    assert whole.get_array().max() == pytest.approx(table["effective_rank"].max())
    assert whole.get_clim() == (0, 64)


@pytest.mark.parametrize("bins", [4, 40])
def test_the_overlap_is_shown_as_it_is(bins):
    ax = ll.plots.overlap(np.eye(bins))
    np.testing.assert_array_equal(ax.images[0].get_array(), np.eye(bins))
    assert ax.images[0].get_clim() == (0, 1) and len(ax.texts) == (16 if bins == 4 else 0)
    assert "before" in ax.get_ylabel() and "after" in ax.get_xlabel()


@pytest.mark.parametrize(
    "wrong", [np.zeros(3), np.full((2, 2), 1.5), np.full((2, 2), np.nan), np.zeros((0, 0))]
)
def test_what_is_no_overlap_is_refused(wrong):
    with pytest.raises(ValueError, match="matrix must"):
        ll.plots.overlap(wrong)


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


def test_ticks_hold_no_needless_zeros(table):
    for draw in (ll.plots.forgetting_curve, ll.plots.accuracy_curve, ll.plots.tradeoff):
        ticks = draw(table).yaxis.get_major_formatter()
        assert [ticks(share, 0) for share in (0.25, 0.125, -0.0, 0.1 + 0.2)] == ["25", "12.5", "0", "30"]


def test_the_rise_of_the_loss_is_drawn_in_nats(table):
    table = table.assign(loss_rise=3 * table["forgetting"])
    ax = ll.plots.forgetting_curve(table, score="loss_rise")
    curves = [line for line in ax.lines if len(line.get_xdata()) == 5]
    windows = table[(table["method"] == "window") & (table["lr"] == 1e-3)]
    np.testing.assert_allclose(curves[0].get_ydata(), windows.groupby("position")["loss_rise"].mean())
    assert ax.get_ylabel().endswith("(nats)") and ax.yaxis.get_major_formatter() is not PERCENT
    with pytest.raises(ValueError, match="score must be one of 'forgetting', 'loss_rise', not 'accuracy'"):
        ll.plots.forgetting_curve(table, score="accuracy")


def test_the_plane_of_the_loss_has_less_of_it_above(table):
    table = table.assign(loss_rise=3 * (0.9 - table["retained_accuracy"]))
    ax, accuracy = ll.plots.tradeoff(table, y="loss_rise"), ll.plots.tradeoff(table)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), accuracy.lines[0].get_xdata())  # the same front
    means = table.groupby(["method", "position", "lr"], dropna=False)[["accuracy", "loss_rise"]].mean()
    points = np.array([c.get_offsets()[0] for c in ax.collections])
    np.testing.assert_allclose(points[points[:, 1].argsort(), 1], np.sort(means["loss_rise"]))
    assert ax.yaxis_inverted() and ax.get_ylabel().endswith("(nats)")
    with pytest.raises(ValueError, match="must be one of 'retained_accuracy', 'loss_rise'"):
        ll.plots.tradeoff(table, y="accuracy")


@pytest.fixture
def looked_at(table) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs with a name each, and what they did to two tasks: half and twice what they forgot."""
    runs = table.assign(run=[f"run {i}" for i in range(len(table))])
    parts = [
        pd.DataFrame({"run": runs["run"], "task": task, "forgetting": factor * runs["forgetting"]})
        for task, factor in (("tweets", 0.5), ("products", 2))
    ]
    together = pd.concat(parts, ignore_index=True)
    return runs, together.assign(loss_rise=10 * together["forgetting"])


@pytest.mark.parametrize(("score", "factor"), [("forgetting", 1), ("loss_rise", 10)])
def test_each_watched_task_has_a_panel_of_its_own_curves(looked_at, score, factor):
    runs, results = looked_at
    axes = ll.plots.watched(results, runs.sample(frac=1, random_state=0), score=score)
    assert [ax.get_title() for ax in axes] == ["tweets", "products"]
    windows = (
        runs[(runs["method"] == "window") & (runs["lr"] == 1e-3)].groupby("position")["forgetting"].mean()
    )
    lora = runs[(runs["method"] == "LoRA") & (runs["lr"] == 1e-3)]["forgetting"].mean()
    for ax, times in zip(axes, (0.5, 2), strict=True):
        curve = next(line for line in ax.lines if line.get_label() == "0.001")
        np.testing.assert_allclose(curve.get_ydata(), factor * times * windows)
        dashed = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"]
        assert any(np.isclose(dashed, factor * times * lora))
    shared = axes[0].get_ylim() == axes[1].get_ylim()
    assert shared == (score == "forgetting")
    assert axes[0].get_ylabel().endswith("(nats)" if score == "loss_rise" else "points)")
    labels = [t.get_text() for t in axes[1].get_legend().get_texts()]
    assert labels == ["0.001", "0.003", "LoRA", "full fine-tuning"] and axes[0].get_legend() is None


def test_watched_tasks_go_on_the_axes_given_and_need_results_of_every_run(looked_at):
    runs, results = looked_at
    own = plt.subplots(1, 3)[1]
    assert list(ll.plots.watched(results, runs, [3e-3], axes=own)) == list(own[:2])
    assert len(plt.get_fignums()) == 1 and not own[2].lines
    assert {t.get_text() for t in own[1].get_legend().get_texts()} == {"0.003", "LoRA", "full fine-tuning"}
    with pytest.raises(ValueError, match="2 watched tasks but only 1 axes"):
        ll.plots.watched(results, runs, axes=own[:1])
    with pytest.raises(ValueError, match="nothing was watched in 1 runs, such as run 0"):
        ll.plots.watched(results[results["run"] != "run 0"], runs)
    with pytest.raises(ValueError, match="no column task"):
        ll.plots.watched(results.drop(columns="task"), runs)
    with pytest.raises(ValueError, match="one of 'forgetting', 'loss_rise', not 'before'"):
        ll.plots.watched(results, runs, score="before")
    with pytest.raises(ValueError, match="no runs of windows"):
        ll.plots.watched(results, runs[runs["method"] == "LoRA"])


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
    means = ll.forgetting.seed_means(table)
    assert points == {tuple(p) for p in means[["accuracy", "retained_accuracy"]].to_numpy()}
    front = means[ll.forgetting.pareto_front(means)]
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


@pytest.fixture
def images(source) -> torch.Tensor:
    return source.test.inputs[:2]


def test_the_maps_hold_the_norms_of_the_tokens_where_they_lie(model, spectra, images):
    name = "blocks.0.attn.proj"
    split = ll.forgetting.feature_split(model, name, spectra[name], ll.Window.middle(8), images)
    axes = ll.plots.feature_maps(images, split)
    assert axes.shape == (2, 3)
    for column, norms in ((1, split.window_norms), (2, split.residual_norms)):
        for row in range(2):
            image = axes[row, column].images[0]
            np.testing.assert_array_equal(image.get_array(), norms[row].reshape(4, 4))
            assert image.get_clim() == (0, norms.max()) and image.get_extent() == [0, 28, 28, 0]
        assert f"0 to {norms.max():.2g}" in axes[0, column].get_title()
    shares = [f"{100 * share:.1g} % of energy" for share in split.shares.tolist()]
    assert [ax.get_xlabel() for ax in axes[:, 1]] == shares
    assert [ax.get_xlabel() for ax in axes[:, 2]] == [
        f"{100 - 100 * s:.2f} % of energy" for s in split.shares
    ]


def test_leading_tokens_are_on_no_map(images):
    torch.manual_seed(0)
    split = FeatureSplit("layer", torch.rand(2, 10, 5), torch.rand(2, 10, 5))
    axes = ll.plots.feature_maps(images, split)
    np.testing.assert_array_equal(axes[1, 1].images[0].get_array(), split.window_norms[1, 1:].reshape(3, 3))
    two = FeatureSplit("layer", split.window[:, :6], split.residual[:, :6])
    with pytest.raises(ValueError, match="6 positions are no square grid"):
        ll.plots.feature_maps(images, two)
    assert ll.plots.feature_maps(images, two, prefix=2)[0, 1].images[0].get_array().shape == (2, 2)
    with pytest.raises(ValueError, match="after 3 leading tokens"):
        ll.plots.feature_maps(images, two, prefix=3)


def test_what_rounding_leaves_of_a_residual_is_shown_as_nothing(model, spectra, images):
    name = "blocks.0.attn.proj"
    split = ll.forgetting.feature_split(model, name, spectra[name], ll.Window.first(96), images)
    axes = ll.plots.feature_maps(images, split)
    assert "zero up to rounding" in axes[0, 2].get_title() and axes[0, 2].get_xlabel() == "0 % of energy"
    assert axes[0, 2].images[0].get_clim() == (0, 1) and axes[0, 1].get_xlabel() == "100.00 % of energy"


def test_maps_go_on_the_axes_given_if_these_and_the_images_fit(images):
    split = FeatureSplit("layer", torch.ones(2, 4, 5), torch.zeros(2, 4, 5))
    figure, axes = plt.subplots(2, 3)
    assert ll.plots.feature_maps(images, split, axes=axes) is axes and plt.get_fignums() == [figure.number]
    with pytest.raises(ValueError, match=r"axes of shape \(2, 3\), not \(3,\)"):
        ll.plots.feature_maps(images, split, axes=axes[0])
    for wrong in (images[:1], images[:, 0]):
        with pytest.raises(ValueError, match="expected 2 images"):
            ll.plots.feature_maps(wrong, split)


def test_a_table_without_windows_is_refused(table):
    with pytest.raises(ValueError, match="no runs of windows"):
        ll.plots.forgetting_curve(table[table["method"] == "LoRA"])


def test_the_curve_of_a_run(model, source, digits):
    run = ll.finetune(
        ll.attach(model, ll.LinearProbe()), digits.first(32, 20), source.first(10, 20),
        steps=2, batch_size=16, evaluations=3, progress=False,
    )  # fmt: skip
    ax = ll.plots.learning_curve(run)
    assert isinstance(ax, Axes)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), run.curve["accuracy"])


def test_other_placements_are_lines_beside_the_curve_with_names_that_fit(table):
    mapping = ll.spectrum.ByLayer({f"blocks.{b}.*": ll.Window.middle(8) for b in range(6)})
    others = [ll.spectrum.RandomComponents(8), ll.spectrum.SpreadComponents(8), mapping]
    rows = [table[table["method"] == "LoRA"].assign(method=str(other)) for other in others]
    wider = pd.concat([table, *rows], ignore_index=True)
    ax = ll.plots.forgetting_curve(wider)
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts[2:6] == [
        "LoRA", "full fine-tuning", "8 random components, seed 0", "8 components evenly spread",
    ]  # fmt: skip
    assert texts[6].endswith(" ...") and max(map(len, texts)) <= 44
    lines = len(ll.plots.forgetting_curve(table).lines)
    assert len(ax.lines) - lines == 2 * len(others)  # one for each learning rate
    assert "8 random components, seed 0" in [
        t.get_text() for t in ll.plots.tradeoff(wider).get_legend().get_texts()
    ]
