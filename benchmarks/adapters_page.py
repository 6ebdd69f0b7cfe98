"""The page of a ledger of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .page import rows_of, with_spread

INTRODUCTION = """\
This page is generated from a ledger by the command below; do not edit it. Every adapter was trained for the same epochs
on the same base, which stays as it is; *all weights* is ordinary training of the whole float network. Brackets are 95%
intervals over the test split. Perplexity: lower is better. Memory is the peak of the process while it trains, above
what it held before."""


def page(ledger: Any) -> str:
    """The whole page in Markdown."""
    lines = [
        "# Benchmarks: adapters",
        "",
        INTRODUCTION,
        "",
        f"* Date: {ledger.date}",
        f"* Machine: {ledger.machine}",
        f"* Versions: {', '.join(f'{name} {version}' for name, version in ledger.versions.items())}",
        f"* Clock: {ledger.clock}",
        f"* Command: `{ledger.command}`",
    ]
    for task, metric in ledger.metrics.items():
        lines += ["", f"## {task}", "", *_learned([row for row in ledger.learned if row.task == task], metric)]
    if ledger.switched:
        lines += ["", "## Three adapters over one loaded file", "", *_switched(ledger.switched)]
    if ledger.merged:
        lines += ["", "## Merged into integers", "", *_merged(ledger.merged)]
    return "\n".join(lines) + "\n"


def _learned(rows: list[Any], metric: str) -> Iterator[str]:
    head = ["base", "way", metric, "before", "trained parameters", "file, bytes", "ms a step", "memory, MB"]
    yield from rows_of(head, (_cells(row) for row in rows))


def _cells(row: Any) -> list[str]:
    memory = "" if row.peak_mb is None else f"{row.peak_mb:,.0f}"
    sizes = [f"{row.trained:,}", f"{row.bytes:,}", f"{row.step_ms:,.0f}", memory]
    return [row.base, row.way, with_spread(row.quality), f"{row.before.value:.2f}", *sizes]


def _switched(rows: list[Any]) -> Iterator[str]:
    yield (
        "LoRA of ranks 4, 8 and 16, in ONNX Runtime. Perplexity of each text with each adapter, all with one session; "
        "*torch* is the text's own adapter in torch."
    )
    yield ""
    names = list(rows[0].quality)
    yield from rows_of(["base", "text", "none", *names, "torch"], (line for row in rows for line in _qualities(row)))
    yield ""
    head = ["base", "base, bytes", "adapters, bytes", "load ms", "switch ms", "run ms: no slots"]
    head += ["none", *names, "memory of 100 switches, MB", "one session"]
    yield from rows_of(head, (_costs(row, names) for row in rows))


def _qualities(row: Any) -> Iterator[list[str]]:
    for text, found in row.quality.items():
        yield [row.base, text, *(f"{value:.3f}" for value in found.values()), f"{row.torch_quality[text]:.3f}"]


def _costs(row: Any, names: list[str]) -> list[str]:
    times = [f"{row.run_ms[name]:.2f}" for name in ("without slots", "none", *names)]
    sizes = [f"{row.base_bytes:,}", ", ".join(f"{size:,}" for size in row.adapter_bytes.values())]
    ends = [f"{row.switching_mb:.1f}", "yes" if row.one_session else "no"]
    return [row.base, *sizes, f"{row.load_ms:.1f}", f"{row.switch_ms:.2f}", *times, *ends]


def _merged(rows: list[Any]) -> Iterator[str]:
    yield "How far the outputs move from the adapter beside its base (relative), and the figure on the test split."
    yield ""
    head = ["task", "base", "moved: nearest", "with data", "within", "base alone", "beside", "nearest", "with data"]
    yield from rows_of(head, (_merge_cells(row) for row in rows))
    for row in rows:
        yield ""
        yield f"* {row.task}, {row.base}, at a tenth of that: `{row.refused or 'not refused'}`"


def _merge_cells(row: Any) -> list[str]:
    kept = f"{row.bound:g}: {'yes' if row.moved['with data'] <= row.bound else 'no'}"
    figures = [with_spread(row.quality[name]) for name in ("base", "beside", "nearest", "with data")]
    return [row.task, row.base, f"{row.moved['nearest']:.3f}", f"{row.moved['with data']:.3f}", kept, *figures]
