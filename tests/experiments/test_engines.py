"""Sweeps of a vision transformer of a few thousand weights, some of whose runs go wrong."""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
import sys
import threading
import time
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import joblib
import pytest
import torch
from engine_runs import (
    FAST,
    Goes,
    Removes,
    in_processes,
    swept,
    wait_for,
)
from small_sequences import learn, pairs, retained, small_spectra, small_vit

import lora_lens as ll
from lora_lens.experiments.continual.strategies import Merged
from lora_lens.experiments.engines.attempts import LAUNCHED, attempt_on_worker
from lora_lens.experiments.engines.choice import chosen_engine, visible_gpus
from lora_lens.experiments.engines.processes import Processes
from lora_lens.experiments.engines.protocol import Attempt, Call, Shared, packed, require_same_versions
from lora_lens.training import Regularized


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("refused", "no such luck"),
        ("a bug", "ZeroDivisionError: division by zero"),
        ("memory", "OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_run_that_fails_is_a_row_with_its_reason_and_the_others_go_on(wrong, reason, tmp_path):
    with pytest.warns(UserWarning, match=f"1 of 4 runs failed; .*: {reason}"):
        table = swept(Regularized(ll.LoRA(2), Goes(wrong=wrong)), store=tmp_path / "s", jobs=1)
    assert table["failed"].tolist() == [False, False, False, True]
    assert table["reason"].tolist() == ["", "", "", reason]
    assert table.loc[3, ["accuracy", "forgetting", "trainable", "loss_rise"]].isna().all()
    assert table.loc[:2, "accuracy"].notna().all() and not table["diverged"].any()
    assert ll.Sweep.open(tmp_path / "s").table["failed"].sum() == 1
    packed = ll.experiments.pack(tmp_path / "s", tmp_path / "p.jsonl.xz")
    for store in (tmp_path / "s", packed):
        assert set(ll.Sweep.open(store).only(table).curves()["run"]) == set(table["run"][:3])
        with pytest.raises(ValueError, match=f"all runs of the table failed, the first with: {reason}"):
            ll.Sweep.open(store).only(table[3:]).answers()


def test_the_next_call_tries_a_failed_run_again_and_no_other(tmp_path):
    method = Regularized(ll.LoRA(2), Goes(wrong="refused"))
    with pytest.warns(UserWarning, match="1 of 4 runs failed"):
        swept(method, store=tmp_path / "s", jobs=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "runs").iterdir()}
    with pytest.warns(UserWarning, match="1 of 4 runs failed"):
        table = swept(method, store=tmp_path / "s", jobs=1)
    again = [path.stem for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert again == table.loc[table["failed"], "run"].tolist()


def test_if_all_runs_fail_the_first_reason_is_raised(tmp_path):
    bad = ll.Grid(seed=[1, 2], baselines=[Regularized(ll.LoRA(2), Goes(wrong="refused"))])
    same = {"model": small_vit(), "task": pairs()[0], "retain": retained(), "jobs": 1} | FAST
    with pytest.raises(ll.errors.InputError, match="no such luck"):
        ll.sweep(bad, store=tmp_path / "s", **same)
    bug = ll.Grid(seed=[1], baselines=[Regularized(ll.LoRA(2), Goes(wrong="a bug"))])
    with pytest.raises(RuntimeError, match=r"all runs failed, .* ZeroDivisionError") as raised:
        ll.sweep(bug, store=tmp_path / "s", **same)
    assert "in begin" in raised.value.__notes__[0]  # where it came from


def test_a_caller_s_own_exit_ends_a_sweep_in_its_process():
    with pytest.raises(SystemExit):  # as of a handler of SIGTERM
        swept(Regularized(ll.LoRA(2), Goes(wrong="exits")), jobs=1)


def test_records_that_are_removed_while_others_run_are_missed(tmp_path):
    removes = Regularized(ll.LoRA(2), Removes(store=str(tmp_path), what="[!.]*.json"))
    with pytest.raises(ll.errors.StoreError, match=r"1 of 2 runs were written to .* and cannot be read any"):
        swept(removes, seeds=(0,), jobs=1, store=tmp_path)
    assert len(swept(ll.LoRA(3), seeds=(0,), jobs=1, store=tmp_path)) == 2


def called(folder: Path, *, noted: bool = True, again: bool = False) -> Call:
    """A call whose store is in this folder."""
    call = Call(key := secrets.token_hex(4), folder / f".call.{key}", again)
    if noted:
        call.notes.mkdir(parents=True)
        (call.notes / key).write_text(key)
    return call


def worked(call: Call, run) -> Attempt | None:
    """What a worker returns of one item."""
    item = (((1,), call.notes.with_name("run.json")),)
    return attempt_on_worker(call, packed(item), lambda: packed(Shared(run, dict)))


def test_a_worker_that_may_only_read_the_store_sends_its_records_back(tmp_path):
    call = called(tmp_path)

    def read_only(event: str, arguments: tuple) -> None:
        if event == "open" and arguments[2] & os.O_CREAT and str(arguments[0]).startswith(str(tmp_path)):
            raise PermissionError(arguments[0])

    def work(_number: int) -> None:
        sys.addaudithook(read_only)
        os._exit(3 if worked(call, lambda *_: {"done": True}).records == ({"done": True},) else 1)

    assert in_processes(work, 1) == [3]
    assert worked(call, lambda *_: {"done": True}).records == ()
    assert json.loads((tmp_path / "run.json").read_bytes()) == {"done": True}


def test_notes_that_are_removed_while_a_worker_runs_cost_nothing(tmp_path):
    call = called(tmp_path)
    ended = worked(call, lambda *_: shutil.rmtree(call.notes) or {"done": True})
    assert not ended.failed and (tmp_path / "run.json").exists()
    ended = worked(called(tmp_path, noted=False), lambda *_: {"done": True})
    assert ended.records == ({"done": True},)


def test_what_cannot_travel_or_arrive_is_said(tmp_path, monkeypatch):
    model = copy.deepcopy(small_vit())
    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(ValueError, match=r"cannot travel to .* files .*jobs=1"),
    ):
        model.register_forward_hook(lambda *_: print("called", file=log))
        swept(model=model, jobs=2, store=tmp_path / "s")
    module = types.ModuleType("only_here")
    exec("class Point: pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    item = packed((((module.Point(),), tmp_path / "run.json"),))
    monkeypatch.delitem(sys.modules, "only_here")
    with pytest.raises(ll.errors.InputError, match=r"No module named 'only_here'.* must be installed where"):
        attempt_on_worker(Call("k", tmp_path), item, bytes)


def test_calls_in_two_threads_have_processes_of_their_own_which_end_with_the_process_that_has_them(tmp_path):
    def begun(name: str, run):
        call = called(tmp_path / name, again=True)  # so that one process is not this one
        items = [(((number,), tmp_path / name / f"{number}.json"),) for number in range(2)]
        return Processes(1).attempts(Shared(run, dict), call, items)

    def waits(_point, _path) -> dict:
        (tmp_path / "begun").touch()
        while not (tmp_path / "closed").exists():  # wait_for is of a module that takes seconds to import
            time.sleep(0.01)
        return {}

    def work(_number: int) -> None:
        slow: list[object] = []
        thread = threading.Thread(target=lambda: slow.extend(begun("slow", waits)))
        thread.start()
        wait_for((tmp_path / "begun").exists)
        quick = begun("quick", lambda *_: {})
        assert not next(quick)[1].failed  # while the other call's first run is computed
        quick.close()
        (tmp_path / "closed").touch()
        thread.join()
        assert len(slow) == 2

    assert in_processes(work, 1) == [0]


def test_a_measure_that_cannot_be_had_is_missing_and_no_failure(tmp_path):
    few = retained().subset(test=5)
    table = swept(
        ll.Window.middle(2), seeds=(0,), store=tmp_path / "s", spectra=small_spectra(), retain=few, jobs=1
    )
    assert not table["failed"].any()
    drifts = ll.Sweep.open(tmp_path / "s").only(table).drifts()  # 5 examples have 4 neighbours each, not 10
    assert drifts["neighbours"].isna().all() and drifts[["cka", "update"]].notna().all(axis=None)


def test_weights_that_are_no_numbers_after_the_last_step_are_a_divergence(tmp_path):
    grid = ll.Grid(lr=[1e-2, 1e30], baselines=[ll.FullFineTuning(), ll.LoRA(2)])
    same = {"model": small_vit(), "task": pairs()[0], "retain": retained(), "spectra": small_spectra()}
    table = ll.sweep(grid, store=tmp_path / "s", jobs=1, **same, **FAST | {"steps": 1}).table
    assert table["diverged"].tolist() == [False, False, True, True] and not table["failed"].any()
    assert set(ll.Sweep.open(tmp_path / "s").only(table).drifts()["run"]) == set(table["run"][:2])


def test_a_sequence_that_fails_is_rows_without_results_and_goes_on_from_its_checkpoint(tmp_path):
    method = Regularized(ll.LoRA(2), Goes(wrong="refused"))  # the second task's seed is 1000 more
    with pytest.raises(ValueError, match="no such luck"):
        learn(Merged(), method, store=tmp_path / "s", retain=retained())
    (checkpoint,) = (tmp_path / "s" / "runs" / "unfinished").glob("*.pt")
    assert torch.load(checkpoint, weights_only=True)["after"] == 1
    table = ll.experiments.ContinualSweep.open(tmp_path / "s").table
    assert len(table) == 4 * 3 and table["failed"].all() and (table["reason"] == "no such luck").all()
    assert table[["accuracy", "loss", "retained_accuracy"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="all runs of the table failed"):
        ll.experiments.ContinualSweep.open(tmp_path / "s").only(table).drifts()


@pytest.mark.parametrize("jobs", [0, -1, 1.5, True, "2"])
def test_impossible_numbers_of_processes_are_refused(jobs, tmp_path):
    with pytest.raises((ValueError, TypeError), match="jobs, the number of processes"):
        swept(ll.Window.middle(2), jobs=jobs, store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinities")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="one process on an accelerator")
def test_by_default_there_is_a_process_for_each_core_that_may_be_used():
    assert chosen_engine(None, None).jobs == joblib.cpu_count()
    assert chosen_engine(None, 10**12).width() == 10**12  # no more are started than there are runs
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert chosen_engine(None, None).jobs == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_under_torchrun_a_sweep_of_several_processes_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2: torchrun .* start this with plain python"):
        swept(ll.Window.middle(2), store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_runs_do_not_hear_of_torchrun(monkeypatch):
    launched = dict.fromkeys(LAUNCHED, "0") | {"WORLD_SIZE": "1", "MASTER_ADDR": "nowhere.invalid"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert not swept(ll.LinearProbe(), seeds=(0,), jobs=1)[
        "failed"
    ].any()  # it would wait for nowhere.invalid
    assert {name: os.environ[name] for name in LAUNCHED} == launched
    assert not torch.distributed.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"jobs is 3, and there is a process for each GPU, of which .* 2"):
        swept(jobs=3)


def test_gpus_are_called_what_cuda_calls_them():
    assert visible_gpus(2, None) == ["0", "1"] and visible_gpus(0, "") == []
    assert visible_gpus(2, "4,MIG-1") == ["4", "MIG-1"] and visible_gpus(1, "2,-1,3") == ["2"]


@pytest.mark.parametrize(
    ("engine", "error", "message"),
    [
        ("dask", ValueError, r"a dask.distributed.Client or 'ray', not 'dask'; pip install .* has Dask"),
        ("spark", ValueError, "engine must be this machine's processes"),
        (2, TypeError, "engine must be this machine's processes"),
        ("ray", ValueError, "jobs are this machine's processes, .* give one of them"),
    ],
)
def test_what_is_no_engine_is_refused(engine, error, message, tmp_path):
    with pytest.raises(error, match=message):
        swept(engine=engine, jobs=2, store=tmp_path / "s")
    with pytest.raises(error, match=message):
        learn(engine=engine, store=tmp_path / "s")  # which gives jobs
    assert not (tmp_path / "s").exists()


def test_without_ray_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lora_lens.experiments.engines.ray_tasks", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'lora_lens\[cluster\]'"):
        swept(engine="ray")


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (PackageNotFoundError("torch"), r"worker w has no torch: install torch=="),
        ("0.1.2", "worker w has torch 0.1.2, and here it is .*: results would depend on who computes them"),
        (OSError("timed out"), "worker w cannot say which torch it has: timed out"),
    ],
)
def test_workers_with_other_code_are_refused(there, message):
    with pytest.raises(ValueError, match=message):
        require_same_versions({"torch": {"v": version("torch"), "w": there}})
    require_same_versions({"torch": {"w": version("torch").split("+")[0] + "+cu999"}})
