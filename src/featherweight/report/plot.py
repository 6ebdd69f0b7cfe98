"""The accuracy-latency-size plot: pure geometry, in pixels of a fixed drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from ..core.run import Candidate, Run
from . import text
from .compare import pair

WIDTH, HEIGHT = 960.0, 460.0
LEFT, RIGHT, TOP, BOTTOM = 76.0, 20.0, 22.0, 54.0
LARGEST, SMALLEST = 26.0, 3.0  # radii of bubbles; areas in between are proportional to the size of the file
MOST = 400  # bubbles; the front, the chosen one and the feasible ones come first
RANK = {"original": 0, "chosen": 1, "front": 2, "feasible": 3, "other": 4}


@dataclass(frozen=True)
class Point:
    """What is drawn: its figures, its kind (a key of RANK), its words for hovering."""

    latency: float
    accuracy: float
    bytes: float
    kind: str
    tag: str
    title: str
    facts: list[tuple[str, str]]
    meets: bool = True
    number: int | str = ""


@dataclass(frozen=True)
class Mark:
    """A point in pixels. `beyond` says that it lies outside the drawing and stands at its edge."""

    x: float
    y: float
    r: float
    point: Point
    beyond: bool = False


@dataclass(frozen=True)
class Label:
    """A text beside a mark."""

    x: float
    y: float
    anchor: str
    text: str
    kind: str


@dataclass(frozen=True)
class Tick:
    """A line of the grid: where, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Scale:
    """A linear scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Plot:
    """The whole drawing."""

    marks: list[Mark]
    labels: list[Label]
    xticks: list[Tick]
    yticks: list[Tick]
    front: str  # points of the line through the front
    bar: float | None  # height of the line that the user's bar draws
    bar_text: str
    limit: float | None  # where the user's latency limit stands
    limit_text: str
    beyond: int
    hidden: int
    source: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def plot(run: Run) -> Plot | None:
    """The plot of a search; None if no candidate was measured."""
    measured = [item for item in run.candidates if _measured(item)]
    if not measured:
        return None
    measured.sort(key=lambda item: (RANK[kind(item)], item.number))
    base, source = original(run)
    points = [candidate_point(item, run) for item in measured[:MOST]]
    points = [base, *points] if base else points
    up = bool(run.metric.get("higher_is_better", True))
    bar = _bar(run, base, up)
    x, y = scales(points, bar, up, run.budget.max_latency)
    marks = sorted((_mark(point, x, y, max(other.bytes for other in points)) for point in points), key=_order)
    line = [(x(point.latency), y(point.accuracy)) for point in envelope(points, up)]
    unit = str(run.metric.get("unit", ""))
    return Plot(
        marks=marks,
        labels=place_labels(marks, along(line)),
        xticks=[Tick(x(value), text.plain(value)) for value in ticks(x.low, x.high, 8)],
        yticks=[Tick(y(value), text.plain(value)) for value in ticks(y.low, y.high, 6)],
        front=" ".join(f"{at[0]:.1f},{at[1]:.1f}" for at in line),
        bar=None if bar is None else y(bar),
        bar_text=f"the bar: at most {text.plain(run.budget.max_drop or 0)} {text.points(unit)} lost".replace("  ", " "),
        limit=None if run.budget.max_latency is None else x(run.budget.max_latency),
        limit_text=f"at most {text.amount(run.budget.max_latency or 0, 'ms')}",
        beyond=sum(mark.beyond for mark in marks),
        hidden=max(0, len(measured) - MOST),
        source=source,
    )


def _measured(item: Candidate) -> bool:
    values = (item.accuracy, item.latency_ms, item.bytes)
    return item.state == "done" and all(value is not None and math.isfinite(value) for value in values)


def kind(item: Candidate) -> str:
    """How a candidate is drawn."""
    return "chosen" if item.chosen else "front" if item.front else "feasible" if item.feasible else "other"


def original(run: Run) -> tuple[Point | None, str]:
    """The original as a point, from the first stage (validation split) or else the readings, and which of the two."""
    unit, name = str(run.metric.get("unit", "")), str(run.metric.get("name", "accuracy"))
    if run.stages:
        first = run.stages[0]
        values, source = (first.latency_ms, first.accuracy, float(first.bytes)), "validation split"
    else:
        found = [pair(run, "p50_ms"), pair(run, name), pair(run, "file_bytes")]
        if any(item is None for item in found):
            return None, "validation split"
        values, source = tuple(item[0].value for item in found if item), "validation split; the original: test split"  # type: ignore[assignment]
    latency, accuracy, size = values
    facts = [(name, text.amount(accuracy, unit, 4)), ("latency", text.amount(latency, "ms")), ("size", text.size(size))]
    return Point(latency, accuracy, size, "original", "original", "The original", facts), source


def candidate_point(item: Candidate, run: Run) -> Point:
    """A candidate with what hovering over it shows."""
    shown = kind(item)
    tag = "chosen" if shown == "chosen" else f"#{item.number}" if shown == "front" else ""
    title = f"#{item.number} {text.clip(text.recipe(item.recipe), 300)}"
    return Point(
        item.latency_ms or 0.0,
        item.accuracy or 0.0,
        float(item.bytes or 0),
        shown,
        tag,
        title,
        facts(item, run),
        item.feasible,
        item.number,
    )


def facts(item: Candidate, run: Run) -> list[tuple[str, str]]:
    """The figures of a candidate, in words."""
    unit, name = str(run.metric.get("unit", "")), str(run.metric.get("name", "accuracy"))
    found = []
    if item.accuracy is not None:
        found.append((name, text.amount(item.accuracy, unit, 4)))
    if item.drop is not None:
        found.append(("lost", text.lost(item.drop, unit)))
    if item.drop_high is not None:
        found.append(("lost, 95% bound", text.lost(item.drop_high, unit)))
    if item.latency_ms is not None:
        found.append(("latency", text.amount(item.latency_ms, "ms")))
    if item.bytes is not None:
        found.append(("size", text.size(item.bytes)))
    if item.energy_mj is not None:
        found.append(("energy", text.amount(item.energy_mj, "mJ")))
    state = ("chosen, " if item.chosen else "") + ("on the front, " if item.front else "")
    return [*found, ("state", state + ("meets the bar" if item.feasible else "does not meet the bar"))]


# -- scales -------------------------------------------------------------------------------------------------------
def _bar(run: Run, base: Point | None, up: bool) -> float | None:
    if base is None or run.budget.max_drop is None:
        return None
    return base.accuracy - run.budget.max_drop if up else base.accuracy + run.budget.max_drop


def scales(points: list[Point], bar: float | None, up: bool, limit: float | None) -> tuple[Scale, Scale]:
    """The two scales: latency from zero; accuracy so that better is up, around what matters.

    A recipe that ruined the model would squeeze all others together, so both scales are laid around the original, the
    bar and what meets it, reach a stated distance beyond, and what lies outside stands at the edge.
    """
    matters = [point for point in points if point.kind in ("original", "chosen") or point.meets]
    fast = [point.latency for point in matters] + ([limit] if limit else [])
    right = reach(fast, [point.latency for point in points], 0.6, 0.0)[1]
    good = [point.accuracy for point in matters] + ([bar] if bar is not None else [])
    low, high = reach(good, [point.accuracy for point in points], 3.0, None)
    pad = 0.11 * ((high - low) or abs(high) or 1.0)
    y = Scale(low - pad, high + pad, HEIGHT - BOTTOM, TOP) if up else Scale(low - pad, high + pad, TOP, HEIGHT - BOTTOM)
    return Scale(0.0, (right or 1.0) * 1.06, LEFT, WIDTH - RIGHT), y


def reach(core: list[float], every: list[float], spans: float, floor: float | None) -> tuple[float, float]:
    """The range of `core`, widened to those of `every` within `spans` times its span; from `floor` if given."""
    core = core or every
    low, high = min(core), max(core)
    start = low if floor is None else floor
    span = (high - start) or abs(high) * 0.01
    near = [value for value in every if start - spans * span <= value <= high + spans * span]
    return (min([low, *near]) if floor is None else floor), max([high, *near])


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round values (1, 2, 2.5 or 5 times a power of ten apart) between `low` and `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def envelope(points: list[Point], up: bool) -> list[Point]:
    """The points of the front that no other beats in both accuracy and latency, by rising latency: what the line joins.

    The front itself also counts size, so some of its points lie off the line.
    """
    found: list[Point] = []
    on_front = [point for point in points if point.kind in ("front", "chosen")]
    for point in sorted(on_front, key=lambda item: (item.latency, -item.accuracy if up else item.accuracy)):
        if not found or (point.accuracy > found[-1].accuracy if up else point.accuracy < found[-1].accuracy):
            found.append(point)
    return found


# -- marks and labels ---------------------------------------------------------------------------------------------
def _mark(point: Point, x: Scale, y: Scale, largest: float) -> Mark:
    radius = max(SMALLEST, LARGEST * math.sqrt(point.bytes / largest)) if largest > 0 else SMALLEST
    beyond = not (x.holds(point.latency) and y.holds(point.accuracy))
    if beyond:
        facts = [*point.facts, ("note", "lies outside the drawing; shown at its edge")]
        point, radius = replace(point, facts=facts), 5.0
    return Mark(x(point.latency), y(point.accuracy), radius, point, beyond)


def _order(mark: Mark) -> tuple[bool, float]:
    """Large bubbles first, so that small ones lie on top and can be reached; the chosen one last."""
    return mark.point.kind == "chosen", -mark.r


Box = tuple[float, float, float, float]
Disc = tuple[float, float, float]  # centre and radius of something that a label should not cover


def along(line: list[tuple[float, float]]) -> list[Disc]:
    """Small discs every few pixels along a line."""
    found = []
    for (x1, y1), (x2, y2) in pairwise(line):
        parts = max(1, round(math.hypot(x2 - x1, y2 - y1) / 8))
        found += [(x1 + (x2 - x1) * place / parts, y1 + (y2 - y1) * place / parts, 1.5) for place in range(parts + 1)]
    return found


def place_labels(marks: list[Mark], line: list[Disc]) -> list[Label]:
    """A label for each tagged mark, where it covers no other label and as little else as possible.

    A label of the front for which there is no room is left out.
    """
    taken: list[Box] = []
    found: list[Label] = []
    for mark in sorted(
        (mark for mark in marks if mark.point.tag and not mark.beyond), key=lambda mark: RANK[mark.point.kind]
    ):
        discs = [(other.x, other.y, other.r) for other in marks if other is not mark] + line
        choices = [(label, box) for label, box in _choices(mark) if _inside(box)]
        scored = sorted((_covered(box, taken, discs), place) for place, (_, box) in enumerate(choices))
        if not scored or (scored[0][0] >= OTHER_LABEL and mark.point.kind == "front"):
            continue
        label, box = choices[scored[0][1]]
        found.append(label)
        taken.append(box)
    return found


def _choices(mark: Mark) -> list[tuple[Label, Box]]:
    wide, tall, gap = 6.8 * len(mark.point.tag), 13.0, mark.r + 6
    diagonal = 0.72 * gap
    beside = [(gap, 4.0, "start"), (-gap, 4.0, "end"), (0.0, -gap, "middle"), (0.0, gap + 10, "middle")]
    above = [(diagonal, -diagonal, "start"), (-diagonal, -diagonal, "end")]
    below = [(diagonal, diagonal + 9, "start"), (-diagonal, diagonal + 9, "end")]
    found = []
    for dx, dy, anchor in [*beside, *above, *below]:
        x, y = mark.x + dx, mark.y + dy
        left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        found.append((Label(x, y, anchor, mark.point.tag, mark.point.kind), (left, y - tall + 2, left + wide, y + 2)))
    return found


def _inside(box: Box) -> bool:
    return box[0] >= LEFT and box[1] >= TOP and box[2] <= WIDTH - RIGHT and box[3] <= HEIGHT - BOTTOM


OTHER_LABEL = 1000.0  # what covering another label costs; covering a mark or a piece of the line costs its radius


def _covered(box: Box, taken: list[Box], discs: list[Disc]) -> float:
    """What a label at `box` would hide."""
    labels = sum(box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken)
    return OTHER_LABEL * labels + sum(radius for x, y, radius in discs if _distance(box, x, y) < radius)


def _distance(box: Box, x: float, y: float) -> float:
    return math.hypot(max(box[0] - x, 0.0, x - box[2]), max(box[1] - y, 0.0, y - box[3]))
