"""Residual quantization against a slow plain one; sums are stored as chosen, saved, exported and trained."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import conv_task, one_thread, transformer_task  # noqa: F401
from torch import Tensor, nn

from featherweight.core.additive import Additive
from featherweight.core.context import Context, fingerprint, run_recipe, run_step
from featherweight.core.fit import Training
from featherweight.core.recipe import Recipe
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.methods.share.clusters import density_start, k_means
from featherweight.methods.share.residual import assign, find_tables, missed, without
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")
SEEDS = st.integers(0, 10_000)


def points_of(seed: int, count: int = 60, length: int = 2) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start_of(entries: int):
    return lambda points, mass: density_start(points, entries, mass)


@given(seed=SEEDS, books=st.integers(1, 3), length=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_without_sweeps_it_is_k_means_on_what_is_left(seed, books, length):
    points, mass = points_of(seed, length=length), torch.rand(60, dtype=torch.float64) + 0.1
    rest = points.clone()
    tables = find_tables(points, mass, books, start_of(4), 5, sweeps=0)
    for table in tables:
        wanted, indices = k_means(rest, density_start(rest, 4, mass), mass, 5)
        assert torch.equal(wanted, table)
        for place, point in enumerate(rest.clone()):
            rest[place] = point - wanted[indices[place]]


@given(seed=SEEDS, books=st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_a_sweep_never_loses_and_another_book_gains(seed, books):
    points, mass = points_of(seed), torch.rand(60, dtype=torch.float64) + 0.1
    losses = []
    for sweeps in range(4):
        tables = find_tables(points, mass, books, start_of(4), 10, sweeps)
        losses.append(missed(points, tables, assign(points, tables, sweeps), mass))
    assert all(each <= losses[0] + 1e-9 for each in losses)
    tables = find_tables(points, mass, books, start_of(4), 10, 0)
    greedy = [missed(points, tables, assign(points, tables, sweeps), mass) for sweeps in range(3)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(greedy))
    fewer = find_tables(points, mass, books - 1, start_of(4), 10, 0)
    assert greedy[0] < missed(points, fewer, assign(points, fewer, 0), mass)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_each_sweep_takes_the_best_entry_for_what_the_others_leave(seed):
    points, tables = points_of(seed, 12), torch.stack([points_of(seed + each, 3) for each in range(3)])
    wanted = assign(points, tables, 0)
    for book in range(3):
        for place, point in enumerate(points):
            others = sum(tables[other][wanted[other, place]] for other in range(3) if other != book)
            wanted[book, place] = (point - others - tables[book]).square().sum(1).argmin()
    assert torch.equal(assign(points, tables, 1), wanted)
    for book in range(3):
        plain = sum(tables[other][wanted[other]] for other in range(3) if other != book)
        assert torch.allclose(without(tables, wanted, book), plain)


@pytest.mark.parametrize(
    "given", [{"bits": 3}, {"bits": 4, "length": 2, "scope": "model"}, {"bits": 1, "codebooks": 3}]
)
def test_sums_are_stored_as_chosen_saved_and_exported(given, tmp_path):
    task = conv_task()
    item = step("share.codebook", **{"codebooks": 2, **given})
    model, _ = run_step(item, task.fresh(), Context(task, device=CPU))
    found = encodings(model)
    assert found and {each.form for each in found.values()} == item.forms()
    for name, each in found.items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        assert isinstance(each, Additive) and each.shape == weight.shape
        assert torch.equal(each.decode(), weight) and torch.equal(each.restore(each.parts()), weight)
    save(model, tmp_path / "model")
    assert fingerprint(load(tmp_path / "model", like=task.original)) == fingerprint(model)
    for name in ("onnxruntime", "coded"):
        artifact = target(name).export(model, task.example, tmp_path / name)
        assert item.forms() <= set(artifact.manifest.stored.values())


def test_two_books_lose_less_than_one_of_the_same_bits_and_train(tmp_path):
    task = transformer_task()
    ctx = Context(task, device=CPU)

    def error(**given) -> float:
        model, _ = run_step(step("share.codebook", importance="none", **given), task.fresh(), ctx)
        return sum(
            float((each.decode() - task.original.get_parameter(name)).square().sum())
            for name, each in encodings(model).items()
        )

    assert error(bits=3, length=2, codebooks=2) < 0.5 * error(bits=3, length=2)
    item = step("share.codebook", bits=2, length=2, codebooks=2, retrain=Training(epochs=1, lr=3e-3))
    before, _ = run_step(item.model_copy(update={"retrain": None}), task.fresh(), ctx)
    after, _ = run_step(item, task.fresh(), ctx)
    x, y = task.train.tensors
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(model(x), y)) for model in (before, after)]
    assert losses[1] < losses[0]
    for name, each in encodings(after).items():
        assert torch.equal(each.indices, encodings(before)[name].indices)


def test_sums_of_pruned_weights_are_refused_by_name():
    task = conv_task()
    recipe = Recipe([step("prune.weights", sparsity=0.6), step("share.codebook", bits=3, codebooks=2)])
    with pytest.raises(Exception, match="it is pruned, and vectors and sums hold single zeros no longer"):
        run_recipe(recipe, Context(task, device=CPU))
