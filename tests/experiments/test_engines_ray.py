"""Sweeps as tasks of Ray, on this machine; workers and callers are killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
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
from small_sequences import learn
from unseen import UNSEEN

import lora_lens as ll
from lora_lens.training import Regularized

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would tell its maker that it was started
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (the name as Ray reads it; its workers would wait for others)
ray = pytest.importorskip("ray")
TESTS = Path(__file__).parents[1]


def connect(**where: object) -> None:
    """To a Ray whose workers do not see some folders."""
    environment = {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    hook = {"worker_process_setup_hook": "unseen.hide_unseen", "env_vars": environment}
    ray.init(log_to_driver=False, logging_level="error", runtime_env=hook, **where)


@pytest.fixture(scope="module", autouse=True)
def local() -> Iterator[None]:
    """Two workers."""
    for attempt in range(5):
        try:
            connect(num_cpus=2, include_dashboard=False)
            break
        except Exception as error:  # Ray waits 30 s for itself, which is not enough on a busy machine
            if "timed out during startup" not in str(error) or attempt == 4:
                raise
            ray.shutdown()
    yield
    ray.shutdown()


def test_the_table_is_the_same_as_in_this_process(tmp_path):
    alone = swept(ll.Window.middle(2), ll.LinearProbe(), jobs=1)
    table = swept(ll.Window.middle(2), ll.LinearProbe(), engine="ray", store=tmp_path / "s")
    pd.testing.assert_frame_equal(table, alone, check_exact=True)
    assert [path.name for path in (tmp_path / "s" / "runs").iterdir() if path.suffix != ".json"] == []


def test_what_runs_share_is_unpickled_once_in_each_worker(tmp_path):
    noting = Regularized(ll.LoRA(2), Noting(str(tmp_path / "runs"), processes=2))
    swept(noting, seeds=range(6), model=noting_model(tmp_path / "u"), engine="ray")
    assert set(lines_of(tmp_path / "u").values()) == {1}
    assert sum(lines_of(tmp_path / "runs").values()) == 6
    assert os.getpid() not in set(map(int, lines_of(tmp_path / "runs")))


def test_runs_that_fail_or_kill_their_worker_are_rows_with_their_reason(tmp_path):
    dies = Regularized(ll.LoRA(2), Noting(str(tmp_path / "runs"), dies_once=True))
    wrong = [Regularized(ll.LoRA(2), Goes(wrong=w)) for w in WRONG]
    with pytest.warns(UserWarning, match="4 of 6 runs failed"):
        table = swept(dies, *wrong, seeds=(1,), engine="ray", store=tmp_path / "s")
    assert table["reason"].str.split(":").str[0].tolist() == ["", "", *WRONG.values()]
    assert table["accuracy"].notna().tolist() == [True, True, False, False, False, False]
    assert sum(lines_of(tmp_path / "runs").values()) == 1 + 1  # it was run again


def test_the_caller_writes_for_workers_that_do_not_see_the_store(tmp_path):
    store = tmp_path / UNSEEN
    table = swept(ll.LinearProbe(), engine="ray", store=store)
    assert len(finished(store)) == 4 and not table["failed"].any()
    pd.testing.assert_frame_equal(table, swept(ll.LinearProbe(), jobs=1), check_exact=True)
    sequences = learn(engine="ray", jobs=None, store=tmp_path / f"{UNSEEN} sequences")
    pd.testing.assert_frame_equal(sequences, learn(), check_exact=True)


def kill_a_worker() -> bool:
    """One that was computing something; whether there was one."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if process.name().startswith("ray::_attempt"):
                process.kill()
                return True
    return False


def test_killed_workers_and_callers_cost_no_run(tmp_path):
    store = tmp_path / "s"
    script = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
        "import engine_runs, pathlib, test_engines_ray\n"
        f"test_engines_ray.connect(address={ray.get_runtime_context().gcs_address!r})\n"
        f"engine_runs.many(pathlib.Path({str(store)!r}), engine='ray')"
    )
    token = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}  # to be let in
    caller = started(script, **token)
    wait_for(lambda: len(finished(store)) >= 3 or not caller.is_alive())
    caller.kill()
    caller.join()
    assert 3 <= len(finished(store)) < 12
    killed: list[bool] = []
    killing = meanwhile(store, 7, lambda: killed.append(kill_a_worker()))
    table = many(store, engine="ray")
    killing.join()
    assert killed == [True] and not table["failed"].any()
    pd.testing.assert_frame_equal(table, many_alone(), check_exact=True)
