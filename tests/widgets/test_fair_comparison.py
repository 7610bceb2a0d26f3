"""The explorer of comparisons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from explored import alts, control, message, narrow_vit, numbers, parts, pictures, sentence, shows_results
from ipywidgets import VBox, Widget

import lora_lens as ll
from lora_lens.forgetting import fair_comparison

RATES = (1e-3, 1e-2)
TRAINED = (1e-3, 1e-1)  # far enough apart that a few steps on few images change what was forgotten
SETTINGS = {
    "equal learning rate": "learning rate",
    "matched accuracy": "accuracy to match",
    "matched update": "update to match",
}
TOLERANCE = "tolerance (points of accuracy)"
FORGETTING, ACCURACY = "forgetting (%) [95% interval]", "accuracy (%) [95% interval]"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Few short real runs, with their curves and drifts."""
    model = narrow_vit(0)
    small = ll.tasks.bundled.digits().first(64, 40)
    folder = tmp_path_factory.mktemp("sweeps") / "runs"
    grid = ll.Grid(window=ll.windows(4, 3), lr=TRAINED, seed=(0, 1), baselines=[ll.LoRA(4)])
    fast = {"steps": 4, "evaluations": 3, "batch_size": 16, "jobs": 1, "progress": False}
    spectra = ll.spectra(model, progress=False)
    ll.sweep(grid, model=model, task=small, retain=small, spectra=spectra, store=folder, **fast)
    return folder


@pytest.fixture(scope="module")
def table(store) -> pd.DataFrame:
    return ll.Sweep.open(store).table


@pytest.fixture
def explorer(table, store) -> VBox:
    return ll.widgets.comparison_explorer(ll.Sweep.open(store).only(table))


def simulated(seeds: int = 6, depth: float = 0.3) -> pd.DataFrame:
    """Forgetting that is a U of this depth over the position, at two rates, with a little noise."""
    random = np.random.default_rng(0)
    rows = [
        {
            "run": f"{position}-{lr}-{seed}",
            "method": "window",
            "rank": 8,
            "position": position,
            "start": np.nan,
            "lr": lr,
            "seed": seed,
            "accuracy": 0.8 + 10 * lr + random.normal(0, 0.002),
            "forgetting": 0.1 + 4 * depth * (position - 0.5) ** 2 + random.normal(0, 0.01),
            "retained_before": 0.9,
            "diverged": False,
        }
        for position in np.linspace(0, 1, 5)
        for lr in RATES
        for seed in range(seeds)
    ]
    table = pd.DataFrame(rows)
    return table.assign(retained_accuracy=table["retained_before"] - table["forgetting"])


def percent(row: pd.Series, score: str) -> str:
    mean, low, high = (100 * row[score + end] for end in ("", "_low", "_high"))
    return f"{mean:.1f}" if np.isnan(low) else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def expected(result: pd.DataFrame, score: str) -> dict[str, str]:
    """What the table must show for each position, and for LoRA under no position."""
    return {
        "" if np.isnan(row["position"]) else f"{row['position']:g}": percent(row, score)
        for _, row in result.dropna(subset=[score]).iterrows()
    }


def shown(explorer: VBox, column: str) -> dict[str, str]:
    return {row["position"]: row[column] for row in numbers(explorer) if row[column]}


def test_it_shows_forgetting_at_an_equal_rate_before_any_click(explorer):
    picture, bars = alts(explorer)
    assert picture.startswith("forgetting against the position of the window at equal learning rate")
    assert "with intervals over 2 seeds" in picture
    assert "cost at most 2 points of accuracy" in bars and "4 windows and methods" in bars
    assert all(png.startswith(b"\x89PNG") for png in pictures(explorer)) and shows_results(explorer)
    assert len(numbers(explorer)) == 4
    assert control(explorer, "comparison").options == (
        "equal learning rate", "own best rate", "matched accuracy", "matched update",
    )  # fmt: skip


def test_the_rate_at_first_is_the_one_that_learns_most():
    explorer = ll.widgets.comparison_explorer(simulated())
    assert control(explorer, "learning rate").value == 1e-2


