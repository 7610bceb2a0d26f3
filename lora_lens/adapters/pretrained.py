"""The pretrained weights of adapted layers, in a model or file, and whether they are the right ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.hashing import digest_of
from lora_lens.spectrum.sources.matrices import Weight, weights


def matrices_of(
    source: nn.Module | str | Path, names: Sequence[str], prefix: str = ""
) -> dict[str, Callable[[], Tensor]]:
    """What reads each named weight of a model or file as a matrix.

    Args:
        prefix: the model's ``base_model_prefix``: transformers' from_pretrained also takes the file of a
            model without its head, whose names lack it, or with a head, where they have it.

    Raises:
        ValueError: a name is missing there, or it is an adapter.
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
            found = {w.name: w for w in weights(source, list(there))}
            chosen = {name: found[other] for name, other in zip(names, there, strict=True)}
        except (InputError, KeyError) as error:
            errors.append(error)
            continue
        require_weights(chosen.values(), source)
        return {name: weight.load for name, weight in chosen.items()}
    where = source if isinstance(source, (str, Path)) else type(source).__name__
    raise InputError(f"{where} is not the model that was adapted: {errors[0]}") from errors[0]


def require_weights(found: Iterable[Weight], source: object) -> None:
    """Raise a ValueError if they are an adapter's updates, which are no weights of a model."""
    if any(weight.update for weight in found):
        raise InputError(
            f"{source} is an adapter, so what it holds are updates of weights: give the model that they were "
            "merged into (PEFT's merge_and_unload)"
        )


def require_same(name: str, matrix: Tensor, digest: str, kind: str = "") -> None:
    """Raise a ValueError that names the weight if it is not the one that was adapted.

    Args:
        kind: how it is quantized, see :func:`lora_lens.spectrum.quantized_layers.quantized_as`.
    """
    if digest_of(matrix) != digest:
        rounded = (
            "; evaluating it may have rounded the scales of this 4-bit model, so read it from disk again and "
            "load the adapter first"
        )
        raise InputError(
            f"{name}.weight is not the one that this adapter was made for (their hashes differ; here "
            f"{str(matrix.dtype).removeprefix('torch.')}, {tuple(matrix.shape)}): use the same pretrained "
            f"model, in the same dtype{rounded if kind == 'Params4bit' else ''}"
        )
