"""One operator call in an exported graph, as its rule sees it, and the table of rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .labels import Dim, Indices, Labels, Shape, fixed

Result = Shape | list[Shape | None]
Rule = Callable[["Call"], Result]
RULES: dict[str, Rule] = {}


class NoRule(Exception):
    """An operator is used in a way that no rule covers; the message says which."""


@dataclass(frozen=True, eq=False)
class Size:
    """A number that the model's code wrote into an operator and that follows from how many of `labels` there are.

    `module` is the full name of the module whose code it is. With `attribute` it is known where the number is kept;
    otherwise whichever attribute of the module holds `value` may be it.
    """

    module: str
    value: int
    labels: Indices
    attribute: str = ""


@dataclass(frozen=True, eq=False)
class Work:
    """Multiply-accumulates of one call: `constant` times the length of each of `factors`."""

    constant: int
    factors: tuple[Indices, ...]


@dataclass
class Trace:
    """What the rules find out on their way through one graph.

    Some calls can be cut in several ways (a reshape into heads: whole heads, or the same part of every head).
    `choices` says which way to take for which node; `open` collects for each such node its call, the number of ways
    and the labels concerned.
    """

    choices: dict[str, int] = field(default_factory=dict)
    labels: Labels = field(default_factory=Labels)
    sizes: list[Size] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    open: dict[str, tuple[Call, int, list[Indices]]] = field(default_factory=dict)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of the ATen operators called `names` (words of one string, or several strings).

    It stands for all of their overloads and in-place forms.
    """

    def register(function: Rule) -> Rule:
        for name in " ".join(names).split():
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = function
        return function

    return register


class Call:
    """A node of the graph with its arguments by their names in the operator's schema; tensors are given as their
    `Shape`s.
    """

    def __init__(self, node: fx.Node, arguments: dict[str, Any], trace: Trace):
        self.node, self.arguments, self.trace, self.labels = node, arguments, trace, trace.labels

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def name(self) -> str:
        """The operator's own name: `conv2d` of `aten.conv2d.default`."""
        return str(self.node.target._schema.name).partition("::")[2]  # type: ignore[union-attr]

    @property
    def shapes(self) -> list[Shape]:
        """Every tensor among the arguments, in order."""
        return list(shapes_in(self.arguments))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the output, if it is one tensor."""
        return sizes_of(self.node.meta["val"])

    @property
    def module(self) -> str:
        """The full name of the innermost module whose code made this call."""
        stack = self.node.meta.get("nn_module_stack") or {}
        return re.sub(r"@\d+", "", next(reversed(stack.values()))[0]) if stack else ""

    def unite(self, *dims: Dim) -> Dim:
        """All `dims` (of one size) become one; see `Labels.unite`."""
        result = dims[0]
        for dim in dims[1:]:
            result = self.labels.unite(result, dim)
        return result

    def freeze(self, dim: Dim, reason: str = "") -> Dim:
        """Fix `dim`; by default because this operator runs over it."""
        return self.labels.freeze(dim, reason or f"the operator {self.name} runs over it")

    def freeze_all(self, reason: str) -> None:
        """Fix every dimension of every tensor that goes into this call."""
        for shape in self.shapes:
            for dim in shape:
                self.labels.freeze(dim, reason)

    def choose(self, ways: int, labels: Indices) -> int:
        """Which of several ways to cut this call to take; they are tried in order until one passes the check."""
        known = self.trace.open.setdefault(self.node.name, (self, ways, []))
        known[2].append(labels)
        return min(self.trace.choices.get(self.node.name, 0), ways - 1)

    def size(self, value: int, labels: Indices, module: str | None = None, attribute: str = "") -> None:
        """Note that the model's code holds `value`, and that it follows from how many of `labels` are kept."""
        self.trace.sizes.append(Size(self.module if module is None else module, value, labels, attribute))

    def work(self, *dims: Dim) -> None:
        """Note that this call takes as many multiply-accumulates as the product of `dims`."""
        constant = 1
        for dim in dims:
            constant *= 1 if dim.free else dim.size
        self.trace.works.append(Work(constant, tuple(dim.labels for dim in dims if dim.labels is not None)))


def shapes_in(value: Any) -> Sequence[Shape]:
    """Every `Shape` in nested lists and mappings, in order."""
    if isinstance(value, Shape):
        return [value]
    if isinstance(value, dict):
        return [shape for item in value.values() for shape in shapes_in(item)]
    if isinstance(value, list | tuple):
        return [shape for item in value for shape in shapes_in(item)]
    return []


def sizes_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The sizes of a traced tensor; those that depend on data count as 0."""
    return tuple(size if isinstance(size, int) else 0 for size in tensor.shape)


def fixed_like(value: Any, reason: str) -> Any:
    """Fixed shapes for the output(s) of a call; None where an output is no tensor."""
    if isinstance(value, torch.Tensor):
        return Shape(fixed(size, reason) for size in sizes_of(value))
    if isinstance(value, list | tuple):
        return [fixed_like(item, reason) for item in value]
    return None


def find(target: Any) -> Rule | None:
    """The rule of an operator, by its name or that of its out-of-place form; pointwise ones share one rule."""
    name = str(target._schema.name).partition("::")[2]
    found = RULES.get(name) or RULES.get(name.rstrip("_"))
    return RULES["pointwise"] if found is None and torch.Tag.pointwise in target.tags else found
