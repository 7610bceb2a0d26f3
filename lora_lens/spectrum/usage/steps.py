"""The steps of one function, statement by statement; see :mod:`lora_lens.spectrum.usage.reading`."""

from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from lora_lens.spectrum.usage.calls import called
from lora_lens.spectrum.usage.conditions import decided
from lora_lens.spectrum.usage.operators import Args, Kwargs
from lora_lens.spectrum.usage.source import inside_decorator, mentioned, reads_in, syntax_tree, words_of
from lora_lens.spectrum.usage.values import (
    NOTHING,
    UNKNOWN,
    InnerFunction,
    Many,
    Named,
    Row,
    Value,
    Weight,
    closure_of,
    each,
    item_at,
    items_at,
    joined,
    texts_in,
    union,
    with_item,
    wrapped,
)

if TYPE_CHECKING:
    from lora_lens.spectrum.usage.reading import CodeReader


class Reading:
    """One function with what its parameters are bound to."""

    def __init__(
        self,
        reader: CodeReader,
        function: types.FunctionType,
        args: Sequence[Value],
        kwargs: Mapping[str, Value],
    ) -> None:
        self.reader, self.function = reader, function
        self.where = function.__qualname__.replace("<locals>.", "")
        self.returned: Value = NOTHING
        self.yielded: Value = NOTHING
        self.busy = 0
        self.tree = syntax_tree(function)
        self.given = (args, kwargs)
        self.env: dict[str, Value] = {}
        self.outer = closure_of(function)
        if self.tree is not None:
            self.env = self._bound(self.tree.args, args, kwargs)

    def result(self) -> Value:
        if self.tree is None:
            self.blind()
        elif isinstance(self.tree, ast.Lambda):
            self.returned = self.value(self.tree.body)
        else:
            self.run(self.tree.body)
        return (Many(self.yielded),) if self.yielded else self.returned

    def blind(self) -> None:
        """Without source: whatever its instructions may read of the modules that it is given.

        That is more than the truth: a function that it names may be given any layer that it names.
        """
        args, kwargs = self.given
        code, reader = self.function.__code__, self.reader
        near = union(*args, *kwargs.values(), *map(wrapped, self.outer.values()))
        roots = [item for item in near if isinstance(item, nn.Module)]
        for layer, attribute in reads_in(code, roots, reader.layers):
            reader.use(reader.attribute(layer, attribute, self.where), self.where)
        named = [module for root in roots for module in mentioned(code, root)]
        may_be = tuple({id(module): module for module in (*roots, *named)}.values())
        own = [i for i in roots if id(i) not in reader.layers]
        found = [reader.attribute(item, word, self.where) for item in own for word in words_of(code)]
        found += [wrapped(self.function.__globals__.get(word)) for word in words_of(code)]
        for item in union(*found, *map(wrapped, self.outer.values())):
            if isinstance(item, nn.Module) and id(item) not in reader.layers:
                item = types.MethodType(type(item).forward, item)
            item = inside_decorator(item) or item
            if isinstance(item, (types.FunctionType, types.MethodType)) and may_be:
                count = item.__code__.co_argcount - isinstance(item, types.MethodType)
                reader.enter(item, [may_be] * count)

    def _bound(
        self, names: ast.arguments, args: Sequence[Value], kwargs: Mapping[str, Value]
    ) -> dict[str, Value]:
        places = [a.arg for a in (*names.posonlyargs, *names.args)]
        bound = dict(zip(places, args, strict=False))
        known = {*places, *(a.arg for a in names.kwonlyargs)}
        bound |= {name: value for name, value in kwargs.items() if name in known}
        if names.vararg:
            bound[names.vararg.arg] = (Row.of(*args[len(places) :]),)
        if names.kwarg:
            rest = {name: value for name, value in kwargs.items() if name not in known}
            bound[names.kwarg.arg] = (Many(union(*rest.values())) if "**" in rest else Named.of(rest),)
        return bound

    # --- statements ---

    def run(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign():
                value = self.value(node.value)
                for target in node.targets:
                    self.assign(target, value)
            case ast.AnnAssign():
                if node.value is not None:
                    self.assign(node.target, self.value(node.value))
            case ast.AugAssign():
                before = self.value(node.target, loading=True)
                value = self.value(node.value)
                self.reader.use(union(before, value), self.where)
                if isinstance(node.target, ast.Name):
                    self.env[node.target.id] = union(before, value)
            case ast.Return():
                self.returned = union(self.returned, self.value(node.value))
            case ast.Expr():
                self.value(node.value)
            case ast.If():
                self.value(node.test)
                known = decided(self, node.test)
                if known is UNKNOWN:
                    self.either(node.body, node.orelse)
                else:
                    self.run(node.body if known else node.orelse)
            case ast.For() | ast.AsyncFor():
                elements = each(self.value(node.iter))
                rounds = len(texts_in(elements))  # such as the parts of a path
                for _ in range(min(max(2, rounds), 8)):  # what the first round assigns, the second one reads
                    self.either([ast.Pass()], node.body, before=(node.target, elements))
                self.run(node.orelse)
            case ast.While():
                for _ in range(2):
                    self.value(node.test)
                    self.either([ast.Pass()], node.body)
                self.run(node.orelse)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    value = self.value(item.context_expr)
                    if item.optional_vars is not None:
                        self.assign(item.optional_vars, value)
                self.run(node.body)
            case ast.Try() | ast.TryStar():
                self.run(node.body)
                self.either([ast.Pass()], *(handler.body for handler in node.handlers))
                self.run([*node.orelse, *node.finalbody])
            case ast.Match():
                subject = self.value(node.subject)
                self.reader.use(subject, self.where)
                patterns = [part for case in node.cases for part in ast.walk(case.pattern)]
                for name in (n for part in patterns for n in getattr(part, "kwd_attrs", ())):
                    found = [self.reader.attribute(item, name, self.where) for item in subject]
                    self.reader.use(union(*found), self.where)
                self.either([ast.Pass()], *(case.body for case in node.cases))
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.env[node.name] = self.inner(node.args, node.body)
            case ast.Assert():
                self.value(node.test)

    def either(self, *bodies: list[ast.stmt], before: tuple[ast.expr, Value] | None = None) -> None:
        start, ends = dict(self.env), []
        for body in bodies:
            self.env = dict(start)
            if before is not None:
                self.assign(*before)
            self.run(body)
            ends.append(self.env)
        self.env = {name: union(*(e.get(name, ()) for e in ends)) for name in {n for e in ends for n in e}}

    def inner(self, names: ast.arguments, body: list[ast.stmt] | ast.expr) -> Value:
        made = InnerFunction(self, names, body)
        self.of_inner(made, [], {})
        return (made,)

    def of_inner(self, made: InnerFunction, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
        """What an inner function returns, in the variables as they are now."""
        kept = self.env, self.returned, self.yielded
        if self.busy > 2:  # it calls itself
            return NOTHING
        self.busy += 1
        unknown = {a.arg: NOTHING for a in ast.walk(made.names) if isinstance(a, ast.arg)}
        self.env = self.env | unknown | self._bound(made.names, args, kwargs)
        self.returned = self.yielded = NOTHING
        if isinstance(made.body, ast.expr):
            self.returned = self.value(made.body)
        else:
            self.run(made.body)
        value = (Many(self.yielded),) if self.yielded else self.returned
        self.env, self.returned, self.yielded = kept
        self.busy -= 1
        return value

    def assign(self, target: ast.expr, value: Value) -> None:
        match target:
            case ast.Name():
                self.env[target.id] = value
            case ast.Tuple() | ast.List():
                starred = [isinstance(place, ast.Starred) for place in target.elts]
                for i, place in enumerate(target.elts):
                    if isinstance(place, ast.Starred):
                        self.assign(place.value, (Many(each(value)),))
                    else:
                        at = i - len(target.elts) if any(starred[:i]) else i
                        self.assign(place, union(*(item_at(item, at) for item in value)))
            case ast.Attribute():
                self.reader.use(value, self.where)
                held = self.value(target.value)
                owners = [item.layer for item in held if isinstance(item, Weight)]
                for layer in (*owners, *self.reader.layers_in(held)):
                    self.reader.report(layer, f"is needed as it is: {self.where} sets its {target.attr}")
            case ast.Subscript():
                held = self.value(target.value)
                self.reader.use(union(value, held), self.where)
                if isinstance(target.value, ast.Name):
                    self.env[target.value.id] = with_item(held, self.value(target.slice), value)

    # --- expressions ---

    def value(self, node: ast.expr | None, loading: bool = False) -> Value:
        match node:
            case ast.Name():
                return self.name(node.id)
            case ast.Attribute():
                found = [self.reader.attribute(i, node.attr, self.where) for i in self.value(node.value)]
                return union(*found)
            case ast.Call():
                return self.call(node)
            case ast.Constant():
                return (node.value,) if isinstance(node.value, str) else NOTHING
            case ast.Tuple() | ast.List() | ast.Set():
                if any(isinstance(element, ast.Starred) for element in node.elts):
                    return (Many(union(*(self._spread(element) for element in node.elts))),)
                return (Row.of(*map(self.value, node.elts)),)
            case ast.Dict():
                return self.mapping(node)
            case ast.JoinedStr():
                return self.text(node)
            case ast.Subscript():
                return self.subscript(node)
            case ast.BoolOp():
                return union(*(self.value(v) for v in node.values))
            case ast.IfExp():
                self.value(node.test)
                known = decided(self, node.test)
                if known is not UNKNOWN:
                    return self.value(node.body if known else node.orelse)
                return union(self.value(node.body), self.value(node.orelse))
            case ast.BinOp():
                both = union(self.value(node.left), self.value(node.right))
                if any(isinstance(item, Many) for item in both):
                    return (Many(each(both)),)
                self.reader.use(both, self.where)
                if isinstance(node.op, ast.Add):
                    return joined([self.value(node.left), self.value(node.right)])
            case ast.UnaryOp():
                value = self.value(node.operand)
                if not isinstance(node.op, ast.Not):
                    self.reader.use(value, self.where)
            case ast.Compare():
                values = [self.value(part) for part in (node.left, *node.comparators)]
                if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
                    self.reader.use(union(*values), self.where)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                return self.comprehension(node.generators, node.elt)
            case ast.DictComp():
                return self.comprehension(node.generators, node.value)
            case ast.Lambda():
                return self.inner(node.args, node.body)
            case ast.NamedExpr():
                value = self.value(node.value)
                self.assign(node.target, value)
                return value
            case ast.Starred() | ast.Await():
                return self.value(node.value)
            case ast.Yield():
                self.yielded = union(self.yielded, self.value(node.value))
            case ast.YieldFrom():
                self.yielded = union(self.yielded, each(self.value(node.value)))
        return NOTHING

    def mapping(self, node: ast.Dict) -> Value:
        items = list(zip(node.keys, map(self.value, node.values), strict=True))
        named = {k.value: v for k, v in items if isinstance(k, ast.Constant) and isinstance(k.value, str)}
        if len(named) == len(items):
            return (Named.of(named),)
        return (Many(union(*(each(value) if key is None else value for key, value in items))),)

    def text(self, node: ast.JoinedStr) -> Value:
        """Only of names: what else is written into a text does not count."""
        inner = [part.value if isinstance(part, ast.FormattedValue) else part for part in node.values]
        plain = all(isinstance(part, (ast.Constant, ast.Name, ast.Attribute)) for part in inner)
        return joined([self.value(part) for part in inner]) if plain else NOTHING

    def _spread(self, node: ast.expr) -> Value:
        return each(self.value(node.value)) if isinstance(node, ast.Starred) else self.value(node)

    def name(self, name: str) -> Value:
        if name in self.env:
            return self.env[name]
        for known in (self.outer, self.function.__globals__, vars(builtins)):
            if name in known:
                return wrapped(known[name])
        return NOTHING

    def subscript(self, node: ast.Subscript) -> Value:
        at = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if isinstance(node.slice, ast.UnaryOp) and isinstance(node.slice.operand, ast.Constant):
            at = ast.literal_eval(node.slice)
        index = self.value(node.slice)
        self.reader.use(index, self.where)
        found: list[Value] = []
        for item in self.value(node.value):
            if isinstance(item, Weight):
                self.reader.use((item,), self.where)
            elif isinstance(node.slice, ast.Slice):
                found.append((Many(each((item,))),))
            else:
                found.append(items_at((item,), index) if at is None else item_at(item, at))
        return union(*found)

    def comprehension(self, generators: list[ast.comprehension], element: ast.expr) -> Value:
        kept = dict(self.env)
        for part in generators:
            self.assign(part.target, each(self.value(part.iter)))
            for test in part.ifs:
                self.value(test)
        value = self.value(element)
        self.env = kept
        return (Many(value),)

    def called(self, callee: object, args: Args, kwargs: Kwargs) -> Value:
        return called(self, callee, args, kwargs)

    def call(self, node: ast.Call) -> Value:
        callees = self.value(node.func)
        args: list[Value] = []
        for arg in node.args:
            if isinstance(arg, ast.Starred):
                spread = self.value(arg.value)
                rows = [item.places for item in spread if isinstance(item, Row)]
                args += rows[0] if len(rows) == 1 == len(spread) else [each(spread)]
            else:
                args.append(self.value(arg))
        kwargs = self._keywords(node.keywords)
        match node.func:
            case ast.Attribute(value=ast.Name(id=name), attr="update" | "setdefault") if name in self.env:
                given = union(*(each(value) or value for value in (*args, *kwargs.values())))
                self.env[name] = with_item(self.env[name], NOTHING, given)
        if not callees:
            self.reader.hand_over(union(*args, *kwargs.values()), self.where)
        return union(*(called(self, callee, args, kwargs) for callee in callees))

    def _keywords(self, keywords: list[ast.keyword]) -> dict[str, Value]:
        kwargs: dict[str, Value] = {}
        for keyword in keywords:
            value = self.value(keyword.value)
            spread = [item for item in value if isinstance(item, Named)] if keyword.arg is None else []
            if not spread or len(spread) < len(value):
                spread = [Named.of({keyword.arg or "**": value})]
            for name, place in (pair for item in spread for pair in item.places.items()):
                kwargs[name] = union(kwargs.get(name, ()), place)
        return kwargs
