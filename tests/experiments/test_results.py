from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from ipywidgets import VBox
from small_sequences import small_spectra, small_vit

import lora_lens as ll

DIGITS = Path(__file__).parents[2] / "data" / "results" / "digits.jsonl.xz"
SETTINGS = {"steps": 3, "batch_size": 16, "evaluations": 2, "jobs": 1, "progress": False}


@pytest.fixture(scope="module")
def stored() -> ll.Sweep:
    return ll.Sweep.open(DIGITS)


@pytest.fixture(scope="module")
def tasks(source, digits) -> dict:
    tasks = {"task": digits.first(32, 20), "retain": source.first(10, 20)}
    return {"model": small_vit(), "spectra": small_spectra(), **tasks, "watch": [source.first(10, 30)]}


@pytest.fixture(scope="module")
def alone_and_kept(tasks, tmp_path_factory) -> tuple[ll.Sweep, ll.Sweep]:
    """A sweep without a store, and with one."""
    grid = ll.Grid(ll.windows(4, 2), lr=1e-2)
    store = tmp_path_factory.mktemp("kept") / "s"
    return ll.sweep(grid, **tasks, **SETTINGS), ll.sweep(grid, **tasks, **SETTINGS, store=store)


@pytest.mark.parametrize("part", ["curves", "answers", "drifts", "watched"])
def test_a_sweep_without_a_store_keeps_the_same(alone_and_kept, part):
    alone, kept = alone_and_kept
    opened = ll.Sweep.open(kept.path).only(kept.table)
    pd.testing.assert_frame_equal(alone.table, kept.table)
    for sweep in (kept, opened):
        pd.testing.assert_frame_equal(getattr(alone, part)(), getattr(sweep, part)())
    assert alone.path is None and (kept.path / "runs").is_dir()
    assert alone.experiment == kept.experiment == opened.experiment


def test_some_of_the_runs_are_chosen_by_a_query_a_mask_or_rows(stored):
    rows = stored.table[stored.table["position"] == 0.5]
    for given in ("position == 0.5", stored.table["position"] == 0.5, rows):
        some = stored.only(given)
        pd.testing.assert_frame_equal(some.table, rows)
        assert set(some.curves()["run"]) == set(rows["run"])
    assert len(stored.only("lr == 0.005").only("seed == 0")) < len(stored.only("lr == 0.005"))
    with pytest.raises(ValueError, match=r"no run of <Sweep: .* fits 'seed == 77'"):
        stored.only("seed == 77")


def test_what_is_kept_comes_in_the_order_of_the_table(stored):
    backwards = stored.only(stored.table[::-1])
    assert backwards.curves()["run"].drop_duplicates().tolist() == backwards.table["run"].tolist()


def test_fair_comparisons_are_those_of_the_library(stored):
    table, forgetting = stored.table, ll.forgetting
    at_rate = forgetting.at_equal_rate(table[table["lr"] == 0.005])
    pd.testing.assert_frame_equal(stored.fair(lr=0.005), at_rate)
    pd.testing.assert_frame_equal(stored.fair(), forgetting.at_own_best_rate(table))
    matched = forgetting.at_matched_accuracy(table, stored.curves(), 0.8)
    pd.testing.assert_frame_equal(stored.fair(accuracy=0.8), matched)
    moved = forgetting.at_matched_update(table, stored.drifts(), 0.1)
    pd.testing.assert_frame_equal(stored.fair(update=0.1), moved)
    with pytest.raises(ValueError, match="at one of lr, accuracy and update, not at lr, update"):
        stored.fair(lr=0.005, update=0.1)
    assert stored.best().window == ll.experiments.advise_from(table).window


def test_in_a_cell_a_sweep_is_a_picture_and_a_short_table(stored):
    shown = stored._repr_html_()
    assert shown.count("<img alt=") == 1 and shown.count("<tr") <= 16 and "where most is learnt" in shown
    assert repr(stored) == (
        f"<Sweep: {len(stored)} runs; 9 windows; 8 random components, seed 0, LoRA; 4 learning rates; "
        f"5 seeds; {DIGITS}>"
    )
    lost = stored.table.assign(failed=True, reason="no memory")
    assert "All runs failed" in stored.only(lost)._repr_html_()


def test_plots_explorers_and_reports_take_a_sweep(stored, tmp_path):
    some = stored.only("lr == 0.005")
    assert ll.plots.tradeoff(some).get_xlabel() == ll.plots.tradeoff(some.table).get_xlabel()
    assert isinstance(some.explore(), VBox)
    assert some.report(tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_a_table_alone_is_refused_where_more_is_needed(stored):
    with pytest.raises(TypeError, match=r"sweep must be an ll\.Sweep, .*its table alone has no curves"):
        ll.widgets.pair_explorer(stored.table)


def test_sequences_of_tasks_are_no_sweep():
    split = DIGITS.with_name("split_fashion.jsonl.xz")
    with pytest.raises(ValueError, match=r"open them with ll\.experiments\.ContinualSweep"):
        ll.Sweep.open(split)
    found = ll.experiments.ContinualSweep.open(split)
    assert "sequences; " in repr(found) and len(repr(found)) < 200
    assert "<table" in found._repr_html_()
    pd.testing.assert_frame_equal(found.scores(), ll.experiments.continual.continual_scores(found.table))
    assert isinstance(ll.widgets.continual_explorer(found, found.drifts()), VBox)
