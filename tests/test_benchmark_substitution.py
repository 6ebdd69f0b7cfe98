"""The benchmark of substitution: few enough multiply-accumulates, every figure on the page, a run that goes on."""

from pathlib import Path

import pytest
from small_tasks import one_thread  # noqa: F401

from benchmarks import substitution
from benchmarks.substitution import Ledger, finished, page

HERE = Path(__file__).parent
WAYS = ["plain", "block by block"]


def arguments(folder: Path) -> list[str]:
    given = ["--task", f"{HERE / 'tiny_tasks.py'}:bars", "--ways", *WAYS, "--seconds", "3", "--threads", "1"]
    given += ["--fewer", "2.5", "--lr", "0.01", "--timing", "0.05", "--batches", "1", "--date", "2026-01-31"]
    return [*given, "--out", str(folder), "--models", str(folder / "models"), "--page", str(folder / "page.md")]


def test_every_network_is_written_down_and_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert substitution.main(arguments(tmp_path)) == 0
    (ledger,) = finished(tmp_path, "2026-01-31")
    forms = [(row.name, row.form) for row in ledger.rows]
    assert forms == [(name, form) for name in ("original", *WAYS) for form in ("float32", "int8")]
    original = ledger.rows[0]
    for row in ledger.rows[2:]:
        assert original.macs / row.macs >= 2.5 and row.parameters < original.parameters
        assert row.epochs > 0 and row.busy_seconds < 6 and row.timings
    text = (tmp_path / "page.md").read_text()
    assert text == page([ledger])
    for row in ledger.rows:
        assert f"| {row.name} | {row.form} | {row.accuracy.value:.2f} [" in text
    monkeypatch.setattr(substitution, "made", lambda *given: pytest.fail("trained again"))
    assert substitution.main(arguments(tmp_path)) == 0
    (again,) = finished(tmp_path, "2026-01-31")
    assert [row.accuracy for row in again.rows] == [row.accuracy for row in ledger.rows]


def test_networks_made_on_other_terms_are_made_anew(tmp_path: Path) -> None:
    given = arguments(tmp_path)
    task = substitution.find_task(given[1])
    run = substitution.Run(substitution.arguments(given), task)
    run.ledger.rows = []
    run.keep([])
    longer = substitution.Run(substitution.arguments([*given, "--seconds", "4"]), task)
    assert longer.ledger.budget_seconds == 4 and longer.path == run.path
    assert Ledger.model_validate_json(run.path.read_text()).budget_seconds == 3


def test_the_page_of_the_repository_is_that_of_its_newest_ledgers() -> None:
    root = HERE.parent
    ledgers = sorted((root / "benchmarks" / "ledger").glob("substitution-*.json"))
    written = root / "docs" / "benchmarks-substitution.md"
    assert bool(ledgers) == written.is_file()
    if ledgers:
        newest = max(Ledger.model_validate_json(path.read_text("utf-8")).date for path in ledgers)
        assert written.read_text("utf-8") == page(finished(root / "benchmarks" / "ledger", newest))
