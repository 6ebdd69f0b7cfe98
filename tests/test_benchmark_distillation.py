"""The benchmark of distillation: every figure of the ledger is on the page, and a run that was killed goes on."""

import json
from pathlib import Path

import pytest
import torch
from small_tasks import one_thread  # noqa: F401
from torch import nn

from benchmarks import distillation
from benchmarks.distillation import Ledger, depthwise_and_pointwise
from benchmarks.distillation_page import page

HERE = Path(__file__).parent
WAYS = ["alone", "kl", "hint", "ensemble"]


def arguments(folder: Path) -> list[str]:
    bars, blocks = f"{HERE / 'tiny_tasks.py'}:bars", f"{HERE / 'small_tasks.py'}:blocks_task"
    given = ["--images", bars, "--teacher", bars, "--ensemble", bars, "--sentences", blocks, "--ways", *WAYS]
    given += ["--epochs", "1", "--sentence-epochs", "1", "--seeds", "0", "1", "--lr", "0.01", "--timing", "0.05"]
    given += ["--date", "2026-01-31", "--device", "cpu", "--out", str(folder), "--page", str(folder / "page.md")]
    return given


def test_every_row_is_written_down_and_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert distillation.main(arguments(tmp_path)) == 0
    path = tmp_path / "distillation-2026-01-31.json"
    found = Ledger.model_validate(json.loads(path.read_text()))
    images = [(row.seed, row.student, row.way) for row in found.rows if row.section == "images"]
    assert images == [(seed, student, way) for seed in (0, 1) for student in ("plain", "separable") for way in WAYS]
    sentences = [(row.seed, row.way) for row in found.rows if row.section == "sentences"]
    assert sentences == [(seed, way) for seed in (0, 1) for way in ("alone", "outputs", "DistilBERT")]
    original, student = found.sizes
    assert student.parameters < original.parameters and student.bytes < original.bytes
    text = (tmp_path / "page.md").read_text()
    assert page(found) == text
    for row in found.rows:
        assert f"{row.accuracy.value:.2f}" in text and f"| {row.way} |" in text
    parameters = {row.student: row.parameters for row in found.rows if row.section == "images"}
    assert parameters["separable"] < parameters["plain"]
    monkeypatch.setattr(distillation, "run_step", lambda *given: pytest.fail("trained again"))
    assert distillation.main(arguments(tmp_path)) == 0
    assert Ledger.model_validate(json.loads(path.read_text())).rows == found.rows


def test_two_thin_convolutions_give_what_one_gives() -> None:
    layer = nn.Conv2d(6, 9, 3, stride=2, padding=1)
    made = depthwise_and_pointwise(layer)
    image = torch.randn(2, 6, 8, 8)
    assert made(image).shape == layer(image).shape
    assert sum(each.numel() for each in made.parameters()) < sum(each.numel() for each in layer.parameters())


def test_the_page_of_the_repository_is_that_of_its_ledger() -> None:
    root = HERE.parent
    ledgers = sorted((root / "benchmarks" / "ledger").glob("distillation-*.json"))
    written = root / "docs" / "benchmarks-distillation.md"
    assert bool(ledgers) == written.is_file()
    if ledgers:
        newest = Ledger.model_validate_json(ledgers[-1].read_text(encoding="utf-8"))
        assert written.read_text(encoding="utf-8") == page(newest)
