"""Bases followed through an exported graph, operator by operator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from .bases import Axes, Axis, Bases, Value
from .groups import IGNORED
from .rules.call import sizes_of

Rule = Callable[["Op"], Axes]
RULES: dict[str, Rule] = {}
LISTS: dict[str, Callable[[Op], list[Value]]] = {}  # for operators that give several tensors


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register the rule of the ATen operators with these names, separated by blanks."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


class Op:
    """One call in the graph: its arguments by their names in the operator's schema, tensors as `Value`s."""

    def __init__(self, node: fx.Node, given: dict[str, Any], trace: Trace):
        self.node, self.given, self.trace, self.bases = node, given, trace, trace.bases

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name)

    @property
    def name(self) -> str:
        return operator_name(self.node)

    @property
    def sizes(self) -> tuple[int, ...]:
        return sizes_of(self.node.meta["val"])

    @property
    def first(self) -> Value:
        return next(values_in(self.given))

    def fix(self, *axes: Axis | str) -> str:
        return self.bases.fix(f"{self.name} looks at its single entries", *axes)

    def fix_all(self) -> Axes:
        """Every dimension of every tensor that goes in keeps its basis, and so do those of the output."""
        axes = [axis for value in values_in(self.given) for axis in value.axes]
        reason = self.fix(*axes)
        return (reason,) * len(self.sizes)


def operator_name(node: fx.Node) -> str:
    """The operator's own name: `conv2d` of `aten.conv2d.default`, `add` of `aten.add_.Tensor`."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.name
    name = str(schema.name).partition("::")[2]
    return name if name in RULES else name.rstrip("_")


def values_in(item: Any) -> Iterator[Value]:
    """Every `Value` in nested lists, tuples and mappings, in order."""
    if isinstance(item, Value):
        yield item
    elif isinstance(item, dict):
        for each in item.values():
            yield from values_in(each)
    elif isinstance(item, list | tuple):
        for each in item:
            yield from values_in(each)


class Trace:
    """Follows bases through a graph. `owners` gives the placeholders of parameters their names, `held` their values.

    `known` holds what each parameter's dimensions follow, `outputs` what those of the outputs do, and `pending` each
    norm's gain: the axis that is free only if the gain moves, the norm's output, its gain, and its shift.
    """

    def __init__(self, owners: Mapping[fx.Node, str], held: Mapping[str, Tensor]):
        self.owners, self.held, self.bases = owners, held, Bases()
        self.known: dict[str, Axes] = {}
        self.state: dict[fx.Node, Any] = {}
        self.outputs: list[Axis | str] = []
        self.pending: list[tuple[Axis, fx.Node, fx.Node, fx.Node | None]] = []

    def walk(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "output":
                self.outputs = [axis for value in values_in(self._resolved(node.args)) for axis in value.axes]
            elif node.op == "placeholder":
                self.state[node] = self._placed(node)
            elif node.op == "get_attr":
                self.state[node] = _fixed(node.meta.get("val"), "it meets a constant")
            else:
                self.state[node] = self._follow(node)
        used = {self.owners[node] for node in graph.nodes if node in self.owners and node.users}
        for name in self.known.keys() - used:
            self.bases.fix("it is not used on the example inputs", *self.known[name])

    def _placed(self, node: fx.Node) -> Any:
        name, value = self.owners.get(node), node.meta.get("val")
        if name is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return _fixed(value, "it meets an input or a constant")
        if name not in self.known:
            self.known[name] = tuple(self.bases.fresh(size) for size in value.shape)
        return Value(tuple(value.shape), self.known[name])

    def _resolved(self, value: Any) -> Any:
        return fx.map_arg(value, lambda node: self.state.get(node))

    def _follow(self, node: fx.Node) -> Any:
        target: Any = node.target
        args = self._resolved(node.args)
        if target is operator.getitem and isinstance(args[0], list):
            return args[0][args[1]]
        if operator_name(node).startswith(IGNORED):
            return None
        schema = getattr(target, "_schema", None)
        names = [item.name for item in schema.arguments] if schema else [str(place) for place in range(len(args))]
        given = {**dict(zip(names, args)), **self._resolved(node.kwargs)}
        for item in schema.arguments if schema else ():
            given.setdefault(item.name, item.default_value)
        return self._apply(Op(node, given, self))

    def _apply(self, op: Op) -> Any:
        output = op.node.meta.get("val")
        found = RULES.get(op.name)
        floats = isinstance(output, Tensor) and output.is_floating_point()
        if found is not None and floats:
            return Value(op.sizes, found(op))
        if op.name in LISTS and isinstance(output, list | tuple):
            return LISTS[op.name](op)
        return _fixed(output, op.fix(*(axis for value in values_in(op.given) for axis in value.axes)))


def _fixed(value: Any, reason: str) -> Any:
    if isinstance(value, Tensor):
        return Value(sizes_of(value), (reason,) * value.dim())
    if isinstance(value, list | tuple):
        return [_fixed(item, reason) for item in value]
    return None
