"""PEFT's method comparison: reading its results, and writing experiments for windows."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig
from tiny_models import llama

import lora_lens as ll


def result(name: str, **changes: object) -> dict:
    """A result file's content, with the keys that PEFT's script writes and that are read here."""
    given = {
        "created": "2026-07-15T05:41:18+00:00", "version": "0.19.2.dev0", "start": True,
        "status": "success", "lr": 1e-4, "last": {"test accuracy": 0.478, "forgetting": 0.05},
    } | changes  # fmt: skip
    config = LoraConfig(r=8, init_lora_weights=given["start"], target_modules=["q_proj"]).to_dict()
    return {
        "run_info": {
            "created_at": given["created"],
            "experiment_name": name,
            "train_config": {"optimizer_kwargs": {"lr": given["lr"], "weight_decay": 0.1}, "seed": 0},
            "peft_config": {key: value for key, value in config.items() if not isinstance(value, set)},
        },
        "train_info": {
            "status": given["status"],
            "num_trainable_params": 9175040,
            "metrics": [{"step": 250, "valid accuracy": 0.3}, given["last"]],
        },
        "meta_info": {"package_info": {"peft-version": given["version"]}},
    }


def written(folder: Path, *results: dict) -> Path:
    for number, one in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(one, default=str))
    return folder


def test_results_become_a_table_that_the_trade_off_plane_draws(tmp_path):
    last = {"test accuracy": 0.51, "forgetting": 0.11}
    folder = written(tmp_path, result("lora/rank32"), result("lora/rank64", last=last, lr=3e-4))
    table = ll.forgetting.method_comparison(folder)
    assert table["method"].tolist() == ["lora/rank32", "lora/rank64"] and (table["void"] == "").all()
    assert table["accuracy"].tolist() == [0.478, 0.51] and table["loss_rise"].tolist() == [0.05, 0.11]
    assert table["lr"].tolist() == [1e-4, 3e-4] and table["rank"].tolist() == [8, 8]
    ax = ll.plots.tradeoff(table, y="loss_rise")
    assert "nats" in ax.get_ylabel() and len(ax.collections) == 2
    assert ll.forgetting.pareto_front(table.assign(kept=-table["loss_rise"]), y="kept").all()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"created": "2026-07-14T13:00:00+00:00"}, "#3419"),
        ({"created": "2026-01-08T05:41:18"}, "#3419"),
        ({"version": "0.18.1"}, "#3419"),  # an old PEFT that somebody ran later
        ({"start": "pissa_niter_16"}, "pissa_niter_16 changes the base"),
        ({"last": {"test accuracy": 0.4}}, "not measured"),
    ],
)
def test_void_numbers_are_left_out_and_counted(tmp_path, changes, why):
    folder = written(tmp_path, result("lora/good"), result("lora/void", **changes))
    with pytest.warns(UserWarning, match="1 row of 2 have no loss_rise"):
        table = ll.forgetting.method_comparison(folder)
    assert table["void"][0] == "" and why in table["void"][1]
    assert table["loss_rise"].isna().tolist() == [False, True]


def test_failed_experiments_have_a_row_without_results(tmp_path):
    folder = written(tmp_path, result("lora/good"), result("lora/lost", status="canceled", last={"step": 5}))
    table = ll.forgetting.method_comparison(folder)
    assert table["failed"].tolist() == [False, True] and table["reason"][1] == "canceled"
    assert len(ll.plots.tradeoff(table, y="loss_rise").collections) == 1


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        ll.forgetting.method_comparison(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no results"):
        ll.forgetting.method_comparison(tmp_path)
    for number, content in enumerate(["{}", "no JSON", "[1, 2]", '{"run_info": 3}']):
        file = tmp_path / f"{number}.json"
        file.write_text(content)
        with pytest.raises(ValueError, match=f"{number}.json is no result of PEFT's method comparison"):
            ll.forgetting.method_comparison(file)
    images = tmp_path / "images.json"
    images.write_text(json.dumps(result("lora/x", last={"drift": 0.3}), default=str))
    with pytest.raises(ValueError, match="image-gen, which measures the drift of images"):
        ll.forgetting.method_comparison(images)


def test_an_experiment_holds_the_window(tmp_path):
    model = llama()
    adapted = ll.attach(model, ll.Window.last(4), targets=["q_proj", "v_proj"], alpha=8)
    folder = tmp_path / "experiments" / "lora" / "tiny-last-rank4"
    ll.forgetting.method_comparison_experiment(adapted, folder, lr=3e-4)
    config = PeftConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.peft_type) == (4, 8, "LORA")
    settings = json.loads((folder / "training_params.json").read_text())
    assert settings == {"optimizer_kwargs": {"lr": 3e-4, "weight_decay": 0.0}}
    again = ll.load(copy.deepcopy(model), folder / "start")  # as its README says
    ids = {"input_ids": torch.arange(2, 10)[None]}
    assert ll.function_error(again, adapted, ids) == 0
    names = [{n for n, p in one.named_parameters() if p.requires_grad} for one in (again, adapted)]
    assert names[0] == names[1]
    assert "disable_adapter" in (folder / "README.md").read_text()


def test_an_experiment_begins_before_training(tmp_path):
    adapted = ll.attach(llama(), ll.Window.last(4), targets=["q_proj"])
    with torch.no_grad():
        next(p for p in adapted.parameters() if p.requires_grad).mul_(1.1)
    with pytest.raises(ValueError, match="trained already"):
        ll.forgetting.method_comparison_experiment(adapted, tmp_path / "x")
    with pytest.raises(ValueError, match=r"ll\.attach"):
        ll.forgetting.method_comparison_experiment(llama(), tmp_path / "x")
