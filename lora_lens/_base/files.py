"""Files that appear whole or not at all, also after a kill or on a full disk."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_lens._base.errors import StoreError


def write_atomically(path: Path, record: dict[str, Any]) -> None:
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
    except FileNotFoundError:
        raise StoreError(
            f"cannot write {path}: its folder was removed, and with it the runs that had ended; start again "
            "where nobody removes it"
        ) from None
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; the runs that have ended are kept: start again "
            "once there is room"
        ) from None


def create_file(path: Path, content: bytes) -> None:
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
