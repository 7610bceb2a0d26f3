from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

import lora_lens as ll
from lora_lens.experiments.advisor import advise_from


def swept(values: dict[tuple[float | None, float], list[float]]) -> pd.DataFrame:
    """A table from values over seeds, by (position, rate), all of it accuracy; position None is LoRA."""
    rows = []
    for (position, lr), scores in values.items():
        method = "LoRA" if position is None else "window"
        for seed, score in enumerate(scores):
            rows.append(
                {"method": method, "rank": 8, "position": position, "start": None, "lr": lr, "seed": seed,
                 "steps": 120, "accuracy": score, "forgetting": 0.0}
            )  # fmt: skip
    return pd.DataFrame(rows).astype({"position": float})


def test_the_highest_mean_value_is_recommended():
    table = swept({(0.0, 1e-2): [0.5, 0.6], (0.5, 1e-3): [0.7, 0.8], (0.5, 1e-2): [0.8, 0.9]})
    advice = advise_from(table)
    assert (advice.window, advice.rank, advice.lr) == (ll.Window.middle(8), 8, 1e-2)
    assert advice.value == pytest.approx(0.85)
    assert advice.interval == pytest.approx(ll.forgetting.seed_interval([0.8, 0.9]))
    assert advice.rule == "sweep"
    assert "window of rank 8 at position 0.5 with learning rate 0.01: value 0.850" in advice.words
    assert "accuracy - 1 * forgetting" in advice.words
    assert "chosen on the same seeds, so the value leans upwards" in advice.words
    assert advice.evidence["value"].tolist() == pytest.approx([0.85, 0.75, 0.55])
    assert advice.evidence["difference"].tolist() == pytest.approx([0, -0.1, -0.3])
    assert advice.evidence["recommended"].tolist() == [True, False, False]


def test_windows_by_start_are_recommended_by_start():
    table = swept({(0.0, 1e-2): [0.5], (1.0, 1e-2): [0.6]})
    table["start"], table["position"] = table["position"].map({0.0: 3, 1.0: 40}), np.nan
    assert advise_from(table).window == ll.Window(8, start=40)


def test_the_weight_says_what_forgetting_costs():
    table = swept({(0.0, 1e-2): [0.9], (1.0, 1e-2): [0.8]})
    table["forgetting"] = [0.15, 0.1]
    assert advise_from(table).window == ll.Window.first(8)  # 0.75 against 0.7
    assert advise_from(table).value == pytest.approx(0.75)
    assert advise_from(table, weight=4).window == ll.Window.last(8)  # 0.3 against 0.4
    assert advise_from(table, weight=4).value == pytest.approx(0.4)
    assert "accuracy - 4 * forgetting" in advise_from(table, weight=4).words


def test_the_choice_is_made_on_half_of_the_seeds_and_told_by_the_others():
    table = swept({(0.0, 1e-2): [0.9, 0.9, 0.1, 0.3], (1.0, 1e-2): [0.5, 0.5, 0.8, 0.8]})
    advice = advise_from(table)
    assert advice.window == ll.Window.first(8)
    assert advice.value == pytest.approx(0.2)
    assert "chosen on other seeds" in advice.words
    assert advice.evidence["recommended"].tolist() == [False, True]
    assert advice.evidence["seeds"].tolist() == [2, 2]


def test_choosing_on_other_seeds_takes_the_winner_s_curse_away():
    random = np.random.default_rng(0)
    told = {3: [], 6: []}
    for _ in range(40):
        for seeds, found in told.items():
            noise = random.normal(0.5, 0.1, size=(8, seeds))
            table = swept(
                {(position, 1e-2): list(noise[i]) for i, position in enumerate(np.linspace(0, 1, 8))}
            )
            found.append(advise_from(table).value)
    assert np.mean(told[3]) > 0.55  # the best of eight, told by the seeds that chose it
    assert np.mean(told[6]) == pytest.approx(0.5, abs=0.03)


