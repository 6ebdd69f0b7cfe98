"""Residual blocks that are skipped while a network is trained: a skipped block is not computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Wrap = Callable[[Any], Any]  # a tensor -> what a block would give with it


def linear_decay(count: int, last: float) -> list[float]:
    """How often each of `count` residual blocks is skipped: in proportion to its place, the last one at `last`.

    Huang et al., arXiv:1603.09382, equation 4.
    """
    return [last * place / count for place in range(1, count + 1)]


def evenly(count: int, kept: int) -> list[int]:
    """Which `kept` of `count` blocks stay, spread evenly; half of them is every other, as in arXiv:1909.11556."""
    return [int((place + 0.5) * count / kept) for place in range(kept)]


@dataclass
class Draw:
    """Which blocks are skipped in the coming step: each by a chance of its own, `rates` by name, anew every step.

    `during` goes to `ctx.fit`; `drawn` counts how often each was skipped, of `steps`.
    """

    rates: Mapping[str, float]
    generator: torch.Generator
    skipped: set[str] = field(default_factory=set)
    drawn: dict[str, int] = field(default_factory=dict)
    steps: int = 0

    def during(self, _model: nn.Module, t: float) -> None:
        self.skipped.clear()
        if t < 1:
            chances = torch.rand(len(self.rates), generator=self.generator).tolist()
            self.skipped |= {name for (name, rate), chance in zip(self.rates.items(), chances) if chance < rate}
            self.drawn |= {name: self.drawn.get(name, 0) + 1 for name in self.skipped}
            self.steps += 1


def handed_on(given: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """What a skipped block gives: its first input."""
    return given[0] if given else next(iter(named.values()))


def wraps(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> dict[str, Wrap]:
    """How each of the named blocks gives its tensor, as seen when `run` runs the model: alone, or in a tuple or list
    with values that are no tensors. A block that gives several tensors is not among them: they cannot be had without
    computing it.
    """
    found: dict[str, Wrap] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _given: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found[name] = lambda x: x
            elif type(output) in (tuple, list) and not any(isinstance(rest, Tensor) for rest in output[1:]):
                found[name] = lambda x: type(output)([x, *output[1:]])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(look(name)) for name in names]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def skipping(model: nn.Module, blocks: Mapping[str, Wrap], skipped: set[str]) -> Iterator[None]:
    """Within this block, a module of `blocks` whose name is in `skipped` at that time hands its first input on at once,
    wrapped as it gives its own output.
    """
    modules = {name: model.get_submodule(name) for name in blocks}
    for name, module in modules.items():
        module.forward = _either(name, module.forward, blocks[name], skipped)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward  # the class's own is there again


def _either(name: str, compute: Callable[..., Any], wrap: Wrap, skipped: set[str]) -> Callable[..., Any]:
    def forward(*given: Any, **named: Any) -> Any:
        return wrap(handed_on(given, named)) if name in skipped else compute(*given, **named)

    return forward
