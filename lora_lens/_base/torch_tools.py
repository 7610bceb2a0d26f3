"""Calls of models, what their layers are given, and checks of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lora_lens._base.errors import InputError, LoraLensError

Inputs = Tensor | Mapping[str, Tensor]
MODEL_CHECKS = (RuntimeError, AssertionError, ValueError, TypeError, IndexError)  # of inputs that do not fit


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


def call(model: nn.Module, inputs: Inputs) -> object:
    """What the model makes of a batch, or of a mapping of keyword arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    return inputs.to(device)


def real_positions(inputs: Inputs, x: Tensor | None = None) -> Tensor | None:
    """Which positions of a batch hold tokens and no padding, (batch, tokens); None where all do.

    Args:
        x: what a layer was given for the batch; None as well where its positions are no tokens.
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or (x is not None and x.shape[:2] != mask.shape):
        return None
    return mask.bool()


@contextmanager
def seeing_inputs(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it lasts, ``see`` is told of every call of the layers: the layer's name and its first input."""

    def tell(name: str, _module: nn.Module, given: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
        see(name, given[0] if given else next(iter(options.values())))

    with ExitStack() as during:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(partial(tell, name), with_kwargs=True)
            during.callback(handle.remove)
        yield


@contextmanager
def taking(model: nn.Module, what: str, remedy: str) -> Iterator[None]:
    """Tell what the model itself says of inputs that do not fit it.

    Raises:
        ValueError: the model does not take them.
    """
    try:
        yield
    except (LoraLensError, torch.OutOfMemoryError):
        raise
    except MODEL_CHECKS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{type(model).__name__} does not take {what}: {reason}; {remedy}") from error


def check_finite(name: str, weight: Tensor) -> None:
    # The sum is faster than asking each, and copies nothing; it may be infinite by itself.
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise InputError(
            f"{name}.weight holds NaN or infinite values, so it has no spectrum; "
            "load the model again or repair the checkpoint"
        )
