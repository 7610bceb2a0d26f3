"""Several processes that train one model together, started by torchrun or accelerate launch."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn


def accelerator() -> Accelerator:
    """Several processes without a GPU share their work only where ``cpu`` is given."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(cpu=several and not torch.accelerator.is_available())


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Every process steps with the mean of all gradients, sent as one vector.

    What no process has a gradient of keeps none, as in one process: the optimizer then leaves it alone, while
    a gradient of zero would let weight decay shrink it.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    reached = torch.tensor([float(p.grad is not None) for p in parameters], device=gradients[0].device)
    mean = accelerator.reduce(torch.cat([reached, *(g.flatten() for g in gradients)]), "mean")
    reached, *parts = mean.split([len(parameters), *(g.numel() for g in gradients)])
    for parameter, share, part in zip(parameters, reached.tolist(), parts, strict=True):
        found = part.view_as(parameter).to(parameter.dtype, copy=True)
        parameter.grad = found if share else None
