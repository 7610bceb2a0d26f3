"""The syntax tree of a function from its source, and what its instructions read where there is no source."""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import re
import types
from collections.abc import Container, Iterable, Iterator
from functools import lru_cache

from torch import nn

# What may be asked of a weight whatever its values are.
_OF_VALUES = (
    "dtype device layout type names data_ptr grad requires_grad is_floating_point is_complex is_quantized"
)
_OF_SHAPE = "shape size ndim dim numel nbytes itemsize element_size stride is_contiguous is_cuda is_meta"
HARMLESS = frozenset([*_OF_VALUES.split(), *_OF_SHAPE.split()])
_WHOLE = frozenset({"state_dict", "get_parameter", "named_parameters", "_parameters", "__dict__", "eval"})
_WORDS = re.compile(r"\w+")
Tree = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def inside_decorator(function: object) -> object | None:
    """What a decorated or compiled function is around, where it says so."""
    if isinstance(function, (nn.Module, type)):
        return None
    return getattr(function, "__wrapped__", None) or getattr(function, "_torchdynamo_orig_callable", None)


def syntax_tree(function: types.FunctionType) -> Tree | None:
    """None where the source is missing, or is not that of the function."""
    linecache.lazycache(function.__code__.co_filename, function.__globals__)
    return _parsed(function.__code__)


@lru_cache(maxsize=8192)
def _parsed(code: types.CodeType) -> Tree | None:
    if code.co_name == "<lambda>":
        return _lambda(code)
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    try:
        lines = inspect.getblock(lines) if lines else []
        text = "".join(lines)
        tree = ast.parse("if 1:\n" + text if text[:1].isspace() else text)
    except SyntaxError:
        return None
    names = list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.If) else tree.body
    functions = [node for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    found = [node for node in functions if node.name == code.co_name and _parameters(node.args) == names]
    return found[0] if len(found) == 1 else None


def _lambda(code: types.CodeType) -> ast.Lambda | None:
    """A lambda's lines alone are seldom a statement, so it is looked for in the whole file by its place."""
    places = [(line, at) for line, _, at, end in code.co_positions() if line and end]
    names = list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    found = [
        node
        for node in _lambdas(code.co_filename, code.co_firstlineno)
        if _parameters(node.args) == names
        and all(_start(node) <= place <= (node.end_lineno, node.end_col_offset) for place in places)
    ]
    return max(found, key=_start) if found else None


def _start(node: ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset


@lru_cache(maxsize=64)
def _lambdas(file: str, line: int) -> list[ast.Lambda]:
    """Those that start in a line of a file."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Lambda) and node.lineno == line]


def _parameters(names: ast.arguments) -> list[str]:
    return [name.arg for name in (*names.posonlyargs, *names.args, *names.kwonlyargs)]


def reads_in(
    code: types.CodeType, roots: Iterable[nn.Module], layers: Container[int]
) -> Iterator[tuple[nn.Module, str]]:
    """(layer, attribute) for the attributes that code without source may read of layers below ``roots``.

    A chain such as ``self.proj.weight.dtype`` is followed; the weight of what is in a variable counts for all
    layers whose names occur in the code, which is more than the truth.

    Args:
        layers: the ids of the modules that count.
    """
    roots, words = list(roots), words_of(code)
    whole = bool(words & _WHOLE) or ("parameters" in words and not words & HARMLESS)
    in_text = "weight" in words - {*code.co_names}  # as getattr(layer, "weight") has it
    for chain in [*_chains(code), *([["weight"]] if whole or in_text else [])]:
        for root in roots:
            for i, name in enumerate(chain):
                if (child := root._modules.get(name)) is None:
                    if id(root) in layers and not _harmless(chain[i:]):
                        yield root, name
                    break
                root = child
        if chain[0] == "weight" and not _harmless(chain):
            for module in (m for root in roots for m in (root.modules() if whole else mentioned(code, root))):
                if id(module) in layers:
                    yield module, "weight"


def mentioned(code: types.CodeType, root: nn.Module) -> Iterator[nn.Module]:
    """The modules below ``root`` whose names occur in the code."""
    words = words_of(code)
    every = words & {"modules", "named_modules", "children", "named_children", "_modules", "items", "values"}
    for name, module in root.named_modules():
        if name and (every or all(part in words or part.isdigit() for part in name.split("."))):
            yield module


def _harmless(chain: list[str]) -> bool:
    return chain[0] == "weight" and len(chain) > 1 and chain[1] in HARMLESS


def _chains(code: types.CodeType) -> Iterator[list[str]]:
    """The attributes that are read one of the other, as a.b.c gives [b, c]."""
    chain: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(step.argval)
        elif chain and step.opname not in ("CACHE", "PRECALL", "NOP", "EXTENDED_ARG"):
            yield chain
            chain = []
    if chain:
        yield chain
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _chains(inner)


@lru_cache(maxsize=1024)
def words_of(code: types.CodeType) -> frozenset[str]:
    """The names and texts in the code, and the words of the texts, such as the parts of a path."""
    inner = [words_of(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    texts = [c for c in code.co_consts if isinstance(c, str)]
    return frozenset().union(code.co_names, texts, *(_WORDS.findall(text) for text in texts), *inner)
