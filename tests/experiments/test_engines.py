"""Sweeps of a vision transformer of a few thousand weights, some of whose runs go wrong."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import joblib
import pandas as pd
import pytest
import torch
from small_sequences import learn, pairs, retained, small_spectra, small_vit

import lora_lens as ll
from lora_lens.experiments.continual.strategies import Merged
from lora_lens.experiments.engines.attempts import LAUNCHED
from lora_lens.experiments.engines.choice import chosen_engine, visible_gpus
from lora_lens.training import Regularized, Regularizer

FAST = {"steps": 2, "batch_size": 8, "evaluations": 2, "warmup": 0.0, "progress": False}


@dataclass(frozen=True)
class Goes(Regularizer):
    """Goes wrong in the way asked for, where the seed is 1 or more."""

    strength: float = 0.0
    wrong: str = ""

    def begin(self, model, past, config):
        if config.seed >= 1:
            match self.wrong:
                case "refused":
                    raise ll.errors.InputError("no such luck")
                case "a bug":
                    raise ZeroDivisionError("division by zero")
                case "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory")
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
        return lambda: 0.0


def swept(method: object, seeds=(0, 1), store: Path | None = None, **others: object) -> pd.DataFrame:
    grid = ll.Grid(lr=1e-2, seed=seeds, baselines=[ll.LoRA(2), method])
    settings = {"task": pairs()[0], "retain": retained(), "jobs": 1} | FAST | others
    return ll.sweep(grid, model=small_vit(), store=store, **settings).table


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
        table = swept(Regularized(ll.LoRA(2), Goes(wrong=wrong)), store=tmp_path / "s")
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
        swept(method, store=tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "runs").iterdir()}
    with pytest.warns(UserWarning, match="1 of 4 runs failed"):
        table = swept(method, store=tmp_path / "s")
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


def test_a_run_whose_process_is_killed_does_not_take_the_others_along(tmp_path):
    with pytest.warns(UserWarning, match="1 of 2 runs failed; .* its process was killed"):
        table = swept(Regularized(ll.LoRA(2), Goes(wrong="killed")), (1,), tmp_path / "s", jobs=2)
    assert table["failed"].tolist() == [False, True]
    assert table["accuracy"].isna().tolist() == [False, True]


def test_a_measure_that_cannot_be_had_is_missing_and_no_failure(tmp_path):
    few = retained().subset(test=5)
    table = swept(ll.Window.middle(2), (0,), tmp_path / "s", spectra=small_spectra(), retain=few)
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
    assert not swept(ll.LinearProbe(), (0,))["failed"].any()  # it would wait for nowhere.invalid
    assert {name: os.environ[name] for name in LAUNCHED} == launched
    assert not torch.distributed.is_initialized()
