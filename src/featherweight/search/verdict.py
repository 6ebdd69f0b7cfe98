"""One plain sentence about what was gained and lost, from the readings alone. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.metric import Metric
from ..core.reading import Reading, find
from ..core.run import Budget


def verdict(readings: Sequence[Reading], budget: Budget, metric: Metric, runtime: str, nearest: bool = False) -> str:
    """The sentence: gains and losses against the original, then whether the bar is met. What got worse is said first.

    `nearest` says that no candidate met the bar in the search, so this one is the nearest.
    """
    sentence = ", ".join(part for part in (_compared(_gains(readings), runtime), _loss(readings, metric)) if part)
    judged = judgement(readings, budget, metric)
    end = "; no recipe that was tried met it, this one came nearest" if nearest and judged else ""
    return sentence + (f": {judged}" if judged else "") + end


def _compared(gains: Sequence[str], runtime: str) -> str:
    """ "8.9x smaller and 2.6x faster than the original in onnxruntime"; what is equal takes "as" instead of "than"."""
    links = ["as" if text.startswith("as ") else "than" for text in gains]
    if not gains:
        return f"measured in {runtime}"
    if len(set(links)) == 1:
        return f"{' and '.join(gains)} {links[0]} the original in {runtime}"
    return ", and ".join(f"{text} {link}" for text, link in zip(gains, links)) + f", the original in {runtime}"


def misses(readings: Sequence[Reading], budget: Budget, metric: Metric) -> dict[str, str]:
    """Which limits of the bar the readings break, and by what, in words; empty if all are met. Raises nothing: what
    was not read is not judged.
    """
    found = {}
    drop, size, latency = _drop(readings), _value(readings, "file_bytes"), _p50(readings, "compressed")
    if budget.max_drop is not None and drop is not None and drop.value > budget.max_drop + 1e-9:
        found["drop"] = f"{amount(drop.value, metric)} lost where at most {budget.max_drop:g} may be"
    if budget.max_size is not None and size is not None and size > budget.max_size:
        found["size"] = f"{size:,.0f} bytes where at most {budget.max_size:,} may be"
    if budget.max_latency is not None and latency is not None and latency.value > budget.max_latency:
        found["latency"] = f"{latency.value:.3g} ms where at most {budget.max_latency:g} may be"
    return found


def judgement(readings: Sequence[Reading], budget: Budget, metric: Metric) -> str:
    """Whether the bar is met, and what it is; empty where there is no bar."""
    bars = []
    if budget.max_drop is not None:
        bars.append(f"at most {budget.max_drop:g}{'' if metric.unit != '%' else ' points'} lost")
    if budget.max_size is not None:
        bars.append(f"at most {budget.max_size:,} bytes")
    if budget.max_latency is not None:
        bars.append(f"at most {budget.max_latency:g} ms")
    if not bars:
        return ""
    broken = misses(readings, budget, metric)
    return f"misses the bar ({'; '.join(broken.values())})" if broken else f"meets the bar of {', '.join(bars)}"


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


def _drop(readings: Sequence[Reading]) -> Reading | None:
    return find(list(readings), "compressed", "drop")


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
