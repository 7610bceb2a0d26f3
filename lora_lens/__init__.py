"""Which part of a pretrained model's spectrum should LoRA train, and what does it cost in forgetting?

import lora_lens as ll

model, source = ll.embedded.vision()
spectra = ll.spectra(model)
adapted = ll.attach(model, ll.Window(rank=8, position=0.5), spectra=spectra)
run = ll.finetune(adapted, ll.embedded.digits(), retain=source)
"""

from importlib import import_module

from lora_lens import (
    comparison,
    continual_metrics,
    embedded,
    embedded_texts,
    errors,
    fronts,
    items,
    memories,
    metrics,
    neighbours,
    penalties,
    placement,
    predictors,
    rotation,
    spectral_metrics,
    strategies,
    task_sequences,
    task_variants,
    tradeoffs,
)
from lora_lens.adapter import attach, detach
from lora_lens.advisor import Advice, advise_from
from lora_lens.comparison import compare
from lora_lens.continual import continual, continual_drifts, continual_runs
from lora_lens.corpus import Corpus, Texts
from lora_lens.drift import drift
from lora_lens.evaluation import evaluate
from lora_lens.exactness import function_error, summary
from lora_lens.exporting import export, export_residual
from lora_lens.feature_change import feature_change
from lora_lens.features import feature_split
from lora_lens.folders import folder_task
from lora_lens.foresight import foresee
from lora_lens.hub_texts import dataset_corpus, hub_corpus
from lora_lens.methods import FullFineTuning, LinearProbe, LoRA, PeftStart, Penalized, Variant
from lora_lens.peft_starts import attach_start
from lora_lens.pilot import advise
from lora_lens.probe import probed
from lora_lens.replies import replies, replies_before_after
from lora_lens.saving import load, save
from lora_lens.spectrum import Spectrum, SpectrumSet, spectra
from lora_lens.store import answers, curves, drifts, experiment, pack, runs, watched
from lora_lens.sweep import Grid, sweep
from lora_lens.tasks import Examples, Task
from lora_lens.text_files import text_corpus
from lora_lens.text_tasks import label_word_task, language_task, text_task
from lora_lens.training import Progress, Run, Training, finetune
from lora_lens.u_shape import u_shape_test
from lora_lens.window import Window, windows

__version__ = "0.1.0"
__all__ = [
    "Advice",
    "Corpus",
    "Examples",
    "FullFineTuning",
    "Grid",
    "LinearProbe",
    "LoRA",
    "PeftStart",
    "Penalized",
    "Progress",
    "Run",
    "Spectrum",
    "SpectrumSet",
    "Task",
    "Texts",
    "Training",
    "Variant",
    "Window",
    "advise",
    "advise_from",
    "answers",
    "attach",
    "attach_start",
    "compare",
    "comparison",
    "continual",
    "continual_drifts",
    "continual_metrics",
    "continual_runs",
    "curves",
    "dataset_corpus",
    "detach",
    "drift",
    "drifts",
    "embedded",
    "embedded_texts",
    "errors",
    "evaluate",
    "experiment",
    "export",
    "export_residual",
    "feature_change",
    "feature_split",
    "finetune",
    "folder_task",
    "foresee",
    "fronts",
    "function_error",
    "hub_corpus",
    "items",
    "label_word_task",
    "language_task",
    "load",
    "memories",
    "metrics",
    "neighbours",
    "pack",
    "penalties",
    "placement",
    "plots",
    "predictors",
    "probed",
    "replies",
    "replies_before_after",
    "report",
    "rotation",
    "runs",
    "save",
    "spectra",
    "spectral_metrics",
    "strategies",
    "summary",
    "sweep",
    "task_sequences",
    "task_variants",
    "text_corpus",
    "text_task",
    "tradeoffs",
    "u_shape_test",
    "watched",
    "widgets",
    "windows",
]


def __getattr__(name: str) -> object:
    """Import what draws when it is first used, not before."""
    if name in ("plots", "widgets"):
        return import_module(f"lora_lens.{name}")
    if name == "report":
        return import_module("lora_lens.sweep_report").report
    raise AttributeError(f"module 'lora_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "plots", "report", "widgets"])
