"""quantize.entropy: the price of a bit against its definition and the coder; zeros, grids and files that follow."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import accuracy, conv_task, one_thread, transformer_task  # noqa: F401
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.core.coding.arrays import code_integers
from featherweight.core.context import Context, run_recipe, run_step
from featherweight.core.errors import NoEffect, TaskError
from featherweight.core.recipe import Recipe
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.methods.quantize.description import BEFORE, expected, length, price, total
from featherweight.methods.quantize.entropy import Grid, Priced
from featherweight.methods.quantize.ratedistortion import on_grid, to_digits

CPU = torch.device("cpu")
MEANS = st.floats(0.01, 20)


def made(task: Task, **given):
    return run_step(
        step("quantize.entropy", **{"epochs": 2, "lr": 3e-3, **given}), task.fresh(), Context(task, device=CPU)
    )


def zeros(model: nn.Module) -> float:
    found = [each.decode() == 0 for each in encodings(model).values()]
    return sum(int(each.sum()) for each in found) / sum(each.numel() for each in found)


@given(MEANS)
@settings(max_examples=50, deadline=None)
def test_lengths_are_those_of_a_distribution_of_that_mean(mean):
    magnitudes = torch.arange(0, 4000, dtype=torch.float64)
    chances = torch.exp2(-length(magnitudes, torch.tensor(mean, dtype=torch.float64)))
    both = torch.where(magnitudes == 0, 1.0, 2.0)
    assert float((both * chances).sum()) == pytest.approx(1, abs=1e-6)
    assert float((both * chances * magnitudes).sum()) == pytest.approx(mean, rel=1e-5)


@given(MEANS)
@settings(max_examples=30, deadline=None)
def test_one_more_costs_its_price_and_the_mean_is_the_best_to_know(mean):
    known = torch.tensor(mean, dtype=torch.float64)
    two, three = length(torch.tensor([2.0, 3.0], dtype=torch.float64), known)
    assert float(three - two) == pytest.approx(float(price(known)))
    t = (math.sqrt(1 + mean**2) - 1) / mean
    assert float(price(known)) == pytest.approx(-math.log2(t), rel=1e-9)
    # the most likely mean: the length does not change with it, which is why it may be held while magnitudes move
    moved = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
    length(known, moved).backward()
    assert float(moved.grad) == pytest.approx(0, abs=1e-9)


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_what_is_expected_is_row_times_column_over_all(seed, rows, columns):
    magnitudes = torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)).double()
    mean = max(float(magnitudes.mean()), 1e-6)
    for r in range(rows):
        for c in range(columns):
            row = (sum(float(magnitudes[r, j]) for j in range(columns)) + BEFORE * mean) / (columns + BEFORE)
            column = (sum(float(magnitudes[i, c]) for i in range(rows)) + BEFORE * mean) / (rows + BEFORE)
            assert float(expected(magnitudes)[r, c]) == pytest.approx(row * column / mean, rel=1e-6)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_the_bits_are_about_those_that_the_coder_takes(density):
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(200, 1, generator=generator).square() * torch.rand(1, 300, generator=generator).square() * 9
    kept = torch.rand(200, 300, generator=generator) < density * size
    integers = torch.where(kept, torch.randn(200, 300, generator=generator).mul(2).round(), 0.0)
    coded = code_integers(integers.long().numpy())
    assert 8 * len(coded.data) == pytest.approx(total(integers), rel=0.15)


def test_the_term_is_the_bits_at_their_prices():
    task = conv_task()
    model = task.fresh()
    grid = Grid("hidden", model.hidden, coarse=1.0)
    grid.appraise()
    weight, scale = grid.value().detach(), float(grid.link.scale)
    wanted = (weight.abs() / scale * price(expected(grid.integers().abs().float()))).sum()
    assert float(grid.bits()) == pytest.approx(float(wanted), rel=1e-5)
    priced = Priced([grid], weight=0.5, ramp=0.4)
    for t, share in ((0.0, 0.0), (0.2, 0.5), (0.4, 1.0), (1.0, 1.0)):
        priced.rise(model, t)
        assert float(priced()) == pytest.approx(0.5 * share * float(wanted), rel=1e-5)


def test_a_higher_price_makes_more_zeros_and_a_smaller_file(tmp_path: Path):
    task = conv_task()
    sizes, shares = [], []
    for rate in (0.01, 0.3, 3.0):
        model, record = made(task, rate=rate, epochs=8)
        artifact = target("coded").export(model, task.example, tmp_path / str(rate))
        sizes.append(artifact.bytes())
        shares.append(zeros(model))
        assert set(artifact.manifest.stored.values()) >= {"int8"} and "zeros" in record.changed["conv"]
    assert sizes == sorted(sizes, reverse=True) and shares == sorted(shares) and shares[-1] > shares[0] + 0.1


def test_weights_lie_on_one_grid_each_and_vectors_on_a_coarse_one():
    task = transformer_task()
    model, _ = made(task, digits=4)
    for name, each in encodings(model).items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        assert each.form == "int8" and each.scale.dim() == 0 and torch.equal(each.decode(), weight)
    bias: Tensor = model.head.bias.detach()
    step_size = 2.0 ** (math.floor(math.log2(float(bias.square().mean().sqrt()))) - 4)
    assert float((bias / step_size - (bias / step_size).round()).abs().max()) < 0.02
    assert accuracy(task, model) > 0.5 * accuracy(task, task.original)


def test_pruned_weights_stay_zero():
    task = conv_task()
    ctx = Context(task, device=CPU)
    steps = [step("prune.weights", sparsity=0.7), step("quantize.entropy", epochs=1, lr=3e-3, rate=0.01)]
    pruned, _ = run_recipe(Recipe(steps[:1]), ctx)
    model, _ = run_recipe(Recipe(steps), ctx)
    before, after = encodings(pruned), encodings(model)
    assert all(bool((after[name].decode()[~each.keep] == 0).all()) for name, each in before.items())


def test_what_cannot_be_priced_is_named():
    task = conv_task()
    tied = task.fresh()
    tied.conv.weight = tied.stem.weight = nn.Parameter(torch.randn(16, 16, 3, 3))
    found = step("quantize.entropy")._choose(tied, Context(task, device=CPU))  # such a network does not run
    assert [name for name, _ in found] == ["depth", "hidden", "head"]
    stored, _ = run_step(step("quantize.weights", method="rtn"), task.fresh(), Context(task, device=CPU))
    with pytest.raises(NoEffect, match="its weight is already stored as"):
        run_step(step("quantize.entropy", epochs=1), stored, Context(task, device=CPU))
    untrained = Task(name="t", model=task.original, calibrate=task.calibrate, test=task.test)
    with pytest.raises(TaskError, match="has no 'train' data"):
        run_step(step("quantize.entropy"), untrained.fresh(), Context(untrained, device=CPU))


def test_settling_keeps_every_integer():
    layer = nn.Linear(40, 30)
    grid = Grid("layer", layer, coarse=0.5)
    with torch.no_grad():
        grid.chain.original.copy_((torch.randint(-5, 5, (30, 40)) + 0.5) * grid.link.scale)
    before = grid.integers()
    assert "bits per weight" in grid.settle()
    links = layer.parametrizations["weight"]
    assert torch.equal(links[-1].encode(links.original).values, before) and parametrize.is_parametrized(layer)


def test_floats_beside_the_weights_take_few_digits_and_what_is_skipped_stays(tmp_path: Path):
    task = conv_task()
    model, record = made(task, epochs=0.02, lr=1e-9, digits=5, skip=("hidden", "stem_norm"))
    for name in ("hidden", "stem_norm"):
        before, after = task.original.get_submodule(name), model.get_submodule(name)
        assert torch.allclose(after.weight, before.weight, rtol=1e-6) and not torch.equal(
            on_grid(after.weight, 5), after.weight
        )
        assert "excluded by skip" in {left.layer: left.reason for left in record.left}[name]
    norm, kept = model.conv_norm, model.stem_norm
    deviation = (norm.running_var + norm.eps).sqrt()
    assert torch.equal(to_digits(norm.running_mean, deviation, 5), norm.running_mean)
    assert torch.equal(to_digits(norm.running_var, norm.running_var, 5), norm.running_var)
    assert not torch.equal(to_digits(kept.running_var, kept.running_var, 5), kept.running_var)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), st.integers(2, 12))
@settings(max_examples=50, deadline=None)
def test_each_float_has_as_many_digits_as_asked(values, digits):
    given_values = torch.tensor(values, dtype=torch.float64)
    found = to_digits(given_values, given_values, digits)
    assert float(((found - given_values) / given_values).abs().max()) <= 2.0 ** -(digits + 1)
    wholes = found / torch.exp2(given_values.log2().floor() - digits)
    assert torch.equal(wholes, wholes.round())
    zero = torch.zeros(1)
    assert torch.equal(to_digits(zero, zero, digits), zero)
