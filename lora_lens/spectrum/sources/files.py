"""What a path holds: safetensors and their shards, GGUF, adapters. Nothing pickled is opened."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lens._base.errors import InputError, MissingFileError
from lora_lens._base.naming import frames_inside, listed
from lora_lens.spectrum.sources.adapters import (
    in_peft_folder,
    is_adapter,
    of_adapter_file,
    saved_by_lora_lens,
    without_adapter,
)
from lora_lens.spectrum.sources.checkpoint import headers, metadata, read_json, read_tensor
from lora_lens.spectrum.sources.gguf import in_gguf
from lora_lens.spectrum.sources.quantized import HINT, quantized_by
from lora_lens.spectrum.sources.roles import Stored, weights_among

INDEX = ".safetensors.index.json"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


def tensors_in(path: Path) -> list[Stored]:
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise MissingFileError(
            f"no file or folder {path}; a model of the Hugging Face Hub must be on this disk first, "
            "for example with `hf download`"
        )
    if path.name.endswith(INDEX):
        return _in_shards(path)
    if path.suffix == ".safetensors":
        return _in_safetensors(path)
    if path.suffix == ".gguf":
        return [tensor for part in _parts(path) for tensor in in_gguf(part)]
    raise InputError(
        f"{path} is neither .safetensors nor .gguf; pickled checkpoints (.bin, .pt) are not opened, because "
        "a pickle can run code: load it in the program it comes from and save it as safetensors"
    )


def _in_folder(folder: Path) -> list[Stored]:
    if (found := saved_by_lora_lens(folder)) is not None:
        return found
    if (folder / "adapter_config.json").is_file():
        return in_peft_folder(folder)
    for usual in ("model.safetensors", f"model{INDEX}"):
        if (folder / usual).is_file():
            return tensors_in(folder / usual)
    for pattern in (f"*{INDEX}", "*.safetensors", "*.gguf"):
        files = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
        whole = {(m[1], m[3]) if (m := PART.fullmatch(path.stem)) else path.stem for path in files}
        if len(whole) == 1:
            return tensors_in(files[0]) if pattern != "*.safetensors" else _in_files(_parts(files[0]))
        if files:
            raise InputError(f"{folder} holds several: {listed(f.name for f in files)}; give the path of one")
    inside = sorted(config.parent for config in folder.glob("*/adapter_config.json"))
    if len(inside) == 1:
        return in_peft_folder(inside[0])
    if inside:
        names = listed(f.name for f in inside)
        raise InputError(f"{folder} holds several adapters, in {names}; give the path of one")
    raise MissingFileError(
        f"{folder} holds no weights: expected model.safetensors, an index of shards, a .gguf file or "
        "an adapter (pickled .bin files are not opened: save the model again as safetensors)"
    )


def _in_shards(index: Path) -> list[Stored]:
    places = _places(index)
    shards = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index} points to {shard!r}, which is no .safetensors file of its own folder")
        if not (index.parent / shard).is_file():
            raise MissingFileError(f"{index} names {shard}, which is not in its folder; download it as well")
        shards[index.parent / shard] = {key for key, place in places.items() if place == shard}
    return _in_files(shards)


def _in_files(
    files: Iterable[Path] | Mapping[Path, set[str]], others: Iterable[str] = (), evidence: str = ""
) -> list[Stored]:
    """The weights of one model in one or several files.

    Args:
        files: their paths, or of each the keys that an index expects there.
        others: keys in other files of the model.
        evidence: what says that the model is quantized, besides the config.
    """
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    places: dict[str, tuple[Path, str]] = {}
    for path in files:
        found = headers(path)
        expected = files[path] if isinstance(files, Mapping) else found.keys()
        if not expected <= found.keys():
            missing = listed(sorted(expected - found.keys()), most=3)
            raise InputError(f"{path} lacks {missing}, which its index names; download or save it again")
        tensors |= {key: found[key] for key in found if key in expected}
        places |= {key: (path, key) for key in found if key in expected}
    if is_adapter(tensors):
        if len({place for place, _ in places.values()}) > 1:
            raise InputError(f"{path.parent} holds an adapter in several files; save it again as one")
        return of_adapter_file(path, tensors, metadata(path))
    config = path.parent / "config.json"
    facts = read_json(config) if config.is_file() else {}
    own = without_adapter(tensors)
    if len(own) < len(tensors):
        warnings.warn(
            f"{path} holds a model with an adapter in it; what is read are the weights below the adapter, "
            "without its update: for those with it, save the model after PEFT's merge_and_unload",
            stacklevel=frames_inside(),
        )
    return weights_among(
        {name: tensors[key] for name, key in own.items()},
        partial(_read, {name: places[key] for name, key in own.items()}),
        facts,
        others,
        _evidence(path.parent, facts) or evidence,
    )


def _in_safetensors(path: Path) -> list[Stored]:
    others: set[str] = set()
    for index in path.parent.glob(f"*{INDEX}"):
        places = _places(index)
        if path.name in places.values():
            others |= places.keys()
    evidence = ""
    if PART.fullmatch(path.stem) and not others:
        evidence = "this is one of several files, which may hold its scale"
    elif any("quant" in key.lower() for key in metadata(path)):
        evidence = "the file's header speaks of quantization"
    elif beside := [f.name for f in path.parent.glob("*.safetensors") if f != path and HINT.search(f.name)]:
        evidence = f"beside it is {beside[0]}"
    return _in_files([path], others, evidence)


def _read(places: Mapping[str, tuple[Path, str]], name: str, expert: int | None = None) -> Tensor:
    path, key = places[name]
    return read_tensor(path, key, expert)


def _places(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise InputError(f"{index} holds no weight_map from tensor names to files; download or save it again")
    return places


def _evidence(folder: Path, facts: Mapping[str, Any]) -> str:
    if method := quantized_by(facts):
        return f"config.json says that the model is quantized ({method})"
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        if (folder / name).is_file():
            return f"{name} says that the model is quantized"
    return ""


def _parts(path: Path) -> list[Path]:
    """All files of a split model, such as ``model-00002-of-00003.gguf``, or the one file."""
    split = PART.fullmatch(path.stem)
    if not split:
        return [path]
    count = int(split[3])
    parts = [path.with_name(f"{split[1]}-{i + 1:05}-of-{split[3]}{path.suffix}") for i in range(count)]
    for part in parts:
        if not part.is_file():
            raise MissingFileError(f"{path.name} is one of {count} files, and {part} is missing; download it")
    return parts
