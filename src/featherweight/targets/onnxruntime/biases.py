"""Biases of integer kernels: int32, in units of input scale times weight scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .edit import Editor, StoredWeight, array, operand, quantized_activation, setting, stored_weight

if TYPE_CHECKING:
    from onnxscript import ir


def integer_bias(
    bias: np.ndarray, weight: np.ndarray, weight_scale: np.ndarray, input_scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bias as int32 in units of input scale times weight scale, with the weight's integers and scales to match.

    Where a bias is too large for 31 bits beside the weights of its channel, that channel's scale is enlarged and its
    weights are rounded again: they weigh less than 2**-22 of the bias there. `bias` has one entry per channel (C),
    `weight` is C x ... integers, `weight_scale` C. Jacob et al., arXiv:1712.05877, section 2.4.
    """
    limit = 2.0**30
    needed = np.abs(bias.astype(np.float64)) / (limit * input_scale)
    scale = np.maximum(weight_scale.astype(np.float64), needed).astype(np.float32)
    ratio = (weight_scale / scale).reshape(-1, *[1] * (weight.ndim - 1))
    weight = np.where(ratio == 1, weight, np.rint(weight * ratio)).astype(weight.dtype)
    return np.rint(bias / (scale.astype(np.float64) * input_scale)).astype(np.int32), weight, scale


def quantize_biases(edit: Editor) -> None:
    """Store the biases of Conv and Gemm between quantized inputs and weights as int32.

    ONNX Runtime makes no integer kernel where the bias is a float.
    """
    for node in list(edit.graph):
        if node.op_type in ("Conv", "Gemm") and plain_product(node):
            _quantize_bias(edit, node)


def plain_product(node: ir.Node) -> bool:
    """Whether a Gemm only multiplies and adds a bias (anything but a Gemm does)."""
    factors = setting(node, "alpha", 1.0), setting(node, "beta", 1.0)
    return node.op_type != "Gemm" or (factors == (1, 1) and not setting(node, "transA", 0))


def is_bias(value: ir.Value | None, length: int) -> bool:
    """Whether `value` is a constant with one float per output."""
    held = array(value)
    return held is not None and held.shape == (length,) and held.dtype == np.float32


def output_axis(node: ir.Node) -> int:
    """The dimension of the weight of a Conv, Gemm or MatMul that its outputs run along."""
    return 0 if node.op_type == "Conv" or setting(node, "transB", 0) else 1


def _quantize_bias(edit: Editor, node: ir.Node) -> None:
    given, weight = quantized_activation(node.inputs[0]), stored_weight(node.inputs[1])
    bias, axis = array(operand(node, 2)), output_axis(node)
    if given is None or weight is None or bias is None or not weight.only_for(node) or weight.grid.zero.any():
        return
    if bias.shape != (weight.integers.shape[axis],) or weight.per_channel not in (None, axis):
        return
    input_scale = float(given[1].scale)
    per_channel = np.broadcast_to(weight.grid.scale, bias.shape)
    values, moved, scale = integer_bias(bias, np.moveaxis(weight.integers, axis, 0), per_channel, input_scale)
    if not np.array_equal(scale, per_channel):
        _replace(edit, weight, np.moveaxis(moved, 0, axis), scale, axis)
    held = edit.initializer(str(node.inputs[2].name), values)  # type: ignore[union-attr]
    units = (scale.astype(np.float64) * input_scale).astype(np.float32)
    if weight.grid.axis is None and np.array_equal(scale, per_channel):
        made = edit.insert(node, "DequantizeLinear", [held, edit.constant(units[0])])
    else:
        made = edit.insert(node, "DequantizeLinear", [held, edit.constant(units)], axis=0)
    node.replace_input_with(2, made)


def _replace(edit: Editor, weight: StoredWeight, integers: np.ndarray, scale: np.ndarray, axis: int) -> None:
    held = edit.initializer(str(weight.value.name), integers)
    inputs = [held, edit.constant(scale), edit.constant(np.zeros(scale.shape, integers.dtype))]
    edit.take_over(weight.node.outputs[0], edit.insert(weight.node, "DequantizeLinear", inputs, axis=axis))
