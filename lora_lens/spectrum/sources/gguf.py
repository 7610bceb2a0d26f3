"""Reading GGUF files: the header by itself, the numbers with the gguf package."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_lens._base.errors import InputError, MissingPackageError
from lora_lens._base.naming import listed
from lora_lens.spectrum.sources.factor_pairs import is_adapter_key, pairs_among, stored_pair
from lora_lens.spectrum.sources.quantized import Signs, problem_of
from lora_lens.spectrum.sources.roles import Stored, aside_names, is_embedding, weight_name

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
INTEGERS = {"I8", "I16", "I32", "I64"}
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by value type
INTS = {4: "I", 5: "i", 10: "Q", 11: "q"}
UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
ROWS_AT_ONCE = 64
LONGEST = 65535  # bytes of a name
RESHAPED = "comfy.gguf.orig_shape."  # ComfyUI cuts rows that fill no block anew, and writes how they were
NO_SIGNS = Signs(())
Read = Callable[[int | None], Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a file.

    Attributes:
        kind: the name of its type.
        problem: why it cannot be read, or "".
        read: reads it whole, or one expert of it.
    """

    shape: Shape
    kind: str
    problem: str
    read: Read


def in_gguf(path: Path) -> list[Stored]:
    """The weights of one file, or the updates of an adapter that llama.cpp's converter wrote.

    Raises:
        ValueError: it is damaged, of another byte order or version.
        ImportError: the gguf package is needed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("reading a GGUF file needs the gguf package: pip install gguf") from error
    _require_version(path)
    try:
        about, tensors, start = _header(path)
        placed = {
            key: _as_it_was(_found(path, key, shape, number, start + offset), about.get(RESHAPED + key))
            for key, (shape, number, offset) in tensors.items()
        }
    except (ValueError, KeyError, OverflowError, RecursionError, ZeroDivisionError, struct.error) as error:
        raise InputError(f"{path} is truncated or malformed ({error}); download it again") from error
    if about.get("general.type") == "adapter" or any(map(is_adapter_key, placed)):
        return _in_adapter(path, about, placed)
    named = {k: name for k, t in placed.items() if (name := weight_name(k, t.shape, NO_SIGNS)) is not None}
    aside, stored = aside_names({name: placed[key].shape for key, name in named.items()}), []
    for key, name in named.items():
        shape, read = placed[key].shape, placed[key].read
        problem = placed[key].problem or problem_of(_dtype(placed[key]))
        beside = (k for k in placed if k.startswith(f"{name}.") and k.endswith("scale"))
        scales = [k for k in beside if k != f"{name}.input_scale"]
        if scales == [f"{name}.scale"] and math.prod(placed[scales[0]].shape) == 1:
            read = partial(_times, read, placed[scales[0]].read)  # as llama.cpp does, in BitNet and others
        elif scales:
            problem = problem or f"has {listed(scales)} beside it, which is not read; choose others by name"
        conv = "conv" in name.rpartition(".")[2]
        stored.append(
            Stored(
                name,
                shape,
                read,
                usual=not (name in aside or is_embedding(name) or conv) and (len(shape) < 4 or bool(problem)),
                problem=problem,
                experts=len(shape) == 3 and "conv" not in name,
            )
        )
    return stored


def _in_adapter(path: Path, about: Mapping[str, Any], placed: Mapping[str, _Tensor]) -> list[Stored]:
    """llama.cpp scales B @ A by alpha / rank, and not at all where alpha is 0."""
    if about.get("adapter.type") != "lora" or "adapter.lora.alpha" not in about:
        raise InputError(
            f"{path} holds an adapter of type {about.get('adapter.type')!r}, expected 'lora' with "
            "adapter.lora.alpha"
        )
    alpha, stored = about["adapter.lora.alpha"], []
    for pair in pairs_among({key: (tensor.shape, _dtype(tensor)) for key, tensor in placed.items()})[0]:
        problem = placed[pair.a].problem or placed[pair.b].problem
        if pair.layer == "token_embd":
            problem = (
                "is an embedding, whose factors llama.cpp stores the other way round; choose others by name"
            )
        scaling = alpha / pair.rank if alpha and pair.rank else 1.0
        read = partial(_whole, placed)
        stored.append(stored_pair(pair, pair.layer, scaling, read, problem=problem))
    return stored


def _dtype(tensor: _Tensor) -> str:
    """As it is read: floats of all widths and what gguf dequantizes are F32."""
    return tensor.kind if tensor.kind in INTEGERS else "F32"


def _times(read: Read, factor: Read, expert: int | None = None) -> Tensor:
    return read(expert) * factor(None).flatten()


def _whole(placed: Mapping[str, _Tensor], key: str) -> Tensor:
    return placed[key].read(None)


def _require_version(path: Path) -> None:
    with path.open("rb") as stream:
        first = stream.read(8)
    if len(first) < 8 or first[:4] != b"GGUF":
        raise InputError(
            f"{path} is truncated or malformed (its first bytes are not GGUF's); download it again"
        )
    little, big = (int.from_bytes(first[4:], order) for order in ("little", "big"))
    if little in (2, 3):
        return
    if big in (2, 3):
        raise InputError(
            f"{path} is a big-endian GGUF file; convert it with the gguf package's gguf-convert-endian"
        )
    raise InputError(
        f"{path} is truncated or malformed, or of GGUF version {little}, and only versions 2 and 3 are read; "
        "convert the model again with a llama.cpp of today"
    )


def _header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Shape, int, int]], int]:
    """What the file says about itself, shape, type and offset of every tensor by name, and where they start.

    gguf's own reader keeps an array for each token of the vocabulary and does
    not end on some damaged files, so only the dequantization is left to it.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:

        def number(code: str) -> Any:
            return struct.unpack(f"<{code}", stream.read(struct.calcsize(code)))[0]

        def text() -> str:
            length = number("Q")
            if length > LONGEST:
                raise ValueError(f"a name of {length} bytes")
            return stream.read(length).decode()

        def skip(kind: int, count: int) -> None:
            if kind in (STRING, ARRAY):
                for _ in range(count):
                    skip(0, number("Q")) if kind == STRING else skip(number("I"), number("Q"))
            elif stream.tell() + count * WIDTHS[kind] > size:
                raise ValueError("its header reaches past its end")
            else:
                stream.seek(count * WIDTHS[kind], 1)

        stream.seek(8)
        count, fields, about = number("Q"), number("Q"), {}
        for _ in range(fields):
            key, kind = text(), number("I")
            if kind == UINT32:
                about[key] = number("I")
            elif kind == FLOAT32:
                about[key] = number("f")
            elif kind == ARRAY and key.startswith(RESHAPED):
                if (kind := number("I")) not in INTS:
                    raise ValueError(f"{key} holds no whole numbers")
                about[key] = tuple(number(INTS[kind]) for _ in range(min(number("Q"), LONGEST)))
            elif kind == STRING and key in ("general.type", "adapter.type"):
                about[key] = text()
            else:
                skip(kind, 1)
        tensors = {}
        for _ in range(count):
            name, dimensions = text(), [number("Q") for _ in range(number("I"))]
            tensors[name] = (tuple(reversed(dimensions)), number("I"), number("Q"))
        alignment = about.get("general.alignment", 32)
        start = -(-stream.tell() // alignment) * alignment
    return about, tensors, start


def _found(path: Path, key: str, shape: Shape, number: int, offset: int) -> _Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        problem = (
            f"is of GGML type {number}, which the installed gguf {version('gguf')} does not know: it is "
            "newer, or withdrawn; try pip install --upgrade gguf, or choose others by name"
        )
        return _Tensor(shape, str(number), problem, partial(_of_gguf, path, offset, shape, 0, str(number)))
    row = shape[-1] // block * size if shape else size
    if shape and shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} numbers cannot be {kind.name}")
    if offset + math.prod(shape[:-1]) * row > path.stat().st_size:
        raise ValueError(f"{key} reaches past its end")
    problem = ""
    if not (kind.name in FLOATS or kind.name in INTEGERS or _can_dequantize(number, size)):
        problem = f"is {kind.name}, which gguf {version('gguf')} cannot dequantize; try a newer gguf"
    return _Tensor(shape, kind.name, problem, partial(_of_gguf, path, offset, shape, row, kind.name))


