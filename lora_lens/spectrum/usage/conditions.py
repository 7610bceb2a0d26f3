"""What conditions in code come to, where settings decide them; see :mod:`lora_lens.spectrum.usage.steps`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_lens.spectrum.usage.values import UNKNOWN

if TYPE_CHECKING:
    from lora_lens.spectrum.usage.steps import Reading

COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


def decided(reading: Reading, node: ast.expr) -> object:
    """What a condition on settings of modules and configs comes to, such as ``reading.config.tp > 1``."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Attribute():
            return reading.reader.setting(reading.value(node.value), node.attr)
        case ast.UnaryOp(op=ast.Not()):
            value = decided(reading, node.operand)
            return value if value is UNKNOWN else not value
        case ast.BoolOp():
            values = [decided(reading, part) for part in node.values]
            ends = isinstance(node.op, ast.Or)
            if any(value is not UNKNOWN and bool(value) == ends for value in values):
                return ends
            return UNKNOWN if UNKNOWN in values else not ends
        case ast.Compare(ops=[op]) if type(op) in COMPARED:
            left, right = decided(reading, node.left), decided(reading, node.comparators[0])
            if left is not UNKNOWN and right is not UNKNOWN:
                try:
                    return COMPARED[type(op)](left, right)
                except TypeError:
                    return UNKNOWN
    return UNKNOWN
