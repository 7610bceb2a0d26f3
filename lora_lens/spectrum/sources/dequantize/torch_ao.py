"""torchao's tensors, which torchao itself dequantizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_lens._base.errors import InputError, MissingPackageError
from lora_lens._base.naming import listed
from lora_lens.spectrum.sources.checkpoint import DTYPES
from lora_lens.spectrum.sources.dequantize.layer import Layer, Plain, json_facts


def torchao_tensor(layer: Layer) -> Plain | None:
    """A tensor subclass in its parts, as torchao's own safetensors support writes it."""
    about = layer.header.get(f"{layer.name}.weight")
    if about is None or not all(part.startswith("_weight_") for part in layer.tensors):
        return None
    needed = {f"_weight_{part}" for part in json_facts(about).get("_tensor_data_names") or ()}
    if missing := needed - layer.tensors.keys():
        raise InputError(f"is of torchao, and its {listed(sorted(missing))} is missing; save it again")
    shapes = {part: layer.shape(part) for part in layer.tensors}
    small = {
        part: torch.empty(shape, dtype=DTYPES[layer.dtype(part)], device="meta")
        for part, shape in shapes.items()
    }  # the class of the whole knows its shape
    return Plain(tuple(_of_torchao(layer, about, small).shape), partial(_read_torchao, layer, about))


def _read_torchao(layer: Layer, about: str, expert: int | None) -> Tensor:
    tensor = _of_torchao(layer, about, {part: layer.read(part) for part in layer.tensors})
    return tensor.dequantize().float()  # type: ignore[no-any-return]


def _of_torchao(layer: Layer, about: str, parts: Mapping[str, Tensor]) -> Any:
    try:
        from torchao.prototype.safetensors import safetensors_support  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingPackageError(
            f"{layer.name} is quantized by torchao: reading it needs the torchao package: pip install torchao"
        ) from error
    key = f"{layer.name}.weight"
    tensors = {f"{layer.name}.{part}": tensor for part, tensor in parts.items()}
    header = {key: about, "tensor_names": json.dumps([key])}
    try:
        found, _ = safetensors_support.unflatten_tensor_state_dict(tensors, header)
        return found[key]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"is of torchao, which cannot read it ({error}); save it again") from error
