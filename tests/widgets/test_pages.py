from __future__ import annotations

import pytest
from explored import control, narrow_vit, pictures
from ipywidgets import HTML, VBox

import lora_lens as ll


def test_a_page_is_made_when_it_is_first_opened_and_stays():
    spectra = ll.spectra(narrow_vit(0), progress=False)
    made = []

    def spectrum() -> VBox:
        made.append("spectrum")
        return ll.widgets.spectrum_explorer(spectra)

    tabs = ll.widgets.pages({"first": lambda: HTML("here"), "spectrum": spectrum})
    assert [child.children[0].value for child in tabs.children] == ["here", "<p>making this page ...</p>"]
    assert not made and tabs.titles == ("first", "spectrum")
    tabs.selected_index = 1
    (explorer,) = tabs.children[1].children
    control(explorer, "position").value = 0.0
    shown = pictures(explorer)
    tabs.selected_index = 0
    tabs.selected_index = 1
    assert made == ["spectrum"] and pictures(tabs.children[1].children[0]) == shown


def test_a_page_that_cannot_be_made_says_why_and_the_others_are_there(tmp_path):
    tabs = ll.widgets.pages(
        {"lost": lambda: ll.Sweep.open(tmp_path / "none").table, "second": lambda: HTML("here")}
    )
    assert "there is no results folder or file" in tabs.children[0].children[0].value
    tabs.selected_index = 1
    assert tabs.children[1].children[0].value == "here"


def test_a_bug_on_a_page_shows_its_type_and_is_logged(caplog):
    tabs = ll.widgets.pages({"broken": lambda: {}["key"]})
    assert "this page failed: KeyError: &#x27;key&#x27;" in tabs.children[0].children[0].value
    (record,) = caplog.records
    assert record.exc_info[0] is KeyError


@pytest.mark.parametrize("explorers", [None, 3, [], {"name": None}, {"name": HTML("made already")}])
def test_what_makes_no_pages_is_refused(explorers):
    with pytest.raises(ll.errors.InputTypeError, match=r"must be a (dict of )?function"):
        ll.widgets.pages(explorers)


def test_no_pages_are_refused():
    with pytest.raises(ValueError, match="no explorers"):
        ll.widgets.pages({})
