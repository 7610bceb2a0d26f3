"""Tensors as bytes and into hashes: equal content, equal bytes, whatever the layout and the device."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import torch
from torch import Tensor


class Digest(Protocol):
    """What hashlib's constructors return."""

    def update(self, data: bytes | memoryview, /) -> None: ...


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order, without a copy if they lie so in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def add_tensor(digest: Digest, tensor: Tensor) -> None:
    """Hash a tensor's dtype, shape and elements; of torchao's quantized tensors those of their parts."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if type(tensor).__module__.startswith("torchao."):
        parts: Any = tensor
        for part in parts.__tensor_flatten__()[0]:
            add_tensor(digest, getattr(parts, part))
        return
    digest.update(tensor_bytes(tensor))


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and elements: 64 hex digits."""
    digest = hashlib.sha256()
    add_tensor(digest, tensor)
    return digest.hexdigest()
