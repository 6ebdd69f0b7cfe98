"""Weights of which only the decided integers are kept: what is stored is what was chosen, and only scales train on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.additive import Additive, summed
from ..core.encoding import Affine, Codebook, spread
from ..core.soft import Link


class Held(Link):
    """A link that holds a weight by itself: the floats that it was made from are dropped as it is put on.

    `forward` ignores its argument, and `right_inverse` leaves an empty parameter in its place. Scales (zero points,
    tables) are parameters in float32; they count with the precision in which they are stored (float16, or with
    `float16` False float32), and gradients pass straight through that.
    """

    float16: bool
    dtype: str

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.new_empty(0)

    def _stored(self, part: Tensor) -> Tensor:
        """A float part as it lies on the disk."""
        return part.detach().half() if self.float16 else part.detach()

    def _rounded(self, part: Tensor) -> Tensor:
        """A float part with the precision in which it is stored, with the gradient of `part` itself."""
        return part + (self._stored(part).float() - part).detach()


class HeldIntegers(Held, kind="integers"):
    """Hold a weight as `(values - zero) * scale` with fixed integers; scale and zero point (in floats) train on.

    Laid out as `Affine`: `values` has the weight's shape, in int8 or uint8; `scale` and `zero` are scalars, have one
    entry per index of `axis`, or the shape [channels, groups]. A zero point of integers stays as it is.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self,
        values: Tensor | None = None,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        axis: int | None = 0,
        bits: int = 8,
        group: int | None = None,
        float16: bool = True,
        dtype: str = "float32",
        shapes: list[list[int]] | None = None,
        kinds: list[str] | None = None,
    ):
        super().__init__()
        self.axis, self.bits, self.group, self.float16 = axis, bits, group, float16
        self.dtype = dtype
        if values is None or scale is None or zero is None:
            values, scale, zero = _blank(shapes or [[0], [], []], kinds or ["uint8", "float32", "uint8"])
        self.register_buffer("values", values)
        self.scale = nn.Parameter(scale.detach().float().clone())
        if zero.is_floating_point():
            self.zero = nn.Parameter(zero.detach().float().clone())
        else:
            self.register_buffer("zero", zero)

    def settings(self) -> dict[str, Any]:
        parts = (self.values, self.scale, self.zero)
        return {
            "axis": self.axis,
            "bits": self.bits,
            "group": self.group,
            "float16": self.float16,
            "dtype": self.dtype,
            "shapes": [list(part.shape) for part in parts],
            "kinds": [_name(part) for part in parts],
        }

    def extra_repr(self) -> str:
        return f"axis={self.axis}, bits={self.bits}, group={self.group}"

    def forward(self, weight: Tensor) -> Tensor:
        zero = self._rounded(self.zero) if self.zero.is_floating_point() else self.zero.float()
        floats = self.values.float() - spread(zero, self.values, self.axis, self.group)
        floats = floats * spread(self._rounded(self.scale), self.values, self.axis, self.group)
        return floats.to(getattr(torch, self.dtype))

    def encode(self, weight: Tensor) -> Affine:
        zero = self._stored(self.zero) if self.zero.is_floating_point() else self.zero
        return Affine(
            values=self.values,
            scale=self._stored(self.scale),
            zero=zero,
            axis=self.axis,
            bits=self.bits,
            group=self.group,
        )


