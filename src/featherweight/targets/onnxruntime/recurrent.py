"""Recurrent layers on stored integers: ONNX Runtime has a kernel for the LSTM, none for GRU and plain recurrence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .activations import SHAPES
from .edit import Editor, StoredWeight, array, first, made_by, only_user, operand, setting, stored_weight

if TYPE_CHECKING:
    from onnxscript import ir

KERNEL = "DynamicQuantizeLSTM"
ATTRIBUTES = ("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "input_forget")


def recur_dynamic(edit: Editor) -> None:
    """Turn each LSTM that reads a dynamically quantized value, or what such an LSTM gave, and has stored integers for
    weights, into DynamicQuantizeLSTM.

    The kernel quantizes its inputs itself, as one, and the hidden state anew at every step.
    """
    for node in list(edit.graph):
        if node.op_type != "LSTM" or setting(node, "layout", 0):
            continue
        weights = [stored_weight(operand(node, place)) for place in (1, 2)]
        found = [weight for weight in weights if weight is not None and _fits(weight, node)]
        if len(found) == 2 and _reads_quantized(edit, node):
            _recur(edit, node, *found)


def _fits(weight: StoredWeight, node: ir.Node) -> bool:
    """Whether a weight (directions x gates x inputs) is of signed bytes around zero with scales as the kernel takes
    them.
    """
    signed = weight.integers.dtype == np.int8 and not weight.grid.zero.any()
    return signed and weight.integers.ndim == 3 and weight.per_channel in (None, 0, 1) and weight.only_for(node)


def _reads_quantized(edit: Editor, node: ir.Node) -> bool:
    """Whether the inputs of an LSTM are to be quantized at run time; what did that before it is left out then."""
    reader = node
    while (mover := first(reader).producer()) is not None and mover.op_type in SHAPES:
        reader = mover
    source = first(reader).producer()
    if source is None or source.op_type == KERNEL:
        return source is not None
    quantized = made_by(first(source), "DynamicQuantizeLinear") if source.op_type == "DequantizeLinear" else None
    if quantized is None or (reader is not node and only_user(reader.outputs[0]) is None):
        return False
    reader.replace_input_with(0, first(quantized))
    edit.prune(source)
    return True


def _recur(edit: Editor, node: ir.Node, inputs: StoredWeight, hidden: StoredWeight) -> None:
    from onnxscript import ir

    values, scales = zip(*(_columns(edit, weight) for weight in (inputs, hidden)))
    given = [operand(node, place) for place in range(8)]
    zeros = [edit.constant(np.zeros(array(scale).shape, np.int8)) for scale in scales]  # type: ignore[union-attr]
    given[1:3] = values
    made = ir.node(
        KERNEL,
        [*given, scales[0], zeros[0], scales[1], zeros[1]],
        {name: node.attributes[name] for name in ATTRIBUTES if name in node.attributes},
        domain="com.microsoft",
        num_outputs=len(node.outputs),
    )
    edit.graph.opset_imports["com.microsoft"] = 1
    edit.graph.insert_before(node, made)
    for old, new in zip(node.outputs, made.outputs):
        edit.take_over(old, new)


def _columns(edit: Editor, weight: StoredWeight) -> tuple[ir.Value, ir.Value]:
    """The integers with one column per gate and output (directions x inputs x gates), and their scales: one per
    direction, or one per direction and column.
    """
    turned = np.ascontiguousarray(weight.integers.swapaxes(1, 2))
    directions, _, columns = turned.shape
    shape = (directions, columns) if weight.per_channel == 1 else (directions,)
    scale = weight.grid.scale if weight.per_channel == 0 else np.broadcast_to(weight.grid.scale, shape)
    return edit.initializer(str(weight.value.name), turned), edit.constant(scale.astype(np.float32))
