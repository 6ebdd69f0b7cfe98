"""Convolutions and poolings on integers, in the shape for which ONNX Runtime's kernels are fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .activations import per_tensor
from .edit import Editor, array, made_by, only_user, rank, setting

if TYPE_CHECKING:
    from onnxscript import ir

CHANNELS = 4  # the packed convolution kernels of x86 take input channels by fours, and at least 16 output channels
LEAST_OUT = 16


def pool_means(edit: Editor) -> None:
    """Turn a mean over height and width of a quantized value into GlobalAveragePool, which has an integer kernel."""
    for node in list(edit.graph):
        if node.op_type != "ReduceMean" or not made_by(node.inputs[0], "DequantizeLinear") or rank(node.inputs[0]) != 4:
            continue
        axes = array(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or {int(axis) % 4 for axis in axes} != {2, 3}:
            continue
        pooled = edit.insert(node, "GlobalAveragePool", [node.inputs[0]])
        if not setting(node, "keepdims", 1):
            pooled = edit.insert(node, "Squeeze", [pooled, edit.constant(np.array([2, 3], dtype=np.int64))])
        edit.take_over(node.outputs[0], pooled)


def merge_slices(edit: Editor) -> None:
    """Turn a slice of a slice along other dimensions into one slice."""
    for node in list(edit.graph):
        before = made_by(node.inputs[0], "Slice") if node.op_type == "Slice" else None
        if before is None or only_user(before.outputs[0]) is not node or len(before.inputs) < 4 or len(node.inputs) < 4:
            continue
        parts = [[array(value) for value in each.inputs[1:5]] for each in (before, node)]
        if any(part is None for each in parts for part in each) or set(parts[0][2]) & set(parts[1][2]):  # type: ignore[arg-type]
            continue
        if any((axes < 0).any() for axes in (parts[0][2], parts[1][2])):  # type: ignore[operator]
            continue
        for each in parts:
            each.extend([np.ones(len(each[0]), np.int64)] * (4 - len(each)))  # type: ignore[arg-type]
        joined = [edit.constant(np.concatenate([a, b])) for a, b in zip(*parts)]  # type: ignore[list-item]
        edit.take_over(node.outputs[0], edit.insert(node, "Slice", [before.inputs[0], *joined]))


def absorb_padding(edit: Editor) -> None:
    """Let a quantized convolution pad height and width itself where a Pad in front of it fills in zeros."""
    for node in list(edit.graph):
        given = made_by(node.inputs[0], "DequantizeLinear") if node.op_type == "Conv" else None
        pad = None if given is None else made_by(given.inputs[0], "Pad")
        if given is None or pad is None or not per_tensor(given) or only_user(given.outputs[0]) is not node:
            continue
        amounts = _zero_padding(pad, given)
        if amounts is None or setting(node, "auto_pad", "NOTSET") != "NOTSET":
            continue
        dims = len(amounts) // 2
        begin, end = amounts[2:dims], amounts[dims + 2 :]
        if any(amounts[place] for place in (0, 1, dims, dims + 1)) or min(*begin, *end) < 0:
            continue
        old = setting(node, "pads", [0] * (2 * len(begin)))
        edit.set(node, "pads", [int(a) + int(b) for a, b in zip(old, [*begin, *end])])
        source = edit.insert(node, "DequantizeLinear", [pad.inputs[0], *given.inputs[1:]])
        edit.take_over(given.outputs[0], source)


def _zero_padding(pad: ir.Node, given: ir.Node) -> list[int] | None:
    """How much a Pad adds, if it fills in what `given` reads as zero, along all dimensions in order."""
    amounts = array(pad.inputs[1])
    value = array(pad.inputs[2]) if len(pad.inputs) > 2 else None
    zero = array(given.inputs[2]) if len(given.inputs) > 2 else None
    if amounts is None or setting(pad, "mode", "constant") != "constant" or len(pad.inputs) > 3 and pad.inputs[3] is not None:
        return None
    return amounts.tolist() if int(0 if value is None else value) == int(0 if zero is None else zero) else None


def pad_channels(edit: Editor) -> None:
    """Add empty input channels to convolutions whose number of them is no multiple of four, so that a packed kernel can take them.

    The stored weights stay as they are; ONNX Runtime pads them once, when it loads.
    """
    for node in list(edit.graph):
        if node.op_type != "Conv" or setting(node, "group", 1) != 1:
            continue
        given, weight = (made_by(value, "DequantizeLinear") for value in node.inputs[:2])
        shape = weight.inputs[0].shape if weight is not None else None  # type: ignore[union-attr]
        if given is None or weight is None or shape is None or not per_tensor(given) or array(weight.inputs[0]) is None:
            continue
        outputs, channels = int(shape[0]), int(shape[1])  # type: ignore[arg-type]
        if channels % CHANNELS and outputs >= LEAST_OUT and outputs % CHANNELS == 0 and setting(weight, "axis", 0) == 0:
            _pad_channels(edit, node, given, weight, -channels % CHANNELS)


def _pad_channels(edit: Editor, node: ir.Node, given: ir.Node, weight: ir.Node, missing: int) -> None:
    dims = len(weight.inputs[0].shape)  # type: ignore[union-attr,arg-type]
    amounts = edit.constant(np.array([0] * (dims + 1) + [missing] + [0] * (dims - 2), dtype=np.int64))
    wider = edit.insert(node, "Pad", [given.inputs[0], amounts, *given.inputs[2:3]])
    node.replace_input_with(0, edit.insert(node, "DequantizeLinear", [wider, *given.inputs[1:]]))
    filled = edit.insert(node, "Pad", [weight.inputs[0], amounts])
    node.replace_input_with(1, edit.insert(node, "DequantizeLinear", [filled, *weight.inputs[1:]], **({"axis": 0} if "axis" in weight.attributes else {})))
    edit.prune(given)
    edit.prune(weight)
