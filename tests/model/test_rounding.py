"""Weights on a grid of integers: the link is exact, its gradient passes, its encoding is what it computes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from featherweight.core.soft import Link, Mask, encodings, fold
from featherweight.model.rounding import Rounding, dequantize, limits, quantize

BITS = st.integers(2, 8)


def link(weight: torch.Tensor, axis: int | None, bits: int) -> Rounding:
    reach = weight.abs().amax() if axis is None else weight.abs().movedim(axis, 0).flatten(1).amax(1)
    return Rounding(reach.clamp_min(1e-6) / limits(bits)[1], axis=axis, bits=bits)


@given(st.integers(0, 10_000), BITS, st.sampled_from([None, 0, 1, 2, 3]))
def test_forward_is_the_decoded_encoding_and_idempotent(seed, bits, axis):
    weight = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(seed))
    made = link(weight, axis, bits)
    grid, encoding = made(weight.requires_grad_()), made.encode(weight)
    assert torch.equal(grid, encoding.decode())
    assert torch.equal(grid, made(weight.detach()))
    assert torch.equal(made(grid.detach()), grid)
    low, high = limits(bits)
    assert low <= encoding.values.min() and encoding.values.max() <= high
    step = encoding.scale.amax()
    assert (grid - weight).abs().max() <= step / 2 * (1 + 1e-5)


def test_halves_go_to_the_even_integer():
    values = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    integers = quantize(values, torch.tensor(1.0), torch.tensor(0), None, -127, 127)
    assert integers.dtype == torch.int8 and integers.tolist() == [-2, -2, 0, 0, 2, 2]


def test_an_unsigned_grid_with_a_zero_point():
    scale, zero = torch.tensor([0.5, 0.25]), torch.tensor([10, 0], dtype=torch.uint8)
    values = torch.tensor([[-6.0, 0.0, 1.0], [-6.0, 0.0, 1.0]])
    integers = quantize(values, scale, zero, 0, 0, 255)
    assert integers.dtype == torch.uint8 and integers.tolist() == [[0, 10, 12], [0, 0, 4]]
    assert dequantize(integers, scale, zero, 0).tolist() == [[-5.0, 0.0, 1.0], [0.0, 0.0, 1.0]]


def test_the_gradient_passes_inside_the_range_and_stops_outside():
    made = Rounding(torch.tensor(1.0), bits=3)  # -3 to 3
    weight = torch.tensor([-4.0, -3.4, 0.2, 3.0, 3.49, 3.6], requires_grad=True)
    (made(weight) * torch.arange(1.0, 7.0)).sum().backward()
    assert weight.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match="from 2 to 8"):
        limits(bits)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_above_zero_is_refused(scale):
    with pytest.raises(ValueError, match="above zero"):
        Rounding(torch.tensor([1.0, scale]), axis=0)


def test_its_settings_rebuild_it():
    made = Rounding(torch.rand(4) + 0.1, torch.tensor([0, 1, 2, 3]), axis=1, bits=5, low=0, high=31)
    again = Link.kinds["affine"](**made.settings())
    again.load_state_dict(made.state_dict())
    weight = torch.randn(2, 4)
    assert torch.equal(again(weight), made(weight)) and again.encode(weight).form == "uint5"


def test_after_a_mask_zeros_stay_zeros_and_training_keeps_both():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", Mask(torch.rand(4, 6) > 0.5))
    parametrize.register_parametrization(layer, "weight", link(layer.weight, 0, 8))
    zeros = layer.weight == 0
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    before = layer.weight.detach().clone()
    layer(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before) and (layer.weight[zeros] == 0).all()
    encoding = encodings(layer)["weight"]
    assert encoding.form == "int8" and torch.equal(encoding.decode(), fold(layer).weight)


def test_half_precision_weights_keep_their_type():
    weight = torch.randn(4, 4, dtype=torch.bfloat16)
    assert link(weight, 0, 8)(weight).dtype == torch.bfloat16
