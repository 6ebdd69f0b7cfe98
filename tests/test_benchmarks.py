"""The benchmark: what stands in the ledger stands on the page, losses and failures included."""

import json
from pathlib import Path

import pytest

from benchmarks import aware, int8, page
from benchmarks.compare import ORIGINAL
from benchmarks.contender import load, singles
from benchmarks.record import Figure, Ledger, Network, Row, Timing

TASKS = str(Path(__file__).parent / "tiny_tasks.py")


def figure(value: float) -> Figure:
    return Figure(value=value, low=value - 1, high=value + 1, n=200)


def row(contender: str, package: str, accuracy: float, size: int, ms: float) -> Row:
    timings = [Timing(batch=1, threads=1, p50_ms=figure(ms), faster=figure(2 / ms))]
    lost = figure(90 - accuracy)
    return Row(
        contender=contender,
        package=package,
        about="As it is.",
        accuracy=figure(accuracy),
        drop=lost,
        bytes=size,
        timings=timings,
    )


def ledger(*rows: Row, higher_is_better: bool = True) -> Ledger:
    network = Network(
        task="zoo:some",
        metric="top1",
        unit="%",
        higher_is_better=higher_is_better,
        calibration_inputs=512,
        rows=[row(ORIGINAL, "featherweight", 90, 4000, 2.0), *rows],
    )
    return Ledger(
        benchmark="int8",
        date="2026-01-31",
        command="python -m benchmarks.int8",
        machine="a machine",
        versions={"torch": "2.13.0"},
        seed=0,
        max_drop=0.5,
        networks=[network],
    )


def test_the_page_compares_the_best_of_both_sides() -> None:
    found = page.page(
        ledger(
            row("ours", "featherweight", 89.8, 1000, 0.5),
            row("theirs", "peer", 89.9, 2000, 0.4),
            row("theirs, collapsed", "peer", 40, 10, 0.01),
        )
    )
    summary = next(line for line in found.splitlines() if line.startswith("| zoo:some |"))
    assert summary == (
        "| zoo:some | 89.80 / 89.90 | -0.10 | 1,000 / 2,000 | 2.00 | 0.5 / 0.4 | 0.80 "
        "| no verdict: our chosen file was not made |"
    )
    assert "| theirs, collapsed | 40.00 [39.00, 41.00] | 50.00 [49.00, 51.00] | 10 | 400.00x |" in found


def test_where_lower_is_better_the_difference_turns_round() -> None:
    found = page.page(
        ledger(
            row("ours", "featherweight", 89.8, 1000, 1), row("theirs", "peer", 89.9, 1000, 1), higher_is_better=False
        )
    )
    assert "| zoo:some | 89.80 / 89.90 | +0.10 |" in found


def test_a_failure_stands_on_the_page() -> None:
    failed = Row(
        contender="theirs", package="peer", about="As it is.", state="failed", reason="RuntimeError: no kernel"
    )
    found = page.page(ledger(failed))
    assert "theirs failed: RuntimeError: no kernel" in found and "| zoo:some | none / none |  |" in found


def test_single_inputs_hold_the_same_data() -> None:
    import numpy as np

    batches = [{"x": np.arange(6).reshape(3, 2)}, {"x": np.arange(4).reshape(2, 2)}]
    split = singles(batches)
    assert len(split) == 5
    assert np.array_equal(
        np.concatenate([item["x"] for item in split]), np.concatenate([item["x"] for item in batches])
    )


def test_contenders_are_found_and_say_with_which_settings_they_run() -> None:
    found = load()
    assert {entrant.package for entrant in found.values()} >= {"featherweight", "onnxruntime"}
    assert all(entrant.about.endswith(".") for entrant in found.values())


def test_one_run_writes_the_ledger_and_the_page(tmp_path: Path) -> None:
    sides = ["featherweight static", "onnxruntime static min-max", "onnxruntime dynamic"]
    arguments = ["--networks", f"{TASKS}:bars", "--contenders", *sides, "--seconds", "0.1", "--date", "2026-01-31"]
    written = tmp_path / "benchmarks.md"
    assert int8.main([*arguments, "--out", str(tmp_path), "--page", str(written)]) == 0
    found = Ledger.model_validate(json.loads((tmp_path / "int8-2026-01-31.json").read_text()))
    rows = {row.contender: row for row in found.networks[0].rows}
    assert ORIGINAL in rows and "featherweight static mse" in rows
    for name in (ORIGINAL, *sides):
        assert rows[name].state == "done", rows[name].reason
        assert rows[name].accuracy is not None and rows[name].accuracy.n == 200
        assert [timing.batch for timing in rows[name].timings] == [1, 32] and name in written.read_text()
    assert rows["featherweight static"].bytes < rows[ORIGINAL].bytes
    assert rows[ORIGINAL].drop is not None and rows[ORIGINAL].drop.value == 0
    assert page.page(found) == written.read_text()


def test_the_page_of_the_repository_is_that_of_its_ledger() -> None:
    root = Path(__file__).parent.parent
    ledgers = sorted((root / "benchmarks" / "ledger").glob("int8-*.json"))
    assert ledgers
    newest = Ledger.model_validate_json(ledgers[-1].read_text(encoding="utf-8"))
    assert (root / "docs" / "benchmarks.md").read_text(encoding="utf-8") == page.page(newest)


@pytest.mark.parametrize("argument", ["--networks", "--date"])
def test_wrong_usage_is_said(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        int8.main([argument])
    assert raised.value.code == 2 and argument in capsys.readouterr().err


def test_training_in_few_bits_is_written_down_and_not_done_twice(tmp_path: Path, monkeypatch) -> None:
    given = ["--task", f"{TASKS}:bars", "--widths", "W2A4", "--times", "0.25", "--lr", "0.01", "--date", "2026-01-31"]
    given += ["--models", str(tmp_path / "models"), "--out", str(tmp_path), "--page", str(tmp_path / "page.md")]
    assert aware.main(given) == 0
    first = json.loads((tmp_path / "aware-2026-01-31.json").read_text())
    assert [row["method"] for row in first["rows"]] == ["rounded", "trained"]
    assert all(row["accuracy"]["n"] == first["original"]["n"] > 0 and row["seconds"] > 0 for row in first["rows"])
    text = (tmp_path / "page.md").read_text()
    for row in first["rows"]:
        assert f"| W2A4 | {row['method']} | {row['accuracy']['value']:.2f} " in text and f"{row['bytes']:,}" in text
    monkeypatch.setattr(aware, "run_step", lambda *given: pytest.fail("trained again"))
    assert aware.main(given) == 0
    assert json.loads((tmp_path / "aware-2026-01-31.json").read_text()) == first
