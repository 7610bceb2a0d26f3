from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lens as ll


def exported_after_norms_moved(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    adapted = ll.attach(model, ll.LoRA(2), targets="0").train()
    adapted(torch.randn(8, 6))
    ll.export(adapted, folder)


def a_window_of_zeros(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    nn.init.zeros_(model[0].weight)
    ll.attach(model, ll.Window.first(2), spectra=ll.spectra(model, progress=False))


def the_first_of_sorted_examples(folder: Path) -> None:
    examples = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) // 10)
    ll.Task("sorted", ("a", "b"), examples, examples).first(train=5)


@pytest.mark.parametrize(
    "warned", [exported_after_norms_moved, a_window_of_zeros, the_first_of_sorted_examples]
)
def test_a_warning_points_at_the_user_s_line_however_many_calls_lie_between(warned, tmp_path):
    with pytest.warns(UserWarning) as caught:
        warned(tmp_path)
    assert {Path(w.filename) for w in caught} == {Path(__file__)}


def test_all_warnings_are_given_so():
    package = Path(ll.__file__).parent
    calling = [p for p in package.rglob("*.py") if re.search(r"warnings\.warn\(", p.read_text())]
    assert calling == [package / "_base" / "warning.py"]
