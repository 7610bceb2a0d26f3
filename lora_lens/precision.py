"""Matrix products in bfloat16, where processors have units for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PRECISIONS = ("float32", "bfloat16")


def fastest_precision() -> str:
    """The ``precision`` that costs least here: "bfloat16" on GPUs and processors that multiply in it.

    On other processors, those without AVX-512, it is emulated, and many times slower than "float32".
    """
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "float32"


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Matrix products in ``precision`` for a while; what comes before and after them stays as it is."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


def as_double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the tensor's device may have no such numbers, as Apple's GPUs."""
    return (tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()).double()
