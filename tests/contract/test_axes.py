"""What every axis promises, on whatever axes are installed: real figures of every artifact, with their origin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from measured_task import two_inputs
from torch import nn

from featherweight.core import registry
from featherweight.core.axis import Axis, Bench
from featherweight.core.machine import describe
from featherweight.core.reading import Reading
from featherweight.core.target import Artifact, target
from featherweight.core.task import Task
from featherweight.measure.read import read

registry.load("axes")
AXES = sorted(Axis.kinds)
QUICK = {
    "latency": {"seconds": 0.05, "loads": 2, "batches": (1, 3)},
    "memory": {"repeats": 1},
    "energy": {"seconds": 0.05},
}


def smaller() -> nn.Module:
    """The task's model with its smaller weights at zero: another artifact of the same form."""
    model = two_inputs().fresh()
    with torch.no_grad():
        for weight in model.parameters():
            weight[weight.abs() < 0.1] = 0
    return model


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Task, Artifact, Artifact]]:
    """A model with two named inputs, one of integers, and a dict of outputs, in ONNX Runtime."""
    task, folder, runtime = two_inputs(), tmp_path_factory.mktemp("axes"), target("onnxruntime")
    yield (
        task,
        *(runtime.export(made, task.example, folder / name) for name, made in (("a", task.original), ("b", smaller()))),
    )


@pytest.fixture(scope="module", params=AXES)
def figures(
    request: pytest.FixtureRequest, artifacts: tuple[Task, Artifact, Artifact]
) -> tuple[str, list[Reading], list[Reading]]:
    """An axis' readings without and with a compressed artifact."""
    task, original, compressed = artifacts
    item = Axis.kinds[request.param](**QUICK.get(request.param, {}))
    return request.param, item.read(Bench(task, original)), item.read(Bench(task, original, compressed))


Figures = tuple[str, list[Reading], list[Reading]]


def test_it_says_what_it_measures(figures: Figures):
    kind = Axis.kinds[figures[0]]
    assert kind.__doc__ and len(kind.__doc__.strip().splitlines()[0]) > 30
    assert kind.model_config["frozen"] and kind.model_config["extra"] == "forbid"


def test_every_subject_has_the_same_figures(figures: Figures):
    _, alone, both = figures
    assert {reading.subject for reading in alone} == {"original"}
    assert {reading.subject for reading in both} == {"original", "compressed"}
    names = [
        {(reading.name, *sorted(reading.conditions.items())) for reading in both if reading.subject == subject}
        for subject in ("original", "compressed")
    ]
    assert names[0] <= names[1]
    assert {(reading.name, *sorted(reading.conditions.items())) for reading in alone} == names[0]


def test_every_figure_says_where_it_comes_from(figures: Figures):
    name, alone, both = figures
    for reading in [*alone, *both]:
        assert reading.axis == name
        assert math.isfinite(reading.value)
        assert reading.unit or reading.name in ("parameters", "macs", "integer_macs")
        assert reading.machine == describe()
        assert reading.runtime.startswith("onnxruntime 1.")
        assert reading.kind == "measured" or "model" in reading.conditions
        if reading.low is not None and reading.high is not None:
            assert reading.low <= reading.value <= reading.high
        if reading.axis in ("accuracy", "latency", "memory"):
            assert reading.n is not None and reading.n >= 1


def test_a_figure_is_named_once(figures: Figures):
    for readings in figures[1:]:
        keys = [(reading.subject, reading.name, *sorted(reading.conditions.items())) for reading in readings]
        assert len(set(keys)) == len(keys)


def test_readings_go_through_json(figures: Figures):
    for reading in figures[2]:
        assert Reading.model_validate_json(reading.model_dump_json()) == reading


def test_no_two_axes_share_a_name_of_a_figure(artifacts: tuple[Task, Artifact, Artifact]):
    """Figures are looked up by name alone."""
    axes = [Axis.kinds[name](**QUICK.get(name, {})) for name in AXES]
    owners: dict[str, set[str]] = {}
    for reading in read(Bench(*artifacts), axes):
        owners.setdefault(reading.name, set()).add(reading.axis)
    assert {name: axes for name, axes in owners.items() if len(axes) > 1} == {}


def test_accuracy_is_the_same_in_torch_and_in_the_runtime(artifacts: tuple[Task, Artifact, Artifact]):
    task, original, _ = artifacts
    (top,) = read(Bench(task, original), ["accuracy"])
    assert top.value == 80.0


def test_the_compressed_model_is_what_is_measured(artifacts: tuple[Task, Artifact, Artifact]):
    task, original, compressed = artifacts
    readings = read(Bench(task, original, compressed), ["accuracy"])
    agreement = next(reading for reading in readings if reading.name == "agreement")
    names = ("x", "kind")
    runners = [artifact.open() for artifact in (original, compressed)]
    same = [
        np.mean(
            [
                a == b
                for a, b in zip(
                    *(runner(**{name: batch[name] for name in names})["logits"].argmax(1) for runner in runners)
                )
            ]
        )
        for batch in task.batches("test", batch_size=150)
    ]
    assert agreement.value == pytest.approx(100 * same[0])
    assert agreement.value < 100


@pytest.mark.slow
def test_an_artifact_compared_with_itself_is_no_faster(artifacts: tuple[Task, Artifact, Artifact], tmp_path: Path):
    """The interval holds 1 in at least 19 of 20 comparisons of a file with itself, on a busy machine too."""
    task, original, _ = artifacts
    item = Axis.kinds["latency"](batches=(1,), seconds=1.0)
    held = 0
    for seed in range(20):
        readings = item.read(Bench(task, original, original, seed=seed))
        (speedup,) = (reading for reading in readings if reading.name == "speedup")
        assert speedup.low is not None and speedup.high is not None
        held += speedup.low <= 1 <= speedup.high
        assert speedup.high / speedup.low < 1.5
    assert held >= 19
