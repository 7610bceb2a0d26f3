"""The model and the data that ship with the project (see ``data/README.md``)."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from timm.layers import HybridEmbed, LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from lora_lens.tasks import Examples, Task

PACKAGE = Path(__file__).parent
FASHION_MEAN, FASHION_STD = 0.2860, 0.3530  # of the 60,000 training images, pixels in [0, 1]
FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def vision_architecture(num_classes: int = 10) -> VisionTransformer:
    """The embedded model's architecture, with random weights.

    A timm ``VisionTransformer`` for 28 x 28 grey images: a stem of three
    overlapping 3 x 3 convolutions of stride 2 (Xiao et al. 2021, "Early
    convolutions help transformers see better") gives 16 tokens of width 96 to
    six blocks; the classifier reads their average.
    """
    width = 96
    stem = ConvStem(in_chans=1, depth=3, channels=width, norm_layer=LayerNorm2d, act_layer=nn.GELU)
    return VisionTransformer(
        img_size=28,
        in_chans=1,
        num_classes=num_classes,
        embed_dim=width,
        depth=6,
        num_heads=3,
        global_pool="avg",
        class_token=False,
        embed_layer=partial(HybridEmbed, stem, proj=False),
        patch_size=1,
    )


def vision() -> tuple[VisionTransformer, Task]:
    """The pretrained vision transformer, and Fashion-MNIST, the task it knows.

    10,000 training images (a balanced part of the 60,000 it was pretrained
    on) and the 10,000 test images, which it has not seen; inputs are
    normalised, (n, 1, 28, 28).

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.
    """
    model = vision_architecture()
    model.load_state_dict(load_file(_verified("vit_fashion_mnist.safetensors")))
    return model.eval(), _images("fashion_mnist", FASHION_CLASSES)


def digits() -> Task:
    """MNIST digits, to be learnt: 7,500 training and 2,500 test images, prepared as for :func:`vision`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.
    """
    return _images("digits", tuple("0123456789"))


def _images(name: str, classes: tuple[str, ...]) -> Task:
    with np.load(_verified(f"{name}.npz"), allow_pickle=False) as arrays:
        parts = {}
        for part in ("train", "test"):
            pixels = torch.from_numpy(arrays[f"{part}_images"]).float() / 255
            labels = torch.from_numpy(arrays[f"{part}_labels"]).long()
            parts[part] = Examples(((pixels - FASHION_MEAN) / FASHION_STD)[:, None], labels)
    return Task(name, classes, **parts)


def _verified(name: str) -> Path:
    """The path of a data file, after comparing it with its checksum."""
    folder = next(
        (f for f in (PACKAGE / "data", PACKAGE.parent / "data") if (f / "SHA256SUMS").exists()), None
    )
    if folder is None or not (folder / name).exists():
        raise FileNotFoundError(
            f"the embedded file {name} is missing; install lora_lens again or restore its data folder"
        )
    sums = dict(reversed(line.split()) for line in (folder / "SHA256SUMS").read_text().splitlines())
    if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sums.get(name):
        raise ValueError(
            f"{folder / name} is damaged: its SHA-256 is not the one in SHA256SUMS; "
            "restore it from the repository"
        )
    return folder / name
