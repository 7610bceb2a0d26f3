"""What a file holds: safetensors and their shards, GGUF, and PEFT adapters. Nothing pickled is opened."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lens.errors import InputError, MissingFileError, MissingPackageError
from lora_lens.layers import listed

PACKED = ("qweight", "weight_packed")  # GPTQ and AWQ, compressed-tensors: listed in order to be refused
HEADS = {"head", "heads", "lm_head", "mlp_head", "classifier", "score", "embed_out"}
EMBEDDINGS = {"wte", "wpe", "shared", "relative_attention_bias"}
ROUTERS = {"gate", "router", "ffn_gate_inp"}
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
CONV1D_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}
TRANSPOSED_EXPERTS = {"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"}
GGML_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
GGML_INTEGERS = {"I8", "I16", "I32", "I64"}
GGUF_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by value type
GGUF_STRING, GGUF_ARRAY = 8, 9
ROWS_AT_ONCE = 64
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor where it lies."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[int | None], Tensor]  # the whole tensor, or one of its experts
    usual: bool = True  # chosen without patterns
    problem: str = ""  # why it is no matrix of numbers
    experts: bool = False
    transposed: bool = False
    thirds: bool = True  # if its name says q, k and v: they are one after the other
    factors: Callable[[], tuple[Tensor, Tensor]] | None = None


def tensors_in(path: Path) -> list[Stored]:
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise MissingFileError(
            f"no file or folder {path}; a model of the Hugging Face Hub must be on this disk first, "
            "for example with `hf download`"
        )
    if path.name.endswith(".safetensors.index.json"):
        return _in_shards(path)
    if path.suffix == ".safetensors":
        return _in_safetensors(path)
    if path.suffix == ".gguf":
        return [tensor for part in _gguf_parts(path) for tensor in _in_gguf(part)]
    raise InputError(
        f"{path} is neither .safetensors nor .gguf; pickled checkpoints (.bin, .pt) are not opened, because "
        "a pickle can run code: load it in the program it comes from and save it as safetensors"
    )


def _in_folder(folder: Path) -> list[Stored]:
    if (folder / "adapter_config.json").is_file():
        return _in_adapter(folder)
    for usual in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / usual).is_file():
            return tensors_in(folder / usual)
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.gguf"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return tensors_in(found[0])
        if found:
            raise InputError(f"{folder} holds several: {listed(f.name for f in found)}; give the path of one")
    raise MissingFileError(
        f"{folder} holds no weights: expected model.safetensors, an index of shards, a .gguf file or "
        "an adapter (pickled .bin files are not opened: save the model again as safetensors)"
    )


def _in_shards(index: Path) -> list[Stored]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise InputError(f"{index} holds no weight_map from tensor names to files; download or save it again")
    stored = []
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index} points to {shard!r}, which is no .safetensors file of its own folder")
        if not (index.parent / shard).is_file():
            raise MissingFileError(f"{index} names {shard}, which is not in its folder; download it as well")
        stored += _in_safetensors(index.parent / shard, {k for k, place in places.items() if place == shard})
    return stored


def _in_safetensors(path: Path, expected: set[str] | None = None) -> list[Stored]:
    config = path.parent / "config.json"
    facts = read_json(config) if config.is_file() else {}
    text = facts.get("text_config")
    models = {str(part.get("model_type")) for part in (facts, text) if isinstance(part, dict)}
    headers = _headers(path)
    if expected is not None and not expected <= headers.keys():
        missing = listed(sorted(expected - headers.keys()), most=3)
        raise InputError(f"{path} lacks {missing}, which its index names; download or save it again")
    stored = []
    for key, (shape, dtype) in headers.items():
        name = _weight_name(key, len(shape))
        if name is None or (expected is not None and key not in expected):
            continue
        scaled = f"{key}_scale" in headers or f"{key}_scale_inv" in headers
        problem = problem_of(dtype in FLOATS, dtype, scaled)
        stored.append(_in_file(name, shape, partial(_of_safetensors, path, key), problem, models))
    return stored


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor in a safetensors file."""
    with _opened(path) as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
        return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in parts.items()}


def _of_safetensors(path: Path, key: str, expert: int | None = None) -> Tensor:
    with _opened(path) as file:
        return file.get_tensor(key) if expert is None else file.get_slice(key)[expert]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise MissingFileError(f"no file {path}; pickled files are not opened, save as safetensors instead")
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or malformed ({error}); download or save it again") from error


