from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lora_lens as ll
from lora_lens.experiments import columns
from lora_lens.experiments.columns import FILE, columns_of, read_columns, records_in, rows_of
from lora_lens.experiments.identity import run_name
from lora_lens.experiments.records import all_records, packed

DIGITS = Path(__file__).parents[2] / "data" / "results" / "digits.jsonl.xz"


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """A folder with thirty of the kept runs, one file each."""
    monkeypatch.setattr(columns, "WORTH", 5)
    described, *records = packed(DIGITS)
    folder = tmp_path / "store"
    (folder / "runs").mkdir(parents=True)
    (folder / "experiment.json").write_text(json.dumps(described))
    for record in records[:30]:
        (folder / "runs" / f"{record['run']}.json").write_text(json.dumps(record))
    return folder


def told(store: Path) -> list[pd.DataFrame]:
    sweep = ll.Sweep.open(store)
    return [sweep.table, sweep.curves(), sweep.answers(), sweep.drifts()]


def test_columns_hold_what_the_records_hold(store):
    found = read_columns(store)
    assert found["run"].to_pylist() == sorted(all_records(store))
    for record in all_records(store).values():
        row = found.filter([run == record["run"] for run in found["run"].to_pylist()])
        for part in ("curve", "items", "drift"):
            expected = pd.DataFrame(record[part])
            pd.testing.assert_frame_equal(rows_of(row, part).drop(columns="run"), expected)
        (about,) = records_in(row)
        assert about == {
            key: value for key, value in record.items() if key not in ("curve", "items", "drift")
        }


def test_what_is_kept_is_read_instead_of_the_run_files(store, monkeypatch):
    before = told(store)
    assert (store / FILE).exists()
    monkeypatch.setattr(columns, "read_runs", lambda *_: pytest.fail("a run file was read"))
    for first, second in zip(before, told(store), strict=True):
        pd.testing.assert_frame_equal(first, second)


def test_the_columns_follow_the_run_files(store):
    told(store)
    one, two, three, *_ = sorted((store / "runs").iterdir())
    one.unlink()
    record = json.loads(two.read_text())
    record["result"]["accuracy"] = 0.125
    two.write_text(json.dumps(record))
    new = json.loads(three.read_text())
    new["settings"]["seed"] = 99
    new["run"] = run_name(new["settings"], new.get("exact", {}))
    (store / "runs" / f"{new['run']}.json").write_text(json.dumps(new))
    table = ll.Sweep.open(store).table.set_index("run")
    assert one.stem not in table.index and table.loc[two.stem, "accuracy"] == 0.125
    assert table.loc[new["run"], "seed"] == 99 and len(table) == 30


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no columns at all"])
def test_damaged_columns_are_made_again(store, content):
    before = told(store)
    (store / FILE).write_bytes(content)
    for first, second in zip(before, told(store), strict=True):
        pd.testing.assert_frame_equal(first, second)
    assert len(columns._kept(store / FILE)) == 30


def test_columns_of_another_format_are_made_again(store, monkeypatch):
    told(store)
    monkeypatch.setattr(columns, "FORMAT", b"2")
    assert len(columns._kept(store / FILE)) == 0
    assert len(ll.Sweep.open(store)) == 30
    assert len(columns._kept(store / FILE)) == 30


def test_a_store_that_may_not_be_written_to_is_read(store, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(columns, "replace_file", full)
    assert len(ll.Sweep.open(store)) == 30
    assert not (store / FILE).exists()


def test_nothing_is_left_beside_the_columns(store):
    told(store)
    assert sorted(os.listdir(store)) == [FILE, "experiment.json", "runs"]


def test_a_copy_elsewhere_tells_the_same(store, tmp_path):
    before = told(store)
    shutil.copytree(store, tmp_path / "copy", copy_function=shutil.copyfile)  # with other times of change
    for first, second in zip(before, told(tmp_path / "copy"), strict=True):
        pd.testing.assert_frame_equal(first, second)


def test_runs_that_keep_more_or_less_stand_in_one_table():
    more = {"run": "a", "curve": {"step": [0, 5], "loss": [1, 2], "test_loss": [0.5, None]}}
    less = {"run": "b", "curve": {"step": [0], "loss": [0.25]}}
    none = {"run": "c", "failed": "no memory"}
    found = rows_of(columns_of([none, more, less]), "curve")
    assert found["run"].tolist() == ["a", "a", "b"] and found["step"].tolist() == [0, 5, 0]
    assert found["loss"].tolist() == [1, 2, 0.25]
    assert found["test_loss"].tolist()[0] == 0.5 and np.isnan(found["test_loss"].tolist()[1:]).all()


def test_numbers_in_one_run_and_words_in_another_are_refused():
    records = [{"run": "a", "curve": {"step": [0]}}, {"run": "b", "curve": {"step": ["zero"]}}]
    with pytest.raises(ValueError, match="the runs differ in what their curve holds as step"):
        columns_of(records)


def test_a_folder_without_runs_has_no_columns_and_other_errors_are_not_hidden(tmp_path, store, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert len(read_columns(tmp_path / "empty")) == 0

    def lost(*_: object) -> None:
        raise FileNotFoundError("elsewhere")

    monkeypatch.setattr(columns, "read_runs", lost)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        read_columns(store)


def test_kept_columns_that_do_not_go_with_new_runs_are_refused_in_words(store):
    told(store)
    path = sorted((store / "runs").iterdir())[0]
    record = json.loads(path.read_text())
    record["curve"]["accuracy"] = ["high" for _ in record["curve"]["accuracy"]]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="differ in what their tables hold"):
        read_columns(store)
