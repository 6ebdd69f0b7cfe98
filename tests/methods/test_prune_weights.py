"""Magnitude pruning: exact sparsity, masks that hold and tighten, layers that are left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_tasks import conv_task, one_thread, transformer_task  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize

from featherweight.core.context import Context, run_recipe, run_step
from featherweight.core.errors import NoEffect, RecipeError
from featherweight.core.fit import Training
from featherweight.core.recipe import Recipe
from featherweight.core.soft import Mask, chains, encodings, fold
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.methods.prune.weights import WeightPruning


def context(task: Task) -> Context:
    return Context(task, device=torch.device("cpu"))


def masked(task: Task, **settings: Any) -> Any:
    return run_step(WeightPruning(**settings), task.fresh(), context(task))


def zeros(model: nn.Module) -> dict[str, float]:
    """The share of zeros in each masked weight, as it is when the masks are folded in."""
    plain = fold(model)
    return {name: float((plain.get_parameter(name) == 0).float().mean()) for name, *_ in chains(model)}


def total(model: nn.Module) -> float:
    plain = fold(model)
    weights = [plain.get_parameter(name) for name, *_ in chains(model)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.95])
def test_sparsity_over_all_layers_is_exact(sparsity: float):
    model, _ = masked(conv_task(), sparsity=sparsity)
    weights = sum(mask.keep.numel() for *_, (mask,) in chains(model))
    assert total(model) == pytest.approx(sparsity, abs=1 / weights)


def test_sparsity_of_each_layer_is_exact():
    model, record = masked(conv_task(), sparsity=0.6, scope="layer")
    for name, share in zeros(model).items():
        size = fold(model).get_parameter(name).numel()
        assert share == pytest.approx(0.6, abs=1 / size), name
    assert record.changed["head"] == "60.0% of 320 weights are zero"


def test_the_smallest_weights_go():
    task = conv_task()
    model, _ = masked(task, sparsity=0.5, scope="layer")
    for name, _, _, (mask,) in chains(model):
        weight = task.original.get_parameter(name).abs()
        assert weight[mask.keep].min() >= weight[~mask.keep].max()


def test_every_layer_keeps_its_least():
    weak = conv_task().fresh()
    weak.head.weight.data *= 1e-4  # type: ignore[union-attr,operator]
    task = replace(conv_task(), model=weak)
    model, _ = masked(task, sparsity=0.9, min_keep=0.05)
    assert zeros(model)["head.weight"] == pytest.approx(0.95, abs=1e-6)


def test_masks_hold_during_training_and_what_is_stored_is_sparse():
    model, _ = masked(conv_task(), sparsity=0.7, retrain=Training(epochs=1), gradual=False)
    assert total(model) == pytest.approx(0.7, abs=0.01)
    assert {encoding.form for encoding in encodings(model).values()} == {"sparse"}


def test_gradual_sparsity_rises_on_a_cubic_curve_and_ends_where_it_was_asked(monkeypatch: pytest.MonkeyPatch):
    seen: list[float] = []
    tighten = WeightPruning._tighten

    def watched(self: WeightPruning, masks: Any, sparsity: float) -> None:
        seen.append(sparsity)
        tighten(self, masks, sparsity)

    monkeypatch.setattr(WeightPruning, "_tighten", watched)
    model, _ = masked(conv_task(), sparsity=0.8, retrain=Training(epochs=2))
    assert seen[0] == 0 and seen[-1] == 0.8 and seen == sorted(seen) and len(seen) > 5
    assert seen[1] < 0.8 < seen[1] * 8
    assert total(model) == pytest.approx(0.8, abs=0.01)


def test_a_second_pass_tightens_the_same_masks():
    task = conv_task()
    once, _ = masked(task, sparsity=0.5)
    before = {name: mask.keep.clone() for name, _, _, (mask,) in chains(once)}
    twice, record = run_step(WeightPruning(sparsity=0.8), once, context(task))
    for name, _, _, links in chains(twice):
        assert [type(link) for link in links] == [Mask]
        assert not (links[0].keep & ~before[name]).any(), "a connection came back"
    assert total(twice) == pytest.approx(0.8, abs=0.01)
    assert record.changed


def test_a_second_pass_that_asks_for_less_is_an_error():
    task = conv_task()
    once, _ = masked(task, sparsity=0.5)
    with pytest.raises(NoEffect, match="zero already"):
        run_step(WeightPruning(sparsity=0.4), once, context(task))


def test_masks_that_hold_back_nothing_are_no_effect():
    with pytest.raises(NoEffect):
        masked(conv_task(), sparsity=1e-6)


def test_a_layer_that_is_sparse_already_does_not_spare_the_others():
    task = conv_task()
    once, _ = masked(task, sparsity=0.9, scope="layer", only="head")
    twice, record = run_step(WeightPruning(sparsity=0.5, scope="layer"), once, context(task))
    shares = zeros(twice)
    assert shares.pop("head.weight") == pytest.approx(0.9, abs=0.01)
    assert shares and all(share == pytest.approx(0.5, abs=0.01) for share in shares.values())
    assert [left.reason for left in record.left if left.layer == "head"] == [
        "90.0% of the weights are zero already, sparsity=0.5 asks for no more"
    ]


def test_after_structured_pruning():
    task = conv_task()
    recipe = Recipe([{"kind": "prune.structured", "keep": 0.7}, {"kind": "prune.weights", "sparsity": 0.5}])
    model, records = run_recipe(recipe, context(task))
    assert total(model) == pytest.approx(0.5, abs=0.01)
    assert records[1].parameters_after < records[0].parameters_before


def test_structured_pruning_after_it_is_refused():
    with pytest.raises(RecipeError, match=r"prune\.structured.*prune\.weights"):
        Recipe([{"kind": "prune.weights"}, {"kind": "prune.structured"}]).check()


def test_what_it_does_not_cover_is_named():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
            self.proj, self.out = nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.proj(self.lstm(self.embed(x))[0])).flatten(0, 1)

    x = torch.randint(0, 20, (4, 5))
    task = Task(name="mixed", model=Mixed().eval(), test=[(x, x.flatten())], calibrate=[(x, x.flatten())])
    _, record = masked(task, sparsity=0.5)
    reasons = {left.layer: left.reason for left in record.left}
    assert set(record.changed) == {"proj"}
    assert "LSTM" in reasons["lstm"] and "looked up" in reasons["embed"] and "shared with embed" in reasons["out"]


def test_chosen_layers_only():
    model, record = masked(conv_task(), sparsity=0.5, only="hidden,head", skip=["head"])
    assert [name for name, *_ in chains(model)] == ["hidden.weight"]
    assert {"stem", "head"} <= {left.layer for left in record.left}


def test_a_transformer():
    model, _ = masked(transformer_task(), sparsity=0.5)
    assert total(model) == pytest.approx(0.5, abs=0.01)


def test_the_original_stays_plain():
    task = conv_task()
    masked(task, sparsity=0.5)
    assert not any(parametrize.is_parametrized(module) for module in task.original.modules())


@pytest.mark.parametrize("settings", [{"sparsity": 0}, {"sparsity": 1}, {"scope": "net"}, {"min_keep": -1}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"prune\.weights: " + next(iter(settings))):
        step("prune.weights", **settings)
