"""Weights of 2, 4 and 8 bits in blocks, as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them.

Which of them pay was measured with ONNX Runtime 1.31 on x86 with AVX-512 VNNI, one thread, against fp32 (1 and 32 rows,
64 to 1024 inputs and outputs). With `accuracy_level` 4, which brings the inputs to int8 block by block (0.5% off per
product), 512 x 512 takes 0.6-0.9 of the time at one row and 0.7-0.9 at 32; level 0 takes 1.2-17 times. Slower than
floats, and left to them: fewer than 256 x 256 weights (up to 2.9 times); 2 bits in blocks of 16 (10-17 times, there is
no kernel) or 256 (22 times), or of 32 where there are many rows (1.3-1.8 times); zero points that are floats (1.1-12
times; 8 bits do not run).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from featherweight.core.encoding import Affine

from .edit import Editor

if TYPE_CHECKING:
    from onnxscript import ir

LEVEL = 4  # inputs in int8
FEWEST = 256 * 256  # weights below which the kernel takes longer than floats
PADDING = 1.125  # how much longer a row may become when its last block is filled up
FLOAT = 1  # ONNX's number for float32


@dataclass(frozen=True)
class Blocks:
    """A weight of the shape [outputs, inputs] whose rows are cut into blocks of `size` neighbours.

    `values` is outputs x blocks x bytes (uint8, lowest bits first); `zero` is packed likewise (outputs x bytes), None
    where it lies in the middle of the grid. `scale` has one column per group; a group is `repeat` blocks.
    """

    values: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    inputs: int
    bits: int
    size: int

    @property
    def outputs(self) -> int:
        return len(self.values)

    @property
    def repeat(self) -> int:
        return self.values.shape[1] // self.scale.shape[1]


def in_blocks(encoding: Affine, axis: int, gather: bool = False, many: bool = False) -> Blocks | None:
    """The weight with one row per index of `axis`, in the largest blocks that pay; None if none do.

    `many` says that many rows are multiplied at a time, `gather` that rows are only looked up.
    """
    if encoding.bits not in (2, 4, 8) or encoding.zero.is_floating_point() or len(encoding.shape) != 2:
        return None
    if encoding.axis not in (None, axis):
        return None
    integers, scale, zero = _rows(encoding, axis)
    size = block_size(integers.shape[1], encoding.group, encoding.bits, gather, many)
    if size is None or (gather and integers.shape[1] % size):
        return None
    count = math.ceil(integers.shape[1] / size)
    padded = np.pad(integers, ((0, 0), (0, count * size - integers.shape[1])))
    middle = 2 ** (encoding.bits - 1)
    zeros = None if (zero == middle).all() else _packed(np.repeat(zero, count // zero.shape[1], 1), encoding.bits)
    values = _packed(padded.reshape(len(integers) * count, size), encoding.bits).reshape(len(integers), count, -1)
    return Blocks(values, scale, zeros, integers.shape[1], encoding.bits, size)


def block_size(length: int, group: int | None, bits: int, gather: bool = False, many: bool = False) -> int | None:
    """The largest block that the kernels take for rows of this length: a part of a group, or with little padding."""
    smallest = 16 if bits > 2 or gather else 64 if many else 32
    sizes = [size for size in (256, 128, 64, 32, 16) if smallest <= size <= (128 if bits == 2 else 256)]
    if group is not None:
        return next((size for size in sizes if group % size == 0), None)
    return next((size for size in sizes if math.ceil(length / size) * size <= length * PADDING), None)


def _rows(encoding: Affine, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers from 0 up, scales and zero points, each with one row per output; one column per group."""
    offset = 2 ** (encoding.bits - 1) if encoding.values.dtype.is_signed else 0
    integers = encoding.values.cpu().numpy().astype(np.int16) + offset
    integers = np.moveaxis(integers, axis, 0)
    entries = encoding.scale.cpu().numpy(), encoding.zero.cpu().numpy().astype(np.int16) + offset
    scale, zero = (part.reshape(1 if part.size == 1 else len(integers), -1) for part in entries)
    count = max(scale.shape[1], zero.shape[1])
    return integers, scale, np.broadcast_to(zero, (len(integers), count))


def _packed(rows: np.ndarray, bits: int) -> np.ndarray:
    """Each row as bytes, lowest bits first, filled up with zeros."""
    share = 8 // bits
    filled = np.pad(rows, ((0, 0), (0, -rows.shape[1] % share))).reshape(len(rows), -1, share).astype(np.int32)
    return (filled << (bits * np.arange(share))).sum(2).astype(np.uint8)


class Placed:
    """A weight in blocks in the graph: stored once, read by products and by look-ups."""

    def __init__(self, edit: Editor, name: str, note: str, blocks: Blocks, gather: bool):
        self.edit, self.blocks = edit, blocks
        values = blocks.values.reshape(blocks.outputs, -1) if gather else blocks.values
        self.values, self.gather = edit.initializer(name, values), gather
        edit.notes[name] = note
        self.zero = None if blocks.zero is None else edit.constant(blocks.zero)

    def multiply(self, node: ir.Node, given: ir.Value, bias: ir.Value | None) -> ir.Value:
        """`given` times the weight, in front of `node`."""
        inputs = [given, self.values, self._scale(node), self.zero, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        sizes = {"K": self.blocks.inputs, "N": self.blocks.outputs, "block_size": self.blocks.size}
        return self.edit.insert(
            node, "com.microsoft.MatMulNBits", inputs, **sizes, bits=self.blocks.bits, accuracy_level=LEVEL
        )

    def look_up(self, node: ir.Node, index: ir.Value) -> ir.Value:
        """The rows of the weight at `index`, in front of `node`."""
        table = self.values
        if not self.gather:
            flat = self.edit.constant(np.array([self.blocks.outputs, -1]))
            table = self.edit.insert(node, "Reshape", [table, flat])
        inputs = [table, index, self._scale(node), *([] if self.zero is None else [self.zero])]
        kind, axes = "com.microsoft.GatherBlockQuantized", {"gather_axis": 0, "quantize_axis": 1}
        return self.edit.insert(node, kind, inputs, bits=self.blocks.bits, block_size=self.blocks.size, **axes)

    def _scale(self, node: ir.Node) -> ir.Value:
        """Scales as float32, one per block: what is not stored so is computed when the file is loaded."""
        count, scale = self.blocks.values.shape[1], self.blocks.scale
        value = self.edit.constant(np.ascontiguousarray(scale))
        if scale.dtype != np.float32:
            value = self.edit.insert(node, "Cast", [value], to=FLOAT)
        if scale.shape == (self.blocks.outputs, count):
            return value
        groups = scale.shape[1]
        if groups not in (1, count):
            value = self.edit.insert(node, "Unsqueeze", [value, self.edit.constant(np.array([2]))])
            wide = self.edit.constant(np.array([self.blocks.outputs, groups, self.blocks.repeat]))
            value = self.edit.insert(node, "Expand", [value, wide])
            flat = self.edit.constant(np.array([self.blocks.outputs, count]))
            return self.edit.insert(node, "Reshape", [value, flat])
        return self.edit.insert(node, "Expand", [value, self.edit.constant(np.array([self.blocks.outputs, count]))])
