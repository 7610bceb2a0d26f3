"""Processes that a sweep starts, keeps for the next call, and survives when they are killed.

All tests that need two are here, so that they have the same: one takes seconds to import everything.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from clean_processes import started
from engine_runs import (
    WRONG,
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
from small_sequences import learn, pairs, retained

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


def test_the_table_is_the_same_in_one_process_or_two():
    one, two = (swept(ll.Window.middle(2), ll.LinearProbe(), jobs=jobs) for jobs in (1, 2))
    pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_sequences_in_two_processes_give_the_table_of_one():
    two = {"tasks": pairs()[:2], "seeds": (0, 1), "retain": retained()}
    pd.testing.assert_frame_equal(learn(**two, jobs=2), learn(**two), check_exact=True)


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


def test_runs_that_fail_or_kill_their_process_are_rows_and_the_others_go_on(tmp_path):
    wrong = [Regularized(ll.LoRA(2), Goes(wrong=w)) for w in WRONG]
    with pytest.warns(UserWarning, match="4 of 5 runs failed"):
        table = swept(*wrong, seeds=(1,), store=tmp_path / "s", jobs=2)
    assert table["reason"].str.split(":").str[0].tolist() == ["", *WRONG.values()]
    assert table["accuracy"].isna().tolist() == [False, True, True, True, True]


@dataclass(frozen=True)
class Deadly(ll.LoRA):
    """Kills its process the first times."""

    marker: str = ""
    times: int = 1

    def attach(self, request, plan):
        marker = Path(self.marker)
        before = len(marker.read_text()) if marker.exists() else 0
        if before < self.times:
            marker.write_text("x" * (before + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().attach(request, plan)


@pytest.mark.parametrize("times", [1, 2])
def test_a_group_whose_process_is_killed_is_run_again_and_then_one_by_one(times, tmp_path):
    deadly = Deadly(4, str(tmp_path / "there"), times)
    methods, together = [*ll.windows(rank=4, count=3), deadly], {"seeds": (0,), "fuse": 2}
    table = swept(*methods, **together, jobs=2, store=tmp_path / "store")
    assert len(table) == 1 + 4 and not table["failed"].any()
    assert len((tmp_path / "there").read_text()) == times
    if times == 1:
        pd.testing.assert_frame_equal(table, swept(*methods, **together, jobs=1), check_exact=True)


def test_each_gpu_has_a_process_whose_death_is_seen_after_others_ended_of_idleness(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5, 3")
    monkeypatch.setattr(processes, "IDLE", 0.5)
    monkeypatch.setattr(processes, "REUSED", 0.25)
    noting = Noting(str(tmp_path / "runs"), "CUDA_VISIBLE_DEVICES", processes=2)
    swept(Regularized(ll.LoRA(2), noting))
    pids, gpus = zip(*(line.split() for line in lines_of(tmp_path / "runs")), strict=True)
    assert set(gpus) == {"GPU-5", "3"}
    wait_for(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids))
    killed = Regularized(ll.LoRA(2), Goes(wrong="killed"))
    tables = []
    call = threading.Thread(target=lambda: tables.append(swept(killed, seeds=(1,))), daemon=True)
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
