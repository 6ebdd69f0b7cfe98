"""Streams of bits: what is packed in parts is one stream, and comes back."""

import pytest
import torch

from featherweight.core.packing import pack_bits, unpack_bits


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 8, 2**20, 2**20 + 3])
def test_streams_longer_than_a_part_come_back(bits: int, count: int) -> None:
    values = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    stream = pack_bits(values, bits)
    assert stream.dtype == torch.uint8 and len(stream) == -(-count // 8) * bits
    assert torch.equal(unpack_bits(stream, bits, count), values.int())


def test_what_does_not_fit_is_refused_in_any_part() -> None:
    values = torch.zeros(2**20 + 1, dtype=torch.int32)
    values[-1] = 8
    with pytest.raises(ValueError, match="from 0 to 7"):
        pack_bits(values, 3)
