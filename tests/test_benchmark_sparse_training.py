"""The benchmark of sparse training: every figure of the ledger is on the page, and a run that was killed goes on."""

import json
from pathlib import Path

import pytest

from benchmarks import sparse_training
from benchmarks.sparse_training import Ledger
from benchmarks.sparse_training_page import page

TASKS = str(Path(__file__).parent / "tiny_tasks.py")


def arguments(folder: Path) -> list[str]:
    task = f"{TASKS}:bars"
    given = ["--task", task, "--timed", task, "--epochs", "1", "--interval", "1", "--seeds", "0", "--lr", "0.01"]
    given += ["--rounds", "2", "--steps", "2", "--date", "2026-01-31", "--device", "cpu"]
    return [*given, "--out", str(folder), "--page", str(folder / "page.md")]


def test_every_row_is_written_down_and_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sparse_training.main(arguments(tmp_path)) == 0
    path = tmp_path / "sparse-training-2026-01-31.json"
    found = Ledger.model_validate(json.loads(path.read_text()))
    assert [(row.contender, row.seed) for row in found.trained] == [
        (name, 0) for name in ("dense", "static", "set", "rigl")
    ]
    zeros = {row.contender: row.zeros for row in found.trained}
    assert zeros["dense"] < 0.01
    assert all(zeros[name] == pytest.approx(0.9, abs=0.02) for name in ("static", "set", "rigl"))
    text = (tmp_path / "page.md").read_text()
    for row in found.trained:
        assert f"{row.accuracy.value:.2f}" in text and row.accuracy.n == 200
    for way in found.timed:
        assert f"| {way.way} | " in text
        assert (way.state == "done") == (len(way.seconds) == 2) and (way.state == "done" or way.reason in text)
    assert found.timed[0].state == "done" and "refused: " in text
    assert page(found) == text
    monkeypatch.setattr(sparse_training, "run_step", lambda *given: pytest.fail("trained again"))
    assert sparse_training.main(arguments(tmp_path)) == 0
    assert Ledger.model_validate(json.loads(path.read_text())).trained == found.trained
    with pytest.raises(SystemExit, match="has another task or sparsity"):
        sparse_training.main([*arguments(tmp_path), "--sparsity", "0.5"])


def test_the_page_of_the_repository_is_that_of_its_ledger() -> None:
    root = Path(__file__).parent.parent
    ledgers = sorted((root / "benchmarks" / "ledger").glob("sparse-training-*.json"))
    written = root / "docs" / "benchmarks-sparse-training.md"
    assert bool(ledgers) == written.is_file()
    if ledgers:
        newest = Ledger.model_validate_json(ledgers[-1].read_text(encoding="utf-8"))
        assert written.read_text(encoding="utf-8") == page(newest)
