"""The weights of any source as matrices: a model, a checkpoint, a GGUF file, an adapter.

Listing reads names and shapes only; a matrix is read when its ``load`` is called, so one that is
dropped before the next keeps memory flat however large the source is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from lora_lens._base import validate
from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.naming import GROUPS, Targets, block_and_kind, listed
from lora_lens._base.warning import warn
from lora_lens._base.wrappers import inner_model
from lora_lens.spectrum.patterns import ONE_EXPERT, matching, part_of
from lora_lens.spectrum.sources.files import tensors_at
from lora_lens.spectrum.sources.roles import Stored, numbers_counted

# Not query_key_value and qkv_proj, which mix q, k and v by head.
FUSED = {"qkv", "c_attn", "Wqkv", "attn_qkv", "in_proj_weight"}
GATE_UP = {"gate_up_proj", "input_linear"}


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix (out, in) that is not read yet.

    Attributes:
        name: dotted module name, with a suffix for a part: ``blocks.0.attn.qkv[q]``,
            ``mlp.experts.down_proj[3]``, ``mlp.experts.gate_up_proj[3][up]``.
        shape: (out, in).
        load: reads the matrix, in its stored dtype, float8 and what is quantized as float32; what it
            returns may share memory with the model or the file, so do not write to it. Raises ValueError
            for a damaged file.
        factors: of an adapter's update, reads (scaling * B, A), shapes (out, r) and (r, in), whose
            product is the matrix; otherwise None.
        update: whether it is an adapter's update of a weight, and not a weight.
        convolution: whether it is a convolution's, whose kernel lies in the columns.

    What :func:`weights` returns.
    """

    name: str
    shape: tuple[int, int]
    load: Callable[[], Tensor]
    factors: Callable[[], tuple[Tensor, Tensor]] | None = None
    update: bool = False
    convolution: bool = False


def weights(
    source: nn.Module | str | Path,
    targets: Targets = None,
    split_qkv: bool = False,
    split_gate_up: bool = False,
    revision: str | None = None,
) -> list[Weight]:
    """The matrices of ``source``, none of them read yet.

    Args:
        source: one of

            - a model: its linear and embedding layers, convolutions as (out, in * kh * kw), GPT-2's
              ``Conv1D`` transposed, each expert of a mixture of experts, the
              weights of nn.MultiheadAttention. Of a model under PEFT the
              base weights, by the names they have without PEFT;
            - a ``.safetensors`` file, or a folder with one, with shards or with an index of them. A file
              does not tell kinds of layers apart, so everything named ``.weight`` and every 3-D tensor
              of experts counts. Which matrices are stored transposed (GPT-2's, the experts of gpt-oss,
              Llama 4 and Qwen3-VL) is read from their shapes and the ``config.json`` beside the file.
              Quantized weights are dequantized: float8, MXFP4, NVFP4, GPTQ, AWQ, compressed-tensors,
              bitsandbytes, torchao (docs/files.md has the table); other formats are refused by name;
            - the name of a model on the Hugging Face Hub, ``"org/model"``, if nothing of that name lies on
              this disk, or ``"hf://org/model@revision/folder"``: the headers are read, and of the weights
              only the bytes of the chosen ones. Tokens and cache are those of huggingface_hub;
            - a ``.gguf`` file, dequantized with the gguf package; a split one is read whole. Its
              names are llama.cpp's, and q and k of Llama models have their rows permuted;
            - a LoRA adapter: PEFT's folder or file, a folder of :func:`lora_lens.save`, a file of kohya's
              scripts, diffusers, MLX or llama.cpp that says how it is scaled: the update of each adapted
              layer, scaling * B @ A, relative to the pretrained weight; also of LoHa and LoKr, by PEFT or
              LyCORIS. Adapters whose base is a residual (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ, unless
              converted) and methods that need the base weight (DoRA, VeRA, OFT, IA3) are refused.
        targets: None for the linear layers and experts, without embeddings, output head and
            routers (in files: by their usual names); or patterns and groups as in
            :func:`lora_lens.spectrum.target_layers`, which choose among all of the above.
        split_qkv: q, k and v as three weights for layers named qkv, c_attn, Wqkv or attn_qkv of
            shape (3 * in, in), and for in_proj_weight of nn.MultiheadAttention. Those that mix q, k and v by
            head stay whole.
        split_gate_up: gate and up as two weights for layers and experts named gate_up_proj or input_linear,
            whose rows are all of gate before all of up or, in gpt-oss, one of each in turn.
        revision: of a model on the Hub: a branch, a tag or a commit; default its main branch.

    Returns:
        In the model's order, or for files by name with numbers counted.

    Raises:
        FileNotFoundError: no such file or model, no weights in a folder, a missing shard.
        TypeError: an argument is of another type.
        ValueError: nothing matches; a file is damaged or unsafe to open; a chosen weight is empty,
            on the meta device, or quantized in a format that is not read, or its parts do not fit
            together; a model on the Hub is gated.
        ImportError: the gguf or torchao package is needed.

    Warns:
        UserWarning: experts adapted as parameters and outputs of nn.MultiheadAttention are left out of an
            adapter; an adapter may be a trainer's checkpoint of a window, whose base is a residual; nothing
            says which way round experts are.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.ModuleDict({"qkv": torch.nn.Linear(16, 48), "fc1": torch.nn.Linear(16, 32)})
        >>> [(w.name, w.shape) for w in ll.spectrum.weights(model, split_qkv=True)]
        [('qkv[q]', (16, 16)), ('qkv[k]', (16, 16)), ('qkv[v]', (16, 16)), ('fc1', (32, 16))]
    """
    split_qkv = validate.flag(split_qkv, "split_qkv")
    split_gate_up = validate.flag(split_gate_up, "split_gate_up")
    patterns = validate.patterns(targets)
    if revision is not None:
        validate.instance(revision, str, "revision", "a branch, a tag or a commit of a model on the Hub")
    if isinstance(source, nn.Module):
        if revision is not None:
            raise InputError(
                f"revision={revision!r} is one of a model on the Hub, and source is a model in memory"
            )
        from lora_lens.spectrum.sources.models import in_model  # files need neither peft nor transformers

        source = inner_model(source)
        stored, where = list(in_model(source)), type(source).__name__
    elif isinstance(source, (str, Path)):
        stored, where = _ordered(tensors_at(source, revision)), str(source)
    else:
        raise InputTypeError(
            "expected a model, or the path of a file or folder as a string or Path, not "
            f"{validate.shown(source)}"
        )

    matrices = [(tensor, weight) for tensor in stored for weight in _split(tensor, split_qkv, split_gate_up)]
    if not matrices:
        raise InputError(
            f"{where} holds no weights: expected tensors of two or more dimensions named .weight"
        )
    could = f"these could match: {listed(sorted({block_and_kind(s.name)[1] for s in stored}))}"
    chosen = {id(s) for s in stored if s.usual} if patterns is None else set()
    by_last: dict[str, list[Weight]] = {}
    for _, weight in matrices:
        by_last.setdefault(weight.name.rpartition(".")[2], []).append(weight)
    if patterns is None and not chosen:
        raise InputError(f"{where} has no linear layers besides its head; choose others by name, {could}")
    for pattern in patterns or ():
        found = {id(w) for w in by_last.get(pattern.rpartition(".")[2], ()) if _ends(w.name, pattern)}
        if pattern in GROUPS or not (
            found and pattern.endswith("]")
        ):  # matching each of 10,000 experts is slow
            names = (
                _group(stored, pattern) if pattern in GROUPS else matching([s.name for s in stored], pattern)
            )
            found |= {id(w) for s, w in matrices if s.name in names}
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
        warn(
            f"the experts {listed(sorted(doubtful), most=2)} are read as (experts, out, in): neither a "
            "config with the hidden size nor their shapes say so; if they are (experts, in, out), left and "
            "right singular vectors are exchanged",
        )
    left = [s for s in stored if s.factors and s.problem and not s.usual] if patterns is None else []
    if left:
        warn(
            f"left out {listed((s.name for s in left), most=3)}: {left[0].name} {left[0].problem}",
        )
    return [weight for _, weight in picked]


