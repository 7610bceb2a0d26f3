"""The live panel: a run grows while the page stays alive; it is paused, stopped, and survives a bad end."""

from __future__ import annotations

import re
import time
from typing import ClassVar

import pytest
from pages import PATIENCE, Explorer, Notebook

PANEL = """
import lora_lens as ll

model, source = ll.embedded.vision()
digits = ll.embedded.digits().first(train=1000, test=200)
panel = ll.widgets.training_explorer(
    model, digits, source.first(test=200), ll.spectra(model, progress=False), steps=400, evaluations=41
)
panel
"""


class TestTraining:
    name = "training"
    cells: ClassVar = (PANEL,)

    def test_before_any_click_it_says_what_to_do(self, explorer: Explorer):
        view = explorer.view()
        assert "press Start" in view.text and view.pictures and all(view.alts)
        assert all(name for _, name in explorer.names())

    def test_curves_grow_and_the_page_stays_alive(self, explorer: Explorer):
        explorer.button("Start").click()
        first = step_after(explorer, 0)
        drawn = explorer.root.locator("img:not(.ll-script)").get_attribute("src")
        explorer.press("position", "End")  # counts for the next run
        wait_for(explorer, "position 1,")
        later = step_after(explorer, max(first, 25))  # tested every tenth step
        assert later > first
        assert explorer.root.locator("img:not(.ll-script)").get_attribute("src") != drawn

    def test_a_paused_run_stands_still_and_goes_on(self, explorer: Explorer):
        explorer.button("Pause").click()
        wait_for(explorer, "paused")
        time.sleep(2)  # for the step that was going on
        stands = step_of(explorer)
        time.sleep(3)
        assert step_of(explorer) == stands
        explorer.button("Go on").click()
        assert step_after(explorer, stands) > stands

    def test_a_stopped_run_is_a_row_of_the_table(self, explorer: Explorer):
        explorer.button("Stop").click()
        wait_for(explorer, "was stopped")
        assert explorer.root.locator("table tbody tr").count() == 1
        assert "stopped" in explorer.root.locator("table").inner_text()
        assert explorer.button("Start").is_enabled() and explorer.button("Stop").is_disabled()

    def test_a_restart_under_a_running_training_is_said(self, notebook: Notebook, explorer: Explorer):
        explorer.button("Start").click()
        step_after(explorer, 0)
        notebook.restart()
        explorer.root.locator(".ll-no-kernel").wait_for()
        notebook.run()
        assert "press Start" in notebook.explorers()[0].view().text


def step_of(explorer: Explorer) -> int:
    found = re.search(r": step (\d+) of", explorer.root.inner_text())
    return int(found[1]) if found else 0


def step_after(explorer: Explorer, step: int) -> int:
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        if (now := step_of(explorer)) > step:
            return now
        time.sleep(0.1)
    pytest.fail(f"still at step {step} after {PATIENCE} s: {explorer.root.inner_text()}")


def wait_for(explorer: Explorer, words: str) -> None:
    explorer.root.get_by_text(words).first.wait_for()
