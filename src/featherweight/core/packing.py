"""Integers of few bits in dense bytes: pure functions made of plain tensor operations, so that they can be exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """`values` (integers from 0 to 2**bits - 1, any shape) as a stream of bits in bytes, lowest bit first: uint8.

    Eight values lie in `bits` bytes; the stream is filled up with zeros to a multiple of eight values.
    """
    import torch

    flat = values.reshape(-1).to(torch.int32)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise ValueError(f"values must be from 0 to {2**bits - 1} to be packed in {bits} bits")
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    stream = (flat[:, None] >> torch.arange(bits, dtype=torch.int32, device=flat.device)) & 1
    weight = 1 << torch.arange(8, dtype=torch.int32, device=flat.device)
    return (stream.reshape(-1, 8) * weight).sum(1).to(torch.uint8)


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` integers of a stream made by `pack_bits`, as int32 in one dimension."""
    import torch

    rows = stream.reshape(-1, bits).to(torch.int32)
    columns = [_value(rows, place * bits, bits) for place in range(8)]
    return torch.stack(columns, 1).reshape(-1)[:count]


def _value(rows: Tensor, start: int, bits: int) -> Tensor:
    """The value whose lowest bit is bit `start` of each row; it lies in one byte or in two.

    Division and remainder stand for shift and mask: every exporter knows them.
    """
    byte, shift = divmod(start, 8)
    word = rows[:, byte]
    if shift + bits > 8:
        word = word + rows[:, byte + 1] * 256
    return (word // 2**shift) % 2**bits if shift else word % 2**bits
