"""A server whose pages may run no inline script: the explorers do all that they do elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pages import PATIENCE, Notebook, write_notebook
from servers import Server, jupyterlab

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CELL = """import lora_lens as ll
ll.widgets.tradeoff_explorer(ll.Sweep.open("../data/results/digits.jsonl.xz").table)"""
POLICY = {"Content-Security-Policy": "script-src 'self' blob: 'unsafe-eval'"}  # no 'unsafe-inline'


@pytest.fixture(scope="module")
def lab(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    own = tmp_path_factory.mktemp("strict")
    (own / "config").mkdir()
    settings = {"ServerApp": {"tornado_settings": {"headers": POLICY}}}
    (own / "config" / "jupyter_server_config.json").write_text(json.dumps(settings))
    with jupyterlab(root, own) as server:
        yield server


def test_sliders_have_names_points_are_picked_and_rectangles_drawn(browser: Browser, lab: Server, root: Path):
    write_notebook(root / "notebooks" / "strict.ipynb", CELL)
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    page, refused = context.new_page(), []
    page.set_default_timeout(1000 * PATIENCE)
    page.on("console", lambda message: refused.append(message.text) if message.type == "error" else None)
    notebook = Notebook(page, lab, "notebooks/strict.ipynb")
    notebook.run()
    (explorer,) = notebook.explorers(1)
    explorer.view(lambda view: "220 of 220 runs" in view.text)
    assert ("slider", "retained accuracy, to") in explorer.names()

    spot = next(spot for spot in explorer.spots() if spot.get_attribute("aria-pressed") == "false")
    told = f"The run: {spot.get_attribute('aria-label').partition(': accuracy')[0]}"
    explorer.changed(lambda: spot.click(force=True), lambda view: told in view.text)
    explorer.changed(
        lambda: explorer.brush(0.6, 0.2, 0.9, 0.8), lambda view: "220 of 220 runs" not in view.text
    )
    assert refused and all("Content Security Policy" in text for text in refused)  # JupyterLab's own script
    notebook.close()
    context.close()
