"""distill.logits: the mathematics, ensembles, outputs that are no classes, and what cannot work."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_tasks import ConvNet, accuracy, conv_task, one_thread  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import ArtifactError, RecipeError, TaskError
from featherweight.core.fit import missed_variance, soft_cross_entropy, soft_targets
from featherweight.core.metric import mean_squared_error
from featherweight.core.outputs import first
from featherweight.core.recipe import Recipe
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.model.skeleton import save

CPU = torch.device("cpu")


# -- mathematics -------------------------------------------------------------------------------------------------------
@given(st.integers(0, 1000), st.floats(1, 8))
def test_the_loss_is_the_divergence_of_softened_classes(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    p, q = (torch.softmax(item.double() / temperature, -1) for item in (teacher, student))
    wanted = (p * (p / q).log()).sum(-1).mean() * temperature**2
    assert torch.allclose(soft_cross_entropy(student, teacher, temperature).double(), wanted, rtol=1e-3, atol=1e-6)
    assert soft_cross_entropy(teacher, teacher, temperature) == pytest.approx(0, abs=1e-6)


def test_at_high_temperature_it_matches_logits():
    """Hinton et al., section 2.1: the gradient tends to the difference of centred logits over the number of classes."""
    student, teacher = torch.randn(3, 6).requires_grad_(), torch.randn(3, 6)
    soft_cross_entropy(student, teacher, 500.0).backward()
    difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    assert torch.allclose(student.grad, difference.detach() / 6 / 3, atol=1e-3)


def test_sequences_count_each_position():
    student, teacher = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    flat = soft_cross_entropy(student.reshape(14, 5), teacher.reshape(14, 5), 3.0)
    assert torch.allclose(soft_cross_entropy(student, teacher, 3.0), flat)


def test_an_ensemble_is_the_mean_of_its_probabilities():
    task = conv_task()
    ctx, batch = Context(task, device=CPU), next(iter(task.batches("train")))
    torch.manual_seed(1)
    teachers = [ConvNet().eval(), ConvNet().eval()]
    with torch.no_grad():
        output = task.call(task.original, batch)
        found = soft_targets(2.0, teachers)(task.original, batch, output, ctx)
        mean = torch.stack([torch.softmax(task.call(teacher, batch) / 2.0, -1) for teacher in teachers]).mean(0)
    assert torch.allclose(found, soft_cross_entropy(output, mean.log() * 2.0, 2.0), atol=1e-5)


def test_missed_variance_is_nought_for_equal_and_one_for_the_mean():
    teacher = torch.randn(50, 3) * 7 + 2
    assert missed_variance(teacher, teacher) == 0
    assert missed_variance(teacher.mean().expand(50, 3), teacher) == pytest.approx(1, rel=1e-5)
    assert torch.isfinite(missed_variance(torch.ones(4), torch.zeros(4)))


# -- the step ----------------------------------------------------------------------------------------------------------
def damaged(task: Task) -> nn.Module:
    model = task.fresh()
    with torch.no_grad():
        model.conv.weight.mul_(torch.rand(model.conv.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.6)
    return model


def distance(task: Task, model: nn.Module) -> float:
    images = task.test.tensors[0]
    with torch.no_grad():
        return float((first(model(images)) - first(task.original(images))).square().mean())


@pytest.mark.parametrize("settings", [{}, {"loss": "mse"}, {"weight": 1.0, "temperature": 1.0}])
def test_a_damaged_model_comes_nearer_to_its_teacher(settings):
    task = conv_task()
    before = distance(task, damaged(task))
    item = step("distill.logits", epochs=5, lr=5e-3, **settings)
    model, record = run_step(item, damaged(task), Context(task, device=CPU))
    assert distance(task, model) < 0.7 * before
    assert accuracy(task, model) > accuracy(task, task.original) - 0.05
    assert "1 teacher" in record.changed["*"]


def test_with_all_the_weight_on_the_teacher_no_labels_are_needed():
    task = conv_task()

    def no_labels(output, batch):
        raise AssertionError("the task's loss was asked")

    task = replace(task, loss=no_labels)
    model, _ = run_step(step("distill.logits", weight=1.0), damaged(task), Context(task, device=CPU))
    assert distance(task, model) < distance(task, damaged(task))


class Denoiser(nn.Module):
    """One hidden layer from pictures to pictures; several outputs by name, the picture first."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 48), nn.Linear(48, 64)

    def forward(self, x):
        hidden = torch.relu(self.inner(x))
        return {"clean": self.outer(hidden), "hidden": hidden}


