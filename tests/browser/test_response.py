"""How fast the window follows a dragged slider in a model of ViT-B's size; what 500 moves leave behind.

The times are written to ``response.json`` beside the screenshots and not judged: they are this machine's.
"""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
from pages import Explorer, Notebook, eventually
from servers import REPOSITORY

if TYPE_CHECKING:
    from playwright.sync_api import CDPSession

TIMED, WARM_UP, LATER, ROUNDS = 40, 3, 500, 3
# Growth allowed over LATER moves: 500 pictures that were kept would be some 100 MB, 500 figures more. The
# model is small, since it is copied whenever the slider rests, and an allocator keeps some of 350 MB.
KERNEL_BYTES, PAGE_BYTES, PAGE_NODES = 40e6, 10e6, 200

CELL = f"""
import os
os.environ["LORA_LENS_CACHE"] = {str(REPOSITORY / "results" / "test" / "spectra")!r}

import timm
import torch
import lora_lens as ll

print(os.getpid())
torch.manual_seed(0)
model = timm.create_model("vit_base_patch16_224", num_classes=10)
digits = ll.tasks.bundled.digits().first(train=8, test=8)
images = torch.nn.functional.interpolate(digits.test.inputs, size=224).expand(-1, 3, -1, -1)
task = ll.Task("large digits", digits.classes, *2 * [ll.Examples(images, digits.test.labels)])
ll.widgets.window_explorer(model, ll.spectra(model, "blocks.[0-1].*", progress=False), task)
"""
SMALL = """
small, clothes = ll.tasks.bundled.vision()
ll.widgets.window_explorer(small, ll.spectra(small, "blocks.0.*", progress=False), clothes)
"""

# Notes when the pointer moves, and when each picture that a move has changed is decoded and painted.
WATCH = """root => {
  root.moves = [], root.shown = [];
  const last = [];
  const painted = what => requestAnimationFrame(() => setTimeout(() => {
    root.shown.push([what, performance.now()]);
  }));
  document.addEventListener('pointermove', event => root.moves.push(event.timeStamp), true);
  new MutationObserver(() => {
    root.querySelectorAll('img').forEach((image, place) => {
      if (last[place] === image.src) return;
      last[place] = image.src;
      const alt = image.alt;
      image.decode().catch(() => {}).then(() => painted(alt));  // replaced meanwhile: the next one counts
    });
    const drawn = root.querySelectorAll('canvas');  // in the page itself, over parts of the pictures
    const window = [...drawn].find(canvas => canvas.dataset.window !== last.window)?.dataset.window;
    if (!window) return;
    last.window = window;
    painted(`${drawn.length} parts of ${window}`);
  }).observe(root, {subtree: true, childList: true, attributes: true});
}"""
# What the page itself draws of all three pictures, the shade, six maps and two matrices, of which window; and
# the first and the last of the kernel's pictures, by what their descriptions say of the position.
RANK, COMPONENTS = 8, 768
DRAWN, FIRST, LAST = "9 parts of {}, {}", "at position {:g} shaded", "at position {:g}, and the residual"

# Where the page has drawn, in shares of the picture below it; and what.
PLACES = """root => [...root.querySelectorAll('canvas')].map(canvas => {
  const image = canvas.parentElement.querySelector('img');
  const [box, whole] = [canvas, image].map(element => element.getBoundingClientRect());
  return [
    (box.left - whole.left) / whole.width, (box.top - whole.top) / whole.height,
    box.width / whole.width, box.height / whole.height,
  ];
})"""
PARTS = """root => [...root.querySelectorAll('canvas')].map(canvas => {
  const {width, height} = canvas, {data} = canvas.getContext('2d').getImageData(0, 0, width, height);
  const picture = canvas.parentElement.querySelector('img').dataset.follows;
  return {picture, width, height, pixels: [...data]};
})"""
# The colours of a picture in the middles of cells that share a place in it.
SAMPLED = """(root, [name, [left, top, width, height], columns, rows]) => {
  const image = [...root.querySelectorAll('img')].find(image => image.dataset.follows === name);
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), pen = canvas.getContext('2d');
  pen.drawImage(image, 0, 0);
  const all = pen.getImageData(0, 0, canvas.width, canvas.height), found = [];
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const x = Math.floor(canvas.width * (left + width * (column + 0.5) / columns));
      const y = Math.floor(canvas.height * (top + height * (row + 0.5) / rows));
      found.push(...all.data.slice(4 * (y * canvas.width + x), 4 * (y * canvas.width + x) + 4));
    }
  return found;
}"""


