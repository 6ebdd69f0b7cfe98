"""How dense each layer of a sparse network is: pure functions on shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, ...]


def uniform(shapes: Sequence[Size], density: float) -> list[float]:
    """Every layer keeps the same share of its weights."""
    return [density] * len(shapes)


def erdos_renyi_kernel(shapes: Sequence[Size], density: float) -> list[float]:
    """The share of weights that each layer keeps: in proportion to the sum of its dimensions over their product.

    `shapes` are those of the weights (outputs, inputs, kernel...); of linear layers that is the Erdos-Renyi allocation
    of Mocanu et al., arXiv:1707.04780, with the kernel that of Evci et al., arXiv:1911.11134. Layers that would keep
    more than all of their weights keep all, and the others share the rest, so that `density` of all weights stays.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes)]
    dense: set[int] = set()
    while True:
        rest = [place for place in range(len(shapes)) if place not in dense]
        left = density * sum(sizes) - sum(sizes[place] for place in dense)
        scale = left / sum(raw[place] * sizes[place] for place in rest) if rest else 0.0
        over = [place for place in rest if scale * raw[place] > 1]
        if not over:
            return [1.0 if place in dense else scale * raw[place] for place in range(len(shapes))]
        dense |= {place for place in over if raw[place] == max(raw[other] for other in over)}


def counts(shapes: Sequence[Size], densities: Sequence[float]) -> list[int]:
    """How many weights each layer keeps: at least one, at most all."""
    sizes = [math.prod(shape) for shape in shapes]
    return [min(size, max(1, round(density * size))) for size, density in zip(sizes, densities)]
