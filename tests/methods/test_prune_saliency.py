"""The mathematics of pruning connections, against slow plain references in float64 written from the papers."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import one_thread  # noqa: F401
from torch import Tensor

from featherweight.methods.prune.obs import cheapest, refitted, removals
from featherweight.methods.prune.patterns import Pattern, by_unit, keep_largest_of_all, keep_n_of_m, masks
from featherweight.methods.prune.saliency import brain_damage, by_input_norm, first_order, moved
from featherweight.methods.prune.sparsegpt import inverse_factor, sparsegpt

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)


def matrices(seed: int, rows: int, columns: int, mixed: float = 1.0) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of correlated inputs that can be inverted; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = mixed * torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    mix += torch.eye(columns, dtype=torch.float64)
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    moment = inputs.T @ inputs / len(inputs)
    return weight, moment + 0.01 * moment.diagonal().mean() * torch.eye(columns, dtype=torch.float64)


def loss(weight: Tensor, pruned: Tensor, moment: Tensor) -> float:
    """The squared error of outputs, one input at a time: `sum e^T H e` over the rows e of the error."""
    return sum(float(row @ moment @ row) for row in weight - pruned)


def least_squares(row: Tensor, moment: Tensor, keep: list[int]) -> Tensor:
    """The row that is nearest in the outputs of those with zeros outside `keep`: the normal equations."""
    found = torch.zeros_like(row)
    if keep:
        found[keep] = torch.linalg.solve(moment[keep][:, keep], (moment @ row)[keep])
    return found


# -- masks ----------------------------------------------------------------------------
@few
@given(seeds, st.sampled_from([(2, 4), (4, 8), (1, 4), (3, 5)]), st.integers(1, 5), st.integers(1, 4))
def test_n_of_m_keeps_the_largest_of_each_group(seed: int, pattern: tuple[int, int], rows: int, groups: int):
    kept, of = pattern
    score = torch.rand(rows, groups * of, generator=torch.Generator().manual_seed(seed))
    found = keep_n_of_m(score, kept, of)
    for row, start in itertools.product(range(rows), range(0, groups * of, of)):
        wanted = sorted(range(start, start + of), key=lambda place: -float(score[row, place]))[:kept]
        assert found[row, start : start + of].nonzero().flatten().add(start).tolist() == sorted(wanted)


@few
@given(seeds, st.tuples(st.integers(1, 4), st.integers(1, 4)), st.floats(0.05, 0.95))
def test_blocks_go_whole_and_by_their_mean_score(seed: int, block: tuple[int, int], sparsity: float):
    high, wide = block
    score = torch.rand(high * 3, wide * 4, generator=torch.Generator().manual_seed(seed))
    (found,) = masks([score], [sparsity], Pattern(block=block), "layer")
    mean, kept = {}, set()
    for row, column in itertools.product(range(3), range(4)):
        cut = (slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide))
        assert found[cut].all() or not found[cut].any(), "a block was torn"
        mean[row, column] = float(score[cut].mean())
        kept |= {(row, column)} if found[cut].all() else set()
    assert abs(len(kept) - max(1, 12 * (1 - sparsity))) <= 0.5 + 1e-9
    assert min(mean[place] for place in kept) >= max([mean[place] for place in mean.keys() - kept], default=0)


@few
@given(seeds, st.floats(0.05, 0.95), st.integers(4, 9))
def test_rows_of_blocks_compete_by_themselves(seed: int, sparsity: float, columns: int):
    score = torch.rand(5, columns, generator=torch.Generator().manual_seed(seed))
    (found,) = masks([score], [sparsity], Pattern(), "row")
    for row, keep in zip(score, found):
        assert abs(int(keep.sum()) - columns * (1 - sparsity)) <= 0.5 + 1e-9
        if keep.any() and not keep.all():
            assert row[keep].min() >= row[~keep].max()


@few
@given(seeds, st.floats(0.1, 0.9))
def test_whole_rows_of_unlike_length_compete_by_what_a_weight_of_them_is_worth(seed: int, sparsity: float):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(6, columns, generator=generator) for columns in (3, 10)]
    found = masks(scores, [sparsity] * 2, Pattern.of_setting("row"), "global")
    total = sum(score.numel() for score in scores)
    zeros = sum(int((~mask).sum()) for mask in found)
    assert abs(zeros - sparsity * total) <= 10, "off by more than the longest row"
    assert all(keep.all() or not keep.any() for mask in found for keep in mask)
    best = {float(score.mean(1).max()) for score in scores}  # one row of each layer stays, whatever it is worth
    means = [(float(row.mean()), bool(keep.all())) for s, m in zip(scores, found) for row, keep in zip(s, m)]
    gone = [mean for mean, keep in means if not keep]
    stay = [mean for mean, keep in means if keep and mean not in best]
    assert sum(mean > min(stay, default=1) for mean in gone) <= 1, "at most the row at the edge does not fit"


def test_what_must_not_stay_never_does_and_a_block_without_choice_comes_last():
    score = torch.tensor([[5.0, -torch.inf, 1.0, 1.0], [-torch.inf, -torch.inf, 0.5, 0.5]])
    worth = by_unit(score, (1, 2))
    assert worth.tolist() == [[2.5, 1.0], [-torch.inf, 0.5]]
    assert not keep_largest_of_all([score], 0.5)[0][score == -torch.inf].any()


# -- scores ----------------------------------------------------------------------------
@few
@given(seeds)
def test_wanda_is_the_size_of_the_weight_times_the_norm_of_its_input(seed: int):
    generator = torch.Generator().manual_seed(seed)
    inputs, weight = torch.randn(20, 6, generator=generator), torch.randn(3, 6, generator=generator)
    found = by_input_norm(weight, inputs.T @ inputs / len(inputs))
    for row, column in itertools.product(range(3), range(6)):
        norm = sum(float(value) ** 2 for value in inputs[:, column]) ** 0.5
        assert float(found[row, column]) == pytest.approx(abs(float(weight[row, column])) * norm / 20**0.5, rel=1e-4)


@few
@given(seeds)
def test_scores_are_the_changes_of_losses_for_which_they_are_exact(seed: int):
    """First order on a linear loss; Optimal Brain Damage on a diagonal parabola around its minimum."""
    generator = torch.Generator().manual_seed(seed)
    weight, slope = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    bend = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    for row, column in itertools.product(range(3), range(4)):
        without = weight.clone()
        without[row, column] = 0
        fell = float((without * slope).sum() - (weight * slope).sum())
        assert float(first_order(weight, slope)[row, column]) == pytest.approx(fell**2)
        rose = float((bend * (without - weight).square()).sum()) / 2
        assert float(brain_damage(weight, bend)[row, column]) == pytest.approx(rose)


@few
@given(seeds, st.integers(1, 6))
def test_movement_is_the_sum_of_the_gradients_of_scores_that_pass_straight_through(seed: int, steps: int):
    """The paper's scores are trained by gradient descent at rate 1: dL/dS is that of `W * S` at S."""
    generator = torch.Generator().manual_seed(seed)
    inputs, weight = torch.randn(5, 4, generator=generator), torch.randn(3, 4, generator=generator)
    keep = torch.rand(3, 4, generator=generator) > 0.4
    score, learned = torch.zeros(3, 4), torch.zeros(3, 4)
    for _ in range(steps):
        scores = learned.clone().requires_grad_(True)
        through = keep + scores - scores.detach()  # the mask, with the gradient of the scores
        (inputs @ (weight * through).T).square().sum().backward()
        learned = learned - scores.grad
        effective = (weight * keep).requires_grad_(True)
        (inputs @ effective.T).square().sum().backward()
        score = moved(score, weight, effective.grad)
        weight = weight - 0.01 * effective.grad * keep
    assert torch.allclose(score, learned, rtol=1e-4, atol=1e-5)


