"""Which layers of a model: the linear ones a pattern selects, and the classifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

Targets = str | Sequence[str] | None


def target_layers(model: nn.Module, targets: Targets = None) -> dict[str, nn.Linear]:
    """The linear layers that ``targets`` selects, by module name.

    Args:
        targets: None for every ``nn.Linear`` but the classifier; or one or
            several patterns. A pattern is the end of a module name, in whole
            dotted parts, and may hold wildcards: ``"qkv"``, ``"attn.proj"``,
            ``"blocks.[0-2].mlp.*"``.

    Raises:
        ValueError: a pattern matches nothing, or something that is no ``nn.Linear``.
    """
    modules = {name: m for name, m in model.named_modules() if name}
    linear = {name: m for name, m in modules.items() if type(m) is nn.Linear}
    if targets is None:
        output = classifier(model, required=False)
        chosen = {name: m for name, m in linear.items() if m is not output}
        if not chosen:
            raise ValueError(f"{type(model).__name__} has no nn.Linear layer besides its classifier")
        return chosen

    patterns = [targets] if isinstance(targets, str) else list(targets)
    matched: set[str] = set()
    for pattern in patterns:
        found = matching(modules, pattern)
        if not any(name in linear for name in found):
            kinds = sorted({block_and_kind(name)[1] for name in linear})
            what = f"only {_described(modules, found)}" if found else "no module"
            raise ValueError(
                f"target {pattern!r} matches {what}; it must match nn.Linear layers, "
                f"and these could match: {listed(kinds)}"
            )
        wrong = sorted(n for n in found - set(linear) if "weight" in modules[n]._parameters)
        if wrong:
            raise ValueError(
                f"target {pattern!r} also matches {_described(modules, wrong)}, and a window fits nn.Linear "
                f"layers only; write a longer pattern, such as {_longer(found & set(linear))!r}"
            )
        matched |= found & set(linear)
    return {name: m for name, m in linear.items() if name in matched}


def classifier(model: nn.Module, required: bool = True) -> nn.Linear | None:
    """The linear layer that turns a model's features into its logits.

    Asks timm's ``get_classifier`` or transformers' ``get_output_embeddings``,
    else takes the usual attribute names (``head``, ``classifier``, ``score``, ``fc``).

    Raises:
        ValueError: ``required`` and the model has none.
    """
    ask = getattr(model, "get_classifier", getattr(model, "get_output_embeddings", lambda: None))
    found = ask()
    for name in ("head", "classifier", "score", "fc"):
        if isinstance(found, nn.Linear):
            return found
        found = getattr(model, name, None)
    if isinstance(found, nn.Linear):
        return found
    if required:
        raise ValueError(
            f"{type(model).__name__} has no linear classifier: expected get_classifier() as in timm, "
            "or an nn.Linear named head, classifier, score or fc"
        )
    return None


def matching(names: Iterable[str], pattern: str) -> set[str]:
    """The names that end in ``pattern``, in whole dotted parts; it may hold wildcards."""
    return {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")}


def block_and_kind(name: str) -> tuple[int, str]:
    """``"blocks.3.attn.qkv"`` -> ``(3, "attn.qkv")``; without a number the block is -1."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[i + 1 :]) or name
    return -1, name


def check_finite(name: str, weight: Tensor) -> None:
    # The sum is faster than asking each, and copies nothing; it may be infinite by itself.
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise ValueError(
            f"{name}.weight holds NaN or infinite values, so it has no spectrum; "
            "load the model again or mend the checkpoint"
        )


def listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _described(modules: Mapping[str, nn.Module], names: Iterable[str]) -> str:
    return listed([f"{n} ({type(modules[n]).__name__})" for n in sorted(names)], most=4)


def _longer(names: set[str]) -> str:
    return block_and_kind(min(names))[1]
