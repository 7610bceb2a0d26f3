"""Sentences made from tables; those of the notebooks are in ``tests/course/test_notebook_sentences.py``."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import lora_lens as ll

RESULTS = Path(__file__).parents[2] / "data" / "results"


def test_runs_that_cannot_be_told_apart_are_refused():
    stored = ll.Sweep.open(RESULTS / "digits.jsonl.xz").only("lr >= 0.005 and lr <= 0.01").table
    with pytest.raises(
        ValueError, match=r"two runs of the window at 0 share learning rate 0\.005 and seed 0; keep"
    ):
        windows = stored[stored["position"] == 0].sort_values(["lr", "seed"])
        ll.reports.by_seed(
            pd.concat([windows, windows.assign(run=windows["run"] + "b", rank=4)]), "forgetting"
        )
    forgetting = ll.reports.by_seed(stored, "forgetting")
    with pytest.raises(ValueError, match="keep the rates that both have"):
        ll.reports.at_each_rate(forgetting[0.0], forgetting[0.5].drop(columns=0.01))


def test_seeds_are_paired_by_number_and_one_alone_decides_nothing():
    one, other = pd.Series({0: 0.1, 1: 0.5, 2: 0.9}), pd.Series({2: 0.8, 1: 0.4, 0: 0.05})
    assert ll.reports.more_or_less(one, other) == "more"
    assert ll.reports.more_or_less(other, one) == "less"
    assert ll.reports.more_or_less(one, one) == "neither clearly more nor less"
    assert ll.reports.more_or_less(one[:1], other[2:]) == "neither clearly more nor less"
    assert ll.reports.more_or_less(one, other[:1]) == "neither clearly more nor less"
    assert ll.reports.more_or_less(one, list(other[::-1])) == "more"
    for unpaired in (other.rename({0: 7, 1: 8, 2: 9}), list(other[:2])):
        with pytest.raises(ValueError, match="no pairs; give a value of each for the same seeds"):
            ll.reports.more_or_less(one, unpaired)
    assert ll.reports.points([0.92, 0.931]) == str(pd.Series([0.92, 0.931]).mul(100).mean().round(1))


def test_an_interval_has_two_ends_with_signs():
    assert ll.reports.interval((-0.00001, 0.0624)) == "+0.0 to +6.2"
    with pytest.raises(ValueError, match="shares must be the two ends of an interval, not"):
        ll.reports.interval((0.1, 0.2, 0.3))
