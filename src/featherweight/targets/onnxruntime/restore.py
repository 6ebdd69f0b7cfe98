"""Weights in any form: their parts as initializers, and the operations of the encoding as a function that ONNX Runtime
computes once, when it loads.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from featherweight.core.encoding import Encoding
from featherweight.core.storage import Packed

from .edit import Editor
from .exporter import to_onnx
from .floats import quiet
from .shrink import short_names
from .simplify import simplify

if TYPE_CHECKING:
    from onnxscript import ir

DOMAIN = "featherweight"
MADE: dict[tuple[Hashable, int], Any] = {}  # functions that were made in this process, by what they restore, and opset


def restore(model: ir.Model, edit: Editor, stored: Mapping[str, Encoding], opset: int) -> None:
    """Store the parts of these weights in place of the floats, and compute the floats from them in the graph.

    The first part bears the name of the weight. Weights of equal form and shape share one function, so that a weight
    costs one node; the runtime inlines it and computes it ahead. Shapes and operations are those of `Encoding.restore`.
    """
    if not stored:
        return
    from featherweight.model.restore import parts_of, signature

    kinds: dict[Hashable, Encoding] = {}
    for encoding in stored.values():
        kinds.setdefault(signature(encoding), encoding)
    functions = _functions(kinds, opset, len(model.functions))
    for name, encoding in stored.items():
        function = functions[signature(encoding)]
        model.functions[function.identifier()] = function
        old = edit.graph.initializers[name]
        arrays = [part.numpy() for part in parts_of(encoding).values()]
        inputs = [edit.initializer(name, arrays[0]), *map(edit.constant, arrays[1:])]
        edit.notes[name] = str(Packed.of(encoding))
        edit.take_over(old, edit.insert(edit.graph[0], f"{DOMAIN}.{function.name}", inputs))


def _functions(kinds: dict[Hashable, Encoding], opset: int, first: int) -> dict[Hashable, ir.Function]:
    """One function per kind of encoding: its inputs are the parts, its output is the weight. `first` is the number of
    the first of them: the graph may have others.
    """
    from onnxscript import ir

    missing = {kind: encoding for kind, encoding in kinds.items() if (kind, opset) not in MADE}
    if missing:
        for kind, function in zip(missing, _exported(list(missing.values()), opset)):
            MADE[kind, opset] = ir.serde.serialize_function(function)
    found = {}
    for place, kind in enumerate(kinds, first):
        found[kind] = ir.serde.deserialize_function(MADE[kind, opset])
        found[kind].name = f"restore{place}"
    return found


def _exported(encodings: list[Encoding], opset: int) -> Iterator[ir.Function]:
    """The functions of these encodings, from one export: most of its time is the same whatever there is to export."""
    from featherweight.model.restore import capture_restore, parts_of

    program = capture_restore(encodings)
    with quiet():
        made = to_onnx(program, opset)
        simplify(made, lambda node: None)
    inputs = iter(made.graph.inputs)
    for encoding, output in zip(encodings, made.graph.outputs):
        own = [next(inputs) for _ in parts_of(encoding)]
        yield _function("restore", made.graph, own, output, opset)


def _function(name: str, graph: ir.Graph, inputs: list[ir.Value], output: ir.Value, opset: int) -> ir.Function:
    """The part of `graph` that computes `output`, copied into a function."""
    from onnxscript import ir

    needed = _behind(output)
    names = short_names()
    copies = {value: ir.Value(name=next(names)) for value in inputs}
    given, nodes = list(copies.values()), []
    for value in graph.initializers.values():
        if value in needed:
            assert value.const_value is not None
            node = ir.node("Constant", [], {"value": ir.tensor(value.const_value.numpy())})
            nodes.append(node)
            copies[value] = node.outputs[0]
    for old in graph:
        if any(result in needed for result in old.outputs):
            read = [None if value is None else copies[value] for value in old.inputs]
            node = ir.node(old.op_type, read, old.attributes, domain=old.domain, num_outputs=len(old.outputs))
            nodes.append(node)
            copies.update(zip(old.outputs, node.outputs))
    for node in nodes:
        for result in node.outputs:
            result.name = next(names)
    body = ir.Graph(given, [copies[output]], nodes=nodes, opset_imports={"": opset})
    return ir.Function(DOMAIN, name, graph=body, attributes=[])


def _behind(output: ir.Value) -> set[ir.Value]:
    """`output` and all values that it is computed from."""
    found: set[ir.Value] = set()
    waiting: list[ir.Value] = [output]
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            producer = value.producer()
            waiting += [read for read in _inputs(producer) if read is not None]
    return found


def _inputs(node: ir.Node | None) -> Iterable[ir.Value | None]:
    return () if node is None else node.inputs
