"""What an explorer cannot show is said in place, in one line, and nothing beside it dies."""

from __future__ import annotations

from typing import ClassVar

import pytest
from pages import Explorer, Notebook, eventually

SPECTRA = """
from collections import OrderedDict

import pandas as pd
import torch
import lora_lens as ll

model, source = ll.tasks.bundled.vision()
spectra = ll.spectra(model, progress=False)
two = ll.SpectrumSet([spectra["blocks.0.attn.qkv"], spectra["blocks.1.mlp.fc1"]])
table = ll.Sweep.open("../data/results/digits.jsonl.xz").table
"""


class TestBadInput:
    name = "bad_input"
    cells: ClassVar = (
        SPECTRA,
        "ll.widgets.spectrum_explorer(two)",
        "ll.widgets.tradeoff_explorer(table.head(0))",
        "ll.widgets.tradeoff_explorer(pd.DataFrame({'colour': ['red']}))",
        """body, head = torch.nn.Linear(28, 3), torch.nn.Linear(84, 10)
parts = {"body": body, "flat": torch.nn.Flatten(), "head": head}
by_row = torch.nn.Sequential(OrderedDict(parts))  # sees rows of pixels, no square grid of tokens
ll.widgets.window_explorer(by_row, ll.spectra(by_row, progress=False), source)""",
        "ll.widgets.tradeoff_explorer(table)",
    )
    failing = (2, 3, 4)

    @pytest.fixture
    def spectra(self, notebook: Notebook) -> Explorer:
        return notebook.explorers(2)[0]

    @pytest.fixture
    def tradeoffs(self, notebook: Notebook) -> Explorer:
        return notebook.explorers(2)[1]

    @pytest.mark.parametrize(
        ("place", "said"),
        [
            (0, "the table is empty"),
            (1, "the table has no column method, rank"),
            (2, "none of the layers with a spectrum"),
        ],
        ids=["empty table", "foreign table", "no matching layer"],
    )
    def test_what_cannot_be_explored_is_one_line(self, notebook: Notebook, place: int, said: str):
        shown = notebook.errors()[place]
        assert said in shown and "\n" not in shown

    def test_the_explorers_beside_live_on(self, spectra: Explorer, tradeoffs: Explorer):
        spectra.changed(lambda: spectra.press("position", "End"), lambda view: "position 1 " in view.alt)
        tradeoffs.changed(lambda: tradeoffs.button("accuracy").click())

    @pytest.mark.parametrize(("typed", "taken"), [("7", "1"), ("-3", "0")])
    def test_a_number_outside_the_range_becomes_its_end(self, spectra: Explorer, typed: str, taken: str):
        spectra.type_in("position", "0.5")
        spectra.changed(
            lambda: spectra.type_in("position", typed), lambda view: f"position {taken} " in view.alt
        )
        assert float(spectra.readout("position").inner_text()) == float(taken)

    def test_words_for_a_number_change_nothing(self, spectra: Explorer):
        before = spectra.view()
        spectra.type_in("position", "many")
        assert spectra.view() == before
        chosen = float(spectra.slider("position").get_attribute("aria-valuenow"))
        readout = spectra.readout("position")
        eventually(lambda: readout.inner_text() == f"{chosen:.2f}", "the words stay where the number was")

    def test_a_choice_without_rows_is_said_until_another_is_made(self, spectra: Explorer):
        spectra.changed(lambda: spectra.select("kind").select_option(label="attn.qkv"))
        said = "block 1 has no attn.qkv; choose another block or kind"
        spectra.changed(
            lambda: spectra.select("block").select_option(label="1"),
            lambda view: (
                view.message == said and not view.pictures
            ),  # a stale one would answer another question
        )
        spectra.changed(
            lambda: spectra.select("block").select_option(label="all"),
            lambda view: view.pictures and not view.message,
        )

    def test_nothing_chosen_is_said_until_something_is(self, tradeoffs: Explorer):
        boxes = tradeoffs.root.locator("input[type=checkbox]").all()
        for box in boxes[:-1]:
            tradeoffs.changed(box.uncheck)
        said = "choose at least one learning rate"
        tradeoffs.changed(boxes[-1].uncheck, lambda view: view.message == said and not view.pictures)
        tradeoffs.changed(boxes[0].check, lambda view: len(view.pictures) == 2 and not view.message)
