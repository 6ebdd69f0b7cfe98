"""The page of the benchmark of experts, from its ledgers."""

from __future__ import annotations

from typing import Any

from .record import Figure, Record, Timing

PAGE = """\
# Benchmarks: mixtures of experts

This page is generated from a ledger by the command below; do not edit it. Metrics are those of the ONNX file over the
whole test split, brackets are 95% intervals. *MACs* are multiply-accumulates of one input, read off a run of the file:
only experts that are chosen count. *Faster*: than the original's file in the same rounds, median of the ratios; below 1
it is slower. *Healed*: trained by the outputs of the original for the epochs of the command. Seconds are those of the
processor, export and judging not included.
"""
HEADS = {
    "dense": "Feed-forwards as experts, beside neurons pruned by magnitude, at equal compute",
    "mixture": "A tiny network of the Mixtral layout, trained here: two layers of 8 experts, 2 a token",
    "time": "One layer in the runtime, beside a dense one with all of its neurons",
}


class Row(Record):
    """One way to make or shrink experts, and what became of it."""

    part: str
    name: str
    steps: list[dict[str, Any]]
    metric: Figure | None = None
    macs: int = 0
    dense_macs: int = 0
    bytes: int = 0
    cpu_seconds: float = 0.0
    timing: Timing | None = None
    coverage: dict[str, str] = {}


class Ledger(Record):
    """One run of this benchmark on one task."""

    benchmark: str = "experts"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    seed: int
    clock: str
    task: str
    metric: str
    higher_is_better: bool
    notes: str
    original: Figure
    macs: int
    bytes: int
    rows: list[Row]


def page(ledgers: list[Ledger]) -> str:
    """The whole page in Markdown."""
    lines = [PAGE]
    for ledger in ledgers:
        versions = ", ".join(f"{name} {number}" for name, number in ledger.versions.items())
        lines += [f"## {ledger.task}", "", f"* Date: {ledger.date}", f"* Machine: {ledger.machine}"]
        lines += [f"* Versions: {versions}", f"* Latency: of one thread, batch 1, {ledger.clock} clock"]
        lines += [f"* Command: `{ledger.command}`", "", ledger.notes, ""]
        for part, head in HEADS.items():
            rows = [row for row in ledger.rows if row.part == part]
            if rows:
                lines += [f"### {head}", "", *(_times(rows) if part == "time" else _judged(ledger, part, rows)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _judged(ledger: Ledger, part: str, rows: list[Row]) -> list[str]:
    better = "higher" if ledger.higher_is_better else "lower"
    lines = [
        f"| method | {ledger.metric} ({better} is better) | MACs | bytes | faster | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    if part == "dense":
        lines.append(f"| float32 | {text(ledger.original)} | {ledger.macs:,} | {ledger.bytes:,} | | |")
    for row in rows:
        assert row.metric is not None
        work = f"{row.macs:,} | {row.bytes:,} | {faster(row)} | {row.cpu_seconds:.0f}"
        lines.append(f"| {row.name} | {text(row.metric)} | {work} |")
    told = next((row.coverage for row in rows if row.coverage), {})
    if told:
        which = rows[0].name if part == "mixture" else "the first split"
        lines += ["", f"Who is routed where on the calibration data, of {which}:", ""]
        lines += [f"* {name}: {how}" for name, how in told.items()]
    return lines


def _times(rows: list[Row]) -> list[str]:
    lines = [
        "| computed, of | MACs | of the dense layer's | ms | faster than the dense layer |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        assert row.timing is not None
        middle = row.timing.p50_ms
        shown = f"{middle.value:.3f} [{middle.low:.3f}, {middle.high:.3f}]"
        lines.append(f"| {row.name} | {row.macs:,} | {row.macs / row.dense_macs:.1%} | {shown} | {faster(row)} |")
    return lines


def faster(row: Row) -> str:
    assert row.timing is not None
    ratio = row.timing.faster
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def text(found: Figure) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