class HeldIndices(Held, kind="indices"):
    """Hold a weight as `table[indices] * scale` with fixed indices; the table and the scale can be trained.

    Laid out as `Codebook`: `indices` (uint8 or int16) has the weight's shape, or with a table [entries, length] its
    last dimension divided by `length`, or any shape where `size` is the weight's. The gradient of an entry is the sum
    over all weights that it stands for (Han et al., arXiv:1510.00149). The first `fixed` entries are not trained: a 0
    for pruned weights stays one. Several weights may share one `table`.
    """

    indices: Tensor
    table: Tensor
    scale: Tensor

    def __init__(
        self,
        indices: Tensor | None = None,
        table: Tensor | None = None,
        scale: Tensor | None = None,
        axis: int | None = 0,
        group: int | None = None,
        float16: bool = True,
        dtype: str = "float32",
        shapes: list[list[int]] | None = None,
        kinds: list[str] | None = None,
        fixed: int = 0,
        size: list[int] | None = None,
    ):
        super().__init__()
        self.axis, self.group, self.float16, self.fixed = axis, group, float16, fixed
        self.dtype, self.size = dtype, size
        if indices is None or table is None or scale is None:
            indices, table, scale = _blank(shapes or [[0], [1], []], kinds or ["uint8", "float32", "float32"])
        self.register_buffer("indices", indices)
        self.table, self.scale = (nn.Parameter(part.detach().float().clone()) for part in (table, scale))

    def settings(self) -> dict[str, Any]:
        parts = (self.indices, self.table, self.scale)
        return {
            "axis": self.axis,
            "group": self.group,
            "float16": self.float16,
            "dtype": self.dtype,
            "shapes": [list(part.shape) for part in parts],
            "kinds": [_name(part) for part in parts],
            "fixed": self.fixed,
            "size": self.size,
        }

    def extra_repr(self) -> str:
        return f"axis={self.axis}, entries={len(self.table)}, group={self.group}"

    def forward(self, weight: Tensor) -> Tensor:
        table = self._rounded(self.table)
        if self.fixed:
            table = torch.cat([table[: self.fixed].detach(), table[self.fixed :]])
        values = table[self.indices.long()]
        values = values.flatten(-2) if table.dim() == 2 else values
        values = values if self.size is None else values.reshape(self.size)
        scale = spread(self._rounded(self.scale), values, self.axis, self.group)
        return (values * scale).to(getattr(torch, self.dtype))

    def encode(self, weight: Tensor) -> Codebook:
        size = None if self.size is None else tuple(self.size)
        return Codebook(self.indices, self._stored(self.table), self._stored(self.scale), self.axis, self.group, size)


class HeldSums(Held, kind="sums"):
    """Hold a weight as sums of entries of several tables, times a scale; the tables and the scale can be trained.

    Laid out as `Additive`. The gradient of an entry is the sum over all vectors that it is a part of. Several weights
    may share one `table` (that of all books, [books, entries, length]).
    """

    indices: Tensor
    table: Tensor
    scale: Tensor

    def __init__(
        self,
        indices: Tensor | None = None,
        table: Tensor | None = None,
        scale: Tensor | None = None,
        size: list[int] | None = None,
        float16: bool = True,
        dtype: str = "float32",
        shapes: list[list[int]] | None = None,
    ):
        super().__init__()
        self.size, self.float16, self.dtype = list(size or [0]), float16, dtype
        if indices is None or table is None or scale is None:
            kinds = ["uint8", "float32", "float32"]
            indices, table, scale = _blank(shapes or [[1, 0], [1, 1, 1], []], kinds)
        self.register_buffer("indices", indices)
        self.table, self.scale = (nn.Parameter(part.detach().float().clone()) for part in (table, scale))

    def settings(self) -> dict[str, Any]:
        shapes = [list(part.shape) for part in (self.indices, self.table, self.scale)]
        return {"size": self.size, "float16": self.float16, "dtype": self.dtype, "shapes": shapes}

    def extra_repr(self) -> str:
        return f"books={len(self.table)}, entries={self.table.shape[1]}"

    def forward(self, weight: Tensor) -> Tensor:
        values = summed(self._rounded(self.table), self.indices.long()).reshape(self.size)
        return (values * self._rounded(self.scale)).to(getattr(torch, self.dtype))

    def encode(self, weight: Tensor) -> Additive:
        return Additive(self.indices, self._stored(self.table), self._stored(self.scale), tuple(self.size))


def _blank(shapes: list[list[int]], kinds: list[str]) -> list[Tensor]:
    return [torch.ones(shape, dtype=getattr(torch, kind)) for shape, kind in zip(shapes, kinds)]


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
