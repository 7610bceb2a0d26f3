"""What is asked of every notebook with explorers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pages import Notebook, barriers


class EveryNotebook:
    """Subclasses name the notebook and how many explorers it has; conftest runs it once for each class."""

    name: ClassVar[str]
    explorers: ClassVar[int] = 1

    def test_it_runs_to_the_end(self, notebook: Notebook):
        assert not notebook.errors()
        counts = notebook.page.evaluate(
            "() => [...jupyterapp.shell.currentWidget.content.model.cells]"
            ".filter(cell => cell.type === 'code').map(cell => cell.executionCount)"
        )
        assert counts == list(range(1, len(counts) + 1))

    def test_each_explorer_shows_pictures_and_words_before_any_click(
        self, notebook: Notebook, screenshots: Path
    ):
        for place, explorer in enumerate(notebook.explorers(self.explorers)):
            view = explorer.view(lambda view: view.pictures and view.words)
            explorer.screenshot(screenshots / f"{self.name}_{place + 1}.png")
            assert all(view.alts) and not view.message

    def test_every_control_has_a_name_for_screen_readers(self, notebook: Notebook):
        for explorer in notebook.explorers(self.explorers):
            explorer.view()
            told = explorer.names()
            assert told and all(name for _, name in told), told

    def test_nothing_bars_the_way_in_light_or_dark(self, notebook: Notebook):
        for explorer in notebook.explorers(self.explorers):
            explorer.view()
        with notebook.dark():
            assert barriers(notebook.page, ".ll-explorer", colours_only=True) == []
        assert barriers(notebook.page, ".ll-explorer") == []

    def test_nothing_turns_for_whoever_wants_less_motion(self, notebook: Notebook):
        notebook.page.emulate_media(reduced_motion="reduce")
        turns = """root => { root.classList.add('ll-working');
          const moving = root.getAnimations({subtree: true}).filter(a => a.animationName === 'll-turn');
          root.classList.remove('ll-working'); return moving.length }"""
        still = notebook.explorers(self.explorers)[0].root.evaluate(turns)
        notebook.page.emulate_media(reduced_motion="no-preference")
        assert (still, notebook.explorers(self.explorers)[0].root.evaluate(turns)) == (0, 1)

    def test_tab_reaches_every_control_in_the_order_of_the_page(self, notebook: Notebook):
        for explorer in notebook.explorers(self.explorers):
            explorer.view()
            assert explorer.reached_by_tab() == list(range(len(explorer.controls())))

    def test_views_do_not_stack_up(self, notebook: Notebook):
        before = [len(cell) for cell in notebook.outputs()]
        for explorer in notebook.explorers(self.explorers):
            pictures = len(explorer.view().pictures)
            for control in explorer.root.locator('[role="slider"]').all():
                if control.is_visible() and control.is_enabled():
                    upper = "noUi-handle-upper" in control.get_attribute("class")
                    for key in ("ArrowLeft", "ArrowRight") if upper else ("ArrowRight", "ArrowLeft"):
                        control.press(key)  # there, and back for the tests that follow
            explorer.view(lambda view, pictures=pictures: len(view.pictures) == pictures)
        assert [len(cell) for cell in notebook.outputs()] == before
        notebook.explorers(self.explorers)
