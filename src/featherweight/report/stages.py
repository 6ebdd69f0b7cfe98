"""What each step of the chosen recipe did to each axis: a table and one small chart per axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..core.record import StepRecord
from ..core.run import Run, Stage
from . import text
from .compare import Direction

# Smaller changes than these are within what file headers and a busy machine do by themselves.
SMALLER, FASTER = 0.01, 0.03


@dataclass(frozen=True)
class Cell:
    """One figure after a step, and its change against the step before."""

    value: str
    delta: str = ""
    direction: Direction = ""


@dataclass(frozen=True)
class Line:
    """One step: its figures, and what it reported."""

    number: int
    after: str
    cells: list[Cell]
    nothing: bool
    record: StepRecord | None


@dataclass(frozen=True)
class Column:
    """One axis of the table of stages."""

    title: str
    read: Callable[[Stage], float]
    show: Callable[[float], str]
    change: Callable[[float, float], str]
    higher_is_better: bool = False
    noise: float = 0.0  # relative changes smaller than this are neither better nor worse


@dataclass(frozen=True)
class Bar:
    """One bar (or dot) of a small chart, in its own pixels."""

    x: float
    y: float
    height: float
    value: str
    delta: str
    direction: Direction
    number: int


@dataclass(frozen=True)
class Chart:
    """A small chart of one axis over the stages; `dots` where the scale does not start at zero."""

    title: str
    bars: list[Bar]
    dots: bool
    width: float
    slot: float = 58.0
    base: float = 96.0
    line: str = field(default="")


def columns(run: Run) -> list[Column]:
    """The axes of a stage, with how they are written."""
    unit = str(run.metric.get("unit", ""))
    metric = str(run.metric.get("name", "accuracy"))
    return [
        Column(
            metric,
            lambda stage: stage.accuracy,
            lambda value: text.amount(value, unit, 4),
            lambda before, after: text.signed(after - before, unit),
            bool(run.metric.get("higher_is_better", True)),
        ),
        Column("size", lambda stage: stage.bytes, text.size, text.percent),
        Column(
            "latency",
            lambda stage: stage.latency_ms,
            lambda value: text.amount(value, "ms"),
            text.percent,
            noise=FASTER,
        ),
        Column("parameters", lambda stage: stage.parameters, text.count, text.percent),
        Column("multiply-accumulates", lambda stage: stage.macs, text.count, text.percent),
    ]


def lines(run: Run) -> list[Line]:
    """The original, then the model after each step."""
    axes, found = columns(run), []
    for number, stage in enumerate(run.stages):
        before = run.stages[number - 1] if number else None
        record = run.steps[number - 1] if 0 < number <= len(run.steps) else None
        cells = [_cell(axis, before, stage) for axis in axes]
        found.append(Line(number, stage.after or "original", cells, bought_nothing(run, number), record))
    return found


def _cell(axis: Column, before: Stage | None, after: Stage) -> Cell:
    value = axis.read(after)
    if before is None:
        return Cell(axis.show(value))
    was = axis.read(before)
    delta = axis.change(was, value)
    if not delta or delta.startswith("±") or abs(value - was) < axis.noise * abs(was):
        return Cell(axis.show(value), delta, "same")
    return Cell(axis.show(value), delta, "better" if (value > was) == axis.higher_is_better else "worse")


def bought_nothing(run: Run, number: int) -> bool:
    """Whether the run warned that the step at this stage bought nothing.

    The warning names the kind: of several steps of one kind it means those that made the file neither smaller nor
    faster.
    """
    if number == 0:
        return False
    before, after = run.stages[number - 1], run.stages[number]
    if not any(line.startswith(f"{after.after} bought nothing") for line in run.warnings):
        return False
    alone = sum(stage.after == after.after for stage in run.stages) == 1
    return alone or (after.bytes > before.bytes * (1 - SMALLER) and after.latency_ms > before.latency_ms * (1 - FASTER))


def charts(run: Run) -> list[Chart]:
    """One small chart per axis; bars start at zero, the metric is drawn as dots on a scale of its own."""
    if len(run.stages) < 2:
        return []
    table = lines(run)
    return [
        _chart(axis, [axis.read(stage) for stage in run.stages], [line.cells[place] for line in table], place == 0)
        for place, axis in enumerate(columns(run))
    ]


def _chart(axis: Column, values: list[float], cells: list[Cell], dots: bool) -> Chart:
    room, base, slot = 62.0, Chart.base, Chart.slot
    low, high = (min(values), max(values)) if dots else (0.0, max(values))
    span = (high - low) or 1.0
    bars = []
    for number, (value, cell) in enumerate(zip(values, cells)):
        share = (value - low) / span if high > low else 0.5 if dots else 0.0
        height = 8 + share * (room - 16) if dots else share * room
        bars.append(
            Bar(
                slot * (number + 0.5),
                base - height,
                height,
                cell.value,
                cell.delta.partition(text.THIN)[0],
                cell.direction,
                number,
            )
        )
    path = " ".join(f"{bar.x:.1f},{bar.y:.1f}" for bar in bars) if dots else ""
    return Chart(axis.title, bars, dots, slot * len(values), line=path)
