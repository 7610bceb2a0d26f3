"""Processes that a sweep starts, keeps for the next call, and survives when they are killed.

All tests that need two are here, so that they have the same: one takes seconds to import everything.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
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
from lora_lens.experiments.engines.protocol import Call, Shared
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


def test_runs_that_fail_or_kill_their_process_are_rows_and_the_others_go_on(tmp_path):
    wrong = [Regularized(ll.LoRA(2), Goes(wrong=w)) for w in WRONG]
    noting = Regularized(ll.LoRA(2), Noting(str(tmp_path / "runs")))
    with pytest.warns(UserWarning, match="4 of 6 runs failed"):
        table = swept(*wrong, noting, seeds=(1,), store=tmp_path / "s", jobs=2)
    assert table["reason"].str.split(":").str[0].tolist() == ["", *WRONG.values(), ""]
    assert table["accuracy"].isna().tolist() == [False, True, True, True, True, False]
    assert sum(lines_of(tmp_path / "runs").values()) == 1


@dataclass(frozen=True)
class Deadly(ll.LoRA):
    """Writes its letter; kills its process if the letters are these."""

    file: str = ""
    letter: str = ""
    deadly: tuple[str, ...] = ()

    def attach(self, request, plan):
        with open(self.file, "a") as stream:
            stream.write(self.letter)
        if Path(self.file).read_text() in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().attach(request, plan)


def test_a_group_whose_process_is_killed_is_run_again_and_then_one_by_one(tmp_path):
    file = str(tmp_path / "letters")
    group = [Deadly(4, file, "a"), Deadly(4, file, "b", ("ab", "abab"))]
    together = {"seeds": (0,), "fuse": 2}
    table = swept(*ll.windows(rank=4, count=2), *group, **together, jobs=2, store=tmp_path / "store")
    written = Path(file).read_text()
    # Alone, the two are in two processes, and either may be the first.
    assert written[:4] == "ab" + "ab" and sorted(written[4:]) == ["a", "b"]
    assert len(table) == 1 + 4 and not table["failed"].any()
    one_by_one = swept(*group, seeds=(0,), jobs=1)
    for column in ("accuracy", "forgetting", "loss_rise"):
        assert table[column].tolist()[-2:] == one_by_one[column].tolist()[-2:]


def test_each_gpu_has_a_process_whose_death_is_seen_after_others_ended_of_idleness(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5, 3")
    monkeypatch.setattr(processes, "IDLE", 0.5)
    monkeypatch.setattr(processes, "REUSED", 0.25)
    engine = chosen_engine(None, None)
    items = [(((number,), tmp_path / f"{number}.json"),) for number in range(2)]

    # What runs here refers to nothing of the tests, whose imports would take seconds in each process.
    def notes(_point, _path) -> dict:
        (tmp_path / f"{os.getpid()}.pid").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        while len(list(tmp_path.glob("*.pid"))) < 2:
            time.sleep(0.01)
        return {}

    def dies(_point, _path) -> dict:
        os.kill(os.getpid(), signal.SIGKILL)

    ended = engine.attempts(Shared(notes, dict), Call("first", tmp_path / "unseen"), items)
    assert [attempt.records for _, attempt in ended] == [({},), ({},)]
    noted = {int(path.stem): path.read_text() for path in tmp_path.glob("*.pid")}
    assert set(noted.values()) == {"GPU-5", "3"}
    wait_for(lambda: not any(map(psutil.pid_exists, noted)))
    call = engine.attempts(Shared(dies, dict), Call("second", tmp_path / "unseen", again=True), items[:1])
    died: list[tuple] = []
    thread = threading.Thread(target=lambda: died.extend(call), daemon=True)
    thread.start()
    thread.join(300)
    assert died == [(items[0], None)]


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
    pid = int(next(iter(lines_of(tmp_path / "pid"))))
    killing = meanwhile(store, 6, lambda: os.kill(pid, signal.SIGKILL))
    table = many(store, jobs=2)
    killing.join()
    assert not table["failed"].any()
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    pd.testing.assert_frame_equal(table, many_alone(), check_exact=True)
