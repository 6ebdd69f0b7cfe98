"""Size off the disk and off the manifest."""

from collections.abc import Callable
from pathlib import Path

import pytest
from measured_task import two_inputs
from numpy_target import NumpyTarget

from featherweight.core.axis import Bench
from featherweight.core.errors import ArtifactError
from featherweight.core.reading import find
from featherweight.core.target import Artifact, Work
from featherweight.measure.energy import Energy, modelled
from featherweight.measure.size import Size


def test_bytes_are_those_of_the_file(bench: Callable[..., Bench], original: Artifact):
    made = bench(work={"integer_macs": 100, "weight_bytes": 321})
    readings = Size().read(made)
    values = {name: find(readings, "original", name) for name in ("file_bytes", "parameters", "macs", "integer_macs")}
    assert (
        values["file_bytes"] is not None
        and values["file_bytes"].value == (original.folder / "weights.npz").stat().st_size
    )
    parameters = 3 * 8 + 8 * 16 + 16 + 16 * 5 + 5
    assert values["parameters"] is not None and values["parameters"].value == parameters
    assert values["macs"] is not None and values["macs"].value == 8 * 16 + 16 * 5
    found = [find(readings, "compressed", name) for name in ("integer_macs", "weight_bytes", "ratio")]
    assert [reading.value for reading in found if reading] == [100, 321, 1.0]


def test_a_changed_file_is_refused(bench: Callable[..., Bench]):
    made = bench()
    assert made.compressed is not None
    with made.compressed.file.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="its digest differs"):
        Size().read(made)


@pytest.mark.parametrize("axis", [Size(), Energy()])
def test_an_artifact_of_one_batch_size_is_counted_at_that(axis: Size | Energy, tmp_path: Path):
    task = two_inputs(dynamic={})
    fixed = NumpyTarget().export(task.original, task.example, tmp_path / "fixed", free={})
    readings = [reading for reading in axis.read(Bench(task, fixed)) if reading.conditions]
    assert readings and {reading.conditions["batch"] for reading in readings} == {2}


def test_modelled_energy_is_that_of_one_input():
    work = Work(parameters=1, macs=100, weight_bytes=0)
    assert modelled(work, 0, batch=2).value == pytest.approx(modelled(work, 0).value / 2)
