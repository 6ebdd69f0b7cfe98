"""Running a step: what is recorded, and the three things that are never let through."""

import pytest
import torch
from torch import nn

from featherweight.core import registry
from featherweight.core.context import Context, count_parameters, fingerprint, run_recipe, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import NoEffect, NotFinite
from featherweight.core.recipe import Recipe
from featherweight.core.step import Step
from featherweight.core.task import Task


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = Arrays(torch.randn(20, 4), torch.arange(20) % 3)
    return Task(name="plain", model=model.eval(), train=data, test=data, batch_size=8)


@pytest.fixture
def kinds(monkeypatch) -> dict[str, type[Step]]:
    """Steps of these tests, gone again afterwards."""
    registry.load("methods")  # once for the whole process: what it finds must not go with these
    monkeypatch.setattr(Step, "kinds", dict(Step.kinds))

    class Scale(Step, kind="test.scale"):
        """Multiply the first weight."""

        factor: float = 2.0

        def apply(self, model, ctx):
            with torch.no_grad():
                model[0].weight.mul_(self.factor)
            ctx.change("0", "scaled")
            ctx.leave("2", "not the first")
            ctx.warn("only a test")
            return model

    class Noise(Step, kind="test.noise"):
        """Add noise from the global generator."""

        def apply(self, model, ctx):
            with torch.no_grad():
                model[0].weight.add_(torch.randn_like(model[0].weight))
            return model.train()

    return Step.kinds


def context(task: Task, seed: int = 0) -> Context:
    return Context(task, seed=seed, device=torch.device("cpu"))


def test_what_a_step_did_is_recorded(task, kinds):
    model, record = run_step(kinds["test.scale"](factor=3), task.fresh(), context(task))
    assert record.step == {"kind": "test.scale", "factor": 3.0} and record.changed == {"0": "scaled"}
    assert [(left.layer, left.reason) for left in record.left] == [("2", "not the first")]
    assert record.warnings == ["only a test"] and record.seconds > 0
    assert record.parameters_before == record.parameters_after == count_parameters(model) == 67


def test_a_step_that_changes_nothing_is_an_error_with_its_reasons(task, kinds):
    with pytest.raises(NoEffect, match=r"test\.scale changed nothing: 2: not the first; remove it or change"):
        run_step(kinds["test.scale"](factor=1), task.fresh(), context(task))


def test_nan_is_an_error_that_names_the_tensor(task, kinds):
    model = task.fresh()
    with torch.no_grad():
        model[0].weight[0, 0] = 3e38
    with pytest.raises(NotFinite, match=r"after test\.scale the tensor '0\.weight' holds NaN or infinite"):
        run_step(kinds["test.scale"](factor=1e10), model, context(task))


def test_outputs_that_are_not_finite_are_an_error(task, kinds):
    model = task.fresh()
    with torch.no_grad():
        model[0].weight.fill_(1e30)
        model[2].weight.fill_(1e30)
    with pytest.raises(NotFinite, match="the model gives NaN or infinite outputs"):
        run_step(kinds["test.scale"](factor=1e5), model, context(task))


def test_randomness_comes_from_the_seed_alone(task, kinds):
    found = []
    for seed, disturb in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(disturb)
        state = torch.get_rng_state()
        model, _ = run_step(kinds["test.noise"](), task.fresh(), context(task, seed))
        assert torch.equal(torch.get_rng_state(), state) and not model.training
        found.append(fingerprint(model))
    assert found[0] == found[1] != found[2]


def test_a_recipe_runs_on_a_copy_and_gives_a_record_per_step(task, kinds):
    before = fingerprint(task.original)
    model, records = run_recipe(Recipe([kinds["test.scale"](), kinds["test.noise"]()]), context(task))
    assert fingerprint(task.original) == before != fingerprint(model)
    assert [record.step["kind"] for record in records] == ["test.scale", "test.noise"]
    assert records[1].changed == {}


def test_observing_hands_over_inputs_and_outputs_and_leaves_no_hook(task):
    seen: dict[str, list[tuple[int, ...]]] = {"0": [], "2": []}
    model = task.fresh().train()
    context(task).observe(
        model, {name: lambda given, out, name=name: seen[name].append((*given[0].shape, *out.shape)) for name in seen}
    )
    assert seen == {"0": [(8, 4, 8, 8), (8, 4, 8, 8), (4, 4, 4, 8)], "2": [(8, 8, 8, 3), (8, 8, 8, 3), (4, 8, 4, 3)]}
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_observing_stops_at_nan_and_takes_its_hooks_away(task):
    model = task.fresh()
    with torch.no_grad():
        model[2].bias[0] = torch.inf
    with pytest.raises(NotFinite, match="NaN or infinite outputs on the split 'calibrate'"):
        context(task).observe(model, {"0": lambda given, out: None})
    assert not any(module._forward_hooks for module in model.modules())


def test_fingerprints_see_weights_types_and_sizes():
    models = [
        nn.Sequential(nn.Linear(2, 2)),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.LeakyReLU(0.1)),
        nn.Sequential(nn.LeakyReLU(0.2)),
    ]
    assert len({fingerprint(model) for model in models}) == 4
