"""Which engine computes the runs of a call, checked before anything expensive."""

from __future__ import annotations

import multiprocessing
import os

import joblib
import torch

from lora_lens._base.errors import InputError, InputTypeError, MissingPackageError
from lora_lens._base.validate import shown, whole_number
from lora_lens.experiments.engines.processes import Processes
from lora_lens.experiments.engines.protocol import Engine

ENGINES = "this machine's processes (None), a dask.distributed.Client or 'ray'"


def chosen_engine(engine: object, jobs: int | None) -> Engine:
    """Who computes the runs.

    Args:
        engine: None for this machine's processes, a dask.distributed.Client, or "ray".
        jobs: how many processes; by default all cores that this one may use, or one for each GPU.

    Raises:
        InputTypeError, InputError: it is none of these; both are given; ``jobs`` is no whole number of at
            least 1, above the number of GPUs, or above 1 in a process that may start no others; the workers
            are none, or have other versions of lora_lens or torch; or torchrun has started several processes.
        MissingPackageError: Ray is not installed.
        EngineError: it does not start.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: torchrun or accelerate launch started several "
            "processes, which would all do the same runs; start this with plain python, jobs= shares out "
            "the runs"
        )
    if engine is None:
        return _processes(jobs)
    module = type(engine).__module__.split(".")[0]  # so that nobody needs Dask to run without it
    client = module == "distributed" and hasattr(engine, "submit") and hasattr(engine, "scatter")
    if not client and not (isinstance(engine, str) and engine == "ray"):
        hint = ""
        if module in ("distributed", "dask_jobqueue", "dask_cuda"):
            hint = "; of a cluster take dask.distributed.Client(cluster)"
        elif isinstance(engine, str) and engine.lower() == "dask":
            hint = "; pip install 'lora_lens[cluster]' has Dask, and docs/clusters.md says how to start it"
        kind = InputError if isinstance(engine, str) else InputTypeError
        raise kind(f"engine must be {ENGINES}, not {shown(engine)}{hint}")
    if jobs is not None:
        raise InputError(
            "jobs are this machine's processes, and with engine= the runs go to its workers: give one of them"
        )
    if client:
        from lora_lens.experiments.engines.dask_workers import DaskWorkers

        return DaskWorkers(engine)
    try:
        from lora_lens.experiments.engines.ray_tasks import RayTasks
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingPackageError("engine='ray' needs Ray: pip install 'lora_lens[cluster]'") from None
    return RayTasks()


def _processes(jobs: int | None) -> Processes:
    gpus = visible_gpus(torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    childless = multiprocessing.current_process().daemon  # a worker of Dask or of a multiprocessing.Pool
    if jobs is None:
        usual = 1 if torch.accelerator.is_available() or childless else joblib.cpu_count()
        return Processes(len(gpus) or usual, gpus)
    jobs = whole_number(jobs, "jobs, the number of processes (by default all cores),", least=1)
    if gpus and jobs > len(gpus):
        raise InputError(
            f"jobs is {jobs}, and there is a process for each GPU, of which this one sees {len(gpus)}; "
            "set CUDA_VISIBLE_DEVICES to nothing to compute on the cores"
        )
    if childless and jobs > 1:
        raise InputError(
            f"jobs is {jobs}, and this process, a daemon such as those of Dask and of multiprocessing.Pool, "
            "may start no others: give jobs=1"
        )
    return Processes(jobs, gpus)


def visible_gpus(count: int, visible: str | None) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process sees: numbers or UUIDs."""
    names = visible.split(",") if visible else map(str, range(count))
    return [name.strip() for name in names][:count]
