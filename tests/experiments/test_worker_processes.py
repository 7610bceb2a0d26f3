"""Processes that a sweep starts, keeps for the next call, and survives when they are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import pandas as pd
import psutil
import pytest
from clean_processes import started
from engine_runs import (
    Goes,
    Noting,
    finished,
    lines_of,
    many,
    many_alone,
    meanwhile,
    noting_model,
    swept,
    wait_for,
)

import lora_lens as ll
from lora_lens.experiments.engines import processes
from lora_lens.experiments.engines.choice import chosen_engine
from lora_lens.training import Regularized


def test_a_process_that_may_start_no_others_computes_all_by_itself():
    process = multiprocessing.current_process()
    process._config["daemon"] = True  # as Dask does with its workers
    try:
        assert chosen_engine(None, None).jobs == 1
        with pytest.raises(ValueError, match=r"jobs is 2, and this process, a daemon .* give jobs=1"):
            chosen_engine(None, 2)
    finally:
        process._config["daemon"] = False


def test_what_runs_share_is_unpickled_once_in_each_process(tmp_path):
    noting = Regularized(ll.LoRA(2), Noting(str(tmp_path / "runs"), processes=2))
    swept(noting, seeds=range(6), model=noting_model(tmp_path / "u"), jobs=2)
    assert set(lines_of(tmp_path / "u").values()) == {1} and len(lines_of(tmp_path / "u")) == 2
    assert sum(lines_of(tmp_path / "runs").values()) == 6  # in those two


def test_a_run_whose_process_is_killed_once_is_run_again_and_the_others_once(tmp_path):
    dies = Regularized(ll.LoRA(2), Noting(str(tmp_path / "runs"), dies_once=True))
    table = swept(dies, seeds=range(4), jobs=2)
    assert not table["failed"].any() and table["accuracy"].notna().all()
    assert sum(lines_of(tmp_path / "runs").values()) == 4 + 1


def test_the_death_of_a_process_is_seen_after_others_ended_of_idleness(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "_idle", {})
    monkeypatch.setattr(processes, "IDLE", 0.5)
    monkeypatch.setattr(processes, "REUSED", 0.25)
    swept(Regularized(ll.LoRA(2), Noting(str(tmp_path / "runs"))), jobs=2)
    pids = {int(line.split()[0]) for line in lines_of(tmp_path / "runs")}
    wait_for(lambda: not any(map(psutil.pid_exists, pids)))
    killed = Regularized(ll.LoRA(2), Goes(wrong="killed"))
    tables = []
    call = threading.Thread(target=lambda: tables.append(swept(killed, seeds=(1,), jobs=2)), daemon=True)
    with pytest.warns(UserWarning, match="its process was killed"):
        call.start()
        call.join(300)
    assert [table["failed"].tolist() for table in tables] == [[False, True]]


def test_a_killed_process_or_caller_costs_no_run(tmp_path):
    store = tmp_path / "s"
    script = f"import engine_runs as e, pathlib; e.many(pathlib.Path({str(store)!r}), jobs=2)"
    caller = started(script)
    wait_for(lambda: len(finished(store)) >= 3 or not caller.is_alive())
    its_own = psutil.Process(caller.pid).children(recursive=True)
    caller.kill()
    caller.join()
    assert not psutil.wait_procs(its_own, timeout=120)[1]  # they would keep their memory for minutes
    assert 3 <= len(finished(store)) < 12
    kept = {file: file.stat().st_mtime_ns for file in finished(store)}
    victim = Noting(str(tmp_path / "pid"))
    swept(Regularized(ll.LoRA(2), victim), jobs=2)  # whose processes wait for the next call
    pid = int(next(iter(lines_of(tmp_path / "pid"))).split()[0])
    killing = meanwhile(store, 6, lambda: os.kill(pid, signal.SIGKILL))
    table = many(store, jobs=2)
    killing.join()
    assert not table["failed"].any()
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    pd.testing.assert_frame_equal(table, many_alone(), check_exact=True)
