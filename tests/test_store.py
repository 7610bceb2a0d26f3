from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_lens.store import experiment_identity, open_store, read_run, run_name, write_atomically

IDENTITY = {"lora_lens": "0", "model": "m", "task": "t", "retain": "r"}


def test_a_folder_opens_again_for_the_same_experiment(tmp_path):
    for _ in range(2):
        with open_store(tmp_path / "s", IDENTITY) as runs:
            assert runs == tmp_path / "s" / "runs" and runs.is_dir()


def test_a_folder_whose_first_moment_was_cut_short_still_opens(tmp_path):
    (tmp_path / ".experiment.x1y2").write_text('{"iden')
    with open_store(tmp_path, IDENTITY) as runs:
        assert runs.is_dir()
    (tmp_path / "runs").rmdir()
    with open_store(tmp_path, IDENTITY) as runs:
        assert runs.is_dir()


def test_another_experiment_is_named_part_by_part(tmp_path):
    with open_store(tmp_path / "s", IDENTITY):
        pass
    with (
        pytest.raises(ValueError, match=r"different experiment \(task: there t, here other\)"),
        open_store(tmp_path / "s", IDENTITY | {"task": "other"}),
    ):
        pass


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "cat.jpg").write_text("a cat")
    with (
        pytest.raises(ValueError, match="is not empty and holds no experiment"),
        open_store(tmp_path, IDENTITY),
    ):
        pass
    assert [f.name for f in tmp_path.iterdir()] == ["cat.jpg"]


def test_without_a_folder_nothing_stays():
    with open_store(None, IDENTITY) as runs:
        assert runs.is_dir()
    assert not runs.exists()


def test_a_record_that_cannot_be_written_leaves_the_old_one_and_no_scraps(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, {"run": "run"})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_atomically(path, {"run": "run", "model": object()})
    assert read_run(path) == {"run": "run"}
    assert [f.name for f in tmp_path.iterdir()] == ["run.json"]
    assert read_run(tmp_path / "other.json") is None


def test_names_depend_on_every_setting_and_not_on_their_order():
    assert (
        run_name({"lr": 0.1, "seed": 0})
        == run_name({"seed": 0, "lr": 0.1})
        != run_name({"lr": 0.1, "seed": 1})
    )


def test_the_identity_sees_every_weight_and_buffer(digits):
    task = digits.subset(10, 10)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = experiment_identity(model, task, task)
    assert before == experiment_identity(copy.deepcopy(model), task, task)
    with torch.no_grad():
        model[1].num_batches_tracked += 1
    assert experiment_identity(model, task, task)["model"] != before["model"]
