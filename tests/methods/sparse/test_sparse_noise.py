"""Dropout that leaves sparsity: its mathematics against plain references, and the two steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from small_tasks import accuracy, conv_task, one_thread, transformer_task  # noqa: F401
from torch import Tensor, nn

from featherweight.core.context import Context, run_recipe, run_step
from featherweight.core.data import Arrays
from featherweight.core.fit import task_loss
from featherweight.core.recipe import Recipe
from featherweight.core.soft import chains, fold
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.methods.sparse.noise import candidates, divergence, log_alpha, risen
from featherweight.methods.sparse.targeted_dropout import Dropped
from featherweight.methods.sparse.variational_dropout import PARAMETER, noisy
from featherweight.model.masks import mask_on, put_mask


def context(task: Task) -> Context:
    return Context(task, device=torch.device("cpu"))


def run(kind: str, task: Task | None = None, **settings: Any) -> Any:
    task = task or conv_task()
    return run_step(step(kind, **({"epochs": 2, "lr": 1e-3} | settings)), task.fresh(), context(task))


# -- the divergence ---------------------------------------------------------------------------------------------------
def by_integration(ratio: float) -> float:
    """The divergence of N(1, alpha) from the log-uniform prior, up to a constant: E log|x| - log(alpha) / 2.

    Kingma et al., arXiv:1506.02557, appendix C; the mean by the trapezoidal rule, fine enough for the pole at zero.
    """
    deviation = math.exp(ratio / 2)
    unit = torch.linspace(-8, 8, 2_000_001, dtype=torch.float64)
    density = torch.exp(-(unit**2) / 2) / math.sqrt(2 * math.pi)
    mean = torch.trapezoid(density * torch.log((1 + deviation * unit).abs().clamp_min(1e-9)), unit)
    return float(mean) - ratio / 2


def test_the_divergence_is_that_of_the_paper_to_a_percent_of_a_nat():
    """The fit of equation 14 beside numerical integration; the constant is set by very large noise."""
    constant = by_integration(14.0)
    for ratio in (-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0):
        wanted = by_integration(ratio) - constant
        assert float(divergence(torch.tensor([ratio]))) == pytest.approx(wanted, abs=0.02), ratio


@given(some.lists(some.floats(-30, 30), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_the_divergence_is_a_sum_that_falls_with_noise(ratios: list[float]):
    tensor = torch.tensor(ratios, dtype=torch.float64)
    one = divergence(tensor)
    assert float(one) >= 0
    assert float(one) == pytest.approx(sum(float(divergence(each[None])) for each in tensor), abs=1e-9)
    assert float(divergence(tensor + 0.5)) <= float(one) + 1e-12


def test_log_alpha_is_the_variance_over_the_squared_weight():
    found = log_alpha(torch.tensor([0.5, -2.0]), torch.tensor([math.log(0.1), math.log(8.0)]))
    assert found.tolist() == pytest.approx([math.log(0.4), math.log(2.0)], abs=1e-6)


# -- local reparametrization ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (3, 6)),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 2, 5, 5)),
        (nn.Conv1d(4, 4, 3, padding=1, groups=2), (2, 4, 6)),
    ],
)
def test_noise_on_outputs_has_the_moments_of_noise_on_weights(layer: nn.Module, shape: tuple[int, ...], masked: bool):
    torch.manual_seed(0)
    x = torch.randn(shape)
    if masked and mask_on(layer) is None:
        put_mask(layer, torch.rand(layer.weight.shape) < 0.6)  # type: ignore[arg-type]
    with noisy({"layer": layer}, start=-2.0), torch.no_grad():
        log_variance = layer.get_parameter(PARAMETER)
        log_variance.add_(torch.randn_like(log_variance))
        layer.train()
        outputs = torch.stack([layer(x) for _ in range(1500)])
        layer.eval()
        mean = layer(x)
        weight: Tensor = layer.weight.clone()  # type: ignore[operator]
        mask = mask_on(layer)
        deviation = (log_variance / 2).exp() * (1.0 if mask is None else mask.keep)
    plain = fold(layer)
    sampled = []
    with torch.no_grad():
        for _ in range(1500):
            plain.weight.copy_(weight + deviation * torch.randn_like(weight))  # type: ignore[operator]
            sampled.append(plain(x))
    assert torch.allclose(outputs.mean(0), mean, atol=0.2)
    assert torch.allclose(outputs.std(0), torch.stack(sampled).std(0), rtol=0.2, atol=0.03)


def test_afterwards_the_layer_is_as_it_was():
    layer = nn.Linear(5, 3)
    with noisy({"layer": layer}, start=-1.0):
        assert PARAMETER in dict(layer.named_parameters())
    assert set(dict(layer.named_parameters())) == {"weight", "bias"} and not layer._forward_hooks


def test_weights_that_are_mostly_noise_are_zero_and_the_others_stay():
    model, record = run("sparse.variational_dropout", epochs=8, lr=3e-3, weight=0.3)
    names = {name for name, *_ in chains(model)}
    assert names == {f"{name}.weight" for name in ("stem", "conv", "depth", "hidden", "head")}
    shares = [float((fold(model).get_parameter(name) == 0).float().mean()) for name in names]
    assert all(0.02 < share < 0.98 for share in shares) and max(shares) > 0.3
    assert "% of 2048 weights are zero" in record.changed["hidden"]
    assert accuracy(conv_task(), model) > accuracy(conv_task(), conv_task().original) - 0.05
    assert not any(PARAMETER in name for name, _ in model.named_parameters())


def test_inputs_that_say_nothing_lose_their_weights():
    """Of 20 inputs 2 say everything: sparse variational dropout finds them."""
    torch.manual_seed(0)
    x = torch.randn(1000, 20)
    task = Task(
        name="few",
        model=nn.Linear(20, 2),
        train=Arrays(x, (x[:, 0] > x[:, 1]).long()),
        test=Arrays(x, (x[:, 0] > x[:, 1]).long()),
    )
    model, _ = run("sparse.variational_dropout", task, epochs=25, lr=2e-2, variance_lr=0.1)
    mask = mask_on(model)
    assert mask is not None and bool(mask.keep[:, :2].any(0).all())
    assert float(mask.keep[:, 2:].float().mean()) < 0.2


def test_noise_that_has_no_time_to_grow_is_said():
    _, record = run("sparse.variational_dropout", epochs=0.2, start=-40.0)
    assert all("none of its weights has a log alpha above 3" in left.reason for left in record.left)
    assert {"stem", "head"} <= {left.layer for left in record.left}


def test_a_layer_that_is_not_called_gets_no_noise():
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(input=torch.relu(x @ self.one.weight.T))

    x = torch.randn(64, 6)
    task = Task(name="direct", model=Direct(), train=Arrays(x, (x[:, 0] > 0).long()))
    _, record = run("sparse.variational_dropout", task, epochs=1, start=0.0)
    assert "does not call it" in {left.layer: left.reason for left in record.left}["one"]
    assert "are zero" in record.changed["two"]


def test_the_divergence_is_spread_over_inputs_however_they_come_in_batches():
    class Looked(Context):
        penalty = 0.0

        def fit(self, model: nn.Module, training: Any, **given: Any) -> float:  # type: ignore[override]
            given["during"](model, 1.0)
            batch = next(self.batches("train"))
            output = self.task.call(model.eval(), batch)
            loss = given["term"](model, batch, output, self) - task_loss(model, batch, output, self)
            self.penalty = float(loss.detach())
            return 0.0

    task = conv_task()
    found = []
    for each in (task, replace(task, train=list(task.batches("train", 50)))):
        ctx = Looked(each, device=torch.device("cpu"))
        step("sparse.variational_dropout", start=-5.0).apply(each.fresh(), ctx)
        found.append(ctx.penalty)
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] > 1e-3


# -- targeted dropout -------------------------------------------------------------------------------------------------
@given(some.integers(1, 6), some.integers(1, 12), some.floats(0, 0.99), some.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_targets_are_the_smallest_of_each_output(rows: int, columns: int, share: float, seed: int):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = candidates(weight, share)
    for row, aimed in zip(weight.tolist(), found.tolist()):
        smallest = sorted(range(columns), key=lambda place: abs(row[place]))[: int(share * columns)]
        assert {place for place, hit in enumerate(aimed) if hit} == set(smallest)


def test_targets_are_dropped_at_the_rate_and_nothing_else_is():
    noise, weight = Dropped(), torch.randn(4, 50)
    noise.share, noise.rate = 0.6, 0.3
    drawn = torch.stack([noise(weight) == 0 for _ in range(2000)]).float().mean(0)
    aimed = candidates(weight, 0.6)
    assert torch.allclose(drawn[aimed], torch.tensor(0.3), atol=0.06) and bool((drawn[~aimed] == 0).all())
    assert torch.equal(noise.eval()(weight), weight)


def test_the_share_rises_first_and_the_chance_after_it():
    found = [risen(t / 10, 0.5, 0.8, 0.6) for t in range(11)]
    assert found[0] == (0.0, 0.6) and found[5] == (0.8, 0.6) and found[10] == pytest.approx((0.8, 1.0))
    assert [one for one, _ in found] == sorted(one for one, _ in found)
    assert [two for _, two in found] == sorted(two for _, two in found)
    assert risen(0.0, 0.0, 0.8, 0.6) == (0.8, 0.6)


def test_each_output_ends_with_its_share_of_zeros():
    model, record = run("sparse.targeted_dropout", transformer_task(), sparsity=0.75)
    for name, _, _, links in chains(model):
        assert [type(link).__name__ for link in links] == ["Mask"]
        rows = fold(model).get_parameter(name).flatten(1)
        assert bool(((rows == 0).sum(1) == int(0.75 * rows.shape[1])).all())
    assert record.changed["wide"] == "75.0% of 1536 weights are zero"


def test_each_output_of_a_transposed_convolution_ends_with_its_share():
    net = nn.Sequential(nn.Unflatten(1, (4, 4)), nn.ConvTranspose1d(4, 6, 3), nn.Flatten(), nn.Linear(36, 2))
    x = torch.randn(64, 16)
    task = Task(name="up", model=net, train=Arrays(x, (x[:, 0] > 0).long()))
    model, _ = run("sparse.targeted_dropout", task, sparsity=0.5)
    assert (model[1].weight == 0).sum((0, 2)).tolist() == [6] * 6


def test_targeted_dropout_costs_less_than_pruning_at_once():
    task, kinds = conv_task(), {"only": "conv,hidden"}
    model, _ = run("sparse.targeted_dropout", epochs=8, lr=3e-3, sparsity=0.7, **kinds)
    plain, _ = run("finetune", epochs=8, lr=3e-3)
    for name in ("conv", "hidden"):
        layer = plain.get_submodule(name)
        put_mask(layer, ~candidates(layer.weight, 0.7))
    assert accuracy(task, model) > accuracy(task, plain)


def test_masks_that_are_there_are_kept_and_tightened():
    for kind in ("sparse.targeted_dropout", "sparse.variational_dropout"):
        recipe = Recipe([{"kind": "prune.weights", "sparsity": 0.3}, {"kind": kind, "epochs": 2}])
        ctx = context(conv_task())
        pruned, _ = run_recipe(Recipe(recipe.steps[:1]), ctx)
        model, _ = run_recipe(recipe, ctx)
        before = {name: links[0].keep for name, _, _, links in chains(pruned)}  # type: ignore[union-attr]
        assert before
        for name, _, _, links in chains(model):
            assert [type(link).__name__ for link in links] == ["Mask"]
            assert not bool((links[0].keep & ~before[name]).any()), "a connection came back"  # type: ignore[operator]
