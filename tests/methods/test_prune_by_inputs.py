"""prune.weights in patterns, by inputs and by gradients, on small trained networks; what is stored, what is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import accuracy, conv_task, digits, one_thread, transformer_task  # noqa: F401
from torch import Tensor, nn

from featherweight.core.context import Context, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import NoEffect, NotFinite
from featherweight.core.evaluate import calibration_loss
from featherweight.core.soft import encodings, fold
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.methods.prune.allocation import allocate, interpolated, levels
from featherweight.methods.prune.weights import WeightPruning
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")
SCORES = ["magnitude", "taylor", "fisher", "wanda", "activation", "obs", "sparsegpt"]


def pruned(task: Task, **settings: Any) -> Any:
    return run_step(WeightPruning(**settings), task.fresh(), Context(task, device=CPU))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every pruned weight as it is stored."""
    return {name: encoding.decode() for name, encoding in encodings(model).items()}


def share_of_zeros(model: nn.Module) -> float:
    """Among all weights of linear layers, those in which none went included."""
    plain = fold(model)
    found = [module.weight for module in plain.modules() if isinstance(module, nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in found) / sum(weight.numel() for weight in found)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_reaches_the_sparsity_and_beats_chance(score: str):
    task = transformer_task()
    model, record = pruned(task, score=score, sparsity=0.6)
    assert share_of_zeros(model) == pytest.approx(0.6, abs=0.02)
    assert set(record.changed) == {name.removesuffix(".weight") for name in weights(model)}
    generator = torch.Generator().manual_seed(0)
    chance = task.fresh()
    for name in weights(model):
        weight = chance.get_parameter(name)
        weight.data *= torch.rand(weight.shape, generator=generator) > 0.6
    ctx = Context(task, device=CPU)
    assert calibration_loss(model, ctx) < 0.8 * calibration_loss(chance, ctx)


@pytest.mark.parametrize("score", SCORES)
def test_two_of_four_lie_where_the_channels_lie(score: str):
    """In every score, in linear layers and along the input channels of convolutions; the first has one channel."""
    model, record = pruned(conv_task(), score=score, pattern="2:4", only="stem,conv,hidden")
    for name, weight in weights(model).items():
        rows = weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)
        groups = (rows != 0).reshape(len(rows), -1, 4).sum(2)
        assert (groups <= 2).all() and groups.float().mean() > 1.9, name
    assert set(record.changed) == {"conv", "hidden"}
    assert ("stem", "its rows of 9 weights are no groups of 4") in {(each.layer, each.reason) for each in record.left}


