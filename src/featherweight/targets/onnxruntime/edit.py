"""Small edits of an ONNX graph: constants, insertion, replacement; and how its nodes are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnxscript import ir

MADE = "#"  # names of constants that are no weights of the torch model begin with it
SPARE = "~"  # the end of the name of an initializer that another one has replaced


class Editor:
    """Edits one graph in place; equal constants are stored once."""

    def __init__(self, graph: ir.Graph):
        self.graph = graph
        self.made: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self.notes: dict[str, str] = {}  # what packed initializers are, by their names

    def constant(self, array: Any) -> ir.Value:
        """An initializer that holds `array`."""
        array = np.asarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.made:
            self.made[key] = self.initializer(f"{MADE}{len(self.made)}", array)
        return self.made[key]

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """A new initializer of this name; one that bears it already gets another while it is still read."""
        from onnxscript import ir

        self._give_way(name)
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _give_way(self, name: str) -> None:
        old, spare = self.graph.initializers.get(name), name
        while spare in self.graph.initializers:
            spare += SPARE
        if old is not None:
            old.name = spare

    def insert(self, before: ir.Node, kind: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """A new node in front of `before`; gives its output. ONNX Runtime's own operators are "com.microsoft.NAME"."""
        from onnxscript import ir

        domain, _, kind = kind.rpartition(".")
        if domain:
            self.graph.opset_imports[domain] = 1
        node = ir.node(kind, inputs, attributes, domain=domain)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def dequantize(self, before: ir.Node, integers: ir.Value, like: ir.Node, axis: int | None = None) -> ir.Value:
        """`integers` as floats in front of `before`, on the grid of the DequantizeLinear `like`; `axis` is the
        dimension of `integers` along which scale and zero point vary.
        """
        along = {} if axis is None else {"axis": axis}
        return self.insert(before, "DequantizeLinear", [integers, *like.inputs[1:]], **along)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every user of `old` read `new`, and remove the nodes that nothing reads any more."""
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        producer = old.producer()
        if producer is not None:
            self.prune(producer)

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """`replace`, where `new` is the same value computed otherwise: it takes over shape, type and output name."""
        new.shape, new.type = old.shape, old.type
        if old.is_graph_output():
            old.name, new.name = None, old.name
        self.replace(old, new)

    def set(self, node: ir.Node, name: str, value: Any) -> None:
        """Give an attribute of `node` this value."""
        from onnxscript import ir

        node.attributes[name] = ir.convenience.convert_attribute(name, value)

    def prune(self, node: ir.Node) -> None:
        """Remove `node`, and what only it needed, if nothing reads its outputs."""
        if any(output.uses() or output.is_graph_output() for output in node.outputs):
            return
        sources = [value.producer() for value in node.inputs if value is not None]
        self.graph.remove(node, safe=True)
        for source in dict.fromkeys(sources):
            if source is not None and source.graph is not None:
                self.prune(source)

    def sweep(self) -> None:
        """Remove the initializers that nothing reads."""
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]


# -- reading ----------------------------------------------------------------------------------------------------------
def array(value: ir.Value | None) -> np.ndarray | None:
    """The constant that `value` holds; None if it is computed or an input."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def operand(node: ir.Node, place: int) -> ir.Value | None:
    """An input of `node`; None if it is left out."""
    return node.inputs[place] if place < len(node.inputs) else None


def first(node: ir.Node) -> ir.Value:
    """The first input of `node`, which must be there."""
    value = node.inputs[0]
    assert value is not None
    return value


def made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of this kind that computes `value`; None if another computes it."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, if nothing else does and it is no output of the graph."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def rank(value: ir.Value | None) -> int | None:
    """Number of dimensions of `value`; None if it is not known."""
    return None if value is None or value.shape is None else len(value.shape)


def setting(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, or what ONNX says it is without one."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


@dataclass(frozen=True)
class Grid:
    """The constant parameters of a QuantizeLinear or DequantizeLinear: `float = (integer - zero) * scale`.

    Scale and zero point are scalars (`axis` None) or have one entry per index of `axis`.
    """

    scale: np.ndarray
    zero: np.ndarray
    axis: int | None

    def same(self, other: Grid) -> bool:
        """Whether both map equal integers of equal type to equal floats."""
        return (
            self.zero.dtype == other.zero.dtype
            and self.axis == other.axis
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero, other.zero)
        )


def grid(node: ir.Node | None) -> Grid | None:
    """The grid of a QuantizeLinear or DequantizeLinear; None if it is computed at run time (or there is no node)."""
    scale = None if node is None else array(operand(node, 1))
    if node is None or scale is None:
        return None
    zero = array(operand(node, 2))
    if zero is None and operand(node, 2) is not None:
        return None
    if zero is None:
        kind = first(node).dtype if node.op_type == "DequantizeLinear" else node.outputs[0].dtype
        if kind is None:
            return None
        zero = np.zeros(scale.shape, kind.numpy())
    if scale.size == 1:
        return Grid(scale.reshape(()), zero.reshape(()), None)
    return Grid(scale, zero, int(setting(node, "axis", 1)))


@dataclass(frozen=True)
class StoredWeight:
    """A weight that is stored as integers: the DequantizeLinear that reads it, its initializer, its integers and its
    grid.
    """

    node: ir.Node
    value: ir.Value
    integers: np.ndarray
    grid: Grid

    @property
    def per_channel(self) -> int | None:
        """The dimension along which the scale varies, from 0; None if there is one scale."""
        return None if self.grid.axis is None else self.grid.axis % self.integers.ndim

    def only_for(self, node: ir.Node) -> bool:
        """Whether `node` alone reads this weight."""
        return only_user(self.node.outputs[0]) is node and only_user(self.value) is self.node


def stored_weight(value: ir.Value | None) -> StoredWeight | None:
    """The stored weight that `value` is the floats of; None if it is anything else."""
    node = made_by(value, "DequantizeLinear")
    integers = None if node is None else array(first(node))
    found = grid(node)
    if node is None or integers is None or found is None:
        return None
    return StoredWeight(node, first(node), integers, found)


def quantized_activation(value: ir.Value | None) -> tuple[ir.Node, Grid] | None:
    """The DequantizeLinear, with one constant scale, that computes `value`; None for anything else, or a weight."""
    node = made_by(value, "DequantizeLinear")
    found = grid(node)
    if node is None or found is None or found.axis is not None or array(first(node)) is not None:
        return None
    return node, found
