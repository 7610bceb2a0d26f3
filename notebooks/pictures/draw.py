"""Draws pictures of README and guide anew: python notebooks/pictures/draw.py. Most need Chromium."""

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
from pages import Explorer, Notebook, write_notebook  # noqa: E402
from servers import copy_of_notebooks, jupyterlab  # noqa: E402

RATES = [2e-3, 5e-3, 1e-2]
STEPS = 26  # of the film's slider, there and back
MILLISECONDS = 160
WIDTH = 900
CELLS = (
    """
import lora_lens as ll
model, clothes = ll.tasks.bundled.vision()
spectra = ll.spectra(model, progress=False)
ll.widgets.window_explorer(model, spectra, clothes)
""",
    """
digits = ll.tasks.bundled.digits().first(train=4000, test=500)
ll.widgets.training_explorer(model, digits, clothes.first(test=500), spectra)
""",
)


def draw_tradeoff(path: Path) -> None:
    table = ll.Sweep.open(REPOSITORY / "data" / "results" / "digits.jsonl.xz").table
    table = table[table["lr"].isin(RATES) & table["method"].isin(["window", "LoRA"])]
    with ll.plots.house_style():
        figure, axes = plt.subplots(1, 2, figsize=(13, 4.4), width_ratios=[1.15, 1])
        ll.plots.forgetting_curve(table, ax=axes[0])
        ll.plots.tradeoff(table, ax=axes[1])
        figure.savefig(path, dpi=100)


def film_window(explorer: Explorer, path: Path) -> None:
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
        frames.append(Image.open(BytesIO(explorer.page.screenshot(clip=area))).convert("RGB"))
        for _ in range(4):  # hundredths
            handle.press("ArrowRight")
    size = WIDTH, round(WIDTH * frames[0].height / frames[0].width)
    frames = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    film = [*frames, *frames[-2:0:-1]]
    film[0].save(
        path, save_all=True, append_images=film[1:], duration=MILLISECONDS, loop=0, quality=80, method=6
    )


def shoot_training(explorer: Explorer, path: Path) -> None:
    """Two runs, and the middle of a third."""
    for number, key in enumerate(("Home", "End"), 1):
        explorer.press("position", key)
        explorer.button("Start").click()
        explorer.root.get_by_text(f"Run {number} is done").wait_for(timeout=600_000)
    explorer.press("position", "ArrowLeft")
    explorer.button("Start").click()
    explorer.root.get_by_text("Tested at step 60").wait_for(timeout=600_000)
    explorer.screenshot(path)
    explorer.button("Stop").click()


def main() -> None:
    draw_tradeoff(HERE / "tradeoff.png")
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        root = copy_of_notebooks(Path(folder) / "root")
        write_notebook(root / "notebooks" / "pictures.ipynb", *CELLS)
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox", "--disable-gpu"]}
        chromium = playwright.chromium.launch(**options)
        page = chromium.new_page(viewport={"width": 1420, "height": 3200})
        with jupyterlab(root, Path(folder) / "own") as lab:
            notebook = Notebook(page, lab, "notebooks/pictures.ipynb")
            notebook.run()
            window, training = notebook.explorers(2)
            film_window(window, HERE / "window_explorer.webp")
            shoot_training(training, HERE / "training_explorer.png")
            notebook.close()
        chromium.close()


if __name__ == "__main__":
    main()
