"""Several axes at once."""

from collections.abc import Callable

import pytest

from featherweight.core.axis import Bench
from featherweight.core.errors import RecipeError
from featherweight.core.progress import Progress
from featherweight.measure.read import read
from featherweight.measure.size import Size


class Told(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_axes_by_name_and_by_value(bench: Callable[..., Bench]):
    made = bench()
    made.progress = progress = Told()
    readings = read(made, [Size(), "accuracy"])
    assert [reading.axis for reading in readings][:: len(readings) - 1] == ["size", "accuracy"]
    assert progress.lines == ["measuring size", "measuring accuracy"]


def test_an_unknown_axis_is_refused_before_anything_is_measured(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Size, "read", lambda *_: pytest.fail("measured"))
    with pytest.raises(
        RecipeError, match="there is no axis 'beauty'; the axes are: accuracy, energy, latency, memory, size"
    ):
        read(bench(), ["size", "beauty"])
