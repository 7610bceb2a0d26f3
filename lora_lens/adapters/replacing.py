"""Folders where files of lora_lens lie beside others': ours are replaced all at once, others' never touched.

lora_lens.json lists the files that were written with it, with their SHA-256: those, as long as they are
unchanged, are ours, and nothing else is. New files go into a folder like this:

1. They are written, and synced to the disk, into a hidden folder inside, .lora_lens.<16 hex digits>.
2. One rename calls it .lora_lens.ready. Until then the old files count, from then on the new ones.
3. What is ours no more is removed, the new files are moved to their places, lora_lens.json last.

After a kill before 2 the old files are as they were. After one in 3 what still lies in .lora_lens.ready is
the newest, so :func:`settled` looks there first, and step 3 is finished by whoever next comes along. PEFT,
which does not look there, then finds either the old files, the new ones, or no adapter_config.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from lora_lens._base.errors import InputError, InputTypeError, MissingFileError
from lora_lens._base.validate import shown
from lora_lens.spectrum.sources.checkpoint import read_json

try:
    import fcntl
except ImportError:  # on Windows: two processes must not write to one folder at the same time
    fcntl = None  # type: ignore[assignment]  # a module where there is one

ABOUT, WEIGHTS, START = "lora_lens.json", "adapter_model.safetensors", "start.safetensors"
BUFFERS, ON_RESIDUAL, CONFIG = "buffers.safetensors", "on_residual", "adapter_config.json"
CARD = "README.md"  # of an export; people may change it
BASE_AND_ADAPTER = "residual base and adapter"
READY, STAGED = ".lora_lens.ready", re.compile(r"\.lora_lens\.[0-9a-f]{16}")
ENTRIES = (CONFIG, "config.json")  # without which PEFT and transformers read nothing else

# What may be written for each kind of folder; before lora_lens.json listed files, this told what was ours.
SHARD = "model-?????-of-?????.safetensors"
ADAPTER_FILES = (CONFIG, WEIGHTS, BUFFERS, ABOUT)
BASE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    SHARD,
    "model.safetensors.index.json",
)
FILES = {
    "adapter": (*ADAPTER_FILES, CARD),
    "window": (f"{ON_RESIDUAL}/{CONFIG}", f"{ON_RESIDUAL}/{WEIGHTS}", START, BUFFERS, ABOUT),
    BASE_AND_ADAPTER: (
        *(f"base/{name}" for name in BASE_FILES),
        *(f"adapter/{name}" for name in ADAPTER_FILES),
        ABOUT,
    ),
}


@contextmanager
def replaced(folder: str | Path, kind: str) -> Iterator[Path]:
    """An empty folder to write into; at the end what it holds replaces our files in ``folder``, all or none.

    The last to be written in it is ABOUT, with :func:`write_about`.

    Raises:
        InputError: ``folder`` is a file or holds something, but nothing of ours; or a file that is not ours,
            or was changed since, has the name of one that belongs to ``kind``.
        OSError: the disk is full, the folder cannot be written, ...; then the old files are as they were.
    """
    folder = place_of(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"{folder} exists and was not written by lora_lens: it is no folder; choose another")
    if (folder.parent / READY).is_dir():  # else what waits there for this folder would count as newer
        with _alone_in(folder.parent):
            _finish(folder.parent)
    created = not folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{folder} cannot be made, because it would lie within a file: {error}") from error
    staged = folder / f".lora_lens.{secrets.token_hex(8)}"
    try:
        with _alone_in(folder) as sure:
            _finish(folder)
            if os.path.lexists(folder / READY):
                raise InputError(f"{folder / READY} is in the way, and not lora_lens's: move it away")
            foreign = (f for f in folder.iterdir() if not STAGED.fullmatch(f.name))
            if not (folder / ABOUT).is_file() and any(foreign):
                raise InputError(f"{folder} exists and was not written by lora_lens; choose another folder")
            own = _own_files(folder)
            _require_own(folder, own, _matching(folder, FILES[kind]))
            if sure:
                _clear(folder)
            try:
                staged.mkdir()
                yield staged
                _require_own(folder, own, _own_files(staged))
                _sync(staged)
                os.rename(staged, folder / READY)
                _sync_folder(folder)
            except BaseException:
                shutil.rmtree(staged, ignore_errors=True)
                raise
            _finish(folder, checked=True)
    finally:
        if created:
            with suppress(OSError):  # all went well, so it is not empty
                folder.rmdir()


@contextmanager
def settled(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Where each of our files lies, by its name, while nobody else replaces them.

    Raises:
        MissingFileError: there is no such folder.
    """
    above = folder.parent  # of the folders "base" and "adapter", which are replaced together
    outer = above if (above / ABOUT).is_file() or (above / READY).is_dir() else folder
    with ExitStack() as stack:
        for place in dict.fromkeys((outer, folder)):
            if not place.is_dir():
                continue
            stack.enter_context(_alone_in(place))
            with suppress(OSError, InputError):  # where it cannot be finished, it can be read all the same
                _finish(place)
        places = (folder / READY, outer / READY / folder.name, folder)
        if not any(place.is_dir() for place in places):
            raise MissingFileError(f"there is no folder {folder}; give one that ll.save or ll.export wrote")
        yield lambda name: next((p / name for p in places if (p / name).is_file()), folder / name)


