"""Which examples stand for all of them: drawn by a seed, every class in proportion."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def held_out(count: int, share: float, random: np.random.Generator) -> list[int]:
    """Which of the ``count`` examples of a class are for testing; at least one is, and one is not."""
    testing = min(max(round(share * count), 1), count - 1)
    return random.permutation(count)[:testing].tolist()


def sampled_rows(labels: Tensor, count: int, seed: int) -> Tensor:
    """The numbers of ``count`` examples in ascending order, drawn without replacement.

    Classes keep their shares, and each has at least one example where ``count`` reaches the number of
    classes. The draw is the same on every machine, and a smaller one is part of a larger one.

    Args:
        labels: (n,), whole numbers; ``count`` is at most n.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    _, of_class, sizes = np.unique(labels.cpu().numpy()[shuffled], return_inverse=True, return_counts=True)
    by_class = np.argsort(of_class, kind="stable")
    place = np.empty(len(labels), dtype=np.int64)  # among the examples of the same class, from 0
    place[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # The first of every class, largest class first; then each class at even steps through its examples.
    order = np.lexsort(((place + 0.5) / sizes[of_class], place > 0))
    return torch.from_numpy(np.sort(shuffled[order[:count]]))
