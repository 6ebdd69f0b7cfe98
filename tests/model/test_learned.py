"""Learned step sizes: values and gradients against slow references in float64, written from the papers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.core.soft import Link
from featherweight.model.learned import (
    LearnedPort,
    LearnedRounding,
    LearnedSteps,
    Moments,
    gradient_factor,
    ternary_scale,
)


def reference(values, scale, low, high, gradient):
    """Esser et al., arXiv:1902.08153, equations 1 to 3 and section 2.1, one number at a time."""
    output, to_values, to_scale = [], [], 0.0
    for value, given_gradient in zip(values.tolist(), gradient.tolist()):
        v = value / scale
        level = min(max(v, low), high)
        output.append(float(round(level)) * scale)  # Python rounds half to even, as torch does
        to_values.append(given_gradient if low < v < high else 0.0)
        to_scale += given_gradient * (round(v) - v if low < v < high else (low if v <= low else high))
    return torch.tensor(output, dtype=torch.float64), torch.tensor(to_values, dtype=torch.float64), to_scale


grids = st.sampled_from([(-2, 1), (-1, 1), (-8, 7), (-127, 127), (0, 15), (0, 3), (-7, 8), (0, 255)])


@settings(deadline=None, max_examples=60)
@given(grid=grids, scale=st.floats(0.01, 3), count=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_forward_and_gradients_are_those_of_the_paper(grid, scale, count, seed):
    generator = torch.Generator().manual_seed(seed)
    reach = 1.3 * max(-grid[0], grid[1])
    steps = (torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1) * reach
    steps = torch.where((steps - steps.floor() - 0.5).abs() < 1e-3, steps + 0.01, steps)  # no ties: rounding decides
    values, gradient = steps * scale, torch.randn(count, generator=generator, dtype=torch.float64)
    want, to_values, to_scale = reference(values, scale, *grid, gradient)
    given_values = values.clone().requires_grad_()
    step = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    output = LearnedSteps.apply(given_values, step, None, *grid, 0.25)
    output.backward(gradient)
    assert torch.allclose(output.double(), want, rtol=1e-12)
    assert torch.equal(given_values.grad, to_values)
    assert float(step.grad) == pytest.approx(0.25 * to_scale, rel=1e-4, abs=1e-4 * count * reach)


def test_each_channel_has_its_own_gradient():
    torch.manual_seed(0)
    weight, scale, gradient = torch.randn(3, 5, 2), torch.tensor([0.1, 0.4, 1.0]), torch.randn(3, 5, 2)
    for axis in (0, 1, 2):
        entries = scale[: weight.shape[axis]].repeat(2)[: weight.shape[axis]].clone().requires_grad_()
        given_weight = weight.clone().requires_grad_()
        output = LearnedSteps.apply(given_weight, entries, axis, -2, 1, 1.0)
        output.backward(gradient)
        for place in range(weight.shape[axis]):
            rows = [each.select(axis, place).flatten().double() for each in (weight, gradient)]
            want, to_values, to_scale = reference(rows[0], float(entries.detach()[place]), -2, 1, rows[1])
            assert torch.allclose(output.select(axis, place).flatten(), want.float())
            assert torch.allclose(given_weight.grad.select(axis, place).flatten(), to_values.float())
            assert float(entries.grad[place]) == pytest.approx(to_scale, rel=1e-4, abs=1e-5)


def test_gradients_are_scaled_by_the_number_of_values_and_the_highest_integer():
    assert gradient_factor(100, 7) == pytest.approx(1 / math.sqrt(700))
    link, weight = LearnedRounding(torch.tensor([0.3, 0.3]), 0, 4, -8, 7), torch.randn(2, 50)
    link(weight).backward(torch.ones(2, 50))
    _, _, whole = reference(weight[0].double(), float(torch.tensor(0.3)), -8, 7, torch.ones(50))
    assert float(link.scale.grad[0]) == pytest.approx(whole / math.sqrt(50 * 7), rel=1e-3, abs=1e-4)
    for count in (1, 4):  # for an activation the number of values in one input: not that of a batch
        port = LearnedPort(0.3, 0, 2)
        values = torch.full((count, 10), 5.0)
        port(values).backward(torch.full((count, 10), 1 / count))
        assert float(port.scale.grad) == pytest.approx(3 * 10 / math.sqrt(10 * 3), rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), columns=st.integers(1, 30))
def test_the_ternary_step_is_that_of_ternary_weight_networks(seed, rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = ternary_scale(weight, 0)
    for row, scale in zip(weight.double().tolist(), found.tolist()):
        threshold = 0.7 * sum(abs(each) for each in row) / len(row)
        above = [abs(each) for each in row if abs(each) > threshold]
        assert scale == pytest.approx(sum(above) / len(above), rel=1e-5)
    assert ternary_scale(torch.zeros(2, 3), 0).min() > 0
    assert ternary_scale(weight, None).shape == ()


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -2, 1), (2, -1, 1), (3, -4, 3), (4, -8, 7), (8, -127, 127)])
def test_a_settled_link_holds_the_same_values(bits, low, high):
    torch.manual_seed(1)
    link, weight = LearnedRounding(torch.rand(6) + 0.1, 0, bits, low, high), torch.randn(6, 9)
    with torch.no_grad():
        value = link(weight)
    assert torch.equal(value, link.encode(weight).decode())
    assert torch.equal(value, link.settled()(weight))
    assert link.settled().encode(weight).form == f"int{bits}"
    assert len(value[0].unique()) <= high - low + 1
    again = Link.kinds[link.kind](**link.settings())
    assert again.settings() == link.settings() and again.scale.shape == link.scale.shape


@pytest.mark.parametrize(("zero", "bits"), [(0, 2), (0, 4), (7, 4), (120, 8), (255, 8)])
def test_a_settled_port_gives_the_same_values(zero, bits):
    torch.manual_seed(2)
    port, values = LearnedPort(0.13, zero, bits), 4 * torch.randn(3, 40)
    with torch.no_grad():
        one, other = port(values), port.settled()(values)
    assert torch.allclose(one, other, atol=1e-6) and len(one.unique()) <= 2**bits


def test_moments_of_a_stream_are_those_of_the_whole():
    torch.manual_seed(3)
    values, moments = 3 + torch.randn(10, 4, 5, 6), Moments()
    for part in values.split(3):
        moments.add(part)
    mean, variance = moments.result()
    assert torch.allclose(mean.float(), values.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance.float(), values.var((0, 2, 3), correction=0), atol=1e-4)
