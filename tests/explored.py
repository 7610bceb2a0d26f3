"""A small model to explore, and what a person sees of an explorer: for the tests of all explorers."""

from __future__ import annotations

import re
from base64 import b64decode
from html import unescape

import torch
from ipywidgets import HTML, VBox, Widget
from timm.models.vision_transformer import VisionTransformer


def narrow_vit(seed: int) -> VisionTransformer:
    """A small model whose spectra differ in length: 32 components in attention, 16 in the MLP."""
    torch.manual_seed(seed)
    shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 10}
    return VisionTransformer(**shape, embed_dim=32, depth=2, num_heads=2, mlp_ratio=0.5).eval()


def parts(widget: Widget, kind: type) -> list[Widget]:
    inside = [w for child in getattr(widget, "children", ()) for w in parts(child, kind)]
    return [widget, *inside] if isinstance(widget, kind) else inside


def control(explorer: VBox, description: str) -> Widget:
    (found,) = (w for w in parts(explorer, Widget) if getattr(w, "description", None) == description)
    return found


def pictures(explorer: VBox) -> list[bytes]:
    found = [
        re.search(r'<img alt="[^"]+" src="data:image/png;base64,([^"]+)"', h.value)
        for h in parts(explorer, HTML)
    ]
    return [b64decode(match[1]) for match in found if match]


def text(explorer: VBox) -> str:
    """All that is written, without the pictures."""
    return "\n".join(html.value for html in parts(explorer, HTML) if not html.value.startswith("<img"))


def message(explorer: VBox) -> str:
    (found,) = (html.value for html in parts(explorer, HTML) if '<p role="alert"' in html.value)
    return found


def shows_results(explorer: VBox) -> bool:
    assert ("alert" in text(explorer)) == (explorer.children[-1].layout.display == "none")
    return explorer.children[-1].layout.display != "none"


def alts(explorer: VBox) -> list[str]:
    """What the pictures show, in words."""
    found = [re.match('<img alt="([^"]+)"', html.value) for html in parts(explorer, HTML)]
    return [unescape(match[1]) for match in found if match]


def numbers(explorer: VBox) -> list[dict[str, str]]:
    """The rows of the table, by column."""
    (table,) = (html.value for html in parts(explorer, HTML) if "<table" in html.value)
    columns = [unescape(name) for name in re.findall("<th>(.*?)</th>", table)]
    cells = [unescape(cell) for cell in re.findall("<td>(.*?)</td>", table)]
    rows = range(0, len(cells), len(columns))
    return [dict(zip(columns, cells[i : i + len(columns)], strict=True)) for i in rows]


def sentence(explorer: VBox) -> str:
    (found,) = (html.value for html in parts(explorer, HTML) if html.value.startswith("<p>"))
    return unescape(found[3:-4])
