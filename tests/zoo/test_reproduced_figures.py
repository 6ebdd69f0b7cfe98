"""Before anything is compressed each task reproduces the figure that came with its data, on the whole test split."""

import pytest
import torch

from featherweight.core.context import count_parameters
from featherweight.core.evaluate import records, torch_run
from featherweight.core.task import Task, find_task
from featherweight.zoo.cifar10 import jpeg_images, unlike
from featherweight.zoo.source import Source

pytestmark = pytest.mark.data
slow = pytest.mark.slow

FIGURES = [
    pytest.param("cifar10-resnet20", 87.82, 0.02, 10_000, 269_722, marks=slow),
    pytest.param("cifar10-resnet56", 92.72, 0.02, 1_017, 853_018, marks=slow),
    pytest.param("stsb-minilm", 82.03, 0.02, 1_379, 22_565_376, marks=slow),
    pytest.param("denoise-dncnn", 30.397, 0.03, 12, 556_032, marks=slow),
    pytest.param("stories260k", 4.0775, 0.001, 150, 260_032, marks=slow),
    ("kws-dscnn", 91.5, 0.02, 1_000, 23_756),
    ("kws-kwt1", 97.07, 0.02, 920, 607_308),
    ("vww-mobilenet", 85.3, 0.02, 1_000, 216_322),
    ("ad-autoencoder", 0.880, 0.001, 248, 267_928),
    ("titles-lstm", 2.560, 0.001, 150, 462_717),
]
OVERLAPPING = ["kws-dscnn", "kws-kwt1", "vww-mobilenet", "ad-autoencoder"]


def measured(task: Task) -> tuple[float, int]:
    found = records(task, torch_run(task, task.original))
    return task.metric.reduce(found), len(found)


@pytest.mark.parametrize(("name", "figure", "tolerance", "count", "parameters"), FIGURES)
def test_the_published_figure_is_reproduced(name, figure, tolerance, count, parameters):
    task = find_task(f"zoo:{name}")
    task.check()
    assert count_parameters(task.original) == parameters
    assert len(next(iter(task.example.values()))) == 2
    value, found = measured(task)
    assert found == count
    assert value == pytest.approx(figure, abs=tolerance)
    assert find_task(f"zoo:{name}").digest == task.digest


@slow
@pytest.mark.parametrize(
    ("name", "least", "parameters"), [("mnist-lenet5", 99.0, 431_080), ("mnist-lenet300", 98.2, 266_610)]
)
def test_networks_trained_on_the_spot_reach_what_the_literature_starts_from(name, least, parameters):
    task = find_task(f"zoo:{name}")
    task.check()
    assert count_parameters(task.original) == parameters
    value, found = measured(task)
    assert found == 10_000
    assert value >= least
    assert find_task(f"zoo:{name}").digest == task.digest


def items(data) -> list[bytes]:
    """Each item of a data set as bytes."""
    if hasattr(data, "tensors"):
        return [item.numpy().tobytes() for item in data.tensors[0]]
    if hasattr(data, "clips"):
        return [item.numpy().tobytes() for item in data.clips]
    if hasattr(data, "clean"):
        return [item.numpy().tobytes() for item in data.clean]
    rows = next(getattr(data, name) for name in ("tokens", "titles") if hasattr(data, name))
    return [str([part.tolist() for part in row] if isinstance(row, tuple) else row.tolist()).encode() for row in rows]


@pytest.mark.parametrize("name", ["cifar10-resnet20", "mnist-lenet5", "stsb-minilm", "stories260k", "titles-lstm"])
def test_no_item_of_the_test_split_trains_or_validates(name):
    task = find_task(f"zoo:{name}")
    train, validate, test = (items(getattr(task, split)) for split in ("train", "validate", "test"))
    assert not set(test) & (set(train) | set(validate))
    assert not set(train) & set(validate)


def test_what_validates_resnet56_is_no_copy_of_what_tests():
    task = find_task("zoo:cifar10-resnet56")
    test, aside = (centred(getattr(task, split).tensors[0]) for split in ("test", "validate"))
    copies, labels = jpeg_images(Source("cifar10-resnet56"), "cifar10/cifar10_jpeg_test.npz")
    assert (test @ centred(copies).T).max(1).values.min() > 0.93  # each test image has its JPEG copy among these...
    assert (test @ aside.T).max() < 0.92  # ... and none among those that validate
    left_out = torch.ones(len(copies), dtype=torch.bool)
    left_out[unlike(task.test.tensors[0], copies)] = False
    assert torch.equal(labels[left_out].bincount(), task.test.tensors[1].bincount())
    assert task.validate.tensors[1].bincount().tolist() == pytest.approx([200] * 10, abs=5)


def centred(images: torch.Tensor) -> torch.Tensor:
    """Each image as a vector of zero mean and unit length."""
    rows = images.flatten(1).float()
    return torch.nn.functional.normalize(rows - rows.mean(1, keepdim=True))


def test_what_denoises_trains_on_other_pictures():
    task = find_task("zoo:denoise-dncnn")
    assert not set(items(task.train)) & set(items(task.validate))
    assert [tuple(batch["x"].shape[2:]) for batch in task.test] == [(256, 256)] * 7 + [(512, 512)] * 5
    one, again, fresh = (
        task.train.batch(torch.arange(3), generator)["x"] for generator in (None, None, torch.Generator())
    )
    assert torch.equal(one, again) and not torch.equal(one, fresh)
    noise = task.test[0]["x"] - task.test[0]["labels"]
    assert float(noise.std()) * 255 == pytest.approx(25, rel=0.02)


@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlap_is_as_stated(name):
    task = find_task(f"zoo:{name}")
    calibrate, validate, test = (items(getattr(task, split)) for split in ("calibrate", "validate", "test"))
    assert set(calibrate) <= set(validate) <= set(test)
    assert len(validate) == len(test) // 2 and len(calibrate) < len(validate)
    assert task.train is None and "nothing to train on" in task.notes


def test_a_pair_is_two_neighbouring_rows_padded_and_masked():
    task = find_task("zoo:stsb-minilm")
    batch = next(task.batches("test", 3))
    assert batch["input_ids"].shape[0] == 6 == 2 * len(batch["labels"])
    lengths = [len(sentence) for pair in task.test.tokens[:3] for sentence in pair]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"].shape[1] == max(lengths)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


def test_titles_are_windows_of_what_came_before():
    task = find_task("zoo:titles-lstm")
    ids = task.test.titles[0]
    item = task.test[0]
    assert item["x"].shape == (len(ids) - 1, 40)
    assert item["labels"].tolist() == ids[1:].tolist()
    for place, row in enumerate(item["x"]):
        before = ids[: place + 1][-40:].tolist()
        assert row.tolist() == [0] * (40 - len(before)) + before
    assert ids[0] == ids[-1]
