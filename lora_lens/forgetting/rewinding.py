"""Going back from a trained adapter towards the pretrained model, along curves that need no training.

An adapted layer computes W + scaling (X - B_0 A_0) for whatever product X of factors it is given, in the
residual form because its base holds W - scaling B_0 A_0. So X = t B A + (1 - t) B_0 A_0 makes it W + t dW:
the base is not touched, and all that a point needs is factors of twice the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.naming import counted, listed
from lora_lens._base.progress import progress_bar
from lora_lens._base.validate import choice, flag, instance, number, sequence, whole_number
from lora_lens.adapters.exporting import write_updates
from lora_lens.adapters.injection import (
    attached,
    lora_layers,
    moved_buffers,
    require_unmerged,
    whole_modules,
)
from lora_lens.adapters.model_card import Score, kind_of
from lora_lens.adapters.peft_names import ADAPTER
from lora_lens.adapters.stacks import StackedLayer
from lora_lens.adapters.start import Start, factor_matrix, is_dora, trained_update
from lora_lens.forgetting.rewind_paths import Moved, Part, RewindPath, WholeUpdate
from lora_lens.forgetting.weight_drift import (
    require_finite,
    require_spectra,
    require_start_of,
    some_rows,
    spectrum_of,
    start_rows,
)
from lora_lens.spectrum.adaptable_layers import weight_of
from lora_lens.spectrum.factorizing import factorize
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum.svd import product_norm
from lora_lens.tasks.evaluation import Answers, evaluate
from lora_lens.tasks.readouts import HeadReadout, Readout
from lora_lens.tasks.task import Task

FARTHEST = 1.2
USUAL = tuple(i / 10 for i in range(11))
LOST = ("forgetting", "loss_rise")
WHOLE = WholeUpdate()
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Point:
    """One point of a curve, with its scores as in :attr:`Rewound.table`.

    Example:
        >>> import lora_lens as ll
        >>> ll.forgetting.Point(ll.forgetting.WholeUpdate(), 0.5, 0.9, 0.8, 0.1, 0.3)
        <whole update at t = 0.5: accuracy 90.0%, forgetting 10.0 points>
    """

    path: RewindPath
    t: float
    accuracy: float
    retained_accuracy: float
    forgetting: float
    loss_rise: float

    def __repr__(self) -> str:
        scores = f"accuracy {100 * self.accuracy:.1f}%, forgetting {100 * self.forgetting:.1f} points"
        return f"<{self.path} at t = {self.t:g}: {scores}>"


@dataclass(frozen=True, eq=False)
class _Layer:
    """The factors of one layer as they were when it was rewound, and those that it started from."""

    b: Tensor
    a: Tensor
    start: Factors | None
    scaling: float
    moved: Moved

    def factors(self, t: float, part: Part) -> Factors:
        """What makes the layer compute W + t dW + (1 - t) K, in its dtype and on its device."""
        of_update, of_part = part.coefficients(t)
        terms = [(of_update, self.b, self.a)]
        if self.start is not None:
            terms.append((1 - of_update, *self.start))
        if part.b is not None:
            terms.append((of_part / self.scaling, part.b, part.a))
        terms = [term for term in terms if term[0]] or [(0.0, self.b[:, :1], self.a[:1])]
        if terms[0][0] == 1 and len(terms) == 1:
            return terms[0][1:]
        exact = torch.promote_types(self.b.dtype, torch.float32)
        place = {"device": self.b.device, "dtype": exact}
        b = torch.cat([c * factor.to(**place) for c, factor, _ in terms], dim=1)
        a = torch.cat([factor.to(**place) for _, _, factor in terms])
        return b.to(self.b.dtype), a.to(self.a.dtype)

    def update(self, t: float, part: Part) -> Factors:
        """Factors of t dW + (1 - t) K."""
        of_update, of_part = part.coefficients(t)
        b, a = self.moved.b, self.moved.a
        if part.b is None or of_part == 0:
            return of_update * b, a
        if of_update == 0:
            return of_part * part.b.to(b.dtype), part.a.to(a.dtype)
        return torch.cat([of_update * b, of_part * part.b.to(b.dtype)], dim=1), torch.cat(
            [a, part.a.to(a.dtype)]
        )


@dataclass(frozen=True, eq=False)
class Rewound:
    """Curves from the trained towards the pretrained model, and every point of them to go to.

    Attributes:
        table: one row per point, by path and ascending t. Columns: path (in words); t; update, the norm of
            what is left of the update as a share of the trained one's; accuracy and test_loss, on the new
            task; retained_before, retained_accuracy, retained_loss; forgetting, retained_before -
            retained_accuracy; loss_rise, in nats. Before is the pretrained model.
        task, retain: of both tasks the name, and the hub's word for what is done there.
    """

    table: pd.DataFrame
    task: tuple[str, str]
    retain: tuple[str, str]
    _adapted: nn.Module
    _layers: Mapping[str, _Layer]
    _parts: Mapping[RewindPath, Mapping[str, Part]]

    def __repr__(self) -> str:
        paths, points = counted(len(self._parts), "path"), counted(len(self.table), "point")
        return f"<Rewound of {paths}, {points}; best: {self.best()!r}>"

    def best(
        self,
        weight: float = 1.0,
        *,
        accuracy: float | None = None,
        score: str = "forgetting",
        path: RewindPath | None = None,
    ) -> Point:
        """The point with the largest accuracy - ``weight`` * ``score``; of equal ones that of the largest t.

        The best of many points looks better than it is on the examples that it was chosen by: choose on
        some and report others, as ``dataclasses.replace(task, test=...)`` makes them.

        Args:
            weight: what a unit of the score costs, at least 0.
            accuracy: in its place: the least score among the points of at least this accuracy, in [0, 1].
            score: "forgetting", or "loss_rise" in nats, which tells more of language models.
            path: among its points only; default all.

        Raises:
            ValueError: no point is as accurate, or ``path`` is none of these.
            TypeError: an argument is of another type.
        """
        weight = number(weight, "weight", least=0)
        choice(score, "score", LOST)
        rows = self.table if path is None else self.table[self.table["path"] == str(self._known(path))]
        if accuracy is None:
            value = rows["accuracy"] - weight * rows[score]
        else:
            accuracy = number(accuracy, "accuracy", least=0, most=1)
            reached = rows[rows["accuracy"] >= accuracy]
            if reached.empty:
                raise InputError(
                    f"no point has an accuracy of {accuracy:g}; the largest is {rows['accuracy'].max():g}"
                )
            value = -reached[score]
        row = rows.loc[rows.loc[value[value == value.max()].index, "t"].idxmax()]
        names = {str(known): known for known in self._parts}
        scores = ("accuracy", "retained_accuracy", "forgetting", "loss_rise")
        return Point(names[row["path"]], float(row["t"]), *(float(row[name]) for name in scores))

    @contextmanager
    def at(self, t: float | Point, path: RewindPath | None = None) -> Iterator[nn.Module]:
        """The adapted model at a point, for as long as a ``with`` block lasts; then it is as before.

        Args:
            t: in [0, 1.2], whether it was measured or not; or a point from :meth:`best`.
            path: which way; default the first.

        Raises:
            ValueError: ``t`` is out of its range, ``path`` is none of those that were measured, or the model
                was merged meanwhile.
            TypeError: an argument is of another type.
        """
        path, t = self._place(t, path)
        with _factors_in(self._adapted, self._layers, self._parts[path], t, whole=_is_whole(path)):
            yield self._adapted

    def export(
        self,
        folder: str | Path,
        t: float | Point | None = None,
        path: RewindPath | None = None,
        *,
        rank: int | None = None,
    ) -> pd.DataFrame:
        """Write the model at a point as an ordinary LoRA, as :func:`lora_lens.export` does.

        Args:
            folder: as for :func:`lora_lens.save`.
            t: in [0, 1.2], or a point from :meth:`best`; default the best one.
            path: which way; default the first.
            rank: the largest rank to write; default None, the exact update.

        Returns:
            One row per layer, as from :func:`lora_lens.export`.

        Raises:
            ValueError, TypeError, OSError: as :meth:`at` and :func:`lora_lens.export`.
        """
        path, t = self._place(self.best() if t is None else t, path)
        parts = self._parts[path]
        updates = {name: layer.update(t, parts[name]) for name, layer in self._layers.items()}
        with self.at(t, path):
            return write_updates(
                self._adapted,
                updates,
                folder,
                rank,
                {"rewound": f"{path} at t = {t:g}"},
                self._scores(path, t),
            )

    def _scores(self, path: RewindPath, t: float) -> list[Score]:
        """For the card; none of a point that was not measured."""
        rows = self.table[(self.table["path"] == str(path)) & (self.table["t"] == t)]
        if rows.empty:
            return []
        row = rows.iloc[0]
        kept = Score(*self.retain, row["retained_accuracy"], row["retained_before"], row["loss_rise"])
        return [Score(*self.task, row["accuracy"]), kept]

    def _place(self, t: float | Point, path: RewindPath | None) -> tuple[RewindPath, float]:
        if isinstance(t, Point):
            return self._known(t.path), t.t
        path = next(iter(self._parts)) if path is None else self._known(path)
        return path, number(t, "t", least=0, most=FARTHEST)

    def _known(self, path: RewindPath) -> RewindPath:
        if path not in self._parts:
            raise InputError(f"{path} was not measured; there are {listed(map(str, self._parts))}")
        return path


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

    layers = {
        name: _noted(name, x, record.starts.get(name), spectra) for name, x in lora_layers(peft_model).items()
    }
    moved = {name: layer.moved for name, layer in layers.items()}
    parts = {path: path.parts(moved) for path in ways}
    length = _norm([(layer.moved.b, layer.moved.a) for layer in layers.values()])

    @cache
    def ends(t: float) -> tuple[Answers, Answers]:
        """At the pretrained and at the trained model, which paths share."""
        return answers(WHOLE, t)

    def answers(path: RewindPath, t: float) -> tuple[Answers, Answers]:
        part = parts.get(path) or WHOLE.parts(moved)
        with _factors_in(adapted, layers, part, t, whole=_is_whole(path)):
            return tuple(
                evaluate(adapted, asked, by, precision=precision)
                for asked, by in ((task, new), (retain, retained))
            )

    def row(path: RewindPath, t: float) -> dict[str, object]:
        shared = t == 1 or (t == 0 and _is_whole(path))
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
        ValueError: nothing says what, or a head has another number of classes.
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


def require_rewindable(adapted: nn.Module) -> None:
    """Raise a ValueError if the pretrained model cannot be reached by other factors of this adapter."""
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    for name, layer in lora_layers(peft_model).items():
        if layer.disable_adapters:
            raise InputError(f"the adapter of {name} is disabled: call enable_adapter_layers() first")
        if isinstance(layer, StackedLayer):
            raise InputError(
                f"{name} is adapted as a parameter, together with what lies in it, and PEFT has no place for "
                "other factors there: export it (ll.export) and interpolate the weights"
            )
        if is_dora(layer):
            raise InputError(
                f"{name} has DoRA, whose update is no product of factors, so nothing can be scaled: merge "
                "it (merge_and_unload) and interpolate the weights"
            )
    if moved := moved_buffers(peft_model, record):
        raise InputError(
            f"training moved {listed(moved, most=2)}: statistics of batch norms fit the trained weights "
            "only, and a point between would need its own; train with the norms in eval mode"
        )
    for name, wrapper in whole_modules(peft_model).items():
        for key, buffer in wrapper.modules_to_save[ADAPTER].named_buffers():
            if not torch.equal(buffer, wrapper.original_module.get_buffer(key)):
                raise InputError(
                    f"training moved {name}.{key}, which has no value between; train it in eval mode"
                )


def _checked_paths(paths: object) -> tuple[RewindPath, ...]:
    found = (paths,) if hasattr(paths, "parts") else sequence(paths, "paths", "ways back")
    for path in found:
        if not callable(getattr(path, "parts", None)) or isinstance(path, type):
            raise InputError(f"each of paths must be one such as ll.forgetting.WholeUpdate(), not {path!r}")
    if not found or len(set(map(str, found))) < len(found):
        raise InputError("paths must hold at least one way back, and none of them twice")
    return found


def _is_whole(path: RewindPath) -> bool:
    return path == WHOLE


def _noted(name: str, layer: nn.Module, start: Start | None, spectra: SpectrumSet | None) -> _Layer:
    """The factors of a layer as they are now, and how to get at its pretrained weight."""
    b, a = (factor_matrix(f).clone() for f in (layer.lora_B, layer.lora_A))
    require_finite(name, b)
    require_finite(name, a)

    def weight() -> Tensor:
        return start_rows(layer, start, slice(None))

    @cache
    def spectrum() -> Spectrum:
        if spectra is None:
            return factorize(name, weight())
        found = spectrum_of(spectra, name)
        require_start_of(found, name, weight()[some_rows(found)])
        return found

    first = None if start is None else start.taken(layer)
    moved = Moved(*trained_update(layer, start), weight, spectrum)
    return _Layer(b, a, first, layer.scaling[ADAPTER], moved)


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


@contextmanager
def _factors_in(
    adapted: nn.Module, layers: Mapping[str, _Layer], parts: Mapping[str, Part], t: float, *, whole: bool
) -> Iterator[None]:
    """Other factors in the adapter's layers, and of what PEFT trains in full other values, for a while.

    The parameters that were there come back themselves, not copies.
    """
    require_rewindable(adapted)
    peft_model, _ = attached(adapted)
    changes: list[tuple[nn.Module, str, Tensor]] = []
    for name, layer in lora_layers(peft_model).items():
        b, a = layers[name].factors(t, parts[name])
        of_b, of_a = layer.lora_B[ADAPTER], layer.lora_A[ADAPTER]
        changes.append((of_b, "weight", b.reshape(*b.shape, *weight_of(of_b).shape[2:])))
        changes.append((of_a, "weight", a.reshape(len(a), *weight_of(of_a).shape[1:])))
    for wrapper in whole_modules(peft_model).values() if whole and t != 1 else ():
        for key, old in wrapper.original_module.named_parameters():
            owner, _, last = key.rpartition(".")
            module = wrapper.modules_to_save[ADAPTER].get_submodule(owner)
            now = getattr(module, last).detach()
            changes.append((module, last, ((1 - t) * old.detach() + t * now).to(now.dtype)))
    before = [getattr(module, key) for module, key, _ in changes]
    try:
        for module, key, values in changes:
            setattr(module, key, nn.Parameter(values, requires_grad=False))
        yield
    finally:
        for (module, key, _), old in zip(changes, before, strict=True):
            setattr(module, key, old)
