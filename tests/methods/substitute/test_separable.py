"""Depthwise and pointwise convolutions in place of ordinary ones: the fit, what pays, what is left alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import blocks_task, conv_task, one_thread  # noqa: F401
from torch import nn

from featherweight.core.context import Context, fingerprint, run_step
from featherweight.core.errors import NoEffect, TaskError
from featherweight.core.fit import Training
from featherweight.core.outputs import as_arrays
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.methods.substitute.separable import fitted, output_error, product, separated
from featherweight.model.cost import forward_macs
from featherweight.model.factored import Factored
from featherweight.model.imitation import block_errors, enclosing
from featherweight.model.skeleton import load, save

SEEDS = st.integers(0, 2**16)
CPU = torch.device("cpu")


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(seed: int, size: int) -> torch.Tensor:
    inputs = drawn(seed, 3 * size, size) @ drawn(seed + 1, size, size)
    return inputs.T @ inputs / len(inputs)


@given(seed=SEEDS, inputs=st.integers(1, 4), multiplier=st.integers(1, 4), places=st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_singular_vectors_of_each_input_are_the_nearest(seed, inputs, multiplier, places):
    weight = drawn(seed, 5, inputs, places)
    near = product(*separated(weight, multiplier))
    for place in range(inputs):
        tail = torch.linalg.svdvals(weight[:, place])[multiplier:].square().sum()
        assert torch.allclose((weight[:, place] - near[:, place]).square().sum(), tail, atol=1e-9)


@given(seed=SEEDS, multiplier=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_every_sweep_gains_and_ends_where_neither_part_can_be_better(seed, multiplier):
    weight, moment = drawn(seed, 6, 3, 4), moment_of(seed + 7, 12)
    errors = [output_error(weight, product(*separated(weight, multiplier)), moment)]
    errors += [
        output_error(weight, product(*fitted(weight, moment, multiplier, sweeps)), moment) for sweeps in (0, 1, 4)
    ]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(errors))
    depth, point = (each.clone().requires_grad_() for each in fitted(weight, moment, multiplier, 200))
    missed = (weight - product(depth, point)).flatten(1)
    ((missed @ moment) * missed).sum().div((weight.flatten(1) @ moment * weight.flatten(1)).sum()).backward()
    assert depth.grad.abs().max() < 0.05 and point.grad.abs().max() < 1e-3


def test_the_error_is_that_of_the_outputs():
    weight, near = drawn(0, 4, 2, 3), drawn(1, 4, 2, 3)
    inputs = drawn(2, 100, 6)
    moment = inputs.T @ inputs / 100
    wanted, found = inputs @ weight.flatten(1).T, inputs @ near.flatten(1).T
    expected = float((wanted - found).square().sum() / wanted.square().sum())
    assert output_error(weight, near, moment) == pytest.approx(expected)


def made(**given):
    task = conv_task()
    return run_step(step("substitute.separable", **given), task.fresh(), Context(task, device=CPU))


@pytest.mark.parametrize("multiplier", [1, 2])
def test_layers_are_replaced_saved_exported_and_trained(multiplier, tmp_path):
    task = conv_task()
    model, record = made(multiplier=multiplier)
    assert set(record.changed) == {"stem", "conv"} and isinstance(model.conv, Factored)
    assert model.conv[0].groups == 16 and model.conv[0].weight.shape == (16 * multiplier, 1, 3, 3)
    reasons = {each.layer: each.reason for each in record.left}
    assert reasons["depth"] == "has groups of channels already"
    assert {"hidden", "head", "stem_norm", "conv_norm"} <= reasons.keys()
    save(model, tmp_path / "model")
    assert fingerprint(load(tmp_path / "model", like=task.original)) == fingerprint(model)
    images, labels = task.test.tensors
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "artifact")
    with torch.no_grad():
        assert abs(artifact.open()(images) - as_arrays(model(images))).max() < 1e-3
    healed, _ = made(multiplier=multiplier, retrain=Training(epochs=6, lr=1e-2, teacher=0.5))
    with torch.no_grad():
        right = [float((each(images).argmax(1) == labels).float().mean()) for each in (model, healed)]
    assert right[1] > right[0] + 0.2


def test_the_fit_to_inputs_beats_the_weight_alone():
    task = conv_task()
    model, _ = made(only="conv")
    seen = []
    Context(task, device=CPU).observe(task.original, {"conv": lambda given, out: seen.append((given[0], out))})
    layer = task.original.conv
    depth, point = separated(layer.weight.detach().flatten(2), 1)
    near = product(depth, point).reshape(layer.weight.shape).float()

    def missed(outputs) -> float:
        return sum(float((found - wanted[1]).square().sum()) for found, wanted in zip(outputs, seen))

    with torch.no_grad():
        fit = missed([model.conv(x) for x, _ in seen])
        plain = missed([torch.nn.functional.conv2d(x, near, layer.bias, padding=1) for x, _ in seen])
    assert fit < 0.8 * plain


class Clock:
    """A stopwatch that takes a list of answers."""

    name = "a clock"

    def __init__(self, *seconds: float):
        self.seconds = list(seconds)

    def __call__(self, models):
        assert len(models) == len(self.seconds)
        return self.seconds


def test_only_what_is_faster_on_the_target_is_replaced():
    task = conv_task()
    with pytest.raises(NoEffect, match="computes no more than a depthwise and a pointwise one with multiplier=8"):
        run_step(step("substitute.separable", only="conv", multiplier=8), task.fresh(), Context(task, device=CPU))
    item = step("substitute.separable", of="latency", multiplier=2)
    with pytest.raises(TaskError, match="measured on the target"):
        run_step(item, task.fresh(), Context(task, device=CPU))
    with pytest.raises(NoEffect, match=r"the model takes 1\.100 of its time with this layer replaced: no gain"):
        run_step(item, task.fresh(), Context(task, device=CPU, stopwatch=Clock(1.0, 1.1, 1.1)))
    _, record = run_step(item, task.fresh(), Context(task, device=CPU, stopwatch=Clock(1.0, 0.8, 1.1)))
    assert set(record.changed) == {"conv"}


def test_within_a_budget_the_error_is_the_least_that_any_choice_has():
    task = conv_task()
    whole = forward_macs(task.original, task.example)
    losses = {}
    for one, other in itertools.product((0, 1, 2), repeat=2):
        chosen = {"stem": one, "conv": other}
        model, total = task.fresh(), 0.0
        for name, multiplier in chosen.items():
            if multiplier:
                model, record = run_step(
                    step("substitute.separable", only=name, multiplier=multiplier), model, Context(task, device=CPU)
                )
                total += float(record.changed[name].split(", ")[-1].split("%")[0]) / 100
        losses[one, other] = (forward_macs(model, task.example) / whole, total)
    keep = 0.45
    best = min(loss for share, loss in losses.values() if share <= keep)
    model, record = made(keep=keep, multiplier=2)
    found = sum(float(how.split(", ")[-1].split("%")[0]) / 100 for how in record.changed.values())
    assert forward_macs(model, task.example) <= keep * whole
    assert found <= best + 0.02  # the first layer, replaced or not, changes what the second one sees
    with pytest.raises(TaskError, match=r"keep=0\.01 of the multiply-accumulates cannot be reached: at least 0\."):
        made(keep=0.01)


def test_a_batch_norm_between_the_two_changes_nothing():
    task = conv_task()
    plain, _ = made(only="conv", recalibrate=False)
    normal, _ = made(only="conv", recalibrate=False, normalize=True)
    norm = normal.conv[1]
    assert isinstance(norm, torch.nn.BatchNorm2d) and not norm.running_mean.any() and norm.weight.eq(1).all()
    images = task.calibrate.tensors[0]
    seen = []
    with torch.no_grad():
        assert torch.allclose(plain(images), normal(images), atol=1e-4)
        norm.register_forward_hook(lambda _m, given, out: seen.append(given[0]))
        normal(images)
    energy = torch.cat([each.movedim(1, 0).flatten(1) for each in seen], 1).square().mean(1)
    assert torch.allclose(energy, norm.running_var, rtol=1e-3, atol=1e-6)


def test_layers_that_save_too_little_or_miss_too_much_stay():
    with pytest.raises(NoEffect, match="a gain below"):
        made(min_gain=0.9)
    _, record = made()
    missed = {name: float(how.split(", ")[-1].split("%")[0]) / 100 for name, how in record.changed.items()}
    worst = max(missed, key=missed.__getitem__)
    _, record = made(max_error=(missed["stem"] + missed["conv"]) / 2)
    assert set(record.changed) == {"stem", "conv"} - {worst}
    assert any("of the energy of its outputs would be missed" in each.reason for each in record.left)


def test_blocks_are_taught_each_for_itself_and_bad_ones_are_put_back():
    task = blocks_task()
    ctx = Context(task, device=CPU)
    base = {"only": "rows.*,turned.*"}
    plain, _ = run_step(step("substitute.separable", **base), task.fresh(), ctx)
    imitate = {"epochs": 8, "lr": 3e-3}
    taught, record = run_step(step("substitute.separable", imitate=imitate, **base), task.fresh(), ctx)
    names = [f"rows.{place}" for place in range(4)] + ["turned.0"]
    assert set(enclosing(task.original, record.changed).values()) == set(names)
    before, after = (block_errors(each, task.original, names, ctx) for each in (plain, taught))
    assert all(after[name] < before[name] for name in names)
    limit = sorted(after.values())[2]
    item = step("substitute.separable", imitate=imitate, max_error=limit, **base)
    some, record = run_step(item, task.fresh(), ctx)
    kept = {name for name in names if isinstance(some.get_submodule(name).a, Factored)}
    assert kept == {name for name in names if after[name] <= limit}
    put_back = {each.layer.rpartition(".")[0] for each in record.left if each.reason.startswith("put back")}
    assert put_back == set(names) - kept and item.training


class Twice(nn.Module):
    """One convolution under two names: N x 1 x 8 x 8 to N x 10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        self.again = self.conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(torch.relu(self.conv(torch.relu(self.stem(x))))).mean((2, 3)))


def test_a_layer_under_two_names_is_replaced_under_both():
    torch.manual_seed(0)
    splits = {name: getattr(conv_task(), name) for name in ("train", "calibrate", "validate", "test")}
    task = Task(name="twice", model=Twice().eval(), **splits)
    model, record = run_step(step("substitute.separable", min_gain=0), task.fresh(), Context(task, device=CPU))
    assert isinstance(model.conv, Factored) and model.again is model.conv and set(record.changed) == {"conv"}
    assert record.parameters_after < record.parameters_before
