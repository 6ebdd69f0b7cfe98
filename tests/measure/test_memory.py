"""Memory of a fresh process."""

from collections.abc import Callable

import pytest
from numpy_target import variant

from featherweight.core.axis import Bench
from featherweight.core.errors import ArtifactError
from featherweight.core.reading import Reading, find
from featherweight.core.target import Artifact
from featherweight.measure.memory import Memory, weigh

MEBIBYTE = 2**20


def test_what_the_model_holds_is_found(bench: Callable[..., Bench]):
    made = bench(hold=64 * MEBIBYTE)
    readings = Memory(repeats=2).read(made)
    names = ("floor_bytes", "peak_bytes", "added_bytes")
    one, other = ([found(readings, subject, name) for name in names] for subject in ("original", "compressed"))
    assert other[2].value - one[2].value == pytest.approx(64 * MEBIBYTE, rel=0.05)
    assert other[0].value == pytest.approx(one[0].value, rel=0.05)
    for floor, peak, added in (one, other):
        assert floor.value + added.value <= peak.value * 1.01
        assert (
            peak.n == 2 and peak.low is not None and peak.high is not None and 0 <= peak.low <= peak.value <= peak.high
        )


def found(readings: list[Reading], subject: str, name: str) -> Reading:
    reading = find(readings, subject, name)
    assert reading is not None and reading.unit == "bytes"
    return reading


def test_the_process_holds_no_torch_and_nothing_of_its_parent(original: Artifact):
    """torch alone takes some 200 MiB; this process holds it, the fresh one must not be charged with that."""
    weight = weigh(original)
    assert weight["peak_bytes"] < 120 * MEBIBYTE
    assert weight["added_bytes"] < 8 * MEBIBYTE


def test_a_single_process_has_no_spread(bench: Callable[..., Bench]):
    made = bench()
    made.compressed = None
    readings = Memory(repeats=1).read(made)
    assert all(reading.low is None and reading.high is None and reading.n == 1 for reading in readings)


def test_a_failure_in_the_process_is_one_line(original: Artifact, tmp_path):
    broken = variant(original, tmp_path / "broken", fail="the runtime has no kernel for this")
    with pytest.raises(ArtifactError, match="fails in a fresh process: RuntimeError: the runtime has no kernel"):
        weigh(broken)


def test_a_process_that_does_not_end_is_ended(original: Artifact, tmp_path):
    with pytest.raises(ArtifactError, match="did not load and run within 1 s"):
        weigh(variant(original, tmp_path / "slow", delay=30.0), timeout=1.0)