def test_only_what_differs_beyond_the_seeds_is_told_apart():
    table = swept(
        {
            (0.0, 1e-2): [0.30, 0.41, 0.50],
            (0.5, 1e-2): [0.70, 0.80, 0.90],
            (1.0, 1e-2): [0.60, 0.82, 0.91],
        }
    )
    advice = advise_from(table)
    by_position = advice.evidence.set_index("position")
    assert by_position["apart"].to_dict() == {0.0: True, 0.5: False, 1.0: False}
    # differences -0.40, -0.39, -0.40: t(0.975, 2) = 4.3027, sd = 0.0057735, so +- 0.014342
    assert by_position.loc[0.0, "difference_low"] == pytest.approx(-0.396667 - 0.014342, abs=1e-5)
    assert by_position.loc[0.0, "difference_high"] == pytest.approx(-0.396667 + 0.014342, abs=1e-5)
    assert "cannot be told apart from 1 of the 2 others: the window of rank 8 at position 1" in advice.words


def test_one_seed_tells_nothing_apart():
    advice = advise_from(swept({(0.0, 1e-2): [0.1], (1.0, 1e-2): [0.9]}))
    assert not advice.evidence["apart"].any()
    assert np.isnan(advice.interval).all()
    assert "1 seed, so there is no interval" in advice.words


def test_other_methods_are_compared_and_not_recommended():
    table = swept({(0.5, 1e-2): [0.7, 0.8], (None, 1e-2): [0.9, 0.9], (None, 1e-3): [0.1]})
    advice = advise_from(table)
    assert advice.window == ll.Window.middle(8)
    assert advice.evidence["method"].tolist() == ["LoRA", "window", "LoRA"]
    assert advice.evidence["seeds"].tolist() == [2, 2, 1]
    assert "LoRA with learning rate 0.01" in advice.words


def test_seeds_that_are_not_complete_take_no_part():
    table = swept({(0.0, 1e-2): [0.5, 0.5, 0.9], (1.0, 1e-2): [0.6, 0.6]})
    advice = advise_from(table)
    assert advice.window == ll.Window.last(8)
    assert advice.evidence["seeds"].tolist() == [2, 2]


@settings(max_examples=30, deadline=None)
@given(st.permutations([0.1, 0.25, 0.4, 0.55]), st.floats(-0.1, 0.4))
def test_a_shift_of_all_values_changes_the_value_alone(scores, shift):
    def table(by: float) -> pd.DataFrame:
        positions = enumerate(np.linspace(0, 1, 4))
        return swept({(p, 1e-2): [scores[i] + by, scores[i] + by + 0.01 * i] for i, p in positions})

    here, there = advise_from(table(0)), advise_from(table(shift))
    assert here.window == there.window
    assert there.value == pytest.approx(here.value + shift)
    np.testing.assert_allclose(here.evidence["difference"], there.evidence["difference"], atol=1e-12)


def test_tables_that_allow_no_advice_are_refused():
    table = swept({(0.0, 1e-2): [0.5, 0.6], (1.0, 1e-2): [0.7, 0.8]})
    for weight in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"weight must be 0 or more, not {weight}"):
            advise_from(table, weight=weight)
    with pytest.raises(ValueError, match="the table has no column forgetting"):
        advise_from(table.drop(columns="forgetting"))
    with pytest.raises(ValueError, match="the table has no windows to recommend"):
        advise_from(swept({(None, 1e-2): [0.5]}))
    with pytest.raises(
        ValueError, match=r"position 0 with learning rate 0.01 have seed 0; pass the runs of one"
    ):
        advise_from(pd.concat([table, table.iloc[:1]]))
    with pytest.raises(ValueError, match=r"the windows differ in steps \(120, 480\)"):
        advise_from(pd.concat([table, table.assign(steps=480)]))
    with pytest.raises(ValueError, match="no seed was run with every window and rate"):
        advise_from(table.drop([0, 3]))
