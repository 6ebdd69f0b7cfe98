"""Size off the disk and off the manifest."""

from collections.abc import Callable

import pytest

from featherweight.core.axis import Bench
from featherweight.core.errors import ArtifactError
from featherweight.core.reading import find
from featherweight.core.target import Artifact
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
