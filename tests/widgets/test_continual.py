"""The explorer of continual learning, on short real sequences and on made-up ones."""

from __future__ import annotations

from html import unescape

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from continual_tables import forgetful, sequence, together
from explored import alts, control, message, numbers, parts, pictures, sentence, shows_results
from ipywidgets import VBox, Widget
from small_sequences import SETTINGS, pairs, retained, small_spectra, small_vit

import lora_lens as ll
from lora_lens.experiments.continual.metrics import SCORES, continual_scores, score_means
from lora_lens.experiments.continual.strategies import Joint, Merged

METHOD = "strategy and method"
ORDERS = [(0, 1, 2), (2, 0, 1)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table and drifts of few short real sequences: windows and LoRA at two rates, and joint training."""
    store = tmp_path_factory.mktemp("sequences") / "store"
    fast = SETTINGS | {"retain": retained(), "spectra": small_spectra(), "store": store}
    tasks, lora = pairs()[:3], ll.LoRA(4)
    windows = ll.Grid(ll.windows(4, 3), lr=[2e-2], seed=(0, 1))
    ll.experiments.continual_sweep(small_vit(), tasks, Merged(), windows, orders=ORDERS, **fast)
    ll.experiments.continual_sweep(
        small_vit(), tasks, Merged(), ll.Grid(lr=[1e-3, 2e-2], baselines=[lora]), **fast
    )
    ll.experiments.continual_sweep(small_vit(), tasks, Joint(), ll.Grid(lr=[2e-2], baselines=[lora]), **fast)
    table = ll.experiments.ContinualSweep.open(store).table
    return table, ll.experiments.ContinualSweep.open(store).only(table).drifts()


@pytest.fixture
def table(results) -> pd.DataFrame:
    return results[0]


@pytest.fixture
def explorer(results) -> VBox:
    return ll.widgets.continual_explorer(*results)


@pytest.fixture
def without_drifts(table) -> VBox:
    return ll.widgets.continual_explorer(table)


def windows_and_lora() -> pd.DataFrame:
    """Windows at three positions in two orders with two seeds, and one run of LoRA."""
    runs = [
        forgetful(0.7 + 0.01 * seed, 0.1 + 0.1 * position, position=position, order=order, seed=seed)
        for position in (0.0, 0.5, 1.0)
        for order in ORDERS
        for seed in (0, 1)
    ]
    return pd.concat([*runs, forgetful(0.7, 0.2, method="LoRA", position=np.nan)], ignore_index=True)


def shown(explorer: VBox) -> dict[str, str]:
    return {row["score"]: row["percent [95% interval]"] for row in numbers(explorer)}


def expected(table: pd.DataFrame) -> dict[str, str]:
    means, texts = score_means(continual_scores(table)).iloc[0], {}
    for score in SCORES:
        mean, low, high = (100 * means[score + end] for end in ("", "_low", "_high"))
        if not np.isnan(mean):
            interval = "" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]"
            texts[score.replace("_", " ")] = f"{mean:.1f}{interval}"
    return texts


def test_it_shows_the_middle_window_before_any_click(explorer, table):
    heat, time, weights = alts(explorer)
    assert heat.startswith("accuracy on every task after each was learnt, merged: window at 0.5; at the end")
    assert "merged: window at 0.5" in time and weights.startswith(
        "how far the weights moved and how the first"
    )
    assert all(png.startswith(b"\x89PNG") for png in pictures(explorer)) and shows_results(explorer)
    assert control(explorer, METHOD).value == "merged: windows"
    offered = [label for label, _ in control(explorer, METHOD).options]
    assert offered == ["joint: LoRA", "merged: LoRA", "merged: windows"]
    assert sentence(explorer).startswith("Means over 4 runs, 2 orders and 2 seeds. The places are those of")


def test_the_numbers_are_those_of_the_library(without_drifts, table):
    for position in (0.0, 1.0):
        control(without_drifts, "position").value = position
        assert shown(without_drifts) == expected(table[table["position"] == position])
    control(without_drifts, "order").value = "2 0 1"
    chosen = table[(table["position"] == 1) & (table["order"] == "2 0 1")]
    assert shown(without_drifts) == expected(chosen)
    control(without_drifts, "seed").value = 1
    assert shown(without_drifts) == expected(chosen[chosen["seed"] == 1])
    assert "[" not in shown(without_drifts)["average accuracy"]


def test_the_words_for_the_heat_map_tell_its_last_row(without_drifts, table):
    assert len(pictures(without_drifts)) == 2 and "followed" not in sentence(without_drifts)  # no weights
    control(without_drifts, "order").value, control(without_drifts, "seed").value = "0 1 2", 0
    run = table[(table["position"] == 0.5) & (table["order"] == "0 1 2") & (table["seed"] == 0)]
    last = run[run["after"] == 3].sort_values("place")["accuracy"]
    assert alts(without_drifts)[0].endswith(
        "in percent: " + ", ".join(f"{100 * value:.0f}" for value in last)
    )


def test_one_order_is_told_task_by_task(without_drifts):
    names = [task.name for task in pairs()[:3]]
    control(without_drifts, "order").value = "2 0 1"
    told = "; ".join(names[number] for number in (2, 0, 1))
    assert (
        sentence(without_drifts) == f"Means over 2 runs, 1 order and 2 seeds. Learnt in this order: {told}."
    )
    control(without_drifts, "seed").value = 0
    assert sentence(without_drifts) == f"Learnt in this order: {told}."


def test_each_control_changes_the_pictures(explorer):
    changes = {"position": 1.0, "order": "2 0 1", "seed": 1, METHOD: "merged: LoRA"}
    for description, value in changes.items():
        before = pictures(explorer), numbers(explorer)
        control(explorer, description).value = value
        assert shows_results(explorer)
        assert pictures(explorer)[:2] != before[0][:2] and pictures(explorer)[0] != before[0][0]
        assert numbers(explorer) != before[1]
        # The picture of the weights has the windows of all positions.
        assert (pictures(explorer)[2] == before[0][2]) == (description == "position")


def test_at_first_the_rate_is_the_one_that_learns_most(table):
    rows = table[(table["strategy"] == "merged") & (table["method"] == "LoRA")]
    explorer = ll.widgets.continual_explorer(rows)
    rate = control(explorer, "learning rate")
    assert rate.value == continual_scores(rows).set_index("lr")["average_accuracy"].idxmax()
    for lr in (1e-3, 2e-2):
        rate.value = lr
        assert shown(explorer) == expected(rows[rows["lr"] == lr])


def test_a_rate_is_kept_where_another_method_has_it(without_drifts):
    control(without_drifts, METHOD).value = "merged: LoRA"
    rate = control(without_drifts, "learning rate")
    assert rate.value == 2e-2 and not rate.disabled
    rate.value = 1e-3
    control(without_drifts, METHOD).value = "merged: windows"
    assert rate.value == 2e-2 and rate.disabled


def test_the_position_can_be_moved_for_windows_only_and_is_kept_meanwhile(explorer):
    position = control(explorer, "position")
    position.value = 1.0
    control(explorer, METHOD).value = "merged: LoRA"
    assert position.disabled and alts(explorer)[2] == "how far the weights moved, task by task, merged: LoRA"
    control(explorer, METHOD).value = "merged: windows"
    assert not position.disabled and position.value == 1.0 and "window at 1;" in alts(explorer)[0]


def test_choices_that_a_method_lacks_fall_back_to_all(without_drifts):
    control(without_drifts, "order").value, control(without_drifts, "seed").value = "2 0 1", 1
    control(without_drifts, METHOD).value = "merged: LoRA"
    assert control(without_drifts, "order").label == control(without_drifts, "seed").label == "all"
    assert [label for label, _ in control(without_drifts, "order").options] == ["all", "0 1 2"]
    assert shows_results(without_drifts)


def test_joint_training_has_scores_of_its_end_and_no_weights(explorer, table):
    control(explorer, METHOD).value = "joint: LoRA"
    assert len(pictures(explorer)) == 2 and "were not followed" in sentence(explorer)
    assert shown(explorer) == expected(table[table["strategy"] == "joint"])
    assert "average forgetting" not in shown(explorer)
    control(explorer, METHOD).value = "merged: windows"
    assert len(pictures(explorer)) == 3 and "followed" not in sentence(explorer)


def test_settings_are_told_apart_and_bring_their_own_methods():
    classes = forgetful(0.4, 0.5, setting="class-incremental", method="LoRA", position=np.nan)
    explorer = ll.widgets.continual_explorer(pd.concat([windows_and_lora(), classes]))
    setting = control(explorer, "setting")
    assert setting.value == "task-incremental" and not setting.disabled
    setting.value = "class-incremental"
    assert control(explorer, METHOD).value == "merged: LoRA" and control(explorer, METHOD).disabled
    assert control(explorer, "position").disabled
    assert shown(explorer) == expected(classes)


def test_ranks_are_told_apart():
    both = pd.concat([windows_and_lora(), forgetful(0.9, 0.0, rank=4)])
    explorer = ll.widgets.continual_explorer(both)
    choice = control(explorer, METHOD)
    choice.value = "merged: windows of rank 4"
    assert shown(explorer)["average accuracy"] == "90.0"
    assert {"merged: windows of rank 8", "merged: LoRA of rank 8"} < {label for label, _ in choice.options}


def test_a_window_without_a_position_is_a_method_of_its_own():
    given = forgetful(0.6, 0.1, position=np.nan, start=3)
    explorer = ll.widgets.continual_explorer(pd.concat([windows_and_lora(), given]))
    control(explorer, METHOD).value = "merged: window from 3"
    assert control(explorer, "position").disabled and shown(explorer) == expected(given)


def test_what_was_not_run_is_said_in_place_until_another_choice():
    table = windows_and_lora()
    missing = (table["order"] == "2 0 1") & (table["seed"] == 1) & (table["position"] == 0.5)
    explorer = ll.widgets.continual_explorer(table[~missing])
    control(explorer, "order").value = "2 0 1"
    control(explorer, "seed").value = 1
    said = "merged: windows was not run with order 2 0 1 and seed 1"
    assert said in unescape(message(explorer)) and not shows_results(explorer)
    control(explorer, "position").value = 1.0
    assert shows_results(explorer)


def test_what_diverged_is_said():
    table = windows_and_lora()
    bad = table["run"] == table.loc[table["position"] == 0.5, "run"].iloc[0]
    explorer = ll.widgets.continual_explorer(table.assign(diverged=bad))
    assert sentence(explorer).endswith(" 1 run diverged.")
    control(explorer, "position").value = 0.0
    assert "diverged" not in sentence(explorer)


def test_a_change_draws_once(without_drifts, monkeypatch):
    drawn, draw = [], ll.plots.accuracy_heatmap
    monkeypatch.setattr(ll.plots, "accuracy_heatmap", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    control(without_drifts, "position").value = 0.0
    control(without_drifts, METHOD).value = "merged: LoRA"  # brings other rates, orders and seeds
    control(without_drifts, METHOD).value = "joint: LoRA"
    assert len(drawn) == 3


def test_moves_leave_no_figure_open_and_the_style_alone(explorer):
    style, figures = dict(plt.rcParams), plt.get_fignums()
    for position in (0.0, 0.5, 1.0):
        control(explorer, "position").value = position
    assert plt.get_fignums() == figures and dict(plt.rcParams) == style


def test_every_control_has_a_name_and_waits_for_the_hand_to_stop(without_drifts):
    controls = [
        w for w in parts(without_drifts, Widget) if hasattr(w, "description") and hasattr(w, "disabled")
    ]
    assert len(controls) == 6 and all(c.description for c in controls)
    assert control(without_drifts, "position").continuous_update is False


def test_what_is_no_table_of_sequences_is_refused(table):
    with pytest.raises(ValueError, match="the table is empty"):
        ll.widgets.continual_explorer(table.iloc[:0])
    with pytest.raises(ValueError, match="no column run, strategy"):
        ll.widgets.continual_explorer(pd.DataFrame({"a": [1]}))
    with pytest.raises(ValueError, match="should have one row for each"):
        ll.widgets.continual_explorer(table.iloc[1:])
    mixed = sequence([[0.9, np.nan, np.nan], [0.8, 0.9, np.nan], [0.7, 0.8, 0.9]], [0.9] * 4, steps=7)
    with pytest.raises(ValueError, match="differ in steps"):
        ll.widgets.continual_explorer(pd.concat([forgetful(0.8, 0.1, seed=1), mixed]))


def test_drifts_of_other_runs_are_refused(results):
    table, drifts = results
    with pytest.raises(ValueError, match="none of the table's runs has a drift"):
        ll.widgets.continual_explorer(together(0.8), drifts)
    with pytest.raises(ValueError, match="no column update"):
        ll.widgets.continual_explorer(table, drifts.drop(columns="update"))
