"""A saved page: without kernel and network, the first view of an explorer is still there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pages import barriers, write_notebook

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

STATE = re.compile(r'<script type="application/vnd.jupyter.widget-state\+json">(.*?)</script>', re.DOTALL)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    notebook = tmp_path_factory.mktemp("exported") / "spectra.ipynb"
    write_notebook(
        notebook,
        """import lora_lens as ll

model, source = ll.tasks.bundled.vision()
ll.widgets.window_explorer(model, ll.spectra(model, progress=False), source)""",
    )
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--execute", str(notebook)]
    subprocess.run(command, check=True, capture_output=True)
    return notebook.with_suffix(".html")


@pytest.fixture
def page(browser: Browser, exported: Path) -> Page:
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(exported.as_uri(), wait_until="load")
    yield page
    context.close()


def test_pictures_and_numbers_of_the_first_view_are_shown(page: Page, screenshots: Path):
    still = page.locator(".ll-still")
    page.screenshot(path=screenshots / "exported.png", full_page=True)
    pictures = still.locator("img").all()
    assert len(pictures) >= 3 and all(p.evaluate("image => image.naturalWidth") > 100 for p in pictures)
    assert all(p.is_visible() for p in pictures)
    assert "rank 8 at position 0.5 " in pictures[0].get_attribute("alt")
    assert "[44, 52) of 96" in still.locator("table").inner_text()
    assert barriers(page, ".ll-still") == []


def test_what_the_controls_said_is_told(page: Page):
    told = page.locator(".ll-still").inner_text()
    assert "rank: 8" in told and "position: 0.5" in told


def test_no_name_of_a_python_class_is_shown_instead(page: Page):
    shown = page.locator("body").inner_text()
    assert "VBox(" not in shown and "Explorer(" not in shown


def test_the_state_of_the_widgets_is_in_the_file(exported: Path):
    (state,) = STATE.findall(exported.read_text())
    names = [model["model_name"] for model in json.loads(state)["state"].values()]
    assert {"FloatSliderModel", "IntSliderModel", "DropdownModel", "HTMLModel"} <= set(names)