def _gguf_parts(path: Path) -> list[Path]:
    """All files of a split GGUF, such as ``model-00002-of-00003.gguf``, or the one file."""
    split = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", path.stem)
    count = int(split[2]) if split else 1
    parts = (
        [path.with_name(f"{split[1]}-{i + 1:05}-of-{split[2]}.gguf") for i in range(count)]
        if split
        else [path]
    )
    for part in parts:
        if not part.is_file():
            raise MissingFileError(f"{path.name} is one of {count} files, and {part} is missing; download it")
    return parts


def _in_gguf(path: Path) -> list[Stored]:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise MissingPackageError("reading a GGUF file needs the gguf package: pip install gguf") from error
    stored = []
    try:
        for key, shape, number, offset in _gguf_header(path):
            name, kind = _weight_name(key, len(shape)), GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[kind]
            row = shape[-1] // block * size if shape else size
            if shape and shape[-1] % block:
                raise InputError(f"rows of {shape[-1]} numbers cannot be {kind.name}")
            if offset + math.prod(shape[:-1]) * row > path.stat().st_size:
                raise InputError(f"{key} reaches past its end")
            if name is not None:
                read = partial(_of_gguf, path, offset, shape, row, kind.name)
                stored.append(
                    _in_file(name, shape, read, problem_of(kind.name not in GGML_INTEGERS, kind.name))
                )
    except (ValueError, KeyError, OverflowError, RecursionError, ZeroDivisionError, struct.error) as error:
        raise InputError(f"{path} is truncated or malformed ({error}); download it again") from error
    return stored


