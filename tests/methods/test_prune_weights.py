"""prune.weights: exact sparsity, masks that hold and tighten, schedules, layers that are left alone."""

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
    model, _ = masked(conv_task(), sparsity=0.7, retrain=Training(epochs=1))
    assert total(model) == pytest.approx(0.7, abs=0.01)
    assert {encoding.form for encoding in encodings(model).values()} == {"sparse"}


def test_gradual_sparsity_rises_on_a_cubic_curve_and_ends_where_it_was_asked(monkeypatch: pytest.MonkeyPatch):
    seen: list[float] = []
    prune = WeightPruning._prune

    def watched(self: WeightPruning, model: nn.Module, ctx: Context, held: Any, wanted: dict[str, float]) -> None:
        seen.append(wanted["head"])
        prune(self, model, ctx, held, wanted)

    monkeypatch.setattr(WeightPruning, "_prune", watched)
    model, _ = masked(conv_task(), sparsity=0.8, schedule="gradual", retrain=Training(epochs=2))
    assert seen[0] == 0 and seen[-1] == 0.8 and seen == sorted(seen) and len(seen) > 5
    assert seen[1] < 0.8 < seen[1] * 8
    assert total(model) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("pattern", ["none", "4:8"])
def test_movement_pruning_ends_where_it_was_asked_with_plain_masks(pattern: str):
    settings = {} if pattern != "none" else {"sparsity": 0.7}
    only = "conv,hidden,head" if pattern == "none" else "conv,hidden"
    model, record = masked(
        conv_task(),
        score="movement",
        pattern=pattern,
        schedule="gradual",
        retrain=Training(epochs=2),
        only=only,
        **settings,
    )
    assert total(model) == pytest.approx(settings.get("sparsity", 0.5), abs=0.01)
    assert all([type(link) for link in links] == [Mask] for *_, links in chains(model)) and record.changed


def test_movement_pruning_goes_by_where_weights_move_not_by_how_large_they_are():
    """One step of plain gradient descent: the weights that stay are those with the smallest `w dL/dw`."""
    task = conv_task()
    schedule = Training(epochs=0.2, lr=1e-6, optimizer="sgd", weight_decay=0, warmup=0)  # one batch of 64 of 320
    taught, ctx = task.fresh(), context(task)
    batch = next(iter(ctx.task.batches("train", 64, ctx.generator("fit:prune.weights at rising sparsity"))))
    taught.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.generator("fit:prune.weights at rising sparsity").initial_seed())
        task.loss(task.call(taught, batch), batch).backward()
    head = taught.head  # type: ignore[union-attr]
    value = (head.weight * head.weight.grad).detach()  # type: ignore[union-attr,operator]
    model, _ = masked(
        task, score="movement", scope="layer", schedule="gradual", only="head", sparsity=0.5, retrain=schedule
    )
    (mask,) = next(links for name, _, _, links in chains(model) if name == "head.weight")
    assert value[mask.keep].max() <= value[~mask.keep].min() + 1e-6


def test_rounds_take_the_same_share_each_and_end_where_it_was_asked(monkeypatch: pytest.MonkeyPatch):
    seen: list[float] = []
    fit = Context.fit

    def watched(self: Context, model: nn.Module, *args: Any, **settings: Any) -> float:
        seen.append(total(model))
        return fit(self, model, *args, **settings)

    monkeypatch.setattr(Context, "fit", watched)
    model, _ = masked(conv_task(), sparsity=0.784, schedule="rounds", rounds=3, retrain=Training(epochs=1))
    assert seen == [pytest.approx(1 - 0.6**turn, abs=0.01) for turn in (1, 2, 3)]
    assert total(model) == pytest.approx(0.784, abs=0.01)


def test_the_lottery_ticket_goes_back_to_the_weights_of_an_earlier_point(monkeypatch: pytest.MonkeyPatch):
    starts: list[dict[str, torch.Tensor]] = []
    load = nn.Module.load_state_dict

    def watched(self: nn.Module, state: dict[str, torch.Tensor], **settings: Any) -> Any:
        found = load(self, state, **settings)
        starts.append({name: value.clone() for name, value in self.state_dict().items()})
        return found

    monkeypatch.setattr(nn.Module, "load_state_dict", watched)
    task = conv_task()
    settings: dict[str, Any] = {"schedule": "rounds", "rounds": 2, "sparsity": 0.6, "scope": "layer"}
    model, _ = masked(task, **settings, rewind=0.0, retrain=Training(epochs=1))
    original = task.original.state_dict()
    for state in starts:
        for name, value in state.items():
            plain = name.replace("parametrizations.", "").replace(".original", "")
            assert name.endswith(".keep") or torch.equal(value, original[plain]), name
    first, second = ({n: v for n, v in s.items() if n.endswith(".keep")} for s in starts)
    assert all(not (second[name] & ~first[name]).any() and not second[name].equal(first[name]) for name in first)
    starts.clear()
    masked(task, **settings, rewind=0.5, retrain=Training(epochs=1))
    late = {n: v for n, v in starts[0].items() if n.endswith(".original")}
    assert any(
        not v.equal(original[n.replace("parametrizations.", "").replace(".original", "")]) for n, v in late.items()
    )
    assert all(v.equal(starts[1][n]) for n, v in late.items()), "every round starts from the same point"
    assert total(model) == pytest.approx(0.6, abs=0.01)


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


TRAINED = {"retrain": {"epochs": 1}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pattern": "4:4"}, "keeps everything"),
        ({"pattern": "2:4", "sparsity": 0.7}, "has a sparsity of 0.5; leave sparsity out"),
        ({"pattern": "2:4", "scope": "layer"}, "every group of 4 competes"),
        ({"pattern": "2:4", "allocation": "sensitivity"}, "every group of 4 competes"),
        ({"pattern": "row", "score": "sparsegpt"}, "none makes up for another"),
        ({"pattern": [1, 4], "score": "obs"}, "for blocks use sparsegpt"),
        ({"pattern": "2x4"}, "pattern"),
        ({"score": "wanda", "scope": "global"}, "say nothing across layers"),
        ({"scope": "global", "allocation": "sensitivity"}, "compete within layers"),
        ({"scope": "layer", "min_keep": 0.1}, "min_keep is for what competes across layers"),
        ({"damping": 0.1}, "damping and compensate are settings of obs and sparsegpt"),
        ({"score": "wanda", "compensate": True}, "damping and compensate are settings of obs and sparsegpt"),
        ({"schedule": "gradual"}, "needs a training"),
        ({"schedule": "rounds"}, "needs a training"),
        ({"score": "movement", **TRAINED}, "set schedule: gradual"),
        ({"score": "fisher", "schedule": "gradual", **TRAINED}, "use schedule: rounds"),
        ({"rounds": 5, **TRAINED}, "settings of schedule: rounds"),
        ({"rewind": 0.1, **TRAINED}, "settings of schedule: rounds"),
        ({"rewind": 0.1, "schedule": "rounds", "score": "obs", **TRAINED}, "takes back what obs changes"),
    ],
)
def test_settings_that_do_nothing_together_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(RecipeError, match=words):
        step("prune.weights", **settings)


def test_a_pattern_says_its_own_sparsity():
    item = step("prune.weights", pattern="1:4")
    assert item.sparsity == 0.75 and step(item.kind, **{k: v for k, v in item.dump().items() if k != "kind"}) == item  # type: ignore[attr-defined]
