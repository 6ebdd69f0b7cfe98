"""What the command line shows: progress on standard error, tables on standard output, and nothing else there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from .core.diagnosis import Diagnosis
from .core.progress import Progress
from .report import compare, diagnosis, text

if TYPE_CHECKING:
    from .core.reading import Reading
    from .core.run import Run

REDRAW_SECONDS = 0.2
PIPE_WIDTH = 120
MOST_LAYERS = 20  # of a diagnosis
LABEL_WIDTH = 28  # so that wide intervals do not break the names of the figures
COLOURS = {"better": "green", "worse": "red"}
DETAILS = (
    "p95_ms",
    "p99_ms",
    "throughput",
    "speedup",
    "weight_bytes",
    "ratio",
    "added_bytes",
    "floor_bytes",
    "energy_ratio",
)


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
        self.interrupted = False
        self.before: Any = None
        self.unraisable = sys.unraisablehook

    def __enter__(self) -> Bars:
        self.interrupted = False
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._interrupt)
            self.unraisable, sys.unraisablehook = sys.unraisablehook, self._dropped
        self.bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bars.stop()
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            sys.unraisablehook = self.unraisable

    def _interrupt(self, *_: Any) -> None:
        """Ctrl-C. Python drops the exception if it falls into a destructor, so the next progress repeats it."""
        self.interrupted = True
        raise KeyboardInterrupt

    def _dropped(self, event: Any) -> None:
        """An exception that Python drops and prints: an interruption is not printed, because it is repeated."""
        if event.exc_type is not KeyboardInterrupt:
            self.unraisable(event)

    def _go_on(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def track(self, items: Iterable[Any], text: str, total: int | None = None) -> Iterator[Any]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        task = self.bars.add_task(escape(text), total=total)
        try:
            for item in items:
                yield item
                self._go_on()
                self.bars.update(task, advance=1)
                self._draw()
        finally:
            self.bars.remove_task(task)
            self._draw()

    def say(self, text: str) -> None:
        self._go_on()
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
    out.print(gains_table(run, details))
    if run.candidates:
        states = [candidate.state for candidate in run.candidates]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        out.print(f"{len(states)} recipes tried: {counts}")
    for place, step in enumerate(run.recipe.get("steps", []), 1):
        out.print(f"step {place}: {text.step(step)}", markup=False, soft_wrap=True)
    for warning in run.warnings:
        out.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    for name, path in (
        ("artifact", folder / "artifact"),
        ("recipe", folder / "recipe.yaml"),
        ("report", folder / "report.html"),
    ):
        if path.exists():
            out.print(f"{name + ':':<10}{path}", markup=False, soft_wrap=True)


def gains_table(run: Run, details: bool = False) -> Table:
    """Original against compressed, a row for each figure and condition; `details` adds the tails and the intervals."""
    table = Table("", "original", "compressed", "change", padding=(0, 2))
    table.columns[0].min_width = LABEL_WIDTH
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in compare.rows(run.readings, run.metric["name"], run.metric["higher_is_better"]):
        if details or row.name not in DETAILS:
            cells = [figure(reading, details) for reading in (row.original, row.compressed)]
            colour = COLOURS.get(row.direction)
            table.add_row(heading(row), *cells, f"[{colour}]{escape(row.change)}[/]" if colour else escape(row.change))
    return table


def show_diagnosis(out: Console, answer: dict[str, Any], folder: Path | None) -> None:
    """What was found, the layers with the worst first, the line for the recipe, and where the page is."""
    found = Diagnosis.model_validate({name: value for name, value in answer.items() if name != "line"})
    colour = "red" if found.collapse or not found.enough else "yellow" if found.skip else "green"
    out.print(f"\n[bold {colour}]{escape(diagnosis.sentence(found))}[/]\n", soft_wrap=True)
    table = Table("layer", f"{found.metric['name']} lost", "95% interval", "signal to noise", padding=(0, 2))
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for line in diagnosis.lines(found)[:MOST_LAYERS]:
        table.add_row(*map(escape, (line.price.layer, line.drop, line.interval, line.signal)))
    out.print(table)
    if len(found.layers) > MOST_LAYERS:
        out.print(f"and {len(found.layers) - MOST_LAYERS} quieter layers (--json and --out have all of them)")
    if found.line:
        out.print(found.line, markup=False, soft_wrap=True)
    if folder is not None:
        out.print(f"{'page:':<10}{folder / 'diagnosis.html'}", markup=False, soft_wrap=True)


def heading(row: compare.Row) -> str:
    """What a row shows, with the conditions that tell rows apart, and a mark where the figure was not measured."""
    words = [text.label(row.name), *([row.conditions] if row.axis == "latency" else [])]
    if row.axis == "accuracy":
        words += [row.joined("split"), f"n = {row.joined('n')}"]
    if "modelled" in row.joined("kind"):
        words.append("modelled")
    return escape(", ".join(words))


def figure(reading: Reading | None, details: bool = False) -> str:
    """A value with its unit, and in detail its 95% interval below; empty where there is none."""
    if reading is None:
        return ""
    value = text.amount(reading.value, reading.unit)
    if details and reading.low is not None and reading.high is not None:
        value += f"\n{text.interval(reading.low, reading.high, reading.unit)}"
    return escape(value)


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
        if entry.get("unset"):
            out.print(f"  [yellow]not set:[/] the environment variable {', '.join(entry['unset'])}", soft_wrap=True)
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
