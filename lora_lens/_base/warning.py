"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings

# Context managers and decorators lie between our functions.
INSIDE = ("lora_lens.", "contextlib", "torch.")


def warn(text: str) -> None:
    """A UserWarning about the line outside lora_lens that led here, however many calls lie between."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level + 1)
