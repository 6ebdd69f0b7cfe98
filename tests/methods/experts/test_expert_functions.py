"""The mathematics of experts against plain references: dispatch, losses, clusters, matching, routers."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from featherweight.methods.experts.clusters import balanced_clusters, groups, matching
from featherweight.methods.experts.losses import load_balancing, router_z
from featherweight.methods.experts.merge import merged_expert
from featherweight.methods.experts.parts import fitted_router, part, unselected_means
from featherweight.model.dispatch import capacity_of, dispatch
from featherweight.model.experts import Router, chosen, experts_of, feed_forward, mixture


def member(width: int = 6, neurons: int = 5, gated: bool = False) -> nn.Module:
    gate = nn.Linear(width, neurons) if gated else None
    return feed_forward(nn.Linear(width, neurons), nn.GELU(), nn.Linear(neurons, width), gate)


def plainly(x: Tensor, indices: Tensor, weights: Tensor, members: list, most: int | None = None) -> Tensor:
    """Each token through each of its experts in a loop; first choices are served first, then earlier tokens."""
    result, taken = torch.zeros_like(x), [0] * len(members)
    for choice, token in itertools.product(range(indices.shape[1]), range(len(x))):
        place = int(indices[token, choice])
        taken[place] += 1
        if most is None or taken[place] <= most:
            result[token] += weights[token, choice] * members[place](x[token])
    return result


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("factor", [None, 0.5, 1.0, 1.25])
def test_experts_give_what_a_loop_gives(gated: bool, factor: float | None) -> None:
    members = [member(gated=gated) for _ in range(5)]
    x, logits = torch.randn(17, 6), torch.randn(17, 5)
    weights, indices = chosen(logits, 2, "softmax", normalise=True)
    most = None if factor is None else capacity_of(17, 2, 5, factor)
    layer = experts_of(members, factor)
    torch.testing.assert_close(layer(x, indices, weights), plainly(x, indices, weights, members, most))
    layer.observed_whole = True
    torch.testing.assert_close(layer(x, indices, weights), plainly(x, indices, weights, members, most))


def test_a_table_leads_to_experts_that_stand_for_several() -> None:
    members = [member() for _ in range(2)]
    x, indices = torch.randn(9, 6), torch.randint(0, 4, (9, 2))
    weights, table = torch.rand(9, 2), (0, 1, 1, 0)
    wanted = plainly(x, indices, weights, [members[place] for place in table])
    torch.testing.assert_close(experts_of(members, table=table)(x, indices, weights), wanted)


def test_only_chosen_experts_compute_and_gradients_reach_them() -> None:
    members = [member() for _ in range(4)]
    seen = {}
    for place, each in enumerate(members):
        each.register_forward_hook(lambda _m, given, _out, place=place: seen.update({place: len(given[0])}))
    layer = mixture(Router(6, 4, 1), experts_of(members))
    with torch.no_grad():
        layer.router.bias[2] = 100.0
    x = torch.randn(3, 7, 6, requires_grad=True)
    layer(x).square().sum().backward()
    assert seen == {0: 0, 1: 0, 2: 21, 3: 0}
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    assert float(members[2].up.weight.grad.abs().sum()) > 0
    assert not any(float(members[place].up.weight.grad.abs().sum()) for place in (0, 1, 3))


def test_first_choices_fill_an_expert_before_second_ones() -> None:
    indices = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 1]])
    found = dispatch(indices, 2, 0.5)  # two rows for each expert
    assert found.counts.tolist() == [2, 2] and found.tokens.tolist() == [0, 2, 1, 0]
    assert found.places.tolist() == [[0, 2, 1, 4], [3, 4, 4, 4]]


@pytest.mark.parametrize(("tokens", "factor", "most"), [(16, 1.0, 8), (16, 1.25, 10), (1, 0.1, 1), (7, 1.0, 4)])
def test_capacity_is_the_even_share_times_the_factor_rounded_up(tokens: int, factor: float, most: int) -> None:
    assert capacity_of(tokens, 2, 4, factor) == most


def test_a_router_says_what_its_scores_mean() -> None:
    logits = torch.randn(8, 5)
    order = logits.argsort(descending=True)[:, :2]
    wanted = {
        "softmax": logits.softmax(1).gather(1, order),
        "selected": logits.gather(1, order).softmax(1),
        "sigmoid": logits.sigmoid().gather(1, order),
        "one": torch.ones(8, 2),
    }
    for scores, values in wanted.items():
        weights, indices = chosen(logits, 2, scores)
        assert torch.equal(indices, order)
        torch.testing.assert_close(weights, values)
    torch.testing.assert_close(chosen(logits, 2, "softmax", True)[0], wanted["selected"])
    with pytest.raises(ValueError, match="top_k=6 is not from 1 to 5, the number of experts"):
        Router(4, 5, 6)


# -- losses ------------------------------------------------------------------------------------------------------------
def test_the_losses_are_those_of_the_papers() -> None:
    logits = torch.randn(11, 4, dtype=torch.float64).float()
    _, indices = chosen(logits, 1, "softmax")
    share = [sum(int(row) == place for row in indices[:, 0]) / 11 for place in range(4)]
    mean = [sum(float(torch.softmax(row, 0)[place]) for row in logits) / 11 for place in range(4)]
    wanted = 4 * sum(f * p for f, p in zip(share, mean))
    assert float(load_balancing(logits, indices)) == pytest.approx(wanted, rel=1e-5)
    squares = [float(torch.log(torch.exp(row).sum())) ** 2 for row in logits]
    assert float(router_z(logits)) == pytest.approx(sum(squares) / 11, rel=1e-5)


def test_an_even_router_has_a_balancing_loss_of_one_and_a_collapsed_one_of_the_number_of_experts() -> None:
    even = torch.zeros(8, 4)
    assert float(load_balancing(even, torch.arange(8)[:, None] % 4)) == pytest.approx(1.0)
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).repeat(8, 1)
    assert float(load_balancing(collapsed, torch.zeros(8, 1, dtype=torch.long))) == pytest.approx(4.0)


# -- groups ------------------------------------------------------------------------------------------------------------
def test_clusters_are_of_equal_size_and_find_what_is_alike() -> None:
    centres = torch.randn(4, 8) * 5
    features = (centres[:, None] + 0.1 * torch.randn(4, 6, 8)).flatten(0, 1)
    order = torch.randperm(24)
    owner = balanced_clusters(features[order], 4, torch.Generator().manual_seed(0))
    assert owner.bincount().tolist() == [6, 6, 6, 6]
    assert all(len(set(owner[order // 6 == place].tolist())) == 1 for place in range(4))


def test_clusters_of_equal_rows_are_of_equal_size_all_the_same() -> None:
    owner = balanced_clusters(torch.ones(12, 3), 3, torch.Generator().manual_seed(0))
    assert owner.bincount().tolist() == [4, 4, 4]


def test_groups_join_the_nearest() -> None:
    points = torch.tensor([[0.0], [0.1], [5.0], [5.2], [9.0]])
    assert groups(torch.cdist(points, points), 3) == [[0, 1], [2, 3], [4]]
    assert len(groups(torch.zeros(5, 5), 3)) == 3


def test_matching_undoes_a_permutation() -> None:
    rows, order = torch.randn(9, 4), torch.randperm(9)
    assert torch.equal(rows[order][matching(rows, rows[order])], rows)


@pytest.mark.parametrize("gated", [False, True])
def test_experts_that_differ_by_the_order_of_their_neurons_merge_without_loss(gated: bool) -> None:
    one = member(gated=gated)
    order = torch.randperm(5)
    other = part(one, order, one.down.bias)
    made = merged_expert([one, other], torch.tensor([3.0, 5.0]))
    x = torch.randn(7, 6)
    torch.testing.assert_close(made(x), one(x))


# -- parts -------------------------------------------------------------------------------------------------------------
def test_the_parts_of_a_feed_forward_add_up_to_it() -> None:
    whole = member(neurons=8, gated=True)
    sets = list(torch.randperm(8).chunk(4))
    x = torch.randn(7, 6)
    total = sum(part(whole, each)(x) for each in sets) + whole.down.bias
    torch.testing.assert_close(total, whole(x))


def test_a_fitted_router_finds_a_linear_rule() -> None:
    x, weight, bias = torch.randn(200, 5), torch.randn(3, 5), torch.randn(3)
    found = fitted_router(x, x @ weight.T + bias, damping=1e-9)
    torch.testing.assert_close(found[0], weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found[1], bias, atol=1e-4, rtol=1e-3)


def test_what_stands_for_an_expert_is_its_mean_where_it_is_left_out() -> None:
    outputs, selected = torch.randn(6, 3), torch.tensor([True, False, False, True, True, False])
    torch.testing.assert_close(unselected_means(outputs, selected), outputs[[1, 2, 5]].mean(0))
    torch.testing.assert_close(unselected_means(outputs, torch.ones(6, dtype=torch.bool)), outputs.mean(0))
