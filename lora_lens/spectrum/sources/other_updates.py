"""Updates of other methods than LoRA that need no base weight: LoHa and LoKr.

LoHa (Yeh et al. 2024, "Navigating text-to-image customization", LyCORIS) is scaling (A1 B1) * (A2 B2), entry
by entry; LoKr there is scaling kron(W1, W2), where each may be a product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens.spectrum.sources.roles import Stored

LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}

Shapes = Mapping[str, tuple[tuple[int, ...], str]]
Read = Callable[[str], Tensor]


def is_product(kinds: Collection[str]) -> bool:
    """Whether a layer's parts are all that LoHa or LoKr consists of, in the form without a tensor core."""
    found = set(kinds)
    factors = (("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b"))
    each = all(
        (whole in found) != ({a, b} <= found) and (a in found) == (b in found) for whole, a, b in factors
    )
    return found == LOHA or (found <= LOKR and each)


@dataclass(frozen=True)
class Product:
    """A layer's name in its file, and the inner dimension of its products, by which alpha is divided.

    It is 0 of a LoKr without products, which LyCORIS does not scale.
    """

    layer: str
    rank: int


def product_of(layer: str, kinds: Collection[str], tensors: Shapes) -> Product:
    parts = [kind for kind in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b") if kind in kinds]
    return Product(layer, tensors[f"{layer}.{parts[0]}"][0][0] if parts else 0)


def stored_product(
    layer: str, name: str, kinds: Collection[str], tensors: Shapes, read: Read, scaling: float
) -> Stored:
    """The update of one layer by LoHa or LoKr.

    Raises:
        ValueError: the shapes of its parts do not fit.
    """
    shapes = {kind: tensors[f"{layer}.{kind}"][0] for kind in kinds}
    try:
        small = {kind: torch.empty(shape, device="meta") for kind, shape in shapes.items()}
        shape = tuple(_product(small, 1.0).shape)
    except (RuntimeError, IndexError) as error:
        raise InputError(
            f"the factors of {name} do not fit together: {shapes}; save the adapter again"
        ) from error
    return Stored(name, shape, partial(_read_product, layer, tuple(kinds), read, scaling), update=True)


def _read_product(
    layer: str, kinds: Collection[str], read: Read, scaling: float, expert: int | None
) -> Tensor:
    return _product({kind: read(f"{layer}.{kind}").float() for kind in kinds}, scaling)


def _product(parts: Mapping[str, Tensor], scaling: float) -> Tensor:
    if "hada_w1_a" in parts:
        first, second = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
        return first * second * scaling
    first, second = (
        parts[f"lokr_w{i}"] if f"lokr_w{i}" in parts else parts[f"lokr_w{i}_a"] @ parts[f"lokr_w{i}_b"]
        for i in (1, 2)
    )
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return torch.kron(first, second.contiguous()) * scaling
