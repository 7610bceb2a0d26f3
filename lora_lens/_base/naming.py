"""Names of layers, and how they are listed to people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Targets = str | Sequence[str] | None

GROUPS = ("all-linear", "all-conv", "all-attention", "all-mlp", "all-experts")


def block_and_kind(name: str) -> tuple[int, str]:
    """``"blocks.3.attn.qkv"`` -> ``(3, "attn.qkv")``; without a number the block is -1."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[i + 1 :]) or name
    return -1, name


def listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(number: int, what: str) -> str:
    """As in "1 seed" and "2 seeds"."""
    return f"{number} {what}" + ("" if number == 1 else "s")
