from __future__ import annotations

import json
import shutil
from pathlib import Path
from zipfile import ZipFile

import pandas as pd
import pytest
import torch
from clean_processes import started
from small_sequences import KILLED, LORA, learn, pairs, retained, small_spectra

import lora_lens as ll
from lora_lens.experiments.continual.strategies import Continued, Merged
from lora_lens.tasks.scenarios import TaskIncremental
from lora_lens.training import EWC, Replay


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder with the stores of sequences that were killed, and the sizes of their checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    process = started(
        "import pathlib, small_sequences, sys; small_sequences.main(pathlib.Path(sys.argv[1]))", folder
    )
    process.join(300)
    assert process.exitcode == 0
    return folder


@pytest.fixture(scope="module")
def orthogonal() -> pd.DataFrame:
    """The table of one of them that was left alone."""
    return KILLED["orthogonal"].run(None)


def checkpoints(store: Path) -> list[Path]:
    return list((store / "runs" / "unfinished").glob("[!.]*.pt"))


@pytest.mark.parametrize("name", [name for name in KILLED if not name.startswith("twelve,")])
def test_a_killed_sequence_goes_on_and_ends_with_the_same_numbers(name, killed, tmp_path):
    store, sequence = killed / name, KILLED[name]
    (checkpoint,) = checkpoints(store)
    assert torch.load(checkpoint, weights_only=True)["after"] == sequence.at - 1
    shutil.copytree(store, tmp_path / "again")
    resumed, whole = sequence.run(tmp_path / "again"), sequence.run(tmp_path / "whole")
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert not checkpoints(tmp_path / "again")
    if name not in ("separate", "twelve"):
        pd.testing.assert_frame_equal(
            *(
                ll.experiments.ContinualSweep.open(tmp_path / where).only(whole).drifts()
                for where in ("again", "whole")
            ),
            check_exact=True,
        )