def channels(count: int) -> Task:
    """A network of digits on `count` channels: a 2 x 2 convolution, one of single channels, one of groups of four."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, count, 1),
        nn.Conv2d(count, 8, 2),
        nn.Conv2d(8, 8, 4, groups=8),
        nn.Conv2d(8, 10, 2, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Task(name="channels", model=model.eval(), batch_size=32, **digits())


def test_groups_never_reach_from_one_place_of_the_kernel_to_the_next():
    """24 weights of 6 channels and 16 of one channel divide by four, but not into four channels at one place."""
    _, record = pruned(channels(6), pattern="2:4", skip=("0",))
    left = {each.layer: each.reason for each in record.left}
    assert left["1"] == "its 6 inputs at a place of the kernel are no groups of 4"
    assert left["2"] == "its 1 inputs at a place of the kernel are no groups of 4"
    model, record = pruned(channels(8), pattern="2:4")
    assert set(record.changed) == {"1", "3"}
    for weight in weights(model).values():
        assert ((weight != 0).unfold(1, 4, 4).sum(-1) <= 2).all()


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_blocks_never_reach_from_one_group_of_channels_to_the_next(score: str):
    """8 rows of one channel each, and 10 of two groups, divide by two and by five, but two rows of one group do not."""
    _, record = pruned(channels(6), pattern=(2, 1), score=score, scope="layer", skip=("0",))
    assert set(record.changed) == {"1"}
    left = {each.layer: each.reason for each in record.left}
    assert left["2"] == "its 1 x 16 weights are no blocks of 2 x 1"
    assert left["3"] == "its 5 x 16 weights are no blocks of 2 x 1"
    _, record = pruned(channels(6), pattern=(5, 4), score=score, scope="layer", only="3")
    assert set(record.changed) == {"3"}


@pytest.mark.parametrize("score", ["magnitude", "fisher", "wanda", "sparsegpt"])
def test_blocks_are_whole(score: str):
    chosen = "attend.*,wide,narrow"
    model, record = pruned(transformer_task(), score=score, pattern=(4, 4), scope="layer", sparsity=0.5, only=chosen)
    for weight in weights(model).values():
        blocks = (weight != 0).unfold(0, 4, 4).unfold(1, 4, 4).flatten(2)
        assert (blocks.all(2) | ~blocks.any(2)).all()
        assert share(weight) == pytest.approx(0.5, abs=0.03)
    assert all(how.endswith("in the pattern 4x4") for how in record.changed.values())


def test_whole_rows_go():
    model, _ = pruned(transformer_task(), pattern="row", sparsity=0.3)
    for weight in weights(model).values():
        rows = (weight != 0).any(1)
        assert (weight[rows] != 0).all()
    assert share_of_zeros(model) == pytest.approx(0.3, abs=0.03)


def test_making_up_keeps_the_outputs_nearer():
    """What the papers say: SparseGPT and exact OBS leave less error in the outputs than masks alone."""
    task = transformer_task()

    def error(**settings: Any) -> float:
        model, _ = pruned(task, sparsity=0.6, scope="layer", **settings)
        images = task.test.tensors[0]
        with torch.no_grad():
            return float((model(images) - task.original(images)).square().mean())

    found = {score: error(score=score) for score in ("magnitude", "wanda", "sparsegpt", "obs")}
    assert max(found["sparsegpt"], found["obs"]) < 0.8 * min(found["magnitude"], found["wanda"]), found


class Blocks(nn.Module):
    """Residual blocks of linear layers between a stem and a head: N x 64 to N x 10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 16)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x)))


def blocks_task() -> Task:
    torch.manual_seed(0)
    return Task(name="blocks", model=Blocks().eval(), batch_size=32, **digits())


