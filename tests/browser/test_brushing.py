"""A sweep of ten thousand runs is brushed with mouse and keyboard, and what all explorers' buttons do.

The times are written to ``brushing.json`` beside the screenshots and not judged: they are this machine's.
"""

from __future__ import annotations

import json
import os
import platform
import re
from base64 import b64decode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from statistics import median, quantiles
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
from pages import Explorer, eventually
from PIL import Image

TABLE = """
import numpy as np
import pandas as pd

random = np.random.default_rng(0)
grid = [np.linspace(0, 1, 25), [0.001, 0.002, 0.005, 0.01], range(100)]
table = pd.MultiIndex.from_product(grid, names=["position", "lr", "seed"]).to_frame(index=False)
beta = random.beta(2, 2, (2, len(table)))
scores = {"accuracy": 0.95 - 0.25 * beta[0], "forgetting": 0.02 + 0.5 * beta[1]}
table = table.assign(method="window", rank=8, start=None, diverged=False, **scores)
table["retained_accuracy"] = 0.92 - table["forgetting"]
"""
CELL = f"{TABLE}\nimport lora_lens as ll\n\nll.widgets.tradeoff_explorer(table)"
BRUSHES = 20
# Notes when the pointer moves and is released, and when what follows is decoded and painted: the page's own
# points, of which a pixel is read, since that waits for all that is drawn; and then the kernel's picture.
WATCH = """root => {
  const painted = done => requestAnimationFrame(() => setTimeout(() => done(performance.now())));
  root.moves = [], root.choices = [], root.brushes = [];
  const shown = (times, event) => {
    const canvas = root.querySelector('.ll-points');
    painted(() => {
      if (canvas?.getContext('2d').getImageData(0, 0, 1, 1)) times.push(performance.now() - event.timeStamp);
    });
  };
  root.addEventListener('pointermove', event => {
    if (event.buttons) shown(root.moves, event);
  });
  root.addEventListener('pointerup', event => shown(root.choices, event));
  root.addEventListener('pointerup', event => {
    const before = root.querySelector('.ll-plane img').src;
    const observer = new MutationObserver(() => {
      const image = root.querySelector('.ll-plane img');
      if (!image || image.src === before) return;
      observer.disconnect();
      image.decode().then(() => painted(now => root.brushes.push(now - event.timeStamp)));
    });
    observer.observe(root, {subtree: true, childList: true});
  }, true);
}"""


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    names: dict[str, pd.DataFrame] = {}
    exec(TABLE, names)
    return names["table"]


@pytest.fixture
def whole(explorer: Explorer) -> Iterator[Explorer]:
    """With all runs chosen, before and after."""
    for _ in range(2):
        explorer.button("all runs").click()
        explorer.view(lambda view: "10000 of 10000 runs" in view.text)
        if not _:
            yield explorer


def chosen(explorer: Explorer) -> int:
    return int(re.search(r"(\d+) of 10000 runs", explorer.view().text)[1])


def ranges(explorer: Explorer) -> list[tuple[float, float]]:
    """In percent, as their readouts say."""
    texts = [explorer.readout(label).inner_text() for label in ("accuracy", "retained accuracy")]
    return [tuple(float(end) for end in re.findall(r"[\d.]+", text)) for text in texts]


def pixels(source: str) -> np.ndarray:
    """Of a PNG in an address, (height, width, 3) of int."""
    return np.asarray(Image.open(BytesIO(b64decode(source.partition(",")[2]))).convert("RGB"), int)


def inside(explorer: Explorer, table: pd.DataFrame) -> pd.DataFrame:
    (left, right), (bottom, top) = ranges(explorer)
    x, y = 100 * table["accuracy"], 100 * table["retained_accuracy"]
    return table[x.between(left - 1e-7, right + 1e-7) & y.between(bottom - 1e-7, top + 1e-7)]


