"""What the tensors of a file are: linear layers, experts and which way round, heads, embeddings, routers.

A file does not tell kinds of layers apart, so it goes by names, by shapes and by the config.json beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.wrappers import unwrapped
from lora_lens.spectrum.patterns import NAMES, NEW_HEADS, routers
from lora_lens.spectrum.sources.dequantize.formats import dequantized, library_of
from lora_lens.spectrum.sources.dequantize.layer import Layer, Plain
from lora_lens.spectrum.sources.quantized import NARROW, Signs, problem_of

Shapes = Mapping[str, tuple[int, ...]]

# Heads by their usual names: as the last part, as the whole name, and what lies in them.
HEADS = {"lm_head", "lm_heads", "embed_out", "lm_loss", "generator_lm_head"}
WHOLE_HEADS = {*NAMES, "output", "proj_out", "cls", "objective", "qa_outputs", "mlp_head"}
OF_HEAD = re.compile(
    r"(^|\.)head_dist(\.|$)|^(head\.(fc|l)|heads?\.head)(\.|$)|(lm_head|predictions)\.decoder$"
)
EMBEDDING = re.compile(
    r"(?!.*(dense|proj|projections?|linear)$|patch_embed)"
    r"(.*(embed|embd)|(wte|wpe|pe_k|shared|(.*_)?emb|relative_attention_bias|bias_values|presence_token"
    r"|reference_points)$)",
    re.IGNORECASE,
)
TABLES = {"query", "transformer.w"}  # by whole names: their last parts mean other things elsewhere
# The weights of nn.MultiheadAttention, the first of them q, k and v below each other.
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
EXPERTS = re.compile(r"expert|moe|_exps\b|(^|\.)(in|out)put_linear\b", re.IGNORECASE)  # the last are JetMoE's
DOWN = re.compile(r"down|w2|fc2|output|out_proj|wo$")
UP = re.compile(r"gate|up|w1|w3|v1|fc1|fc3|input|in_proj|wi")
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "hidden_dim", "embed_dim")
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
CONV1D_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}
TRANSPOSED_EXPERTS = {"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"}
TRANSPOSED_EXPERTS |= {"qwen3_vl_moe", "qwen3_vl_moe_text"}


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
    doubtful: bool = False  # nothing says whether it is transposed
    interleaved: bool = False  # if its name says gate and up: their rows take turns
    thirds: bool = True  # if its name says q, k and v: they are one after the other
    factors: Callable[[], tuple[Tensor, Tensor]] | None = None
    update: bool = False  # of an adapter: no weight, but what is added to one


def weights_among(
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    read: Callable[[str, int | None], Tensor],
    facts: Mapping[str, Any],
    others: Iterable[str] = (),
    evidence: str = "",
    settings: Mapping[str, Any] | None = None,
    header: Mapping[str, str] | None = None,
) -> list[Stored]:
    """The weights among a file's tensors; quantized ones as what they stand for, where that is read.

    Args:
        tensors: shape and dtype of each tensor, by key.
        read: reads one of them, or one expert of it.
        facts: the config.json beside the file, or nothing.
        others: keys in other files of the same model that are not among the tensors, such as scales.
        evidence: what says that the model is quantized.
        settings: what a config says about its quantization.
        header: what the file says about itself.
    """
    signs = Signs([*tensors, *others])
    if evidence:
        signs.add_packed(tensors)
    shapes = {key: shape for key, (shape, _) in tensors.items()}
    named = {key: name for key in tensors if (name := weight_name(key, shapes[key], signs)) is not None}
    parts: dict[str, dict[str, str]] = {}
    for key, name in signs.keys.items():
        parts.setdefault(name, {})[key[len(name) + 1 :]] = key
    plain: dict[str, Plain] = {}
    problems: dict[str, str] = {}
    for key, name in named.items():
        if not signs.of(name):
            continue
        inside = parts.get(name, {}) | ({} if key in signs.payloads else {"weight": key})
        if (size := f"{name}.weight_shape") in tensors:
            inside["weight_shape"] = size
        if missing := sorted(inside[part] for part in inside if inside[part] not in tensors):
            problems[key] = f"needs {listed(missing)}, in a file that is not here; download it as well"
            continue
        found = {part: (own, *tensors[own]) for part, own in inside.items()}
        stacked = len(shapes[key]) > 2 and holds_experts(name)
        layer = Layer(name, found, read, settings or {}, header or {}, stacked)
        try:
            whole = dequantized(layer)
        except InputError as error:
            problems[key] = str(error)
        else:
            if whole:
                plain[key], shapes[key] = whole, whole.shape
            elif who := library_of(layer):
                problems[key] = f"is quantized by {who}; dequantize the model first, or choose others by name"
    experts = {k for k in named if len(shapes[k]) == 3 and holds_experts(named[k] if k in plain else k)}
    loose = {named[k]: shapes[k] for k in experts if not (k in plain and plain[k].last_is_in)}
    turned, doubtful = transposed_experts(loose, facts, shapes)
    turned |= _transposed_conv1d({named[k]: shapes[k] for k in named if len(shapes[k]) == 2}, facts)
    aside = aside_names({name: shapes[key] for key, name in named.items()}, facts)
    stored = []
    for key, name in named.items():
        shape, dtype = shapes[key], tensors[key][1]
        beside = signs.of(name)
        hint = signs.hint(name) if dtype in NARROW and not beside else ""
        problem = problems.get(key, "")
        if not problem and key not in plain:
            problem = problem_of(dtype, beside, shape, evidence or hint)
        stored.append(
            Stored(
                unwrapped(name),
                shape,
                plain[key].read if key in plain else partial(read, key),
                usual=name not in aside
                and not name.endswith(ATTENTION)
                and not is_embedding(name, f"{name}.bias" in tensors)
                and (len(shape) == 2 or key in experts or bool(problem)),
                problem=problem,
                experts=key in experts,
                transposed=name in turned,
                doubtful=name in doubtful,
                interleaved="gpt_oss" in model_types(facts),
            )
        )
    return stored


def weight_name(key: str, shape: tuple[int, ...], signs: Signs) -> str | None:
    """The name of the weight that a file's tensor is, or None for biases, norms, tables and the like."""
    if key in signs.payloads:
        return signs.payloads[key]
    name, _, last = key.rpartition(".")
    if key in signs.keys or len(shape) < 2:
        return None
    if last == "weight":
        return name or key
    if last in ATTENTION and len(shape) == 2:
        return key
    return key if len(shape) == 3 and holds_experts(key) else None


