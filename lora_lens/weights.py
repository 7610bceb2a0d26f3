"""The weights of any source as matrices: a model, a checkpoint, a GGUF file, an adapter.

Listing reads names and shapes only; a matrix is read when its ``load`` is called, so one that is
dropped before the next keeps memory flat however large the source is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from lora_lens.checkpoint import PACKED, Stored, problem_of, tensors_in
from lora_lens.errors import InputError, InputTypeError
from lora_lens.heads import head_layers
from lora_lens.layers import GROUPS, Targets, block_and_kind, listed, part_of
from lora_lens.patterns import matching, routers

FUSED = {"qkv", "c_attn", "Wqkv", "attn_qkv"}  # not query_key_value and qkv_proj, which mix q, k, v by head


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix (out, in) that is not read yet.

    Attributes:
        name: dotted module name, with a suffix for a part: ``blocks.0.attn.qkv[q]``,
            ``mlp.experts.down_proj[3]``.
        shape: (out, in).
        load: reads the matrix, in its stored dtype; what it returns may share memory with the
            model or the file, so do not write to it. Raises ValueError for a damaged file.
        factors: of an adapter's update, reads (scaling * B, A), shapes (out, r) and (r, in), whose
            product is the matrix; otherwise None.
    """

    name: str
    shape: tuple[int, int]
    load: Callable[[], Tensor]
    factors: Callable[[], tuple[Tensor, Tensor]] | None = None


def weights(source: nn.Module | str | Path, targets: Targets = None, split_qkv: bool = False) -> list[Weight]:
    """The matrices of ``source``, none of them read yet.

    Args:
        source: one of

            - a model: its linear and embedding layers, convolutions as (out, in * kh * kw), GPT-2's
              ``Conv1D`` transposed, each expert of a mixture of experts. Of a model under PEFT the
              base weights, by the names they have without PEFT;
            - a ``.safetensors`` file, or a folder with one or with an index of shards. A file does
              not tell kinds of layers apart, so everything named ``.weight`` and every 3-D tensor
              with "expert" in its name counts, as stored; a ``config.json`` beside it tells which
              models store matrices transposed (GPT-2, the experts of gpt-oss and Llama 4);
            - a ``.gguf`` file, dequantized with the gguf package; a split one is read whole. Its
              names are llama.cpp's, and q and k of Llama models have their rows permuted;
            - a folder with a PEFT LoRA adapter: the update scaling * B @ A of each adapted layer.
        targets: None for the linear layers and experts, without embeddings, output head and
            routers (in files: by their usual names); or patterns and groups as in
            :func:`lora_lens.layers.target_layers`, which choose among all of the above.
        split_qkv: q, k and v as three weights for layers named qkv, c_attn, Wqkv or attn_qkv of
            shape (3 * in, in). Those that mix q, k and v by head stay whole.

    Returns:
        In the model's order, or for files by name with numbers counted.

    Raises:
        FileNotFoundError: no such file, no weights in a folder, a missing shard.
        ValueError: nothing matches; a file is damaged or unsafe to open; a chosen weight is empty,
            on the meta device or quantized.
        ImportError: the gguf package is needed.
    """
    if isinstance(source, nn.Module):
        stored, where = list(_in_module(source)), type(source).__name__
    elif isinstance(source, (str, Path)):
        stored, where = sorted(tensors_in(Path(source)), key=lambda s: _numbers_counted(s.name)), str(source)
    else:
        raise InputTypeError(f"expected a model or a path, not {type(source).__name__}")

    matrices = [(tensor, weight) for tensor in stored for weight in _matrices(tensor, split_qkv)]
    if not matrices:
        raise InputError(
            f"{where} holds no weights: expected tensors of two or more dimensions named .weight"
        )
    could = f"these could match: {listed(sorted({block_and_kind(s.name)[1] for s in stored}))}"
    patterns = [targets] if isinstance(targets, str) else list(targets or [])
    chosen = {id(s) for s in stored if s.usual} if targets is None else set()
    if targets is None and not chosen:
        raise InputError(f"{where} has no linear layers besides its head; choose others by name, {could}")
    for pattern in patterns:
        names = _group(stored, pattern) if pattern in GROUPS else matching([s.name for s in stored], pattern)
        found = {id(w) for s, w in matrices if s.name in names or f".{w.name}".endswith(f".{pattern}")}
        if not found:
            raise InputError(
                f"no layer of {where} belongs to {pattern!r}; {could}"
                if pattern in GROUPS
                else f"target {pattern!r} matches no weight of {where}; {could}"
            )
        chosen |= found
    picked = [(s, w) for s, w in matrices if id(s) in chosen or id(w) in chosen]
    for tensor, _ in picked:
        if tensor.problem or 0 in tensor.shape:
            raise InputError(f"{tensor.name} {tensor.problem or f'is empty: its shape is {tensor.shape}'}")
    return [weight for _, weight in picked]


