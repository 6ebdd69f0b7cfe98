"""Teachers of distill.logits: ensembles by weight, artifacts, outputs on the disk, and how often a teacher runs."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_tasks import ConvNet, accuracy, conv_task, one_thread  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import RecipeError, TaskError
from featherweight.core.fit import ensemble_logits, mean_outputs
from featherweight.core.recipe import Recipe
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.methods.distill.inputs import differ, numbered
from featherweight.model.skeleton import save

CPU = torch.device("cpu")


class Counting(nn.Module):
    """A model that counts the rows that it was run on."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, x):
        self.rows += len(x)
        return self.inner(x)


def student() -> nn.Module:
    torch.manual_seed(3)
    return ConvNet().eval()


def counted(**settings):
    """A short distillation, and how many rows the teacher was run on."""
    task = conv_task()
    ctx, teacher = Context(task, device=CPU), Counting(task.original).eval()
    ctx.__dict__["teacher"] = teacher
    model, record = run_step(step("distill.logits", **{"lr": 5e-3, **settings}), student(), ctx)
    return model, record, teacher.rows, len(task.train)


# -- one pass --------------------------------------------------------------------------------------------------------
def test_a_second_epoch_costs_no_pass_of_the_teacher():
    kept, record, rows, inputs = counted(epochs=3)
    assert inputs <= rows <= inputs + 2 * 64  # the pass, and two looks at one batch
    live, record_live, rows_live, _ = counted(epochs=3, outputs="each")
    assert rows_live >= 3 * inputs
    assert "computed once" in record.changed["*"] and "computed once" not in record_live.changed["*"]
    for name, tensor in live.state_dict().items():
        assert torch.allclose(kept.state_dict()[name].float(), tensor.float(), atol=1e-3), name


@pytest.mark.parametrize("loss", ["dkd", "dist", "kl", "mse"])
def test_every_loss_teaches(loss):
    settings = {"weight": 1.0, "loss": loss, "temperature": 2.0, "beta": 2.0}
    model, *_ = counted(epochs=20, lr=1e-2, **settings)
    assert accuracy(conv_task(), model) > 0.6 > 0.3 > accuracy(conv_task(), student())


def test_what_was_said_stays_in_a_folder_and_serves_again(tmp_path: Path):
    first, _, rows, inputs = counted(epochs=1, folder=str(tmp_path / "said"))
    (file,) = (tmp_path / "said").glob("*.npy")
    assert rows >= inputs and np.load(file).shape == (inputs, 10)
    again, _, rows, _ = counted(epochs=1, folder=str(tmp_path / "said"))
    assert rows <= 2 * 64 and list((tmp_path / "said").iterdir()) == [file]
    other = step("distill.logits", epochs=1, lr=5e-3, teachers=[str(file)], teacher_weights=[0, 1])
    task = conv_task()
    third, _ = run_step(other, student(), Context(task, device=CPU))
    for model in (again, third):
        for name, tensor in first.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name


def augmented():
    task = conv_task()

    def noisy(images, generator):
        return images + 0.01 * torch.randn(images.shape, generator=generator)

    return replace(task, model=task.original, train=Arrays(*task.train.tensors, augment=noisy))


def test_augmented_inputs_are_asked_about_each_time_and_that_is_said(tmp_path: Path):
    task = augmented()
    _, record = run_step(step("distill.logits", epochs=2), student(), Context(task, device=CPU))
    assert "asked again on each batch (the training data are augmented" in record.changed["*"]
    for settings in ({"outputs": "once"}, {"folder": str(tmp_path)}):
        with pytest.raises(TaskError, match=r"cannot be computed once and kept: the training data are augmented"):
            run_step(step("distill.logits", epochs=2, **settings), student(), Context(task, device=CPU))
    np.save(tmp_path / "said.npy", np.zeros((320, 10), np.float32))
    with pytest.raises(TaskError, match="training data differ each time"):
        run_step(step("distill.logits", teachers=[str(tmp_path / "said.npy")]), student(), Context(task, device=CPU))


class Noisy(torch.utils.data.Dataset):
    """Items with noise of torch's own generator, as a data set with transforms gives them."""

    def __init__(self, noise: float):
        self.tensors, self.noise = conv_task().train.tensors, noise

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, place):
        image = self.tensors[0][place]
        return image + self.noise * torch.randn(image.shape), self.tensors[1][place]


