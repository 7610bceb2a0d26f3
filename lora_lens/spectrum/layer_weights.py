"""The weight of a layer, or of one of its experts, as a matrix to read and write."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from lora_lens._base.wrappers import named_modules, submodule
from lora_lens.spectrum.quantized_layers import dequantized, quantized_as
from lora_lens.spectrum.stacks import StackedMatrix, stacked_at
from lora_lens.spectrum.usage.kept_layers import memory

LINEAR = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layer = nn.Module | StackedMatrix
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def layers_at(model: nn.Module, names: Iterable[str]) -> dict[str, Layer]:
    """The layers and experts of these names, in their order.

    Raises:
        AttributeError: there is none of that name.
    """
    names = list(names)
    experts = stacked_at(model, names)
    return {name: experts[name] if name in experts else submodule(model, name) for name in names}


def owner_of(layer: Layer) -> Tensor:
    """The parameter that holds a layer's weight, maybe together with others."""
    return layer.stack.parameter if isinstance(layer, StackedMatrix) else weight_of(layer)


def weight_of(layer: Layer) -> Tensor:
    """The layer's weight as it is."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # what is no layer with a weight has been refused
    return weight


def weight_matrix(layer: Layer) -> Tensor:
    """The weight as (out_features, in_features), a view if possible; of a convolution (out, in * kh * kw).

    What is quantized is given dequantized.
    """
    if quantized_as(layer):
        return dequantized(layer)
    weight = weight_of(layer).detach()
    return weight.T if isinstance(layer, Conv1D) else weight.flatten(1)


@torch.no_grad()
def set_weight_matrix(layer: Layer, matrix: Tensor) -> None:
    """Write what :func:`weight_matrix` reads."""
    place, weight = weight_matrix(layer), weight_of(layer)
    place.copy_(matrix)
    if place.data_ptr() != weight.data_ptr():  # of a convolution in channels-last order it is a copy
        weight.copy_(place.view(weight.shape))


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """(out_features, in_features) of :func:`weight_matrix`."""
    if quantized_as(layer) and isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    weight = weight_of(layer)
    rows, columns = weight.shape[0], weight[0].numel()
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def shared_weights(model: nn.Module) -> dict[str, list[str]]:
    """By the names of modules, what else has their weight, by memory: tied by value is tied as well."""
    places: dict[object, list[str]] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter):
                place = name if key == "weight" else f"{name}.{key}".strip(".")
                places.setdefault(memory(parameter), []).append(place)
    return {name: [n for n in names if n != name] for names in places.values() for name in names}
