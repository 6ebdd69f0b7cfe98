"""Peers in environments of their own: found or said to be missing; what a network's figures come to."""

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gptq, int8, page, weights
from benchmarks.compare import Terms, compare
from benchmarks.contender import load, one_length
from benchmarks.peers import NotInstalled, Peer, names, requirements, write_calibration
from benchmarks.peers.calibration import inputs_in
from benchmarks.record import CHOSEN, Figure, Network, Row, Timing
from benchmarks.verdict import ORIGINAL, duels, verdict

TASKS = str(Path(__file__).parent / "tiny_tasks.py")


def figure(value: float, half: float = 0.1) -> Figure:
    return Figure(value=value, low=value - half, high=value + half, n=200)


def row(name: str, accuracy: float, faster: float, ahead: float = 0.0, times: float = 1.0) -> Row:
    """A contender: `ahead` and `times` are how much better and faster our chosen file was."""
    timing = Timing(
        batch=1, threads=1, p50_ms=figure(1 / faster, 0), faster=figure(faster, 0), ahead=figure(times, 0.02)
    )
    return Row(
        contender=name,
        package="featherweight" if name in (ORIGINAL, CHOSEN) else "peer",
        about="As it is.",
        accuracy=figure(accuracy),
        drop=figure(90 - accuracy),
        ahead=figure(ahead),
        bytes=1000,
        timings=[timing],
    )


def network(*rows: Row) -> Network:
    return Network(
        task="zoo:some",
        metric="top1",
        unit="%",
        higher_is_better=True,
        calibration_inputs=8,
        rows=[row(ORIGINAL, 90, 1.0), *rows],
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (row(CHOSEN, 90, 2.0), row("peer", 89.7, 1.8, 0.3, 1.1), "won in accuracy, batch 1"),
        (row(CHOSEN, 90, 2.0), row("peer", 89.95, 1.8, 0.05, 1.1), "won in batch 1; nothing lost"),
        (row(CHOSEN, 90, 2.0), row("peer", 89.95, 2.0, 0.05, 1.0), "level"),
        (row(CHOSEN, 89.8, 2.0), row("peer", 90, 1.8, -0.2, 1.1), "lost in accuracy; won in batch 1"),
        (row(CHOSEN, 90, 2.0), row("peer", 89.95, 2.5, 0.05, 0.8), "lost in batch 1"),
        (row(CHOSEN, 90, 0.9), row("peer", 89.95, 0.9, 0.05, 1.0), "float32 should ship (int8 is not faster)"),
        (row(CHOSEN, 80, 2.0), row("peer", 81, 2.0, -1, 1.0), "float32 should ship (loses too much)"),
    ],
)
def test_the_verdict_follows_the_intervals(ours: Row, theirs: Row, said: str) -> None:
    assert verdict(network(ours, theirs), 0.5).startswith(said)


def test_who_loses_too_much_is_no_rival_in_speed() -> None:
    found = duels(network(row(CHOSEN, 90, 2.0), row("slow", 89.9, 1.5), row("collapsed", 40, 9.0)), 0.5)
    assert [(duel.what, duel.rival) for duel in found] == [("accuracy", "slow"), ("batch 1", "slow")]


def test_without_rivals_there_is_no_verdict_but_speed_is_judged() -> None:
    assert verdict(network(row(CHOSEN, 90, 2.0)), 0.5) == "no verdict: none of the others made a file"
    assert verdict(network(), 0.5) == "no verdict: our chosen file was not made"


def test_every_peer_is_pinned_and_has_its_contenders() -> None:
    assert set(names()) >= {"nncf", "neural-compressor", "llmcompressor"}
    for name in names():
        assert all("==" in line for line in requirements(name).read_text("utf-8").split())
    assert {entrant.package for entrant in load().values()} >= {"nncf", "onnx-neural-compressor"}


def test_a_peer_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match="FEATHERWEIGHT_PEERS"):
        _ = Peer("nncf", None).python
    with pytest.raises(NotInstalled, match=r"benchmarks\.peers"):
        _ = Peer("nncf", tmp_path).python


def test_what_a_peer_raises_is_its_reason(tmp_path: Path) -> None:
    interpreter = tmp_path / "nncf" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    interpreter.chmod(0o755)
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
        Peer("nncf", tmp_path).run("quantize_nncf.py", "in.onnx", "data.npz", "out.onnx", "--preset", "mixed")


