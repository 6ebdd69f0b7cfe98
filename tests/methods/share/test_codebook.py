"""share.codebook: k-means against plain references; what is stored is what was chosen; pruned weights stay 0."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import conv_task, digits, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, fingerprint, run_recipe, run_step
from featherweight.core.fit import Training
from featherweight.core.recipe import Recipe
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.methods.share.clusters import density_start, error, k_means, linear_start, nearest, plus_plus_start
from featherweight.model.masks import put_mask
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")
SEEDS = st.integers(0, 10_000)


def shared(task: Task, **given):
    return run_step(step("share.codebook", **given), task.fresh(), Context(task, device=CPU))


def points_of(seed: int, count: int = 40, length: int = 1) -> torch.Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=SEEDS, length=st.sampled_from([1, 2, 4]), entries=st.sampled_from([2, 5, 8]))
@settings(max_examples=40, deadline=None)
def test_lloyd_is_the_plain_one_and_never_loses(seed, length, entries):
    points, mass = points_of(seed, length=length), torch.rand(40, dtype=torch.float64) + 0.1
    table = density_start(points, entries, mass)
    found = nearest(points, table)
    distances = ((points[:, None] - table) ** 2).sum(-1)
    assert torch.allclose(distances.gather(1, found[:, None])[:, 0], distances.amin(1))
    means = torch.stack(
        [
            (points[found == entry] * mass[found == entry, None]).sum(0) / mass[found == entry].sum()
            for entry in range(entries)
        ]
    )
    once, _ = k_means(points, table, mass, iterations=1)
    used = torch.bincount(found, minlength=entries) > 0
    assert torch.allclose(once[used], means[used])
    losses = [error(points, *k_means(points, table, mass, iterations=turns), mass) for turns in range(6)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(losses))


def test_every_start_has_as_many_entries_and_finds_plain_clusters():
    centres = torch.tensor([-3.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    points = (centres.repeat(30) + 0.01 * points_of(1, 120)[:, 0])[:, None]
    for table in (
        linear_start(points, 4),
        density_start(points, 4),
        plus_plus_start(points, 4, torch.Generator().manual_seed(0)),
    ):
        found, _ = k_means(points, table)
        assert found.shape == (4, 1) and torch.allclose(found[:, 0].sort().values, centres, atol=0.02)


def test_an_entry_without_points_moves_and_held_entries_stay():
    points = torch.tensor([[0.0], [0.1], [4.0], [9.0]])
    table, indices = k_means(points, torch.tensor([[0.0], [100.0], [200.0]]), held=1)
    assert table[0] == 0 and error(points, table, indices) < 0.1
    assert len(plus_plus_start(torch.ones(5, 1), 3, torch.Generator().manual_seed(0))) == 3


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"bits": 2, "start": "linear", "importance": "none"},
        {"bits": 3, "start": "k-means++"},
        {"scope": "model"},
        {"bits": 8, "length": 2},
        {"bits": 6, "length": 4, "scope": "model"},
    ],
)
def test_it_is_stored_as_chosen_and_saved(given, tmp_path):
    task = conv_task()
    model, record = shared(task, **given)
    found = encodings(model)
    bits, length = given.get("bits", 4), given.get("length", 1)
    assert found and all(each.form == f"codebook{bits}" for each in found.values())
    for name, each in found.items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        assert each.shape == weight.shape and torch.equal(each.decode(), weight)
        assert torch.equal(each.restore(each.parts()), weight)
        assert each.sizes()["indices"] <= weight.numel() * bits / length / 8 + bits
    if given.get("scope") == "model":
        tables = [parameter for name, parameter in model.named_parameters() if name.endswith(".table")]
        assert len(tables) == 1 and len(found) > 1
    save(model, tmp_path / "model")
    assert fingerprint(load(tmp_path / "model", like=task.original)) == fingerprint(model)
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "made")
    assert set(artifact.manifest.stored.values()) >= {f"codebook{bits}"}
    assert len(record.changed) >= len(found)


def test_an_entry_is_trained_by_the_sum_of_the_gradients_of_its_weights():
    torch.manual_seed(0)
    task = Task(name="line", model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), **digits())
    model, _ = shared(task, bits=2, importance="none")
    link = model[1].parametrizations.weight[0]
    x, y = task.test.tensors[0][:50], task.test.tensors[1][:50]
    nn.functional.cross_entropy(model(x), y).backward()
    plain = nn.Linear(64, 10)
    plain.load_state_dict({"weight": model[1].weight.detach(), "bias": model[1].bias.detach()})
    nn.functional.cross_entropy(plain(x.flatten(1)), y).backward()
    wanted = torch.zeros(4).index_add_(0, link.indices.long().flatten(), plain.weight.grad.flatten())
    assert torch.allclose(link.table.grad, wanted, rtol=1e-4, atol=1e-7)


def test_training_moves_the_table_and_lowers_the_loss():
    task = conv_task()
    before, _ = shared(task, bits=1)
    after, record = shared(task, bits=1, retrain=Training(epochs=2, lr=3e-3))
    x, y = task.test.tensors
    with torch.no_grad():
        lost = [float(nn.functional.cross_entropy(model.eval()(x), y)) for model in (before, after)]
    assert lost[1] < 0.9 * lost[0] and "*" in record.changed
    for name, each in encodings(after).items():
        assert len(each.decode().unique()) <= 2, name


def test_pruned_weights_stay_zero_through_sharing_and_training():
    task = conv_task()
    recipe = Recipe([step("prune.weights", sparsity=0.6), step("share.codebook", bits=3, retrain=Training(epochs=1))])
    model, _ = run_recipe(recipe, Context(task, device=CPU))
    pruned, _ = run_recipe(Recipe([step("prune.weights", sparsity=0.6)]), Context(task, device=CPU))
    zero = sum(int((each.decode() == 0).sum()) for each in encodings(pruned).values())
    found = encodings(model)
    kept = sum(int((each.decode() == 0).sum()) for each in found.values())
    assert zero and kept >= zero and all(len(each.decode().unique()) <= 8 for each in found.values())


def test_what_cannot_share_is_named():
    task = transformer_task()
    _, record = shared(task, bits=4, length=16, only="*")
    assert any("does not divide" in str(each) for each in record.left)
    _, record = shared(conv_task(), bits=8)
    assert any("has no more weights than a table" in str(each) for each in record.left)


@pytest.mark.parametrize("start", ["linear", "density", "k-means++"])
def test_a_layer_of_one_value_keeps_it_beside_others(start):
    """A filter that blurs: all of its weights are alike, so they have no spread to be measured by."""
    task = conv_task()
    model = task.fresh()
    with torch.no_grad():
        model.depth.weight.fill_(1 / 9)
    model, _ = run_step(step("share.codebook", scope="model", start=start), model, Context(task, device=CPU))
    assert torch.allclose(model.depth.weight, torch.tensor(1 / 9), rtol=0.2)


def test_a_layer_that_is_pruned_away_is_named():
    task = conv_task()
    model = task.fresh()
    put_mask(model.hidden, torch.zeros(32, 64, dtype=torch.bool))
    model, record = run_step(step("share.codebook"), model, Context(task, device=CPU))
    assert "all of its weights are pruned" in {left.layer: left.reason for left in record.left}["hidden"]
    assert not model.hidden.weight.any() and "conv" in record.changed