def test_what_is_kept_does_not_grow_with_the_tasks(killed):
    for name in ("twelve, ewc", "twelve, orthogonal", "twelve, replay"):
        sizes = json.loads((killed / name).with_suffix(".json").read_text())
        (checkpoint,) = checkpoints(killed / name)
        content = torch.load(checkpoint, weights_only=True)
        assert len(sizes) == 11 and content["after"] == 10 and len(content["heads"]) == 10
        # A head of 2 classes, 12 rows of the table and, of Replay, a tensor of numbers; zip adds to each.
        assert (sizes[10] - sizes[2]) / 8 < 6000
        if name == "twelve, ewc":
            assert sum(t.numel() for t in content["kept"].values()) == 2 * 4 * (32 + 128) * 2
        if name == "twelve, orthogonal":
            assert {n: tuple(t.shape) for n, t in content["kept"].items()} == {
                "blocks.1.mlp.fc1": (32, 32),
                "blocks.1.mlp.fc2": (128, 128),
            }
        if name == "twelve, replay":
            assert sum(len(t) for t in content["kept"].values()) <= 40 and len(content["kept"]) == 10


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_a_number(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    place = whole.index(b"/data/1") + 200
    whole[place] ^= 255
    path.write_bytes(whole)


def replace_by_another(path: Path) -> None:
    torch.save({"after": 2}, path)


def replace_by_a_model(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def replace_by_a_zip(path: Path) -> None:
    with ZipFile(path, "w") as parts:
        parts.writestr("notes.txt", "no checkpoint")


def replace_by_text(path: Path) -> None:
    path.write_text("no checkpoint")


DAMAGES = [
    damage_end, damage_a_number, replace_by_another, replace_by_a_model, replace_by_a_zip, replace_by_text,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_starts_the_sequence_again(damage, killed, orthogonal, tmp_path):
    shutil.copytree(killed / "orthogonal", tmp_path / "s")
    (checkpoint,) = checkpoints(tmp_path / "s")
    damage(checkpoint)
    with pytest.warns(UserWarning, match=r"is damaged .* the sequence starts again"):
        table = KILLED["orthogonal"].run(tmp_path / "s")
    pd.testing.assert_frame_equal(table, orthogonal, check_exact=True)


def test_a_bug_does_not_cost_the_sequence_its_checkpoint(killed, tmp_path, monkeypatch):
    shutil.copytree(killed / "orthogonal", tmp_path / "s")
    (checkpoint,) = checkpoints(tmp_path / "s")
    content = checkpoint.read_bytes()
    with monkeypatch.context() as changed:
        changed.setattr(TaskIncremental, "restore", lambda *_: {}["a bug"])
        with pytest.raises(RuntimeError, match="all runs failed, the first with: KeyError: 'a bug'"):
            KILLED["orthogonal"].run(tmp_path / "s")
    assert checkpoint.read_bytes() == content
    table = KILLED["orthogonal"].run(tmp_path / "s")
    assert not table["failed"].any() and not checkpoint.exists()


def test_a_checkpoint_of_another_sequence_is_not_taken(killed, tmp_path):
    shutil.copytree(killed / "orthogonal", tmp_path / "s")
    (checkpoint,) = checkpoints(tmp_path / "s")
    torch.save(torch.load(checkpoint, weights_only=True) | {"run": "another"}, checkpoint)
    with pytest.warns(UserWarning, match="is damaged .it is that of another.; the sequence starts again"):
        KILLED["orthogonal"].run(tmp_path / "s")


def test_a_sequence_may_go_on_with_spectra_or_without(killed, tmp_path):
    shutil.copytree(killed / "replay", tmp_path / "without")
    table = KILLED["replay"].run(tmp_path / "without", spectra=None)
    pd.testing.assert_frame_equal(table, KILLED["replay"].run(None), check_exact=True)

    shutil.copytree(killed / "twelve", tmp_path / "with")
    table = KILLED["twelve"].run(tmp_path / "with", spectra=small_spectra())
    drift = ll.experiments.ContinualSweep.open(tmp_path / "with").only(table).drifts()
    assert drift["after"].min() == 7 and drift["update"].notna().all()
    assert drift[["overlap_left", "block_change"]].isna().all(axis=None)  # what the window was is not known


def test_finished_sequences_are_kept_and_only_what_is_missing_is_run(tmp_path):
    store, two = tmp_path / "s", {"tasks": pairs()[:2]}
    first = learn(store=store, **two)
    kept = {f: f.stat().st_mtime_ns for f in store.glob("runs/*.json")}
    again = learn(store=store, **two)
    pd.testing.assert_frame_equal(first, again)
    more = learn(store=store, seeds=(0, 1), orders=[(0, 1), (1, 0)], **two)
    learn(Merged(Replay(4)), store=store, setting="class-incremental", **two)
    assert more["run"].nunique() == 4 and len(list(store.glob("runs/*.json"))) == 5
    assert all(f.stat().st_mtime_ns == t for f, t in kept.items()) and len(kept) == 1
    pd.testing.assert_frame_equal(more[more["run"] == first["run"][0]].reset_index(drop=True), first)
    with pytest.raises(ValueError, match=r"holds a different experiment \(tasks: "):
        learn(store=store, tasks=pairs()[1:3])
    with pytest.raises(
        ValueError, match=r"holds a different experiment \(retain: there nothing, here digits"
    ):
        learn(store=store, retain=retained(), **two)


def test_what_makes_another_sequence_has_another_name(tmp_path):
    two, store = {"tasks": pairs()[:2], "steps": 1}, tmp_path / "s"
    for strategy in (EWC(1.0, examples=3), EWC(1.0, examples=4), EWC(2.0, examples=3)):
        learn(Continued(strategy), LORA, store=store, **two)
    for others in (
        {"setting": "domain-incremental"},
        {"alpha": 8},
        {"targets": "blocks.0.*"},
        {"batch_size": 4},
    ):
        learn(Continued(EWC(1.0, examples=3)), LORA, store=store, **two | others)
    learn(Continued(EWC(1.0, examples=3)), LORA, store=store, variant=ll.Variant(rslora=True), **two)
    assert len(list(store.glob("runs/*.json"))) == 8


def test_a_folder_and_its_packed_file_tell_the_same(tmp_path):
    store, two = tmp_path / "s", {"tasks": pairs()[:2], "spectra": small_spectra()}
    for setting in ("class-incremental", "task-incremental"):
        learn(Continued(), LORA, store=store, setting=setting, **two)
        learn(store=store, setting=setting, **two)
    packed = ll.experiments.pack(store, tmp_path / "packed.jsonl.xz")
    table = ll.experiments.ContinualSweep.open(store).table
    pd.testing.assert_frame_equal(ll.experiments.ContinualSweep.open(packed).table, table)
    assert table["run"].nunique() == 4 and table["setting"].tolist() == sorted(table["setting"])
    pd.testing.assert_frame_equal(
        *(ll.experiments.ContinualSweep.open(place).only(table).drifts() for place in (store, packed))
    )
    for place in (store, packed):
        with pytest.raises(
            ValueError, match=r"holds sequences of tasks; open them with ll\.experiments\.ContinualSweep"
        ):
            ll.Sweep.open(place)


def test_what_holds_no_sequences_is_refused(tmp_path):
    (tmp_path / "empty" / "runs").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no sequences of tasks"):
        ll.experiments.ContinualSweep.open(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there is no results folder or file"):
        ll.experiments.ContinualSweep.open(tmp_path / "nowhere")
    table = learn(tasks=pairs()[:2], store=tmp_path / "s")
    with pytest.raises(ValueError, match=r"was kept with its drift; .* spectra=ll\.spectra\(model\)"):
        ll.experiments.ContinualSweep.open(tmp_path / "s").only(table).drifts()
