"""Attention as the exporter writes it, said shorter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .edit import Editor, array, first, made_by, only_user, operand, rank, setting

if TYPE_CHECKING:
    from onnxscript import ir


def turn_keys(edit: Editor) -> None:
    """Write the transposition of the last two dimensions of the keys as one Transpose.

    The exporter merges all leading dimensions, transposes, and splits them again, with shapes that it computes from the
    value: ten operations at every layer, for any number of dimensions. Here that number is known.
    """
    for node in list(edit.graph):
        source = _turned(node) if node.op_type == "Reshape" else None
        dims = rank(source)
        if source is None or dims is None or dims < 3:
            continue
        order = [*range(dims - 2), dims - 1, dims - 2]
        before = made_by(source, "Transpose")
        if before is not None and "perm" in before.attributes:
            earlier = setting(before, "perm", None)
            source, order = first(before), [earlier[place] for place in order]
        edit.take_over(node.outputs[0], edit.insert(node, "Transpose", [source], perm=order))


def _turned(node: ir.Node) -> ir.Value | None:
    """What a Reshape of a Transpose of a Reshape is the turned form of; None if it is anything else."""
    middle = made_by(first(node), "Transpose")
    merged = None if middle is None else made_by(first(middle), "Reshape")
    if middle is None or merged is None or list(setting(middle, "perm", [])) != [0, 2, 1]:
        return None
    if only_user(middle.outputs[0]) is not node or only_user(merged.outputs[0]) is not middle:
        return None
    source = first(merged)
    together, apart = _sizes(operand(merged, 1), source), _sizes(operand(node, 1), source)
    return source if together == ["all before", -2, -1] and apart == ["each before", -1, -2] else None


def _sizes(shape: ir.Value | None, source: ir.Value) -> list[object] | None:
    """A computed shape in words: which of the last two sizes of `source` stand where, and how those before them."""
    joined = made_by(shape, "Concat")
    return None if joined is None else [_size(value, source) for value in joined.inputs]


def _size(value: ir.Value | None, source: ir.Value) -> object:
    held = array(value)
    if held is not None:
        return "all before" if held.tolist() == [-1] else None
    part = made_by(value, "Slice")
    whole = None if part is None else made_by(first(part), "Shape")
    if part is None or whole is None or first(whole) is not source or len(part.inputs) > 4:
        return None
    start, end = (array(operand(part, place)) for place in (1, 2))
    if start is None or end is None or setting(whole, "start", 0) or "end" in whole.attributes:
        return None
    begins, ends = int(start[0]), int(end[0])
    if begins == -1 and ends > 2**31:
        return -1
    if ends == -1 and begins == -2:
        return -2
    return "each before" if begins < -(2**31) and ends == -2 else None
