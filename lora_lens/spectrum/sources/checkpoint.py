"""Checkpoint files: safetensors, one tensor at a time, and JSON. Nothing pickled is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lens._base.errors import InputError, MissingFileError

# safetensors' names of dtypes.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
if exponents := getattr(torch, "float8_e8m0fnu", None):  # from torch 2.7 on
    DTYPES["F8_E8M0"] = exponents


def headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor in a safetensors file."""
    with _opened(path) as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
        return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in parts.items()}


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself in words."""
    with _opened(path) as file:
        return file.metadata() or {}


def read_tensor(path: Path, key: str, expert: int | None = None) -> Tensor:
    """A tensor, or one of its experts."""
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(key) if expert is None else file.get_slice(key)[expert]
        return tensor


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise MissingFileError(f"no file {path}; pickled files are not opened, save as safetensors instead")
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    return json_object(path.read_bytes(), str(path))


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The object that a text in JSON is; ``where`` it stands, for the message.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no valid JSON ({error}); download or save it again") from error
    if not isinstance(facts, dict):
        raise InputError(f"{where} holds no JSON object; download or save it again")
    return facts


class Folder(Protocol):
    """Where the files of one model lie: on this disk, or on a hub.

    Attributes:
        names: of the files in it.
    """

    @property
    def names(self) -> set[str]: ...

    def place(self, name: str) -> str:
        """Where a file is, for messages."""
        ...

    def local(self, name: str) -> Path:
        """The path of a file on this disk; one of a hub is downloaded."""
        ...

    def json(self, name: str) -> dict[str, Any]:
        """The object that a JSON file holds."""
        ...

    def headers(self, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """As :func:`headers`."""
        ...

    def metadata(self, name: str) -> dict[str, str]:
        """As :func:`metadata`."""
        ...

    def read(self, name: str, key: str, expert: int | None = None) -> Tensor:
        """As :func:`read_tensor`."""
        ...


class LocalFolder:
    """A folder on this disk."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def names(self) -> set[str]:
        return {path.name for path in self.path.iterdir() if path.is_file()}

    def place(self, name: str) -> str:
        return str(self.path / name)

    def local(self, name: str) -> Path:
        return self.path / name

    def json(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name)

    def headers(self, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
        return headers(self.path / name)

    def metadata(self, name: str) -> dict[str, str]:
        return metadata(self.path / name)

    def read(self, name: str, key: str, expert: int | None = None) -> Tensor:
        return read_tensor(self.path / name, key, expert)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or malformed ({error}); download or save it again") from error
