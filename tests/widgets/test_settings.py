"""What explorers are set to: taken back, written as code, and given to their constructors."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from explored import control, narrow_vit, pictures, shows_results, text
from IPython.core.interactiveshell import InteractiveShell
from ipywidgets import HTML, Dropdown, FloatSlider

import lora_lens as ll
from lora_lens.widgets._explorer import Explorer
from lora_lens.widgets._settings import settings_of


@pytest.fixture(scope="module")
def spectra() -> ll.SpectrumSet:
    torch.manual_seed(0)
    names = [f"blocks.{block}.{kind}" for block in range(2) for kind in ("fc", "attn.qkv")]
    return ll.SpectrumSet([ll.spectrum.factorize(name, torch.randn(12, 8)) for name in names])


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    table = ll.Sweep.open(Path(__file__).parents[2] / "data" / "results" / "digits.jsonl.xz").table
    return table[table["lr"].isin([0.005, 0.02]) & (table["seed"] < 2)]


def seen(explorer: Explorer) -> tuple[list[bytes], str]:
    return pictures(explorer), text(explorer)


def test_choices_are_taken_back_one_by_one(spectra):
    explorer = ll.widgets.spectrum_explorer(spectra, rank=2)
    views = [seen(explorer)]
    assert not explorer.page.undoable
    for name, value in (("kind", "fc"), ("block", 1), ("rank", 3)):
        control(explorer, name).value = value
        views.append(seen(explorer))
    assert explorer.page.undoable
    for view in views[-2::-1]:
        explorer.undo()
        assert seen(explorer) == view
    assert not explorer.page.undoable
    explorer.undo()
    assert seen(explorer) == views[0]


def test_moves_of_one_slider_in_a_row_are_one_choice(spectra, monkeypatch):
    explorer = ll.widgets.spectrum_explorer(spectra, rank=2)
    position, rank = control(explorer, "position"), control(explorer, "rank")
    for value in (0.6, 0.7, 0.8):
        position.value = value
    rank.value = 3
    explorer.undo()
    assert (rank.value, position.value) == (2, 0.8)
    explorer.undo()
    assert position.value == 0.5
    position.value = 0.6  # no part of the moves before
    explorer.undo()
    assert position.value == 0.5
    monkeypatch.setattr("lora_lens.widgets._explorer.ONE_MOVE", -1)  # seconds: each is later than that
    for value in (0.6, 0.7):
        position.value = value
    explorer.undo()
    assert position.value == 0.6


def test_a_choice_that_changes_others_is_taken_back_with_them(spectra):
    explorer = ll.widgets.spectrum_explorer({"a": spectra, "b": ll.SpectrumSet([spectra["blocks.0.fc"]])}, 2)
    control(explorer, "kind").value, control(explorer, "block").value = "attn.qkv", 1
    before = seen(explorer)
    control(explorer, "model").value = "b"
    assert control(explorer, "kind").value == ""
    explorer.undo()
    assert shows_results(explorer) and seen(explorer) == before


def test_a_choice_that_cannot_be_shown_is_taken_back_as_well(table):
    explorer = ll.widgets.tradeoff_explorer(table)
    before = seen(explorer)
    control(explorer, "windows").value = ()
    assert not shows_results(explorer)
    explorer.undo()
    assert shows_results(explorer) and seen(explorer) == before


def test_a_brush_all_runs_and_a_pick_are_one_choice_each(table):
    explorer = ll.widgets.tradeoff_explorer(table)
    first = explorer.code()
    explorer.page.brushed = "0.2,0.2,0.9,0.9"
    explorer.page.picked = table["run"].iloc[5]
    control(explorer, "windows").value = ("LoRA", "window at 0")
    narrow = explorer.code()
    control(explorer, "all runs").click()
    assert explorer.code() == f'll.widgets.tradeoff_explorer(sweep, picked="{table["run"].iloc[5]}")'
    explorer.undo()
    assert explorer.code() == narrow
    explorer.undo()
    explorer.undo()
    explorer.undo()
    assert explorer.code() == first == "ll.widgets.tradeoff_explorer(sweep)"
    assert not explorer.page.undoable


def test_the_code_of_a_view_makes_it_again(spectra, table):
    explorer = ll.widgets.spectrum_explorer(spectra, rank=2)
    for name, value in (("kind", "fc"), ("block", 1), ("rank", 3), ("position", 0.31)):
        control(explorer, name).value = value
    code = 'll.widgets.spectrum_explorer(spectra, rank=3, kind="fc", block=1, position=0.31)'
    assert explorer.code() == explorer.page.code == code
    again = eval(code, {"ll": ll, "spectra": spectra})
    assert seen(again) == seen(explorer) and again.code() == code and not again.page.undoable

    explorer = ll.widgets.tradeoff_explorer(table)
    explorer.page.brushed = "0.2,0.2,0.9,0.9"
    explorer.page.picked = table["run"].iloc[5]
    control(explorer, "0.02").value = False
    control(explorer, "score").value = "accuracy"
    assert 'score="accuracy", lr=[0.005], accuracy=[' in explorer.code()
    again = eval(explorer.code(), {"ll": ll, "sweep": table})
    assert seen(again) == seen(explorer) and again.code() == explorer.code()


def test_controls_that_depend_on_each_other_are_set_in_their_order():
    sweep = ll.Sweep.open(Path(__file__).parents[2] / "data" / "results" / "digits.jsonl.xz")
    pair = ll.widgets.pair_explorer(sweep.only("seed < 2"), A="LoRA", lr_of_A=0.002, B="window at 1")
    assert pair.code() == 'll.widgets.pair_explorer(sweep, A="LoRA", lr_of_A=0.002, B="window at 1")'
    compared = ll.widgets.comparison_explorer(
        sweep.table, seeds=[0, 1], comparison="own best rate", tolerance=3
    )
    assert not control(compared, "2").value and "<td>2</td>" in text(compared)
    assert compared.code().endswith('comparison="own best rate", seeds=[0, 1], tolerance=3.0)')


def test_what_is_trained_can_be_said_at_the_start(digits, spectra):
    model, small = narrow_vit(0), digits.first(64, 40)
    explorer = ll.widgets.training_explorer(model, small, small, steps=20, position=0.25)
    assert control(explorer, "position").value == 0.25 and "position 0.25" in text(explorer)
    control(explorer, "steps").value = 40
    code = "ll.widgets.training_explorer(model, task, retain, steps=40, position=0.25)"
    assert explorer.code() == code


def test_objects_go_by_their_names_in_the_notebook(spectra):
    shell = InteractiveShell.instance()
    try:
        shell.user_ns["_12"] = shell.user_ns["of_clothes"] = spectra
        explorer = ll.widgets.spectrum_explorer(spectra)
        assert explorer.code() == "ll.widgets.spectrum_explorer(of_clothes)"
    finally:
        InteractiveShell.clear_instance()


@pytest.mark.parametrize(
    ("view", "said"),
    [
        ({"kind": "nope"}, 'kind cannot be \'nope\'; choose one of "", "fc", "attn.qkv"'),
        ({"position": 3}, "position cannot be 3; choose from 0 to 1"),
        ({"position": "left"}, "position cannot be 'left'; choose from 0 to 1"),
        ({"blockk": 1}, "spectrum_explorer has no setting 'blockk'; did you mean 'block'"),
    ],
)
def test_settings_that_a_control_cannot_have_are_refused(spectra, view, said):
    with pytest.raises(ll.errors.LoraLensError) as error:
        ll.widgets.spectrum_explorer(spectra, rank=2, **view)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("view", "said"),
    [
        ({"lr": [0.3]}, r"lr cannot be \[0.3\]; choose some of 0.005, 0.02"),
        ({"lr": 0.005}, "lr cannot be 0.005; choose some of"),
        ({"lr": []}, "choose at least one learning rate"),
        ({"picked": "zz"}, "the table has no run 'zz'"),
        ({"accuracy": (0.1, 2)}, r"accuracy cannot be \(0.1, 2\); choose from"),
    ],
)
def test_views_of_a_sweep_that_cannot_be_are_refused(table, view, said):
    with pytest.raises(ValueError, match=said):
        ll.widgets.tradeoff_explorer(table, **view)


def test_a_misspelt_argument_is_named_before_the_missing_one():
    with pytest.raises(TypeError, match="no setting 'tsk'; did you mean 'task'"):
        ll.widgets.window_explorer(None, None, tsk=1)


def test_settings_are_named_as_python_names_arguments():
    names = ["class", "learning rate of A", "tolerance (points of accuracy)"]
    row = [HTML("learning rates"), *(Dropdown(options=["a"], description=name) for name in names)]
    assert list(settings_of([row])) == ["class_", "lr_of_A", "tolerance"]
    (slider,) = settings_of([[FloatSlider(0.1 + 0.2, description="t")]]).values()
    assert slider.value == 0.3


def test_a_still_copy_says_them_in_words(table):
    chosen = {"lr": [0.005], "accuracy": [0.8, 0.9]}
    still = ll.widgets.tradeoff_explorer(table, **chosen).still()
    assert "<p>score: forgetting; learning rates: 0.005; windows: all; accuracy: 0.8 to 0.9; " in still
    fewer = ll.widgets.tradeoff_explorer(table, windows=["window at 1", "LoRA"]).still()
    assert "learning rates: all; windows: window at 1, LoRA; accuracy: " in fewer
