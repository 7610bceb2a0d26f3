"""Pictures of single examples: which classes are taken for which, and what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import instance, numbers, sequence, whole_number
from lora_lens.plots._style import house_style, literal, some_axes, styled
from lora_lens.plots.texts import show_text, text_axes
from lora_lens.plots.windows import show_image
from lora_lens.tasks.task import Task

IN_A_ROW = 8
MOST_ANNOTATED = 20  # classes; the numbers of more would overlap


@styled
def confusion(counts: np.ndarray, classes: Sequence[str], *, ax: Axes) -> Axes:
    """How often each class (row) was taken for each class (column), in percent of the row.

    Cells from 0.5% on hold their number; with more than 20 classes a colour bar stands for all.

    Args:
        counts: (classes, classes), from :func:`lora_lens.forgetting.confusion`. Rows without examples stay
            empty.
        classes: their names.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: the shape of ``counts`` is not that of the classes.

    Example:
        >>> import lora_lens as ll, numpy as np
        >>> [text.get_text() for text in ll.plots.confusion(np.array([[9, 1], [5, 5]]), ["cat", "dog"]).texts]
        ['90', '10', '50', '50']
    """
    counts = numbers(counts, "counts")
    classes = [literal(name) for name in sequence(classes, "classes", "the classes' names")]
    if counts.shape != (len(classes), len(classes)):
        raise InputError(f"expected counts of shape {(len(classes),) * 2}, not {counts.shape}")
    with np.errstate(invalid="ignore"):
        percent = 100 * counts / counts.sum(1, keepdims=True)
    shown = np.where(percent >= 0.5, np.char.mod("%.0f", np.nan_to_num(percent)), "")
    annotated = len(classes) <= MOST_ANNOTATED
    sns.heatmap(
        percent,
        ax=ax,
        cmap="Blues",
        vmin=0,
        vmax=100,
        annot=shown if annotated else None,
        fmt="",
        annot_kws={"fontsize": 8.5 if len(classes) > 6 else 11},
        cbar=not annotated,
        cbar_kws=None if annotated else {"label": "% of the true class"},
        square=True,
        xticklabels=classes,
        yticklabels=classes,
    )
    ax.tick_params(axis="x", rotation=90)
    ax.tick_params(axis="y", rotation=0)
    if not annotated:
        ax.tick_params(labelsize=7)
    ax.set(xlabel="predicted", ylabel="true class", title="Confusion (% of the true class)")
    ax.grid(False)
    return ax


def forgotten_examples(
    task: Task, forgotten: pd.DataFrame, count: int = 16, *, axes: np.ndarray | None = None
) -> np.ndarray:
    """The first of a table of forgotten examples, with their class, what replaced it, and how often.

    Images of a task of images, and of a classification of texts the texts, as far as there is room.

    Args:
        task: the retained task; ``forgotten`` counts its test examples from 0.
        forgotten: from :func:`lora_lens.forgetting.forgotten_by` (item, label, share, instead).
        count: how many to show; fewer if there are fewer.
        axes: to draw on, at least as many as examples; the rest are emptied. Default: a new pyplot figure.

    Returns:
        The Axes.

    Raises:
        ValueError: there is nothing to show, an item is not among the test examples, a column is missing, too
            few ``axes``, or the task is one of neither images nor classified texts.

    Example:
        >>> import lora_lens as ll, pandas as pd, torch
        >>> images = ll.Examples(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]))
        >>> clothes = ll.Task("clothes", ("shirt", "coat"), images, images)
        >>> forgotten = {"item": [0, 3], "label": [0, 1], "share": [1.0, 0.5], "instead": [1, 0]}
        >>> ll.plots.forgotten_examples(clothes, pd.DataFrame(forgotten)).shape
        (1, 2)
    """
    kind = shown_as(task)
    columns = ["item", "label", "share", "instead"]
    source = "ll.forgetting.forgotten_by"
    forgotten = checked(forgotten, columns, "the table of forgotten examples", source, empty=True)
    rows = forgotten.head(whole_number(count, "count", least=1))
    if rows.empty:
        raise InputError("the table has no examples: none was forgotten")
    if not rows["label"].between(0, len(task.classes) - 1).all():
        raise InputError(
            f"some labels are not among the {len(task.classes)} classes of {task.name}; pass the "
            "retained task of the sweep"
        )
    if rows["item"].max() >= len(task.test):
        raise InputError(
            f"item {rows['item'].max()} is not among the {len(task.test)} test {kind} of {task.name}; "
            "pass the retained task of the sweep"
        )
    with house_style():
        if axes is None and kind == "images":
            wide = min(IN_A_ROW, len(rows))
            tall = -(-len(rows) // wide)
            axes = plt.subplots(tall, wide, figsize=(1.35 * wide, 1.75 * tall), squeeze=False)[1]
        elif axes is None:
            axes = text_axes([task.test.texts[item] for item in rows["item"]])
        flat = some_axes(axes, len(rows), kind)
        for ax in flat:
            ax.axis("off")
        for ax, row in zip(flat, rows.itertuples(), strict=False):
            right = task.classes[int(row.label)]
            instead = "" if pd.isna(row.instead) else f"\N{RIGHTWARDS ARROW} {task.classes[int(row.instead)]}"
            told = [part for part in (right, instead, f"{row.share:.0%} of runs") if part]
            if kind == "texts":
                show_text(ax, task.test.texts[int(row.item)], "  ".join(told))
            else:
                show_image(ax, task.test.batch(torch.tensor([int(row.item)]))[0])
                ax.set_title(literal("\n".join(told)), fontsize=8.5, loc="center")
    return axes


def shown_as(task: Task) -> str:
    """What a task's examples are to a person: "images" or "texts".

    Raises:
        ValueError: they are neither, or have no classes.
    """
    instance(task, Task, "the task", "a Task, such as the retained one of the sweep")
    if not task.classes:
        raise InputError(
            f"{task.name} has no classes: its items are the tokens that it predicts, which are no examples "
            "to show one by one; look at its loss_rise, or at a classification"
        )
    if getattr(task.test, "texts", None) is not None:
        return "texts"
    if getattr(getattr(task.test, "inputs", None), "ndim", None) == 4:
        return "images"
    raise InputError(
        f"the examples of {task.name} are neither images, (channels, height, width), nor texts that were "
        "kept, so there is nothing to show"
    )
