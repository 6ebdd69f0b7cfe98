"""Linear layers and embeddings whose weights lie in blocks: found in the graph, and given to the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from featherweight.core.encoding import Affine, Encoding
from featherweight.core.storage import Packed

from .biases import is_bias, output_axis, plain_product
from .blocks import FEWEST, Blocks, Placed, in_blocks
from .edit import Editor, StoredWeight, first, only_user, operand, quantized_activation, rank, setting

if TYPE_CHECKING:
    from onnxscript import ir


@dataclass(frozen=True)
class Reader:
    """A node that reads a weight: a product whose outputs run along `axis` of the weight, or a look-up of its rows."""

    node: ir.Node
    axis: int
    look_up: bool = False


def use_blocks(edit: Editor, stored: Mapping[str, Encoding], multiply: bool = True) -> set[str]:
    """Give linear layers and embeddings to the kernels for blocks, where that pays; gives the names of their weights.

    A weight that is both (a tied embedding) is stored once for both. A weight that anything else reads is left alone;
    without `multiply`, so is one that any product reads.
    """
    done = set()
    for name, encoding in stored.items():
        value = edit.graph.initializers[name]
        readers = _readers(value)
        if not isinstance(encoding, Affine) or not readers or value.is_graph_output():
            continue
        if not multiply and not all(reader.look_up for reader in readers):
            continue
        blocks = _blocks(encoding, readers)
        if blocks is not None:
            only_looked_up = all(reader.look_up for reader in readers)
            placed = Placed(edit, name, str(Packed.of(encoding)), blocks, only_looked_up)
            for reader in readers:
                _put(edit, reader, placed)
            done.add(name)
    return done


def _readers(value: ir.Value) -> list[Reader] | None:
    """All that read a weight, if each of them is a product or a look-up; through a transposition too."""
    found: list[Reader] = []
    for usage in value.uses():
        turned = usage.node.op_type == "Transpose"
        if turned and usage.node.outputs[0].is_graph_output():
            return None
        for inner in usage.node.outputs[0].uses() if turned else [usage]:
            reader = _reader(inner.node, inner.idx, turned)
            if reader is None:
                return None
            found.append(reader)
    return found


def _reader(node: ir.Node, place: int, turned: bool) -> Reader | None:
    if node.op_type == "Gather" and place == 0 and not turned and not setting(node, "axis", 0):
        return Reader(node, 0, look_up=True)
    if node.op_type not in ("MatMul", "Gemm") or place != 1 or not plain_product(node):
        return None
    bias = operand(node, 2)
    if rank(first(node)) in (None, 1) or (bias is not None and rank(bias) != 1):
        return None
    return Reader(node, output_axis(node) ^ turned)


def _blocks(encoding: Affine, readers: list[Reader]) -> Blocks | None:
    products = [reader for reader in readers if not reader.look_up]
    if products and encoding.values.numel() < FEWEST:
        return None
    axes = {reader.axis for reader in readers}
    if len(axes) != 1:
        return None
    many = any((rank(first(reader.node)) or 0) > 2 for reader in products)
    blocks = in_blocks(encoding, axes.pop(), gather=not products, many=many)
    padded = blocks is not None and blocks.inputs % blocks.size != 0
    return None if padded and len(products) < len(readers) else blocks  # a look-up would give the padding too


def _put(edit: Editor, reader: Reader, placed: Placed) -> None:
    node = reader.node
    if reader.look_up:
        index = operand(node, 1)
        assert index is not None
        edit.take_over(node.outputs[0], placed.look_up(node, index))
        return
    replaced, bias = _with_bias(node, placed.blocks.outputs)
    edit.take_over(replaced.outputs[0], placed.multiply(node, first(node), bias))


def _with_bias(node: ir.Node, length: int) -> tuple[ir.Node, ir.Value | None]:
    """The last node of a product with its bias, and the bias: that of a Gemm, or a constant added to a MatMul."""
    if node.op_type == "Gemm":
        return node, operand(node, 2)
    user = only_user(node.outputs[0])
    if user is not None and user.op_type == "Add":
        bias = next((value for value in user.inputs if is_bias(value, length)), None)
        return (node, None) if bias is None else (user, bias)
    return node, None


def use_blocks_of_bytes(edit: Editor, weight: StoredWeight) -> bool:
    """`use_blocks` for a weight of 8 bits that was already laid out; whether it was done."""
    readers = _readers(weight.node.outputs[0])
    if not readers or any(reader.look_up or _is_quantized(reader.node) for reader in readers):
        return False
    if len(tuple(weight.value.uses())) != 1 or weight.node.outputs[0].is_graph_output():
        return False
    encoding = _encoding(weight)
    blocks = _blocks(encoding, readers)
    if blocks is None:
        return False
    placed = Placed(edit, str(weight.value.name), str(Packed.of(encoding)), blocks, gather=False)
    for reader in readers:
        _put(edit, reader, placed)
    return True


def _is_quantized(node: ir.Node) -> bool:
    return quantized_activation(first(node)) is not None


def _encoding(weight: StoredWeight) -> Affine:
    import torch

    values, scale, zero = (
        torch.from_numpy(np.array(part)) for part in (weight.integers, weight.grid.scale, weight.grid.zero)
    )
    return Affine(values, scale, zero, weight.per_channel)
