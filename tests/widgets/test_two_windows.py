"""Two windows side by side, what is read of single runs, and the pictures of both."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from explored import alts, control, message, parts, pictures, shows_results, text
from ipywidgets import HTML, VBox

import lora_lens as ll
from lora_lens.experiments.records import all_records
from lora_lens.plots.single_runs import learning_curve, relative_updates
from lora_lens.widgets._run_view import of_all_classes
from lora_lens.widgets.two_windows import pair_explorer

DIGITS = Path(__file__).parents[2] / "data" / "results" / "digits.jsonl.xz"
SCORES = ("accuracy", "retained_accuracy", "forgetting")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Some runs of the sweep that the project keeps: 4 windows and methods, 2 rates, 3 seeds."""
    table = ll.Sweep.open(DIGITS).table
    some = table["position"].isin([0, 0.5, 1]) | (table["method"] == "LoRA")
    return table[some & table["lr"].isin([0.005, 0.01]) & (table["seed"] < 3)]


@pytest.fixture(scope="module")
def fashion() -> ll.Task:
    return ll.tasks.bundled.vision()[1].first(test=1000)


@pytest.fixture(scope="module")
def folder(table, tmp_path_factory) -> Path:
    """The same runs as files, to take something away from them."""
    runs = tmp_path_factory.mktemp("store") / "runs"
    runs.mkdir()
    for run, record in all_records(DIGITS).items():
        if run in set(table["run"]):
            (runs / f"{run}.json").write_text(json.dumps(record))
    return runs.parent


@pytest.fixture
def explorer(table) -> VBox:
    return pair_explorer(ll.Sweep.open(DIGITS).only(table))


def rows(explorer: VBox) -> dict[str, list[str]]:
    """The scores of A and of B, and their difference."""
    html = next(part for part in text(explorer).split("<table") if "A - B" in part)
    cells = [unescape(cell) for cell in re.findall("<td>(.*?)</td>", html)]
    return {cells[i].split(" (")[0]: cells[i + 1 : i + 4] for i in range(0, len(cells), 4)}


def written(explorer: VBox) -> str:
    """All that is written, also under pictures."""
    return unescape("\n".join(html.value for html in parts(explorer, HTML)))


def of(table: pd.DataFrame, position: float, lr: float) -> pd.DataFrame:
    return table[(table["position"] == position) & (table["lr"] == lr)]


def without(folder: Path, runs: pd.Series, keys: tuple[str, ...], to: Path) -> Path:
    """A copy of the folder in which these runs were kept without these parts."""
    copy = shutil.copytree(folder, to)
    for run in runs:
        path = copy / "runs" / f"{run}.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in record.items() if key not in keys}))
    return copy


def test_first_and_middle_window_stand_side_by_side_before_any_click(explorer):
    assert (control(explorer, "A").value, control(explorer, "B").value) == ("window at 0", "window at 0.5")
    assert control(explorer, "A").options == ("window at 0", "window at 0.5", "window at 1", "LoRA")
    curves, drift = alts(explorer)
    assert "A: window at 0 ends at" in curves and "B: window at 0.5 by" in drift
    assert all(png.startswith(b"\x89PNG") for png in pictures(explorer)) and shows_results(explorer)


def test_both_begin_at_the_rate_that_learns_most(explorer, table):
    best = table.groupby("lr")["accuracy"].mean().idxmax()
    assert [control(explorer, f"learning rate of {side}").value for side in "AB"] == [best, best]


def test_the_difference_is_paired_by_seed_with_its_interval(explorer, table):
    control(explorer, "learning rate of A").value = 0.005
    control(explorer, "learning rate of B").value = 0.01
    a, b = (of(table, *which).set_index("seed") for which in ((0, 0.005), (0.5, 0.01)))
    for score, told in zip(SCORES, rows(explorer).values(), strict=True):
        difference = 100 * (a[score] - b[score])
        low, high = ll.forgetting.seed_interval(difference)
        assert told[:2] == [f"{100 * a[score].mean():.1f}", f"{100 * b[score].mean():.1f}"]
        assert told[2] == f"{difference.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
    assert "The difference is that of 3 seeds which both have" in text(explorer)


def test_each_control_changes_the_pictures(explorer):
    for description, value in (("A", "LoRA"), ("B", "window at 1"), ("learning rate of A", 0.01)):
        before = pictures(explorer)
        control(explorer, description).value = value
        assert all(new != old for new, old in zip(pictures(explorer), before, strict=True)), description


