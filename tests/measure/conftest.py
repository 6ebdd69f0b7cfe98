"""Artifacts of the numpy target for the tests of the axes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from measured_task import two_inputs
from numpy_target import NumpyTarget, variant

from featherweight.core.axis import Bench
from featherweight.core.target import Artifact, Target
from featherweight.core.task import Task


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numpy target is known by name in these tests alone, so that no contract suite takes it for one of ours."""
    monkeypatch.setitem(Target.kinds, "numpy", NumpyTarget)


@pytest.fixture
def task() -> Task:
    return two_inputs()


@pytest.fixture
def original(task: Task, tmp_path: Path) -> Artifact:
    return NumpyTarget().export(task.original, task.example, tmp_path / "original")


@pytest.fixture
def bench(task: Task, original: Artifact, tmp_path: Path) -> Callable[..., Bench]:
    """A bench on the original and on a copy of it with other settings; no copy where there are none."""

    def make(work: dict[str, Any] | None = None, **settings: Any) -> Bench:
        return Bench(task, original, variant(original, tmp_path / "compressed", work, **settings))

    return make
