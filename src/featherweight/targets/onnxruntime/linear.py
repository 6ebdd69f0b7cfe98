"""Linear layers and embeddings on stored integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .biases import is_bias, output_axis, plain_product
from .edit import (
    Editor,
    StoredWeight,
    first,
    made_by,
    only_user,
    operand,
    quantized_activation,
    rank,
    setting,
    stored_weight,
)
from .narrow import use_blocks_of_bytes

if TYPE_CHECKING:
    from onnxscript import ir

FLOAT = 1  # ONNX's number for float32


def multiply_static(edit: Editor) -> None:
    """Turn products of a quantized value of three or more dimensions with stored integers into MatMulIntegerToFloat.

    ONNX Runtime makes that operator by itself, but leaves the bias to an addition, which cost up to 6% of the time of a
    transformer. Products that are quantized again at once keep their form: they become QLinearMatMul.
    """
    for node in list(edit.graph):
        given = quantized_activation(first(node)) if node.op_type == "MatMul" else None
        weight = None if given is None else stored_weight(operand(node, 1))
        if given is None or weight is None or weight.integers.ndim != 2 or rank(first(node)) in (None, 2):
            continue
        if weight.per_channel in (None, 1) and not _quantized_next(node):
            _multiply_static(edit, node, given[0], weight)


def _quantized_next(node: ir.Node) -> bool:
    user = only_user(node.outputs[0])
    return user is not None and user.op_type == "QuantizeLinear"


def _multiply_static(edit: Editor, node: ir.Node, given: ir.Node, weight: StoredWeight) -> None:
    user, bias = only_user(node.outputs[0]), None
    if user is not None and user.op_type == "Add":
        bias = next((value for value in user.inputs if is_bias(value, weight.integers.shape[1])), None)
    zero = weight.node.inputs[2] if weight.grid.zero.any() else None
    inputs = [first(given), weight.value, given.inputs[1], weight.node.inputs[1], operand(given, 2), zero, bias]
    while inputs[-1] is None:
        inputs.pop()
    result = edit.insert(node, "com.microsoft.MatMulIntegerToFloat", inputs)
    replaced = node if bias is None or user is None else user
    edit.take_over(replaced.outputs[0], result)


def multiply_dynamic(edit: Editor) -> None:
    """Turn products of a dynamically quantized value with stored integers into MatMulInteger, scaled afterwards."""
    for node in list(edit.graph):
        given = _dynamic(first(node)) if node.op_type in ("MatMul", "Gemm") else None
        weight = None if given is None else stored_weight(operand(node, 1))
        if given is None or weight is None or weight.integers.ndim != 2 or not plain_product(node):
            continue
        if weight.per_channel in (None, output_axis(node)):
            _multiply_dynamic(edit, node, given, weight)


def _dynamic(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that `value` comes from, if it follows DynamicQuantizeLinear."""
    source = made_by(value, "DequantizeLinear")
    return source if source is not None and made_by(first(source), "DynamicQuantizeLinear") is not None else None


def _multiply_dynamic(edit: Editor, node: ir.Node, given: ir.Node, weight: StoredWeight) -> None:
    values, (scale, zero) = _columns(edit, node, weight), weight.node.inputs[1:3]
    sums = edit.insert(node, "MatMulInteger", [first(given), values, given.inputs[2], zero])
    floats = edit.insert(node, "Cast", [sums], to=FLOAT)
    result = edit.insert(node, "Mul", [floats, edit.insert(node, "Mul", [given.inputs[1], scale])])
    bias = operand(node, 2)
    edit.take_over(node.outputs[0], result if bias is None else edit.insert(node, "Add", [result, bias]))


def _columns(edit: Editor, node: ir.Node, weight: StoredWeight) -> ir.Value:
    """The integers of the weight of a product with one column per output."""
    if output_axis(node) == 1:
        return weight.value
    turned = np.ascontiguousarray(weight.integers.T)
    return edit.initializer(str(weight.value.name), turned) if weight.only_for(node) else edit.constant(turned)


def multiply_rows(edit: Editor) -> None:
    """Turn products of a value whose rows are quantized with a scale each, with stored integers, into
    MatMulIntegerToFloat, and multiply by the scales of the rows afterwards: its kernel takes only one.
    """
    for node in list(edit.graph):
        found = _rows(first(node)) if node.op_type in ("MatMul", "Gemm") else None
        weight = None if found is None else stored_weight(operand(node, 1))
        if found is None or weight is None or weight.integers.ndim != 2 or not plain_product(node):
            continue
        if weight.per_channel in (None, output_axis(node)):
            _multiply_rows(edit, node, *found, weight)


