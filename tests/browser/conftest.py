"""A real browser on real servers; where there is none, these tests are skipped and say so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pages import Explorer, Notebook, watched_page, write_notebook
from servers import REPOSITORY, Server, copy_of_notebooks, jupyterlab

# As for all tests: where there is a GPU, training would go there.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest.register_assert_rewrite("every_notebook")

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
ABSENT = [
    *(["Chromium (apt-get install chromium)"] if CHROMIUM is None else []),
    *(
        f"{name} (pip install {name})"
        for name in ("playwright", "axe-playwright-python", "jupyterlab", "voila")
        if find_spec(name.replace("-", "_")) is None
    ),
]
# Begun first, so that none of them runs alone in the end.
LONGEST = ("TestTradeoff", "TestLanguage", "test_site", "test_app", "TestResponse", "TestTradeoffScience")
LAPTOP = {"width": 1360, "height": 900}
SENTENCE = f"the explorers were not tested in a browser, because this is not installed: {', '.join(ABSENT)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.cls.__name__ if item.cls else item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)
    if ABSENT:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(SENTENCE))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ABSENT:
        terminalreporter.write_line(f"SKIPPED: {SENTENCE}", yellow=True, bold=True)


@pytest.fixture(scope="session")
def own_cache() -> None:
    """None of their own, as the other tests have: one notebook finds what another has left in the user's."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # as root it would not start
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_notebooks(tmp_path_factory.mktemp("browser") / "root")


@pytest.fixture(scope="session")
def lab(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with jupyterlab(root, tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture(scope="session")
def screenshots() -> Path:
    folder = Path(os.environ.get("LORA_LENS_SCREENSHOTS", REPOSITORY / "results" / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="class")
def notebook(request: pytest.FixtureRequest, browser: Browser, lab: Server, root: Path) -> Iterator[Notebook]:
    """The one that a class of tests names, or the one whose cells it has, run from start to end."""
    wanted = request.cls
    if hasattr(wanted, "cells"):
        path = root / "notebooks" / f"{wanted.name}.ipynb"
        write_notebook(path, *wanted.cells, failing=getattr(wanted, "failing", ()))
    with watched_page(browser, viewport=LAPTOP) as page:
        notebook = Notebook(page, lab, f"notebooks/{wanted.name}.ipynb")
        notebook.run()
        yield notebook
        notebook.close()


@pytest.fixture(scope="class")
def explorer(notebook: Notebook) -> Explorer:
    """Its first one."""
    return Explorer(notebook.page)
