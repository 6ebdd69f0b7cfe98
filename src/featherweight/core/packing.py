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

    flat = values.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise ValueError(f"values must be from 0 to {2**bits - 1} to be packed in {bits} bits")
    parts = [_packed(part, bits) for part in flat.split(2**20)]  # apart: a bit takes four bytes while it is packed
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)


def packed_bytes(count: int, bits: int) -> int:
    """The bytes that `pack_bits` makes of `count` values."""
    return -(-count // 8) * bits


def _packed(flat: Tensor, bits: int) -> Tensor:
    import torch

    padded = torch.nn.functional.pad(flat.to(torch.int32), (0, -flat.numel() % 8))
    stream = (padded[:, None] >> torch.arange(bits, dtype=torch.int32, device=flat.device)) & 1
    weight = 1 << torch.arange(8, dtype=torch.int32, device=flat.device)
    return (stream.reshape(-1, 8) * weight).sum(1).to(torch.uint8)


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` integers of a stream made by `pack_bits`, as int32 in one dimension.

    A value lies in one byte or in two. It is cut out in float32, which holds two bytes exactly: shifts and integer
    division have no short form, or none at all, where this is exported to.
    """
    import torch

    start = torch.arange(8, device=stream.device) * bits
    byte = start // 8
    rows = stream.reshape(-1, bits).float()
    words = rows.index_select(1, byte) + rows.index_select(1, (byte + 1).clamp(max=bits - 1)) * 256
    values = torch.floor(words / 2.0 ** (start - byte * 8))
    values = values - torch.floor(values / 2**bits) * 2**bits
    return values.reshape(-1)[:count].to(torch.int32)
