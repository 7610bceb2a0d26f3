"""Sweeps on Dask's workers: a cluster on this machine, whose workers, scheduler and caller are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing import forkserver

import dask
import pandas as pd
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
from unseen import UNSEEN, hide_unseen

import lora_lens as ll
from lora_lens.training import Regularized

distributed = pytest.importorskip("distributed")
DASK = "import dask.cli; dask.cli.run_cli()"


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    """No deadline of Dask's is missed on a busy machine, and its workers have everything imported."""
    forkserver.ensure_running()  # before Dask says what it should import
    with dask.config.set(
        {
            "distributed.comm.timeouts.connect": "120s",
            "distributed.worker.multiprocessing-method": "forkserver",
        }
    ):
        yield


@pytest.fixture(scope="module")
def client(patient) -> Iterator[distributed.Client]:
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def two_workers(client) -> distributed.Client:
    """After those that a test killed have come back, or another where Dask has given one up."""
    try:
        client.wait_for_workers(2, timeout=60)
    except TimeoutError:
        client.cluster.scale(len(client.cluster.worker_spec) + 1)
        client.wait_for_workers(2)
    return client


def test_the_table_is_the_same_as_in_this_process(two_workers, tmp_path):
    alone = swept(ll.Window.middle(2), ll.LinearProbe(), jobs=1)
    table = swept(ll.Window.middle(2), ll.LinearProbe(), engine=two_workers, store=tmp_path / "s")
    pd.testing.assert_frame_equal(table, alone, check_exact=True)
    assert [path.name for path in (tmp_path / "s" / "runs").iterdir() if path.suffix != ".json"] == []


def test_what_runs_share_is_unpickled_once_in_each_worker(two_workers, tmp_path):
    noting = Regularized(ll.LoRA(2), Noting(str(tmp_path / "runs"), processes=2))
    swept(noting, seeds=range(6), model=noting_model(tmp_path / "u"), engine=two_workers)
    assert set(lines_of(tmp_path / "u").values()) == {1} and len(lines_of(tmp_path / "u")) == 2
    assert sum(lines_of(tmp_path / "runs").values()) == 6


def test_runs_that_fail_or_kill_their_worker_are_rows_with_their_reason(two_workers, tmp_path):
    dies = Regularized(ll.LoRA(2), Noting(str(tmp_path / "runs"), dies_once=True))
    wrong = [Regularized(ll.LoRA(2), Goes(wrong=w)) for w in WRONG]
    with pytest.warns(UserWarning, match="4 of 6 runs failed"):
        table = swept(dies, *wrong, seeds=(1,), engine=two_workers, store=tmp_path / "s")
    assert table["reason"].str.split(":").str[0].tolist() == ["", "", *WRONG.values()]
    assert table["accuracy"].notna().tolist() == [True, True, False, False, False, False]
    assert sum(lines_of(tmp_path / "runs").values()) == 1 + 1  # it was run again


def test_the_caller_writes_for_workers_that_do_not_see_the_store(two_workers, tmp_path):
    two_workers.run(hide_unseen)
    store = tmp_path / UNSEEN
    table = swept(Regularized(ll.LoRA(2), Noting(str(tmp_path / "runs"))), engine=two_workers, store=store)
    assert os.getpid() not in set(map(int, lines_of(tmp_path / "runs")))
    assert len(finished(store)) == 4 and not table["failed"].any()
    again = swept(Regularized(ll.LoRA(2), Noting(str(tmp_path / "runs"))), engine=two_workers, store=store)
    pd.testing.assert_frame_equal(again, table)
    assert sum(lines_of(tmp_path / "runs").values()) == 2
    sequences = learn(engine=two_workers, jobs=None, store=tmp_path / f"{UNSEEN} sequences")
    pd.testing.assert_frame_equal(sequences, learn(), check_exact=True)


def test_killed_workers_and_callers_cost_no_run(two_workers, tmp_path):
    store = tmp_path / "s"
    address = two_workers.scheduler.address
    script = (
        "import distributed, engine_runs, pathlib;"
        f"engine_runs.many(pathlib.Path({str(store)!r}), engine=distributed.Client({address!r}))"
    )
    caller = started(script)
    wait_for(lambda: len(finished(store)) >= 3 or not caller.is_alive())
    caller.kill()
    caller.join()
    assert 3 <= len(finished(store)) < 12
    pids = list(two_workers.run(os.getpid).values())
    killing = meanwhile(store, 7, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])  # and all data lost
    table = many(store, engine=two_workers)
    killing.join()
    assert not table["failed"].any()
    pd.testing.assert_frame_equal(table, many_alone(), check_exact=True)


def test_a_killed_scheduler_ends_the_call_and_another_goes_on(two_workers, tmp_path):
    store, found = tmp_path / "s", tmp_path / "scheduler.json"
    commands = ["scheduler", "--port", "0"], ["worker", "--nthreads", "1", "--no-nanny"]
    processes = [started(DASK, *command, "--no-dashboard", "--scheduler-file", found) for command in commands]
    try:
        wait_for(found.exists)
        with distributed.Client(scheduler_file=str(found), timeout=5) as other:
            other.wait_for_workers(1)
            killing = meanwhile(store, 3, processes[0].kill)
            with pytest.raises(ll.errors.EngineError, match="those that have ended are kept"):
                many(store, engine=other)
            killing.join()
            wait_for(lambda: other.status == "closed")
            with pytest.raises(ValueError, match="a Client that is closed"):
                many(store, engine=other)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert 3 <= len(finished(store)) < 12
    table = many(store, engine=two_workers)
    pd.testing.assert_frame_equal(table, many_alone(), check_exact=True)


def test_clients_that_cannot_run_anything_are_refused(client, tmp_path):
    with pytest.raises(TypeError, match=r"of a cluster take dask.distributed.Client\(cluster\)"):
        swept(engine=client.cluster, store=tmp_path / "s")
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=None) as empty,
        distributed.Client(empty) as other,
        pytest.raises(ValueError, match="a Client without workers: start some"),
    ):
        swept(engine=other, store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_workers_with_another_torch_are_refused(tmp_path):
    (tmp_path / "torch-0.1.2.dist-info").mkdir()
    (tmp_path / "torch-0.1.2.dist-info" / "METADATA").write_text("Name: torch\nVersion: 0.1.2\n")
    with distributed.LocalCluster(n_workers=0, dashboard_address=None) as cluster:
        command = f"import sys; sys.path.insert(0, {str(tmp_path)!r});{DASK}"
        worker = started(command, "worker", cluster.scheduler_address, "--no-dashboard", "--no-nanny")
        try:
            with distributed.Client(cluster) as client:
                client.wait_for_workers(1)
                with pytest.raises(ValueError, match=r"worker tcp.* has torch 0.1.2, and here it is"):
                    swept(engine=client, store=tmp_path / "s")
        finally:
            worker.kill()
            worker.join()
    assert not (tmp_path / "s").exists()


def test_threads_of_one_worker_do_not_meddle_with_each_other(tmp_path):
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=3, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
        pytest.warns(UserWarning, match="up to 3 threads each and compute one run at a time"),
    ):
        table = swept(ll.Window.middle(2), engine=client)
    pd.testing.assert_frame_equal(table, swept(ll.Window.middle(2), jobs=1), check_exact=True)
