"""Diagnosis: the damaged layer comes first, single layers are what they say, a collapse is named where it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import conv_task, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight import api
from featherweight.core.context import Context, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import RecipeError
from featherweight.core.outputs import difference
from featherweight.core.recipe import Recipe
from featherweight.core.run import Budget
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.model.parts import Replay, only, parts
from featherweight.model.select import LayerStep
from featherweight.search.diagnose import diagnose, parse_method

LAYERS = {"stem", "conv", "depth", "hidden", "head"}


class Chain(nn.Module):
    """Six linear layers of which one unit each is dead (always 0): N x 16 to N x 10."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(5)])
        self.head = nn.Linear(16, 10)
        with torch.no_grad():
            for layer in [*self.layers, self.head]:
                nn.init.orthogonal_(layer.weight, gain=1.5)
                layer.bias.uniform_(-0.1, 0.1)
            for layer in self.layers:
                layer.weight[3], layer.bias[3] = 0.0, 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


def damaged(seed: int) -> tuple[Task, str]:
    """A task whose labels are the model's own answers, and the layer that is damaged: in half of its rows a huge weight
    reads the dead unit, which changes no output, but leaves no room on the grid of integers for the other weights.
    """
    torch.manual_seed(seed)
    model, place = Chain().eval(), 1 + seed % 5
    layer = [*model.layers, model.head][place]
    with torch.no_grad():
        layer.weight[: len(layer.weight) // 2, 3] = 300.0
        inputs = torch.randn(192, 16)
        data = Arrays(inputs, model(inputs).argmax(-1))
    name = "head" if place == 5 else f"layers.{place}"
    return Task(name="chain", model=model, calibrate=data, validate=data, test=data), name


@pytest.mark.parametrize("kind", ["quantize.static", "quantize.dynamic"])
@pytest.mark.parametrize("seed", range(10))
def test_the_damaged_layer_comes_first(seed: int, kind: str):
    task, name = damaged(seed)
    found = diagnose(task, parse_method(kind), limit=192, bar=5.0)
    assert len(found.layers) == 6 and found.layers[0].layer == name
    assert found.layers[0].drop > 10 > max(price.drop for price in found.layers[1:])
    assert (found.line, found.enough) == (f"skip: [{name}]", True)
    assert found.skipped_drop is not None and found.skipped_drop <= 5 < (found.drop or 0)


@pytest.mark.parametrize("make", [conv_task, transformer_task])
@pytest.mark.parametrize("kind", ["quantize.static", "quantize.dynamic", "prune.weights"])
def test_one_layer_alone_is_the_method_on_that_layer(make: Any, kind: str):
    task = make()
    context = Context(task, device=torch.device("cpu"))
    item = step(kind)
    assert isinstance(item, LayerStep)
    model, record = run_step(item.alone(), task.fresh(), context)
    owned, inputs = parts(model), task.example
    replay = Replay(model, owned)
    assert not difference(task.original(**inputs), replay.start(inputs)), "all off is the original"
    with torch.no_grad():
        assert not difference(model(**inputs), replay.run(list(owned))), "all on is the compressed model"
    if kind == "quantize.dynamic":  # ranges at run time: the same whichever other layers are rounded
        layer = next(iter(owned))
        alone, _ = run_step(step(kind, only=layer), task.fresh(), context)
        with torch.no_grad():
            assert not difference(alone(**inputs), replay.run([layer]))
    assert set(owned) <= set(record.changed)


def test_weights_that_were_dropped_come_from_the_model_before():
    task = transformer_task()
    found = diagnose(task, Recipe([{"kind": "quantize.weights", "bits": 3, "group": 8, "method": "rtn"}]), limit=64)
    assert {"attend.query", "wide", "narrow", "head"} <= {price.layer for price in found.layers}
    context = Context(task, device=torch.device("cpu"))
    alone, _ = run_step(step("quantize.weights", bits=3, group=8, method="rtn", only="wide"), task.fresh(), context)
    with torch.no_grad():
        want, got = task.original(**task.example), alone(**task.example)
    noise = 10 * torch.log10((want**2).sum() / ((want - got) ** 2).sum())
    measured = next(price.signal_db for price in found.layers if price.layer == "wide")
    assert measured == pytest.approx(float(noise), abs=6), "of two inputs, of 64 inputs"


def test_parts_are_on_again_afterwards():
    task = conv_task()
    model, _ = run_step(step("quantize.static"), task.fresh(), Context(task, device=torch.device("cpu")))
    with torch.no_grad():
        before = model(**task.example)
        with only(parts(model), (), model):
            assert not torch.equal(model(**task.example), before)
        assert torch.equal(model(**task.example), before)


def test_a_method_that_reshapes_is_applied_layer_by_layer():
    found = diagnose(conv_task(), Recipe([{"kind": "prune.structured", "keep": 0.7}]), limit=64)
    alone = {price.layer for price in found.layers}
    assert alone and alone <= LAYERS
    assert {left.layer for left in found.left} >= LAYERS - alone


def test_what_is_skipped_is_measured_and_needed():
    task = conv_task()
    strong = Recipe([{"kind": "prune.weights", "sparsity": 0.95, "scope": "layer"}])
    found = diagnose(task, strong, limit=64, bar=5.0)
    assert found.drop is not None and found.drop > 5 and found.skip
    assert found.line == f"skip: [{', '.join(found.skip)}]"
    again = diagnose(task, Recipe([{**strong.dump()["steps"][0], "skip": found.skip}]), limit=64, bar=5.0)
    assert again.drop == pytest.approx(found.skipped_drop)


def test_nothing_is_skipped_where_nothing_is_lost():
    found = diagnose(conv_task(), parse_method("quantize.dynamic"), limit=64, bar=5.0)
    assert found.skip == [] and found.line == "" and found.enough and found.collapse is None


class Fragile(nn.Module):
    """The middle layer gives the same for every input once its many small weights are rounded beside a huge one."""

    def __init__(self, middle: float) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        with torch.no_grad():
            self.middle.weight.mul_(1e-4)
            self.middle.bias.fill_(middle)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x.mean(1)))
        return self.last(self.middle(x) * 1e4)


def test_a_collapse_is_named_with_the_layer_where_it_starts():
    task = replace(transformer_task(), model=Fragile(0.0).eval())
    found = diagnose(task, Recipe([{"kind": "prune.weights", "sparsity": 0.6, "min_keep": 0}]), limit=64)
    assert found.collapse is not None
    assert (found.collapse.how, found.collapse.layer) == ("the same output for every input", "middle")


@pytest.mark.slow
def test_the_search_leaves_out_the_layer_that_no_storage_can_carry(tmp_path: Path):
    task, name = damaged(3)
    run = api.compress(task, out=tmp_path / "run", budget=Budget(objective="size", max_drop=5.0), trials=6).run
    assert run.diagnosis is not None and run.diagnosis.skip == [name]
    repaired = [item for item in run.candidates if item.recipe["steps"][-1].get("skip") == [name]]
    assert repaired and repaired[0].feasible
    assert not any(item.feasible for item in run.candidates if item.number < repaired[0].number)
    assert run.feasible
    assert "Which layers cost most" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_step_without_layers_is_refused():
    with pytest.raises(RecipeError, match=r"finetune does not work layer by layer"):
        diagnose(conv_task(), Recipe([{"kind": "finetune"}]))
