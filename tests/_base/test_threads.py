from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread

import numpy as np
import pytest
import torch
from threadpoolctl import OpenBLASController, ThreadpoolController, threadpool_info
from torch import nn

import lora_lens as ll
from lora_lens._base.threads import limited_threads, thread_count
from lora_lens.spectrum import _lapack as lapack


def blas() -> list[int]:
    return [found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"]


@pytest.fixture(autouse=True)
def two_threads():
    """A machine with two cores, whatever this one has."""
    before, found = torch.get_num_threads(), [x["num_threads"] for x in threadpool_info()]
    torch.set_num_threads(2)
    controller = ThreadpoolController().select(user_api="blas")
    for library in controller.lib_controllers:
        library.set_num_threads(2)
    # threadpoolctl lets only the thread that set a number last set it again, unless that says it is done
    getattr(OpenBLASController, "clear_controlling_thread", lambda: None)()
    assert set(blas()) == {2}
    yield
    torch.set_num_threads(before)
    for library, count in zip(ThreadpoolController().lib_controllers, found, strict=True):
        library.set_num_threads(count)
    getattr(OpenBLASController, "clear_controlling_thread", lambda: None)()


def in_a_thread(work) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_the_last_to_leave_finds_all_as_the_first_did(first_to_leave):
    leave, within = [Event(), Event()], [Event(), Event()]
    counts = {}

    def limit(number: int) -> None:
        with limited_threads(1):
            within[number].set()
            assert leave[number].wait(60)
        counts[number] = torch.get_num_threads()

    threads = [Thread(target=limit, args=(number,)) for number in range(2)]
    for thread, event in zip(threads, within, strict=True):  # one after the other
        thread.start()
        assert event.wait(60)
    assert set(blas()) == {1} and thread_count() == in_a_thread(thread_count) == 2
    for number in (first_to_leave, 1 - first_to_leave):
        leave[number].set()
        threads[number].join(60)
    assert set(blas()) == {2} and counts == {0: 2, 1: 2}
    assert torch.get_num_threads() == 2 and in_a_thread(torch.get_num_threads) == 2


def test_a_limit_within_a_limit_is_the_outer_s_afterwards():
    with limited_threads(1):
        with limited_threads(1, blas=2):
            assert thread_count() == 1 and set(blas()) == {1}
        assert torch.get_num_threads() == thread_count() == 1
    assert torch.get_num_threads() == 2


def test_two_factorizations_at_once_leave_the_threads_as_they_were():
    together = Barrier(2)
    torch.manual_seed(0)
    models = [nn.Sequential(*(nn.Linear(60, 60) for _ in range(20))) for _ in range(2)]

    def factorize(model: nn.Module) -> ll.SpectrumSet:
        together.wait(30)
        return ll.spectra(model, "all-linear", progress=False)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(factorize, models))
    for model, spectra in zip(models, found, strict=True):
        weight = model[0].weight.detach().double()
        np.testing.assert_allclose(
            next(iter(spectra.values())).singular_values, torch.linalg.svdvals(weight), rtol=1e-6
        )
    assert set(blas()) == {2} and torch.get_num_threads() == 2
    assert in_a_thread(torch.get_num_threads) == 2


def test_the_process_s_own_prototypes_stay_as_others_set_them(monkeypatch):
    lapack._routine.cache_clear()
    for shared in (ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer):
        monkeypatch.setattr(shared, "restype", ctypes.c_int)
    np.testing.assert_allclose(lapack.eigenvalues(np.diag([3.0, 1.0, 2.0])), [1, 2, 3])
    for shared in (ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer):
        assert shared.restype is ctypes.c_int