def test_auto_matches_outputs_where_the_metric_is_not_about_classes():
    torch.manual_seed(0)
    pictures = conv_task().train.tensors[0].flatten(1)
    noisy = pictures + 0.2 * torch.randn_like(pictures)
    model = Denoiser()
    data = Arrays(noisy, pictures)
    task = Task(
        name="denoise", model=model, train=data, test=data, metric=mean_squared_error(),
        loss=lambda output, batch: nn.functional.mse_loss(first(output), batch[1]),
    )  # fmt: skip
    Context(task, device=CPU).fit(model, step("finetune", epochs=10, lr=5e-3))
    student = task.fresh()
    with torch.no_grad():
        student.inner.weight[24:] = 0
    before = distance(task, student)
    model, _ = run_step(step("distill.logits", epochs=3), student, Context(task, device=CPU))
    assert distance(task, model) < 0.5 * before


def test_auto_takes_classes_where_the_metric_is_about_them(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "featherweight.core.fit.soft_targets", lambda *given: asked.append(given) or soft_targets(*given)
    )
    task = conv_task()
    run_step(step("distill.logits", temperature=3), damaged(task), Context(task, device=CPU))
    assert [given[0] for given in asked] == [3.0]


def test_teachers_from_a_folder_and_from_a_task(tmp_path):
    task = conv_task()
    save(damaged(task), tmp_path / "other")
    file = tmp_path / "mine.py"
    file.write_text("from small_tasks import conv_task\n")
    teachers = [str(tmp_path / "other"), f"{file}:conv_task"]
    item = step("distill.logits", teachers=teachers)
    model, record = run_step(item, damaged(task), Context(task, device=CPU))
    alone, _ = run_step(step("distill.logits"), damaged(task), Context(task, device=CPU))
    assert "3 teacher" in record.changed["*"] and distance(task, model) != distance(task, alone)


def test_teachers_that_do_not_fit_are_refused_in_one_line(tmp_path):
    task = conv_task()
    ctx = Context(task, device=CPU)
    with pytest.raises(TaskError, match="names no task"):
        run_step(step("distill.logits", teachers=["nonsense"]), task.fresh(), ctx)
    with pytest.raises(ArtifactError, match="no saved model"):
        run_step(step("distill.logits", teachers=[str(tmp_path)]), task.fresh(), ctx)
    file = tmp_path / "seven.py"
    file.write_text(
        "import torch\nfrom torch import nn\nfrom featherweight.core.task import Task\n"
        "def seven():\n    return Task(name='seven', model=nn.Sequential(nn.Flatten(), nn.Linear(64, 7)))\n"
        "def broken():\n    return Task(name='broken', model=nn.Linear(63, 7))\n"
    )
    with pytest.raises(TaskError, match=r"teacher 1 gives outputs of shape \(64, 7\), the model \(64, 10\)"):
        run_step(step("distill.logits", teachers=[f"{file}:seven"]), task.fresh(), ctx)
    with pytest.raises(TaskError, match="teacher 1 fails on the task's inputs") as caught:
        run_step(step("distill.logits", teachers=[f"{file}:broken"]), task.fresh(), ctx)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"temperature": 0}, {"weight": 0}, {"loss": "l1"}, {"teacher": 0.5}])
def test_settings_that_cannot_be_are_refused(setting):
    with pytest.raises(RecipeError, match=r"distill\.logits: "):
        step("distill.logits", **setting)


def test_another_teacher_in_the_same_folder_is_another_recipe(tmp_path):
    recipe = Recipe([{"kind": "distill.logits", "teachers": [str(tmp_path / "teacher")]}])
    torch.manual_seed(1)
    save(ConvNet(), tmp_path / "teacher")
    before = recipe.digest()
    assert recipe.digest() == before
    save(ConvNet(), tmp_path / "teacher")
    assert recipe.digest() != before
