"""Encodings: how a weight is stored when it is not stored as plain floats. Methods make them, targets write them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .packing import pack_bits, packed_bytes, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor


def holds_zeros(form: str) -> bool:
    """Whether a form is one of `Sparse`: at any positions, or in a pattern. Such forms have no parts."""
    return form in ("sparse", "row") or bool(re.fullmatch(r"\d+[:x]\d+", form))


@dataclass(frozen=True)
class Encoding:
    """A stored form of one weight; `decode` gives the floats that it stands for.

    A target that has no kernel for a form stores `parts()` and puts the operations of `restore` into its graph, so
    every form can lie small on every disk that takes tensors.
    """

    kind: ClassVar[str] = ""

    @property
    def form(self) -> str:
        """The name by which a target says that it carries this: "int8", "uint4", "sparse"..."""
        raise NotImplementedError(f"{type(self).__name__} must name its form")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        raise NotImplementedError(f"{type(self).__name__} must say its shape")

    def decode(self) -> Tensor:
        """The plain weight, float32, of the original shape."""
        return self.restore(self.parts())

    def parts(self) -> dict[str, Tensor]:
        """The tensors that lie on the disk, packed densely, by the name of what each is ("values", "scale"...)."""
        raise NotImplementedError(f"{type(self).__name__} must say what lies on the disk")

    def restore(self, parts: dict[str, Tensor]) -> Tensor:
        """`decode` as plain tensor operations on `parts()` alone: what can be captured and exported."""
        raise NotImplementedError(f"{type(self).__name__} must restore itself")

    def bits_per_weight(self) -> float:
        """All bits of `parts()` over the number of weights."""
        return 8 * sum(self.sizes().values()) / math.prod(self.shape)

    def sizes(self) -> dict[str, int]:
        """The bytes of each of `parts()`; forms override it where packing only to count would be slow."""
        return {name: plain_bytes(part) for name, part in self.parts().items()}


@dataclass(frozen=True)
class Affine(Encoding):
    """Integers with a scale and a zero point: `weight = (values - zero) * scale`.

    `values` has the weight's shape, in int8 or uint8 even below 8 bits. `scale` (float32 or float16) and `zero` (the
    type of `values`, or floats) are scalars (per tensor, `axis` None), have one entry per index of `axis` (per
    channel), or, with `group`, have the shape [channels, groups]: with `axis` first and the rest in one row, every
    `group` neighbours share one entry. Jacob et al., arXiv:1712.05877.
    """

    kind: ClassVar[str] = "affine"
    values: Tensor
    scale: Tensor
    zero: Tensor
    axis: int | None = None
    bits: int = 8
    group: int | None = None

    @property
    def form(self) -> str:
        return f"{'int' if self.values.dtype.is_signed else 'uint'}{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def decode(self) -> Tensor:
        return self._floats(self.values, self.scale, self.zero)

    def parts(self) -> dict[str, Tensor]:
        """`values`, `scale`, and `zero` unless it is zero everywhere."""
        found = {"values": self._packed(self.values), "scale": self.scale}
        return {**found, "zero": self._packed(self.zero)} if bool(self.zero.any()) else found

    def sizes(self) -> dict[str, int]:
        found = {"values": self._size(self.values), "scale": plain_bytes(self.scale)}
        return {**found, "zero": self._size(self.zero)} if bool(self.zero.any()) else found

    def _size(self, part: Tensor) -> int:
        whole = self.bits == 8 or part.is_floating_point()
        return plain_bytes(part) if whole else packed_bytes(part.numel(), self.bits)

    def restore(self, parts: dict[str, Tensor]) -> Tensor:
        zero = self._unpacked(parts["zero"], self.zero) if "zero" in parts else None
        return self._floats(self._unpacked(parts["values"], self.values), parts["scale"], zero)

    def _packed(self, part: Tensor) -> Tensor:
        return part if self.bits == 8 or part.is_floating_point() else pack_bits(part.int() + self._offset, self.bits)

    def _unpacked(self, stored: Tensor, like: Tensor) -> Tensor:
        if self.bits == 8 or like.is_floating_point():
            return stored
        return (unpack_bits(stored, self.bits, like.numel()) - self._offset).reshape(like.shape)

    @property
    def _offset(self) -> int:
        """What makes the integers of a signed grid start at 0."""
        return 2 ** (self.bits - 1) if self.values.dtype.is_signed else 0

    def _floats(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        floats = values.float()
        if zero is not None:
            floats = floats - spread(zero.float(), values, self.axis, self.group)
        return floats * spread(scale.float(), values, self.axis, self.group)


@dataclass(frozen=True)
class Sparse(Encoding):
    """Floats of which only some positions are kept; the others are zero. `keep` is a boolean mask of the weight's
    shape.

    `pattern` says where they lie in the weight as a matrix of outputs by inputs: "2:4" (at most 2 of every 4 neighbours
    in a row), "4x4" (blocks), "row" (whole rows), or nothing; single zeros may lie among those that are kept. The
    columns of a convolution lie input channel beside input channel, one place of the kernel after the other.
    """

    kind: ClassVar[str] = "sparse"
    values: Tensor
    keep: Tensor
    pattern: str = ""

    @property
    def form(self) -> str:
        return self.pattern or "sparse"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def decode(self) -> Tensor:
        return self.values * self.keep


@dataclass(frozen=True)
class Codebook(Encoding):
    """Indices into a table: `weight = table[indices] * scale`.

    `table` is [entries] for single weights, or [entries, length] where one index stands for `length` neighbours of the
    last dimension. `indices` (uint8 or int16) has the weight's shape, the last dimension divided by `length`; with
    `size`, the weight's shape, they may lie in any shape of that order. `scale` is laid out as in `Affine` (scalar, per
    channel of `axis`, or [channels, groups]).
    """

    kind: ClassVar[str] = "codebook"
    indices: Tensor
    table: Tensor
    scale: Tensor
    axis: int | None = None
    group: int | None = None
    size: tuple[int, ...] | None = None

    @property
    def bits(self) -> int:
        """Bits of one index."""
        return max(1, (len(self.table) - 1).bit_length())

    @property
    def form(self) -> str:
        return f"codebook{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        if self.size is not None:
            return self.size
        length = self.table.shape[1] if self.table.dim() == 2 else 1
        return (*self.indices.shape[:-1], self.indices.shape[-1] * length)

    def parts(self) -> dict[str, Tensor]:
        indices = pack_bits(self.indices, self.bits) if self.bits <= 8 else self.indices
        return {"indices": indices, "table": self.table, "scale": self.scale}

    def restore(self, parts: dict[str, Tensor]) -> Tensor:
        indices = parts["indices"]
        if self.bits <= 8:
            indices = unpack_bits(indices, self.bits, self.indices.numel())
        values = parts["table"].float()[indices.reshape(-1).long()].reshape(self.shape)
        return values * spread(parts["scale"].float(), values, self.axis, self.group)


def plain_bytes(part: Tensor) -> int:
    """The bytes of a tensor as it is."""
    return part.numel() * part.element_size()


def spread(entry: Tensor, like: Tensor, axis: int | None, group: int | None = None) -> Tensor:
    """Reshape entries per channel so that they broadcast against `like` along `axis`; scalars pass through.

    With `group`, entries [channels, groups] are repeated to the shape of `like`.
    """
    if axis is None or entry.dim() == 0:
        return entry
    if group is not None:
        moved = (like.shape[axis], *(size for place, size in enumerate(like.shape) if place != axis))
        return entry.repeat_interleave(group, 1).reshape(moved).movedim(0, axis)
    shape = [1] * like.dim()
    shape[axis] = -1
    return entry.reshape(shape)
