"""Biases of integer kernels: int32, in units of input scale times weight scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .activations import per_tensor
from .edit import Editor, array, made_by, only_user, setting

if TYPE_CHECKING:
    from onnxscript import ir


def integer_bias(bias: np.ndarray, weight: np.ndarray, weight_scale: np.ndarray, input_scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bias as int32 in units of input scale times weight scale, with weight integers and scales to match.

    Where a bias is so large against its channel's weights that it does not fit 31 bits, that channel's scale is enlarged and its weights
    rounded again, which moves its outputs by less than 2**-23 of the bias times the number of weights. `bias` has one entry per channel
    (C), `weight` is C x ... integers, `weight_scale` C. Jacob et al., arXiv:1712.05877, section 2.4.
    """
    limit = 2.0**30
    needed = np.abs(bias.astype(np.float64)) / (limit * input_scale)
    scale = np.maximum(weight_scale.astype(np.float64), needed).astype(np.float32)
    ratio = (weight_scale / scale).reshape(-1, *[1] * (weight.ndim - 1))
    weight = np.where(ratio == 1, weight, np.rint(weight * ratio)).astype(weight.dtype)
    return np.rint(bias / (scale.astype(np.float64) * input_scale)).astype(np.int32), weight, scale


def quantize_biases(edit: Editor) -> None:
    """Store the biases of Conv and Gemm between quantized inputs and weights as int32: without it their sums stay in floats."""
    for node in list(edit.graph):
        if node.op_type in ("Conv", "Gemm"):
            _quantize_bias(edit, node)


def _quantize_bias(edit: Editor, node: ir.Node) -> None:
    given, weight = (made_by(value, "DequantizeLinear") for value in node.inputs[:2])
    bias = array(node.inputs[2]) if len(node.inputs) > 2 else None
    if given is None or weight is None or bias is None or not per_tensor(given) or array(given.inputs[0]) is not None:
        return
    if node.op_type == "Gemm" and (setting(node, "alpha", 1.0) != 1 or setting(node, "beta", 1.0) != 1 or setting(node, "transA", 0)):
        return
    integers, scale = array(weight.inputs[0]), array(weight.inputs[1])
    axis = 1 if node.op_type == "Gemm" and not setting(node, "transB", 0) else 0
    if integers is None or scale is None or only_user(weight.outputs[0]) is not node or bias.ndim != 1 or bias.size != integers.shape[axis]:
        return
    if scale.size > 1 and setting(weight, "axis", 1) % integers.ndim != axis or _has_zero(weight):
        return
    input_scale = float(array(given.inputs[1]).reshape(()))  # type: ignore[union-attr]
    per_channel = np.broadcast_to(scale.reshape(-1), bias.shape)
    values, moved, new_scale = integer_bias(bias, np.moveaxis(integers, axis, 0), per_channel, input_scale)
    if not np.array_equal(new_scale, per_channel):
        _replace_weight(edit, node, weight, np.moveaxis(moved, 0, axis), new_scale, axis)
    held = edit.hold(node.inputs[2], values)  # type: ignore[union-attr]
    bias_scale = (new_scale.astype(np.float64) * input_scale).astype(np.float32)
    same = bool((bias_scale == bias_scale[0]).all()) and scale.size == 1
    scales = edit.constant(bias_scale[0] if same else bias_scale)
    node.replace_input_with(2, edit.insert(node, "DequantizeLinear", [held, scales], **({} if same else {"axis": 0})))


def _has_zero(node: ir.Node) -> bool:
    zero = array(node.inputs[2]) if len(node.inputs) > 2 else None
    return zero is not None and bool(zero.any())


def _replace_weight(edit: Editor, node: ir.Node, weight: ir.Node, integers: np.ndarray, scale: np.ndarray, axis: int) -> None:
    held = edit.hold(weight.inputs[0], integers)  # type: ignore[arg-type]
    zero = edit.constant(np.zeros(scale.shape, integers.dtype))
    edit.take_over(weight.outputs[0], edit.insert(node, "DequantizeLinear", [held, edit.constant(scale), zero], axis=axis))
