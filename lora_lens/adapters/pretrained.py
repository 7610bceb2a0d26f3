"""The pretrained weights of adapted layers, in a model or file, and whether they are the right ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.hashing import digest_of
from lora_lens.spectrum.sources.matrices import weights


def matrices_of(
    source: nn.Module | str | Path, names: Sequence[str], prefix: str = ""
) -> dict[str, Callable[[], Tensor]]:
    """What reads each named weight of a model or file as a matrix.

    Args:
        prefix: the model's ``base_model_prefix``: transformers' from_pretrained also takes the file of a
            model without its head, whose names lack it, or with a head, where they have it.

    Raises:
        ValueError: a name is missing there.
    """
    if not names:
        return {}
    within = f"{prefix}." if prefix else ""
    ways = dict.fromkeys(
        tuple(there)
        for there in (names, [n.removeprefix(within) for n in names], [f"{within}{n}" for n in names])
    )
    errors = []
    for there in ways:
        try:
            found = {w.name: w.load for w in weights(source, list(there))}
            return {name: found[other] for name, other in zip(names, there, strict=True)}
        except (InputError, KeyError) as error:
            errors.append(error)
    where = source if isinstance(source, (str, Path)) else type(source).__name__
    raise InputError(f"{where} is not the model that was adapted: {errors[0]}") from errors[0]


def require_same(name: str, matrix: Tensor, digest: str) -> None:
    """Raise a ValueError that names the weight if it is not the one that was adapted."""
    if digest_of(matrix) != digest:
        raise InputError(
            f"{name}.weight is not the one that this adapter was made for (their hashes differ; here "
            f"{str(matrix.dtype).removeprefix('torch.')}, {tuple(matrix.shape)}): use the same pretrained "
            "model, in the same dtype"
        )
