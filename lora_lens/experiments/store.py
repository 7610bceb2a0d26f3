"""The runs of a sweep on disk: one folder per experiment, one small file per finished run.

experiment.json     which model and tasks the runs belong to, and the versions that made them
runs/<run>.json     settings, results, curve, answers and drift of one run; <run> is a hash of all that it
                    was made with (lora_lens.experiments.identity), of which "exact" has what the settings do
                    not tell

A run that failed has the reason under "failed", and no results.

Packed, all of it is one file to keep or to hand on: a line of JSON for the experiment, then one for each
run, compressed with LZMA. What reads a folder reads such a file as well.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from lora_lens._base.errors import ExistingFileError, InputError, LoraLensError, MissingFileError, StoreError
from lora_lens.experiments.identity import ANSWERS, MODEL_SETTINGS
from lora_lens.experiments.records import (
    all_records,
    experiment_in,
    packed,
    records_of,
    row_of,
    store_path,
    told_apart,
)

LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave in a folder, as "._*"


def runs(store: str | Path) -> pd.DataFrame:
    """All runs of a results folder, or of a file from :func:`pack`, without running anything.

    Files in the folder that are damaged or no run of a sweep are passed over; a warning names them.

    Returns:
        One row per run with the columns of :func:`lora_lens.sweep`, by method, rank, position, rate and seed.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it holds no runs, or is no such file.
        TypeError: ``store`` is no path.
    """
    records = all_records(store).values()
    if any("result" not in record for record in records):
        raise InputError(f"{store} holds sequences of tasks; read them with ll.experiments.continual_runs")
    table = pd.DataFrame([row_of(record) for record in told_apart(records)])
    if table.empty:
        raise InputError(f"{store} holds no finished runs")
    order = ["method", "rank", "position", "start", "steps", "lr", "seed"]
    return table.sort_values(order, kind="stable", ignore_index=True)


def pack(store: str | Path, path: str | Path) -> Path:
    """Write all finished runs of a results folder into one file of about 2 kB per run.

    Args:
        store: the folder that ``sweep`` was given.
        path: the file to write, ``.jsonl.xz``. An earlier pack there is replaced when the new one is
            complete; nothing else is replaced.

    Returns:
        ``path``.

    Raises:
        FileNotFoundError, ValueError: as :func:`runs`.
        FileExistsError: something else than a pack is at ``path``.
    """
    path, records = store_path(path, "path", "that of the file to write"), all_records(store)
    if not records:
        raise InputError(f"{store} holds no finished runs")
    _require_pack(path)
    lines = [json.dumps(record) for record in [experiment(store), *(records[run] for run in sorted(records))]]
    replace_file(path, lzma.compress("\n".join(lines).encode()))
    return path


def _require_pack(path: Path) -> None:
    """Raise if a file cannot be written there without harm to another one."""
    if not path.parent.is_dir():
        raise MissingFileError(f"there is no folder {path.parent} to write {path.name} into; make it first")
    if not os.path.lexists(path):
        return
    try:
        known = path.is_file() and "identity" in experiment(path)
    except (InputError, LookupError, TypeError):  # not a pack, an empty one, JSON of another kind
        known = False
    if not known:
        raise ExistingFileError(
            f"{path} was not written by ll.experiments.pack, so it stays; choose another name"
        )


def experiment(store: str | Path) -> dict[str, dict[str, str]]:
    """What all runs of a results folder, or of a file from :func:`pack`, belong to.

    Returns:
        identity, with lora_lens (its version), model (a hash of its weights), settings of the model (a hash
        of what its function depends on beside them, such as dropout; not of earlier versions), task and
        retain (their names and hashes of their examples); versions, of the packages that made the first runs.

    Raises:
        FileNotFoundError: there is no such folder or file, or no experiment in the folder.
        ValueError: it is no such file, or the folder's experiment.json is damaged.
    """
    store = store_path(store)
    if not store.is_dir():
        return packed(store)[0]
    described = store / "experiment.json"
    if not described.exists():
        raise MissingFileError(f"the folder {store} holds no experiment; pass the store of a sweep")
    try:
        return experiment_in(described.read_bytes())
    except InputError as error:
        raise InputError(
            f"{described} is damaged or of another program ({error}), and without it nobody knows what the "
            "runs beside it belong to; put the right one back, or choose another folder"
        ) from None


def curves(store: str | Path, table: pd.DataFrame) -> pd.DataFrame:
    """The evaluations along the way of every run in ``table``.

    Returns:
        One row per run and evaluation: run, step, loss, accuracy, test_loss, retained_accuracy,
        retained_loss, as in :class:`lora_lens.Run`; without the two test losses where an earlier version
        kept the runs.

    Raises:
        FileNotFoundError: a run is not in the store.
        ValueError: the store holds sequences of tasks.
    """
    records = records_of(store, table)
    if any("curve" not in record for record in records):
        raise InputError(f"{store} holds sequences of tasks, which have no curves")
    return run_first([pd.DataFrame(record["curve"]).assign(run=record["run"]) for record in records])


def answers(store: str | Path, table: pd.DataFrame) -> pd.DataFrame:
    """What every run in ``table`` did to each test example of the retained task.

    Returns:
        One row per run and example: run, item (its place in the test set), label, before and after
        (the predicted class before and after training). See :mod:`lora_lens.forgetting.examples`.

    Raises:
        FileNotFoundError: a run is not in the store.
        ValueError: a run was kept by a version that did not note its answers.
    """
    parts = []
    for record in records_of(store, table):
        if "items" not in record:
            raise InputError(
                f"run {record['run']} in {store} was kept without its answers, by an earlier version; "
                "sweep again into another folder to have them"
            )
        kept = pd.DataFrame(record["items"]).rename_axis("item").reset_index()
        parts.append(kept.assign(run=record["run"]))
    return pd.concat(parts, ignore_index=True)[["run", "item", "label", "before", "after"]]


def drifts(store: str | Path, table: pd.DataFrame) -> pd.DataFrame:
    """What every run in ``table`` did to each adapted weight, as far as the sweep measured it.

    Returns:
        One row per run and layer: run, and the columns of :func:`lora_lens.forgetting.drift` and
        :func:`lora_lens.forgetting.rotations`; cka, relative_change and neighbours, the same for all layers
        of a run, are those of the retained task's features, see :func:`lora_lens.forgetting.representations`
        and :func:`lora_lens.forgetting.neighbour_agreement`. Runs without an adapter or that diverged have no
        rows.

    Raises:
        FileNotFoundError: a run is not in the store.
        ValueError: none of the runs has a drift.
    """
    parts = [
        pd.DataFrame(record["drift"]).assign(run=record["run"], **record["features"])
        for record in records_of(store, table)
        if "drift" in record
    ]
    if not parts:
        raise InputError(
            f"no run in {store} was kept with its drift; sweep measures it when it is given "
            "spectra=ll.spectra(model), with all vectors"
        )
    return run_first(parts)


def watched(store: str | Path, table: pd.DataFrame) -> pd.DataFrame:
    """What every run in ``table`` did to the tasks that the sweep watched beside the retained one.

    Returns:
        One row per run and task: run, task, before and after (accuracies, in [0, 1]), loss_before and
        loss_after (nats per example, of a language task per token), forgetting (before - after) and
        loss_rise (loss_after - loss_before); in the last two positive = forgot.

    Raises:
        FileNotFoundError: a run is not in the store.
        ValueError: the sweep watched nothing.
    """
    parts = [
        pd.DataFrame(record["watched"]).assign(run=record["run"])
        for record in records_of(store, table)
        if "watched" in record
    ]
    if not parts:
        raise InputError(f"no run in {store} watched other tasks; give the sweep watch=[...]")
    together = run_first(parts)
    return together.assign(
        forgetting=together["before"] - together["after"],
        loss_rise=together["loss_after"] - together["loss_before"],
    )


def run_first(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of several runs as one, with the column that names the run in front."""
    together = pd.concat(parts, ignore_index=True)
    return together[["run", *together.columns.drop("run")]]


