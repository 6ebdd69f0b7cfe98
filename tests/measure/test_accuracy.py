"""Accuracy off the artifact."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from measured_task import two_inputs
from numpy_target import NumpyTarget

from featherweight.core.axis import Bench
from featherweight.core.errors import NotFinite, TaskError
from featherweight.core.evaluate import torch_figure
from featherweight.core.metric import Metric
from featherweight.core.reading import find
from featherweight.core.target import Artifact
from featherweight.measure.accuracy import Accuracy


def test_it_is_what_the_torch_model_reaches(bench: Callable[..., Bench]):
    made = bench(flip=4)
    readings = Accuracy().read(made)
    top = find(readings, "original", "top1")
    assert top is not None and top.n == 150 and top.unit == "%" and top.split == "test"
    assert top.value == torch_figure(made.task, split="test") == 80.0
    assert top.low is not None and top.high is not None and 72 < top.low < 80 < top.high < 88
    assert top.conditions == {"batch": 32}


def test_drop_and_agreement_are_paired(bench: Callable[..., Bench]):
    """4 inputs of each of the 5 batches get the opposite answer: 130 of 150 agree."""
    readings = Accuracy().read(bench(flip=4))
    agreement, drop = find(readings, "compressed", "agreement"), find(readings, "compressed", "drop")
    original, compressed = find(readings, "original", "top1"), find(readings, "compressed", "top1")
    assert agreement is not None and drop is not None and original is not None and compressed is not None
    assert agreement.value == pytest.approx(100 * 130 / 150)
    assert drop.value == pytest.approx(original.value - compressed.value)
    assert drop.low is not None and drop.high is not None and 0 < drop.low < drop.value < drop.high
    width = (original.high or 0) - (original.low or 0)
    assert drop.high - drop.low < width  # paired: narrower than the interval of either figure


def test_an_equal_artifact_drops_nothing(bench: Callable[..., Bench]):
    readings = Accuracy().read(bench())
    drop, agreement = find(readings, "compressed", "drop"), find(readings, "compressed", "agreement")
    assert drop is not None and (drop.value, drop.low, drop.high) == (0, 0, 0)
    assert agreement is not None and agreement.value == 100
    assert agreement.low is not None and 97 < agreement.low < 98  # 150 of 150 does not prove 100%


def test_a_lower_is_better_metric_drops_upwards(original: Artifact, bench: Callable[..., Bench]):
    made = bench(flip=4)
    error = Metric(
        "error",
        lambda out, batch: 100.0 * (out["logits"].argmax(-1) != np.asarray(batch["labels"])),
        unit="%",
        higher_is_better=False,
    )
    made.task = replace(made.task, metric=error)
    drop = find(Accuracy().read(made), "compressed", "drop")
    assert drop is not None and drop.value > 0


def test_one_pass_and_no_more(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch):
    made, seen = bench(), []
    batches = type(made.task).batches

    def counted(task, split, *rest):
        for batch in batches(task, split, *rest):
            seen.append(len(batch["x"]))
            yield batch

    monkeypatch.setattr(type(made.task), "batches", counted)
    Accuracy().read(made)
    assert seen == [32, 32, 32, 32, 22]


def test_not_finite_names_the_artifact_and_the_split(bench: Callable[..., Bench]):
    with pytest.raises(NotFinite, match=r"compressed artifact .*compressed gives NaN .* 'test'"):
        Accuracy().read(bench(spoil=True))


def test_a_missing_split_is_said(original: Artifact):
    with pytest.raises(TaskError, match="no 'test' data"):
        Accuracy().read(Bench(two_inputs(test=None), original))


def test_an_empty_split_is_said(original: Artifact):
    with pytest.raises(TaskError, match="'test' is empty"):
        Accuracy().read(Bench(two_inputs(test=[]), original))


def test_batches_of_a_size_that_the_artifact_does_not_take(tmp_path: Path):
    task = two_inputs(dynamic={})
    fixed = NumpyTarget().export(task.original, task.example, tmp_path / "fixed", free={})
    with pytest.raises(TaskError, match="holds 32 inputs, but the artifact takes 2 at a time"):
        Accuracy().read(Bench(task, fixed))


def test_few_resamples_for_many_inputs():
    assert Accuracy(resamples=1000)._resamples(np.zeros(100_000_000)) == 200
    assert Accuracy(resamples=1000)._resamples(np.zeros(10_000)) == 1000
