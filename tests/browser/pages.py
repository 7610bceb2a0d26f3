"""A notebook in JupyterLab and its explorers, as somebody with a mouse, a keyboard and eyes has them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from servers import Server

if TYPE_CHECKING:  # without playwright these tests are skipped, and for that they must be readable
    from playwright.sync_api import Browser, CDPSession, ConsoleMessage, Locator, Page

KINDS = ("select", "input", "button", '[role="slider"]', '[contenteditable="true"]', "[tabindex]")
CONTROLS = ", ".join(f'{kind}:not([tabindex="-1"])' for kind in KINDS)
QUIET = 0.4  # seconds without a change after which a view counts as ready; slow parts pause 0.15 s
RUN_SECONDS = 1800  # of a whole notebook; 03 without its finished runs takes minutes
POLLED = 500  # milliseconds; by default a page is asked, and drawn, at every frame
PATIENCE = 120  # seconds; nothing here is a measurement, and test machines are slow and busy

STATE = """root => {
  const laidOut = root.checkVisibility({contentVisibilityAuto: true});  // else there is no text yet
  if (!laidOut) root.scrollIntoView();
  const seen = element => element.checkVisibility();
  const pictures = [...root.querySelectorAll('img')].filter(seen);
  const texts = [...root.querySelectorAll('.widget-html-content')].filter(seen);
  return {
    pictures: pictures.map(i => ({alt: i.alt, source: i.currentSrc, width: i.complete ? i.naturalWidth : 0})),
    words: texts.map(text => text.innerText.trim()).filter(text => text),
    message: [...root.querySelectorAll('[role="alert"]')].filter(seen).map(e => e.innerText).join(' '),
    busy: !laidOut || root.matches('.ll-working') || Boolean(root.querySelector('.ll-stale')),
  }
}"""


@dataclass(frozen=True)
class View:
    """What an explorer shows at one moment."""

    pictures: tuple[tuple[str, str], ...]  # alternative text, source
    words: tuple[str, ...]
    message: str

    @property
    def alts(self) -> list[str]:
        return [alt for alt, _ in self.pictures]

    @property
    def alt(self) -> str:
        """Of the first picture."""
        return self.alts[0] if self.pictures else ""

    @property
    def text(self) -> str:
        return "\n".join(self.words)


class Explorer:
    """One explorer on a page, found by its place among those there."""

    def __init__(self, page: Page, place: int = 0, within: str = "") -> None:
        self.page = page
        self.root = page.locator(f"{within} .ll-explorer".strip()).nth(place)

    def view(self, wanted: Callable[[View], object] = lambda view: True) -> View:
        """What is shown once nothing changes, all pictures are there, and it is what is ``wanted``."""
        return self._settled(lambda view: (view.pictures or view.message) and wanted(view), "it never came")

    def changed(
        self, act: Callable[[], object], wanted: Callable[[View], object] = lambda view: True
    ) -> View:
        """What is shown after ``act``, which must change a picture, words or the message.

        On a busy machine a view can rest half way, with one picture of the new one: ``wanted`` is waited for.
        """
        before = self.view()
        act()
        return self._settled(
            lambda view: view != before and wanted(view), "it did not change to what it should"
        )

    def slider(self, label: str, upper: bool = False) -> Locator:
        """The handle of a slider, of a range's lower or upper end: it takes arrow keys and can be dragged."""
        return self._labelled(label).locator(f".noUi-handle-{'upper' if upper else 'lower'}")

    def track(self, label: str) -> Locator:
        return self._labelled(label).locator(".noUi-base")

    def readout(self, label: str) -> Locator:
        return self._labelled(label).locator(".widget-readout")

    def select(self, label: str) -> Locator:
        return self._labelled(label).locator("select")

    def options(self, label: str) -> list[str]:
        """As they are written in Python: ipywidgets shows their spaces as no-break spaces."""
        return [text.replace("\xa0", " ") for text in self.select(label).locator("option").all_inner_texts()]

    def button(self, label: str) -> Locator:
        return self.root.locator("button").filter(has_text=re.compile(f"^{re.escape(label)}$"))

    def checkbox(self, label: str) -> Locator:
        return self.root.locator(".widget-checkbox", has_text=label).locator("input")

    def press(self, label: str, key: str) -> None:
        handle = self.slider(label)
        handle.focus()
        handle.press(key)

    def drag(self, label: str, to: float) -> None:
        """The handle with the mouse to a share of the slider's length."""
        handle = self.slider(label)
        handle.scroll_into_view_if_needed()
        box, track = handle.bounding_box(), self.track(label).bounding_box()
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + box["width"] / 2, y)
        self.page.mouse.down()
        self.page.mouse.move(track["x"] + to * track["width"], y, steps=8)
        self.page.mouse.up()

    def type_in(self, label: str, text: str) -> None:
        """Into the number beside a slider."""
        readout = self.readout(label)
        readout.click()
        readout.press("ControlOrMeta+a")
        readout.press_sequentially(text)
        readout.press("Enter")

    def choose_other(self, label: str) -> str:
        """An option that is not the one chosen; its name."""
        select = self.select(label)
        now = select.evaluate("select => select.selectedOptions[0].text")
        other = next(option for option in reversed(self.options(label)) if option != now)
        select.select_option(label=other)
        return other

    def spots(self) -> list[Locator]:
        """The points of a picture that can be picked."""
        return self.root.locator(".ll-spot").all()

    def brush(self, left: float, bottom: float, right: float, top: float) -> None:
        """A rectangle with the mouse, in shares of the sides of the picture's axes."""
        area = self.root.locator(".ll-brush")
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        for x, y, act in ((left, bottom, self.page.mouse.down), (right, top, self.page.mouse.up)):
            place = box["x"] + x * box["width"], box["y"] + (1 - y) * box["height"]
            self.page.mouse.move(*place, steps=5)
            act()

    def controls(self) -> list[Locator]:
        """All that can have the focus, in the page's order."""
        return [
            control
            for control in self.root.locator(CONTROLS).all()
            if control.is_visible() and control.is_enabled()
        ]

    def names(self) -> list[tuple[str, str]]:
        """Role and name of every control as Chromium tells them to a screen reader."""
        self.root.scroll_into_view_if_needed()
        devtools = self.page.context.new_cdp_session(self.page)
        return [_told(devtools, control) for control in self.controls()]

    def reached_by_tab(self) -> list[int]:
        """The places among ``controls`` where the focus was while Tab was pressed, from the first on."""
        controls = self.controls()
        handles = [control.element_handle() for control in controls]
        self.root.evaluate("(root, order) => { root.tabOrder = order }", handles)
        where = "root => root.tabOrder.indexOf(document.activeElement)"
        controls[0].focus()
        reached = []
        for _ in range(2 * len(controls)):
            reached.append(self.root.evaluate(where))
            self.page.keyboard.press("Tab")
            if self.root.evaluate("root => !root.contains(document.activeElement)"):
                break
        return reached

    def screenshot(self, path: Path) -> None:
        """All of it, however high."""
        size = self.page.viewport_size
        height = int(self.root.bounding_box()["height"])
        self.page.set_viewport_size({**size, "height": max(size["height"], height + 300)})
        self.root.scroll_into_view_if_needed()
        self.root.screenshot(path=path)
        self.page.set_viewport_size(size)

    def _labelled(self, label: str) -> Locator:
        named = self.page.locator(".widget-label").filter(has_text=re.compile(f"^{re.escape(label)}$"))
        return self.root.locator(".widget-inline-hbox", has=named)

    def _settled(self, wanted: Callable[[View], object], otherwise: str) -> View:
        self.root.scroll_into_view_if_needed()
        give_up = time.monotonic() + PATIENCE
        last, since = None, time.monotonic()
        while time.monotonic() < give_up:
            seen = self.root.evaluate(STATE)
            shown = View(
                tuple((picture["alt"], picture["source"]) for picture in seen["pictures"]),
                tuple(seen["words"]),
                seen["message"],
            )
            if shown != last:
                last, since = shown, time.monotonic()
            loaded = all(picture["width"] for picture in seen["pictures"])
            ready = loaded and not seen["busy"] and time.monotonic() - since > QUIET
            if ready and wanted(shown):
                return shown
            time.sleep(0.05)
        raise AssertionError(f"{otherwise} within {PATIENCE} s; {last.message} {last.words} {last.alts}")


