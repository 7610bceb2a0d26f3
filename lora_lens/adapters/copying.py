"""Copies of models that share what does not change."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lora_lens._base.errors import InputError


def copy_around(model: nn.Module, shared: Iterable[Tensor]) -> nn.Module:
    """A deep copy of all but the values of ``shared``."""
    # data instead of detach(): changes of the copy must not count as changes of the original.
    plain = [p for p in shared if type(p) is nn.Parameter and type(p.data) is Tensor]
    return copied(model, {id(p): nn.Parameter(p.data, p.requires_grad) for p in plain})


def copied(model: nn.Module, known: dict[int, Tensor]) -> nn.Module:
    """A deep copy, with ``known`` by the ids of what they stand for.

    Raises:
        ValueError: the model holds something that has no copy.
    """
    # Outputs of an earlier call, such as a recurrent state, are copied without the graph they came from.
    kept = [
        value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)
    ]
    outputs = {id(value): value.detach().clone() for value in kept if value.grad_fn is not None}
    try:
        return copy.deepcopy(model, outputs | known)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, AssertionError) as error:  # as pickle, torch and FSDP have it
        raise InputError(
            f"{type(model).__name__} cannot be copied ({str(error).partition('. ')[0]}): take off what it "
            "holds of that kind, such as locks, outputs of an earlier call or shards; attach can also "
            "adapt it inplace=True"
        ) from error
