"""One plain sentence about what was gained and lost, from the readings alone. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.metric import Metric
from ..core.reading import Reading, find
from ..core.run import Budget

THREADS = 1  # that the latency of the bar is judged on


@dataclass(frozen=True)
class Limit:
    """One limit of the bar in words, whether what it limits was measured, and by what it is broken (empty if not)."""

    words: str
    measured: bool
    broken: str = ""


@dataclass(frozen=True)
class Judged:
    """Every limit of the bar against the readings, by what is limited: "drop", "size", "latency"."""

    limits: dict[str, Limit]

    @property
    def met(self) -> bool:
        """Whether every limit was measured and is met; a bar without limits is."""
        return all(limit.measured and not limit.broken for limit in self.limits.values())

    def __str__(self) -> str:
        limits = self.limits.values()
        broken = [limit.broken for limit in limits if limit.broken]
        kept = [limit.words for limit in limits if limit.measured and not limit.broken]
        lacking = [limit.words for limit in limits if not limit.measured]
        said = (
            f"misses the bar ({'; '.join(broken)})" if broken else f"meets the bar of {', '.join(kept)}" if kept else ""
        )
        return "; ".join(filter(None, [said, f"not measured: {', '.join(lacking)}" if lacking else ""]))


def verdict(readings: Sequence[Reading], judged: Judged, metric: Metric, runtime: str, nearest: bool = False) -> str:
    """The sentence: gains and losses against the original, then whether the bar is met. What got worse is said first.

    `nearest` says that no candidate met the bar in the search, so that this one is the nearest; it is said where these
    readings break a limit too.
    """
    sentence = ", ".join(part for part in (_compared(_gains(readings), runtime), _loss(readings, metric)) if part)
    broken = any(limit.broken for limit in judged.limits.values())
    end = "; no recipe that was tried met it, this one came nearest" if nearest and broken else ""
    return sentence + (f": {judged}" if judged.limits else "") + end


def _compared(gains: Sequence[str], runtime: str) -> str:
    """ "8.9x smaller and 2.6x faster than the original in onnxruntime"; what is equal takes "as" instead of "than"."""
    links = ["as" if text.startswith("as ") else "than" for text in gains]
    if not gains:
        return f"measured in {runtime}"
    if len(set(links)) == 1:
        return f"{' and '.join(gains)} {links[0]} the original in {runtime}"
    return ", and ".join(f"{text} {link}" for text, link in zip(gains, links)) + f", the original in {runtime}"


def judge_bar(readings: Sequence[Reading], budget: Budget, metric: Metric, batch: int = 1) -> Judged:
    """Each limit of the bar against the readings. Latency is judged at batch size `batch` on one thread alone: a figure
    under other conditions says nothing about it.
    """
    found, points = {}, " points" if metric.unit == "%" else ""
    if (most := budget.max_drop) is not None:
        drop = _value(readings, "drop")
        found["drop"] = _limit(f"{most:g}", f"{points} lost", most, drop, lambda lost: f"{amount(lost, metric)} lost")
    if (most := budget.max_size) is not None:
        size = _value(readings, "file_bytes")
        found["size"] = _limit(f"{most:,}", " bytes", most, size, lambda count: f"{count:,.0f} bytes")
    if (most := budget.max_latency) is not None:
        at, own = f" ms (p50, batch {batch}, {THREADS} thread)", {"batch": batch, "threads": THREADS}
        time = find(list(readings), "compressed", "p50_ms", **own)
        found["latency"] = _limit(
            f"{most:g}", at, most, None if time is None else time.value, lambda ms: f"{ms:.3g}{at}"
        )
    return Judged(found)


def _limit(most: str, unit: str, bound: float, figure: float | None, show: Callable[[float], str]) -> Limit:
    if figure is None:
        return Limit(f"at most {most}{unit}", measured=False)
    over = figure > bound + 1e-9
    return Limit(f"at most {most}{unit}", True, f"{show(figure)} where at most {most} may be" if over else "")


def amount(value: float, metric: Metric) -> str:
    """A difference of the metric in words: "0.17 points of top1", "0.0032 of mse"."""
    if metric.unit == "%":
        return f"{value:.2f} points of {metric.name}"
    return f"{value:.3g}{' ' + metric.unit if metric.unit else ''} of {metric.name}"


def _gains(readings: Sequence[Reading]) -> list[str]:
    """Size and speed in words, what got worse first."""
    parts: list[tuple[bool, str]] = []
    if (before := _value(readings, "file_bytes", "original")) and (after := _value(readings, "file_bytes")):
        parts.append((after > before, ratio_words(before / after, "smaller", "larger", "as large")))
    if (speed := _speed(readings)) is not None:
        value, same, conditions = speed
        words = "as fast" if same else ratio_words(value, "faster", "slower", "as fast")
        parts.append((value < 1 and not same, f"{words} ({conditions})"))
    return [text for _, text in sorted(parts, key=lambda part: not part[0])]


def ratio_words(ratio: float, better: str, worse: str, equal: str) -> str:
    """ "2.6x faster", "1.3x slower", "as fast"."""
    shown = max(ratio, 1 / ratio)
    digits = 1 if shown >= 1.95 else 2
    if round(shown, 2) == 1:
        return equal
    return f"{shown:.{digits}f}x {better if ratio > 1 else worse}"


def _speed(readings: Sequence[Reading]) -> tuple[float, bool, str] | None:
    """The speed-up at the smallest batch on one thread, whether it is no difference, and its conditions in words."""
    before, after = _p50(readings, "original"), _p50(readings, "compressed")
    if before is None or after is None:
        return None
    batch, threads = after.conditions.get("batch", 1), after.conditions.get("threads", 1)
    paired = find(list(readings), "compressed", "speedup", batch=batch, threads=threads)
    value = paired.value if paired is not None else before.value / after.value
    same = paired is not None and paired.low is not None and paired.high is not None and paired.low <= 1 <= paired.high
    return value, same, f"p50, batch {batch}, {threads} thread{'' if threads == 1 else 's'}"


def slower(readings: Sequence[Reading]) -> str:
    """A warning if the compressed artifact is slower than the original beyond the noise; empty if not."""
    speed = _speed(readings)
    if speed is None or speed[0] >= 1 or speed[1]:
        return ""
    factor, conditions = 1 / speed[0], speed[2]
    return f"the compressed artifact is {factor:.2f}x slower than the original here ({conditions})"


def not_faster(stored: Mapping[str, str], evidence: Mapping[str, Any]) -> str:
    """A warning if weights that are stored small are computed with as floats, which is no faster; empty if none are."""
    small = [
        name for name in evidence.get("float_layers", []) if stored.get(name, "float").rstrip("0123456789") != "float"
    ]
    if not small:
        return ""
    forms = ", ".join(sorted({stored[name] for name in small}))
    return f"stored as {forms} but computed as floats, so smaller and no faster: {_named(small)}"


def idle_zeros(dense: Sequence[str], runtime: str) -> str:
    """A warning if zeros lie on the disk as any other number and are computed with; empty if there are none."""
    if not dense:
        return ""
    zeros = f"{runtime} stores the zeros of pruned weights as any other number and computes with them"
    return f"{zeros}, so they make nothing smaller or faster: {_named(dense)}"


def _named(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _p50(readings: Sequence[Reading], subject: str) -> Reading | None:
    found = [reading for reading in readings if reading.subject == subject and reading.name == "p50_ms"]
    return min(
        found,
        key=lambda reading: (reading.conditions.get("batch", 1), reading.conditions.get("threads", 1)),
        default=None,
    )


def _value(readings: Sequence[Reading], name: str, subject: str = "compressed") -> float | None:
    reading = find(list(readings), subject, name)
    return None if reading is None else reading.value


def _loss(readings: Sequence[Reading], metric: Metric) -> str:
    before, after = find(list(readings), "original", metric.name), find(list(readings), "compressed", metric.name)
    if before is None or after is None:
        return ""
    drop = metric.drop(before.value, after.value)
    unit = f" {metric.unit}" if metric.unit else ""
    shown = (
        f"{before.value:.2f} -> {after.value:.2f}" if metric.unit == "%" else f"{before.value:.4g} -> {after.value:.4g}"
    ) + unit
    counted = f", n={after.n:,}" if after.n else ""
    if drop == 0:
        return f"nothing lost ({metric.name} {shown}{counted})"
    return f"{amount(abs(drop), metric)} {'lost' if drop > 0 else 'gained'} ({shown}{counted})"