def test_each_block_meets_what_the_pruned_blocks_before_it_give():
    """Wanda by hand: the layers of a block by what they get with the blocks before it pruned, itself not yet."""
    task = blocks_task()
    model, _ = pruned(task, score="wanda", only="blocks.*")
    plain, now = fold(model), task.fresh()
    images = task.calibrate.tensors[0]
    for place in range(3):
        names = [f"blocks.{place}.{name}" for name in ("one", "two")]
        seen: dict[str, Tensor] = {}
        handles = [
            now.get_submodule(name).register_forward_hook(
                lambda _m, given, _o, name=name, seen=seen: seen.update({name: given[0]})
            )
            for name in names
        ]
        with torch.no_grad():
            now(images)
        for handle in handles:
            handle.remove()
        for name in names:
            weight = now.get_parameter(f"{name}.weight")
            score = weight.detach().abs() * seen[name].square().mean(0).sqrt()
            keep = torch.zeros_like(score).scatter_(1, score.topk(score.shape[1] // 2, 1).indices, 1.0)
            weight.data *= keep
            assert torch.equal(weight, plain.get_parameter(f"{name}.weight")), name


def test_compensation_brings_outputs_back_to_the_originals():
    task = transformer_free = blocks_task()
    errors = []
    for compensate in (False, True):
        model, _ = pruned(task, score="sparsegpt", sparsity=0.5, only="blocks.*", compensate=compensate)
        images = transformer_free.calibrate.tensors[0]
        with torch.no_grad():
            errors.append(float((model(images) - task.original(images)).square().mean()))
    assert errors[1] < errors[0]


def test_a_second_pass_of_every_score_only_tightens():
    task = transformer_task()
    for score in SCORES:
        once, _ = pruned(task, score="magnitude", sparsity=0.3, scope="layer")
        before = {name: weight == 0 for name, weight in weights(once).items()}
        twice, _ = run_step(WeightPruning(score=score, sparsity=0.6), once, Context(task, device=CPU))
        assert all((weight[before[name]] == 0).all() for name, weight in weights(twice).items()), score
        assert share_of_zeros(twice) == pytest.approx(0.6, abs=0.03), score


def test_a_pattern_is_put_on_what_is_sparse_enough_already_and_survives_a_later_step():
    task = transformer_task()
    once, _ = pruned(task, sparsity=0.6, scope="layer", only="wide,narrow")
    again, record = run_step(WeightPruning(pattern="2:4", only="wide,narrow"), once, Context(task, device=CPU))
    assert set(record.changed) == {"wide", "narrow"}
    later, _ = run_step(WeightPruning(sparsity=0.9, scope="layer", only="wide"), again, Context(task, device=CPU))
    assert {each.form for each in encodings(later).values()} == {"2:4"}
    assert all(((w != 0).reshape(-1, 4).sum(1) <= 2).all() for w in weights(later).values())
    with pytest.raises(NoEffect, match=r"prune\.weights changed nothing"):
        run_step(WeightPruning(pattern="2:4", only="wide"), later, Context(task, device=CPU))


def test_drift_that_cannot_be_known_is_said():
    _, record = pruned(conv_task(), score="sparsegpt", compensate=True, only="hidden")
    assert ("hidden (compensate)", "it is in no block, where its drift is not known") in {
        (each.layer, each.reason) for each in record.left
    }


# -- allocation ----------------------------------------------------------------------------
def test_the_allocation_is_the_best_of_all_by_brute_force():
    losses = {"a": {0.25: 0.1, 0.5: 0.4, 0.75: 2.0}, "b": {0.25: 0.3, 0.5: 1.5, 0.75: 4.0}}
    counts = {"a": 300, "b": 100}
    found = allocate(losses, counts, 0.5, {"a": 0.0, "b": 0.0})
    assert sum(found[name] * counts[name] for name in counts) == pytest.approx(200, abs=2)

    def price(a: float, b: float) -> float:
        import numpy as np

        return float(interpolated(losses["a"], 0, np.array([a]))[0] + interpolated(losses["b"], 0, np.array([b]))[0])

    best = min(price(a, (200 - 300 * a) / 100) for a in [x / 1000 for x in range(420, 667)])
    assert price(found["a"], found["b"]) <= best + 0.03


def test_losses_in_between_rise_and_start_from_what_is_pruned_already():
    import numpy as np

    found = interpolated({0.5: 0.2, 0.7: 0.1, 0.9: 1.0}, 0.3, np.array([0.3, 0.4, 0.5, 0.7, 0.8]))
    assert found.tolist() == pytest.approx([0, 0.1, 0.2, 0.2, 0.6])
    assert levels(0.5, 0.0, 0.02) == pytest.approx([0.25, 0.5, 0.65, 0.775])
    assert levels(0.9, 0.92, 0.02) == pytest.approx([0.93, 0.955])
    assert min(1 - each for each in levels(0.95, 0.0, 0.04)) >= 0.04


@pytest.mark.parametrize("score", ["magnitude", "sparsegpt"])
def test_layers_that_matter_more_keep_more(score: str):
    """One layer that cannot lose anything among others that can: it is found, and the loss is lower."""
    task = transformer_task()
    spoilt = task.fresh()
    spoilt.head.weight.data[:, ::2] *= 1e-3  # type: ignore[union-attr,operator,index]
    same = {
        name: share(weight)
        for name, weight in weights(pruned(task, score=score, scope="layer", sparsity=0.7)[0]).items()
    }
    model, _ = pruned(task, score=score, allocation="sensitivity", sparsity=0.7)
    own = {name: share(weight) for name, weight in weights(model).items()}
    assert share_of_zeros(model) == pytest.approx(0.7, abs=0.02)
    assert max(own.values()) > max(same.values()) + 0.02 and min(own.values()) < min(same.values()) - 0.02
    ctx = Context(task, device=CPU)
    uniform, _ = pruned(task, score=score, scope="layer", sparsity=0.7)
    assert calibration_loss(model, ctx) < calibration_loss(uniform, ctx)


def share(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


# -- what is stored and said ----------------------------------------------------------------------------
@pytest.mark.parametrize(("pattern", "form"), [("2:4", "2:4"), ((2, 4), "2x4"), ("row", "row"), ("none", "sparse")])
def test_a_pattern_is_an_encoding_that_saves_loads_and_exports(pattern: Any, form: str, tmp_path: Path):
    task = transformer_task()
    model, _ = pruned(task, pattern=pattern, only="wide,narrow")
    assert {each.form for each in encodings(model).values()} == {form}
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", like=task.original)
    assert {name: each.form for name, each in encodings(again).items()} == {
        name: each.form for name, each in encodings(model).items()
    }
    coded = target("coded").export(model, task.example, tmp_path / "coded")
    assert {coded.manifest.stored[name] for name in weights(model)} == {form}
    dense = target("onnxruntime").export(model, task.example, tmp_path / "dense")
    assert dense.manifest.dense == sorted(weights(model))
    assert coded.bytes() < dense.bytes()


def test_a_layer_whose_inputs_are_nought_is_left_and_named():
    task = blocks_task()
    dead = task.fresh()
    dead.blocks[1].one.bias.data.fill_(-100.0)  # type: ignore[union-attr,index]
    task = replace(task, model=dead)
    _, record = pruned(task, score="sparsegpt", only="blocks.*")
    assert {each.layer: each.reason for each in record.left}["blocks.1.two"].startswith("its inputs in the calibration")
    assert "blocks.1.one" in record.changed


@pytest.mark.parametrize("score", ["sparsegpt", "obs"])
def test_a_group_of_channels_whose_inputs_are_nought_is_pruned_by_size(score: str):
    task = channels(6)
    dead: Any = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), *list(task.original)[2:])  # type: ignore[call-overload]
    dead[0].bias.data[2] = -100.0
    model, record = pruned(replace(task, model=dead.eval()), score=score, only="2", scope="layer")
    assert set(record.changed) == {"2"}
    kept, before = weights(model)["2.weight"][2].flatten(), dead[2].weight[2].flatten()
    assert torch.equal(kept != 0, before.abs() >= before.abs().sort().values[8])
    assert torch.allclose(kept[kept != 0], before[kept != 0])


def test_inputs_that_are_not_finite_are_refused():
    images, labels = digits()["calibrate"].tensors
    task = blocks_task()
    broken = task.fresh()
    broken.stem.weight.data.fill_(torch.inf)  # type: ignore[union-attr]
    with pytest.raises(NotFinite):
        pruned(replace(task, model=broken, calibrate=Arrays(images, labels)), score="wanda", only="blocks.*")


def test_a_layer_whose_inputs_cannot_be_seen_is_left_and_named():
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.ConvTranspose2d(1, 4, 2, stride=2), nn.Linear(4 * 16 * 16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.up(x)).flatten(1))

    task = Task(name="up", model=Up().eval(), batch_size=32, **digits())
    _, record = pruned(task, score="wanda")
    assert set(record.changed) == {"head"}
    assert "cannot be lined up" in {each.layer: each.reason for each in record.left}["up"]
    _, record = pruned(task, score="magnitude")
    assert set(record.changed) == {"up", "head"}


def test_transposed_linear_layers_of_transformers_are_pruned():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = conv1d(32, 64), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x.flatten(1))))

    torch.manual_seed(0)
    task = Task(name="conv1d", model=Net().eval(), batch_size=32, **digits())
    model, record = pruned(task, score="sparsegpt", pattern="2:4")
    assert set(record.changed) == {"one", "two"}
    rows = fold(model).get_parameter("one.weight").T
    assert ((rows != 0).reshape(32, -1, 4).sum(2) == 2).all()


def test_nothing_of_the_pattern_is_an_error_that_names_the_reason():
    with pytest.raises(NoEffect, match="no groups of 7"):
        pruned(transformer_task(), pattern="3:7")


def test_accuracy_survives_half_of_the_weights():
    task = transformer_task()
    model, _ = pruned(task, score="sparsegpt", sparsity=0.5)
    assert accuracy(task, model) > accuracy(task, task.original) - 0.05
