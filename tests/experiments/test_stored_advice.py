from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp

import lora_lens as ll
from lora_lens.experiments.stored_advice import BEST, MIDDLE, OWN_RATE, evidence

ROOT = Path(__file__).parents[2]
RULES = pd.read_csv(ROOT / "data" / "results" / "rules.csv")


def advised(**named: object) -> ll.experiments.Advice:
    model = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    examples = ll.Examples(torch.randn(4, 16), torch.arange(4) % 2)
    task = ll.Task("noise", ("even", "odd"), examples, examples)
    return ll.advise(**{"model": model, "task": task, "retain": task} | named)


def test_the_evidence_is_what_the_comparison_of_rules_found():
    shown = evidence()
    found = RULES.set_index(["goal", "rule"]).loc[list(zip(shown["goal"], shown["rule"], strict=True))]
    pd.testing.assert_frame_equal(shown, found.reset_index()[list(shown)], check_dtype=False, atol=5e-5)


def test_no_rule_that_needs_no_run_has_less_regret_than_the_advice():
    needs_no_run = r"(window [\d.]+|LoRA|LoRA, L2 .*), ([\d.]+|rate of others)|best fixed.*|ridge on rate.*"
    free = RULES[RULES["rule"].str.fullmatch(needs_no_run)]
    for goal, rules in free.groupby("goal"):
        assert len(rules) > 7
        assert rules.loc[rules["regret"].idxmin(), "rule"] == BEST, goal


def test_its_value_is_the_gain_over_the_middle_window():
    advice = advised(rank=4)
    kept = RULES[(RULES["goal"] == "kept") & (RULES["rule"] == BEST)].iloc[0]
    assert advice.value == pytest.approx(-kept["difference"], abs=5e-5)
    assert advice.interval == pytest.approx((-kept["high"], -kept["low"]), abs=5e-5)
    assert advice.interval[0] <= advice.value <= advice.interval[1]
    assert (advice.rank, advice.rule, advice.window) == (4, "stored", None)
    assert {BEST, MIDDLE, OWN_RATE} <= set(advice.evidence["rule"])


def test_it_fits_on_a_few_lines_and_says_how_sure_it_is():
    shown = repr(advised())
    lines = shown.splitlines()
    assert len(lines) <= 8 and max(map(len, lines)) <= 110
    assert lines[0] == "Advice(LoRA of rank 8, L2 to initial 0.01, lr=0.005, rule='stored')"
    for part in ("no window", "95% interval", " of 5, p = ", "after Holm", "Nothing was trained"):
        assert part in shown.replace("\n", " ")


def test_the_advice_can_be_attached_and_swept_as_it_is(patch_vit, source, digits):
    task, retain = digits.first(40, 10), source.first(40, 10)
    advice = ll.advise(patch_vit, task, retain, rank=2)
    assert ll.summary(ll.attach(patch_vit, advice.method))["rank"].tolist()
    grid = ll.Grid(lr=advice.lr, baselines=[advice.method])
    short = {"steps": 1, "batch_size": 8, "jobs": 1, "progress": False}
    swept = ll.sweep(grid, model=patch_vit, task=task, retain=retain, **short)
    assert swept.table["method"].tolist() == [str(advice.method)]


def test_what_cannot_be_advised_is_refused():
    with pytest.raises(ValueError, match="advice needs the task that the model knows"):
        advised(retain=None)
    with pytest.raises(TypeError, match="retain must be a task"):
        advised(retain=[1])
    with pytest.raises(ValueError, match="rank must be at least 1"):
        advised(rank=0)
    with pytest.raises(ValueError, match="nothing"):
        advised(targets="nothing")


# data/compare_rules.py


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    return importlib.import_module("compare_rules")


def runs(cells: dict[tuple[str, float], list[tuple[float, float]]]) -> pd.DataFrame:
    """From (accuracy, forgetting) over seeds by (cell, rate); half is retained before."""
    rows = []
    for (cell, lr), scores in cells.items():
        position = float(cell.removeprefix("window ")) if cell.startswith("window") else np.nan
        for seed, (accuracy, forgetting) in enumerate(scores):
            row = {"cell": cell, "lr": lr, "position": position, "seed": seed, "accuracy": accuracy}
            rows.append(row | {"forgetting": forgetting, "retained_before": 0.5, "cka_loss": accuracy / 2})
    return pd.DataFrame(rows)


def test_only_what_is_forgotten_beyond_two_points_costs(rules):
    one = rules.Setting.of("s", "f", runs({("LoRA", 5e-3): [(0.8, 0.02), (0.7, -0.1), (0.9, 0.12)]}), "kept")
    np.testing.assert_allclose(one.values, [[0.8, 0.7, 0.8]])


def test_an_area_is_of_the_rates_that_all_cells_have(rules):
    table = runs(
        {
            ("LoRA", 5e-3): [(0.8, 0.1)] * 2,
            ("LoRA", 1e-2): [(0.9, 0.2)] * 2,
            ("window 0.5", 5e-3): [(0.6, 0.0)] * 2,
        }
    )
    both = rules.Setting.of("s", "f", table, "area")
    np.testing.assert_allclose(both.values, [[0.8 * 0.8] * 2, [0.6] * 2])
    both = rules.Setting.of("s", "f", table[table["cell"] == "LoRA"], "area")
    np.testing.assert_allclose(both.values, [[0.8 * 0.8 + 0.1 * 0.6] * 2])


