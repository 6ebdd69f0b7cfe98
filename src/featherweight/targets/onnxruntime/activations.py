"""Quantized activations, brought into the form that ONNX Runtime's integer kernels are fused from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .edit import Editor, array, made_by, only_user, setting

if TYPE_CHECKING:
    from onnxscript import ir

MOVES = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "MaxPool", "DepthToSpace", "SpaceToDepth", "Identity"})
SHAPES = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})


def make_signed(edit: Editor) -> None:
    """Hold activations in int8 instead of uint8: every zero point 128 lower, the floats that they stand for unchanged."""
    for node in list(edit.graph):
        if node.op_type != "QuantizeLinear":
            continue
        zero = array(node.inputs[2])
        if zero is None or zero.dtype != np.uint8:
            continue
        signed = edit.constant((zero.astype(np.int16) - 128).astype(np.int8))
        node.replace_input_with(2, signed)
        for usage in node.outputs[0].uses():
            if usage.node.op_type == "DequantizeLinear":
                usage.node.replace_input_with(2, signed)
        node.outputs[0].dtype = signed.dtype


def drop_clipping(edit: Editor) -> None:
    """Remove Relu and Clip where the quantization behind them cuts at the same places."""
    for node in list(edit.graph):
        clip = node.inputs[0].producer() if node.op_type == "QuantizeLinear" and node.inputs[0] is not None else None
        if clip is None or clip.op_type not in ("Relu", "Clip") or only_user(clip.outputs[0]) is not node:
            continue
        scale, zero = array(node.inputs[1]), array(node.inputs[2])
        low, high = (0.0, np.inf) if clip.op_type == "Relu" else (_bound(clip, 1, -np.inf), _bound(clip, 2, np.inf))
        if scale is not None and zero is not None and scale.size == 1 and low is not None and high is not None and cuts_alike(low, high, float(scale.reshape(())), zero):
            node.replace_input_with(0, clip.inputs[0])
            edit.prune(clip)


def _bound(clip: ir.Node, place: int, default: float) -> float | None:
    """A limit of Clip; None if it is computed."""
    if len(clip.inputs) <= place or clip.inputs[place] is None:
        return default
    limit = array(clip.inputs[place])
    return None if limit is None else float(limit.reshape(()))


def cuts_alike(low: float, high: float, scale: float, zero: np.ndarray) -> bool:
    """Whether quantizing with `scale` and `zero` gives the same integers with and without cutting to low...high first."""
    limits = np.iinfo(zero.dtype)
    offset = float(zero.reshape(()))
    return float(np.rint(low / scale)) + offset <= limits.min and float(np.rint(high / scale)) + offset >= limits.max


def move_behind(edit: Editor) -> None:
    """Let what only moves values move integers: DequantizeLinear goes behind it, and QuantizeLinear in front; pairs that cancel are removed."""
    for node in list(edit.graph):
        source = made_by(node.inputs[0], "DequantizeLinear") if node.inputs else None
        if source is not None and per_tensor(source) and _moves(node):
            _dequantize_later(edit, node, source)
        elif node.op_type == "QuantizeLinear":
            _quantize_sooner(edit, node)
    for node in list(edit.graph):
        if node.op_type == "QuantizeLinear" and node.graph is not None:
            _cancel(edit, node)


def _moves(node: ir.Node) -> bool:
    if node.op_type == "Pad":
        value = array(node.inputs[2]) if len(node.inputs) > 2 else None
        return setting(node, "mode", "constant") != "constant" or len(node.inputs) < 3 or node.inputs[2] is None or (value is not None and not value.any())
    return node.op_type in MOVES and not (node.op_type == "MaxPool" and len(node.outputs) > 1)


def per_tensor(node: ir.Node) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear has one constant scale."""
    scale = array(node.inputs[1])
    return scale is not None and scale.size == 1


def _dequantize_later(edit: Editor, node: ir.Node, source: ir.Node) -> None:
    inputs = [source.inputs[0], *node.inputs[1:]]
    if node.op_type == "Pad" and setting(node, "mode", "constant") == "constant":
        zero = array(source.inputs[2]) if len(source.inputs) > 2 else None
        kind = source.inputs[0].dtype.numpy()  # type: ignore[union-attr]
        inputs = [inputs[0], inputs[1], edit.constant(np.zeros((), kind) if zero is None else zero.reshape(())), *inputs[3:]]
    from onnxscript import ir

    moved = ir.node(node.op_type, inputs, node.attributes, num_outputs=len(node.outputs))
    edit.graph.insert_before(node, moved)
    for old, new in zip(node.outputs, moved.outputs):
        new.shape, new.dtype = old.shape, source.inputs[0].dtype  # type: ignore[union-attr]
        floats = edit.insert(node, "DequantizeLinear", [new, *source.inputs[1:]])
        floats.shape, floats.dtype = old.shape, old.dtype
        old.replace_all_uses_with(floats, replace_graph_outputs=True)
    edit.prune(node)


def _quantize_sooner(edit: Editor, node: ir.Node) -> None:
    """Put QuantizeLinear in front of the operations that only give its input another shape."""
    while True:
        value = node.inputs[0]
        mover = value.producer() if value is not None else None
        if mover is None or mover.op_type not in SHAPES or only_user(value) is not node:  # type: ignore[arg-type]
            return
        source = mover.inputs[0]
        assert source is not None and value is not None
        integers = edit.insert(mover, "QuantizeLinear", [source, *node.inputs[1:]])
        integers.shape, integers.dtype = source.shape, node.outputs[0].dtype
        mover.replace_input_with(0, integers)
        node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
        value.dtype = integers.dtype
        edit.graph.remove(node, safe=True)
        node = integers.producer()  # type: ignore[assignment]


def _cancel(edit: Editor, node: ir.Node) -> None:
    """Remove a dequantization followed by a quantization with the same parameters."""
    source = made_by(node.inputs[0], "DequantizeLinear")
    if source is None or not per_tensor(source):
        return
    same = all(np.array_equal(array(a), array(b)) for a, b in zip(source.inputs[1:3], node.inputs[1:3]))  # type: ignore[arg-type]
    if same and len(source.inputs) == len(node.inputs) and source.inputs[0].dtype == node.outputs[0].dtype:  # type: ignore[union-attr]
        edit.replace(node.outputs[0], source.inputs[0])  # type: ignore[arg-type]
