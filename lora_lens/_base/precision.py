"""Matrix products in bfloat16, where processors have units for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PRECISIONS = ("float32", "bfloat16")


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Matrix products in ``precision`` for a while; what comes before and after them stays as it is."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


def as_double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the tensor's device may have no such numbers, as Apple's GPUs."""
    return (tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()).double()