def _as_it_was(tensor: _Tensor, original: Shape | None) -> _Tensor:
    if original is None or original == tensor.shape:
        return tensor
    if math.prod(original) != math.prod(tensor.shape) or min(original, default=0) < 0:
        raise ValueError(f"a tensor of shape {tensor.shape} cannot have been {original}")
    return replace(tensor, shape=original, read=partial(_reshaped, tensor.read, original))


def _reshaped(read: Read, shape: Shape, expert: int | None = None) -> Tensor:
    whole = read(None).reshape(shape)
    return whole if expert is None else whole[expert]


@lru_cache
def _can_dequantize(number: int, size: int) -> bool:
    from gguf import GGMLQuantizationType, quants

    try:
        quants.dequantize(np.zeros((1, size), np.uint8), GGMLQuantizationType(number))
    except NotImplementedError:
        return False
    return True


def _of_gguf(path: Path, offset: int, shape: Shape, row: int, kind: str, expert: int | None = None) -> Tensor:
    from gguf import GGMLQuantizationType, quants

    if expert is not None:
        shape = shape[1:]
        offset += expert * math.prod(shape[:-1]) * row
    rows = math.prod(shape[:-1])
    data = np.fromfile(path, np.uint8, rows * row, offset=offset)
    if len(data) < rows * row:
        raise InputError(f"{path} ends early; download it again")
    if kind in FLOATS:
        return torch.from_numpy(data.view(FLOATS[kind]).reshape(shape))
    values = np.empty((rows, shape[-1]), np.float32)
    for first in range(0, rows, ROWS_AT_ONCE):  # it takes several times the memory of what it returns
        part = slice(first, first + ROWS_AT_ONCE)
        values[part] = quants.dequantize(data.reshape(rows, row)[part], GGMLQuantizationType[kind])
    return torch.from_numpy(values.reshape(shape))
