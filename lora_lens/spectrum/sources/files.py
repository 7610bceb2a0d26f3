"""What a path holds: safetensors and their shards, GGUF, adapters. Nothing pickled is opened."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lens._base.errors import InputError, MissingFileError
from lora_lens._base.naming import listed
from lora_lens._base.warning import warn
from lora_lens.spectrum.sources.adapters import (
    in_peft_folder,
    is_adapter,
    of_adapter_file,
    saved_by_lora_lens,
    without_adapter,
)
from lora_lens.spectrum.sources.checkpoint import Folder, LocalFolder
from lora_lens.spectrum.sources.gguf import in_gguf
from lora_lens.spectrum.sources.quantized import HINT, Signs, quantization_settings, quantized_by
from lora_lens.spectrum.sources.roles import Stored, weights_among

INDEX = ".safetensors.index.json"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
QUANTIZATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def tensors_at(source: str | Path, revision: str | None = None) -> list[Stored]:
    """The weights of a file or folder on this disk, or else of a repository on the hub.

    Raises:
        ValueError: a revision of what lies on this disk.
    """
    on_disk = Path(source).exists()
    if isinstance(source, str) and not on_disk:
        from lora_lens.spectrum.sources import hub  # files need no huggingface_hub

        if found := hub.repository(source):
            repo, named, inside = found
            return _in_repository(repo, named, inside, revision)
    if on_disk and revision is not None:
        raise InputError(
            f"revision={revision!r} is one of a model on the Hugging Face Hub, and {source} lies on this "
            "disk, which goes first; leave the revision out, or give hf://org/model"
        )
    return tensors_in(Path(source))


def _in_repository(repo: str, named: str | None, inside: str, revision: str | None) -> list[Stored]:
    from lora_lens.spectrum.sources import hub

    if named and revision and named != revision:
        raise InputError(f"the address names revision {named!r}, and revision is {revision!r}; give one")
    revision = named or revision
    try:
        folder = hub.HubFolder(repo, revision)
    except hub.Unreachable as error:
        if kept := hub.cached_snapshot(repo, revision):
            return tensors_in(kept / inside)
        raise hub.Unreachable(f"no file or folder {repo} on this disk, and {error}") from error
    if inside in folder.every:  # a file
        inside, _, name = inside.rpartition("/")
        folder = folder.below(inside)
    else:
        folder, name = folder.below(inside), None
        if {"adapter_config.json", "lora_lens.json"} & folder.names:
            return tensors_in(folder.download())
        if any(file.endswith(".safetensors") for file in folder.names):
            name = chosen_in(folder)
    if name is None or not name.endswith((".safetensors", INDEX)):
        raise hub.no_safetensors(folder)
    return in_folder(folder, name)


def tensors_in(path: Path) -> list[Stored]:
    """The weights, or an adapter's updates, that a file or a folder on this disk holds."""
    if path.is_dir():
        return _in_path(path)
    if not path.is_file():
        raise MissingFileError(
            f"no file or folder {path}; a model on the Hugging Face Hub is named org/model"
        )
    if path.name.endswith(INDEX):
        return _in_shards(LocalFolder(path.parent), path.name)
    if path.suffix == ".safetensors":
        return _in_safetensors(LocalFolder(path.parent), path.name)
    if path.suffix == ".gguf":
        return [
            t for part in _parts(LocalFolder(path.parent), path.name) for t in in_gguf(path.with_name(part))
        ]
    raise InputError(
        f"{path} is neither .safetensors nor .gguf; pickled checkpoints (.bin, .pt) are not opened, because "
        "a pickle can run code: load it in the program it comes from and save it as safetensors"
    )


