"""Pictures of texts hold every token with its share, and of a text as much as there is room for."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

import lora_lens as ll
from lora_lens.plots.texts import show_text, wrapped


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def written(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_each_token_stands_over_its_share_in_its_colour():
    ax = ll.plots.token_shares([" good", "##ness", "\n", " ", "$5"], [0.0, 0.125, 0.03, 0.5, 0.25])
    words, numbers = written(ax)[::2], written(ax)[1::2]
    assert words == ["good", "##ness", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\N{OPEN BOX}", "$5"]
    assert numbers == ["0.0", "12", "3.0", "50", "25"]
    colours = plt.get_cmap("cividis")
    expected = [to_hex(colours(share / 0.5)) for share in (0.0, 0.125, 0.03, 0.5, 0.25)]
    assert [to_hex(box.get_facecolor()) for box in ax.patches] == expected
    ax.figure.canvas.draw()  # a dollar begins no formula


@pytest.mark.parametrize("count", [1, 20, 150])
def test_no_token_overlaps_another_or_leaves_the_picture(count):
    pieces = (["token", "a", "longer one"] * 50)[:count]
    ax = ll.plots.token_shares(pieces, np.linspace(0, 1, count))
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    boxes = [(b.get_x(), b.get_y(), b.get_width(), b.get_height()) for b in ax.patches]
    assert len(boxes) == count
    for (x, y, w, h), (next_x, next_y, _, _) in pairwise(boxes):
        assert (next_y == y and next_x > x + w) or (next_x == left and next_y > y + h)
    assert all(left <= x and x + w <= right and top <= y and y + h <= bottom for x, y, w, h in boxes)


def test_tokens_without_room_are_counted():
    ax = plt.subplots(figsize=(3, 1))[1]
    assert ll.plots.token_shares(["word"] * 500, np.full(500, 0.1), ax=ax) is ax
    shown = len(ax.patches)
    assert 0 < shown < 500 and written(ax)[0] == f"and {500 - shown} more"


def test_what_are_no_shares_of_the_tokens_is_refused():
    for pieces, shares in ((["a"], [0.1, 0.2]), ([], []), (["a"], [[0.1]])):
        with pytest.raises(ValueError, match=f"one share for each of {len(pieces)} tokens"):
            ll.plots.token_shares(pieces, shares)
    for wrong in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match=r"shares must be in \[0, 1\]"):
            ll.plots.token_shares(["a"], [wrong])


def test_a_text_is_wrapped_and_cut_where_the_axes_end():
    assert wrapped("one two three four", 8, 2) == ["one two", "..."]
    assert wrapped("one two three four", 13, 2) == ["one two three", "four"]
    low, high = plt.subplots(2, 1, figsize=(4, 5), height_ratios=[1, 8])[1]
    for ax in (low, high):
        show_text(ax, "It cost $5 and $6. " * 12, "a title")
    assert written(low)[0].endswith(" ...") and not written(high)[0].endswith(" ...")
    assert high.get_title(loc="left") == "a title" and not high.axison
    high.figure.canvas.draw()