def _gguf_header(path: Path) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape, type and place of every tensor.

    gguf's own reader keeps an array for each token of the vocabulary and does
    not end on some damaged files, so only the dequantization is left to it.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:

        def number(code: str) -> int:
            return struct.unpack(f"<{code}", stream.read(struct.calcsize(code)))[0]

        def text() -> str:
            length = number("Q")
            if length > 65535:
                raise InputError(f"a name of {length} bytes")
            return stream.read(length).decode()

        def skip(kind: int, count: int) -> None:
            if kind in (GGUF_STRING, GGUF_ARRAY):
                for _ in range(count):
                    skip(0, number("Q")) if kind == GGUF_STRING else skip(number("I"), number("Q"))
            elif stream.tell() + count * GGUF_WIDTHS[kind] > size:
                raise InputError("its header reaches past its end")
            else:
                stream.seek(count * GGUF_WIDTHS[kind], 1)

        if stream.read(4) != b"GGUF" or number("I") not in (2, 3):
            raise InputError("its first bytes are not those of a little-endian GGUF file of version 2 or 3")
        count, fields, alignment = number("Q"), number("Q"), 32
        for _ in range(fields):
            key, kind = text(), number("I")
            if key == "general.alignment":
                alignment = number("I")
            else:
                skip(kind, 1)
        tensors = []
        for _ in range(count):
            name, dimensions = text(), [number("Q") for _ in range(number("I"))]
            tensors.append((name, tuple(reversed(dimensions)), number("I"), number("Q")))
        start = -(-stream.tell() // alignment) * alignment
    for name, shape, kind, offset in tensors:
        yield name, shape, kind, start + offset


def _of_gguf(
    path: Path, offset: int, shape: tuple[int, ...], row: int, kind: str, expert: int | None = None
) -> Tensor:
    from gguf import GGMLQuantizationType, quants

    if expert is not None:
        shape = shape[1:]
        offset += expert * math.prod(shape[:-1]) * row
    rows = math.prod(shape[:-1])
    data = np.fromfile(path, np.uint8, rows * row, offset=offset)
    if len(data) < rows * row:
        raise InputError(f"{path} ends early; download it again")
    if kind in GGML_FLOATS:
        return torch.from_numpy(data.view(GGML_FLOATS[kind]).reshape(shape))
    values = np.empty((rows, shape[-1]), np.float32)
    try:
        for first in range(0, rows, ROWS_AT_ONCE):  # it takes several times the memory of what it returns
            part = slice(first, first + ROWS_AT_ONCE)
            values[part] = quants.dequantize(data.reshape(rows, row)[part], GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise InputError(f"the gguf package cannot dequantize {kind}, in {path}; try a newer gguf") from error
    return torch.from_numpy(values.reshape(shape))


def read_json(path: Path) -> dict:
    try:
        facts = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON ({error}); download or save it again") from error
    if not isinstance(facts, dict):
        raise InputError(f"{path} holds no JSON object; download or save it again")
    return facts


def _weight_name(key: str, ndim: int) -> str | None:
    """The name of the weight that a file's tensor is, or None for biases, norms, tables and the like."""
    name, _, last = key.rpartition(".")
    if ndim > 1 and last in (*PACKED, "weight"):
        return name or key
    if ndim == 4 and "expert" in key and key.endswith("_blocks"):  # packed MXFP4 of gpt-oss
        return key.removesuffix("_blocks")
    return key if ndim == 3 and "expert" in key else None


def _in_file(
    name: str, shape: tuple[int, ...], read: Callable, problem: str, models: Set[str] = frozenset()
) -> Stored:
    parts = name.lower().split(".")
    experts = len(shape) == 3 and "conv" not in name
    beside = any("embed" in p or "embd" in p for p in parts) or (HEADS | EMBEDDINGS) & set(parts)
    return Stored(
        name,
        shape,
        read,
        usual=not beside
        and name not in ("output", "fc")
        and parts[-1] not in ROUTERS
        and (len(shape) < 4 or bool(problem)),
        problem=problem,
        experts=experts,
        transposed=bool(
            models & TRANSPOSED_EXPERTS if experts else models & CONV1D_MODELS and parts[-1] in CONV1D_LAYERS
        ),
    )


# --- a PEFT adapter ---


def _in_adapter(folder: Path) -> list[Stored]:
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = read_json(config_path)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise InputError(
            f"{folder} holds a {kind} adapter; only LoRA's update is scaling * B @ A: merge this one into "
            "its model and compare the weights before and after"
        )
    if not path.is_file():
        raise MissingFileError(
            f"{folder} holds no adapter_model.safetensors (a pickled adapter_model.bin is not opened, "
            "because a pickle can run code); save the adapter again as safetensors"
        )
    headers = _headers(path)
    stored = []
    for key_a, (shape_a, dtype) in headers.items():
        layer = re.fullmatch(r"(.+)\.lora_(embedding_)?A(\.weight)?", key_a)
        if not layer:
            continue
        name, embedding = layer[1].removeprefix("base_model.model."), bool(layer[2])
        key_b = f"{layer[1]}.lora_{layer[2] or ''}B{layer[3] or ''}"
        shape_b, rank = headers.get(key_b, ((), ""))[0], shape_a[0] if shape_a else 0
        try:
            ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
            expected = ranks.get(get_pattern_key(ranks, name), config["r"])
            alpha = alphas.get(get_pattern_key(alphas, name), config["lora_alpha"])
            scaling = alpha / (math.sqrt(expected) if config.get("use_rslora") else expected)
        except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError, re.error) as error:
            raise InputError(
                f"{config_path} gives no scaling of {name} ({error!r}); save it again"
            ) from error
        if len(shape_a) < 2 or len(shape_b) < 2 or not rank == shape_b[1] == expected:
            raise InputError(
                f"{path}: A {shape_a} and B {shape_b} of {name} are no pair of rank {expected}, "
                "as for an adapted linear layer, embedding or convolution; leave such an adapter out"
            )
        out, rest = shape_b[0], math.prod(shape_a[1:])
        factors = partial(_adapter_factors, path, key_a, key_b, scaling, embedding)
        shape = (rest, out) if embedding else (out, rest)
        problem = problem_of(dtype in FLOATS, dtype)
        stored.append(Stored(name, shape, partial(_product, factors), problem=problem, factors=factors))
    return stored


def _adapter_factors(
    path: Path, key_a: str, key_b: str, scaling: float, embedding: bool
) -> tuple[Tensor, Tensor]:
    """(scaling * B, A) in at least float32, so that scaling rounds nothing of a half-precision adapter."""
    a, b = _of_safetensors(path, key_a), _of_safetensors(path, key_b)
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.flatten(1).to(dtype), b.flatten(1).to(dtype)
    return (scaling * a.T, b.T) if embedding else (scaling * b, a)


def _product(factors: Callable[[], tuple[Tensor, Tensor]], expert: int | None) -> Tensor:
    b, a = factors()
    return b @ a


def problem_of(floating: bool, dtype: str, scaled: bool = False, meta: bool = False) -> str:
    if meta:
        return "is on the meta device, with a shape but no values; load the model's weights first"
    if not floating:
        return f"holds {dtype} values: quantized or packed; dequantize the model, or choose others by name"
    if scaled:
        return f"holds {dtype} values that need the scales stored beside them; dequantize the model first"
    return ""
