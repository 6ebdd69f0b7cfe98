"""Quantized activations, brought into the form that ONNX Runtime's integer kernels are fused from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .edit import Editor, Grid, array, first, grid, made_by, only_user, operand, rank, setting

if TYPE_CHECKING:
    from onnxscript import ir

SHAPES = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})
MOVES = SHAPES | frozenset({"Slice", "Split", "Gather", "MaxPool", "DepthToSpace", "SpaceToDepth", "Identity"})


def make_signed(edit: Editor) -> None:
    """Hold activations in int8 instead of uint8: zero points 128 lower, the floats that they stand for unchanged."""
    for node in list(edit.graph):
        zero = array(operand(node, 2)) if node.op_type == "QuantizeLinear" else None
        if zero is None or zero.dtype != np.uint8:
            continue
        signed = edit.constant((zero.astype(np.int16) - 128).astype(np.int8))
        node.replace_input_with(2, signed)
        node.outputs[0].type = signed.type
        for usage in node.outputs[0].uses():
            if usage.node.op_type == "DequantizeLinear":
                usage.node.replace_input_with(2, signed)


def move_behind(edit: Editor) -> None:
    """Let what only moves values move integers: DequantizeLinear goes behind it, QuantizeLinear in front of it.

    A dequantization that then meets a quantization with the same parameters is removed with it.
    """
    for node in list(edit.graph):
        source = made_by(operand(node, 0), "DequantizeLinear")
        found = grid(source)
        if source is not None and found is not None and found.axis is None and _moves(node):
            _dequantize_later(edit, node, source, found)
        elif node.op_type == "QuantizeLinear":
            _quantize_sooner(edit, node)
    for node in list(edit.graph):
        if node.op_type == "QuantizeLinear":
            _cancel(edit, node)


def _moves(node: ir.Node) -> bool:
    """Whether every entry of the outputs is an entry of the first input, or zero."""
    if node.op_type == "Pad" and setting(node, "mode", "constant") == "constant":
        filled = array(operand(node, 2))
        return operand(node, 2) is None or (filled is not None and not filled.any())
    return node.op_type in MOVES | {"Pad"} and not (node.op_type == "MaxPool" and len(node.outputs) > 1)


def _dequantize_later(edit: Editor, node: ir.Node, source: ir.Node, found: Grid) -> None:
    from onnxscript import ir

    inputs = [first(source), *node.inputs[1:]]
    if node.op_type == "Pad" and setting(node, "mode", "constant") == "constant":
        inputs[2:3] = [edit.constant(found.zero)]
    moved = ir.node(node.op_type, inputs, node.attributes, num_outputs=len(node.outputs))
    edit.graph.insert_before(node, moved)
    for old, new in zip(node.outputs, moved.outputs):
        new.shape, new.type = old.shape, first(source).type
        floats = edit.dequantize(node, new, source)
        floats.shape, floats.type = old.shape, old.type
        old.replace_all_uses_with(floats, replace_graph_outputs=True)
    edit.prune(node)


def _quantize_sooner(edit: Editor, node: ir.Node) -> None:
    """Put QuantizeLinear in front of the operations that only give its input another shape."""
    while True:
        value = first(node)
        mover = value.producer()
        if mover is None or mover.op_type not in SHAPES or only_user(value) is not node:
            return
        source = first(mover)
        integers = edit.insert(mover, "QuantizeLinear", [source, *node.inputs[1:]])
        integers.shape, integers.type, value.type = source.shape, node.outputs[0].type, node.outputs[0].type
        mover.replace_input_with(0, integers)
        node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
        edit.graph.remove(node, safe=True)
        made = integers.producer()
        assert made is not None
        node = made


def _cancel(edit: Editor, node: ir.Node) -> None:
    """Remove a dequantization followed by a quantization with the same parameters."""
    source = made_by(first(node), "DequantizeLinear")
    before, after = grid(source), grid(node)
    if source is not None and before is not None and after is not None and before.same(after):
        edit.replace(node.outputs[0], first(source))


# -- means and slices --------------------------------------------------------------------------------------------------
def pool_means(edit: Editor) -> None:
    """Turn a mean over height and width of a quantized value into GlobalAveragePool, which has an integer kernel."""
    for node in list(edit.graph):
        if node.op_type != "ReduceMean" or not made_by(first(node), "DequantizeLinear") or rank(first(node)) != 4:
            continue
        axes = array(operand(node, 1))
        if axes is None or {int(axis) % 4 for axis in axes} != {2, 3}:
            continue
        pooled = edit.insert(node, "GlobalAveragePool", [first(node)])
        if not setting(node, "keepdims", 1):
            pooled = edit.insert(node, "Squeeze", [pooled, edit.constant(np.array([2, 3], dtype=np.int64))])
        edit.take_over(node.outputs[0], pooled)


def merge_slices(edit: Editor) -> None:
    """Turn a slice of a slice along other dimensions into one slice."""
    for node in list(edit.graph):
        before = made_by(first(node), "Slice") if node.op_type == "Slice" else None
        if before is None or only_user(before.outputs[0]) is not node:
            continue
        parts = [_slice_of(each) for each in (before, node)]
        inner, outer = parts
        if inner is None or outer is None or set(inner[2]) & set(outer[2]) or min(*inner[2], *outer[2]) < 0:
            continue
        joined = [edit.constant(np.array([*a, *b], dtype=np.int64)) for a, b in zip(inner, outer)]
        edit.take_over(node.outputs[0], edit.insert(node, "Slice", [first(before), *joined]))


def _slice_of(node: ir.Node) -> list[list[int]] | None:
    """Starts, ends, axes and steps of a Slice; None if they are computed at run time or the axes are not said."""
    parts = [array(operand(node, place)) for place in range(1, 5)]
    if any(part is None for part in parts[:3]) or (parts[3] is None and operand(node, 4) is not None):
        return None
    lists = [part.tolist() for part in parts if part is not None]
    return lists if len(lists) == 4 else [*lists, [1] * len(lists[0])]


# -- clipping ---------------------------------------------------------------------------------------------------------
def drop_clipping(edit: Editor) -> None:
    """Remove Relu and Clip where the quantization behind them cuts at the same places."""
    for node in list(edit.graph):
        clip = first(node).producer() if node.op_type == "QuantizeLinear" else None
        if clip is None or clip.op_type not in ("Relu", "Clip") or only_user(clip.outputs[0]) is not node:
            continue
        found, limits = grid(node), _limits(clip)
        if found is not None and found.axis is None and limits is not None and cuts_alike(*limits, found):
            node.replace_input_with(0, first(clip))
            edit.prune(clip)


def _limits(clip: ir.Node) -> tuple[float, float] | None:
    """Where Relu or Clip cuts; None if that is computed at run time."""
    if clip.op_type == "Relu":
        return 0.0, np.inf
    found = []
    for place, default in ((1, -np.inf), (2, np.inf)):
        limit = array(operand(clip, place))
        if limit is None and operand(clip, place) is not None:
            return None
        found.append(default if limit is None else float(limit.reshape(())))
    return found[0], found[1]


def cuts_alike(low: float, high: float, found: Grid) -> bool:
    """Whether quantizing to this grid (one scale) gives the same integers if values are cut to low...high first."""
    limits, scale, zero = np.iinfo(found.zero.dtype), float(found.scale), float(found.zero)
    return float(np.rint(low / scale)) + zero <= limits.min and float(np.rint(high / scale)) + zero >= limits.max
