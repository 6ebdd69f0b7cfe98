"""share.layers: layouts against plain references; one copy is stored, exported and trained."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import blocks_task, one_thread  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize

from featherweight.core.context import Context, count_parameters, fingerprint, run_step
from featherweight.core.errors import NoEffect
from featherweight.core.fit import Training
from featherweight.core.soft import Mask
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.methods.share.layouts import cycle, sequence, similar
from featherweight.model.coded import Reader
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")


def shared(task: Task, model: nn.Module | None = None, **given):
    model = task.fresh() if model is None else model
    return run_step(step("share.layers", **given), model, Context(task, device=CPU))


@given(count=st.integers(1, 20), sets=st.integers(1, 20))
def test_layouts_use_every_set_evenly(count, sets):
    sets = min(sets, count)
    for layout in (sequence(count, sets), cycle(count, sets)):
        sizes = [layout.count(each) for each in range(sets)]
        assert len(layout) == count and sum(sizes) == count and max(sizes) - min(sizes) <= 1
    assert sequence(count, sets) == sorted(sequence(count, sets))
    assert all((one + 1) % sets == other for one, other in itertools.pairwise(cycle(count, sets)))


def by_hand(vectors: list[torch.Tensor], sets: int) -> list[int]:
    """Ward's method as he wrote it: always the two groups whose union has the least more squares about its mean."""
    groups = [[place] for place in range(len(vectors))]

    def squares(group: list[int]) -> float:
        rows = torch.stack([vectors[place] for place in group]).double()
        return float((rows - rows.mean(0)).square().sum())

    while len(groups) > sets:
        pairs = itertools.combinations(range(len(groups)), 2)
        one, other = min(
            pairs, key=lambda p: squares(groups[p[0]] + groups[p[1]]) - sum(map(squares, (groups[p[0]], groups[p[1]])))
        )
        groups[one] += groups.pop(other)
    groups = sorted(sorted(group) for group in groups)
    return [next(number for number, group in enumerate(groups) if place in group) for place in range(len(vectors))]


@given(seed=st.integers(0, 10_000), count=st.integers(1, 8), sets=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_similar_layers_are_those_that_ward_joins(seed, count, sets):
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(5, generator=generator) for _ in range(count)]
    assert similar(vectors, sets) == by_hand(vectors, sets)


@pytest.mark.parametrize("name", ["onnxruntime", "coded"])
def test_one_copy_is_saved_and_exported(name, tmp_path):
    task = blocks_task()
    model, record = shared(task, keep=0.2)
    rows = model.rows
    assert all(row.a.weight is rows[0].a.weight and row.norm.bias is rows[0].norm.bias for row in rows)
    assert rows[0] is not rows[1] and {"rows.0.a", "rows.3.b"} <= record.changed.keys()
    whole, one = count_parameters(task.original), sum(p.numel() for p in task.original.rows[0].parameters())
    assert count_parameters(model) == whole - 3 * one
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", like=task.original)
    assert fingerprint(again) == fingerprint(model) and again.rows[1].b.weight is again.rows[3].b.weight
    sizes = [
        target(name).export(each, task.example, tmp_path / f"{each is model}").bytes()
        for each in (task.original, model)
    ]
    assert sizes[0] - sizes[1] > 0.6 * 3 * 4 * one
    if name == "coded":
        held = dict(Reader(tmp_path / "True" / "model.fwc").tensors())
        assert sum(tuple(each.shape) == (8, 8, 3, 3) for each in held.values()) == 2


def test_training_heals_and_keeps_the_sharing():
    task = blocks_task()
    broken, _ = shared(task, keep=0.2)
    model, record = shared(task, keep=0.2, retrain=Training(epochs=4, lr=3e-3))
    assert all(row.a.weight is model.rows[0].a.weight for row in model.rows) and "*" in record.changed
    x, y = task.train.tensors
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(each(x), y)) for each in (broken, model)]
    assert losses[1] < 0.8 * losses[0]


def test_means_firsts_and_vectors_of_their_own():
    task = blocks_task()
    theirs = [row.a.weight.detach() for row in task.original.rows]
    mean, _ = shared(task)
    assert torch.allclose(mean.rows[1].a.weight, torch.stack(theirs[:2]).mean(0), atol=1e-7)
    assert mean.rows[2].a.weight is mean.rows[3].a.weight and mean.rows[1].a.weight is not mean.rows[2].a.weight
    first, _ = shared(task, start="first", layout="cycle")
    assert torch.equal(first.rows[3].a.weight, theirs[1]) and first.rows[0].a.weight is first.rows[2].a.weight
    own, _ = shared(task, keep=0.2, share="matrices")
    assert own.rows[0].b.weight is own.rows[3].b.weight and own.rows[0].b.bias is not own.rows[3].b.bias


def test_what_is_shared_can_be_shared_further():
    task = blocks_task()
    once, _ = shared(task, layout="cycle", keep=0.7)  # 0 1 2 0
    own = [once.rows[place].b.weight.detach().clone() for place in (0, 1, 2)]
    again, _ = shared(task, once, layout="sequence")  # 0 0 1 1
    assert torch.allclose(again.rows[0].b.weight, (own[0] + own[1]) / 2, atol=1e-7)
    assert torch.allclose(again.rows[3].b.weight, (own[2] + own[0]) / 2, atol=1e-7)
    assert again.rows[0].b.weight is again.rows[1].b.weight is not again.rows[2].b.weight
    with pytest.raises(NoEffect, match=r"2 different layers in its row that are alike; keep=0\.5 asks for no fewer"):
        shared(task, again)
    one, _ = shared(task, again, keep=0.2)
    assert len({id(row.b.weight) for row in one.rows}) == 1


def test_what_cannot_share_is_named():
    task = blocks_task()
    _, record = shared(task)
    reasons = {each.layer: each.reason for each in record.left}
    assert reasons["turned.0.a"] == "1 different layers in its row that are alike; keep=0.5 asks for no fewer"
    assert reasons["head"] == "no other layer of a row is like it"
    masked = task.fresh()
    parametrize.register_parametrization(masked.rows[1].a, "weight", Mask(torch.ones(8, 8, 3, 3)))
    model, record = shared(task, masked, keep=0.2)
    assert "stored in another form already" in str([each for each in record.left if each.layer == "rows.1.a"])
    assert model.rows[0].a.weight is model.rows[3].a.weight
    assert "rows.1.a" not in record.changed and "rows.3.a" in record.changed
    tied = task.fresh()
    tied.stem.bias = tied.rows[0].b.bias
    with pytest.raises(NoEffect, match="those of layers elsewhere"):
        shared(task, tied)


def test_what_a_layer_holds_under_two_names_stays_one():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(torch.relu(self.a(x)))

    x = torch.randn(8, 6)
    net = nn.Sequential(nn.Sequential(*(Tied() for _ in range(4))), nn.Linear(6, 2))
    task = Task(name="tied", model=net, calibrate=[(x,)])
    model, _ = shared(task)
    weights = [weight for layer in model[0] for weight in (layer.a.weight, layer.b.weight)]
    assert len({id(weight) for weight in weights}) == 2
    theirs = [layer.a.weight.detach() for layer in task.original[0]]
    assert torch.allclose(model[0][0].b.weight, (theirs[0] + theirs[1]) / 2, atol=1e-7)
