"""AdaRound against a slow reference in float64, written from the paper (arXiv:2004.10568)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featherweight.methods.quantize.adaround import BETAS, exponent, rounded, share_up, undecided, variable_of
from featherweight.methods.quantize.reconstruct import Learned
from featherweight.model.rounding import Rounding

VALUES = st.lists(st.floats(-8, 8), min_size=1, max_size=12)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def reference_share(value: float) -> float:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1) with zeta 1.1 and gamma -0.1 (equation 23)."""
    return min(1.0, max(0.0, sigmoid(value) * (1.1 - -0.1) + -0.1))


@given(VALUES)
def test_the_share_is_the_rectified_sigmoid(values):
    got = share_up(torch.tensor(values, dtype=torch.float64))
    assert got.tolist() == pytest.approx([reference_share(value) for value in values], abs=1e-12)


@given(VALUES, st.floats(2, 20))
def test_the_regularizer_counts_what_is_undecided(values, beta):
    shares = [reference_share(value) for value in values]
    wanted = sum(1 - abs(2 * share - 1) ** beta for share in shares)
    got = undecided(torch.tensor(shares, dtype=torch.float64), beta)
    assert float(got) == pytest.approx(wanted, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_variable_gives_its_share_back(shares):
    got = share_up(variable_of(torch.tensor(shares, dtype=torch.float64)))
    assert got.tolist() == pytest.approx(shares, abs=1e-9)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=12), st.floats(0, 1))
def test_soft_rounding_lies_between_the_integers_around(steps, share):
    wanted = [min(7.0, max(-7.0, math.floor(step) + share)) for step in steps]
    got = rounded(torch.tensor(steps, dtype=torch.float64), torch.tensor(share, dtype=torch.float64), -7, 7)
    assert got.tolist() == pytest.approx(wanted, abs=1e-12)


def test_the_exponent_stays_and_then_falls_along_a_cosine():
    assert exponent(0.0) == exponent(0.2) == BETAS[0]
    assert exponent(0.6) == pytest.approx(sum(BETAS) / 2) and exponent(1.0) == pytest.approx(BETAS[1])


@given(st.integers(0, 1000), st.sampled_from([2, 3, 4, 8]), st.sampled_from([None, 0, 1]))
def test_what_is_learned_starts_as_the_weight_itself_and_ends_on_its_grid(seed, bits, axis):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    top = 2 ** (bits - 1) - 1
    reach = weight.abs().amax() if axis is None else weight.abs().amax(1 - axis)
    link = Rounding(reach / top, axis=axis, bits=bits)
    learned = Learned(weight, link)
    assert torch.allclose(learned.weight(learned.share()), weight, atol=1e-5)
    decided = learned.decided()
    assert torch.equal(link(decided), decided), "rounding to nearest leaves what was decided as it is"
    assert ((decided - weight).abs() <= (reach.max() / top) * 1.001).all()


def test_gradients_reach_every_undecided_weight():
    weight = torch.tensor([[0.35, -0.61, 0.2]])
    learned = Learned(weight, Rounding(torch.tensor(0.1)))
    learned.weight(learned.share()).sum().backward()
    assert isinstance(learned.variable, nn.Parameter) and (learned.variable.grad != 0).sum() >= 2
