from __future__ import annotations

import copy
import json
import lzma
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from engine_runs import in_processes
from small_sequences import small_spectra, small_vit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lens as ll
from lora_lens._base.files import write_atomically
from lora_lens.experiments.identity import ANSWERS, experiment_identity, model_identity, run_name
from lora_lens.experiments.records import all_records
from lora_lens.experiments.store import open_store

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
    assert json.loads(path.read_bytes()) == {"run": "run"}
    assert [f.name for f in tmp_path.iterdir()] == ["run.json"]


def test_names_depend_on_every_setting_and_not_on_their_order():
    assert (
        run_name({"lr": 0.1, "seed": 0})
        == run_name({"seed": 0, "lr": 0.1})
        != run_name({"lr": 0.1, "seed": 1})
    )


def test_the_identity_sees_every_weight_and_buffer():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = model_identity(model)
    assert before == model_identity(copy.deepcopy(model))
    with torch.no_grad():
        model[1].num_batches_tracked += 1
    assert model_identity(model)["model"] != before["model"]


def test_the_identity_sees_what_a_model_computes_with_beside_its_weights(model, digits):
    task, same = digits.first(10, 10), copy.deepcopy(model)
    before = model_identity(model)
    same.train().set_grad_checkpointing()
    same(task.train.inputs)  # running it changes nothing
    assert model_identity(same) == before
    heads, dropout, buffer = (copy.deepcopy(model) for _ in range(3))
    attention = heads.blocks[0].attn
    attention.num_heads, attention.head_dim = 1, attention.head_dim * attention.num_heads
    dropout.blocks[1].mlp.drop1.p = 0.5
    buffer.register_buffer("shift", torch.ones(1), persistent=False)
    for other in (heads, dropout, buffer):
        now = model_identity(other)
        assert {key for key in now if now[key] != before[key]} == {"settings of the model"}
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    before, llama.config.num_attention_heads = model_identity(llama), 4
    assert model_identity(llama) != before


def _scaled(model: nn.Module) -> None:
    for block in model.blocks:
        block.attn.scale *= 3
        block.attn.fused_attn = False


def _hooked(model: nn.Module) -> None:
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output * 0.5)


def _flipped(model: nn.Module) -> None:
    own = model.forward_features
    model.forward_features = lambda x, **settings: own(x.flip(3), **settings)


@pytest.mark.parametrize("change", [_scaled, _hooked, _flipped])
def test_a_model_that_computes_something_else_with_equal_weights_is_another(change, source, digits, tmp_path):
    model, other = ll.tasks.bundled.vision()[0], ll.tasks.bundled.vision()[0]
    task, retain = digits.first(10, 10), source.first(10, 50)
    change(other)
    with open_store(tmp_path, experiment_identity(model, task, retain)):
        pass
    with (
        pytest.raises(ValueError, match=r"different experiment \(loss of the model"),
        open_store(tmp_path, experiment_identity(other, task, retain)),
    ):
        pass
    rounded = experiment_identity(model, task, retain)
    rounded[ANSWERS] = f"{float(rounded[ANSWERS]) * 1.0001:.6g}"  # as another device may have it
    with open_store(tmp_path, rounded):
        pass


def test_a_store_of_an_earlier_version_that_did_not_note_settings_goes_on(tmp_path):
    with open_store(tmp_path, IDENTITY):
        pass
    with open_store(tmp_path, IDENTITY | {"settings of the model": "s"}):
        pass
    with open_store(tmp_path / "new", IDENTITY | {"settings of the model": "s"}):
        pass
    with (
        pytest.raises(ValueError, match="different experiment \\(settings of the model: there s, here t"),
        open_store(tmp_path / "new", IDENTITY | {"settings of the model": "t"}),
    ):
        pass


@pytest.fixture(scope="module")
def swept(source, digits, tmp_path_factory):
    """(folder, table) of a sweep of two windows and the baselines, with drifts."""
    folder = tmp_path_factory.mktemp("swept") / "store"
    grid = ll.Grid(
        ll.windows(rank=8, count=2),
        lr=[5e-3],
        seed=[1, 0],
        baselines=[ll.LoRA(8), ll.LinearProbe(), ll.FullFineTuning()],
    )
    settings = {"steps": 2, "batch_size": 8, "evaluations": 2, "jobs": 1, "progress": False}
    tasks = {"task": digits.first(32, 50), "retain": source.first(10, 60)}
    small = {"model": small_vit(), "spectra": small_spectra()}
    return folder, ll.sweep(grid, **small, **tasks, store=folder, **settings).table


