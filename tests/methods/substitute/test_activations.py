"""Cheaper activations: found in modules and in graphs, kept where the outputs stay and where it pays."""

import pytest
import torch
from small_tasks import conv_task, one_thread  # noqa: F401
from torch import fx, nn

from featherweight.core.context import Context, fingerprint, run_step
from featherweight.core.errors import NoEffect, RecipeError
from featherweight.core.fit import Training
from featherweight.core.recipe import Recipe
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.methods.substitute.activations import CheaperActivations
from featherweight.model.activations import CHEAPER, FUNCTIONS, MODULES, NODES, TYPES, module_sites
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")


class Quick(nn.Module):
    """GELU by a sigmoid, as some networks have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Modules(nn.Module):
    """The digits by two hidden layers with activations that are modules: N x 1 x 8 x 8 to N x 10."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        self.smooth, self.own = nn.SiLU(), Quick()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.own(self.narrow(self.smooth(self.wide(x.flatten(1))))))


def modules_task(kind: type[nn.Module] = Modules) -> Task:
    torch.manual_seed(0)
    base, model = conv_task(), kind()
    splits = {name: getattr(base, name) for name in ("train", "calibrate", "validate", "test")}
    task = Task(name="modules", model=model, batch_size=64, **splits)
    Context(task, device=CPU).fit(model, Training(epochs=8, lr=1e-2))
    return Task(name="modules", model=model.eval(), batch_size=64, **splits)


def run(task: Task, stopwatch=None, **given):
    return run_step(
        step("substitute.activations", **given), task.fresh(), Context(task, device=CPU, stopwatch=stopwatch)
    )


def test_every_activation_has_a_cheaper_form_in_modules_and_in_graphs():
    assert set(TYPES.values()) <= set(FUNCTIONS) == set(CHEAPER)
    x = torch.linspace(-4, 4, 33)
    for cheap in {each for options in CHEAPER.values() for each in options}:
        target, named = NODES[cheap]
        assert torch.allclose(MODULES[cheap]()(x), target(x, **named))


def test_modules_are_found_by_type_and_by_what_they_compute():
    task = modules_task()
    kinds = {site.name: site.kind for site in module_sites(task.fresh(), task.example)}
    assert kinds == {"smooth": "silu", "own": "quick_gelu"}
    model, record = run(task, max_change=0.5)
    assert set(record.changed) == {"smooth", "own"} and isinstance(model.own, nn.ReLU | nn.Hardswish)
    assert {each.layer for each in record.left} == {"wide", "narrow", "head"}


def test_the_cheapest_that_changes_little_enough_is_taken():
    task = modules_task()
    images = task.calibrate.tensors[0]
    with torch.no_grad():
        wanted = task.original(images)

    def change(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(images) - wanted).square().sum() / wanted.square().sum())

    hard = change(run(task, to="hardswish", max_change=1.0)[0])
    flat = change(run(task, to="relu", max_change=1.0)[0])
    assert hard < flat
    between = (hard * 1.05 + flat) / 2
    model, record = run(task, max_change=between)
    assert change(model) <= between and {type(model.smooth), type(model.own)} & {nn.Hardswish, nn.ReLU}
    assert all("of the energy of the outputs" in how for how in record.changed.values())
    with pytest.raises(NoEffect, match=r"would change .* of the energy of the outputs \(max_change=1e-06\)"):
        run(task, max_change=1e-6)


class Functions(Modules):
    """The same with activations that are called as functions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.wide(x.flatten(1)))
        return self.head(nn.functional.gelu(self.narrow(x)) * torch.sigmoid(x))


def test_functions_are_exchanged_in_the_graph_and_named_by_who_calls_them(tmp_path):
    task = modules_task(Functions)
    with pytest.raises(NoEffect, match="called as functions are found with functions: true"):
        run(task)
    before = fingerprint(task.original)
    model, record = run(task, functions=True, max_change=0.9)
    assert isinstance(model, fx.GraphModule) and set(record.changed) == {"silu", "gelu", "sigmoid"}
    assert "sigmoid to hardsigmoid" in record.changed["sigmoid"]
    calls = {node.target for node in model.graph.nodes if node.op == "call_function"}
    assert torch.ops.aten.hardsigmoid.default in calls and torch.ops.aten.silu.default not in calls
    assert set(dict(model.named_parameters())) == set(dict(task.original.named_parameters()))
    assert fingerprint(task.original) == before
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "artifact")
    images = task.test.tensors[0]
    with torch.no_grad():
        assert abs(artifact.open()(images) - model(images).numpy()).max() < 1e-3
    save(model, tmp_path / "model")
    assert fingerprint(load(tmp_path / "model", like=task.original)) == fingerprint(model)
    _, record = run(task, functions=True, max_change=0.9, skip=["gelu"], only="gelu,silu")
    assert set(record.changed) == {"silu"} and {"gelu", "sigmoid"} <= {each.layer for each in record.left}


def test_softmax_stays_and_what_is_as_cheap_is_said():
    with pytest.raises(NoEffect, match="silu is no dearer than to='gelu_tanh'"):
        run(modules_task(), to="gelu_tanh")


class Clock:
    """A stopwatch that takes a list of answers."""

    name = "a clock"

    def __init__(self, *seconds: float):
        self.seconds = list(seconds)

    def __call__(self, models):
        assert len(models) == len(self.seconds)
        return self.seconds


def test_only_what_is_faster_on_the_target_is_taken():
    task = modules_task()
    # the model; silu as relu, as hard swish; quick gelu as relu, as hard swish
    clock = Clock(1.0, 1.1, 0.9, 1.1, 1.2)
    model, record = run(task, clock, of="latency", max_change=1.0)
    assert isinstance(model.smooth, nn.Hardswish) and set(record.changed) == {"smooth"}
    (reason,) = (each.reason for each in record.left if each.layer == "own")
    assert reason == "quick_gelu stays, of the model's time relu saves -10.0%, hardswish saves -20.0%"


def test_only_a_captured_graph_ends_what_is_possible():
    plain, graph = CheaperActivations(), CheaperActivations(functions=True)
    Recipe([plain, step("prune.structured")]).check()
    with pytest.raises(RecipeError, match=r"put prune\.structured before it"):
        Recipe([graph, step("prune.structured")]).check()
