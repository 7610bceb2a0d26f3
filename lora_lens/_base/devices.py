"""The device that a user names, checked before work begins."""

from __future__ import annotations

import torch

from lora_lens._base.errors import InputError


def checked_device(device: object) -> torch.device | None:
    """The device, which can be used here; None stays None.

    Raises:
        ValueError: there is none of that name, or torch cannot use it here.
    """
    if device is None:
        return None
    try:
        place: torch.device = torch.device(device)  # type: ignore[call-overload]  # it raises for anything else
        torch.empty(1, device=place)
    # What torch raises for no device, for one that it was not built for, and for one that is not there.
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(
            f"device must be one that torch has here, such as 'cpu', not {device!r} ({why})"
        ) from error
    if place.type == "meta":
        raise InputError("device must be one that computes, such as 'cpu' or 'cuda', not 'meta'")
    return place
