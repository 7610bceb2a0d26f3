"""The weights of any source as matrices: a model, a checkpoint, a GGUF file, an adapter.

Listing reads names and shapes only; a matrix is read when its ``load`` is called, so one that is
dropped before the next keeps memory flat however large the source is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator
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

from lora_lens.errors import InputError, InputTypeError
from lora_lens.heads import head_layers
from lora_lens.naming import GROUPS, Targets, block_and_kind, listed, part_of
from lora_lens.patterns import matching, routers
from lora_lens.quantized import Signs, problem_in
from lora_lens.roles import Stored, holds_experts, numbers_counted, transposed_experts
from lora_lens.validate import flag, sequence, shown
from lora_lens.weight_files import tensors_in
from lora_lens.wrappers import inner_model, named_modules

FUSED = {"qkv", "c_attn", "Wqkv", "attn_qkv"}  # not query_key_value and qkv_proj, which mix q, k, v by head


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix (out, in) that is not read yet.

    Attributes:
        name: dotted module name, with a suffix for a part: ``blocks.0.attn.qkv[q]``,
            ``mlp.experts.down_proj[3]``.
        shape: (out, in).
        load: reads the matrix, in its stored dtype, float8 as float32; what it returns may share memory
            with the model or the file, so do not write to it. Raises ValueError for a damaged file.
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
            - a ``.safetensors`` file, or a folder with one, with shards or with an index of them. A file
              does not tell kinds of layers apart, so everything named ``.weight`` and every 3-D tensor
              of experts counts. Which matrices are stored transposed (GPT-2's, the experts of gpt-oss,
              Llama 4 and Qwen3-VL) is read from their shapes and the ``config.json`` beside the file.
              float8 without a scale is read; whatever is quantized is refused with the reason;
            - a ``.gguf`` file, dequantized with the gguf package; a split one is read whole. Its
              names are llama.cpp's, and q and k of Llama models have their rows permuted;
            - a LoRA adapter: PEFT's folder or file, a folder of :func:`lora_lens.save`, a file of kohya's
              scripts, diffusers, MLX or llama.cpp that says how it is scaled: the update of each adapted
              layer, scaling * B @ A, relative to the pretrained weight. Adapters whose base is a
              residual (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ, unless converted) and other methods than
              LoRA are refused.
        targets: None for the linear layers and experts, without embeddings, output head and
            routers (in files: by their usual names); or patterns and groups as in
            :func:`lora_lens.layers.target_layers`, which choose among all of the above.
        split_qkv: q, k and v as three weights for layers named qkv, c_attn, Wqkv or attn_qkv of
            shape (3 * in, in). Those that mix q, k and v by head stay whole.

    Returns:
        In the model's order, or for files by name with numbers counted.

    Raises:
        FileNotFoundError: no such file, no weights in a folder, a missing shard.
        TypeError: an argument is of another type.
        ValueError: nothing matches; a file is damaged or unsafe to open; a chosen weight is empty,
            on the meta device or quantized.
        ImportError: the gguf package is needed.

    Warns:
        UserWarning: experts adapted as parameters and outputs of nn.MultiheadAttention are left out of an
            adapter; nothing says which way round experts are.
    """
    split_qkv = flag(split_qkv, "split_qkv")
    patterns = patterns_of(targets)
    if isinstance(source, nn.Module):
        source = inner_model(source)
        stored, where = list(_in_module(source)), type(source).__name__
    elif isinstance(source, (str, Path)):
        stored, where = sorted(tensors_in(Path(source)), key=lambda s: numbers_counted(s.name)), str(source)
    else:
        raise InputTypeError(
            f"expected a model, or the path of a file or folder as a string or Path, not {shown(source)}"
        )

    matrices = [(tensor, weight) for tensor in stored for weight in _matrices(tensor, split_qkv)]
    if not matrices:
        raise InputError(
            f"{where} holds no weights: expected tensors of two or more dimensions named .weight"
        )
    could = f"these could match: {listed(sorted({block_and_kind(s.name)[1] for s in stored}))}"
    chosen = {id(s) for s in stored if s.usual} if patterns is None else set()
    if patterns is None and not chosen:
        raise InputError(f"{where} has no linear layers besides its head; choose others by name, {could}")
    for pattern in patterns or ():
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
    if doubtful := {s.name for s, _ in picked if s.doubtful}:
        warnings.warn(
            f"the experts {listed(sorted(doubtful), most=2)} are read as (experts, out, in): neither a "
            "config with the hidden size nor their shapes say so; if they are (experts, in, out), left and "
            "right singular vectors are exchanged",
            stacklevel=2,
        )
    left = [s for s in stored if s.factors and s.problem and not s.usual] if patterns is None else []
    if left:
        warnings.warn(
            f"left out {listed((s.name for s in left), most=3)}: {left[0].name} {left[0].problem}",
            stacklevel=2,
        )
    return [weight for _, weight in picked]


