"""Which blocks to take away, so that enough is saved and little is lost: pure functions on numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def rank(losses: Mapping[str, float], saved: Mapping[str, float]) -> list[str]:
    """The blocks that save something, those first whose removal costs least loss per saved cost.

    Where the loss falls, what saves more counts for more as well. Ties are broken by the order of `losses`.
    """

    def price(name: str) -> float:
        loss, gain = losses[name], saved[name]
        return loss / gain if loss > 0 else loss * gain

    return sorted((name for name in losses if saved[name] > 0), key=price)


def give_back(order: Sequence[str], saved: Mapping[str, float], wanted: float) -> list[str]:
    """The shortest beginning of `order` that saves `wanted`, without those of it that are not needed for that.

    What is missed most, the last of the order, is given back first.
    """
    total, chosen = 0.0, []
    for name in order:
        if total >= wanted:
            break
        chosen.append(name)
        total += saved[name]
    for name in reversed(chosen.copy()):
        if total - saved[name] >= wanted:
            chosen.remove(name)
            total -= saved[name]
    return chosen
