"""Every example in a docstring runs, and every public class and function has one."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import lora_lens as ll

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "lora_lens").rglob("*.py"))
# Results: nobody makes one by hand, so the examples of the functions that return them show them.
RETURNED_BY = {
    "Run": "finetune",
    "course.Verdict": "course.check",
    "training.Run": "finetune",
    "forgetting.Growth": "forgetting.growth",
    "forgetting.Measured": "measure",
    "forgetting.Rewound": "rewind",
    "spectrum.Change": "spectrum.change",
    "spectrum.Weight": "spectrum.weights",
}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def has_example(thing: object) -> bool:
    """In its own docstring, or for a class in that of one of its methods."""
    return any(found.examples for found in doctest.DocTestFinder().find(thing, "its name"))


def public_names() -> Iterator[tuple[str, object]]:
    for stub in sorted((ROOT / "lora_lens").rglob("__init__.pyi")):
        package = import_module(module_name(stub.with_suffix(".py")))
        for name in package.__all__:
            yield f"{package.__name__}.{name}", getattr(package, name)


@pytest.mark.parametrize("name", [module_name(file) for file in FILES if ">>>" in file.read_text()])
def test_every_example_runs(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # some read data/
    try:
        # Without the module's names, because a reader has none: an example imports all that it uses.
        failed, tried = doctest.testmod(import_module(name), globs={})
    finally:
        plt.close("all")
    assert tried and not failed, capsys.readouterr().out


def test_every_public_class_and_function_has_an_example():
    things = {name: thing for name, thing in public_names() if inspect.isclass(thing) or callable(thing)}
    assert len(things) > 150
    without = {name for name, thing in things.items() if not has_example(thing)}
    assert without == {f"lora_lens.{name}" for name in RETURNED_BY}
    assert all(has_example(attrgetter(function)(ll)) for function in RETURNED_BY.values())
