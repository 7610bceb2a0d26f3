"""What training did, from its two ends: a pretrained model and a trained one, in memory or on disk."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from lora_lens._base.errors import InputError, InputTypeError, MissingFileError
from lora_lens._base.naming import block_and_kind, listed
from lora_lens._base.random_state import seeded
from lora_lens._base.validate import instance, sequence, shown
from lora_lens.adapters.adopting import adopt, require_ordinary
from lora_lens.adapters.copying import copy_around
from lora_lens.adapters.injection import (
    attached,
    lora_layers,
    require_enabled,
    require_unadapted,
    require_unmerged,
)
from lora_lens.adapters.peft_names import ADAPTER, PREFIX
from lora_lens.adapters.pretrained import matrices_of, require_same
from lora_lens.adapters.replacing import ABOUT, CONFIG, place_of
from lora_lens.adapters.saving import load, weight_digests
from lora_lens.adapters.start import Start, effective_weight, is_dora, trained_update
from lora_lens.forgetting.weight_drift import drift, drift_between, start_rows
from lora_lens.spectrum.sources.adapters import FILE
from lora_lens.spectrum.sources.checkpoint import headers, read_json, read_safetensors
from lora_lens.spectrum.sources.matrices import weights
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.spectrum.svd import product_norm
from lora_lens.tasks.evaluation import evaluate
from lora_lens.tasks.own_answers import require_own_answers
from lora_lens.tasks.task import Task

STEP = re.compile(r"checkpoint-(\d+)")
Place = nn.Module | str | Path


@dataclass(frozen=True, eq=False)
class Measured:
    """What :func:`lora_lens.measure` found.

    Attributes:
        table: one row per retained task: task (its name), before, after (accuracies in [0, 1]), forgetting
            (before - after), loss_before, loss_after and loss_rise (in nats per item, of a language task per
            token).
        drift: one row per layer: layer, block, kind, update (||dW||_F), norm (||W||_F) and relative, their
            ratio; with spectra, all columns of :func:`lora_lens.forgetting.drift`.
    """

    table: pd.DataFrame
    drift: pd.DataFrame = field(repr=False)

    @property
    def relative(self) -> float:
        """How far all layers together moved, sqrt(sum ||dW||_F^2 / sum ||W||_F^2)."""
        squares = (self.drift[["update", "norm"]] ** 2).sum()
        return float(np.sqrt(squares["update"] / squares["norm"]))


def measure(
    before: Place,
    after: Place,
    retain: Task | Sequence[Task],
    *,
    start: str | Path | None = None,
    like: nn.Module | None = None,
    spectra: SpectrumSet | None = None,
    precision: str = "float32",
) -> Measured:
    """What a trained model forgot, and how far each layer moved, against the pretrained model.

    Both may be on disk, and ``after`` with its adapter or merged. ``before`` is the pretrained model: the
    base of an adapted model may hold a residual, which nobody should compare with.

    Args:
        before: the pretrained model, without adapters; or a folder of transformers' ``save_pretrained``, or
            a safetensors file of the weights of ``like``.
        after: the trained model, adapted or not; or such a folder or file; or the folder of an adapter, from
            :func:`lora_lens.save`, :func:`lora_lens.export`, PEFT or a trainer.
        retain: what the model could do before: one task or several.
        start: what :func:`lora_lens.save` wrote before training, where ``after`` is a trainer's checkpoint of
            a window: its factors fit a residual that only the start can form.
        like: a model whose code the safetensors files belong to.
        spectra: of the pretrained model, with all vectors, to say where each weight moved.
        precision: as for :func:`lora_lens.evaluate`.

    Raises:
        ValueError: ``before`` is adapted; the adapter belongs to another model, or to a base that is not
            known; a task does not fit; a file is damaged.
        FileNotFoundError: there is no such folder or file.
        TypeError: an argument is of another type.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU())
        >>> model.fc = torch.nn.Linear(8, 2)
        >>> images = ll.Examples(torch.randn(20, 1, 4, 4), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> adapted = ll.attach(model, ll.Window.first(2), targets="1")  # and train it
        >>> with TemporaryDirectory() as folder:
        ...     _ = ll.export(adapted, folder)
        ...     measured = ll.measure(model, folder, retain=task)
        >>> measured.table[["task", "forgetting"]].values.tolist()
        [['noise', 0.0]]
    """
    tasks = _tasks(retain)
    before = opened(before, "before", like)
    require_unadapted(before)
    after = trained_model(after, before, start, like)
    rows = []
    for task in tasks:
        old = evaluate(before, task, task.own_readout(before), precision=precision)
        require_own_answers(task, old)
        new = evaluate(after, task, task.own_readout(after), precision=precision)
        rows.append(
            {
                "task": task.name,
                "before": old.accuracy,
                "after": new.accuracy,
                "forgetting": old.accuracy - new.accuracy,
                "loss_before": old.loss,
                "loss_after": new.loss,
                "loss_rise": new.loss - old.loss,
            }
        )
    return Measured(pd.DataFrame(rows), moves(before, after, spectra))


class Growth(pd.DataFrame):
    """What :func:`growth` returns; a part of it is an ordinary table.

    Attributes:
        layers: one row per checkpoint and layer: step, layer, block, kind, update (||dW||_F), norm (||W||_F)
            and relative, their ratio; with spectra, all columns of :func:`lora_lens.forgetting.drift`.
    """

    _metadata = ["layers"]  # noqa: RUF012 - pandas's name and type
    layers: pd.DataFrame


def growth(
    folder: str | Path,
    model: nn.Module,
    retain: Task | None = None,
    *,
    start: str | Path | None = None,
    spectra: SpectrumSet | None = None,
    precision: str = "float32",
) -> Growth:
    """How an adapter grew over the checkpoints that a trainer kept, and what the model forgot meanwhile.

    Args:
        folder: the trainer's, with folders checkpoint-<step>.
        model: the pretrained model, without adapters.
        retain: what it could do before; default None, no scores.
        start: what :func:`lora_lens.save` wrote before training, of a window.
        spectra: of ``model``, with all vectors, to say how far the singular bases turned.
        precision: as for :func:`lora_lens.evaluate`.

    Returns:
        One row for step 0, the pretrained model, and one per checkpoint, by step. Columns: step; update, the
        norm of all layers' updates together, sqrt(sum ||dW||_F^2); relative, its share of the weights' norm;
        with spectra rotation, the share of what lies off the diagonal of U^T dW V, which to first order turns
        singular vectors; with ``retain`` retained_accuracy, forgetting and loss_rise (in nats). Each layer's
        are in its attribute ``layers``, a table of their own.

    Raises:
        ValueError: the folder is no trainer's, a checkpoint holds no adapter or that of another model, or as
            :func:`lora_lens.measure`.
        FileNotFoundError: there is no such folder.
        TypeError: an argument is of another type.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> adapted = ll.attach(model, ll.LoRA(2), targets="0")
        >>> with TemporaryDirectory() as folder:
        ...     for step in (10, 20):  # as a trainer does
        ...         _ = adapted.get_parameter("base_model.model.0.lora_B.default.weight").data.add_(0.1)
        ...         adapted.save_pretrained(f"{folder}/checkpoint-{step}")
        ...     table = ll.forgetting.growth(folder, model)
        >>> table["step"].tolist(), table["update"].is_monotonic_increasing
        ([0, 10, 20], True)
    """
    instance(retain, (Task, type(None)), "retain", "a task, or None")
    folder = place_of(folder)
    instance(model, nn.Module, "model", "the pretrained model")
    require_unadapted(model)
    steps = _checkpoints(folder)
    readout = None if retain is None else retain.own_readout(model)
    old = None if retain is None else evaluate(model, retain, readout, precision=precision)
    if retain is not None and old is not None:
        require_own_answers(retain, old)
    first: dict[str, object] = {"step": 0, "update": 0.0, "relative": 0.0}
    if spectra is not None:
        first["rotation"] = 0.0
    if old is not None:
        first |= {"retained_accuracy": old.accuracy, "forgetting": 0.0, "loss_rise": 0.0}
    rows, layers = [first], []
    for step, place in steps.items():
        adapted = trained_model(place, model, start, None)
        moved = moves(model, adapted, spectra)
        layers.append(moved.assign(step=step))
        update, norm = (float(np.sqrt((moved[column] ** 2).sum())) for column in ("update", "norm"))
        row: dict[str, object] = {"step": step, "update": update, "relative": update / norm}
        if spectra is not None:
            turned = moved["update"] ** 2 * (1 - moved["outside"]) * (1 - moved["diagonal"])
            row["rotation"] = float(np.sqrt(turned.fillna(0).sum())) / norm
        if retain is not None and old is not None:
            new = evaluate(adapted, retain, readout, precision=precision)
            row |= {
                "retained_accuracy": new.accuracy,
                "forgetting": old.accuracy - new.accuracy,
                "loss_rise": new.loss - old.loss,
            }
        rows.append(row)
    table = Growth(rows)
    table.layers = pd.concat(layers, ignore_index=True)
    return table


def trained_model(
    after: Place, before: nn.Module, start: str | Path | None, like: nn.Module | None
) -> nn.Module:
    """The trained model, from wherever it is.

    Raises:
        ValueError, FileNotFoundError, TypeError: as :func:`lora_lens.measure`.
    """
    if not isinstance(after, nn.Module):
        instance(after, (str, Path), "after", "a model, or the path of one or of an adapter")
        folder = place_of(after, "after")
        if start is not None:
            return load(before, start, checkpoint=folder)
        if (folder / ABOUT).is_file():
            return load(before, folder)
        if (folder / CONFIG).is_file():
            return _with_adapter(before, folder)
        return opened(folder, "after", before if like is None else like)
    if not isinstance(after, PeftModel) or not hasattr(after, "attachment"):
        return after
    peft_model, record = attached(after)
    require_unmerged(peft_model)
    require_enabled(peft_model)
    digests = weight_digests(peft_model, record)
    read = matrices_of(before, list(digests))
    for name, digest in digests.items():
        require_same(name, read[name](), digest)
    return after


def opened(model: Place, name: str, like: nn.Module | None) -> nn.Module:
    """A model itself, or from a folder of transformers' or a safetensors file.

    Raises:
        ValueError, FileNotFoundError, TypeError: it cannot be read.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, (str, Path)):
        raise InputTypeError(f"{name} must be a model, or the path of one, not {shown(model)}")
    place = place_of(model, name)
    if not place.exists():
        raise MissingFileError(
            f"there is no file or folder {place}; {name} must be a model or where one lies"
        )
    if (place / CONFIG).is_file():
        raise InputError(f"{place} holds an adapter, and {name} must be a whole model")
    if (place / "config.json").is_file():
        settings = json.loads((place / "config.json").read_text())
        named = str((settings.get("architectures") or ["no architecture"])[0])
        kind = getattr(transformers, named, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise InputError(
                f"{place} names {named}, which is no model of transformers: pass the model itself"
            )
        return kind.from_pretrained(place, local_files_only=True).eval()
    file = place / "model.safetensors" if place.is_dir() else place
    if not file.is_file() or file.suffix != ".safetensors":
        raise InputError(
            f"{place} holds neither config.json beside its weights, as transformers writes them, nor "
            "model.safetensors; load the model yourself and pass it"
        )
    if like is None:
        raise InputError(f"{file} holds weights without the model's code: pass like=, a model of that code")
    found = copy.deepcopy(instance(like, nn.Module, "like", "a model"))
    state = read_safetensors(file)
    missing, unknown = found.load_state_dict(state, strict=False)
    if missing or unknown:
        raise InputError(f"{file} is of another model: {listed([*missing, *unknown], most=3)} differ")
    return found.eval()


def moves(before: nn.Module, after: nn.Module, spectra: SpectrumSet | None) -> pd.DataFrame:
    """One row per layer: how far its weight moved, see :class:`Measured`."""
    if hasattr(after, "attachment"):
        if spectra is not None:
            return drift(after, spectra)
        peft_model, record = attached(after)
        require_unmerged(peft_model)
        found = {
            name: _size(layer, record.starts.get(name)) for name, layer in lora_layers(peft_model).items()
        }
    elif isinstance(after, PeftModel):
        return moves(before, adopt(after), spectra)
    elif spectra is not None:
        return drift_between(before, after, spectra)
    else:
        require_unadapted(after)  # the base of an adapter is not the trained model
        names = [weight.name for weight in weights(before)]
        old, new = matrices_of(before, names), matrices_of(after, names)
        found = {name: _difference(name, old[name](), new[name]()) for name in names}
    rows: list[Mapping[str, object]] = []
    for name, (update, norm) in found.items():
        block, kind = block_and_kind(name)
        places = {"layer": name, "block": block, "kind": kind}
        rows.append(places | {"update": update, "norm": norm, "relative": update / norm if norm else np.nan})
    return pd.DataFrame(rows)


def _size(layer: nn.Module, start: Start | None) -> tuple[float, float]:
    pretrained = start_rows(layer, start, slice(None))
    if is_dora(layer):
        update = torch.linalg.norm(effective_weight(layer) - pretrained)
    else:
        update = product_norm(*trained_update(layer, start))
    return float(update), float(torch.linalg.norm(pretrained))


def _difference(name: str, old: Tensor, new: Tensor) -> tuple[float, float]:
    if old.shape != new.shape:
        raise InputError(f"{name} has shape {tuple(old.shape)} before and {tuple(new.shape)} after")
    old, new = old.detach().cpu().double(), new.detach().cpu().double()
    return float(torch.linalg.norm(new - old)), float(torch.linalg.norm(old))


def _with_adapter(before: nn.Module, folder: Path) -> nn.Module:
    """The pretrained model with an adapter that PEFT wrote; it shares what loading leaves alone."""
    read_json(folder / CONFIG)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError) as error:  # as PEFT has it of kinds and settings that it does not know
        raise InputError(
            f"{folder / CONFIG} is no config that this version of PEFT knows: {error}"
        ) from error
    try:  # before PEFT makes a start that changes the weights, such as OLoRA's
        require_ordinary({ADAPTER: config})
    except InputError as error:
        raise InputError(f"{folder}: {error}; that folder of ll.save goes in here as start=") from error
    written = headers(folder / FILE) if (folder / FILE).is_file() else None
    names = before.named_parameters(remove_duplicate=False)
    # An embedding that PEFT wrote along replaces the one in the model.
    replaced = {id(p) for name, p in names if written is None or PREFIX + name in written}
    base = copy_around(before, [p for p in before.parameters() if id(p) not in replaced])
    try:
        with seeded(0):  # PEFT draws factors before it reads those of the file
            adapted = PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise InputError(f"{folder} holds an adapter of another model: {reason}") from error
    return adopt(adapted)


def _checkpoints(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        raise MissingFileError(f"there is no folder {folder}")
    found = {int(m[1]): path for path in folder.iterdir() if (m := STEP.fullmatch(path.name))}
    if not found:
        raise InputError(f"{folder} holds no folder checkpoint-<step>, as a trainer writes them")
    if without := [p.name for p in found.values() if not (p / CONFIG).is_file()]:
        raise InputError(f"{folder}: {listed(sorted(without), most=3)} holds no {CONFIG}, so no adapter")
    return dict(sorted(found.items()))


def _tasks(retain: object) -> tuple[Task, ...]:
    if retain is None:
        raise InputTypeError(
            "retain must be a task that the model could do before, or several, not None; without labels, "
            "ll.tasks.agreement(model, inputs) makes one"
        )
    tasks = sequence(retain, "retain", "tasks", one=Task)
    for task in tasks:
        instance(task, Task, "each of retain", "a task, such as from ll.tasks.folder_task")
    if not tasks:
        raise InputError("retain is empty; give at least one task that the model could do before")
    return tasks
