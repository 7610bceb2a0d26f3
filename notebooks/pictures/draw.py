"""Draws the README's pictures anew: python notebooks/pictures/draw.py. The second needs Chromium."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
from PIL import Image
from playwright.sync_api import sync_playwright

import lora_lens as ll

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "browser"))

from conftest import CHROMIUM  # noqa: E402
from pages import Notebook, write_notebook  # noqa: E402
from servers import copy_of_notebooks, jupyterlab  # noqa: E402

RATES = [2e-3, 5e-3, 1e-2]
STEPS = 26  # of the slider, there and back
MILLISECONDS = 160
WIDTH = 900
CELL = """
import lora_lens as ll
model, clothes = ll.embedded.vision()
ll.widgets.window_explorer(model, ll.spectra(model, progress=False), clothes)
"""


def draw_tradeoff(path: Path) -> None:
    table = ll.runs(REPOSITORY / "data" / "results" / "digits.jsonl.xz")
    table = table[table["lr"].isin(RATES) & table["method"].isin(["window", "LoRA"])]
    with ll.plots.house_style():
        figure, axes = plt.subplots(1, 2, figsize=(13, 4.4), width_ratios=[1.15, 1])
        ll.plots.forgetting_curve(table, ax=axes[0])
        ll.plots.tradeoff(table, ax=axes[1])
        figure.savefig(path, dpi=100)


def film_window_explorer(path: Path) -> None:
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        root = copy_of_notebooks(Path(folder) / "root")
        write_notebook(root / "notebooks" / "film.ipynb", CELL)
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = chromium.new_page(viewport={"width": 1420, "height": 1500})
        with jupyterlab(root, Path(folder) / "own") as lab:
            notebook = Notebook(page, lab, "notebooks/film.ipynb")
            notebook.run()
            explorer = notebook.explorers()[0]
            explorer.view()
            handle = explorer.slider("position")
            handle.focus()
            handle.press("Home")
            top = explorer.root.bounding_box()
            below = explorer.root.locator("img.ll-wide").first.bounding_box()  # noise, which films badly
            area = {**top, "height": below["y"] - top["y"] - 20}
            frames = []
            for _ in range(STEPS):
                explorer.view()
                frames.append(Image.open(BytesIO(page.screenshot(clip=area))).convert("RGB"))
                for _ in range(4):  # hundredths
                    handle.press("ArrowRight")
            notebook.close()
        chromium.close()
    size = WIDTH, round(WIDTH * frames[0].height / frames[0].width)
    frames = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    film = [*frames, *frames[-2:0:-1]]
    film[0].save(
        path, save_all=True, append_images=film[1:], duration=MILLISECONDS, loop=0, quality=80, method=6
    )


if __name__ == "__main__":
    draw_tradeoff(HERE / "tradeoff.png")
    film_window_explorer(HERE / "window_explorer.webp")
