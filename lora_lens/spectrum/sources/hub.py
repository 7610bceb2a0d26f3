"""A model on the Hugging Face Hub: its headers are read first, then only the bytes of the chosen matrices.

Tokens, the endpoint and the cache are huggingface_hub's own, with its environment variables. Configs and
indexes are kept in that cache; what it already holds of the weights is read from there, and none are added.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # its HTTPError is httpx's or httpx2's
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from lora_lens._base.errors import InputError, MissingFileError
from lora_lens._base.naming import listed
from lora_lens.spectrum.sources.checkpoint import DTYPES, headers, metadata, read_json, read_tensor

BARE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")
ADDRESS = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^@]+?))?(/(?P<inside>[^@]+?))?/?")
FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".json", ".zip", ".npz")
LONGEST = 100 * 2**20  # bytes of a header, which safetensors allows
Header = dict[str, Any]


class Unreachable(MissingFileError):
    """The hub could not be asked, as without a network."""


def repository(source: str) -> tuple[str, str | None, str] | None:
    """Repository, revision and place in it of "org/model" or "hf://org/model@revision/folder", or None."""
    if found := ADDRESS.fullmatch(source):
        revision, inside = found["revision"], found["inside"] or ""
        if revision and "/" in revision and not revision.startswith("refs/"):  # @main/folder
            revision, _, more = revision.partition("/")
            inside = f"{more}/{inside}".strip("/")
        return found["repo"], revision, inside
    if BARE.fullmatch(source) and not source.endswith(FILES):
        return source, None, ""
    return None


class HubFolder:
    """A folder of a repository at one commit; see :class:`lora_lens.spectrum.sources.checkpoint.Folder`.

    Attributes:
        repo: its name, org/model.
        commit: the hash that the revision had when it was first asked for.
        inside: the folder in it, with a slash at its end, or "".
        every: the names of all files in the repository.

    Raises:
        FileNotFoundError: no such repository, revision or folder.
        ValueError: it is gated, or the hub answers with another error.
        Unreachable: no answer.
    """

    def __init__(self, repo: str, revision: str | None = None):
        self.repo, self.inside = repo, ""
        with answered(repo, revision):
            info = HfApi().model_info(repo, revision=revision)
        self.commit = info.sha or revision or "main"
        self.every = {file.rfilename for file in info.siblings or ()}
        self._headers: dict[str, tuple[int, Header]] = {}
        self._lock = Lock()

    def below(self, inside: str) -> HubFolder:
        """A folder in it, at the same commit."""
        folder = copy(self)
        folder.inside, folder._headers = f"{inside}/" if inside else "", {}
        return folder

    @property
    def names(self) -> set[str]:
        own = (name.removeprefix(self.inside) for name in self.every if name.startswith(self.inside))
        return {name for name in own if "/" not in name}

    def place(self, name: str) -> str:
        return f"{self.repo}/{self.inside}{name}".rstrip("/")

    def local(self, name: str) -> Path:
        """The file in huggingface_hub's cache, downloaded if it is not there."""
        with answered(self.repo, self.commit):
            return Path(hf_hub_download(self.repo, f"{self.inside}{name}", revision=self.commit))

    def download(self) -> Path:
        """The whole folder in that cache, as for an adapter."""
        with answered(self.repo, self.commit):
            patterns = [f"{self.inside}*.json", f"{self.inside}*.safetensors"]
            found = snapshot_download(self.repo, revision=self.commit, allow_patterns=patterns)
        return Path(found) / self.inside

    def json(self, name: str) -> dict[str, Any]:
        return read_json(self.local(name))

    def headers(self, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
        if path := self._cached(name):
            return headers(path)
        _, header = self._header(name)
        return {key: (tuple(of["shape"]), of["dtype"]) for key, of in header.items() if key != "__metadata__"}

    def metadata(self, name: str) -> dict[str, str]:
        if path := self._cached(name):
            return metadata(path)
        return dict(self._header(name)[1].get("__metadata__") or {})

    def read(self, name: str, key: str, expert: int | None = None) -> Tensor:
        if path := self._cached(name):
            return read_tensor(path, key, expert)
        start, header = self._header(name)
        (first, last), shape = header[key]["data_offsets"], tuple(header[key]["shape"])
        if expert is not None:
            size, shape = (last - first) // shape[0], shape[1:]
            first, last = first + expert * size, first + (expert + 1) * size
        dtype = DTYPES.get(header[key]["dtype"])
        if dtype is None or last - first != math.prod(shape) * dtype.itemsize:
            raise InputError(f"{self.place(name)}: {key} is of {header[key]['dtype']}, which is not read")
        if first == last:
            return torch.empty(shape, dtype=dtype)
        content = bytearray(self._bytes(name, start + first, start + last))
        return torch.frombuffer(content, dtype=dtype).reshape(shape)

    def _cached(self, name: str) -> Path | None:
        found = try_to_load_from_cache(self.repo, f"{self.inside}{name}", revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def _header(self, name: str) -> tuple[int, Header]:
        """Where the data of a safetensors file starts, and what its header says of each tensor."""
        with self._lock:
            known = self._headers.get(name)
        if known:
            return known
        (length,) = struct.unpack("<Q", self._bytes(name, 0, 8))
        if length > LONGEST:
            raise InputError(f"{self.place(name)} is truncated or malformed: its header has {length} bytes")
        content = self._bytes(name, 8, 8 + length)
        try:
            header = json.loads(content)
            for key, of in header.items():
                if key != "__metadata__":
                    first, last = of["data_offsets"]
                    if (
                        not 0 <= first <= last
                        or not isinstance(of["dtype"], str)
                        or min(of["shape"], default=0) < 0
                    ):
                        raise ValueError(f"its {key} has no place")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.place(name)} is truncated or malformed ({error})") from error
        with self._lock:
            self._headers[name] = 8 + length, header
        return 8 + length, header

    def _bytes(self, name: str, first: int, last: int) -> bytes:
        """A range of a file; with no cache, the file system asks for no byte more."""
        with answered(self.repo, self.commit):
            path = f"{self.repo}@{self.commit}/{self.inside}{name}"
            with HfFileSystem().open(path, "rb", cache_type="none") as file:
                file.seek(first)
                content: bytes = file.read(last - first)
        if len(content) != last - first:
            raise InputError(f"{self.place(name)} ends early, or its server sends no ranges")
        return content


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """What huggingface_hub's cache holds of a repository, for when the hub cannot be asked."""
    usual = ("config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json")
    found = map(partial(try_to_load_from_cache, repo, revision=revision), usual)
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def no_safetensors(folder: HubFolder) -> MissingFileError:
    """What to say of a folder without safetensors at its top."""
    names, place = folder.names, folder.place("")
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        return MissingFileError(
            f"{place} holds no safetensors, but {listed(gguf, most=3)}: download the one to read, with "
            f"`hf download {folder.repo} {folder.inside}{gguf[0]}`, and give its path"
        )
    if pickled := sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))):
        return MissingFileError(
            f"{place} holds no safetensors, but {listed(pickled, most=3)}: pickled files are not opened, "
            "because a pickle can run code; look for a revision with safetensors, or save the model as such"
        )
    below = (
        n.removeprefix(folder.inside).rpartition("/")[0] for n in folder.every if n.endswith(".safetensors")
    )
    inside = sorted({f"hf://{folder.repo}/{folder.inside}{path}" for path in below if path})
    elsewhere = f" but in its folders; give one of {listed(inside)}" if inside else ""
    return MissingFileError(f"{place} holds no safetensors{elsewhere}")


@contextmanager
def answered(repo: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub in words."""
    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            f"{repo} is gated: ask for access on its page, and log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise MissingFileError(
            f"no file or folder {repo} on this disk, and no model of that name on the Hugging Face Hub; if "
            "it is private, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise Unreachable(f"the Hugging Face Hub could not be asked for {repo}: {error}") from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise MissingFileError(f"the Hugging Face Hub has {repo}, and not this{at}: {error}") from error
    except HFValidationError as error:
        raise InputError(f"{repo} is no name of a repository: {error}") from error
    except HfHubHTTPError as error:
        raise InputError(f"the Hugging Face Hub does not give {repo}{at}: {error}") from error
    except HTTPError as error:  # of the connection
        raise Unreachable(f"the Hugging Face Hub could not be asked for {repo}: {error}") from error
