"""The benchmark on MNIST: one network from training to the coded file; what is in the ledger stands on the page."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from benchmarks import lenet
from benchmarks.lenet_page import curve, page
from benchmarks.lenet_record import Ledger, Row
from featherweight.core.fit import Training


def row(name: str, seed: int, error: float, size: int) -> Row:
    return Row(
        network="lenet-5",
        seed=seed,
        name=name,
        steps=[] if name == "dense" else [{"kind": "quantize.entropy", "rate": 0.1}],
        validation_error=error,
        test_error=error,
        inputs=10_000,
        bytes=size,
        parameters=431_080,
        weights=1000,
        seconds=10,
    )


def ledger(*rows: Row) -> Ledger:
    found = Ledger(date="2026-01-31", command="python", machine="a machine", versions={}, rows=[])
    for each in rows:
        found.add(each)
    return found


def test_the_page_has_mean_spread_and_an_honest_verdict() -> None:
    rows = [row("dense", 0, 0.7, 1_724_320), row("rate 0.1", 0, 0.6, 4000), row("rate 0.1", 1, 0.9, 5000)]
    text = page(ledger(*rows, row("rate 1", 0, 0.9, 2000)))
    assert "| rate 0.1 | 2 | 0.75 ± 0.21 | 0.60 to 0.90 | 4,500 | 388 ± 61 | 1,000 | 10 |" in text
    assert "The smallest that meets it in the mean: rate 0.1, 388 times smaller at 0.75%; none with every seed." in text
    assert text.index("| dense | 1 ") < text.index("| rate 0.1 ") < text.index("| rate 1 ")
    assert "No recipe meets it." in page(ledger(row("rate 0.1", 0, 0.9, 4000)))


def test_a_row_takes_the_place_of_the_same_one() -> None:
    found = ledger(row("rate 0.1", 0, 0.7, 4000), row("rate 0.1", 0, 0.8, 3000))
    assert [each.bytes for each in found.rows] == [3000]


def test_the_curve_shows_every_file() -> None:
    drawn = xml.fromstring(curve(ledger(row("rate 0.1", 0, 0.7, 4000), row("rate 0.1", 1, 0.8, 3000))))
    space = "{http://www.w3.org/2000/svg}"
    assert len([each for each in drawn.iter(f"{space}circle") if each.get("class") == "ours"]) == 2


@pytest.mark.data
def test_a_run_goes_from_training_to_the_file_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"epochs": 0.05, "batch_size": 128}
    study = dataclasses.replace(
        lenet.STUDIES["lenet-300-100"],
        training=Training(**short, lr=2e-3),
        before=({"kind": "prune.weights", "sparsity": 0.5},),
        priced={"kind": "quantize.entropy", **short},
        rates=(0.1,),
    )
    monkeypatch.setitem(lenet.STUDIES, "lenet-300-100", study)
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    words = ["--date", "2026-01-31", "--networks", "lenet-300-100", "--seeds", "3", "--out", str(tmp_path)]
    words += ["--page", str(tmp_path / "page.md")]
    lenet.main(words)
    path = tmp_path / "lenet-2026-01-31.json"
    found = Ledger.model_validate_json(path.read_text("utf-8"))
    dense, small = found.rows
    assert dense.parameters == small.parameters == 266_610 and small.inputs == 10_000
    assert small.bytes < dense.bytes / 10 and small.weights <= 133_300 and small.test_error < 60
    assert (tmp_path / "page.svg").is_file() and "| rate 0.1 | 1 |" in (tmp_path / "page.md").read_text("utf-8")
    before = path.stat().st_mtime_ns
    lenet.main(words)
    assert path.stat().st_mtime_ns == before
