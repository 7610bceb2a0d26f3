"""Random numbers that follow a seed, while the global random state stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """What draws on the CPU or on ``device`` meanwhile follows ``seed``; then both go on as before."""
    device = torch.device(device)
    accelerators = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
        # torch.manual_seed reaches the generators of all devices, those that are not put back as well
        (torch.manual_seed if accelerators else torch.default_generator.manual_seed)(seed)
        yield
