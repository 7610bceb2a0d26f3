"""What a file holds of one quantized layer, and what all formats need."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lens._base.errors import InputError

Shape = tuple[int, ...]
Read = Callable[[int | None], Tensor]
EXPONENTS = {"U8", "F8_E8M0"}  # a scale 2^(byte - 127), of OCP's microscaling formats


@dataclass(frozen=True)
class Plain:
    """A quantized layer as the matrix, or the stack of experts' matrices, that it stands for.

    Attributes:
        shape: (out, in), of experts (experts, out, in).
        read: dequantizes the matrix, or one expert of the stack, in float32.
        last_is_in: whether its format says that the last axis is the input's.
    """

    shape: Shape
    read: Read
    last_is_in: bool = False


@dataclass(frozen=True)
class Layer:
    """What a file holds of one quantized layer.

    Attributes:
        name: of the layer.
        tensors: key, shape and dtype by the part's name without the layer's: weight, weight_scale, ...
        fetch: reads a tensor, or one expert of it, by key.
        settings: what the config says about quantization.
        header: what the file says about itself.
        stacked: whether it is a stack of experts.
    """

    name: str
    tensors: Mapping[str, tuple[str, Shape, str]]
    fetch: Callable[[str, int | None], Tensor]
    settings: Mapping[str, Any]
    header: Mapping[str, str]
    stacked: bool = False

    def holds(self, *needed: str, maybe: tuple[str, ...] = ()) -> bool:
        """Whether it consists of these parts and no others."""
        return {*needed} <= self.tensors.keys() <= {*needed, *maybe}

    def shape(self, part: str) -> Shape:
        return self.tensors[part][1]

    def dtype(self, part: str) -> str:
        return self.tensors[part][2]

    def read(self, part: str, expert: int | None = None) -> Tensor:
        return self.fetch(self.tensors[part][0], expert)

    def require(self, fits: bool, *parts: str) -> None:
        """Raises InputError: the shapes of these parts do not belong together."""
        if not fits:
            shapes = " and ".join(f"{part} {self.shape(part)}" for part in parts)
            raise InputError(
                f"is quantized, and its parts do not fit together: {shapes}; download or save it again, or "
                "choose others by name"
            )


def json_facts(text: str | bytes) -> Mapping[str, Any]:
    try:
        facts = json.loads(text)
    except ValueError:
        facts = None
    if not isinstance(facts, Mapping):
        raise InputError("is quantized, and what is stored about it is no JSON; download it again")
    return facts


def is_positive(number: object) -> bool:
    return isinstance(number, int) and number > 0


def scale_numbers(tensor: Tensor, part: str) -> Tensor:
    """A scale as float32; a byte stands for a power of two."""
    if tensor.dtype == torch.uint8 and "zero" not in part:
        return (tensor.float() - 127).exp2()
    return tensor.float()


def as_plane(layer: Layer, part: str, expert: int | None) -> Tensor:
    """A part as (rows, columns) of blocks, one expert's if there is one for each."""
    shape = layer.shape(part)
    of_each = expert is not None and math.prod(shape) > 1
    plane = scale_numbers(layer.read(part, expert if of_each else None), part)
    return plane.reshape(-1, 1) if plane.ndim < 2 else plane.flatten(1)


def by_blocks(
    values: Tensor, numbers: Tensor, blocks: tuple[int, int], apply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Apply each number to its block of (rows, columns), in place, with no copy of the whole."""
    (rows, columns), (high, wide) = values.shape, blocks
    if columns % wide == 0:
        grouped = values.view(rows, columns // wide, wide)
        numbers = numbers.unsqueeze(-1)
    else:
        grouped, numbers = values, numbers.repeat_interleave(wide, dim=1)[:, :columns]
    if high == 1 or len(numbers) == 1:
        apply(grouped, numbers)
    else:
        for i, line in enumerate(numbers):
            apply(grouped[i * high : (i + 1) * high], line)
    return values


def by_table(codes: Tensor, table: Tensor, high_first: bool) -> Tensor:
    """Bytes of two codes each as (rows, 2 * bytes) of the table's numbers."""
    codes_of = torch.arange(256)
    pairs = torch.stack([table[codes_of >> 4], table[codes_of & 15]], 1)
    pairs = pairs if high_first else pairs.flip(1)
    return torch.nn.functional.embedding(codes.int(), pairs).flatten(-2)