def _rows(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The DequantizeLinear and the scales of the rows that `value` is the product of; None if it is anything else."""
    product = made_by(value, "Mul")
    given = None if product is None else quantized_activation(first(product))
    scale = None if product is None else operand(product, 1)
    divided = None if given is None else made_by(first(given[0]), "QuantizeLinear")
    divided = None if divided is None else made_by(first(divided), "Div")
    if given is None or divided is None or scale is None or operand(divided, 1) is not scale:
        return None
    return given[0], scale


def _multiply_rows(edit: Editor, node: ir.Node, given: ir.Node, rows: ir.Value, weight: StoredWeight) -> None:
    values, (scale, zero) = _columns(edit, node, weight), weight.node.inputs[1:3]
    inputs = [first(given), values, given.inputs[1], scale, given.inputs[2]]
    if weight.grid.zero.any():
        inputs.append(zero)
    product = edit.insert(node, "com.microsoft.MatMulIntegerToFloat", inputs)
    result = edit.insert(node, "Mul", [product, rows])
    bias = operand(node, 2)
    edit.take_over(node.outputs[0], result if bias is None else edit.insert(node, "Add", [result, bias]))


# -- embeddings -------------------------------------------------------------------------------------------------------
def look_up(edit: Editor) -> None:
    """Let Gather read rows of stored integers and turn only those into floats, not the whole table at every call."""
    for node in list(edit.graph):
        table = stored_weight(first(node)) if node.op_type == "Gather" and not setting(node, "axis", 0) else None
        indices = rank(operand(node, 1))
        if table is None or indices is None:
            continue
        rows = edit.insert(node, "Gather", [table.value, node.inputs[1]])
        if table.per_channel == 0:
            made = _rows_with_scales(edit, node, table, rows)
        else:
            axis = None if table.per_channel is None else indices + table.per_channel - 1
            made = edit.dequantize(node, rows, table.node, axis)
        edit.take_over(node.outputs[0], made)


def _rows_with_scales(edit: Editor, node: ir.Node, table: StoredWeight, rows: ir.Value) -> ir.Value:
    """Rows that each have a scale of their own: the scales are looked up like the rows."""
    column = (-1, *[1] * (table.integers.ndim - 1))

    def looked_up(entries: np.ndarray) -> ir.Value:
        return edit.insert(node, "Gather", [edit.constant(entries.reshape(column).astype(np.float32)), node.inputs[1]])

    floats = edit.insert(node, "Cast", [rows], to=FLOAT)
    if table.grid.zero.any():
        floats = edit.insert(node, "Sub", [floats, looked_up(table.grid.zero)])
    return edit.insert(node, "Mul", [floats, looked_up(table.grid.scale)])


# -- weights that meet floats -----------------------------------------------------------------------------------------
def restore_floats(edit: Editor, multiply: bool = True) -> None:
    """Give weights of linear layers that no integer kernel reads to MatMulNBits where that pays (and `multiply` allows
    it); write the dequantization of all others as Cast and Mul.

    These ONNX Runtime computes once, when it loads. DequantizeLinear of a weight it keeps for integer kernels, and
    where there is none it computes it at every call.
    """
    for node in list(edit.graph):
        weight = stored_weight(node.outputs[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.integers.dtype == np.int32:
            continue
        usages = node.outputs[0].uses()
        if node.outputs[0].is_graph_output() or not all(in_integer_kernel(usage.node) for usage in usages):
            in_blocks = multiply and use_blocks_of_bytes(edit, weight)
            if not in_blocks:
                _restore(edit, weight)


def _restore(edit: Editor, weight: StoredWeight) -> None:
    shape = [1] * weight.integers.ndim
    if weight.per_channel is not None:
        shape[weight.per_channel] = -1
    floats = edit.insert(weight.node, "Cast", [weight.value], to=FLOAT)
    if weight.grid.zero.any():
        floats = edit.insert(
            weight.node, "Sub", [floats, edit.constant(weight.grid.zero.reshape(shape).astype(np.float32))]
        )
    scaled = edit.insert(weight.node, "Mul", [floats, edit.constant(weight.grid.scale.reshape(shape))])
    edit.take_over(weight.node.outputs[0], scaled)


def in_integer_kernel(node: ir.Node) -> bool:
    """Whether ONNX Runtime makes an integer kernel of `node`: quantized operands, for a convolution a quantized output
    too.
    """
    if node.op_type not in ("Conv", "Gemm", "MatMul") or quantized_activation(first(node)) is None:
        return False
    bias = operand(node, 2)
    if bias is not None and made_by(bias, "DequantizeLinear") is None:
        return False
    if node.op_type != "Conv":
        return True
    user = only_user(node.outputs[0])
    if user is not None and user.op_type in ("Relu", "Clip"):
        user = only_user(user.outputs[0])
    return user is not None and user.op_type == "QuantizeLinear"
