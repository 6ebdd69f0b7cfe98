"""RigL, SET and static sparsity: exact counts, masks that move, what the optimizer forgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_tasks import conv_task, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_recipe, run_step
from featherweight.core.errors import NoEffect, RecipeError
from featherweight.core.fit import task_loss
from featherweight.core.recipe import Recipe
from featherweight.core.soft import Mask, chains, encodings, fold
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.methods.sparse.allocation import counts, erdos_renyi_kernel
from featherweight.methods.sparse.evolution import Evolution
from featherweight.methods.sparse.scratch import start_anew
from featherweight.model.masks import mask_on, plain_weight, put_mask

LAYERS = ["stem", "conv", "depth", "hidden", "head"]


def context(task: Task) -> Context:
    return Context(task, device=torch.device("cpu"))


def trained(kind: str, task: Task | None = None, **settings: Any) -> Any:
    task = task or conv_task()
    quick = {"epochs": 2, "interval": 2, "lr": 1e-3}
    return run_step(step(kind, **(quick | settings)), task.fresh(), context(task))


def kept(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: mask.keep for name, _, _, (mask,) in chains(model)}


@pytest.mark.parametrize("kind", ["sparse.rigl", "sparse.set"])
@pytest.mark.parametrize("start", ["given", "scratch"])
def test_every_layer_keeps_as_many_as_the_allocation_says(kind: str, start: str):
    model, record = trained(kind, start=start, sparsity=0.8)
    shapes = [tuple(conv_task().original.get_submodule(name).weight.shape) for name in LAYERS]
    wanted = dict(zip(LAYERS, counts(shapes, erdos_renyi_kernel(shapes, 0.2))))
    for name, mask in kept(model).items():
        layer = name.removesuffix(".weight")
        assert int(mask.sum()) == wanted.pop(layer)
        assert int((fold(model).get_parameter(name) != 0).sum()) <= int(mask.sum())
        assert "connections exchanged" in record.changed[layer] and " 0 connections" not in record.changed[layer]
    assert all(counts(shapes, [1.0] * 5)[LAYERS.index(name)] == count for name, count in wanted.items())
    assert {encoding.form for encoding in encodings(model).values()} == {"sparse"}


def test_without_exchange_the_random_connections_stay():
    """Static random sparsity: the connections of the first step are those of the last."""
    one, _ = trained("sparse.set", fraction=0.0, start="scratch", epochs=0.2)
    other, record = trained("sparse.set", fraction=0.0, start="scratch", epochs=2)
    assert all(torch.equal(kept(one)[name], mask) for name, mask in kept(other).items())
    assert all(" 0 connections exchanged" in how for name, how in record.changed.items() if name != "*")


def test_from_given_weights_the_largest_are_kept():
    task = conv_task()
    model, _ = trained("sparse.rigl", fraction=0.0, sparsity=0.7, epochs=0.2)
    for name, mask in kept(model).items():
        weight = task.original.get_parameter(name).abs()
        assert weight[mask].min() >= weight[~mask].max()


def test_it_goes_on_from_a_pruned_network():
    recipe = Recipe([{"kind": "prune.weights", "sparsity": 0.5}, {"kind": "sparse.rigl", "epochs": 1, "interval": 2}])
    model, _ = run_recipe(recipe, context(conv_task()))
    masks = kept(model).values()
    assert sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks) == pytest.approx(0.1, abs=0.02)


def test_uniform_allocation_is_the_same_in_each_layer():
    model, _ = trained("sparse.set", allocation="uniform", sparsity=0.75)
    assert all(float(mask.float().mean()) == pytest.approx(0.25, abs=0.01) for mask in kept(model).values())


def test_the_gradient_that_grows_is_that_of_the_dense_weight():
    """What RigL sees on a masked network is what a dense network with those zeros would compute."""
    task = conv_task()
    batch, ctx = next(task.batches("train", 32)), context(task)
    model = task.fresh().eval()
    layer = model.get_submodule("hidden")
    mask = put_mask(layer, torch.rand(layer.weight.shape) < 0.3)
    evolution = Evolution({"hidden": (layer, mask)}, 0.3, 1, 1.0)
    handles = evolution.watch()
    evolution.during(model, 0.0)
    task_loss(model, batch, task.call(model, batch), ctx).backward()
    handles[0].remove()
    dense = fold(model)
    task_loss(dense, batch, task.call(dense, batch), ctx).backward()
    wanted = dense.get_parameter("hidden.weight").grad
    assert wanted is not None and torch.allclose(evolution.gradients["hidden"], wanted, atol=1e-7)
    assert bool((wanted[~mask.keep] != 0).any())
    masked = plain_weight(layer).grad
    assert masked is not None and bool((masked[~mask.keep] == 0).all())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_grown_weights_and_what_the_optimizer_knows_of_them_begin_at_zero(optimizer: str):
    layer = nn.Linear(20, 20, bias=False)
    mask = put_mask(layer, torch.rand(20, 20) < 0.5)
    weight, before = plain_weight(layer), mask.keep.clone()
    made = torch.optim.SGD([weight], lr=0.1, momentum=0.9) if optimizer == "sgd" else torch.optim.AdamW([weight], 0.1)
    evolution = Evolution({"layer": (layer, mask)}, 0.5, 2, 1.0)
    evolution.watch()
    for turn in range(2):
        evolution.during(layer, turn / 10)
        layer(torch.randn(8, 20)).square().sum().backward()
        made.step()
        evolution.after(made, (turn + 1) / 10)
    grown, lost = mask.keep & ~before, before & ~mask.keep
    assert int(grown.sum()) == int(lost.sum()) == evolution.exchanged["layer"] > 0
    state = [value for value in made.state[weight].values() if value.shape == weight.shape]
    assert state
    for tensor in [weight, *state]:
        assert bool((tensor[grown] == 0).all()) and bool((tensor[lost] == 0).all())
        assert bool((tensor[before & mask.keep] != 0).any())


def test_rigl_finds_connections_that_matter():
    """Only 3 of 50 inputs say anything: RigL ends with connections to them, static sparsity has those of its draw."""
    torch.manual_seed(0)
    x = torch.randn(2000, 50)
    y = (x[:, 0] + x[:, 1] - x[:, 2] > 0).long()

    def found(**settings: Any) -> int:
        from featherweight.core.data import Arrays

        task = Task(name="few", model=nn.Linear(50, 2), train=Arrays(x, y), test=Arrays(x, y))
        item = step("sparse.rigl", start="scratch", allocation="uniform", sparsity=0.9, epochs=4, interval=5, lr=1e-2)
        model, _ = run_step(item.model_copy(update=settings), task.fresh(), context(task))
        mask = mask_on(model)
        assert mask is not None
        return int(mask.keep[:, :3].sum())

    assert found(fraction=0.5) == 6 > found(fraction=0.0)


def test_starting_anew_draws_weights_and_takes_masks_off():
    model = conv_task().fresh()
    put_mask(model.get_submodule("hidden"), torch.zeros(32, 64, dtype=torch.bool))
    assert start_anew(model) == []
    assert mask_on(model.get_submodule("hidden")) is None
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert not torch.equal(parameter, conv_task().original.get_parameter(name)), name
    assert bool((model.get_buffer("stem_norm.running_mean") == 0).all())


def test_what_cannot_be_drawn_anew_is_said():
    _, record = trained("sparse.set", transformer_task(), start="scratch")
    assert any("place is not drawn anew" in warning for warning in record.warnings)


def test_dense_layers_and_layers_that_are_skipped_are_named():
    _, record = trained("sparse.rigl", sparsity=0.3, skip=["conv"])
    reasons = {left.layer: left.reason for left in record.left}
    assert "excluded by skip" in reasons["conv"]
    assert "leaves it dense" in reasons["stem"] and "leaves it dense" in reasons["depth"]


def test_it_trains_nothing_where_no_layer_is_chosen():
    with pytest.raises(NoEffect):
        trained("sparse.rigl", only="nothing.*")


@pytest.mark.parametrize("settings", [{"sparsity": 1}, {"fraction": 2}, {"interval": 0}, {"stop": 0}, {"start": "new"}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"sparse\.rigl: " + next(iter(settings))):
        step("sparse.rigl", **settings)


def test_too_few_steps_for_an_exchange_are_said():
    _, record = trained("sparse.rigl", interval=100)
    assert [text for text in record.warnings if "nothing was exchanged in 10 steps with interval=100" in text]
    assert not trained("sparse.set", interval=100, fraction=0.0)[1].warnings


def test_masks_are_plain_masks():
    model, _ = trained("sparse.rigl")
    assert all([type(link) for link in links] == [Mask] for *_, links in chains(model))
