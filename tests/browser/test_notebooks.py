"""The notebooks of the course in JupyterLab: their explorers answer to mouse and keyboard."""

from __future__ import annotations

import re
from collections.abc import Callable

from every_notebook import EveryNotebook
from pages import Explorer, Notebook, View, eventually


def follow_the_sliders(explorer: Explorer) -> View:
    """The window of rank 8, to both ends, and one component more; what was shown at position 1."""

    def shows(rank: int, position: int, place: str) -> Callable[[View], bool]:
        return lambda view: f"rank {rank} at position {position} " in view.alt and place in view.text

    last = explorer.changed(lambda: explorer.press("position", "End"), shows(8, 1, "[88, 96) of 96"))
    explorer.changed(lambda: explorer.drag("position", to=0), shows(8, 0, "[0, 8) of 96"))
    explorer.changed(lambda: explorer.press("rank", "ArrowRight"), shows(9, 0, "[0, 9) of 96"))
    return last


class TestTour(EveryNotebook):
    name = "00_tour"
    explorers = 2

    def test_the_window_follows_the_sliders(self, explorer: Explorer):
        assert "rank 8 at position 0.5 " in explorer.view().alt
        follow_the_sliders(explorer)

    def test_the_stored_runs_are_shown_by_another_score(self, notebook: Notebook):
        tradeoff = notebook.explorers(self.explorers)[1]
        assert tradeoff.view().alt.startswith("forgetting against the position")
        tradeoff.changed(
            lambda: tradeoff.button("accuracy").click(),
            lambda view: view.alt.startswith("accuracy against the position"),
        )

    def test_what_was_found_is_said_from_the_stored_runs(self, notebook: Notebook):
        assert "From the table of these 220 runs" in str(notebook.outputs()[-1])


class TestSpectra(EveryNotebook):
    name = "01_spectra"
    explorers = 2

    def test_the_shaded_window_follows_the_sliders(self, explorer: Explorer):
        assert "rank 8 at position 0.5 " in explorer.view().alt
        follow_the_sliders(explorer)

    def test_one_kind_and_one_block_are_one_weight(self, explorer: Explorer):
        before = explorer.view()
        kind, other = explorer.options("kind")[1:3]
        explorer.changed(
            lambda: explorer.select("kind").select_option(label=kind),
            lambda view: kind in view.text and other not in view.text,
        )
        block = explorer.options("block")[1]
        explorer.changed(
            lambda: explorer.select("block").select_option(label=block),
            lambda view: view.alt.startswith("singular values of 1 weight of "),
        )
        explorer.select("block").select_option(label="all")
        explorer.changed(
            lambda: explorer.select("kind").select_option(label="all"), lambda view: view == before
        )

    def test_another_model_shows_its_own_kinds(self, explorer: Explorer):
        now = explorer.options("kind")
        name = explorer.options("model")[1]
        explorer.changed(
            lambda: explorer.select("model").select_option(label=name),
            lambda view: f" of {name}, with the window" in view.alt,
        )
        eventually(lambda: explorer.options("kind") != now, "the kinds stay those of the other model")

    def test_a_metrics_window_is_compared_with_another_spectrum(self, notebook: Notebook):
        metric = notebook.explorers(self.explorers)[1]
        metric.changed(
            lambda: metric.press("position", "Home"), lambda view: "rank 8 at position 0 " in view.alt
        )
        metric.changed(
            lambda: metric.select("compared with").select_option(label="digits"),
            lambda view: "in common with digits" in view.text and "components of digits" in view.alt,
        )


class TestWindows(EveryNotebook):
    name = "02_windows"
    explorers = 2

    def test_the_window_follows_the_sliders(self, explorer: Explorer):
        at_first = explorer.view(lambda view: "[44, 52) of 96" in view.text)
        assert "rank 8 at position 0.5 " in at_first.alt
        last = follow_the_sliders(explorer)
        assert last.pictures[0] != at_first.pictures[0]

    def test_the_window_of_another_layer_is_cut_out(self, explorer: Explorer):
        before = explorer.view()
        layer = explorer.options("layer")[-1]
        after = explorer.changed(
            lambda: explorer.select("layer").select_option(label=layer),
            lambda view: sum(alt.startswith(layer) for alt in view.alts) >= 2,
        )
        assert all(new != old for new, old in zip(after.pictures[:2], before.pictures[:2], strict=True))


class TestTradeoff(EveryNotebook):
    name = "03_tradeoff"

    def test_the_curves_are_those_of_the_chosen_score(self, explorer: Explorer):
        assert explorer.view().alt.startswith("forgetting against the position")
        explorer.changed(
            lambda: explorer.button("accuracy").click(),
            lambda view: view.alt.startswith("accuracy against the position"),
        )

    def test_a_rate_that_is_left_out_is_gone_from_the_table(self, explorer: Explorer):
        def lists_it(view: View) -> bool:
            return bool(re.search(r"\s0\.01\s", view.text))

        explorer.view(lists_it)
        explorer.changed(explorer.checkbox("0.01").uncheck, lambda view: not lists_it(view))
        explorer.changed(explorer.checkbox("0.01").check, lists_it)

    def test_a_point_that_is_clicked_is_told_about(self, explorer: Explorer):
        spot = next(spot for spot in explorer.spots() if spot.get_attribute("aria-pressed") == "false")
        label = spot.get_attribute("aria-label")
        told = f"The run: {label.partition(': accuracy')[0]}"
        explorer.changed(lambda: spot.click(force=True), lambda view: told in view.text)

    def test_points_are_picked_by_keyboard(self, explorer: Explorer):
        told = re.search("The run: .*", explorer.view().text)[0]
        explorer.root.locator('.ll-spot[tabindex="0"]').focus()
        explorer.page.keyboard.press("PageDown")
        label = explorer.page.evaluate("document.activeElement.getAttribute('aria-label')")
        other = f"The run: {label.partition(': accuracy')[0]}"
        explorer.changed(
            lambda: explorer.page.keyboard.press("Enter"),
            lambda view: other in view.text and told not in view.text,
        )

    def test_a_brushed_rectangle_narrows_the_choice(self, explorer: Explorer):
        def some(view: View) -> bool:
            found = re.search(r"(\d+) of 42 runs", view.text)
            return bool(found) and 0 < int(found[1]) < 42

        everything = explorer.root.get_by_text("42 of 42 runs")
        explorer.button("all runs").click()
        everything.wait_for()
        explorer.changed(lambda: explorer.brush(0.7, 0.04, 0.98, 0.98), some)
        explorer.button("all runs").click()
        everything.wait_for()