def test_regret_is_to_the_cell_that_is_best_on_the_other_seeds(rules):
    scores = {("LoRA", 5e-3): [0.9, 0.5, 0.5], ("window 0.5", 5e-3): [0.6, 0.7, 0.3]}
    table = runs({cell: [(a, 0.0) for a in found] for cell, found in scores.items()})
    setting = rules.Setting.of("s", "f", table, "kept")
    # Best without seed 0: 0.5 and 0.5, the first of equals; without 1: LoRA; without 2: LoRA.
    np.testing.assert_allclose(setting.regret(rules.fixed("window 0.5", 5e-3)), [0.3, -0.2, 0.2])
    np.testing.assert_allclose(setting.regret(rules.fixed("LoRA", 5e-3)), [0, 0, 0])
    assert np.isnan(setting.regret(rules.fixed("window 1", 5e-3))).all()


def test_a_rate_that_is_not_stored_is_the_nearest(rules):
    table = runs({("LoRA", lr): [(0.5 + 10 * lr, 0.0)] * 2 for lr in (1e-3, 3e-3, 1e-2)})
    setting = rules.Setting.of("s", "f", table, "kept")
    for asked, taken in ((5e-3, 3e-3), (6e-3, 1e-2), (1e-5, 1e-3), (1.0, 1e-2)):
        place = rules.fixed("LoRA", asked)(setting.seen[0])
        assert setting.seen[0]["x"][place] == pytest.approx(np.log(taken / 5e-3))


def test_what_a_rule_leaves_open_is_chosen_by_the_other_families(rules):
    def setting(name: str, family: str, at_low: float) -> object:
        cells = {("LoRA", 2e-3): [(at_low, 0.0)] * 2, ("LoRA", 1e-2): [(0.5, 0.0)] * 2}
        return rules.Setting.of(name, family, runs(cells), "kept")

    three = [setting("a", "one", 0.9), setting("b", "one", 0.9), setting("c", "two", 0.1)]
    found = rules.left_out(three, [rules.fixed("LoRA", 2e-3), rules.fixed("LoRA", 1e-2)])
    # Each family takes the rate that suits the other: 0.4 lost in both.
    assert {name: r.tolist() for name, r in found.items()} == pytest.approx(
        {name: pytest.approx([0.4, 0.4]) for name in "abc"}
    )


def test_measures_thresholds_and_own_sweeps(rules):
    cells = {("window 0", 5e-3): [(0.9, 0.3)] * 2, ("window 1", 5e-3): [(0.6, 0.0)] * 2}
    setting = rules.Setting.of("s", "f", runs(cells | {("LoRA", 5e-3): [(0.8, 0.1)] * 2}), "kept")
    cells = setting.seen[0]
    named = cells["cell"].tolist()
    assert named[rules.extreme("cka_loss", 1, 5e-3)(cells)] == "window 0"
    assert named[rules.extreme("cka_loss", -1, 5e-3)(cells)] == "window 1"
    assert rules.extreme("rotation", 1, 5e-3)(cells) is None
    assert named[rules.threshold("cka_loss", 1, 0.41)(cells)] == "LoRA"
    assert named[rules.threshold("cka_loss", -1, 0.41)(cells)] == "window 0"
    assert named[rules.threshold("cka_loss", 1, 0.1)(cells)] == "window 1"  # none: the nearest
    assert named[rules.own_sweep("windows")(cells)] == "window 0"  # 0.62 against 0.6
    assert named[rules.own_sweep("LoRA")(cells)] == "LoRA"


def test_a_regression_finds_the_rate_that_is_best_elsewhere(rules):
    cells = {("LoRA", lr): [(0.9 - abs(np.log(lr / 5e-3)) / 10, 0.0)] * 2 for lr in (1e-3, 5e-3, 2e-2)}
    settings = [rules.Setting.of(name, name, runs(cells), "kept") for name in "ab"]
    choice = rules.ridge(settings[:1], measures=False)
    assert settings[1].seen[0]["x"][choice(settings[1].seen[0])] == 0


def test_differences_are_paired_and_their_intervals_hold_them(rules):
    middle = {"a": np.array([0.1, 0.2, 0.3]), "b": np.array([0.2, 0.2]), "c": np.array([0.0, 0.1])}
    own = {"a": middle["a"] - 0.1, "b": middle["b"] - 0.2}
    row = rules.compared(own, middle, {"a": "one", "b": "two", "c": "three"})
    assert (row["families"], row["settings"], row["better"]) == (2, 2, 2)
    assert row["regret"] == pytest.approx((0.1 + 0.0) / 2)
    assert row["difference"] == pytest.approx(-0.15)
    assert (row["low"], row["high"]) == pytest.approx(ll.forgetting.seed_interval([-0.1, -0.2]))
    assert row["p"] == pytest.approx(ttest_1samp([-0.1, -0.2], 0).pvalue)
    assert np.isnan(rules.compared(middle, middle, {"a": "one", "b": "two", "c": "three"})["p"])
