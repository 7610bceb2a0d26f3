"""Checkpoint files: safetensors, one tensor at a time, and JSON. Nothing pickled is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lens._base.errors import InputError, MissingFileError


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


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or malformed ({error}); download or save it again") from error