def test_the_drifts_are_those_of_the_library(explorer, table):
    lr = control(explorer, "learning rate of A").value
    relative = 100 * ll.Sweep.open(DIGITS).only(of(table, 0, lr)).drifts()["relative"]
    assert f"A: window at 0 by {relative.min():.1f} to {relative.max():.1f}%" in alts(explorer)[1]


def test_without_common_seeds_it_says_so(table):
    apart = table[(table["position"] == 0) == (table["seed"] == 0)]
    explorer = pair_explorer(ll.Sweep.open(DIGITS).only(apart))
    assert {told[2] for told in rows(explorer).values()} == {"no seed in common"}
    assert "A is the mean of 1 seed, B of 2 seeds; they share no seed" in text(explorer)
    explorer = pair_explorer(
        ll.Sweep.open(DIGITS).only(table[(table["position"] != 0) | (table["seed"] == 0)])
    )
    assert "they share one seed, so the difference has no interval" in text(explorer)
    assert not any("[" in told[2] for told in rows(explorer).values())


def test_the_same_runs_on_both_sides_are_said_in_place(explorer):
    control(explorer, "B").value = "window at 0"
    assert "A and B are the same runs" in message(explorer) and not shows_results(explorer)
    control(explorer, "learning rate of B").value = 0.01
    assert shows_results(explorer)


def test_only_rates_that_a_window_was_run_at_are_offered(table):
    explorer = pair_explorer(
        ll.Sweep.open(DIGITS).only(table[(table["method"] != "LoRA") | (table["lr"] == 0.005)])
    )
    control(explorer, "learning rate of A").value = 0.01
    control(explorer, "A").value = "LoRA"
    rate = control(explorer, "learning rate of A")
    assert rate.options == (("0.005", 0.005),) and rate.value == 0.005 and shows_results(explorer)
    control(explorer, "A").value = "window at 1"
    assert len(rate.options) == 2 and rate.value == 0.005


def test_examples_are_told_apart_by_who_forgot_them(table, fashion):
    explorer = pair_explorer(ll.Sweep.open(DIGITS).only(table), fashion)
    lr = control(explorer, "learning rate of A").value
    lost = []
    for position in (0, 0.5):
        answers = ll.Sweep.open(DIGITS).only(of(table, position, lr)).answers()
        wrong = (answers["before"] == answers["label"]) & (answers["after"] != answers["label"])
        share = wrong.groupby(answers["item"]).mean()
        lost.append(set(share.index[share > 0.5]))
    a, b = lost
    counts = re.search(
        r"<td>(\d+)</td>\s*<td>(\d+)</td>\s*<td>(\d+)</td>", text(explorer).split("forgotten in")[1]
    )
    assert [int(count) for count in counts.groups()] == [len(a - b), len(b - a), len(a & b)]
    for name, group in (("A only", a - b), ("B only", b - a), ("both", a & b)):
        assert group and f"Forgotten by {name}: {min(6, len(group))} of {len(group)} images" in text(explorer)


def test_what_the_store_lacks_is_said_in_place_and_the_rest_works(table, folder, fashion, tmp_path):
    a = of(table, 0, 0.01)["run"]
    earlier = without(folder, a, ("drift", "features", "items"), tmp_path / "earlier")
    explorer = pair_explorer(ll.Sweep.open(earlier).only(table), fashion)
    for side in "AB":
        control(explorer, f"learning rate of {side}").value = 0.01
    curves, drift = alts(explorer)
    assert (
        "A: window at 0 ends at" in curves
        and "window at 0 by" not in drift
        and "B: window at 0.5 by" in drift
    )
    assert "Not shown of A: window at 0: no run in" in written(explorer)
    assert f"Not shown: run {a.iloc[0]} in {earlier} was kept without its answers" in text(explorer)
    control(explorer, "A").value = "LoRA"
    assert "Not shown" not in text(explorer) and "Forgotten by both" in text(explorer)
    (earlier / "runs" / f"{a.iloc[1]}.json").unlink()
    explorer = pair_explorer(ll.Sweep.open(earlier).only(table))
    control(explorer, "learning rate of A").value = 0.01
    assert f"holds no run {a.iloc[1]}" in text(explorer) and rows(explorer) and shows_results(explorer)


def test_without_any_drift_the_reason_stands_in_its_place(table, folder, tmp_path):
    nothing = without(folder, table["run"], ("drift", "features"), tmp_path / "nothing")
    explorer = pair_explorer(ll.Sweep.open(nothing).only(table))
    assert len(pictures(explorer)) == 1 and text(explorer).count("Not shown: A: window at 0: no run in") == 1


