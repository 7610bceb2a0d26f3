"""``check`` and ``hint``: unanswered, unknown, and how a grader uses them."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

import lora_lens as ll
from lora_lens.course.exercises import EXERCISES

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_exercise_without_an_answer_says_how_to_get_a_hint(exercise):
    verdict = ll.course.check(exercise, ...)
    assert not verdict
    assert "not answered yet" in repr(verdict) and f'll.course.hint("{exercise}")' in repr(verdict)


def test_an_unknown_exercise_is_refused_with_the_one_that_was_meant():
    with pytest.raises(ll.errors.InputError, match="did you mean '02-1'"):
        ll.course.check("2-1", 3)
    with pytest.raises(ll.errors.InputError, match="exercise must be one of"):
        ll.course.hint("09-1")
    with pytest.raises(ll.errors.InputError, match="number must be at most 2"):
        ll.course.hint("02-1", 3)


def test_each_exercise_has_one_cell_in_its_notebook_and_is_named_in_the_text_above_it():
    checked = []
    for path in sorted(NOTEBOOKS.glob("0*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        for above, cell in pairwise(cells):
            source = "".join(cell["source"])
            for exercise in (
                re.findall(r'll\.course\.check\("(.*?)"', source) if "answer = ..." in source else ()
            ):
                checked.append(exercise)
                assert path.name.startswith(exercise[:2])
                assert f"**{exercise[3:]}.**" in "".join(above["source"])
    assert checked == list(EXERCISES)