def test_calibration_data_reach_the_peers_in_order(tmp_path: Path) -> None:
    batches = [{"x": np.full((1, 2), place), "mask": np.ones((1, 3), bool)} for place in range(12)]
    found = inputs_in(str(write_calibration(tmp_path / "calibration.npz", batches)))
    assert [sorted(batch) for batch in found] == [["mask", "x"]] * 12
    assert [int(batch["x"][0, 0]) for batch in found] == list(range(12))


def test_masked_batches_get_one_length_and_others_stay() -> None:
    text = [{"ids": np.full((2, size), 7), "attention_mask": np.ones((2, size), int)} for size in (3, 5)]
    padded = one_length(text)
    assert [batch[name].shape for batch in padded for name in batch] == [(2, 5)] * 4
    assert padded[0]["attention_mask"].sum() == 6 and padded[0]["ids"][0].tolist() == [7, 7, 7, 0, 0]
    pictures = [{"x": np.ones((2, 1, 4, 4))}, {"x": np.ones((2, 1, 6, 6))}]
    assert [batch["x"].shape for batch in one_length(pictures)] == [(2, 1, 4, 4), (2, 1, 6, 6)]


def test_a_missing_peer_stands_in_the_ledger_and_on_the_page(tmp_path: Path) -> None:
    found = compare(f"{TASKS}:bars", [load()["nncf mixed"]], tmp_path, Terms([1], seconds=0.1), int8.Lines())
    assert {row.contender: row.state for row in found.rows} == {ORIGINAL: "done", "nncf mixed": "not installed"}
    assert any("nncf mixed is not installed: " in line for line in page.failures(found))


@pytest.mark.slow
def test_ours_is_chosen_by_the_validation_split(tmp_path: Path) -> None:
    entrant = load()[CHOSEN]
    found = compare(f"{TASKS}:bars", [entrant], tmp_path, Terms([1], seconds=0.1), int8.Lines())
    own = found.rows[1]
    assert own.state == "done", own.reason
    assert "lost on the validation split" in own.note and found.load is not None and found.timed


def test_the_command_of_a_ledger_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    words = ["--networks", "zoo:digits", "--date", "2026-01-31", "--peers", str(tmp_path), "--out", str(tmp_path)]
    said = int8.command(int8.arguments([*words, "--seconds", "1.5"]))
    assert said == ("python -m benchmarks.int8 --networks zoo:digits --date 2026-01-31 --seconds 1.5 --peers FOLDER")


def test_gptq_of_a_layer_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "OURS", {"featherweight, plain": gptq.OURS["featherweight, plain"]})
    words = ["--size", "128", "--inputs", "96", "--group", "64", "--runs", "1", "--date", "2026-01-31"]
    given = gptq.arguments([*words, "--out", str(tmp_path), "--page", str(tmp_path / "page.md")])
    given.peers = None
    found = gptq.measure(given)
    own, *theirs = found.rows
    assert own.state == "done", own.reason
    assert own.error is not None and 0 < own.error < found.to_nearest
    assert own.peak_mib[0] >= own.start_mib[0] > 0 and own.cpu_seconds[0] > 0
    assert theirs and all(row.state == "not installed" for row in theirs)
    text = gptq.page(found)
    assert "| featherweight, plain |" in text and "LLM Compressor is not installed: " in text


def test_the_error_of_a_layer_is_that_of_its_outputs(tmp_path: Path) -> None:
    weight, inputs = np.eye(4), np.diag([1.0, 1.0, 1.0, 0.0])
    np.save(tmp_path / "weight.npy", weight)
    np.save(tmp_path / "inputs.npy", inputs)
    changed = weight.copy()
    changed[3, 3] = 5  # no input reaches it
    assert gptq.error_of(tmp_path, changed) == 0
    changed[0, 0] = 2
    assert gptq.error_of(tmp_path, changed) == pytest.approx(1 / np.sqrt(3))


def test_the_gptq_page_of_the_repository_is_that_of_its_ledger() -> None:
    root = Path(__file__).parent.parent
    ledgers = sorted((root / "benchmarks" / "ledger").glob("gptq-*.json"))
    assert ledgers
    newest = gptq.Ledger.model_validate_json(ledgers[-1].read_text(encoding="utf-8"))
    assert (root / "docs" / "benchmarks-gptq.md").read_text(encoding="utf-8") == gptq.page(newest)


def test_the_page_of_weights_is_that_of_its_ledgers() -> None:
    root = Path(__file__).parent.parent
    folder = root / "benchmarks" / "ledger"
    dates = sorted(path.stem[-10:] for path in folder.glob("weights-*.json"))
    found = weights.page(weights.all_ledgers(folder, dates[-1]))
    assert (root / "docs" / "benchmarks-weights.md").read_text(encoding="utf-8") == found