def _ends(name: str, pattern: str) -> bool:
    return f".{name}".endswith(f".{pattern}")


def _ordered(stored: list[Stored]) -> list[Stored]:
    return sorted(stored, key=lambda tensor: numbers_counted(tensor.name))


def _group(stored: list[Stored], group: str) -> set[str]:
    if group == "all-experts":
        return {s.name for s in stored if s.experts or ONE_EXPERT.search(s.name)}
    if group == "all-conv":
        return {s.name for s in stored if len(s.shape) > 2 and not s.experts}
    return {s.name for s in stored if s.usual and group in ("all-linear", f"all-{part_of(s.name)}")}


def _split(stored: Stored, qkv: bool, gate_up: bool) -> list[Weight]:
    last, found = stored.name.rpartition(".")[2], []
    for whole in _matrices(stored):
        rows, columns = whole.shape
        if qkv and stored.thirds and last in FUSED and rows == 3 * columns:
            parts = {part: slice(i * columns, (i + 1) * columns) for i, part in enumerate("qkv")}
        elif gate_up and last in GATE_UP and rows % 2 == 0:
            half = rows // 2
            parts = {"gate": slice(0, half), "up": slice(half, rows)}
            if stored.interleaved:
                parts = {"gate": slice(0, rows, 2), "up": slice(1, rows, 2)}
        else:
            parts = {}
        found += [_rows(whole, f"{whole.name}[{part}]", which) for part, which in parts.items()] or [whole]
    return found


def _matrices(stored: Stored) -> list[Weight]:
    out, *rest = stored.shape[1:] if stored.experts else stored.shape
    shape = (math.prod(rest), out) if stored.transposed else (out, math.prod(rest))
    if stored.experts:
        experts = range(stored.shape[0])
        return [Weight(f"{stored.name}[{i}]", shape, partial(_matrix, stored, i)) for i in experts]
    matrix = partial(_matrix, stored, None)
    return [Weight(stored.name, shape, matrix, stored.factors, stored.update, len(stored.shape) > 2)]


def _matrix(stored: Stored, expert: int | None) -> Tensor:
    matrix = stored.read(expert)
    matrix = matrix.float() if matrix.itemsize == 1 else matrix  # of float8 little can be computed
    matrix = matrix.flatten(1) if matrix.ndim > 2 else matrix
    return matrix.T if stored.transposed else matrix


def _rows(whole: Weight, name: str, rows: slice) -> Weight:
    factors = whole.factors and partial(_factor_rows, whole.factors, rows)
    shape = (len(range(*rows.indices(whole.shape[0]))), whole.shape[1])
    return replace(whole, name=name, shape=shape, load=partial(_load_rows, whole.load, rows), factors=factors)


def _load_rows(load: Callable[[], Tensor], rows: slice) -> Tensor:
    return load()[rows]


def _factor_rows(factors: Callable[[], tuple[Tensor, Tensor]], rows: slice) -> tuple[Tensor, Tensor]:
    b, a = factors()
    return b[rows], a
