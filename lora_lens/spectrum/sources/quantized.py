"""Signs that a stored tensor is no plain matrix of numbers: what lies beside it, its dtype, the config.

A float8 weight without any sign of a scale is just numbers. What a file holds in a known format is
dequantized, see :mod:`lora_lens.spectrum.sources.dequantize`; everything else that is quantized is refused
with the reason, because the numbers as stored are not the weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_lens._base.naming import listed

# What quantizers store instead of a weight, behind the layer's name: GPTQ and AWQ, compressed-tensors,
# torchao, HQQ, quanto, AQLM, VPTQ, EXL2 and EXL3, QuIP#, MXFP4.
PAYLOADS = r"qweight(_\w+)?|weight_q|q_weight|packed|qdata|W_q|_data|codes|indices|trellis|Qidxs|blocks"
# What they store beside it. Scales of inputs and outputs are none: they leave the weight as it is.
SIGNS = (
    PAYLOADS
    + r"|q?scale_weight|w?scales?(_inv|_2|_bf16|_and_zero\w*)?|(global|block|row|channel|group|tensor)_scale"
    r"|_scale|scale_(shift|and_zero)|q?zeros?|zero_points?|_zero_point|_shift|absmax|nested_absmax|quant_map"
    r"|nested_quant_map|quant_state(\.\S+)?|SCB|weight_format|g_idx|codebooks?|q_scale(_max)?|q_groups|q_perm"
    r"|q_invperm|suh|svh|SU|SV|tables2?|(res_)?centroids(\.weight)?|comfy_quant|quant_type|quantizer\.\S+"
)
SIGN = re.compile(rf"(?P<layer>.+?)(?P<weight>[._]_?weight)?[._](?P<sign>{SIGNS})")
PAYLOAD = re.compile(PAYLOADS)
COMMON = {"indices", "codes", "blocks", "packed"}  # words for other things as well, where they stand alone
HINT = re.compile(r"scale|scl|amax|quant", re.IGNORECASE)
NO_HINT = re.compile(r"(logit|layer|embed|res|residual|k|v|kv_cache)_?scale\w*")  # of no weight
OWN = ("weight", "bias")
TABLE = re.compile(r"(ids?|idxs?|index|indexes|indices|(?<!bit)mask|bias)$")  # integers in any model
FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
NARROW = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
NARROW |= {"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"}
WORDS = ("quantization_config", "compression_config", "quantization", "quantized", "quant_method")


class Signs:
    """Which layers of a file or module are quantized, by the names of all its tensors."""

    def __init__(self, keys: Iterable[str]):
        self.beside: dict[str, list[str]] = {}  # by layer
        self.payloads: dict[str, str] = {}  # the layer of each packed tensor, by key
        self.keys: dict[str, str] = {}  # the layers of what is no weight of its own
        keys, alone = list(keys), []
        self.all = set(keys)
        for key in keys:
            if key.endswith(".weight") and not key.endswith("centroids.weight"):
                continue
            head, tail = split_before(key, 4)  # what a sign can be is in the last parts, the search is short
            if found := SIGN.fullmatch(tail):
                layer = head + found["layer"]
                self.keys[key] = layer
                self.beside.setdefault(layer, []).append(key[len(layer) + 1 :])
                if PAYLOAD.fullmatch(found["sign"]):
                    self.payloads[key] = layer
                    if found["sign"] in COMMON and not found["weight"]:
                        alone.append(key)
        for key in alone:
            if len(self.beside[self.payloads[key]]) == 1:
                del self.payloads[key]
        self.inside: dict[str, list[str]] = {}  # the last parts by what comes before
        for key in keys:
            parent, _, last = key.rpartition(".")
            self.inside.setdefault(parent, []).append(last)
        self.hints: list[str] = []  # what may be a scale, but of no layer that is here
        self.shared: dict[str, str] = {}  # those among them that may be for all layers around, by place
        for key in keys:
            parent, _, last = key.rpartition(".")
            if HINT.search(key) and last not in OWN and f"{self.keys.get(key)}.weight" not in self.all:
                self.hints.append(key)
                if HINT.search(last) and not NO_HINT.fullmatch(last):
                    self.shared[parent] = key
                    if of := self.keys.get(key):  # one that is not here, such as q, k and v in one
                        self.shared[of.rpartition(".")[0]] = key

    def of(self, layer: str) -> list[str]:
        """What lies beside the layer's weight, by names without the layer's."""
        return self.beside.get(layer, [])

    def add_packed(self, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """Of a model that is said to be quantized: integers in a layer without a weight are its payload."""
        for key, (shape, dtype) in tensors.items():
            parent, _, last = key.rpartition(".")
            layer = self.keys.get(key, parent)
            own = key[len(layer) + 1 :]
            alone = f"{layer}.weight" not in self.all and self.of(layer) in ([], [own])
            integers = dtype not in {*FLOATS, *NARROW, "BOOL"} and not TABLE.search(last)
            if alone and integers and len(shape) > 1:
                self.payloads[key] = layer
                self.beside[layer] = [own]

    def hint(self, layer: str) -> str:
        """That something else may be the layer's scale, under a name of no known quantizer; or "".

        Whatever lies in the layer besides weight and bias, and what speaks of a scale around it.
        """
        own = [f"{layer}.{last}" for last in self.inside.get(layer, ()) if last not in OWN]
        own += [f"{layer}.weight.{last}" for last in self.inside.get(f"{layer}.weight", ())]
        parts = layer.split(".")
        around = (self.shared.get(".".join(parts[:i])) for i in range(len(parts)))
        dicts = (key for key in self.hints if key.endswith(f".{layer}") or key.startswith(f"{layer}."))
        found = next(filter(None, (*own, *around, *dicts)), "")
        return f"beside it is {found}" if found else ""


def split_before(key: str, parts: int) -> tuple[str, str]:
    """A dotted name before and from its last ``parts`` parts on."""
    tail = ".".join(key.split(".")[-parts:])
    return key[: len(key) - len(tail)], tail


def quantized_by(facts: Mapping[str, Any]) -> str:
    """The method that a config.json names for its weights, or ""."""
    for word in WORDS:
        if about := facts.get(word):
            named = about if isinstance(about, Mapping) else {"method": about}
            known = (named.get(key) for key in ("quant_method", "method", "quant_type", "quant_algo"))
            return str(next(filter(None, known), word))
    parts = (part for key, part in facts.items() if isinstance(part, Mapping) and key not in WORDS)
    return next(filter(None, map(quantized_by, parts)), "")


def quantization_settings(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says about the quantization of its weights, or nothing."""
    for word in WORDS:
        if isinstance(about := facts.get(word), Mapping):
            return about
    parts = (part for part in facts.values() if isinstance(part, Mapping))
    return next(filter(None, map(quantization_settings, parts)), {})


