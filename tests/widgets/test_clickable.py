"""Buttons over a picture: where they lie, what they say, and what a drawn rectangle means."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_lens.plots._image import drawn
from lora_lens.widgets._clickable import Spot, brushed_ranges, clickable
from lora_lens.widgets._picture import Picture

SPOTS = [Spot(0.1, 1, "first", "a"), Spot(0.9, 3, "second", "b", aside=True), Spot(0.5, 9, "third", "c")]


def axes(figure: Figure):
    ax = figure.subplots()
    ax.set(xlim=(0, 1), ylim=(10, 0))  # upside down, as a rise of the loss is shown
    return ax


def picture(spots=SPOTS, **options) -> tuple[str, Figure]:
    made = []
    image = drawn(lambda figure: made.append(axes(figure)), "points", (5, 3))
    return clickable(image, made[0], spots, name="runs", **options), made[0].figure


def buttons(html: str) -> list[dict[str, str]]:
    found = re.findall("<button ([^>]*)></button>", html)
    return [{k: unescape(v) for k, v in re.findall(r'([\w-]+)="([^"]*)"', button)} for button in found]


def place(style: str) -> dict[str, float]:
    return {side: float(share) / 100 for side, share in re.findall(r"(\w+): ([\d.]+)%", style)}


def test_a_button_lies_on_the_point_that_is_drawn():
    figure = Figure(figsize=(5, 3), layout="constrained")
    ax = axes(figure)
    ax.axis("off")
    colours = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ax.scatter([s.x for s in SPOTS], [s.y for s in SPOTS], c=colours, s=80)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255  # (height, width, 3)
    for button, colour in zip(buttons(clickable("", ax, SPOTS, name="runs")), colours, strict=True):
        at = place(button["style"])
        row, column = round(at["top"] * len(pixels)), round(at["left"] * pixels.shape[1])
        np.testing.assert_allclose(pixels[row, column], colour, atol=0.02)


def test_it_lies_there_too_where_only_the_moving_artists_are_drawn_again():
    made = []

    def draw(figure):
        made.append(axes(figure))
        return [made[0].scatter([0.5], [5])]

    image = Picture(draw, (5, 3)).html("points")
    ax = made[0]
    (button,) = buttons(clickable(image, ax, [Spot(0.5, 5, "middle", "m")], name="runs"))
    box, at = ax.get_position(), place(button["style"])
    assert at["left"] == pytest.approx((box.x0 + box.x1) / 2, abs=1e-4)
    assert at["top"] == pytest.approx(1 - (box.y0 + box.y1) / 2, abs=1e-4)


def test_each_button_says_what_it_is_to_eyes_and_ears_and_gives_its_value():
    html, _ = picture([Spot(0.5, 5, 'rate 0.1 & "seed" <2>', "run<1>")])
    (button,) = buttons(html)
    assert button["aria-label"] == button["title"] == 'rate 0.1 & "seed" <2>' and button["value"] == "run<1>"
    assert button["type"] == "button" and button["aria-pressed"] == "false"
    assert '<img alt="points"' in html and 'role="group" aria-label="runs: arrow keys' in html


@pytest.mark.parametrize(("picked", "stop"), [("", "a"), ("c", "c"), ("b", "b"), ("unknown", "a")])
def test_tab_stops_once_at_the_picked_point_or_the_first(picked, stop):
    html, _ = picture(picked=picked)
    found = buttons(html)
    assert [b["value"] for b in found if b["tabindex"] == "0"] == [stop]
    assert [b["value"] for b in found if b["aria-pressed"] == "true"] == [picked] * (
        picked in "abc" and picked != ""
    )


def test_points_aside_are_there_but_no_stop():
    found = buttons(picture([SPOTS[1], SPOTS[0]])[0])
    assert [b["class"] for b in found] == ["ll-spot ll-aside", "ll-spot"]
    assert [b["tabindex"] for b in found] == ["-1", "0"]
    assert "tabindex" not in picture([])[0]


def test_points_without_a_place_are_left_out():
    spots = [*SPOTS, Spot(np.nan, 1, "diverged", "d"), Spot(0.5, np.inf, "diverged", "e")]
    assert [b["value"] for b in buttons(picture(spots)[0])] == ["a", "b", "c"]


def test_a_page_without_the_style_shows_no_buttons():
    html, _ = picture()
    assert html.count("<button") == html.count('<button type="button" hidden') == 3


def test_the_brush_covers_the_axes():
    html, figure = picture(brush=True)
    at, box = place(re.search('class="ll-brush" style="([^"]+)"', html)[1]), figure.axes[0].get_position()
    assert at["left"] == pytest.approx(box.x0, abs=1e-4) and at["width"] == pytest.approx(box.width, abs=1e-4)
    assert at["top"] == pytest.approx(1 - box.y1, abs=1e-4)
    assert at["height"] == pytest.approx(box.height, abs=1e-4)
    assert "ll-brush" not in picture()[0]


@pytest.mark.parametrize("corners", ["0.25,0.1,0.75,0.5", "0.75,0.5,0.25,0.1", "0.25,0.5,0.75,0.1"])
def test_a_rectangle_is_the_same_from_whichever_corner_it_was_drawn(corners):
    (left, right), (bottom, top) = brushed_ranges(corners, picture()[1].axes[0])
    assert (left, right) == pytest.approx((0.25, 0.75)) and (bottom, top) == pytest.approx((5, 9))


@pytest.mark.parametrize("text", ["", "1,2", "0,0,1,1,1", "0,0,1,2", "-0.1,0,1,1", "a,b,c,d", "0,0,nan,1"])
def test_what_is_no_rectangle_is_refused(text):
    with pytest.raises(ValueError, match="a rectangle is four shares from 0 to 1"):
        brushed_ranges(text, picture()[1].axes[0])
