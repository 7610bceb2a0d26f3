"""Pairs of low-rank factors among a file's tensors, by the names that programs give them.

PEFT writes ``lora_A`` and ``lora_B``, kohya's scripts ``lora_down`` and ``lora_up``, diffusers ``lora.down``
and ``lora.up``, MLX and llama.cpp ``lora_a`` and ``lora_b``, NeMo ``adapter.linear_in`` and ``linear_out``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens.spectrum.sources.quantized import problem_of
from lora_lens.spectrum.sources.roles import Stored, is_embedding

FACTOR = re.compile(
    r"(?P<layer>.+?)(?P<weight>\.weight)?[._](?P<kind>lora_embedding|lora_linear_layer|lora\d*"
    r"|(lora_\w+_)?adapter(?=\.linear_))[._](?P<side>[AaBb]|down|up|linear_in|linear_out)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<end>\.weight)?"
)
# Of other methods, or of a pair that is more than a pair.
OTHER = re.compile(
    r"(?P<layer>.+?)[._](?P<what>hada_[wt]\d(_[ab])?|lokr_(w\d(_[ab])?|t\d)|oft_(blocks|r|diag)\S*|boft_\w+|dora_scale|"
    r"lora_magnitude_vector\S*|lora_mid\S*|lora_diag\S*|lora_E\S*|ia3_l\S*|vera_lambda_[bd]\S*|hra_u\S*|"
    r"fourierft_spectrum\S*|randlora_\w+\S*|diff(_b)?|w_norm|b_norm|glora\S*|[ab][12]\.weight|scalar|m)"
)
STRONG = re.compile(r"hada_|lokr_|oft_|lora|dora_scale|ia3_l|vera_|hra_u|fourierft|adapter\.linear_")
SIDES = {"A": "a", "a": "a", "down": "a", "linear_in": "a"}
SIDES |= {"B": "b", "b": "b", "up": "b", "linear_out": "b"}


@dataclass(frozen=True)
class Pair:
    """Two factors of one layer, B (out, rank) and A (rank, in) however they are stored."""

    layer: str
    a: str
    b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    dtypes: tuple[str, str]
    adapter: str = ""
    embedding: bool = False
    turned: bool = False  # stored as A (in, rank) and B (rank, out)

    @property
    def rank(self) -> int:
        return (self.shape_a[-1] if self.turned else self.shape_a[0]) if self.shape_a else 0


def is_adapter_key(key: str) -> bool:
    """Whether a name is that of a factor, or of what other adapters consist of."""
    if not STRONG.search(key):
        return False
    other = OTHER.fullmatch(key)
    return bool(FACTOR.fullmatch(key) or (other and STRONG.search(other["what"])))


def pairs_among(
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
) -> tuple[list[Pair], dict[str, list[str]]]:
    """The pairs, and by layer the names of what else an adapter's file holds for it.

    Raises:
        ValueError: one factor of a pair is missing.
    """
    halves: dict[tuple[str, str], dict[str, str]] = {}
    others: dict[str, list[str]] = {}
    for key in tensors:
        if found := FACTOR.fullmatch(key):
            numbered = found["kind"] if found["kind"][-1].isdecimal() else ""
            layer = f"{found['layer']}_{numbered}" if numbered else found["layer"]
            halves.setdefault((layer, found["adapter"] or ""), {})[SIDES[found["side"]]] = key
        elif found := OTHER.fullmatch(key):
            others.setdefault(found["layer"], []).append(found["what"])
    pairs = []
    for (layer, adapter), sides in halves.items():
        if len(sides) < 2:
            (key,) = sides.values()
            raise InputError(
                f"{key} has no partner: a pair of factors, A and B, is needed; save the adapter again"
            )
        a, b = sides["a"], sides["b"]
        (shape_a, dtype_a), (shape_b, dtype_b) = tensors[a], tensors[b]
        turned = _turned(a, shape_a, shape_b)
        pairs.append(
            Pair(
                layer,
                a,
                b,
                shape_a,
                shape_b,
                (dtype_a, dtype_b),
                adapter,
                "lora_embedding" in a or (turned and is_embedding(layer)),  # MLX's has no name of its own
                turned,
            )
        )
    return pairs, others


def stored_pair(
    pair: Pair,
    name: str,
    scaling: float,
    read: Callable[[str], Tensor],
    *,
    rank: int | None = None,
    problem: str = "",
    factors: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> Stored:
    """The update of one layer, scaling * B @ A.

    Args:
        rank: which the scaling is for; None if it was formed with the pair's own.
        problem: why it cannot be read.
        factors: reads other factors than these.

    Raises:
        ValueError: the shapes are no pair of that rank.
    """
    shape_a, shape_b = pair.shape_a, pair.shape_b
    if pair.turned:
        shape_a, shape_b = shape_a[::-1], shape_b[::-1]
    rank = pair.rank if rank is None else rank
    fits = len(shape_a) > 1 and len(shape_b) > 1 and pair.rank == rank == math.prod(shape_b[1:]) > 0
    if not fits and not problem:
        raise InputError(
            f"A {pair.shape_a} and B {pair.shape_b} of {name} are no pair of rank {rank}, as for an "
            "adapted linear "
            "layer, embedding or convolution; leave such an adapter out"
        )
    out, rest = (shape_b or (0,))[0], math.prod(shape_a[1:])
    problem = problem or next(filter(None, map(problem_of, pair.dtypes)), "")
    factors = factors or partial(factors_of, pair, scaling, read)
    shape = (rest, out) if pair.embedding else (out, rest)
    return Stored(name, shape, partial(_product, factors), problem=problem, factors=factors, update=True)


def _turned(key: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> bool:
    """MLX stores A (in, rank) and B (rank, out). Square layers fit either way, so there names decide.

    MLX's end in .lora_a, as do llama.cpp's, which has .weight.lora_a and stores factors as PEFT does.
    """
    if len(shape_a) != 2 or len(shape_b) != 2 or ".lora_a" not in key:
        return False
    plain, turned = shape_a[0] == shape_b[1], shape_a[1] == shape_b[0]
    of_mlx = key.endswith(".lora_a") and not key.endswith(".weight.lora_a")
    return turned and (of_mlx or not plain)


def factors_of(pair: Pair, scaling: float, read: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """(scaling * B, A) in at least float32, so that scaling rounds nothing of a half-precision adapter."""
    a, b = read(pair.a), read(pair.b)
    dtype = a.dtype if a.dtype == b.dtype == torch.float64 else torch.float32
    a, b = (factor.flatten(1).to(dtype) for factor in ((a.T, b.T) if pair.turned else (a, b)))
    return (scaling * a.T, b.T) if pair.embedding else (scaling * b, a)


def _product(factors: Callable[[], tuple[Tensor, Tensor]], expert: int | None) -> Tensor:
    b, a = factors()
    return b @ a
