"""Calls of models, and checks of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lens._base.errors import InputError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every module is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def call(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> object:
    """What the model makes of a batch, or of a mapping of keyword arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def check_finite(name: str, weight: Tensor) -> None:
    # The sum is faster than asking each, and copies nothing; it may be infinite by itself.
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise InputError(
            f"{name}.weight holds NaN or infinite values, so it has no spectrum; "
            "load the model again or repair the checkpoint"
        )