@contextmanager
def held_slider(explorer: Explorer) -> Iterator[Track]:
    """The position slider's handle, held down; let go afterwards."""
    try:
        yield Track(explorer)
    finally:
        explorer.page.mouse.up()


class TestResponse:
    name = "response"
    cells: ClassVar = (CELL, SMALL)

    def test_every_move_arrives(self, notebook: Notebook, screenshots: Path):
        watched = notebook.explorers(2)[0]
        watched.view()
        watched.root.evaluate(WATCH)
        with held_slider(watched) as track:
            self.time_moves(watched, track, screenshots)

    def time_moves(self, watched: Explorer, track: Track, screenshots: Path) -> None:
        times, at = [], track.value()
        for step in range(TIMED):
            before = watched.root.evaluate("root => [root.moves.length, root.shown.length]")
            track.move(0.2 + 0.6 * step / TIMED)
            if at == track.value():  # a pixel is less than a step of the slider
                continue
            at = track.value()
            watched.page.wait_for_function(
                "([root, text, start]) => root.shown.slice(start).some(([alt]) => alt.includes(text))",
                arg=[watched.root.element_handle(), LAST.format(at), before[1]],
            )
            start = round(at * (COMPONENTS - RANK))
            drawn = DRAWN.format(start, start + RANK)
            times.append(
                watched.root.evaluate(
                    "(root, [texts, move, start]) => texts.map(text => "
                    "root.shown.slice(start).find(([alt]) => alt.includes(text))[1] - root.moves[move])",
                    [[drawn, FIRST.format(at), LAST.format(at)], *before],
                )
            )
        assert len(times) > TIMED / 2
        drawn, first, last = zip(*times, strict=True)
        measured = {
            "what": "milliseconds from a move of the pointer to a new picture painted, window of rank 8",
            "model": "vit_base_patch16_224, one layer of 768 components shown",
            "moves": len(times),
            "all three pictures, drawn in the page": spread(drawn),
            "first of the kernel's pictures": spread(first),
            "last of the kernel's pictures": spread(last),
            "machine": f"{platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}",
        }
        (screenshots / "response.json").write_text(json.dumps(measured, indent=1) + "\n")
        print(json.dumps(measured))

    def test_what_the_page_draws_is_what_the_kernel_draws(self, notebook: Notebook):
        explorer = notebook.explorers(2)[1]
        explorer.drag("position", 0.2)
        explorer.view(lambda view: "position 0.2 " in view.alt)
        os.kill(notebook.kernel_process(), signal.SIGSTOP)
        try:
            with held_slider(explorer) as track:
                track.move(0.7)
                explorer.page.wait_for_function(
                    "root => root.querySelectorAll('canvas').length === 9", arg=explorer.root.element_handle()
                )
            at, drawn, places = track.value(), *map(explorer.root.evaluate, (PARTS, PLACES))
            self.keep_their_places_in_a_narrow_window(explorer, places)
        finally:
            os.kill(notebook.kernel_process(), signal.SIGCONT)
        explorer.view(lambda view: f"position {at:g} " in view.alt)
        explorer.page.wait_for_function(
            "root => !root.querySelector('canvas')", arg=explorer.root.element_handle()
        )
        assert len(drawn) == 9
        for part, place in zip(drawn, places, strict=True):
            ours = np.array(part["pixels"]).reshape(part["height"], part["width"], 4)[..., :3]
            theirs = explorer.root.evaluate(SAMPLED, [part["picture"], place, *ours.shape[1::-1]])
            differs = np.abs(ours - np.array(theirs).reshape(*ours.shape[:2], 4)[..., :3]).max(-1) > 8
            assert differs.mean() < 0.03, place  # the picture's frames lie over them

    def keep_their_places_in_a_narrow_window(
        self, explorer: Explorer, places: Sequence[Sequence[float]]
    ) -> None:
        size, image = explorer.page.viewport_size, explorer.root.locator("img").first
        width = image.bounding_box()["width"]
        explorer.page.set_viewport_size({**size, "width": size["width"] // 2})
        eventually(lambda: image.bounding_box()["width"] < 0.9 * width, "the pictures are as wide as before")
        eventually(
            lambda: np.allclose(explorer.root.evaluate(PLACES), places, atol=0.02),
            "what the page has drawn did not move with the pictures",
        )
        explorer.page.set_viewport_size(size)

    def test_many_moves_leave_nothing_behind(self, notebook: Notebook):
        explorer = notebook.explorers(2)[1]
        devtools = explorer.page.context.new_cdp_session(explorer.page)
        most = {"kernel": KERNEL_BYTES, "heap": PAGE_BYTES, "nodes": PAGE_NODES}
        with held_slider(explorer) as track:
            for _ in range(WARM_UP):  # whatever is made once is made now
                sweep(track, 40)
                explorer.view()
            for _ in range(ROUNDS):  # what is left behind comes each time, what an allocator keeps does not
                before = held(devtools, notebook.kernel_process())
                sweep(track, LATER)
                track.move(0.37)
                assert 0.35 < track.value() < 0.39
                explorer.view(lambda view: f"position {track.value():g} " in view.alt)
                after = held(devtools, notebook.kernel_process())
                grown = {what: after[what] - before[what] for what in before}
                print(before, grown)
                if all(grown[what] < limit for what, limit in most.items()):
                    return
        pytest.fail(f"after {LATER} moves there is more each time than {most}: {grown}")


class Track:
    """A slider from 0 to 1 whose handle follows the pointer."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer, self.mouse = explorer, explorer.page.mouse
        handle = explorer.slider("position")
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        track = explorer.track("position").bounding_box()
        self.start, self.length, self.y = track["x"], track["width"], box["y"] + box["height"] / 2
        self.mouse.move(box["x"] + box["width"] / 2, self.y)
        self.mouse.down()

    def move(self, value: float) -> None:
        self.mouse.move(self.start + value * self.length, self.y)

    def value(self) -> float:
        """What the slider says, at once: to the pixel where the pointer is."""
        return float(self.explorer.readout("position").inner_text())


def spread(times: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(median(times), 1),
        "90th percentile": round(quantiles(times, n=10)[-1], 1),
        "slowest": round(max(times), 1),
    }


def sweep(track: Track, moves: int) -> None:
    """To and fro in steps of 0.01, as fast as the page takes them."""
    for step in range(moves):
        track.move(abs((step + 100) % 200 - 100) / 100)
        track.explorer.page.wait_for_timeout(30)


def held(devtools: CDPSession, kernel: int) -> dict[str, float]:
    """Bytes of the kernel, without mapped files, and of the page's heap, and the page's nodes.

    The page's garbage is collected before.
    """
    resident = next(
        line for line in Path(f"/proc/{kernel}/status").read_text().splitlines() if "RssAnon" in line
    )
    devtools.send("Performance.enable")
    for _ in range(2):
        devtools.send("HeapProfiler.collectGarbage")
    measured = {m["name"]: m["value"] for m in devtools.send("Performance.getMetrics")["metrics"]}
    return {
        "kernel": 1024 * int(resident.split()[1]),
        "heap": measured["JSHeapUsedSize"],
        "nodes": measured["Nodes"],
    }
