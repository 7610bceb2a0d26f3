"""The web page of ``make app``: for whoever has its token, on phone, laptop and projector, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from firefox import ABSENT, FIREFOX, firefox
from pages import Explorer, barriers, eventually, watched_page
from servers import Server, web_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTHS = {"phone": 390, "laptop": 1280, "projector": 1920}
THEMES = ("light", "dark")
ONCE = pytest.mark.parametrize("page", ["light"], indirect=True)  # colours change neither names nor controls
# By how many pixels the page, what an explorer lies in or one of its controls is too wide. A wide picture or
# table may be scrolled for itself.
BEYOND = """explorer => {
  const right = control => control.getBoundingClientRect().right - innerWidth;
  let beyond = document.scrollingElement.scrollWidth - innerWidth;
  for (let outer = explorer; outer; outer = outer.parentElement)
    if (getComputedStyle(outer).overflowX !== 'visible' || outer === explorer)
      beyond = Math.max(beyond, outer.scrollWidth - outer.clientWidth);
  const controls = [...explorer.querySelectorAll('select, input, button, .widget-readout')];
  return Math.max(beyond, ...controls.filter(c => c.checkVisibility() && !c.matches('.ll-spot')).map(right));
}"""
# The least height of a picture just after it came, which moves all that lies below.
NOTE_HEIGHTS = """(() => {
  const root = document.querySelector('.ll-explorer');
  root.least = Infinity;
  const heights = () => [...root.querySelectorAll('img')].map(image => image.offsetHeight);
  const note = () => { root.least = Math.min(root.least, ...heights()) };
  new MutationObserver(note).observe(root, {childList: true, subtree: true});
})()"""
END = "\ue010"  # the key, as WebDriver has it
TABS = ".jupyter-widget-tab .lm-TabBar-tab"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with web_page(tmp_path_factory.mktemp("app")) as server:
        yield server


@pytest.fixture(scope="module", params=THEMES)
def page(request: pytest.FixtureRequest, browser: Browser, app: Server) -> Iterator[Page]:
    with watched_page(browser, viewport={"width": WIDTHS["laptop"], "height": 900}) as page:
        page.goto(app.address("", theme=request.param))
        page.locator(TABS).first.wait_for()
        page.theme = request.param
        yield page


@pytest.mark.parametrize("query", ["", "?token=guessed"])
def test_it_refuses_whoever_has_no_token(app: Server, query: str):
    with urlopen(f"{app.url}/{query}") as answer:
        shown = answer.read().decode()
        assert urlsplit(answer.url).path == "/login"
    assert "token" in shown and "lora_lens" not in shown and "jupyter-widget" not in shown


def test_every_page_shows_a_picture_and_fits_every_width(page: Page, screenshots: Path):
    eventually(lambda: page.locator(TABS).count() >= 6, "there are no six tabs")
    widths = WIDTHS if page.theme == "light" else {"laptop": WIDTHS["laptop"]}  # colours move nothing
    too_wide, barred = [], []
    for number, tab in enumerate(page.locator(TABS).all()):
        name = tab.inner_text()
        tab.click()
        page.locator(".ll-explorer").nth(number).wait_for()
        assert not Explorer(page, number).view().message, name
        for device, width in widths.items():
            page.set_viewport_size({"width": width, "height": 900})
            Explorer(page, number).view()
            beyond = page.locator(".ll-explorer").nth(number).evaluate(BEYOND)
            tab.scroll_into_view_if_needed()
            shot = f"app_{name.lower().replace(' ', '_')}_{device}_{page.theme}.png"
            page.screenshot(path=screenshots / shot)
            if beyond > 0:
                too_wide.append(f"{name} is {beyond:.0f} pixels too wide for {width}")
        found = barriers(page, colours_only=page.theme == "dark")
        barred += [f"{name}: {barrier}" for barrier in found]
    assert not too_wide and not barred


@ONCE
def test_pages_are_opened_by_keyboard(page: Page):
    tabs = page.locator(TABS)
    tabs.first.click()
    tabs.first.press("ArrowRight")
    page.keyboard.press("Enter")
    assert tabs.nth(1).get_attribute("aria-selected") == "true"


@ONCE
def test_a_control_moves_the_picture(page: Page):
    page.locator(TABS, has_text="Spectrum").click()
    explorer = Explorer(page, 0)
    explorer.changed(lambda: explorer.press("position", "End"), lambda view: "position 1 " in view.alt)


@ONCE
def test_every_control_has_a_name_for_screen_readers(page: Page):
    for number, tab in enumerate(page.locator(TABS).all()):
        tab.click()
        page.locator(".ll-explorer").nth(number).wait_for()
        explorer = Explorer(page, number)
        explorer.view()
        told = explorer.names()
        assert told and all(name for _, name in told), told


@pytest.mark.skipif(FIREFOX is None, reason=ABSENT)
def test_in_firefox_an_explorer_follows_its_slider(app: Server, screenshots: Path):
    position = "document.querySelector('.ll-explorer .noUi-handle[aria-label=position]')"
    alt = "(document.querySelector('.ll-explorer img')?.alt ?? '')"
    with firefox() as page:
        page.open(app.address("", theme="light"))
        page.wait_for(f"Boolean({position}) && {alt}.includes('position 0.5')")
        page.evaluate(NOTE_HEIGHTS)
        page.evaluate(f"{position}.focus()")
        page.press(END)
        page.wait_for(f"{alt}.includes('position 1 ')")
        assert page.evaluate("document.querySelector('.ll-explorer').least") > 100
        page.screenshot(screenshots / "app_spectrum_firefox.png")