# -- Optimal Brain Surgeon ----------------------------------------------------------------------------
@few
@given(seeds, st.integers(2, 7))
def test_one_removal_is_the_best_of_all_by_least_squares(seed: int, columns: int):
    weight, moment = matrices(seed, 3, columns)
    order, rise = removals(weight, moment, 1, torch.ones_like(weight, dtype=torch.bool))
    for row in range(3):
        tried = []
        for place in range(columns):
            keep = [other for other in range(columns) if other != place]
            tried.append(loss(weight[row, None], least_squares(weight[row], moment, keep)[None], moment))
        assert tried[int(order[row, 0])] == pytest.approx(min(tried), rel=1e-6)
        assert float(rise[row, 0]) == pytest.approx(min(tried), rel=1e-6)


@few
@given(seeds, st.integers(2, 7))
def test_removals_one_after_the_other_add_up_to_the_loss_of_the_refitted_rows(seed: int, columns: int):
    """Each removal is the cheapest given those before it, by brute force; the sum is the loss of all of them."""
    weight, moment = matrices(seed, 2, columns)
    order, rise = removals(weight, moment, columns, torch.ones_like(weight, dtype=torch.bool))
    for row in range(2):
        keep, spent = list(range(columns)), 0.0
        for place, price in zip(order[row].tolist(), rise[row].tolist()):
            tried = {
                other: loss(
                    weight[row, None], least_squares(weight[row], moment, [k for k in keep if k != other])[None], moment
                )
                for other in keep
            }
            assert tried[place] == pytest.approx(min(tried.values()), rel=1e-6)
            keep.remove(place)
            spent += price
            assert spent == pytest.approx(tried[place], rel=1e-6)


@few
@given(seeds, st.floats(0.1, 0.9))
def test_refitting_is_least_squares_on_what_stays(seed: int, share: float):
    weight, moment = matrices(seed, 4, 6)
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) < share
    found = refitted(weight, moment, keep)
    for row in range(4):
        wanted = least_squares(weight[row], moment, keep[row].nonzero().flatten().tolist())
        assert torch.allclose(found[row], wanted, rtol=1e-6, atol=1e-9)


