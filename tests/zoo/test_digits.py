"""The embedded task."""

import torch

from featherweight.core.context import count_parameters
from featherweight.core.evaluate import torch_figure
from featherweight.core.task import SPLITS, find_task


def test_digits_is_accurate_stratified_and_stable():
    task = find_task("zoo:digits")
    task.check()
    assert task.source == "zoo:digits"
    assert [len(getattr(task, split)) for split in ("train", "validate", "test")] == [897, 300, 600]
    assert torch_figure(task) >= 98.5
    assert torch_figure(task, split="validate") >= 98
    assert 300_000 < count_parameters(task.original) < 1_000_000
    assert find_task("zoo:digits").digest == task.digest
    for split in ("train", "validate", "test"):
        share = torch.bincount(getattr(task, split).tensors[1]) / len(getattr(task, split))
        assert (share - 0.1).abs().max() < 0.01


def test_no_digit_is_in_two_splits():
    from collections import Counter

    from sklearn.datasets import load_digits

    task = find_task("zoo:digits")
    parts = [getattr(task, split).tensors for split in SPLITS if getattr(task, split) is not None]
    together = Counter(
        (image.numpy().tobytes(), int(label)) for images, labels in parts for image, label in zip(images, labels)
    )
    found = load_digits()
    images = torch.from_numpy(found.images).float() / 16
    assert together == Counter((image.numpy().tobytes(), int(label)) for image, label in zip(images, found.target))
    assert max(together.values()) == 1
