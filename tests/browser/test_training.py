"""The live panel: a run grows while the page stays alive; it is paused, stopped, and survives a bad end."""

from __future__ import annotations

import re
import time
from typing import ClassVar

from pages import Explorer, Notebook, eventually

PANEL = """
import lora_lens as ll

model, source = ll.tasks.bundled.vision()
digits = ll.tasks.bundled.digits().first(train=1000, test=200)
panel = ll.widgets.training_explorer(
    model, digits, source.first(test=200), ll.spectra(model, progress=False), steps=400, evaluations=41
)
panel
"""


class TestTraining:
    name = "training"
    cells: ClassVar = (PANEL,)

    def test_before_any_click_it_says_what_to_do(self, explorer: Explorer):
        view = explorer.view(lambda view: "press Start" in view.text and view.pictures)
        assert all(view.alts)
        assert all(name for _, name in explorer.names())

    def test_curves_grow_and_the_page_stays_alive(self, explorer: Explorer):
        explorer.button("Start").click()
        first = step_after(explorer, 0)
        drawn = explorer.root.locator("img").get_attribute("src")
        explorer.press("position", "End")  # counts for the next run
        wait_for(explorer, "position 1,")
        step_after(explorer, first)
        picture = explorer.root.locator("img")  # another one every tenth step
        eventually(lambda: picture.get_attribute("src") != drawn, "the curves did not grow")

    def test_a_paused_run_stands_still_and_goes_on(self, explorer: Explorer):
        explorer.button("Pause").click()
        wait_for(explorer, "paused")
        stands = step_at_rest(explorer)
        explorer.button("Go on").click()
        step_after(explorer, stands)

    def test_a_stopped_run_is_a_row_of_the_table(self, explorer: Explorer):
        explorer.button("Stop").click()
        wait_for(explorer, "was stopped")
        rows = explorer.root.locator("table tbody tr")
        eventually(lambda: rows.count() == 1 and "stopped" in rows.first.inner_text(), "no row was added")
        start, stop = explorer.button("Start"), explorer.button("Stop")
        eventually(lambda: start.is_enabled() and stop.is_disabled(), "the buttons did not follow")

    def test_a_restart_under_a_running_training_is_said(self, notebook: Notebook, explorer: Explorer):
        explorer.button("Start").click()
        step_after(explorer, 0)
        notebook.restart()
        explorer.root.locator(".ll-no-kernel").wait_for()
        notebook.run()
        explorer.view(lambda view: "press Start" in view.text)


def step_of(explorer: Explorer) -> int:
    found = re.search(r": step (\d+) of", explorer.root.inner_text())
    return int(found[1]) if found else 0


def step_after(explorer: Explorer, step: int) -> int:
    eventually(lambda: step_of(explorer) > step, f"it did not go beyond step {step}")
    return step_of(explorer)


def step_at_rest(explorer: Explorer) -> int:
    """The step, once it has been the same for three seconds."""
    since, step = time.monotonic(), step_of(explorer)

    def rests() -> bool:
        nonlocal since, step
        if (now := step_of(explorer)) != step:
            since, step = time.monotonic(), now
        return time.monotonic() - since > 3

    eventually(rests, "the steps go on")
    return step


def wait_for(explorer: Explorer, words: str) -> None:
    explorer.root.get_by_text(words).first.wait_for()
