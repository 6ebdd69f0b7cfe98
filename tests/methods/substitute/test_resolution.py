"""Images at a fraction of their size inside the network: what is computed, exported, refused."""

import numpy as np
import pytest
import torch
from small_tasks import accuracy, conv_task, one_thread, pooled_task, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_recipe, run_step
from featherweight.core.errors import ArtifactError, RecipeError, TaskError
from featherweight.core.recipe import Recipe
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.model.cost import forward_macs
from featherweight.model.resized import Resized, resized, scaled
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")
KIND = "substitute.resolution"


def applied(task: Task, **settings) -> nn.Module:
    return run_step(step(KIND, **settings), task.fresh(), Context(task, device=CPU))[0]


def with_model(task: Task, model: nn.Module) -> Task:
    splits = {name: getattr(task, name) for name in ("train", "calibrate", "validate", "test")}
    return Task(name="other", model=model.eval(), batch_size=64, **splits)


def along(size: int, out: int) -> np.ndarray:
    """Each row takes one pixel of `out` from `size` of them: the two nearest to its centre, by their distance."""
    found = np.zeros((out, size))
    for place in range(out):
        centre = min(max((place + 0.5) * size / out - 0.5, 0), size - 1)
        left = min(int(centre), size - 2)
        found[place, left : left + 2] = [1 - (centre - left), centre - left]
    return found


@pytest.mark.parametrize("factor", [0.5, 0.75, 0.6])
def test_pixels_are_means_of_their_nearest_neighbours(factor):
    images = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    rows, columns = along(8, round(8 * factor)), along(10, int(10 * factor + 0.5))
    wanted = np.einsum("rh,nchw,kw->ncrk", rows, images.double().numpy(), columns)
    assert np.abs(resized(images, factor).numpy() - wanted).max() < 1e-5


def test_sides_are_rounded_to_whole_pixels():
    assert [scaled(224, factor) for factor in (192 / 224, 160 / 224, 0.857)] == [192, 160, 192]
    assert [scaled(side, 0.5) for side in (1, 2, 3, 32)] == [1, 1, 2, 16]


def test_it_computes_less_on_images_of_the_old_size():
    task = pooled_task()
    model = applied(task, factor=0.5, recalibrate=False)
    images = task.test.tensors[0]
    with torch.no_grad():
        small = nn.functional.avg_pool2d(images, 2)  # what bilinear interpolation by one half is
        assert torch.allclose(model(images), task.original(small), atol=1e-5)
    whole, left = forward_macs(task.original, task.example), forward_macs(model, task.example)
    assert 0.25 * whole < left < 0.3 * whole
    assert torch.equal(model.base.stem.weight, task.original.stem.weight)


def test_statistics_are_taken_anew_and_training_heals():
    task = pooled_task()
    with_old, with_new = applied(task, factor=0.75, recalibrate=False), applied(task, factor=0.75)
    assert not torch.allclose(with_new.base.stem_norm.running_mean, with_old.base.stem_norm.running_mean)
    taught = applied(task, factor=0.75, retrain={"epochs": 6, "lr": 3e-3, "teacher": 0.5})
    assert accuracy(task, taught) > accuracy(task, with_new)
    assert accuracy(task, taught) > accuracy(task, task.original) - 0.1


def test_twice_is_once_with_the_product():
    task = pooled_task()
    ctx = Context(task, device=CPU)
    model, records = run_recipe(Recipe([{"kind": KIND, "factor": 0.75}] * 2), ctx)
    assert isinstance(model, Resized) and not isinstance(model.base, Resized) and model.factor == 0.75**2
    assert "images of 8 x 8 to 6 x 6" in records[0].changed["*"]
    assert "images of 6 x 6 to 5 x 5" in records[1].changed["*"]


@pytest.mark.parametrize("behind", [[], [{"kind": "quantize.static"}], [{"kind": "prune.structured", "keep": 0.6}]])
def test_artifacts_and_saved_models_take_the_old_size(behind, tmp_path):
    task = pooled_task()
    model, _ = run_recipe(Recipe([{"kind": KIND, "factor": 0.6}, *behind]), Context(task, device=CPU))
    images = task.test.tensors[0][:7]
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "artifact")
    assert artifact.manifest.inputs[0].shape == [-1, 1, 8, 8]
    found, wanted = artifact.open()(images), model(images).detach().numpy()
    assert np.abs(found - wanted).max() < (0.1 if behind else 1e-4) * np.abs(wanted).max()
    save(model, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model", like=task.original)(images), model(images))
    if not behind:
        with pytest.raises(ArtifactError, match="the module 'base' is PooledNet, which is no layer"):
            load(tmp_path / "model")


def test_free_sides_stay_free(tmp_path):
    given = pooled_task()
    splits = {name: getattr(given, name) for name in ("train", "calibrate", "validate", "test")}
    free = {"x": {0: "batch", 2: "height", 3: "width"}}
    task = Task(name="free", model=given.original, dynamic=free, **splits)
    model = applied(task, factor=0.5)
    runner = target("onnxruntime").export(model, task.example, tmp_path / "artifact", free).open()
    images = torch.randn(3, 1, 14, 22, generator=torch.Generator().manual_seed(0))
    assert np.abs(runner(images) - model(images).detach().numpy()).max() < 1e-4


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Viewed(nn.Module):
    """A classifier behind a view, which turns positions that are missing into fewer rows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.reshape(-1, 64))


def test_networks_that_are_tied_to_a_size_are_refused_by_name():
    with pytest.raises(TaskError, match=r"substitute.resolution: the layer 'hidden' is tied to the size of the images"):
        applied(conv_task(), factor=0.5)
    with pytest.raises(TaskError, match=r"an output of 2 x 1 x 8 x 8 becomes 2 x 1 x 4 x 4 with smaller images"):
        run_step(step(KIND, factor=0.5), Dense(), Context(with_model(pooled_task(), Dense()), device=CPU))
    task = with_model(pooled_task(), Viewed())
    with pytest.raises(TaskError, match=r"is tied to the size of the images|an output of 2 x 10 becomes"):
        applied(task, factor=0.5)
    with pytest.raises(TaskError, match=r"needs an input of images \(N x C x H x W floats\); this model takes x:"):
        applied(transformer_task())


@pytest.mark.parametrize("factor", [0.99, 0.01])
def test_a_factor_that_leaves_nothing_to_do_or_nothing_at_all_is_refused(factor):
    with pytest.raises(RecipeError, match=rf"factor={factor:g} images of 8 x 8 become images of \d x \d; give"):
        applied(pooled_task(), factor=factor)


@pytest.mark.parametrize("factor", [0, 1, 1.5])
def test_factors_out_of_range_are_one_clear_line(factor):
    with pytest.raises(RecipeError, match=rf"{KIND}: factor={factor}: input should be"):
        step(KIND, factor=factor)
