"""What scripts, notebooks and pages take from the package is there; most of them run nowhere in the tests."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path for folder in ("data", "benchmarks", "examples") for path in (ROOT / folder).glob("*.py")
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def code(path: Path) -> list[str]:
    text = path.read_text()
    if path.suffix == ".py":
        return [text]
    if path.suffix == ".md":
        return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return [
        "\n".join(x for x in "".join(c["source"]).splitlines() if not x.startswith(("%", "!"))) for c in cells
    ]


def taken(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Modules of the package and what is taken from them, by an import or as an attribute of ``ll``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_lens":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            names, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                names, inner = [inner.attr, *names], inner.value
            if isinstance(inner, ast.Name) and inner.id == "ll":
                yield "lora_lens", ".".join(names)


def is_there(module: str, names: str) -> bool:
    found = importlib.import_module(module)
    for name in names.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
        if isinstance(found, type):  # attributes of instances need not be the class's
            return True
    return True


@pytest.mark.parametrize("path", [*SCRIPTS, *NOTEBOOKS, *PAGES], ids=lambda path: path.stem)
def test_what_it_takes_from_the_package_is_there(path):
    names = {name for block in code(path) for name in taken(ast.parse(block))}
    assert [name for name in sorted(names) if not is_there(*name)] == []


def test_a_name_that_is_gone_is_found():
    tree = ast.parse("from lora_lens.experiments.advisor import value_of\nll.training.pilot(1)")
    assert [".".join(name) for name in taken(tree) if is_there(*name)] == ["lora_lens.training"]
