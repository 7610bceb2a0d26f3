"""The site of ``make site``, opened from disk without a network; its notebooks are not executed here."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest
from firefox import ABSENT, FIREFOX, firefox
from pages import barriers, watched_page
from servers import REPOSITORY

import lora_lens as ll

if TYPE_CHECKING:
    from playwright.sync_api import Browser

WIDTHS = {"phone": 390, "laptop": 1366, "projector": 1920}
THEMES = ("light", "dark")
PAGES = (
    "index",
    "docs/after_training",
    "docs/explorers",
    "docs/generated/gallery",
    "docs/generated/lora_lens",
    "docs/generated/lora_lens.forgetting",
    "findings/README",
    "notebooks/01_spectra",
    "tests/zoo/README",
    "files/findings/peft_needs_attrs_for_corda.sh",
)


MOVING = """[...document.querySelectorAll('*')].filter(element => {
  const style = getComputedStyle(element);
  const lasts = style.transitionDuration.split(', ').some(duration => parseFloat(duration) > 0);
  return lasts || style.animationName !== 'none' || style.scrollBehavior === 'smooth';
}).map(element => element.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx_book_theme", reason="the extra [site] is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going"]
    command += ["--conf-dir", "docs", "--doctree-dir", folder / "doctrees", ".", folder / "html"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder / "html"


class Contents(HTMLParser):
    """What a page points to, and where others can point to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.anchors |= {told.get("id"), told.get("name")} - {None}
        self.targets |= {told.get("href"), told.get("src")} - {None}


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Contents]:
    found = [page for page in site.rglob("*.html") if "_static" not in page.parts]  # templates of the theme
    return {page: Contents(page) for page in found}


def test_every_link_leads_to_a_page_and_a_place_on_it(site: Path, pages: dict[Path, Contents]):
    wrong = []
    for page, contents in pages.items():
        for target in contents.targets:
            address = urlsplit(target)
            if address.scheme or address.netloc:
                continue
            file = (page.parent / unquote(address.path)).resolve() if address.path else page
            there = pages[file].anchors if file in pages else set()
            if not file.is_file() or (address.fragment and unquote(address.fragment) not in there):
                wrong.append(f"{page.relative_to(site)}: {target}")
    assert len(pages) > 60 and wrong == []


def test_all_public_names_are_in_the_reference(pages: dict[Path, Contents]):
    reference = [found.anchors for page, found in pages.items() if page.name.startswith("lora_lens")]
    anchors = set().union(*reference)
    top = {name for name in ll.__all__ if not isinstance(getattr(ll, name), ModuleType)}
    assert {f"lora_lens.{name}" for name in top} <= anchors
    assert {f"lora_lens.plots.{name}" for name in ll.plots.__all__} <= anchors
    assert {
        "lora_lens.tasks.bundled.vision",
        "lora_lens.Sweep.open",
        "lora_lens.errors.InputError",
    } <= anchors


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_and_ask_nothing_of_the_network(
    browser: Browser, site: Path, screenshots: Path, width: str, theme: str
):
    view = {"viewport": {"width": WIDTHS[width], "height": 900}, "color_scheme": theme, "offline": True}
    with watched_page(browser, reduced_motion="reduce", **view) as page:
        asked: list[str] = []
        barred: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for name in PAGES:
            page.goto((site / f"{name}.html").as_uri())
            page.screenshot(path=screenshots / f"site_{name.replace('/', '_')}_{width}_{theme}.png")
            assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0, name
            assert page.evaluate("document.documentElement.dataset.theme") == theme
            if width == "laptop" and "generated" not in name:  # Sphinx's signatures break axe's rule of lists
                assert page.evaluate(MOVING) == [], name
                rows = "tbody tr:nth-of-type(n+9)" if name == "tests/zoo/README" else None  # all alike
                found = barriers(page, but=rows, colours_only=theme == "dark")
                barred += [f"{name}: {barrier}" for barrier in found]
        assert [address for address in asked if not address.startswith(("file:", "data:"))] == []
        assert barred == []


@pytest.mark.skipif(FIREFOX is None, reason=ABSENT)
def test_firefox_opens_it(site: Path, screenshots: Path):
    with firefox() as page:
        page.open((site / "index.html").as_uri())
        page.screenshot(screenshots / "site_index_firefox.png")
        assert page.evaluate("document.title").endswith("lora_lens")
        assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0


def test_the_search_finds_functions_and_prose(browser: Browser, site: Path):
    with watched_page(browser, offline=True) as page:
        for words, found in (
            ("rewind", "docs/after_training.html"),
            ("u_shape_test", "lora_lens.forgetting"),
        ):
            page.goto(f"{(site / 'search.html').as_uri()}?q={words}")
            page.locator(f"#search-results a[href*='{found}']").first.wait_for()


def test_the_gallery_has_a_picture_and_its_code_for_every_plot(browser: Browser, site: Path):
    with watched_page(browser, offline=True) as page:
        page.goto((site / "docs/generated/gallery.html").as_uri())
        for name in set(ll.plots.__all__) - {"house_style"}:
            example = page.locator("section", has=page.locator(f"> h3:text-is('{name}')")).last
            example.scroll_into_view_if_needed()
            assert f"ll.plots.{name}" in example.locator("pre").first.inner_text()
            picture = example.locator("img").first
            assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100


def test_the_guide_shows_below_their_lines_the_explorers_that_need_no_training(browser: Browser, site: Path):
    others = {"training_explorer", "rewind_explorer", "growth_explorer", "expert_explorer", "pages"}
    with watched_page(browser, offline=True) as page:
        page.goto((site / "docs/explorers.html").as_uri())
        for name in set(ll.widgets.__all__) - others:
            pictures = page.locator(f".highlight-python:has-text('ll.widgets.{name}(') + .ll-still img")
            assert pictures.first.get_attribute("alt")
            assert pictures.first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100


def test_names_in_the_guide_lead_to_the_reference_and_formulas_are_drawn(browser: Browser, site: Path):
    with watched_page(browser, offline=True) as page:
        page.goto((site / "docs/after_training.html").as_uri())
        page.locator("article a", has_text="ll.rewind").first.click()
        page.wait_for_url("**/docs/generated/lora_lens.html#lora_lens.rewind")
        page.goto((site / "notebooks/01_spectra.html").as_uri())
        assert page.locator("math").count() > 50
        assert page.locator("math").first.bounding_box()["height"] > 5