def patterns_of(targets: Targets) -> tuple[str, ...] | None:
    """``targets`` as patterns, or None for the usual weights.

    Raises:
        TypeError, ValueError: it is neither a pattern nor a sequence of them, or holds none.
    """
    if targets is None:
        return None
    patterns = sequence(targets, "targets", "patterns, or one pattern", one=str)
    if not patterns:
        raise InputError("targets is empty: give None for all linear layers, or names such as 'q_proj'")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise InputTypeError(f"targets must hold patterns such as 'q_proj', not {shown(pattern)}")
    return patterns


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
    matrix = matrix.float() if matrix.itemsize == 1 else matrix  # of float8 little can be computed
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


def _in_module(model: nn.Module) -> Iterator[Stored]:
    model = inner_model(model.get_base_model()) if isinstance(model, PeftModel) else model
    modules = dict(named_modules(model))
    wrappers = {n for n, m in modules.items() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    heads, choosing = head_layers(model), routers(modules)
    looked_up = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
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
        found = _tensors(module, name)
        experts = {key for key, (_, t) in found.items() if t.ndim == 3 and _may_hold_experts(module, key)}
        shapes = {key: tuple(found[key][1].shape) for key in experts}
        turned, doubtful = _transposed_among(module, shapes, model)
        tied = linear and id(module.weight) in looked_up
        for key, (own, tensor) in found.items():
            yield Stored(
                key,
                tuple(tensor.shape),
                partial(_of_tensor, tensor),
                usual=(linear and module not in heads and path not in choosing and not tied)
                or key in experts,
                problem=problem_in(module, tensor, own),
                experts=key in experts,
                transposed=isinstance(module, Conv1D) or key in turned,
                doubtful=key in doubtful,
                thirds=linear and not mixed,
            )


def _tensors(module: nn.Module, name: str) -> dict[str, tuple[str, Tensor]]:
    """A module's matrices with their own names in it, by the names they have in the model."""
    found = {name or "weight": ("weight", getattr(module, "weight", None))}
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    if not isinstance(found[name or "weight"][1], Tensor):
        packed = Signs(f"layer.{key}" for key in own).payloads
        key = next((key for key in own if f"layer.{key}" in packed), "weight")
        found = {name or "weight": (key, own.get(key))}
    for key, tensor in own.items():
        whole = f"{name}.{key}" if name else key
        if key != "weight" and not is_lazy(tensor) and tensor.ndim == 3 and holds_experts(whole):
            found[whole] = (key, tensor)
    return {
        k: (o, t) for k, (o, t) in found.items() if isinstance(t, Tensor) and not is_lazy(t) and t.ndim > 1
    }


def _may_hold_experts(module: nn.Module, key: str) -> bool:
    return holds_experts(key) and not isinstance(module, (_ConvNd, nn.Bilinear))


def _transposed_among(
    module: nn.Module, experts: dict[str, tuple[int, ...]], model: nn.Module
) -> tuple[Collection[str], Collection[str]]:
    """Those of a module's experts that it multiplies as (in, out), and those that it may."""
    if not experts:
        return (), ()
    if isinstance(known := getattr(module, "is_transposed", None), bool):
        return (experts if known else ()), ()
    config = getattr(model, "config", None)
    return transposed_experts(experts, config.to_dict() if hasattr(config, "to_dict") else {})


def _of_tensor(tensor: Tensor, expert: int | None) -> Tensor:
    return tensor.detach() if expert is None else tensor.detach()[expert]


def _unwrapped(path: str, wrappers: set[str]) -> str | None:
    """The name a module has without PEFT; None for what PEFT added."""
    parts, kept = path.split("."), []
    for i, part in enumerate(parts):
        if ".".join(parts[:i]) not in wrappers:
            kept.append(part)
        elif part not in ("base_layer", "original_module"):
            return None
    return ".".join(kept)
