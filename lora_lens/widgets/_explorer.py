"""What all explorers are made of: controls over pictures and tables, slow parts, errors said in place."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, wraps
from html import escape
from threading import RLock
from time import monotonic

import pandas as pd
from IPython.display import HTML as StaticHTML, display
from ipywidgets import HTML, Checkbox, Dropdown, HBox, Layout, SelectMultiple, VBox, Widget as Control
from traitlets import Bunch

from lora_lens._base.errors import LoraLensError
from lora_lens._base.validate import known_settings
from lora_lens.widgets._page import Page
from lora_lens.widgets._settings import Setting, call, rounded, settings_of

ALL = ""  # not None, for which ipywidgets shows an empty box
WORDS = {"description_width": "initial"}  # longer descriptions are cut off otherwise
PAUSE = 0.15  # seconds without a change before slow parts begin
ONE_MOVE = 1  # seconds within which moves of one slider are one choice
DONE = object()

LOG = logging.getLogger(__name__)

Parts = Iterator[tuple[HTML, str] | None]


class Explorer(VBox):
    """Controls over a message over results; in a saved page, a still copy of the view that was displayed.

    The first view raises what is wrong, later ones say it in place.

    Args:
        rows: of controls.
        results: what is hidden while something is wrong.
        draw: sets the results and may change controls itself; that draws nothing again. For what takes
            longer than a slider's move may, it returns an iterator: each pair of a box and its content is
            shown as it comes, each None is a place to stop at. It runs in a thread of its own after a short
            pause, and is dropped as soon as a control changes; at first, and where no event loop runs, all
            of it is done at once.
        page: to be told of clicks.
    """

    def __init__(
        self,
        rows: list[list[Control]],
        results: list[Control],
        draw: Callable[[], Parts | None],
        page: Page | None = None,
    ) -> None:
        self._draw = draw
        self.page = Page() if page is None else page
        self._results = VBox(results)
        self._message = HTML()
        self._drawing = False
        self._lock = RLock()  # ipykernel handles a control's first message in another thread than later ones
        self._view = 0  # counts what the controls have asked for: slow parts of an earlier view are stale
        self._slow: set[HTML] = set()
        self._following: asyncio.Task | None = None
        picks = {} if page is None else {"picked": Setting("picked", page, trait="picked")}
        self._settings = picks | settings_of(rows)
        self._earlier: list[dict[str, object]] = []
        self._moved: tuple[object, float] = (None, 0)  # the slider moved last, and when
        self._made: tuple = ()
        self._fill(draw() or ())
        self._first = self._now = self._state()
        for row in rows:
            for control in row:
                control.observe(self._redraw, "value")
        self.page.observe(self._redraw, ["picked", "brushed"])
        self.page.on_msg(lambda _page, message, _buffers: self.undo() if message == "undo" else None)
        wrapped = Layout(flex_flow="row wrap", grid_gap="0 12px")
        controls = [HBox(row, layout=wrapped) for row in rows]
        super().__init__([self.page, *controls, self._message, self._results])
        self.add_class("ll-explorer")
        self.page.still = f"ll-{self.model_id}"

    def made_by(
        self,
        function: str,
        given: Mapping[str, object],
        required: Mapping[str, bool],
        view: Mapping[str, object],
    ) -> None:
        """Say which call made it, and begin with another view.

        Args:
            function: its name in ``ll.widgets``.
            given: its arguments.
            required: all that it has, and whether they are written without their names.
            view: settings of controls, by name.

        Raises:
            TypeError: there is no such control.
            ValueError: a control cannot have that value, or what they ask for cannot be shown.
        """
        self._made = function, given, required
        if view:
            known_settings(view, [*required, *self._settings], function)
            self.set(view)
            self._fill(self._draw() or ())
        self._now = self._state()
        self.page.code = self.code()

    def code(self) -> str:
        """The line of Python that makes it as it is now."""
        function, given, required = self._made
        changed = {name: value for name, value in self._now.items() if value != self._first[name]}
        return call(function, given, [name for name, needed in required.items() if needed], changed)

    def undo(self) -> None:
        """Take the last choice back; moves of one slider that follow each other are one."""
        with self._lock:
            if self._earlier:
                self._now = self._earlier.pop()
                self._moved = None, 0
                self.set(self._now)
                self._redraw(None)

    def _state(self) -> dict[str, object]:
        return {name: setting.value for name, setting in self._settings.items()}

    def set(self, view: Mapping[str, object]) -> None:
        """Move controls, in their order and with a look after each: one may decide what the next ones offer.

        Args:
            view: values by name, such as those of :meth:`code`.

        Raises:
            ValueError: a control cannot have that value.
        """
        self._drawing = True
        try:
            for name, setting in self._settings.items():
                if name in view and setting.value != view[name]:
                    setting.set(view[name])
                    with suppress(LoraLensError):
                        self._draw()
        finally:
            self._drawing = False

    def _remember(self, control: object) -> None:
        """Keep what was chosen before, for undo, and the code of what is chosen now."""
        now, when = self._state(), monotonic()
        if now != self._now:
            slider = control if hasattr(control, "continuous_update") else None
            if slider is None or self._moved[0] is not slider or when - self._moved[1] > ONE_MOVE:
                self._earlier.append(self._now)
            self._now, self._moved = now, (slider, when)
        self.page.undoable = bool(self._earlier)
        if self._made:
            self.page.code = self.code()

    def close(self) -> None:
        self._view += 1
        super().close()

    def _ipython_display_(self) -> None:
        display(self._repr_mimebundle_(), raw=True)
        display(StaticHTML(self.still()))

    def still(self) -> str:
        """The view as HTML for pages without a kernel: no controls, but what they said."""
        chosen = "; ".join(setting.in_words() for setting in self._settings.values() if setting.title)
        shown = [box.value for box in _boxes(self._results.children)]
        content = f"<p>{escape(chosen)}</p>" + "\n".join(shown)
        return f'<div class="ll-still {self.page.still}">{content}</div>'

    def _redraw(self, change: Bunch | None) -> None:
        """Draw what is quick, and begin what is slow; changes of controls by ``draw`` draw nothing again."""
        if change is not None and rounded(change.old) == rounded(change.new):
            return  # a slider whose place was set says where it is, rounded in another way: nobody moved it
        with self._lock:
            if not self._drawing:
                self._draw_anew(change)

    def _draw_anew(self, change: Bunch | None) -> None:
        self._drawing = True
        self._view += 1
        self.page.busy = True
        follows = False
        try:
            parts = self._draw()
            if self._message.value:
                self._message.value, self._results.layout.display = "", None
            loop = running_loop()
            if parts is not None and loop is not None:
                for box in self._slow:
                    box.add_class("ll-stale")
                self._following = loop.create_task(self._follow(parts, self._view))
                follows = True
            else:
                self._fill(parts or ())
        except Exception as error:
            self._say(said(error, "this view", log=False))
            if not isinstance(error, LoraLensError):
                raise
        finally:
            self._drawing = False
            self._remember(change and change.owner)
            if not follows:
                self.page.busy = False

    async def _follow(self, parts: Parts, view: int) -> None:
        """Show slow parts as they are ready, as long as nobody asks for another view."""
        await asyncio.sleep(PAUSE)
        try:
            while view == self._view:
                part = await asyncio.get_running_loop().run_in_executor(_worker(), next, parts, DONE)
                if part is DONE:
                    break
                if view == self._view:
                    self._fill([part])
        except Exception as error:
            words = said(error, "this view")
            if view == self._view:
                self._say(words)
        finally:
            if view == self._view:
                self.page.busy = False

    def _fill(self, parts: Iterable[tuple[HTML, str] | None]) -> None:
        for part in parts:
            if part is not None:
                box, html = part
                box.value = html
                box.remove_class("ll-stale")
                self._slow.add(box)

    def _say(self, words: str) -> None:
        self._message.value = alarm(words)
        self._results.layout.display = "none"  # a stale picture would answer another question


def explorer(make: Callable[..., Explorer]) -> Callable[..., Explorer]:
    """Let a function that makes an explorer take settings of its controls as keywords; errors are brief.

    A notebook shows bad arguments in one line, without the way that led there.
    """
    signature = inspect.signature(make)
    parameters = signature.parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    required = {name: p.default is p.empty for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}

    @wraps(make)
    def made(*arguments: object, **options: object) -> Explorer:
        try:
            own = {name: value for name, value in options.items() if open_ended or name in parameters}
            try:
                given = signature.bind(*arguments, **own).arguments
            except TypeError:  # an argument is missing, perhaps as it was misspelt
                known_settings(options, list(parameters), make.__name__)
                raise
            shown = make(*arguments, **own)
            view = {name: value for name, value in options.items() if name not in own}
            shown.made_by(make.__name__, given | given.pop("settings", {}), required, view)
            return shown
        except LoraLensError as error:
            line = f"{type(error).__name__}: {error}"
            error._render_traceback_ = lambda: [line]  # IPython asks for it
            raise

    return made


def said(error: Exception, what: str, log: bool = True) -> str:
    """An error in one line: a mistake in the input in its own words, a bug with its type, and in the log."""
    if isinstance(error, LoraLensError):
        return str(error)
    if log:
        LOG.error("%s failed", what, exc_info=error)
    return f"{what} failed: {type(error).__name__}: {error}"


def running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@cache
def _worker() -> ThreadPoolExecutor:
    """One thread for the slow parts of all explorers: two would only slow each other down."""
    return ThreadPoolExecutor(1, thread_name_prefix="explorer")


def _boxes(results: Iterable[Control]) -> Iterator[HTML]:
    for result in results:
        if isinstance(result, HTML):
            yield result
        yield from _boxes(getattr(result, "children", ()))


def dropdown(description: str, options: Iterable[str] = ()) -> Dropdown:
    options = list(options)
    return Dropdown(options=options, index=0 if options else None, description=description)


def offer_with_all(choice: Dropdown, options: list[tuple[str, object]]) -> None:
    """``all`` and ``options``; the value stays if it is among them."""
    options = [("all", ALL), *options]
    if tuple(options) != choice.options:
        kept = choice.value
        choice.options = options
        choice.value = kept if kept in dict(options).values() else ALL


def rate_choice(table: pd.DataFrame) -> Dropdown:
    """The learning rates; at first the one that learns most."""
    learnt = table.groupby("lr")["accuracy"].mean()
    options = [(f"{rate:g}", rate) for rate in learnt.index]
    return Dropdown(options=options, value=learnt.idxmax(), description="learning rate", style=WORDS)


def window_choice(names: list[str]) -> SelectMultiple:
    """Windows and methods, at first all of them."""
    layout = Layout(width="24em", max_width="98%")
    rows = min(len(names), 6)
    return SelectMultiple(options=names, value=names, rows=rows, description="windows", layout=layout)


def checkbox(description: str) -> Checkbox:
    return Checkbox(True, description=description, indent=False, layout=Layout(width="max-content"))


def alarm(words: str) -> str:
    """What is wrong, in words that a screen reader says at once."""
    return f'<p role="alert"><b>{escape(words)}</b></p>'


def table_box() -> HTML:
    numbers = HTML()
    numbers.add_class("jp-RenderedHTMLCommon")  # so that it looks like every other table of the notebook
    return numbers


def html_table(table: pd.DataFrame, rows_in_view: int | None = None, headings: str = "right") -> str:
    text = table.to_html(index=False, border=0, na_rep="", justify=headings)
    if rows_in_view is None or len(table) <= rows_in_view:
        return text
    height = f"max-height: {2 * rows_in_view}em; overflow: auto"
    return f'<div tabindex="0" role="region" aria-label="table" style="{height}">{text}</div>'


def percent(mean: float, low: float, high: float) -> str:
    """A share with its interval, if there is one."""
    if pd.isna(mean):
        return ""
    return f"{100 * mean:.1f}" + ("" if pd.isna(low) else f" [{100 * low:.1f}, {100 * high:.1f}]")


def plain_texts(values: pd.Series) -> list[str]:
    """Numbers and names as short as they can be said; nothing where there is nothing."""
    return ["" if pd.isna(v) else f"{v:g}" if isinstance(v, float) else str(v) for v in values]