class TestTradeoffScience(EveryNotebook):
    name = "04_tradeoff_science"
    explorers = 3

    def test_windows_are_compared_in_another_way(self, explorer: Explorer):
        assert "equal learning rate" in explorer.view().alt
        explorer.changed(
            lambda: explorer.select("comparison").select_option(label="own best rate"),
            lambda view: "own best learning rate" in view.alt,
        )
        share = explorer.readout("accuracy to match").inner_text()
        explorer.changed(
            lambda: explorer.select("comparison").select_option(label="matched accuracy"),
            lambda view: f"at matched accuracy {share}" in view.alt,
        )
        explorer.changed(
            lambda: explorer.press("accuracy to match", "ArrowLeft"),
            lambda view: f"at matched accuracy {int(share[:-1]) - 1}%" in view.alt,
        )

    def test_examples_of_one_class_are_shown(self, notebook: Notebook):
        forgotten = notebook.explorers(self.explorers)[1]
        before = forgotten.view()
        name = forgotten.options("class")[1]
        forgotten.changed(
            lambda: forgotten.select("class").select_option(label=name),
            lambda view: f"images of {name} that most of" in view.alt and view.words != before.words,
        )

    def test_another_window_beside_the_middle_one(self, notebook: Notebook):
        pair = notebook.explorers(self.explorers)[2]
        before = pair.view(lambda view: any("window at 0.5" in alt for alt in view.alts))
        pair.changed(
            lambda: pair.select("A").select_option(label="window at 1"),
            lambda view: any("window at 1" in alt for alt in view.alts) and view.words != before.words,
        )
        pair.changed(
            lambda: pair.select("A").select_option(label="window at 0.5"),
            lambda view: "A and B are the same runs" in view.message and not view.pictures,
        )
        pair.changed(lambda: pair.select("A").select_option(label="window at 0"))


class TestLanguage(EveryNotebook):
    name = "05_language"
    explorers = 2

    def test_the_window_follows_the_slider_in_both(self, notebook: Notebook):
        for explorer in notebook.explorers(self.explorers):
            explorer.changed(
                lambda explorer=explorer: explorer.press("position", "End"),
                lambda view: "position 1 " in view.alt,
            )

    def test_another_text_is_looked_at(self, notebook: Notebook):
        explorer = notebook.explorers(self.explorers)[1]
        explorer.view()
        text = explorer.options("text")[2]
        explorer.changed(
            lambda: explorer.select("text").select_option(label=text),
            lambda view: "of text 3" in "".join(view.alts[1:2]),
        )


class TestContinual(EveryNotebook):
    name = "07_continual"

    def test_another_method_changes_pictures_and_scores(self, explorer: Explorer):
        before = explorer.view()
        name = explorer.options("strategy and method")[-1]
        view = explorer.changed(
            lambda: explorer.select("strategy and method").select_option(label=name),
            lambda view: view.alt != before.alt and view.words != before.words,
        )
        assert view.pictures[0] != before.pictures[0]

    def test_one_order_is_told_task_by_task(self, explorer: Explorer):
        order = explorer.options("order")[1]
        explorer.changed(
            lambda: explorer.select("order").select_option(label=order),
            lambda view: "Learnt in this order: " in view.text,
        )


class TestAfterTraining(EveryNotebook):
    name = "08_after_training"
    explorers = 2

    def test_the_point_follows_t_back_from_the_trained_model(self, explorer: Explorer):
        at_first = explorer.view(lambda view: "whole update at t = 1:" in view.alt)
        back = explorer.changed(
            lambda: explorer.press("t", "Home"), lambda view: "whole update at t = 0:" in view.alt
        )
        assert back.pictures[0] != at_first.pictures[0]
        explorer.changed(
            lambda: explorer.press("t", "ArrowRight"), lambda view: "whole update at t = 0.2:" in view.alt
        )

    def test_another_path_has_points_of_its_own(self, explorer: Explorer):
        path = explorer.options("path")[-1]
        explorer.changed(
            lambda: explorer.select("path").select_option(label=path),
            lambda view: view.alt.startswith(f"{path} at t = "),
        )
        explorer.changed(lambda: explorer.press("t", "Home"), lambda view: f"{path} at t = 0:" in view.alt)

    def test_curve_and_map_of_the_layers_follow_the_checkpoint(self, notebook: Notebook):
        checkpoints = notebook.explorers(self.explorers)[1]
        steps = [re.search(r"at step (\d+)", alt)[1] for alt in checkpoints.view().alts]
        assert len(set(steps)) == 1
        checkpoints.changed(
            lambda: checkpoints.press("step", "ArrowLeft"),
            lambda view: all(f"at step {steps[0]}" not in alt for alt in view.alts),
        )
        checkpoints.changed(
            lambda: checkpoints.select("of each layer").select_option(label="share inside the window"),
            lambda view: view.alts[1].startswith("share inside the window by layer"),
        )