def require_writable(store: str | Path | None) -> None:
    """Refuse early what cannot become a results folder; nothing is written.

    Raises:
        InputTypeError, InputError: it is no path, a file, or within a file.
        StoreError: a folder there may not be written to.
    """
    if store is None:
        return
    store = store_path(store, expected="a folder for the runs")
    there = next(path for path in (store, *store.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        where = "is a file" if there == store else f"lies within {there}, which is a file"
        raise InputError(f"store must be a folder for the runs, and {store} {where}; choose another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StoreError(f"the folder {there} may not be written to, so {store} cannot keep runs")


@contextmanager
def open_store(store: str | Path | None, identity: dict[str, str]) -> Iterator[Path]:
    """The folder of the runs, after making sure that it holds this experiment or none.

    Several processes may open a new one at the same time.

    Raises:
        InputError: it holds another experiment, or other files.
        StoreError: it cannot be written to.
    """
    if store is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    require_writable(store)
    try:
        folder = _opened(Path(store), identity)
    except LoraLensError:
        raise
    except OSError as error:
        raise StoreError(f"cannot keep runs in {store}: {error}; choose another folder") from None
    yield folder


def _opened(store: Path, identity: dict[str, str]) -> Path:
    described = store / "experiment.json"
    store.mkdir(parents=True, exist_ok=True)
    # Looked at before experiment.json is: another process that is as far as its runs has written that.
    others = [file.name for file in store.iterdir() if not _of_no_matter(file.name)]
    if not described.exists():
        if others:
            raise InputError(f"the folder {store} is not empty and holds no experiment; choose another one")
        versions = {name: version(name) for name in ("torch", "timm", "peft", "accelerate")}
        _create(described, json.dumps({"identity": identity, "versions": versions}, indent=1).encode())
    found = experiment(store)["identity"]
    # Earlier versions did not note all.
    known = {key: identity.get(key) for key in (MODEL_SETTINGS, ANSWERS)} | found
    different = [key for key in identity | known if not _same(key, known.get(key), identity.get(key))]
    if different:
        details = "; ".join(f"{k}: there {found.get(k)}, here {identity.get(k)}" for k in different)
        raise InputError(
            f"the results folder {store} holds a different experiment ({details}); "
            "choose another folder, or remove this one if you no longer need it"
        )
    (store / "runs").mkdir(exist_ok=True)
    return store / "runs"


def _same(key: str, there: object, here: object) -> bool:
    """Of losses up to what other devices and numbers of threads may change."""
    if key == ANSWERS and None not in (there, here):
        return math.isclose(float(there), float(here), rel_tol=1e-3) or str(there) == str(here)
    return there == here


def _of_no_matter(name: str) -> bool:
    """Left by a kill, or by a file manager."""
    return name in LITTER or name.startswith(("._", ".experiment."))


def write_atomically(path: Path, record: dict) -> None:
    """Keep a record; as :func:`write_bytes`."""
    write_bytes(path, json.dumps(record, indent=1).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """A file of a results folder, whole or not at all.

    Raises:
        StoreError: the disk is full, or the folder cannot be written to.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; the runs that have ended are kept: start again "
            "once there is room"
        ) from None


def _create(path: Path, content: bytes) -> None:
    """The file appears whole, unless another process was first: then that one's stays."""
    with _written(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(temporary, path)


def replace_file(path: Path, content: bytes) -> None:
    """The new file appears whole or the old one stays, also after a kill or on a full disk."""
    with _written(path, content) as temporary:
        os.replace(temporary, path)


@contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """A file beside ``path`` that holds the content, safe on the disk; what is left of it goes afterwards."""
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