def problem_of(
    dtype: str,
    beside: Iterable[str] = (),
    shape: tuple[int, ...] = (),
    evidence: str = "",
    meta: bool = False,
) -> str:
    """Why a tensor's numbers are not a weight's values, or "".

    Args:
        dtype: as safetensors or torch name it.
        beside: names of tensors beside it that are signs of quantization.
        shape: of the tensor as stored.
        evidence: what else says that the source is quantized, such as "config.json names fp8".
        meta: it has a shape but no values.
    """
    dtype = dtype.removeprefix("torch.")
    if meta:
        return "is on the meta device, with a shape but no values; load the model's weights first"
    if beside:
        return (
            f"holds {dtype} values that need the scales or packing stored beside them "
            f"({listed(sorted(beside), most=4)}), so it is quantized{evidence and f', as {evidence}'}; "
            "dequantize the model first, or choose others by name"
        )
    if dtype in NARROW and evidence:
        return (
            f"holds {dtype} values, and {evidence}: if they have a scale, they are wrong without it by a "
            "factor; dequantize the model first, or choose others by name"
        )
    if dtype in FLOATS and "bitsandbytes" in evidence and len(shape) == 2 and 1 in shape and max(shape) > 1:
        return f"of shape {shape} is packed, as {evidence}; dequantize the model, or choose others by name"
    if dtype in FLOATS | NARROW:
        return ""
    if dtype.lower().startswith(("c", "complex")):
        return f"holds {dtype} values: complex weights are not read; choose others by name"
    why = evidence and f", as {evidence}"
    return f"holds {dtype} values: quantized or packed{why}; dequantize the model, or choose others by name"


def problem_in(module: nn.Module, tensor: Tensor, key: str) -> str:
    """Why a tensor of a module is no matrix of numbers, or "".

    Args:
        key: the tensor's name within its module: "weight", "gate_up_proj", ...
    """
    kind = type(tensor)
    if type(tensor.data) is not Tensor or kind not in (nn.Parameter, Tensor):
        return (
            f"is a {kind.__name__} of {type(module).__name__}, whose values are not stored as they are: "
            "quantized or sharded; dequantize or gather the model first, or choose others by name"
        )
    names = {
        f"layer.{name}" for name, _ in (*module.named_parameters(), *module.named_buffers()) if name != key
    }
    names |= {f"layer.{name}" for name in ("weight_scale", "weight_scale_inv") if hasattr(module, name)}
    signs = Signs(names)
    own = "layer" if key == "weight" else f"layer.{key}"
    return problem_of(
        str(tensor.dtype), signs.of(own), tuple(tensor.shape), signs.hint(own), meta=tensor.is_meta
    )
