"""Decompositions against plain references: exact at full rank, as good as theory says below it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.methods.factor.matrices import cost, decompose, largest_rank, roots
from featherweight.methods.factor.networks import (
    contracted,
    cp,
    divided,
    outer,
    tensor_train,
    train_cost,
    train_ranks,
    tucker,
)

SEEDS = st.integers(0, 2**16)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tucker_product(parts) -> torch.Tensor:
    return torch.einsum("or,rshw,is->oihw", parts.outputs, parts.core, parts.inputs)


@given(seed=SEEDS, outputs=st.integers(1, 9), columns=st.integers(1, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_factors_of_a_rank_are_nearer_than_those_of_singular_values(seed, outputs, columns, data):
    weight, rank = drawn(seed, outputs, columns), data.draw(st.integers(1, min(outputs, columns)))
    found = decompose(weight)
    left, right = found.factors(rank)
    assert (left.shape, right.shape) == ((outputs, rank), (rank, columns))
    missed = (weight - left @ right).square().sum() / weight.square().sum()
    assert float(missed) == pytest.approx(found.missed(rank), abs=1e-9)
    other = drawn(seed + 1, rank, columns)  # any rows, and the best outputs for them
    near = weight @ torch.linalg.pinv(other) @ other
    assert float(missed) <= float((weight - near).square().sum() / weight.square().sum()) + 1e-9


@given(seed=SEEDS, rank=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_whitened_factors_are_nearer_in_outputs_than_plain_and_any_refit(seed, rank):
    weight, inputs = drawn(seed, 6, 8), drawn(seed + 1, 50, 8) @ drawn(seed + 2, 8, 8)
    moment = inputs.T @ inputs / len(inputs)
    white, plain = decompose(weight, moment, damping=1e-9), decompose(weight)

    def error(near: torch.Tensor) -> float:
        return float(((weight - near) @ inputs.T).square().sum() / (weight @ inputs.T).square().sum())

    left, right = white.factors(rank)
    reached = error(left @ right)
    assert reached == pytest.approx(white.missed(rank), rel=1e-4, abs=1e-7)
    assert reached <= error(torch.matmul(*plain.factors(rank))) + 1e-7
    made = inputs @ plain.factors(rank)[1].T
    refit = torch.linalg.lstsq(made, inputs @ weight.T).solution.T
    assert reached <= error(refit @ plain.factors(rank)[1]) + 1e-7


def test_the_root_of_a_singular_moment_has_an_inverse():
    inputs = drawn(0, 3, 7)
    root, inverse = roots(inputs.T @ inputs, damping=1e-3)
    assert torch.allclose(root @ inverse, torch.eye(7, dtype=torch.float64), atol=1e-8)
    damped = inputs.T @ inputs
    damped.diagonal().add_(1e-3 * damped.diagonal().mean())
    assert torch.allclose(root @ root, damped, atol=1e-8)


@given(outputs=st.integers(1, 50), columns=st.integers(1, 50), parameters=st.integers(0, 3000))
def test_the_largest_rank_costs_no_more_and_one_more_would(outputs, columns, parameters):
    rank = largest_rank(outputs, columns, parameters)
    assert cost(outputs, columns, rank) <= parameters
    assert rank == min(outputs, columns) or cost(outputs, columns, rank + 1) > parameters


@given(seed=SEEDS, one=st.integers(1, 5), other=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_tucker_is_exact_at_full_rank_and_sweeps_never_lose(seed, one, other):
    weight = drawn(seed, 5, 4, 3, 3)
    assert torch.allclose(tucker_product(tucker(weight, (5, 4))), weight, atol=1e-10)
    errors = [
        float((tucker_product(tucker(weight, (one, other), sweeps)) - weight).square().sum()) for sweeps in (0, 1, 8)
    ]
    assert errors[2] <= errors[1] + 1e-9 <= errors[0] + 2e-9
    # the truncated unfoldings are at most sqrt(2) from the best in norm (De Lathauwer et al., 2000, property 10)
    tails = [
        float(torch.linalg.svdvals(weight.movedim(mode, 0).flatten(1))[rank:].square().sum())
        for mode, rank in enumerate((one, other))
    ]
    assert max(tails) - 1e-9 <= errors[2] and errors[0] <= sum(tails) + 1e-9


@given(seed=SEEDS, rank=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_cp_finds_a_sum_of_outer_products(seed, rank):
    factors = [drawn(seed + mode, size, rank) for mode, size in enumerate((6, 5, 3, 3))]
    wanted = torch.einsum("ar,br,cr,dr->abcd", *factors)
    assert torch.allclose(outer(factors), wanted, atol=1e-10)
    found = cp(wanted, rank, torch.Generator().manual_seed(seed), sweeps=400, tolerance=1e-9)
    assert [each.shape for each in found] == [each.shape for each in factors]
    assert float((outer(found) - wanted).norm() / wanted.norm()) < (1e-4 if rank == 1 else 0.35)
    norms = torch.stack([each.norm(dim=0) for each in found])
    assert torch.allclose(norms, norms[:1].expand_as(norms), rtol=1e-6)


def test_more_terms_and_sweeps_of_cp_come_nearer():
    weight = drawn(3, 8, 7, 3, 3)

    def error(rank: int, sweeps: int) -> float:
        return float((outer(cp(weight, rank, torch.Generator(), sweeps)) - weight).square().sum())

    assert error(12, 30) < error(12, 3) < error(12, 1)
    assert error(24, 30) < error(12, 30) < error(4, 30)


@given(seed=SEEDS, rows=st.lists(st.integers(1, 4), min_size=2, max_size=3), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_tensor_train_is_exact_at_full_rank_and_near_below_it(seed, rows, data):
    columns = data.draw(st.lists(st.integers(1, 4), min_size=len(rows), max_size=len(rows)))
    matrix = drawn(seed, math.prod(rows), math.prod(columns))
    full = train_ranks(rows, columns, 10**6)
    assert torch.allclose(contracted(tensor_train(matrix, rows, columns, full)), matrix, atol=1e-10)
    rank = data.draw(st.integers(1, 4))
    cores = tensor_train(matrix, rows, columns, train_ranks(rows, columns, rank))
    assert sum(core.numel() for core in cores) == train_cost(rows, columns, rank)
    # what is cut off each unfolding bounds the error from both sides (Oseledets, 2011, theorem 2.2)
    order = len(rows)
    pairs = [axis for k in range(order) for axis in (order + k, k)]
    tensor = matrix.reshape(*rows, *columns).permute(pairs)
    tails = [
        float(torch.linalg.svdvals(tensor.reshape(math.prod(tensor.shape[: 2 * k]), -1))[rank:].square().sum())
        for k in range(1, order)
    ]
    error = float((contracted(cores) - matrix).square().sum())
    assert max(tails) - 1e-9 <= error <= sum(tails) + 1e-9


@given(size=st.integers(1, 5000), parts=st.integers(1, 4))
def test_sizes_fall_into_factors(size, parts):
    found = divided(size, parts)
    assert math.prod(found) == size and len(found) == parts and found == sorted(found, reverse=True)


def test_factors_are_as_equal_as_primes_allow():
    assert divided(384, 2) == [24, 16]
    assert divided(1536, 3) == [16, 12, 8]
    assert divided(7, 3) == [7, 1, 1]
