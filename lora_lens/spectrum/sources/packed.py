"""Quantized layers of a file as matrices: packed integers unpacked, scales applied.

A format is recognized by the names, shapes and dtypes of what a layer consists of, and by the config where
these leave a choice. What comes out is float32, whatever dtype the model computes in; no library is needed,
but torchao for its own tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_lens._base.errors import InputError, MissingPackageError
from lora_lens._base.naming import listed
from lora_lens.spectrum.sources.checkpoint import DTYPES
from lora_lens.spectrum.sources.quantized import NARROW

Shape = tuple[int, ...]
Read = Callable[[int | None], Tensor]

# The scale of a weight: DeepSeek's and transformers' names, compressed-tensors', fbgemm's and ModelOpt's,
# ComfyUI's and Mistral's. All multiply, also those that are called inverse.
SCALES = ("weight_scale_inv", "scale_inv", "weight_scale", "scale", "scale_weight", "qscale_weight")
EXPONENTS = {"U8", "F8_E8M0"}  # a scale 2^(byte - 127), of OCP's microscaling formats
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
POWERS = tuple(2**i for i in range(4, 10))  # sizes of blocks and groups where no config names one
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # in which of 8 places of an int32 column i lies
# Who reads what is not read here, by a part of the layer, or by the dtype of its weight.
OTHERS = {
    "W_q": "HQQ, which the hqq package reads",
    "codebooks": "AQLM, which the aqlm package reads",
    "weight._data": "quanto, which the optimum-quanto package reads",
    "centroids.weight": "VPTQ, which the vptq package reads",
    "trellis": "EXL3, which the exllamav3 package reads",
    "q_weight": "EXL2, which the exllamav2 package reads",
    "Qidxs": "QuIP#, which the quip-sharp project reads",
    "U32": "MLX, which the mlx package reads",
}


@dataclass(frozen=True)
class Plain:
    """A quantized layer as the matrix, or the stack of experts' matrices, that it stands for.

    Attributes:
        shape: (out, in), of experts (experts, out, in).
        read: dequantizes the matrix, or one expert of the stack, in float32.
        last_is_in: whether its format says that the last axis is the input's.
    """

    shape: Shape
    read: Read
    last_is_in: bool = False


@dataclass(frozen=True)
class Layer:
    """What a file holds of one quantized layer.

    Attributes:
        name: of the layer.
        tensors: key, shape and dtype by the part's name without the layer's: weight, weight_scale, ...
        fetch: reads a tensor, or one expert of it, by key.
        settings: what the config says about quantization.
        header: what the file says about itself.
        stacked: whether it is a stack of experts.
    """

    name: str
    tensors: Mapping[str, tuple[str, Shape, str]]
    fetch: Callable[[str, int | None], Tensor]
    settings: Mapping[str, Any]
    header: Mapping[str, str]
    stacked: bool = False

    def holds(self, *needed: str, maybe: tuple[str, ...] = ()) -> bool:
        """Whether it consists of these parts and no others."""
        return {*needed} <= self.tensors.keys() <= {*needed, *maybe}

    def shape(self, part: str) -> Shape:
        return self.tensors[part][1]

    def dtype(self, part: str) -> str:
        return self.tensors[part][2]

    def read(self, part: str, expert: int | None = None) -> Tensor:
        return self.fetch(self.tensors[part][0], expert)

    def require(self, fits: bool, *parts: str) -> None:
        """Raises InputError: the shapes of these parts do not belong together."""
        if not fits:
            shapes = " and ".join(f"{part} {self.shape(part)}" for part in parts)
            raise InputError(
                f"is quantized, and its parts do not fit together: {shapes}; download or save it again, or "
                "choose others by name"
            )


def dequantized(layer: Layer) -> Plain | None:
    """The matrix that a quantized layer stands for; None if its format is not read.

    Raises:
        InputError: a part is missing, or of another shape than the others; the message goes on from the
            layer's name.
    """
    return next(filter(None, (read(layer) for read in FORMATS)), None)


def library_of(layer: Layer) -> str:
    """Who reads a format that is not read here, as "HQQ, which the hqq package reads", or ""."""
    marks = {*layer.tensors, *(dtype for part, (_, _, dtype) in layer.tensors.items() if part == "weight")}
    return next((who for mark, who in OTHERS.items() if mark in marks), "")


# --- one number per value: float8 and int8 ---


def _scaled(layer: Layer) -> Plain | None:
    """float8 or int8 values times the scale of their tensor, row, column, group or block."""
    scale = next((part for part in SCALES if part in layer.tensors), "")
    zero = next((part for part in ("weight_zero_point", "zero_point") if part in layer.tensors), "")
    if not scale or not layer.holds("weight", scale, maybe=("comfy_quant", zero)):
        return None
    if layer.dtype("weight") not in NARROW | {"I8"}:
        return None
    comfy, shape = _of_comfy(layer), layer.shape("weight")
    kind = str(comfy.get("format", "float8"))
    if not kind.startswith(("float8", "int8", "mxfp8")) or comfy.get("convrot"):
        return None
    if layer.dtype("weight") == "I8" and layer.dtype(scale) == "F8_E8M0":
        return None  # two 4-bit floats in a byte
    rows, columns = _matrix_shape(shape, layer.stacked)
    if kind == "mxfp8":
        layer.require(math.prod(layer.shape(scale)) == _padded(rows, columns // 32), "weight", scale)
        return Plain(shape, partial(_read_mxfp8, layer, scale))
    blocks = _blocks(layer, scale, rows, columns)
    if zero:
        layer.require(layer.shape(zero) == layer.shape(scale), scale, zero)
    return Plain(shape, partial(_read_scaled, layer, scale, zero, blocks))


def _read_scaled(layer: Layer, scale: str, zero: str, blocks: tuple[int, int], expert: int | None) -> Tensor:
    weight = layer.read("weight", expert).float()
    values = weight.flatten(1)
    if zero:
        values = _by_blocks(values, _plane(layer, zero, expert).neg_(), blocks, torch.Tensor.add_)
    values = _by_blocks(values, _plane(layer, scale, expert), blocks, torch.Tensor.mul_)
    return values.reshape(weight.shape)


def _plane(layer: Layer, part: str, expert: int | None) -> Tensor:
    """A part as (rows, columns) of blocks, one expert's if there is one for each."""
    shape = layer.shape(part)
    of_each = expert is not None and math.prod(shape) > 1
    plane = _number(layer.read(part, expert if of_each else None), part)
    return plane.reshape(-1, 1) if plane.ndim < 2 else plane.flatten(1)


