"""The page of a ledger: every figure, losses included. Again: `python -m benchmarks.page LEDGER.json PAGE.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from featherweight.core.files import write_text

from .record import Figure, Ledger, Network, Row
from .verdict import OURS, accuracy, duels, keeping, made, milliseconds, ours, speed, verdict

INTRODUCTION = """\
This page is generated from a ledger by the command below; do not edit it. Every file was made from the same float32
network and the same calibration data, and all files of one network were measured in one run (`--add` keeps networks of
earlier ones): accuracy over the whole test split in ONNX Runtime; latency with all contenders interleaved in one
process, one thread. Brackets are 95% intervals. *Faster*
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
        lines += ["", f"## {network.task}", "", *decided(network, ledger.max_drop), *table(network), *failures(network)]
    return "\n".join([*lines, "", "## The contenders", "", *who(ledger)]) + "\n"


def table(network: Network) -> Iterator[str]:
    """Every contender on one network."""
    batches = [timing.batch for timing in network.rows[0].timings]
    head = ["contender", f"{network.metric}{f' ({network.unit})' if network.unit else ''}", "lost", "bytes", "smaller"]
    head += [f"{text}, batch {batch}" for batch in batches for text in ("ms", "faster")]
    original = network.rows[0]
    n = original.accuracy.n if original.accuracy else 0
    clock = ", in time of the processor (what else the machine does is left out)" if network.clock != "wall" else ""
    busy = f" Latency of {network.timed}, at a load average of {network.load:.1f}{clock}." if network.load else ""
    yield f"Test inputs: {n}. Calibration inputs: {network.calibration_inputs}.{busy} {network.notes}".strip()
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


def decided(network: Network, max_drop: float) -> Iterator[str]:
    """The verdict, with the figures that it comes from."""
    own = ours(network)
    if own is None:
        return
    yield f"**Verdict: {verdict(network, max_drop)}.**"
    yield ""
    for duel in duels(network, max_drop):
        form = "{:.2f}" if duel.what == "accuracy" else "{:.3g} ms"
        unit = "" if duel.what == "accuracy" else "x"
        both_sides = f"{form.format(duel.ours)}, the best of the others ({duel.rival}) {form.format(duel.theirs)}"
        yield f"* {duel.what}: ours {both_sides}: {with_spread(duel.ahead, unit)}, {duel.outcome}"
    yield f"* chosen: {own.note}"
    yield ""


def failures(network: Network) -> Iterator[str]:
    for row in network.rows:
        if row.state != "done":
            yield ""
            yield f"{row.contender} {'failed' if row.state == 'failed' else f'is {row.state}'}: {row.reason}"


def summary(ledger: Ledger) -> Iterator[str]:
    """Ours against the others' best; who loses more than the bar counts for accuracy only."""
    yield (
        f"Fastest and smallest among those that lose at most {ledger.max_drop:g}% of the original's figure. A ratio"
        " above 1, or a positive difference, is in favour of featherweight. Ours is the file chosen by the validation"
        " split, theirs the best on the test split. *Level*: the 95% interval of the difference holds none."
    )
    yield ""
    head = ["network", "accuracy: ours / theirs", "difference", "bytes: ours / theirs", "ratio"]
    batches = [timing.batch for timing in ledger.networks[0].rows[0].timings]
    head += [text for batch in batches for text in (f"ms, batch {batch}: ours / theirs", "ratio")]
    yield from rows_of([*head, "verdict"], (against(network, ledger.max_drop, batches) for network in ledger.networks))


def against(network: Network, max_drop: float, batches: list[int]) -> list[str]:
    best = max if network.higher_is_better else min
    sign = 1 if network.higher_is_better else -1
    line = [network.task]
    own, rival = (best(map(accuracy, side), default=None) for side in sides(network, made(network)))
    line += [both(own, rival, "{:.2f}"), "" if own is None or rival is None else f"{sign * (own - rival):+.2f}"]
    kept = sides(network, keeping(network, max_drop))
    own, rival = (min((row.bytes for row in side), default=None) for side in kept)
    line += [both(own, rival, "{:,.0f}"), "" if own is None or rival is None else f"{rival / own:.2f}"]
    for batch in batches:
        fast, faster = (max(side, key=lambda row: speed(row, batch), default=None) for side in kept)
        own, rival = (None if row is None else milliseconds(row, batch) for row in (fast, faster))
        line.append(both(own, rival, "{:.3g}"))
        line.append("" if fast is None or faster is None else f"{speed(fast, batch) / speed(faster, batch):.2f}")
    return [*line, verdict(network, max_drop)]


def sides(network: Network, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Our row (all of ours where none was chosen), and those of the others."""
    chosen = ours(network)
    own = [row for row in rows if row.package == OURS] if chosen is None else [row for row in rows if row is chosen]
    return own, [row for row in rows if row.package != OURS]


def both(ours: float | None, theirs: float | None, form: str) -> str:
    return " / ".join("none" if value is None else form.format(value) for value in (ours, theirs))


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
    write_page(Ledger.read(ledger_path), page_path)
