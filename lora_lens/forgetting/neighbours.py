"""Whether training left each example its nearest neighbours: pure functions on features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.validate import numbers, sequence, whole_number

CHUNK = 256  # rows of similarities in memory at once


def neighbour_agreement(before: Tensor | np.ndarray, after: Tensor | np.ndarray, k: int = 10) -> float:
    """The share of the nearest neighbours that each example keeps, on average: in [0, 1].

    |S_i ∩ S'_i| / k, averaged over the examples i, where S_i and S'_i are the k examples with the most
    similar features before and after, i itself left out. Huh et al. 2024, "The Platonic representation
    hypothesis", appendix A, mutual k-nearest neighbour alignment; as there, similar means the cosine, but
    no large features are cut off. Turning or scaling the features leaves it 1; features that have nothing
    to do with each other get k / (n - 1) by chance. CKA, which
    :func:`lora_lens.forgetting.feature_change` gives, is about all pairs of examples; this is about the near
    ones alone.

    In float32, in O(n (p + q + k)) memory and O(n^2 (p + q)) time. Of equally near examples the earlier
    ones count.

    Args:
        before: (n, p) features of n examples, such as the sentence vectors of a model before training.
        after: (n, q) features of the same examples, such as those after training.
        k: neighbours, from 1 to n - 1.

    Raises:
        ValueError: they are no matrices of as many rows, a row is zero or not finite, or k is out of range.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> before = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> after = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.3]])
        >>> ll.forgetting.neighbour_agreement(before, after, k=1)
        0.75
    """
    old, new = _nearest_before_and_after(before, after, k)
    return float(_shared(old, new).double().mean() / old.shape[1])


def neighbour_table(
    before: Tensor | np.ndarray,
    after: Tensor | np.ndarray,
    texts: Sequence[str],
    k: int = 3,
    count: int = 10,
) -> pd.DataFrame:
    """The examples whose nearest neighbours changed most, for people to read.

    Args:
        before: as :func:`neighbour_agreement`.
        after: as :func:`neighbour_agreement`.
        texts: of the n examples.
        k: as :func:`neighbour_agreement`.
        count: rows, at most.

    Returns:
        One row per example, the most changed first and equally changed ones in their order: text; shared,
        how many of its k neighbours it kept; before and after, the texts of the neighbours, the nearest
        first, with " | " between them.

    Raises:
        ValueError: as :func:`neighbour_agreement`, there are not as many texts as rows, or count is below 1.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> before = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> after = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.3]])
        >>> ll.forgetting.neighbour_table(before, after, texts=["cat", "cats", "sun", "suns"], k=1, count=2)
           text  shared before after
        0  suns       0    sun  cats
        1   cat       1   cats  cats
    """
    count, texts = whole_number(count, "count", least=1), sequence(texts, "texts", "the examples' texts")
    before = _features(before, "before")
    if before.ndim == 2 and len(texts) != len(before):
        raise InputError(f"expected a text for each of the {len(before)} rows of features, not {len(texts)}")
    old, new = _nearest_before_and_after(before, after, k)
    shared = _shared(old, new)
    rows = shared.argsort(stable=True)[:count].tolist()

    def named(neighbours: Tensor) -> list[str]:
        return [" | ".join(texts[j] for j in neighbours[i].tolist()) for i in rows]

    return pd.DataFrame(
        {
            "text": [texts[i] for i in rows],
            "shared": shared[rows].tolist(),
            "before": named(old),
            "after": named(new),
        }
    )


def _nearest_before_and_after(
    before: Tensor | np.ndarray, after: Tensor | np.ndarray, k: int
) -> tuple[Tensor, Tensor]:
    x, y = _features(before, "before"), _features(after, "after")
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise InputError(
            f"features have shapes {tuple(x.shape)} and {tuple(y.shape)}: expected (n, p) and (n, q), "
            "one row for each of the same n examples"
        )
    if not 1 <= whole_number(k, "k") < len(x):
        raise InputError(
            f"k must be from 1 to {len(x) - 1}, as each of {len(x)} examples has that many others, not {k}"
        )
    x, y = _directions(x, "before"), _directions(y, "after")
    return _nearest(x, k), _nearest(y, k)


def _features(features: object, name: str) -> Tensor:
    return features.detach() if isinstance(features, Tensor) else torch.from_numpy(numbers(features, name))


def _directions(features: Tensor, when: str) -> Tensor:
    """The rows with length 1, float32."""
    features = features if features.is_floating_point() else features.float()
    largest = features.abs().amax(1, keepdim=True)
    for wrong, words in ((~largest.isfinite(), "are not finite"), (largest == 0, "are zero")):
        rows = wrong.flatten().nonzero().flatten().tolist()
        if rows:
            raise InputError(
                f"{len(rows)} of {len(features)} rows of the features {when} training {words} "
                f"(rows {listed(map(str, rows), most=5)}), so they have no neighbours; leave these "
                "examples out on both sides"
            )
    scaled = (features / largest).float()  # first, as squares of large and small numbers leave float32
    return scaled / torch.linalg.norm(scaled, dim=1, keepdim=True)


def _nearest(directions: Tensor, k: int) -> Tensor:
    """Of each row the k other ones with the largest cosine, the largest first: (n, k) indices, on the CPU.

    Not scikit-learn's NearestNeighbors, which takes any of equally near ones: of texts that a corpus
    holds several times, it would count as lost what a mere rotation left in place.
    """
    found = []
    for rows in torch.arange(len(directions), device=directions.device).split(CHUNK):
        cosines = directions[rows] @ directions.T  # (chunk, n)
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        # topk takes any of equal values, so it gives the k-th value only
        last = cosines.topk(k, dim=1).values[:, -1:]
        above, equal = cosines > last, cosines == last
        room = k - above.sum(1, keepdim=True)
        if (equal.sum(1, keepdim=True) > room).any():  # seldom, and slow
            equal &= equal.cumsum(1, dtype=torch.int32) <= room
        indices = (above | equal).nonzero()[:, 1].view(-1, k)
        order = cosines.gather(1, indices).argsort(dim=1, descending=True, stable=True)
        found.append(indices.gather(1, order).cpu())
    return torch.cat(found)


def _shared(old: Tensor, new: Tensor) -> Tensor:
    """How many indices each row of ``old`` (n, k) has in common with that of ``new``: (n,)."""
    both = torch.cat([old, new], dim=1).sort(dim=1).values
    return (both.diff(dim=1) == 0).sum(1)  # none is twice in one of the two