class TestBrushing:
    name = "brushing"
    cells: ClassVar = (CELL,)

    def test_the_runs_within_a_rectangle_are_chosen(self, whole: Explorer, table: pd.DataFrame):
        whole.changed(lambda: whole.brush(0.7, 0.5, 0.95, 0.95))
        within = inside(whole, table)
        assert 100 < len(within) < 5000
        assert chosen(whole) == len(within)
        there = set(within.index.astype(str))
        spots = whole.root.evaluate(
            "root => [...root.querySelectorAll('.ll-spot')].map(s => [s.value, s.matches('.ll-aside')])"
        )
        assert {value for value, aside in spots if not aside} <= there
        assert not {value for value, aside in spots if aside} & there
        assert len(spots) <= 500

    def test_on_release_the_page_itself_shows_the_choice(self, whole: Explorer):
        whole.changed(lambda: whole.brush(0.05, 0.05, 0.3, 0.3))  # a picture in which others are in colour
        whole.root.evaluate(
            "root => root.addEventListener('pointerup', () => {"
            " root.released = root.querySelector('.ll-points').toDataURL() }, {once: true})"
        )
        view = whole.changed(lambda: whole.brush(0.4, 0.3, 0.7, 0.6))
        (kernel,) = (pixels(source) for alt, source in view.pictures if "a point per run" in alt)
        page = pixels(whole.root.evaluate("root => root.released"))
        assert page.shape == kernel.shape
        coloured = np.ptp(page, axis=2) > 40
        assert coloured.sum() > 10_000
        differing = np.abs(page - kernel).max(axis=2) > 8
        assert not (differing & coloured).any()  # the points
        assert differing.mean() < 0.01  # front and rectangle are the kernel's
        eventually(lambda: whole.root.locator(".ll-points, .ll-rubber").count() == 0, "they stayed")

    def test_keys_draw_a_rectangle_and_the_focus_stays(self, whole: Explorer, table: pd.DataFrame):
        keyboard = whole.page.keyboard
        whole.root.locator('.ll-spot[tabindex="0"]').focus()
        keyboard.press("Home")
        keyboard.down("Shift")
        for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"):
            keyboard.press(key)
        last = whole.page.evaluate("document.activeElement.value")
        assert whole.root.locator(".ll-rubber").count() == 1
        whole.changed(lambda: keyboard.up("Shift"))
        assert 0 < chosen(whole) == len(inside(whole, table)) < 10_000
        assert int(last) in inside(whole, table).index
        eventually(lambda: whole.page.evaluate("document.activeElement.value") == last, "the focus was lost")
        keyboard.down("Shift")
        keyboard.press("ArrowLeft")
        keyboard.press("Escape")
        keyboard.up("Shift")
        assert whole.root.locator(".ll-rubber").count() == 0

    def test_choices_are_taken_back_by_button_and_by_key(self, whole: Explorer):
        before = ranges(whole)
        whole.changed(lambda: whole.brush(0.2, 0.2, 0.9, 0.9))
        first = ranges(whole)
        whole.changed(lambda: whole.brush(0.5, 0.5, 0.9, 0.9))
        whole.changed(whole.checkbox("0.001").uncheck)
        whole.changed(whole.button("Undo").click)
        assert whole.checkbox("0.001").is_checked()
        spot = whole.root.locator('.ll-spot[tabindex="0"]')
        spot.focus()
        whole.changed(lambda: whole.page.keyboard.press("Control+z"))
        assert ranges(whole) == first
        assert whole.page.evaluate("document.activeElement.matches('.ll-spot')")
        whole.changed(lambda: whole.page.keyboard.press("Control+z"))
        assert ranges(whole) == before

    def test_an_undone_pick_is_marked_no_more(self, whole: Explorer):
        marked = whole.root.locator('.ll-spot[aria-pressed="true"]')
        before = marked.get_attribute("value")
        whole.root.locator('.ll-spot[tabindex="0"]').focus()
        whole.page.keyboard.press("End")
        whole.changed(lambda: whole.page.keyboard.press("Enter"))
        assert marked.get_attribute("value") != before
        whole.changed(whole.button("Undo").click)
        eventually(lambda: marked.get_attribute("value") == before, "the old point was not marked")

    def test_a_line_of_code_makes_the_view(self, whole: Explorer):
        whole.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        whole.changed(lambda: whole.brush(0.5, 0.5, 0.9, 0.9))
        whole.button("Code").click()
        whole.root.get_by_text("The line is in the clipboard.").wait_for()
        line = whole.page.evaluate("navigator.clipboard.readText()")
        assert line == whole.root.locator(".ll-code").inner_text()
        (left, right), (bottom, top) = ([end / 100 for end in ends] for ends in ranges(whole))
        assert line == (
            f"ll.widgets.tradeoff_explorer(table, accuracy=[{left:g}, {right:g}], "
            f"retained_accuracy=[{bottom:g}, {top:g}])"
        )
        whole.button("Code").click()
        assert not whole.root.locator(".ll-code").is_visible()

    def test_the_pictures_are_copied_or_saved(self, whole: Explorer):
        whole.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        whole.button("Copy picture").click()
        whole.root.get_by_text("The picture is in the clipboard.").wait_for()
        size = whole.page.evaluate(
            "async () => { const [item] = await navigator.clipboard.read();"
            " const image = await createImageBitmap(await item.getType('image/png'));"
            " return [image.width, image.height] }"
        )
        whole.page.evaluate(
            "Object.defineProperty(navigator, 'clipboard', {value: undefined})"
        )  # without TLS
        with whole.page.expect_download() as saved:
            whole.button("Copy picture").click()
        whole.root.get_by_text("saved as explorer.png").wait_for()
        image = Image.open(BytesIO(Path(saved.value.path()).read_bytes()))
        sizes = whole.root.evaluate(
            "root => [...root.querySelectorAll('img')].map(i => [i.naturalWidth, i.naturalHeight])"
        )
        widths, heights = zip(*sizes, strict=True)
        assert list(image.size) == size == [max(widths), sum(heights)]
        assert len(image.convert("L").getcolors()) > 50

    def test_how_long_a_brush_takes(self, whole: Explorer, screenshots: Path):
        whole.root.evaluate(WATCH)
        for number in range(BRUSHES):
            far = 0.55 + 0.4 * number / BRUSHES
            whole.brush(0.05, 0.05, far, far)
            eventually(
                lambda count=number + 1: whole.root.evaluate("root => root.brushes.length") == count,
                "no new picture came",
            )
            whole.view()
        whole.screenshot(screenshots / "brushing.png")
        measured = {
            "what": "milliseconds to a painted picture, 10,000 runs",
            "from each move, the points within in colour": spread(whole.root.evaluate("root => root.moves")),
            "from the release, the same": spread(whole.root.evaluate("root => root.choices")),
            "from the release, the kernel's picture": spread(whole.root.evaluate("root => root.brushes")),
            "machine": f"{platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}",
        }
        (screenshots / "brushing.json").write_text(json.dumps(measured, indent=1) + "\n")
        print(json.dumps(measured))


def spread(times: list[float]) -> dict[str, float]:
    assert len(times) >= BRUSHES
    return {
        "median": round(median(times), 1),
        "90th percentile": round(quantiles(times, n=10)[-1], 1),
        "slowest": round(max(times), 1),
    }
