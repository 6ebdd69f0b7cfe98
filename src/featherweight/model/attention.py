"""Attention in a captured graph: which layers make its queries, keys and values, and which takes its outputs in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .followed import operator_name

LINEAR = frozenset({"linear", "addmm"})
PRODUCTS = frozenset({"matmul", "bmm"})
# what only moves entries, and leaves those of a head beside each other
MOVES = frozenset(
    {
        "view", "_unsafe_view", "reshape", "permute", "transpose", "expand", "contiguous", "clone", "unsqueeze",
        "squeeze", "unflatten", "flatten", "dropout", "alias", "detach", "slice", "t", "mT", "to", "_to_copy",
    }
)  # fmt: skip
# what stands between queries times keys and the softmax, or between that and the values
SCORES = MOVES | {"mul", "div", "add", "sub", "masked_fill", "where", "softmax", "_softmax", "maximum"}


@dataclass(frozen=True)
class Attention:
    """One attention: the full names of the linear layers of its queries, keys, values and outputs, and its heads.

    There are `heads` heads of keys and values and `shared` times as many of queries; a head's queries and keys have
    `width` entries, its values `depth`. `turned` says that something changes the keys between their layer and the
    product, such as a rotation by position; `output` is "" where something else than one linear layer follows.
    """

    query: str
    key: str
    value: str
    output: str
    heads: int
    shared: int
    width: int
    depth: int
    turned: bool

    def with_turned(self) -> Attention:
        return replace(self, turned=True)

    def without_output(self) -> Attention:
        return replace(self, output="")


def attentions(module: fx.GraphModule) -> Iterator[Attention | tuple[str, str]]:
    """Every attention of a captured graph, or, where it is built otherwise, a name of it and the reason."""
    for node in module.graph.nodes:
        found = _parts(node)
        if found is not None:
            yield _attention(node, *found)


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """Queries, keys, values and output of the attention that has this node at its heart; None if it has none."""
    if node.op != "call_function":
        return None
    name = operator_name(node)
    if name == "scaled_dot_product_attention":
        query, key, value = node.args[:3]
        return query, key, value, node  # type: ignore[return-value]
    if name not in ("softmax", "_softmax"):
        return None
    before, behind = _back(node), _ahead(node)
    if before is None or behind is None:
        return None
    return before.args[0], before.args[1], behind.args[1], behind  # type: ignore[return-value]


def _back(node: fx.Node) -> fx.Node | None:
    """The product of queries and keys that a softmax is taken of."""
    waiting = list(node.all_input_nodes[:1])
    while waiting:
        each = waiting.pop()
        name = operator_name(each) if each.op == "call_function" else ""
        if name in PRODUCTS and all(isinstance(item, fx.Node) for item in each.args[:2]):
            return each
        if name in SCORES:
            waiting += each.all_input_nodes[::-1]
    return None


def _ahead(node: fx.Node) -> fx.Node | None:
    """The product of the weights that a softmax gives with the values."""
    for user in node.users:
        name = operator_name(user) if user.op == "call_function" else ""
        if name in PRODUCTS and isinstance(user.args[1], fx.Node):
            return user
        if name in MOVES and (found := _ahead(user)) is not None:
            return found
    return None


def _attention(
    node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, output: fx.Node
) -> Attention | tuple[str, str]:
    made = {"queries": _makers(query), "keys": _makers(key), "values": _makers(value)}
    where = f"attention at {node.name}"
    for what, (linears, _) in made.items():
        if len(linears) != 1:
            return where, f"its {what} come from {len(linears)} linear layers, not one"
    layers = {what: linears[0] for what, (linears, _) in made.items()}
    if len(set(layers.values())) < 3:
        return where, "its queries, keys and values do not come from a layer each"
    width, depth = _sizes(query)[-1], _sizes(value)[-1]
    names = {what: _name(layer) for what, layer in layers.items()}
    counts = [_sizes(layer)[-1] // size for layer, size in zip(layers.values(), (width, width, depth))]
    for (what, layer), count, size in zip(layers.items(), counts, (width, width, depth)):
        if not _in_heads(layer, count, size):
            return names[what] or where, f"the {what} of its heads do not lie one behind the other"
    if counts[1] != counts[2] or counts[0] % counts[1]:
        return where, f"it has {counts[0]} heads of queries, {counts[1]} of keys and {counts[2]} of values"
    turned, changed = not made["keys"][1] or not made["queries"][1], not made["values"][1]
    after = "" if changed else _reader(output)
    shared = counts[0] // counts[1]
    makers = names["queries"], names["keys"], names["values"]
    return Attention(*makers, after, counts[1], shared, width, depth, turned)


def _makers(node: fx.Node) -> tuple[list[fx.Node], bool]:
    """The linear layers that a value comes from, and whether nothing but moves lies between."""
    found: list[fx.Node] = []
    seen, waiting, plain = {node}, [node], True
    while waiting:
        each = waiting.pop()
        if each.op != "call_function":
            continue
        name = operator_name(each)
        if name in LINEAR:
            found.append(each)
            continue
        plain = plain and (name in MOVES or not _asks_data(each))
        fresh = [other for other in each.all_input_nodes if other not in seen]
        seen.update(fresh)
        waiting += fresh
    return found, plain


def _asks_data(node: fx.Node) -> bool:
    """Whether a node gives a tensor: sizes that are read off tensors change nothing."""
    return hasattr(node.meta.get("val"), "shape")


def _in_heads(layer: fx.Node, heads: int, width: int) -> bool:
    """Whether what a layer gives is next seen as [..., heads, width]."""
    for user in layer.users:
        sizes = _sizes(user)
        if operator_name(user) in MOVES and len(sizes) >= 2 and sizes[-2:] == [heads, width]:
            return True
    return False


def _reader(node: fx.Node) -> str:
    """The one linear layer that what an attention gives goes into; "" where there is another reader."""
    while True:
        users = [user for user in node.users if _asks_data(user)]
        if len(users) != 1:
            return ""
        (node,) = users
        if operator_name(node) in LINEAR:
            return _name(node)
        if operator_name(node) not in MOVES:
            return ""


def _name(layer: fx.Node) -> str:
    """The full name of the module that has a linear layer's weight."""
    weight: Any = layer.args[2 if operator_name(layer) == "addmm" else 1]
    return str(weight.target).rpartition(".")[0] if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""


def _sizes(node: fx.Node) -> list[int]:
    shape = getattr(node.meta.get("val"), "shape", (-1,))
    return [size if isinstance(size, int) else -1 for size in shape]
