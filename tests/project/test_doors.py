"""Every public function and class refuses a bad first argument, in words and by an error of its own."""

from __future__ import annotations

import inspect
import re
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
from lora_lens.forgetting.weight_drift import drift_between
from lora_lens.tasks.transforms import class_index
from lora_lens.training.regularizers.l2_to_initial import squared_change

BAD = {"None": None, "3": 3, "'x'": "x", "[]": [], "{}": {}, "object()": object()}
# Of modules without __all__: what they share with others inside the package, not doors of their own.
INSIDE = ("tasks.bundled.PACKAGE",)
# What functions return: nobody but they makes one, and they hold whatever they are given.
RESULTS = """
experiments.Advice forgetting.FeatureEnergies forgetting.FeatureNorms forgetting.FeatureSplit
forgetting.Growth forgetting.Measured forgetting.Point forgetting.Rewound forgetting.UShape
spectrum.Weight tasks.Answers training.Progress Run Spectrum spectrum.Change
Sweep experiments.ContinualSweep
course.Verdict
spectrum.measures.PowerLaw spectrum.measures.MarchenkoPastur
""".split()  # noqa: SIM905
# Bad for most, good for these: a rank, a number of classes or of examples, an accuracy.
TAKES_3 = """
LoRA Training Window windows tasks.bundled.vision_architecture tasks.bundled_texts.genres training.EWC
training.Orthogonal training.Replay training.KLAnchor training.L2ToInitial spectrum.AfterEnergy
spectrum.AtEffectiveRank spectrum.HoldingEnergy spectrum.RandomComponents spectrum.SpreadComponents
tasks.sequences.fashion_digits_corrupted_rotated tasks.sequences.orders tasks.sequences.split_fashion
forgetting.seed_interval forgetting.FirstComponents forgetting.Intruders forgetting.MostMoved
forgetting.SmallValues
""".split()  # noqa: SIM905
TAKEN = dict.fromkeys(TAKES_3, ("3",)) | {
    "Grid": ("[]",),
    "SpectrumSet": ("[]",),
    "forgetting.WholeUpdate": ("None", "'x'"),
    "forgetting.hypervolume": ("[]",),
    "spectrum.factorize": ("'x'",),
    "spectrum.part_of": ("'x'",),
    "reports.say": ("'x'",),  # a line
    "spectrum.to_yaml": ("'x'",),  # one name
    "tasks.hub_corpus": ("'x'",),  # a name; that there is no such dataset takes a network to say
    "experiments.continual.Continued": ("None",),
    "experiments.continual.Merged": ("None",),
    "training.Before": ("None",),
    "tasks.sequences.fashion_digits_corrupted_rotated": ("None", "3"),
    "tasks.sequences.split_fashion": ("None", "3"),
}


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """All doors, by the shortest path to them below ``ll``."""
    found: dict[int, str] = {}
    rooms = [("", ll)]
    for path, room in rooms:
        for name in getattr(room, "__all__", None) or vars(room):
            thing = getattr(room, name)
            below = f"{path}.{name}".strip(".")
            if isinstance(thing, ModuleType) and thing.__name__.startswith("lora_lens.") and name != "errors":
                rooms.append((below, thing))
            elif callable(thing) and not name.startswith("_") and id(thing) not in found:
                own = hasattr(room, "__path__") or getattr(thing, "__module__", "") == room.__name__
                if own and below not in INSIDE:
                    found[id(thing)] = below
                    yield below, thing


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
    return ll.tasks.bundled.digits().subset(train=20, test=20)