def test_two_windows_without_positions_and_other_methods_will_do(table):
    methods = table[(table["position"] == 0) | (table["method"] == "LoRA")]
    explorer = pair_explorer(ll.Sweep.open(DIGITS).only(methods))
    assert (control(explorer, "A").value, control(explorer, "B").value) == ("window at 0", "LoRA")


def test_what_cannot_be_compared_is_refused(table, fashion):
    for bad, words in (
        (table.iloc[:0], "no run of <Sweep: .* fits"),
        (table.drop(columns="forgetting"), "no column forgetting"),
        (table.drop(columns="run"), "no column run"),
        (table[table["position"] == 0], "at least two windows or methods; this table has window at 0 only"),
        (pd.concat([table, table]), "the table holds run .* twice"),
    ):
        with pytest.raises(ValueError, match=words):
            pair_explorer(ll.Sweep.open(DIGITS).only(bad))
    with pytest.raises(ValueError, match="answers are to 1000 other test images"):
        pair_explorer(ll.Sweep.open(DIGITS).only(table), ll.tasks.bundled.digits().first(64, 1000))
    with pytest.raises(FileNotFoundError):
        pair_explorer(ll.Sweep.open("nowhere").only(table))


def test_examples_of_all_classes_come_in_turn():
    forgotten = pd.DataFrame({"item": range(6), "label": [2, 2, 2, 0, 0, 1]})
    assert of_all_classes(forgotten, 4)["item"].tolist() == [3, 5, 0, 4]


def test_updates_are_drawn_kind_by_kind_in_the_order_of_blocks(table):
    drift = ll.Sweep.open(DIGITS).only(table.iloc[[0]]).drifts()
    ax = relative_updates({"": drift.sample(frac=1, random_state=0).sort_values("kind", ascending=False)})
    assert len(ax.lines) == 4 and ax.get_legend() is None
    for line, kind in zip(ax.lines, ("mlp.fc2", "mlp.fc1", "attn.qkv", "attn.proj"), strict=True):
        of_kind = drift[drift["kind"] == kind].sort_values("block")
        np.testing.assert_allclose(line.get_ydata(), 100 * of_kind["relative"])
    places = np.concatenate([line.get_xdata() for line in ax.lines])
    assert np.diff(places).tolist() == [1] * 5 + ([2] + [1] * 5) * 3  # a gap between kinds
    assert [t.get_text() for t in ax.get_xticklabels()] == [*"012345"] * 4
    assert [t.get_text() for t in ax.texts] == ["fc2", "fc1", "qkv", "proj"]
    plt.close("all")


def test_kinds_are_named_as_briefly_as_they_can_be_told_apart():
    kinds = ["self.query", "attention.output.dense", "output.dense", "pooler.dense"]
    layers = pd.DataFrame({"layer": kinds, "kind": kinds, "block": [0, 0, 0, -1], "relative": 0.1})
    ax = relative_updates({"": layers}, ax=plt.figure(figsize=(3, 3)).subplots())
    assert [t.get_text() for t in ax.texts] == ["query", *kinds[1:]]
    heights = {t.xyann[1] for t in ax.texts}
    assert len(heights) == 2  # too narrow for one row
    wide = relative_updates({"": layers}, ax=plt.figure(figsize=(12, 3)).subplots())
    assert len({t.xyann[1] for t in wide.texts}) == 1
    plt.close("all")


def test_layers_of_two_models_in_part_and_bad_tables_are_handled(table):
    drift = ll.Sweep.open(DIGITS).only(table.iloc[[0]]).drifts()
    ax = relative_updates({"A": drift.iloc[:4], "B": drift})
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["A", "B"]
    with pytest.raises(ValueError, match="no column relative"):
        relative_updates({"A": drift.drop(columns="relative")})
    with pytest.raises(ValueError, match="the table of drifts is empty"):
        relative_updates({"A": drift.iloc[:0]})
    plt.close("all")


def test_curves_are_means_in_a_band_from_lowest_to_highest(table):
    along = {
        "A": ll.Sweep.open(DIGITS).only(of(table, 0, 0.01)).curves(),
        "B": ll.Sweep.open(DIGITS).only(of(table, 0.5, 0.01)).curves(),
    }
    ax = learning_curve(along, "retained_accuracy")
    for line, curve in zip(ax.lines, along.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), curve.groupby("step")["retained_accuracy"].mean())
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()  # not by colour alone
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == along["A"]["retained_accuracy"].min()
    with pytest.raises(ValueError, match="no column step"):
        learning_curve({"A": along["A"].drop(columns="step")})
    plt.close("all")