def eventually(true: Callable[[], object], otherwise: str) -> None:
    """Wait until it is true."""
    give_up = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < give_up, f"{otherwise} within {PATIENCE} s"
        time.sleep(0.05)


def write_notebook(path: Path, *cells: str, failing: Iterable[int] = ()) -> None:
    """A notebook of these cells; the ``failing`` ones do not keep those below from running."""
    import nbformat.v4 as v4

    notebook = v4.new_notebook(cells=[v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for number in failing:
        notebook.cells[number].metadata["tags"] = ["raises-exception"]
    path.write_text(v4.writes(notebook))


class Notebook:
    """A notebook that JupyterLab shows, with a kernel of its own."""

    def __init__(self, page: Page, server: Server, path: str) -> None:
        self.page, self.path = page, path
        page.goto(server.address(f"lab/tree/{path}", reset=""))
        page.wait_for_function(
            "path => { const shown = window.jupyterapp?.shell.currentWidget;"
            " return shown?.context?.path === path && shown.sessionContext.session?.kernel }",
            arg=path,
            timeout=1000 * PATIENCE,
            polling=POLLED,
        )
        page.evaluate("async () => { const shown = jupyterapp.shell.currentWidget;"
                      " await shown.sessionContext.ready; await shown.revealed }")  # fmt: skip

    def run(self) -> None:
        """All cells; back when the last one has ended."""
        self.page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function(
            "() => { const shown = jupyterapp.shell.currentWidget;"
            " return shown.sessionContext.session.kernel.status === 'idle' &&"
            " [...shown.content.model.cells].every(cell => (cell.executionState ?? 'idle') === 'idle') }",
            timeout=1000 * RUN_SECONDS,
            polling=POLLED,
        )

    def restart(self) -> None:
        """The kernel, and wait until it is up again; nothing is run."""
        self.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.restartKernel()")

    def wait_for_kernel(self) -> None:
        """Until one answers, after its end."""
        self.page.wait_for_function(
            "() => jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
        )

    def outputs(self) -> list[list[dict]]:
        """Of every code cell, as they would be saved."""
        return self.page.evaluate(
            "() => [...jupyterapp.shell.currentWidget.content.model.cells]"
            ".filter(cell => cell.outputs).map(cell => cell.outputs.toJSON())"
        )

    def errors(self) -> list[str]:
        """The tracebacks in the outputs."""
        return ["\n".join(o["traceback"]) for cell in self.outputs() for o in cell if "traceback" in o]

    def explorers(self, count: int) -> list[Explorer]:
        """All of them, once so many are drawn: the last cell has ended before the page shows what it made."""
        eventually(
            lambda: self.page.locator(".ll-explorer").count() == count, f"there are no {count} explorers"
        )
        return [Explorer(self.page, place) for place in range(count)]

    def kernel_process(self) -> int:
        """The number that a cell printed with ``os.getpid``."""
        printed = [o["text"] for cell in self.outputs() for o in cell if o.get("name") == "stdout"]
        return int("".join("".join(text) for text in printed))

    @contextmanager
    def dark(self) -> Iterator[None]:
        """JupyterLab in its dark theme meanwhile."""
        for theme, light in (("Dark", "false"), ("Light", "true")):
            change = "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"
            self.page.evaluate(change, f"JupyterLab {theme}")
            self.page.locator(f'body[data-jp-theme-light="{light}"]').wait_for(state="attached")
            if theme == "Dark":
                yield

    def close(self) -> None:
        """With its kernel."""
        self.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")


@contextmanager
def watched_page(browser: Browser, **context: object) -> Iterator[Page]:
    """A page of its own; fails in the end if the console showed an error or a request failed."""
    problems: list[str] = []
    opened = browser.new_context(**context)
    page = opened.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.on("console", lambda message: problems.extend(_complaint(message)))
    page.on("pageerror", lambda error: problems.append(f"error on the page: {error}"))
    page.on("requestfailed", lambda request: problems.append(f"no answer: {request.url} {request.failure}"))
    page.on("response", lambda r: problems.append(f"status {r.status}: {r.url}") if r.status >= 400 else None)
    try:
        yield page
        assert not problems, "\n".join(problems)
    finally:
        opened.close()


def barriers(
    page: Page, within: str | None = None, *, but: str | None = None, colours_only: bool = False
) -> list[str]:
    """What axe-core's rules find on the page, or in the elements that a selector names, but in some others.

    In the dark only the colours of a page are others.
    """
    from axe_playwright_python.sync_playwright import Axe

    part = {name: [[given]] for name, given in {"include": within, "exclude": but}.items() if given}
    options = {"preload": False} | ({"runOnly": ["color-contrast"]} if colours_only else {})  # no other file
    found = Axe().run(page, part or None, options).response["violations"]
    nodes = [(rule["id"], node) for rule in found for node in rule["nodes"]]
    return [f"{rule}: {node['html']}: {node['failureSummary']}" for rule, node in nodes]


def _complaint(message: ConsoleMessage) -> list[str]:
    return [f"console: {message.text}"] if message.type == "error" else []


def _told(devtools: CDPSession, control: Locator) -> tuple[str, str]:
    mark = control.evaluate("element => element.dataset.asked = Math.random().toString(36).slice(2)")
    found = devtools.send(
        "Runtime.evaluate", {"expression": f"document.querySelector('[data-asked=\"{mark}\"]')"}
    )
    asked = {"objectId": found["result"]["objectId"], "fetchRelatives": False}
    node = devtools.send("Accessibility.getPartialAXTree", asked)["nodes"][0]
    return node["role"]["value"], node.get("name", {}).get("value", "")