@cache
def others(empty: Path) -> dict[str, tuple]:
    """Good values of all arguments but the first."""
    spectra = ll.SpectrumSet([spectrum()])
    window, folder = ll.Window.first(2), empty / "new"
    corpus = ll.tasks.Texts(("good", "bad"), (1, 0))
    lost = pd.DataFrame({"item": [0], "label": [0], "share": [1.0], "instead": [1]})
    return {
        "tasks.Corpus": (("no", "yes"), corpus, corpus),
        "Examples": (torch.tensor([0, 1]),),
        "training.Regularized": (ll.training.L2ToInitial(1.0),),
        "PeftMethod": (4,),
        "Spectrum": ((8, 6), torch.ones(6)),
        "Task": (("a", "b"), task().train, task().test),
        "tasks.Texts": ((0, 1),),
        "advise": (task(), task()),
        "attach": (window,),
        "compare": (spectra,),
        "course.check": (1,),
        "experiments.continual_sweep": ([task()] * 2, ll.experiments.continual.Merged(), ll.Grid([window])),
        "tasks.dataset_corpus": (corpus, "name"),
        "adapters.push_to_hub": ("name/adapter",),
        "forgetting.drift": (spectra,),
        "forgetting.growth": (narrow_vit(0),),
        "measure": (narrow_vit(0), task()),
        "rewind": (task(), task()),
        "forgetting.method_comparison_experiment": (folder,),
        "tasks.agreement": (task().test.inputs,),
        "training.ForgettingMonitor": (task(),),
        "evaluate": (task(),),
        "export": (folder,),
        "export_residual": (folder,),
        "extract": (narrow_vit(0), folder),
        "forgetting.feature_change": (narrow_vit(0), task().test.inputs),
        "forgetting.feature_energies": ("blocks.0.attn.qkv", spectrum(), task().test.inputs),
        "spectrum.factorize": (torch.randn(4, 3),),
        "forgetting.feature_split": ("blocks.0.attn.qkv", spectrum(), window, task().test.inputs),
        "finetune": (task(),),
        "forgetting.foresee": (task(), task().train, [window]),
        "function_error": (narrow_vit(0), task().test.inputs),
        "tasks.label_word_task": (str.split,),
        "tasks.language_task": (str.split,),
        "load": (folder,),
        "experiments.pack": (folder,),
        "tasks.probed": (task(),),
        "forgetting.replies": (str.split,),
        "forgetting.replies_before_after": (pd.DataFrame({"question": ["a"], "reply": ["b"]}),),
        "reports.at_each_rate": (pd.DataFrame({0.001: [0.1, 0.2]}),),
        "reports.by_seed": ("forgetting",),
        "reports.more_or_less": ([0.1, 0.2],),
        "reports.report": (folder / "report.html",),
        "save": (folder,),
        "tasks.text_task": (str.split,),
        "forgetting.u_shape_test": (0.001,),
        "spectrum.principal_angles": (spectrum(), window),
        "spectrum.overlap": (spectrum(), window),
        "spectrum.overlap_matrix": (spectrum(), 2),
        "spectrum.change": (spectrum(),),
        "spectrum.intruder_dimensions": (spectrum(),),
        "experiments.continual.forward_transfer": ([0.1, 0.1],),
        "experiments.continual.intransigence": ([0.1, 0.1],),
        "forgetting.forgotten_by_one": ("run",),
        "forgetting.forgetting_interval": (table(),),
        "forgetting.confusion": (3,),
        "forgetting.neighbour_agreement": (torch.randn(20, 3),),
        "forgetting.neighbour_table": (torch.randn(20, 3), ["a"] * 20),
        "spectrum.AfterEnergy": (0.5,),
        "spectrum.HoldingEnergy": (0.5,),
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
        "forgetting.predict_forgetting": (drifts(),),
        "forgetting.rotations": (spectra,),
        "forgetting.turned": ("blocks.0.attn.qkv", spectrum()),
        "spectrum.measures.marchenko_pastur": ((8, 6),),
        "tasks.sequences.orders": (2,),
        "tasks.sequences.rotations": ([0, 10],),
        "tasks.corrupted": ("noise", 1),
        "tasks.few_shot": (2,),
        "tasks.only_classes": ([0, 1],),
        "tasks.permuted": (0,),
        "tasks.rotated": (10,),
        "forgetting.against_baseline": ("LoRA",),
        "forgetting.at_matched_accuracy": (drifts(), 0.5),
        "forgetting.at_matched_update": (drifts(), 0.5),
        "widgets.forgotten_explorer": (task(),),
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


@cache
def source() -> tuple:
    """The embedded vision model and what it knows."""
    model, known = ll.tasks.bundled.vision()
    return model, known.subset(train=8, test=8)


@cache
def attached() -> torch.nn.Module:
    return ll.attach(source()[0], ll.Window.middle(4))


@cache
def of_mlp() -> ll.SpectrumSet:
    return ll.spectra(source()[0], "all-mlp", progress=False)


def of_fc1() -> ll.Spectrum:
    return of_mlp()["blocks.0.mlp.fc1"]


def split(spectrum: object = None, window: object = ll.Window.middle(4), inputs: object = None) -> object:
    spectrum = of_fc1() if spectrum is None else spectrum
    inputs = task().test.inputs if inputs is None else inputs
    return ll.forgetting.feature_split(source()[0], "blocks.0.mlp.fc1", spectrum, window, inputs)


def foreseen(examples: object = None, **named: object) -> object:
    examples = task().train if examples is None else examples
    return ll.forgetting.foresee(source()[0], task(), examples, [ll.Window.middle(4)], **named)


def changed(layers: object) -> object:
    return ll.forgetting.feature_change(source()[0], source()[0], task().test.inputs, layers)


def tuned(**named: object) -> object:
    return ll.finetune(attached(), task(), steps=1, evaluations=2, progress=False, **named)


def without_gradients(mode: Callable) -> object:
    with mode():
        return tuned()


def advised(**named: object) -> object:
    return ll.advise(source()[0], task(), source()[1], **named)


def answers() -> pd.DataFrame:
    return pd.DataFrame(
        {"run": ["a", "b"], "item": [0, 0], "label": [1, 1], "before": [1, 1], "after": [1, 0]}
    )


def continual_table() -> pd.DataFrame:
    row = {"run": "a", "after": 1, "place": 0, "strategy": "Merged", "method": "LoRA", "rank": 4}
    row |= {"position": np.nan, "start": np.nan, "lr": 0.001, "order": "0", "task": "t", "accuracy": 0.5}
    return pd.DataFrame([row | {"retained_before": 0.5, "retained_accuracy": 0.5}])


def words(text: str) -> ll.tasks.Texts:
    return ll.tasks.Texts((text,), (0,))


HUGE = 10**30
# Arguments after the first: what is given, and some words of the answer.
LATER = {
    "drift of other layers": (
        lambda: ll.forgetting.drift(attached(), of_mlp()),
        "no spectrum of 'blocks.0.attn.qkv'",
    ),
    "drift of a path": (
        lambda: ll.forgetting.drift(attached(), "model.safetensors"),
        "spectra must be what ll.spectra",
    ),
    "drift window": (lambda: ll.forgetting.drift(attached(), of_mlp(), window=8), "window must be a window"),
    "drift_between spectra": (lambda: drift_between(source()[0], source()[0], 3), "spectra must be"),
    "rotations of None": (
        lambda: ll.forgetting.rotations(attached(), None),
        "spectra must be",
    ),
    "rotations of other layers": (
        lambda: ll.forgetting.rotations(attached(), of_mlp()),
        "no spectrum of",
    ),
    "rotations count": (
        lambda: ll.forgetting.rotations(attached(), of_mlp(), count="3"),
        "count must be a wh",
    ),
    "rotations threshold": (
        lambda: ll.forgetting.rotations(attached(), of_mlp(), threshold=2),
        "threshold mu",
    ),
    "turned layer": (
        lambda: ll.forgetting.turned(attached(), [], of_fc1()),
        "layer must be the name",
    ),
    "turned spectrum": (
        lambda: ll.forgetting.turned(attached(), "blocks.0.mlp.fc1", of_mlp()),
        "spectrum must",
    ),
    "foresee a task": (lambda: foreseen(task()), "not the task 'digits'; pass task.test"),
    "foresee spectra": (lambda: foreseen(spectra=3), "spectra must be what ll.spectra"),
    "foresee other layers": (lambda: foreseen(spectra=of_mlp(), targets=["qkv"]), "no spectrum of"),
    "evaluate a task": (lambda: ll.evaluate(*source(), examples=task()), "not the task 'digits'; pass task."),
    "evaluate examples": (lambda: ll.evaluate(*source(), examples=3), "examples must be ll.Examples"),
    "evaluate readout": (lambda: ll.evaluate(*source(), 3), "readout must be what task.own_readout"),
    "split by the set": (lambda: split(of_mlp()), "spectrum must be that of the layer"),
    "split by a rank": (lambda: split(window=8), "window must be a window"),
    "split of a task": (lambda: split(inputs=task()), "inputs must be a batch"),
    "split of words": (lambda: split(inputs=torch.zeros(2, 5)), "does not take these inputs"),
    "energies of the set": (
        lambda: ll.forgetting.feature_energies(source()[0], "blocks.0.mlp.fc1", of_mlp(), task().test.inputs),
        "spectrum must be that of the layer",
    ),
    "change layers": (lambda: changed(3), "layers must be a sequence of names"),
    "change no layers": (lambda: changed([]), "layers is empty"),
    "change a number": (lambda: changed([3]), "each of layers must be a module's name"),
    "advise rank": (lambda: advised(rank="x"), "rank must be a whole number"),
    "advise layers": (lambda: advised(targets="nothing"), "nothing"),
    "advise_from weight": (lambda: ll.experiments.advise_from(table(), "x"), "weight must be a number"),
    "advise_from no number": (
        lambda: ll.experiments.advise_from(table(), float("nan")),
        "weight must be 0 or more",
    ),
    "no_grad": (lambda: without_gradients(torch.no_grad), "gradients are off"),
    "inference_mode": (lambda: without_gradients(torch.inference_mode), "gradients are off"),
    "forgotten by a list": (
        lambda: ll.forgetting.forgotten_by(answers(), by=["run"]),
        "by must be the name of a c",
    ),
    "forgotten by one": (
        lambda: ll.forgetting.forgotten_by_one(answers(), 3),
        "by must be the name of a column",
    ),
    "outcomes by numbers": (
        lambda: ll.forgetting.transitions(answers(), by=[3]),
        "each of by must be the name",
    ),
    "heatmap of runs": (
        lambda: ll.plots.accuracy_heatmap(continual_table(), run=["x"]),
        "run must be one of",
    ),
    "overlap of a table": (
        lambda: ll.plots.overlap(pd.DataFrame({"a": [1]})),
        "matrix must be what ll.spectrum",
    ),
    "turned of a table": (lambda: ll.plots.rotation_matrix(pd.DataFrame({"a": [1]})), "turned must be what"),
    "turned of angles": (lambda: ll.plots.rotation_matrix([[2.0]]), "turned must have entries in [0, 1]"),
    "no vectors by name": (lambda: ll.spectra(source()[0], vectors={}), "vectors is empty"),
    "two classes": (
        lambda: ll.Task("t", ("a", "a"), task().train, task().test),
        "several classes called 'a'",
    ),
    "corpus classes": (
        lambda: ll.tasks.Corpus("c", ("a", "a"), words("b"), words("d")),
        "several classes called 'a'",
    ),
    "orders": (lambda: ll.tasks.sequences.orders(HUGE, 2), "count must be at most 1000"),
    "confusion": (lambda: ll.forgetting.confusion(answers(), HUGE), "classes must be at most"),
    "classes of a model": (lambda: ll.tasks.bundled.vision_architecture(HUGE), "num_classes must be at most"),
    "change under no layer": (
        lambda: squared_change(None, None, None),
        "layer must be a layer",
    ),
    "class of no task": (lambda: class_index(None, 0), "task must be a Task"),
    "transitions by nothing": (lambda: ll.forgetting.transitions(answers(), by=[]), "by is empty"),
    "forgotten by one of none": (
        lambda: ll.forgetting.forgotten_by_one(answers(), None),
        "by must be the name",
    ),
    "heatmap of no run": (lambda: ll.plots.accuracy_heatmap(continual_table(), run=HUGE), "has no run 1000"),
    "grid of a word": (lambda: ll.forgetting.patch_grid("x"), "positions must be a whole number"),
    "grid after a word": (
        lambda: ll.forgetting.patch_grid(17, "x"),
        "prefix must be a whole number",
    ),
    "resamples": (
        lambda: ll.forgetting.u_shape_test(None, 1e-3, resamples=HUGE),
        "at most 100000, not 10",
    ),
    "seed": (
        lambda: ll.forgetting.u_shape_test(None, 1e-3, seed=HUGE),
        "seed must be at most 92",
    ),
    "subset seed": (lambda: task().subset(2, 2, seed=HUGE), "seed must be at most"),
    "few_shot seed": (lambda: ll.tasks.few_shot(task(), 1, seed=HUGE), "seed must be at most"),
    "random seed": (lambda: ll.spectrum.RandomComponents(4, seed=HUGE), "seed must be at most"),
    "windows": (lambda: ll.windows(8, count=HUGE), "count must be at most 100000"),
    "grid seed": (lambda: ll.Grid(window=ll.Window.middle(4), seed=[-1]), "seed must be at least 0, not -1"),
    "steps": (lambda: ll.Training(steps=HUGE), "steps must be at most"),
    "batch_size": (lambda: ll.Training(batch_size=HUGE), "batch_size must be at most"),
    "evaluations": (lambda: ll.Training(evaluations=HUGE), "evaluations must be at most"),
}


@pytest.mark.parametrize("name", LATER)
def test_a_bad_later_argument_is_refused_in_words(name):
    call, words = LATER[name]
    with pytest.raises(ll.errors.LoraLensError, match=re.escape(words)):
        call()
