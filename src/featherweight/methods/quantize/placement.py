"""Where activations are quantized, read off the graph: at both ends of every operation that can run on integers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from featherweight.model.norms import CONVOLUTIONS, LINEAR, TRANSPOSED

aten = torch.ops.aten

# What directly follows an operation and becomes part of it in an integer kernel: only the range of its output changes.
FUSED = frozenset(
    {
        aten.relu.default,
        aten.relu_.default,
        aten.hardtanh.default,
        aten.hardtanh_.default,
        aten.clamp.default,
        aten.clamp_min.default,
    }
)
# What only moves values: its output has the scale of its input.
MOVES = frozenset(
    {
        aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
        aten.squeeze.dim, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.chunk.default,
        aten.split.Tensor, aten.split_with_sizes.default, aten.contiguous.default, aten.clone.default,
        aten.max_pool1d.default, aten.max_pool2d.default, aten.dropout.default, aten.upsample_nearest2d.vec,
        aten.pixel_shuffle.default, aten.channel_shuffle.default, aten.alias.default, aten.expand.default,
        aten.repeat.default,
    }
)  # fmt: skip
PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
# What an integer kernel computes once all of its inputs are integers.
JOINS = frozenset({aten.add.Tensor, aten.add_.Tensor, aten.cat.default})
POOLS = frozenset({aten.mean.dim, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default})


RECURRENT = frozenset({aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input})


@dataclass
class Placement:
    """Which values get a port. `sources` are measured; `shared` take the scale of another value. Nodes of one graph.

    `readers` says which nodes read a port; those that compute in floats keep the value as it was. Where an integer
    kernel makes the value, only integers are left of it, and all nodes read the port: then it has no entry.
    """

    sources: list[fx.Node] = field(default_factory=list)
    shared: dict[fx.Node, fx.Node] = field(default_factory=dict)
    readers: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    layers: dict[str, fx.Node] = field(default_factory=dict)  # full name of the weight -> its operation

    def reads(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether `node` reads the port behind `value`."""
        return value not in self.readers or node in self.readers[value]

    def ports(self) -> dict[str, str]:
        """The name of every port, with that of the port whose grid it has: mostly its own."""
        names = {value: value for value in self.sources} | self.shared
        return {f"ports.{value.name}": f"ports.{origin.name}" for value, origin in names.items()}


def weight_name(node: fx.Node) -> str | None:
    """The full name of the weight of a convolution or linear operation; None for any other operation, or a computed
    weight.
    """
    if node.op != "call_function" or node.target not in (*CONVOLUTIONS, *TRANSPOSED, LINEAR):
        return None
    weight = node.args[1]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def stored_weights(node: fx.Node) -> list[str]:
    """The full names of the weights of an embedding or a recurrent layer, which are stored in integers and computed
    with in floats; empty for any other operation.
    """
    if node.op != "call_function":
        return []
    if node.target is aten.embedding.default:
        held = [node.args[0]]
    elif node.target in RECURRENT:
        held = list(node.args[2])  # type: ignore[arg-type]
    else:
        return []
    weights = [item for item in held if isinstance(item, fx.Node) and item.op == "get_attr" and _is_matrix(item)]
    return [str(item.target) for item in weights]


def _is_matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is not None and value.dim() > 1


def place(graph: fx.Graph, wanted: set[str]) -> Placement:
    """Decide where ports stand so that the layers whose weights are named in `wanted` run on integers.

    A convolution gets ports at its input and its output; a linear layer only at its input (its sums leave in floats
    where nothing else computes on integers). Additions, concatenations and poolings between integer values join them.
    An activation that follows directly is inside.
    """
    found = Placement()
    ported: set[fx.Node] = set()
    for node in graph.nodes:
        name = weight_name(node)
        if name is not None and name in wanted:
            found.layers[name] = node
            _read(node, node.args[0], ported, found)
            if node.target != LINEAR:
                _give(_end(node), ported, found)
        elif node.target in JOINS and _all_integer(node, ported):
            for item in _tensors(node):
                _read(node, item, ported, found)
            _give(_end(node), ported, found)
        elif node.target in POOLS and moved_from(node.args[0]) in ported and _pools_space(node):
            _read(node, node.args[0], ported, found)
            _give(node, ported, found)
    return found


def _end(node: fx.Node) -> fx.Node:
    """The value that leaves `node` once a fused activation has been applied."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in FUSED:
        return users[0]
    return node


def moved_from(value: object) -> fx.Node | None:
    """The value that `value` is only a moved form of; None for what is no value of the graph."""
    while isinstance(value, fx.Node) and (
        value.target in MOVES or (value.target in PADS and _zero_pad(value)) or _is_getitem(value)
    ):
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None


def _is_getitem(node: fx.Node) -> bool:
    import operator

    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in MOVES


def _zero_pad(node: fx.Node) -> bool:
    if node.target is aten.pad.default:
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        return mode == "constant" and not value
    return not (node.args[2] if len(node.args) > 2 else 0)


def _read(node: fx.Node, value: object, ported: set[fx.Node], found: Placement) -> None:
    """Let `node` read `value` through a port, and through one behind what it is a moved form of; both on one grid."""
    origin = moved_from(value)
    assert origin is not None and isinstance(value, fx.Node)
    _add_port(value, origin, ported, found)
    reader = node
    for each in _moves_to(value, origin):
        if each in (value, origin) and each in found.readers:
            found.readers[each].append(reader)
        reader = each


def _moves_to(value: fx.Node, origin: fx.Node) -> list[fx.Node]:
    """`value`, what it is a moved form of, and so on to `origin`."""
    chain = [value]
    while chain[-1] is not origin:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain


def _give(value: fx.Node, ported: set[fx.Node], found: Placement) -> None:
    """Put a port behind what an integer kernel makes: nothing reads the floats before it."""
    _add_port(value, value, ported, found)
    found.readers.pop(value, None)


def _add_port(value: fx.Node, origin: fx.Node, ported: set[fx.Node], found: Placement) -> None:
    if origin not in ported:
        ported.add(origin)
        found.sources.append(origin)
        found.readers[origin] = []
    if value is not origin and value not in ported:
        ported.add(value)
        found.shared[value] = origin
        found.readers[value] = []


def _all_integer(node: fx.Node, ported: set[fx.Node]) -> bool:
    items = _tensors(node)
    return (
        len(items) > 1
        and all(moved_from(item) in ported for item in items)
        and not node.kwargs.get("alpha")
        and _from_convolution(items)
    )


def _from_convolution(items: list[fx.Node]) -> bool:
    """Whether one of the values is no model input: what joins is inside the network."""
    return any(origin is not None and origin.op != "placeholder" for origin in map(moved_from, items))


def _tensors(node: fx.Node) -> list[fx.Node]:
    items = node.args[0] if node.target is aten.cat.default else node.args[:2]
    return [item for item in items if isinstance(item, fx.Node)] if isinstance(items, list | tuple) else []


def _pools_space(node: fx.Node) -> bool:
    """Whether a pooling runs over height and width of a four-dimensional value."""
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    if value is None or value.dim() != 4:
        return False
    if node.target is aten.mean.dim:
        return {int(place) % 4 for place in node.args[1]} == {2, 3}  # type: ignore[union-attr,arg-type]
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(node.args[1]) == [1, 1]  # type: ignore[arg-type]
    return True