def _in_path(path: Path) -> list[Stored]:
    if (found := saved_by_lora_lens(path)) is not None:
        return found
    if (path / "adapter_config.json").is_file():
        return in_peft_folder(path)
    if (name := chosen_in(folder := LocalFolder(path))) is not None:
        return tensors_in(path / name) if name.endswith(".gguf") else in_folder(folder, name)
    inside = sorted(config.parent for config in path.glob("*/adapter_config.json"))
    if len(inside) == 1:
        return in_peft_folder(inside[0])
    if inside:
        names = listed(f.name for f in inside)
        raise InputError(f"{path} holds several adapters, in {names}; give the path of one")
    raise MissingFileError(
        f"{path} holds no weights: expected model.safetensors, an index of shards, a .gguf file or "
        "an adapter (pickled .bin files are not opened: save the model again as safetensors)"
    )


def chosen_in(folder: Folder) -> str | None:
    """The one file in a folder, index or first of several parts that holds a model, or None.

    Raises:
        ValueError: there are several.
    """
    names = {name for name in folder.names if not name.startswith(".")}
    for usual in ("model.safetensors", f"model{INDEX}"):
        if usual in names:
            return usual
    for ending in (INDEX, ".safetensors", ".gguf"):
        files = sorted(name for name in names if name.endswith(ending))
        stems = {name: name.removesuffix(ending) for name in files}
        if len({(m[1], m[3]) if (m := PART.fullmatch(stem)) else stem for stem in stems.values()}) == 1:
            return files[0]
        if files:
            raise InputError(
                f"{folder.place('').rstrip('/')} holds several: {listed(files)}; give the path of one"
            )
    return None


def in_folder(folder: Folder, name: str) -> list[Stored]:
    """The weights in the file of that name, in all parts of it, or in those that it is the index of."""
    if name.endswith(INDEX):
        return _in_shards(folder, name)
    parts = _parts(folder, name)
    return _in_files(folder, parts) if len(parts) > 1 else _in_safetensors(folder, name)


