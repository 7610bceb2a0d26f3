from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_sequences import small_spectra, small_vit

import lora_lens as ll
from lora_lens.adapters import PEFT_STARTS, PeftMethod
from lora_lens.training import KLAnchor, L2ToInitial, Regularized

SETTINGS = {"steps": 4, "batch_size": 16, "evaluations": 2, "progress": False}
GRID = ll.Grid(
    window=ll.windows(rank=8, count=3),
    lr=[1e-3, 1e-2],
    seed=range(2),
    baselines=[ll.LoRA(8), ll.LinearProbe()],
)


@pytest.fixture(scope="module")
def experiment(source, digits) -> dict:
    return {
        "model": small_vit(),
        "task": digits.first(64, 50),
        "retain": source.first(10, 50),
        "spectra": small_spectra(),
    }


@pytest.fixture(scope="module")
def table(experiment) -> pd.DataFrame:
    return ll.sweep(GRID, **experiment, **SETTINGS, jobs=1).table


def test_one_tidy_row_per_run_in_the_grid_s_order(table):
    assert len(table) == len(GRID) == 20
    assert table["run"].is_unique
    assert table["method"].value_counts().to_dict() == {"window": 12, "LoRA": 4, "linear probe": 4}
    assert table["seed"].tolist() == [0] * 10 + [1] * 10
    assert sorted(table["position"].dropna().unique()) == [0, 0.5, 1]
    assert table[["accuracy", "retained_accuracy", "retained_before"]].stack().between(0, 1).all()
    pd.testing.assert_series_equal(
        table["forgetting"], table["retained_before"] - table["retained_accuracy"], check_names=False
    )
    assert table["retained_before"].nunique() == 1
    assert (table.loc[table["method"] == "linear probe", "forgetting"] == 0).all()
    assert not any(isinstance(cell, (list, dict, torch.Tensor)) for cell in table.to_numpy().ravel())


def test_a_row_is_what_attach_and_finetune_give(table, experiment):
    row = table.iloc[7]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    window = ll.Window(int(row["rank"]), position=row["position"])
    adapted = ll.attach(experiment["model"], window, spectra=experiment["spectra"], seed=row["seed"])
    run = ll.finetune(
        adapted, experiment["task"], experiment["retain"], lr=row["lr"], seed=row["seed"], **SETTINGS
    )
    torch.set_num_threads(threads)
    assert (run.accuracy, run.forgetting) == (row["accuracy"], row["forgetting"])


def test_finished_runs_are_kept_and_a_larger_grid_runs_only_what_is_missing(tmp_path, table, experiment):
    small = ll.Grid(window=GRID.window, lr=[1e-3], seed=[0])
    ll.sweep(small, **experiment, **SETTINGS, store=tmp_path / "s", jobs=1)
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "s" / "runs").iterdir()}
    assert len(files) == 3
    larger = ll.sweep(replace(GRID, seed=[0]), **experiment, **SETTINGS, store=tmp_path / "s", jobs=1).table
    assert all(f.stat().st_mtime_ns == t for f, t in files.items())
    pd.testing.assert_frame_equal(larger, table[table["seed"] == 0], check_exact=True)

    curves = ll.Sweep.open(tmp_path / "s").only(larger).curves()
    assert len(curves) == 2 * len(larger)
    last = curves.groupby("run")["accuracy"].last()
    pd.testing.assert_series_equal(last.sort_index(), larger.set_index("run")["accuracy"].sort_index())


def test_a_damaged_file_is_run_again_with_a_warning(tmp_path, experiment):
    grid = ll.Grid(window=[ll.Window.first(8)])
    first = ll.sweep(grid, **experiment, **SETTINGS, store=tmp_path / "s", jobs=1).table
    (path,) = (tmp_path / "s" / "runs").iterdir()
    path.write_text(path.read_text()[:40])
    with pytest.warns(UserWarning, match="1 file in .* is damaged or no run of a sweep, and is run again: "):
        again = ll.sweep(grid, **experiment, **SETTINGS, store=tmp_path / "s", jobs=1).table
    pd.testing.assert_frame_equal(first, again, check_exact=True)


