"""Matrix products in bfloat16, where processors have units for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("float32", "bfloat16")


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Matrix products in ``precision`` for a while; what comes before and after them stays as it is."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield
