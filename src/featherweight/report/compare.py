"""The original beside the compressed artifact: rows of a table, headline figures, the bar."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from ..core.reading import Reading, find
from ..core.run import Budget, Run
from . import text

Direction = Literal["better", "worse", "same", ""]
HIGHER_IS_BETTER = {"throughput", "agreement", "speedup", "ratio"}
NEUTRAL = {"integer_macs", "floor_bytes"}
WORDS = {
    "size": ("smaller", "larger"),
    "latency": ("faster", "slower"),
    "macs": ("fewer", "more"),
    "parameters": ("fewer", "more"),
}
PAIRED = {
    "metric": "drop",
    "file_bytes": "ratio",
    "p50_ms": "speedup",
    "mj_per_inference": "energy_ratio",
}  # the reading of the change itself
SAME = 0.005  # ratios nearer to 1 than this are shown as "no change"


@dataclass(frozen=True)
class Row:
    """One figure of both artifacts; either may be missing."""

    axis: str
    name: str
    unit: str
    conditions: str
    original: Reading | None
    compressed: Reading | None
    change: str = ""
    direction: Direction = ""

    @property
    def readings(self) -> list[Reading]:
        return [reading for reading in (self.original, self.compressed) if reading is not None]

    def joined(self, field: str) -> str:
        """A field of both readings: once where they agree."""
        values = [str(getattr(reading, field)) for reading in self.readings if getattr(reading, field) is not None]
        return " / ".join(dict.fromkeys(f"{int(value):,}" if field == "n" else value for value in values))


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    figure: str
    unit: str
    caption: str
    detail: str
    direction: Direction


@dataclass(frozen=True)
class Limit:
    """One part of the bar: what was asked, what was reached, whether it was met (None: not measured)."""

    asked: str
    reached: str
    met: bool | None


def conditions(reading: Reading) -> str:
    """The conditions of a reading: "batch 1, 1 thread"."""
    words = []
    for key, value in reading.conditions.items():
        words.append(f"{value} thread{'s' if value != 1 else ''}" if key == "threads" else f"{key} {value}")
    return ", ".join(words)


def rows(readings: list[Reading], metric: str, higher_is_better: bool) -> list[Row]:
    """Every reading, those of both subjects of the same figure side by side, in the order in which they were taken."""
    pairs: dict[object, list[Reading]] = {}
    for reading in readings:
        key: tuple[object, ...] = (
            reading.axis,
            reading.name,
            reading.split,
            tuple(sorted(reading.conditions.items())),
            reading.unit,
            reading.kind,
        )
        if any(other.subject == reading.subject for other in pairs.get(key, [])):
            key += (len(pairs),)  # the same figure twice, on two machines for instance: a row of its own
        pairs.setdefault(key, []).append(reading)
    return [_row(pair, readings, metric, higher_is_better) for pair in pairs.values()]


def by_axis(found: list[Row]) -> list[tuple[str, list[Row]]]:
    """The rows under the axis they belong to; axes in the order in which they first come."""
    order = list(dict.fromkeys(row.axis for row in found))
    ranked = sorted(found, key=lambda row: order.index(row.axis))
    return [(axis, list(group)) for axis, group in groupby(ranked, key=lambda row: row.axis)]


def _row(pair: list[Reading], readings: list[Reading], metric: str, higher_is_better: bool) -> Row:
    by: dict[str, Reading] = {reading.subject: reading for reading in pair}
    original, compressed, any_ = by.get("original"), by.get("compressed"), pair[0]
    change: tuple[str, Direction] = ("", "")
    if original is not None and compressed is not None:
        direct = find(
            readings, "compressed", PAIRED.get("metric" if any_.name == metric else any_.name, ""), **any_.conditions
        )
        if any_.name == metric:
            change = difference(original, compressed, higher_is_better, direct)
        elif any_.name not in NEUTRAL:
            change = ratio(original, compressed, direct)
    unit = text.points(any_.unit) if any_.name == "drop" else any_.unit
    return Row(any_.axis, any_.name, unit, conditions(any_), original, compressed, *change)


def difference(
    original: Reading, compressed: Reading, higher_is_better: bool, direct: Reading | None = None
) -> tuple[str, Direction]:
    """The change of the metric, and whether it is for the better; neither, if the paired interval holds zero."""
    gain = compressed.value - original.value
    words = text.signed(gain, original.unit)
    if words.startswith("±") or (direct is not None and holds(direct, 0.0)):
        return words, "same"
    return words, "better" if (gain > 0) == higher_is_better else "worse"


def ratio(original: Reading, compressed: Reading, direct: Reading | None = None) -> tuple[str, Direction]:
    """The change as a factor; "no clear change" where a noisy figure leaves that open.

    `direct` is the paired reading of the same change (original / compressed), where there is one; else the two
    intervals are compared.
    """
    if original.value <= 0 or compressed.value <= 0:
        same = original.value == compressed.value
        return ("no change", "same") if same else (text.signed(compressed.value - original.value, original.unit), "")
    factor = 1 / direct.value if direct is not None and direct.value > 0 else compressed.value / original.value
    if abs(factor - 1) < SAME:
        return "no change", "same"
    if holds(direct, 1.0) if direct is not None else overlap(original, compressed):
        return "no clear change", "same"
    shrinks, grows = WORDS.get(original.name) or WORDS.get(original.axis, ("less", "more"))
    if original.name in HIGHER_IS_BETTER:
        shrinks, grows = "less", "more"
    better = (factor > 1) == (original.name in HIGHER_IS_BETTER)
    return f"{text.times(max(factor, 1 / factor))} {grows if factor > 1 else shrinks}", "better" if better else "worse"


def holds(reading: Reading, value: float) -> bool:
    """Whether the reading's interval, if it has one, contains `value`."""
    return reading.low is not None and reading.high is not None and reading.low <= value <= reading.high