@pytest.mark.parametrize(
    ("comparison", "description", "value", "words"),
    [
        ("equal learning rate", "learning rate", None, "equal learning rate 0.00"),
        ("own best rate", "score", "accuracy", "accuracy against"),
        ("matched accuracy", "accuracy to match", None, "matched accuracy"),
        ("matched update", "update to match", None, "matched update"),
        ("equal learning rate", "score", "accuracy", "accuracy against"),
        ("equal learning rate", "1", False, "over 1 seed"),
    ],
)
def test_each_control_changes_the_picture_and_its_words(explorer, comparison, description, value, words):
    control(explorer, "comparison").value = comparison
    before, said = pictures(explorer)[0], alts(explorer)[0]
    moved = control(explorer, description)
    if value is None and description == "learning rate":
        value = next(rate for rate in TRAINED if rate != moved.value)
    elif value is None:
        value = moved.max if description == "accuracy to match" else 10 ** (moved.min + 0.02)
    moved.value = value
    assert shows_results(explorer)
    assert pictures(explorer)[0] != before and alts(explorer)[0] != said and words in alts(explorer)[0]


def test_at_an_equal_rate_the_numbers_are_those_of_the_library(explorer, table):
    for rate in TRAINED:
        control(explorer, "learning rate").value = rate
        result = fair_comparison.at_equal_rate(table[table["lr"] == rate])
        assert shown(explorer, FORGETTING) == expected(result, "forgetting")
        assert shown(explorer, ACCURACY) == expected(result, "accuracy")
        assert {row["learning rate"] for row in numbers(explorer)} == {f"{rate:g}"}


def test_at_the_own_best_rate_the_numbers_are_those_of_the_library(explorer, table):
    control(explorer, "comparison").value = "own best rate"
    result = fair_comparison.at_own_best_rate(table)
    assert shown(explorer, FORGETTING) == expected(result, "forgetting")
    assert [row["rate chosen on"] for row in numbers(explorer)] == ["other seeds"] * 4


def test_with_two_seeds_or_more_the_best_rate_is_chosen_on_others():
    explorer = ll.widgets.comparison_explorer(simulated())
    control(explorer, "comparison").value = "own best rate"
    assert sentence(explorer).startswith("Each seed is judged at the rate that is best over the other seeds")
    assert {row["seeds"] for row in numbers(explorer)} == {"6"}
    table = simulated()
    alone = ll.widgets.comparison_explorer(table[table["seed"] == table["seed"].min()])
    control(alone, "comparison").value = "own best rate"
    assert "leans upwards" in sentence(alone)


def test_at_a_matched_accuracy_the_numbers_are_those_of_the_library(explorer, table, store):
    control(explorer, "comparison").value = "matched accuracy"
    accuracy = control(explorer, "accuracy to match")
    accuracy.value = accuracy.max
    result = fair_comparison.at_matched_accuracy(
        table, ll.Sweep.open(store).only(table).curves(), accuracy.max
    )
    result = result[result["most_reached"]]
    assert shown(explorer, FORGETTING) == expected(result, "forgetting")
    reached = {f"{row.reached} of {row.seeds}" for row in result.itertuples()}
    assert {row["seeds that got there"] for row in numbers(explorer)} == reached
    missed = (result["reached"] < result["seeds"]).sum()
    assert missed > 0 and f"For {missed} of 4 windows and methods not every seed" in sentence(explorer)


def test_at_a_matched_update_the_numbers_are_those_of_the_library(explorer, table, store):
    control(explorer, "comparison").value = "matched update"
    update = control(explorer, "update to match").value
    result = fair_comparison.at_matched_update(table, ll.Sweep.open(store).only(table).drifts(), update)
    assert (result["reached"] > 0).any()
    assert shown(explorer, FORGETTING) == expected(result, "forgetting")
    assert shown(explorer, ACCURACY) == expected(result, "accuracy")


def test_where_all_got_there_it_says_so(explorer):
    control(explorer, "comparison").value = "matched accuracy"
    control(explorer, "accuracy to match").value = control(explorer, "accuracy to match").min
    assert sentence(explorer) == "All seeds of all 4 windows and methods got there."


def test_the_sliders_span_what_the_runs_reached(explorer, table, store):
    curves, drifts = ll.Sweep.open(store).only(table).curves(), ll.Sweep.open(store).only(table).drifts()
    accuracy, update = (control(explorer, f"{name} to match") for name in ("accuracy", "update"))
    assert accuracy.max == pytest.approx(curves["accuracy"].max(), abs=0.01)
    assert accuracy.min == pytest.approx(curves.loc[curves["step"] == 0, "accuracy"].mean(), abs=0.01)
    relative = ll.forgetting.relative_updates(drifts)
    assert 10**update.min == pytest.approx(relative.min()) and 10**update.max == pytest.approx(relative.max())