def write_about(folder: Path, about: Mapping[str, object]) -> None:
    """Write ABOUT into a folder that is otherwise complete, with its list of all the files in it."""
    about = {**about, "files": {n: _digest(folder / n) for n in _files_in(folder) if n != ABOUT}}
    (folder / ABOUT).write_text(json.dumps({**about, "sha256": _digest_of(about)}, indent=1))


def unchanged(about: Mapping[str, object]) -> bool:
    """Whether the content of ABOUT is as it was written; True for earlier versions, which could not tell."""
    return "sha256" not in about or about["sha256"] == _digest_of(about)


def changed_files(
    find: Callable[[str], Path], about: Mapping[str, object], folder: Path, but: Set[str] = frozenset()
) -> set[str]:
    """The names of the files that ABOUT lists and that were changed since, all ``but`` some.

    Raises:
        MissingFileError: one is not there.
    """
    files = {n: digest for n, digest in _listed(about, folder / ABOUT).items() if n not in but}
    for name in files:
        if not find(name).is_file():
            raise MissingFileError(
                f"{folder} lacks {name}, which its {ABOUT} names: copy it there or save again"
            )
    return {name for name, digest in files.items() if digest and _digest(find(name)) != digest}


def place_of(folder: str | Path, name: str = "folder") -> Path:
    """A folder that may not exist yet, without links in its path."""
    if not isinstance(folder, (str, os.PathLike)):
        raise InputTypeError(f"{name} must be the path of a folder, not {shown(folder)}")
    if not str(folder).strip():
        raise InputError(f"{name} must be the path of a folder, not an empty text")
    try:
        return Path(folder).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, no such home, a zero byte
        raise InputError(f"{name} must be the path of a folder, not {folder!r}: {error}") from error


def _finish(folder: Path, checked: bool = False) -> None:
    """Move files that are ready to their places, if there are any; a kill in the midst changes nothing."""
    ready = folder / READY
    if ready.is_symlink() or not ready.is_dir():
        return
    old = _own_files(folder)
    new = _own_files(ready) or old  # without its list, which is the last to be moved
    moving = [name for name in _files_in(ready) if name in new]
    entries = {name for name in moving if PurePosixPath(name).name in ENTRIES}
    moving.sort(key=lambda name: (name == ABOUT, name in entries))
    if ABOUT in moving:
        if not checked:
            none: frozenset[str] = frozenset()
            _require_own(folder, {n: old.get(n, none) | new.get(n, none) for n in old | new}, old | new)
        for name in old:
            if name not in new or name in entries:
                (folder / name).unlink(missing_ok=True)
        for parent in {(folder / name).parent for name in old.keys() - new.keys()} - {folder}:
            with suppress(OSError):  # others' files are in it
                parent.rmdir()
    for name in moving:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(ready / name, folder / name)
    for parent in {(folder / name).parent for name in moving} | {folder}:
        _sync_folder(parent)
    _remove_empty(ready)
    _sync_folder(folder)


