"""What :func:`lora_lens.rewind` gives: the points of curves, the best of them, and how to go there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import nn

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.naming import counted, listed
from lora_lens._base.schema import is_agreement
from lora_lens._base.validate import choice, number
from lora_lens.adapters.exporting import write_updates
from lora_lens.adapters.model_card import Score
from lora_lens.forgetting.rewind_paths import Part, RewindPath, WholeUpdate
from lora_lens.forgetting.temporary_factors import TrainedLayer, factors_in

FARTHEST = 1.2
LOST = ("forgetting", "loss_rise")
WHOLE = WholeUpdate()


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
    _layers: Mapping[str, TrainedLayer]
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
        with factors_in(self._adapted, self._layers, self._parts[path], t, whole=path == WHOLE):
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
        measure = "agreement" if is_agreement(self.table) else "accuracy"
        scores = (row[name] for name in ("retained_accuracy", "retained_before", "loss_rise"))
        return [Score(*self.task, row["accuracy"]), Score(*self.retain, *scores, measure)]

    def _place(self, t: float | Point, path: RewindPath | None) -> tuple[RewindPath, float]:
        if isinstance(t, Point):
            return self._known(t.path), t.t
        path = next(iter(self._parts)) if path is None else self._known(path)
        return path, number(t, "t", least=0, most=FARTHEST)

    def _known(self, path: RewindPath) -> RewindPath:
        if not hasattr(path, "parts"):
            raise InputTypeError(f"path must be one such as ll.forgetting.WholeUpdate(), not {path!r}")
        if path not in self._parts:
            raise InputError(f"{path} was not measured; there are {listed(map(str, self._parts))}")
        return path
