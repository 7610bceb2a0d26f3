from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import lora_lens as ll
from lora_lens.items import confusion, forgotten_by, transitions


@pytest.fixture
def items() -> pd.DataFrame:
    """Two runs over five examples, of which the first four were right before."""
    label, before = [0, 0, 1, 2, 2], [0, 0, 1, 2, 1]
    after = {"a": [0, 1, 1, 0, 2], "b": [0, 1, 1, 2, 0]}
    parts = [
        pd.DataFrame({"run": run, "item": range(5), "label": label, "before": before, "after": answers})
        for run, answers in after.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_transitions_count_every_example_once(items):
    table = transitions(items).set_index("run")
    counts = table[["kept", "forgotten", "gained", "never", "changed", "examples"]]
    assert counts.loc["a"].tolist() == [2, 2, 1, 0, 3, 5]
    assert counts.loc["b"].tolist() == [3, 1, 0, 1, 2, 5]
    assert table["forgetting"].tolist() == pytest.approx([0.2, 0.2])  # equal, and yet not the same
    by_class = transitions(items, by=["run", "label"])
    assert by_class.query("run == 'a' and label == 2")[["forgotten", "gained"]].values.tolist() == [[1, 1]]


def test_the_examples_that_all_forget_come_first(items):
    table = forgotten_by(items)
    assert table["item"].tolist() == [1, 3, 0, 2]
    assert table["share"].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert table["instead"].tolist()[:2] == [1, 0] and table["instead"].isna().tolist()[2:] == [True, True]
    assert (table["runs"] == 2).all()


def test_confusion_counts_what_was_taken_for_what(items):
    assert confusion(items, 3, "before").tolist() == [[4, 0, 0], [0, 2, 0], [0, 2, 2]]
    assert confusion(items[items["run"] == "a"], 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_other_tables_are_refused(items):
    with pytest.raises(ValueError, match="no table of answers: it lacks after"):
        transitions(items.drop(columns="after"))
    with pytest.raises(ValueError, match="when must be 'before' or 'after', not 'now'"):
        confusion(items, 3, "now")
    with pytest.raises(ValueError, match="expected classes from 0 to 1, not 0 to 2"):
        confusion(items, 2)
    with pytest.raises(ValueError, match="start from different answers"):
        forgotten_by(items.assign(before=np.arange(10) % 3))


def test_a_sweep_keeps_the_answers_of_every_run(patch_vit, digits, source, tmp_path):
    retain = source.subset(1, 30)
    grid = ll.Grid(window=ll.windows(2, 2), lr=[1e-2])
    settings = {"model": patch_vit, "task": digits.subset(64, 20), "retain": retain, "store": tmp_path / "s"}
    table = ll.sweep(grid, steps=4, evaluations=2, progress=False, **settings)
    items = ll.answers(tmp_path / "s", table)
    assert len(items) == 2 * 30
    assert (items["label"].to_numpy().reshape(2, 30) == retain.test.labels.numpy()).all()
    counted = transitions(items).set_index("run")["forgetting"]
    assert counted.loc[table["run"]].tolist() == pytest.approx(table["forgetting"].tolist())
    with pytest.raises(FileNotFoundError, match="holds no run nothing"):
        ll.answers(tmp_path / "s", pd.DataFrame({"run": ["nothing"]}))
    for path in (tmp_path / "s" / "runs").iterdir():
        record = ll.store.read_run(path)
        del record["items"]
        ll.store.write_atomically(path, record)
    with pytest.raises(ValueError, match="was kept without its answers, by an earlier version"):
        ll.answers(tmp_path / "s", table)