def holds_experts(key: str) -> bool:
    """Whether a 3-D tensor is a stack of experts, by its name, rather than a 1-D convolution."""
    return bool(EXPERTS.search(key)) and "conv" not in key


def aside_names(shapes: Shapes, facts: Mapping[str, Any] | None = None) -> set[str]:
    """Which names are those of heads and routers, by the same rules as in models.

    Args:
        shapes: of all weights of a file, by name.
        facts: the config.json beside it.
    """
    names, facts = list(shapes), facts or {}
    found = routers(names)
    timm = facts.get("pretrained_cfg")
    named = timm.get("classifier") if isinstance(timm, Mapping) else None
    found |= {named} if isinstance(named, str) else set(named or ())
    architectures = facts.get("architectures") or ()
    firsts: dict[str, list[str]] = {}
    for name in names:
        firsts.setdefault(name.partition(".")[0], []).append(name)
        last = next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)
        known = architectures and name == "output"  # a head in Meta's own files, and none in transformers'
        if last in HEADS or (name in WHOLE_HEADS and not known) or OF_HEAD.search(name):
            found.add(name)
    if len(firsts) > 1 and any(NEW_HEADS.search(str(kind)) for kind in architectures):
        base = max(firsts, key=lambda first: len(firsts[first]))
        found |= {name for name in names if name.partition(".")[0] != base}
    elif not (named or architectures):  # of several layers the last one, as in torchvision's classifier.6,
        for inside in (firsts[first] for first in NAMES if first in firsts):
            if not found & set(inside):  # or all that give as many classes, as in timm's crossvit
                classes = shapes[max(inside, key=_lateness)][0]
                found |= {name for name in inside if shapes[name][0] == classes}
    return found


def _lateness(name: str) -> tuple[bool, list[tuple[int, int, str]]]:
    """A sort key for layers of a head: what is called a classifier there comes last, as in EfficientViT."""
    return not set(NAMES).isdisjoint(name.split(".")[1:]), numbers_counted(name)


