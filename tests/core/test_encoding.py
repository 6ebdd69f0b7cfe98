"""Encodings: what lies on the disk gives back what the encoding stands for, in operations that can be exported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.core.encoding import Affine, Codebook, Encoding
from featherweight.core.packing import pack_bits, unpack_bits


@given(bits=st.integers(1, 8), count=st.integers(1, 67), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_bits_come_back_and_take_no_more_room(bits, count, seed):
    values = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    stream = pack_bits(values, bits)
    assert stream.dtype == torch.uint8 and stream.numel() == -(-count // 8) * bits
    assert torch.equal(unpack_bits(stream, bits, count), values.int())


def test_a_value_of_more_bits_is_refused():
    with pytest.raises(ValueError, match="from 0 to 7"):
        pack_bits(torch.tensor([8]), 3)


def affine(bits: int, signed: bool, group: int | None, axis: int | None, floating: bool = False) -> Affine:
    random = torch.Generator().manual_seed(bits)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    kind = torch.int8 if signed else torch.uint8
    values = torch.randint(low, high + 1, (6, 16), generator=random).to(kind)
    channels = 1 if axis is None else values.shape[axis]
    shape = [] if axis is None else [channels] if group is None else [channels, values.numel() // channels // group]
    zero = torch.rand(shape, generator=random) if floating else torch.randint(low, high + 1, shape, generator=random)
    return Affine(
        values, torch.rand(shape, generator=random) + 0.1, zero if floating else zero.to(kind), axis, bits, group
    )


FORMS = [
    affine(bits, signed, group, axis, floating)
    for bits in (2, 3, 4, 8)
    for signed in (True, False)
    for group, axis in ((None, None), (None, 0), (None, 1), (8, 0), (3, 1))
    for floating in (False, True)
] + [
    Codebook(torch.randint(0, 16, (4, 8)).to(torch.uint8), torch.randn(16), torch.rand(4, 2), axis=0, group=4),
    Codebook(torch.randint(0, 600, (4, 8)).to(torch.int16), torch.randn(600, 2), torch.rand(4), axis=0),
]


@pytest.mark.parametrize("encoding", FORMS, ids=lambda each: f"{each.form}-{each.axis}-{each.group}")
def test_what_is_stored_stands_for_the_same_weight(encoding: Encoding):
    assert torch.equal(encoding.restore(encoding.parts()), encoding.decode())
    assert encoding.decode().shape == encoding.shape


@pytest.mark.parametrize("encoding", FORMS[::7], ids=lambda each: f"{each.form}-{each.axis}-{each.group}")
def test_restoring_can_be_captured(encoding: Encoding):
    class Restore(torch.nn.Module):
        def forward(self, parts):
            return encoding.restore(parts)

    program = torch.export.export(Restore(), (encoding.parts(),))
    assert torch.equal(program.module()(encoding.parts()), encoding.decode())


def test_a_grouped_zero_point_belongs_to_its_group():
    values = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    scale, zero = torch.tensor([[1.0, 10.0]]), torch.tensor([[1, 3]], dtype=torch.uint8)
    encoding = Affine(values, scale, zero, axis=0, bits=2, group=2)
    assert encoding.decode().tolist() == [[-1.0, 0.0, -10.0, 0.0]]
    assert encoding.parts()["values"].numel() == 2  # one stream of eight values of two bits


def test_bits_per_weight_count_scales_and_zeros():
    encoding = Affine(torch.ones(4, 32, dtype=torch.int8), torch.ones(4, 1).half(), torch.zeros(4, 1), 0, 4, 32)
    assert encoding.bits_per_weight() == 4.5
    zero = torch.full((5, 1), 3, dtype=torch.uint8)
    for bits in (2, 3, 5, 8):
        encoding = Affine(torch.ones(5, 9, dtype=torch.uint8), torch.ones(5, 1).half(), zero, 0, bits, 9)
        assert encoding.sizes() == {name: part.numel() * part.element_size() for name, part in encoding.parts().items()}
