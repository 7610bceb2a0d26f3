from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

import lora_lens as ll


@given(k=st.integers(1, 4096), data=st.data())
def test_a_position_always_fits_and_its_ends_are_the_spectrum_s(k, data):
    rank = data.draw(st.integers(1, k))
    part = ll.Window(rank, position=data.draw(st.floats(0, 1))).slice(k)
    assert 0 <= part.start <= k - rank and part.stop - part.start == rank
    assert ll.Window.first(rank).slice(k).start == 0
    assert ll.Window.last(rank).slice(k).stop == k


@given(k=st.integers(2, 500), data=st.data())
def test_a_grid_runs_from_first_to_last_without_turning_back(k, data):
    rank, count = data.draw(st.integers(1, k)), data.draw(st.integers(2, 12))
    starts = [w.slice(k).start for w in ll.windows(rank, count)]
    assert starts == sorted(starts) and starts[0] == 0 and starts[-1] == k - rank


def test_named_points():
    assert ll.Window.middle(8) == ll.Window(8, position=0.5)
    assert ll.Window.middle(8).slice(96) == slice(44, 52)
    assert ll.Window(8, start=3).slice(96) == slice(3, 11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0, "position": 0}, "at least 1"),
        ({"rank": 8}, "either a position"),
        ({"rank": 8, "position": 0.5, "start": 3}, "either a position"),
        ({"rank": 8, "position": 1.5}, "in \\[0, 1\\], not 1.5"),
        ({"rank": 8, "position": float("nan")}, "in \\[0, 1\\], not nan"),
        ({"rank": 8, "start": -1}, "at least 0, not -1"),
    ],
)
def test_impossible_windows_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ll.Window(**arguments)


def test_a_rank_that_is_no_whole_number_is_refused():
    with pytest.raises(TypeError, match=r"whole number, not 2\.5"):
        ll.Window(2.5, position=0)


def test_a_window_beyond_the_spectrum_names_the_weight_and_the_limit():
    with pytest.raises(ValueError, match=r"\[90, 98\) does not fit blocks.0.attn.proj.*at most 88"):
        ll.Window(8, start=90).slice(96, "blocks.0.attn.proj")
    with pytest.raises(ValueError, match="rank 97 does not fit head: its spectrum has 96"):
        ll.Window.first(97).slice(96, "head")
