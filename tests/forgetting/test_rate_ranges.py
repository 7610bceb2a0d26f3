from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sweep_tables import runs

from lora_lens.forgetting.rate_ranges import rate_robustness

unit = st.floats(0, 1, allow_nan=False)


def test_the_range_of_good_rates_and_the_collapse_of_a_known_table():
    means = {0.1: 0.89, 0.2: 0.5, 0.4: 0.88, 0.8: 0.9, 1.6: 0.885, 3.2: 0.6, 6.4: 0.44, 12.8: 0.1}
    row = rate_robustness(runs({(0.5, lr): [a, a] for lr, a in means.items()})).iloc[0]
    assert (row["best_lr"], row["lowest"], row["highest"], row["collapse"]) == (0.8, 0.4, 1.6, 6.4)
    assert row["octaves"] == row["octaves_low"] == row["octaves_high"] == pytest.approx(2)
    assert (row["seeds"], row["rates"], row["accuracy"]) == (2, 8, pytest.approx(0.9))
    assert not row["at_grid_end"]


def test_a_best_rate_at_the_end_of_the_grid_is_marked_and_has_no_collapse():
    row = rate_robustness(runs({(0.5, 0.1): [0.2], (0.5, 0.2): [0.9]}), tolerance=0).iloc[0]
    assert row["at_grid_end"] and np.isnan(row["collapse"]) and row["octaves"] == 0
    assert np.isnan(row["octaves_low"]) and np.isnan(row["accuracy_low"])
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        rate_robustness(runs({(0.5, 0.1): [0.2]}), tolerance=-1)


@given(st.lists(st.lists(unit, min_size=4, max_size=4), min_size=2, max_size=4), st.floats(0, 0.5))
@settings(max_examples=40, deadline=None)
def test_the_range_widens_with_the_tolerance_and_holds_the_best_rate(scores, tolerance):
    table = runs({(0.5, 2.0**i): values for i, values in enumerate(scores)})
    narrow, wide = (rate_robustness(table, t).iloc[0] for t in (tolerance, tolerance + 0.1))
    assert wide["lowest"] <= narrow["lowest"] <= narrow["best_lr"] <= narrow["highest"] <= wide["highest"]
    assert 0 <= narrow["octaves_low"] <= narrow["octaves_high"] <= len(scores) - 1
