"""What later tasks leave of a window: its subspaces, and what the weight does between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lens.spectrum.svd import thin_svd
from lora_lens.spectrum.window import Placement


@dataclass(frozen=True, eq=False)
class WindowComponents:
    """The components of a window: left (out, rank), values (rank,) and right (rank, in), float64."""

    left: Tensor
    values: Tensor
    right: Tensor


def components_of(weight: Tensor, placement: Placement, name: str = "this weight") -> WindowComponents:
    """The window's components in a weight (out, in).

    Raises:
        ValueError: it does not fit.
    """
    left, values, right = thin_svd(weight)
    part = placement.components(values.cpu(), name)
    return WindowComponents(left[:, part].double(), values[part].double(), right[part].double())


def survival(before: WindowComponents, weight: Tensor, placement: Placement) -> dict[str, float]:
    """How much of a window is left in a later weight (out, in).

    - overlap_left, overlap_right: the mean squared cosine of the principal angles between the window's
      subspace then and that of the window at the same place now, in [0, 1]; 1 where it did not turn (Hu et
      al. 2022, arXiv 2106.09685, equation 4).
    - block_change: ||U^T W V - diag(S)||_F / ||S|| with the window's components (U, S, V) then and W now: 0
      where the weight does on these directions what it did, wherever its own components went.
    """
    now = components_of(weight, placement)
    block = before.left.T @ weight.double() @ before.right.T
    change = torch.linalg.norm(block - before.values.diag()) / torch.linalg.norm(before.values)
    return {
        "overlap_left": float((before.left.T @ now.left).square().sum() / len(before.values)),
        "overlap_right": float((before.right @ now.right.T).square().sum() / len(before.values)),
        "block_change": float(change),
    }