def test_what_differs_each_time_is_seen():
    assert differ(Noisy(0.01)) and not differ(Noisy(0.0)) and not differ(conv_task().train)
    task = conv_task()
    assert numbered(replace(task, train=Noisy(0.0)))[0].count == 320
    assert "no number" in numbered(replace(task, train=(batch for batch in ())))[1]


def test_a_list_of_batches_has_numbers():
    task = conv_task()
    listed = replace(task, model=task.original, train=list(task.batches("train", 50)))
    data, _ = numbered(listed)
    for batch in data:
        assert torch.equal(batch[0], task.train.tensors[0][data.index])
    item = step("distill.logits", epochs=2, outputs="once")
    one, record = run_step(item, student(), Context(listed, device=CPU))
    other, _ = run_step(item.model_copy(update={"outputs": "each"}), student(), Context(listed, device=CPU))
    assert "computed once" in record.changed["*"]
    assert torch.allclose(one.head.weight, other.head.weight, atol=1e-3)


# -- who teaches -----------------------------------------------------------------------------------------------------
def test_an_ensemble_is_weighted():
    one, other = torch.randn(4, 3), torch.randn(4, 3)
    p, q = (torch.softmax(each / 2, -1) for each in (one, other))
    found = ensemble_logits([one, other], 2.0, [3, 1])
    assert torch.allclose(torch.softmax(found / 2, -1), 0.75 * p + 0.25 * q, atol=1e-6)
    assert torch.allclose(mean_outputs([one, other], [1, 3]), 0.25 * one + 0.75 * other, atol=1e-6)
    assert torch.allclose(mean_outputs([one, other]), (one + other) / 2)


def test_an_artifact_teaches_as_its_model_does(tmp_path: Path):
    task = conv_task()
    target("onnxruntime").export(task.original, task.example, tmp_path / "artifact")
    item = step("distill.logits", teachers=[str(tmp_path / "artifact")], teacher_weights=[0, 1], lr=5e-3)
    model, record = run_step(item, student(), Context(task, device=CPU))
    wanted, _ = run_step(step("distill.logits", lr=5e-3), student(), Context(task, device=CPU))
    assert "1 teacher" in record.changed["*"]
    assert torch.allclose(model.head.weight, wanted.head.weight, atol=1e-3)
    recipe = Recipe([item])
    before = recipe.digest()
    target("onnxruntime").export(student(), task.example, tmp_path / "artifact")
    assert recipe.digest() != before


def test_who_has_no_weight_is_not_run(tmp_path: Path):
    task = conv_task()
    save(task.fresh(), tmp_path / "same")
    _, record, rows, _ = counted(epochs=1, teachers=[str(tmp_path / "same")], teacher_weights=[0, 2])
    assert rows == 0 and "1 teacher" in record.changed["*"]


@pytest.mark.parametrize("weights", [[1], [0, 0], [1, 1, 1], [-1, 2]])
def test_weights_that_do_not_fit_the_teachers_are_refused(weights):
    with pytest.raises(RecipeError, match=r"teacher_weights"):
        step("distill.logits", teachers=["zoo:x"], teacher_weights=weights)


def test_outputs_on_the_disk_that_do_not_fit_are_refused_in_one_line(tmp_path: Path):
    task, file = conv_task(), tmp_path / "said.npy"
    item = step("distill.logits", teachers=[str(file)])

    def refused(text: str) -> None:
        with pytest.raises(TaskError, match=text) as caught:
            run_step(item, student(), Context(task, device=CPU))
        assert "\n" not in str(caught.value)

    refused("there is no file")
    np.save(file, np.zeros((7, 10), np.float32))
    refused("holds 7 outputs of type float32, but there are 320")
    np.save(file, np.zeros((320, 7), np.float32))
    refused(re.escape("teacher 1 gives outputs of shape (64, 7)"))
    file.write_bytes(b"nothing")
    refused("is no array of numbers")


def test_decoupled_needs_true_classes():
    task = conv_task()
    unlabelled = replace(
        task, model=task.original, train=Arrays(task.train.tensors[0], task.train.tensors[1].float()),
        loss=lambda output, batch: output.mean(),
    )  # fmt: skip
    with pytest.raises(TaskError, match="needs the true class of each row"):
        run_step(step("distill.logits", loss="dkd"), student(), Context(unlabelled, device=CPU))