@few
@given(seeds, st.integers(0, 20))
def test_the_next_to_go_in_all_rows_is_the_cheapest_next_of_each(seed: int, count: int):
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(5, generator=generator) for _ in range(4)])
    rise = torch.rand(4, 5, generator=generator)
    done = [0] * 4
    for _ in range(count):
        done[min((row for row in range(4) if done[row] < 5), key=lambda row: float(rise[row, done[row]]))] += 1
    wanted = torch.ones(4, 5, dtype=torch.bool)
    for row in range(4):
        wanted[row, order[row, : done[row]]] = False
    assert torch.equal(cheapest(order, rise, 5, count), wanted)


@few
@given(seeds)
def test_obs_keeps_n_of_m_and_takes_first_what_is_gone_already(seed: int):
    weight, moment = matrices(seed, 3, 8)
    allowed = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed)) > 0.2
    gone = (~allowed).reshape(3, 2, 4).sum(2) <= 2
    weight = weight * allowed
    if gone.all():
        order, rise = removals(weight, moment, 4, allowed, (2, 4))
        keep = cheapest(order, rise, 8, 12)
        assert (keep.reshape(3, 2, 4).sum(2) == 2).all() and not (keep & ~allowed).any()


# -- SparseGPT ----------------------------------------------------------------------------
def column_by_column(weight: Tensor, moment: Tensor, width: int, kept: int) -> tuple[Tensor, Tensor]:
    """Section 3.2 as it stands: the inverse of what is left is computed anew for every column, updates at once."""
    weight, columns = weight.clone(), weight.shape[1]
    keep = torch.ones_like(weight, dtype=torch.bool)
    for column in range(columns):
        inverse = torch.linalg.inv(moment[column:, column:])
        if column % width == 0:
            own = [torch.linalg.inv(moment[place:, place:])[0, 0] for place in range(column, column + width)]
            score = weight[:, column : column + width] ** 2 / torch.stack(own)
            for row in range(len(weight)):
                worst = sorted(range(width), key=lambda place: float(score[row, place]))[: width - kept]
                keep[row, [column + place for place in worst]] = False
        error = weight[:, column] * ~keep[:, column] / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
    return weight * keep, keep


@few
@given(seeds, st.sampled_from([(2, 4), (1, 2), (1, 4)]), st.integers(1, 4))
def test_sparsegpt_is_the_plain_algorithm(seed: int, pattern: tuple[int, int], groups: int):
    kept, of = pattern
    weight, moment = matrices(seed, 5, groups * of)
    factor = inverse_factor(moment)
    assert factor is not None
    choose = Pattern(kept=kept, of=of)
    everything = torch.ones_like(weight, dtype=torch.bool)
    found, keep = sparsegpt(weight, factor, lambda score: masks([score], [1.0], choose, "layer")[0], everything, of)
    wanted, wanted_keep = column_by_column(weight, moment, of, kept)
    assert torch.equal(keep, wanted_keep)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("width", [8, 32, 128])
def test_gathered_updates_change_nothing(width: int):
    """More columns than one block: what is gathered over a block must arrive behind it."""
    weight, moment = matrices(3, 4, 256)
    factor = inverse_factor(moment)
    assert factor is not None
    half = [torch.rand(4, 256, generator=torch.Generator().manual_seed(1)) > 0.5]
    places = iter(range(0, 256, width))

    def choose(score: Tensor) -> Tensor:
        start = next(places)
        return half[0][:, start : start + width]

    found, keep = sparsegpt(weight, factor, choose, torch.ones_like(weight, dtype=torch.bool), width)
    assert torch.equal(keep, half[0])
    plain = weight.clone()
    for column in range(256):
        error = plain[:, column] * ~keep[:, column] / factor[column, column]
        plain[:, column:] -= error[:, None] * factor[column, column:]
    assert torch.allclose(found, plain * keep, rtol=1e-8, atol=1e-8)


def test_making_up_for_what_goes_costs_less_than_not():
    """Exact OBS less than SparseGPT less than as many smallest weights, over ten layers with correlated inputs; and no
    weights for the mask of SparseGPT cost less than refitted ones.
    """
    total = [0.0, 0.0, 0.0]
    everything = torch.ones(16, 16, dtype=torch.bool)
    for seed in range(10):
        weight, moment = matrices(seed, 16, 16, mixed=0.5)
        exact = refitted(weight, moment, cheapest(*removals(weight, moment, 16, everything), 16, 128))
        factor = inverse_factor(moment)
        assert factor is not None
        made, keep = sparsegpt(weight, factor, lambda s: masks([s], [0.5], Pattern(), "layer")[0], everything)
        (small,) = masks([weight.abs()], [0.5], Pattern(), "layer")
        losses = [loss(weight, each, moment) for each in (exact, made, weight * small)]
        assert loss(weight, refitted(weight, moment, keep), moment) <= losses[1] * (1 + 1e-9)
        total = [sum(pair) for pair in zip(total, losses)]
    assert total[0] < 0.8 * total[1] and total[1] < 0.95 * total[2], total


def test_a_moment_that_cannot_be_inverted_has_no_factor():
    assert inverse_factor(torch.ones(3, 3)) is None
