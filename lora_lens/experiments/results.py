"""What a sweep gives: a table of its runs, and beside it all that was kept of each."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lora_lens._base.errors import InputError, MissingFileError
from lora_lens._base.naming import counted, listed
from lora_lens._base.validate import instance, share
from lora_lens.experiments.advisor import Advice, advise_from
from lora_lens.experiments.columns import columns_of, read_columns, records_in, rows_of
from lora_lens.experiments.records import require_runs, row_of, with_distinct_names
from lora_lens.experiments.store import experiment
from lora_lens.forgetting.aggregate import seed_means
from lora_lens.forgetting.fair_comparison import (
    at_equal_rate,
    at_matched_accuracy,
    at_matched_update,
    at_own_best_rate,
    relative_updates,
)
from lora_lens.forgetting.paired_comparison import against_baseline, early_updates

if TYPE_CHECKING:
    from ipywidgets import VBox

ORDER = ["method", "rank", "position", "start", "steps", "lr", "seed"]
SHOWN = ["method", "rank", "position", "start"]  # in a cell, beside the scores
MOST_SHOWN = 15  # rows


def require_sweep(value: object) -> None:
    """Refuse what is no sweep, such as its table alone."""
    hint = "; its table alone has no curves and no answers" if isinstance(value, pd.DataFrame) else ""
    instance(value, Sweep, "sweep", f"an ll.Sweep, from ll.sweep or ll.Sweep.open{hint}")


class Kept:
    """A table of runs, and what was kept of each: the base class of :class:`Sweep` and its like.

    Attributes:
        table: one row per run (of a sequence of tasks several), those that failed with their reason.
        path: the folder or packed file that keeps the runs; None where nothing was kept on disk.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        columns: pa.Table,
        experiment: Mapping[str, dict] | None = None,
        path: Path | None = None,
    ) -> None:
        self.table, self.path = table, path
        self._columns, self._experiment = columns, experiment

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The runs in a results folder, or in a file from :func:`lora_lens.experiments.pack`.

        Files in the folder that are damaged or no runs are passed over; a warning names them.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ValueError: it holds no such runs, or is no such file.
            TypeError: ``path`` is no path.
        """
        columns = read_columns(path)
        return cls(cls._read(columns, path), columns, path=Path(path))

    @property
    def experiment(self) -> Mapping[str, dict[str, str]]:
        """What all runs belong to; as :func:`lora_lens.experiments.experiment`."""
        return experiment(self.path) if self._experiment is None else self._experiment

    def only(self, rows: str | pd.Series | pd.DataFrame) -> Self:
        """The same with some of the runs.

        Args:
            rows: a query, such as ``"lr == 0.005"``; a mask, such as ``sweep.table["position"] == 0.5``; or
                some rows of the table.

        Raises:
            ValueError: no run is left.
        """
        if isinstance(rows, pd.DataFrame):
            table = rows
        else:
            table = self.table.query(rows) if isinstance(rows, str) else self.table[rows]
        if table.empty:
            raise InputError(f"no run of {self!r} fits {rows!r}")
        return type(self)(table, self._columns, self._experiment, self.path)

    @classmethod
    def _read(cls, columns: pa.Table, path: str | Path) -> pd.DataFrame:
        raise NotImplementedError

    def _finished(self) -> pd.DataFrame:
        failed = self.table.get("failed", pd.Series(False, self.table.index)).eq(True)
        return self.table[~failed]

    def _columns_of_finished(self) -> pa.Table:
        """What is kept of the table's runs, in its order; nothing is of those that failed.

        Raises:
            MissingFileError: the store lacks a run.
            InputError: all of the runs failed.
        """
        runs = require_runs(self.table)
        places = pc.index_in(pa.array(runs, pa.string()), self._columns["run"].combine_chunks())
        if places.null_count:
            absent = runs[places.is_null().to_pylist().index(True)]
            raise MissingFileError(f"{self.path or 'this sweep'} holds no run {absent}")
        finished = set(self._finished()["run"])
        if not finished:
            raise InputError(f"all runs of the table failed, the first with: {self.table['reason'].iloc[0]}")
        return self._columns.take(places.filter(pa.array([run in finished for run in runs])))

    def _rows(self, part: str) -> pd.DataFrame:
        return rows_of(self._columns_of_finished(), part)


class Sweep(Kept):
    """The runs of a sweep.

    Attributes:
        table: one row per run, those that failed with their reason; see :func:`lora_lens.sweep`.
        path: the folder or packed file that keeps the runs; None where nothing was kept on disk.

    Plots, explorers and reports take a sweep where they take its table.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
        >>> middle = sweep.only("position == 0.5 and lr == 0.005")
        >>> len(middle), middle.curves()["step"].unique().tolist()  # runs, and when they were evaluated
        (5, [0, 30, 60, 90, 120])
    """

    @classmethod
    def of(cls, records: list[dict], experiment: Mapping, path: Path | None = None) -> Self:
        """From the records of its runs, in their order."""
        table = pd.DataFrame([row_of(record) for record in with_distinct_names(records)])
        return cls(table, columns_of(records), experiment, path)

    @classmethod
    def _read(cls, columns: pa.Table, path: str | Path) -> pd.DataFrame:
        records = records_in(columns)
        if any("result" not in record for record in records):
            raise InputError(
                f"{path} holds sequences of tasks; open them with ll.experiments.ContinualSweep.open"
            )
        table = pd.DataFrame([row_of(record) for record in with_distinct_names(records)])
        if table.empty:
            raise InputError(f"{path} holds no finished runs")
        return table.sort_values(ORDER, kind="stable", ignore_index=True)

    def curves(self) -> pd.DataFrame:
        """The evaluations along the way.

        Returns:
            One row per run and evaluation: run, step, loss, accuracy, test_loss, retained_accuracy,
            retained_loss, update, as in :class:`lora_lens.Run`; without the two test losses and the update
            where an earlier version kept the runs.
        """
        return self._rows("curve")

    def answers(self) -> pd.DataFrame:
        """What every run did to each test example of the retained task.

        Returns:
            One row per run and example: run, item (its place in the test set), label, before and after (the
            predicted class before and after training). See :mod:`lora_lens.forgetting.examples`.

        Raises:
            ValueError: a run was kept by a version that did not note its answers.
        """
        found = self._rows("items")
        kept = set(found["run"])
        if without := [run for run in require_runs(self._finished()) if run not in kept]:
            raise InputError(
                f"run {without[0]} in {self.path} was kept without its answers, by an earlier version; sweep "
                "again into another folder to have them"
            )
        return found.assign(item=found.groupby("run", sort=False).cumcount())[
            ["run", "item", "label", "before", "after"]
        ]

    def drifts(self) -> pd.DataFrame:
        """What every run did to each adapted weight, as far as the sweep measured it.

        Returns:
            One row per run and layer: run, and the columns of :func:`lora_lens.forgetting.drift` and
            :func:`lora_lens.forgetting.rotations`; cka, relative_change and neighbours, the same for all
            layers of a run, are those of the retained task's features, see
            :func:`lora_lens.forgetting.feature_change` and
            :func:`lora_lens.forgetting.neighbour_agreement`. Runs without an adapter or that diverged have
            no rows.

        Raises:
            ValueError: none of the runs has a drift.
        """
        columns = self._columns_of_finished()
        found = rows_of(columns, "drift")
        if found.empty:
            raise InputError(
                f"no run in {self.path or 'this sweep'} was kept with its drift; sweep measures it when "
                "it is given drift=True, or spectra=ll.spectra(model) with all vectors"
            )
        features = {r["run"]: r["features"] for r in records_in(columns) if "features" in r}
        return found.join(pd.DataFrame.from_dict(features, orient="index"), on="run")

    def watched(self) -> pd.DataFrame:
        """What every run did to the tasks that the sweep watched beside the retained one.

        Returns:
            One row per run and task: run, task, before and after (accuracies, in [0, 1]), loss_before and
            loss_after (nats per example, of a language task per token), forgetting (before - after) and
            loss_rise (loss_after - loss_before); in the last two positive = forgot.

        Raises:
            ValueError: the sweep watched nothing.
        """
        found = self._rows("watched")
        if found.empty:
            raise InputError(f"no run of {self!r} watched other tasks; give the sweep watch=[...]")
        return found.assign(
            forgetting=found["before"] - found["after"], loss_rise=found["loss_after"] - found["loss_before"]
        )

    def best(self, weight: float = 1.0) -> Advice:
        """What to take, a window or none, and its rate; as :func:`lora_lens.experiments.advise_from`."""
        return advise_from(self.table, weight)

    def fair(
        self, *, lr: float | None = None, accuracy: float | None = None, update: float | None = None
    ) -> pd.DataFrame:
        """What windows and methods forget where they are comparable, with 95% intervals over seeds.

        Args:
            lr: at this learning rate, as :func:`lora_lens.forgetting.at_equal_rate`.
            accuracy: where they first reach this accuracy on the new task, in [0, 1], as
                :func:`lora_lens.forgetting.at_matched_accuracy`.
            update: at this size of the update relative to the weights, as
                :func:`lora_lens.forgetting.at_matched_update`.

        Without any of them each at its own best rate, as :func:`lora_lens.forgetting.at_own_best_rate`.

        Raises:
            ValueError: several are given, or as those functions.
        """
        given = {"lr": lr, "accuracy": accuracy, "update": update}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise InputError(f"compare at one of lr, accuracy and update, not at {listed(given)}")
        if lr is not None:
            return at_equal_rate(self.only(self.table["lr"] == lr).table)
        if accuracy is not None:
            return at_matched_accuracy(self.table, self.curves(), share(accuracy, "accuracy"))
        if update is not None:
            return at_matched_update(self.table, self.drifts(), update)
        return at_own_best_rate(self.table)

    def against(
        self,
        baseline: str | Mapping[str, object],
        value: str = "accuracy - forgetting",
        *,
        accuracy: float | None = None,
        update: float | None = None,
        early_update: float | None = None,
        comparisons: int | None = None,
    ) -> pd.DataFrame:
        """How much better than a baseline all others are, and what of it is more than chance.

        As :func:`lora_lens.forgetting.against_baseline`, with the sweep's own curves and drifts.

        Args:
            baseline: its name in the column method, or its columns.
            value: what is compared, larger being better: a column, or an expression of several.
            accuracy: where they first reach this accuracy on the new task, in [0, 1].
            update: at this size of the update at the end, relative to the weights.
            early_update: at this size of the update at the first evaluation after the start.
            comparisons: how many are made in all, where this sweep is one of several.

        Without any of the three each at its own best rate.

        Raises:
            ValueError: several are given, or as that function.
        """
        at = {"accuracy": accuracy, "update": update, "early_update": early_update}
        if len(given := [name for name, one in at.items() if one is not None]) > 1:
            raise InputError(f"compare at one of accuracy, update and early_update, not at {listed(given)}")
        sizes = None if update is None else relative_updates(self.drifts())
        if early_update is not None:
            update, sizes = early_update, early_updates(self.curves())
        curves = None if accuracy is None else self.curves()
        at = {"accuracy": accuracy, "curves": curves, "update": update, "sizes": sizes}
        return against_baseline(self.table, baseline, value, **at, comparisons=comparisons)

    def report(self, path: str | Path, **options: object) -> Path:
        """A report on the sweep, on one page; as :func:`lora_lens.reports.report`."""
        from lora_lens.reports.sweep_report import report

        return report(self, path, **options)

    def explore(self, **options: object) -> VBox:
        """The explorer of the sweep's trade-offs; as :func:`lora_lens.widgets.tradeoff_explorer`."""
        from lora_lens.widgets.trade_off import tradeoff_explorer

        return tradeoff_explorer(self, **options)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        windows = self.table.loc[self.table["method"] == "window", ["rank", "position", "start"]]
        others = [method for method in self.table["method"].unique() if method != "window"]
        parts = [
            counted(len(self), "run"),
            *([counted(len(windows.drop_duplicates()), "window")] if len(windows) else []),
            *([listed(others, most=3)] if others else []),
            counted(self.table["lr"].nunique(), "learning rate"),
            counted(self.table["seed"].nunique(), "seed"),
            *([str(self.path)] if self.path else []),
        ]
        return f"<Sweep: {'; '.join(parts)}>"

    def _repr_html_(self) -> str:
        from lora_lens.plots._image import drawn
        from lora_lens.plots._scores import in_words
        from lora_lens.plots.sweeps import tradeoff

        finished = self._finished()
        if finished.empty:
            return f"<p>{escape(repr(self))}</p><p>All runs failed, see the column reason of its table.</p>"
        picture = drawn(
            lambda figure: tradeoff(finished, ax=figure.subplots()),
            f"{in_words('retained_accuracy', finished)} against accuracy on the new task, means over seeds",
        )
        rate = finished.groupby("lr")["accuracy"].mean().idxmax()
        means = seed_means(finished[finished["lr"] == rate])
        means = means.sort_values("method", key=lambda method: method != "window", kind="stable")
        scores = {f"{name} (%)": (100 * means[name]).round(1) for name in ("accuracy", "forgetting")}
        shown = means[[c for c in SHOWN if means[c].notna().any()]].assign(**scores, seeds=means["seeds"])
        table = shown.head(MOST_SHOWN).to_html(index=False, float_format="{:g}".format, na_rep="", border=0)
        more = f"<p>and {len(means) - MOST_SHOWN} more</p>" if len(means) > MOST_SHOWN else ""
        caption = f"<p>At learning rate {rate:g}, where most is learnt, means over seeds:</p>"
        return f"<p>{escape(repr(self))}</p>{picture}{caption}{table}{more}"
