"""The smallest file for a graph: no names that nobody reads, no notes, nothing stored twice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .edit import MADE, array, rank

if TYPE_CHECKING:
    from onnxscript import ir

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
WINDOWS = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
DEFAULTS: dict[tuple[str, str], Any] = {  # what an operator does when the attribute is absent
    ("Conv", "auto_pad"): "NOTSET",
    ("Conv", "group"): 1,
    ("Gemm", "alpha"): 1.0,
    ("Gemm", "beta"): 1.0,
    ("Gemm", "transA"): 0,
    ("Gemm", "transB"): 0,
    ("MaxPool", "auto_pad"): "NOTSET",
    ("MaxPool", "ceil_mode"): 0,
    ("MaxPool", "storage_order"): 0,
    ("AveragePool", "auto_pad"): "NOTSET",
    ("AveragePool", "ceil_mode"): 0,
    ("AveragePool", "count_include_pad"): 0,
    ("ConvTranspose", "auto_pad"): "NOTSET",
    ("ConvTranspose", "group"): 1,
    ("Reshape", "allowzero"): 0,
    ("Gather", "axis"): 0,
    ("Pad", "mode"): "constant",
    ("ReduceMean", "noop_with_empty_axes"): 0,
    ("Shape", "start"): 0,
}


def shrink(model: ir.Model, weights: set[str]) -> None:
    """Shorten the names of everything but inputs, outputs and `weights`; drop notes, inferred shapes and attributes
    that say the default.
    """
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    model.producer_name, model.producer_version, model.graph.name = "featherweight", None, "g"
    _merge_constants(model.graph, weights)
    common.CommonSubexpressionEliminationPass()(model)  # once more: equal operations now read equal constants
    _drop_defaults(model.graph)
    _rename(model.graph, weights)


def _merge_constants(graph: ir.Graph, weights: set[str]) -> None:
    """Let equal constants that are no weights share one initializer."""
    first: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        held = array(value)
        if name in weights or held is None:
            continue
        key = (str(value.dtype), held.shape, held.tobytes())
        if key in first and not value.is_graph_output():
            value.replace_all_uses_with(first[key])
            del graph.initializers[name]
        else:
            first[key] = value


def _drop_defaults(graph: ir.Graph) -> None:
    for node in graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if not attribute.is_ref() and _says_nothing(node, name, attribute.value):
                del node.attributes[name]


def _says_nothing(node: ir.Node, name: str, value: Any) -> bool:
    """Whether an attribute only says what holds without it."""
    if (node.op_type, name) in DEFAULTS:
        return DEFAULTS[node.op_type, name] == value
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and name == "axis":
        return rank(node.inputs[1]) == 0
    if node.op_type in ("Conv", "ConvTranspose") and name == "kernel_shape":
        return True
    if node.op_type in WINDOWS and name in ("dilations", "strides", "pads"):
        return set(value) == {0 if name == "pads" else 1}
    return False


def short_names() -> Iterator[str]:
    """Names in order of their length: a, b, ... Z, aa, ab..."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(LETTERS, repeat=length))


def _rename(graph: ir.Graph, weights: set[str]) -> None:
    kept = {value.name for value in (*graph.inputs, *graph.outputs)} | weights
    names = (name for name in short_names() if name not in kept)
    values = list(graph.initializers.values())
    for value in values:
        if value.name not in weights and not value.is_graph_input() and not value.is_graph_output():
            value.name = MADE + next(names)
        if not value.is_graph_input() and not value.is_graph_output():
            value.shape = value.type = None  # the tensor itself says it
    for node in graph.all_nodes():
        node.name = None
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = output.type = None
                output.name = next(names)
