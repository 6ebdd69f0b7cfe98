"""Linear layers and embeddings on stored integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .edit import Editor, array, made_by, only_user, rank, setting

if TYPE_CHECKING:
    from onnxscript import ir


def multiply_dynamic(edit: Editor) -> None:
    """Turn products of a dynamically quantized value with stored integers into MatMulInteger, and scale its sums afterwards."""
    for node in list(edit.graph):
        if node.op_type in ("MatMul", "Gemm") and _is_dynamic(node.inputs[0]):
            _multiply_dynamic(edit, node)


def _is_dynamic(value: ir.Value | None) -> bool:
    source = made_by(value, "DequantizeLinear")
    return source is not None and made_by(source.inputs[0], "DynamicQuantizeLinear") is not None


def _multiply_dynamic(edit: Editor, node: ir.Node) -> None:
    given, weight = made_by(node.inputs[0], "DequantizeLinear"), made_by(node.inputs[1], "DequantizeLinear")
    found = None if weight is None else stored_matrix(node, weight)
    if given is None or weight is None or found is None:
        return
    values, scale, zero, transposed = found
    if transposed:
        values = edit.hold(weight.inputs[0], array(values).T) if _alone(weight, node) else edit.constant(array(values).T)  # type: ignore[union-attr,arg-type]
    sums = edit.insert(node, "MatMulInteger", [given.inputs[0], values, given.inputs[2], zero])
    floats = edit.insert(node, "Cast", [sums], to=1)
    result = edit.insert(node, "Mul", [floats, edit.insert(node, "Mul", [given.inputs[1], scale])])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = edit.insert(node, "Add", [result, node.inputs[2]])
    edit.take_over(node.outputs[0], result)


def stored_matrix(node: ir.Node, weight: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value | None, bool] | None:
    """Integers, scale and zero point of the matrix that `node` multiplies with, and whether it stands transposed.

    None if it is no stored matrix with scales per tensor or per output, or if `node` does more than a product and a bias.
    """
    integers, scale = array(weight.inputs[0]), array(weight.inputs[1])
    if integers is None or scale is None or integers.ndim != 2 or node.inputs[1] is not weight.outputs[0]:
        return None
    gemm = node.op_type == "Gemm"
    if gemm and (setting(node, "alpha", 1.0) != 1 or setting(node, "beta", 1.0) != 1 or setting(node, "transA", 0)):
        return None
    transposed = gemm and bool(setting(node, "transB", 0))
    if scale.size > 1 and setting(weight, "axis", 1) % 2 != (0 if transposed else 1):
        return None
    values = weight.inputs[0]
    assert values is not None and weight.inputs[1] is not None
    return values, weight.inputs[1], weight.inputs[2] if len(weight.inputs) > 2 else None, transposed


def _alone(weight: ir.Node, node: ir.Node) -> bool:
    return only_user(weight.outputs[0]) is node and len(weight.inputs[0].uses()) == 1  # type: ignore[union-attr]


def look_up(edit: Editor) -> None:
    """Let Gather read rows of stored integers and turn only those into floats, instead of the whole table at every call."""
    for node in list(edit.graph):
        table = made_by(node.inputs[0], "DequantizeLinear") if node.op_type == "Gather" else None
        integers = array(table.inputs[0]) if table is not None else None
        if table is None or integers is None or setting(node, "axis", 0) != 0:
            continue
        rows = edit.insert(node, "Gather", [table.inputs[0], node.inputs[1]])
        indices = rank(node.inputs[1])  # type: ignore[arg-type]
        if array(table.inputs[1]).size == 1 or integers.ndim == 0:  # type: ignore[union-attr]
            made = edit.insert(node, "DequantizeLinear", [rows, *table.inputs[1:]])
        elif setting(table, "axis", 1) % integers.ndim:
            if indices is None:
                continue
            made = edit.insert(node, "DequantizeLinear", [rows, *table.inputs[1:]], axis=indices + setting(table, "axis", 1) % integers.ndim - 1)
        else:
            made = _rows_with_scales(edit, node, table, rows, integers.ndim)
        edit.take_over(node.outputs[0], made)


def _rows_with_scales(edit: Editor, node: ir.Node, table: ir.Node, rows: ir.Value, dimensions: int) -> ir.Value:
    """Rows that each have a scale of their own: the scales are looked up like the rows."""
    column = (-1, *[1] * (dimensions - 1))

    def looked_up(entries: np.ndarray) -> ir.Value:
        return edit.insert(node, "Gather", [edit.constant(entries.reshape(column).astype(np.float32)), node.inputs[1]])

    floats = edit.insert(node, "Cast", [rows], to=1)
    zero = array(table.inputs[2]) if len(table.inputs) > 2 else None
    if zero is not None and zero.any():
        floats = edit.insert(node, "Sub", [floats, looked_up(zero)])
    scale = array(table.inputs[1])
    assert scale is not None
    return edit.insert(node, "Mul", [floats, looked_up(scale)])


# -- weights that meet floats -----------------------------------------------------------------------------------------
def restore_floats(edit: Editor) -> None:
    """Write the dequantization of weights that no integer kernel reads as Cast and Mul, which ONNX Runtime computes once, when it loads.

    DequantizeLinear of a weight it leaves in the graph for integer kernels, and then computes at every call where there is none.
    """
    for node in list(edit.graph):
        if node.op_type != "DequantizeLinear" or array(node.inputs[0]) is None or array(node.inputs[0]).dtype == np.int32:  # type: ignore[union-attr]
            continue
        usages = node.outputs[0].uses()
        if not node.outputs[0].is_graph_output() and usages and all(in_integer_kernel(usage.node) for usage in usages):
            continue
        _restore(edit, node)


def _restore(edit: Editor, node: ir.Node) -> None:
    values, scale = array(node.inputs[0]), array(node.inputs[1])
    zero = array(node.inputs[2]) if len(node.inputs) > 2 else None
    assert values is not None and scale is not None
    shape = [1] * values.ndim
    if scale.size > 1:
        shape[setting(node, "axis", 1)] = -1
    floats = edit.insert(node, "Cast", [node.inputs[0]], to=1)
    if zero is not None and zero.any():
        floats = edit.insert(node, "Sub", [floats, edit.constant(zero.reshape(shape).astype(np.float32))])
    edit.take_over(node.outputs[0], edit.insert(node, "Mul", [floats, edit.constant(scale.reshape(shape))]))


def in_integer_kernel(node: ir.Node) -> bool:
    """Whether ONNX Runtime makes an integer kernel of `node`: quantized inputs, and for a convolution a quantized output too."""
    given = made_by(node.inputs[0], "DequantizeLinear")
    if given is None or array(given.inputs[0]) is not None:
        return False
    if node.op_type in ("Gemm", "MatMul"):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return not _is_dynamic(node.inputs[0]) and (bias is None or made_by(bias, "DequantizeLinear") is not None)
    if node.op_type != "Conv" or _is_dynamic(node.inputs[0]):
        return False
    user = only_user(node.outputs[0])
    if user is not None and user.op_type in ("Relu", "Clip"):
        user = only_user(user.outputs[0])
    return user is not None and user.op_type == "QuantizeLinear"
