"""The page of a ledger: every figure, losses included. Again: `python -m benchmarks.page LEDGER.json PAGE.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from featherweight.core.files import write_text

from .compare import ORIGINAL
from .record import Figure, Ledger, Network, Row

OURS = "featherweight"
INTRODUCTION = """\
This page is generated from a ledger by the command below; do not edit it. Every file was made from the same float32
network and the same calibration data, and all of them were measured in one run: accuracy over the whole test split in
ONNX Runtime; latency with all contenders interleaved in one process, one thread. Brackets are 95% intervals. *Faster*
and *smaller* are against the float32 original in the same runtime; a figure below 1 means slower or larger."""


def write_page(ledger: Ledger, path: Path) -> Path:
    """Write the page that `page` gives, whole or not at all."""
    write_text(path, page(ledger))
    return path


def page(ledger: Ledger) -> str:
    """The whole page in Markdown."""
    lines = [
        "# Benchmarks: int8",
        "",
        INTRODUCTION,
        "",
        f"* Date: {ledger.date}",
        f"* Machine: {ledger.machine}",
        f"* Versions: {', '.join(f'{name} {version}' for name, version in ledger.versions.items())}",
        f"* Command: `{ledger.command}`",
        "",
        "## Against the best of the others",
        "",
        *summary(ledger),
    ]
    for network in ledger.networks:
        lines += ["", f"## {network.task}", "", *table(network), *failures(network)]
    return "\n".join([*lines, "", "## The contenders", "", *who(ledger)]) + "\n"


def table(network: Network) -> Iterator[str]:
    """Every contender on one network."""
    batches = [timing.batch for timing in network.rows[0].timings]
    head = ["contender", f"{network.metric}{f' ({network.unit})' if network.unit else ''}", "lost", "bytes", "smaller"]
    head += [f"{text}, batch {batch}" for batch in batches for text in ("ms", "faster")]
    original = network.rows[0]
    n = original.accuracy.n if original.accuracy else 0
    yield f"Test inputs: {n}. Calibration inputs: {network.calibration_inputs}. {network.notes}".strip()
    yield ""
    yield from rows_of(head, (cells(row, original) for row in network.rows if row.state == "done"))


def cells(row: Row, original: Row) -> list[str]:
    assert row.accuracy is not None and row.drop is not None
    times = [text for item in row.timings for text in (f"{item.p50_ms.value:.3g}", with_spread(item.faster, "x"))]
    return [
        row.contender,
        with_spread(row.accuracy),
        with_spread(row.drop),
        f"{row.bytes:,}",
        f"{original.bytes / row.bytes:.2f}x",
        *times,
    ]


def failures(network: Network) -> Iterator[str]:
    for row in network.rows:
        if row.state == "failed":
            yield ""
            yield f"{row.contender} failed: {row.reason}"


def summary(ledger: Ledger) -> Iterator[str]:
    """featherweight's best against the others' best; who loses more than the bar counts for accuracy only."""
    yield (
        f"Fastest and smallest among those that lose at most {ledger.max_drop:g} in the metric's unit."
        " A ratio above 1, or a positive difference, is in favour of featherweight."
    )
    yield ""
    head = ["network", "accuracy: ours / theirs", "difference", "bytes: ours / theirs", "ratio"]
    batches = [timing.batch for timing in ledger.networks[0].rows[0].timings]
    head += [text for batch in batches for text in (f"ms, batch {batch}: ours / theirs", "ratio")]
    yield from rows_of(head, (against(network, ledger.max_drop, batches) for network in ledger.networks))


def against(network: Network, max_drop: float, batches: list[int]) -> list[str]:
    done = [row for row in network.rows if row.state == "done" and row.contender != ORIGINAL]
    kept = [row for row in done if row.drop is not None and row.drop.value <= max_drop]
    best = max if network.higher_is_better else min
    sign = 1 if network.higher_is_better else -1
    line = [network.task]
    ours, theirs = (best(map(accuracy, side), default=None) for side in sides(done))
    line += [both(ours, theirs, "{:.2f}"), "" if ours is None or theirs is None else f"{sign * (ours - theirs):+.2f}"]
    costs: list[list[list[float]]] = [[[row.bytes for row in side] for side in sides(kept)]]
    costs += [[[milliseconds(row, batch) for row in side] for side in sides(kept)] for batch in batches]
    for (our_costs, their_costs), form in zip(costs, ["{:,.0f}"] + ["{:.3g}"] * len(batches)):
        ours, theirs = min(our_costs, default=None), min(their_costs, default=None)
        line += [both(ours, theirs, form), "" if ours is None or theirs is None else f"{theirs / ours:.2f}"]
    return line


def sides(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Our rows, and those of the others."""
    return [row for row in rows if row.package == OURS], [row for row in rows if row.package != OURS]


def both(ours: float | None, theirs: float | None, form: str) -> str:
    return " / ".join("none" if value is None else form.format(value) for value in (ours, theirs))


def accuracy(row: Row) -> float:
    assert row.accuracy is not None
    return row.accuracy.value


def milliseconds(row: Row, batch: int) -> float:
    return next(timing.p50_ms.value for timing in row.timings if timing.batch == batch)


def who(ledger: Ledger) -> Iterator[str]:
    about = {row.contender: row.about for network in ledger.networks for row in network.rows}
    yield from (f"* **{name}**: {text}" for name, text in about.items())


def with_spread(figure: Figure, unit: str = "") -> str:
    return f"{figure.value:.2f}{unit} [{figure.low:.2f}, {figure.high:.2f}]"


def rows_of(head: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    """A Markdown table; all but the first column are aligned to the right."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if place == 0 else "---:" for place in range(len(head))) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


if __name__ == "__main__":
    ledger_path, page_path = map(Path, sys.argv[1:])
    write_page(Ledger.model_validate_json(ledger_path.read_text(encoding="utf-8")), page_path)
