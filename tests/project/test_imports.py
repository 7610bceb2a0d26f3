"""What is imported when, seen in one fresh process outside the checkout, as each takes many seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lora_lens as ll

SCRIPT = """
import json, sys

loaded = {}
def note(after):
    loaded[after] = sorted({name.partition(".")[0] for name in sys.modules})

import lora_lens as ll
ll.Window
note("import")
ll.spectra(sys.argv[1])
note("spectra of a file")
dir(ll.widgets), ll.plots, ll.Sweep
note("names")
ll.widgets.spectrum_explorer
note("an explorer")
sys.path.append(sys.argv[2])
import engine_runs
engine_runs.swept(seeds=[0])
note("a sweep")
names = [getattr(ll, name).__name__ for name in ll.__all__]
print(json.dumps({"loaded": loaded, "version": ll.__version__, "names": names}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    """Tests run in the checkout, whose folder hides what an installation lacks."""
    folder = tmp_path_factory.mktemp("elsewhere")
    save_file({"a.weight": torch.randn(4, 3)}, folder / "model.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, Path(__file__).parents[1]],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_installed_package_is_whole_wherever_it_is_imported(told):
    assert told["version"] == ll.__version__ and len(told["names"]) == len(ll.__all__)


@pytest.mark.parametrize(
    ("after", "packages"),
    [
        ("import", {"ipywidgets", "matplotlib", "seaborn", "transformers"}),
        ("spectra of a file", {"accelerate", "matplotlib", "peft", "timm", "torchvision", "transformers"}),
        ("names", {"anywidget", "bqplot", "ipympl", "ipywidgets"}),
        ("an explorer", {"bqplot", "ipympl"}),
        ("a sweep", {"dask", "distributed", "ray"}),
    ],
)
def test_what_is_not_needed_is_not_imported(told, after, packages):
    assert packages & set(told["loaded"][after]) == set()


def test_widgets_are_imported_when_one_is_used(told):
    assert {"anywidget", "ipywidgets"} <= set(told["loaded"]["an explorer"])
