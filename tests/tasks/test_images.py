from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from lora_lens.tasks.images import as_rgb

RAMP = np.array([[round(i * 65535 / 7) for i in range(8)]], dtype=np.uint16)
EIGHT = [round(i * 255 / 7) for i in range(8)]


def written(image: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    """The image as it is opened from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def pixels(image: Image.Image) -> list[list[int]]:
    """Red, green and blue of the first row."""
    found = as_rgb(image)
    assert found.mode == "RGB"
    return np.asarray(found)[0].tolist()


def grey(*values: int) -> list[list[int]]:
    return [[value] * 3 for value in values]


def palette(**options: object) -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    return written(image, **options)


@pytest.mark.parametrize(
    "image",
    [
        written(Image.fromarray(RAMP)),
        written(Image.fromarray(RAMP), "TIFF"),
        written(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
        written(Image.fromarray(65535 - RAMP), "TIFF", tiffinfo={262: 0}),  # white is zero
        Image.open(io.BytesIO(b"P5 8 1 65535\n" + RAMP.astype(">u2").tobytes())),
        Image.open(io.BytesIO(b"P5 8 1 7\n" + bytes(range(8)))),
    ],
    ids=["png", "tiff", "big endian", "white is zero", "pgm", "3 bits"],
)
def test_a_deep_grey_ramp_keeps_its_levels(image):
    assert pixels(image) == grey(*EIGHT)


def test_twelve_bits_are_twelve_bits():
    """Two pixels of 12 bits in three bytes, 0x000 and 0xfff, as Pillow reads but does not write them."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 1, 279: 3}
    entries = b"".join(
        tag.to_bytes(2, "little")
        + (3).to_bytes(2, "little")
        + (1).to_bytes(4, "little")
        + value.to_bytes(4, "little")
        for tag, value in tags.items()
    )
    head = b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little") + entries + bytes(4)
    assert len(head) == 122
    assert pixels(Image.open(io.BytesIO(head + b"\x00\x0f\xff"))) == grey(0, 255)


def test_what_is_transparent_lies_on_white():
    rgba = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]], dtype=np.uint8))
    white, red, light = [255, 255, 255], [255, 0, 0], [204, 204, 204]
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert pixels(written(rgba, kind, **options)) == [white, red, light]
    two = Image.fromarray(np.array([[[0, 0], [90, 255]]], dtype=np.uint8), "LA")
    assert pixels(written(two)) == [white, *grey(90)]
    assert pixels(palette()) == [red, [0, 255, 0]]
    assert pixels(palette(transparency=0)) == [white, [0, 255, 0]]
    ramp = Image.fromarray(np.array([[7, 9]], dtype=np.uint8))
    assert pixels(written(ramp, transparency=7)) == grey(255, 9)
    assert pixels(written(Image.fromarray(RAMP), transparency=0)) == grey(255, *EIGHT[1:])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_an_image_stands_upright(kind, orientation):
    seen = Image.fromarray(np.kron([[0, 60, 120], [180, 210, 250]], np.ones((16, 16))).astype(np.uint8))
    stored = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # what undoes each
    exif = Image.Exif()
    exif[0x0112] = stored.get(orientation, 1)
    kept = ImageOps.exif_transpose(_tagged(seen, exif))
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    found = as_rgb(written(kept, kind, exif=exif, **options)).convert("L")
    assert found.size == seen.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(seen)).max() <= 12


def _tagged(image: Image.Image, exif: Image.Exif) -> Image.Image:
    image = image.copy()
    image.info["exif"] = exif.tobytes()
    return image


def test_other_colour_models_and_single_bits():
    assert pixels(written(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[0] == [255, 0, 0]
    assert pixels(written(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")) == [[255, 0, 0]]
    assert pixels(Image.new("YCbCr", (1, 1), (76, 85, 255))) == [[254, 0, 0]]
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert pixels(written(bits)) == grey(0, 255)
    assert pixels(written(Image.new("RGB", (1, 1), (1, 2, 3)))) == [[1, 2, 3]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_counts(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    image = written(frames[0], kind, save_all=True, append_images=frames[1:])
    assert image.n_frames == 2
    assert np.abs(np.array(pixels(image)[0]) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("values", [np.float32([[0, 0.5, 1]]), np.int32([[0, 70000]])], ids=str)
def test_pixels_without_a_known_white_are_refused(values):
    with pytest.raises(ValueError, match="has no fixed white; save it with 8 or 16 bits"):
        as_rgb(written(Image.fromarray(values), "TIFF"))