@pytest.mark.parametrize("comparison", ["own best rate", *SETTINGS])
def test_only_the_control_of_the_chosen_comparison_can_be_moved(explorer, comparison):
    control(explorer, "comparison").value = comparison
    for name, description in SETTINGS.items():
        assert control(explorer, description).disabled == (name != comparison)
    assert control(explorer, "score").disabled == (comparison == "matched accuracy")


def test_at_a_matched_accuracy_the_score_is_what_was_forgotten(explorer):
    control(explorer, "score").value = "accuracy"
    control(explorer, "comparison").value = "matched accuracy"
    assert control(explorer, "score").value == "forgetting" and alts(explorer)[0].startswith("forgetting")


def test_without_a_store_only_what_the_table_tells_is_compared(table):
    explorer = ll.widgets.comparison_explorer(table)
    assert control(explorer, "comparison").options == ("equal learning rate", "own best rate")
    assert not {"accuracy to match", "update to match"} & {
        getattr(w, "description", "") for w in parts(explorer, Widget)
    }


def test_a_store_without_drifts_has_no_matched_update(table, store, tmp_path):
    earlier = shutil.copytree(store, tmp_path / "earlier")
    for path in (earlier / "runs").glob("*.json"):
        record = json.loads(path.read_text())
        del record["drift"]
        path.write_text(json.dumps(record))
    explorer = ll.widgets.comparison_explorer(ll.Sweep.open(earlier).only(table))
    assert control(explorer, "comparison").options == (
        "equal learning rate", "own best rate", "matched accuracy",
    )  # fmt: skip


def test_the_store_is_read_once(table, store, tmp_path):
    folder = shutil.copytree(store, tmp_path / "copy")
    explorer = ll.widgets.comparison_explorer(ll.Sweep.open(folder).only(table))
    shutil.rmtree(folder)
    for comparison in control(explorer, "comparison").options:
        control(explorer, "comparison").value = comparison
        assert shows_results(explorer)


def test_the_answer_is_that_of_the_test_of_u_shape():
    table = simulated()
    explorer = ll.widgets.comparison_explorer(table)
    for rate in RATES:
        control(explorer, "learning rate").value = rate
        assert sentence(explorer) == ll.forgetting.u_shape_test(table, rate).words
        assert sentence(explorer).startswith("A U-shape")


def test_fewer_seeds_mean_other_intervals_and_no_test():
    table = simulated()
    explorer = ll.widgets.comparison_explorer(table)
    for seed in (3, 4, 5):
        control(explorer, str(seed)).value = False
    assert "3 seeds are too few" in sentence(explorer)
    few = table[(table["seed"] < 3) & (table["lr"] == control(explorer, "learning rate").value)]
    assert shown(explorer, FORGETTING) == expected(fair_comparison.at_equal_rate(few), "forgetting")
    assert all("over 3 seeds" in words for words in alts(explorer))


def test_no_seed_is_said_in_place(explorer):
    for seed in ("0", "1"):
        control(explorer, seed).value = False
    assert "choose at least one seed" in message(explorer) and not shows_results(explorer)
    control(explorer, "0").value = True
    assert shows_results(explorer)


def test_the_tolerance_moves_the_bars_only():
    explorer = ll.widgets.comparison_explorer(simulated())
    before = pictures(explorer)
    control(explorer, TOLERANCE).value = 10  # the rates differ by 9 points of accuracy
    after = pictures(explorer)
    assert after[0] == before[0] and after[1] != before[1]
    assert "cost at most 10 points" in alts(explorer)[1]


def test_ranks_are_told_apart_and_not_tested_together():
    both = pd.concat([simulated(), simulated().assign(rank=16)])
    explorer = ll.widgets.comparison_explorer(both)
    assert {row["rank"] for row in numbers(explorer)} == {"8", "16"}
    assert sentence(explorer).startswith("No test of a U-shape: two runs at position 0")


def test_what_is_no_sweep_or_mixes_several_is_refused(table, store, tmp_path):
    with pytest.raises(ValueError, match="the table is empty"):
        ll.widgets.comparison_explorer(table.iloc[:0])
    with pytest.raises(ValueError, match="no column method, rank"):
        ll.widgets.comparison_explorer(pd.DataFrame({"a": [1]}))
    with pytest.raises(ValueError, match="share learning rate"):
        ll.widgets.comparison_explorer(pd.concat([table, table]))
    with pytest.raises(FileNotFoundError, match="holds no run"):
        ll.widgets.comparison_explorer(ll.Sweep.open(store).only(simulated()))
