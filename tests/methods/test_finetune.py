"""finetune: what was damaged recovers, and what is held stays held."""

from dataclasses import replace

import pytest
import torch
from small_tasks import accuracy, conv_task, one_thread  # noqa: F401
from torch.nn.utils import parametrize

from featherweight.core.context import Context, run_step
from featherweight.core.errors import NotFinite, RecipeError, TaskError
from featherweight.core.soft import Mask, encodings
from featherweight.core.step import step

CPU = torch.device("cpu")


def masked(task, keep: float):
    """A copy of the task's model whose hidden layer has only its largest weights."""
    model = task.fresh()
    weight = model.hidden.weight.detach().abs()
    parametrize.register_parametrization(model.hidden, "weight", Mask(weight >= weight.flatten().quantile(1 - keep)))
    return model


def test_a_damaged_model_recovers_and_its_mask_holds():
    task = conv_task()
    model = masked(task, 0.02)
    damaged, zeros = accuracy(task, model), model.hidden.weight == 0
    tuned, record = run_step(step("finetune", epochs=6, lr=5e-3), model, Context(task, device=CPU))
    assert accuracy(task, tuned) > damaged + 0.05
    assert (tuned.hidden.weight[zeros] == 0).all()
    assert "6 epochs" in record.changed["*"]


@pytest.mark.parametrize("kind", ["quantize.dynamic", "quantize.static"])
def test_a_quantized_model_is_trained_as_what_it_is(kind):
    task = conv_task()
    model, _ = run_step(step(kind), task.fresh(), Context(task, device=CPU))
    before = encodings(model)["head.weight"]
    tuned, _ = run_step(step("finetune", epochs=2, lr=1e-2), model, Context(task, device=CPU))
    after = encodings(tuned)["head.weight"]
    assert after.form == "int8" and torch.equal(after.scale, before.scale)
    assert not torch.equal(after.values, before.values)
    assert accuracy(task, tuned) > accuracy(task, task.original) - 0.1


def test_frozen_parameters_stay_and_are_reported():
    task = conv_task()
    model = task.fresh()
    model.stem.weight.requires_grad_(False)
    frozen = model.stem.weight.detach().clone()
    tuned, record = run_step(step("finetune"), model, Context(task, device=CPU))
    assert torch.equal(tuned.stem.weight, frozen)
    assert [(left.layer, left.reason) for left in record.left] == [("stem.weight", "frozen (requires_grad is False)")]


def test_a_teacher_pulls_the_outputs_to_its_own():
    task = conv_task()
    images = task.test.tensors[0]
    ends = {}
    for weight in (0.0, 0.9):
        item = step("finetune", epochs=3, lr=1e-2, teacher=weight)
        tuned, _ = run_step(item, masked(task, 0.1), Context(task, device=CPU))
        with torch.no_grad():
            ends[weight] = float((tuned(images).softmax(-1) - task.original(images).softmax(-1)).abs().mean())
    assert ends[0.9] < ends[0.0]


def test_without_training_data_one_clear_error():
    task = replace(conv_task(), train=None)
    with pytest.raises(TaskError, match="has no 'train' data, which training needs"):
        run_step(step("finetune"), task.fresh(), Context(task, device=CPU))


def test_a_loss_that_leaves_the_numbers_is_an_error_that_says_what_to_do():
    task = conv_task()
    with pytest.raises(NotFinite, match="lower lr"):
        run_step(step("finetune", lr=1e30, clip=1e30, epochs=4), task.fresh(), Context(task, device=CPU))


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"lr": -1}, {"teacher": 1.5}, {"optimizer": "adam"}, {"warmup": 1}])
def test_settings_out_of_range_are_refused_in_one_line(setting):
    with pytest.raises(RecipeError, match=f"finetune: {next(iter(setting))}=") as caught:
        step("finetune", **setting)
    assert "\n" not in str(caught.value)
