"""What all explorers share: slow parts that follow, errors in place, the still copy in a saved page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from threading import Event, Thread

import pytest
from explored import message, shows_results
from ipywidgets import HTML, IntSlider

import lora_lens as ll
from lora_lens.widgets._explorer import Explorer

SECONDS = 60  # to wait for anything


class Squares:
    """An explorer whose quick part is a number and whose slow parts are its square and its cube."""

    def __init__(self) -> None:
        self.number = IntSlider(1, 0, 100, description="number")
        self.quick, self.square, self.cube = HTML(), HTML(), HTML()
        self.begun: list[int] = []
        self.free, self.free_cube = Event(), Event()  # nothing slow goes on before they are set
        self.free.set()
        self.free_cube.set()
        self.explorer = Explorer([[self.number]], [self.quick, self.square, self.cube], self.draw)

    def draw(self) -> Iterator[tuple[HTML, str] | None]:
        self.quick.value = f"{self.number.value}"
        return self.slow(self.number.value)

    def slow(self, number: int) -> Iterator[tuple[HTML, str] | None]:
        self.begun.append(number)
        assert self.free.wait(SECONDS)
        if number == 13:
            raise ll.errors.InputError("13 has no square here")
        if number == 14:
            raise KeyError("fourteen")
        yield self.square, f"{number**2}"
        yield None
        assert self.free_cube.wait(SECONDS)
        yield self.cube, f"{number**3}"

    def shown(self) -> tuple[str, str, str]:
        return self.quick.value, self.square.value, self.cube.value


async def until(true) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.01)


def test_without_an_event_loop_and_at_first_slow_parts_are_there_at_once():
    squares = Squares()
    assert squares.shown() == ("1", "1", "1")
    squares.number.value = 3
    assert squares.shown() == ("3", "9", "27")


def test_slow_parts_follow_a_pause_and_keep_the_loop_free():
    squares = Squares()

    async def session() -> None:
        squares.free_cube.clear()
        squares.number.value = 5
        assert squares.shown() == ("5", "1", "1")
        assert "ll-stale" in squares.square._dom_classes and "ll-stale" in squares.cube._dom_classes
        await until(lambda: squares.square.value == "25")  # each is shown when it is ready
        assert "ll-stale" not in squares.square._dom_classes and squares.cube.value == "1"
        for _ in range(10):
            await asyncio.sleep(0.01)
        assert squares.explorer.page.busy
        squares.free_cube.set()
        await until(lambda: squares.cube.value == "125")
        await until(lambda: not squares.explorer.page.busy)
        assert "ll-stale" not in squares.cube._dom_classes

    asyncio.run(session())


def test_of_many_changes_only_the_last_is_worked_at(monkeypatch):
    monkeypatch.setattr("lora_lens.widgets._explorer.PAUSE", 2)  # seconds, in which all changes are made
    squares = Squares()

    async def session() -> None:
        for number in range(20, 40):
            squares.number.value = number
            await asyncio.sleep(0)
        await until(lambda: squares.cube.value == f"{39**3}")

    asyncio.run(session())
    assert squares.begun == [1, 39]


def test_work_that_became_stale_is_dropped_half_way():
    squares = Squares()
    cubes = []
    squares.cube.observe(lambda change: cubes.append(change["new"]), "value")

    async def session() -> None:
        squares.free_cube.clear()
        squares.number.value = 6
        await until(lambda: squares.square.value == "36")
        squares.number.value = 7
        squares.free_cube.set()
        await until(lambda: squares.cube.value == "343")

    asyncio.run(session())
    assert cubes == ["343"]


def test_a_change_in_another_thread_while_a_view_is_drawn_is_drawn_after_it():
    """ipykernel handles a control's first message in its main thread, later ones in JupyterLab's subshell."""
    one, other, shown = IntSlider(1, description="one"), IntSlider(1, description="other"), HTML()
    drawing, free, changed = Event(), Event(), Event()
    other.observe(lambda _: changed.set(), "value")
    free.set()

    def draw() -> None:
        wanted = f"{one.value} {other.value}"
        drawing.set()
        assert free.wait(SECONDS)
        shown.value = wanted

    Explorer([[one, other]], [shown], draw)
    drawing.clear()
    free.clear()
    first = Thread(target=lambda: setattr(one, "value", 2), daemon=True)
    first.start()
    assert drawing.wait(SECONDS)
    second = Thread(target=lambda: setattr(other, "value", 3), daemon=True)
    second.start()
    assert changed.wait(SECONDS)
    second.join(0.2)  # a change that is dropped ends at once, any other waits for the first one's picture
    free.set()
    for thread in (first, second):
        thread.join(SECONDS)
    assert shown.value == "2 3"


@pytest.mark.parametrize(
    ("number", "words"), [(13, "13 has no square here"), (14, "this view failed: KeyError: 'fourteen'")]
)
def test_an_error_in_a_slow_part_is_said_in_place_until_the_next_change(number, words, caplog):
    squares = Squares()

    async def session() -> None:
        squares.number.value = number
        await until(lambda: not shows_results(squares.explorer))
        assert words in message(squares.explorer).replace("&#x27;", "'")
        assert not squares.explorer.page.busy
        squares.number.value = 2
        await until(lambda: squares.cube.value == "8")
        assert shows_results(squares.explorer)

    asyncio.run(session())
    logged = [record.exc_info[0] for record in caplog.records]
    assert logged == ([KeyError] if number == 14 else [])  # a bug, and no mistake in the input


def test_a_bug_in_the_quick_part_is_said_with_its_type_and_raised():
    number, picture = IntSlider(1, 0, 9), HTML()

    def draw() -> None:
        picture.value = f"{1 / (number.value - 3):g}"
        if number.value == 4:
            raise ValueError("a library's own")

    panel = Explorer([[number]], [picture], draw)
    for value, words in (
        (3, "this view failed: ZeroDivisionError: "),
        (4, "this view failed: ValueError: a "),
    ):
        with pytest.raises((ZeroDivisionError, ValueError)):
            number.value = value
        assert words in message(panel) and not shows_results(panel)


def test_what_is_closed_works_at_nothing():
    squares = Squares()

    async def session() -> None:
        squares.number.value = 8
        squares.explorer.close()
        await squares.explorer._following

    asyncio.run(session())
    assert squares.begun == [1]


NOTEBOOK = """
import torch
import lora_lens as ll
torch.manual_seed(0)
spectra = ll.SpectrumSet([ll.spectrum.factorize("blocks.0.fc", torch.randn(8, 8))])
ll.widgets.spectrum_explorer(spectra, rank=2)
"""


@pytest.fixture(scope="module")
def executed():
    import nbformat  # which takes seconds
    from nbclient import NotebookClient

    wrong = "import pandas as pd\nll.widgets.tradeoff_explorer(pd.DataFrame({'a': [1]}))"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (NOTEBOOK, wrong)])
    return NotebookClient(notebook, timeout=300, allow_errors=True, kernel_name="python3").execute()


def test_a_saved_page_holds_the_widgets_state_and_a_still_copy(executed):
    from nbconvert import HTMLExporter

    outputs = [output for output in executed.cells[0].outputs if output["output_type"] == "display_data"]
    assert len(outputs) == 2
    assert "application/vnd.jupyter.widget-view+json" in outputs[0]["data"]
    page, _ = HTMLExporter().from_notebook_node(executed)
    assert "application/vnd.jupyter.widget-state+json" in page
    still = page[page.index('<div class="ll-still') :]
    assert "kind: all; block: all" in still and "position: 0.5" in still
    assert '<img alt="singular values of 1 weight' in still and "[3, 5) of 8" in still


def test_bad_arguments_are_one_line_in_a_notebook(executed):
    (error,) = executed.cells[1].outputs
    assert error["ename"] == "InputError"
    assert len(error["traceback"]) == 1 and "\n" not in error["traceback"][0]
    assert "the table has no column method, rank" in error["traceback"][0]


def test_the_spectrum_explorer_is_an_explorer(spectra):
    assert isinstance(ll.widgets.spectrum_explorer(spectra), Explorer)
