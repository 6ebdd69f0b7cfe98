"""What the command line shows: progress on standard error, tables on standard output, and nothing else there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from .core.progress import Progress

if TYPE_CHECKING:
    from .core.reading import Reading
    from .core.run import Run

REDRAW_SECONDS = 0.2
PIPE_WIDTH = 120
BETTER_AND_WORSE = {
    "size": ("smaller", "larger"),
    "latency": ("faster", "slower"),
    "memory": ("less", "more"),
    "energy": ("less", "more"),
}
MORE_IS_BETTER = ("throughput",)
DETAILS = ("p95_ms", "p99_ms", "mean_ms", "weight_bytes", "added_bytes", "ratio", "p50_ratio")


class Bars(Progress):
    """Bars for what is counted and lines for what is said, on standard error; where that is no terminal, lines only.

    Bars are redrawn by the work that they count, not by a thread: a thread would disturb the latencies measured.
    """

    def __init__(self, console: Console):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.console = console
        self.bars = RichProgress(
            *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
        )
        self.drawn = 0.0

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bars.stop()

    def track(self, items: Iterable[Any], text: str, total: int | None = None) -> Iterator[Any]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        task = self.bars.add_task(escape(text), total=total)
        try:
            for item in items:
                yield item
                self.bars.update(task, advance=1)
                self._draw()
        finally:
            self.bars.remove_task(task)
            self._draw()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        if time.monotonic() - self.drawn > REDRAW_SECONDS:
            self.bars.refresh()
            self.drawn = time.monotonic()


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for the tables where the output goes into a file or pipe."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPE_WIDTH
    return made


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what is written to standard output meanwhile, by Python or by a library's C code, to standard error."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        if os.name == "posix":  # what C code printed still waits in its own buffer
            ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)


def show_run(out: Console, run: Run, folder: Path, details: bool = False) -> None:
    """The verdict, the table of what was gained and lost, the warnings, and where everything is."""
    out.print(f"\n[bold {'green' if run.feasible else 'red'}]{escape(run.verdict)}[/]\n", soft_wrap=True)
    out.print(gains_table(run.readings, details))
    if run.candidates:
        states = [candidate.state for candidate in run.candidates]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        out.print(f"{len(states)} recipes tried: {counts}")
    for place, step in enumerate(run.recipe.get("steps", []), 1):
        settings = ", ".join(f"{key}={value}" for key, value in step.items() if key != "kind")
        out.print(f"step {place}: {step['kind']}{f' ({settings})' if settings else ''}", markup=False, soft_wrap=True)
    for warning in run.warnings:
        out.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    for name, path in (
        ("artifact", folder / "artifact"),
        ("recipe", folder / "recipe.yaml"),
        ("report", folder / "report.html"),
    ):
        if path.exists():
            out.print(f"{name + ':':<10}{path}", markup=False, soft_wrap=True)


def gains_table(readings: list[Reading], details: bool = False) -> Table:
    """Original against compressed, a row for each figure and condition; `details` adds tails and derived figures."""
    table = Table("axis", "figure", "original", "compressed", "change")
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    axis = ""
    for pair in pairs(readings):
        one = next(iter(pair.values()))
        if one.name in DETAILS and not details:
            continue
        cells = [figure(pair[subject]) if subject in pair else "" for subject in ("original", "compressed")]
        table.add_row(one.axis if one.axis != axis else "", escape(label(one)), *cells, change(pair))
        axis = one.axis
    return table


def pairs(readings: list[Reading]) -> list[dict[str, Reading]]:
    """The readings of the same figure under the same conditions together, by subject, in order."""
    found: dict[tuple[Any, ...], dict[str, Reading]] = {}
    for reading in readings:
        found.setdefault((reading.axis, reading.name, *sorted(reading.conditions.items())), {})[reading.subject] = (
            reading
        )
    return list(found.values())


def label(reading: Reading) -> str:
    """The name of a figure with its conditions, and with its split where there is one."""
    conditions = [f"{key} {value}" for key, value in reading.conditions.items() if reading.axis != "accuracy"]
    parts = [
        *conditions,
        *([reading.split] if reading.split else []),
        *(["modelled"] if reading.kind == "modelled" else []),
    ]
    return f"{reading.name} ({', '.join(parts)})" if parts else reading.name


def figure(reading: Reading) -> str:
    """A value with its unit, and with its 95% interval where it has one."""
    spread = (
        f" ({number(reading.low)} to {number(reading.high)})"
        if reading.low is not None and reading.high is not None
        else ""
    )
    return f"{number(reading.value)} {reading.unit}".rstrip() + spread


def number(value: float) -> str:
    """Whole numbers in full, others to four digits."""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.4g}"


def change(pair: dict[str, Reading]) -> str:
    """How the compressed figure stands to the original's: a ratio in words, a difference for accuracies, or nothing."""
    if len(pair) < 2:
        return ""
    original, compressed = pair["original"], pair["compressed"]
    if original.axis not in BETTER_AND_WORSE:
        return f"{compressed.value - original.value:+,.4g} {original.unit}".rstrip()
    if original.value <= 0 or compressed.value <= 0:
        return ""
    ratio = original.value / compressed.value
    ratio = 1 / ratio if original.name in MORE_IS_BETTER else ratio
    better, worse = BETTER_AND_WORSE[original.axis]
    colour, times, word = ("green", ratio, better) if ratio >= 1 else ("red", 1 / ratio, worse)
    return f"[{colour}]{times:.2f}x {word}[/]" if f"{times:.2f}" != "1.00" else "same"


def show_catalog(out: Console, entries: list[dict[str, Any]]) -> None:
    """One block for each thing there is: its name and first sentence, what else is known, and its settings."""
    for entry in entries:
        out.print(f"\n[bold]{escape(entry['name'])}[/]  {escape(entry['summary'])}", soft_wrap=True)
        for key in ("paper", "stores", "carries"):
            if entry.get(key):
                value = entry[key] if isinstance(entry[key], str) else ", ".join(entry[key])
                out.print(f"  {key}: {value}", markup=False, soft_wrap=True)
        if entry["missing"]:
            out.print(
                f"  [yellow]not installed:[/] {', '.join(entry['missing'])}; run: {escape(entry['install'])}",
                soft_wrap=True,
            )
        if entry.get("settings"):
            out.print(settings_table(entry["settings"]))


def settings_table(settings: list[dict[str, Any]]) -> Table:
    """Name, type, default, allowed values and searched range of every setting."""
    table = Table(
        "setting", "type", "default", "allowed", "the search tries", box=None, padding=(0, 2, 0, 2), header_style="dim"
    )
    for row in settings:
        default = "required" if row["required"] else "none" if row["default"] is None else str(row["default"])
        table.add_row(*map(escape, (row["name"], row["type"], default, row["range"], row["searched"])))
    return table