def _own_files(folder: Path) -> dict[str, frozenset[str]]:
    """The files of ours in a folder and what they may hold, as digests; of earlier versions anything ("")."""
    path = folder / ABOUT
    if not path.is_file():
        return {}
    about = read_json(path)
    if not unchanged(about) or about.get("kind") not in FILES or "format" not in about:
        raise InputError(
            f"{path} was not written by lora_lens or was changed since, so its folder stays as it is: "
            "move it away or choose another folder"
        )
    own = {name: frozenset({digest}) for name, digest in _listed(about, path).items()}
    return {**own, ABOUT: frozenset({""})}


def _listed(about: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The files that ABOUT lists with their digests; "" where an earlier version wrote no list."""
    files = about.get("files")
    if files is None:
        return dict.fromkeys(_matching(path.parent, FILES[about["kind"]]) - {ABOUT}, "")
    if not isinstance(files, dict) or not all(_may_list(about["kind"], *item) for item in files.items()):
        raise InputError(f"{path} has no list of files as lora_lens writes it: save the adapter again")
    return files


def _may_list(kind: str, name: str, digest: object) -> bool:
    """Whether it is a name of a file that lora_lens writes, with a digest; in a base also its code."""
    usual = name.startswith("base/") or any(fnmatchcase(name, pattern) for pattern in FILES[kind])
    inside = not {"", ".", ".."} & set(name.split("/")) and not re.search(r"[\\:\0]", name) and name != ABOUT
    return usual and inside and isinstance(digest, str) and digest != ""


def _require_own(folder: Path, own: Mapping[str, Iterable[str]], names: Iterable[str]) -> None:
    """Raise for the first file in the way of ``names`` that does not hold what ``own`` allows."""
    for name in names:
        path = folder / name
        parents = [folder / p for p in PurePosixPath(name).parents if str(p) != "."]
        blocked = [p for p in parents if p.is_symlink() or (p.exists() and not p.is_dir())]
        if blocked or path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(
                f"{blocked[0] if blocked else path} is in the way of a file to be written, and is no "
                f"{'folder' if blocked else 'file'} of lora_lens's: move it away or choose another folder"
            )
        allowed = own.get(name, ())
        if path.exists() and "" not in allowed and _digest(path) not in allowed:
            what = "was changed since lora_lens wrote it" if allowed else "was not written by lora_lens"
            raise InputError(f"{path} {what}, so it stays: move it away or choose another folder")


def _matching(folder: Path, patterns: Iterable[str]) -> set[str]:
    """The names in a folder, as far as they fit patterns: of files, links and whatever else."""
    found = {p.relative_to(folder).as_posix() for pattern in patterns for p in folder.glob(pattern)}
    return found | {p for p in patterns if os.path.lexists(folder / p)}


def _clear(folder: Path) -> None:
    """Remove what killed writers left: in folders with our names, files with our names."""
    patterns = [pattern for kind in FILES.values() for pattern in kind]
    for left in (
        f for f in folder.iterdir() if STAGED.fullmatch(f.name) and f.is_dir() and not f.is_symlink()
    ):
        for name in _files_in(left):
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                (left / name).unlink()
        _remove_empty(left)


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those in it, as far as they are empty."""
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(path)


def _files_in(folder: Path) -> list[str]:
    """The names of all files and links below a folder."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Wait until no other process or thread is in here for this folder; the end of a process ends its turn.

    Gives False where the file system has no locks; there, of two that commit at once one fails.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        sure = False
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            sure = True
        yield sure
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # also for processes forked meanwhile
        os.close(handle)


def _sync(folder: Path) -> None:
    """Bring all files below a folder, and their names, to the disk."""
    for path, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(path, name), "rb+") as stream:
                os.fsync(stream.fileno())
        _sync_folder(Path(path))


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # Windows opens no folders, and some file systems sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(about: Mapping[str, object]) -> str:
    """Of the content, so that other line ends or another order change nothing."""
    kept = {key: value for key, value in about.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
