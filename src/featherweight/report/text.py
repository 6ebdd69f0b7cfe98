"""Figures and recipes as short text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

MINUS, THIN = "\u2212", "\u00a0"  # a true minus sign; a space that does not break between a figure and its unit
LABELS = {
    "file_bytes": "artifact on disk",
    "weight_bytes": "weights",
    "macs": "multiply-accumulates",
    "integer_macs": "of these on integers",
    "p50_ms": "latency p50",
    "p95_ms": "latency p95",
    "p99_ms": "latency p99",
    "mean_ms": "latency mean",
    "peak_bytes": "peak resident memory",
    "added_bytes": "memory added by the model",
    "floor_bytes": "memory of the empty runtime",
    "drop": "lost, paired",
    "speedup": "speed-up, paired",
    "ratio": "original size / compressed",
    "energy_ratio": "original energy / compressed",
    "agreement": "same answer as the original",
    "mj_per_inference": "energy per inference",
}


def label(name: str) -> str:
    """What a reading's name means, in words."""
    return LABELS.get(name, name.replace("_", " "))


def number(value: float, digits: int = 4) -> str:
    """A figure with `digits` significant digits, thousands separated; whole numbers in full."""
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif value != 0 and not 1e-4 <= abs(value) < 1e15:
        text = f"{value:.{digits - 1}e}"
    else:
        rounded = float(f"{value:.{digits - 1}e}")  # 0.99996 has the places of 1.00
        places = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
        text = f"{value:,.{places}f}"
    return text.replace("-", MINUS)


def scaled(value: float, step: float, names: tuple[str, ...]) -> str:
    """`value` in the largest unit of `names` (each `step` times the last) in which it is at least 1."""
    place = 0
    while abs(value) >= step and place < len(names) - 1:
        value, place = value / step, place + 1
    if abs(value) >= step * 0.9995 and place < len(names) - 1:
        value, place = value / step, place + 1
    return f"{number(value if place else round(value), 3)}{THIN}{names[place]}".strip()


def size(value: float) -> str:
    """Bytes in decimal units: 1.16 MB is 1,160,000 bytes."""
    return scaled(value, 1000, ("B", "kB", "MB", "GB", "TB"))


def count(value: float) -> str:
    """A count: in full below a million, then in millions and more."""
    return number(round(value)) if abs(value) < 1e6 else scaled(value / 1000, 1000, ("k", "M", "G", "T"))


def amount(value: float, unit: str, digits: int = 3) -> str:
    """A value with its unit, as it stands in a table."""
    if unit in ("bytes", "byte", "B"):
        return size(value)
    if unit == "x":
        return times(value)
    if unit in ("%", "points"):
        return f"{value:.2f}{THIN}{unit}".replace("-", MINUS)
    if float(value).is_integer() and abs(value) >= 1e6:
        return f"{count(value)}{THIN}{unit}".strip()
    return f"{number(value, digits)}{THIN}{unit}".strip()


def interval(low: float, high: float, unit: str) -> str:
    """An interval, its unit once where both ends have the same."""
    start, end = amount(low, unit), amount(high, unit)
    figure, space, name = start.partition(THIN)
    return f"{figure if space and end.endswith(space + name) else start} to {end}"


def moment(stamp: str) -> str:
    """A moment in ISO 8601 as a person writes it; anything else as it is."""
    try:
        return f"{datetime.fromisoformat(stamp):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return stamp


def signed(value: float, unit: str, digits: int = 2) -> str:
    """A difference with its sign; differences of percentages are points."""
    unit = points(unit)
    text = number(abs(value), digits) if unit != "points" else f"{abs(value):.2f}"
    if float(text.replace(",", "") or 0) == 0:
        return f"±0{THIN}{unit}".strip()
    return f"{'+' if value > 0 else MINUS}{text}{THIN}{unit}".strip()


def points(unit: str) -> str:
    """The unit of a difference: percentages differ by points."""
    return "points" if unit == "%" else unit


def lost(value: float, unit: str) -> str:
    """A loss with its unit: two decimals for points, else three significant digits."""
    text = f"{value:.2f}".replace("-", MINUS) if points(unit) == "points" else number(value, 3)
    return f"{text}{THIN}{points(unit)}".strip()


def plain(value: float) -> str:
    """A figure that a user gave, without the zeros that they did not."""
    return f"{value:,.6g}".replace("-", MINUS)


def percent(before: float, after: float) -> str:
    """The change from `before` to `after` in percent of `before`."""
    if before == 0:
        return "" if after else "±0%"
    change = 100 * (after - before) / before
    if abs(change) < 0.5:
        return "±0%"
    return f"{'+' if change > 0 else MINUS}{abs(change):,.0f}%"


def times(factor: float) -> str:
    """A factor: 8.93x, 26.1x, 140x."""
    return f"{factor:.2f}x" if factor < 10 else f"{factor:.1f}x" if factor < 100 else f"{factor:,.0f}x"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 1:
        return f"{number(seconds * 1000, 2)}{THIN}ms"
    if seconds < 90:
        return f"{seconds:.1f}{THIN}s"
    minutes = round(seconds / 60)
    return f"{minutes}{THIN}min" if minutes < 90 else f"{minutes // 60}{THIN}h {minutes % 60}{THIN}min"


def settings(values: Mapping[str, Any]) -> str:
    """Settings as `name=value` pairs, nested ones in brackets; without those that are None or an empty list."""
    given = {key: value for key, value in values.items() if key != "kind" and value is not None and value != []}
    return ", ".join(f"{key}={_value(value)}" for key, value in given.items())


def step(item: Any) -> str:
    """One step of a recipe: its kind with its settings."""
    if not isinstance(item, Mapping):
        return str(item)
    given = settings(item)
    kind = str(item.get("kind", "step"))
    return f"{kind}({given})" if given else kind


def recipe(value: Mapping[str, Any]) -> str:
    """A recipe in one line."""
    steps = value.get("steps") or []
    return " + ".join(step(item) for item in steps) or "no step"


def clip(text: Any, limit: int = 400) -> str:
    """`text` cut to `limit` characters; run.json keeps all of it."""
    text = str(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return f"({settings(value)})"
    return "[" + ", ".join(map(_value, value)) + "]" if isinstance(value, list | tuple) else str(value)
