"""The benchmark of the coder: figures of a small network, and the page that is that of its ledger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_tasks import conv_task, one_thread  # noqa: F401

from benchmarks import coder


def test_the_integers_of_a_network_come_back_near_their_entropy() -> None:
    row = coder.measure("conv", "int4, a step per row", conv_task(), runs=1)
    weights = [p for name, p in conv_task().original.named_parameters() if p.dim() > 1]
    assert row.count == sum(p.numel() for p in weights) and row.tensors == len(weights)
    assert 2 < row.entropy < 4 and abs(row.over) < 0.05
    assert len(row.encode_seconds) == len(row.decode_seconds) == 1
    ledger = coder.Ledger(date="2026-01-31", command="x", machine="y", versions={}, rows=[row])
    text = coder.page(ledger)
    assert f"| {row.bits:.4f} | {row.over:+.2%} |" in text and f"Furthest above the entropy: {row.over:+.2%}" in text


def test_entropy_is_that_of_frequencies() -> None:
    assert coder.entropy(np.array([[0, 1, 2, 3]])) == pytest.approx(8)
    assert coder.entropy(np.zeros((2, 3), np.int64)) == 0


def test_the_page_of_the_repository_is_that_of_its_ledger() -> None:
    root = Path(__file__).parent.parent
    newest = sorted((root / "benchmarks" / "ledger").glob("coder-*.json"))[-1]
    ledger = coder.Ledger.model_validate_json(newest.read_text(encoding="utf-8"))
    assert (root / "docs" / "benchmarks-coder.md").read_text(encoding="utf-8") == coder.page(ledger)
    assert all(row.over < 0.01 for row in ledger.rows)