def is_embedding(name: str, has_bias: bool = False) -> bool:
    """Whether a matrix is looked up row by row, by its name; an embedding has no bias."""
    parts = [part for part in name.split(".") if not part.isdecimal()] or [name]
    return not has_bias and (name in TABLES or EMBEDDING.match(parts[-1]) is not None)


def numbers_counted(name: str) -> list[tuple[int, int, str]]:
    """A sort key under which layer 10 comes after layer 9."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name)]


def transposed_experts(
    experts: Shapes, facts: Mapping[str, Any], shapes: Shapes | None = None
) -> tuple[set[str], set[str]]:
    """Which of the experts' tensors (experts, a, b) hold (in, out) instead of (out, in), and which may.

    Up projections take the hidden size and down projections return it; so do fused up projections, which
    are twice as wide as their down projections. Where all is square, known model types decide.

    Args:
        experts: the shapes by name.
        facts: the model's config.
        shapes: of all tensors by key, among them the routers, (experts, hidden).
    """
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in experts.items():
        parent, _, last = name.rpartition(".")
        modules.setdefault(parent, {})[last] = shape
    turned, doubtful = set(), set()
    for parent, inside in modules.items():
        names = {f"{parent}.{last}" if parent else last for last in inside}
        votes = _votes(inside, _hidden_sizes(facts)) or _votes(inside, _routed(parent, inside, shapes or {}))
        known = bool(model_types(facts) & TRANSPOSED_EXPERTS)
        if len(votes) != 1 and not known:
            doubtful |= names
        turned |= names if votes == {True} or (len(votes) != 1 and known) else set()
    return turned, doubtful


def model_types(facts: Mapping[str, Any]) -> set[str]:
    parts = (facts, facts.get("text_config"))
    return {str(part.get("model_type")) for part in parts if isinstance(part, Mapping)}


def _votes(inside: Shapes, hidden: set[int]) -> set[bool]:
    votes = set()
    down = {last: shape for last, shape in inside.items() if DOWN.search(last)}
    up = {last: shape for last, shape in inside.items() if UP.search(last) and last not in down}
    for last, (_, a, b) in (up | down).items():
        if (a in hidden) != (b in hidden):
            votes.add((a in hidden) != (last in down))
    for (_, a, b), (_, c, d) in product(up.values(), down.values()):
        plain, other = (a == 2 * d and b == c), (b == 2 * c and a == d)
        if plain != other:
            votes.add(other)
    return votes


def _hidden_sizes(facts: Mapping[str, Any]) -> set[int]:
    """The hidden sizes of the parts of a config that have experts, or of all."""
    parts = [facts, *(part for part in facts.values() if isinstance(part, Mapping))]
    routed = [part for part in parts if any("expert" in str(key) for key in part)]
    sizes = (part.get(key) for part in routed or parts for key in HIDDEN)
    return {size for size in sizes if isinstance(size, int)}


def _routed(parent: str, inside: Shapes, shapes: Shapes) -> set[int]:
    """What a router (experts, hidden) next to the experts takes."""
    block = parent.rpartition(".")[0]
    count = next(iter(inside.values()))[0]
    found = (s for k, s in shapes.items() if len(s) == 2 and s[0] == count and k.startswith(f"{block}."))
    return {shape[1] for shape in found}


def _transposed_conv1d(matrices: Shapes, facts: Mapping[str, Any]) -> set[str]:
    """GPT-2's layers that are stored (in, out): by the shapes of c_attn and c_fc, which widen, in a block."""
    blocks: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in matrices.items():
        path, _, last = name.rpartition(".")
        if last in CONV1D_LAYERS:
            number = re.search(r"^.*?\.?\d+(?=\.)", path)
            blocks.setdefault(number[0] if number else path, {})[name] = shape
    turned = set()
    for inside in blocks.values():
        wide = [shape for last in ("c_attn", "c_fc") for name, shape in inside.items() if name.endswith(last)]
        wide = [shape for shape in wide if shape[0] != shape[1]]
        known = bool(model_types(facts) & CONV1D_MODELS)
        turned |= set(inside) if (wide[0][0] < wide[0][1] if wide else known) else set()
    return turned
