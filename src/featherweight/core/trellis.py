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
TURN_BITS = 5


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


def turn(sign: Tensor, magnitude: Tensor) -> Tensor:
    """What one row or column needs to be turned back, in 5 bits (uint8): its sign (True for +1) and a power of sqrt(2).

    Magnitudes are rounded to the nearest of 2**-4, 2**-3.5 ... 2**3.5.
    """
    exponent = (magnitude.double().log2() * 2).round().clamp(-8, 7) + 8
    return (exponent * 2 + sign).byte()


def unturn(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Signs (+1 and -1) and magnitudes, as floats, of what `turn` gave."""
    sign = (turns % 2).float() * 2 - 1
    return sign, 2.0 ** ((turns // 2).float() / 2 - 4)


@dataclass(frozen=True)
class Trellis(Encoding):
    """Weights as paths through a trellis: `balanced and rotated weight = code(window of bits) * scale`.

    `symbols` (uint8, [sequences, steps], each of `bits` bits) is the weight, as a matrix of its first dimension by all
    others, column after column; sequences are circular, so a window of `window` bits needs no start. `scale` (float16)
    has one entry. `left` and `right` (uint8, see `turn`) say how columns (one entry per row) and rows (one per column)
    are turned back: by a rotation with random signs, and then times a magnitude; None where they were not turned.
    Tseng et al., arXiv:2406.11235; the magnitudes after QuIP, arXiv:2307.13304.
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
        """`symbols` as a stream of bits, `scale`, and `turns`: 5 bits for each of `left`, then each of `right`."""
        import torch

        found = {"symbols": pack_bits(self.symbols, self.bits), "scale": self.scale}
        turns = [each for each in (self.left, self.right) if each is not None]
        return found | {"turns": pack_bits(torch.cat(turns), TURN_BITS)} if turns else found

    def restore(self, parts: dict[str, Tensor]) -> Tensor:
        symbols = unpack_bits(parts["symbols"], self.bits, self.symbols.numel()).reshape(self.symbols.shape)
        first, second = (0 if each is None else len(each) for each in (self.left, self.right))
        turns = unpack_bits(parts["turns"], TURN_BITS, first + second) if first + second else symbols
        left, right = turns[:first] if first else None, turns[first:] if second else None
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
    """The weight that symbols, scale and turns stand for; see `Trellis`. float32, of `size`."""
    columns = code(windows(symbols, bits, window), window).reshape(-1, size[0]) * scale
    rows = columns if left is None else _back(columns, left)
    rows = rows.mT if right is None else _back(rows.mT, right)
    return rows.reshape(size)


def _back(rows: Tensor, turns: Tensor) -> Tensor:
    sign, magnitude = unturn(turns)
    return rotate(rows, sign, back=True) * magnitude
