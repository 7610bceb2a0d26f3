from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

STUB = "from .inside import collected\nfrom .wrong import nothing\n"


@pytest.fixture
def package(monkeypatch, tmp_path) -> Iterator[ModuleType]:
    """A package of two modules, one of which cannot be imported."""
    folder = tmp_path / "lazy_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from lora_lens._base.lazy import attach_stub\n"
        "__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)\n"
    )
    (folder / "__init__.pyi").write_text(STUB)
    (folder / "inside.py").write_text("import gc\ncollected = gc.isenabled()\n")
    (folder / "wrong.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("lazy_package")
    for name in ("lazy_package", "lazy_package.inside"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_while_a_name_is_imported(package, enabled):
    assert dir(package) == ["collected", "nothing"]
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        assert not package.collected
        with pytest.raises(ZeroDivisionError):
            package.nothing  # noqa: B018
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
