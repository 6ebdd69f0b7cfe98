"""The page of a diagnosis: which layers cost most, drawn, and the line that excludes the worst."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.diagnosis import Diagnosis, LayerPrice
from . import layers, text

MOST = 300  # rows
QUIETEST, LOUDEST = 60.0, 0.0  # decibels: the ends of the bars


@dataclass(frozen=True)
class Line:
    """The price of one layer in words, and the length of its bar (noise: the longer the worse) in percent."""

    price: LayerPrice
    drop: str
    interval: str
    signal: str
    bar: float
    skipped: bool


def lines(found: Diagnosis) -> list[Line]:
    """The layers, the worst first."""
    unit = str(found.metric["unit"])
    return [
        Line(
            price,
            text.lost(price.drop, unit),
            text.interval(price.low, price.high, unit),
            decibels(price.signal_db),
            _length(price.signal_db),
            price.layer in found.skip,
        )
        for price in found.layers[:MOST]
    ]


def decibels(value: float | None) -> str:
    """Signal to noise in words."""
    if value is None:
        return "no noise"
    return "not finite" if value <= -1e8 else f"{value:.1f} dB"


def _length(signal: float | None) -> float:
    if signal is None:
        return 0.0
    return 100 * min(1.0, max(0.0, (QUIETEST - signal) / (QUIETEST - LOUDEST)))


def sentence(found: Diagnosis) -> str:
    """What was found, in one or two sentences."""
    metric, unit, kind = found.metric["name"], str(found.metric["unit"]), found.method["kind"]
    if found.collapse is not None:
        where = f"; it starts at {found.collapse.layer} ({found.collapse.sign})" if found.collapse.layer else ""
        start = f"{kind} makes the model collapse: {found.collapse.how}{where}."
    else:
        after = text.amount(found.compressed or 0.0, unit)
        start = f"{kind} takes {metric} from {text.amount(found.original, unit)} to {after} on {found.n} inputs."
    return f"{start} {_advice(found, unit)}"


def _advice(found: Diagnosis, unit: str) -> str:
    aim = "what chance explains" if found.bar is None else f"the bar of {text.amount(found.bar, unit)}"
    if not found.skip:
        return f"No layer needs to be left out: the loss is within {aim}."
    names = ", ".join(found.skip[:4]) + (f" and {len(found.skip) - 4} more" if len(found.skip) > 4 else "")
    worst = f"The worst layer is {names}" if len(found.skip) == 1 else f"The worst layers are {names}"
    left = "" if found.skipped_drop is None else f" ({text.lost(found.skipped_drop, unit)} lost)"
    if found.enough:
        return f"{worst}; skipped, the loss is within {aim}{left}."
    return f"{worst}, but leaving that out does not bring the loss within {aim}{left}."


def view(found: Diagnosis) -> dict[str, Any]:
    """The values that the page lays out."""
    left: dict[str, list[str]] = {}
    for item in found.left:
        left.setdefault(item.reason, []).append(item.layer)
    return {
        "found": found,
        "sentence": sentence(found),
        "prices": lines(found),
        "left": [
            layers.Left("", reason, names[: layers.MOST_NAMES], max(0, len(names) - layers.MOST_NAMES))
            for reason, names in left.items()
        ],
    }
