from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import lora_lens as ll
from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.schema import checked

COLUMNS = ["run", "method", "position", "lr", "seed", "forgetting"]


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        {"run": f"{position} {seed}", "method": "window", "rank": 8, "position": position, "start": np.nan,
         "lr": 0.01, "seed": seed, "diverged": False, "accuracy": 0.8 + position / 10,
         "retained_accuracy": 0.7, "forgetting": 0.2 + seed / 10}
        for position in (0.0, 0.5, 1.0) for seed in (0, 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_good_table_goes_through_as_it_is(table):
    assert checked(table, COLUMNS) is table


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "the table must be what ll.sweep returns, a table, not None"),
        ("results/digits", "not 'results/digits'; a store is opened with ll.Sweep.open"),
        ([{"lr": 1}], r"pandas.DataFrame\(...\) makes a table"),
        ({"lr": [1]}, r"pandas.DataFrame\(...\) makes a table"),
        (np.ones((2, 2)), "not ndarray"),
        (pd.Series([1]), "not Series"),
    ],
)
def test_what_is_no_table_is_refused_with_what_to_do(given, said):
    with pytest.raises(InputTypeError, match=said):
        checked(given, COLUMNS)


def test_missing_columns_are_named_with_those_that_were_meant(table):
    for name, here in (("learning_rate", "lr"), ("forgeting", "forgetting")):
        with pytest.raises(InputError, match=f"no column {here}; did you mean '{name}'.; it has run, method"):
            checked(table.rename(columns={here: name}), COLUMNS)
    with pytest.raises(InputError, match=r"the table has no column run, method, .*; it has 0"):
        checked(pd.DataFrame([1, 2]), COLUMNS)
    with pytest.raises(InputError, match="two columns called 'lr'"):
        checked(pd.concat([table, table[["lr"]]], axis=1), COLUMNS)


def test_an_empty_table_is_refused_unless_it_may_be_empty(table):
    for empty in (table.iloc[:0], pd.DataFrame()):
        with pytest.raises(
            InputError, match=r"the table is empty, it has no rows; pass what ll.sweep returns"
        ):
            checked(empty, COLUMNS)
    assert checked(table.iloc[:0], COLUMNS, empty=True).empty


def test_words_where_numbers_are_meant_are_refused(table):
    for column, value in (("lr", "1e-3"), ("seed", "0"), ("forgetting", {}), ("position", "middle")):
        with pytest.raises(InputError, match=f"the table must hold numbers in its column {column}, not "):
            checked(table.astype({column: object}).assign(**{column: [value] * 6}), COLUMNS)


def test_numbers_of_other_types_become_plain_ones(table):
    nothing = table.assign(position=pd.Series([None] * 6, dtype=object))
    assert checked(nothing, COLUMNS)["position"].isna().all()
    assert checked(nothing, COLUMNS)["position"].dtype == float
    others = checked(table.convert_dtypes(), COLUMNS)
    assert others["lr"].dtype == float and others["seed"].tolist() == [0, 1] * 3
    assert ll.forgetting.at_equal_rate(table.convert_dtypes()).equals(ll.forgetting.at_equal_rate(table))


def test_a_row_without_what_names_it_and_a_run_that_stands_twice_are_refused(table):
    for column in ("lr", "seed", "method"):
        with pytest.raises(InputError, match=f"rows without a value of {column}"):
            checked(table.assign(**{column: [np.nan, *table[column][1:]]}), COLUMNS)
    with pytest.raises(InputError, match=r"holds run 0.0 0 twice"):
        checked(pd.concat([table, table]), COLUMNS, once=True)


def failed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with one more run, which failed."""
    scores = ["accuracy", "retained_accuracy", "forgetting", "diverged"]
    row = table.iloc[[0]].assign(run="lost", seed=7, failed=True, reason="out of memory")
    row[scores] = np.nan
    return pd.concat([table.assign(failed=False, reason=None), row], ignore_index=True)


def test_runs_that_failed_are_left_out(table):
    rows = checked(failed(table), COLUMNS)
    assert rows["run"].tolist() == table["run"].tolist() and rows["diverged"].dtype == bool
    for function in (
        ll.forgetting.at_equal_rate,
        ll.forgetting.seed_means,
        ll.forgetting.at_own_best_rate,
    ):
        pd.testing.assert_frame_equal(function(failed(table)), function(table), check_dtype=False)
    drawn, usual = ll.plots.tradeoff(failed(table)), ll.plots.tradeoff(table)
    assert len(drawn.collections) == len(usual.collections)
    assert not ll.forgetting.pareto_front(failed(table)).iloc[-1]


def test_a_table_of_failed_runs_alone_is_refused_with_the_reason(table):
    with pytest.raises(InputError, match="all 1 runs in the table failed, such as: out of memory"):
        checked(failed(table).iloc[-1:], COLUMNS)


def test_explorers_refuse_a_table_without_any_score(table):
    for score in ("accuracy", "retained_accuracy"):
        with pytest.raises(InputError, match=f"no run of the table has a value of {score}"):
            ll.widgets.tradeoff_explorer(table.assign(**{score: np.nan}))


@pytest.mark.parametrize("value", [80.0, -0.1, np.inf])
def test_percentages_in_place_of_shares_are_refused(table, value):
    table.loc[1, "accuracy"] = value
    with pytest.raises(InputError, match=rf"the table has {value:g} in its column accuracy, .* 80% is 0\.8"):
        checked(table, [*COLUMNS, "accuracy"])
    table.loc[1, "accuracy"] = np.nan  # of a run that diverged
    assert len(checked(table, [*COLUMNS, "accuracy"])) == 6
