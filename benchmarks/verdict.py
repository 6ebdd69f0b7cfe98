"""What a network's figures come to: our chosen file against the best of the others, won or lost. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from .record import CHOSEN, Figure, Network, Row

ORIGINAL = "float32 original"
OURS = "featherweight"


@dataclass(frozen=True)
class Duel:
    """Our chosen file against one of the others in one figure; `ahead` is positive (a ratio: above 1) in our favour."""

    what: str
    ours: float
    theirs: float
    rival: str
    ahead: Figure
    even: float  # what `ahead` is where both are equal

    @property
    def outcome(self) -> str:
        """Won or lost; "level" where the 95% interval of the difference holds no difference."""
        if self.ahead.low <= self.even <= self.ahead.high:
            return "level"
        return "won" if self.ahead.value > self.even else "lost"


def accuracy(row: Row) -> float:
    assert row.accuracy is not None
    return row.accuracy.value


def milliseconds(row: Row, batch: int) -> float:
    return next(timing.p50_ms.value for timing in row.timings if timing.batch == batch)


def speed(row: Row, batch: int) -> float:
    """How many times faster than the original, by round: steadier than milliseconds where the machine is busy."""
    return next(timing.faster.value for timing in row.timings if timing.batch == batch)


def bar(network: Network, max_drop: float) -> float:
    """What a contender may lose, in the metric's unit: `max_drop` percent of the original's figure."""
    return max_drop / 100 * abs(accuracy(network.rows[0]))


def made(network: Network) -> list[Row]:
    """The rows of all contenders that made a file."""
    return [row for row in network.rows if row.state == "done" and row.contender != ORIGINAL]


def keeping(network: Network, max_drop: float) -> list[Row]:
    """Those of `made` that lose no more than the bar."""
    limit = bar(network, max_drop)
    return [row for row in made(network) if row.drop is not None and row.drop.value <= limit]


def ours(network: Network) -> Row | None:
    """The row of our chosen file, if it was made."""
    return next((row for row in made(network) if row.contender == CHOSEN), None)


def duels(network: Network, max_drop: float) -> list[Duel]:
    """Accuracy against the most accurate of the others, latency at each batch size against the fastest that keeps the
    bar. Empty where our chosen file or all of the others are missing.
    """
    own, best = ours(network), max if network.higher_is_better else min
    others = [row for row in made(network) if row.package != OURS]
    if own is None or not others:
        return []
    rival = best(others, key=accuracy)
    assert rival.ahead is not None
    found = [Duel("accuracy", accuracy(own), accuracy(rival), rival.contender, rival.ahead, 0.0)]
    quick = [row for row in keeping(network, max_drop) if row.package != OURS]
    for batch in (timing.batch for timing in own.timings if quick):
        rival = max(quick, key=lambda row: speed(row, batch))
        ahead = next(timing.ahead for timing in rival.timings if timing.batch == batch)
        assert ahead is not None
        mine, theirs = milliseconds(own, batch), milliseconds(rival, batch)
        found.append(Duel(f"batch {batch}", mine, theirs, rival.contender, ahead, 1.0))
    return found


def slower_at(network: Network) -> list[int]:
    """The batch sizes at which our chosen file is no faster than the float32 original."""
    own = ours(network)
    return [timing.batch for timing in own.timings if timing.faster.value <= 1] if own else []


def verdict(network: Network, max_drop: float) -> str:
    """Won, level or lost against the best of the others, and whether float32 should ship instead."""
    own, found = ours(network), duels(network, max_drop)
    if own is None:
        return "no verdict: our chosen file was not made"
    lost = [duel.what for duel in found if duel.outcome == "lost"]
    won = [duel.what for duel in found if duel.outcome == "won"]
    if not found:
        text = "no verdict: none of the others made a file"
    elif lost:
        text = f"lost in {', '.join(lost)}" + (f"; won in {', '.join(won)}" if won else "")
    else:
        text = f"won in {', '.join(won)}" + ("; nothing lost" if len(won) < len(found) else "") if won else "level"
    slow = slower_at(network)
    over = own.drop is not None and own.drop.value > bar(network, max_drop)
    if over or len(slow) == len(own.timings):
        return f"float32 should ship ({'loses too much' if over else 'int8 is not faster'}); among int8: {text}"
    if slow:
        return f"{text}; at batch {', '.join(map(str, slow))} float32 should ship"
    return text
