"""The runs of a sweep on disk: one folder per experiment, one small file per finished run.

experiment.json     which model and tasks the runs belong to, and the versions that made them
runs/<run>.json     settings, results, curve, answers and drift of one run; <run> is a hash of all that it
                    was made with (lora_lens.experiments.identity), of which "exact" has what the settings do
                    not tell
columns.parquet     the same as columns, once there are many; it may be deleted at any time

A run that failed has the reason under "failed", and no results.

Packed, all of it is one file to keep or to hand on: a line of JSON for the experiment, then one for each
run, compressed with LZMA. What reads a folder reads such a file as well.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from lora_lens._base.errors import ExistingFileError, InputError, LoraLensError, MissingFileError, StoreError
from lora_lens._base.files import create_file, replace_file
from lora_lens.experiments.identity import ANSWERS, MODEL_SETTINGS
from lora_lens.experiments.records import all_records, experiment_in, packed, store_path

LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave in a folder, as "._*"


def pack(store: str | Path, path: str | Path) -> Path:
    """Write all finished runs of a results folder into one file of about 2 kB per run.

    Args:
        store: the folder that ``sweep`` was given.
        path: the file to write, ``.jsonl.xz``. An earlier pack there is replaced when the new one is
            complete; nothing else is replaced.

    Returns:
        ``path``.

    Raises:
        FileNotFoundError: there is no such store, or no folder for the file.
        ValueError: the store holds no finished runs, or is none.
        FileExistsError: something else than a pack is at ``path``.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> once = {"steps": 2, "batch_size": 10, "jobs": 1, "progress": False}
        >>> with TemporaryDirectory() as folder:
        ...     store, grid = Path(folder) / "runs", ll.Grid(ll.Window.middle(2))
        ...     _ = ll.sweep(grid, model=model, task=task, retain=task, store=store, **once)
        ...     packed = ll.experiments.pack(store, Path(folder) / "runs.jsonl.xz")
        ...     len(ll.Sweep.open(packed))
        1
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
    """The model and tasks that all runs of a results folder, or of a file from :func:`pack`, belong to.

    Args:
        store: the folder or file.

    Returns:
        "identity", with lora_lens (its version), model (a hash of its weights), settings of the model (a hash
        of what its function depends on beside them, such as dropout; not of earlier versions), task and
        retain (their names and hashes of their examples); "versions", of the packages that made the first
        runs.

    Raises:
        FileNotFoundError: there is no such folder or file, or no experiment in the folder.
        ValueError: it is no such file, or the folder's experiment.json is damaged.

    Example:
        >>> import lora_lens as ll
        >>> found = ll.experiments.experiment("data/results/digits.jsonl.xz")
        >>> sorted(found), found["identity"]["task"].split()[0]
        (['identity', 'versions'], 'digits')
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


def new_experiment(identity: dict[str, str]) -> dict[str, dict[str, str]]:
    """What runs of this identity that are made now belong to; as :func:`experiment` reads it."""
    versions = {name: version(name) for name in ("torch", "timm", "peft", "accelerate")}
    return {"identity": identity, "versions": versions}


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
        create_file(described, json.dumps(new_experiment(identity), indent=1).encode())
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
