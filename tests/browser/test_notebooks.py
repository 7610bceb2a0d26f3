"""The notebooks of the course in JupyterLab: their explorers answer to mouse and keyboard."""

from __future__ import annotations

import re

from every_notebook import EveryNotebook
from pages import Explorer, Notebook


class TestSpectra(EveryNotebook):
    name = "01_spectra"

    def test_the_shaded_window_follows_the_sliders(self, explorer: Explorer):
        assert "rank 8 at position 0.5 " in explorer.view().alts[0]
        last = explorer.changed(lambda: explorer.press("position", "End"))
        assert "rank 8 at position 1 " in last.alts[0] and "[88, 96) of 96" in last.text
        first = explorer.changed(lambda: explorer.drag("position", to=0))
        assert "rank 8 at position 0 " in first.alts[0] and "[0, 8) of 96" in first.text
        longer = explorer.changed(lambda: explorer.press("rank", "ArrowRight"))
        assert "rank 9 at position 0 " in longer.alts[0] and "[0, 9) of 96" in longer.text

    def test_one_kind_and_one_block_are_one_weight(self, explorer: Explorer):
        before = explorer.view()
        kind, other = explorer.options("kind")[1:3]
        chosen = explorer.changed(lambda: explorer.select("kind").select_option(label=kind))
        assert kind in chosen.text and other not in chosen.text
        block = explorer.options("block")[1]
        one = explorer.changed(lambda: explorer.select("block").select_option(label=block))
        assert one.alts[0].startswith("singular values of 1 weight of ")
        explorer.select("block").select_option(label="all")
        assert explorer.changed(lambda: explorer.select("kind").select_option(label="all")) == before

    def test_another_model_shows_its_own_kinds(self, explorer: Explorer):
        now = explorer.options("kind")
        name = explorer.options("model")[1]
        view = explorer.changed(lambda: explorer.select("model").select_option(label=name))
        assert f" of {name}, with the window" in view.alts[0]
        assert explorer.options("kind") != now


class TestWindows(EveryNotebook):
    name = "02_windows"
    explorers = 2

    def test_the_window_follows_the_sliders(self, explorer: Explorer):
        at_first = explorer.view()
        assert "rank 8 at position 0.5 " in at_first.alts[0] and "[44, 52) of 96" in at_first.text
        last = explorer.changed(lambda: explorer.press("position", "End"))
        assert "rank 8 at position 1 " in last.alts[0] and "[88, 96) of 96" in last.text
        assert last.pictures[0] != at_first.pictures[0]
        first = explorer.changed(lambda: explorer.drag("position", to=0))
        assert "rank 8 at position 0 " in first.alts[0] and "[0, 8) of 96" in first.text
        longer = explorer.changed(lambda: explorer.press("rank", "ArrowRight"))
        assert "rank 9 at position 0 " in longer.alts[0] and "[0, 9) of 96" in longer.text

    def test_the_window_of_another_layer_is_cut_out(self, explorer: Explorer):
        before = explorer.view()
        layer = explorer.options("layer")[-1]
        after = explorer.changed(lambda: explorer.select("layer").select_option(label=layer))
        named = [alt for alt in after.alts if alt.startswith(layer)]
        assert len(named) >= 2
        assert all(new != old for new, old in zip(after.pictures[:2], before.pictures[:2], strict=True))