def _group(stored: list[Stored], group: str) -> set[str]:
    if group == "all-conv":
        return {s.name for s in stored if len(s.shape) > 2 and not s.experts}
    return {s.name for s in stored if s.usual and group in ("all-linear", f"all-{part_of(s.name)}")}


def _matrices(stored: Stored, split_qkv: bool) -> list[Weight]:
    out, *rest = stored.shape[1:] if stored.experts else stored.shape
    shape = (math.prod(rest), out) if stored.transposed else (out, math.prod(rest))
    if stored.experts:
        experts = range(stored.shape[0])
        return [Weight(f"{stored.name}[{i}]", shape, partial(_matrix, stored, i)) for i in experts]
    whole = Weight(stored.name, shape, partial(_matrix, stored, None), stored.factors)
    fused = stored.thirds and stored.name.rpartition(".")[2] in FUSED
    if not (split_qkv and fused and shape[0] == 3 * shape[1]):
        return [whole]
    size = shape[1]
    return [_rows(whole, f"{whole.name}[{part}]", i * size, size) for i, part in enumerate("qkv")]


def _matrix(stored: Stored, expert: int | None) -> Tensor:
    matrix = stored.read(expert)
    matrix = matrix.flatten(1) if matrix.ndim > 2 else matrix
    return matrix.T if stored.transposed else matrix


def _rows(whole: Weight, name: str, first: int, count: int) -> Weight:
    factors = whole.factors and partial(_factor_rows, whole.factors, first, count)
    return Weight(name, (count, whole.shape[1]), partial(_load_rows, whole.load, first, count), factors)


def _load_rows(load: Callable[[], Tensor], first: int, count: int) -> Tensor:
    return load()[first : first + count]


def _factor_rows(
    factors: Callable[[], tuple[Tensor, Tensor]], first: int, count: int
) -> tuple[Tensor, Tensor]:
    b, a = factors()
    return b[first : first + count], a


def _numbers_counted(name: str) -> list[tuple[int, int, str]]:
    """A sort key under which layer 10 comes after layer 9."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name)]


def _in_module(model: nn.Module) -> Iterator[Stored]:
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(model.named_modules())
    wrappers = {n for n, m in modules.items() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    heads, choosing = head_layers(model), routers(modules)
    for path, module in modules.items():
        name = _unwrapped(path, wrappers)
        if name is None or path in wrappers:  # a wrapper shows its base layer's weight as its own
            continue
        linear = isinstance(module, (nn.Linear, Conv1D)) and "original_module" not in path.split(".")
        parent = path.rpartition(".")[0]
        while parent and parent in wrappers:
            parent = parent.rpartition(".")[0]
        # timm's MaxViT (head_first) and TinyViT (val_dim) mix q, k and v by head
        mixed = getattr(modules[parent], "head_first", False) or hasattr(modules[parent], "val_dim")
        for key, tensor in _tensors(module, name).items():
            experts = tensor.ndim == 3 and not isinstance(module, _ConvNd)
            scaled = hasattr(module, "weight_scale") or hasattr(module, "weight_scale_inv")
            yield Stored(
                key,
                tuple(tensor.shape),
                partial(_of_tensor, tensor),
                usual=(linear and module not in heads and path not in choosing) or experts,
                problem=problem_of(tensor.is_floating_point(), str(tensor.dtype), scaled, tensor.is_meta),
                experts=experts,
                transposed=isinstance(module, Conv1D) or (experts and _has_transposed_experts(module)),
                thirds=linear and not mixed,
            )


def _tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    packed = (getattr(module, key) for key in PACKED if hasattr(module, key))
    found = {name or "weight": getattr(module, "weight", next(packed, None))}
    for key, parameter in module.named_parameters(prefix=name, recurse=False):
        if "expert" in key and not key.endswith(".weight") and not is_lazy(parameter) and parameter.ndim == 3:
            found[key] = parameter
    return {k: t for k, t in found.items() if isinstance(t, Tensor) and not is_lazy(t) and t.ndim > 1}


def _of_tensor(tensor: Tensor, expert: int | None) -> Tensor:
    return tensor.detach() if expert is None else tensor.detach()[expert]


def _has_transposed_experts(module: nn.Module) -> bool:
    return getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")


def _unwrapped(path: str, wrappers: set[str]) -> str | None:
    """The name a module has without PEFT; None for what PEFT added."""
    parts, kept = path.split("."), []
    for i, part in enumerate(parts):
        if ".".join(parts[:i]) not in wrappers:
            kept.append(part)
        elif part not in ("base_layer", "original_module"):
            return None
    return ".".join(kept)
