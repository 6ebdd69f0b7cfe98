"""The benchmark of pruned weights: its rows are steps that can be, and its page is that of its ledger."""

from pathlib import Path

from benchmarks import sparsity
from featherweight.core.step import step

ROOT = Path(__file__).parent.parent


def test_every_row_is_a_step_that_can_be_or_the_peers() -> None:
    rows = list(sparsity.contenders(sparsity.arguments(["--date", "2026-01-31"])))
    for row in rows:
        if row.name.startswith(sparsity.PEER):
            assert set(row.step) == {"score", "pattern", "sparsity"}
        else:
            made = step(row.step["kind"], **{name: value for name, value in row.step.items() if name != "kind"})
            assert made.sparsity == 0.5  # type: ignore[attr-defined]
    assert {row.pattern for row in rows} == {"none", "2:4"}
    assert len({str(row.step) for row in rows}) == len(rows), "no row is made twice"


def test_the_page_is_that_of_its_ledgers() -> None:
    folder = ROOT / "benchmarks" / "ledger"
    dates = sorted(path.stem[-10:] for path in folder.glob("sparsity-*.json"))
    found = sparsity.page(sparsity.all_ledgers(folder, dates[-1]))
    assert (ROOT / "docs" / "benchmarks-sparsity.md").read_text(encoding="utf-8") == found
