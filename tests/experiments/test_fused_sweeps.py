from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from small_sequences import pairs, retained, small_vit
from torch import nn

import lora_lens as ll
from lora_lens.training import L2ToInitial, Regularized

FAST = {"steps": 4, "batch_size": 8, "evaluations": 2, "warmup": 0.0, "progress": False, "jobs": 1}
NUMBERS = ["loss", "accuracy", "retained_accuracy", "retained_loss", "loss_rise"]
GRID = ll.Grid(
    window=ll.windows(rank=4, count=3),
    lr=[1e-3, 1e-2],
    baselines=[ll.LoRA(4), ll.LoRA(2), ll.FullFineTuning(), Regularized(ll.LoRA(4), L2ToInitial(1))],
)


def swept(grid=GRID, model=None, **settings) -> pd.DataFrame:
    tasks = {"task": pairs()[0], "retain": retained()}
    return ll.sweep(grid, model=small_vit() if model is None else model, **tasks, **FAST | settings).table


@pytest.fixture(scope="module")
def single() -> pd.DataFrame:
    return swept()


def test_the_table_is_that_of_single_runs(single):
    fused = swept(fuse=3)
    pd.testing.assert_frame_equal(fused.drop(columns=NUMBERS), single.drop(columns=NUMBERS))
    pd.testing.assert_frame_equal(fused[NUMBERS], single[NUMBERS], rtol=1e-3)
    assert not fused["failed"].any() and (fused["loss"] != single["loss"]).any()


def test_an_interrupted_sweep_forms_the_same_groups_and_ends_with_the_same_table(tmp_path):
    first = swept(fuse=4, store=tmp_path)
    files = sorted((tmp_path / "runs").glob("*.json"))
    before = {file.name: json.loads(file.read_bytes()) for file in files}
    for file in files[::3]:
        file.unlink()
    pd.testing.assert_frame_equal(swept(fuse=4, store=tmp_path), first)
    for file in files:
        now = json.loads(file.read_bytes())
        assert now["result"] == before[file.name]["result"] and now["curve"] == before[file.name]["curve"]


def test_what_cannot_be_fused_is_trained_one_by_one():
    drawing = copy.deepcopy(small_vit())
    drawing.pos_drop = nn.Dropout(0.1)
    grid = ll.Grid(window=ll.windows(rank=4, count=2), lr=1e-2)
    pd.testing.assert_frame_equal(swept(grid, drawing, fuse=2), swept(grid, drawing))


@dataclass(frozen=True)
class Refusing(ll.LoRA):
    """Has a bug the first time."""

    marker: str = ""

    def attach(self, request, plan):
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            raise ZeroDivisionError("a bug")
        return super().attach(request, plan)


def test_a_group_with_a_bug_is_trained_one_by_one_and_one_is_told(tmp_path):
    grid = ll.Grid(lr=1e-2, baselines=[ll.LoRA(4), Refusing(4, str(tmp_path / "there"))])
    with pytest.warns(
        UserWarning, match="2 runs could not be computed together, .* one by one: (.|\n)*a bug"
    ):
        table = swept(grid, fuse=2)
    assert len(table) == 2 and not table["failed"].any()


@pytest.mark.parametrize(("fuse", "error"), [(0, ValueError), (2.5, TypeError), ("all", TypeError)])
def test_fuse_is_a_number_of_runs(fuse, error):
    with pytest.raises(error, match="fuse, the number of runs that are trained together"):
        swept(fuse=fuse)
