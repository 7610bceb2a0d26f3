"""Every public function and class refuses a bad first argument, in words and by an error of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from explored import narrow_vit

import lora_lens as ll

BAD = {"None": None, "3": 3, "'x'": "x", "[]": [], "{}": {}, "object()": object()}
# Of modules without __all__: what they share with others inside the package, not doors of their own.
INSIDE = """
tradeoffs.resampled tradeoffs.mean_and_interval tradeoffs.window_columns tradeoffs.groups tradeoffs.share
tradeoffs.seeds_by_rate tradeoffs.rates_in
strategies.method_of strategies.require_method strategies.exact_strategy
penalties.squared_change task_variants.class_index task_variants.checked_seed
""".split()  # noqa: SIM905
# What functions return: nobody but they makes one, and they hold whatever they are given.
RESULTS = """
Advice Progress Run Spectrum comparison.Change strategies.Slot
spectral_metrics.PowerLaw spectral_metrics.MarchenkoPastur
""".split()  # noqa: SIM905
# Bad for most, good for these: a rank, a number of classes or of examples, an accuracy.
TAKES_3 = """
LoRA Training Window windows embedded.vision_architecture embedded_texts.genres memories.EWC
memories.Orthogonal memories.Replay metrics.forgetting penalties.KLAnchor penalties.L2ToInitial
placement.AfterEnergy placement.AtEffectiveRank placement.HoldingEnergy placement.RandomComponents
placement.SpreadComponents
task_sequences.fashion_digits_corrupted_rotated task_sequences.orders task_sequences.split_fashion
tradeoffs.bootstrap_interval
""".split()  # noqa: SIM905
TAKEN = dict.fromkeys(TAKES_3, ("3",)) | {
    "Grid": ("[]",),
    "SpectrumSet": ("[]",),
    "fronts.hypervolume": ("[]",),
    "hub_corpus": ("'x'",),  # a name; that there is no such dataset takes a network to say
    "strategies.Continued": ("None",),
    "strategies.Merged": ("None",),
    "task_sequences.fashion_digits_corrupted_rotated": ("None", "3"),
    "task_sequences.split_fashion": ("None", "3"),
}


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in ll.__all__:
        found = getattr(ll, name)
        if isinstance(found, ModuleType) and name != "errors":
            inside = getattr(found, "__all__", None)
            for one, thing in vars(found).items():
                own = one in inside if inside else getattr(thing, "__module__", "") == found.__name__
                if callable(thing) and own and not one.startswith("_") and f"{name}.{one}" not in INSIDE:
                    yield f"{name}.{one}", thing
        elif callable(found):
            yield name, found


def takes_something(name: str, door: Callable[..., Any]) -> bool:
    return name not in RESULTS and bool(inspect.signature(door).parameters)


DOORS = {name: door for name, door in public() if takes_something(name, door)}


@cache
def table() -> pd.DataFrame:
    """A sweep of three windows and LoRA with two seeds and rates."""
    places = [("window", 0.0), ("window", 0.5), ("window", 1.0), ("LoRA", np.nan)]
    rows = [
        {"run": f"{method} {position} {lr} {seed}", "method": method, "rank": 4, "position": position,
         "start": np.nan, "lr": lr, "seed": seed, "steps": 10, "diverged": False, "loss": 0.1,
         "accuracy": 0.5 + 50 * lr + 0.01 * seed, "retained_before": 0.9,
         "retained_accuracy": 0.9 - 50 * lr + 0.02 * seed, "forgetting": 50 * lr - 0.02 * seed}
        for method, position in places for lr in (0.001, 0.002) for seed in (0, 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@cache
def drifts() -> pd.DataFrame:
    rows = [
        {"run": run, "layer": "blocks.0.fc", "block": 0, "kind": "fc", "update": 1.0 + i,
         "relative": 0.1 + i / 99, "cka": 0.9 - i / 99, "relative_change": 0.1, "after": 1,
         "block_change": 0.1}
        for i, run in enumerate(table()["run"])
    ]  # fmt: skip
    return pd.DataFrame(rows)


@cache
def spectrum() -> ll.Spectrum:
    torch.manual_seed(0)
    return ll.spectrum.factorize("blocks.0.fc", torch.randn(8, 6))


@cache
def task() -> ll.Task:
    return ll.embedded.digits().subset(train=20, test=20)


@cache
def others(empty: Path) -> dict[str, tuple]:
    """Good values of all arguments but the first."""
    spectra = ll.SpectrumSet([spectrum()])
    window, folder = ll.Window.first(2), empty / "new"
    corpus = ll.Texts(("good", "bad"), (1, 0))
    lost = pd.DataFrame({"item": [0], "label": [0], "share": [1.0], "instead": [1]})
    return {
        "Corpus": (("no", "yes"), corpus, corpus),
        "Examples": (torch.tensor([0, 1]),),
        "Penalized": (ll.penalties.L2ToInitial(1.0),),
        "PeftStart": (4,),
        "Spectrum": ((8, 6), torch.ones(6)),
        "Task": (("a", "b"), task().train, task().test),
        "Texts": ((0, 1),),
        "advise": (task(), task()),
        "answers": (table(),),
        "attach": (window,),
        "attach_start": (ll.PeftStart("pissa", 4),),
        "compare": (spectra,),
        "continual": ([task(), task()], ll.strategies.Merged(), ll.Grid(window=[window])),
        "continual_drifts": (table(),),
        "curves": (table(),),
        "dataset_corpus": (corpus, "name"),
        "drift": (spectra,),
        "drifts": (table(),),
        "evaluate": (task(),),
        "export": (folder,),
        "export_residual": (folder,),
        "feature_change": (narrow_vit(0), task().test.inputs),
        "feature_split": ("blocks.0.attn.qkv", spectrum(), window, task().test.inputs),
        "finetune": (task(),),
        "foresee": (task(), task().train, [window]),
        "function_error": (narrow_vit(0), task().test.inputs),
        "label_word_task": (str.split,),
        "language_task": (str.split,),
        "load": (folder,),
        "pack": (folder,),
        "probed": (task(),),
        "replies": (str.split,),
        "replies_before_after": (pd.DataFrame({"question": ["a"], "reply": ["b"]}),),
        "report": (folder / "report.html",),
        "save": (folder,),
        "text_task": (str.split,),
        "u_shape_test": (0.001,),
        "watched": (table(),),
        "comparison.principal_angles": (spectrum(), window),
        "comparison.overlap": (spectrum(), window),
        "comparison.overlap_matrix": (spectrum(), 2),
        "comparison.change": (spectrum(),),
        "comparison.rotation": (spectrum(),),
        "comparison.intruder_dimensions": (spectrum(),),
        "comparison.compare": (spectrum(),),
        "continual_metrics.forward_transfer": ([0.1, 0.1],),
        "continual_metrics.intransigence": ([0.1, 0.1],),
        "items.forgotten_by_one": ("run",),
        "items.forgetting_interval": (table(),),
        "items.confusion": (3,),
        "metrics.accuracy": ([1, 2],),
        "metrics.forgetting": (0.5,),
        "neighbours.neighbour_agreement": (torch.randn(20, 3),),
        "neighbours.neighbour_table": (torch.randn(20, 3), ["a"] * 20),
        "placement.AfterEnergy": (0.5,),
        "placement.HoldingEnergy": (0.5,),
        "plots.against_forgetting": (drifts(), "relative"),
        "plots.by_setting": ("rank",),
        "plots.confusion": (["a", "b"],),
        "plots.decomposition": (window,),
        "plots.feature_maps": (None,),
        "plots.forgotten_examples": (lost,),
        "plots.learning_curves": (10,),
        "plots.token_shares": ([0.1],),
        "plots.update_over_time": (table(),),
        "plots.watched": (table(),),
        "plots.window_survival": (table(),),
        "predictors.predict_forgetting": (drifts(),),
        "rotation.rotations": (spectra,),
        "rotation.turned": ("blocks.0.fc", spectrum()),
        "spectral_metrics.marchenko_pastur": ((8, 6),),
        "task_sequences.orders": (2,),
        "task_sequences.rotations": ([0, 10],),
        "task_variants.corrupted": ("noise", 1),
        "task_variants.few_shot": (2,),
        "task_variants.only_classes": ([0, 1],),
        "task_variants.permuted": (0,),
        "task_variants.rotated": (10,),
        "tradeoffs.at_matched_accuracy": (drifts(), 0.5),
        "tradeoffs.at_matched_update": (drifts(), 0.5),
        "widgets.forgotten_explorer": (folder, task()),
        "widgets.pair_explorer": (folder,),
        "widgets.training_explorer": (task(), task()),
        "widgets.window_explorer": (spectra, task()),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("doors")


@pytest.mark.parametrize("name", DOORS)
def test_a_bad_first_argument_is_refused_in_words(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    door, more, named = DOORS[name], others(folder).get(name, ()), {}
    if name == "sweep":
        named = {"model": narrow_vit(0), "task": task(), "retain": task(), "progress": False}
    open_before = plt.get_fignums()
    wrong = []
    for written, bad in BAD.items():
        if written in TAKEN.get(name, ()):
            continue
        try:
            door(bad, *more, **named)
            wrong.append(f"{name}({written}) is taken")
        except ll.errors.LoraLensError as error:
            if "\n" in str(error) or not str(error):
                wrong.append(f"{name}({written}) says {str(error)!r}")
        except Exception as error:
            wrong.append(f"{name}({written}) raises {type(error).__name__}: {str(error)[:150]}")
    if plt.get_fignums() != open_before:
        wrong.append(f"{name} leaves an empty figure")
        plt.close("all")
    assert not wrong, "\n".join(wrong)
    assert not list(folder.iterdir())
