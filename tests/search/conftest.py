"""Each test of the search keeps models between steps in a folder of its own, and times artifacts briefly."""

from pathlib import Path

import pytest

from featherweight.search import judge


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(judge, "TIMING_SECONDS", 0.03)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
