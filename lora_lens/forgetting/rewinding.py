"""Curves from a trained adapter towards the pretrained model, which need no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import pandas as pd
import torch
from torch import nn

from lora_lens._base.errors import InputError
from lora_lens._base.progress import progress_bar
from lora_lens._base.validate import flag, instance, number, sequence, whole_number
from lora_lens.adapters.injection import attached
from lora_lens.adapters.model_card import kind_of
from lora_lens.forgetting.rewind_paths import RewindPath
from lora_lens.forgetting.rewound import FARTHEST, WHOLE, Rewound
from lora_lens.forgetting.temporary_factors import Factors, factors_in, require_rewindable, trained_layers
from lora_lens.forgetting.weight_drift import require_spectra
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.spectrum.svd import product_norm
from lora_lens.tasks.evaluation import Answers, evaluate, example_features
from lora_lens.tasks.own_answers import require_own_answers
from lora_lens.tasks.readouts import HeadReadout, Readout
from lora_lens.tasks.task import Task

USUAL = tuple(i / 10 for i in range(11))


def rewind(
    adapted: nn.Module,
    task: Task,
    retain: Task,
    *,
    t: Sequence[float] = USUAL,
    paths: RewindPath | Sequence[RewindPath] = WHOLE,
    readout: nn.Module | None = None,
    spectra: SpectrumSet | None = None,
    refine: int = 0,
    precision: str = "float32",
    progress: bool = True,
) -> Rewound:
    """What a trained model would do and know if it had moved less: curves in the trade-off plane.

    At t the weights are W + t dW (:class:`lora_lens.forgetting.WholeUpdate`), as in WiSE-FT (Wortsman et al.
    2022, arXiv 2109.01903, section 3), or only a part of dW is scaled: that of the layers that moved
    most (:class:`~lora_lens.forgetting.MostMoved`), in the first components
    (:class:`~lora_lens.forgetting.FirstComponents`), of small singular values
    (:class:`~lora_lens.forgetting.SmallValues`) or of intruder dimensions
    (:class:`~lora_lens.forgetting.Intruders`). Nothing is trained, merged or copied: at each point the
    adapter has other factors, of about twice the rank, while both tasks are asked; then the model is as it
    was, whatever happens.

    A new head of the new task stays as it was trained, and ``modules_to_save`` go back with the whole update.

    Args:
        adapted: from :func:`lora_lens.attach` or :func:`lora_lens.load`, trained.
        task: what it learned.
        retain: what it may have forgotten.
        t: in [0, 1.2]: 0 takes back all that a path scales, 1 is the trained model.
        paths: one way back or several; each gives a curve.
        readout: what reads the new task's answers: the head that was trained beside the model, ``run.head``,
            or a readout such as ``task.own_readout(adapted)``. Default the task's own, of a language model or
            where the model's own head was trained (modules_to_save).
        spectra: of the pretrained model, with all vectors, for the paths that need them; default computed
            here.
        refine: how many more points to try on each path, one after the other beside the one of the largest
            accuracy - forgetting so far, in the middle of the wider gap.
        precision: as for :func:`lora_lens.evaluate`.
        progress: show a bar.

    Raises:
        ValueError: ``adapted`` does not come from :func:`lora_lens.attach`, is merged or disabled, holds NaN,
            has DoRA, or training moved its buffers (batch norms); nothing says how the new task is read;
            ``t`` is empty or out of its range; the spectra are another model's.
        TypeError: an argument is of another type.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> adapted = ll.attach(model, ll.Window.middle(4))
        >>> run = ll.finetune(adapted, task, retain=task, steps=2, batch_size=10, progress=False)
        >>> rewound = ll.rewind(adapted, task, task, t=[0, 0.5, 1], readout=run.head, progress=False)
        >>> rewound.table[["t", "update", "forgetting"]].iloc[0].tolist()  # the pretrained model
        [0.0, 0.0, 0.0]
    """
    peft_model, record = attached(adapted)
    what = "a task, such as from ll.tasks.folder_task or ll.tasks.text_task"
    instance(task, Task, "task", what)
    instance(retain, Task, "retain", f"{what}: what the model may have forgotten")
    places = [
        number(one, "each of t", least=0, most=FARTHEST) for one in sequence(t, "t", "numbers", (int, float))
    ]
    if not places:
        raise InputError("t is empty; give at least one number in [0, 1.2]")
    ways = _checked_paths(paths)
    refine, progress = whole_number(refine, "refine", least=0, most=100), flag(progress, "progress")
    if spectra is not None:
        require_spectra(spectra)
    require_rewindable(adapted)
    new = task_readout(adapted, task, readout)
    retained = retain.own_readout(adapted)

    layers = trained_layers(peft_model, record.starts, spectra)
    moved = {name: layer.moved for name, layer in layers.items()}
    parts = {path: path.parts(moved) for path in ways}
    length = _norm([(layer.moved.b, layer.moved.a) for layer in layers.values()])

    @cache
    def ends(t: float) -> tuple[Answers, Answers]:
        """At the pretrained and at the trained model, which paths share."""
        return answers(WHOLE, t)

    def answers(path: RewindPath, t: float) -> tuple[Answers, Answers]:
        part = parts.get(path) or WHOLE.parts(moved)
        with factors_in(adapted, layers, part, t, whole=path == WHOLE):
            return tuple(
                evaluate(adapted, asked, by, precision=precision)
                for asked, by in ((task, new), (retain, retained))
            )

    def row(path: RewindPath, t: float) -> dict[str, object]:
        shared = t == 1 or (t == 0 and path == WHOLE)
        learned, kept = ends(t) if shared else answers(path, t)
        left = _norm([layer.update(t, parts[path][name]) for name, layer in layers.items()])
        bar.update()
        return {
            "path": str(path),
            "t": t,
            "update": left / length if length else 0.0,
            "accuracy": learned.accuracy,
            "test_loss": learned.loss,
            "retained_accuracy": kept.accuracy,
            "retained_loss": kept.loss,
        }

    count = len(ways) * (len(set(places)) + refine)
    with progress_bar(shown=progress, total=count, desc="rewind", unit="point") as bar:
        before = ends(0.0)[1]
        require_own_answers(retain, before)
        tables = []
        for path in ways:
            rows = [row(path, one) for one in sorted(set(places))]
            for _ in range(refine):
                if (middle := _beside_best(rows, before)) is None:
                    break
                rows = sorted([*rows, row(path, middle)], key=lambda found: found["t"])
            tables.append(pd.DataFrame(rows))
    table = pd.concat(tables, ignore_index=True)
    table.insert(5, "retained_before", before.accuracy)
    table["forgetting"] = table["retained_before"] - table["retained_accuracy"]
    table["loss_rise"] = table["retained_loss"] - before.loss
    named = ((one.name, kind_of(one)) for one in (task, retain))
    return Rewound(table, *named, adapted, layers, parts)


def task_readout(adapted: nn.Module, task: Task, readout: nn.Module | None) -> Readout:
    """What reads the new task's answers.

    Raises:
        ValueError: nothing says what, or a head has another number of classes or of features.
        TypeError: ``readout`` is something else.
    """
    expected = "the trained head, run.head, or what task.own_readout(adapted) gives"
    instance(readout, (nn.Module, type(None)), "readout", expected)
    if isinstance(readout, nn.Linear):
        if readout.out_features != len(task.classes):
            raise InputError(
                f"{task.name} has {len(task.classes)} classes, and the head has {readout.out_features}: give "
                "the head that was trained for this task"
            )
        one = task.test.take(torch.arange(1))
        if (width := example_features(adapted, task, one).shape[-1]) != readout.in_features:
            raise InputError(
                f"the head reads {readout.in_features} features, and this model gives {width}: give the head "
                "that was trained beside it"
            )
        return HeadReadout(readout, task.pooling)
    if readout is not None:
        return instance(readout, Readout, "readout", expected)
    peft_model, _ = attached(adapted)
    own_head = task.head is not None or peft_model.planned_whole
    if not own_head and isinstance(task.new_readout(adapted, 0), HeadReadout):
        raise InputError(
            f"{task.name} was learned through a head of its own, which an adapter does not hold: pass "
            "readout=run.head, or readout=task.own_readout(adapted) if the model's own head answers"
        )
    return task.own_readout(adapted)


def _checked_paths(paths: object) -> tuple[RewindPath, ...]:
    found = (paths,) if hasattr(paths, "parts") else sequence(paths, "paths", "ways back")
    for path in found:
        if not callable(getattr(path, "parts", None)) or isinstance(path, type):
            raise InputError(f"each of paths must be one such as ll.forgetting.WholeUpdate(), not {path!r}")
    if not found or len(set(map(str, found))) < len(found):
        raise InputError("paths must hold at least one way back, and none of them twice")
    return found


def _norm(updates: Sequence[Factors]) -> float:
    """Of all layers' updates together."""
    return float(sum(product_norm(b, a).square() for b, a in updates) ** 0.5)


def _beside_best(rows: Sequence[Mapping[str, float]], before: Answers) -> float | None:
    """The middle of the wider gap beside the best point so far; None where there is no gap left."""
    values = [row["accuracy"] - (before.accuracy - row["retained_accuracy"]) for row in rows]
    best = max(range(len(rows)), key=lambda i: (values[i], rows[i]["t"]))
    beside = [rows[i]["t"] for i in (best - 1, best + 1) if 0 <= i < len(rows)]
    middle = max(
        ((rows[best]["t"] + other) / 2 for other in beside),
        key=lambda m: abs(m - rows[best]["t"]),
        default=None,
    )
    return None if middle is None or abs(middle - rows[best]["t"]) < 1e-3 else middle
