"""Something that a model of transformers can be called with, found by trying what its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.small_configs import IMAGE, VOCABULARY


def inputs_for(model: nn.Module) -> dict[str, Tensor]:
    """Keyword arguments under which the model's forward returns tensors.

    Raises:
        RuntimeError: none was found; with what the first try raised.
    """
    first: Exception | None = None
    for given in _candidates(model):
        try:
            with torch.no_grad():
                model(**given)
            return given
        except Exception as error:  # what a stranger's forward raises at wrong input can be anything
            first = first or error
    text = " ".join(f"{type(first).__name__}: {first}".split())
    raise RuntimeError(f"no input found; {text[:160]}")


def _candidates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    taken = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(5, min(VOCABULARY - 30, 90), shape, generator=generator)

    sides = dict.fromkeys([*_numbers(model.config, "image_size"), IMAGE, 64, 224])
    channels = next(iter(_numbers(model.config, "num_channels")), 3)
    mels = [*_numbers(model.config, "num_mel_bins"), *_numbers(model.config, "feature_size"), 80]
    images = [normal(2, channels, side, side) for side in sides]
    every: dict[str, list[Tensor]] = {
        "input_ids": [tokens(2, 9), tokens(2, 16)],
        "pixel_values": [
            *images,
            *(i[:, None] for i in images),
            *(i[:, None].repeat(1, 4, 1, 1, 1) for i in images),
        ],
        "pixel_values_videos": [i[:, None].repeat(1, 4, 1, 1, 1) for i in images],
        "pixel_values_images": images,
        "input_features": [normal(2, m, t) for m in dict.fromkeys(mels) for t in (64, 200, 3000)]
        + [normal(2, t, m) for m in dict.fromkeys(mels) for t in (64, 200)],
        "input_values": [
            normal(2, 4000),
            normal(2, 1, 4000),
            *(normal(2, 64, m) for m in dict.fromkeys(mels)),
        ],
        "inputs_embeds": [normal(2, 9, w) for w in dict.fromkeys(_numbers(model.config, "hidden_size"))],
        "inputs": [tokens(2, 16), *images],
        "past_values": [normal(2, 64), normal(2, 64, 1)],
    }
    beside = {"decoder_input_ids": tokens(2, 7)} if "decoder_input_ids" in taken else {}
    main = model.main_input_name if model.main_input_name in every else "input_ids"
    order = [main, *(name for name in every if name != main)]
    for extra in [beside, {}] if beside else [{}]:
        for name in (n for n in order if n in taken):
            yield from ({name: value} | extra for value in every[name])
        if "pixel_values" in taken and "input_ids" in taken:
            yield from ({"input_ids": tokens(2, 9), "pixel_values": image} | extra for image in images)


def _numbers(config: Any, name: str) -> list[int]:
    """The values of a setting in a configuration and in those inside it."""
    found: list[int] = []
    for key, value in vars(config).items():
        if key == name:
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            found += [value] if isinstance(value, int) else []
        elif hasattr(value, "model_type"):
            found += _numbers(value, name)
    return found


def image_for(cfg: Mapping[str, Any]) -> Tensor:
    """A batch of two images of the smallest size that a timm model takes."""
    size = cfg.get("min_input_size") or cfg["input_size"]
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