class TestTradeoff(EveryNotebook):
    name = "03_tradeoff"

    def test_the_curves_are_those_of_the_chosen_score(self, explorer: Explorer):
        assert explorer.view().alts[0].startswith("forgetting against the position")
        accuracy = explorer.changed(lambda: explorer.button("accuracy").click())
        assert accuracy.alts[0].startswith("accuracy against the position")

    def test_a_rate_that_is_left_out_is_gone_from_the_table(self, explorer: Explorer):
        assert re.search(r"\s0\.02\s", explorer.view().text)
        without = explorer.changed(explorer.checkbox("0.02").uncheck)
        assert not re.search(r"\s0\.02\s", without.text)
        explorer.changed(explorer.checkbox("0.02").check)

    def test_a_point_that_is_clicked_is_told_about(self, explorer: Explorer):
        spot = next(spot for spot in explorer.spots() if spot.get_attribute("aria-pressed") == "false")
        label = spot.get_attribute("aria-label")
        view = explorer.changed(lambda: spot.click(force=True))
        assert f"The run: {label.partition(': accuracy')[0]}" in view.text

    def test_points_are_picked_by_keyboard(self, explorer: Explorer):
        told = re.search("The run: .*", explorer.view().text)[0]
        explorer.root.locator('.ll-spot[tabindex="0"]').focus()
        explorer.page.keyboard.press("PageDown")
        label = explorer.page.evaluate("document.activeElement.getAttribute('aria-label')")
        view = explorer.changed(lambda: explorer.page.keyboard.press("Enter"))
        assert f"The run: {label.partition(': accuracy')[0]}" in view.text and told not in view.text

    def test_a_brushed_rectangle_narrows_the_choice(self, explorer: Explorer):
        def inside() -> int:
            return int(re.search(r"(\d+) of 66 runs", explorer.view().text)[1])

        everything = explorer.root.get_by_text("66 of 66 runs")
        explorer.button("all runs").click()
        everything.wait_for()
        explorer.changed(lambda: explorer.brush(0.7, 0.04, 0.98, 0.98))
        assert 0 < inside() < 66
        explorer.button("all runs").click()
        everything.wait_for()


class TestTradeoffScience(EveryNotebook):
    name = "04_tradeoff_science"
    explorers = 3

    def test_windows_are_compared_in_another_way(self, explorer: Explorer):
        assert "equal learning rate" in explorer.view().alts[0]
        best = explorer.changed(lambda: explorer.select("comparison").select_option(label="own best rate"))
        assert "own best learning rate" in best.alts[0]
        matched = explorer.changed(
            lambda: explorer.select("comparison").select_option(label="matched accuracy")
        )
        share = explorer.readout("accuracy to match").inner_text()
        assert f"at matched accuracy {share}" in matched.alts[0]
        less = explorer.changed(lambda: explorer.press("accuracy to match", "ArrowLeft"))
        assert f"at matched accuracy {int(share[:-1]) - 1}%" in less.alts[0]

    def test_examples_of_one_class_are_shown(self, notebook: Notebook):
        forgotten = notebook.explorers()[1]
        before = forgotten.view()
        name = forgotten.options("class")[1]
        view = forgotten.changed(lambda: forgotten.select("class").select_option(label=name))
        assert f"images of {name} that most of" in view.alts[0]
        assert view.words != before.words and view.pictures[0] != before.pictures[0]

    def test_another_window_beside_the_middle_one(self, notebook: Notebook):
        pair = notebook.explorers()[2]
        before = pair.view()
        assert any("window at 0.5" in alt for alt in before.alts)
        view = pair.changed(lambda: pair.select("A").select_option(label="window at 1"))
        assert any("window at 1" in alt for alt in view.alts) and view.words != before.words
        same = pair.changed(lambda: pair.select("A").select_option(label="window at 0.5"))
        assert "A and B are the same runs" in same.message and not same.pictures
        pair.changed(lambda: pair.select("A").select_option(label="window at 0"))


class TestLanguage(EveryNotebook):
    name = "05_language"
    explorers = 2

    def test_the_window_follows_the_slider_in_both(self, notebook: Notebook):
        for explorer in notebook.explorers():
            last = explorer.changed(lambda explorer=explorer: explorer.press("position", "End"))
            assert "position 1 " in last.alts[0]

    def test_another_text_is_looked_at(self, notebook: Notebook):
        explorer = notebook.explorers()[1]
        text = explorer.options("text")[2]
        view = explorer.changed(lambda: explorer.select("text").select_option(label=text))
        assert "of text 3" in view.alts[1]


class TestContinual(EveryNotebook):
    name = "07_continual"

    def test_another_method_changes_pictures_and_scores(self, explorer: Explorer):
        before = explorer.view()
        name = explorer.options("strategy and method")[-1]
        view = explorer.changed(lambda: explorer.select("strategy and method").select_option(label=name))
        assert view.pictures[0] != before.pictures[0] and view.words != before.words
        assert view.alts[0] != before.alts[0]

    def test_one_order_is_told_task_by_task(self, explorer: Explorer):
        order = explorer.options("order")[1]
        view = explorer.changed(lambda: explorer.select("order").select_option(label=order))
        assert "Learnt in this order: " in view.text
