"""Trellis-coded weights: a stream of bits of which every weight reads a window, and arithmetic for its value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .encoding import Encoding
from .packing import pack_bits, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor

# The code is a permutation of the states, `linear * s + square * s**2`, whose result is a quantile of the Gaussian.
# These factors gave the least distortion at 2, 3 and 4 bits of some random ones (benchmarks/gaussian.py).
LINEAR, SQUARE = 1207, 156
TUKEY = 0.135  # exponent with which Tukey's lambda distribution comes closest to the Gaussian
TUKEY_UNIT = 0.1975


def code(states: Tensor, window: int) -> Tensor:
    """The value of each state (integers from 0 to 2**window - 1): a sample of the unit Gaussian, float32.

    It is arithmetic alone, so no table lies on any disk: a permutation of the states gives each an own quantile, whose
    place in the Gaussian Tukey's lambda approximates. After the computed codes of QTIP, arXiv:2406.11235, section 3.2.
    """
    count = 2**window
    states = states.long()
    mixed = (states * LINEAR + (states * states) % count * SQUARE) % count
    quantile = (mixed.float() + 0.5) / count
    return (quantile**TUKEY - (1 - quantile) ** TUKEY) / TUKEY_UNIT


def windows(symbols: Tensor, bits: int, window: int) -> Tensor:
    """The state at every step of circular sequences of symbols: the last `window` bits, the newest lowest.

    Both are [sequences, steps].
    """
    import torch

    reach, steps = -(-window // bits), symbols.shape[1]
    rows = symbols.int()
    rows = torch.cat([rows[:, steps - reach + 1 :], rows], 1)
    states = rows[:, reach - 1 :]
    for back in range(1, reach):
        states = states + rows[:, reach - 1 - back : reach - 1 - back + steps] * 2 ** (bits * back)
    return states.long() % 2**window


def hadamard(rows: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension, a power of two.

    It is the Kronecker product of two smaller ones: two products of matrices, few operations in an exported graph.
    """
    import torch

    size = rows.shape[-1]
    inner = 2 ** (size.bit_length() // 2)
    matrix = torch.ones(1, 1, dtype=rows.dtype, device=rows.device)
    while len(matrix) < inner:
        upper = torch.cat([matrix, matrix], 1)
        matrix = torch.cat([upper, torch.cat([matrix, -matrix], 1)])
    outer = matrix[: size // inner, : size // inner]
    return (outer @ (rows.reshape(*rows.shape[:-1], -1, inner) @ matrix)).reshape(rows.shape) / size**0.5


def rotate(rows: Tensor, signs: Tensor, back: bool = False) -> Tensor:
    """Rotate the last dimension: random signs, then a Hadamard transform; `back` undoes it.

    A size that is no power of two is covered by two transforms of the largest power of two below it, at both ends, the
    second with the signs in reverse order; every entry is then a sum over at least half of all.
    """
    import torch

    size = rows.shape[-1]
    block = 2 ** (size.bit_length() - 1)
    if block == size:
        return hadamard(rows) * signs if back else hadamard(rows * signs)

    def head(values: Tensor) -> Tensor:
        return torch.cat([hadamard(values[..., :block]), values[..., block:]], -1)

    def tail(values: Tensor) -> Tensor:
        return torch.cat([values[..., : size - block], hadamard(values[..., size - block :])], -1)

    if back:
        return head(tail(rows) * signs.flip(0)) * signs
    return tail(head(rows * signs) * signs.flip(0))


@dataclass(frozen=True)
class Trellis(Encoding):
    """Weights as paths through a trellis: `rotated weight = code(window of bits) * scale`, then rotated back.

    `symbols` (uint8, [sequences, steps], each of `bits` bits) is the weight, as a matrix of its first dimension by all
    others, column after column; sequences are circular, so a window of `window` bits needs no start. `scale` (float16)
    has one entry, or one per row. `left` and `right` (bool, True for +1) are the signs of the random rotations of the
    columns and of the rows; None where there was none. Tseng et al., arXiv:2406.11235.
    """

    kind: ClassVar[str] = "trellis"
    symbols: Tensor
    scale: Tensor
    size: tuple[int, ...]
    bits: int
    window: int
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def form(self) -> str:
        return f"trellis{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def parts(self) -> dict[str, Tensor]:
        """`symbols` as a stream of bits, `scale`, and `signs`, one bit each: those of `left`, then those of `right`."""
        import torch

        found = {"symbols": pack_bits(self.symbols, self.bits), "scale": self.scale}
        signs = [sign for sign in (self.left, self.right) if sign is not None]
        return found | {"signs": pack_bits(torch.cat(signs), 1)} if signs else found

    def restore(self, parts: dict[str, Tensor]) -> Tensor:
        symbols = unpack_bits(parts["symbols"], self.bits, self.symbols.numel()).reshape(self.symbols.shape)
        first, second = (0 if sign is None else len(sign) for sign in (self.left, self.right))
        signs = unpack_bits(parts["signs"], 1, first + second) if first + second else symbols
        left, right = signs[:first] if first else None, signs[first:] if second else None
        return restored(symbols, parts["scale"].float(), left, right, self.size, self.bits, self.window)


def restored(
    symbols: Tensor,
    scale: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    size: tuple[int, ...],
    bits: int,
    window: int,
) -> Tensor:
    """The weight that symbols, scale and signs (1 for +1, 0 for -1) stand for; see `Trellis`. float32, of `size`."""
    columns = code(windows(symbols, bits, window), window).reshape(-1, size[0]) * scale
    if left is not None:
        columns = rotate(columns, left.float() * 2 - 1, back=True)
    rows = columns.mT
    if right is not None:
        rows = rotate(rows, right.float() * 2 - 1, back=True)
    return rows.reshape(size)
