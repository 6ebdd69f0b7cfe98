"""The smallest file for a graph: no names that nobody reads, no notes, nothing stored twice."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from .edit import MADE, array

if TYPE_CHECKING:
    from onnxscript import ir

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
DEFAULTS = {  # what an operator does when the attribute is absent
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
    """Shorten the names of everything but inputs, outputs and `weights`; drop notes, inferred shapes and attributes that say the default."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedOpsetsPass

    ClearMetadataAndDocStringPass()(model)
    RemoveUnusedOpsetsPass()(model)
    model.producer_name, model.producer_version, model.graph.name = "featherweight", None, "g"
    _merge_constants(model.graph, weights)
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
            if attribute.is_ref() or (node.op_type, name) not in DEFAULTS and not _says_nothing(node, name, attribute.value):
                continue
            if (node.op_type, name) not in DEFAULTS or DEFAULTS[node.op_type, name] == attribute.value:
                del node.attributes[name]


def _says_nothing(node: ir.Node, name: str, value: object) -> bool:
    """Whether an attribute of a convolution or pooling only repeats what is known without it."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and name == "axis":
        scale = node.inputs[1]
        return scale is not None and scale.shape is not None and len(scale.shape) == 0
    if node.op_type in ("Conv", "ConvTranspose") and name == "kernel_shape":
        return True
    if name in ("dilations", "strides") and node.op_type in ("Conv", "ConvTranspose", "MaxPool", "AveragePool"):
        return set(value) == {1}  # type: ignore[call-overload]
    return name == "pads" and node.op_type in ("Conv", "ConvTranspose", "MaxPool", "AveragePool") and set(value) == {0}  # type: ignore[call-overload]


def _short() -> itertools.chain[str]:
    return itertools.chain.from_iterable(map("".join, itertools.product(LETTERS, repeat=length)) for length in itertools.count(1))  # type: ignore[arg-type]


def _rename(graph: ir.Graph, weights: set[str]) -> None:
    kept = {value.name for value in (*graph.inputs, *graph.outputs)} | weights
    names = (name for name in _short() if name not in kept)
    values = list(graph.initializers.values())
    for value in values:
        if value.name not in weights and not value.is_graph_input() and not value.is_graph_output():
            value.name = MADE + next(names)
    for node in graph.all_nodes():
        node.name = None
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = output.type = None
                output.name = next(names)
