"""Factorizations on disk, found again by the content of the weight.

<key>.spectrum.safetensors   left (out, k) and right (k, in), float32, and singular_values (k,), float64;
                             <key> is the hash of the weight and the method, see :func:`weight_key`
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens._base.hashing import tensor_bytes
from lora_lens._base.warning import warn

Factors = tuple[Tensor, Tensor, Tensor]

FORMAT = "lora_lens spectrum 1"
ENTRY = ".spectrum.safetensors"
PARTIAL = ".spectrum.partial"
# Anything else in the folder belongs to somebody else, whatever its ending.
OWN_ENTRY = re.compile(rf"[0-9a-f]{{64}}{re.escape(ENTRY)}")
OWN_PARTIAL = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(PARTIAL)}")
DAY = 24 * 60 * 60  # seconds
DAMAGE = (SafetensorError, ValueError, RuntimeError)  # what reading a file that is no entry raises


def weight_key(weight: Tensor, method: str) -> str:
    """SHA-256 of a weight's bytes, shape and dtype and of the method that factorizes it: 64 hex digits.

    The memory layout does not matter: a transposed view has the key of its
    contiguous copy. Hashing runs outside the GIL, so threads help.
    """
    described = (FORMAT, method, str(weight.dtype), tuple(weight.shape))
    digest = hashlib.sha256(repr(described).encode())  # on processors of today faster than BLAKE2
    digest.update(tensor_bytes(weight))
    return digest.hexdigest()


def default_folder() -> Path:
    """``$LORA_LENS_CACHE``, else ``lora_lens`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    try:
        if named := os.environ.get("LORA_LENS_CACHE"):
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_lens"
    except RuntimeError:  # this user has no home; writing then fails, with the warning that it deserves
        return Path("/nonexistent/.cache/lora_lens")


class SpectrumCache:
    """Factors (U, S, V^T) of weights in a folder; the least recently used make room for new ones.

    Threads and processes may share the folder: entries appear whole or not at
    all, and nothing is locked. The cache never stops a computation: when the
    folder cannot be read or written (a full disk, no permission) it warns
    once, and from then on keeps nothing.

    Attributes:
        folder: made by the first ``put``; other files in it are left alone.
        max_bytes: how large all entries together may grow. Between two looks at the folder, other
            processes may write more than that.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int = 20 * 2**30):
        self.folder = default_folder() if folder is None else Path(folder)
        self.max_bytes = max_bytes
        self._failed = False
        self._room = -1.0  # bytes that may be written before the next look at the folder
        self._lock = Lock()  # for threads that fail at once

    def get(self, key: str) -> Factors | None:
        """The factors kept for ``key``: left (out, k), singular values (k,), right (k, in); or None.

        The vectors are mapped, not copied, into memory, after their checksum
        is found right; writing to them changes neither the file nor what
        others read. A damaged entry is removed, with a warning that names it.
        """
        path = self._path(key)
        try:
            with open(path, "rb") as held:  # while it is open, no other file can take its inode
                try:
                    factors = _read(path, key)
                except DAMAGE as error:
                    # No damage if another process evicted or replaced the file while it was read.
                    if os.path.samestat(os.fstat(held.fileno()), os.stat(path)):
                        self._remove(path, error)
                    return None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._give_up(error)
            return None
        with suppress(OSError):  # evicted meanwhile, or another user's: the factors are good all the same
            os.utime(path)
        return factors

    def put(self, key: str, left: Tensor, singular_values: Tensor, right: Tensor) -> None:
        """Keep factors: left (out, k), singular values (k,), right (k, in), on the CPU.

        Factors larger than ``max_bytes`` are not kept.
        """
        tensors = {
            "left": left.to(torch.float32).contiguous(),
            "singular_values": singular_values.to(torch.float64).contiguous(),
            "right": right.to(torch.float32).contiguous(),
        }
        if self._failed or sum(t.nbytes for t in tensors.values()) > self.max_bytes:
            return
        about = {"format": FORMAT, "key": key, "crc32": _checksum(tensors)}
        partial = self.folder / f".{uuid4().hex}{PARTIAL}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(partial, "xb") as stream:
                stream.write(save(tensors, about))  # no fsync: what a power cut loses, the checksum tells
            os.replace(partial, self._path(key))
            self._room -= sum(t.nbytes for t in tensors.values())
            if self._room < 0:
                self._tidy()
        except OSError as error:
            self._give_up(error)
        finally:
            with suppress(OSError):
                partial.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{ENTRY}"

    def _remove(self, path: Path, error: Exception) -> None:
        with suppress(OSError):
            path.unlink()
        warn(f"{path} is damaged ({error}); its spectrum is computed again")

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            first, self._failed = not self._failed, True
        if first:
            warn(
                f"spectra are not kept in {self.folder} ({error.strerror or error}) and have to be computed "
                "again next time; make room there, or set LORA_LENS_CACHE to a folder that can be written",
            )

    def _tidy(self) -> None:
        """Remove the least recently used entries above the limit, and what killed writers left."""
        entries = []
        with os.scandir(self.folder) as files:
            for file in files:
                with suppress(OSError):  # gone meanwhile, or another user's
                    if not file.is_file(follow_symlinks=False):
                        continue
                    if OWN_ENTRY.fullmatch(file.name):
                        stat = file.stat()
                        entries.append((stat.st_mtime_ns, stat.st_size, file.path))
                    elif OWN_PARTIAL.fullmatch(file.name) and file.stat().st_mtime < time.time() - DAY:
                        os.unlink(file.path)
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass  # another process made the same room
            except PermissionError:
                continue  # another user's
            total -= size
        self._room = (self.max_bytes - total) / 2  # the other half is for other processes


def _read(path: Path, key: str) -> Factors:
    """Raises OSError when the file cannot be read, one of DAMAGE when it is not what ``put`` wrote."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in ("left", "singular_values", "right")}
    if about.get("format") != FORMAT or about.get("key") != key:
        raise InputError("it is no spectrum, or one of another weight")
    if about.get("crc32") != _checksum(tensors):
        raise InputError("its checksum is wrong")
    left, values, right = tensors.values()
    if [t.dtype for t in tensors.values()] != [torch.float32, torch.float64, torch.float32]:
        raise InputError("its dtypes are wrong")
    if (left.ndim, values.ndim, right.ndim) != (2, 1, 2) or not (
        left.shape[1] == len(values) == right.shape[0] == min(left.shape[0], right.shape[1]) > 0
    ):
        raise InputError("its shapes do not fit together")
    if not values.isfinite().all() or values[-1] < 0 or (values.diff() > 0).any():
        raise InputError("its singular values do not descend to 0 or above")
    return left, values.clone(), right  # whoever keeps the values alone does not keep the file mapped


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    crc = 0
    for tensor in tensors.values():
        crc = zlib.crc32(tensor_bytes(tensor), crc)
    return f"{crc:08x}"
