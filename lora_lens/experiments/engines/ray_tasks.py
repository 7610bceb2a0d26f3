"""Tasks of a Ray cluster; nothing else imports Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lora_lens._base.errors import EngineError, InputError
from lora_lens.experiments.engines.attempts import attempt_on_worker
from lora_lens.experiments.engines.protocol import (
    PACKAGES,
    Attempt,
    Call,
    Item,
    Shared,
    packed,
    require_same_versions,
)


class RayTasks:
    """Of the Ray that was initialised, or of a new one: a core for each run, and a GPU if there are any."""

    def __init__(self) -> None:
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=False)
            except Exception as error:  # Ray has no error of its own for a machine that is too busy
                ray.shutdown()
                raise EngineError(f"Ray did not start: {error}") from error
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        if not nodes:
            raise InputError("engine is a Ray whose machines offer no cores: start some with ray start")
        require_same_versions({name: {_named(n): _version_at(n, name) for n in nodes} for name in PACKAGES})
        self.resources = {"num_cpus": 1}
        if ray.cluster_resources().get("GPU"):
            self.resources["num_gpus"] = 1

    def width(self) -> int:
        return int(ray.cluster_resources().get("GPU" if "num_gpus" in self.resources else "CPU", 0))

    def attempts(
        self, shared: Shared, call: Call, items: Sequence[Item]
    ) -> Iterator[tuple[Item, Attempt | None]]:
        whole = ray.put(packed(shared))
        task = ray.remote(max_retries=0, **self.resources)(_attempt)
        waiting = {task.remote(call, packed(item), [whole]): item for item in items}
        try:
            while waiting:
                (ended, *_), _ = ray.wait(list(waiting))
                try:
                    result = ray.get(ended)
                except RayTaskError:  # raised by our own code
                    raise
                except RayError:
                    result = None
                yield waiting.pop(ended), result
        finally:
            for reference in waiting:
                ray.cancel(reference)


def _attempt(call: Call, item: bytes, whole: list[ray.ObjectRef]) -> Attempt | None:
    return attempt_on_worker(call, item, partial(ray.get, whole[0]))


def _named(node: dict) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _version_at(node: dict, package: str) -> object:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    probe = ray.remote(num_cpus=0, scheduling_strategy=there)(version)
    try:
        return ray.get(probe.remote(package))
    except RayTaskError as error:
        return error.cause
    except RayError as error:  # its process did not even start
        return error
