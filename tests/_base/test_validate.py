from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from lora_lens._base import validate
from lora_lens._base.errors import InputError, InputTypeError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_whole_numbers_of_every_library_become_plain_ones(value):
    found = validate.whole_number(value, "steps", least=1, most=3)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize(
    "value", [2.0, np.float64(2), "2", None, True, np.True_, [2], np.array([2]), torch.tensor(2.0), math.nan]
)
def test_what_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(InputTypeError, match=r"^steps must be a whole number, not "):
        validate.whole_number(value, "steps")


def test_whole_numbers_outside_the_range_are_refused_with_its_end():
    with pytest.raises(InputError, match=r"^steps must be at least 1, not 0$"):
        validate.whole_number(0, "steps", least=1)
    with pytest.raises(InputError, match=r"^steps must be at most 5, not 6$"):
        validate.whole_number(6, "steps", most=5)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_of_every_library_become_plain_ones(value):
    found = validate.number(value, "lr", above=0)
    assert found == 0.5 and type(found) is float
    assert validate.number(3, "lr") == 3.0


@pytest.mark.parametrize("value", ["1e-3", None, True, 1j, [0.1], np.array([0.1]), {}])
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(InputTypeError, match=r"^lr must be a number, not "):
        validate.number(value, "lr")


@pytest.mark.parametrize(
    ("value", "limits", "said"),
    [
        (math.nan, {}, "lr must be finite, not nan"),
        (math.inf, {"above": 0}, "lr must be positive and finite, not inf"),
        (10**400, {}, "lr must be finite, not inf"),
        (0, {"above": 0}, "lr must be positive and finite, not 0.0"),
        (-1, {"least": 0}, "lr must be at least 0 and finite, not -1.0"),
        (1, {"least": 0, "below": 1}, r"lr must be in \[0, 1\), not 1.0"),
        (2, {"most": 1}, "lr must be at most 1 and finite, not 2.0"),
    ],
)
def test_numbers_outside_the_range_are_refused_with_the_range(value, limits, said):
    with pytest.raises(InputError, match=f"^{said}$"):
        validate.number(value, "lr", **limits)


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5], (1, 2.5), np.array([1, 2.5]), pd.Series([1, 2.5]),
        torch.tensor([1, 2.5], requires_grad=True),
        torch.tensor([1, 2.5], dtype=torch.bfloat16), np.array([1, 2.5], dtype=object),
    ],
)  # fmt: skip
def test_numbers_in_any_container_become_an_array(values):
    found = validate.numbers(values, "values")
    assert found.dtype == float and found.tolist() == [1, 2.5]


def test_what_was_not_measured_is_missing():
    assert np.isnan(validate.numbers([None, 1], "values")).tolist() == [True, False]


@pytest.mark.parametrize("values", [None, "12", ["1", "2"], {}, object(), [[1], [1, 2]], [None, "1"], [1j]])
def test_what_holds_no_numbers_is_refused_by_name(values):
    with pytest.raises(InputTypeError, match=r"^values must be numbers"):
        validate.numbers(values, "values")


def test_only_true_and_false_are_flags():
    assert validate.flag(np.True_, "progress") is True and validate.flag(False, "progress") is False
    for value in (1, None, "no", []):
        with pytest.raises(InputTypeError, match=r"^progress must be True or False, not "):
            validate.flag(value, "progress")


def test_a_choice_suggests_what_was_meant():
    assert validate.choice("mean", "pooling", ["mean", "last"]) == "mean"
    with pytest.raises(
        InputError, match=r"^pooling must be one of 'mean', 'last', not 'meen'; did you mean 'mean'"
    ):
        validate.choice("meen", "pooling", ["mean", "last"])
    for value in (None, 3, ["mean"]):
        with pytest.raises(InputTypeError, match=r"^pooling must be one of 'mean', 'last', not "):
            validate.choice(value, "pooling", ["mean", "last"])


@pytest.mark.parametrize(
    "value",
    [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), pd.Series([1, 2]), iter([1, 2])],
)
def test_everything_in_a_fixed_order_is_a_sequence(value):
    assert [int(v) for v in validate.sequence(value, "seed", "seeds")] == [1, 2]


def test_one_element_may_stand_for_a_sequence():
    assert validate.sequence(3, "seed", "seeds", int) == (3,)
    assert validate.sequence("run", "by", "columns", str) == ("run",)


@pytest.mark.parametrize(
    "value", ["12", b"12", {1: 2}, {1, 2}, 3, None, np.array(1), np.ones((2, 2)), pd.DataFrame({"a": [1]})]
)
def test_what_has_letters_no_order_or_several_axes_is_no_sequence(value):
    with pytest.raises(InputTypeError, match=r"^seed must be a sequence of seeds, such as a list, not "):
        validate.sequence(value, "seed", "seeds")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("learning_rate", "'learning_rate'; did you mean 'lr'?"),
        ("batchsize", "'batchsize'; did you mean 'batch_size'?"),
        ("colour", "'colour'; there are lr, batch_size"),
    ],
)
def test_an_unknown_setting_is_named_with_the_one_that_was_meant(given, said):
    with pytest.raises(InputTypeError) as error:
        validate.known_settings(["lr", given], ["lr", "batch_size"], "sweep")
    assert str(error.value) == f"sweep has no setting {said}"


def test_long_values_are_shown_on_one_short_line():
    assert validate.shown("a") == "'a'"
    for value in (torch.nn.Linear(2, 2), torch.ones(50, 50), pd.DataFrame({"a": range(50)}), "long " * 500):
        text = validate.shown(value)
        assert "\n" not in text and len(text) < 120
    assert validate.shown(np.ones((4, 5))).endswith("of shape (4, 5)")
