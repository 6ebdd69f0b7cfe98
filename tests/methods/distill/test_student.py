"""distill.student: a network of the user's own in place of the model; trained, kept by the store, exported."""

from pathlib import Path

import pytest
import torch
from small_tasks import ConvNet, accuracy, blocks_task, conv_task, one_thread  # noqa: F401
from torch import nn

import featherweight as fw
from featherweight.core.context import Context, run_recipe
from featherweight.core.errors import RecipeError, TaskError
from featherweight.core.recipe import Recipe
from featherweight.core.target import target
from featherweight.model.skeleton import load, save
from featherweight.search.store import Store, build

CPU = torch.device("cpu")
MINE = """
import torch
from torch import nn

import featherweight as fw

class Mine(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 24), nn.Linear(24, classes)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(x.flatten(1))))

def seven():
    return Mine(7)

def two():
    class Two(Mine):
        def forward(self, x):
            return {"logits": super().forward(x), "again": x}
    return Two()

def number():
    return 3

ready = Mine()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def recipe(student: str, **settings) -> Recipe:
    return Recipe(
        [
            {"kind": "distill.student", "student": student},
            {"kind": "distill.logits", "weight": 1.0, "epochs": 20, "lr": 1e-2, **settings},
        ]
    )


def test_a_student_of_another_type_is_taught_kept_and_exported(file: Path, tmp_path: Path):
    task, store = conv_task(), Store(tmp_path / "store")
    steps = recipe(f"{file}:Mine")
    steps.check(target("onnxruntime"))
    model, records = build(steps, Context(task, device=CPU), store)
    assert type(model).__name__ == "Mine" and accuracy(task, model) > 0.7
    assert "2" in records[0].changed["*"] and records[0].parameters_after < records[0].parameters_before
    assert len(list((tmp_path / "store").iterdir())) == 2
    store.progress.say = lambda text: pytest.fail(text)
    again, _ = build(steps, Context(task, device=CPU), store)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    save(model, tmp_path / "model")
    found = load(tmp_path / "model", like=steps.architecture(task))
    target("onnxruntime").export(found, task.example, tmp_path / "artifact")


def test_the_users_student_is_not_trained_itself(file: Path):
    import sys

    run_recipe(recipe(f"{file}:ready", epochs=1), Context(conv_task(), device=CPU))
    ready = sys.modules["featherweight_task_mine"].ready
    assert ready.training and all(parameter.grad is None for parameter in ready.parameters())


def test_a_saved_model_is_a_student(tmp_path: Path):
    task = conv_task()
    torch.manual_seed(4)
    other = ConvNet().eval()
    save(other, tmp_path / "other")
    steps = [{"kind": "distill.student", "student": str(tmp_path / "other")}]
    model, _ = run_recipe(Recipe(steps), Context(task, device=CPU))
    assert torch.equal(model.head.weight, other.head.weight) and model is not other


def test_a_student_that_names_its_inputs_otherwise_is_refused(tmp_path: Path):
    save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), tmp_path / "linear")
    with pytest.raises(TaskError, match=r"must take them by the names that the model's has \(x\)"):
        run_recipe(recipe(str(tmp_path / "linear")), Context(conv_task(), device=CPU))


def test_same_seed_same_student_and_another_file_is_another_recipe(file: Path):
    steps = recipe(f"{file}:Mine", epochs=1)
    one, other = (run_recipe(steps, Context(conv_task(), seed=3, device=CPU))[0] for _ in range(2))
    assert torch.equal(one.head.weight, other.head.weight)
    before = steps.digest()
    file.write_text(MINE + "\n# other\n")
    assert steps.digest() != before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seven", r"gives output of shape \(2, 7\), the model output of shape \(2, 10\)"),
        ("two", "gives logits of shape"),
        ("number", "gives int, not a torch.nn.Module"),
        ("nothing", "has no 'nothing'"),
    ],
)
def test_a_student_that_does_not_fit_is_refused_in_one_line(file: Path, name: str, text: str):
    with pytest.raises(TaskError, match=text) as caught:
        run_recipe(recipe(f"{file}:{name}"), Context(conv_task(), device=CPU))
    assert "\n" not in str(caught.value)


def test_it_stands_first(file: Path):
    steps = Recipe([{"kind": "finetune"}, {"kind": "distill.student", "student": f"{file}:Mine"}])
    with pytest.raises(RecipeError, match=r"step 2 \(distill.student\) puts another model in place.*put .* first"):
        steps.check()


def test_a_student_is_made_of_the_teacher_by_pruning_its_depth():
    """Every other block, named: what a recipe does, there is no step of its own for."""
    task = blocks_task()
    steps = Recipe(
        [
            {
                "kind": "prune.blocks", "keep": 0.6, "only": "rows.[13]", "rounds": 1, "min_blocks": 0,
                "recalibrate": False,
            },
            {"kind": "distill.features", "loss": "cosine", "weight": 0.7, "feature_weight": 0.14, "epochs": 2},
        ]
    )  # fmt: skip
    model, records = run_recipe(steps, Context(task, device=CPU))
    assert len(model.rows) == 2 and {"rows.1", "rows.3"} <= set(records[0].changed)
    assert "rows.0 from rows.1" in records[1].changed["*"]


def test_a_run_with_a_student_of_another_type_is_measured_and_read_again(file: Path, tmp_path: Path):
    result = fw.apply(conv_task(), recipe(f"{file}:Mine", epochs=1), out=tmp_path / "out", axes=["size"])
    assert type(result.model).__name__ == "Mine"
    found = {(reading.subject, reading.name): reading.value for reading in result.readings if reading.axis == "size"}
    assert found[("compressed", "parameters")] < found[("original", "parameters")]