def test_a_folder_and_its_packed_file_tell_the_same(swept, tmp_path):
    folder, table = swept
    packed = ll.experiments.pack(folder, tmp_path / "packed.jsonl.xz")
    assert packed.stat().st_size < sum(f.stat().st_size for f in folder.rglob("*.json")) / 5
    runs = ll.Sweep.open(packed).table
    pd.testing.assert_frame_equal(runs, ll.Sweep.open(folder).table)
    by_run = table.set_index("run").loc[runs["run"]].reset_index()
    pd.testing.assert_frame_equal(runs, by_run[runs.columns], check_dtype=False)
    assert runs["seed"].tolist()[:2] == [0, 1]
    of_file, of_folder = (ll.Sweep.open(place).only(table) for place in (packed, folder))
    for read in (ll.Sweep.curves, ll.Sweep.answers, ll.Sweep.drifts):
        pd.testing.assert_frame_equal(read(of_file), read(of_folder))


def test_nothing_but_an_earlier_pack_is_replaced(swept, tmp_path):
    folder, _ = swept
    packed = ll.experiments.pack(folder, tmp_path / "packed.jsonl.xz")
    assert ll.experiments.pack(folder, packed) == packed
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    others = {
        "notes.txt": b"mine",
        "empty": b"",
        "other.xz": lzma.compress(b"mine"),
        "3.xz": lzma.compress(b"3"),
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    for name in (*others, "folder", "link"):
        with pytest.raises(
            FileExistsError, match=f"{name} was not written by ll.experiments.pack, so it stays"
        ):
            ll.experiments.pack(folder, tmp_path / name)
    assert {name: (tmp_path / name).read_bytes() for name in others} == others
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ll.experiments.pack(folder, tmp_path / "nowhere" / "packed.xz")


def test_a_sweep_s_runs_are_no_sequences(swept, tmp_path):
    folder, _ = swept
    for store in (folder, ll.experiments.pack(folder, tmp_path / "packed.jsonl.xz")):
        with pytest.raises(
            ValueError, match=r"holds no sequences of tasks; single runs are opened by ll\.Sweep\.open"
        ):
            ll.experiments.ContinualSweep.open(store)


def test_drifts_are_those_of_the_trained_models(swept, source, digits):
    (folder, table), spectra = swept, small_spectra()
    found = ll.Sweep.open(folder).only(table).drifts()
    adapters = table[table["method"].isin(["window", "LoRA"])]
    full = table[table["method"] == "full fine-tuning"]
    assert set(found["run"]) == {*adapters["run"], *full["run"]}
    assert (found.groupby("run").size() == len(spectra)).all()

    row = table[(table["position"] == 1) & (table["seed"] == 0)].iloc[0]
    adapted = ll.attach(small_vit(), ll.Window.last(8), spectra=spectra)
    settings = {"steps": 2, "batch_size": 8, "evaluations": 2, "lr": 5e-3, "progress": False}
    ll.finetune(adapted, digits.first(32, 50), source.first(10, 60), **settings)
    mine, here = found[found["run"] == row["run"]].set_index("layer"), ll.forgetting.drift(adapted, spectra)
    here = here.set_index("layer")
    for column in ("update", "inside", "mixed"):
        np.testing.assert_allclose(mine[column], here[column], rtol=2e-2, atol=1e-4)
    assert mine["cka"].nunique() == 1 and 0.5 < mine["cka"].iloc[0] <= 1


def test_drifts_are_measured_where_all_vectors_are_known(source, digits, tmp_path):
    spectra = small_spectra()
    first = torch.arange(8)
    few = ll.SpectrumSet(
        [replace(s, left=s.left[:, :8], right=s.right[:8], components=first) for s in spectra.values()]
    )
    settings = {"steps": 1, "batch_size": 8, "evaluations": 2, "jobs": 1, "progress": False}
    tasks = {"task": digits.first(16, 20), "retain": source.first(10, 20)}
    settings |= {"model": small_vit(), **tasks}
    grid = ll.Grid([ll.Window.first(8)])
    for without in ({"spectra": few}, {"spectra": spectra, "drift": False}, {"targets": "attn.proj"}):
        store = tmp_path / str(sorted(without))
        table = ll.sweep(grid, store=store, **without, **settings).table
        with pytest.raises(ValueError, match=r"was kept with its drift; .* spectra=ll.spectra\(model\)"):
            ll.Sweep.open(store).only(table).drifts()
    by_given = ll.sweep(grid, spectra=spectra, **settings).drifts()
    asked = ll.sweep(grid, spectra=few, drift=True, **settings).drifts()
    pd.testing.assert_frame_equal(asked, by_given, rtol=1e-3)


def test_what_is_no_store_is_refused(swept, tmp_path):
    folder, table = swept
    for read in (ll.Sweep.open, lambda path: ll.experiments.pack(path, tmp_path / "p.jsonl.xz")):
        with pytest.raises(FileNotFoundError, match="there is no results folder or file"):
            read(tmp_path / "nowhere")
    (tmp_path / "text.jsonl.xz").write_text("no xz")
    with pytest.raises(ValueError, match=r"is damaged or was not written by ll\.experiments\.pack"):
        ll.Sweep.open(tmp_path / "text.jsonl.xz")
    packed = ll.experiments.pack(folder, tmp_path / "packed.jsonl.xz")
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is damaged or was not written by ll\.experiments\.pack"):
        ll.Sweep.open(packed).only(table).curves()
    (tmp_path / "empty" / "runs").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no finished runs"):
        ll.Sweep.open(tmp_path / "empty")
    packed.write_bytes(whole)
    with pytest.raises(FileNotFoundError, match="holds no run abc"):
        ll.Sweep.open(packed).only(table.assign(run="abc")).answers()
    with pytest.raises(ValueError, match="holds no finished runs"):
        ll.experiments.pack(tmp_path / "empty", packed)
    assert packed.read_bytes() == whole


def test_processes_that_start_one_new_store_at_the_same_time_all_may(tmp_path):
    for turn in range(10):

        def work(number: int, store=tmp_path / str(turn)) -> None:
            with open_store(store, IDENTITY) as runs:
                write_atomically(runs / f"{number}.json", {"run": str(number)})

        assert in_processes(work, 4) == [0] * 4
        assert sorted(f.name for f in (tmp_path / str(turn)).iterdir()) == ["experiment.json", "runs"]
        assert len(list((tmp_path / str(turn) / "runs").iterdir())) == 4


def test_of_two_experiments_that_start_one_store_at_the_same_time_one_is_refused(tmp_path):
    for turn in range(10):

        def work(number: int, store=tmp_path / str(turn)) -> None:
            try:
                with open_store(store, IDENTITY | {"task": f"task {number}"}):
                    pass
            except ll.errors.InputError as error:
                os._exit(3 if "holds a different experiment (task: " in str(error) else 1)

        assert sorted(in_processes(work, 2)) == [0, 3]


def test_a_full_disk_says_so_and_loses_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "run.json"
    write_atomically(path, {"run": "old"})

    def work(_number: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            write_atomically(path, {"run": "new" * 1000})
        except ll.errors.StoreError as error:
            os._exit(3 if "start again once there is room" in str(error) else 1)

    assert in_processes(work, 1) == [3]
    assert json.loads(path.read_bytes()) == {"run": "old"}
    assert [f.name for f in tmp_path.iterdir()] == ["run.json"]


def test_a_folder_that_was_removed_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(ll.errors.StoreError, match="its folder was removed, and with it the runs"):
        write_atomically(tmp_path / "gone" / "runs" / "run.json", {"run": "run"})


def test_what_cannot_be_a_store_is_refused_before_anything_runs(tmp_path, model, digits):
    (tmp_path / "file").write_text("text")
    same = {"model": model, "task": digits, "retain": digits, "grid": ll.Grid([ll.Window.first(8)])}
    for store, message in (
        (tmp_path / "file", "is a file; choose another path"),
        (tmp_path / "file" / "s", "lies within .*, which is a file"),
        (42, "store must be a folder for the runs, not 42"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ll.sweep(store=store, **same)
    with pytest.raises(OSError, match="cannot keep runs in /proc/s"), open_store("/proc/s", IDENTITY):
        pass


def test_what_a_file_manager_leaves_in_a_folder_does_not_fill_it(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"\0\1")
    (tmp_path / "._experiment.json").write_bytes(b"\0\5\x16\7")
    with open_store(tmp_path, IDENTITY) as runs:
        assert runs.is_dir()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x05\x16\x07\xff",
        b'{"iden',
        b"[1]",
        b'{"identity": "x"}',
        b'{"identity": {}}',
        b'{"identity": {"task": 3}}',
    ],
)
def test_a_damaged_experiment_is_named_and_nothing_is_changed(content, tmp_path):
    with open_store(tmp_path, IDENTITY):
        pass
    (tmp_path / "experiment.json").write_bytes(content)
    for read in (
        lambda: open_store(tmp_path, IDENTITY).__enter__(),
        lambda: ll.experiments.experiment(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"experiment\.json is damaged or of another program"):
            read()
    assert (tmp_path / "experiment.json").read_bytes() == content


def test_foreign_and_damaged_files_among_the_runs_are_named_and_passed_over(swept, tmp_path):
    folder, table = swept
    shutil.copytree(folder, tmp_path / "s")
    places = tmp_path / "s" / "runs"
    one, another, *_ = sorted(places.iterdir())
    (places / f"._{one.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\xff\xfe")
    (places / "notes.json").write_text('{"run": 1}')
    (places / "list.json").write_text("[1, 2]")
    (places / "deep.json").write_text("[" * 100_000)
    (places / "folder.json").mkdir()
    (places / ".DS_Store").write_bytes(b"\0\1")
    (places / "copy.json").write_bytes(one.read_bytes())
    another.write_bytes(another.read_bytes()[:50])
    for read in (
        ll.Sweep.open,
        lambda store: ll.Sweep.open(ll.experiments.pack(store, tmp_path / "p.jsonl.xz")),
    ):
        with pytest.warns(
            UserWarning, match=rf"7 files in .* passed over: \._{one.name} \(no whole JSON\)"
        ) as said:
            found = read(tmp_path / "s")
        assert len(said) == 1
        assert set(found.table["run"]) == set(table["run"]) - {another.stem}
    with (
        pytest.warns(UserWarning, match="7 files .* passed over"),
        pytest.raises(FileNotFoundError, match=f"holds no run {another.stem}"),
    ):
        ll.Sweep.open(tmp_path / "s").only(table).curves()


def test_a_packed_file_is_parsed_once_and_again_when_it_has_changed(swept, tmp_path):
    folder, table = swept
    packed = ll.experiments.pack(folder, tmp_path / "packed.jsonl.xz")
    assert all_records(packed)[table["run"][0]] is all_records(packed)[table["run"][0]]
    shutil.copytree(folder, tmp_path / "fewer")
    (tmp_path / "fewer" / "runs" / f"{table['run'][0]}.json").unlink()
    ll.experiments.pack(tmp_path / "fewer", packed)
    assert table["run"][0] not in all_records(packed)


@pytest.mark.parametrize(
    "read",
    [
        ll.Sweep.open,
        ll.experiments.experiment,
        ll.experiments.ContinualSweep.open,
        lambda s: ll.experiments.pack(s, "p"),
    ],
)
def test_what_is_no_path_is_no_store(read):
    for store in (None, 42, ["a"], pd.DataFrame({"run": ["a"]})):
        with pytest.raises(TypeError, match="store must be the folder or packed file of a sweep, not"):
            read(store)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("settings", "lr"), 0.5, "its settings are not those that the run was made with"),
        (("exact",), [1], "no record of a run"),
        (("exact",), {"method": "other"}, "its settings are not those"),
        (("result",), {}, "its results are damaged"),
        (("result", "accuracy"), "0.5", "its results are damaged"),
        (("result", "forgetting"), None, "its results are damaged"),
        (("curve",), [1], "its results are damaged"),
        (("curve", "step"), [0], "its results are damaged"),
        (("items",), {"label": [1], "before": [1, 2]}, "its results are damaged"),
        (("features",), None, "its results are damaged"),
        (("failed",), None, "its results are damaged"),
    ],
)
def test_a_run_s_file_with_other_content_is_no_result(swept, tmp_path, place, value, reason):
    folder, table = swept
    shutil.copytree(folder, tmp_path / "s")
    path = tmp_path / "s" / "runs" / f"{table['run'][0]}.json"
    record = json.loads(path.read_bytes())
    (record if len(place) == 1 else record[place[0]])[place[-1]] = value
    path.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=f"passed over: {path.name} .{reason}"):
        assert path.stem not in set(ll.Sweep.open(tmp_path / "s").table["run"])