def _number(tensor: Tensor, part: str) -> Tensor:
    """A scale as float32; a byte stands for a power of two."""
    if tensor.dtype == torch.uint8 and "zero" not in part:
        return (tensor.float() - 127).exp2()
    return tensor.float()


def _matrix_shape(shape: Shape, stacked: bool) -> tuple[int, int]:
    out, *rest = shape[1:] if stacked else shape
    return out, math.prod(rest)


def _blocks(layer: Layer, scale: str, rows: int, columns: int) -> tuple[int, int]:
    """The (rows, columns) that share a number of the scale; the last block of an axis may be cut off."""
    found = layer.shape(scale)
    if layer.stacked and math.prod(found) > 1:
        layer.require(found[0] == layer.shape("weight")[0], "weight", scale)
        found = found[1:]
    counts = (*found, 1, 1)[:2]
    layer.require(len(found) <= 2 and 0 not in counts, "weight", scale)
    named = _named_blocks(layer.settings)
    if layer.dtype(scale) in EXPONENTS:
        named = [*named, (1, 32)]
    for a, b in named:
        if counts == (-(-rows // a), -(-columns // b)):
            return a, b
    ways = [_ways(size, count, bool(named)) for size, count in zip((rows, columns), counts, strict=True)]
    layer.require(all(len(way) == 1 for way in ways), "weight", scale)
    return ways[0][0], ways[1][0]


def _ways(size: int, count: int, named: bool) -> list[int]:
    """How many entries of an axis may share one of ``count`` numbers."""
    if count in (1, size):
        return [size if count == 1 else 1]
    return [] if named else [block for block in POWERS if -(-size // block) == count]


def _named_blocks(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The sizes of blocks and groups that a config names: transformers' and compressed-tensors'."""
    found: list[tuple[int, int]] = []
    groups = settings.get("config_groups")
    parts = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if groups else []
    for part in (settings, *(part for part in parts if isinstance(part, Mapping))):
        block = part.get("weight_block_size") or part.get("block_structure")
        if isinstance(block, (list, tuple)) and len(block) == 2 and all(_positive(b) for b in block):
            found.append((block[0], block[1]))
        if _positive(part.get("group_size")) and part is not settings:
            found.append((1, part["group_size"]))
    return found


def _positive(number: object) -> bool:
    return isinstance(number, int) and number > 0


def _by_blocks(
    values: Tensor, numbers: Tensor, blocks: tuple[int, int], apply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Apply each number to its block of (rows, columns), in place, with no copy of the whole."""
    (rows, columns), (high, wide) = values.shape, blocks
    if columns % wide == 0:
        grouped = values.view(rows, columns // wide, wide)
        numbers = numbers.unsqueeze(-1)
    else:
        grouped, numbers = values, numbers.repeat_interleave(wide, dim=1)[:, :columns]
    if high == 1 or len(numbers) == 1:
        apply(grouped, numbers)
    else:
        for i, line in enumerate(numbers):
            apply(grouped[i * high : (i + 1) * high], line)
    return values


# --- 4-bit floats: two in a byte ---


def _mxfp4(layer: Layer) -> Plain | None:
    """gpt-oss: blocks of 32 along the input, 16 bytes each, and the exponent of each block."""
    for blocks, scales in (("blocks", "scales"), ("weight.blocks", "weight.scales")):
        if layer.holds(blocks, scales) and layer.dtype(blocks) == "U8" == layer.dtype(scales):
            *first, count, size = layer.shape(blocks)
            layer.require(layer.shape(scales) == (*first, count), blocks, scales)
            return Plain((*first, 2 * count * size), partial(_read_fp4, layer, blocks, scales, ""), True)
    if "blocks" in layer.tensors and layer.dtype("blocks") == "U8" and len(layer.shape("blocks")) > 2:
        raise InputError(
            "holds MXFP4 blocks without their scales; download or save it again, or choose others by name"
        )
    return None


def _packed_fp4(layer: Layer) -> Plain | None:
    """NVFP4 and MXFP4 of ModelOpt, compressed-tensors, DeepSeek and ComfyUI: one scale for 16 or 32."""
    packed = "weight_packed" if "weight_packed" in layer.tensors else "weight"
    scale = next((part for part in ("weight_scale", "scale") if part in layer.tensors), "")
    top = next((part for part in ("weight_scale_2", "weight_global_scale") if part in layer.tensors), "")
    if not scale or not layer.holds(packed, scale, maybe=(top, "comfy_quant")):
        return None
    of_scale = layer.dtype(scale)
    nv = of_scale == "F8_E4M3" and bool(top) and layer.dtype(packed) == "U8"
    mx = of_scale in EXPONENTS and not top and layer.dtype(packed) in ("U8", "I8")
    comfy = _of_comfy(layer)
    if not (nv or mx) or comfy.get("format", "nvfp4") != "nvfp4" or (comfy and not nv):
        return None
    *first, bytes_in = layer.shape(packed)
    group = 16 if nv else 32
    fits = bytes_in * 2 // group == (layer.shape(scale) or (0,))[-1] and layer.shape(scale)[:-1] == (*first,)
    if comfy:
        fits = math.prod(layer.shape(scale)) == _padded(first[-1], bytes_in * 2 // group)
    if mx and not fits and 3 * layer.shape(scale)[-1] * 8 == bytes_in:
        return None  # 6-bit floats
    layer.require(fits and bytes_in * 2 % group == 0, packed, scale)
    if top:
        of_each = layer.stacked and math.prod(layer.shape(top)) == first[0]
        layer.require(math.prod(layer.shape(top)) == 1 or of_each, packed, top)
    return Plain((*first, 2 * bytes_in), partial(_read_fp4, layer, packed, scale, top), True)


def _read_fp4(layer: Layer, packed: str, scale: str, top: str, expert: int | None) -> Tensor:
    codes = layer.read(packed, expert).view(torch.uint8)
    codes = codes.flatten(-2) if codes.ndim > 2 else codes
    swizzled = bool(_of_comfy(layer))
    values = _by_table(codes, torch.tensor(FP4), high_first=swizzled)
    numbers = layer.read(scale, expert)
    if swizzled:
        numbers = _unswizzled(numbers, len(values), values.shape[1] // 16)
    numbers = _number(numbers, scale)
    values = _by_blocks(values, numbers, (1, values.shape[1] // numbers.shape[1]), torch.Tensor.mul_)
    if top:
        of_each = expert is not None and math.prod(layer.shape(top)) > 1
        number = layer.read(top, expert if of_each else None).float().reshape(())
        values = values.mul_(number) if top == "weight_scale_2" else values.div_(number)
    return values


def _by_table(codes: Tensor, table: Tensor, high_first: bool) -> Tensor:
    """Bytes of two codes each as (rows, 2 * bytes) of the table's numbers."""
    codes_of = torch.arange(256)
    pairs = torch.stack([table[codes_of >> 4], table[codes_of & 15]], 1)
    pairs = pairs if high_first else pairs.flip(1)
    return torch.nn.functional.embedding(codes.int(), pairs).flatten(-2)


# --- ComfyUI: what it writes beside a weight, and scales in the order that tensor cores read them ---


def _of_comfy(layer: Layer) -> Mapping[str, Any]:
    """What ComfyUI notes of the layer, beside it or in the file's header; {} if the file is not its."""
    if "comfy_quant" in layer.tensors:
        return _json(bytes(layer.read("comfy_quant").flatten().tolist()))
    if "_quantization_metadata" not in layer.header:
        return {}
    layers = _json(layer.header["_quantization_metadata"]).get("layers")
    about = layers.get(layer.name) if isinstance(layers, Mapping) else None
    return about if isinstance(about, Mapping) else {"format": "one that its header does not name"}


def _json(text: str | bytes) -> Mapping[str, Any]:
    try:
        facts = json.loads(text)
    except ValueError:
        facts = None
    if not isinstance(facts, Mapping):
        raise InputError("is quantized, and what is stored about it is no JSON; download it again")
    return facts


def _padded(rows: int, columns: int) -> int:
    return -(-rows // 128) * 128 * (-(-columns // 4) * 4)


def _unswizzled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales (rows, columns) from the tiles of 128 x 4 in which cuBLAS takes block scales.

    A tile holds row 32 i + j, column k at 16 j + 4 i + k.
    """
    high, wide = -(-rows // 128), -(-columns // 4)
    tiles = scales.reshape(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * 128, wide * 4)[:rows, :columns]


def _read_mxfp8(layer: Layer, scale: str, expert: int | None) -> Tensor:
    values = layer.read("weight", expert).float()
    numbers = _unswizzled(layer.read(scale, expert), len(values), values.shape[1] // 32)
    return _by_blocks(values, _number(numbers, scale), (1, 32), torch.Tensor.mul_)


# --- packed integers: GPTQ, AWQ, compressed-tensors ---


def _gptq_or_awq(layer: Layer) -> Plain | None:
    """Both keep qweight, qzeros and scales (groups, out); the shapes tell them apart."""
    if "qweight" not in layer.tensors or not {"qzeros", "scales"} & layer.tensors.keys():
        return None
    if missing := {"qzeros", "scales"} - layer.tensors.keys():
        raise InputError(
            f"is quantized, and its {listed(sorted(missing))} is missing; download or save it again"
        )
    if not layer.holds("qweight", "qzeros", "scales", maybe=("g_idx",)) or layer.stacked:
        return None
    if {layer.dtype("qweight"), layer.dtype("qzeros")} != {"I32"}:
        return None
    shapes = [layer.shape(part) for part in ("qweight", "qzeros", "scales")]
    layer.require(all(len(shape) == 2 for shape in shapes), "qweight", "qzeros", "scales")
    (high, wide), (groups, zeros), (count, out) = shapes
    layer.require(groups == count > 0, "qzeros", "scales")
    if wide == out:
        return _gptq(layer, high, out, groups, zeros)
    if wide * 8 != out or "g_idx" in layer.tensors:
        return None
    layer.require(zeros == wide and high % groups == 0, "qweight", "qzeros", "scales")
    return Plain((out, high), partial(_read_awq, layer), True)


def _gptq(layer: Layer, high: int, out: int, groups: int, zeros: int) -> Plain | None:
    bits = layer.settings.get("bits")
    if "g_idx" in layer.tensors and (size := math.prod(layer.shape("g_idx"))):
        ways = [b for b in (2, 3, 4, 8) if high * 32 == size * b]
        layer.require(len(ways) == 1, "qweight", "g_idx")
        bits = ways[0]
    elif bits not in (2, 3, 4, 8):
        return None
    else:
        size = high * 32 // bits
        layer.require(high * 32 % bits == 0 and size % groups == 0, "qweight", "scales")
    layer.require(zeros == -(-out * bits // 32), "qzeros", "scales")
    kind = layer.settings.get("checkpoint_format", "gptq")
    method = str(layer.settings.get("quant_method", "gptq" if "bits" in layer.settings else ""))
    if kind not in ("gptq", "gptq_v2") or method != "gptq":
        what = f"of {method}, {kind}" if method else "and no config says how its zero points are stored"
        raise InputError(
            f"is quantized in GPTQ's packing, {what}: the gptqmodel package reads it; add the config.json or "
            "quantize_config.json that belongs to it, dequantize the model, or choose others by name"
        )
    return Plain((out, size), partial(_read_gptq, layer, bits, size, kind == "gptq"), True)


def _read_gptq(layer: Layer, bits: int, size: int, less_one: bool, expert: int | None) -> Tensor:
    scales = layer.read("scales").float().T.contiguous()  # (out, groups)
    codes = _unpacked(layer.read("qweight").T.contiguous(), bits, size)
    zeros = _unpacked(layer.read("qzeros"), bits, len(scales)).T
    if less_one:  # the first format stores the zero point less one
        zeros = (zeros + 1) & (2**bits - 1)
    groups = layer.read("g_idx").flatten() if "g_idx" in layer.tensors else None
    if groups is not None and len(groups) == 0:
        groups = None
    return _affine(codes, scales, zeros, groups)


def _read_awq(layer: Layer, expert: int | None) -> Tensor:
    codes, zeros = (_awq_columns(layer.read(part)) for part in ("qweight", "qzeros"))
    return _affine(codes.T.contiguous(), layer.read("scales").float().T.contiguous(), zeros.T, None)


def _awq_columns(words: Tensor) -> Tensor:
    codes = _unpacked(words, 4, 8 * words.shape[1])
    return codes.view(len(words), -1, 8)[:, :, list(AWQ_ORDER)].flatten(1)


def _packed_integers(layer: Layer) -> Plain | None:
    """compressed-tensors' pack-quantized: integers of 1 to 8 bits, of which 2^(bits - 1) was added."""
    more = ("weight_zero_point", "weight_shape", "weight_g_idx")
    if not layer.holds("weight_packed", "weight_scale", maybe=more) or layer.dtype("weight_packed") != "I32":
        return None
    if "weight_shape" not in layer.tensors:
        raise InputError(
            "is quantized, and its weight_shape is missing; download or save it again, or choose others by "
            "name"
        )
    if layer.settings.get("transform_config"):
        raise InputError(
            "is quantized after a transform (config.json's transform_config), which compressed-tensors "
            "undoes in the model; choose others by name"
        )
    shape = tuple(int(size) for size in layer.read("weight_shape").flatten().tolist())
    packed, scale = layer.shape("weight_packed"), layer.shape("weight_scale")
    layer.require(len(packed) == len(shape) > 1 and packed[:-1] == shape[:-1], "weight_packed")
    columns = shape[-1]
    ways = [bits for bits in range(1, 9) if packed[-1] == -(-columns * bits // 32)]
    if len(ways) > 1:  # of few columns; then the config decides
        ways = [bits for bits in ways if bits in _named_bits(layer.settings)]
    if len(ways) != 1:
        raise InputError(
            f"of shape {shape} is packed into {packed}, which fits no or several numbers of bits; the "
            "compressed-tensors package that wrote it reads it; choose others by name"
        )
    groups = math.prod(scale[len(shape) - 1 :])
    rows_fit = scale[: len(shape) - 1] == shape[:-1] or math.prod(scale) == 1
    ordered = "weight_g_idx" in layer.tensors
    layer.require(
        rows_fit and groups > 0 and (ordered or columns % groups == 0), "weight_packed", "weight_scale"
    )
    if "weight_zero_point" in layer.tensors:
        expected = (*shape[:-2], -(-shape[-2] * ways[0] // 32), groups)
        layer.require(layer.shape("weight_zero_point") == expected, "weight_scale", "weight_zero_point")
    return Plain(shape, partial(_read_packed_integers, layer, ways[0], shape), True)


def _read_packed_integers(layer: Layer, bits: int, shape: Shape, expert: int | None) -> Tensor:
    rows, columns = shape[-2:]
    codes = _unpacked(layer.read("weight_packed", expert), bits, columns)
    scale = _plane(layer, "weight_scale", expert).expand(rows, -1)
    if "weight_zero_point" in layer.tensors:
        words = layer.read("weight_zero_point", expert)
        zeros = _unpacked(words.T.contiguous(), bits, rows).T  # both have the same offset
    else:
        zeros = torch.full((1, 1), 2 ** (bits - 1), dtype=torch.uint8).expand(scale.shape)
    groups = layer.read("weight_g_idx", expert) if "weight_g_idx" in layer.tensors else None
    return _affine(codes, scale, zeros, groups)


def _named_bits(settings: Mapping[str, Any]) -> set[object]:
    groups = settings.get("config_groups")
    parts = groups.values() if isinstance(groups, Mapping) else ()
    found = (part.get("weights") for part in parts if isinstance(part, Mapping))
    return {part.get("num_bits") for part in found if isinstance(part, Mapping)}


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` integers of each row of int32 words, packed without gaps, lowest bits first."""
    rows, width = words.shape
    missing = -width % bits
    words = torch.nn.functional.pad(words, (0, missing)) if missing else words
    codes = torch.empty(rows, words.shape[1] // bits * 32, dtype=torch.uint8)
    for i in range(32):  # the bits of one in 32 lie at the same place of a word, or of two
        word, shift = divmod(i * bits, 32)
        part = (words[:, word::bits] >> shift) & ((1 << min(bits, 32 - shift)) - 1)
        if shift + bits > 32:
            more = words[:, word + 1 :: bits] & ((1 << (shift + bits - 32)) - 1)
            part |= more << (32 - shift)
        codes[:, i::32] = part
    return codes[:, :count]


def _affine(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor | None) -> Tensor:
    """(codes - zeros) * scales, where scales and zeros (rows, groups) hold for groups of columns.

    Args:
        groups: the group of each column; None if they follow one another.
    """
    values = codes.float()
    if groups is not None:
        if len(groups) != values.shape[1] or int(groups.min()) < 0 or int(groups.max()) >= scales.shape[1]:
            raise InputError("a quantized layer names groups that it has no scales for; download it again")
        places = groups.long()
        values -= zeros[:, places]
        values *= scales[:, places]
        return values
    blocks = (1, values.shape[1] // scales.shape[1])
    _by_blocks(values, zeros.float(), blocks, torch.Tensor.sub_)
    return _by_blocks(values, scales, blocks, torch.Tensor.mul_)


# --- bitsandbytes ---


def _nf4(layer: Layer) -> Plain | None:
    """4-bit codes of a table, two in a byte, and the largest value of each block of the flat weight."""
    state = next((part for part in layer.tensors if part.startswith("weight.quant_state.bitsandbytes__")), "")
    if not state:
        return None
    parts = ("weight", state, "weight.absmax", "weight.quant_map")
    if missing := {*parts} - layer.tensors.keys():
        raise InputError(f"is 4-bit of bitsandbytes, and its {listed(sorted(missing))} is missing")
    if not layer.holds(*parts, maybe=("weight.nested_absmax", "weight.nested_quant_map")):
        return None
    about = _json(bytes(layer.read(state).flatten().tolist()))
    shape, block = tuple(about.get("shape") or ()), about.get("blocksize")
    if len(shape) != 2 or not all(map(_positive, (*shape, block))):
        raise InputError("is 4-bit of bitsandbytes, and its state holds no shape and blocksize")
    size = math.prod(shape)
    width = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}.get(layer.dtype("weight"), 0)
    layer.require(math.prod(layer.shape("weight")) * width == -(-size // 2), "weight")
    layer.require(math.prod(layer.shape("weight.absmax")) == -(-size // block), "weight.absmax")
    nested = "weight.nested_absmax" in layer.tensors
    if nested != ("nested_blocksize" in about) or nested != ("weight.nested_quant_map" in layer.tensors):
        raise InputError("is 4-bit of bitsandbytes with nested scales, of which a part is missing")
    return Plain(shape, partial(_read_nf4, layer, about, shape))


def _read_nf4(layer: Layer, about: Mapping[str, Any], shape: Shape, expert: int | None) -> Tensor:
    codes = layer.read("weight").flatten().view(torch.uint8)
    values = _by_table(codes, layer.read("weight.quant_map").float(), high_first=True)[: math.prod(shape)]
    largest = layer.read("weight.absmax")
    if "weight.nested_absmax" in layer.tensors:
        outer = layer.read("weight.nested_absmax").float()
        largest = layer.read("weight.nested_quant_map").float()[largest.int()]
        largest = _in_runs(largest, outer, about["nested_blocksize"]) + about["nested_offset"]
    return _in_runs(values, largest.float(), about["blocksize"]).view(shape)


def _in_runs(values: Tensor, numbers: Tensor, run: int) -> Tensor:
    """Multiply each run of flat values by its number, in place; the last run may be shorter."""
    whole = len(values) // run
    values[: whole * run].view(whole, run).mul_(numbers[:whole, None])
    values[whole * run :].mul_(numbers[whole:])
    return values


def _int8_rows(layer: Layer) -> Plain | None:
    """LLM.int8: rows times SCB / 127."""
    if not layer.holds("weight", "SCB", maybe=("weight_format",)) or layer.dtype("weight") != "I8":
        return None
    shape = layer.shape("weight")
    layer.require(len(shape) == 2 and layer.shape("SCB") == shape[:1], "weight", "SCB")
    if "weight_format" in layer.tensors and int(layer.read("weight_format").flatten()[0]) != 0:
        raise InputError(
            "is 8-bit of bitsandbytes in the order of an old GPU; save it again with a newer one"
        )
    return Plain(shape, partial(_read_int8_rows, layer))


def _read_int8_rows(layer: Layer, expert: int | None) -> Tensor:
    return layer.read("weight").float().mul_(layer.read("SCB").float()[:, None] / 127)


# --- torchao ---


def _torchao(layer: Layer) -> Plain | None:
    """A tensor subclass in its parts, as torchao's own safetensors support writes it."""
    about = layer.header.get(f"{layer.name}.weight")
    if about is None or not all(part.startswith("_weight_") for part in layer.tensors):
        return None
    needed = {f"_weight_{part}" for part in _json(about).get("_tensor_data_names") or ()}
    if missing := needed - layer.tensors.keys():
        raise InputError(f"is of torchao, and its {listed(sorted(missing))} is missing; save it again")
    shapes = {part: layer.shape(part) for part in layer.tensors}
    small = {
        part: torch.empty(shape, dtype=DTYPES[layer.dtype(part)], device="meta")
        for part, shape in shapes.items()
    }  # the class of the whole knows its shape
    return Plain(tuple(_of_torchao(layer, about, small).shape), partial(_read_torchao, layer, about))


def _read_torchao(layer: Layer, about: str, expert: int | None) -> Tensor:
    tensor = _of_torchao(layer, about, {part: layer.read(part) for part in layer.tensors})
    return tensor.dequantize().float()  # type: ignore[no-any-return]


def _of_torchao(layer: Layer, about: str, parts: Mapping[str, Tensor]) -> Any:
    try:
        from torchao.prototype.safetensors import safetensors_support  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingPackageError(
            f"{layer.name} is quantized by torchao: reading it needs the torchao package: pip install torchao"
        ) from error
    key = f"{layer.name}.weight"
    tensors = {f"{layer.name}.{part}": tensor for part, tensor in parts.items()}
    header = {key: about, "tensor_names": json.dumps([key])}
    try:
        found, _ = safetensors_support.unflatten_tensor_state_dict(tensors, header)
        return found[key]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"is of torchao, which cannot read it ({error}); save it again") from error


FORMATS: tuple[Callable[[Layer], Plain | None], ...] = (
    _scaled,
    _mxfp4,
    _packed_fp4,
    _gptq_or_awq,
    _packed_integers,
    _nf4,
    _int8_rows,
    _torchao,
)