def test_a_folder_of_a_different_experiment_is_refused_and_left_alone(tmp_path, experiment, source):
    grid = ll.Grid(window=[ll.Window.first(8)])
    ll.sweep(grid, **experiment, **SETTINGS, store=tmp_path / "s", jobs=1)
    before = {f: f.read_bytes() for f in (tmp_path / "s").rglob("*") if f.is_file()}
    other = experiment | {"retain": source.first(10, 49)}
    with pytest.raises(ValueError, match=r"holds a different experiment \(retain: there fashion_mnist"):
        ll.sweep(grid, **other, **SETTINGS, store=tmp_path / "s", jobs=1)
    assert before == {f: f.read_bytes() for f in (tmp_path / "s").rglob("*") if f.is_file()}

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("a cat")
    with pytest.raises(ValueError, match="is not empty and holds no experiment"):
        ll.sweep(grid, **experiment, **SETTINGS, store=tmp_path / "photos")


def test_bad_points_are_met_before_the_first_run(tmp_path, experiment):
    grid = ll.Grid(window=[ll.Window.first(8), ll.Window(8, start=90)])
    with pytest.raises(ValueError, match=r"\[90, 98\) does not fit blocks.0.attn.qkv"):
        ll.sweep(grid, **experiment, **SETTINGS, store=tmp_path / "s")
    with pytest.raises(ValueError, match="lr must be positive"):
        ll.sweep(
            ll.Grid(window=[ll.Window.first(8)], lr=[1e-3, -1]),
            **experiment,
            **SETTINGS,
            store=tmp_path / "s",
        )
    with pytest.raises(ValueError, match="lr and seed are the grid's"):
        ll.sweep(GRID, **experiment, **SETTINGS, lr=1e-3, store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_impossible_grids_are_refused():
    with pytest.raises(ValueError, match="at least one window or baseline"):
        ll.Grid()
    with pytest.raises(ValueError, match="lr holds the same value twice"):
        ll.Grid(window=ll.windows(8, 2), lr=[1e-3, 0.001])
    with pytest.raises(TypeError, match=r"each of window must be a window, .* or another method, not 8"):
        ll.Grid(window=[8])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": "first"}, "window must be a sequence of windows and other methods, .* not 'first'"),
        ({"window": ["first"]}, "each of window must be a window, .* not 'first'"),
        ({"window": None}, "window must be a sequence"),
        ({"baselines": ll.LoRA}, "baselines must be a sequence"),
        ({"baselines": [ll.Window.first(8)]}, "together holds the same value twice"),
        ({"lr": "1e-3"}, "lr must be a sequence of numbers, such as a list, not '1e-3'"),
        ({"lr": ["1e-3"]}, "lr must be a number, not '1e-3'"),
        ({"lr": float("inf")}, "lr must be positive and finite, not inf"),
        ({"lr": None}, "lr must be a sequence of numbers"),
        ({"lr": []}, "one lr and one seed"),
        ({"lr": [1e-3, np.float64(0.001)]}, "lr holds the same value twice"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"seed": [True]}, "seed must be a whole number, not True"),
        ({"seed": {0, 1}}, "seed must be a sequence"),
    ],
)
def test_bad_grids_are_refused_in_words(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ll.Grid(**{"window": [ll.Window.first(8)]} | wrong)


def test_a_grid_takes_single_values_arrays_and_tensors():
    middle = ll.Window.middle(8)
    grid = ll.Grid(middle, lr=np.logspace(-3, -1, 3), seed=np.arange(2), baselines=ll.LoRA(8))
    assert grid == ll.Grid([middle], [1e-3, 1e-2, 1e-1], (0, 1), [ll.LoRA(8)])
    assert [type(value) for value in (*grid.lr, *grid.seed)] == [float] * 3 + [int] * 2
    same = ll.Grid([middle], lr=torch.tensor(0.5), seed=pd.Series([3]), baselines={"all-mlp": middle})
    assert (same.lr, same.seed, len(same.baselines)) == ((0.5,), (3,), 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grid": [ll.Window.first(8)]}, "grid must be a lora_lens.Grid"),
        ({"model": None}, "model must be a torch.nn.Module, the pretrained model, not None"),
        ({"task": None}, "task must be a lora_lens.Task, .* not None"),
        ({"retain": None}, "retain must be the task that the model knows, .* there is ll.finetune"),
        ({"watch": [None]}, "each of watch must be a lora_lens.Task"),
        ({"watch": "digits"}, "watch must be a sequence of tasks"),
        ({"spectra": True}, r"spectra must be what ll.spectra\(model\) returns, not True"),
        ({"variant": "dora"}, "variant must be a lora_lens.Variant"),
        ({"progress": "no"}, "progress must be True or False, not 'no'"),
        ({"learning_rate": 1e-3}, "sweep has no setting 'learning_rate'; did you mean 'lr'"),
        ({"n_jobs": 2}, "sweep has no setting 'n_jobs'; did you mean 'jobs'"),
        ({"batchsize": 2}, "sweep has no setting 'batchsize'; did you mean 'batch_size'"),
        ({"seed": 1}, "lr and seed are the grid's"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(wrong, message, experiment, tmp_path):
    good = experiment | SETTINGS | {"grid": GRID, "store": tmp_path / "s"}
    with pytest.raises((ValueError, TypeError), match=message):
        ll.sweep(**good | wrong)
    assert not (tmp_path / "s").exists()


def test_numpy_s_numbers_and_a_single_task_do_as_settings(experiment, tmp_path):
    grid = ll.Grid(baselines=ll.LinearProbe())
    settings = SETTINGS | {"steps": np.int64(2), "warmup": np.float32(0), "weight_decay": np.float64(0.5)}
    same = experiment | {"watch": experiment["retain"], "jobs": np.int64(1), "store": tmp_path / "s"}
    table = ll.sweep(grid, **same, **settings).table
    assert table.loc[0, ["steps", "warmup", "weight_decay"]].tolist() == [2, 0, 0.5]
    assert len(ll.Sweep.open(tmp_path / "s").only(table).watched()) == 1


ELSEWHERE = [
    *(PeftMethod(name, 4) for name in PEFT_STARTS),
    Regularized(ll.Window.middle(4), L2ToInitial(0.1)),
    Regularized(ll.LoRA(4), KLAnchor(1)),
    Regularized(ll.FullFineTuning(), L2ToInitial(0.1)),
    Regularized(PeftMethod("corda", 4), KLAnchor(1)),
]
FEW = {"targets": "blocks.0.*", "jobs": 1}


@pytest.fixture(scope="module")
def elsewhere(experiment, tmp_path_factory) -> tuple[pd.DataFrame, Path]:
    store = tmp_path_factory.mktemp("elsewhere") / "s"
    grid = ll.Grid(window=[ll.Window.middle(4)], lr=[1e-2], baselines=ELSEWHERE)
    return ll.sweep(grid, **experiment, **SETTINGS, **FEW, store=store).table, store


def test_starts_and_penalties_stand_in_the_same_table(elsewhere):
    table, store = elsewhere
    assert table["method"].tolist() == ["window", *map(str, ELSEWHERE)]
    assert table["run"].is_unique and not table["diverged"].any()
    assert table.loc[1:, ["position", "start"]].isna().all(axis=None)
    assert table["rank"].tolist()[:10] == [4] * 10 and table["rank"].isna().tolist()[10:] == [True, False]
    assert table["retained_before"].nunique() == 1
    measured = ll.Sweep.open(store).only(table).drifts()
    assert set(measured["run"]) == set(table["run"])
    assert (measured["relative"] > 0).all() and measured["cka"].notna().all()


def test_their_rows_are_what_attach_and_finetune_give(elsewhere, experiment):
    row = elsewhere[0].iloc[-1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    task, retain = experiment["task"], experiment["retain"]
    start = ELSEWHERE[-1].method
    adapted = ll.attach(experiment["model"], start, task=task, retain=retain, targets="blocks.0.*", seed=0)
    run = ll.finetune(adapted, task, retain, lr=1e-2, regularizer=KLAnchor(1), **SETTINGS)
    torch.set_num_threads(threads)
    assert (run.accuracy, run.forgetting) == (row["accuracy"], row["forgetting"])
    assert run.curve["loss"].iloc[-1] == row["loss"]


def test_the_identity_of_earlier_methods_does_not_change(model, source, digits, spectra):
    grid = ll.Grid(ll.Window.middle(8), lr=[1e-3], baselines=[ll.LoRA(8)])
    tasks = {"task": digits.first(64, 50), "retain": source.first(10, 50)}
    table = ll.sweep(grid, model=model, spectra=spectra, **tasks, **SETTINGS, jobs=1).table
    assert table["run"].tolist() == ["8a0f21d18d541f97", "b1ac6f76c173d52e"]


@pytest.mark.parametrize(
    ("method", "choices", "message"),
    [
        (PeftMethod("lora_ga", 20), {}, "lora_ga of rank 20 does not fit blocks.0.attn.qkv"),
        (PeftMethod("pissa", 4), {"variant": ll.Variant(rslora=True)}, "takes no variant, not rslora"),
        (Regularized(ll.Window(8, start=90), KLAnchor(1)), {}, r"\[90, 98\) does not fit"),
        (Regularized(ll.LoRA(4), KLAnchor(1)), {"batch_size": 1}, "half of each batch, and batch_size is 1"),
        (Regularized(ll.LoRA(4), L2ToInitial(1)), {"variant": ll.Variant(dora=True)}, "DoRA changes"),
    ],
)
def test_bad_starts_and_penalties_are_met_before_the_first_run(
    method, choices, message, tmp_path, experiment
):
    grid = ll.Grid(window=[ll.Window.first(8)], baselines=[method])
    with pytest.raises(ValueError, match=message):
        ll.sweep(grid, **experiment, **SETTINGS | choices, store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_each_seed_is_told_when_it_is_through(experiment, tmp_path):
    told = []
    grid = ll.Grid(lr=1e-2, seed=[3, 0, 5], baselines=[ll.LoRA(2), ll.LinearProbe()])
    settings = experiment | SETTINGS | {"spectra": None, "steps": 2, "jobs": 1, "store": tmp_path / "s"}
    whole = ll.sweep(grid, each_seed=told.append, **settings)
    assert [list(dict.fromkeys(part.table["seed"])) for part in told] == [[3], [3, 0], [3, 0, 5]]
    pd.testing.assert_frame_equal(told[-1].table, whole.table)
    assert set(told[0].curves()["run"]) == set(whole.table["run"][:2])
    next((tmp_path / "s" / "runs").glob(f"{whole.table['run'][2]}.json")).unlink()
    ll.sweep(grid, each_seed=told.append, **settings)  # first of the seeds that are there already
    assert [list(dict.fromkeys(part.table["seed"])) for part in told[3:]] == [[3, 5], [3, 0, 5]]
    with pytest.raises(TypeError, match="each_seed must be a function of a Sweep, not 3"):
        ll.sweep(grid, each_seed=3, **settings)


def test_runs_in_a_metric_are_other_runs_and_keep_their_drifts(experiment, source, tmp_path):
    model = experiment["model"]
    grid = ll.Grid(ll.Window.first(8), lr=1e-2, baselines=[ll.LoRA(8)])
    shared = {**experiment, "store": tmp_path, **SETTINGS, "jobs": 1}
    plain = ll.sweep(grid, **shared)
    metrics = [ll.spectrum.Metric(source, examples=20, power=power) for power in (0.5, 1.0)]
    sweeps = []
    for metric in metrics:
        found = ll.spectra(model, metric=metric, progress=False)
        sweeps.append(ll.sweep(grid, **(shared | {"spectra": found})))
    tables = [plain.table, *(found.table for found in sweeps)]
    assert len({table.loc[0, "run"] for table in tables}) == 3
    assert len({table.loc[1, "run"] for table in tables}) == 1  # LoRA does not see the spectra
    assert [found.table.loc[0, "variant"] for found in sweeps] == [str(metric) for metric in metrics]
    opened = ll.Sweep.open(tmp_path)
    assert len(opened.table) == 4
    assert set(opened.table["variant"].dropna()) == {str(metric) for metric in metrics}
    drifts = sweeps[0].drifts().set_index("run").loc[tables[1].loc[0, "run"]]
    assert drifts["inside"].isna().all() and (drifts["update"] > 0).all() and drifts["rotation"].notna().all()
    again = ll.sweep(grid, **(shared | {"spectra": ll.spectra(model, metric=metrics[0], progress=False)}))
    pd.testing.assert_frame_equal(again.table, sweeps[0].table)
