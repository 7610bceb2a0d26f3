"""Pictures as HTML images, each with a text for screen readers."""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Callable
from html import escape
from io import BytesIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lora_lens.plots._style import house_style

WIDE = 660  # pixels: on a phone, wider pictures are moved sideways rather than made too small to read


def drawn(draw: Callable[[Figure], object], alt: str, size: tuple[float, float] = (8, 4.2)) -> str:
    """A picture of constant size as an HTML image with a text for screen readers.

    Not ipywidgets' Image: that has no alternative text, and its view fails in some versions of
    JupyterLab. Drawn without pyplot, so that no figure stays open.
    """
    with house_style():
        figure = Figure(figsize=size)
        draw(figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return as_html(canvas, alt)


def as_html(canvas: FigureCanvasAgg, alt: str) -> str:
    """What is drawn on the canvas."""
    source = b64encode(as_png(canvas)).decode()
    images = any(ax.images for ax in canvas.figure.axes)  # whose colours stay the same in the dark
    width, height = canvas.get_width_height()
    kind = ("ll-images" if images else "ll-chart") + " ll-wide" * (width > WIDE)
    data = f"data:image/png;base64,{source}"
    sizes = f'width="{width}" height="{height}"'  # else Firefox gives it no height until it is decoded
    look = f'style="max-width: 100%; height: auto" class="{kind}"'
    return f'<img alt="{escape(alt)}" src="{data}" {sizes} {look}>'


def as_png(canvas: FigureCanvasAgg, mode: str = "RGB") -> bytes:
    """Likewise; "RGBA" keeps what is transparent."""
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert(mode)
    png = BytesIO()
    # Speed counts: a picture lives until the next move.
    pixels.save(png, "png", compress_level=1, compress_type=zlib.Z_RLE)
    return png.getvalue()
