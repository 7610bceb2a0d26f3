"""What the documents point to is there: files, headings, possible addresses, names of the library.

Nothing is fetched: whether a page on the web still exists is not tested.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import lora_lens

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / folder / "README.md" for folder in ("notebooks", "data", "benchmarks", "examples")),
    ROOT / "notebooks" / "TEACHING.md",
    *sorted({*(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "moved.md"}),  # which holds old names
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
FENCED = re.compile(r"^ *```.*?^ *```[ \t]*$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?:(?: {4}|\t).*\n?)+")
IN_BACKTICKS = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(\s*([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)[^()]*\)")
HTML_LINK = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)=[\"']([^\"']*)[\"']")
BARE = re.compile(r"<(https?:[^>]*)>")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
NAME = re.compile(r"(?<![\w.])ll((?:\.[A-Za-z_]\w*)+)")
ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")


@cache
def markdown(document: Path) -> str:
    """What is written: of a notebook, its markdown cells."""
    text = document.read_text()
    if document.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def without_code(text: str) -> str:
    return IN_BACKTICKS.sub("", INDENTED.sub("\n", FENCED.sub("", text)))


def links(text: str) -> list[tuple[str, str]]:
    """Words and target of each link and picture."""
    prose = without_code(text)
    return LINK.findall(prose) + [("", target) for target in HTML_LINK.findall(prose) + BARE.findall(prose)]


def anchors(document: Path) -> set[str]:
    """The headings' addresses, as GitHub makes them, and for notebooks as Jupyter does."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in HEADING.findall(FENCED.sub("", markdown(document))):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        if document.suffix == ".ipynb":
            found.add(plain.replace(" ", "-"))
            continue
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def complaint(words: str, target: str, document: Path) -> str | None:
    """What is wrong with a link in ``document``, or None."""
    address = urlsplit(target)
    if address.scheme or address.netloc:
        host = address.netloc
        if address.scheme not in ("http", "https") or not re.fullmatch(r"(?:[\w-]+\.)+[a-z]{2,}", host):
            return f"{target} is no address of a web page"
        if host == "arxiv.org" and not re.fullmatch(rf"/(?:abs|pdf)/{ARXIV.pattern[2:-2]}", address.path):
            return f"{target} is no address of a paper on arXiv"
        if host == "arxiv.org" and (said := ARXIV.search(words)) and said[0] not in address.path:
            return f"[{words}] leads to another paper, {target}"
        return None
    file = (document.parent / unquote(address.path)).resolve() if address.path else document
    if not target or not file.exists() or not file.is_relative_to(ROOT):
        return f"there is no {target!r} in the repository, seen from {document.parent.name}/"
    if address.fragment and (file.is_dir() or unquote(address.fragment) not in anchors(file)):
        return f"{target} names a heading that is not there"
    return None


def names(text: str) -> set[str]:
    """Everything called ll.something in backticks, or in fenced or indented code."""
    fenced = FENCED.findall(text)
    rest = FENCED.sub("", text)
    code = [*fenced, *INDENTED.findall(rest), *IN_BACKTICKS.findall(rest)]
    return {f"ll{name}" for part in code for name in NAME.findall(part)}


def exists(name: str) -> bool:
    value: object = lora_lens
    for part in name.split(".")[1:]:
        if part in getattr(value, "__dataclass_fields__", {}):
            return True  # a field: of a class it has no value yet, and what follows is the value's
        # A package's modules are there once something has imported them, which is no promise.
        if not hasattr(value, part) or (hasattr(value, "__path__") and part not in value.__all__):
            return False
        value = getattr(value, part)
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d.parent.name}/{d.name}")
def test_every_link_leads_somewhere(document):
    wrong = [complaint(words, target, document) for words, target in links(markdown(document))]
    assert [text for text in wrong if text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d.parent.name}/{d.name}")
def test_every_name_of_the_library_exists(document):
    assert sorted(name for name in names(markdown(document)) if not exists(name)) == []


@pytest.mark.parametrize("folder", ["lora_lens", "notebooks", "data", "benchmarks", "examples"])
def test_every_name_in_code_and_docstrings_is_offered(folder):
    files = [f for f in sorted((ROOT / folder).rglob("*")) if f.suffix in (".py", ".ipynb")]
    used = {file.name: {f"ll{name}" for name in NAME.findall(file.read_text())} for file in files}
    assert {file: lost for file, found in used.items() if (lost := {n for n in found if not exists(n)})} == {}
    assert any(used.values())


def test_links_and_names_are_found_at_all():
    readme, spectra = ROOT / "README.md", ROOT / "notebooks" / "01_spectra.ipynb"
    assert ("01_spectra", "notebooks/01_spectra.ipynb") in links(markdown(readme))
    assert ("arXiv:2404.02948", "https://arxiv.org/abs/2404.02948") in links(markdown(spectra))
    assert {"ll.spectra", "ll.tasks.bundled.vision", "ll.widgets.window_explorer"} <= names(markdown(readme))
    assert "ll.spectrum.factorize" in names(markdown(spectra))


@pytest.mark.parametrize(
    "target, said",
    [
        ("notebooks/01_spectre.ipynb", "there is no 'notebooks/01_spectre.ipynb'"),
        ("notebooks/README.md#how-the-default-experiment-was-chosen", "names a heading that is not there"),
        ("data/results#runs", "names a heading that is not there"),
        ("../elsewhere", "there is no '../elsewhere'"),
        ("", "there is no ''"),
        ("https//arxiv.org/abs/2404.02948", "there is no 'https//arxiv.org"),
        ("http:/arxiv.org/abs/2404.02948", "is no address of a web page"),
        ("https://arxiv.org/abs/2404.2948x", "is no address of a paper"),
        ("https://arxiv.org/abs/2406.09044", "leads to another paper"),
        ("ftp://example.org/file", "is no address of a web page"),
    ],
)
def test_a_broken_link_is_told(target, said):
    ((words, found),) = links(f"See [arXiv:2404.02948]({target}).")
    assert said in complaint(words, found, ROOT / "README.md")


@pytest.mark.parametrize(
    "target",
    ["LICENSE", "data/results", "#limits", "notebooks/README.md#how-the-default-experiment-of-03-was-chosen"],
)
def test_a_sound_link_is_not(target):
    assert complaint("words", target, ROOT / "README.md") is None


def test_code_is_no_link_and_prose_no_code():
    assert links("`[s, s + r)(x)` and\n\n    a[0](b)\n\n```python\nc[1](d)\n```\n") == []
    assert names("ll.nothing, `ll.none(x).y` and\n\n    ll.plots.few(t)\n") == {"ll.none", "ll.plots.few"}
    assert not exists("ll.none") and not exists("ll.plots.few")
    assert exists("ll.Run.accuracy") and exists("ll.forgetting.u_shape_test")
