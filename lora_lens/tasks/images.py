"""Image files as people see them: upright, 8 bits of red, green and blue, on white where transparent."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from lora_lens._base.errors import InputError

SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # whose pixels of mode I have 16 bits
TIFF_BITS, TIFF_MEANING, WHITE_IS_ZERO = 258, 262, 0


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened image in mode RGB; of several frames the one that it is at, which is the first.

    It is turned and mirrored as its EXIF data say. Of 16-bit (and 12-bit) grey the darkest value becomes 0
    and the lightest 255, where Pillow would cut off at 255. What is transparent lies on white, where Pillow
    would uncover the colours below, mostly black. Colour profiles and gamma are not applied, as in
    torchvision's and timm's own loaders, so a model sees the colours that it was trained on.

    Raises:
        ValueError: see :func:`has_white`.
        OSError, SyntaxError and others of Pillow: the file is damaged.
    """
    mode, tags = image.mode, getattr(image, "tag_v2", {})
    if not has_white(image):
        raise InputError(f"an image of mode {mode} has no fixed white; save it with 8 or 16 bits")
    bits = tags.get(TIFF_BITS, (16,))[0]
    inverted = tags.get(TIFF_MEANING) == WHITE_IS_ZERO
    image = ImageOps.exif_transpose(image)
    clear = image.info.get("transparency")
    if mode.startswith("I"):
        image = _grey(image, 2**bits - 1, inverted, clear)
    elif clear is not None or mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def has_white(image: Image.Image) -> bool:
    """Whether it is known which value is white: not of 32-bit whole numbers or fractions."""
    return image.mode != "F" and (image.mode != "I" or image.format in SIXTEEN_BIT_FORMATS)


def _grey(image: Image.Image, white: int, inverted: bool, clear: int | None) -> Image.Image:
    """An image of up to 16 bits in 8; ``clear`` is the value that is transparent."""
    values = np.asarray(image).astype(np.int64)
    shown = white - values if inverted else values
    if clear is not None:
        shown[values == clear] = white
    return Image.fromarray(np.rint(shown * (255 / white)).astype(np.uint8))
