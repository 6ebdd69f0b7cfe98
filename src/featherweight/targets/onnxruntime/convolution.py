"""Convolutions on integers, padded as ONNX Runtime's fast kernels want it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .edit import (
    Editor,
    Grid,
    StoredWeight,
    array,
    first,
    made_by,
    only_user,
    operand,
    quantized_activation,
    setting,
    stored_weight,
)

if TYPE_CHECKING:
    from onnxscript import ir

CHANNELS = 4  # the packed convolution kernels of x86 take input channels by fours,
LEAST_OUT = 16  # and at least this many output channels


def absorb_padding(edit: Editor) -> None:
    """Let a quantized convolution pad height and width itself where a Pad in front of it fills in zeros."""
    for node in list(edit.graph):
        found = quantized_activation(first(node)) if node.op_type == "Conv" else None
        pad = None if found is None else made_by(first(found[0]), "Pad")
        if found is None or pad is None or only_user(found[0].outputs[0]) is not node:
            continue
        amounts = _zero_padding(pad, found[1])
        if amounts is None or setting(node, "auto_pad", "NOTSET") != "NOTSET":
            continue
        dims = len(amounts) // 2
        spatial = [*amounts[2:dims], *amounts[dims + 2 :]]
        if any(amounts[place] for place in (0, 1, dims, dims + 1)) or min(spatial) < 0:
            continue
        old = setting(node, "pads", [0] * len(spatial))
        edit.set(node, "pads", [int(a) + int(b) for a, b in zip(old, spatial)])
        edit.take_over(first(node), edit.dequantize(node, first(pad), found[0]))


def _zero_padding(pad: ir.Node, found: Grid) -> list[int] | None:
    """How much a Pad adds, if it fills in what stands for zero on this grid, along all dimensions in order."""
    amounts, value = array(operand(pad, 1)), array(operand(pad, 2))
    if amounts is None or setting(pad, "mode", "constant") != "constant" or operand(pad, 3) is not None:
        return None
    return amounts.tolist() if int(0 if value is None else value) == int(found.zero) else None


def pad_channels(edit: Editor) -> None:
    """Add empty input channels where their number is no multiple of four, so that a packed kernel takes the
    convolution.

    The stored weights stay as they are; ONNX Runtime pads them once, when it loads.
    """
    for node in list(edit.graph):
        if node.op_type != "Conv" or setting(node, "group", 1) != 1:
            continue
        found, weight = quantized_activation(first(node)), stored_weight(operand(node, 1))
        if found is None or weight is None or weight.per_channel not in (None, 0):
            continue
        outputs, channels = weight.integers.shape[:2]
        missing = -channels % CHANNELS
        packed = outputs >= LEAST_OUT and outputs % CHANNELS == 0 and not weight.grid.zero.any()
        if (
            packed and 0 < missing <= channels // 2
        ):  # more than half as much work again is not worth it: one channel was slower
            _pad_channels(edit, node, found, weight)


def _pad_channels(edit: Editor, node: ir.Node, found: tuple[ir.Node, Grid], weight: StoredWeight) -> None:
    shape = weight.integers.shape
    amounts = np.zeros(2 * len(shape), dtype=np.int64)
    amounts[len(shape) + 1] = -shape[1] % CHANNELS
    given = found[0]
    wider = edit.insert(node, "Pad", [first(given), edit.constant(amounts), edit.constant(found[1].zero)])
    node.replace_input_with(0, edit.dequantize(node, wider, given))
    filled = edit.insert(node, "Pad", [weight.value, edit.constant(amounts)])
    node.replace_input_with(1, edit.dequantize(node, filled, weight.node, weight.per_channel))
    edit.prune(given)
    edit.prune(weight.node)