def overlap(one: Reading, other: Reading) -> bool:
    """Whether both have an interval and these overlap."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low <= other.high and other.low <= one.high


# -- headline -----------------------------------------------------------------------------------------------------
def tiles(run: Run) -> list[Tile]:
    """The headline figures that the readings allow: size, latency, loss, agreement, memory."""
    found = [_size(run), _latency(run), _loss(run), _agreement(run), _memory(run)]
    return [tile for tile in found if tile is not None]


def pair(run: Run, name: str) -> tuple[Reading, Reading] | None:
    """The readings called `name` of both artifacts, at the smallest batch on the fewest threads."""
    found = [reading for reading in run.readings if reading.name == name and reading.subject == "original"]
    for original in sorted(found, key=load):
        compressed = find(run.readings, "compressed", name, **original.conditions)
        if compressed is not None:
            return original, compressed
    return None


def load(reading: Reading) -> tuple[float, ...]:
    """Batch size and threads of a reading, to order by; 1 where it does not say."""
    values = [reading.conditions.get(name, 1) for name in ("batch", "threads")]
    return tuple(value if isinstance(value, int | float) else 1 for value in values)


def _factor_tile(run: Run, name: str, words: str, more: str = "") -> Tile | None:
    both = pair(run, name)
    if both is None:
        return None
    original, compressed = both
    direct = find(run.readings, "compressed", PAIRED.get(name, ""), **original.conditions)
    detail = f"{text.amount(original.value, original.unit)} → {text.amount(compressed.value, compressed.unit)}"
    detail += ", ".join(["", *filter(None, [more, conditions(original)])])
    change, direction = ratio(original, compressed, direct)
    if direction == "same":
        return Tile("≈ 1x", "", f"{text.label(name)}: {change}", detail, direction)
    if direct is not None and direct.low is not None and direct.high is not None:
        detail += f", 95% interval {text.interval(direct.low, direct.high, 'x')}"
    figure, _, word = change.partition(" ")
    return Tile(figure, "", f"{word} {words}".strip(), detail, direction)


def _size(run: Run) -> Tile | None:
    return _factor_tile(run, "file_bytes", "")


def _latency(run: Run) -> Tile | None:
    return _factor_tile(run, "p50_ms", "", "p50")


def _memory(run: Run) -> Tile | None:
    return _factor_tile(run, "peak_bytes", "memory", "peak")


def loss(run: Run) -> tuple[float, Reading | None] | None:
    """How much of the metric was lost (negative: gained), and the reading that says so, if one does."""
    drop = find(run.readings, "compressed", "drop")
    if drop is not None:
        return drop.value, drop
    both = pair(run, str(run.metric.get("name", "")))
    if both is None:
        return None
    change = both[0].value - both[1].value
    return (change if run.metric.get("higher_is_better", True) else -change), None


def _loss(run: Run) -> Tile | None:
    lost, both = loss(run), pair(run, str(run.metric.get("name", "")))
    if lost is None:
        return None
    value, reading = lost
    unit, name = text.points(str(run.metric.get("unit", ""))), run.metric.get("name", "the metric")
    parts = (
        [f"{text.amount(both[0].value, both[0].unit, 4)} → {text.amount(both[1].value, both[1].unit, 4)}"]
        if both
        else []
    )
    if both and both[1].n:
        parts.append(f"n = {both[1].n:,}")
    if reading is not None and reading.low is not None and reading.high is not None:
        parts.append(f"95% interval {text.interval(reading.low, reading.high, unit)}")
    figure, _, _ = text.signed(abs(value), unit).lstrip("+").partition(text.THIN)
    if figure.startswith("±"):
        return Tile("nothing", "", f"of {name} lost", ", ".join(parts), "same")
    words = ("lost", "gained") if run.metric.get("higher_is_better", True) else ("higher", "lower")
    caption = f"of {name} {words[value < 0]}" if words[0] == "lost" else f"{words[value < 0]} {name}"
    allowed = run.budget.max_drop is not None and value <= run.budget.max_drop + 1e-9
    unclear = reading is not None and holds(reading, 0.0)
    direction: Direction = "" if unclear or (allowed and value > 0) else "better" if value < 0 else "worse"
    return Tile(figure, unit, caption, ", ".join(parts), direction)


def _agreement(run: Run) -> Tile | None:
    reading = find(run.readings, "compressed", "agreement")
    if reading is None:
        return None
    detail = f"of {reading.n:,} inputs" if reading.n else ""
    return Tile(
        *text.amount(reading.value, reading.unit).partition(text.THIN)[::2], "same answers as the original", detail, ""
    )


def gained(run: Run) -> bool | None:
    """Whether the artifact is smaller, faster or takes less memory; None if none of these was measured for both."""
    found = [tile.direction for tile in (_size(run), _latency(run), _memory(run)) if tile is not None]
    return "better" in found if found else None


# -- the bar ------------------------------------------------------------------------------------------------------
def limits(run: Run) -> list[Limit]:
    """Each part of the bar beside what the compressed artifact reached on the test split."""
    budget, found = run.budget, []
    lost, unit = loss(run), text.points(str(run.metric.get("unit", "")))
    if budget.max_drop is not None:
        allowed, name = f"at most {text.plain(budget.max_drop)} {unit}".rstrip(), run.metric.get("name", "the metric")
        asked, word = (
            (f"lose {allowed} of {name}", "lost")
            if run.metric.get("higher_is_better", True)
            else (f"{name} {allowed} higher", "higher")
        )
        reached = "" if lost is None else f"{text.lost(lost[0], unit)} {word}"
        found.append(Limit(asked, reached, None if lost is None else lost[0] <= budget.max_drop + 1e-9))
    for name, limit, unit in (("file_bytes", budget.max_size, "bytes"), ("p50_ms", budget.max_latency, "ms")):
        if limit is not None:
            both = pair(run, name)
            reached = text.amount(both[1].value, unit) if both else ""
            asked = f"at most {text.amount(limit, unit)}" + (
                " per input (p50, batch 1)" if unit == "ms" else " on disk"
            )
            found.append(Limit(asked, reached, both[1].value <= limit if both else None))
    return found


def has_bar(budget: Budget) -> bool:
    """Whether the user set any limit at all."""
    return any(limit is not None for limit in (budget.max_drop, budget.max_size, budget.max_latency))