def _in_shards(folder: Folder, index: str) -> list[Stored]:
    places, names, shards = _places(folder, index), folder.names, {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise InputError(
                f"{folder.place(index)} points to {shard!r}, which is no .safetensors file of its own folder"
            )
        if shard not in names:
            raise MissingFileError(
                f"{folder.place(index)} names {shard}, which is not in its folder; download it as well"
            )
        shards[shard] = {key for key, place in places.items() if place == shard}
    return _in_files(folder, shards)


def _in_files(
    folder: Folder,
    files: Iterable[str] | Mapping[str, set[str]],
    others: Mapping[str, str] | None = None,
    evidence: str = "",
) -> list[Stored]:
    """The weights of one model in one or several files.

    Args:
        files: their names, or of each the keys that an index expects there.
        others: the files of other keys of the model, whose weights are not wanted.
        evidence: what says that the model is quantized, besides the config.
    """
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    places: dict[str, tuple[str, str]] = {}
    about: dict[str, str] = {}
    for file, found in _all_headers(folder, files):
        expected = files[file] if isinstance(files, Mapping) else found.keys()
        if not expected <= found.keys():
            missing = listed(sorted(expected - found.keys()), most=3)
            raise InputError(
                f"{folder.place(file)} lacks {missing}, which its index names; download or save it again"
            )
        tensors |= {key: found[key] for key in found if key in expected}
        places |= {key: (file, key) for key in found if key in expected}
        about |= folder.metadata(file)
    if is_adapter(tensors):
        if len({place for place, _ in places.values()}) > 1:
            raise InputError(f"{folder.place('')} holds an adapter in several files; save it again as one")
        return of_adapter_file(folder.local(file), tensors, about)
    facts = folder.json("config.json") if "config.json" in folder.names else {}
    own = without_adapter(tensors)
    if len(own) < len(tensors):
        warn(
            f"{folder.place(file)} holds a model with an adapter in it; what is read are the weights below "
            "the adapter, without its update: for those with it, save the model after PEFT's "
            "merge_and_unload",
        )
    named = {name: tensors[key] for name, key in own.items()}
    at = {name: places[key] for name, key in own.items()}
    beside = _scales_elsewhere(folder, named, others or {})
    return weights_among(
        named | {key: fact for key, (_, fact) in beside.items()},
        partial(_read, folder, at | {key: (shard, key) for key, (shard, _) in beside.items()}),
        facts,
        (others or {}).keys() - beside.keys(),
        _evidence(folder, facts) or evidence,
        _settings(folder, facts),
        about,
    )


def _all_headers(
    folder: Folder, files: Iterable[str]
) -> Iterable[tuple[str, dict[str, tuple[tuple[int, ...], str]]]]:
    """The headers of all files, several at a time, since those on a hub take long to answer."""
    with ThreadPoolExecutor(8) as pool:
        yield from zip(files, pool.map(folder.headers, files), strict=True)


def _scales_elsewhere(
    folder: Folder, tensors: Iterable[str], others: Mapping[str, str]
) -> dict[str, tuple[str, tuple[tuple[int, ...], str]]]:
    """The file, shape and dtype of what other files hold of the layers that are quantized in this one."""
    own = set(tensors)
    layers = {key.removesuffix(".weight") for key in own} | set(Signs(own).payloads.values())
    wanted = [key for key, layer in Signs(others).keys.items() if layer in layers and key not in own]
    found: dict[str, tuple[str, tuple[tuple[int, ...], str]]] = {}
    for file in sorted({others[key] for key in wanted} & folder.names):
        inside = folder.headers(file)
        found |= {key: (file, inside[key]) for key in wanted if others[key] == file and key in inside}
    return found


def _in_safetensors(folder: Folder, name: str) -> list[Stored]:
    others: dict[str, str] = {}
    names = folder.names
    for index in sorted(other for other in names if other.endswith(INDEX)):
        places = _places(folder, index)
        if name in places.values():
            others |= {key: shard for key, shard in places.items() if shard != name}
    evidence = ""
    if PART.fullmatch(name.removesuffix(".safetensors")) and not others:
        evidence = "this is one of several files, which may hold its scale"
    elif any("quant" in key.lower() for key in folder.metadata(name)):
        evidence = "the file's header speaks of quantization"
    elif beside := sorted(n for n in names if n != name and n.endswith(".safetensors") and HINT.search(n)):
        evidence = f"beside it is {beside[0]}"
    return _in_files(folder, [name], others, evidence)


def _read(
    folder: Folder, places: Mapping[str, tuple[str, str]], name: str, expert: int | None = None
) -> Tensor:
    file, key = places[name]
    return folder.read(file, key, expert)


def _places(folder: Folder, index: str) -> dict[str, str]:
    places = folder.json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise InputError(
            f"{folder.place(index)} holds no weight_map from tensor names to files; download or save it again"
        )
    return places


def _evidence(folder: Folder, facts: Mapping[str, Any]) -> str:
    if method := quantized_by(facts):
        return f"config.json says that the model is quantized ({method})"
    for name in QUANTIZATION:
        if name in folder.names:
            return f"{name} says that the model is quantized"
    return ""


def _settings(folder: Folder, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the config says about quantization, or a file of its own, as GPTQ's and AWQ's programs write."""
    if found := quantization_settings(facts):
        return found
    names = folder.names
    return next((folder.json(name) for name in QUANTIZATION if name in names), {})


def _parts(folder: Folder, name: str) -> list[str]:
    """All files of a split model, such as ``model-00002-of-00003.gguf``, or the one file."""
    stem, dot, ending = name.rpartition(".")
    split = PART.fullmatch(stem)
    if not split:
        return [name]
    count, names = int(split[3]), folder.names
    parts = [f"{split[1]}-{i + 1:05}-of-{split[3]}{dot}{ending}" for i in range(count)]
    for part in parts:
        if part not in names:
            raise MissingFileError(
                f"{name} is one of {count} files, and {folder.place(part)} is missing; download it"
            )
    return parts
