"""Small edits of an ONNX graph: constants, insertion, replacement."""

from __future__ import annotations

from collections.abc import Sequence
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

    def constant(self, array: Any) -> ir.Value:
        """An initializer that holds `array`."""
        array = np.asarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.made:
            self.made[key] = self.initializer(f"{MADE}{len(self.made)}", array)
        return self.made[key]

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """A new initializer of this name."""
        from onnxscript import ir

        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def insert(self, before: ir.Node, kind: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """A new node in front of `before`; gives its output."""
        from onnxscript import ir

        node = ir.node(kind, inputs, attributes)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every user of `old` read `new`, and remove the nodes that nothing reads any more."""
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        producer = old.producer()
        if producer is not None:
            self.prune(producer)

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """`replace`, where `new` is the same value computed otherwise: it takes over shape, type, and the name of an output."""
        new.shape, new.type = old.shape, old.type
        if old.is_graph_output():
            old.name, new.name = None, old.name
        self.replace(old, new)

    def set(self, node: ir.Node, name: str, value: Any) -> None:
        """Give an attribute of `node` this value."""
        from onnxscript import ir

        node.attributes[name] = ir.convenience.convert_attribute(name, value)

    def hold(self, value: ir.Value, array: np.ndarray) -> ir.Value:
        """An initializer with the name of the initializer `value` that holds `array`; `value` keeps another name while it is read."""
        name = value.name
        assert name is not None
        value.name = f"{name}{SPARE}"
        return self.initializer(name, array)

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


def array(value: ir.Value | None) -> np.ndarray | None:
    """The constant that `value` holds; None if it is computed or an input."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of this kind that computes `value`; None if another computes it."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value` and nothing else does; None if there are more, or it is an output of the graph."""
    uses = value.uses()
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def rank(value: ir.Value) -> int | None:
    """Number of dimensions of `value`; None if it is not known."""
    return None if value.shape is None else len(value.shape)


def setting(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, or what ONNX says it is without one."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value
