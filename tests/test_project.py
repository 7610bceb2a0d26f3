"""Promises of the repository as a whole: environments in step, tidy notebooks, light imports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONDA_NAMES = {"torch": "pytorch", "playwright": "playwright-python"}


def requirements() -> set[str]:
    """Of everything but the benchmarks, the reference and other people's trainers, which no user needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"].items()
    extras = [line for name, group in groups if name not in ("bench", "docs", "loops") for line in group]
    return {line for line in [*project["dependencies"], *extras] if not line.startswith("lora_lens")}


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower()


def test_conda_users_get_the_same_environment():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    packages = {line for line in conda if isinstance(line, str) and line != "pip"}
    expected = {
        line.replace(name_of(line), CONDA_NAMES.get(name_of(line), name_of(line)), 1)
        for line in requirements()
    }
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert packages == expected | {f"python{python}"}
    assert conda[-1] == {"pip": ["--no-deps -e ."]}


def test_every_requirement_is_pinned_to_the_version_that_was_tested():
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {name_of(line) for line in requirements()} <= pinned


def test_importing_the_package_draws_nothing():
    code = "import sys, lora_lens; print({'matplotlib', 'ipywidgets', 'seaborn'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_imports_point_one_way():
    order = [
        "errors",
        "validate",
        "tables",
        "random_state",
        "fingerprint",
        "lapack",
        "factorization",
        "spectral_metrics",
        "window",
        "wrappers",
        "patterns",
        "naming",
        "torch_tools",
        "code_values",
        "code_operators",
        "code_conditions",
        "code_calls",
        "code_source",
        "code_steps",
        "code_reading",
        "kept_layers",
        "weight_reads",
        "heads",
        "layers",
        "copying",
        "progress",
        "placement",
        "checkpoint",
        "quantized",
        "roles",
        "factor_pairs",
        "adapter_updates",
        "gguf_files",
        "weight_files",
        "weights",
        "cache",
        "devices",
        "threads",
        "spectrum",
        "comparison",
        "methods",
        "peft_names",
        "rollback",
        "planned_layers",
        "injection",
        "precision",
        "adapter",
        "replacing",
        "adapter_files",
        "saving",
        "plain_peft",
        "exporting",
        "readouts",
        "features",
        "feature_change",
        "drift",
        "rotation",
        "neighbours",
        "sampling",
        "corpus",
        "tasks",
        "task_variants",
        "images",
        "folders",
        "corpus_checks",
        "delimited",
        "text_files",
        "hub_texts",
        "token_examples",
        "tokenizing",
        "text_tasks",
        "metrics",
        "evaluation",
        "frozen_prefix",
        "probe",
        "replies",
        "run_groups",
        "tradeoffs",
        "items",
        "continual_metrics",
        "fronts",
        "predictors",
        "u_shape",
        "processes",
        "training_settings",
        "training",
        "background_run",
        "foresight",
        "penalties",
        "peft_starts",
        "identity",
        "records",
        "store",
        "running",
        "sweep",
        "window_survival",
        "scenarios",
        "memories",
        "strategies",
        "sequence_checkpoint",
        "sequence_training",
        "continual",
        "advisor",
        "pilot",
        "embedded",
        "embedded_texts",
        "task_sequences",
        "plot_style",
        "spectrum_plots",
        "window_plots",
        "text_plots",
        "sweep_plots",
        "continual_plots",
        "continual_score_plots",
        "tradeoff_plots",
        "setting_plots",
        "item_plots",
        "drift_plots",
        "run_plots",
        "plots",
        "html_page",
        "report_words",
        "report_facts",
        "report_tables",
        "report_figures",
        "sweep_report",
        "explorer",
        "live_pictures",
        "spectrum_explorer",
        "window_explorer",
        "training_controls",
        "training_explorer",
        "clickable",
        "forgotten_explorer",
        "run_choice",
        "run_plane",
        "run_view",
        "pair_explorer",
        "tradeoff_explorer",
        "comparison_explorer",
        "continual_explorer",
        "pages",
        "widgets",
        "uncalled",
        "exactness",
    ]
    rooms = {f.stem for f in (ROOT / "lora_lens").glob("*.py")} - {"__init__"}
    assert rooms == set(order)
    for room in order:
        text = (ROOT / "lora_lens" / f"{room}.py").read_text()
        text = re.sub(r"if TYPE_CHECKING:\n(    .*\n)+", "", text)  # names for annotations alone
        imported = set(re.findall(r"^\s*from lora_lens\.(\w+) import", text, re.MULTILINE))
        assert all(order.index(other) < order.index(room) for other in imported), (room, imported)


def test_all_public_names_exist_and_are_documented():
    import lora_lens as ll

    for name in ll.__all__:
        assert getattr(ll, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
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

    assert complaints(notebook, clean) == "none"
    assert "run make format" in complaints(notebook, clean.replace('"outputs": []', printed, 1))
    assert "==> the" in complaints("README.md", f"{'het'[::-1]} window\n")
    assert "rooms.py" in complaints("rooms.py", "x=1\n")
    assert complaints("rooms.py", "x = 1\n") == "none"


def test_the_readme_s_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    short = example.replace("steps=150", "steps=5, evaluations=2")
    assert short != example
    subprocess.run([sys.executable, "-c", short], check=True, cwd=ROOT)
